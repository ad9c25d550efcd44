"""The findings and confounds: they claim what a test holds, and nothing else."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from report_fixtures import GPT2, SKILL, make_run
from scipy.stats import binomtest

from basics import paths
from papertrail.report import sources
from study.comparison import Comparison, confounds, findings, original, tables
from study.comparison.differences import STAGES, compared, difference
from study.comparison.results import WORDS, compact, duration, listed, percent, plain, probability, signed
from study.preset import Preset, load_preset


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return Comparison.load(make_run(tmp_path_factory.mktemp("runs") / "fake"))


def test_findings_are_few_short_and_linked_to_the_page(comparison):
    found = findings.findings(comparison)
    assert 6 <= len(found) <= findings.MOST == 8
    labels = {embed.label for embed in sources.read(paths.REPORT).embeds}
    labels |= {section.identifier for section in sources.read(paths.REPORT).sections}
    for one in found:
        bare = re.sub(r"\]\([^)]*\)|\[", "", one.sentence)
        assert len(bare.split()) <= findings.LONGEST == 30, one.sentence
        assert one.link in labels and re.search(r"\d", one.sentence + "1" * (one.key == "seeds"))
        assert all(name in comparison.records for name in one.evidence)
        assert one.evidence or one.key in ("ledger", "seeds")
    text = findings.opening(comparison).markdown
    assert text.startswith("1. **Threefold pretrain is better than GPT-2 (trained here)** in bits per byte: −0.07")
    assert "[Evidence](#fig-baselines)" in text and "](#sec-confounds)" in text


def test_a_line_of_the_preset_opens_the_page(comparison):
    preset = Preset(name="x", notice="A self-made world.", description="Ten thousand tokens.")
    assert findings.notice(comparison, preset).markdown == "**A self-made world.**"
    assert findings.notice(comparison, replace(preset, notice="")).markdown == "Ten thousand tokens."
    assert findings.notice(comparison, Preset(name="x")).empty
    part = replace(comparison, absent=("evaluate-dpo",))
    assert findings.notice(part, preset).markdown.endswith("the stages evaluate-dpo have not been run.")
    smoke = load_preset("smoke")
    assert "self-made world" in smoke.notice and "no result" in smoke.notice


def test_findings_on_stages_give_change_and_interval(comparison):
    found = {one.key: one for one in findings.findings(comparison)}
    assert re.search(
        r"in reward accuracy: \+4\d\.\d pp \[\+\d\d\.\d, \+\d\d\.\d\]", found["dpo"].sentence.replace("\u00a0", " ")
    )
    assert found["dpo"].differs and "Threefold SFT is worse than Threefold pretrain" in found["sft"].sentence
    assert "above the majority class (51.0%)" in found["sentiment"].sentence


def test_a_dpo_that_learned_nothing_is_said_with_what_it_had(tmp_path):
    loaded = Comparison.load(make_run(tmp_path / "fake", skills={"dpo": SKILL["sft"]}, seeds={"sft": 4, "dpo": 4}))
    loaded.records["data/sources"].values["sources"] = [{"use": "dpo", "documents": 621}]
    dpo = next(one for one in findings.stages(loaded) if one.key == "dpo")
    assert "**No detectable difference** between Threefold DPO and Threefold SFT in reward accuracy" in dpo.sentence
    assert "100 steps, 621 pairs, KL 0.050" in dpo.sentence and not dpo.differs


def edit_configs(loaded, **configs):
    for model, config in configs.items():
        loaded.records[f"model/{model}"].values["config"] = config


def said(loaded):
    """Everything that the report generates about differences between models, as one text."""
    results = [
        findings.opening(loaded), confounds.listing(loaded), tables.standing(loaded), tables.stage_evolution(loaded),
        original.standing(loaded),
    ]  # fmt: skip
    return " ".join(one.markdown for one in results)


def test_identical_architectures_with_different_optimizers_never_differ_by_architecture(tmp_path):
    """The swap test: GPT-2's row is given our architecture; all that is left to differ is how it was trained."""
    swapped = Comparison.load(make_run(tmp_path / "swapped"))
    ours = swapped.model("pretrain")["config"]
    edit_configs(swapped, gpt2=ours, distilgpt2=ours)
    first = findings.against_baselines(swapped)[0]
    assert first.differs and "they differ in optimizer and learning rate" in first.sentence
    assert "rchitecture" not in said(swapped).replace("named after a published model", "")
    assert "**C1 Optimizer.**" in said(swapped) and "AdamW: GPT-2" in said(swapped)
    one = first.difference
    assert {"optimizer", "learning_rate"} <= {caveat.key for caveat in confounds.of(swapped, one)}
    assert "C1" in tables.standing(swapped).values["rows"][0]["Confounds"]
    same = Comparison.load(make_run(tmp_path / "same"))  # and the other way round: one optimizer, two architectures
    same.stage("gpt2")["fingerprint"]["config"]["gpt2"]["optimizer"] = "muon"
    assert "they differ in architecture (" in findings.against_baselines(same)[0].sentence
    edit_configs(same, pretrain=GPT2)  # nothing at all is left
    assert "differ in" not in findings.against_baselines(same)[0].sentence


