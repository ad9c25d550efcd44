"""The same computation in two ways on the device; how far the results are apart (`box.close`)."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.box import EOS, SINK, Box, close, texts
from threefold.config import ModelConfig, TrainConfig
from threefold.data.packing import Batch, PackedRows, pack_documents, pack_examples, pack_pairs
from threefold.model import Decoder, KVCache, to_transformers
from threefold.model.decoding import FixedSteps, Steps
from threefold.segments import TRUNK_SHIFT
from threefold.training import Distillation, NextToken, Objective, Preference, distributed, losses, train
from threefold.training.forward import CompiledForward, ForwardPass
from threefold.training.loop import build_optimizers
from threefold.training.objectives import MicroBatch
from threefold.training.state import STATE

SMALL = ModelConfig(n_layer=2, d_model=128, n_head=4, n_kv_head=2, d_ff=256, context=256, vocab_size=320)
HALF = ModelConfig(n_layer=1, d_model=64, n_head=2, d_ff=128, context=256, vocab_size=320)
EXACT, NEAR = 1e-4, 1e-3  # relative errors allowed in fp32 of a forward, and of gradients or kernels of another order
TRAINED = 1e-2  # of weights after some steps: Muon enlarges rounding in directions that have small gradients


def _lists(seed: int, count: int = 24, longest: int = 90) -> list[Any]:
    return texts(seed, count, 40, 0.7, SMALL.vocab_size, longest)


def _documents() -> PackedRows:
    return pack_documents(_lists(1), SMALL, EOS, [SINK])


def _batches() -> dict[str, Batch]:
    """A batch of documents, one of examples and one of pairs."""
    prompts, chosen, rejected = _lists(2), _lists(3), _lists(4)
    examples = pack_examples(list(zip(prompts, chosen, strict=True)), SMALL, EOS, [SINK])
    pairs = pack_pairs(list(zip(prompts, chosen, rejected, strict=True)), SMALL, EOS, [SINK])
    return {
        "documents": _documents().rows(range(4)),
        "examples": examples.rows(range(4)),
        "pairs": next(pairs.batches(8, shuffle=False)),
    }


def _gradient(model: Decoder) -> Tensor:
    """All gradients in one vector, taken from the model."""
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return found


def flex_attention(box: Box) -> dict[str, Any]:
    model, found = box.model(SMALL), {}
    for name, batch in _batches().items():
        rows = MicroBatch.of(batch).to(box.device)
        inputs = rows.tokens_BT, rows.positions_BT, rows.segments_BT
        real = (rows.segments_BT >= 0)[..., None]
        if box.device == "cpu":
            with torch.no_grad():
                hidden_BTD = model.run(inputs[0], model.prepare(*inputs, in_blocks=True))
                found[name] = close(hidden_BTD * real, model.hidden(*inputs) * real, NEAR)
            continue
        NextToken()(model, rows).sum.backward()
        expected = _gradient(model)
        for kind in ("whole", "by block"):
            compiled = CompiledForward(model, by_block=kind == "by block")
            found[f"{name}, {kind}"] = close(compiled.hidden(*inputs) * real, model.hidden(*inputs) * real, NEAR)
            NextToken()(compiled, rows).sum.backward()
            found[f"{name}, {kind}, gradient"] = close(_gradient(model), expected, NEAR)
    return found


def transformers_logits(box: Box) -> dict[str, Any]:
    model = box.model(SMALL)
    tokens_BT = torch.randint(2, SMALL.vocab_size, (4, 200), generator=torch.Generator().manual_seed(1)).to(box.device)
    with torch.no_grad():
        return close(model(tokens_BT), to_transformers(model)(tokens_BT).logits, EXACT)


def _logits_alone(model: Decoder, batch: Batch) -> Tensor:
    """Logits [N, V] of the positions that have a target, of every document by itself after the sink."""
    out_BTV = torch.zeros(*batch.tokens_BT.shape, model.config.vocab_size, dtype=torch.float64)
    for row, segments_T in enumerate(batch.segments_BT):
        for segment in segments_T[segments_T > 0].unique().tolist():
            own = (segments_T == segment).nonzero()[:, 0]
            trunk = (segments_T == segment >> TRUNK_SHIFT).nonzero()[:, 0]  # of a document that is no branch: the sink
            before = trunk if segment >> TRUNK_SHIFT == 0 else torch.cat([trunk.new_zeros(1), trunk])
            logits_TV = model(batch.tokens_BT[row, torch.cat([before, own])][None])[0]
            out_BTV[row, own] = logits_TV[len(before) :]
            if segment == 1:
                out_BTV[row, 0] = logits_TV[0]
    return out_BTV.flatten(0, 1)[MicroBatch.of(batch).index_N]


def objectives(box: Box) -> dict[str, Any]:
    batches, beta, temperature, weight = _batches(), 0.1, 2.0, 0.5
    model, teacher = box.model(SMALL), box.model(HALF, std=0.2)
    exact, exact_teacher = (Decoder(m.config).double() for m in (model, teacher))
    exact.load_state_dict(model.state_dict())
    exact_teacher.load_state_dict(teacher.state_dict())
    reference_P2 = -torch.rand(len(_lists(2)), 2, generator=torch.Generator().manual_seed(2)) * 300
    given: dict[str, tuple[Objective, Batch]] = {
        "next token, documents": (NextToken(), batches["documents"]),
        "next token, examples": (NextToken(), batches["examples"]),
        "preference": (Preference(beta, reference_P2), batches["pairs"]),
        "distillation": (Distillation(teacher, temperature, weight), batches["documents"]),
    }
    found = {}
    for name, (objective, batch) in given.items():
        objective.to(box.device)
        loss = objective(model, MicroBatch.of(batch).to(box.device)).sum
        loss.backward()
        logits_NV, rows = _logits_alone(exact, batch), MicroBatch.of(batch)
        expected = F.cross_entropy(logits_NV, rows.targets_N, reduction="sum")
        if name == "preference":
            logp_N = -F.cross_entropy(logits_NV, rows.targets_N, reduction="none")
            logp_P2 = logp_N.new_zeros(2 * len(rows.pairs_P)).index_add(0, rows.sides_N, logp_N).view(-1, 2)
            reward_P2 = beta * (logp_P2 - reference_P2[rows.pairs_P])
            expected = -F.logsigmoid(reward_P2[:, 0] - reward_P2[:, 1]).sum()
        elif name == "distillation":
            soft, teacher_soft = (
                (logits / temperature).log_softmax(-1)
                for logits in (logits_NV, _logits_alone(exact_teacher, batch).detach())
            )
            divergence = (teacher_soft.exp() * (teacher_soft - soft)).sum()
            expected = weight * temperature**2 * divergence + (1 - weight) * expected
        expected.backward()
        found[name] = close(loss, expected, EXACT)
        found[f"{name}, gradient"] = close(_gradient(model), _gradient(exact), NEAR)
    return found


def compiled_losses(box: Box) -> dict[str, Any]:
    """Losses whose passes over the logits are compiled, against the same losses eager, for two numbers of targets."""
    found, generator = {}, torch.Generator().manual_seed(5)
    for n in (700, 300):
        h_ND, teacher_ND = (torch.randn(n, 64, generator=generator).to(box.device) for _ in range(2))
        weight_VD, teacher_VD = (torch.randn(1001, 64, generator=generator).to(box.device) for _ in range(2))
        targets_N = torch.randint(1001, (n,), generator=generator).to(box.device)
        inputs = (h_ND.requires_grad_(), weight_VD.requires_grad_())
        values: dict[str, list[Tensor]] = {}
        for compiled in (True, False):
            kind = {"compiled": compiled and not box.rehearse}
            for name, loss in {
                "cross-entropy": losses.cross_entropy_sum(*inputs, targets_N, **kind),
                "distillation": losses.distillation_sums(
                    *inputs, targets_N, teacher_ND, teacher_VD, temperature=2.0, share=0.5, **kind
                )[0],
                "log-probabilities": losses.target_logprobs(*inputs, targets_N, **kind).square().sum(),
            }.items():
                gradients = torch.autograd.grad(loss, inputs)
                values.setdefault(name, []).append(torch.cat([loss.view(1), *(g.flatten() for g in gradients)]))
        found |= {f"{name}, {n} targets": close(*pair, NEAR) for name, pair in values.items()}
    return found


@torch.inference_mode()
def decoding_steps(box: Box) -> dict[str, Any]:
    """Steps of fixed shapes, captured on a GPU, against plain ones: rows of several lengths, with and without a start
    that they share."""
    model, found = box.model(SMALL).eval(), {}
    tokens_BT = torch.randint(2, SMALL.vocab_size, (4, 60), generator=torch.Generator().manual_seed(6)).to(box.device)
    real_BT = torch.arange(40, device=box.device) >= torch.tensor([[0], [7], [20], [39]], device=box.device)
    for name, shared in (("alone", 0), ("shared start", 24)):
        logits = []
        for kind in (FixedSteps, Steps):
            start = KVCache.of(model, 1, max(1, shared))
            if shared:
                model.hidden(tokens_BT[:1, :shared], cache=start)
            cache = start.expand(4, 60) if shared else KVCache.of(model, 4, 60)
            model.hidden(tokens_BT[:, :40], segments_BT=torch.where(real_BT, 0, -1), cache=cache)
            steps = kind(model, cache)
            first = [steps(tokens_BT[:, at]).clone() for at in range(40, 50)]
            steps = kind(model, steps.filled().select(torch.tensor([0, 2], device=box.device)))
            logits.append(torch.cat([*first, *(steps(tokens_BT[[0, 2], at]).clone() for at in range(50, 60))]))
        found[name] = close(*logits, NEAR)
    return found


class _Interrupted(Exception):
    pass


class _Interrupting(NextToken):
    """Raises in the first step after a state was saved in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, model, batch):
        if (self.folder / STATE).exists():
            raise _Interrupted
        return super().__call__(model, batch)


