"""The plan was fixed before the run: its hash in every record, and the dates of real commits."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

from basics.errors import ReportError
from basics.files import sha256_file
from papertrail import preregistration, records
from papertrail.plan import Project
from papertrail.records import Record

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    (root / "study").mkdir(parents=True)
    (root / "study" / "plan.toml").write_text("margin = 0.01\n")
    return Project(root=root, notebooks=root, plan=root / "study" / "plan.toml")


def git(root: Path, *arguments: str, day: int = 1) -> None:
    date = f"2026-03-{day:02}T12:00:00+01:00"
    names = ["-c", "user.name=n", "-c", "user.email=e"]
    environment = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date, "PATH": "/usr/bin:/bin:/usr/local/bin"}
    subprocess.run(["git", *names, "-C", str(root), *arguments], check=True, env=environment)


@pytest.fixture
def committed(project):
    """The plan in a repository's first commit, of 2026-03-01, and another file in a second, of 2026-03-09."""
    git(project.root, "init", "-q")
    git(project.root, "add", "study")
    git(project.root, "commit", "-qm", "The plan")
    (project.root / "other").write_text("x")
    git(project.root, "add", "other")
    git(project.root, "commit", "-qm", "Something else", day=9)
    return project


def run(project: Project, day: int = 5, plan: str | None = "") -> list[Record]:
    """Records of a run that began on a day in March, with the plan's hash as it is now."""
    plan = project.plan_sha256 if plan == "" else plan
    stages = {
        f"stage/{name}": {"started": f"2026-03-{day + late:02}T11:00:00+00:00", "git": {"commit": COMMIT}}
        for late, name in enumerate(("data", "sft"))
    }
    found = {**stages, "evaluation/sft/x": {"metrics": {}}}
    return [Record(name, values, None, "x.ipynb", 0, plan) for name, values in found.items()]


def test_a_plan_that_is_older_than_the_run_is_reported_with_both_commits(committed):
    found = preregistration.finding(committed, run(committed))
    first = subprocess.run(
        ["git", "-C", str(committed.root), "rev-list", "--max-parents=0", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert found.problems == () and found.unchecked == ""
    assert (found.plan_commit, found.plan_date) == (first, "2026-03-01T12:00:00+01:00")
    assert (found.run_commits, found.run_started) == ((COMMIT,), "2026-03-05T11:00:00+00:00")
    line = preregistration.require(found)
    assert line == (
        f"plan: commit {first[:12]} of 2026-03-01T12:00:00+01:00; "
        "run: commit 0123456789ab, begun 2026-03-05T11:00:00+00:00"
    )


def test_a_plan_that_was_changed_after_the_run_began_fails_though_the_records_hold_its_hash(committed):
    committed.plan.write_text("margin = 0.02\n")
    git(committed.root, "commit", "-qam", "Another margin", day=6)
    (problem,) = preregistration.finding(committed, run(committed)).problems
    assert problem.startswith("study/plan.toml was last changed on 2026-03-06T12:00:00+01:00 (commit ")
    assert "after the run began on 2026-03-05T11:00:00+00:00" in problem
    assert preregistration.finding(committed, run(committed, day=7)).problems == ()


def test_the_zone_of_a_commits_date_counts(committed):
    """12:00 at +01:00 is 11:00 UTC, the second in which the run began: not later."""
    committed.plan.write_text("margin = 0.02\n")
    git(committed.root, "commit", "-qam", "Another margin", day=5)
    assert preregistration.finding(committed, run(committed)).problems == ()


def test_records_of_another_plan_fail_with_both_hashes(committed):
    before = run(committed)
    committed.plan.write_text("margin = 0.02\n")
    found = preregistration.finding(committed, before)
    assert len(found.problems) == 1 and "exploratory" in found.problems[0]
    assert all(digest[:12] in found.problems[0] for digest in (before[0].plan, sha256_file(committed.plan)))
    with pytest.raises(ReportError, match="the plan was not fixed before the run"):
        preregistration.require(found)


def test_records_of_which_only_some_hold_the_plan_fail(committed):
    first, *others = run(committed)
    (problem,) = preregistration.finding(committed, [replace(first, plan=None), *others]).problems
    assert "records hold none:" in problem


@pytest.mark.parametrize("state", ["no repository", "not committed", "shallow", "no hash", "inner folder"])
def test_what_cannot_be_checked_is_said_to_be_unchecked(state, committed, tmp_path):
    project, published = committed, run(committed)
    if state == "no repository":
        (project.root / ".git").rename(tmp_path / "git")
        expected = "there is no git repository"
    elif state == "not committed":
        project.plan.write_text("margin = 0.03\n")
        published = run(project)
        expected = "plan.toml has changes that are not committed"
    elif state == "shallow":
        git(tmp_path, "clone", "-q", "--depth", "1", f"file://{project.root}", "shallow")
        project = replace(project, root=tmp_path / "shallow", plan=tmp_path / "shallow" / "study" / "plan.toml")
        expected = "the clone is shallow"
    elif state == "no hash":
        published = run(project, plan=None)
        expected = "the run's records hold no hash of a plan"
    else:  # an archive unpacked inside another repository
        project = replace(project, root=project.root / "study")
        expected = "there is no git repository"
    found = preregistration.finding(project, published)
    assert expected in found.unchecked and found.problems == ()
    assert f"which came first was not checked: {found.unchecked}" in preregistration.require(found)


def test_a_study_without_a_plan_has_nothing_to_check(tmp_path):
    found = preregistration.finding(
        Project(root=tmp_path, notebooks=tmp_path), run(Project(tmp_path, tmp_path), plan=None)
    )
    assert found.unchecked == "the study has no plan" and found.problems == () and found.plan_sha256 is None


def test_every_published_record_carries_the_plan(monkeypatch):
    shown = []
    monkeypatch.setattr(InteractiveShell, "initialized", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda data, **options: shown.append(data[records.MIME]))
    monkeypatch.setattr(records, "_plan", None)
    records.publish("a", {"x": 1})
    records.carry_plan("f" * 64)
    records.publish("a", {"x": 1})
    assert "plan" not in shown[0] and shown[1] == {**shown[0], "plan": "f" * 64}
