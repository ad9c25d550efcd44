"""Learning rates that are chosen by trials before a training, and the further GPT-2 row with a recipe of its own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from basics import paths
from basics.errors import ConfigError, DivergedError, MissingInput
from basics.files import read_note, sha256_file, write_note
from study import stages, training
from study.comparison.models import PLAN
from study.preset import load_preset, model_names, parse_overrides, replicated, section, trained
from study.run import CHOICE, open_run, open_stage
from study.training import prepare, recipe, train_stage
from study.tuning import choose, run_trials, trial_config
from threefold.config import SourceConfig, TrainConfig, gpt2_counterpart
from threefold.data import corpus, sources
from threefold.data.templates import as_document
from threefold.data.tokenizer import build_tokenizer
from threefold.model.decoder import parameter_counts
from threefold.training.loop import train

PRESET = str(Path(__file__).parents[1] / "presets" / "tiny.toml")
TUNED = (
    "tuning.multipliers=0.5,1,4; tuning.share=0.5; pretrain.steps=6; "
    "pretrain.batch_size=4; pretrain.precision=fp32; gpt2_adamw.steps=6; "
    "gpt2_adamw.optimizer=adamw; baselines.seeds=true"
)


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", folder)
        yield folder


def opened(stage: str, run: str = "tuned", preset: str = PRESET, **parameters):
    return open_stage(stage, preset=preset, run=run, overrides=TUNED, **parameters)


def make_data(run: str, preset: str = PRESET) -> None:
    data = opened("data", run, preset)
    folder, preset = data.begin(), data.preset
    texts = corpus.mixture_texts(preset.data.pretrain)
    build_tokenizer(preset.tokenizer, texts, context=preset.model.context).save_pretrained(folder / "tokenizer")
    data.finish()


def tune(run: str, model: str) -> tuple[list[dict], dict]:
    stage = opened("tune", run, model=model)
    folder = stage.begin()
    trials = run_trials(stage, folder, lambda line: None)
    write_note(folder / CHOICE, choice := choose(model, stage.config, trials, stage.preset.tuning.share))
    stage.finish()
    return trials, choice


@pytest.fixture(scope="module")
def tuned(runs):
    make_data("tuned")
    return tune("tuned", "pretrain")


def without_seconds(trials: list[dict]) -> list[dict]:
    return [{**trial, "seconds": 0.0} for trial in trials]


def test_a_trial_is_the_training_itself_at_another_rate_for_a_share_of_its_length(tuned, tmp_path):
    trials, choice = tuned
    assert [(trial["multiplier"], trial["steps"]) for trial in trials] == [(0.5, 3), (1.0, 3), (4.0, 3)]
    assert len({trial["tokens"] for trial in trials}) == 1
    stage = opened("tune", model="pretrain")
    for trial in trials:
        inputs, rates = prepare(stage), (trial["multiplier"] * 3e-3, trial["multiplier"] * 0.02)
        config = replace(stage.config, steps=3, learning_rate=rates[0], muon_learning_rate=rates[1])
        alone = train(
            *(inputs.model, inputs.objective, inputs.rows, config, tmp_path / f"{trial['multiplier']}"),
            **{"seed": 1337, "heldout": inputs.heldout, "progress": lambda line: None},
        ).result
        assert alone.heldout_loss == trial["heldout_loss"]
        assert (trial["learning_rate"], trial["muon_learning_rate"]) == rates
    best = min(trials, key=lambda trial: trial["heldout_loss"])
    assert all(choice[key] == best[key] for key in ("multiplier", "heldout_loss"))
    assert choice["trials"] == 3 and choice["share"] == 0.5
    assert sorted(path.name for path in stage.folder.iterdir()) == [
        *("choice.json", "run.json", "trial-1.json", "trial-2.json", "trial-3.json"),
    ]


def test_a_trial_that_diverges_is_not_chosen_and_all_of_them_are_an_error(tuned, tmp_path):
    stage = opened("tune", model="pretrain")
    stage.config = replace(stage.config, optimizer="adamw", warmup=0.0)
    preset = replace(stage.preset, tuning=replace(stage.preset.tuning, multipliers=[1.0, 1e30]))
    stage.run = replace(stage.run, preset=preset)
    trials = run_trials(stage, tmp_path, lambda line: None)
    assert trials[0]["heldout_loss"] > 0 and trials[1]["heldout_loss"] is None and trials[1]["tokens"] == 0
    assert choose("pretrain", stage.config, trials, 0.5)["multiplier"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trial-1.json", "trial-2.json"]
    stage.run = replace(stage.run, preset=replace(preset, tuning=replace(preset.tuning, multipliers=[1e30])))
    with pytest.raises(
        DivergedError, match="every trial diverged; lower its learning rates, or the smallest of tuning"
    ):
        run_trials(stage, tmp_path / "again", lambda line: None)


def test_the_training_takes_the_rates_that_the_trials_chose_and_so_does_its_replicate(tuned):
    _, choice = tuned
    for parameters in ({}, {"replicate": 2}):
        stage = opened("pretrain", **parameters)
        inputs = prepare(stage)
        assert inputs.chosen == choice
        assert stage.config.learning_rate == choice["learning_rate"] == 3e-3 * choice["multiplier"]
        assert stage.config.muon_learning_rate == choice["muon_learning_rate"]
        assert stage.config.steps == 6
        folder = stage.begin()
        result = train_stage(stage, inputs, folder, lambda line: None).result
        made = recipe(stage, inputs, result)
        assert made["rates"] == "trials" and made["tuning"] == choice
        assert made["optimizer"] == "muon" and made["learning_rate"] == choice["learning_rate"]
        assert made["steps"] == 6 and made["tokens"] == result.tokens and made["tokens_inherited"] == 0
        assert made["data"] == ["sample-stories", "sample-text", "sample-sentiment"]
        facts = stage.finish(tokens=result.tokens, recipe=made)
        digest = sha256_file(opened("tune", model="pretrain").folder / CHOICE)
        assert facts["fingerprint"]["parents"]["tune-pretrain"] == digest
    run = stage.run
    assert [run.seed(name) for name in ("tune-pretrain", "pretrain", "pretrain-seed2", "gpt2-seed2")] == [
        *(1337, 1337, 1338, 1338),
    ]


def test_tokens_of_the_weights_that_a_training_begins_with_are_counted(tuned):
    before = read_note(opened("pretrain").folder / "run.json")
    stage = opened("tune", model="sft")
    assert prepare(stage).inherited == before["tokens"] > 0


def test_trials_are_not_judged_by_text_that_evaluations_score(tmp_path):
    scored = next(iter(sources.iterate(SourceConfig(source="sample-text", split="test"))))
    own = "A page that stands in no other text of this run tells of herons, otters and the weir behind the old mill."
    tokens = []
    for name, documents in (("alone", [own]), ("both", [own, as_document("wikitext", scored)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        heldout = f'[[data.pretrain_heldout]]\npath = "{name}.jsonl"\nreader = "text"\n[[data.sft]]'
        text = Path(PRESET).read_text().split("[[data.pretrain_heldout]]")
        preset = tmp_path / f"{name}.toml"
        preset.write_text(text[0] + heldout + text[1].partition("[[data.sft]]")[2])
        make_data(name, str(preset))
        tokens.append(prepare(opened("tune", name, str(preset), model="pretrain")).heldout.n_tokens)
    assert tokens[0] == tokens[1] > 0


def test_a_training_without_its_trials_names_the_notebook_that_makes_them(runs):
    make_data("untried")
    with pytest.raises(MissingInput, match=r"tune-gpt2 .* notebooks/01_tune.ipynb .* -p model gpt2"):
        prepare(opened("pretrain", "untried", model="gpt2"))


def test_an_interrupted_trial_is_resumed_and_a_finished_one_is_kept(tuned, monkeypatch):
    make_data("interrupted")
    stage, begun = opened("tune", "interrupted", model="pretrain"), []

    def stopping(line: str) -> None:
        if line.startswith("tune-pretrain × 1:") and len(begun) == 2:
            raise KeyboardInterrupt

    def counted(*arguments, **options):
        begun.append(options["name"])
        return train(*arguments, **options)

    monkeypatch.setattr(training, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        run_trials(stage, stage.begin(), stopping)
    assert begun == ["tune-pretrain × 0.5", "tune-pretrain × 1"]
    stage = opened("tune", "interrupted", model="pretrain")
    trials = run_trials(stage, stage.begin(), lambda line: None)
    assert begun[2:] == ["tune-pretrain × 1", "tune-pretrain × 4"]
    assert without_seconds(trials) == without_seconds(tuned[0])


@pytest.mark.parametrize(
    ("losses", "best", "edge"), [((3, 2, 4), 1, False), ((1, 2, 4), 0.5, True), ((3, 2, 2), 1, False)]
)
def test_the_lowest_loss_is_chosen_the_first_of_equal_ones_and_an_edge_is_said(losses, best, edge):
    keys = ("multiplier", "learning_rate", "muon_learning_rate", "heldout_loss")
    trials = [dict(zip(keys, (m, m, m, loss), strict=True)) for m, loss in zip((0.5, 1.0, 2.0), losses, strict=True)]
    choice = choose("dpo", TrainConfig(steps=9), trials, 0.25)
    assert (choice["multiplier"], choice["edge"]) == (best, edge)


@pytest.mark.parametrize(("length", "part"), [({"steps": 9}, 2), ({"tokens": 1001}, 250), ({"epochs": 3.0}, 0.75)])
def test_a_trial_takes_its_share_of_any_length(length, part):
    config = trial_config(TrainConfig(**length, learning_rate=1e-3), 2.0, 0.25)
    assert [getattr(config, key) for key in length] == [part]
    assert (config.learning_rate, config.muon_learning_rate) == (2e-3, 0.04)


def test_a_preset_without_trials_and_recipe_has_the_stages_it_had():
    plan = open_run("smoke", create=False).plan
    assert not [name for name in plan if name.startswith("tune-") or "adamw" in name]
    assert plan["pretrain"].needs == ("data",) and plan["sft"].needs == ("pretrain",)


def test_what_trials_and_the_further_row_add_to_the_plan():
    run = open_run(PRESET, overrides=parse_overrides(TUNED), create=False)
    assert "gpt2-adamw" in model_names(run.preset) and trained(run.preset)[:3] == ["pretrain", "gpt2", "gpt2-adamw"]
    assert replicated(run.preset) == ["pretrain", "sft", "dpo", "gpt2", "gpt2-adamw"]
    assert run.plan["gpt2-adamw"].needs == ("data", "tune-gpt2-adamw")
    assert run.plan["gpt2-adamw-seed2"].needs == ("data", "tune-gpt2-adamw")
    assert run.plan["evaluate-gpt2-adamw-seed2"].needs == ("gpt2-adamw-seed2",)
    assert run.plan["tune-dpo"].needs == ("sft",) and run.plan["distilgpt2"].needs == ("gpt2", "tune-distilgpt2")
    assert "distilgpt2-seed2" not in run.plan and {"tune-pretrain", "gpt2-seed2"} <= set(run.plan["compare"].needs)
    assert run.config_of("tune-sft") == run.config_of("sft") | {
        "tuning": {"multipliers": [0.5, 1.0, 4.0], "share": 0.5}
    }
    assert run.config_of("gpt2-adamw")["gpt2_adamw"]["steps"] == 6
    assert run.data_of("tune-pretrain") == run.data_of("pretrain")
    assert stages.select(run.preset, "tune") == [name for name in run.plan if name.startswith("tune-")] != []
    with pytest.raises(ConfigError, match="stage 'tune'"):
        stages.select(load_preset("smoke"), "tune")


@pytest.mark.parametrize("name", ["laptop", "reference"])
def test_gpt2s_architecture_is_trained_by_our_recipe_and_by_its_own(name):
    preset = load_preset(name)
    assert preset.gpt2 == preset.pretrain and preset.gpt2_adamw.optimizer == "adamw"
    assert preset.gpt2_adamw.lengths == preset.pretrain.lengths and "gpt2-adamw" in trained(preset)


def test_the_notebook_says_what_makes_trials_where_the_preset_has_none():
    with pytest.raises(ConfigError, match=r"tuning.multipliers is empty.*overrides='tuning.multipliers=0.5,1,2'"):
        open_stage("tune", preset=PRESET, model="sft")
    with pytest.raises(ConfigError, match=r"did you mean distilgpt2?"):
        open_stage("tune", preset=PRESET, model="distilgpt", overrides=TUNED)


def test_the_reference_preset_is_what_the_plan_says():
    preset, budget = load_preset("reference"), PLAN["budget"]
    assert (budget["preset"], budget["seeds"], budget["seeded"]) == ("reference", preset.seeds, replicated(preset))
    assert [*budget["training"]] == trained(preset)
    for name, planned in budget["training"].items():
        config = getattr(preset, section(name))
        assert planned == {"epochs": config.epochs, "optimizer": config.optimizer}, name
    assert PLAN["tuning"] == {"multipliers": [*preset.tuning.multipliers], "share": preset.tuning.share}


def test_the_reference_preset_is_fair():
    """The same text, batches and optimizer for ours and GPT-2's architecture, parameters within 3%; what chooses rates
    is not what is measured."""
    preset = load_preset("reference")
    assert preset.gpt2 == preset.pretrain
    assert replace(preset.gpt2_adamw, optimizer="muon", learning_rate=3e-3) == preset.pretrain
    model = replace(preset.model, vocab_size=preset.tokenizer.vocab_size)
    ours, theirs = (parameter_counts(config)["total"] for config in (model, gpt2_counterpart(model)))
    assert abs(theirs / ours - 1) < 0.03
    chosen_on, measured_by = preset.data.sft_heldout + preset.data.dpo_heldout, preset.evaluation
    for heldout, measured in zip(chosen_on, (measured_by.instructions, measured_by.preferences), strict=True):
        spans = [(part.skip_examples, part.skip_examples + part.max_examples) for part in (heldout, measured)]
        assert heldout.source == measured.source and (spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0])
    for part in ("sft", "dpo"):
        first = getattr(preset.data, part)[0]
        assert first.skip_examples >= max(
            one.skip_examples + one.max_examples
            for one in (*chosen_on, measured_by.instructions, measured_by.preferences)
            if one.source == first.source
        )
