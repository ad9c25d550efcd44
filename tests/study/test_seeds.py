"""Several trainings of one lineage: names, plan, records, and the statistics that tell seeds from items."""

import math
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from evaluation_fixtures import language_model
from report_fixtures import MODELS, SKILL, execute_compare, make_run, seal, sha
from scipy import stats as scipy_stats

from basics import files, names, paths
from basics.errors import ConfigError, MissingInput, RecordError
from papertrail import records
from papertrail.plan import dependents
from papertrail.run import read_run_file
from study import stages
from study.comparison import Comparison, claims, confounds, findings, seeds, tables
from study.comparison.measures import HEADLINE, PRIMARY, STAGED
from study.preset import Preset, load_preset, parse_overrides
from study.run import Run, open_run, open_stage
from threefold.config import EvaluationConfig, SourceConfig, TrainConfig
from threefold.evaluation import evaluate, headline, statistics

LINEAGE = ("pretrain", "sft", "dpo")


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PROJECT", tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("THREEFOLD_DATA", "")
    return tmp_path


# Names and plan ------------------------------------------------------------------------------------------------------


def test_a_replicates_name_and_back():
    assert names.replicate_name("sft", 1) == "sft" and names.replicate_name("sft", 12) == "sft-seed12"
    for name in ("sft", "evaluate-sft", "02_sft"):
        for replicate in (1, 2, 10, 37):
            assert names.replicate_of(names.replicate_name(name, replicate)) == (name, replicate)
    for name in ("sft-seed1", "sft-seed0", "sft-seed02", "sft-seeds2", "-seed2"):
        assert names.replicate_of(name) == (name, 1)


def test_folders_notebooks_and_commands_of_replicates(project):
    run = open_run("smoke", overrides=["seeds=3"])
    assert run.stage_folder("sft-seed2") == run.path / "seeds" / "2" / "sft"
    assert run.stage_folder("evaluate-dpo-seed3") == run.path / "seeds" / "3" / "evaluation" / "dpo"
    executed = [run.plan[name].executed for name in ("pretrain-seed2", "dpo-seed3", "evaluate-sft-seed2")]
    assert executed == ["01_pretrain-seed2", "03_dpo-seed3", "04_evaluate-sft-seed2"]
    assert run.plan["evaluate-sft-seed2"].parameters == {"model": "sft", "replicate": 2}
    assert run.command("dpo-seed3") == (
        "papermill notebooks/03_dpo.ipynb runs/smoke/notebooks/03_dpo-seed3.ipynb "
        "-p preset smoke -p overrides seeds=3 -p replicate 3"
    )
    for name in ("gpt2-seed2", "data-seed2", "compare-seed2", "evaluate-random-seed2", "sft-seed1", "evaluate-seed2"):
        with pytest.raises(ConfigError, match="unknown stage"):
            run.stage_folder(name)


def test_a_notebook_opens_the_replicate_it_is_asked_for(project):
    door = {"preset": "smoke", "overrides": "seeds=2; seed=7"}
    first, second = (open_stage("sft", **door, replicate=replicate) for replicate in (1, 2))
    assert (first.name, first.replicate, first.seed) == ("sft", 1, 7)
    assert (second.name, second.replicate, second.seed, second.model) == ("sft-seed2", 2, 8, "sft")
    evaluation = open_stage("evaluate", **door, model="dpo", replicate=2)
    assert (evaluation.name, evaluation.model, evaluation.subject) == ("evaluate-dpo-seed2", "dpo", "dpo-seed2")
    assert evaluation.seed == 7  # the same demonstrations and resamples for every replicate
    with pytest.raises(MissingInput) as caught:
        second.require("pretrain")
    assert "stage pretrain-seed2 of run smoke is not there yet" in str(caught.value)
    assert str(caught.value).endswith("-p replicate 2`")
    with pytest.raises(MissingInput, match="stage data of run"):  # the data are not read again
        second.require("data")


