"""The command line. Wrong input: one line on stderr and exit 2; a failed stage: exit 1; a signal: 128 + its number.

Each command imports what it needs when it runs, so that help and status do not wait for torch.
"""

import argparse
import contextlib
import errno
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from basics import files, names
from basics.errors import DISK_FULL, ConfigError, MissingInput, ThreefoldError

if TYPE_CHECKING:
    from study.run import Run

Action = Callable[[argparse.Namespace], int]
Option = tuple[tuple[str, ...], dict[str, Any]]  # arguments of argparse's `add_argument`

CHECKPOINTS = ("pretrain", "sft", "dpo", "gpt2", "distilgpt2")
# Errors of the operating system that the environment causes, not the program.
ENVIRONMENT = (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

_COMMANDS: dict[str, tuple[Action, str, tuple[Option | list[Option], ...]]] = {}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that ends with where to look."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from threefold import __version__

    top = Parser(prog="threefold", description="A small language model through three stages, compared and written up.")
    top.add_argument("--version", action="version", version=f"threefold {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (action, text, options) in _COMMANDS.items():
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(action=action)
        for entry in options:
            if isinstance(entry, list):  # options that exclude each other; `clean` needs one of its two
                group = made.add_mutually_exclusive_group(required=name == "clean")
                for flags, settings in entry:
                    group.add_argument(*flags, **settings)
            else:
                made.add_argument(*entry[0], **entry[1])
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `threefold`; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return options.action(options)
    except ThreefoldError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of our output has gone; the rest cannot be flushed
        return 1
    except OSError as error:
        if error.errno not in ENVIRONMENT:
            raise
        return _fail(f"{error.strerror}: {error.filename or 'the disk'}", 2)


def _fail(message: str, status: int) -> int:
    print(f"threefold: {message}", file=sys.stderr)
    return status


def _say(line: str) -> None:
    print(line, flush=True)


def _json(values: object) -> str:
    return json.dumps(values, indent=2, allow_nan=False)


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# Options ------------------------------------------------------------------------------------------------------------


def command(text: str, *options: Option | list[Option]) -> Callable[[Action], Action]:
    """Decorator: the function is the command of its name. A list holds options that exclude each other."""

    def enter(action: Action) -> Action:
        _COMMANDS[action.__name__.strip("_")] = (action, text, options)
        return action

    return enter


def option(*flags: str, **settings: Any) -> Option:
    return flags, settings


def whole_number(least: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers of at least `least` that 64 bits hold."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"-?\d{1,19}", text) else 2**63
        if not least <= value < 2**63:
            expected = "a whole number" if least < 0 else f"a whole number of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r:.40}: expected {expected}")
        return value

    return parse


RUN = option("--run", default="smoke", metavar="NAME", help="the run's name (default: smoke)")
DATA_DIR = option("--data-dir", default="", metavar="FOLDER", help="local data folder (default: as in the run)")
STAGE = option("--stage", default="dpo", choices=CHECKPOINTS, help="whose checkpoint (default: dpo)")
JSON = option("--json", action="store_true", help="for scripts")


def set_option(text: str) -> Option:
    return option("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


# Runs ---------------------------------------------------------------------------------------------------------------


def _open(name: str, data_dir: str = "", overrides: Mapping[str, Any] | None = None) -> "Run":
    """A run that exists, as it was last configured, or as it would be with these overrides."""
    from study.cli import disk
    from study.run import data_dir_of, open_run

    disk.folder(name)
    return open_run("", name, overrides or {}, data_dir_of(name, data_dir), create=False)


def _intact(name: str, data_dir: str = "") -> "Run":
    """The same, after reading every byte of its finished stages. CheckpointError or RecordError names the first file
    that changed since its stage wrote it; a missing file is reported by the command that needs it."""
    run = _open(name, data_dir)
    for stage in run.plan:
        if run.finished(stage) is not None:
            run.intact(stage, gone=True)
            run.check_notebook(stage)
    return run


@command(
    "execute the stages of a run that are not fresh",
    option("--preset", default="", help="a preset's name or .toml file (default: the run's own, else smoke)"),
    option("--run", default="", metavar="NAME", help="the run's name (default: the preset's)"),
    set_option("override a preset's key, as often as needed"),
    [
        option("--only", action="append", default=[], metavar="STAGE", help="only this stage; may be repeated"),
        option("--from", dest="start", default="", metavar="STAGE", help="this stage and all that follow from it"),
    ],
    option("--force", action="store_true", help="execute the chosen stages although they are fresh"),
    option("--data-dir", default="", metavar="FOLDER", help="local data folder (default: $THREEFOLD_DATA)"),
    option("--jobs", type=whole_number(1), default=0, metavar="N", help="notebooks at a time (default: 2 on a CPU)"),
    option("--nproc", type=whole_number(1), metavar="N", help="processes that train a stage (default: one a GPU)"),
)
def _run(options: argparse.Namespace) -> int:
    from basics import paths
    from papertrail import scheduler
    from papertrail.plan import dependents
    from study import stages
    from study.preset import load_preset, parse_overrides
    from study.run import data_dir_of, open_run

    overrides = parse_overrides(options.set)
    if options.run:
        names.check_name(options.run, "run")
    preset = options.preset
    if not preset and not (options.run and (paths.RUNS / options.run / "config.toml").is_file()):
        preset = "smoke"
    name = options.run or load_preset(preset, overrides).name
    data_dir = data_dir_of(name, options.data_dir)
    run = open_run(preset, options.run, overrides, data_dir, create=False)
    selected = None
    if options.only:
        selected = {stage for chosen in options.only for stage in stages.select(run.preset, chosen)}
    elif options.start:
        first = stages.select(run.preset, options.start)
        selected = set(first).union(*(dependents(run.plan, stage) for stage in first))
    scheduler.check(run, selected)  # before anything is written
    run.create()
    if run.data_dir:
        files.atomic_write(run.path / ".data_dir", run.data_dir + "\n")

    def terminate(number: int, _frame: object) -> NoReturn:
        raise scheduler.Interrupted(number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        done = scheduler.execute(
            run, selected=selected, force=options.force, jobs=options.jobs, nproc=options.nproc, say=_say
        )
    except scheduler.StageFailed as failure:
        return _fail(str(failure), 1)
    except (KeyboardInterrupt, scheduler.Interrupted) as stopped:
        return _fail("stopped; the same command resumes the run", 128 + getattr(stopped, "number", signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)
    _say(
        f"run {run.name}: {len(done.executed)} stages executed, {len(done.skipped)} fresh and skipped, "
        f"{done.seconds:.1f} s; `threefold report --run {run.name}` renders it"
    )
    return 0


@command(
    "train one stage: alone, or as a worker that torchrun started",
    option("stage", metavar="STAGE", help="pretrain, gpt2, distilgpt2, sft, dpo or a replicate of one"),
    RUN,
    DATA_DIR,
    # the notebook that started this worker has begun the stage, and the worker is to end with it
    option("--begun", action="store_true", help=argparse.SUPPRESS),
)
def _train(options: argparse.Namespace) -> int:
    from study.cli import train

    return train.work(_open(options.run, options.data_dir), options.stage, begun=options.begun, say=_say)


@command(
    "say which stages are fresh, stale, missing or failed, and why",
    option("--run", default="", metavar="NAME", help="the run's name (default: all runs, with their sizes)"),
    set_option("with --run: as if `run` had this override; changes nothing"),
    DATA_DIR,
    JSON,
)
def _status(options: argparse.Namespace) -> int:
    from study.cli import status
    from study.preset import parse_overrides

    if options.set and not options.run:
        raise ConfigError("status: --set goes with --run")
    if options.run:
        run = _open(options.run, options.data_dir, parse_overrides(options.set))
        values, as_text = status.of_run(run), status.run_text
    else:
        values, as_text = status.of_all(lambda name: _open(name, options.data_dir)), status.all_text
    _say(_json(values) if options.json else as_text(values))
    return 0


@command(
    "read again all that a run read and wrote, and derive its report's numbers again",
    RUN,
    option("--rerun", default="", metavar="STAGE", help="instead repeat this stage elsewhere and compare bit for bit"),
    JSON,
)
def _verify(options: argparse.Namespace) -> int:
    from basics import paths
    from papertrail import report, rerun, scheduler
    from papertrail.verify import verify
    from study.cli.disk import cache_notes

    run = _open(options.run)
    say = (lambda line: None) if options.json else _say
    try:
        if options.rerun:
            count, problems = len(run.require(options.rerun)["outputs"]), rerun.rerun(run, options.rerun, say)
            kept = f"stage {options.rerun} came out the same, times apart"
        else:
            count, problems = verify(run, say, cache_notes())
            problems = problems or report.rendered(run.path, paths.REPORT)  # reads the notebooks just verified
            kept = f"{count} files are what their run.json says"
    except scheduler.StageFailed as failure:
        return _fail(str(failure), 1)
    if options.json:
        entries = [dict(zip(("path", "problem"), line.split(": ", 1), strict=True)) for line in problems]
        _say(_json({"run": run.name, "files": count, "problems": entries}))
        return 1 if problems else 0
    for problem in problems:
        _fail(f"{run.name}/{problem}", 1)
    if problems:
        return 1
    print(f"run {run.name}: {kept}")
    return 0


@command(
    "put the headline figures and presets of two or more runs side by side",
    option("runs", nargs="+", metavar="RUN"),
    JSON,
)
def _compare(options: argparse.Namespace) -> int:
    from study.cli import compare

    twice = next((name for name in options.runs if options.runs.count(name) > 1), None)
    if twice or len(options.runs) < 2:
        raise ConfigError(f"compare: run {twice} is named twice" if twice else "compare: name two runs or more")
    runs = [_intact(name) for name in options.runs]
    text = _json(compare.as_json(runs)) if options.json else compare.side_by_side(runs)
    for run in runs:
        _warn_if_behind(run, f"the figures of run {run.name} show")
    _say(text)
    return 0


def _warn_if_behind(run: "Run", what: str) -> None:
    from papertrail.staleness import survey

    behind = [name for name, state in survey(run).items() if state.kind != "fresh"]
    if behind:
        print(
            f"threefold: {what} an earlier state of {', '.join(behind)}: `threefold status --run {run.name}`",
            file=sys.stderr,
        )


@command("write a run's training metrics as TensorBoard event files", RUN)
def _tensorboard(options: argparse.Namespace) -> int:
    from study.cli import curves

    out = _from_here(curves.to_tensorboard(_intact(options.run), curves.summary_writer()))
    print(f"`tensorboard --logdir {out}` shows the training of run {options.run}")
    return 0


@command("write a run's training metrics as offline runs of Weights & Biases", RUN)
def _wandb(options: argparse.Namespace) -> int:
    from study.cli import curves

    out = _from_here(curves.to_wandb(_intact(options.run), curves.wandb_client()))
    print(f"`wandb sync {out}/offline-run-*` uploads the training of run {options.run}; nothing was sent yet")
    return 0


@command(
    "remove a run, what can be made again in it, or the cache",
    [
        option("--run", default="", metavar="NAME", help="the run to remove"),
        option("--cache", action="store_true", help="remove tokens and hashes kept between runs"),
    ],
    option(
        "--keep-results",
        action="store_true",
        help="of the run only its rendered report, exported curves, failed notebooks and interrupted stages",
    ),
    option("--yes", action="store_true", help="remove without asking"),
)
def _clean(options: argparse.Namespace) -> int:
    from papertrail import scheduler
    from study.cli import disk

    if options.cache and options.keep_results:
        raise ConfigError("--keep-results is about a run; the cache holds no results")
    home = None if options.cache else disk.removable(options.run)
    with scheduler.lock(home) if home else contextlib.nullcontext():
        listed = disk.leftovers if options.keep_results else disk.whole
        doomed = listed(options.run) if home else disk.cache()
        sizes = {path: disk.size(path) for path in doomed}
        for path, count in sizes.items():
            _say(f"{disk.size_text(count):>8}  {_from_here(path)}")
        _say(f"{disk.size_text(sum(sizes.values()))} to free" if doomed else "nothing to remove")
        if doomed and not options.yes:
            if not sys.stdin.isatty():
                raise ConfigError("nothing was removed: --yes removes it without asking")
            if not _agreed():
                return 0
        disk.remove(doomed)
    if home and not options.keep_results:
        home.rmdir()
    return 0


def _agreed() -> bool:
    try:
        return input("Remove? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


@command(
    "render a run's report",
    RUN,
    DATA_DIR,
    [
        option("--publish", action="store_true", help="make the run the published one in report/, render nothing"),
        option("--check", action="store_true", help="only check that the published report/ holds together"),
    ],
)
def _report(options: argparse.Namespace) -> int:
    from basics import paths
    from papertrail import report

    if options.check:
        report.require(paths.REPORT)
        print("report/: everything it embeds, quotes and cites is there")
        return 0
    run = _intact(options.run, options.data_dir)
    if run.finished("compare") is not None:
        _warn_if_behind(run, "the report shows")
    if options.publish:
        published = report.publish(run.path, paths.REPORT)
        print(f"report/executed: {len(published)} notebooks of run {run.name}")
        return 0
    page = report.render(run.path, paths.REPORT, say=_say)
    print(_from_here(page))
    return 0


# Checkpoints --------------------------------------------------------------------------------------------------------


def _checkpoint(options: argparse.Namespace) -> Path:
    """The folder of a stage's finished checkpoint, if its files are those the stage wrote."""
    run = _open(options.run)
    if "model.safetensors" not in run.require(options.stage)["outputs"]:
        raise MissingInput(f"stage {options.stage} of run {run.name} holds no checkpoint")
    return run.intact(options.stage)


@command(
    "continue a prompt with a stage's checkpoint",
    option("prompt", metavar="PROMPT"),
    RUN,
    STAGE,
    option("--max-new-tokens", type=whole_number(1), metavar="N", help="default: 64; with --stream: until Ctrl-C"),
    option("--temperature", type=float, default=0.0, help="0 (default): greedy"),
    option("--top-k", type=whole_number(-(2**63)), default=-1, metavar="K", help="-1: off"),
    option("--top-p", type=float, default=1.0, metavar="P"),
    option("--seed", type=whole_number(0), default=0, help="of the sampling (default: 0)"),
    option(
        "--stream",
        action="store_true",
        help="print as it comes, past the context and without an end: memory stays constant",
    ),
    option(
        "--window",
        type=whole_number(1),
        metavar="W",
        help="with --stream: recent tokens it sees beside the sinks (default: as many as the context leaves)",
    ),
    option("--stop-at-eos", action="store_true", help="with --stream: the end-of-text token may be drawn and ends it"),
)
def _generate(options: argparse.Namespace) -> int:
    if not options.stream and (options.window or options.stop_at_eos):
        raise ConfigError(f"{'--window' if options.window else '--stop-at-eos'} goes with --stream")
    folder = _checkpoint(options)
    if any("\ud800" <= char <= "\udfff" for char in options.prompt):
        raise ConfigError("the prompt is not UTF-8: the shell handed over bytes that are no text")
    from study.cli import generation

    return generation.generate(options, folder)


@command(
    "copy a stage's checkpoint as a Hugging Face folder",
    option("out", metavar="OUT", type=Path, help="a folder that does not exist yet"),
    RUN,
    STAGE,
)
def _export(options: argparse.Namespace) -> int:
    folder = _checkpoint(options)
    from transformers.utils import logging

    from threefold.model import export

    logging.disable_progress_bar()
    kind = export(folder, options.out)
    print(
        f"{options.out}: stage {options.stage} of run {options.run} as {kind}, its logits checked against transformers'"
    )
    return 0


@command("print the shell's completion script", option("shell", choices=("bash", "zsh")))
def _completion(options: argparse.Namespace) -> int:
    from study.cli.completion import script

    print(script(parser(), options.shell))
    return 0
