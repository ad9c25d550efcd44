"""`full` on one or several devices: its cost, its predicted duration, and the prediction against a measurement.

    python -m benchmarks.scale                                       # the plan: tables by calculation, a few seconds
    torchrun --nproc-per-node 2 -m benchmarks.scale --rounds 30      # predicted against measured, about a minute

The plan states what it assumes; docs/scale.md has all but two of its lines, as a test checks. The check
interleaves, in one run, what the model of time in `benchmarks.cost` is made of (the forward and backward pass alone,
the gradients' exchange alone, AdamW alone) and whole steps, which it predicts from them. It takes one worker per GPU,
or CPU processes of one thread each, whose communication hides behind nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import cost, pipeline
from benchmarks.pipeline import NVLINK, VOCABULARY
from study.preset import load_preset
from threefold.config import ModelConfig, TrainConfig
from threefold.model import Decoder
from threefold.training import distributed
from threefold.training.loop import build_optimizers
from threefold.training.losses import MULTIPLE
from threefold.training.numerics import choose

H100 = pipeline.CARDS["H100"]
# Bytes/s that a worker passes on in a ring: 80% of NVLink within a node, of what leaves a node between nodes.
LINKS = {
    "8, NVLink": (8, NVLINK),
    "64, 8 x 400 Gb/s per node": (64, 0.8 * 400e9),
    "64, 100 Gb/s per node": (64, 0.8 * 12.5e9),
}
CHECKED = ModelConfig(n_layer=4, d_model=256, n_head=4, d_ff=768, context=256, vocab_size=2048)


def plan() -> None:
    preset = load_preset("full")
    config = replace(preset.model, vocab_size=VOCABULARY)
    model = cost.Model.of(config)
    tokens = preset.pretrain.batch_size * preset.pretrain.accumulate * config.context
    micro_tokens = preset.pretrain.batch_size * config.context
    beside, block = kept_bytes(config)
    a_token = beside + config.n_layer * block
    logits = tokens * (VOCABULARY + -VOCABULARY % MULTIPLE["cuda"])
    rows = [
        ("parameters", f"{model.parameters:,}"),
        ("GFLOP per token, 6N", f"{6 * model.parameters / 1e9:.3f}"),
        ("GFLOP per token, matrices and attention", f"{model.flops_a_token / 1e9:.3f}"),
        ("bytes per token on the disk", "2"),
        ("bytes per token kept for the backward pass, eager (measured)", f"{a_token:,.0f}"),
        ("tokens per step", f"{tokens:,}"),
        ("GB kept for a micro-batch's backward pass, eager (measured)", f"{a_token * micro_tokens / 1e9:.1f}"),
        ("bytes per token moved by the update", f"{cost.UPDATE * model.parameters / tokens:,.0f}"),
        ("GB of weights, gradients and AdamW's states", f"{distributed.BYTES * model.parameters / 1e9:.2f}"),
        ("GFLOP per token of Muon's iterations", f"{model.muon_flops() / tokens / 1e9:.3f}"),
        *(
            (f"ms a step in which an H100 moves the logits' bytes, {kind}", f"{1e3 * each * logits / H100.reading:.0f}")
            for kind, each in cost.LOSS.items()
        ),
        ("bytes of gradients each of 8 workers sends per step", f"{cost.ring_bytes(model.gradient_bytes, 8):,.0f}"),
    ]
    print("| full | |\n|---|---:|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows))
    print(
        f"\nPredicted for H100s at {H100.training / H100.bf16:.0%} of 989 TFLOP/s, 80% of 3.35 TB/s memory and of each "
        f"link; {preset.pretrain.tokens:,} tokens.\n"
    )
    columns = ("GPUs", "tokens/step", "compute, ms", "exchange, ms", "exposed", "Muon", "update", "step", "tokens/s")
    print("| " + " | ".join((*columns, "efficiency", "minutes")) + " |")
    print("|---|" + "---:|" * (len(columns) + 1))
    one = None
    for name, (workers, link) in {"1": (1, 1.0), **LINKS}.items():
        for size in (tokens, 4 * tokens) if workers == 64 else (tokens,):
            own = size // workers // config.context
            micro = -(-own // preset.pretrain.batch_size)
            step = cost.step(model, cost.Device(H100.training, H100.reading, link), workers, size, micro)
            rate = size / step.total
            one = one or rate
            parts = (step.compute, step.exchange, step.exposed, step.muon, step.update, step.total)
            shown = [f"{size:,}", *(f"{1e3 * part:.1f}" for part in parts), f"{rate:,.0f}"]
            minutes = preset.pretrain.tokens / rate / 60
            print(f"| {name} | {' | '.join(shown)} | {rate / one / workers:.0%} | {minutes:.1f} |")
    print(f"\n{pipeline.tables()}")


def kept_bytes(config: ModelConfig) -> tuple[float, float]:
    """Bytes per token that autograd keeps in bf16 up to the head: outside the blocks, and in each block.

    Measured as what a second row adds, since copies of weights are kept once for any number of rows.
    """

    def kept_by(model: Decoder, rows: int) -> int:
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = torch.zeros(rows, config.context, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            alive = model.hidden(tokens)  # while this is alive, no memory is freed or used again
        del alive
        return sum(found.values())

    def kept(layers: int) -> float:
        model = Decoder(replace(config, n_layer=layers, vocab_size=256), attention="sdpa")
        return (kept_by(model, 2) - kept_by(model, 1)) / config.context

    one, two = kept(1), kept(2)
    return one - (two - one), two - one


def check(workers: distributed.Workers, rounds: int, rows: int) -> None:
    device = choose(TrainConfig(compile="off"), 0, 0).device
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    decoder = Decoder(CHECKED).to(device)
    forward = Logits(decoder)
    replica = distributed.replicated(forward)
    model = cost.Model.of(CHECKED)
    tokens_BT = torch.randint(CHECKED.vocab_size, (2 * rows, CHECKED.context), device=device)
    copies = [parameter.detach().clone() for parameter in decoder.parameters()]
    for copy in copies:
        copy.grad = torch.full_like(copy, 1e-6)
    adamw = torch.optim.AdamW(copies, fused=True)
    optimizers = build_optimizers(decoder, TrainConfig(optimizer="muon"))
    buffer = torch.zeros(model.gradient_bytes // 4, device=device)

    def alone(n: int) -> None:
        with replica.no_sync():
            replica(tokens_BT[:n]).backward()
        decoder.zero_grad()

    def whole() -> None:
        replica(tokens_BT[:rows]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    parts: dict[str, Callable[[], object]] = {
        "half": lambda: alone(rows),
        "all": lambda: alone(2 * rows),
        "exchange": lambda: workers.sum(buffer),
        "adamw": adamw.step,
        "whole": whole,
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 2):
        for name, work in parts.items():
            workers.agreed(True)  # all workers begin together
            begun = now(device)
            work()
            if turn > 1:  # the first turns allocate
                times[name].append(now(device) - begun)
    medians = torch.tensor([statistics.median(taken) for taken in times.values()])
    half, all_rows, exchange, update, measured = (workers.sum(medians) / workers.size).tolist()
    if not workers.first:
        return
    fitted = cost.Device(
        flops=rows * CHECKED.context * model.flops_a_token / (all_rows - half),
        memory=cost.UPDATE * model.parameters / update,
        link=cost.ring_bytes(model.gradient_bytes, workers.size) / exchange,
        overlap=float(device == "cuda"),
    )
    step = cost.step(model, fitted, workers.size, workers.size * rows * CHECKED.context, 1)
    print(
        f"{workers.size} workers, {device}, {model.parameters:,} parameters, {rows} rows of {CHECKED.context} each, "
        f"medians of {rounds} rounds\n\n"
        f"Fitted: {fitted.flops / 1e9:,.1f} GFLOP/s, {fitted.memory / 1e9:,.2f} GB/s memory, "
        f"{fitted.link / 1e9:,.2f} GB/s a link.\n\n"
        "| | seconds |\n|---|---:|\n"
        f"| compute | {step.compute:.4f} |\n| exchange, exposed | {step.exposed:.4f} |\n| Muon | {step.muon:.4f} |\n"
        f"| update | {step.update:.4f} |\n| step, predicted | {step.total:.4f} |\n| step, measured | {measured:.4f} |\n"
        f"| measured : predicted | {measured / step.total:.2f} |"
    )


class Logits(torch.nn.Module):
    """The model with its head and a loss as one module, for DDP."""

    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV = self.model(tokens_BT)
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten())


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4, help="of each worker in the check")
    options = parser.parse_args()
    with distributed.joined() as workers:
        if workers.size == 1:
            plan()
        else:
            check(workers, options.rounds, options.rows)


if __name__ == "__main__":
    main()
