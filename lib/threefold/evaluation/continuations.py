"""Sample continuations of held-out text, to be read and not scored: the same prompts for every model."""

import random
from pathlib import Path
from typing import Any

from threefold.config import SourceConfig
from threefold.data import sources
from threefold.evaluation.adapter import LanguageModel

PROMPTS, WORDS, TOKENS = 5, 12, 32


def sample_continuations(
    model: LanguageModel, source: SourceConfig, data_dir: str | Path = "", *, seed: int = 1337
) -> dict[str, Any]:
    """How a model continues the first `WORDS` words of `PROMPTS` lines of a text: values of a record.

    The lines are drawn by the seed from those with at least twice as many words. Decoding is greedy, up to EOS,
    `TOKENS` tokens or half the context. A prompt is cut to as many words as leave room for them in the context. Raises
    the errors of `data.sources`.
    """
    lines = [line.split() for text in sources.load(source, data_dir) for line in text.split("\n")]
    lines = [words for words in lines if len(words) >= 2 * WORDS and words[0] != "="]
    chosen = random.Random(seed).sample(lines, min(PROMPTS, len(lines)))
    new = min(TOKENS, model.context // 2)
    room = model.context - new - len(model.prefix_ids)
    prompts = [
        next(text for n in range(WORDS, -1, -1) if len(model.encode([text := " ".join(words[:n])])[0]) <= room)
        for words in chosen
    ]
    return {
        "source": sources.resolve(source, str(data_dir)).name,
        "seed": seed,
        "decoding": "greedy",
        "new_tokens": new,
        "weights_sha256": model.weights_sha256,
        "prompts": prompts,
        "texts": [text for text, _ in model.generate(prompts, new)],
    }
