"""`threefold verify` and `threefold report`."""

import argparse

from basics import paths
from basics.errors import MissingInput
from papertrail import preregistration, scheduler
from papertrail import report as papertrail_report
from papertrail import verify as verification
from study.cli import folders
from study.cli.common import fail, from_here, open_intact, say, say_json, warn_if_behind
from study.existing import open_existing
from study.run import project


def verify(options: argparse.Namespace) -> int:
    run = open_existing(options.run)
    progress = (lambda line: None) if options.json else say
    try:
        if options.rerun:
            problems = verification.rerun(run, options.rerun, progress)
            count = len(run.require(options.rerun)["outputs"])
            kept = f"stage {options.rerun} came out the same, times apart"
        else:
            count, problems = verification.verify(run, progress, folders.cache_notes())
            # reads the notebooks just verified
            problems = problems or papertrail_report.rendered(run.path, paths.REPORT)
            kept = f"{count} files are what their run.json says"
    except scheduler.StageFailed as failure:
        return fail(str(failure), 1)
    if options.json:
        entries = [dict(zip(("path", "problem"), line.split(": ", 1), strict=True)) for line in problems]
        say_json({"run": run.name, "files": count, "problems": entries})
    else:
        for problem in problems:
            fail(f"{run.name}/{problem}", 1)
        if not problems:
            say(f"run {run.name}: {kept}")
    return 1 if problems else 0


def report(options: argparse.Namespace) -> int:
    if options.check:
        papertrail_report.require(paths.REPORT)
        say(preregistration.require(preregistration.of_notebooks(project(), paths.REPORT / "executed")))
        say("report/: everything it embeds, quotes and cites is there")
        return 0
    run = open_intact(options.run, options.data_dir)
    if run.finished("compare") is None:
        raise MissingInput(
            f"run {run.name} has no comparison yet: `threefold run --run {run.name}` makes it, with --only compare of "
            "the finished stages alone"
        )
    warn_if_behind(run, "the report shows")
    say(preregistration.require(preregistration.of_notebooks(run.project, run.path / "notebooks")))
    if options.publish:
        published = papertrail_report.publish(run.path, paths.REPORT)
        say(f"report/executed: {len(published)} notebooks of run {run.name}")
    else:
        say(str(from_here(papertrail_report.render(run.path, paths.REPORT, say=say))))
    return 0
