"""Products with several matrices, RMSNorm and the rotary turn, as a CPU computes them fastest.

Norm and turn have their gradients written out for eager work: in plain torch operations each makes a dozen passes over
memory that the fused kernels of LayerNorm or a compiler save. One core, fp32, 4096 x 128, forward and backward:
`F.rms_norm` 10.1 ms, `rms_norm` here 3.0 ms (LayerNorm 1.8 ms). Compiled graphs and GPUs take the plain forms,
which their compilers fuse.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

SIDE_BY_SIDE = 512  # positions from which one product with several matrices is faster than several products


class Linear(nn.Linear):
    """nn.Linear whose weights `Decoder.initialise` draws: not twice, and not on the meta device, where it is slow."""

    packed: "Packed | None" = None  # of the layers whose product begins with this one

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.packed is None else self.packed(x)[0]


class Packed:
    """The product with the weights of several layers, copied once side by side into the blocks that oneDNN multiplies.

    Plain products put a matrix into such blocks in every call. Queries, keys and values at d 256 in fp32, on two cores
    with AVX512, take 0.7 of the time of three plain products at 32 positions, 0.8 at 4096 (benchmarks/products.py).
    These operators of torch's compiler are not public, and no public one keeps packed weights without compiling. They
    stay because scoring without them took 1.05 to 1.26 times as long, decoding 1.01 to 1.2 times (one core, fp32).
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], positions: int):
        self.sizes = [len(weight) for weight in weights]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(list(weights)), positions)
        self.bias = None if biases[0] is None else torch.cat(list(biases))

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        out = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return _cut(out, self.sizes)


def packs(weight: Tensor) -> bool:
    """Whether `Packed` can be had for such weights: fp32, or bf16 that the CPU multiplies, and a torch with the
    operators that its compiler uses for this."""
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def linears(x_BTD: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Each layer's output for the same input: one product where there are positions enough to pay for putting the
    matrices side by side.

    At d 256 in fp32 it takes 0.94 of the time of three at 4096 positions, at 32 it would take 1.2
    (benchmarks/products.py).
    """
    if layers[0].packed is not None:
        return layers[0].packed(x_BTD)
    if x_BTD[..., 0].numel() < SIDE_BY_SIDE:
        return tuple(layer(x_BTD) for layer in layers)
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return _cut(F.linear(x_BTD, weight, bias), [layer.out_features for layer in layers])


def _cut(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """x.split(sizes, -1), without the Python around it."""
    return (x,) if len(sizes) == 1 else torch.split_with_sizes(x, sizes, -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype."""
    if not _by_hand(x) or weight.dtype != x.dtype:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return (x * _scale(x, eps)).mul_(weight)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its position's angle (rotate-half layout).

    cos, sin: [..., T, 1, K/2]; no gradient goes to them.
    """
    if _by_hand(x_BTHK) and cos.dtype == x_BTHK.dtype:
        return _Rotate.apply(x_BTHK, cos, sin) if torch.is_grad_enabled() else _turn(x_BTHK, cos, sin, 1)
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _by_hand(x: Tensor) -> bool:
    """Eager, on a CPU, and in a format that sums of squares can be kept in."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _scale(x: Tensor, eps: float) -> Tensor:
    return x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()  # no product that autocast would do in bf16


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # LayerNorm's fused backward with mean 0 is RMSNorm's, but for the term through the mean that it takes out.
        x, weight, scale = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, [need_x, need_weight, False]
        )
        if need_x:
            with torch.autocast("cpu", enabled=False):
                through_mean = (grad @ weight).unsqueeze(-1)
            grad_x.addcmul_(through_mean, scale, value=1 / x.shape[-1])
        return grad_x, grad_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad, *ctx.saved_tensors, -1), None, None  # a rotation's transpose turns back


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)
    return out
