"""AdamW and Muon with warm-up and cosine, warm-up-stable-decay or constant learning rates.

AdamW: Loshchilov and Hutter 2019 (1711.05101). Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/),
as in `torch.optim.Muon`, with matrices of equal shape orthogonalised in one batch. Warm-up-stable-decay: Hu et al. 2024
(2404.06395).
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from threefold.config import TrainConfig
from threefold.model.device import fast_bf16
from threefold.training import distributed


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the same states and the same update, but matrices of equal shape go through the
    Newton-Schulz iteration together, in bf16 only where the hardware multiplies it fast (torch always uses bf16).

    With several workers, each orthogonalises a part of the matrices and receives the others. Split matrices are
    gathered first, because every row of an update depends on the whole matrix.

    fp32: keep the iteration in fp32 whatever the hardware can do.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, fp32: bool = False, **settings: float):
        super().__init__(params, **settings)
        self.fp32 = fp32

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. `closure` as in every torch optimizer."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            params, grads, momenta = [], [], []
            self._init_group(group, params, grads, momenta)
            if not params:
                continue
            lr, momentum = group["lr"], group["momentum"]
            for average, grad in zip(momenta, grads, strict=True):  # split tensors have no _foreach_lerp_ in torch 2.11
                average.lerp_(grad, 1 - momentum)
            if group["nesterov"]:
                updates = [grad.lerp(average, momentum) for average, grad in zip(momenta, grads, strict=True)]
            else:
                updates = momenta
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            by_shape: dict[torch.Size, list[int]] = defaultdict(list)
            for index, param in enumerate(params):
                by_shape[param.shape].append(index)
            dtype = torch.bfloat16 if not self.fp32 and fast_bf16(params[0].device) else torch.float32
            for shape, indices in by_shape.items():
                stack = torch.stack([distributed.whole(updates[index].to(dtype)) for index in indices])
                directions = _shared_orthogonalise(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = lr * math.sqrt(max(1, shape[0] / shape[1]))  # so that updates of all shapes have the same size
                changed = [params[index] for index in indices]
                steps = directions.to(params[0].dtype).unbind()
                torch._foreach_add_(changed, list(map(distributed.split_like, steps, changed)), alpha=-rate)
        return loss


def orthogonalise(matrices_NAB: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix to each of N matrices by Muon's quintic Newton-Schulz iteration.

    Args:
        matrices_NAB: N matrices; the result has the same shape and dtype.
        coefficients, steps, eps: of the iteration, as in `torch.optim.Muon`.
    """
    a, b, c = coefficients
    tall = matrices_NAB.size(1) > matrices_NAB.size(2)
    x_NAB = matrices_NAB.mT if tall else matrices_NAB
    x_NAB = x_NAB / x_NAB.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # the largest singular value is now at most 1
    for _ in range(steps):
        gram_NAA = x_NAB @ x_NAB.mT
        step_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, step_NAA, x_NAB, beta=a)
    return x_NAB.mT if tall else x_NAB


def _shared_orthogonalise(matrices_NAB: Tensor, *iteration) -> Tensor:
    """`orthogonalise` of matrices that all workers hold: each worker computes a part and receives the others."""
    workers = distributed.current()
    if workers.size == 1:
        return orthogonalise(matrices_NAB, *iteration)
    each = -(-len(matrices_NAB) // workers.size)
    own_NAB = matrices_NAB[workers.rank * each :][:each]
    part_NAB = torch.zeros_like(matrices_NAB[:1]).repeat(each, 1, 1)  # the last parts may be short, or empty
    if len(own_NAB):
        part_NAB[: len(own_NAB)] = orthogonalise(own_NAB, *iteration)
    return workers.gather(part_NAB)[: len(matrices_NAB)]


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """The factor that the schedule multiplies the learning rates by in one step.

    Args:
        step: the step about to be taken, from 0.
        steps: the number of all steps.
        config: `schedule`, `warmup` and `decay` (fractions of the steps), `final_lr_ratio` (the last step's factor).
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    final = config.final_lr_ratio
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        decay = max(1, round(config.decay * steps))
        left = steps - step  # the last step has 1 left and gets the final ratio
        return 1.0 if left > decay else final + (1 - final) * (left - 1) / decay
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Give every parameter group its full learning rate times the factor."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["base_lr"] * factor
