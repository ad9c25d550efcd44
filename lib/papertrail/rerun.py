"""A stage made once more in a temporary folder, and what then differs: `threefold verify --rerun STAGE`.

What a run's result is: the files its stages wrote and the records its notebooks published. Times are apart: they are
left out by name.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from basics.files import SELF, atomic_write
from papertrail import records
from papertrail import scheduler as executor
from papertrail.run import Run
from papertrail.staleness import state
from study import stages

# What a repetition does not give again, by name: times and what follows from them, ...
TIMES = (
    *("seconds", "evaluation_seconds", "device_seconds", "wall_seconds", "step_seconds", "tokens_per_second"),
    *("log_step_seconds", "matmul_flops", "started", "finished", "attempts"),
)
# ... in run.json what the stage was made from and on, and hashes of files that hold times (the files are compared
# themselves), ...
ELSEWHERE = ("fingerprint", "hardware", "git", "determinism", "outputs")
NOTED = ("files", "determinism", SELF)  # ... in a note beside a training likewise, ...
# ... and results that are, or show, times.
TIMED_FILES = ("steps-preset.json", "steps-ablation.json", "speed.parquet")
TIMED_RECORDS = ("speed/", "comparison/")  # of the stages that measure; the comparison itself only reads


def rerun(run: Run, stage: str, say: Callable[[str], None]) -> list[str]:
    """Make a finished stage again from the same inputs, with the threads and workers it was made with; one line for
    each file or record that differs, with what differs first in it.

    Raises MissingInput (the stage or what it needs has not been made), StageFailed.
    """
    from threefold.data.sources import cache_folder

    facts, step = run.require(stage), stages.steps(run.preset)[stages.select(run.preset, stage)[0]]
    threads = facts.get("determinism", {}).get("threads", [0])
    with tempfile.TemporaryDirectory(prefix="threefold-") as home:
        copy = _mirror(run, stage, Path(home).resolve())
        executor.execute(
            copy,
            selected=[stage],
            force=True,
            nproc=facts.get("training", {}).get("workers"),
            threads=threads[-1],
            environment={"THREEFOLD_CACHE": str(cache_folder())},
            say=say,
        )
        found = list(differences(run, copy, stage))
    if found:
        found += [f"{stage}: now made from other inputs: {reason}" for reason in state(run, step).reasons]
        if "gone on with" in facts.get("determinism", {}).get("level", ""):
            found.append(f"{stage}: its level of determinism is {facts['determinism']['level']}")
    return found


def _mirror(run: Run, stage: str, home: Path) -> Run:
    """The run without this stage in another runs folder: all that was made is there by links."""
    copy = replace(run, path=home / run.name, asked={"run": run.name})
    for name, step in stages.steps(run.preset).items():
        if name == stage or run.finished(name) is None:
            continue
        for kept, link in (
            (run.stage_folder(name), copy.stage_folder(name)),
            (run.notebook(step.executed), copy.notebook(step.executed)),
        ):
            if kept.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(kept)
    copy.notebook("").parent.mkdir(parents=True, exist_ok=True)
    atomic_write(copy.path / "config.toml", (run.path / "config.toml").read_bytes())
    return copy


def differences(one: Run, other: Run, stage: str) -> Iterator[str]:
    """Where two makings of a stage differ, times apart: a line a file or record."""
    folders = one.stage_folder(stage), other.stage_folder(stage)
    listed = [run.require(stage)["outputs"] for run in (one, other)]
    for path in {**listed[0], **listed[1]}:
        if path not in listed[0] or path not in listed[1]:
            yield f"{stage}/{path}: only in the {'second' if path in listed[1] else 'first'}"
        elif listed[0][path] != listed[1][path] and Path(path).name not in TIMED_FILES:
            found = _file_difference(*(folder / path for folder in folders))
            if found:
                yield f"{stage}/{path}: {found}"
    executed = stages.steps(one.preset)[stage].executed
    published = [records.read(run.notebook(executed)) for run in (one, other)]
    for name in {**published[0], **published[1]}:
        if name not in published[0] or name not in published[1]:
            yield f"record {name}: only in the {'second' if name in published[1] else 'first'}"
            continue
        if stage != "compare" and name.startswith(TIMED_RECORDS):
            continue
        pair = [side[name].values for side in published]
        if name == f"stage/{stage}":
            pair = [{key: value for key, value in values.items() if key not in ELSEWHERE} for values in pair]
        if stage != "compare" or name == "stage/compare":
            pair = [_timeless(values) for values in pair]
        found = _difference(*pair)
        if not found and all(side[name].values == values for side, values in zip(published, pair, strict=True)):
            # a table beside values that hold times shows them
            found = _difference(*(side[name].markdown for side in published))
        if found:
            yield f"record {name}: {found}"


def _file_difference(one: Path, other: Path) -> str:
    """What differs first between two files of different bytes; "" where that is times alone."""
    if one.name == "metrics.jsonl":
        from threefold.training.state import read_metrics  # without the steps that an interrupted training took again

        return _difference(*(_timeless(read_metrics(file.parent)) for file in (one, other)))
    if one.suffix == ".json":
        found = [_timeless(json.loads(file.read_text(encoding="utf-8"))) for file in (one, other)]
        for values in found:
            for key in NOTED if isinstance(values, dict) else ():
                values.pop(key, None)
        return _difference(*found)
    if one.suffix == ".safetensors":
        return _weights_difference(one, other)
    if one.suffix == ".parquet":
        import pandas as pd

        tables = [pd.read_parquet(file).drop(columns=list(TIMES), errors="ignore") for file in (one, other)]
        return "" if tables[0].equals(tables[1]) else _difference(*(table.to_dict("list") for table in tables))
    return "other bytes"


def _weights_difference(one: Path, other: Path) -> str:
    """The first parameter, in the file's order, that differs, and by how much."""
    from safetensors import safe_open

    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        names = [list(file.keys()) for file in (first, second)]
        if names[0] != names[1]:
            return f"other parameters: {', '.join(sorted(set(names[0]) ^ set(names[1]))[:4])}"
        changed = []
        for name in names[0]:
            a, b = first.get_tensor(name), second.get_tensor(name)
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
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
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
