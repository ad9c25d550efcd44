"""How much longer a run takes, from what its stages took in earlier runs and so far in this one."""

from collections.abc import Iterable, Mapping

from papertrail.plan import Plan, critical_path
from papertrail.run import Run, intact_run_file

RUNS = 20  # other runs in which a stage is looked up, the latest first


def earlier_seconds(run: Run) -> dict[str, float]:
    """{stage: seconds that it took when it was last made with the same configuration}, by this run or one beside it."""
    seconds: dict[str, float] = {}
    others = {path.parent for path in run.path.parent.glob("*/config.toml")} - {run.path}
    latest = sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True)[:RUNS]
    for name, spec in run.plan.items():
        config = run.config_of(name)
        for folder in [run.path, *latest]:
            facts = intact_run_file(folder / spec.folder) or {}
            took = facts.get("wall_seconds")
            if isinstance(took, int | float) and facts["fingerprint"].get("config") == config:
                seconds[name] = took
                break
    return seconds


def seconds_left(plan: Plan, left: Iterable[str], seconds: Mapping[str, float], jobs: int) -> float | None:
    """Seconds until these stages are made, None if no stage's time is known. An unknown time is estimated from the
    stage's weight."""
    left = list(left)
    if not seconds:
        return None
    rate = sum(seconds.values()) / sum(plan[name].weight for name in seconds)
    expected = {name: seconds.get(name, rate * plan[name].weight) for name in left}
    return max(*critical_path(plan, expected).values(), sum(expected.values()) / jobs)


def duration_text(seconds: float) -> str:
    """ "40 s", "3 min", "2.5 h"."""
    if seconds < 95:
        return f"{max(10, round(seconds, -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5700 else f"{seconds / 3600:.1f} h"
