"""Standard deviations of a fresh embedding: the loss before the first step and after the last one. A Markdown table.

    python -m benchmarks.initialisation           # about five minutes on a CPU core

Blocks whose output projections are zero begin as the identity, so a fresh model with tied embeddings predicts its input
token again: that token's logit is d * std, 20 at d = 1024 and std = 0.02. The training is the same for all: same text
in the same order, Muon and AdamW at the rates of the presets.
"""

import argparse
import math
import tempfile

import torch

from benchmarks.setup import Setup
from threefold.config import TrainConfig
from threefold.evaluation.statistics import paired_student
from threefold.model import Decoder
from threefold.training import NextToken, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", choices=("auto", "real", "sample"), default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setup = Setup("7m", options.data)
    model, rows, heldout = setup.small(options.layers, options.width, options.width * 11 // 4)
    deviations = {"0.02": 0.02, "4 / d": min(0.02, 4 / model.d_model)}
    config = TrainConfig(steps=options.steps, batch_size=4, compile="off")
    first: dict[str, list[float]] = {name: [] for name in deviations}
    last: dict[str, list[float]] = {name: [] for name in deviations}
    for seed in options.seeds:
        for name, std in deviations.items():
            decoder, generator = Decoder(model), torch.Generator().manual_seed(seed)
            decoder.initialise(generator)
            torch.nn.init.normal_(decoder.embed.weight, std=std, generator=generator)
            with tempfile.TemporaryDirectory() as folder:
                arguments = {"seed": seed, "heldout": heldout, "progress": lambda message: None}
                trained = train(decoder, NextToken(), rows, config, folder, **arguments)
            first[name].append(trained.result.heldout[0]["loss"])
            last[name].append(trained.result.heldout_loss)
            print(f"seed {seed}, {name}: {first[name][-1]:.4f} -> {last[name][-1]:.4f}", flush=True)
    print(
        f"\n{trained.result.parameters:,} parameters, width {model.d_model}, {model.n_layer} layers, vocabulary "
        f"{model.vocab_size:,} (ln V = {math.log(model.vocab_size):.2f}), {options.steps} steps of 4 x 128 positions, "
        f"{len(options.seeds)} seeds, {'real' if setup.folder else 'sample'} stories; {trained.result.note}\n\n"
        "| standard deviation of the embedding | held-out loss before | after | after, less the first row's |\n"
        "|---|---:|---:|---|"
    )
    base = last[next(iter(deviations))]
    for name in deviations:
        before, after = (sum(losses) / len(options.seeds) for losses in (first[name], last[name]))
        difference = ""
        if last[name] is not base and len(options.seeds) > 1:
            found = paired_student(base, last[name])
            difference = f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        print(f"| {name} | {before:.3f} | {after:.4f} | {difference} |")


if __name__ == "__main__":
    main()
