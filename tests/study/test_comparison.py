"""Reading a run's records, refusing wrong weights, tables and figures."""

import hashlib
import math
import shutil
from dataclasses import replace

import nbformat
import numpy as np
import pytest
from report_fixtures import MODELS, NOTEBOOKS, PARAMETERS, cell, make_run, notebook, output, seal, sha, stage_values
from scipy import stats

from basics import files, paths
from basics.errors import MissingInput, RecordError
from papertrail import records
from papertrail.run import read_run_file
from study.comparison import Comparison, ablations, claims, components, figures, findings, models, tables, training
from study.comparison.differences import EQUIVALENT, UNRESOLVED, Difference, adjust, compared, difference
from study.comparison.measures import MEASURES, PRIMARY, SHARED, STAGED
from study.preset import Preset
from study.run import Run
from threefold.config import TrainConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "fake")


@pytest.fixture(scope="module")
def comparison(run):
    return Comparison.load(run)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "fake")


def edit(path, change):
    """Rewrite an executed notebook's records: `change(name, values)` returns the new values."""
    made = nbformat.read(path, as_version=4)
    for entry in made.cells:
        for shown in entry.outputs:
            record = shown.data[records.MIME]
            record["values"] = change(record["name"], record["values"])
    nbformat.write(made, path)


# Reading -------------------------------------------------------------------------------------------------------------


def test_models_come_in_the_fixed_order_and_a_folder_of_notebooks_is_enough(comparison, run):
    assert comparison.models == list(MODELS)
    bare = Comparison.load(run / "notebooks")
    assert bare.models == comparison.models and bare.items("sft", "speed") is None
    read, known = ({name: one.values for name, one in each.records.items()} for each in (bare, comparison))
    assert read == known


def test_the_long_table_has_one_row_a_metric_and_marks_those_of_the_measures(comparison):
    expected = {
        (model, protocol, name, entry["value"])
        for model in MODELS
        for protocol, values in comparison.evaluations(model).items()
        for name, entry in values["metrics"].items()
    }
    table = comparison.table
    assert len(table) == len(expected)
    assert set(table[["model", "protocol", "metric", "value"]].itertuples(index=False, name=None)) == expected
    measured = table[table["measure"] != ""]
    assert set(measured["measure"]) == set(MEASURES) and not measured.duplicated(["measure", "model"]).any()
    for key, rows in measured.groupby("measure"):
        assert set(rows["protocol"]) == {comparison.protocol(key)} and set(rows["unit"]) == {MEASURES[key].unit}
    assert set(table["record"]) <= set(comparison.records)


def test_evaluation_of_other_weights_is_refused_with_both_hashes(copy):
    wrong = sha("someone else's weights")
    edit(copy / "notebooks" / "04_evaluate-sft.ipynb", lambda name, values: values | {"weights_sha256": wrong})
    with pytest.raises(RecordError) as error:
        Comparison.load(copy)
    assert wrong[:12] in str(error.value) and sha("weights of sft")[:12] in str(error.value)
    assert "sft" in str(error.value) and "\n" not in str(error.value)


def test_weights_swapped_between_stages_after_the_evaluation_are_refused_with_both_hashes(copy):
    sft, dpo = copy / "sft" / "model.safetensors", copy / "dpo" / "model.safetensors"
    (one, other) = sft.read_bytes(), dpo.read_bytes()
    sft.write_bytes(other), dpo.write_bytes(one)
    with pytest.raises(RecordError) as error:
        Comparison.load(copy)
    assert sha("weights of sft")[:12] in str(error.value) and sha("weights of dpo")[:12] in str(error.value)


def test_a_notebook_that_tells_another_hash_than_run_json_is_refused(copy):
    files.write_note(copy / "dpo" / "run.json", read_run_file(copy / "dpo") | {"weights_sha256": sha("later")})
    with pytest.raises(RecordError, match=rf"{sha('later')[:12]}.* --only \S+ --force`"):
        Comparison.load(copy)


def test_continuations_stand_side_by_side_and_are_of_the_stages_weights(comparison, copy):
    made = tables.continuations(comparison)
    rows = made.values["rows"]
    assert [(row["Prompt"], row["Model"]) for row in rows[2:4]] == [
        ("The old", "Threefold DPO"),
        ("A <b>", "Threefold pretrain"),
    ]
    assert rows[1]["Continuation"] == "miller of sft" and rows[3]["Continuation"] is None
    assert "A &lt;b&gt;" in made.markdown and "<b>" not in made.markdown and made.markdown.count("The old") == 1

    def change(name, values):
        return values | {"weights_sha256": sha("other")} if name.startswith("continuations/") else values

    edit(copy / "notebooks" / "04_evaluate-sft.ipynb", change)
    with pytest.raises(RecordError, match="continuations of sft has weights"):
        Comparison.load(copy)


