"""Queries, keys and values of one layer: three products, one of the weights side by side, and one of packed weights.

    python benchmarks/products.py                 # microseconds on a CPU, a few seconds in all

Interleaved, medians over the rounds; for a batch in decoding (32 positions) and for many positions, and forward and
backward in bf16 as in training.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from threefold.memory import keep_freed_memory
from threefold.model import kernels
from threefold.model.kernels import Linear, Packed, linears
from threefold.training.timing import time_rounds


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in time_rounds(calls, rounds, "cpu").items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in training and evaluation
    layers = [Linear(options.width, options.width, bias=False) for _ in range(3)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)

    def at(side_by_side: int, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kernels.SIDE_BY_SIDE = side_by_side
        return linears(x, *layers)

    def step(side_by_side: int, x: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = at(side_by_side, x)
        torch.autograd.backward(out, [torch.ones_like(part) for part in out])

    print("| | three products, µs | side by side | packed |\n|---|---:|---:|---:|")
    for positions in (32, 4096):
        x = torch.randn(positions, options.width)
        packed = Packed([layer.weight.detach() for layer in layers], [None] * 3, positions)
        with torch.inference_mode():
            found = medians(
                {
                    "plain": lambda x=x: at(1 << 30, x),
                    "side": lambda x=x: at(0, x),
                    "packed": lambda x=x, p=packed: p(x),
                },
                options.rounds,
            )
        plain, side, ours = found["plain"], found["side"], found["packed"]
        print(f"| fp32, {positions} positions | {1e6 * plain:,.0f} | {side / plain:.2f} | {ours / plain:.2f} |")
    x = torch.randn(4096, options.width, requires_grad=True)
    found = medians({"plain": lambda: step(1 << 30, x), "side": lambda: step(0, x)}, options.rounds // 4)
    ratio = found["side"] / found["plain"]
    print(f"| bf16, 4096 positions, forward and backward | {1e6 * found['plain']:,.0f} | {ratio:.2f} | |")


if __name__ == "__main__":
    main()
