"""Pairs of texts of which a model finds one more likely: BLiMP's sentences, and held-out replies by preference.

Rewards are DPO's implicit ones (Rafailov et al. 2023, arXiv 2305.18290, section 4): beta times the log-ratio of a reply
under the model and under the reference, here the SFT checkpoint.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from basics.errors import EvaluationError
from threefold.evaluation.adapter import LanguageModel, Request
from threefold.evaluation.results import SCORING, Dataset, Evaluation, Items, Scoring, proportion

KL_LOGITS = 2**24  # floats of full distributions held at a time, for each of the two models


def blimp(model: LanguageModel, data: Dataset, *, per_phenomenon: int = -1, scoring: Scoring = SCORING) -> Evaluation:
    """`{source}/minimal-pairs`: an acceptable sentence against one that a small change makes unacceptable.

    - Data: `evaluation.blimp` (BLiMP, 67 phenomena of 1,000 pairs; Warstadt et al. 2020, arXiv 1912.00582, call them
      paradigms); where `evaluation.blimp_pairs` is set, so many pairs of each phenomenon, drawn by the seed. All models
      see the same pairs, and the settings say how many.
    - Tokens: the model's own, of a space and the sentence, after the model's prefix tokens (BOS; for a model without a
      prefix its BOS, or else EOS).
    - Prompt: none.
    - Scoring: summed log-likelihood of each sentence, not normalised by length. A pair is right where the acceptable
      sentence is the more likely one; a tie counts half (lm-eval counts it as right).
    - Metrics, shares of pairs: `accuracy` (all pairs) and `accuracy_{phenomenon}`, each with a 95% Wilson interval over
      pairs. Chance is one half.
    - Reproduces: lm-eval 0.4's `blimp` `acc`, the same likelihoods and the same result on every pair; no published
      figure.
    """
    name = f"{data.name}/minimal-pairs"
    chosen = sample(data.items, per_phenomenon, scoring.seed)
    pairs = [data.items[index] for index in chosen]
    targets = model.encode([f" {pair[side]}" for pair in pairs for side in ("good", "bad")])
    logp_N2 = scoring.totals(
        model,
        [(model.start_ids, ids) for ids in targets],
        lambda i: f"{name}: item {chosen[i // 2]}, {('acceptable', 'unacceptable')[i % 2]} sentence",
    ).reshape(-1, 2)
    rows = pd.DataFrame({"item": chosen} | {key: [pair[key] for pair in pairs] for key in ("phenomenon", "group")})
    rows[["logp_good", "logp_bad"]] = logp_N2
    rows["correct"] = _preferred(logp_N2)
    by_phenomenon = rows.groupby("phenomenon", sort=False)["correct"]
    metrics = {"accuracy": proportion(rows["correct"], "accuracy")}
    metrics |= {f"accuracy_{phenomenon}": proportion(part, "accuracy") for phenomenon, part in by_phenomenon}
    settings = {
        "items": len(data.items),
        "pairs": len(rows),
        "phenomena": by_phenomenon.ngroups,
        "pairs_per_phenomenon": None if per_phenomenon < 0 else per_phenomenon,
        "sample_seed": None if per_phenomenon < 0 else scoring.seed,
        "subsampled": len(rows) < len(data.items),
    }
    return Evaluation(name, model.name, model.weights_sha256, metrics, rows, settings)


def sample(items: Items, per_phenomenon: int, seed: int) -> list[int]:
    """Indices of `per_phenomenon` items of each phenomenon (-1: all), in the items' order.

    The draw of a phenomenon depends on the seed and its name, not on which other phenomena there are.
    """
    phenomena = pd.Series([item["phenomenon"] for item in items])
    chosen: list[int] = []
    for phenomenon, indices in phenomena.groupby(phenomena).indices.items():
        if 0 <= per_phenomenon < len(indices):
            generator = np.random.default_rng([seed, zlib.crc32(phenomenon.encode())])
            indices = generator.choice(indices, per_phenomenon, replace=False)
        chosen += indices.tolist()
    return sorted(chosen)


def preferences(
    model: LanguageModel,
    data: Dataset,
    reference: LanguageModel | None = None,
    *,
    beta: float = 0.1,
    scoring: Scoring = SCORING,
) -> Evaluation:
    """`{source}/preferences`: likelihood of chosen against rejected replies, and rewards against the reference.

    - Data: `evaluation.preferences` (HH-RLHF, test).
    - Tokens: the model's own, prefix tokens (BOS) first; dialogue and reply apart, the reply with EOS.
    - Prompt: the dialogue verbatim to its last `Assistant:`. One too long for the context loses its beginning, the same
      for both replies; a pair whose longer reply does not fit beside at least one token of it is left out; both are
      counted.
    - Scoring: log-likelihood of the reply; a reward is `beta` times its difference from the reference's (the SFT
      checkpoint's, where it has the same tokenizer and no shorter context). Ties count half: a model is its own
      reference with accuracy .5.
    - Metrics: `accuracy` (share of pairs whose chosen reply is the likelier) and `accuracy_per_token` (by the mean over
      its tokens: longer replies are not punished), `reward_accuracy`, each with a 95% Wilson interval; `reward_margin`
      (nats times beta) and `kl` (nats per token: exact Kullback-Leibler divergence of the model's next-token
      distribution from the reference's, averaged over positions of the chosen replies), with a 95% bootstrap over
      pairs.
    - Reproduces: the implicit rewards of Rafailov et al. 2023 (arXiv 2305.18290), as in TRL's DPO; no published figure.
    """
    name = f"{data.name}/preferences"
    requests, kept, n_cut = _requests(model, data.items)
    if not kept:
        raise EvaluationError(
            f"{name}: no reply fits the {model.context} positions of {model.name}; use a longer model.context"
        )

    def describe(request: int) -> str:
        return f"{name}: item {kept[request // 2]}, {('chosen', 'rejected')[request % 2]} reply"

    logp_N2 = scoring.totals(model, requests, describe).reshape(-1, 2)
    tokens_N2 = np.array([len(target) for _, target in requests]).reshape(-1, 2)
    rows = pd.DataFrame({"item": kept})
    rows[["logp_chosen", "logp_rejected"]] = logp_N2
    rows[["tokens_chosen", "tokens_rejected"]] = tokens_N2
    rows["correct"], rows["correct_per_token"] = _preferred(logp_N2), _preferred(logp_N2 / tokens_N2)
    metrics = {
        "accuracy": proportion(rows["correct"], "accuracy"),
        "accuracy_per_token": proportion(rows["correct_per_token"], "accuracy"),
    }
    settings = {
        "items": len(data.items),
        "pairs": len(rows),
        "left_out_too_long": len(data.items) - len(rows),
        "prompts_cut": n_cut,
        "reference": None,
    }
    if reference is not None and not model.same_tokenizer(reference):
        settings["reference_left_out"] = f"{reference.name} has another tokenizer"
    elif reference is not None and reference.context < model.context:
        settings["reference_left_out"] = f"{reference.name} has a shorter context"
    elif reference is not None:
        settings |= {"reference": reference.name, "reference_sha256": reference.weights_sha256, "beta": beta}
        reference_N2 = scoring.totals(reference, requests, describe).reshape(-1, 2)
        rewards_N2 = beta * (logp_N2 - reference_N2)
        rows[["reference_logp_chosen", "reference_logp_rejected"]] = reference_N2
        rows["reward_margin"] = rewards_N2[:, 0] - rewards_N2[:, 1]
        rows["reward_correct"] = _preferred(rewards_N2)
        rows["kl"] = kl_N = _divergence(model, reference, requests[::2], scoring.batch_tokens)
        if not np.isfinite(kl_N).all():
            pair = int(np.isfinite(kl_N).argmin())
            raise EvaluationError(f"{describe(2 * pair)}: its divergence from {reference.name} is {kl_N[pair]}")
        metrics |= {
            "reward_margin": scoring.ratio(rows["reward_margin"], 1.0, "nats times beta", "pairs"),
            "reward_accuracy": proportion(rows["reward_correct"], "accuracy"),
            "kl": scoring.ratio(rows["kl"], rows["tokens_chosen"], "nats per token", "pairs"),
        }
    return Evaluation(name, model.name, model.weights_sha256, metrics, rows, settings)


def _requests(model: LanguageModel, items: Items) -> tuple[list[Request], list[int], int]:
    """(requests, the chosen reply before the rejected one of each kept item, kept items, number of prompts cut)."""
    eos = model.tokenizer.eos_token_id
    prompts, chosen, rejected = (
        model.encode([item[key] for item in items]) for key in ("prompt", "chosen", "rejected")
    )
    requests: list[Request] = []
    kept, n_cut = [], 0
    for index, prompt in enumerate(prompts):
        replies = [[*reply[index], eos] for reply in (chosen, rejected)]
        # The last token of a reply is never an input: it needs no position.
        room = model.context - len(model.prefix_ids) - (max(map(len, replies)) - 1)
        if room < 1 or not prompt:
            continue
        n_cut += len(prompt) > room
        requests += [(model.prefix_ids + prompt[-room:], reply) for reply in replies]
        kept.append(index)
    return requests, kept, n_cut


def _preferred(values_N2: np.ndarray) -> np.ndarray:
    """1 where the first is larger, 0 where the second is, 1/2 for a tie."""
    return 0.5 + 0.5 * np.sign(values_N2[:, 0] - values_N2[:, 1])


def _divergence(
    model: LanguageModel, reference: LanguageModel, requests: Sequence[Request], batch_tokens: int
) -> np.ndarray:
    """Sum over each target's positions of KL(model || reference) of the next-token distributions, in nats."""
    totals = np.zeros(len(requests))
    rows = [[*context, *target[:-1]] for context, target in requests]
    batches: list[list[int]] = []
    logits = 0
    for index in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        needed = len(requests[index][1]) * model.backend.vocab_size
        full = not batches or (len(batches[-1]) + 1) * len(rows[batches[-1][0]]) > batch_tokens
        if full or logits + needed > KL_LOGITS:
            batches.append([])
            logits = 0
        batches[-1].append(index)
        logits += needed
    for batch in batches:
        starts = [len(requests[i][0]) - 1 for i in batch]
        ours, theirs = (m.logprobs([rows[i] for i in batch], starts) for m in (model, reference))
        for index, p_TV, q_TV in zip(batch, ours, theirs, strict=True):
            totals[index] = float((p_TV.exp() * (p_TV - q_TV)).sum(dim=-1).double().sum())
    return totals
