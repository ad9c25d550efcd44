"""Forward and backward pass of a small model with unfused attention and with SDPA, by row length.

    python benchmarks/attention.py                # minutes on a CPU

Eager, packed documents of 150 tokens, about 4096 positions per step; interleaved, medians over the rounds. The `auto`
setting of `Decoder` chooses between the two on the basis of these figures.
"""

import argparse
import statistics
from functools import partial

import torch

from threefold.config import ModelConfig
from threefold.memory import keep_freed_memory
from threefold.model import Decoder
from threefold.training.timing import time_rounds

VOCABULARY, KINDS = 256, ("explicit", "sdpa")  # a small head, so that attention dominates


def seconds(length: int, rounds: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a forward and backward pass with each kind of attention, for rows of `length` positions."""
    config = ModelConfig(n_layer=4, d_model=256, n_head=4, d_ff=768, context=length, vocab_size=VOCABULARY)
    models = {kind: Decoder(config, attention=kind) for kind in KINDS}
    rows = max(1, round(4096 / length))
    tokens = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(length) // 150 + 1).expand(rows, -1)

    def step(model: Decoder) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model.hidden(tokens, segments_BT=segments)
        hidden.float().sum().backward()
        model.zero_grad()

    taken = time_rounds({kind: partial(step, model) for kind, model in models.items()}, rounds, "cpu")
    return {kind: statistics.median(each) for kind, each in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 515, 768, 1024, 2048])
    options = parser.parse_args()
    if min(options.rounds, options.threads, *options.lengths) < 1:
        parser.error("rounds, threads and lengths are at least 1")
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in training
    print("| format | positions a row | unfused, ms | SDPA : unfused |\n|---|---:|---:|---:|")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for length in options.lengths:
            found = seconds(length, options.rounds, dtype)
            explicit, sdpa = (found[kind] for kind in KINDS)
            print(f"| {name} | {length} | {1e3 * explicit:,.0f} | {sdpa / explicit:.2f} |", flush=True)


if __name__ == "__main__":
    main()
