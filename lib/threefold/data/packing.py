"""Rows of fixed width from documents, examples and preference pairs, with exact document boundaries.

A row of `T = config.context` positions is

    [the k sinks][piece of a document][piece of a document]...[padding]

Every piece sees the sinks and its own past, and its positions restart at k, so a packed token is computed exactly as an
unpacked one. The target of a token is the next token of its document; the target of a document's last token is EOS. If
a document begins right after the sinks, the target of the last sink is the document's first token. EOS is never an
input where there are sinks, because no later position could see it. A document longer than a row is cut into pieces;
the target of a piece's last token is still the true next token, so each token of a document is a target exactly once
(its first token only after the sinks).

Without sinks (GPT-2's architecture) rows are windows of GPT-2's own stream, `document EOS document EOS ...`: the EOS
that ends one document is the first input of the next one in the row. The first piece of a row has no EOS before it, so
the model learns both forms.

Both sides of a preference pair begin with the same prompt. The prompt without its last token is stored once, as the
trunk of two branches. Each branch sees the trunk and does not see the other branch. The last token of the prompt begins
both branches, because its target is the first token of either response (prefix sharing, Wang & Hegde 2024, 2410.20305).

Packing copies no tokens: a packing is a table of pieces of one or more token streams, which may be memory-mapped, and
batches are gathered from it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from basics.errors import DataError
from threefold.config import ModelConfig
from threefold.data.arrays import Documents, best_fit, ranges, shuffled
from threefold.segments import PADDING, SINK, TRUNK_SHIFT

IGNORE = -100  # the target of a position that is not learned (torch's cross-entropy default)

Ids = Sequence[int] | np.ndarray
Streams = Documents | Sequence[Documents]


@dataclass(frozen=True)
class Batch:
    """B rows of T positions, int64.

    tokens_BT: inputs. targets_BT: the next token, or IGNORE. positions_BT: 0..k-1 for the sinks, from k in each piece.
    segments_BT: 0 for the sinks (every position sees them), n = 1.. for the pieces of a row, -1 for padding;
    n + (m << TRUNK_SHIFT) for a branch of piece m, whose positions continue those of m.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor
    segments_BT: Tensor

    @property
    def n_tokens(self) -> int:
        """The number of document positions, which are neither padding nor sinks."""
        return int((self.segments_BT > SINK).sum())

    @property
    def n_padding(self) -> int:
        """The number of padding positions."""
        return int((self.segments_BT == PADDING).sum())


@dataclass(frozen=True)
class PairBatch(Batch):
    """P preference pairs whose 2P sequences are packed into B rows.

    sides_BT: the sequence of the batch that a position belongs to: 2j for the chosen and 2j + 1 for the rejected side
    of the batch's pair j, -1 for sinks, padding and positions that both sides share. pairs_P: the pairs' numbers in the
    data set. The log-probability of a sequence is the sum over its positions whose target is not IGNORE (its response
    and EOS).
    """

    sides_BT: Tensor
    pairs_P: Tensor


@dataclass(frozen=True)
class _Pieces:
    """A table of pieces, one int64 or bool array per column.

    start: place of the first input in the joined streams. length: number of inputs. masked: how many leading targets
    are not learned. opens: whether the piece begins a document. trunk: how many pieces before this one its trunk is, in
    the same row (0: it is not a branch).
    """

    start: np.ndarray
    length: np.ndarray
    masked: np.ndarray
    opens: np.ndarray
    trunk: np.ndarray

    def take(self, index: np.ndarray) -> "_Pieces":
        return _Pieces(*(array[index] for array in vars(self).values()))


