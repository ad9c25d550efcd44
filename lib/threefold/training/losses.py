"""Losses at the output head, computed in pieces so that the logits of a whole batch are never in memory at once.

The gradient of a piece is computed right after its loss, while its logits are still in cache. On a CPU the head takes
about 40% less time than with `F.cross_entropy` over all logits; on a GPU this saves the largest tensors of a step.

Between its products, a piece makes ten passes over its logits. In a compiled training on a GPU they are fused into two
(`benchmarks.cost` counts the bytes): `compiled` asks for this, and other devices ignore it.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the logits in one piece: as many as the cache of a CPU core holds; 1 GiB of fp32 on a GPU.
PIECE = {"cpu": 1 << 22, "cuda": 1 << 28}
# The vocabulary is padded to a multiple of this inside the products: tensor cores are slow on odd sizes, such as
# GPT-2's 50,257. Weights and checkpoints keep the true size.
MULTIPLE = {"cpu": 1, "cuda": 64}
FUSED = frozenset({"cuda"})  # types of device whose pieces are compiled
NEVER = -1e30  # logit of a padded token: its probability is exactly 0, and differences of two such logits stay finite


def cross_entropy_sum(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, compiled: bool = False) -> Tensor:
    """The summed cross-entropy (nats) of N targets under logits `h_ND @ weight_VD.T`, differentiable in both."""
    return _Pieces.apply(h_ND, weight_VD, _CrossEntropy(targets_N, compiled), torch.is_grad_enabled())[0]


def distillation_sums(
    h_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    teacher_h_NE: Tensor,
    teacher_weight_VE: Tensor,
    temperature: float,
    share: float,
    *,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed losses (nats) of a student against targets and teacher (Hinton et al. 2015, Sanh et al. 2019).

    Args:
        h_ND, weight_VD: the student's last hidden states and output weights.
        targets_N: next tokens.
        teacher_h_NE, teacher_weight_VE: the teacher's, over the same vocabulary; no gradient flows to them.
        temperature: T, which softens both distributions.
        share: the weight of the soft loss in the total.

    Returns:
        total = share * T^2 * soft + (1 - share) * hard, differentiable; soft = KL(teacher_T || student_T) and
        hard = cross-entropy, both without gradient.
    """
    loss = _SoftTargets(targets_N, compiled, teacher_h_NE, teacher_weight_VE, temperature, share)
    sums = _Pieces.apply(h_ND, weight_VD, loss, torch.is_grad_enabled())
    return sums[0], sums[1].detach(), sums[2].detach()


def target_logprobs(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, compiled: bool = False) -> Tensor:
    """The log-probability (nats, fp32) of each of N targets, differentiable."""
    return _kernel(_target_logprobs, compiled, h_ND, targets_N)(h_ND, weight_VD, targets_N)