def test_evaluations_of_a_model_without_a_stage_must_agree(copy):
    def change(name, values):
        return values | {"weights_sha256": sha("other")} if name == "speed/random" else values

    edit(copy / "notebooks" / "04_speed.ipynb", change)
    with pytest.raises(RecordError, match=sha("weights of random")[:12]):
        Comparison.load(copy)


def test_a_record_that_stands_in_two_notebooks_is_refused(copy):
    shutil.copy(copy / "notebooks" / "02_sft.ipynb", copy / "notebooks" / "02_sft-again.ipynb")
    with pytest.raises(RecordError, match=r"stage/sft|model/sft|curve/sft"):
        Comparison.load(copy)


def test_failed_notebooks_are_left_out(copy):
    shutil.copy(copy / "notebooks" / "02_sft.ipynb", copy / "notebooks" / "02_sft.failed.ipynb")
    assert Comparison.load(copy).models == list(MODELS)


def test_items_that_are_not_those_of_the_record_are_refused(copy):
    path = next((copy / "evaluation" / "sft" / "items").glob("*responses.parquet"))
    path.write_bytes((copy / "evaluation" / "dpo" / "items" / path.name).read_bytes() + b" ")
    loaded = Comparison.load(copy)
    with pytest.raises(RecordError, match=hashlib.sha256(path.read_bytes()).hexdigest()[:12]):
        difference(loaded, "instructions", "pretrain", "sft")