class _Layout:
    """How pieces of token streams become rows, given the sinks, EOS and context of a model."""

    def __init__(self, streams: Sequence[Documents], config: ModelConfig, eos: int, sink_ids: Sequence[int]):
        if len(sink_ids) != config.sinks:
            raise ValueError(f"{len(sink_ids)} sink ids for a model with sinks = {config.sinks}")
        self.streams = streams
        self.bases = np.cumsum([0, *(len(stream.tokens) for stream in streams)])  # where each joined stream begins
        self.width = config.context
        self.capacity = config.context - config.sinks  # document positions of a row
        self.eos = eos
        self.sinks = np.asarray(sink_ids, np.int64)

    def whole_documents(self, lead: int) -> _Pieces:
        """One piece per document. lead: 1 to make the EOS before a document its first input, else 0.

        A prompt of P tokens masks P - 1 targets, because the target of its last token belongs to the response.
        """
        prompts = np.concatenate([stream.prompts for stream in self.streams])
        starts = [base + stream.offsets[:-1] for base, stream in zip(self.bases, self.streams, strict=False)]
        return _Pieces(
            start=np.concatenate(starts) - lead,
            length=np.concatenate([stream.lengths for stream in self.streams]) + lead,
            masked=np.maximum(prompts - 1 + lead, 0),
            opens=(prompts >= 0) if lead else (prompts == 0) & (len(self.sinks) > 0),
            trunk=np.zeros_like(prompts),
        )

    def gather(self, index: np.ndarray) -> np.ndarray:
        """int64 tokens at these places of the joined streams."""
        if len(self.streams) == 1:
            return self.streams[0].tokens[index].astype(np.int64)
        tokens = np.empty(len(index), np.int64)
        which = np.searchsorted(self.bases, index, side="right") - 1
        for stream in np.unique(which):
            here = which == stream
            tokens[here] = self.streams[stream].tokens[index[here] - self.bases[stream]]
        return tokens

    def assemble(
        self, pieces: _Pieces, rows: np.ndarray, n_rows: int
    ) -> tuple[dict[str, Tensor], np.ndarray, np.ndarray]:
        """Rows from pieces sorted by row. -> (fields of a Batch, flat places written, piece of each such place)."""
        n_sinks, width = len(self.sinks), self.width
        tokens = np.full((n_rows, width), self.eos, np.int64)
        targets = np.full((n_rows, width), IGNORE, np.int64)
        positions = np.zeros((n_rows, width), np.int64)
        segments = np.full((n_rows, width), PADDING, np.int64)
        tokens[:, :n_sinks] = self.sinks
        positions[:, :n_sinks] = np.arange(n_sinks)
        segments[:, :n_sinks] = SINK
        ordinal = np.arange(len(rows))
        first = np.diff(rows, prepend=-1) != 0
        start, length, masked = pieces.start, pieces.length, pieces.masked
        if n_sinks == 0:  # the first piece of a row has no EOS before its document
            bare = (first & pieces.opens).astype(np.int64)
            start, length, masked = start + bare, length - bare, np.maximum(masked - bare, 0)
        first_of_row = np.maximum.accumulate(np.where(first, ordinal, 0))
        before = np.cumsum(length) - length
        column = n_sinks + before - before[first_of_row]
        piece = np.repeat(ordinal, length)
        within = np.arange(length.sum()) - before[piece]
        place = (rows * width + column)[piece] + within
        source = start[piece] + within
        tokens.ravel()[place] = self.gather(source)
        targets.ravel()[place] = np.where(within < masked[piece], IGNORE, self.gather(source + 1))
        number = ordinal - first_of_row + 1
        branch = pieces.trunk > 0
        length_of_trunk = np.where(branch, length[ordinal - pieces.trunk], 0)
        positions.ravel()[place] = n_sinks + length_of_trunk[piece] + within
        segments.ravel()[place] = (number + np.where(branch, number - pieces.trunk << TRUNK_SHIFT, 0))[piece]
        if n_sinks:
            opened = first & pieces.opens & (masked == 0)
            targets[rows[opened], n_sinks - 1] = self.gather(start[opened])
        arrays = {"tokens_BT": tokens, "targets_BT": targets, "positions_BT": positions, "segments_BT": segments}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, place, piece


class _Packed:
    """What packed rows and packed pairs have in common; `len` is their number."""

    _layout: _Layout
    n_tokens: int

    @property
    def width(self) -> int:
        """T: positions of a row, sinks included."""
        return self._layout.width

    def steps(self, batch_size: int, *, epochs: float = -1, tokens: int = -1) -> int:
        """The number of batches of `batch_size` rows or pairs, at least 1, for this many epochs or, on average,
        document tokens."""
        n = epochs * len(self) if tokens < 0 else tokens / (self.n_tokens / len(self))
        return max(1, round(n / batch_size))


