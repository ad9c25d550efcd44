"""What papertrail knows of a study: its project, and the stages of a run (which notebook makes each, with which
parameters, after which others)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basics.files import sha256_file
from basics.machine import cores


@dataclass(frozen=True)
class Project:
    """Folders, code and libraries behind a study's results, and which of its results are times."""

    root: Path  # of the repository; notebooks are executed in it
    notebooks: Path
    plan: Path | None = None  # the file in `root` that fixes, before a run, how its results will be judged
    packages: tuple[str, ...] = ()  # whose source code counts in a stage's fingerprint
    distributions: tuple[str, ...] = ()  # whose version counts
    summary: str = ""  # the stage that reads every other stage's whole result, times included, and measures nothing
    timed_files: tuple[str, ...] = ()  # names of output files that hold measured times
    timed_records: tuple[str, ...] = ()  # beginnings of the names of records that do
    # file name -> function that reads it, where a repetition may differ in bytes but not in what that returns
    readers: Mapping[str, Callable[[Path], Any]] = field(default_factory=dict)

    @property
    def plan_sha256(self) -> str | None:
        """Hash of the plan as it is now, which every record carries; None where the study has no plan."""
        return sha256_file(self.plan) if self.plan else None


@dataclass(frozen=True)
class StageSpec:
    """One stage of a run."""

    name: str  # "evaluate-sft"
    notebook: str  # stem in the notebooks folder: "04_evaluate"
    executed: str  # stem in the run's notebooks/: "04_evaluate-sft"
    parameters: Mapping[str, str | int]  # of the notebook: {"model": "sft"}
    needs: tuple[str, ...]  # stages that must be finished before it starts
    folder: str  # of what it makes, relative to the run's: "evaluation/sft"
    alone: bool = False  # nothing may run beside it, because it measures times
    weight: int = 1  # how long it takes, compared with other stages; only their order matters
    parallel: bool = False  # its notebook takes `nproc`, the number of processes that do its work together
    memory_keys: str = ""  # settings that take less memory when lowered, for the advice where memory runs out


Plan = Mapping[str, StageSpec]  # by name; each stage comes after those that it needs


def make_plan(specs: Iterable[StageSpec]) -> Plan:
    """The plan of these stages, which keep their order. Raises ValueError where they cannot be run in that order."""
    plan: dict[str, StageSpec] = {}
    for spec in specs:
        if not set(spec.needs) <= set(plan):
            raise ValueError(f"stage {spec.name} comes before a stage that it needs")
        plan[spec.name] = spec
    return plan


def ancestors(plan: Plan, name: str) -> set[str]:
    """The stages that this one needs, directly or not."""
    needs = set(plan[name].needs)
    return needs.union(*(ancestors(plan, need) for need in needs))


def dependents(plan: Plan, name: str) -> set[str]:
    """The stages that need this one, directly or not."""
    return {other for other in plan if name in ancestors(plan, other)}


def threads_for(plan: Plan, spec: StageSpec, jobs: int) -> int:
    """Threads of a stage: all cores if nothing in the plan could ever run beside it, else cores // jobs."""
    alone = spec.alone or len(ancestors(plan, spec.name)) + len(dependents(plan, spec.name)) + 1 == len(plan)
    return cores() if alone else max(1, cores() // jobs)


def critical_path(plan: Plan, weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """{stage: weight of the heaviest chain of stages from its start to the end of the run}.

    weights: of the stages, by default those of the plan; a stage that is not among them counts nothing.
    """
    weights = {name: spec.weight for name, spec in plan.items()} if weights is None else weights
    lengths: dict[str, float] = {}
    for name in reversed(plan):
        after = [lengths[other] for other, spec in plan.items() if name in spec.needs]
        lengths[name] = weights.get(name, 0) + max(after, default=0)
    return lengths