def _target_logprobs(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = _wide(F.linear(h_ND, _padded(weight_VD)), len(weight_VD))
    return -F.cross_entropy(logits_NV, targets_N, reduction="none")


def _padded(weight_VD: Tensor) -> Tensor:
    """The output weights with rows of zeros up to the next multiple; themselves where none are missing."""
    missing = -len(weight_VD) % MULTIPLE[weight_VD.device.type]
    return F.pad(weight_VD, (0, 0, 0, missing)) if missing else weight_VD


def _kernel(compute: Callable, compiled: bool, *by_position: Tensor) -> Callable:
    """The function, or its compiled form: one graph for any number of positions, which is the first size of these
    tensors."""
    if not compiled or by_position[0].device.type not in FUSED:
        return compute
    for tensor in by_position:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(compute)


@cache
def _compiled(compute: Callable) -> Callable:
    return torch.compile(compute)


class _CrossEntropy:
    """Loss and gradient of one piece.

    It is called with the piece's logits, of which the first `n_tokens` are of the vocabulary and the rest padding. It
    returns the sums [k], the loss first; the dense part of the logits' gradient; and the divisor of the rows of that
    part, (N, 1) or None: dividing later, on the narrow side of the products, is cheaper. The whole gradient is the
    dense part minus `one_hot` at each target.
    """

    n_sums = 1
    one_hot = 1.0

    def __init__(self, targets_N: Tensor, compiled: bool):
        self.targets_N, self.compiled = targets_N, compiled

    def __call__(self, piece: slice, logits_NV: Tensor, n_tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
        targets_N = self.targets_N[piece]
        return _kernel(_cross_entropy, self.compiled, logits_NV, targets_N)(logits_NV, targets_N, n_tokens)


def _wide(logits_NV: Tensor, n_tokens: int) -> Tensor:
    """The logits in fp32 at least, those of the padding at `NEVER`."""
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    padding = wide_NV.size(1) - n_tokens
    return F.pad(wide_NV[:, :n_tokens], (0, padding), value=NEVER) if padding else wide_NV


def _narrow(gradient_NV: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in the dtype of the products, where a compiler makes that part of the pass that computes it."""
    return gradient_NV.to(dtype) if torch.compiler.is_compiling() else gradient_NV


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    sums, weights_NV, normaliser_N1 = _softmax_parts(_wide(logits_NV, n_tokens), targets_N)
    return sums, _narrow(weights_NV, logits_NV.dtype), normaliser_N1


def _softmax_parts(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The summed cross-entropy [1]; numerators, which take the place of the logits, and normaliser of the softmax."""
    picked_N1 = logits_NV.gather(1, targets_N.unsqueeze(1))
    largest_N1 = logits_NV.amax(1, keepdim=True)
    weights_NV = logits_NV.sub_(largest_N1).exp_()
    normaliser_N1 = weights_NV.sum(1, keepdim=True)
    loss = (normaliser_N1.log() + largest_N1 - picked_N1).sum()
    return loss.unsqueeze(0), weights_NV, normaliser_N1


class _SoftTargets:
    """The loss of distillation and its gradient for one piece; called as `_CrossEntropy` is."""

    n_sums = 3

    def __init__(
        self, targets_N: Tensor, compiled: bool, h_NE: Tensor, weight_VE: Tensor, temperature: float, share: float
    ):
        self.targets_N, self.compiled, self.one_hot = targets_N, compiled, 1 - share
        self.h_NE, self.weight_VE = h_NE.detach(), _padded(weight_VE.detach().to(h_NE.dtype))
        self.temperature, self.share = temperature, share

    def __call__(self, piece: slice, logits_NV: Tensor, n_tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
        teacher_NV, targets_N = F.linear(self.h_NE[piece], self.weight_VE), self.targets_N[piece]
        compute = _kernel(_soft_targets, self.compiled, logits_NV, teacher_NV, targets_N)
        return *compute(logits_NV, teacher_NV, targets_N, n_tokens, self.temperature, self.share), None


def _soft_targets(
    logits_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, n_tokens: int, T: float, share: float
) -> tuple[Tensor, Tensor]:
    wide_NV = _wide(logits_NV, n_tokens)
    teacher_NV = F.log_softmax(_wide(teacher_NV, n_tokens) / T, dim=1)
    student_NV = F.log_softmax(wide_NV / T, dim=1)
    wanted_NV = teacher_NV.exp()
    soft = (wanted_NV * teacher_NV.sub_(student_NV)).sum().unsqueeze(0)
    hard, weights_NV, normaliser_N1 = _softmax_parts(wide_NV, targets_N)
    # d(T^2 KL)/dlogits = T (student_T - teacher_T)
    difference_NV = student_NV.exp_().sub_(wanted_NV)
    gradient_NV = weights_NV.div_(normaliser_N1).mul_(1 - share).add_(difference_NV, alpha=share * T)
    return torch.cat([share * T**2 * soft + (1 - share) * hard, soft, hard]), _narrow(gradient_NV, logits_NV.dtype)


class _Pieces(torch.autograd.Function):
    """The sum of loss(h @ weight.T) over all pieces. The forward pass also computes the gradients of h and weight."""

    @staticmethod
    def forward(ctx, h_ND: Tensor, weight_VD: Tensor, loss: Callable, gradient: bool) -> Tensor:
        device = h_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            h, weight = h_ND.to(dtype), _padded(weight_VD.to(dtype))
            total = torch.zeros(loss.n_sums, dtype=wide, device=h.device)
            h_gradient, weight_gradient = torch.empty_like(h), torch.zeros_like(weight, dtype=weight_VD.dtype)
            rows = min(len(h), max(1, PIECE[device] // len(weight)))
            logits = torch.empty(rows, len(weight), dtype=dtype, device=h.device)
            for start in range(0, len(h), max(1, rows)):
                piece = slice(start, start + rows)
                h_piece = h[piece]
                product = torch.mm(h_piece, weight.T, out=logits[: len(h_piece)])
                sums, dense, divisor = loss(piece, product, len(weight_VD))
                total += sums
                if not gradient:
                    continue
                dense = dense.to(dtype)
                part = torch.mm(dense, weight, out=h_gradient[piece])
                if divisor is not None:
                    part.div_(divisor)
                    h_piece = (h_piece / divisor).to(dtype)
                part.sub_(weight[loss.targets_N[piece]], alpha=loss.one_hot)
                if dtype == weight_gradient.dtype:
                    weight_gradient.addmm_(dense.T, h_piece)
                else:
                    weight_gradient += dense.T @ h_piece
            if gradient:
                weight_gradient.index_add_(0, loss.targets_N, h.to(weight_gradient.dtype), alpha=-loss.one_hot)
                ctx.save_for_backward(h_gradient.to(h_ND.dtype), weight_gradient[: len(weight_VD)])
        return total

    @staticmethod
    def backward(ctx, *gradients):
        scale = gradients[0][0]  # the first sum is the loss; the others have no gradient
        h_gradient, weight_gradient = ctx.saved_tensors
        return h_gradient * scale, weight_gradient * scale, None, None