@pytest.mark.parametrize(
    ("stage", "parameters", "message"),
    [
        ("sft", {"replicate": 2}, "replicate = 2: preset smoke has seeds = 1; overrides='seeds=2'"),
        ("sft-seed2", {}, "replicate = 2: preset smoke has seeds = 1"),
        ("sft", {"replicate": 0}, "replicate = 0: expected a whole number of at least 1"),
        ("sft", {"replicate": True}, "replicate = true"),
        ("sft", {"replicate": "2"}, "replicate = '2'"),
        ("pretrain", {"model": "gpt2", "replicate": 2, "overrides": "seeds=2"}, "gpt2 is trained once; seeds repeats"),
        ("evaluate", {"model": "random", "replicate": 2, "overrides": "seeds=2"}, "random is trained once"),
        ("data", {"replicate": 1}, "unknown parameter replicate"),
    ],
)
def test_a_replicate_that_cannot_be_meant_stops(stage, parameters, message, project):
    with pytest.raises(ConfigError) as caught:
        open_stage(stage, **parameters)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (project / "runs" / "smoke").exists()  # nothing half-written


def test_seeds_of_a_preset_are_checked():
    assert [load_preset(name).seeds for name in ("smoke", "laptop", "full")] == [1, 3, 1]
    for override, message in (
        ("seeds=0", "seeds = 0: expected at least 1"),
        ("seeds=1.5", "seeds = 1.5: expected a whole number"),
        ("seed=4294967295; seeds=2", "seed + seeds - 1"),
        ("baselines.external=[{name = 'a-seed2', location = 'x'}]", "'a-seed2': -seed and a number"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_preset("smoke", parse_overrides(override))
        assert message in str(caught.value)


def test_a_replicate_is_planned_from_its_own_parents(project):
    one, three = (open_run("smoke", overrides=[f"seeds={count}"], create=False) for count in (1, 3))
    before, plan = one.plan, three.plan
    new = set(plan) - set(before)
    assert new == {f"{part}{stage}-seed{n}" for part in ("", "evaluate-") for stage in LINEAGE for n in (2, 3)}
    assert plan["pretrain-seed2"].needs == ("data",)
    assert plan["dpo-seed3"].needs == ("sft-seed3",)
    assert plan["evaluate-dpo-seed2"].needs == ("sft-seed2", "dpo-seed2")
    assert new <= set(plan["compare"].needs)
    done: set[str] = set()
    for step in plan.values():
        assert done.issuperset(step.needs)
        done.add(step.name)
    assert {**plan, "compare": before["compare"]} | before == {**plan, "compare": before["compare"]}
    assert set(stages.select(three.preset, "evaluate")) >= {"evaluate-sft", "evaluate-sft-seed3"}
    assert dependents(plan, "sft-seed2") == {*("dpo-seed2", "evaluate-sft-seed2", "evaluate-dpo-seed2", "compare")}


def test_more_seeds_leave_the_first_training_as_it_was(project):
    """Only the comparison is stale; a replicate differs from the first in its seed and its parents alone."""
    one, two = (open_run("smoke", overrides=[f"seeds={count}"], create=False) for count in (1, 2))
    for name in one.plan:
        same = one.fingerprint(name) == two.fingerprint(name)
        assert same == (name != "compare"), name
    for name in ("pretrain", "sft", "dpo", "evaluate-dpo"):
        first, again = (two.fingerprint(stage).to_dict() for stage in (name, f"{name}-seed2"))
        different = {key for key in first if first[key] != again[key]}
        trained = {"seed"} if name in LINEAGE else set()
        parents = {"parents"} if name != "pretrain" else set()
        assert different == {"stage", "digest"} | trained | parents, name


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_headline_figures_alone_are_those_of_the_whole_evaluation(tmp_path):
    def part(name, split, n):
        return SourceConfig(source=name, split=split, max_examples=n)

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"sentence_good": "A fox runs.", "sentence_bad": "A fox run.", "UID": "agreement"}\n')
    asked = EvaluationConfig(
        window=64,
        stride=32,
        perplexity=part("sample-text", "test", 2),
        blimp=SourceConfig(path=str(pairs), reader="minimal-pairs"),
        sentiment=part("sample-sentiment", "validation", 6),
        instructions=part("sample-instructions", "test", 4),
        instruction_new_tokens=4,
        preferences=part("sample-preferences", "test", 4),
        sentiment_demonstrations=SourceConfig(source="sample-sentiment"),
        sentiment_shots=(0, 1),
        sentiment_templates=2,
        sentiment_draws=2,
        bootstrap=50,
    )
    model = language_model(context=256)
    reduced, only = headline(asked)
    whole = {one.protocol: one for one in evaluate(model, asked, seed=3, only=only)}
    alone = evaluate(model, reduced, seed=3, only=only)
    assert [one.protocol for one in alone] == [
        *("sample-text/disjoint-64", "pairs/minimal-pairs", "sample-sentiment/1-shot"),
        *("sample-instructions/responses", "sample-preferences/preferences"),
    ]
    for one in alone:
        for name in one.metrics.keys() - {"draw_spread"}:  # an average over templates
            assert one.metrics[name] == whole[one.protocol].metrics[name], (one.protocol, name)
    assert headline(EvaluationConfig(sentiment_shots=(0,)))[1][2] == "zero-shot"


# Statistics ----------------------------------------------------------------------------------------------------------


def test_a_students_interval_is_the_textbooks():
    a, b = [1.0, 2.0, 3.0, 4.0], [1.5, 2.1, 3.9, 4.3]
    found, reference = statistics.paired_student(a, b), scipy_stats.ttest_rel(b, a)
    assert found.difference == pytest.approx(np.mean(b) - np.mean(a))
    assert found.p == pytest.approx(reference.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval()))
    assert statistics.paired_student([1.0], [2.0])[:4] == (1.0, None, None, 1.0)
    assert statistics.paired_student([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])[1:4] == (None, None, 1.0)  # no spread at all
    with pytest.raises(ValueError, match="same units"):
        statistics.paired_student([1.0], [1.0, 2.0])


