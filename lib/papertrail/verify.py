"""`threefold verify`: compare every byte with what run.json says was read and written, and derive the summary again."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from basics import files
from basics.errors import RecordError, SourceError
from papertrail.provenance import Fingerprint
from papertrail.rerun import rerun
from papertrail.run import CONFIG, RUN_FILE, Run, damage


def verify(
    run: Run, say: Callable[[str], None] = lambda line: None, notes: Iterable[Path] = ()
) -> tuple[int, list[str]]:
    """(number of files read, one line per problem). A stage of which nothing was made is no problem.

    Checked: run.json's and the fingerprint's own hashes, the data the stage was made from, each output's hash, that
    there is no other output, that the stage was made from what its parents now hold, the executed notebook's bytes and
    its record against run.json, that there is no other notebook, and the notes (JSON files with their hash, see
    `basics.files`) of a cache. Where all of that holds, the summary stage is made again from the records: every table
    and variable of the report must come out the same.
    """
    problems = [f"{CONFIG}: {problem}"] if (problem := run.config_problem()) else []
    problems += [f"notebooks/{name}: of no stage of the run's preset" for name in run.stray_notebooks()]
    count = 0
    finished: set[str] = set()
    unreadable: set[str] = set()
    reread: dict[str, str] = {}
    for stage, spec in run.plan.items():
        notebook = run.notebook(spec.executed)
        shown = f"notebooks/{notebook.name}"
        try:
            if (facts := run.finished(stage)) is None:
                left = run.stage_folder(stage).exists()
                problems += [f"{spec.folder}: has no {RUN_FILE}, which says what the stage wrote"] if left else []
                problems += (
                    [f"{shown}: has no {spec.folder}/{RUN_FILE} that vouches for it"] if notebook.exists() else []
                )
                continue
            fingerprint = Fingerprint.from_dict(facts["fingerprint"])
        except RecordError as error:
            problems.append(f"{spec.folder}: {error}")
            unreadable.add(stage)
            continue
        count += len(facts["outputs"]) + 2  # run.json and the notebook
        finished.add(stage)
        problems += [f"{spec.folder}/{path}: {problem}" for path, problem in damage(run.stage_folder(stage), facts)]
        for parent, digest in fingerprint.parents.items():
            if parent not in finished | unreadable:
                problems.append(f"{spec.folder}: made from stage {parent}, which is not there")
            elif parent in finished and stage != run.project.summary and digest != run.taken_from(parent, stage):
                problems.append(f"{spec.folder}: made from another {parent} than the one that is there")
        problems += _data_problems(run, stage, fingerprint, reread)
        try:
            problem = run.notebook_problem(stage)
        except RecordError as error:
            problem = str(error)
        problems += [f"{shown}: {problem}"] if problem else []
    for note in notes:
        count += 1
        for file in files.damaged(note):
            shown = Path(os.path.relpath(file, run.path)).as_posix()
            problems.append(f"{shown}: not as it was written; it is made again when it is next used")
    summary = run.project.summary
    if not problems and summary in finished:
        problems = [f"notebooks/{run.plan[summary].executed}.ipynb: {line}" for line in rerun(run, summary, say)]
    return count, list(dict.fromkeys(problems))


def _data_problems(run: Run, stage: str, fingerprint: Fingerprint, reread: dict[str, str]) -> Iterator[str]:
    try:
        now = run.data_of(stage, reread)
    except SourceError as error:
        yield f"data of {stage}: {error}"
        return
    for name, digest in fingerprint.data.items():
        if name in now and now[name] != digest:
            yield f"data {name}: not what {stage} was made from"
