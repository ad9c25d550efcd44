"""`threefold status`: the state of runs, for a person and for a script (docs/scripts.md documents the JSON's keys); and
`threefold clean`: removes a run, what can be made again in it, or the cache."""

import argparse
import contextlib
import os
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from basics import files, paths
from basics.errors import ConfigError, RecordError, ThreefoldError
from papertrail import records, scheduler
from papertrail.run import Run
from papertrail.stage import at_work
from papertrail.staleness import Kind, State, survey
from study.cli.common import columns, from_here, say, say_json
from study.existing import open_existing, run_folder
from study.run import run_names

REMADE = ("report", "tensorboard", "wandb", ".executing")  # by the commands of those names, and by `threefold run`


def status(options: argparse.Namespace) -> int:
    if options.set and not options.run:
        raise ConfigError("status: --set goes with --run")
    if options.run:
        values = of_run(open_existing(options.run, options.data_dir, options.set))
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
        rows = []
        for row in values["runs"]:
            counts = ", ".join(f"{count} {kind}" for kind, count in row["stages"].items() if count)
            states = f"{row['error'] or counts}{'  (at work)' if row['at_work'] else ''}"
            rows.append([row["run"], size_text(row["bytes"]), states])
        if values["cache_bytes"]:
            rows.append([".cache", size_text(values["cache_bytes"]), "tokens and hashes, made again when needed"])
        right = 1
    if options.json:
        say_json(values)
    else:
        say(columns(rows, right=right) if rows else "no runs yet: `threefold run --preset smoke` makes one")
    return 0


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
        sizes = {"bytes": size(folder), "at_work": scheduler.at_work(folder)}
        runs.append({"run": name, **sizes, "stages": stages, "error": error})
    return {"runs": runs, "cache_bytes": size(paths.RUNS / ".cache")}


# Removing -----------------------------------------------------------------------------------------------------------


def clean(options: argparse.Namespace) -> int:
    if options.cache and options.keep_results:
        raise ConfigError("--keep-results is about a run; the cache holds no results")
    run = None if options.cache else removable(options.run)
    with scheduler.lock(run) if run else contextlib.nullcontext():
        entries = cache() if run is None else leftovers(run) if options.keep_results else contents(run)
        if not entries:
            say("nothing to remove")
            return 0
        sizes = [size(path) for path in entries]
        rows = [(size_text(count), str(from_here(path))) for count, path in zip(sizes, entries, strict=True)]
        say(f"{columns(rows, right=0)}\n{size_text(sum(sizes))} to free")
        if not options.yes and not _agreed():
            return 0
        remove(entries)
    if run and not options.keep_results:
        run.rmdir()
    return 0


def _agreed() -> bool:
    """What the person at the terminal answers. Raises ConfigError where there is none."""
    if not sys.stdin.isatty():
        raise ConfigError("nothing was removed: --yes removes it without asking")
    try:
        return input("Remove? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def removable(name: str) -> Path:
    """The folder of a run that may be removed. Raises ConfigError for one that is a link out of the runs folder,
    ThreefoldError while a notebook works on one of its stages."""
    path = run_folder(name)
    if path.is_symlink():
        raise ConfigError(f"run {name} is a link to another folder: remove the link, and what it points to, yourself")
    if stage := at_work(path):
        raise ThreefoldError(f"run {name} is at work in {stage}; wait for it")
    return path


def contents(run: Path) -> list[Path]:
    """Everything in a run's folder. What makes it a run comes last: a removal cut short can be repeated."""
    return sorted(run.iterdir(), key=lambda entry: (entry.name in ("config.toml", scheduler.LOCK), entry.name))


def leftovers(run: Path) -> list[Path]:
    """What a run can lose without losing a result: the rendered report, exported curves, what failed or was
    interrupted."""
    entries = {run / name for name in REMADE}
    entries.update(run.glob(".*.partial"), run.glob("notebooks/*.failed.ipynb"), run.rglob(".*.tmp"))
    # A folder set aside is the only copy of the stage until its successor is in place (`replace_folder`).
    aside = run.rglob(".*.previous")
    entries.update(old for old in aside if old.with_name(old.name[1:].removesuffix(".previous")).exists())
    return sorted(entry for entry in entries if os.path.lexists(entry) and entries.isdisjoint(entry.parents))


def cache() -> list[Path]:
    """What was derived from the data and is kept between runs; the hub's commits of first loads stay, for nothing makes
    them again. Raises ConfigError where the cache is outside the runs folder, ThreefoldError while a run is at work."""
    from threefold.data.hub import REVISIONS

    folder = paths.cache_folder()
    if folder != paths.RUNS / ".cache":
        raise ConfigError(
            f"the cache is {folder}, not in the runs folder ($THREEFOLD_CACHE, or a link): empty it yourself"
        )
    for name in run_names():
        if scheduler.at_work(paths.RUNS / name):
            raise ThreefoldError(f"run {name} is at work and reads the cache; wait for it")
    return sorted(path for path in folder.glob("*") if path.name != REVISIONS)


def cache_notes() -> list[Path]:
    """The checked notes of what the cache keeps: tokens, overlap searches and hashes."""
    patterns = ("code.json", "tokens/[!.]*/meta.json", "overlap/[!.]*.json", "hashes/[!.]*.json")
    return [note for pattern in patterns for note in sorted(paths.cache_folder().glob(pattern))]


def remove(entries: Sequence[Path]) -> None:
    """Remove files and folders in the runs folder; links are removed, not followed. Raises ConfigError, before
    anything is removed, for what lies elsewhere."""
    for path in entries:
        if not path.parent.resolve().is_relative_to(paths.RUNS):
            raise ConfigError(f"{path} leads out of the runs folder: remove it yourself")
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# Sizes --------------------------------------------------------------------------------------------------------------


def size(path: Path | os.DirEntry) -> int:
    """Bytes of a file, or of all files below a folder; a link counts as the link it is."""
    try:
        if os.path.isdir(path) and not path.is_symlink():
            with os.scandir(path) as entries:
                return sum(map(size, entries))
        return os.lstat(path).st_size
    except FileNotFoundError:  # gone since the folder was listed: a run at work
        return 0


def size_text(count: int) -> str:
    """Bytes for a reader, in powers of 1000: 512 B, 45.2 MB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