def test_inherited_tokens_count(comparison):
    rows = {row["Model"]: row for row in tables.training_recipes(comparison).values["rows"]}
    assert rows["DistilGPT-2 (trained here)"]["Training tokens"] == "5M (2.5M inherited)"
    assert rows["Threefold DPO"]["Training tokens"] == "3.3M (2.9M inherited)"
    assert rows["Threefold DPO"]["Optimizer"] == "Muon → AdamW" and rows["Threefold pretrain"]["Precision"] == "fp32"
    assert rows["Threefold pretrain"]["Learning rate"] == "0.003 (hidden matrices 0.02)"
    one = difference(comparison, "bits_per_byte", "distilgpt2", "pretrain")
    assert "tokens" in {caveat.key for caveat in confounds.of(comparison, one)}


def test_further_baselines_are_compared_by_their_records_alone(tmp_path):
    """Also one that no file of the comparison names."""
    loaded = Comparison.load(make_run(tmp_path / "fake", extra=("gpt2-adamw", "gpt2-sgd")))
    assert loaded.baselines == ["gpt2", "gpt2-adamw", "distilgpt2", "gpt2-sgd"] and "gpt2-sgd" in loaded.trained
    pairs = {(one.a, one.b) for one in compared(loaded, "gpt2-sgd")}
    assert pairs == {("gpt2-sgd", other) for other in (*loaded.baselines[:3], "pretrain", "sft", "dpo")}
    assert "gpt2-sgd (trained here)" in tables.training_recipes(loaded).markdown.replace("\\", "")
    assert [one.difference.a for one in findings.against_baselines(loaded)] == ["gpt2", "gpt2-adamw"]


def test_runs_whose_differences_are_noise_claim_none(tmp_path):
    level = dict.fromkeys(SKILL, (2.1, 0.6, 0.8, 0.5, 0.5, 0.5))
    for trial in range(3):
        seeds = {model: 100 * trial + index for index, model in enumerate(SKILL)}
        loaded = Comparison.load(make_run(tmp_path / str(trial), skills=level, seeds=seeds, ablations=False))
        assert [one.sentence for one in findings.findings(loaded) if one.differs] == []
        for result in (tables.stage_evolution(loaded), tables.standing(loaded)):
            assert {one["verdict"] for one in result.values["differences"]} <= {
                "equivalent",
                "no detectable difference",
            }


def test_identical_models_are_never_said_to_differ_and_their_interval_is_honest(tmp_path):
    level = dict.fromkeys(SKILL, (2.1, 0.6, 0.8, 0.5, 0.5, 0.5))
    loaded = Comparison.load(make_run(tmp_path / "fake", skills=level, seeds=dict.fromkeys(SKILL, 5)))
    assert not any(one.differs for one in findings.findings(loaded))
    for one in compared(loaded):
        assert one.change == 0 and one.p == 1 and one.identical and one.verdict == "no detectable difference"
        if one.measure.unit == "share":  # none of n differed: at least one in n may, by Bonett and Price
            assert -one.low == one.high > 1 / one.n, one
        else:
            assert one.low is None and one.high is None
    assert "[0.0, 0.0]" not in said(loaded).replace("\u00a0", " ").replace("\\", "")


def shuffled(comparison, seed):
    """Every item's results dealt out at random among the trained models: whatever differs now is chance."""
    generator = np.random.default_rng(seed)
    models = [model for model in comparison.models if model != "random"]
    items = {}
    for protocol in comparison.protocols:
        frames = [comparison.items(model, protocol) for model in models]
        unit = next((key for key in ("document", "item") if key in frames[0].columns), None)
        if unit is None:
            continue
        keys = [key for key in ("template", "draw") if key in frames[0].columns]
        frames = [frame.sort_values([unit, *keys]).reset_index(drop=True) for frame in frames]
        units, place = np.unique(frames[0][unit], return_inverse=True)
        order_UM = np.array([generator.permutation(len(models)) for _ in units])
        for rank, model in enumerate(models):
            holder = order_UM[place, rank]
            rows = pd.concat([frame[holder == index] for index, frame in enumerate(frames)])
            items[model, protocol] = rows.sort_index()
    return Comparison(comparison.records, resamples=300, _items=items)