def test_a_notebook_that_was_not_run_is_named_with_the_command(copy, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", copy.parent)
    opened = seal(Run.of("fake", copy, Preset(name="fake", dpo=TrainConfig(steps=1))))
    Comparison.load(opened)
    (copy / "notebooks" / "04_evaluate-dpo.ipynb").unlink()
    with pytest.raises(MissingInput, match=r"04_evaluate-dpo\.ipynb.*papermill notebooks/04_evaluate\.ipynb"):
        Comparison.load(opened)
    shutil.rmtree(copy / "evaluation" / "dpo")
    part = Comparison.load(opened)  # a stage that was not run is left out, and the limitations say so
    assert part.absent == ("evaluate-dpo",) and "dpo" not in part.models
    assert "the stages evaluate-dpo have not been run." in findings.notice(part, opened.preset).markdown
    for path in (*(copy / "notebooks").iterdir(), *copy.rglob("run.json")):
        path.unlink()
    with pytest.raises(MissingInput, match="no finished stage: `threefold run --run fake`"):
        Comparison.load(opened)


def test_a_folder_without_notebooks_is_missing_input(tmp_path):
    with pytest.raises(MissingInput, match="no executed notebooks"):
        Comparison.load(tmp_path)


# Names and colours ---------------------------------------------------------------------------------------------------


def test_names_say_where_a_baseline_comes_from(comparison, tmp_path):
    assert comparison.name("gpt2") == "GPT-2 (trained here)"
    hub = Comparison.load(make_run(tmp_path / "hub", hub=("gpt2", "distilgpt2")))
    assert hub.name("gpt2") == "GPT-2 (hub)" and hub.name("distilgpt2") == "DistilGPT-2 (hub)"
    assert hub.name("sft") == "Threefold SFT" and hub.name("SmolLM2-135M") == "SmolLM2-135M"


def test_every_model_has_a_colour_of_its_own_that_others_do_not_change():
    everyone = [*MODELS, "zeta", "alpha"]
    colours = [models.colour(model, everyone) for model in everyone]
    assert len(set(colours)) == len(colours)
    assert models.colour("sft", ["sft"]) == models.colour("sft", everyone)
    assert models.ordered(["alpha", "dpo", "random"]) == ["random", "dpo", "alpha"]


# Differences ---------------------------------------------------------------------------------------------------------


def test_measures_find_their_protocols(comparison):
    assert comparison.protocol("perplexity") == "sample-text/disjoint-256"
    assert comparison.protocol("sentiment") == "sample-sentiment/3-shot"  # not 0-shot, not the precedent's
    assert comparison.protocol("problems") == "sample-problems/5-shot"
    assert comparison.protocol("instructions") == "sample-instructions/responses"
    assert comparison.protocol("preferences") == "sample-preferences/preferences"


def test_paired_perplexity_is_the_ratio_of_the_two_values(comparison):
    one = difference(comparison, "perplexity", "pretrain", "sft")
    values = [comparison.value("perplexity", model).value for model in ("pretrain", "sft")]
    assert one.change == pytest.approx(values[1] / values[0] - 1, rel=1e-9)
    assert one.low < one.change < one.high and one.verdict == "worse"
    bits = difference(comparison, "bits_per_byte", "gpt2", "pretrain")
    values = [comparison.value("bits_per_byte", model).value for model in ("gpt2", "pretrain")]
    assert bits.change == pytest.approx(values[1] - values[0], rel=1e-9) and bits.verdict == "better"


def test_right_and_wrong_go_by_mcnemar_and_only_over_generated_items(comparison):
    one = difference(comparison, "problems", "pretrain", "sft")
    assert one.method == "McNemar, exact" and one.n == 300
    answered = difference(comparison, "instructions", "pretrain", "sft")
    assert answered.n == 100  # the other 200 items were not generated


def test_few_shot_sentiment_resamples_items_not_rows(comparison):
    one = difference(comparison, "sentiment", "gpt2", "pretrain")
    assert one.n == 300 and one.method == "bootstrap over items"  # two draws of the first template
    values = [comparison.value("sentiment", model).value for model in ("gpt2", "pretrain")]
    assert one.change == pytest.approx(values[1] - values[0])


def test_perplexities_of_different_tokenizers_do_not_compare(tmp_path):
    loaded = Comparison.load(make_run(tmp_path / "fake", tokenizers={"gpt2": "another"}))
    assert difference(loaded, "perplexity", "gpt2", "pretrain") is None
    assert difference(loaded, "bits_per_byte", "gpt2", "pretrain") is not None
    markdown = tables.headline(loaded).markdown
    row = next(line for line in markdown.split("\n") if "GPT-2 (trained here)" in line and "Distil" not in line)
    assert row.split("|")[2].strip() == "–" and row.split("|")[3].strip() != "–"


def test_the_same_weights_differ_by_exactly_nothing(tmp_path):
    same = {"sft": (2.1, 0.66, 0.9, 0.03, 0.01, 0.56)}
    loaded = Comparison.load(make_run(tmp_path / "fake", skills=same, seeds={"pretrain": 3, "sft": 3}))
    for measure in {*STAGED, *SHARED} - set(PRIMARY["dpo"]):  # which pretraining does not have
        one = difference(loaded, measure, "pretrain", "sft")
        assert one.change == 0 and one.p == 1 and one.verdict in (EQUIVALENT, UNRESOLVED)


def test_a_difference_needs_both_the_adjusted_p_and_the_interval():
    def made(low, high, p):
        return Difference(MEASURES["sentiment"], "a", "b", (low + high) / 2, low, high, p, 100, "test")

    assert made(0.01, 0.05, 0.04).verdict == "better"
    weak = adjust([made(0.01, 0.05, 0.04), made(-0.1, 0.1, 0.5)])[0]
    assert weak.adjusted == pytest.approx(0.08) and weak.verdict == UNRESOLVED
    assert made(-0.01, 0.015, 0.9).verdict == EQUIVALENT
    assert made(-0.01, 0.03, 0.9).verdict == UNRESOLVED
    assert adjust([None]) == [None]


# Tables --------------------------------------------------------------------------------------------------------------


def test_every_table_is_one_markdown_table_with_finite_values(comparison):
    made = [
        tables.model_configurations(comparison),
        tables.parameters(comparison),
        tables.architecture(comparison),
        tables.headline(comparison),
        tables.protocols(comparison),
        tables.sentiment(comparison),
        tables.metrics(comparison, "tasks", "problems", "instructions"),
        tables.metrics(comparison, "preferences", "preferences"),
        tables.stage_evolution(comparison),
        tables.standing(comparison),
        tables.training_recipes(comparison),
        tables.families(comparison),
        tables.stability(comparison),
        tables.efficiency(comparison),
        tables.speed(comparison),
        tables.provenance(comparison),
    ]
    assert len({one.name for one in made}) == len(made)
    for one in made:
        lines = one.markdown.strip().split("\n")
        assert len(lines) >= 3 and all(line.startswith("|") for line in lines), one.name
        records.bundle(one.name, one.values, markdown=one.markdown)


def test_headline_prints_intervals_and_zero_as_zero(comparison):
    markdown = tables.headline(comparison).markdown
    assert markdown.count("\n") == len(MODELS) + 2
    assert "0.0% \\[0.0," in markdown  # GPT-2 answered no instruction
    assert tables.headline(comparison).values["models"]["gpt2"]["instructions"]["value"] == 0


def test_stage_table_shows_changes_from_the_stage_before_and_since_pretraining(comparison):
    result = tables.stage_evolution(comparison)
    rows = [row for row in result.values["rows"] if row["Measure"].startswith("Perplexity")]
    assert [row["Stage"] for row in rows] == ["pretrain", "SFT", "DPO"]
    assert rows[0]["Change from the stage before"] is None and rows[1]["Change since pretraining"] is None
    assert rows[2]["Change since pretraining"].startswith("+12")
    assert result.markdown.count("Perplexity") == 1  # the repeated name is left blank


def test_protocol_table_divides_largest_by_smallest(comparison):
    row = next(row for row in tables.protocols(comparison).values["rows"] if row["Model"] == "Threefold pretrain")
    shown = [float(row[key]) for key in ("disjoint-256 (per token)", "stride-128 (per token)", "lines-100 (per word)")]
    assert float(row["largest / smallest"]) == pytest.approx(max(shown) / min(shown), abs=0.02)


def test_architecture_sets_the_measured_effect_beside_the_claimed_one(comparison):
    rows = {row["Component"]: row for row in tables.architecture(comparison).values["rows"]}
    assert rows["Normalisation"]["GPT-2"] == "LayerNorm" and rows["Normalisation"]["Threefold"] == "RMSNorm"
    assert "training speed +2.4%" in rows["Normalisation"]["Measured here"]
    assert rows["Positions"]["Measured here"] == "not measured here"
    assert rows["QK normalisation"]["Measured here"] == "same as GPT-2"
    effect = ablations.effect(comparison.by_variant("ablation"), "ffn=gelu", "heldout_loss")
    logs = np.array([2.10, 2.12, 2.11]) - np.array([2.18, 2.205, 2.19])
    assert effect.change == pytest.approx(np.exp(logs.mean()) - 1) and effect.low < effect.change < effect.high


def test_architecture_tells_what_an_unused_component_would_bring(copy):
    notebook(
        copy / "notebooks" / "05_more.ipynb",
        cell("x", output("ablation/qk", {"variant": "qk_norm=true", "heldout_loss": [2.09, 2.11, 2.10]}, "x")),
    )
    rows = {row["Component"]: row for row in tables.architecture(Comparison.load(copy)).values["rows"]}
    assert rows["QK normalisation"]["Measured here"].startswith("same as GPT-2; with qk_norm=true: perplexity −1.0%")


def test_ablation_table_sets_every_variant_against_the_base(comparison):
    found = comparison.by_variant("ablation")
    result = components.ablation_effects(found)
    rows = {row["Variant"]: row for row in result.values["rows"]}
    assert rows["base"]["Difference"] is None and rows["base"]["Held-out loss"] == "2.1100\u00a0±\u00a00.0100"
    gelu = rows["Feed-forward: GELU MLP"]
    assert gelu["Parameters"] == "1,400,000 (0.00%)"
    differences = np.array([2.18, 2.205, 2.19]) - np.array([2.10, 2.12, 2.11])
    test = stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval()
    assert gelu["Difference"].replace("\u00a0", " ") == f"+{differences.mean():.4f} [+{low:.4f}, +{high:.4f}]"
    contrast = {one["variant"]: one for one in ablations.contrasts(found)}["ffn=gelu"]
    loss, time = contrast["loss"], contrast["log_step_seconds"]["preset"]
    assert loss["p"] == pytest.approx(test.pvalue) and loss["p_adjusted"] == pytest.approx(2 * test.pvalue)
    assert ablations.detected(contrast)
    assert math.exp(time["difference"]) == pytest.approx(1 / 1.03, abs=0.001)
    assert time["low"] < math.log(1 / 1.03) + 0.001 and time["p_adjusted"] < 0.05
    said = components.ablation_resolution(found).markdown
    assert (
        "With 3 seeds" in said and "1 differ detectably from the base in held-out loss (Feed-forward: GELU MLP)" in said
    )
    assert figures.ablation_curves(found).values["drawn"] == ["base", "norm=layer", "ffn=gelu"]


def test_without_ablations_their_table_and_figure_say_so():
    assert "Not measured" in components.ablation_effects({}).markdown
    assert "No ablation" in components.ablation_resolution({}).markdown
    assert figures.ablation_curves({}).values == {"drawn": []}


def test_tokens_to_equal_loss_are_read_off_the_curves():
    """loss = 10 - ln(tokens) for the base: exactly linear in the logarithm of tokens, whatever the points."""

    def curve(shift, points):
        return {"tokens": [0, *points], "loss": [10.0, *(10 - math.log(t) + shift for t in points)]}

    base = curve(0.0, [100, 300, 1000])
    worse, better = curve(0.2, [100, 500, 1000]), curve(-0.3, [100, 200, 1000])
    assert ablations.equal_loss(base, worse) == pytest.approx((1000 / math.exp(0.2), 1000))
    assert ablations.equal_loss(base, better) == pytest.approx((1000, 1000 / math.exp(0.3)))
    assert ablations.equal_loss(base, base) == pytest.approx((1000, 1000))
    assert ablations.equal_loss(curve(0.0, [600, 1000]), curve(5.0, [600, 1000])) is None  # below it at once


def test_kernel_table_pairs_the_rounds():
    taken = [0.010, 0.020, 0.030, 0.011, 0.012, 0.013, 0.5]  # slow rounds are slow for both
    seconds = {"SwiGLU": taken, "GELU": [0.9 * x for x in taken]}
    timing = {"part": "ffn", "positions": 8, "parameters": dict.fromkeys(seconds, 12), "seconds": seconds}
    rows = components.kernels([timing]).values["rows"]
    assert rows[0]["Time against the first"] is None and rows[0]["Median"] == "13.000\u00a0ms"
    assert rows[1]["Time against the first"].replace("\u00a0", " ") == "0.900× [0.900, 0.900]"


def test_one_seed_has_no_interval(tmp_path):
    folder = tmp_path / "notebooks"
    base = {"variant": "base", "heldout_loss": [2.0], "tokens_per_second": 100.0}
    other = {"variant": "norm=layer", "heldout_loss": [2.1], "tokens_per_second": 90.0}
    cells = [cell("x", output(f"ablation/{i}", values, "x")) for i, values in enumerate((base, other))]
    notebook(folder / "05_ablations.ipynb", *cells)
    effect = ablations.effect(Comparison.load(tmp_path).by_variant("ablation"), "norm=layer", "tokens_per_second")
    assert effect.change == pytest.approx(100 / 90 - 1) and effect.low is None and effect.basis == "1 round"


def test_efficiency_states_cost_and_limit_only_where_known(comparison, tmp_path):
    every = tables.efficiency(comparison).values["rows"]
    row, total = every[0], every[-1]
    assert total["Stage"] == "Threefold, all stages" and total["Tokens"] == 3_300_000
    assert row["Cost"] == "no price stated" and row["Share of limit"] == "limit not known"
    priced = tables.efficiency(comparison, price_per_hour=3.6).values["rows"][0]
    assert priced["Cost"] == "0.0300 USD at 3.60 an hour"  # 30 s
    facts = stage_values("pretrain", None, 600_000_000) | {"device_seconds": 2400.0}
    facts["hardware"] = {"gpu": ["NVIDIA H100 80GB HBM3"], "cpu": "x", "cores": 16}
    model = {"parameters": {"total": 253_000_000}, "config": {}}
    cells = [cell("x", output("stage/pretrain", facts, "x")), cell("x", output("model/pretrain", model, "x"))]
    notebook(tmp_path / "notebooks" / "01_pretrain.ipynb", *cells)
    (one,) = training.trainings(Comparison.load(tmp_path))
    assert one.tokens_per_hour == pytest.approx(900e6)
    assert one.share_of_limit == pytest.approx(6 * 253e6 * 250e3 / 989e12)
    on_cpu = replace(one, facts={"hardware": {"gpu": [], "cores": 2}, "training": {"matmul_flops": 1e15}})
    assert on_cpu.limit == (1e15, "measured") and on_cpu.share_of_limit == pytest.approx(6 * 253e6 * 250e3 / 1e15)
    facts["hardware"]["gpu"] *= 8  # of which it used two
    together = replace(one, facts={**facts, "training": {"workers": 2}})
    assert (
        together.share_of_limit == pytest.approx(one.share_of_limit / 2)
        and together.device == "2 × NVIDIA H100 80GB HBM3"
    )


def test_stability_sees_a_setback(comparison, copy):
    assert all(curve.stable for curve in training.curves(comparison))

    def spike(name, values):
        if name == "curve/pretrain":
            values["loss"] = values["loss"][:50] + [9.0] * 25 + values["loss"][75:]
        return values

    edit(copy / "notebooks" / f"{NOTEBOOKS['pretrain']}.ipynb", spike)
    shaken = {curve.stage: curve for curve in training.curves(Comparison.load(copy))}
    assert not shaken["pretrain"].stable and shaken["pretrain"].setback > 5 and shaken["gpt2"].stable


def test_tables_of_a_run_that_measured_nothing_say_so(tmp_path):
    model = {"parameters": PARAMETERS, "config": {}}
    notebook(tmp_path / "01_pretrain.ipynb", cell("x", output("model/pretrain", model, "x")))
    empty = Comparison.load(tmp_path)
    for made in (tables.stage_evolution, tables.standing, tables.speed, tables.protocols, tables.headline):
        assert made(empty).markdown == "*Not measured in this run.*"
    assert figures.loss_curves(empty).text and figures.forest("x", empty, [], columns=1).text


# Figures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [0, 1, 2])
def test_figures_say_what_they_show_and_label_their_axes(comparison, columns):
    result = figures.loss_curves(comparison)
    if columns:
        found = compared(comparison, "gpt2")
        result = figures.forest("x", comparison, found, columns)
        for one in found:
            assert f"{one.names[1]} against {one.names[0]}: {one.text}".replace("\u00a0", " ") in result.text
        assert all(axes.get_xlabel().endswith("is better") for axes in result.figure.axes if axes.get_visible())
    data, metadata = records.bundle(result.name, result.values, figure=result.figure, text=result.text)
    assert len(data["image/png"]) > 10_000 and metadata["image/png"]["alt"] == result.text
    assert metadata["image/png"]["width"] < 800


def test_a_model_keeps_its_colour_in_every_figure(comparison):
    figure = figures.loss_curves(comparison).figure
    lines = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == "Threefold pretrain"]
    assert [line.get_color() for line in lines] == [models.colour("pretrain")]
    assert all(axes.get_xlabel() for axes in figure.axes)


