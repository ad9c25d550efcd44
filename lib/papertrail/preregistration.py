"""Whether a study's plan was fixed before a run: the plan's hash in the records, and the dates of its last commit and
of the run's beginning."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from basics.errors import ReportError
from papertrail import records
from papertrail.notebook_files import executed_notebooks
from papertrail.plan import Project
from papertrail.provenance import git
from papertrail.records import Record


@dataclass(frozen=True)
class Finding:
    """What the records and the repository say of the plan. Dates are those at which the commits were written."""

    plan_sha256: str | None  # of the file now
    plan_commit: str | None  # the last that changed it
    plan_date: str | None
    run_commits: tuple[str, ...]  # of the code that made the run's stages
    run_started: str | None  # when its first stage began
    unchecked: str = ""  # why the dates were not compared
    problems: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The finding in one line."""
        of_plan = f"commit {self.plan_commit[:12]} of {self.plan_date}" if self.plan_commit else "no commit"
        of_run = ", ".join(f"commit {commit[:12]}" for commit in self.run_commits) or "no commit"
        line = f"plan: {of_plan}; run: {of_run}, begun {self.run_started or 'at an unknown time'}"
        return f"{line}; which came first was not checked: {self.unchecked}" if self.unchecked else line


def of_notebooks(project: Project, notebooks: Path) -> Finding:
    """The finding for a folder of executed notebooks. Raises RecordError for one that cannot be read."""
    paths = executed_notebooks(notebooks)
    return finding(project, [record for path in paths for record in records.read(path).values()])


def finding(project: Project, published: Iterable[Record]) -> Finding:
    """Compare the plan with the records of a run.

    Problems: the records hold another hash of the plan, only some of them hold one, or the plan was changed after the
    run began. Without a repository, in a shallow clone, where changes of the plan are not committed, and where no
    record holds a plan's hash, the dates are not compared, and `unchecked` says why.
    """
    published, plan = list(published), project.plan
    stages: list[dict[str, Any]] = [record.values for record in published if record.name.startswith("stage/")]
    started = min((stage["started"] for stage in stages if stage.get("started")), default=None)
    held = {record.plan for record in published}
    made = dict.fromkeys(commit for stage in stages if (commit := (stage.get("git") or {}).get("commit")))
    commit = date = None
    unchecked = ""
    if plan is None:
        unchecked = "the study has no plan"
    elif git(project.root, "rev-parse", "HEAD") is None:
        unchecked = "there is no git repository"
    elif git(project.root, "rev-parse", "--is-shallow-repository") != "false":
        unchecked = "the clone is shallow (`git fetch --unshallow`)"
    elif git(project.root, "status", "--porcelain", "--", str(plan)) != "":
        unchecked = f"{plan.name} has changes that are not committed"
    else:
        commit, date = git(project.root, "log", "-1", "--format=%H %aI", "--", str(plan)).split()
        if not started:
            unchecked = "no record says when the run began"
        elif held <= {None}:
            unchecked = "the run's records hold no hash of a plan"
    problems = _problems(project, held, commit, date, started) if plan is not None and held - {None} else ()
    return Finding(project.plan_sha256, commit, date, tuple(made), started, unchecked, tuple(problems))


def _problems(
    project: Project, held: set[str | None], commit: str | None, date: str | None, started: str | None
) -> Iterator[str]:
    file = project.plan.relative_to(project.root).as_posix()
    ways = "restore the plan that the run was made with and list the change as exploratory, or make the whole run again"
    if others := sorted(sha256[:12] if sha256 else "none" for sha256 in held - {project.plan_sha256}):
        yield f"{file} has hash {project.plan_sha256[:12]}, records hold {', '.join(others)}: {ways}"
    if commit and started and datetime.fromisoformat(date) > datetime.fromisoformat(started):
        yield f"{file} was last changed on {date} (commit {commit[:12]}), after the run began on {started}: {ways}"


def require(found: Finding) -> str:
    """The finding's line. Raises ReportError with its problems."""
    if found.problems:
        lines = "\n".join(f"- {line}" for line in found.problems)
        raise ReportError(f"the plan was not fixed before the run:\n{lines}")
    return found.text
