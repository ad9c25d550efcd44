import numpy as np
import pytest
import torch
from evaluation_fixtures import gpt2_language_model, language_model, llama, naive_logprobs, text, tokenizer

from basics.errors import EvaluationError
from threefold.evaluation import LanguageModel, pairs
from threefold.evaluation.results import Dataset, Scoring

QUICK = Scoring(batch_tokens=4096, bootstrap=300)
PAIRS = [
    {
        "prompt": f"\n\nHuman: {text(4 + i % 5, i)}\n\nAssistant:",
        "chosen": f" {text(3 + i % 6, 100 + i)}",
        "rejected": f" {text(5, 200 + i)}",
    }
    for i in range(16)
]


def hh_rlhf(items):
    return Dataset("hh-rlhf", items)


def sides(item):
    """(prompt ids with BOS, chosen and rejected ids with EOS)."""
    encode = tokenizer()
    keys = ("chosen", "rejected")
    replies = [[*encode(item[key], add_special_tokens=False).input_ids, encode.eos_token_id] for key in keys]
    return encode(item["prompt"]).input_ids, *replies


def test_likelihood_of_the_replies_alone():
    original = llama(context=256)
    result = pairs.preferences(LanguageModel.from_model(original, tokenizer(), "llama"), hh_rlhf(PAIRS), scoring=QUICK)
    assert result.protocol == "hh-rlhf/preferences"
    correct, per_token = [], []
    for row, item in zip(result.items.itertuples(), PAIRS, strict=True):
        prompt, chosen, rejected = sides(item)
        a, b = (float(naive_logprobs(original, prompt, reply).sum()) for reply in (chosen, rejected))
        assert (row.logp_chosen, row.logp_rejected) == pytest.approx((a, b), rel=1e-4)
        assert (row.tokens_chosen, row.tokens_rejected) == (len(chosen), len(rejected))
        correct.append(a > b)
        per_token.append(a / len(chosen) > b / len(rejected))
    assert result.metrics["accuracy"]["value"] == np.mean(correct)
    assert result.metrics["accuracy_per_token"]["value"] == np.mean(per_token)
    assert 0 < np.mean(correct) < 1, "the test tells right from wrong"
    assert "reward_margin" not in result.metrics and result.settings["reference"] is None


def test_rewards_and_divergence_against_a_reference():
    policy, reference = llama(context=256), llama(context=256, seed=1)
    model = LanguageModel.from_model(policy, tokenizer(), "dpo")
    frozen = LanguageModel.from_model(reference, tokenizer(), "sft")
    result = pairs.preferences(model, hh_rlhf(PAIRS), frozen, beta=0.3, scoring=QUICK)
    margins, divergence, tokens = [], 0.0, 0
    for item in PAIRS:
        prompt, chosen, rejected = sides(item)
        ratios = [
            float((naive_logprobs(policy, prompt, r) - naive_logprobs(reference, prompt, r)).sum())
            for r in (chosen, rejected)
        ]
        margins.append(0.3 * (ratios[0] - ratios[1]))
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *chosen[:-1]]])
            p, q = (m(ids).logits[0, len(prompt) - 1 :].double().log_softmax(-1) for m in (policy, reference))
        divergence += float((p.exp() * (p - q)).sum())
        tokens += len(chosen)
    assert result.metrics["reward_margin"]["value"] == pytest.approx(np.mean(margins), rel=1e-3)
    assert result.metrics["reward_accuracy"]["value"] == np.mean(np.array(margins) > 0)
    assert result.metrics["kl"]["value"] == pytest.approx(divergence / tokens, rel=1e-4)
    assert result.settings["reference_sha256"] == frozen.weights_sha256 and result.settings["beta"] == 0.3


def test_a_model_against_itself_shows_no_difference():
    model = language_model(context=256)
    metrics = pairs.preferences(model, hh_rlhf(PAIRS), language_model(context=256), scoring=QUICK).metrics
    assert [metrics["reward_margin"][key] for key in ("value", "low", "high")] == [0.0, 0.0, 0.0]
    assert metrics["reward_accuracy"]["value"] == 0.5, "ties count half"
    assert metrics["kl"]["value"] == 0.0


def test_divergence_is_the_same_in_small_pieces(monkeypatch):
    model, frozen = language_model(context=256), language_model(context=256, seed=1)
    whole = pairs.preferences(model, hh_rlhf(PAIRS), frozen, scoring=QUICK).items["kl"]
    monkeypatch.setattr(pairs, "KL_LOGITS", 1)
    pieces = pairs.preferences(model, hh_rlhf(PAIRS), frozen, scoring=QUICK).items["kl"]
    np.testing.assert_allclose(whole, pieces, rtol=1e-3, atol=1e-5)
    assert (whole > 0).all()


def test_a_reference_of_another_tokenizer_is_left_out_and_said_so():
    result = pairs.preferences(language_model(), hh_rlhf(PAIRS), gpt2_language_model(), scoring=QUICK)
    assert "kl" not in result.metrics and "another tokenizer" in result.settings["reference_left_out"]


def test_long_dialogues_lose_their_beginning_and_are_counted():
    original = llama(context=48)
    model = LanguageModel.from_model(original, tokenizer(), "llama")
    long = {**PAIRS[0], "prompt": f"\n\nHuman: {text(60, 5)}\n\nAssistant:"}
    hopeless = {**PAIRS[1], "rejected": text(80, 6)}
    result = pairs.preferences(model, hh_rlhf([long, hopeless, PAIRS[2]]), scoring=QUICK)
    assert result.settings["prompts_cut"] >= 1 and result.settings["left_out_too_long"] == 1
    assert result.items["item"].tolist() == [0, 2]
    prompt, chosen, rejected = sides(long)
    room = 48 - 1 - (max(len(chosen), len(rejected)) - 1)
    kept = [tokenizer().bos_token_id, *prompt[1:][-room:]]
    for reply, value in ((chosen, "logp_chosen"), (rejected, "logp_rejected")):
        expected = float(naive_logprobs(original, kept, reply).sum())
        assert result.items[value].iloc[0] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(EvaluationError, match=r"no reply fits.*model\.context"):
        pairs.preferences(model, hh_rlhf([hopeless]), scoring=QUICK)


def test_a_nan_names_the_pair():
    original = llama(context=256)
    bad = tokenizer()("日", add_special_tokens=False).input_ids[-1]
    original.model.embed_tokens.weight.data[bad] = float("nan")
    model = LanguageModel.from_model(original, tokenizer(), "broken", convert=False)
    items = [*PAIRS[:3], {**PAIRS[3], "rejected": " 日 日"}]
    with pytest.raises(EvaluationError, match=r"hh-rlhf/preferences: item 3, rejected reply"):
        pairs.preferences(model, hh_rlhf(items), scoring=QUICK)