def test_a_forest_fills_what_may_be_claimed_and_draws_zero_and_margin(comparison):
    found = [one for one in compared(comparison, "gpt2") if one.measure.key == "bits_per_byte"]
    (axes,) = figures.forest("x", comparison, found, columns=1).figure.axes
    markers = [line for line in axes.get_lines() if line.get_marker() not in ("None", None, "")]
    filled = {line.get_ydata()[0]: line.get_markerfacecolor() != "white" for line in markers}
    assert filled == {2 - place: one.detected for place, one in enumerate(found)} and len(found) == 3
    assert any(list(line.get_xdata()) == [0, 0] for line in axes.get_lines())
    (band,) = axes.patches
    assert band.get_x() == pytest.approx(-0.01) and band.get_width() == pytest.approx(0.02)


def test_families_of_tests_are_counted(comparison):
    rows = {row["Statements"].partition(" ")[0]: row for row in tables.families(comparison).values["rows"]}
    assert rows["differences"]["Tests"] == len(compared(comparison)) and "Holm" in rows["differences"]["Adjustment"]
    assert rows["components"]["Tests"] == 2 * 3 and rows["claims"]["Tests"] == len(claims.CLAIMS)


def test_sentences_and_table_adjust_over_the_same_family(comparison):
    shown = {one["p_adjusted"] for one in tables.standing(comparison).values["differences"]}
    assert {one.adjusted for one in compared(comparison, "gpt2", "distilgpt2")} == shown
    assert {one.b for one in compared(comparison, "distilgpt2")} == {"gpt2", "pretrain", "sft", "dpo"}


def test_the_plan_stands_beside_the_run_with_what_was_changed_after_results(comparison, monkeypatch):
    """The records of this run hold no plan's hash, so that nothing is said to have been first."""
    change = {"what": "the margin of bits per byte", "why": "it was mistyped", "day": "2026-03-01"}
    monkeypatch.setattr(models, "EXPLORATORY", [change])
    result = tables.plan(comparison)
    rows = result.values["rows"]
    assert [row["What"] for row in rows[:2]] == ["plan", "run"] and rows[1]["Commit"] == "0123456789ab"
    assert rows[0]["Which came first"] == "not checked: the run's records hold no hash of a plan"
    assert rows[2]["What"] == "changed after results: the margin of bits per byte (it was mistyped)"
    assert rows[2]["Date"] == "2026-03-01" and result.values["exploratory"] == [change]
    assert result.values["finding"]["run_started"] == "2026-01-01T00:00:00+00:00"