def thinned(comparison, documents, count):
    """The same run over fewer documents and items, so that a hundred of them can be compared in a test."""
    items = {}
    for model in comparison.models:
        for protocol in comparison.evaluations(model):
            frame = comparison.items(model, protocol)
            unit = next((key for key in ("document", "item") if key in frame.columns), None)
            if unit:
                frame = frame[frame[unit] < (documents if unit == "document" else count)]
            items[model, protocol] = frame
    return Comparison(comparison.records, resamples=300, _items=items)


RUNS = 60


@pytest.mark.parametrize("documents", [6, 40])
def test_shuffled_results_yield_false_sentences_in_at_most_a_twentieth_of_reports(comparison, documents):
    """The family-wise error over *all* sentences and tables of a report, by simulation; and that the tests are not
    simply blind: the same results unshuffled are told apart, and unadjusted ones would claim much."""
    small = thinned(comparison, documents, 60)
    false, unadjusted = 0, 0
    for seed in range(RUNS):
        world = shuffled(small, seed)
        every = compared(world)
        claimed = [one for one in every if one.detected]
        said = [one for one in findings.findings(world) if one.differs] if claimed else []
        assert bool(said) <= bool(claimed)
        false += bool(claimed)
        unadjusted += any(replace(one, adjusted=None).detected for one in every)
    assert len(every) > 40
    assert binomtest(false, RUNS, 0.05, alternative="greater").pvalue > 0.05, f"{false} of {RUNS} reports"
    assert unadjusted > 5 * max(false, 1)
    assert any(one.detected for one in compared(small))


def test_shuffled_reports_hold_no_sentence_that_claims(comparison):
    for seed in (0, 1, 2):
        world = shuffled(comparison, seed)
        assert not any(one.differs for one in findings.findings(world))
        text = findings.opening(world).markdown + original.standing(world).markdown
        for words in ("is better than", "is worse than", "exceeds |", "lags |"):
            assert words not in text.replace("exceeds (", "").replace("lags (", ""), text


def test_equivalence_is_claimed_falsely_at_most_in_a_fortieth(comparison):
    """A true difference of exactly the margin (2 points of 4,000 items, half of them discordant by chance): the 95%
    interval lies within the margin in at most 2.5% of samples; with no true difference it mostly does."""
    from study.comparison.differences import Difference
    from study.comparison.measures import MEASURES
    from threefold.evaluation.statistics import paired_proportions

    def equivalent(gain, trials=400, n=4000):
        generator, count = np.random.default_rng(1), 0
        for _ in range(trials):
            kind = generator.choice(3, n, p=[0.05 + gain, 0.05, 0.90 - gain])  # only b, only a, both
            one = paired_proportions(kind != 0, kind != 1)
            found = Difference(MEASURES["sentiment"], "a", "b", one.difference, one.low, one.high, one.p, n, "x")
            count += found.verdict == "equivalent"
        return count / trials

    assert equivalent(MEASURES["sentiment"].margin) <= 0.04
    assert equivalent(0.0) > 0.95


def test_confounds_are_numbered_once_and_referred_to_by_number(tmp_path):
    run = make_run(tmp_path / "one", source="wikitext-2", tokenizers={"gpt2": "another"}, hub=("distilgpt2",))
    loaded = Comparison.load(run)
    for values in (loaded.stage(stage) for stage in ("pretrain", "sft", "dpo", "gpt2")):
        values["fingerprint"]["config"]["data"] = {"pretrain": [{"source": "wikitext-103"}]}
    for model in loaded.models:
        for protocol, record in loaded.evaluations(model).items():
            if "text" in protocol and protocol != "speed":
                record["settings"] = record["settings"] | {"data": {"source": "wikitext-2", "subsampled": False}}

    def keys(*pair):
        return {one.key for one in confounds.of(loaded, difference(loaded, *pair))}

    assert {"tokenizer", "baseline", "in_domain"} <= keys("bits_per_byte", "gpt2", "dpo")
    other = keys("bits_per_byte", "distilgpt2", "dpo")
    assert {"in_domain", "elsewhere"} <= other and not {"tokenizer", "baseline", "optimizer"} & other
    task = {"source": "gsm8k", "subsampled": True}
    for model in loaded.models:
        record = loaded.evaluations(model)["wikitext-2-problems/5-shot"]
        record["settings"] = record["settings"] | {"data": task}
    loaded.stage("sft")["fingerprint"]["config"]["data"] = {"sft": [{"source": "gsm8k"}]}
    assert {"train_split", "subsampled"} <= keys("problems", "pretrain", "sft")
    text = confounds.listing(loaded).markdown.replace("\\", "")
    assert "gsm8k: SFT, DPO" in text and "wikitext-103: pretrain" in text
    numbers = re.findall(r"\*\*C(\d+) ", text)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    titles = [WORDS["confounds"][key][0] for key in confounds.numbered(loaded)]
    assert all(text.count(f" {title}.**") == 1 for title in titles)


