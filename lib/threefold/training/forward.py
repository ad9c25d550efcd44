"""Forward passes as the training loop runs them: eager or compiled, inside the wrappers of DDP and FSDP2, and without
gradients over held-out rows."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threefold.config import TrainConfig
from threefold.data.packing import PackedRows, PairedRows
from threefold.segments import PADDING
from threefold.training import distributed
from threefold.training.numerics import Numerics, choose
from threefold.training.objectives import HiddenStates, MicroBatch, NextToken, Objective

# Rows that are almost a multiple of so many positions are padded to it: FlexAttention computes in blocks of 128.
MULTIPLE, ALMOST = {"cpu": 1, "cuda": 128}, 1 / 32


class CompiledForward:
    """A model whose layers are a compiled graph of one static shape. Models of equal config share the graph.

    by_block: compile the blocks one by one. All share one graph, which takes a fraction of the whole model's time to
        compile, and nothing is fused from one block to the next.
    """

    def __init__(self, model: nn.Module, *, by_block: bool = False):
        self.model = model
        if by_block:
            blocks = [torch.compile(block.forward, dynamic=False) for block in model.blocks]
            self._run = partial(model.run, blocks=blocks)
        else:
            self._run = torch.compile(model.run, dynamic=False)

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor, segments_BT: Tensor) -> Tensor:
        T = tokens_BT.shape[1]
        missing = -T % MULTIPLE[tokens_BT.device.type]
        if 0 < missing <= ALMOST * T:
            tokens_BT, positions_BT = (F.pad(ids_BT, (0, missing)) for ids_BT in (tokens_BT, positions_BT))
            segments_BT = F.pad(segments_BT, (0, missing), value=PADDING)
        context = self.model.prepare(tokens_BT, positions_BT, segments_BT, in_blocks=tokens_BT.is_cuda)
        return self._run(tokens_BT, context)[:, :T]

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight


class ForwardPass(nn.Module):
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
    return mean_loss(ForwardPass(model), objective or NextToken(), rows, batch_size, numerics)


def mean_loss(
    module: ForwardPass, objective: Objective, rows: PackedRows | PairedRows, batch_size: int, numerics: Numerics
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
