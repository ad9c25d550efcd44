"""Which stages are fresh, and why the others are not."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from basics import files
from basics.errors import RecordError, SourceError
from papertrail.provenance import Fingerprint
from papertrail.run import Run

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
    kind: Kind = "stale"
    digest, facts = "", {}
    failed = run.notebook(f"{run.spec(stage).executed}.failed")
    try:
        expected = run.fingerprint(stage)
        digest = expected.digest
        facts = run.finished(stage) or {}
        if facts:
            reasons = Fingerprint.from_dict(facts["fingerprint"]).differences(expected) or _damage(run, stage, facts)
        else:
            begun = " (an interrupted attempt will be resumed)" if run.partial_folder(stage).exists() else ""
            kind, reasons = "missing", [f"not made yet{begun}"]
    except (RecordError, SourceError) as error:
        reasons = [str(error)]
    if reasons and failed.exists():
        kind, reasons = "failed", [f"the last attempt failed: notebooks/{failed.name}"]
    return State(stage, kind if reasons else "fresh", tuple(reasons), facts, digest)


@files.remembering()
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


def _damage(run: Run, stage: str, facts: Mapping[str, Any]) -> list[str]:
    """The first thing that is wrong with a finished stage's files."""
    for path, digest in facts["outputs"].items():
        file = run.stage_folder(stage) / path
        if not file.is_file():
            return [f"output {path} is gone"]
        if files.sha256_cached(file) != digest:
            return [f"output {path} is not what the stage wrote"]
    problem = run.notebook_problem(stage, files.sha256_cached)
    return [f"the executed notebook {run.spec(stage).executed}.ipynb {problem}"] if problem else []
