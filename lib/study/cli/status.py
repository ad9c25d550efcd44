"""The state of runs, for a person and for a script. The keys of the JSON are documented in docs/scripts.md."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, get_args

from basics import paths
from basics.errors import RecordError, ThreefoldError
from papertrail import records, scheduler
from papertrail.run import Run
from papertrail.staleness import Kind, State, survey
from study.cli import disk
from study.run import run_names


def of_run(run: Run) -> dict[str, Any]:
    """{"run", "stages": [{"stage", "state", "reasons", "wall_seconds", "finished", "fingerprint", "headline"}]}, in
    the order of the plan."""
    stages = [
        {
            "stage": state.stage,
            "state": state.kind,
            "reasons": list(state.reasons),
            "wall_seconds": state.facts.get("wall_seconds"),
            "finished": state.facts.get("finished"),
            "fingerprint": state.digest or None,
            "headline": headline(run, state),
        }
        for state in survey(run).values()
    ]
    return {"run": run.name, "stages": stages}


def run_text(status: Mapping[str, Any]) -> str:
    """What `of_run` found, one line per stage."""
    rows = status["stages"]
    name_width = max(len(row["stage"]) for row in rows)
    headline_width = max(len(row["headline"] or "") for row in rows)
    lines = []
    for row in rows:
        seconds, reasons = row["wall_seconds"], "; ".join(row["reasons"])
        time = f"{seconds:9.1f} s" if isinstance(seconds, int | float) else " " * 11
        start = f"{row['stage']:<{name_width}}  {row['state']:<7}  {time}"
        lines.append(f"{start}  {row['headline'] or '':<{headline_width}}  {reasons}".rstrip())
    return "\n".join(lines)


def headline(run: Run, state: State) -> str | None:
    """The most telling figure of a finished stage; None where its records hold none."""
    evaluations = state.facts.get("training", {}).get("heldout")
    if evaluations:  # a training's own record
        last = evaluations[-1]
        ranked = f", ranks {last['reward_accuracy']:.0%} of pairs right" if "reward_accuracy" in last else ""
        return f"held-out loss {last['loss']:.3f}{ranked}"
    if not state.facts:
        return None
    try:
        run.check_notebook(state.stage)
        published = records.read(run.notebook(run.plan[state.stage].executed))
    except RecordError:
        return None
    for name, record in published.items():
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

    error: why a run's states are unknown (a config.toml that this version cannot read), else None.
    """
    runs = []
    for name in run_names():
        folder, error, counts = paths.RUNS / name, None, Counter()
        try:
            counts.update(state.kind for state in survey(open_run(name)).values())
        except ThreefoldError as unreadable:
            error = str(unreadable)
        stages = {kind: counts[kind] for kind in get_args(Kind)}
        sizes = {"bytes": disk.size(folder), "at_work": scheduler.at_work(folder)}
        runs.append({"run": name, **sizes, "stages": stages, "error": error})
    return {"runs": runs, "cache_bytes": disk.size(paths.RUNS / ".cache")}


def all_text(status: Mapping[str, Any]) -> str:
    """What `of_all` found, one line per run and one for the cache."""
    rows = []
    for run in status["runs"]:
        counts = ", ".join(f"{count} {kind}" for kind, count in run["stages"].items() if count)
        rows.append((run["run"], run["bytes"], f"{run['error'] or counts}{'  (at work)' if run['at_work'] else ''}"))
    if status["cache_bytes"]:
        rows.append((".cache", status["cache_bytes"], "tokens and hashes, made again when needed"))
    if not rows:
        return "no runs yet: `threefold run --preset smoke` makes one"
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {disk.size_text(size):>8}  {text}" for name, size, text in rows)
