"""Rows of fixed width from documents, examples and preference pairs, with exact document boundaries.

A row of `T = config.context` positions is

    [the k sinks][piece of a document][piece of a document]...[padding]

Every piece sees the sinks and its own past, and its positions restart at k, so that a packed token is computed exactly
as an unpacked one. The target of a token is the next token of its document, that of a document's last token is EOS, and
the last sink learns to open a document when one begins right after it. EOS is never an input where there are sinks: no
later position could see it. A document longer than a row is cut; the last token of a piece still learns the true next
token, so each token of a document is a target exactly once (its first one only behind the sinks).

Without sinks (GPT-2's parts) rows are windows of GPT-2's own stream, `document EOS document EOS ...`: the EOS that
ended one document is the first input of the next one in the row. The first piece of a row has none, so both forms are
learned.

Both sides of a preference pair begin with the same prompt. It is laid out once, all but its last token, as the trunk of
two branches that each see it and not each other; the last token of the prompt, which learns the first one of either
response, begins both (prefix sharing, Wang & Hegde 2024, 2410.20305).

Nothing is copied when rows are packed: a packing is a table of pieces over one or more token streams, which may be
memory-mapped; batches are gathered from it.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from basics.errors import DataError
from threefold.config import ModelConfig
from threefold.data.arrays import best_fit, ranges, shuffled
from threefold.data.documents import Documents
from threefold.segments import PADDING, SINK, TRUNK_SHIFT

IGNORE = -100  # the target of a position that is not learned (torch's cross-entropy default)


@dataclass(frozen=True)
class Batch:
    """B rows of T positions, int64.

    tokens_BT: inputs. targets_BT: the next token, or IGNORE. positions_BT: 0..k-1 for the sinks, from k in each piece.
    segments_BT: 0 for the sinks (every position sees them), n = 1.. for the pieces of a row, -1 for padding;
    n + (m << TRUNK_SHIFT) for a branch of piece m, whose positions go on where those of m end.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor
    segments_BT: Tensor

    @property
    def n_tokens(self) -> int:
        """Document positions: neither padding nor sinks."""
        return int((self.segments_BT > SINK).sum())

    @property
    def n_padding(self) -> int:
        """Padding positions."""
        return int((self.segments_BT == PADDING).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; from pinned memory the copy does not block."""
        moved = {entry.name: getattr(self, entry.name).to(device, non_blocking=True) for entry in fields(self)}
        return type(self)(**moved)


@dataclass(frozen=True)
class PairBatch(Batch):
    """P preference pairs whose 2P sequences are packed into B rows.

    sides_BT: which sequence of the batch a position belongs to: 2j for the chosen and 2j+1 for the rejected side of the
    batch's pair j, -1 for sinks, padding and what both sides share. pairs_P: which pairs of the data set these are.
    A sequence's log-probability is the sum over its positions whose target is not IGNORE (its response and EOS).
    """

    sides_BT: Tensor
    pairs_P: Tensor


@dataclass(frozen=True)
class _Pieces:
    """A table of pieces: `start` in the joined streams, `length` in inputs, `masked` leading targets, `opens` a
    document, `trunk` so many pieces before it in its row (0: none).
    """

    start: np.ndarray
    length: np.ndarray
    masked: np.ndarray
    opens: np.ndarray
    trunk: np.ndarray

    def take(self, index: np.ndarray) -> "_Pieces":
        return _Pieces(*(array[index] for array in vars(self).values()))


class _Layout:
    """How pieces of token streams become rows: the sinks, EOS and width of a model."""

    def __init__(self, streams: Sequence[Documents], config: ModelConfig, eos: int, sink_ids: Sequence[int]):
        if len(sink_ids) != config.sinks:
            raise ValueError(f"{len(sink_ids)} sink ids for a model with sinks = {config.sinks}")
        self.streams = [stream.tokens for stream in streams]
        self.bases = np.cumsum([0, *(len(tokens) for tokens in self.streams)])
        self.width = config.context
        self.capacity = config.context - config.sinks  # document positions of a row
        self.eos = eos
        self.sinks = np.asarray(sink_ids, np.int64)

    def gather(self, index: np.ndarray) -> np.ndarray:
        """int64 tokens at these places of the joined streams."""
        if len(self.streams) == 1:
            return self.streams[0][index].astype(np.int64)
        tokens = np.empty(len(index), np.int64)
        which = np.searchsorted(self.bases, index, side="right") - 1
        for stream in np.unique(which):
            here = which == stream
            tokens[here] = self.streams[stream][index[here] - self.bases[stream]]
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
        if len(rows):
            first = np.concatenate(([True], rows[1:] != rows[:-1]))
            start, length, masked = pieces.start, pieces.length, pieces.masked
            if n_sinks == 0:  # the first piece of a row goes without the EOS before its document
                bare = (first & pieces.opens).astype(np.int64)
                start, length, masked = start + bare, length - bare, np.maximum(masked - bare, 0)
            ordinal = np.arange(len(rows))
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
            before_branch = np.where(branch, length[ordinal - pieces.trunk], 0)
            positions.ravel()[place] = n_sinks + before_branch[piece] + within
            segments.ravel()[place] = (number + np.where(branch, number - pieces.trunk << TRUNK_SHIFT, 0))[piece]
            if n_sinks:
                opened = first & pieces.opens & (masked == 0)
                targets[rows[opened], n_sinks - 1] = self.gather(start[opened])
        else:
            place = piece = np.empty(0, np.int64)
        arrays = {"tokens_BT": tokens, "targets_BT": targets, "positions_BT": positions, "segments_BT": segments}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, place, piece


class _Packed:
    """What packed rows and packed pairs have in common; their number is `len`."""

    _layout: _Layout
    n_tokens: int

    @property
    def width(self) -> int:
        """T: positions of a row, sinks included."""
        return self._layout.width

    def steps(self, batch_size: int, *, epochs: float = -1, tokens: int = -1) -> int:
        """Batches of `batch_size` rows or pairs, at least one, for this many epochs or, on average, document tokens."""
        n = epochs * len(self) if tokens < 0 else tokens / (self.n_tokens / len(self))
        return max(1, round(n / batch_size))


class PackedRows(_Packed):
    """Rows of `width` positions, packed once and gathered batch by batch.

    n_documents: documents or examples in the rows. n_dropped: examples that do not fit into a row, left out.
    n_tokens: document positions of all rows (no padding, no sinks). n_padding: padding positions.
    """

    def __init__(self, layout: _Layout, pieces: _Pieces, n_documents: int, n_dropped: int = 0):
        order, offsets = best_fit(pieces.length, layout.capacity)
        self._layout = layout
        self._openings = True
        self._pieces = pieces.take(order)
        self._offsets = offsets  # row r holds pieces offsets[r] .. offsets[r + 1]
        self.n_documents = n_documents
        self.n_dropped = n_dropped
        firsts = offsets[:-1]
        bare = int(self._pieces.opens[firsts].sum()) if len(layout.sinks) == 0 else 0
        self.n_tokens = int(pieces.length.sum()) - bare
        self.n_padding = len(self) * layout.capacity - self.n_tokens

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def utilisation(self) -> float:
        """Share of the rows' positions that are document tokens (the rest: padding and sinks)."""
        return self.n_tokens / (len(self) * self.width)

    def rows(self, index: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these rows, in this order; -1 stands for a row that is all padding."""
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
        """The same rows in which no document's first token is a target. Which first tokens are depends on the sinks and
        the packing; without them the targets of a text are the same in every packing."""
        other = copy.copy(self)
        other._openings = False
        return other

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        steps: int = -1,
        epochs: float = -1,
        start: int = 0,
        shuffle: bool = True,
    ) -> Iterator[Batch]:
        """Batches of `batch_size` rows, always of one shape.

        Shuffled (training): an endless series of epochs, each in its own order given by (seed, epoch), cut into batches
        across their borders; `steps` batches, or as many as cover `epochs`, or no end. `start` skips that many: batch n
        is the same whether or not the iteration began at 0. Not shuffled (scoring): every row once, in order; the last
        batch is filled up with rows of padding.
        """
        if not shuffle:
            for first in range(start * batch_size, len(self), batch_size):
                index = np.full(batch_size, -1)
                rows = np.arange(first, min(first + batch_size, len(self)))
                index[: len(rows)] = rows
                yield self.rows(index)
            return
        if steps < 0 and epochs >= 0:
            steps = self.steps(batch_size, epochs=epochs)
        for index in shuffled(len(self), batch_size, seed, steps, start):
            yield self.rows(index)


class PairedRows(_Packed):
    """Preference pairs whose sides share a prompt; packed batch by batch, so that every batch holds whole pairs.

    n_pairs: pairs kept. n_dropped: pairs with a side that does not fit into a row, left out. n_tokens: document
    positions of both sides, shared ones once. kept: int64 [n_pairs], the place of each pair in what `pack_pairs` was
    given.
    """

    def __init__(self, layout: _Layout, sides: _Pieces, shared: np.ndarray, kept: np.ndarray, n_dropped: int):
        """sides: 2i chosen, 2i + 1 rejected. shared: leading inputs of a pair's sides that are laid out once."""
        self._layout = layout
        self._pieces, self._side, self._begins = _branched(sides, shared)
        self._counts = np.where(shared > 0, 3, 2)  # of each pair's pieces
        self._firsts = np.cumsum(self._counts) - self._counts
        self._lengths = sides.length.reshape(-1, 2).sum(axis=1) - shared  # positions of each pair
        self.kept = kept
        self.n_pairs = len(kept)
        self.n_dropped = n_dropped
        self.n_tokens = int(self._lengths.sum())

    def __len__(self) -> int:
        return self.n_pairs

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        steps: int = -1,
        epochs: float = -1,
        start: int = 0,
        shuffle: bool = True,
    ) -> Iterator[PairBatch]:
        """Batches of `batch_size` pairs.

        Shuffled (training): `steps` batches or those of `epochs`, as `PackedRows.batches`, all with the same number of
        rows (the most any of them needs; so one of the two must be given). Not shuffled (scoring): every pair once, in
        order, in the rows that each batch needs; the last batch may hold fewer pairs.
        """
        if not shuffle:
            for first in range(start * batch_size, len(self), batch_size):
                yield from self.assembled([np.arange(first, min(first + batch_size, len(self)))])
            return
        if steps < 0:
            if epochs < 0:
                raise ValueError("steps or epochs must be given to shuffle pairs")
            steps = self.steps(batch_size, epochs=epochs)
        yield from self.assembled(self.shuffled(batch_size, seed, steps), start)

    def shuffled(self, batch_size: int, seed: int, steps: int) -> list[np.ndarray]:
        """The pairs of `steps` batches, int64 [batch_size] each, short and long ones alike in every batch."""
        return list(shuffled(len(self), batch_size, seed, steps, 0, self._lengths))

    def assembled(self, chosen: list[np.ndarray], start: int = 0) -> Iterator[PairBatch]:
        """The batches of these pairs, from the `start`-th on, all with the rows that the largest of them all needs."""
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
        """The pairs' pieces in the order of their rows, the side that each piece is of (-1: both), and its row."""
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
    """All pairs' pieces: a trunk and its two branches, or two sides that share nothing. -> (pieces; the side that each
    is of, -1 for both; whether it begins what has to lie in one row)."""
    trunk = shared > 0
    begins = np.stack([trunk, ~trunk, ~trunk], axis=1)
    side = np.broadcast_to([-1, 0, 1], begins.shape)
    of = 2 * np.arange(len(shared))[:, None] + np.maximum(side, 0)  # the side whose tokens it takes
    cut = shared[:, None] * (side >= 0)  # what lies in the trunk
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
    documents: Sequence[Sequence[int] | np.ndarray] | Documents | Sequence[Documents],
    config: ModelConfig,
    eos: int,
    sink_ids: Sequence[int],
) -> PackedRows:
    """Rows of documents for next-token training.

    documents: token ids without EOS and sinks, one array a document; or `Documents` streams, several of them as one
    mixture. config: gives the width (`context`) and the number of sinks. Empty documents are left out.
    Raises DataError if they hold no token, ValueError if the number of sink_ids is not the config's.
    """
    streams = _streams(documents, eos)
    layout = _Layout(streams, config, eos, sink_ids)
    lead = int(config.sinks == 0)  # the EOS before a document is its first input
    starts, lengths = [], []
    for stream, base in zip(streams, layout.bases[:-1], strict=True):
        full = stream.lengths > 0
        starts.append(base + stream.offsets[:-1][full] - lead)
        lengths.append(stream.lengths[full] + lead)
    start, length = np.concatenate(starts), np.concatenate(lengths)
    if not len(start):
        raise DataError("no document with a token in it: nothing to pack")
    counts = -(-length // layout.capacity)
    part = ranges(np.zeros_like(counts), counts)
    pieces = _Pieces(
        start=np.repeat(start, counts) + part * layout.capacity,
        length=np.minimum(layout.capacity, np.repeat(length, counts) - part * layout.capacity),
        masked=np.zeros(len(part), np.int64),
        opens=part == 0,
        trunk=np.zeros(len(part), np.int64),
    )
    return PackedRows(layout, pieces, len(start))


def pack_examples(
    examples: Sequence[tuple[Sequence[int], Sequence[int]]] | tuple[Documents, np.ndarray],
    config: ModelConfig,
    eos: int,
    sink_ids: Sequence[int],
) -> PackedRows:
    """Rows of (prompt ids, response ids) for supervised fine-tuning: the response and its EOS are learned, the prompt
    is not.

    examples: pairs of ids without EOS and sinks; or (Documents of prompt + response, int64 [n] prompt lengths).
    An example longer than a row is left out and counted in `n_dropped`: cut short it would teach another task.
    Raises DataError if no example fits.
    """
    documents, prompts = _joined(examples, eos)
    layout = _Layout([documents], config, eos, sink_ids)
    lead = config.sinks == 0
    pieces = _whole(documents, prompts, lead=int(lead), opens=(prompts >= 0) if lead else (prompts == 0))
    kept = np.flatnonzero(pieces.length <= layout.capacity)
    if not len(kept):
        raise DataError(f"no example of {len(documents)} fits into model.context = {config.context} positions")
    return PackedRows(layout, pieces.take(kept), len(kept), len(documents) - len(kept))


def pack_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]] | tuple[Documents, np.ndarray],
    config: ModelConfig,
    eos: int,
    sink_ids: Sequence[int],
) -> PairedRows:
    """Preference pairs (prompt ids, chosen ids, rejected ids): of each side the response and its EOS are scored.

    pairs: ids without EOS and sinks; or (Documents of prompt + response, chosen and rejected sides alternating, int64
    [2n] prompt lengths). A pair with a side longer than a row is left out and counted in `n_dropped`. Raises DataError
    if none fits.
    """
    if not isinstance(pairs, tuple):
        pairs = [side for prompt, chosen, rejected in pairs for side in ((prompt, chosen), (prompt, rejected))]
    documents, prompts = _joined(pairs, eos)
    layout = _Layout([documents], config, eos, sink_ids)
    # Without sinks no side gets an EOS before it, first in its row or not: both sides are computed alike.
    pieces = _whole(documents, prompts, lead=0, opens=(prompts == 0) & (config.sinks > 0))
    fits = (pieces.length <= layout.capacity).reshape(-1, 2).all(axis=1)
    kept = np.flatnonzero(fits)
    if not len(kept):
        raise DataError(f"no preference pair of {len(fits)} fits into model.context = {config.context} positions")
    sides = pieces.take(np.stack([2 * kept, 2 * kept + 1], axis=1).ravel())
    shared = np.fromiter((_shared(documents, prompts, pair) for pair in kept), np.int64, len(kept))
    together = sides.length.reshape(-1, 2).sum(axis=1) - shared <= layout.capacity
    return PairedRows(layout, sides, np.where(together, shared, 0), kept, len(fits) - len(kept))


