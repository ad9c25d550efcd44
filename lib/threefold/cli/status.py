"""How runs stand, for a person and for a script. The keys of the JSON are documented in the README."""

from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

from threefold import paths
from threefold.cli import disk
from threefold.errors import ThreefoldError
from threefold.pipeline import executor
from threefold.pipeline.staleness import Kind, State, survey
from threefold.run import Run


def of_run(run: Run) -> list[State]:
    """Every stage's state, in the order of the plan."""
    return list(survey(run).values())


def stages_json(run: Run, states: list[State]) -> dict[str, Any]:
    """{"run", "stages": [{"stage", "state", "reasons", "wall_seconds", "finished", "fingerprint"}]}."""
    return {
        "run": run.name,
        "stages": [
            {
                "stage": state.stage,
                "state": state.kind,
                "reasons": list(state.reasons),
                "wall_seconds": state.facts.get("wall_seconds"),
                "finished": state.facts.get("finished"),
                "fingerprint": state.digest or None,
            }
            for state in states
        ],
    }


def stages_text(states: list[State]) -> str:
    """One line a stage."""
    width = max(len(state.stage) for state in states)
    lines = []
    for state in states:
        seconds = state.facts.get("wall_seconds")
        time = f"{seconds:9.1f} s" if isinstance(seconds, int | float) else " " * 11
        reasons = "; ".join(state.reasons)
        lines.append(f"{state.stage:<{width}}  {state.kind:<7}  {time}  {reasons}".rstrip())
    return "\n".join(lines)


def of_all(open_run: Callable[[str], Run]) -> dict[str, Any]:
    """{"runs": [{"run", "bytes", "at_work", "stages": {state: how many}, "error"}], "cache_bytes"}.

    error: why a run's states cannot be told (a config.toml that this version does not read), else None.
    """
    found = []
    for name in disk.runs():
        folder = paths.RUNS / name
        error = None
        counts: Counter[str] = Counter()
        try:
            counts.update(state.kind for state in of_run(open_run(name)))
        except ThreefoldError as unread:
            error = str(unread)
        stages = {kind: counts[kind] for kind in get_args(Kind)}
        found.append(
            {
                "run": name,
                "bytes": disk.size(folder),
                "at_work": executor.at_work(folder),
                "stages": stages,
                "error": error,
            }
        )
    return {"runs": found, "cache_bytes": disk.size(paths.RUNS / ".cache")}


def all_text(found: dict[str, Any]) -> str:
    """One line a run, and one for the cache."""
    rows = []
    for run in found["runs"]:
        told = ", ".join(f"{count} {kind}" for kind, count in run["stages"].items() if count)
        work = "  (at work)" if run["at_work"] else ""
        rows.append((run["run"], run["bytes"], f"{run['error'] or told}{work}"))
    if found["cache_bytes"]:
        rows.append((".cache", found["cache_bytes"], "tokens and hashes, made again when needed"))
    if not rows:
        return "no runs yet: `threefold run --preset smoke` makes one"
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {disk.size_text(count):>8}  {told}" for name, count, told in rows)
