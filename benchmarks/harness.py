"""Contestants in processes of their own, interleaved; medians, spreads, ratios; a JSON and a Markdown file per part."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from basics import machine, paths
from basics.files import atomic_write
from benchmarks.parts import OURS, PARTS, Part
from papertrail.provenance import git_state, hardware, versions

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "trl", "lm_eval", "accelerate")


@dataclass(frozen=True)
class Options:
    size: str = "7m"
    data: str = "auto"
    rounds: int = -1  # -1: the part's own number
    threads: int = 0  # 0: as many as cores are idle
    only: tuple[str, ...] = ()  # contestants whose name holds one of these; ours always runs


class Contestant:
    """A worker process; requests and answers are lines of JSON."""

    def __init__(self, name: str, target: str, options: Options, threads: int):
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in `close`
        paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", target, str(threads), options.size, options.data],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=PROJECT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
            },
        )

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to "check" or "round"; SystemExit with the end of the log if the process failed."""
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended with exit code {self.process.returncode}:\n{self.log.read()[-3000:]}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def run(name: str, options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure a part; returns the content of its JSON file."""
    part = PARTS[name]
    options = replace(options, data=part.data or options.data)
    threads = options.threads or machine.free_cores()
    say(f"{name}: threads {threads}, of {machine.cores()} cores, as many as are idle unless --threads is given")
    targets = {
        key: target
        for key, target in part.contestants.items()
        if key == OURS or not options.only or any(text in key for text in options.only)
    }
    contestants: list[Contestant] = []
    try:
        checks, settings, data = {}, {}, {}
        for key, target in targets.items():
            contestants.append(Contestant(key, target, options, threads))
            answer = contestants[-1].ask("check")
            checks[key], settings[key] = answer["values"], answer["settings"]
            if key == OURS:
                data = answer["data"]
            say(f"{name}: {key} is ready ({answer['wall']:.0f} s for its check)")
        agreement = agree(checks, part.tolerance)
        rounds: list[dict[str, dict[str, list[float]]]] = []
        warm = {}
        for number in range((options.rounds if options.rounds > 0 else part.rounds) + 1):
            answers = {contestant.name: contestant.ask("round") for contestant in contestants}
            if number == 0:  # compiles, fills caches
                warm = {key: round(answer["wall"], 2) for key, answer in answers.items()}
                continue
            rounds.append({key: answer["measures"] for key, answer in answers.items()})
            rates = ", ".join(
                f"{key} {items / s:.4g}" for key, m in rounds[-1].items() for items, s in [next(iter(m.values()))]
            )
            say(f"{name}: round {number}: {rates}")
        for contestant in contestants:  # what a contestant knows only after a round, such as its numerics
            settings[contestant.name] = (
                contestant.ask("check")["settings"] if contestant.name == OURS else settings[contestant.name]
            )
    finally:
        for contestant in contestants:
            contestant.close()
    return {
        "part": name,
        "title": part.title,
        "size": options.size,
        "data": data,
        "threads": threads,
        "hardware": hardware(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": {name: version for name, version in versions(PACKAGES).items() if version != "not installed"},
        "git": git_state(paths.PROJECT),
        "agreement": agreement,
        "settings": settings,
        "first_round_seconds": warm,
        "rounds": rounds,
        **summary(part, rounds, settings),
    }


def agree(checks: dict[str, dict[str, list[float]]], tolerance: float) -> dict[str, Any]:
    """Compare each contestant's check values with ours; SystemExit where one computes something else.

    Differences are relative to the largest of our values of that name; tolerance 0 asks for equality.
    """
    ours, differences = checks[OURS], {}
    for key, values in checks.items():
        if key == OURS or not values:
            continue
        if set(values) != set(ours):
            raise SystemExit(f"{key} checks {sorted(values)}, ours {sorted(ours)}")
        for what, mine in ours.items():
            theirs = values[what]
            if len(theirs) != len(mine):
                raise SystemExit(f"{key}: {len(theirs)} values of {what}, ours has {len(mine)}")
            scale = max(map(abs, mine)) or 1.0
            difference = max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) / scale
            if not difference <= tolerance:
                raise SystemExit(
                    f"{key} does not compute what ours does: {what} differs by {difference:.2g} of its largest value, "
                    f"more than {tolerance:g}; nothing is timed"
                )
            differences.setdefault(key, {})[what] = difference
    return {"tolerance": tolerance, "differences": differences}


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """(median, low, high, coverage): the narrowest pair of order statistics that covers the median with at least
    `level`, whatever the distribution; of few values the two extremes, with the coverage that they have."""
    x = np.sort(np.asarray(values, float))
    n = len(x)
    low = 0
    while 2 * binom.cdf(low + 1, n, 0.5) <= 1 - level and low + 1 < n // 2:
        low += 1
    coverage = 1 - 2 * binom.cdf(low, n, 0.5) if n > 1 else 0.0
    return float(np.median(x)), float(x[low]), float(x[n - 1 - low]), float(coverage)


def summary(part: Part, rounds: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Rates with quartiles, paired ratios of ours to each peer, and the share of the machine's limit."""
    rates: dict[str, dict[str, Any]] = {}
    series: dict[tuple[str, str], np.ndarray] = {}
    for key in rounds[0]:
        for measure in rounds[0][key]:
            each = np.array([items / seconds for items, seconds in (r[key][measure] for r in rounds)])
            series[key, measure] = each
            low, middle, high = np.quantile(each, [0.25, 0.5, 0.75])
            seconds = float(np.median([r[key][measure][1] for r in rounds]))
            rates.setdefault(key, {})[measure] = {
                "median": middle, "q25": low, "q75": high, "unit": part.measures[measure], "seconds": seconds,
            }  # fmt: skip
    if ("reference" in part.measures) and (OURS, "reference") in series:
        # One epoch: every pair is in the reference pass once and in training once.
        for key in rates:
            if (key, "reference") in series:
                whole = 1 / (1 / series[key, "train"] + 1 / series[key, "reference"])
            else:
                whole = series[key, "train"]  # computes its reference in each step
            series[key, "train with reference"] = whole
            low, middle, high = np.quantile(whole, [0.25, 0.5, 0.75])
            rates[key]["train with reference"] = {"median": middle, "q25": low, "q75": high, "unit": "pairs/s"}
    ratios = []
    for (key, measure), theirs in series.items():
        if key == OURS or key in part.limits or (OURS, measure) not in series:
            continue
        value, low, high, coverage = median_interval(series[OURS, measure] / theirs)
        least = part.least.get((key, measure))
        found_ratio = {"ratio": value, "low": low, "high": high, "coverage": coverage, "least": least}
        ours, peer = (settings.get(one, {}).get("positions an item") for one in (OURS, key))
        if ours and peer and measure in ("train", "score"):
            found_ratio |= {"positions": peer / ours, "step": value * ours / peer}
        ratios.append({"peer": key, "measure": measure, **found_ratio})
    found: dict[str, Any] = {"rates": rates, "ratios": ratios}
    limits = [key for key in part.limits if key in rates]
    flops = settings.get(OURS, {}).get("flops_per_token")
    if limits and flops:
        found["shares"] = []
        for key in rates:
            if (key, "train") not in series:
                continue
            for limit in limits:
                for count, per_token in flops.items():
                    share = np.median(series[key, "train"] * per_token / 1e9 / series[limit, "matmul"])
                    found["shares"].append({"contestant": key, "limit": limit, "count": count, "share": float(share)})
    return found


def write(result: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """`folder/<part>.json`, its table `folder/<part>.md`, and README.md over all parts in that folder."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_table = folder / f"{result['part']}.json", folder / f"{result['part']}.md"
    atomic_write(as_json, json.dumps(result, indent=1, default=float) + "\n")
    atomic_write(as_table, markdown(result))
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}
    atomic_write(folder / "README.md", overview([found[name] for name in PARTS if name in found]))
    return as_json, as_table


def overview(results: Sequence[dict[str, Any]]) -> str:
    """All parts in one table: ours against each peer, the share of the machine's limit, and what has no peer."""
    lines = [
        "# Benchmark results",
        "",
        "Written by `make bench`. Each part has a page with its machine, versions, rounds and rates. A ratio above 1",
        "means that threefold is faster; the interval covers the median ratio with the probability in parentheses. The",
        "targets were set before the measurement, and not all of them are reached.",
        "",
        "| part | data | threefold against | unit | ratio | interval of the median | target |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for result in results:
        part, page = PARTS[result["part"]], f"[{result['title']}]({result['part']}.md)"
        sources = ", ".join(entry["source"] for entry in result["data"].values()) or "embedded sample"
        for entry in result["ratios"]:
            unit = part.measures[entry["measure"].removesuffix(" with reference")]
            what = unit if entry["measure"] in ("train", "score") else f"{unit}, {entry['measure']}"
            least = "" if entry["least"] is None else f"{entry['least']:g}"
            lines.append(
                f"| {page} | {sources} | {entry['peer']} | {what} | {entry['ratio']:.2f} | {entry['low']:.2f} to "
                f"{entry['high']:.2f} ({entry['coverage']:.0%}) | {least} |"
            )
        for entry in result.get("shares", []):
            if entry["contestant"] == OURS:
                least = part.least.get((entry["limit"], entry["count"]))
                asked = "" if least is None else f"{least:.0%}"
                limit, share = f"the machine's {entry['limit']}", f"{entry['share']:.0%}"
                lines.append(f"| {page} | {sources} | {limit} | {entry['count']} | {share} | | {asked} |")
        if not result["ratios"]:
            for measure, rate in result["rates"][OURS].items():
                lines.append(f"| {page} | {sources} | | seconds per {measure} | {rate['seconds']:.0f} | | |")
    return "\n".join(lines) + "\n"


def markdown(result: dict[str, Any]) -> str:
    """The table of a part, with what it was measured on."""
    host, git = result["hardware"], result["git"]
    n = len(result["rounds"])
    lines = [
        f"## {result['title']}",
        "",
        f"{host['cpu']}, {result['threads']} threads, {host['memory_gib']} GiB"
        + (f", {', '.join(host['gpu'])}" if host["gpu"] else ", no GPU")
        + f"; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}; commit {str(git.get('commit'))[:10]}"
        + (" with changes" if git.get("dirty") else "")
        + f"; load average {result['load'][0]} at the end. {n} interleaved round{'s' * (n > 1)} after one warm-up "
        f"round; model `{result['size']}`.",
        "",
        *(f"{line}\n" for line in (described(result["data"]), PARTS[result["part"]].note) if line),
    ]
    if result["agreement"]["differences"]:
        largest = max(max(values.values()) for values in result["agreement"]["differences"].values())
        lines += [
            f"Checked before timing, in fp32: all contestants compute the same; largest relative difference "
            f"{largest:.1g} (allowed {result['agreement']['tolerance']:g}).",
            "",
        ]
    own = {key: result["settings"].get(key, {}) for key in result["rates"]}
    extra = [column for column in ("positions an item", "padding") if any(column in found for found in own.values())]
    columns = ("contestant", "measure", "median", "quartiles", "unit", "first round, s", *extra)
    lines += [f"| {' | '.join(columns)} |", "|---|---|---:|---:|---|" + "---:|" * (1 + len(extra))]
    shown = {"positions an item": "{:g}", "padding": "{:.0%}"}
    for key, measures in result["rates"].items():
        computed = [shown[column].format(own[key][column]) if column in own[key] else "" for column in extra]
        for measure, rate in measures.items():
            median, low, high = (_figure(rate[name]) for name in ("median", "q25", "q75"))
            first = f"{result['first_round_seconds'][key]:.0f}"
            cells = (key, measure, median, f"{low} to {high}", rate["unit"], first, *computed)
            lines.append(f"| {' | '.join(cells)} |")
    if result["ratios"]:
        lines += ["", *_ratios(result["ratios"])]
    if result.get("shares"):
        lines += ["", "| share of the limit | limit | FLOPs counted | share |", "|---|---|---|---:|"]
        for entry in result["shares"]:
            lines.append(f"| {entry['contestant']} | {entry['limit']} | {entry['count']} | {entry['share']:.0%} |")
    note = "; ".join(f"{key} {value}" for key, value in result["settings"].get(OURS, {}).items() if key not in shown)
    lines += ["", *([f"Threefold: {note}.", ""] if note else [])]
    return "\n".join(lines)


def _ratios(ratios: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the ratios to peers; with their two factors where both computed positions are known."""
    factors = any("positions" in entry for entry in ratios)
    lines = []
    if factors:
        lines += [
            "A ratio is that of the positions computed for an item times that of the positions a second (step).",
            "",
        ]
    columns = ("threefold against", "measure", "ratio", "interval of the median", *(("positions", "step") * factors))
    lines += [f"| {' | '.join((*columns, 'target'))} |", "|---|---|---:|---:|" + "---:|" * (1 + 2 * factors)]
    for entry in ratios:
        interval = f"{entry['low']:.2f} to {entry['high']:.2f} ({entry['coverage']:.0%})"
        cells = [entry["peer"], entry["measure"], f"{entry['ratio']:.2f}", interval]
        if factors:
            cells += [f"{entry[key]:.2f}" if key in entry else "" for key in ("positions", "step")]
        cells.append("" if entry["least"] is None else f"{entry['least']:g}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def described(data: dict[str, dict[str, Any]]) -> str:
    """A sentence on what was measured: sources, numbers and lengths."""
    found = [
        f"{entry['items']:,} {what} of `{entry['source']}` with {mean:.0f} tokens on average ({low:.0f} to {high:.0f} "
        "for nine in ten)"
        for what, entry in data.items()
        for mean, low, high in [entry["tokens"]]
    ]
    vocabulary = next((entry["vocabulary"] for entry in data.values()), 0)
    return f"Data: {'; '.join(found)}; a tokenizer of {vocabulary:,} tokens." if found else ""


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