def test_a_standard_deviation_of_three_is_as_uncertain_as_chi_square_says():
    """Two degrees of freedom have a closed form: P(X > x) = exp(-x / 2)."""
    found = statistics.deviation([1.0, 2.0, 3.0])
    assert found.value == pytest.approx(1.0) and found.n == 3
    assert found.low == pytest.approx(1 / math.sqrt(-math.log(0.025)))
    assert found.high == pytest.approx(1 / math.sqrt(-math.log(0.975)))
    assert statistics.deviation_p(3.0, 3, 1.0) == pytest.approx(2 * math.exp(-9.0))
    assert statistics.deviation_p(0.1, 3, 1.0) == pytest.approx(2 * (1 - math.exp(-0.01)))
    assert statistics.deviation([0.5, 0.5, 0.5])[1:3] == (None, None)
    with pytest.raises(ValueError, match="two values"):
        statistics.deviation([1.0])
    covered = [
        one.low <= 2.0 <= one.high
        for one in map(statistics.deviation, np.random.default_rng(0).normal(5, 2.0, (2000, 3)))
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_the_standard_error_behind_an_interval():
    z = scipy_stats.norm.ppf(0.975)
    assert statistics.standard_error(3 - z * 0.2, 3 + z * 0.2) == pytest.approx(0.2)


# The comparison ------------------------------------------------------------------------------------------------------


def shifted(nats: float = 0.0, sentiment: float = 0.0) -> dict:
    own = {name: SKILL[name] for name in LINEAGE}
    return {name: (one[0] + nats, one[1], one[2] + sentiment, *one[3:]) for name, one in own.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three trainings whose perplexities lie far apart and whose sentiment hardly does."""
    return make_run(tmp_path_factory.mktemp("seeds") / "fake", replicates=(shifted(0.6), shifted(-0.5)))


@pytest.fixture(scope="module")
def comparison(run):
    return Comparison.load(run)


def test_replicates_are_comparisons_of_their_own_and_leak_into_no_table(comparison, tmp_path):
    assert comparison.models == list(MODELS) and sorted(comparison.replicates) == [2, 3]
    assert not any("seed" in name for name in comparison.records)
    second = comparison.replicates[2]
    assert second.models == list(LINEAGE) and second.records["stage/sft"].name == "stage/sft-seed2"
    assert len(second.items("sft", "sample-sentiment/3-shot")) and second.model("sft") is not None
    alone = Comparison.load(make_run(tmp_path / "alone"))
    for table in (
        tables.headline,
        tables.sentiment,
        partial(tables.metrics, name="tasks"),
        partial(tables.metrics, name="preferences"),
        tables.stability,
        tables.efficiency,
    ):
        assert table(comparison).values == table(alone).values
    rows = {row["Stage"]: row for row in tables.provenance(comparison).values["rows"]}
    assert rows["sft-seed2"]["Weights (SHA-256)"] == sha("weights of sft-seed2")[:12]
    assert set(comparison.table["replicate"]) == {1, 2, 3} and set(alone.table["replicate"]) == {1}


def test_another_replicates_weights_are_refused(run, tmp_path):
    swapped = shutil.copytree(run, tmp_path / "swapped")
    second, third = (swapped / "seeds" / n / "sft" / "model.safetensors" for n in "23")
    second.write_bytes(third.read_bytes())
    with pytest.raises(RecordError) as caught:
        Comparison.load(swapped)
    assert "replicate 2" in str(caught.value) and "\n" not in str(caught.value)
    assert sha("weights of sft-seed2")[:12] in str(caught.value)
    assert sha("weights of sft-seed3")[:12] in str(caught.value) and "--only sft-seed2 --force" in str(caught.value)


def test_a_copy_is_no_second_training(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "copied")
    weights = sha("weights of pretrain")
    for place in ("pretrain", "seeds/2/pretrain"):
        shutil.copy(copied / "pretrain" / "model.safetensors", copied / place / "x")
    facts = read_run_file(copied / "seeds/2/pretrain")
    files.write_note(copied / "seeds/2/pretrain/run.json", facts | {"weights_sha256": weights})
    shutil.move(copied / "seeds/2/pretrain/x", copied / "seeds/2/pretrain/model.safetensors")
    for name in ("01_pretrain-seed2", "04_evaluate-pretrain-seed2"):
        path = copied / "notebooks" / f"{name}.ipynb"
        path.write_text(path.read_text().replace(sha("weights of pretrain-seed2"), weights))
    with pytest.raises(RecordError, match=f"replicates 1 and 2 of pretrain have the same weights {weights[:12]}"):
        Comparison.load(copied)


def test_a_replicate_that_the_preset_asks_for_and_that_is_not_there_is_named(run, tmp_path, monkeypatch):
    copied = shutil.copytree(run, tmp_path / "fake")
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    preset = Preset(name="fake", dpo=TrainConfig(steps=1))
    assert len(Comparison.load(seal(Run.of("fake", copied, replace(preset, seeds=2)))).replicates) == 1
    assert Comparison.load(Run.of("fake", copied, preset)).replicates == {}
    part = Comparison.load(seal(Run.of("fake", copied, replace(preset, seeds=4))))
    stages = [f"{kind}{stage}-seed4" for stage in LINEAGE for kind in ("", "evaluate-")]
    assert sorted(part.absent) == sorted(stages) and "pretrain-seed4" in findings.notice(part, preset).markdown


def test_spreads_are_those_of_the_records(comparison):
    found = {(one.measure.key, one.stage): one for one in seeds.spreads(comparison)}
    assert set(found) == {(measure, stage) for measure in HEADLINE for stage in LINEAGE}
    one = found["perplexity", "sft"]
    values = [each.value("perplexity", "sft") for each in comparison.trainings.values()]
    assert one.values == tuple(value.value for value in values) and len(set(one.values)) == 3
    assert one.mean == pytest.approx(np.mean(one.values))
    assert one.deviation.value == pytest.approx(np.std(one.values, ddof=1))
    assert one.error_over_items == pytest.approx((values[0].high - values[0].low) / (2 * 1.959964), rel=1e-6)
    assert one.p == pytest.approx(2 * math.exp(-((one.deviation.value / one.error_over_items) ** 2)))
    assert one.larger == seeds.OVER_SEEDS  # e^0.6 apart, a hundredth of a nat a document
    assert found["sentiment", "sft"].larger != seeds.OVER_SEEDS
    adjusted = statistics.holm([each.p for each in found.values()])
    assert [each.p_adjusted for each in found.values()] == adjusted


def test_changes_are_paired_by_seed_and_compare_logarithms_of_perplexity(comparison):
    found = {(one.measure.key, one.b): (one, each) for one, each in seeds.changes(comparison)}
    one, each = found["perplexity", "sft"]
    trained = comparison.trainings.values()
    logs = [math.log(t.value("perplexity", "sft").value / t.value("perplexity", "pretrain").value) for t in trained]
    assert each == pytest.approx([math.expm1(x) for x in logs])
    assert one.n == 3 and one.change == pytest.approx(math.expm1(np.mean(logs)))
    half = scipy_stats.t.ppf(0.975, 2) * np.std(logs, ddof=1) / math.sqrt(3)
    assert (one.low, one.high) == pytest.approx((math.expm1(np.mean(logs) - half), math.expm1(np.mean(logs) + half)))
    assert one.verdict == "worse"  # +0.1 nats in every training, however far apart the trainings are
    assert all(pair[0].adjusted >= pair[0].p for pair in found.values())


def test_gpt2s_rows_that_were_repeated_are_compared_with_ours_over_the_seeds(comparison):
    """The first GPT-2's records stand for those of its replicates."""
    gpt2 = {name: record for name, record in comparison.records.items() if name.startswith("evaluation/gpt2/")}
    again = {
        place: replace(one, records={**one.records, **gpt2}, differences={}, _items={})
        for place, one in comparison.replicates.items()
    }
    repeated = replace(comparison, replicates=again, differences={}, _items={})
    found = {(one.measure.key, one.a, one.b): each for one, each in seeds.changes(repeated)}
    trained = comparison.trainings.values()
    theirs, ours = ([one.value("bits_per_byte", name) for one in trained] for name in ("gpt2", "pretrain"))
    expected = [one.value - theirs[0].value for one in ours]
    assert found["bits_per_byte", "gpt2", "pretrain"] == pytest.approx(expected)
    assert {one.stage for one in seeds.spreads(repeated)} == {*LINEAGE, "gpt2"}
    assert not [one for one, _ in seeds.changes(comparison) if one.a == "gpt2"]


def test_tables_and_sentences_of_three_seeds(comparison):
    spread, changes = tables.seed_spread(comparison), tables.seed_changes(comparison)
    assert spread.name == "comparison/seeds" and spread.values["seeds"] == [1337, 1338, 1339]
    assert len(spread.values["rows"]) == len(HEADLINE) * 3 and spread.values["trainings"] == 3
    assert len(changes.values["rows"]) == 2 * len(STAGED) - 2  # pretraining has no rewards
    assert changes.markdown.startswith("| Measure")
    row = next(row for row in spread.values["rows"] if row["Measure"] == "Sentiment")
    assert row["Value by seed"].count("%") == 3 and row["SE over items"].endswith(" pp")
    (said,) = findings.trust(comparison)
    assert "Over 3 training seeds" in said.sentence and "standard deviation of" in said.sentence
    assert set(said.evidence) <= set(comparison.records)
    assert (
        "Intervals reflect the sampling of items for the first of 3 training seeds"
        in confounds.listing(comparison).markdown
    )
    assert findings.variables(comparison)["trained"] == "3 times"


def test_changes_of_primary_measures_are_a_family_of_their_own(comparison):
    found = {(one.b, one.measure.key): one for one, _ in seeds.changes(comparison)}
    primary = [(stage, key) for stage, keys in PRIMARY.items() for key in keys if (stage, key) in found]
    assert ("dpo", "reward_margin") in primary and ("sft", "response_loss") in primary
    assert {found[key].family for key in primary} == {len(primary)}
    assert {one.family for key, one in found.items() if key not in primary} == {len(found) - len(primary)}


def test_seeds_that_differ_by_noise_alone_are_not_said_to_vary_more(tmp_path):
    """Trainings of equal skill, whose answers differ by little noise: no claim that seeds outweigh items."""
    same = Comparison.load(make_run(tmp_path / "same", replicates=(shifted(), shifted())))
    assert not [one for one in seeds.spreads(same) if one.larger == seeds.OVER_SEEDS]


def test_one_seed_is_said_to_be_one(tmp_path):
    run = make_run(tmp_path / "one")
    once = Comparison.load(run)
    for table in (tables.seed_spread(once), tables.seed_changes(once)):
        assert table.values["rows"] == [] and table.values["trainings"] == 1
        assert "not measured" in table.markdown and table.markdown == tables.ONE_SEED
    assert "trained once" in findings.trust(once)[0].sentence
    assert "of items for one training seed" in confounds.listing(once).markdown
    assert claims.judge(once)["sft-perplexity"].finding.scope.basis.endswith("one training seed")
    executed = execute_compare(run, paths.PROJECT / "notebooks" / "percent" / "06_compare.py")
    found = records.read(executed)
    assert {"comparison/seeds", "comparison/seed-changes", "comparison/findings"} <= set(found)
    assert files.sha256_json(found["comparison/seeds"].values)  # finite JSON