def _shared(documents: Documents, prompts: np.ndarray, pair: int) -> int:
    """How many leading inputs both sides of a pair share. The last token of the prompt is an input of each side."""
    chosen, rejected = 2 * pair, 2 * pair + 1
    most = int(min(prompts[chosen], prompts[rejected])) - 1
    if most < 1 or prompts[chosen] != prompts[rejected]:
        return 0
    return most if np.array_equal(documents[chosen][:most], documents[rejected][:most]) else 0


def _streams(documents, eos: int) -> list[Documents]:
    if isinstance(documents, Documents):
        return [documents]
    if len(documents) and all(isinstance(part, Documents) for part in documents):
        return list(documents)
    return [Documents.of(documents, eos)]


def _joined(examples, eos: int) -> tuple[Documents, np.ndarray]:
    if isinstance(examples, tuple):
        return examples
    prompts = np.fromiter((len(prompt) for prompt, _ in examples), np.int64, len(examples))
    return Documents.of([[*prompt, *response] for prompt, response in examples], eos), prompts


def _whole(documents: Documents, prompts: np.ndarray, lead: int, opens: np.ndarray) -> _Pieces:
    """One piece per document. A prompt of P tokens masks the P - 1 targets inside it; its last token has a target."""
    return _Pieces(
        start=documents.offsets[:-1] - lead,
        length=documents.lengths + lead,
        masked=np.maximum(prompts - 1 + lead, 0),
        opens=opens,
        trunk=np.zeros_like(prompts),
    )
