"""`threefold run`: executes the stages of a run that are not fresh."""

import argparse
import signal
from typing import NoReturn

from basics import files, names, paths
from papertrail import scheduler
from papertrail.plan import dependents
from study import checks, stages
from study.cli.common import fail, say
from study.preset import load_preset, parse_overrides
from study.run import data_dir_of, open_run


def run(options: argparse.Namespace) -> int:
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
    checks.check(opened.preset, opened.data_dir)  # before anything is written
    scheduler.check(opened, selected)
    opened.create()
    if opened.data_dir:
        files.atomic_write(opened.path / ".data_dir", opened.data_dir + "\n")

    def terminate(number: int, _frame: object) -> NoReturn:
        raise scheduler.Interrupted(number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        done = scheduler.execute(
            opened, selected=selected, force=options.force, jobs=options.jobs, nproc=options.nproc, say=say
        )
    except scheduler.StageFailed as failure:
        return fail(str(failure), 1)
    except (KeyboardInterrupt, scheduler.Interrupted) as stopped:
        return fail("stopped; the same command resumes the run", 128 + getattr(stopped, "number", signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)
    say(
        f"run {opened.name}: {len(done.executed)} stages executed, {len(done.skipped)} fresh and skipped, "
        f"{done.seconds:.1f} s; `threefold report --run {opened.name}` renders it"
    )
    return 0
