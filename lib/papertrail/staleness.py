"""Which stages are fresh, and why the others are not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from basics import files
from basics.errors import RecordError, SourceError
from papertrail import records
from papertrail.provenance import Fingerprint
from papertrail.run import Run
from study import stages
from study.stages import Step

EXECUTION = ("stage", "started", "finished", "wall_seconds", "outputs")  # what tells one execution from another
Kind = Literal["fresh", "stale", "missing", "failed"]


@dataclass(frozen=True)
class State:
    """How a stage stands. `reasons` is empty only for a fresh one."""

    stage: str
    kind: Kind
    reasons: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # its run.json, where there is one
    digest: str = ""  # of the fingerprint expected now


def state(run: Run, step: Step) -> State:
    """A stage's state by its own inputs as they lie on the disk; `survey` adds what its parents will make stale.

    Fresh means: run.json carries the fingerprint expected now, every output has the hash written there, and the
    executed notebook exists and published this very run.json.
    """
    digest = ""
    facts: dict[str, Any] = {}
    failed = run.notebook(f"{step.executed}.failed").exists()
    try:
        expected = stages.fingerprint(run, step.name)
        digest = expected.digest
        facts = run.finished(step.name) or {}
        if not facts:
            begun = " (an interrupted attempt will be resumed)" if run.partial_folder(step.name).exists() else ""
            reason = (
                f"the last attempt failed: notebooks/{step.executed}.failed.ipynb" if failed else f"not made yet{begun}"
            )
            return State(step.name, "failed" if failed else "missing", (reason,), {}, digest)
        reasons = _changes(facts, expected) or _damage(run, step, facts)
    except (RecordError, SourceError) as error:
        reasons = [str(error)]
    if failed and reasons:
        return State(
            step.name, "failed", (f"the last attempt failed: notebooks/{step.executed}.failed.ipynb",), facts, digest
        )
    return State(step.name, "stale" if reasons else "fresh", tuple(reasons), facts, digest)


def survey(run: Run) -> dict[str, State]:
    """Every stage's state, where a stage whose parent is to be made again counts as stale too."""
    plan = stages.steps(run.preset)
    found: dict[str, State] = {}
    for step in plan.values():
        now = state(run, step)
        above = [need for need in step.needs if found[need].kind != "fresh"]
        if now.kind in ("fresh", "stale") and above:
            # "parent sft" of the fingerprint and the parent's own state are one reason, not two
            own = [reason for reason in now.reasons if reason.removeprefix("parent ") not in above]
            parents = [f"parent {need} is {found[need].kind}" for need in above]
            now = State(now.stage, "stale", (*own, *parents), now.facts, now.digest)
        found[step.name] = now
    return found


def same_execution(published: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether a notebook's record of its stage and a run.json come from one execution.

    Not all of them is compared: a path in the configuration (own data, an own model) is cut short in the notebook.
    """
    pairs = [(part.get("fingerprint", {}).get("digest"), *map(part.get, EXECUTION)) for part in (published, facts)]
    return pairs[0] == pairs[1]


def _changes(facts: Mapping[str, Any], expected: Fingerprint) -> list[str]:
    """What changed between the inputs a stage was made from and those it would be made from now."""
    made = Fingerprint.from_dict(facts["fingerprint"])
    return [] if made.digest == expected.digest else made.differences(expected)


def _damage(run: Run, step: Step, facts: Mapping[str, Any]) -> list[str]:
    """What is wrong with a finished stage's files."""
    folder = run.stage_folder(step.name)
    for path, digest in facts["outputs"].items():
        file = folder / path
        if not file.is_file():
            return [f"output {path} is gone"]
        if files.sha256_cached(file) != digest:
            return [f"output {path} is not what the stage wrote"]
    notebook = run.notebook(step.executed)
    if not notebook.exists():
        return [f"the executed notebook {notebook.name} is not there"]
    if facts.get("notebook_sha256") not in (None, files.sha256_cached(notebook)):
        return [f"the executed notebook {notebook.name} was changed since"]
    published = records.read(notebook).get(f"stage/{step.name}")
    if published is None:
        return [f"the executed notebook {notebook.name} holds no record stage/{step.name}"]
    if not same_execution(published.values, facts):
        return [f"the executed notebook {notebook.name} is of another execution than {step.name}/run.json"]
    return []
