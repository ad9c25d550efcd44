"""Sizes that no machine could hold are refused when a preset is read, at once and by their key."""

import dataclasses
import time

import pytest
from shared import ONE_STEP, call

from basics import paths
from basics.errors import ConfigError
from study import sizes, stages
from study.preset import load_preset, override, parse_overrides, preset_names
from threefold.config import ModelConfig
from threefold.model import parameter_counts

TINY = paths.PROJECT / "tests" / "presets" / "tiny.toml"
ABSURD = 10**9
KEYS = [
    *(f"model.{key}" for key in ("n_layer", "d_model", "d_ff", "context", "vocab_size")),
    "tokenizer.vocab_size",
    *(
        f"{stage}.{key}"
        for stage in ("pretrain", "sft", "dpo", "gpt2")
        for key in ("steps", "batch_size", "accumulate")
    ),
    *(
        f"ablations.{key}"
        for key in ("steps", "seeds", "rounds", "length_streams", "length_factor", "train.batch_size")
    ),
    *(f"evaluation.{key}" for key in ("window", "batch_tokens", "bootstrap", "speed_batch_sizes", "speed_prompt")),
    *(f"evaluation.{key}" for key in ("speed_new_tokens", "speed_repeats", "sentiment_draws", "sentiment_shots")),
]


def refusal(preset, text: str) -> str:
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_preset(preset, parse_overrides([text]))
    assert time.process_time() - began < 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("preset", ["smoke", "full", TINY], ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_an_absurd_size_is_refused_by_its_key(preset, key):
    assert f"{key} = {ABSURD}: asks for " in refusal(preset, f"{key}={ABSURD}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds=1000000", "seeds = 1000000: asks for 6e+06 notebooks"),
        ("pretrain.tokens=1000000000000000000", "pretrain.tokens = 1000000000000000000: asks for "),
        ("dpo.epochs=1e15", "dpo.epochs = 1000000000000000.0: asks for "),
        ("ablations.base=n_layer=1000000000", "ablations.base: model.n_layer = 1000000000: asks for "),
        (
            "ablations.variants=['d_model=1000000000']",
            "variants: 'd_model=1000000000': model.d_model = 1000000000: asks",
        ),
        ("ablations.variants=['batch_size=1000000000']", "ablations.train.batch_size = 1000000000: asks for "),
        ("model.sinks=1000000000", "beside sinks = 1000000000"),
    ],
)
def test_other_ways_to_say_it(text, said):
    assert said in refusal("smoke", text)


def test_a_file_with_an_absurd_size_is_one_line_of_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    for line in ("seeds = 1_000_000", "[model]\nn_layer = 1_000_000_000", "[tokenizer]\nvocab_size = 1_000_000_000"):
        (tmp_path / "own.toml").write_text(f"{line}\n{ONE_STEP}")
        status, out, err = call(capsys, "run", "--preset", str(tmp_path / "own.toml"))
        key = line.split()[-3]
        assert (status, out, err.count("\n")) == (2, "", 1) and f"{key} = 1000000" in err and "asks for" in err
    assert not (tmp_path / "runs").exists()


def test_large_is_not_absurd():
    """A model of seven billion parameters, a hundred replicates, and a long training."""
    large = {"model.n_layer": 32, "model.d_model": 4096, "model.n_head": 32, "model.d_ff": 11008, "model.context": 4096}
    assert override(load_preset("full"), {**large, "seeds": 100, "pretrain.tokens": 10**13}).seeds == 100
    began = time.process_time()
    assert len(stages.plan(override(load_preset("full"), {"seeds": 160}))) > 900
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", preset_names())
def test_parameters_are_those_of_the_model(name):
    model = load_preset(name).model
    model = dataclasses.replace(model, vocab_size=5000, position="learned", ffn="swiglu", n_kv_head=-1)
    counted = parameter_counts(model)
    keys = ("n_layer", "d_model", "d_ff", "context", "vocab_size")
    assert sizes.parameters(*(getattr(model, key) for key in keys)) == counted["total"] - counted["norms"]
    assert isinstance(model, ModelConfig) and counted["norms"] < 0.02 * counted["total"]
