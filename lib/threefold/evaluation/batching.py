"""Rows and batches of what is scored: requests that share a context share a row, rows of similar length a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

FULL, SHORTER = 1024, 0.8  # positions that keep a device busy; a row of less than this share of the longest waits

Request = tuple[Sequence[int], Sequence[int]]  # (context ids, target ids): the targets are scored after the context


@dataclass
class Row:
    """What one row of a batch computes: a context and what follows it, in one or several continuations."""

    ids: tuple[int, ...]
    branches: list[int]  # of each id: 0 in the context, n in the n-th continuation
    context: int  # the fewest tokens before anything that is scored
    requests: dict[int, int] = field(default_factory=dict)  # request -> where in the row its continuation begins


def rows_of(requests: Sequence[Request], room: int) -> list[Row]:
    """A row for each distinct input; continuations of one context, such as the labels of a prompt, share a row of up to
    `room` tokens where the context is the longer part of each. A continuation is a target without its last token.
    """
    by_context: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for index, (context, target) in enumerate(requests):
        by_context.setdefault(tuple(context), {}).setdefault(tuple(target[:-1]), []).append(index)
    rows: dict[tuple[int, ...], Row] = {}
    for context, found in by_context.items():
        length = len(context)
        together = length + sum(map(len, found)) <= room and max(map(len, found)) <= length
        for group in [found] if together else [{continuation: found[continuation]} for continuation in found]:
            ids, branches, begins, number = [*context], [0] * length, {}, 0
            for continuation, indices in group.items():
                number += bool(continuation)
                begins |= dict.fromkeys(indices, len(ids))
                ids += continuation
                branches += [number] * len(continuation)
            key = (*ids, -1, *branches) if number > 1 else tuple(ids)
            row = rows.setdefault(key, Row(tuple(ids), branches, length))
            row.context = min(row.context, length)
            row.requests |= begins
    return list(rows.values())


def batches_of(lengths: list[int], extra: int, batch_tokens: int, fill: int = 0) -> list[list[int]]:
    """Indices by falling length, in batches of at most `batch_tokens` padded positions (`extra` more for every row).

    fill: positions that make a batch large enough to leave a row much shorter than its first to the next batch; 0:
        batches are as large as they can be.
    """
    batches: list[list[int]] = []
    first = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rows = len(batches[-1]) if batches else 0
        full = (rows + 1) * (first + extra) > batch_tokens
        if not batches or full or (fill and rows * first >= fill and lengths[index] < SHORTER * first):
            batches.append([])
            first = lengths[index]
        batches[-1].append(index)
    return batches
