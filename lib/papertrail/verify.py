"""Whether a run still is what its stages wrote: `threefold verify` compares every byte with what run.json says was read
and written, and derives the summary again; `threefold verify --rerun STAGE` repeats a stage and reports what differs.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from basics import files
from basics.errors import RecordError, SourceError
from basics.names import check_name
from papertrail import records, scheduler
from papertrail.provenance import RESUMED, Fingerprint
from papertrail.run import CONFIG, RUN_FILE, Run, damage
from papertrail.staleness import state

# What a repetition does not reproduce, by name: times and what follows from them, ...
TIMES = (
    *("seconds", "evaluation_seconds", "device_seconds", "wall_seconds", "step_seconds", "tokens_per_second"),
    *("log_step_seconds", "matmul_flops", "started", "finished", "attempts"),
)
# ... and what else differs with them: what the work was made from and on, and hashes of files that hold times (the
# files are compared themselves), in the record of run.json ...
IN_RUN_FILE = ("fingerprint", "hardware", "git", "determinism", "outputs")
IN_NOTES = ("files", "determinism", files.SELF)  # ... and in a note beside a training


def verify(
    run: Run, say: Callable[[str], None] = lambda line: None, notes: Iterable[Path] = ()
) -> tuple[int, list[str]]:
    """(number of files read, one line per problem). A stage of which nothing was made is not a problem.

    Checked: run.json's and the fingerprint's own hashes, the data the stage was made from, each output's hash, that
    there is no other output, that the stage was made from what its parents now hold, the executed notebook's bytes and
    its record against run.json, that there is no other notebook, and the notes (JSON files with their hash, see
    `basics.files`) of a cache. Where all of that holds, the summary stage is made again from the records: every table
    and variable of the report must come out the same.
    """
    problems = [f"{CONFIG}: {problem}"] if (problem := run.config_problem()) else []
    problems += [f"notebooks/{name}: of no stage of the run's preset" for name in run.stray_notebooks()]
    count = 0
    finished: dict[str, bool] = {}  # stage -> whether its run.json can be read
    reread: dict[str, str] = {}
    for stage, spec in run.plan.items():
        notebook = run.notebook(spec.executed)
        shown = f"notebooks/{notebook.name}"
        try:
            if (facts := run.finished(stage)) is None:
                if run.stage_folder(stage).exists():
                    problems.append(f"{spec.folder}: has no {RUN_FILE}, which says what the stage wrote")
                if notebook.exists():
                    problems.append(f"{shown}: has no {spec.folder}/{RUN_FILE} that vouches for it")
                continue
            fingerprint = Fingerprint.from_dict(facts["fingerprint"])
        except RecordError as error:
            problems.append(f"{spec.folder}: {error}")
            finished[stage] = False
            continue
        count += len(facts["outputs"]) + 2  # run.json and the notebook
        finished[stage] = True
        problems += [f"{spec.folder}/{path}: {problem}" for path, problem in damage(run.stage_folder(stage), facts)]
        for parent, digest in fingerprint.parents.items():
            if parent not in finished:
                problems.append(f"{spec.folder}: made from stage {parent}, which is not there")
            elif finished[parent] and stage != run.project.summary and digest != run.taken_from(parent, stage):
                problems.append(f"{spec.folder}: made from another {parent} than the one that is there")
        try:
            now = run.data_of(stage, reread)
            changed = [name for name, digest in fingerprint.data.items() if now.get(name, digest) != digest]
            problems += [f"data {name}: not what {stage} was made from" for name in changed]
        except SourceError as error:
            problems.append(f"data of {stage}: {error}")
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


# Repeating a stage --------------------------------------------------------------------------------------------------


def rerun(run: Run, stage: str, say: Callable[[str], None]) -> list[str]:
    """Make a finished stage again in a temporary folder from the same inputs, with the threads and workers it was made
    with.

    Returns one line for each file or record that differs, with its first difference.
    Raises MissingInput (the stage, or one that it needs, has not been made), StageFailed.
    """
    facts = run.require(stage)
    determinism = facts.get("determinism", {})
    with tempfile.TemporaryDirectory(prefix="threefold-") as folder:
        copy = _without_stage(run, stage, Path(folder).resolve())
        workers, threads = facts.get("training", {}).get("workers"), determinism.get("threads", [0])[-1]
        scheduler.execute(copy, selected=[stage], force=True, nproc=workers, threads=threads, say=say)
        lines = list(differences(run, copy, stage))
    if lines:
        lines += [f"{stage}: now made from other inputs: {reason}" for reason in state(run, stage).reasons]
        if determinism.get("level", "").startswith(RESUMED):
            lines.append(f"{stage}: its level of determinism is {determinism['level']}")
    return lines


def _without_stage(run: Run, stage: str, runs: Path) -> Run:
    """The run without this stage, in another runs folder: links to everything else that was made."""
    name = check_name(run.require(stage).get("run", run.name), "run")  # a copied run has another one by now
    copy = replace(run, name=name, path=runs / name, parameters={"run": name})
    for other, spec in run.plan.items():
        if other == stage or run.finished(other) is None:
            continue
        for made in (run.stage_folder(other), run.notebook(spec.executed)):
            if made.exists():
                link = copy.path / made.relative_to(run.path)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(made)
    copy.notebook("").parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(run.path / CONFIG, copy.path)
    return copy


def differences(first: Run, second: Run, stage: str) -> Iterator[str]:
    """One line for each file or record in which two executions of a stage differ, times apart."""
    project, runs = first.project, (first, second)
    outputs = [run.require(stage)["outputs"] for run in runs]
    for path in {**outputs[0], **outputs[1]}:
        if path not in outputs[0] or path not in outputs[1]:
            yield f"{stage}/{path}: only in the {'second' if path in outputs[1] else 'first'}"
        elif outputs[0][path] != outputs[1][path] and Path(path).name not in project.timed_files:
            difference = file_difference(*(run.stage_folder(stage) / path for run in runs), project.readers)
            if difference:
                yield f"{stage}/{path}: {difference}"
    published = [records.read(run.notebook(run.spec(stage).executed)) for run in runs]
    measures = stage != project.summary
    for name in {**published[0], **published[1]}:
        if name not in published[0] or name not in published[1]:
            yield f"record {name}: only in the {'second' if name in published[1] else 'first'}"
            continue
        if measures and name.startswith(project.timed_records):
            continue
        values = pair = [side[name].values for side in published]
        if name == f"stage/{stage}":
            pair = [_timeless(side, IN_RUN_FILE) for side in values]
        elif measures:
            pair = [_timeless(side) for side in values]
        difference = first_difference(*pair)
        if not difference and pair == values:  # a table beside values that hold times shows them
            difference = first_difference(*(side[name].markdown for side in published))
        if difference:
            yield f"record {name}: {difference}"


def file_difference(first: Path, second: Path, readers: Mapping[str, Callable[[Path], Any]]) -> str:
    """The first difference between two files with different bytes, "" if only times differ."""
    pair = (first, second)
    if first.name in readers:
        return first_difference(*(_timeless(readers[first.name](file)) for file in pair))
    if first.suffix == ".json":
        return first_difference(*(_timeless(json.loads(file.read_text(encoding="utf-8")), IN_NOTES) for file in pair))
    if first.suffix == ".safetensors":
        return _weights_difference(first, second)
    if first.suffix == ".parquet":
        import pandas as pd

        tables = [pd.read_parquet(file).drop(columns=list(TIMES), errors="ignore") for file in pair]
        return "" if tables[0].equals(tables[1]) else first_difference(*(table.to_dict("list") for table in tables))
    return "other bytes"


def _weights_difference(first: Path, second: Path) -> str:
    """The first parameter, in the file's order, that differs, and by how much."""
    from safetensors import safe_open

    with safe_open(first, "pt") as before, safe_open(second, "pt") as after:
        names = [list(file.keys()) for file in (before, after)]
        if names[0] != names[1]:
            return f"other parameters: {', '.join(sorted(set(names[0]) ^ set(names[1]))[:4])}"
        changed: dict[str, float] = {}
        for name in names[0]:
            a, b = before.get_tensor(name), after.get_tensor(name)
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name} is {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
            if not a.equal(b):
                changed[name] = (a.double() - b.double()).abs().max().item()
    if not changed:
        return "the same weights under another header"
    name, most = next(iter(changed)), max(changed, key=changed.__getitem__)
    return (
        f"{len(changed)} of {len(names[0])} parameters differ, {name} first (largest absolute difference "
        f"{changed[name]:.3g}), {most} most ({changed[most]:.3g})"
    )


def _timeless(value: Any, also: tuple[str, ...] = ()) -> Any:
    """A JSON value without times, at its top level also without these other keys."""
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in (*TIMES, *also)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def first_difference(first: Any, second: Any, where: str = "") -> str:
    """The place of the first difference and both values there; "" where there is none."""
    if isinstance(first, dict) and isinstance(second, dict):
        pairs = ((f"{where}.{key}" if where else key, first.get(key), second.get(key)) for key in {**first, **second})
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = ((f"{where}[{index}]", *values) for index, values in enumerate(zip(first, second, strict=True)))
    else:
        return "" if first == second else f"{where or 'it'} was {_short(first)} and is now {_short(second)}"
    return next(filter(None, (first_difference(a, b, place) for place, a, b in pairs)), "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
