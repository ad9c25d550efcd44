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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from basics import files, names
from basics.errors import DISK_FULL, ConfigError, MissingInput, ThreefoldError
from study.preset import load_preset, parse_overrides

if TYPE_CHECKING:
    from papertrail.run import Run

CHECKPOINTS = ("pretrain", "sft", "dpo", "gpt2", "distilgpt2")
# What the environment, the disk or the rights of a person cause, and no fault of the program.
SURROUNDINGS = (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class Parser(argparse.ArgumentParser):
    """argparse, with an error in one line that ends in the way out."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from threefold import __version__

    top = Parser(prog="threefold", description="A small language model through three stages, compared and written up.")
    top.add_argument("--version", action="version", version=f"threefold {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, action: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        made.set_defaults(action=action)
        return made

    run = command("run", _run, "execute the stages of a run that are not fresh")
    run.add_argument("--preset", default="", help="a preset's name or .toml file (default: the run's own, else smoke)")
    run.add_argument("--run", default="", metavar="NAME", help="the run's name (default: the preset's)")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a preset's key, as often as needed"
    )
    chosen = run.add_mutually_exclusive_group()
    chosen.add_argument("--only", action="append", default=[], metavar="STAGE", help="only this stage; may be repeated")
    chosen.add_argument(
        "--from", dest="start", default="", metavar="STAGE", help="this stage and all that follow from it"
    )
    run.add_argument("--force", action="store_true", help="execute the chosen stages although they are fresh")
    run.add_argument("--data-dir", default="", metavar="FOLDER", help="local data folder (default: $THREEFOLD_DATA)")
    run.add_argument(
        "--jobs", type=_positive, default=0, metavar="N", help="notebooks side by side (default: 2 on a CPU)"
    )

    run.add_argument(
        "--nproc", type=_positive, metavar="N", help="processes that train a stage together (default: one a GPU)"
    )

    train = command("train", _train, "train one stage: alone, or as a worker that torchrun started")
    train.add_argument("stage", metavar="STAGE", help="pretrain, gpt2, distilgpt2, sft, dpo or a replicate of one")
    train.add_argument("--run", default="smoke", metavar="NAME", help="the run's name (default: smoke)")
    train.add_argument("--data-dir", default="", metavar="FOLDER", help="local data folder (default: as in the run)")
    # the notebook that started this worker has begun the stage, and the worker is to end with it
    train.add_argument("--begun", action="store_true", help=argparse.SUPPRESS)

    status = command("status", _status, "say which stages are fresh, stale, missing or failed, and why")
    status.add_argument(
        "--run", default="", metavar="NAME", help="the run's name (default: all runs, with their sizes)"
    )
    status.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --run: as if `run` were told so; no change",
    )
    status.add_argument("--data-dir", default="", metavar="FOLDER", help="local data folder (default: as in the run)")
    status.add_argument("--json", action="store_true", help="for scripts")

    verify = command(
        "verify", _verify, "read again all that a run read and wrote, and derive its report's numbers again"
    )
    verify.add_argument("--run", default="smoke", metavar="NAME", help="the run's name (default: smoke)")
    verify.add_argument(
        "--rerun", default="", metavar="STAGE", help="instead make this stage again elsewhere and compare bit for bit"
    )
    verify.add_argument("--json", action="store_true", help="for scripts")

    compare = command("compare", _compare, "put the headline figures and presets of two or more runs side by side")
    compare.add_argument("runs", nargs="+", metavar="RUN")
    compare.add_argument("--json", action="store_true", help="for scripts")

    board = command("tensorboard", _tensorboard, "write a run's training metrics as TensorBoard event files")
    board.add_argument("--run", default="smoke", metavar="NAME", help="the run's name (default: smoke)")

    offline = command("wandb", _wandb, "write a run's training metrics as offline runs of Weights & Biases")
    offline.add_argument("--run", default="smoke", metavar="NAME", help="the run's name (default: smoke)")

    clean = command("clean", _clean, "remove a run, what can be made again in it, or the cache")
    target = clean.add_mutually_exclusive_group(required=True)
    target.add_argument("--run", default="", metavar="NAME", help="the run to remove")
    target.add_argument("--cache", action="store_true", help="remove tokens and hashes kept between runs")
    clean.add_argument(
        "--keep-results",
        action="store_true",
        help="of the run only its rendered report, exported curves, failed notebooks and interrupted stages",
    )
    clean.add_argument("--yes", action="store_true", help="remove without asking")

    report = command("report", _report, "render a run's report")
    report.add_argument("--run", default="smoke", metavar="NAME", help="the run's name (default: smoke)")
    report.add_argument("--data-dir", default="", metavar="FOLDER", help="local data folder (default: as in the run)")
    mode = report.add_mutually_exclusive_group()
    mode.add_argument(
        "--publish", action="store_true", help="make the run the published one in report/, render nothing"
    )
    mode.add_argument("--check", action="store_true", help="only check that the published report/ holds together")

    generate = command("generate", _generate, "continue a prompt with a stage's checkpoint")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--run", default="smoke", metavar="NAME", help="the run's name (default: smoke)")
    generate.add_argument("--stage", default="dpo", choices=CHECKPOINTS, help="whose checkpoint (default: dpo)")
    generate.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", help="default: 64; with --stream: until Ctrl-C"
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    generate.add_argument("--top-k", type=_whole, default=-1, metavar="K", help="-1: off")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument("--seed", type=_seed, default=0, help="of the sampling (default: 0)")
    generate.add_argument(
        "--stream",
        action="store_true",
        help="print as it comes, past the context and without an end: memory stays constant",
    )
    generate.add_argument(
        "--window",
        type=_positive,
        metavar="W",
        help="with --stream: recent tokens it sees beside the sinks (default: as many as the context leaves)",
    )
    generate.add_argument(
        "--stop-at-eos", action="store_true", help="with --stream: let the end-of-text token be drawn, and end there"
    )

    export = command("export", _export, "copy a stage's checkpoint as a Hugging Face folder")
    export.add_argument("out", metavar="OUT", type=Path, help="a folder that does not exist yet")
    export.add_argument("--run", default="smoke", metavar="NAME", help="the run's name (default: smoke)")
    export.add_argument("--stage", default="dpo", choices=CHECKPOINTS, help="whose checkpoint (default: dpo)")

    completion = command("completion", _completion, "print the shell's completion script")
    completion.add_argument("shell", choices=("bash", "zsh"))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `threefold`; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return options.action(options)
    except ThreefoldError as error:
        print(f"threefold: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("threefold: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read our output has left; nor can the rest be flushed
        return 1
    except OSError as error:
        if error.errno not in SURROUNDINGS:
            raise
        print(f"threefold: {error.strerror}: {error.filename or 'the disk'}", file=sys.stderr)
        return 2


def _whole(text: str) -> int:
    """A whole number that 64 bits hold."""
    if not re.fullmatch(r"-?\d{1,19}", text) or not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r:.40}: expected a whole number")
    return int(text)


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return value


def _seed(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 0")
    return value


def _say(line: str) -> None:
    print(line, flush=True)


# Runs ---------------------------------------------------------------------------------------------------------------


def _open(name: str, data_dir: str = "", overrides: Sequence[str] = ()):
    """A run that exists, as it was last configured, or as it would be with these overrides."""
    from papertrail.run import Run, data_dir_of
    from study.cli import disk

    disk.folder(name)
    return Run.open("", name, overrides, data_dir_of(name, data_dir), create=False)


def _intact(name: str, data_dir: str = ""):
    """The same, after every byte of its finished stages was read. CheckpointError or RecordError names the first file
    that changed since its stage wrote it; what was taken away is for the command to miss."""
    from study import stages

    run = _open(name, data_dir)
    for stage in stages.steps(run.preset):
        if run.finished(stage) is not None:
            run.intact(stage, gone=True)
            run.check_notebook(stage)
    return run


def _run(options: argparse.Namespace) -> int:
    from basics import paths
    from papertrail import scheduler as executor
    from papertrail.run import Run, data_dir_of
    from study import stages

    overrides = parse_overrides(options.set)
    if options.run:
        names.check_name(options.run, "run")
    preset = options.preset
    if not preset and not (options.run and (paths.RUNS / options.run / "config.toml").is_file()):
        preset = "smoke"
    name = options.run or load_preset(preset, overrides).name
    arguments = {"preset": preset, "run": options.run, "overrides": overrides}
    given = data_dir_of(name, options.data_dir)
    look = Run.open(**arguments, data_dir=given, create=False)
    selected = None
    if options.only:
        selected = {stage for chosen in options.only for stage in stages.select(look.preset, chosen)}
    elif options.start:
        first = stages.select(look.preset, options.start)
        plan = stages.steps(look.preset)
        selected = set(first).union(*(stages.dependents(plan, stage) for stage in first))
    executor.check(look, selected)  # before anything is written
    run = Run.open(**arguments, data_dir=given)
    if run.data_dir:
        files.atomic_write(run.path / ".data_dir", run.data_dir + "\n")

    def terminate(number: int, _frame) -> NoReturn:
        raise executor.Interrupted(number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        done = executor.execute(
            run, selected=selected, force=options.force, jobs=options.jobs, nproc=options.nproc, say=_say
        )
    except executor.StageFailed as failure:
        print(f"threefold: {failure}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, executor.Interrupted) as stopped:
        number = getattr(stopped, "number", signal.SIGINT)
        print("threefold: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + number
    finally:
        signal.signal(signal.SIGTERM, before)
    _say(
        f"run {run.name}: {len(done.executed)} stages executed, {len(done.skipped)} fresh and skipped, "
        f"{done.seconds:.1f} s; `threefold report --run {run.name}` renders it"
    )
    return 0


def _train(options: argparse.Namespace) -> int:
    from study.cli import train

    return train.work(_open(options.run, options.data_dir), options.stage, begun=options.begun, say=_say)


def _status(options: argparse.Namespace) -> int:
    from study.cli import status

    if options.set and not options.run:
        raise ConfigError("status: --set goes with --run")
    if options.run:
        run = _open(options.run, options.data_dir, options.set)
        states = status.of_run(run)
        _say(_json(status.stages_json(run, states)) if options.json else status.stages_text(run, states))
    else:
        found = status.of_all(lambda name: _open(name, options.data_dir))
        _say(_json(found) if options.json else status.all_text(found))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from basics import paths
    from papertrail import report, rerun
    from papertrail import scheduler as executor
    from papertrail.verify import verify

    run = _open(options.run)
    say = (lambda line: None) if options.json else _say
    try:
        if options.rerun:
            files, problems = len(run.require(options.rerun)["outputs"]), rerun.rerun(run, options.rerun, say)
            kept = f"stage {options.rerun} came out the same, times apart"
        else:
            files, problems = verify(run, say)
            problems = problems or report.rendered(
                run.path, paths.REPORT
            )  # which reads the notebooks that were just found whole
            kept = f"{files} files are what their run.json says"
    except executor.StageFailed as failure:
        print(f"threefold: {failure}", file=sys.stderr)
        return 1
    if options.json:
        told = [dict(zip(("path", "problem"), line.split(": ", 1), strict=True)) for line in problems]
        _say(_json({"run": run.name, "files": files, "problems": told}))
        return 1 if problems else 0
    for problem in problems:
        print(f"threefold: {run.name}/{problem}", file=sys.stderr)
    if problems:
        return 1
    print(f"run {run.name}: {kept}")
    return 0


def _json(values: object) -> str:
    return json.dumps(values, indent=2, allow_nan=False)


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


def _tensorboard(options: argparse.Namespace) -> int:
    from study.cli import tensorboard

    out = tensorboard.export(_intact(options.run), tensorboard.summary_writer())
    print(f"`tensorboard --logdir {_from_here(out)}` shows the training of run {options.run}")
    return 0


def _wandb(options: argparse.Namespace) -> int:
    from study.cli import wandb

    out = wandb.export(_intact(options.run), wandb.client())
    print(
        f"`wandb sync {_from_here(out)}/offline-run-*` uploads the training of run {options.run}; nothing was sent yet"
    )
    return 0


def _clean(options: argparse.Namespace) -> int:
    from papertrail import scheduler as executor
    from study.cli import disk

    if options.cache and options.keep_results:
        raise ConfigError("--keep-results is about a run; the cache holds no results")
    home = None if options.cache else disk.removable(options.run)
    with executor.lock(home) if home else contextlib.nullcontext():
        find = disk.leftovers if options.keep_results else disk.whole
        found = find(options.run) if home else disk.cache()
        sizes = {path: disk.size(path) for path in found}
        for path, count in sizes.items():
            _say(f"{disk.size_text(count):>8}  {_from_here(path)}")
        _say(f"{disk.size_text(sum(sizes.values()))} to free" if found else "nothing to remove")
        if found and not options.yes:
            if not sys.stdin.isatty():
                raise ConfigError("nothing was removed: --yes removes it without asking")
            if not _agreed():
                return 0
        disk.remove(found)
    if home and not options.keep_results:
        home.rmdir()
    return 0


def _agreed() -> bool:
    try:
        return input("Remove? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


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


def _generate(options: argparse.Namespace) -> int:
    if not options.stream and (options.window or options.stop_at_eos):
        raise ConfigError(f"{'--window' if options.window else '--stop-at-eos'} goes with --stream")
    folder = _checkpoint(options)
    if any("\ud800" <= char <= "\udfff" for char in options.prompt):
        raise ConfigError("the prompt is not UTF-8: the shell handed over bytes that are no text")
    from study.cli import generation

    return generation.generate(options, folder)


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


# The shell ----------------------------------------------------------------------------------------------------------


def _completion(options: argparse.Namespace) -> int:
    from study.cli.completion import script

    print(script(parser(), options.shell))
    return 0
