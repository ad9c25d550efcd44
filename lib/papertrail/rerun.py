"""Repeat a stage in a temporary folder and report what differs: `threefold verify --rerun STAGE`.

Compared are the files that the stage wrote and the records that its notebook published. Times are left out by name.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from basics.files import SELF, atomic_write
from papertrail import records, scheduler
from papertrail.provenance import RESUMED
from papertrail.run import Run
from papertrail.staleness import state

# What a repetition does not reproduce, by name: times and what follows from them, ...
TIMES = (
    *("seconds", "evaluation_seconds", "device_seconds", "wall_seconds", "step_seconds", "tokens_per_second"),
    *("log_step_seconds", "matmul_flops", "started", "finished", "attempts"),
)
# ... and what else differs with them: what the work was made from and on, and hashes of files that hold times (the
# files are compared themselves), in the record of run.json ...
IN_RUN_FILE = ("fingerprint", "hardware", "git", "determinism", "outputs")
IN_NOTES = ("files", "determinism", SELF)  # ... and in a note beside a training


def rerun(run: Run, stage: str, say: Callable[[str], None]) -> list[str]:
    """Make a finished stage again from the same inputs, with the threads and workers it was made with.

    Returns one line for each file or record that differs, with its first difference.
    Raises MissingInput (the stage, or one that it needs, has not been made), StageFailed.
    """
    facts = run.require(stage)
    threads = facts.get("determinism", {}).get("threads", [0])
    with tempfile.TemporaryDirectory(prefix="threefold-") as folder:
        copy = _mirror(run, stage, Path(folder).resolve())
        scheduler.execute(
            copy,
            selected=[stage],
            force=True,
            nproc=facts.get("training", {}).get("workers"),
            threads=threads[-1],
            say=say,
        )
        lines = list(differences(run, copy, stage))
    if lines:
        lines += [f"{stage}: now made from other inputs: {reason}" for reason in state(run, stage).reasons]
        if facts.get("determinism", {}).get("level", "").startswith(RESUMED):
            lines.append(f"{stage}: its level of determinism is {facts['determinism']['level']}")
    return lines


def _mirror(run: Run, stage: str, runs: Path) -> Run:
    """The run without this stage, in another runs folder: links to everything else that was made."""
    copy = replace(run, path=runs / run.name, parameters={"run": run.name})
    for name, spec in run.plan.items():
        if name == stage or run.finished(name) is None:
            continue
        for kept, link in (
            (run.stage_folder(name), copy.stage_folder(name)),
            (run.notebook(spec.executed), copy.notebook(spec.executed)),
        ):
            if kept.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(kept)
    copy.notebook("").parent.mkdir(parents=True, exist_ok=True)
    atomic_write(copy.path / "config.toml", (run.path / "config.toml").read_bytes())
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
        pair = [side[name].values for side in published]
        if name == f"stage/{stage}":
            pair = [_without(values, IN_RUN_FILE) for values in pair]
        if measures or name == f"stage/{stage}":
            pair = [_timeless(values) for values in pair]
        difference = _difference(*pair)
        if not difference and all(side[name].values == values for side, values in zip(published, pair, strict=True)):
            # a table beside values that hold times shows them
            difference = _difference(*(side[name].markdown for side in published))
        if difference:
            yield f"record {name}: {difference}"


def file_difference(first: Path, second: Path, readers: Mapping[str, Callable[[Path], Any]]) -> str:
    """The first difference between two files with different bytes, "" if only times differ."""
    pair = (first, second)
    if first.name in readers:
        return _difference(*(_timeless(readers[first.name](file)) for file in pair))
    if first.suffix == ".json":
        values = (_timeless(json.loads(file.read_text(encoding="utf-8"))) for file in pair)
        return _difference(*(_without(value, IN_NOTES) for value in values))
    if first.suffix == ".safetensors":
        return _weights_difference(first, second)
    if first.suffix == ".parquet":
        import pandas as pd

        tables = [pd.read_parquet(file).drop(columns=list(TIMES), errors="ignore") for file in pair]
        return "" if tables[0].equals(tables[1]) else _difference(*(table.to_dict("list") for table in tables))
    return "other bytes"


def _without(values: Any, keys: Iterable[str]) -> Any:
    return {key: value for key, value in values.items() if key not in keys} if isinstance(values, dict) else values


def _weights_difference(first: Path, second: Path) -> str:
    """The first parameter, in the file's order, that differs, and by how much."""
    from safetensors import safe_open

    with safe_open(first, "pt") as one, safe_open(second, "pt") as other:
        names = [list(file.keys()) for file in (one, other)]
        if names[0] != names[1]:
            return f"other parameters: {', '.join(sorted(set(names[0]) ^ set(names[1]))[:4])}"
        changed = []
        for name in names[0]:
            a, b = one.get_tensor(name), other.get_tensor(name)
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name} is {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
            if not a.equal(b):
                changed.append((name, (a.double() - b.double()).abs().max().item()))
    if not changed:
        return "the same weights under another header"
    (name, by), largest = changed[0], max(changed, key=lambda entry: entry[1])
    return (
        f"{len(changed)} of {len(names[0])} parameters differ, {name} first (largest absolute difference {by:.3g}), "
        f"{largest[0]} most ({largest[1]:.3g})"
    )


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in _without(value, TIMES).items()}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _difference(one: Any, other: Any, where: str = "") -> str:
    """The place of the first difference and both values there; "" where there is none."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = ((f"{where}.{key}" if where else key, one.get(key), other.get(key)) for key in {**one, **other})
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = ((f"{where}[{index}]", *values) for index, values in enumerate(zip(one, other, strict=True)))
    else:
        return "" if one == other else f"{where or 'it'} was {_short(one)} and is now {_short(other)}"
    return next(filter(None, (_difference(a, b, place) for place, a, b in pairs)), "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
