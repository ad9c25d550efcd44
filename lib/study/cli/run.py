"""`threefold run` executes the stages of a run that are not fresh, `threefold doctor` checks this machine for them;
`threefold new` writes a preset for own data."""

import argparse
import json
import signal
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError, safe_open

from basics import files, machine, names, paths
from basics.processes import handling
from papertrail import scheduler
from papertrail.plan import dependents
from papertrail.run import intact_run_file
from study import doctor as checkup
from study import new as studies
from study import stages
from study.cli.common import fail, say
from study.preset import TRAINED, kind_and_model, load_preset, parse_overrides
from study.run import Run, data_dir_of, open_run


def new(options: argparse.Namespace) -> int:
    own = (options.text, options.instructions, options.preferences, options.model)
    say("\n".join(studies.create(options.study, *own)))
    return 0


def opened_for(options: argparse.Namespace) -> tuple[Run, set[str] | None]:
    """The run that --preset, --run and --set describe, and the stages that --only or --from select (None: all)."""
    if options.device == "cpu":
        machine.hide_gpus()
    overrides = parse_overrides(options.set)
    if options.run:
        names.check_name(options.run, "run")
    preset = options.preset
    if not preset and not (options.run and (paths.RUNS / options.run / "config.toml").is_file()):
        preset = "smoke"
    name = options.run or load_preset(preset, overrides).name
    opened = open_run(preset, options.run, overrides, data_dir_of(name, options.data_dir), create=False)
    selected = None
    if options.only:
        selected = {stage for chosen in options.only for stage in stages.select(opened.preset, chosen)}
    elif options.start:
        first = stages.select(opened.preset, options.start)
        selected = set(first).union(*(dependents(opened.plan, stage) for stage in first))
    return opened, selected


def doctor(options: argparse.Namespace) -> int:
    """Writes nothing; exit status 1 if something would stop the run."""
    marks = set()
    for mark, check, found in checkup.rows(*opened_for(options)):
        say(f"{mark:<5}{check:<10}{found}")
        marks.add(mark)
    return int("stop" in marks)


def run(options: argparse.Namespace) -> int:
    opened, selected = opened_for(options)
    checkup.check(opened, selected, say)  # before anything is written
    scheduler.check(opened, selected)
    opened.create()
    if opened.data_dir:
        files.atomic_write(opened.path / ".data_dir", opened.data_dir + "\n")

    def terminate(number: int, _frame: object) -> NoReturn:
        raise scheduler.Interrupted(number)

    try:
        with handling(terminate, "SIGTERM"):
            done = scheduler.execute(
                opened, selected=selected, force=options.force, jobs=options.jobs, nproc=options.nproc, say=say
            )
    except scheduler.StageFailed as failure:
        return fail(str(failure), 1)
    except (KeyboardInterrupt, scheduler.Interrupted) as stopped:
        number = getattr(stopped, "number", signal.SIGINT)
        return fail(f"stopped; the same command resumes the run{_resumed(opened)}", 128 + number)
    say(
        f"run {opened.name}: {len(done.executed)} stages executed, {len(done.skipped)} fresh and skipped, "
        f"{done.seconds:.1f} s; `threefold report --run {opened.name}` renders it"
    )
    return 0


def _resumed(run: Run) -> str:
    """Where each interrupted training begins again. What its work folder holds counts if the stage's fingerprint is
    still the same."""
    places = []
    for stage in run.plan:
        folder, (kind, model) = run.partial_folder(stage), kind_and_model(names.replicate_of(stage)[0])
        if model not in TRAINED or kind == "evaluate" or not folder.is_dir():
            continue
        begun = intact_run_file(folder)
        same = begun is not None and begun["fingerprint"].get("digest") == run.fingerprint(stage).digest
        if same and (folder / "training.json").is_file():
            places.append(f"{stage} is trained")
            continue
        trial = 1 + (len(list(folder.glob("trial-*.json"))) if same else 0)
        work, of_trial = (folder / f"trial-{trial}", f" of trial {trial}") if kind == "tune" else (folder, "")
        places.append(f"{stage} from step {1 + (saved_step(work) if same else 0)}{of_trial}")
    return f": {', '.join(places)}" if places else ""


def saved_step(folder: Path) -> int:
    """How many steps the resumable state of a training in a work folder has taken, 0 where there is none."""
    try:
        with safe_open(folder / "resume.safetensors", framework="numpy") as file:
            (content,) = file.metadata().values()
            return json.loads(content)["state"]["step"]
    except (FileNotFoundError, SafetensorError):
        return 0
