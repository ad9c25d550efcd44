"""AdamW and Muon with warm-up and cosine, warm-up-stable-decay or constant learning rates.

AdamW: Loshchilov and Hutter 2019 (1711.05101). Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/),
as `torch.optim.Muon` has it, with equal matrices orthogonalised in one batch. Warm-up-stable-decay: Hu et al. 2024
(2404.06395).
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from basics.errors import TrainingError
from threefold.config import TrainConfig
from threefold.training import distributed
from threefold.training.numerics import fast_bf16


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, same states and same update, but matrices of one shape go through the Newton-Schulz iteration
    together, in bf16 only where the hardware multiplies it fast (torch's own always uses bf16).

    Of several workers each orthogonalises its share of the matrices and gets the others' from them. Split matrices are
    put together for it: an update's rows hang on the whole matrix.

    fp32: keep the iteration in fp32 whatever the hardware can do.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, fp32: bool = False, **settings: float):
        super().__init__(params, **settings)
        self.fp32 = fp32

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. `closure` as in every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads, momenta = [], [], []
            self._init_group(group, params, grads, momenta)
            if not params:
                continue
            lr, momentum = group["lr"], group["momentum"]
            torch._foreach_lerp_(momenta, grads, 1 - momentum)
            updates = torch._foreach_lerp(grads, momenta, momentum) if group["nesterov"] else momenta
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            by_shape: dict[torch.Size, list[int]] = defaultdict(list)
            for index, param in enumerate(params):
                by_shape[param.shape].append(index)
            for shape, indices in by_shape.items():
                dtype = torch.bfloat16 if not self.fp32 and fast_bf16(params[0].device) else torch.float32
                stack = torch.stack([distributed.whole(updates[index].to(dtype)) for index in indices])
                directions = _shared_orthogonalise(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = lr * math.sqrt(max(1, shape[0] / shape[1]))  # an update's size is not to depend on the shape
                changed = [params[index] for index in indices]
                steps = directions.to(params[0].dtype).unbind()
                torch._foreach_add_(changed, list(map(distributed.split_like, steps, changed)), alpha=-rate)
        return loss


def orthogonalise(matrices_NAB: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest half-orthogonal matrix to each of N, roughly: the quintic Newton-Schulz iteration of Muon.

    Args:
        matrices_NAB: N matrices of one shape; the result has the same shape and dtype.
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
    """`orthogonalise` of matrices that all workers hold: each computes a share of them and gets the others'."""
    workers = distributed.current()
    if workers.size == 1:
        return orthogonalise(matrices_NAB, *iteration)
    each = -(-len(matrices_NAB) // workers.size)
    own_NAB = matrices_NAB[workers.rank * each :][:each]
    part_NAB = torch.zeros_like(matrices_NAB[:1]).repeat(each, 1, 1)  # the last shares may be short, or empty
    if len(own_NAB):
        part_NAB[: len(own_NAB)] = orthogonalise(own_NAB, *iteration)
    return workers.gather(part_NAB)[: len(matrices_NAB)]


def build(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: AdamW alone, or Muon for the hidden matrices and AdamW for the rest.

    Hidden matrices are the 2-D weights inside the blocks. They and an untied output head decay; embeddings, norms and
    biases do not. Every parameter group keeps its full learning rate as `base_lr`; `set_learning_rate` scales it.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    hidden, head, plain = [], [], []  # `unembed`: an untied output head, as the decoder names it
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim != 2 or id(parameter) in embeddings:
            plain.append(parameter)
        elif name.split(".")[0] == "unembed":
            head.append(parameter)
        else:
            hidden.append(parameter)

    decay, rate = config.weight_decay, config.learning_rate
    betas = (config.beta1, config.beta2)
    muon = config.optimizer == "muon"
    groups = [
        {"params": head if muon else hidden + head, "weight_decay": decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    groups = [group for group in groups if group["params"]]
    if groups:
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=betas, eps=1e-8, fused=fused))
    if muon and hidden:
        settings = {"lr": config.muon_learning_rate, "weight_decay": decay, "momentum": 0.95}
        optimizers.append(Muon(hidden, fp32=config.precision == "fp32", **settings))
    if not optimizers:
        raise TrainingError("the model has no parameter to train: every one of them is frozen")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """What the learning rates are multiplied with in one step.

    Args:
        step: the step about to be taken, from 0.
        steps: how many there are in all.
        config: `schedule`, `warmup` and `decay` (shares of the steps), `final_lr_ratio` (the factor of the last step).
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
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