def test_marks_are_short():
    class Fake:
        pass

    numbers = {key: (number, []) for number, key in enumerate("abcdef", 1)}

    def marks(touched):
        from unittest.mock import patch

        with patch.object(confounds, "of", lambda comparison, one: [confounds.Caveat(key, "") for key in touched]):
            return confounds.marks(None, [Fake()], numbers)

    assert marks("abcf") == "C1–C3, C6" and marks("ab") == "C1, C2" and marks("") == ""


def test_two_names_of_the_same_weights_are_said_to_be_the_same(tmp_path):
    loaded = Comparison.load(
        make_run(tmp_path / "fake", skills={"sft": SKILL["pretrain"]}, seeds={"pretrain": 3, "sft": 3})
    )
    for record in loaded.evaluations("sft").values():
        record["weights_sha256"] = loaded.stage("pretrain")["weights_sha256"]
    found = [one for one in compared(loaded, STAGES) if one.b == "sft"]
    assert {caveat.key for one in found for caveat in confounds.of(loaded, one)} == {"same_weights"}
    assert "One model under two names: pretrain and SFT." in confounds.listing(loaded).markdown


def test_a_control_that_is_not_at_chance_is_the_first_finding(tmp_path):
    run = make_run(tmp_path / "fake")
    assert findings.control(Comparison.load(run)) == []
    loaded = Comparison.load(run)
    metrics = loaded.evaluations("random")["sample-sentiment/3-shot"]["metrics"]
    metrics["accuracy_calibrated"] |= {"value": 0.9, "low": 0.86, "high": 0.93}
    first = findings.findings(loaded)[0]
    assert "not at chance" in first.sentence and first.differs


def test_variables_are_text_and_cover_what_the_report_quotes(comparison):
    values = findings.variables(comparison, "fake", "smoke")
    assert all(isinstance(value, str) and value for value in values.values())
    quoted = {reference.key for reference in sources.read(paths.REPORT).variables}
    assert quoted <= set(values)
    assert values["parameters"] == "1.05M" and values["n_models"] == "6"


def test_a_run_with_nothing_measured_still_has_every_variable(tmp_path):
    run = make_run(tmp_path / "fake")
    for path in (run / "notebooks").glob("04_*.ipynb"):
        path.unlink()
    loaded = Comparison.load(run)
    values = findings.variables(loaded)
    assert values["n_models"] is None and values["parameters"] == "1.05M"
    assert [one.key for one in findings.findings(loaded)] == ["seeds", "ledger"]
    assert confounds.listing(loaded).markdown == "None was found."
    assert findings.figure(loaded).text == "No two models were evaluated on the same items."


def test_numbers_for_prose():
    assert percent(0) == "0.0%" and percent(0.8754) == "87.5%"
    assert signed(0.04, 1) == "0.0" and signed(-1.25, 1, " pp") == "−1.2 pp" and signed(3, 1) == "+3.0"
    assert plain(-1234.5, 1) == "−1,234.5" and plain(-0.001, 2) == "0.00"
    assert probability(0.0004) == "<\u00a00.001" and probability(1) == "1.000"
    assert compact(253_000_000) == "253M" and compact(4096) == "4,096" and compact(1.5e9) == "1.5B"
    assert duration(90) == "90.0 s" and duration(600) == "10.0 min" and duration(97_200) == "27.0 h"
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c" and listed([]) == ""


def test_what_the_adjustment_took_away_is_no_difference():
    from study.comparison.differences import Difference
    from study.comparison.measures import MEASURES

    lost = Difference(MEASURES["sentiment"], "gpt2", "dpo", 0.05, 0.01, 0.09, 0.03, 300, "x", adjusted=0.12, family=15)
    assert lost.leaves_out_zero and lost.verdict == "no detectable difference" and lost.p_text == "0.120"
