"""What the machine multiplies at best: the limit that training's share is taken of."""

import time

import torch

SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 704, 256), (4096, 256, 1024))
SECONDS = 1.0  # of each shape in a round


class _Matmul:
    dtype = torch.float32

    def __init__(self, world):
        self.settings = {"shapes": [" x ".join(map(str, shape)) for shape in SHAPES], "of": "the fastest shape"}
        self.operands = [
            (torch.randn(m, k).to(self.dtype), torch.randn(n, k).to(self.dtype), torch.empty(m, n, dtype=self.dtype))
            for m, k, n in SHAPES
        ]
        self.seconds = SECONDS if world.size.model.d_model > 32 else 0.01

    def check(self):
        return {}

    def round(self) -> dict[str, tuple[float, float]]:
        """(GFLOP, seconds) of the shape with the highest rate; results are written in place, nothing is allocated."""
        best = (0.0, 1.0)
        for a, b, out in self.operands:
            torch.mm(a, b.T, out=out)
            done, begun = 0, time.perf_counter()
            while (spent := time.perf_counter() - begun) < self.seconds:
                torch.mm(a, b.T, out=out)
                done += 1
            work = done * 2e-9 * a.shape[0] * a.shape[1] * b.shape[0]
            best = max(best, (work, spent), key=lambda pair: pair[0] / pair[1])
        return {"matmul": best}


class HalfMatmul(_Matmul):
    dtype = torch.bfloat16


class SingleMatmul(_Matmul):
    pass
