"""One training step: the gradients of its micro-batches, clipping and the optimizers' update. Held-out losses."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from basics.errors import TrainingError
from threefold.config import TrainConfig
from threefold.data.packing import PackedRows, PairedRows
from threefold.training import distributed, optimizers
from threefold.training.numerics import Numerics, choose
from threefold.training.objectives import HiddenStates, MicroBatch, NextToken, Objective


class CompiledForward:
    """A model whose layers are a compiled graph of one static shape."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._run = torch.compile(model.run, dynamic=False)

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor, segments_BT: Tensor) -> Tensor:
        context = self.model.prepare(tokens_BT, positions_BT, segments_BT, in_blocks=tokens_BT.is_cuda)
        return self._run(tokens_BT, context)

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight


class _ForwardPass(nn.Module):
    """A forward pass as a module, because DDP and FSDP2 hook into the calls of a module."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, objective: Objective, states: HiddenStates, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sums of the loss and of its metrics; `states` computes with the model's weights."""
        loss = objective(states, batch)
        return loss.sum.clone(), loss.metrics  # no view: FSDP2 hooks into what is returned


class TrainStep:
    """A model on its device with its optimizers. `gradients` and `update` together are one training step.

    In a process that has joined others, gradients are summed over the workers: a step equals that of one process.

    Args:
        model, objective, config: as in `train`.
        numerics: device, precision and compiler.
        split: whether the workers split the model between them (FSDP2). Otherwise each holds a copy (DDP).
    """

    def __init__(
        self, model: nn.Module, objective: Objective, config: TrainConfig, numerics: Numerics, split: bool = False
    ):
        self.model, self.objective, self.numerics, self.clip = model, objective, numerics, config.clip
        self.workers = distributed.current()
        self.module = self.trained = _ForwardPass(model)
        self.forward: HiddenStates = model
        objective.to(numerics.device)
        if split:
            distributed.split(model, self.module, numerics.device, self.workers)
        else:
            model.to(numerics.device)
            if self.workers.size > 1:
                self.trained = distributed.replicated(self.module)
        if numerics.compile:
            if split:  # block by block, as they are gathered
                for block in model.blocks:
                    block.forward = torch.compile(block.forward, dynamic=False)
            else:
                self.forward = CompiledForward(model)
            objective.compile(CompiledForward)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = optimizers.build(model, config)

    def gradients(self, batches: Sequence[MicroBatch], weight: int) -> tuple[list[str], Tensor]:
        """Compute the gradients of a step and clip their norm.

        Args:
            batches: this worker's micro-batches.
            weight: what the sum of all workers' losses is divided by: their targets, or pairs.

        Returns:
            Names and values [k], on the device: "loss", "grad_norm" (before clipping) and the objective's metrics.
        """
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            with distributed.synchronised(self.trained, number == len(batches)):
                with self.numerics.autocast():
                    loss, metrics = self.trained(self.objective, self.forward, batch.to(self.numerics.device))
                # gradients are averaged over the workers; multiplied by their number that is the sum
                (loss * self.workers.size / weight).backward()
            for key, value in {"loss": loss.detach(), **metrics}.items():
                sums[key] = sums[key] + value if key in sums else value
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = distributed.whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
        if self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm, foreach=True)
        means = self.workers.sum(torch.stack(list(sums.values()))) / weight
        return ["loss", "grad_norm", *list(sums)[1:]], torch.cat([means[:1], norm.unsqueeze(0), means[1:]])

    def update(self, learning_rate_factor: float = 1.0) -> None:
        """Change the weights by the gradients, and clear these."""
        optimizers.set_learning_rate(self.optimizers, learning_rate_factor)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def evaluate(self, objective: Objective, rows: PackedRows | PairedRows, batch_size: int) -> dict[str, float]:
        """As `held_out_loss`."""
        return _evaluate(self.module, objective, rows, batch_size, self.numerics)


def held_out_loss(
    model: nn.Module,
    rows: PackedRows | PairedRows,
    objective: Objective | None = None,
    *,
    batch_size: int = 16,
    device: str | None = None,
    precision: str = "auto",
) -> dict[str, float]:
    """The mean loss over rows, each of them once.

    Args:
        model: as in `train`; stays in the mode it was in.
        rows: packed rows, or pairs for a `Preference` objective.
        objective: default next-token prediction.
        batch_size: rows or pairs at a time.
        device, precision: as in `train`.

    Returns:
        {"loss": nats per token (or pair) over all rows, "targets" or "pairs": their number, further metrics}.
    """
    numerics = choose(TrainConfig(precision=precision, compile="off"), 0, 0, device)
    model.to(numerics.device)
    return _evaluate(_ForwardPass(model), objective or NextToken(), rows, batch_size, numerics)


def _evaluate(
    module: _ForwardPass, objective: Objective, rows: PackedRows | PairedRows, batch_size: int, numerics: Numerics
) -> dict[str, float]:
    """Mean loss and metrics over all rows, each weighted by its targets (or as one pair); sums are kept in fp64."""
    sums: dict[str, Tensor] = {}
    weight, workers, was_training = 0, distributed.current(), module.model.training
    objective.to(numerics.device)
    module.model.eval()
    try:
        with torch.no_grad(), numerics.autocast():
            for batch, counts in workers.deal(rows.batches(batch_size, shuffle=False)):
                micro_batch = MicroBatch.of(batch).to(numerics.device)
                loss, metrics = module(objective, module.model, micro_batch)
                weight += micro_batch.weight if counts else 0
                for key, value in {"loss": loss, **metrics}.items():
                    sums[key] = sums.get(key, 0) + value.double() * counts
    finally:
        module.model.train(was_training)
    (weight,) = workers.totals(weight)
    totals = workers.sum(torch.stack(list(sums.values()))).tolist()
    return {**{key: total / weight for key, total in zip(sums, totals, strict=True)}, objective.unit: weight}


@contextlib.contextmanager
def memory_errors(what: str, config: TrainConfig) -> Iterator[None]:
    """Raises TrainingError with a way out where `what` runs out of memory.

    torch has a type for exhausted GPU memory only; its CPU allocator raises a RuntimeError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        texts = ("DefaultCPUAllocator", "std::bad_alloc")
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(t in str(error) for t in texts):
            raise
        size, accumulate = config.batch_size, config.accumulate
        smaller = next((n for n in range(size // 2, 0, -1) if size % n == 0), None)
        way = "lower model.context"
        if smaller is not None:
            way = (
                f"set batch_size = {smaller} (now {size}) and accumulate = {accumulate * size // smaller} "
                f"(now {accumulate}) for the same result in less memory"
            )
        raise TrainingError(f"{what}; {way} ({str(error).splitlines()[0][:160]})") from error
