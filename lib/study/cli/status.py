"""`threefold status`: the state of runs, for a person and for a script. docs/scripts.md documents the JSON's keys."""

import argparse
import statistics
from collections import Counter
from typing import Any, get_args

from basics import files, paths
from basics.errors import ConfigError, RecordError, ThreefoldError
from papertrail import records, scheduler
from papertrail.run import Run
from papertrail.staleness import Kind, State, survey
from study.cli import disk
from study.cli.common import columns, open_existing, say, say_json
from study.preset import parse_overrides
from study.run import run_names


def status(options: argparse.Namespace) -> int:
    if options.set and not options.run:
        raise ConfigError("status: --set goes with --run")
    if options.run:
        values = of_run(open_existing(options.run, options.data_dir, parse_overrides(options.set)))
        rows = [
            [
                row["stage"],
                "at work" if row["at_work"] else row["state"],
                "" if row["wall_seconds"] is None else f"{row['wall_seconds']:.1f} s",
                row["headline"] or "",
                "" if row["at_work"] else "; ".join(row["reasons"]),
            ]
            for row in values["stages"]
        ]
        right = 2
    else:
        values = of_all(options.data_dir)
        rows = [[row["run"], disk.size_text(row["bytes"]), _counts(row)] for row in values["runs"]]
        if values["cache_bytes"]:
            rows.append([".cache", disk.size_text(values["cache_bytes"]), "tokens and hashes, made again when needed"])
        right = 1
    if options.json:
        say_json(values)
    else:
        say(columns(rows, right=right) if rows else "no runs yet: `threefold run --preset smoke` makes one")
    return 0


def _counts(row: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in row["stages"].items() if count)
    return f"{row['error'] or counts}{'  (at work)' if row['at_work'] else ''}"


def of_run(run: Run) -> dict[str, Any]:
    """{"run", "stages": [{"stage", "state", "at_work", "reasons", "wall_seconds", "finished", "fingerprint",
    "headline"}]}, in the order of the plan. state: of what is finished; at_work: whether a notebook makes it now."""
    stages = [
        {
            "stage": state.stage,
            "state": state.kind,
            "at_work": scheduler.stage_at_work(run, state.stage),
            "reasons": list(state.reasons),
            "wall_seconds": state.facts.get("wall_seconds"),
            "finished": state.facts.get("finished"),
            "fingerprint": state.digest or None,
            "headline": headline(run, state),
        }
        for state in survey(run).values()
    ]
    return {"run": run.name, "stages": stages}


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
        values, metrics = record.values, record.values.get("metrics", {})
        if name.startswith("evaluation/") and "bits_per_byte" in metrics:
            return f"{metrics['bits_per_byte']['value']:.3f} bits per byte ({values['protocol']})"
        if name == "speed/dpo" and "decode_b1" in metrics:
            return f"dpo decodes {metrics['decode_b1']['value']:,.0f} tokens/s"
        if name.startswith("tuning/"):
            return f"learning rates × {values['multiplier']:g}, the best of {values['trials']} trials"
        if name == "tokenizer":
            return f"vocabulary {values['vocabulary']:,}"
        if name == "ablation/base":
            return f"base held-out loss {statistics.mean(values['heldout_loss']):.3f}"
    return f"{state.facts['records']} records" if "records" in state.facts else None


@files.remembering()
def of_all(data_dir: str = "") -> dict[str, Any]:
    """{"runs": [{"run", "bytes", "at_work", "stages": {state: how many}, "error"}], "cache_bytes"}.

    error: why a run's states are unknown (a config.toml that this version cannot read), else None.
    """
    runs = []
    for name in run_names():
        folder, error, counts = paths.RUNS / name, None, Counter()
        try:
            counts.update(state.kind for state in survey(open_existing(name, data_dir)).values())
        except ThreefoldError as unreadable:
            error = str(unreadable)
        stages = {kind: counts[kind] for kind in get_args(Kind)}
        sizes = {"bytes": disk.size(folder), "at_work": scheduler.at_work(folder)}
        runs.append({"run": name, **sizes, "stages": stages, "error": error})
    return {"runs": runs, "cache_bytes": disk.size(paths.RUNS / ".cache")}
