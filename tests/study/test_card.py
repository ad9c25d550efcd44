"""The model card: what it says comes from the run's records, the hub can read it, and text of others stays text."""

import json

import pytest
from evaluation_fixtures import tokenizer
from huggingface_hub import ModelCard
from shared import ONE_STEP

from basics import paths
from basics.files import sha256_file
from study import stages
from study.card import write_card
from study.run import open_stage
from threefold.config import ModelConfig
from threefold.data.templates import dialogue_prompt, instruction_prompt
from threefold.model import Decoder, export, save_checkpoint
from threefold.training import TrainResult

PRESET = (
    """
name = "tiny"
[model]
n_layer = 1
d_model = 16
n_head = 2
d_ff = 32
context = 32
[tokenizer]
vocab_size = 384
[[data.pretrain]]
source = "sample-text"
{more}
[[data.sft]]
source = "sample-instructions"
[[data.dpo]]
source = "sample-preferences"
"""
    + ONE_STEP
)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a stage of run tiny with a card, as its notebook does; returns the finished folder."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)

    def make(name: str, more: str = "", tokens: int = 1234, **model):
        (tmp_path / "tiny.toml").write_text(PRESET.format(more=more))
        stage = open_stage(name, preset="tiny.toml")
        folder = stage.begin()
        sizes = {"n_layer": 1, "d_model": 16, "n_head": 2, "d_ff": 32, "context": 32, "vocab_size": 384}
        save_checkpoint(folder, Decoder(ModelConfig(**sizes, **model)), tokenizer())
        result = TrainResult(name, 1, tokens, 0, 1.0, 0.0, 1.0, 2.0, 2.0, 5678, "CPU")
        card = write_card(stage, result)
        assert write_card(stage, result) == card == (folder / "README.md").read_text(encoding="utf-8")
        stage.finish(tokens=tokens)
        return stage.folder

    return make


def test_the_card_tells_the_whole_lineage_and_the_hub_reads_it(make):
    made = {name: make(name, tokens=1000 + index) for index, name in enumerate(("pretrain", "sft", "dpo"))}
    card = ModelCard.load(made["dpo"] / "README.md")
    assert card.data.license == "cc0-1.0"  # all of the sample's
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None
    for index, folder in enumerate(made.values()):
        assert sha256_file(folder / "model.safetensors") in card.text
        assert f"{1000 + index:,}" in card.text
    for source in ("sample-text", "sample-instructions", "sample-preferences"):
        assert source in card.text
    assert "sample-instructions" not in (made["pretrain"] / "README.md").read_text()
    facts = json.loads((made["dpo"] / "run.json").read_text())
    assert facts["fingerprint"]["digest"] in card.text
    assert facts["outputs"]["README.md"] == sha256_file(made["dpo"] / "README.md")  # verify finds a changed card
    assert "beta = 0.1" in card.text and "5,678 parameters" in card.text
    for told in (facts["started"], facts["finished"], facts["started"][:10]):
        assert told not in card.text  # or the same training would not write the same bytes


def test_the_card_shows_the_prompts_that_the_stage_was_taught(make):
    cards = {name: (make(name) / "README.md").read_text() for name in ("pretrain", "sft", "dpo")}
    instruction, dialogue = json.dumps(instruction_prompt("MESSAGE")), json.dumps(dialogue_prompt("MESSAGE"))
    assert "not taught to answer" in cards["pretrain"]
    assert f"- instruction: `{instruction}`" in cards["sft"] and dialogue not in cards["sft"]
    assert f"- instruction: `{instruction}`\n- dialogue: `{dialogue}`\n" in cards["dpo"]


def test_a_restricted_source_is_named_as_such(make):
    make("pretrain")
    more = '[[data.sft]]\nsource = "alpaca"'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "data_fingerprints", lambda *inputs: {})  # Alpaca itself is not at hand
        folder = make("sft", more)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "other" and card.data.license_name
    assert card.data.datasets == ["tatsu-lab/alpaca"]
    assert "**Not for commercial use**: alpaca" in card.text and "CC BY-NC 4.0" in card.text


def test_an_own_file_is_named_without_its_folder_and_shows_as_text(make, tmp_path):
    own = tmp_path / "secret" / "<script>{{< x >}}.txt"
    own.parent.mkdir()
    own.write_text("a few words\n")
    folder = make("pretrain", f"[[data.pretrain]]\npath = {json.dumps(str(own))}\nreader = 'text'")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "other" and card.data.language is None
    assert "not known: own files" in card.text
    assert "secret" not in card.content and "<script>" not in card.content and "{{<" not in card.content


def test_a_mixture_of_parts_promises_no_transformers(make):
    card = ModelCard.load(make("pretrain", norm="layer") / "README.md")
    assert card.data.library_name == "threefold"
    assert "load_checkpoint" in card.text and "AutoModel" not in card.text


def test_the_exported_folder_has_the_card_and_the_weights_it_names(make, tmp_path):
    folder = make("pretrain")
    export(folder, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    assert sha256_file(tmp_path / "out" / "model.safetensors") in (folder / "README.md").read_text()
