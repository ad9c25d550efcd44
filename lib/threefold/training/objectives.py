"""What a stage minimises: next-token prediction, preferences (DPO), or a teacher's distribution.

An objective is called as `objective(model, batch) -> Loss`. The loss is a *sum* with its weight (targets, or pairs), so
that a step's loss is the same whatever micro-batches its rows are cut into.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basics.errors import ConfigError
from threefold.data.packing import IGNORE, Batch, PairBatch
from threefold.training.losses import cross_entropy_sum, distillation_sums, target_logprobs


@dataclass(frozen=True)
class Work:
    """A micro-batch as the device sees it: only positions with a target reach the output head.

    The counts are taken on the host, so that no step waits for the device.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    segments_BT: Tensor
    index_N: Tensor  # which of the B*T positions have a target
    targets_N: Tensor  # their next tokens
    tokens: int  # document positions: neither padding nor sinks
    padding: int
    sides_N: Tensor | None = None  # pairs: whose target it is, 2j of pair j's chosen side, 2j + 1 of its rejected
    pairs_P: Tensor | None = None  # pairs: which ones of the data set

    @classmethod
    def of(cls, batch: Batch) -> "Work":
        """From a data batch in host memory."""
        flat = batch.targets_BT.reshape(-1)
        index_N = (flat != IGNORE).nonzero().squeeze(1)
        sides_N, pairs_P = None, None
        if isinstance(batch, PairBatch):
            sides_N, pairs_P = batch.sides_BT.reshape(-1)[index_N], batch.pairs_P
        return cls(
            batch.tokens_BT,
            batch.positions_BT,
            batch.segments_BT,
            index_N,
            flat[index_N],
            batch.n_tokens,
            batch.n_padding,
            sides_N,
            pairs_P,
        )

    def to(self, device: str) -> "Work":
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
    """What an objective needs of a model."""

    head_weight: Tensor

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor, segments_BT: Tensor) -> Tensor: ...


class Objective:
    """Base of the objectives: see `NextToken`, `Preference`, `Distillation`."""

    name = ""  # in the state of a training: one objective does not go on with another's
    unit = "targets"  # of the weight

    def weight(self, work: Work) -> int:
        """What a micro-batch's loss is divided by, known before the forward pass."""
        return work.targets_N.numel()

    def __call__(self, model: HiddenStates, batch: Work | Batch) -> Loss:
        raise NotImplementedError

    def for_heldout(self) -> "Objective":
        """The objective that held-out rows are measured with."""
        return self

    def to(self, device: str) -> None:
        """Move what the objective itself computes with."""

    def compile(self, wrap: Callable[[nn.Module], HiddenStates]) -> None:
        """Compile what the objective itself computes with."""


class NextToken(Objective):
    """Cross-entropy of the next token at every position that has a target.

    Pretraining rows have targets everywhere; SFT rows only in the responses and their end, never in prompt or padding.
    """

    name = "next token"

    def __call__(self, model: HiddenStates, batch: Work | Batch) -> Loss:
        """batch: rows, as a `Work` or as data in host memory."""
        work = batch if isinstance(batch, Work) else Work.of(batch)
        return Loss(cross_entropy_sum(_states(model, work), model.head_weight, work.targets_N), self.weight(work))


class Preference(Objective):
    """Direct preference optimisation (Rafailov et al. 2023, 2305.18290, equation 7).

    -log sigmoid(beta ((log p(y_w) - log p_ref(y_w)) - (log p(y_l) - log p_ref(y_l)))), with log p summed over a
    response's tokens, averaged over pairs; both sides of a pair are computed in one forward pass.

    Args:
        beta: how strongly the reference holds.
        reference_P2: the frozen reference's log-probabilities (nats) of every pair's chosen and rejected response, in
            the order of the pairs; `reference_logprobs` computes them once before training.
        heldout_reference_P2: those of the held-out pairs, where there are any.
    """

    name = "preference"
    unit = "pairs"

    def __init__(self, beta: float, reference_P2: Tensor, heldout_reference_P2: Tensor | None = None):
        if not beta > 0:
            raise ConfigError(f"beta = {beta}: expected a number above 0")
        self.beta, self.reference_P2, self.heldout_reference_P2 = beta, reference_P2, heldout_reference_P2

    def weight(self, work: Work) -> int:
        return len(work.pairs_P)

    def __call__(self, model: HiddenStates, batch: Work | Batch) -> Loss:
        """batch: packed pairs, as a `Work` or as data in host memory."""
        work = batch if isinstance(batch, Work) else Work.of(batch)
        logprobs_P2 = sequence_logprobs(model, work)
        reward_P2 = self.beta * (logprobs_P2 - self.reference_P2.index_select(0, work.pairs_P))
        chosen_P, rejected_P = reward_P2.unbind(1)
        margin_P = chosen_P - rejected_P
        metrics = {
            "reward_margin": margin_P.detach().sum(),
            "reward_accuracy": (margin_P.detach() > 0).float().sum(),
            "reward_chosen": chosen_P.detach().sum(),
            "reward_rejected": rejected_P.detach().sum(),
        }
        return Loss(-F.logsigmoid(margin_P).sum(), self.weight(work), metrics)

    def for_heldout(self) -> Objective:
        if self.heldout_reference_P2 is None:
            raise ConfigError("held-out pairs need their own reference log-probabilities")
        return Preference(self.beta, self.heldout_reference_P2)

    def to(self, device: str) -> None:
        self.reference_P2 = self.reference_P2.to(device)


class Distillation(Objective):
    """A student follows a teacher's softened distribution and the text (Sanh et al. 2019, 1910.01108).

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

    def __call__(self, model: HiddenStates, batch: Work | Batch) -> Loss:
        """batch: rows, as a `Work` or as data in host memory."""
        work = batch if isinstance(batch, Work) else Work.of(batch)
        if model.head_weight.size(0) != self.teacher.head_weight.size(0):
            raise ConfigError(
                f"a teacher of {self.teacher.head_weight.size(0)} tokens cannot teach a student of "
                f"{model.head_weight.size(0)}: both need the same tokenizer"
            )
        with torch.no_grad():
            teacher_h_NE = _states(self._forward, work)
        total, soft, hard = distillation_sums(
            _states(model, work),
            model.head_weight,
            work.targets_N,
            teacher_h_NE,
            self.teacher.head_weight,
            self.temperature,
            self.share,
        )
        return Loss(total, self.weight(work), {"kl": soft, "next_token": hard})

    def for_heldout(self) -> Objective:
        return NextToken()

    def to(self, device: str) -> None:
        self.teacher.to(device)

    def compile(self, wrap: Callable[[nn.Module], HiddenStates]) -> None:
        self._forward = wrap(self.teacher)


def sequence_logprobs(model: HiddenStates, work: Work) -> Tensor:
    """The log-probabilities (nats, fp32) of the pairs' responses, (P, 2) for chosen and rejected, differentiable."""
    logprobs_N = target_logprobs(_states(model, work), model.head_weight, work.targets_N)
    return logprobs_N.new_zeros(2 * len(work.pairs_P)).index_add(0, work.sides_N, logprobs_N).view(-1, 2)


def _states(model: HiddenStates, work: Work) -> Tensor:
    """The last hidden states (N, D) at the positions that have a target."""
    h_BTD = model.hidden(work.tokens_BT, work.positions_BT, work.segments_BT)
    return h_BTD.flatten(0, 1).index_select(0, work.index_N)
