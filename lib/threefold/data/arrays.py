"""Arrays behind packed rows: the token stream of documents, ranges, bin packing and the order of an epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

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


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The ranges start, start + 1, ... of `counts` integers each, concatenated."""
    return np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing bin packing (Johnson 1973): the longest piece first, each into the fullest row it fits into.

    lengths: int [n], each 1..capacity. -> (order int64 [n]: pieces row after row; offsets int64 [rows + 1] into it).
    Each piece takes one Python step: rows are grouped by the room they have left, and bit r of an integer is set if any
    row has room for exactly r more.
    """
    by_length = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, n_rows = 0, 0  # bit r: some row has room for exactly r
    for index, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, n_rows
            n_rows += 1
        row_of[index] = row
        if room > length:
            open_rows[room - length].append(row)
            rooms |= 1 << (room - length)
    order = by_length[np.argsort(row_of[by_length], kind="stable")]
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=n_rows)))).astype(np.int64)
    return order, offsets


class EpochOrder:
    """The endless series of epochs over n rows, each a permutation that (*key, epoch) seeds.

    lengths int [n], batch_size: if given, each permutation is stratified by the lengths, so that every batch has short
    and long rows alike and all batches are of about the same size.
    """

    def __init__(self, n: int, key: tuple[int, ...], lengths: np.ndarray | None = None, batch_size: int = 1):
        self.n, self.key, self.lengths, self.batch_size = n, key, lengths, batch_size
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def take(self, start: int, end: int) -> np.ndarray:
        """Elements start..end of the series, int64 [end - start]."""
        parts = [np.empty(0, np.int64)]
        while start < end:
            epoch, offset = divmod(start, self.n)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, np.random.default_rng((*self.key, epoch)).permutation(self.n)
                if self.lengths is not None:
                    self._order = _stratified(self._order, self.lengths, self.batch_size)
            parts.append(self._order[offset : offset + end - start])
            start += len(parts[-1])
        return np.concatenate(parts)


def shuffled(
    n: int, batch_size: int, seed: int, steps: int = -1, lengths: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """int64 [batch_size] indices below n: the permutations of epochs 0, 1, ... joined and cut into batches.

    steps: the number of batches, -1 for no end. lengths: see EpochOrder.
    """
    order = EpochOrder(n, (seed,), lengths, batch_size)
    for batch in count() if steps < 0 else range(steps):
        yield order.take(batch * batch_size, (batch + 1) * batch_size)


def _stratified(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """A random order rearranged so that each run of `batch_size` takes one of every stratum of lengths."""
    n_batches = -(-len(order) // batch_size)
    rank = np.empty(len(order), np.int64)  # by length, equal lengths in random order
    rank[order[np.argsort(lengths[order], kind="stable")]] = np.arange(len(order))
    stratum = rank // n_batches
    place = np.empty(len(order), np.int64)  # within the stratum, random
    grouped = order[np.argsort(stratum[order], kind="stable")]
    place[grouped] = np.arange(len(order)) % n_batches
    return np.lexsort((stratum, place))
