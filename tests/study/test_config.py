import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basics import names, paths
from basics.errors import ConfigError
from study.preset import (
    TRAINED,
    BaselinesConfig,
    Preset,
    format_overrides,
    load_preset,
    model_names,
    override,
    parse_overrides,
    preset_names,
    section,
    to_toml,
)
from threefold.config import ExternalConfig, ModelConfig, SourceConfig, TrainConfig, apply_variant

SMALL = """
seed = 7
[model]
n_layer = 2
[pretrain]
steps = 10
[gpt2]
steps = 10
[distilgpt2]
steps = 10
[sft]
epochs = 1
learning_rate = 1
[dpo]
tokens = 1000
[[data.pretrain]]
source = "stories"
max_examples = 5
[[data.pretrain]]
path = "mine.jsonl"
reader = "stories"
"""


@pytest.fixture
def preset_file(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    return file


@pytest.fixture
def small(preset_file) -> Preset:
    return load_preset(preset_file)


def refused(call, *arguments) -> str:
    """The message of the ConfigError that the call raises, which is one line."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_file_is_read_into_frozen_dataclasses(small):
    assert small.name == "small" and small.seed == 7
    assert small.model.n_layer == 2 and small.model.d_model == ModelConfig().d_model
    assert small.sft.learning_rate == 1.0 and isinstance(small.sft.learning_rate, float)
    assert small.data.pretrain == (
        SourceConfig("stories", max_examples=5),
        SourceConfig(path="mine.jsonl", reader="stories"),
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        small.seed = 8


def test_toml_round_trip_is_equal(small, tmp_path):
    texts = ["baselines.external=[{name='a', location='b'}]", "evaluation.sentiment_shots=0,3,8"]
    changed = override(small, parse_overrides(texts))
    assert changed.baselines.external == (ExternalConfig("a", "b"),)
    (tmp_path / "config.toml").write_text(to_toml(changed))
    assert load_preset(tmp_path / "config.toml") == changed


@pytest.mark.parametrize("name", preset_names())
def test_presets_of_the_package_are_valid(name):
    assert load_preset(name).name == name


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "[sft]\nlearning_rte = 1e-3",
            ["small.toml", "sft.learning_rte", "did you mean sft.learning_rate?", "batch_size"],
        ),
        ("[sftt]\nsteps = 1", ["small.toml", "sftt", "did you mean sft?", "pretrain"]),
        ("learning_rate = 1e-3", ["unknown key learning_rate", "did you mean sft.learning_rate?"]),
        ("[sft]\nlearning_rate = '1e-3'", ["sft.learning_rate = '1e-3'", "expected a finite number"]),
        ("[sft]\nlearning_rate = nan", ["sft.learning_rate", "expected a finite number"]),
        ("[sft]\nlearning_rate = true", ["sft.learning_rate = true", "expected a finite number"]),
        ("[sft]\nsteps = 1.0", ["sft.steps", "expected a whole number"]),
        ("[model]\nbias = 1", ["model.bias = 1", "expected true or false"]),
        ("[model]\nnorm = 'rmss'", ["model.norm = 'rmss'", "one of rms, layer", "did you mean rms?"]),
        ("[[data.sft]]\nsource = 3", ["data.sft.0.source = 3", "expected a string"]),
        ("[[data.sft]]\nsorce = 'x'", ["data.sft.0.sorce", "did you mean data.sft.0.source?"]),
        ("model = 3", ["model = 3", "expected a table with n_layer"]),
        ("seed = \n", ["small.toml", "cannot be read as TOML", "line 1"]),
        ("name = '../x'", ["'../x'", "A-Z"]),
    ],
)
def test_what_cannot_be_read_names_file_key_allowed_and_near_miss(tmp_path, text, parts):
    file = tmp_path / "small.toml"
    file.write_text(text)
    message = refused(load_preset, file)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("model.n_head=3", ["model.d_model = 128", "multiple of n_head = 3"]),
        ("model.n_kv_head=3", ["model.n_kv_head = 3", "divisor"]),
        ("model.n_kv_head=0", ["model.n_kv_head = 0", "-1 or at least 1"]),
        ("model.d_model=12", ["an even number"]),
        ("model.sinks=-1", ["model.sinks = -1", "at least 0"]),
        ("model.context=3; model.sinks=2", ["model.context = 3", "at least 4"]),
        ("model.n_layer=0", ["model.n_layer = 0", "at least 1"]),
        ("tokenizer.vocab_size=257", ["tokenizer.vocab_size = 257", "at least 258"]),
        ("sft.learning_rate=0", ["sft.learning_rate = 0.0", "more than 0"]),
        ("sft.warmup=1.5", ["sft.warmup = 1.5", "from 0 to 1"]),
        ("sft.schedule=wsd; sft.warmup=0.9", ["sft.decay = 0.2", "at most 0.1"]),
        ("sft.beta1=1", ["sft.beta1 = 1.0", "less than 1"]),
        ("sft.steps=0", ["sft.steps = 0", "-1 or at least 1"]),
        ("sft.epochs=-1", ["sft", "exactly one of steps, tokens and epochs", "none is"]),
        ("sft.epochs=1; sft.steps=1", ["sft", "exactly one", "steps and epochs are"]),
        ("sft.clip=0", ["sft.clip = 0.0", "-1 or more than 0"]),
        ("data.pretrain.0.path=x", ["data.pretrain.0", "either source", "not both"]),
        ("data.pretrain.1.reader=''", ["data.pretrain.1", "a path needs a reader"]),
        ("data.pretrain.0.source=''", ["data.pretrain.0", "either source"]),
        ("evaluation.sentiment.path=x.tsv", ["evaluation.sentiment", "a path needs a reader"]),
        ("evaluation.stride=1025", ["evaluation.stride = 1025", "at most window = 1024"]),
        ("evaluation.speed_batch_sizes=0", ["evaluation.speed_batch_sizes", "at least 1"]),
        ("ablations.variants=norm=laier", ["ablations.variants", "'norm=laier'", "one of rms, layer"]),
        ("ablations.variants=['n_head=3']", ["ablations.variants", "'n_head=3'", "multiple"]),
        ("ablations.steps=5; ablations.train.steps=6", ["ablations.train", "ablations.steps = 5"]),
        ("ablations.chain=['nrm=layer']", ["ablations.chain: 'nrm=layer': unknown key nrm, did you mean norm?"]),
        ("ablations.chain=['norm=rms']", ["ablations.chain: 'norm=rms' is what the base has already"]),
        ("ablations.chain=['norm=layer', 'norm=layer,bias=true']", ["two of its parts begin with the same key"]),
        ("ablations.scale='d_model=256'", ["ablations.scale: it is the last link of ablations.chain, which is empty"]),
        ("ablations.chain=['norm=layer']; ablations.scale='d_model=63'", ["ablations.scale: 'd_model=63'"]),
        ("tuning.multipliers=1,1", ["tuning.multipliers = [1.0, 1.0]: expected each of them once"]),
        ("tuning.multipliers=0,1", ["tuning.multipliers.0 = 0.0: expected more than 0"]),
        ("tuning.share=1.5", ["tuning.share = 1.5: expected"]),
        ("baselines.external=[{name='sft', location='x'}]", ["baselines.external.0.name = 'sft'", "already"]),
        ("baselines.external=[{name='..', location='x'}]", ["baselines.external.0.name", "'..'"]),
        ("baselines.external=[{name='x'}]", ["baselines.external.0.location"]),
        ("seed=-1", ["seed = -1", "from 0"]),
        ("baselines.gpt2=a", ["baselines.distilgpt2 = 'train'", "baselines.gpt2 = 'a'", "trained here"]),
        ("baselines.gpt2=''", ["baselines.gpt2 = ''", "expected train, a folder or a hub id"]),
    ],
)
def test_impossible_values_are_refused(small, change, parts):
    message = refused(lambda: override(small, parse_overrides(change)))
    for part in parts:
        assert part in message, message


def test_a_student_without_its_teacher_cannot_be_made():
    message = refused(lambda: BaselinesConfig(gpt2="elsewhere"))
    assert "distilgpt2 = 'train'" in message and "gpt2 = 'elsewhere'" in message


def test_a_loaded_baseline_needs_no_training_length(small):
    changed = override(small, {"gpt2.steps": -1, "baselines.gpt2": "a", "baselines.distilgpt2": "b"})
    assert changed.gpt2.steps == -1
    assert "exactly one" in refused(override, small, {"gpt2.steps": -1})


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("sft.learning_rate=3e-4", lambda p: p.sft.learning_rate == 3e-4),
        ("sft.learning_rate = 1", lambda p: p.sft.learning_rate == 1.0),
        ("model.bias=true", lambda p: p.model.bias is True),
        ("model.norm=layer", lambda p: p.model.norm == "layer"),
        ('model.norm="layer"', lambda p: p.model.norm == "layer"),
        ("description=it's 3 = 3", lambda p: p.description == "it's 3 = 3"),
        ("description=2024", lambda p: p.description == "2024"),
        ("data.pretrain.0.max_examples=9", lambda p: p.data.pretrain[0].max_examples == 9),
        ("evaluation.sentiment_shots=0,3", lambda p: p.evaluation.sentiment_shots == (0, 3)),
        ("evaluation.sentiment_shots=[0, 3]", lambda p: p.evaluation.sentiment_shots == (0, 3)),
        ("ablations.variants=ffn=gelu,sinks=0", lambda p: p.ablations.variants == ("ffn=gelu", "sinks=0")),
        ("evaluation.lines={source='a', split='b'}", lambda p: p.evaluation.lines == SourceConfig("a", "b")),
        ("data.sft=[{source='a'}]", lambda p: p.data.sft == (SourceConfig("a"),)),
    ],
)
def test_texts_are_read_by_the_type_of_their_key(small, text, read):
    assert read(override(small, parse_overrides([text])))


def test_values_are_taken_as_they_are_and_none_keeps_the_preset(small):
    changed = override(small, {"sft.learning_rate": "1e-3", "seed": 9, "model.n_layer": None, "description": "'q'"})
    assert (changed.sft.learning_rate, changed.seed, changed.model.n_layer) == (1e-3, 9, 2)
    assert changed.description == "'q'"
    assert "finite number" in refused(override, small, {"sft.learning_rate": "fast"})
    assert "whole number" in refused(override, small, {"sft.batch_size": 2.5})


def test_one_length_replaces_the_presets(small):
    assert override(small, parse_overrides(["sft.steps=5"])).sft == dataclasses.replace(small.sft, steps=5, epochs=-1.0)
    assert override(small, parse_overrides(["dpo.epochs=0.5"])).dpo.tokens == -1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sft.learning_rte=1", ["sft.learning_rte", "did you mean sft.learning_rate?"]),
        ("tuning.multiplier=1", ["did you mean tuning.multipliers?"]),
        ("sft.learning_rate", ["expected key=value"]),
        ("seed.a=1", ["seed is a value"]),
        ("data.pretrain.2.source=x", ["data.pretrain is a list of 2"]),
        ("data.pretrain.first.source=x", ["data.pretrain is a list of 2"]),
        ("seed=1\nname = 'x'", ["seed", "whole number"]),
    ],
)
def test_overrides_that_fit_nothing(small, text, parts):
    message = refused(lambda: override(small, parse_overrides([text])))
    for part in parts:
        assert part in message


def test_overrides_are_checked_together_with_the_file(preset_file):
    assert load_preset(preset_file, parse_overrides(["model.d_model=96", "model.n_head=3"])).model.d_model == 96
    assert load_preset(preset_file, {"model.d_model": 96, "model.n_head": 3}).model.n_head == 3


def test_unknown_preset_lists_the_known_and_the_near_miss(tmp_path, monkeypatch, preset_file):
    monkeypatch.setattr(paths, "PRESETS", tmp_path)
    assert load_preset("small").name == "small"
    message = refused(load_preset, "smal")
    assert "unknown preset 'smal', did you mean small?" in message and "allowed: small" in message
    assert "no such file" in refused(load_preset, "nowhere/x.toml")


def test_semicolons_inside_quotes_and_brackets_separate_nothing():
    text = """ name=c; description="x;y" ;; data.sft=[{source="]"}, {path=";"}]; baselines.gpt2='; ' """
    assert parse_overrides(text) == {
        "name": "c",
        "description": "x;y",
        "data.sft": [{"source": "]"}, {"path": ";"}],
        "baselines.gpt2": "; ",
    }


def test_an_apostrophe_in_a_bare_word_opens_no_string():
    assert parse_overrides("description=it's; seed=3") == {"description": "it's", "seed": 3}
    assert parse_overrides("name=a[b; seed=3") == {"name": "a[b", "seed": 3}


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.text("\"'\\\\;[]{}= \n,a", max_size=12),
    st.integers(0, 9),
    st.sampled_from([(0, 3), [5], ()]),
)
def test_formatted_overrides_are_read_back(text, seed, shots):
    preset = Preset(name="x", **dict.fromkeys(map(section, TRAINED), TrainConfig(steps=1)))
    source = {"source": text or "x", "split": "test"}
    changes = {"description": text, "evaluation.lines": source, "evaluation.sentiment_shots": shots, "seed": seed}
    changes |= {"dpo.beta": 0.5, "model.bias": True, "model.n_layer": None}
    expected = override(preset, changes)
    parsed = parse_overrides(format_overrides(changes))
    assert override(preset, parsed) == expected and expected.description == text
    assert parse_overrides(format_overrides(parsed)) == parsed


def test_a_variant_changes_model_or_training(small):
    model, train = apply_variant(small.model, small.sft, "ffn=gelu, bias=true")
    assert (model, train) == (dataclasses.replace(small.model, ffn="gelu", bias=True), small.sft)
    model, train = apply_variant(small.model, small.sft, "optimizer=adamw,learning_rate=2e-3")
    assert train == dataclasses.replace(small.sft, optimizer="adamw", learning_rate=2e-3) and model == small.model
    assert "key=value" in refused(apply_variant, small.model, small.sft, "gelu")
    assert "did you mean ffn?" in refused(apply_variant, small.model, small.sft, "fn=gelu")


def test_a_configuration_that_is_impossible_cannot_be_made():
    assert "d_model = 130: expected a multiple of n_head = 4" in refused(lambda: ModelConfig(d_model=130))
    assert "did you mean n_layer?" in refused(lambda: ModelConfig(n_layr=1))
    assert "n_layer = 1.0: expected a whole number" in refused(lambda: ModelConfig(n_layer=1.0))


def test_names_cannot_be_paths():
    for name in ("", ".", "..", ".hidden", "a/b", "a\\b", "a b", "ä", "a\n"):
        assert "A-Z a-z 0-9" in refused(names.check_name, name, "run")
    assert names.check_name("SmolLM2-135M_v1.0", "run") == "SmolLM2-135M_v1.0"


def test_models_stand_in_the_reports_order(small):
    changed = override(small, {"baselines.external": [{"name": "a", "location": "b"}]})
    assert model_names(changed) == ["random", "gpt2", "distilgpt2", "pretrain", "sft", "dpo", "a"]


@settings(max_examples=60, deadline=None)
@given(st.floats(min_value=1e-12, max_value=1e6), st.integers(1, 10**7), st.text(max_size=30))
def test_any_resolved_preset_survives_toml(tmp_path_factory, rate, steps, text):
    train = TrainConfig(steps=steps, learning_rate=rate)
    preset = Preset(name="x", description=text, **dict.fromkeys(map(section, TRAINED), train))
    file = tmp_path_factory.mktemp("toml") / "x.toml"
    file.write_text(to_toml(preset), encoding="utf-8", newline="")
    assert load_preset(file) == preset
