"""Losses at the output head, computed in pieces so that the logits of a whole batch are never in memory at once.

A piece's gradient is formed right after its loss, while its logits are still in cache: on a CPU that halves the time of
the head against `F.cross_entropy` over all logits, and on a GPU it removes the largest tensors of a step.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the logits in one piece: what a core's cache holds on a CPU, 1 GiB of fp32 on a GPU.
PIECE = {"cpu": 1 << 20, "cuda": 1 << 28}


def cross_entropy_sum(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The summed cross-entropy (nats) of N targets under logits `h_ND @ weight_VD.T`, differentiable in both."""
    return _Pieces.apply(h_ND, weight_VD, _CrossEntropy(targets_N), torch.is_grad_enabled())[0]


def distillation_sums(
    h_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    teacher_h_NE: Tensor,
    teacher_weight_VE: Tensor,
    temperature: float,
    share: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed losses (nats) of a student against targets and teacher (Hinton et al. 2015, Sanh et al. 2019).

    Args:
        h_ND, weight_VD: the student's last hidden states and output weights.
        targets_N: next tokens.
        teacher_h_NE, teacher_weight_VE: the teacher's, over the same vocabulary; no gradient flows to them.
        temperature: T that softens both distributions.
        share: of the soft loss in the total.

    Returns:
        total = share * T^2 * soft + (1 - share) * hard, differentiable; soft = KL(teacher_T || student_T) and
        hard = cross-entropy, both for reporting.
    """
    loss = _SoftTargets(targets_N, teacher_h_NE, teacher_weight_VE, temperature, share)
    sums = _Pieces.apply(h_ND, weight_VD, loss, torch.is_grad_enabled())
    return sums[0], sums[1].detach(), sums[2].detach()


def target_logprobs(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probabilities (nats, fp32) of N targets, one by one, differentiable in any weighting."""
    logits_NV = F.linear(h_ND, weight_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return -F.cross_entropy(logits_NV, targets_N, reduction="none")


class _CrossEntropy:
    """Loss and gradient of one piece; the gradient overwrites the logits."""

    sums = 1

    def __init__(self, targets_N: Tensor):
        self.targets_N = targets_N

    def __call__(self, piece: slice, logits_NV: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        targets_N1 = self.targets_N[piece].unsqueeze(1)
        normaliser_N1 = logits_NV.logsumexp(1, keepdim=True)
        loss = (normaliser_N1 - logits_NV.gather(1, targets_N1)).sum().unsqueeze(0)
        if not gradient:
            return loss, None
        probabilities_NV = logits_NV.sub_(normaliser_N1).exp_()
        return loss, probabilities_NV.scatter_add_(1, targets_N1, torch.full_like(normaliser_N1, -1.0))


class _SoftTargets:
    """Distillation's loss and gradient of one piece."""

    sums = 3

    def __init__(self, targets_N: Tensor, h_NE: Tensor, weight_VE: Tensor, temperature: float, share: float):
        self.hard = _CrossEntropy(targets_N)
        self.h_NE, self.weight_VE = h_NE.detach(), weight_VE.detach().to(h_NE.dtype)
        self.temperature, self.share = temperature, share

    def __call__(self, piece: slice, logits_NV: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        T, share = self.temperature, self.share
        teacher_NV = F.log_softmax(F.linear(self.h_NE[piece], self.weight_VE).to(logits_NV.dtype) / T, dim=1)
        student_NV = F.log_softmax(logits_NV / T, dim=1)
        wanted_NV = teacher_NV.exp()
        soft = (wanted_NV * (teacher_NV - student_NV)).sum().unsqueeze(0)
        hard, gradient_NV = self.hard(piece, logits_NV, gradient)
        sums = torch.cat([share * T**2 * soft + (1 - share) * hard, soft, hard])
        if gradient_NV is None:
            return sums, None
        # d(T^2 KL)/dlogits = T (student_T - teacher_T)
        soft_gradient_NV = student_NV.exp_().sub_(wanted_NV)
        return sums, gradient_NV.mul_(1 - share).add_(soft_gradient_NV, alpha=share * T)


class _Pieces(torch.autograd.Function):
    """sum over pieces of loss(h @ weight.T), with the gradients of h and weight formed on the way."""

    @staticmethod
    def forward(ctx, h_ND: Tensor, weight_VD: Tensor, loss: Callable, gradient: bool) -> Tensor:
        device = h_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        with torch.autocast(device, enabled=False):
            h, weight = h_ND.to(dtype), weight_VD.to(dtype)
            total = torch.zeros(loss.sums, dtype=torch.promote_types(dtype, torch.float32), device=h.device)
            if gradient:
                h_gradient, weight_gradient = torch.empty_like(h), torch.zeros_like(weight_VD)
            rows = max(1, PIECE[device] // weight.size(0))
            for start in range(0, h.size(0), rows):
                piece = slice(start, start + rows)
                sums, logits_gradient = loss(piece, F.linear(h[piece], weight).to(total.dtype), gradient)
                total += sums
                if gradient:
                    logits_gradient = logits_gradient.to(dtype)
                    torch.mm(logits_gradient, weight, out=h_gradient[piece])
                    if dtype == weight_gradient.dtype:
                        weight_gradient.addmm_(logits_gradient.T, h[piece])
                    else:
                        weight_gradient += logits_gradient.T @ h[piece]
        if gradient:
            ctx.save_for_backward(h_gradient.to(h_ND.dtype), weight_gradient)
        return total

    @staticmethod
    def backward(ctx, *gradients):
        scale = gradients[0][0]  # the first sum is the loss; the others are only reported
        h_gradient, weight_gradient = ctx.saved_tensors
        return h_gradient * scale, weight_gradient * scale, None, None
