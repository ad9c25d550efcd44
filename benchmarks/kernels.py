"""Normalisation and feed-forward layers alone, forward and backward, at the shapes of the 253M model: a Markdown table.

    python benchmarks/kernels.py                  # seconds on a CPU core or a GPU

RMSNorm against LayerNorm and SwiGLU against GELU at equal parameters, interleaved, eager: the same measurement as in
notebook 05, with more rounds. Ratios are medians over the rounds with the 95% interval of order statistics.
"""

import argparse
from dataclasses import asdict

import torch

from study.comparison import components
from threefold.training import time_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, metavar="N")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timings = [time_kernels(part, options.rounds, device=options.device) for part in ("norm", "ffn")]
    print(f"{timings[0].note}\n")
    print(components.kernels([asdict(timing) for timing in timings]).markdown)


if __name__ == "__main__":
    main()
