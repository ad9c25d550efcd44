"""How long a training waits for its resumable state, which a thread writes. A Markdown table.

python -m benchmarks.states           # half a minute on a CPU core, 1.5 GB of memory
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from threefold.training.state import State, StateWriter, collect


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=40_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = nn.Linear(1000, options.parameters // 1000, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    waits, writes = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = StateWriter(Path(folder), 0)
        for number in range(options.rounds):
            begun = time.perf_counter()
            writer.write(State({}, step=number + 1), collect(model, [optimizer]))
            waits.append(time.perf_counter() - begun)
            writer.wait()
            writes.append(time.perf_counter() - begun)
        writer.close()
    wait, write = statistics.median(waits), statistics.median(writes)
    print("| parameters | the training waits, s | until the state is on the disk, s | waits : whole |")
    print("|---:|---:|---:|---:|")
    print(f"| {options.parameters:,} | {wait:.3f} | {write:.3f} | {wait / write:.2f} |")


if __name__ == "__main__":
    main()
