"""`threefold verify`: every byte against what run.json says was read and written, and the tables made again."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from basics import files
from basics.errors import RecordError, SourceError
from papertrail import records
from papertrail.provenance import Fingerprint
from papertrail.rerun import rerun
from papertrail.run import Run, damage
from papertrail.staleness import same_execution
from study import stages


def verify(run: Run, say: Callable[[str], None] = lambda line: None) -> tuple[int, list[str]]:
    """(files read, one line for each thing that does not hold). Only finished stages are looked at.

    Checked: the fingerprint's digest against its components, the data it was made from, each output's hash, that there
    is no output beyond those, that a stage was made from what its parents now hold, the executed notebook's
    bytes and its record against run.json, what the cache keeps of the data; and, where all that holds, the comparison
    is made again from the records: every table and variable of the report must come out the same.
    """
    problems: list[str] = []
    files = 0
    finished: set[str] = set()
    read: dict[str, str] = {}
    plan = stages.steps(run.preset)
    for step in plan.values():
        folder = run.stage_folder(step.name)
        where = folder.relative_to(run.path).as_posix()
        try:
            facts = run.finished(step.name)
            if facts is None:
                continue
            fingerprint = Fingerprint.from_dict(facts["fingerprint"])
        except RecordError as error:
            problems.append(f"{where}: {error}")
            continue
        problems += [f"{where}/{path}: {problem}" for path, problem in damage(folder, facts)]
        files += len(facts["outputs"]) + 2  # run.json and the notebook
        finished.add(step.name)
        for parent, digest in fingerprint.parents.items():
            if step.name != "compare" and parent in finished and digest != stages.identity(run, step.name, parent):
                problems.append(f"{where}: made from another {parent} than the one that is there")
        problems += _inputs(run, step.name, fingerprint, read)
        problems += _notebook(run, step.executed, step.name, facts)
    cached, damaged_files = _cache(run)
    files, problems = files + cached, list(dict.fromkeys(problems)) + damaged_files
    if not problems and "compare" in finished:
        problems += [f"notebooks/{plan['compare'].executed}.ipynb: {line}" for line in rerun(run, "compare", say)]
    return files, problems


def _inputs(run: Run, stage: str, fingerprint: Fingerprint, read: dict[str, str]) -> Iterator[str]:
    try:
        now = stages.data_fingerprints(run, stage, read)
    except SourceError as error:
        yield f"data of {stage}: {error}"
        return
    for name, digest in fingerprint.data.items():
        if name in now and now[name] != digest:
            yield f"data {name}: not what {stage} was made from"


def _notebook(run: Run, executed: str, stage: str, facts: dict) -> list[str]:
    name = f"notebooks/{executed}.ipynb"
    try:
        run.check_notebook(stage)
        found = records.read(run.notebook(executed))
    except RecordError as error:
        return [f"{name}: {error}"]
    record = found.get(f"stage/{stage}")
    if record is None:
        return [f"{name}: no record stage/{stage}"]
    if not same_execution(record.values, facts):
        return [f"{name}: its record stage/{stage} is not what run.json says"]
    return []


def _cache(run: Run) -> tuple[int, list[str]]:
    """(notes read, what is not as it was written) of the tokens, searches and hashes that all runs share."""
    from threefold.data.sources import cache_folder

    home = cache_folder()
    streams = [folder / "meta.json" for folder in sorted(home.glob("tokens/[!.]*"))]
    notes = [*streams, *sorted(home.glob("overlap/[!.]*.json")), *sorted(home.glob("hashes/[!.]*.json"))]
    return len(notes), [
        f"{_shown(file, run)}: not as it was written; it is made again when it is next used"
        for note in notes
        for file in files.damaged(note)
    ]


def _shown(file: Path, run: Run) -> str:
    return Path(os.path.relpath(file, run.path)).as_posix()
