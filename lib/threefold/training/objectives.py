"""Training objectives: next-token prediction, preferences (DPO) and distillation.

An objective is called as `objective(model, batch) -> Loss`. The loss is a *sum* with its weight (targets, or pairs), so
that the loss of a step does not depend on how its rows are divided into micro-batches.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basics.errors import ConfigError, TrainingError
from threefold.config import TrainConfig
from threefold.data.packing import IGNORE, Batch, PairBatch, PairedRows
from threefold.model.decoder import Decoder
from threefold.training import distributed
from threefold.training.losses import cross_entropy_sum, distillation_sums, target_logprobs
from threefold.training.numerics import choose, in_memory
from threefold.training.state import read_tensors, tensors_digest, write_tensors

REFERENCE = "reference.safetensors"  # log-probabilities that a preference training keeps in its folder


@dataclass(frozen=True)
class MicroBatch:
    """Rows in the form that a device computes: only positions with a target reach the output head.

    The counts are made on the host, so that no step waits for the device.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    segments_BT: Tensor
    index_N: Tensor  # which of the B*T positions have a target
    targets_N: Tensor  # their next tokens
    tokens: int  # document positions: neither padding nor sinks
    padding: int
    sides_N: Tensor | None = None  # pairs: the side of each target, 2j for the chosen one of pair j, 2j + 1 otherwise
    pairs_P: Tensor | None = None  # pairs: their numbers in the data set

    @property
    def weight(self) -> int:
        """What a sum of losses over the micro-batch is divided by: its targets, or pairs."""
        return len(self.targets_N if self.pairs_P is None else self.pairs_P)

    @classmethod
    def of(cls, batch: "MicroBatch | Batch") -> "MicroBatch":
        """From a batch of rows in host memory; a micro-batch is returned as it is."""
        if isinstance(batch, MicroBatch):
            return batch
        flat = batch.targets_BT.reshape(-1)
        index_N = (flat != IGNORE).nonzero().squeeze(1)
        inputs = batch.tokens_BT, batch.positions_BT, batch.segments_BT
        pairs = (batch.sides_BT.reshape(-1)[index_N], batch.pairs_P) if isinstance(batch, PairBatch) else ()
        return cls(*inputs, index_N, flat[index_N], batch.n_tokens, batch.n_padding, *pairs)

    def to(self, device: str) -> "MicroBatch":
        """The same on another device, copied without waiting for it."""
        if device == "cpu":
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{n: t.pin_memory().to(device, non_blocking=True) for n, t in tensors.items()})


@dataclass(frozen=True)
class Loss:
    """A loss over one micro-batch."""

    sum: Tensor  # 0-d, differentiable, nats
    weight: int  # what the sum is divided by: target tokens, or pairs
    metrics: dict[str, Tensor] = field(default_factory=dict)  # further sums over the same weight, without gradient


class HiddenStates(Protocol):
    """The part of a model that an objective uses."""

    head_weight: Tensor

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor, segments_BT: Tensor) -> Tensor: ...


class Objective:
    """Base class of `NextToken`, `Preference` and `Distillation`."""

    name = ""  # saved with the state of a training: one objective does not resume another's
    unit = "targets"  # what the weight of a micro-batch counts
    compiled = False  # whether losses are compiled, see `losses`

    def prepare(self, model: nn.Module, rows, heldout, config: TrainConfig, folder: Path, device: str | None) -> None:
        """Compute what the objective needs from the untrained model. May write files to the folder."""

    def __call__(self, model: HiddenStates, batch: MicroBatch | Batch) -> Loss:
        raise NotImplementedError

    def for_heldout(self) -> "Objective":
        """The objective that held-out rows are evaluated with."""
        return self

    def to(self, device: str) -> None:
        """Move the objective's own tensors and models."""

    def compile(self, wrap: Callable[[nn.Module], HiddenStates]) -> None:
        """Compile the loss and the objective's own models."""
        self.compiled = True


class NextToken(Objective):
    """Cross-entropy of the next token at every position that has a target.

    Pretraining rows have targets everywhere; SFT rows only in the responses and their end, never in prompt or padding.
    """

    name = "next token"

    def __call__(self, model: HiddenStates, batch: MicroBatch | Batch) -> Loss:
        """batch: rows, as a `MicroBatch` or as data in host memory."""
        batch = MicroBatch.of(batch)
        states_ND = _states(model, batch)
        loss = cross_entropy_sum(states_ND, model.head_weight, batch.targets_N, compiled=self.compiled)
        return Loss(loss, batch.weight)


