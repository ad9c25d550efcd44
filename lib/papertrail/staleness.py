"""Which stages are fresh, and why the others are not."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from basics import files
from basics.errors import RecordError, SourceError
from papertrail import records
from papertrail.provenance import Fingerprint
from papertrail.run import Run

EXECUTION = ("stage", "started", "finished", "wall_seconds", "outputs")  # what tells one execution from another
Kind = Literal["fresh", "stale", "missing", "failed"]


@dataclass(frozen=True)
class State:
    """The state of a stage. `reasons` is empty only for a fresh one."""

    stage: str
    kind: Kind
    reasons: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # its run.json, where there is one
    digest: str = ""  # of the fingerprint expected now


def state(run: Run, stage: str) -> State:
    """A stage's state by its own inputs as they are on the disk; `survey` adds what its parents will make stale.

    Fresh means: run.json carries the fingerprint expected now, every output has the hash written there, and the
    executed notebook exists and published this very run.json.
    """
    digest, facts, executed = "", {}, run.spec(stage).executed
    failed = f"the last attempt failed: notebooks/{executed}.failed.ipynb"
    has_failed = run.notebook(f"{executed}.failed").exists()
    try:
        expected = run.fingerprint(stage)
        digest = expected.digest
        facts = run.finished(stage) or {}
        if not facts:
            if has_failed:
                return State(stage, "failed", (failed,), {}, digest)
            begun = " (an interrupted attempt will be resumed)" if run.partial_folder(stage).exists() else ""
            return State(stage, "missing", (f"not made yet{begun}",), {}, digest)
        made = Fingerprint.from_dict(facts["fingerprint"])
        reasons = made.differences(expected) or _damage(run, stage, facts)
    except (RecordError, SourceError) as error:
        reasons = [str(error)]
    if not reasons:
        return State(stage, "fresh", (), facts, digest)
    return State(stage, *(("failed", (failed,)) if has_failed else ("stale", tuple(reasons))), facts, digest)


def survey(run: Run) -> dict[str, State]:
    """Every stage's state, where a stage with a parent that is not fresh counts as stale too."""
    states: dict[str, State] = {}
    for spec in run.plan.values():
        own = state(run, spec.name)
        behind = [need for need in spec.needs if states[need].kind != "fresh"]
        if own.kind in ("fresh", "stale") and behind:
            # "parent sft" of the fingerprint and the parent's own state are one reason, not two
            reasons = [reason for reason in own.reasons if reason.removeprefix("parent ") not in behind]
            reasons += [f"parent {need} is {states[need].kind}" for need in behind]
            own = replace(own, kind="stale", reasons=tuple(reasons))
        states[spec.name] = own
    return states


def same_execution(published: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether a notebook's record of its stage and a run.json come from one execution.

    Only some keys are compared: a path in the configuration (own data, an own model) is cut short in the notebook.
    """
    pair = [(part.get("fingerprint", {}).get("digest"), *map(part.get, EXECUTION)) for part in (published, facts)]
    return pair[0] == pair[1]


def _damage(run: Run, stage: str, facts: Mapping[str, Any]) -> list[str]:
    """The first thing that is wrong with a finished stage's files."""
    folder = run.stage_folder(stage)
    for path, digest in facts["outputs"].items():
        file = folder / path
        if not file.is_file():
            return [f"output {path} is gone"]
        if files.sha256_cached(file) != digest:
            return [f"output {path} is not what the stage wrote"]
    notebook = run.notebook(run.spec(stage).executed)
    name = f"the executed notebook {notebook.name}"
    if not notebook.exists():
        return [f"{name} is not there"]
    if facts.get("notebook_sha256") not in (None, files.sha256_cached(notebook)):
        return [f"{name} was changed since"]
    published = records.read(notebook).get(f"stage/{stage}")
    if published is None:
        return [f"{name} holds no record stage/{stage}"]
    if not same_execution(published.values, facts):
        return [f"{name} is of another execution than {stage}/run.json"]
    return []