class PackedRows(_Packed):
    """Rows of `width` positions, packed once and gathered batch by batch.

    n_documents: documents or examples in the rows. n_dropped: examples left out because they do not fit into a row.
    n_tokens: document positions of all rows (no padding, no sinks). n_padding: padding positions.
    """

    def __init__(self, layout: _Layout, pieces: _Pieces, n_documents: int, n_dropped: int = 0):
        order, self._offsets = best_fit(pieces.length, layout.capacity)  # row r: pieces offsets[r] .. offsets[r + 1]
        self._layout = layout
        self._openings = True
        self._pieces = pieces.take(order)
        self.n_documents = n_documents
        self.n_dropped = n_dropped
        bare = int(self._pieces.opens[self._offsets[:-1]].sum()) if len(layout.sinks) == 0 else 0
        self.n_tokens = int(pieces.length.sum()) - bare
        self.n_padding = len(self) * layout.capacity - self.n_tokens

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def utilisation(self) -> float:
        """The share of the rows' positions that are document tokens (the rest: padding and sinks)."""
        return self.n_tokens / (len(self) * self.width)

    def rows(self, index: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these rows, in this order; -1 is a row of padding only."""
        index = np.asarray(index, np.int64)
        counts = np.where(index < 0, 0, self._offsets[index + 1] - self._offsets[index])
        rows = np.repeat(np.arange(len(index)), counts)
        pieces = self._pieces.take(ranges(self._offsets[index], counts))
        tensors, _, _ = self._layout.assemble(pieces, rows, len(index))
        batch = Batch(**tensors)
        if not self._openings:
            opening = (batch.tokens_BT == self._layout.eos) & (batch.positions_BT == 0)  # the EOS before a document
            batch.targets_BT[opening | (batch.segments_BT == SINK)] = IGNORE
        return batch

    def without_openings(self) -> "PackedRows":
        """The same rows in which no document's first token is a target. Which first tokens are targets depends on the
        sinks and the packing; without them every packing of a text has the same targets."""
        other = copy.copy(self)
        other._openings = False
        return other

    def batches(self, batch_size: int, *, seed: int = 0, steps: int = -1, shuffle: bool = True) -> Iterator[Batch]:
        """Batches of `batch_size` rows, all of one shape.

        Shuffled (training): `steps` batches, or without end, of epochs whose order (seed, epoch) gives; a batch may
        span two epochs. Not shuffled (scoring): every row once, in order; the last batch is filled up with padding.
        """
        if shuffle:
            yield from map(self.rows, shuffled(len(self), batch_size, seed, steps))
            return
        for first in range(0, len(self), batch_size):
            index = np.arange(first, first + batch_size)
            yield self.rows(np.where(index < len(self), index, -1))


class PairedRows(_Packed):
    """Preference pairs whose sides share a prompt; packed batch by batch, so that every batch holds whole pairs.

    n_dropped: pairs left out because a side does not fit into a row. n_tokens: document positions of both sides, shared
    ones counted once. kept: int64 [n], the place of each pair in what `pack_pairs` was given.
    """

    def __init__(self, layout: _Layout, sides: _Pieces, shared: np.ndarray, kept: np.ndarray, n_dropped: int):
        """sides: 2i chosen, 2i + 1 rejected. shared: leading inputs of a pair's sides that are stored once."""
        self._layout = layout
        self._pieces, self._side, self._begins = _branched(sides, shared)
        self._counts = np.where(shared > 0, 3, 2)  # of each pair's pieces
        self._firsts = np.cumsum(self._counts) - self._counts
        self._lengths = sides.length.reshape(-1, 2).sum(axis=1) - shared  # positions of each pair
        self.kept = kept
        self.n_dropped = n_dropped
        self.n_tokens = int(self._lengths.sum())

    def __len__(self) -> int:
        return len(self.kept)

    def batches(self, batch_size: int, *, seed: int = 0, steps: int = -1, shuffle: bool = True) -> Iterator[PairBatch]:
        """Batches of `batch_size` pairs.

        Shuffled (training): `steps` batches, all with the same number of rows (the most that any of them needs). Not
        shuffled (scoring): every pair once, in order, in the rows that each batch needs; the last batch may hold fewer
        pairs. Raises ValueError for a shuffle without `steps`.
        """
        if shuffle:
            yield from self.assembled(self.shuffled(batch_size, seed, steps))
            return
        for first in range(0, len(self), batch_size):
            yield from self.assembled([np.arange(first, min(first + batch_size, len(self)))])

    def shuffled(self, batch_size: int, seed: int, steps: int) -> list[np.ndarray]:
        """The pairs of `steps` batches, int64 [batch_size] each; every batch has short and long pairs alike."""
        if steps < 0:
            raise ValueError("steps must be given to shuffle pairs")
        return list(shuffled(len(self), batch_size, seed, steps, self._lengths))

    def assembled(self, chosen: list[np.ndarray], start: int = 0) -> Iterator[PairBatch]:
        """The batches of these pairs from number `start` on, all with as many rows as the largest of them needs."""
        packed = [self._packed(pairs) for pairs in chosen]
        n_rows = max((rows[-1] + 1 for _, _, rows in packed), default=0)
        for pairs, (pieces, side, rows) in zip(chosen[start:], packed[start:], strict=True):
            tensors, place, piece = self._layout.assemble(pieces, rows, n_rows)
            sides = np.full((n_rows, self.width), -1, np.int64)
            sides.ravel()[place] = side[piece]
            yield PairBatch(
                **tensors, sides_BT=torch.from_numpy(sides), pairs_P=torch.from_numpy(pairs.astype(np.int64))
            )

    def _packed(self, pairs: np.ndarray) -> tuple[_Pieces, np.ndarray, np.ndarray]:
        """The pairs' pieces in the order of their rows, the side that each piece belongs to (-1: both), and its row."""
        index = ranges(self._firsts[pairs], self._counts[pairs])
        pieces, side = self._pieces.take(index), self._side[index]
        side = np.where(side < 0, -1, 2 * np.repeat(np.arange(len(pairs)), self._counts[pairs]) + side)
        firsts = np.flatnonzero(self._begins[index])
        counts = np.diff(firsts, append=len(index))
        order, offsets = best_fit(np.add.reduceat(pieces.length, firsts), self._layout.capacity)
        rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        taken = ranges(firsts[order], counts[order])
        return pieces.take(taken), side[taken], np.repeat(rows, counts[order])


def _branched(sides: _Pieces, shared: np.ndarray) -> tuple[_Pieces, np.ndarray, np.ndarray]:
    """All pairs' pieces: a trunk and its two branches, or two sides that share nothing.

    -> (pieces; the side that each belongs to, -1 for both; whether it begins a group that must be in one row).
    """
    trunk = shared > 0
    begins = np.stack([trunk, ~trunk, ~trunk], axis=1)
    side = np.broadcast_to([-1, 0, 1], begins.shape)
    of = 2 * np.arange(len(shared))[:, None] + np.maximum(side, 0)  # the side whose tokens the piece takes
    cut = shared[:, None] * (side >= 0)  # inputs that are in the trunk
    pieces = _Pieces(
        start=sides.start[of] + cut,
        length=np.where(side < 0, shared[:, None], sides.length[of] - cut),
        masked=np.where(side < 0, shared[:, None], sides.masked[of] - cut),
        opens=sides.opens[of] & ~trunk[:, None],
        trunk=trunk[:, None] * (side + 1),
    )
    there = np.flatnonzero(pieces.length)
    flat = _Pieces(*(array.ravel() for array in vars(pieces).values()))
    return flat.take(there), side.ravel()[there], begins.ravel()[there]


def pack_documents(
    documents: Sequence[Ids] | Streams, config: ModelConfig, eos: int, sink_ids: Sequence[int]
) -> PackedRows:
    """Rows of documents for next-token training.

    documents: token ids without EOS and sinks, one array per document; or streams of `Documents`, several of them as
    one mixture. config: gives the width (`context`) and the number of sinks. Empty documents are left out.
    Raises DataError if the documents hold no token, ValueError if the number of sink_ids is not the config's.
    """
    layout = _Layout(_streams(documents, lambda: Documents.of(documents, eos)), config, eos, sink_ids)
    lead = int(config.sinks == 0)
    whole = layout.whole_documents(lead)
    whole = whole.take(np.flatnonzero(whole.length > lead))
    if not len(whole.start):
        raise DataError("no document with a token in it: nothing to pack")
    counts = -(-whole.length // layout.capacity)
    part = ranges(np.zeros_like(counts), counts)
    pieces = whole.take(np.repeat(np.arange(len(counts)), counts))
    before = part * layout.capacity
    length = np.minimum(layout.capacity, pieces.length - before)
    pieces = replace(pieces, start=pieces.start + before, length=length, opens=part == 0)
    return PackedRows(layout, pieces, len(counts))


def pack_examples(
    examples: Sequence[tuple[Ids, Ids]] | Streams, config: ModelConfig, eos: int, sink_ids: Sequence[int]
) -> PackedRows:
    """Rows of (prompt ids, response ids) for supervised fine-tuning: the response and its EOS are learned, the prompt
    is not.

    examples: pairs of ids without EOS and sinks; or streams of `Documents`. An example longer than a row is left out
    and counted in `n_dropped`: cut short it would teach another task. Raises DataError if no example fits.
    """
    layout = _Layout(_streams(examples, lambda: _with_prompts(examples, eos)), config, eos, sink_ids)
    pieces = layout.whole_documents(lead=int(config.sinks == 0))
    fits = pieces.length <= layout.capacity
    if not fits.any():
        raise DataError(f"no example of {len(fits)} fits into model.context = {config.context} positions")
    return PackedRows(layout, pieces.take(np.flatnonzero(fits)), int(fits.sum()), int((~fits).sum()))


def pack_pairs(
    pairs: Sequence[tuple[Ids, Ids, Ids]] | Streams, config: ModelConfig, eos: int, sink_ids: Sequence[int]
) -> PairedRows:
    """Preference pairs (prompt ids, chosen ids, rejected ids): of each side the response and its EOS are scored.

    pairs: ids without EOS and sinks; or streams of `Documents` in which chosen and rejected sides alternate. A pair
    with a side longer than a row is left out and counted in `n_dropped`. Raises DataError if no pair fits.
    """

    def sides() -> Documents:
        flat = [side for prompt, chosen, rejected in pairs for side in ((prompt, chosen), (prompt, rejected))]
        return _with_prompts(flat, eos)

    layout = _Layout(_streams(pairs, sides), config, eos, sink_ids)
    pieces = layout.whole_documents(lead=0)  # no side gets an EOS before it, so that both are computed alike
    fits = (pieces.length <= layout.capacity).reshape(-1, 2).all(axis=1)
    kept = np.flatnonzero(fits)
    if not len(kept):
        raise DataError(f"no preference pair of {len(fits)} fits into model.context = {config.context} positions")
    sides_of_pairs = pieces.take(np.stack([2 * kept, 2 * kept + 1], axis=1).ravel())
    shared = np.concatenate([_shared(stream) for stream in layout.streams])[kept]
    together = sides_of_pairs.length.reshape(-1, 2).sum(axis=1) - shared <= layout.capacity
    return PairedRows(layout, sides_of_pairs, np.where(together, shared, 0), kept, len(fits) - len(kept))


def _shared(sides: Documents) -> np.ndarray:
    """int64 [pairs]: how many leading inputs the sides of each pair share. The prompt's last token is an input of each
    side."""
    shared = np.zeros(len(sides) // 2, np.int64)
    for pair, (chosen, rejected) in enumerate(sides.prompts.reshape(-1, 2).tolist()):
        most = chosen - 1
        if chosen == rejected and np.array_equal(sides[2 * pair][:most], sides[2 * pair + 1][:most]):
            shared[pair] = max(most, 0)
    return shared


def _streams(given: Sequence | Documents, join: Callable[[], Documents]) -> list[Documents]:
    """The streams of documents that were given, or the one that joins what was given as ids."""
    if isinstance(given, Documents):
        return [given]
    if len(given) and all(isinstance(part, Documents) for part in given):
        return list(given)
    return [join()]


def _with_prompts(examples: Sequence[tuple[Ids, Ids]], eos: int) -> Documents:
    """One document of prompt and response per example."""
    whole = [[*prompt, *response] for prompt, response in examples]
    return Documents.of(whole, eos, [len(prompt) for prompt, _ in examples])