class Preference(Objective):
    """Direct preference optimisation (Rafailov et al. 2023, 2305.18290, equation 7).

    -log sigmoid(beta ((log p(y_w) - log p_ref(y_w)) - (log p(y_l) - log p_ref(y_l)))), with log p summed over a
    response's tokens, averaged over pairs; both sides of a pair are computed in one forward pass.

    Args:
        beta: strength of the reference.
        reference_P2: the frozen reference's log-probabilities (nats) of every pair's chosen and rejected response, in
            the order of the pairs. Default: the model as it is before training is the reference, and its
            log-probabilities are computed once and kept in the training's folder.
        heldout_reference_P2: those of the held-out pairs, if there are any.
    """

    name = "preference"
    unit = "pairs"

    def __init__(self, beta: float, reference_P2: Tensor | None = None, heldout_reference_P2: Tensor | None = None):
        if not beta > 0:
            raise ConfigError(f"beta = {beta}: expected a number above 0")
        self.beta, self.reference_P2, self.heldout_reference_P2 = beta, reference_P2, heldout_reference_P2

    def prepare(self, model: nn.Module, rows, heldout, config: TrainConfig, folder: Path, device: str | None) -> None:
        if self.reference_P2 is None:
            reference = _kept_reference(model, {"train": rows, "heldout": heldout}, config, folder, device)
            self.reference_P2, self.heldout_reference_P2 = reference["train"], reference.get("heldout")

    def __call__(self, model: HiddenStates, batch: MicroBatch | Batch) -> Loss:
        """batch: packed pairs, as a `MicroBatch` or as data in host memory."""
        batch = MicroBatch.of(batch)
        logprobs_P2 = sequence_logprobs(model, batch, compiled=self.compiled)
        reward_P2 = self.beta * (logprobs_P2 - self.reference_P2.index_select(0, batch.pairs_P))
        chosen_P, rejected_P = reward_P2.unbind(1)
        margin_P = chosen_P - rejected_P
        metrics = {
            "reward_margin": margin_P.detach().sum(),
            "reward_accuracy": (margin_P.detach() > 0).float().sum(),
            "reward_chosen": chosen_P.detach().sum(),
            "reward_rejected": rejected_P.detach().sum(),
        }
        return Loss(-F.logsigmoid(margin_P).sum(), batch.weight, metrics)

    def for_heldout(self) -> Objective:
        if self.heldout_reference_P2 is None:
            raise ConfigError("held-out pairs need their own reference log-probabilities")
        return Preference(self.beta, self.heldout_reference_P2)

    def to(self, device: str) -> None:
        self.reference_P2 = self.reference_P2.to(device)


class Distillation(Objective):
    """Distillation: a student learns a teacher's softened distribution and the text (Sanh et al. 2019, 1910.01108).

    weight * T^2 * KL(teacher_T || student_T) + (1 - weight) * cross-entropy, averaged over tokens.
    """

    name = "distillation"

    def __init__(self, teacher: nn.Module, temperature: float = 2.0, weight: float = 0.5):
        if not temperature > 0:
            raise ConfigError(f"distill_temperature = {temperature}: expected a number above 0")
        if not 0 <= weight <= 1:
            raise ConfigError(f"distill_weight = {weight}: expected a number from 0 to 1")
        self.teacher = teacher.requires_grad_(False).eval()
        self.temperature, self.share = temperature, weight
        self._forward: HiddenStates = teacher

    def __call__(self, model: HiddenStates, batch: MicroBatch | Batch) -> Loss:
        """batch: rows, as a `MicroBatch` or as data in host memory."""
        batch = MicroBatch.of(batch)
        if model.head_weight.size(0) != self.teacher.head_weight.size(0):
            raise ConfigError(
                f"a teacher of {self.teacher.head_weight.size(0)} tokens cannot teach a student of "
                f"{model.head_weight.size(0)}: both need the same tokenizer"
            )
        with torch.no_grad():
            teacher_h_NE = _states(self._forward, batch)
        total, soft, hard = distillation_sums(
            _states(model, batch),
            model.head_weight,
            batch.targets_N,
            teacher_h_NE,
            self.teacher.head_weight,
            self.temperature,
            self.share,
            compiled=self.compiled,
        )
        return Loss(total, batch.weight, {"kl": soft, "next_token": hard})

    def for_heldout(self) -> Objective:
        return NextToken()

    def to(self, device: str) -> None:
        self.teacher.to(device)

    def compile(self, wrap: Callable[[nn.Module], HiddenStates]) -> None:
        super().compile(wrap)
        self._forward = wrap(self.teacher)