def _trained(box: Box, folder: Path, objective: Objective | None = None) -> Tensor:
    """The weights after eight steps in fp32, with a state after the fourth."""
    config = TrainConfig(steps=8, batch_size=4, precision="fp32", compile="off", checkpoint_every=4)
    model = box.model(SMALL)
    objective, silent = objective or NextToken(), lambda _: None
    train(model, objective, _documents(), config, folder, seed=0, device=box.device, progress=silent)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def training(box: Box) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        expected, repeated = _trained(box, Path(folder, "first")), _trained(box, Path(folder, "second"))
        interrupted = Path(folder, "interrupted")
        with contextlib.suppress(_Interrupted):
            _trained(box, interrupted, _Interrupting(interrupted))
        if not (interrupted / STATE).exists():
            raise AssertionError("an interrupted training left no state to resume")
        resumed = _trained(box, interrupted)
    return {
        name: {**close(weights, expected, TRAINED), "bit_identical": torch.equal(weights, expected)}
        for name, weights in (("determinism", repeated), ("resume", resumed))
    }


def fsdp2(box: Box) -> dict[str, Any]:
    config, batch, results = TrainConfig(precision="fp32"), MicroBatch.of(_documents().rows(range(4))), []
    backend = "cpu:gloo,cuda:nccl" if box.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for split in (True, False):
            model = box.model(SMALL)
            module = ForwardPass(model)
            if split:
                distributed.split(model, module, box.device, distributed.current())
            optimizers = build_optimizers(model, config)
            module(NextToken(), model, batch.to(box.device))[0].backward()
            gradient = [distributed.whole(p.grad).flatten() for p in model.parameters()]
            for optimizer in optimizers:
                optimizer.step()
            weights = [distributed.whole(p.detach()).flatten() for p in model.parameters()]
            results.append((torch.cat(gradient), torch.cat(weights)))
    finally:
        dist.destroy_process_group()
    (gradient, weights), (expected_gradient, expected_weights) = results
    return {"gradient": close(gradient, expected_gradient, NEAR), "update": close(weights, expected_weights, NEAR)}
