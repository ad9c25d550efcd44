"""The highest matrix-multiplication rate of the machine: the limit of which training reaches a share."""

import time

import torch

from threefold.training.numerics import SHAPES, matmul_flops

SECONDS = 1.0  # per shape in a round


class _Matmul:
    dtype = torch.float32

    def __init__(self, setup):
        self.settings = {"shapes": [" x ".join(map(str, shape)) for shape in SHAPES], "of": "the fastest shape"}
        self.seconds = SECONDS if setup.size.model.d_model > 32 else 0.01

    def check(self):
        return {}

    def round(self) -> dict[str, tuple[float, float]]:
        """(GFLOP, seconds) of the shape with the highest rate."""
        begun = time.perf_counter()
        rate = matmul_flops(self.dtype, self.seconds)
        spent = time.perf_counter() - begun
        return {"matmul": (1e-9 * rate * spent, spent)}


class HalfMatmul(_Matmul):
    dtype = torch.bfloat16


class SingleMatmul(_Matmul):
    pass
