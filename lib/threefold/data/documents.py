"""Tokenised documents in one stream."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, concatenated into one stream, `EOS document EOS document EOS`.

    tokens: 1-D unsigned integers, memory-mapped or not. offsets: int64 [n + 1]; document i is `tokens[offsets[i] :
    offsets[i + 1]]` and its last token is EOS; `offsets[0]` is 1, for the EOS the stream starts with.
    prompts: int64 [n]; the first `prompts[i]` tokens of document i are its prompt (0 for plain text).
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompts: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[Sequence[int] | np.ndarray], eos: int, prompts: Sequence[int] = ()) -> "Documents":
        """The stream of documents given as token ids without EOS, and the lengths of their prompts, if any."""
        lengths = np.fromiter((len(document) + 1 for document in ids), np.int64, len(ids))
        offsets = np.concatenate(([1], 1 + np.cumsum(lengths)))
        tokens = np.full(offsets[-1], eos, np.uint32)
        for start, document in zip(offsets[:-1], ids, strict=True):
            tokens[start : start + len(document)] = document
        return cls(tokens, offsets, np.array(prompts, np.int64) if len(prompts) else np.zeros(len(ids), np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]: the number of tokens of each document without its EOS."""
        return np.diff(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """The number of tokens of all documents, without EOS."""
        return int(self.offsets[-1] - self.offsets[0]) - len(self)

    def __getitem__(self, index: int) -> np.ndarray:
        """Document `index` without its EOS."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1] - 1]
