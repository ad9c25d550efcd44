"""How far the seed moves the difference of two trainings, and which differences n seeds can detect: a Markdown table.

    python -m benchmarks.seeds                    # about five minutes on a CPU core

A base and variants that differ little from it are trained from several seeds, as the ablations train them: same text,
same order, same steps. The standard deviation of a variant's difference from the base over the seeds is what a paired
test of that difference has to overcome; it is taken over all variants together, along the training.
"""

import argparse
import math
import tempfile

import numpy as np
import torch

from benchmarks.setup import Setup
from threefold.config import TrainConfig
from threefold.evaluation.statistics import detectable_errors
from threefold.training import run_variants

VARIANTS = ["norm=layer", "ffn=gelu", "qk_norm=true"]


def pooled(differences_VS: np.ndarray) -> float:
    """The standard deviation over the seeds (last axis) around each variant's own mean."""
    return math.sqrt(differences_VS.var(axis=-1, ddof=1).mean())


def detectable(deviation: float, seeds: int) -> float:
    """The smallest true difference that a paired t test of so many seeds finds four times in five, at 5%."""
    return detectable_errors(seeds - 1) * deviation / math.sqrt(seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", choices=("auto", "real", "sample"), default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setup = Setup("7m", options.data)
    model, rows, heldout = setup.small(options.layers, options.width, options.width * 3)
    config = TrainConfig(steps=options.steps, batch_size=4, evaluate_every=options.steps // 3)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"folder": folder, "workers": 1, "device": "cpu"}
        results = run_variants(model, VARIANTS, config, lambda _: (rows, heldout), range(options.seeds), **settings)
    base, *variants = (np.array([run.curve["loss"] for run in result.runs]) for result in results)
    tokens = results[0].runs[0].curve["tokens"]
    print(
        f"{results[0].parameters:,} parameters, width {model.d_model}, {model.n_layer} layers, {options.seeds} seeds, "
        f"{len(VARIANTS)} variants, {'TinyStories' if setup.folder else 'the embedded stories'}\n\n"
        "| tokens | held-out loss of the base | sd over seeds | sd of the differences | 3 seeds | 5 seeds | 8 seeds |\n"
        "|---:|---:|---:|---:|---:|---:|---:|"
    )
    for at in range(1, len(tokens)):
        spread = pooled(np.stack([variant[:, at] - base[:, at] for variant in variants]))
        found = " | ".join(f"{detectable(spread, seeds):.4f}" for seeds in (3, 5, 8))
        alone = base[:, at].std(ddof=1)
        print(f"| {tokens[at]:,} | {base[:, at].mean():.4f} | {alone:.4f} | {spread:.4f} | {found} |")


if __name__ == "__main__":
    main()
