"""What differs between two executions of a stage, times apart: the files that it wrote, and its notebook's records."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from basics.files import SELF
from papertrail import records
from papertrail.run import Run

# What a repetition does not reproduce, by name: times and what follows from them, ...
TIMES = (
    *("seconds", "evaluation_seconds", "device_seconds", "wall_seconds", "step_seconds", "tokens_per_second"),
    *("log_step_seconds", "matmul_flops", "started", "finished", "attempts"),
)
# ... and what else differs with them: what the work was made from and on, and hashes of files that hold times (the
# files are compared themselves), in the record of run.json ...
IN_RUN_FILE = ("fingerprint", "hardware", "git", "determinism", "outputs")
IN_NOTES = ("files", "determinism", SELF)  # ... and in a note beside a training


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
        difference = first_difference(*pair)
        if not difference and pair == [side[name].values for side in published]:
            # a table beside values that hold times shows them
            difference = first_difference(*(side[name].markdown for side in published))
        if difference:
            yield f"record {name}: {difference}"


def file_difference(first: Path, second: Path, readers: Mapping[str, Callable[[Path], Any]]) -> str:
    """The first difference between two files with different bytes, "" if only times differ."""
    pair = (first, second)
    if first.name in readers:
        return first_difference(*(_timeless(readers[first.name](file)) for file in pair))
    if first.suffix == ".json":
        values = (_timeless(json.loads(file.read_text(encoding="utf-8"))) for file in pair)
        return first_difference(*(_without(value, IN_NOTES) for value in values))
    if first.suffix == ".safetensors":
        return _weights_difference(first, second)
    if first.suffix == ".parquet":
        import pandas as pd

        tables = [pd.read_parquet(file).drop(columns=list(TIMES), errors="ignore") for file in pair]
        return "" if tables[0].equals(tables[1]) else first_difference(*(table.to_dict("list") for table in tables))
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


def first_difference(one: Any, other: Any, where: str = "") -> str:
    """The place of the first difference and both values there; "" where there is none."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = ((f"{where}.{key}" if where else key, one.get(key), other.get(key)) for key in {**one, **other})
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = ((f"{where}[{index}]", *values) for index, values in enumerate(zip(one, other, strict=True)))
    else:
        return "" if one == other else f"{where or 'it'} was {_short(one)} and is now {_short(other)}"
    return next(filter(None, (first_difference(a, b, place) for place, a, b in pairs)), "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
