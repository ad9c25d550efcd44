"""The rows of each training step, in a seeded order that can start at any step: a resumed run sees the same rows."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from basics.errors import ConfigError, DataError
from threefold.config import TrainConfig
from threefold.data.arrays import EpochOrder
from threefold.data.packing import Batch, PackedRows, PairedRows


class Feed:
    """The micro-batches of every step: `accumulate` of them with `batch_size` rows (or pairs) each.

    Packed rows are shuffled for each epoch by (seed, epoch). A step may span two epochs, so every batch is full.
    `replay`: other rows that make up `config.replay` of the rows of all steps, in a seeded order of their own.

    Worker `rank` takes every `workers`-th of each step's rows: together the workers take the rows that one process
    would, and each gets long and short ones. A worker's micro-batches hold at most `batch_size` rows.

    Raises ConfigError for a training without a length, a replay without rows or a batch that the workers cannot share
    evenly, DataError for no rows at all.
    """

    def __init__(
        self,
        rows: PackedRows | PairedRows,
        config: TrainConfig,
        seed: int,
        replay: PackedRows | None = None,
        rank: int = 0,
        workers: int = 1,
    ):
        _check(rows, config, replay)
        self.rows, self.seed = rows, seed
        self.config, self.rank, self.workers = config, rank, workers
        self.batch_size = config.batch_size * config.accumulate  # of all workers together
        each, left = divmod(self.batch_size, workers)
        if left:
            raise ConfigError(
                f"batch_size x accumulate = {config.batch_size} x {config.accumulate} = {self.batch_size} rows a step "
                f"cannot be shared evenly by {workers} workers; set one of the two to a multiple of {workers}, or take "
                "another number of workers"
            )
        self.micro_batch = next(n for n in range(min(each, config.batch_size), 0, -1) if each % n == 0)
        self.accumulate = each // self.micro_batch
        self.replay = replay if config.replay > 0 else None
        if config.steps > 0:
            self.steps = config.steps
        elif config.tokens > 0:
            self.steps = rows.steps(self.batch_size, tokens=config.tokens)
        else:
            self.steps = rows.steps(self.batch_size * (1 - config.replay), epochs=config.epochs)

    def halve(self) -> bool:
        """Let each micro-batch hold half as many rows, or the next number that divides a step's, and accumulate more of
        them: steps keep their rows. False if a micro-batch holds one row (or pair) already."""
        rows = self.micro_batch * self.accumulate
        if self.micro_batch == 1:
            return False
        self.micro_batch = next(n for n in range(self.micro_batch // 2, 0, -1) if rows % n == 0)
        self.accumulate = rows // self.micro_batch
        return True

    @property
    def positions(self) -> int:
        """Positions that one worker computes in all steps; for pairs an estimate."""
        paired = isinstance(self.rows, PairedRows)
        rows = self.steps * self.batch_size / self.workers
        return round(rows * (self.rows.n_tokens / len(self.rows) if paired else self.rows.width))

    def run(self, start: int) -> Iterator[tuple[list[Batch], list[int]]]:
        """For each step from `start` (0-based) on: this worker's micro-batches, and the numbers of the step's rows (or
        pairs), for messages."""
        size = self.micro_batch
        if isinstance(self.rows, PairedRows):
            # in an order that depends on the config alone, not on the number of workers
            chosen = self.rows.shuffled(self.config.batch_size, self.seed, self.steps * self.config.accumulate)
            pairs_SP = np.array(chosen).reshape(self.steps, self.batch_size)
            own = list(pairs_SP[:, self.rank :: self.workers].reshape(-1, size))
            batches = self.rows.assembled(own, start * self.accumulate)
            for pairs_P in pairs_SP[start:]:
                yield [next(batches) for _ in range(self.accumulate)], pairs_P.tolist()
            return
        own_order = EpochOrder(len(self.rows), (self.seed, 0))
        replay_order = EpochOrder(len(self.replay), (self.seed, 1)) if self.replay is not None else None
        for step in range(start, self.steps):
            before, after = (math.floor(s * self.batch_size * self.config.replay + 1e-9) for s in (step, step + 1))
            own = own_order.take(step * self.batch_size - before, (step + 1) * self.batch_size - after)
            replayed = replay_order.take(before, after) if replay_order is not None else own[:0]
            mine = np.concatenate([own, replayed])[self.rank :: self.workers]
            n_own = len(own[self.rank :: self.workers])
            yield [self._batch(mine[i : i + size], n_own - i) for i in range(0, len(mine), size)], own.tolist()

    def _batch(self, index: np.ndarray, n_own: int) -> Batch:
        """These rows: the first `n_own` (clipped to their number) are of `rows`, the others of `replay`."""
        n_own = min(max(n_own, 0), len(index))
        parts = [self.rows.rows(index[:n_own])] if n_own else []
        parts += [self.replay.rows(index[n_own:])] if n_own < len(index) else []
        if len(parts) == 1:
            return parts[0]
        return Batch(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True)))


def _check(rows: PackedRows | PairedRows, config: TrainConfig, replay: PackedRows | None) -> None:
    if not config.lengths:
        raise ConfigError("exactly one of steps, tokens and epochs must be set, not none")
    if len(rows) == 0 or (replay is not None and len(replay) == 0):
        raise DataError("there are no rows to train on: the split is empty, or every example was too long")
    if config.replay > 0 and replay is None:
        raise ConfigError(f"replay = {config.replay} needs pretraining rows to replay; replay = 0 trains without")
    if config.replay > 0 and isinstance(rows, PairedRows):
        raise ConfigError(f"replay = {config.replay}: preference pairs cannot be mixed with rows of text; set it to 0")