def half_depth(teacher: Decoder) -> Decoder:
    """A student with copies of every other block of the teacher, beginning with the first, and of its embeddings and
    final norm (Sanh et al. 2019, section 3).

    Raises ConfigError for a teacher of one block.
    """
    config = teacher.config
    if config.n_layer < 2:
        raise ConfigError(f"a teacher with n_layer = {config.n_layer} has no half-depth student; it needs at least 2")
    student = Decoder(replace(config, n_layer=len(range(0, config.n_layer, 2))))
    weights = teacher.state_dict()
    for name in student.state_dict():
        part, _, rest = name.partition(".")
        if part == "blocks":
            index, _, rest = rest.partition(".")
            weights[name] = weights[f"blocks.{2 * int(index)}.{rest}"]
    student.load_state_dict({name: weights[name] for name in student.state_dict()})
    return student


def sequence_logprobs(model: HiddenStates, batch: MicroBatch, *, compiled: bool = False) -> Tensor:
    """The log-probabilities (nats, fp32) of the pairs' responses, (P, 2) for chosen and rejected, differentiable."""
    logprobs_N = target_logprobs(_states(model, batch), model.head_weight, batch.targets_N, compiled=compiled)
    return logprobs_N.new_zeros(2 * len(batch.pairs_P)).index_add(0, batch.sides_N, logprobs_N).view(-1, 2)


def _states(model: HiddenStates, batch: MicroBatch) -> Tensor:
    """The last hidden states (N, D) at the positions that have a target."""
    h_BTD = model.hidden(batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    return h_BTD.flatten(0, 1).index_select(0, batch.index_N)


# The reference of preferences ---------------------------------------------------------------------------------------


def reference_logprobs(
    model: nn.Module,
    pairs: PairedRows,
    *,
    batch_size: int = 16,
    device: str | None = None,
    precision: str = "auto",
) -> Tensor:
    """Log-probabilities (nats) of every pair's chosen and rejected response, (pairs, 2), fp32, on the CPU.

    Raises TrainingError if one is not finite.
    """
    numerics, workers = choose(TrainConfig(precision=precision, compile="off"), 0, 0, device), distributed.current()
    model.to(numerics.device)
    logprobs_P2 = torch.zeros(len(pairs), 2)
    with torch.no_grad(), numerics.autocast():
        for batch, counts in workers.deal(pairs.batches(batch_size, shuffle=False)):
            if counts:
                micro_batch = MicroBatch.of(batch).to(numerics.device)
                logprobs_P2[batch.pairs_P] = sequence_logprobs(model, micro_batch).float().cpu()
    workers.sum(logprobs_P2)  # each pair was computed by one worker
    if not logprobs_P2.isfinite().all():
        bad = logprobs_P2.isfinite().all(dim=1).logical_not().nonzero()[0].item()
        raise TrainingError(f"the reference gives pair {bad} a log-probability that is not finite")
    return logprobs_P2


def _kept_reference(
    model: nn.Module, parts: dict[str, PairedRows | None], config: TrainConfig, folder: Path, device: str | None
) -> dict[str, Tensor]:
    """The reference's log-probabilities of each part's pairs: read from the folder if this model made them, else
    computed and written there."""
    parts = {name: pairs for name, pairs in parts.items() if pairs is not None}
    made_from = {"weights": tensors_digest(model.state_dict())}
    made_from |= {name: f"{len(pairs)} pairs, {pairs.n_tokens} tokens" for name, pairs in parts.items()}
    path, workers = folder / REFERENCE, distributed.current()
    kept, kept_from = {}, {}
    if path.exists():
        with contextlib.suppress(TrainingError):  # damaged
            kept, kept_from = read_tensors(path)
    if workers.agreed(kept_from == made_from):
        return kept
    logprobs = {}
    for name, pairs in parts.items():
        compute = partial(reference_logprobs, model, pairs, device=device, precision=config.precision)
        logprobs[name] = in_memory(lambda size, compute=compute: compute(batch_size=size), config.batch_size)
    if workers.first:
        write_tensors(path, logprobs, made_from)
    return logprobs
