"""Minimal pairs of sentences (BLiMP): which of the two a model finds more likely."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from threefold.evaluation.adapter import LanguageModel
from threefold.evaluation.results import SCORING, Dataset, Evaluation, Scoring, proportion


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
    spans = scoring.logprobs(
        model,
        [(model.start_ids, ids) for ids in targets],
        lambda i: f"{name}: item {chosen[i // 2]}, {('acceptable', 'unacceptable')[i % 2]} sentence",
    )
    logp_N2 = np.array([span.sum() for span in spans]).reshape(-1, 2)
    rows = pd.DataFrame(
        {
            "item": chosen,
            "phenomenon": [pair["phenomenon"] for pair in pairs],
            "group": [pair["group"] for pair in pairs],
            "logp_good": logp_N2[:, 0],
            "logp_bad": logp_N2[:, 1],
            "correct": 0.5 + 0.5 * np.sign(logp_N2[:, 0] - logp_N2[:, 1]),
        }
    )
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


def sample(items: Sequence[Mapping], per_phenomenon: int, seed: int) -> list[int]:
    """Indices of `per_phenomenon` items of each phenomenon (-1: all), in the items' order.

    The draw of a phenomenon depends on the seed and its name, not on which other phenomena there are.
    """
    by_phenomenon: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        by_phenomenon.setdefault(item["phenomenon"], []).append(index)
    chosen: list[int] = []
    for phenomenon, indices in by_phenomenon.items():
        if 0 <= per_phenomenon < len(indices):
            generator = np.random.default_rng([seed, zlib.crc32(phenomenon.encode())])
            indices = generator.choice(indices, per_phenomenon, replace=False).tolist()
        chosen += indices
    return sorted(chosen)
