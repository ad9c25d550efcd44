"""How runs stand, for a person and for a script. The keys of the JSON are documented in docs/scripts.md."""

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

from basics import paths
from basics.errors import RecordError, ThreefoldError
from papertrail import records
from papertrail import scheduler as executor
from papertrail.run import Run
from papertrail.staleness import Kind, State, survey
from study.cli import disk
from study.run import run_names


def of_run(run: Run) -> list[State]:
    """Every stage's state, in the order of the plan."""
    return list(survey(run).values())


def stages_json(run: Run, states: list[State]) -> dict[str, Any]:
    """{"run", "stages": [{"stage", "state", "reasons", "wall_seconds", "finished", "fingerprint", "headline"}]}."""
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
                "headline": headline(run, state),
            }
            for state in states
        ],
    }


def stages_text(run: Run, states: list[State]) -> str:
    """One line a stage."""
    figures = [headline(run, state) or "" for state in states]
    width, wide = max(len(state.stage) for state in states), max(map(len, figures))
    lines = []
    for state, figure in zip(states, figures, strict=True):
        seconds = state.facts.get("wall_seconds")
        time = f"{seconds:9.1f} s" if isinstance(seconds, int | float) else " " * 11
        reasons = "; ".join(state.reasons)
        lines.append(f"{state.stage:<{width}}  {state.kind:<7}  {time}  {figure:<{wide}}  {reasons}".rstrip())
    return "\n".join(lines)


def headline(run: Run, state: State) -> str | None:
    """The figure that says most about a finished stage, of the state it is in; None where its records hold none."""
    held = state.facts.get("training", {}).get("heldout")
    if held:  # a training's own record
        last = held[-1]
        ranked = f", ranks {last['reward_accuracy']:.0%} of pairs right" if "reward_accuracy" in last else ""
        return f"held-out loss {last['loss']:.3f}{ranked}"
    if not state.facts:
        return None
    try:
        run.check_notebook(state.stage)
        found = records.read(run.notebook(run.plan[state.stage].executed))
    except RecordError:
        return None
    for name, record in found.items():
        values = record.values
        kind, metrics = name.partition("/")[0], values.get("metrics", {})
        if kind == "evaluation" and "bits_per_byte" in metrics:
            return f"{metrics['bits_per_byte']['value']:.3f} bits per byte ({values['protocol']})"
        if name == "speed/dpo" and "decode_b1" in metrics:
            return f"dpo decodes {metrics['decode_b1']['value']:,.0f} tokens/s"
        if name == "tokenizer":
            return f"vocabulary {values['vocabulary']:,}"
        if name == "ablation/base":
            return f"base held-out loss {statistics.mean(values['heldout_loss']):.3f}"
    return f"{state.facts['records']} records" if "records" in state.facts else None


def of_all(open_run: Callable[[str], Run]) -> dict[str, Any]:
    """{"runs": [{"run", "bytes", "at_work", "stages": {state: how many}, "error"}], "cache_bytes"}.

    error: why a run's states cannot be told (a config.toml that this version does not read), else None.
    """
    found = []
    for name in run_names():
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
