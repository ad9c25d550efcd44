"""How much longer a run takes: from earlier runs of the same configuration, and from weights where there are none."""

import dataclasses
import json

import pytest

from papertrail.estimate import duration_text, earlier_seconds, seconds_left
from papertrail.plan import StageSpec, make_plan
from papertrail.run import write_run_file
from study.preset import load_preset, override, to_toml
from study.run import Run


def spec(name: str, *needs: str, weight: int = 1) -> StageSpec:
    return StageSpec(name, name, name, {}, needs, name, weight=weight)


PLAN = make_plan([spec("a"), spec("b", "a", weight=3), spec("c", "b"), spec("d", "a", weight=2)])


@pytest.mark.parametrize(
    ("left", "seconds", "jobs", "expected"),
    [
        ("abcd", {}, 2, None),
        ("abcd", {"a": 10.0}, 1, 70.0),  # ten seconds for each unit of weight
        ("abcd", {"a": 10.0}, 2, 50.0),  # a, b and c follow each other
        ("cd", {"a": 10.0, "b": 30.0, "c": 5.0, "d": 5.0}, 1, 10.0),
        ("cd", {"a": 10.0, "b": 30.0, "c": 5.0, "d": 5.0}, 2, 5.0),
    ],
)
def test_the_longest_chain_or_all_of_it_shared(left, seconds, jobs, expected):
    assert seconds_left(PLAN, left, seconds, jobs) == expected


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "10 s"), (44, "40 s"), (94, "90 s"), (100, "2 min"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_a_duration_for_a_reader(seconds, text):
    assert duration_text(seconds) == text


def test_earlier_runs_count_where_their_configuration_is_the_same(tmp_path):
    smoke = load_preset("smoke")
    runs = {
        "one": Run.of("one", tmp_path / "one", smoke),
        "two": Run.of("two", tmp_path / "two", override(smoke, {"sft.learning_rate": 0.5})),
    }
    for run, seconds in zip(runs.values(), (30.0, 50.0), strict=True):
        run.path.mkdir()
        (run.path / "config.toml").write_text(to_toml(run.preset))
        for stage in ("pretrain", "sft"):
            facts = {"stage": stage, "fingerprint": {"config": run.config_of(stage)}, "outputs": {}}
            run.stage_folder(stage).mkdir(parents=True)
            write_run_file(run.stage_folder(stage), {**facts, "wall_seconds": seconds})
    (tmp_path / "two" / "dpo").mkdir()
    (tmp_path / "two" / "dpo" / "run.json").write_text("damaged")
    assert earlier_seconds(runs["one"]) == {"pretrain": 30.0, "sft": 30.0}
    fresh = dataclasses.replace(runs["one"], name="new", path=tmp_path / "new")
    assert earlier_seconds(fresh) == {"pretrain": pytest.approx(40.0, abs=10), "sft": 30.0}
    assert json.dumps(earlier_seconds(Run.of("new", tmp_path / "elsewhere" / "new", smoke))) == "{}"
