"""Checkpoints, tokenizers and prompts of any content: a model that computes what its files say, or one line that names
the file."""

import io
import json
import shutil
import struct
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from evaluation_fixtures import tokenizer
from hypothesis import given
from hypothesis import strategies as st
from properties import as_json, damaged, documented, examples, mutated
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from basics.errors import CheckpointError
from study import cli, existing
from study.cli import common
from threefold.config import ModelConfig
from threefold.data.tokenizer import load_tokenizer
from threefold.evaluation import LanguageModel
from threefold.model import StreamingCache, generate, load_checkpoint, save_checkpoint, stream
from threefold.model.decoder import Decoder

SHAPES = {"n_layer": 1, "d_model": 8, "n_head": 2, "d_ff": 8, "context": 16, "vocab_size": 384}
KINDS = {
    "llama": ModelConfig(**SHAPES),
    "gpt2": ModelConfig(**SHAPES, norm="layer", ffn="gelu", position="learned", sinks=0, bias=True),
    "own": ModelConfig(**SHAPES, ffn="gelu"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{kind: a checkpoint folder}."""
    folders = {kind: tmp_path_factory.mktemp("whole") / kind for kind in KINDS}
    for kind, folder in folders.items():
        torch.manual_seed(0)
        save_checkpoint(folder, Decoder(KINDS[kind]), tokenizer())
    return folders


@pytest.fixture
def copy(whole, tmp_path_factory):
    """A folder for damaged copies."""
    return tmp_path_factory.getbasetemp() / "copy"


def fresh(whole, copy, kind):
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole[kind], copy)
    return copy


def check(folder):
    """What loads is finite and holds the weights of the file, all of them."""
    model = documented(lambda: load_checkpoint(folder), str(folder))
    if model is not None:
        stored = sum(value.numel() for value in load_file(folder / "model.safetensors").values())
        assert sum(parameter.numel() for parameter in model.parameters()) == stored
        assert model(torch.tensor([[0, 1, 2]])).shape == (1, 3, model.config.vocab_size)
    return model


@examples("checkpoint", 200)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_a_config_with_values_of_any_kind(whole, copy, data, kind):
    folder = fresh(whole, copy, kind)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(as_json(data.draw(mutated(content))))
    check(folder)


@examples("checkpoint", 120)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), name=st.sampled_from(["config.json", "model.safetensors"]))
def test_damaged_files(whole, copy, data, kind, name):
    """A whole header with other numbers in it is another model, and loads; what verify is for is not tested here."""
    folder = fresh(whole, copy, kind)
    (folder / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))
    check(folder)


@examples("checkpoint", 60)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_other_tensors(whole, copy, data, kind):
    """Missing, extra, misshapen, of another kind of number: never a model."""
    folder = fresh(whole, copy, kind)
    state = load_file(folder / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(state)))
    what = data.draw(st.sampled_from(["missing", "extra", "misshapen", "integers", "flat", "renamed"]))
    if what in ("missing", "renamed"):
        value = state.pop(name)
        state |= {f"{name}.x": value} if what == "renamed" else {}
    elif what == "extra":
        state[data.draw(st.text(st.characters(codec="ascii"), min_size=1, max_size=5))] = torch.zeros(2)
    else:
        value = state[name]
        other = {"misshapen": value[:-1], "integers": value.to(torch.int32), "flat": value.reshape(1, -1)}
        state[name] = other[what].contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder)
    assert documented(lambda: load_checkpoint(folder), "model.safetensors") is None and "\n" not in str(error.value)


def test_headers_that_were_tried(whole, copy):
    """Lengths without end, a header that is no object, tensors on top of each other or beyond the file."""
    folder = fresh(whole, copy, "llama")

    def header(content):
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        return struct.pack("<Q", len(text)) + text + b"\0" * 64

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for data in (
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        header(b"[" * 5000),
        header([]),
        header({"a": entry, "b": entry}),
        header({"a": entry | {"shape": [2**62, 2**62]}}),
        header({"a": entry | {"data_offsets": [0, 2**60]}}),
    ):
        (folder / "model.safetensors").write_bytes(data)
        assert documented(lambda: load_checkpoint(folder), "model.safetensors") is None
    content = json.loads((whole["llama"] / "config.json").read_text())
    for layers in (2**31 - 1, 2**40):  # nor does either take time
        (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": layers}))
        assert documented(lambda: load_checkpoint(folder)) is None


@examples("tokenizer", 40)
@given(data=st.data())
def test_a_damaged_tokenizer(whole, copy, data):
    folder = fresh(whole, copy, "llama")
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    if data.draw(st.booleans()):
        content = json.loads((folder / name).read_text())
        content = {key: content[key] for key in content if key != "model"} if data.draw(st.booleans()) else content
        (folder / name).write_text(as_json(data.draw(mutated({k: v for k, v in content.items()}))))
    else:
        (folder / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))
    documented(lambda: load_tokenizer(folder), str(folder))


# Other people's models -----------------------------------------------------------------------------------------------


def test_code_and_pickles_of_a_model_folder_are_not_run(tmp_path, monkeypatch):
    """Code beside the weights, in the model's or the tokenizer's configuration, is refused without a question; so are
    pickled weights, where they are all there is, under other names, in an index, or as an adapter."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    config = MistralConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=384
    )
    config.num_key_value_heads = 2
    good = tmp_path / "good"
    MistralForCausalLM(config).save_pretrained(good)
    tokenizer().save_pretrained(good)
    assert LanguageModel.from_checkpoint(good).facts["backend"] == "transformers"

    def other(name):
        return shutil.copytree(good, tmp_path / name)

    code = "open(__file__ + '.ran', 'w')\nclass Evil: pass\n"
    for place, key in (("config.json", "AutoConfig"), ("config.json", "AutoModelForCausalLM")):
        folder = other(f"code-{key}")
        content = json.loads((folder / place).read_text()) | {"auto_map": {key: "evil.Evil"}, "model_type": "evil"}
        (folder / place).write_text(json.dumps(content))
        (folder / "evil.py").write_text(code)
        assert documented(lambda folder=folder: LanguageModel.from_checkpoint(folder), folder.name) is None
    folder = other("code-tokenizer")
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "evil.py").write_text(code)
    documented(lambda: LanguageModel.from_checkpoint(folder), folder.name)

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "pickle.ran"), "w")

    weights = "model.safetensors"
    for name in ("pytorch_model.bin", "model.bin", "pytorch_model.bin.index.json"):
        folder = other(f"pickle-{name}")
        (folder / weights).unlink()
        if name.endswith("json"):
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}))
        torch.save(Evil(), folder / "pytorch_model.bin")
        said = "no model.safetensors"
        assert documented(lambda folder=folder, said=said: LanguageModel.from_checkpoint(folder), said) is None
    for shard in ("pytorch_model.bin", "../good/model.safetensors", "/etc/passwd", 3):
        folder = other(f"index-{str(shard).replace('/', '-')}")
        (folder / weights).unlink()
        torch.save(Evil(), folder / "pytorch_model.bin")
        (folder / f"{weights}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
        assert documented(lambda folder=folder: LanguageModel.from_checkpoint(folder), "not a file name") is None
    folder = other("adapter")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    torch.save(Evil(), folder / "adapter_model.bin")
    assert documented(lambda: LanguageModel.from_checkpoint(folder), "adapter") is None
    assert not list(tmp_path.rglob("*.ran"))


@examples("checkpoint", 40)
@given(data=st.data())
def test_a_foreign_config_with_values_of_any_kind(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "foreign"
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 8,
        "num_hidden_layers": 1,
    }
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": 384}
    if not folder.is_dir():
        MistralForCausalLM(MistralConfig.from_dict(config)).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    sizes = st.sampled_from([None, 0, -1, 1, 3, 2**40, 10**30, "x", [], {}, True, 1.5])
    config[data.draw(st.sampled_from(sorted(config)))] = data.draw(sizes)
    (folder / "config.json").write_text(json.dumps(config))
    documented(lambda: LanguageModel.from_checkpoint(folder), folder.name)


# Prompts -------------------------------------------------------------------------------------------------------------

ids = st.lists(st.integers(-2, 400) | st.sampled_from([2**31, 2**63]), max_size=24)


@examples("prompt", 150)
@given(prompts=st.lists(ids, max_size=4), new=st.integers(-1, 6), temperature=st.floats(-1, 2) | st.just(float("nan")))
def test_generation_from_any_ids(whole, prompts, new, temperature):
    """As many ids as asked for or as fit, all of them the model's; or the index of the prompt at fault."""
    model = load_checkpoint(whole["llama"])
    made = documented(lambda: generate(model, prompts, new, temperature=temperature, generator=torch.Generator()))
    if made is not None:
        assert [len(row) for row in made] == [min(new, 16 - len(prompt)) for prompt in prompts]
        assert all(0 <= id < 384 for row in made for id in row)


@examples("prompt", 100)
@given(
    prompt=ids, window=st.integers(-2, 8), new=st.integers(0, 6), suppress=st.lists(st.integers(-1, 400), max_size=3)
)
def test_streams_from_any_ids(whole, prompt, window, new, suppress):
    model = load_checkpoint(whole["llama"])
    action = lambda: list(stream(model, prompt, StreamingCache.of(model, 1, window), new, suppress=suppress))  # noqa: E731
    made = documented(action)
    if made is not None:
        assert len(made) == new and all(0 <= id < 384 for id in made) and not set(made) & set(suppress)


@examples("prompt", 100)
@given(requests=st.lists(st.tuples(ids, ids), max_size=6))
def test_scores_of_any_ids(whole, requests):
    """Each score is a finite sum of as many log-probabilities as there are targets."""
    model = LanguageModel.from_checkpoint(whole["llama"])
    for score, (_, target) in zip(documented(lambda: model.loglikelihoods(requests)) or (), requests, strict=False):
        assert len(score) == len(target) and score.sum() <= 0


NUMBERS = {
    "--max-new-tokens": ["1", "0", "-1", "x", "1.5", "٣"],
    "--seed": ["0", "-1", "x", "9" * 30, str(2**63 - 1), "9" * 5000],
    "--temperature": ["1", "-1", "nan", "inf", "1e-300", "x"],
    "--top-k": ["-1", "0", "1", "999999999", "9" * 30, "9" * 5000, "x"],
    "--top-p": ["0", "1", "0.5", "1e-300", "nan", "2"],
    "--window": ["1", "15", "999999999", "9" * 30],
}
PROMPTS = ["", "\ud800", "a" * 9999, "-x", "--", "\0", "\x1b[2J"]


@examples("command line", 250)
@given(
    prompt=st.just("a fox") | st.sampled_from(PROMPTS) | st.text(st.characters(), max_size=12),
    stream=st.booleans(),
    settings=st.lists(
        st.sampled_from([f"{name}={value}" for name, several in NUMBERS.items() for value in several]), max_size=2
    ),
)
def test_the_command_line_with_prompts_and_numbers_of_any_kind(whole, prompt, stream, settings):
    """Text and exit 0, or one line and exit 2."""
    words = ["generate", "--max-new-tokens=3", *settings, *["--stream"] * stream, prompt]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(common, "checkpoint", lambda options: whole["llama"])
        patch.setattr(existing, "run_folder", lambda name: whole["llama"])
        try:
            status = cli.main(words)
        except SystemExit as left:
            status = left.code
    assert (status, out.getvalue() != "", err.getvalue().count("\n")) in ((0, True, 0), (2, False, 1)), err.getvalue()


def test_more_tokens_than_any_context_take_no_memory(whole, capsys, monkeypatch):
    monkeypatch.setattr(common, "checkpoint", lambda options: whole["llama"])
    monkeypatch.setattr(existing, "run_folder", lambda name: whole["llama"])
    assert cli.main(["generate", "--max-new-tokens", "9" * 12, "a"]) == 0
    (most,) = [capsys.readouterr().out]
    assert cli.main(["generate", "--max-new-tokens", "16", "a"]) == 0 and capsys.readouterr().out == most


@examples("prompt", 80)
@given(texts=st.lists(st.text(st.characters(), max_size=12) | st.sampled_from(["", "\ud800", "a" * 9999]), max_size=3))
def test_prompts_of_any_text(whole, texts):
    model = LanguageModel.from_checkpoint(whole["llama"])
    made = documented(lambda: model.generate(texts, 2))
    assert made is None or (len(made) == len(texts) and all(isinstance(text, str) for text, _ in made))
