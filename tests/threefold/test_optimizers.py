"""Optimizers and schedules: against torch's Muon, a formula by hand, and the ends of each schedule."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from basics.errors import TrainingError
from threefold.config import ModelConfig, TrainConfig
from threefold.model.decoder import Decoder
from threefold.training import optimizers
from threefold.training.loop import build_optimizers
from threefold.training.optimizers import Muon, learning_rate_factor, orthogonalise, set_learning_rate

TINY = ModelConfig(n_layer=2, d_model=16, n_head=2, d_ff=24, context=16, vocab_size=31, tie_embeddings=False, bias=True)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def matrices(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("bf16", [True, False])
def test_muon_equals_torch(monkeypatch, bf16):
    """In bf16 as torch computes it; in fp32 within bf16's error, which is what the iteration's accuracy asks for."""
    monkeypatch.setattr(optimizers, "fast_bf16", lambda device: bf16)
    ours, theirs = matrices(0), matrices(0)
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    assert Muon(matrices(0), fp32=True, **settings).fp32
    mine, torchs = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    before = [p.detach().clone() for p in theirs]
    for step in range(5):
        for a, b, gradient in zip(ours, theirs, matrices(10 + step), strict=True):
            a.grad, b.grad = gradient.detach().clone(), gradient.detach().clone()
        mine.step()
        torchs.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        difference, moved = (a - b).norm(), (b - start).norm()
        assert difference < (0.005 if bf16 else 0.03) * moved
    assert mine.state_dict()["state"].keys() == torchs.state_dict()["state"].keys()
    torchs.load_state_dict(mine.state_dict())  # the same states: either goes on where the other stopped


def test_matrices_of_equal_shape_are_updated_together_as_one_by_one():
    """The batched iteration against one optimizer for each matrix, in fp32: equal but for the order of sums."""
    together, alone = matrices(0), matrices(0)
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "fp32": True}
    one, many = Muon(together, **settings), [Muon([parameter], **settings) for parameter in alone]
    for step in range(5):
        for a, b, gradient in zip(together, alone, matrices(10 + step), strict=True):
            a.grad, b.grad = gradient.detach().clone(), gradient.detach().clone()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            one.step()
        for optimizer in many:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    products = sum(event.count for event in profiled.key_averages() if event.key == "aten::baddbmm")
    assert products == 3 * 2 * 5  # three shapes, two such products an iteration, not five matrices' worth


def test_orthogonalise_brings_singular_values_near_one():
    stack = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(stack, COEFFICIENTS, 5, 1e-7))
    assert values.min() > 0.6 and values.max() < 1.25
    assert orthogonalise(torch.zeros(1, 4, 4), COEFFICIENTS, 5, 1e-7).abs().max() == 0  # a zero gradient moves nothing


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_only_matrices_decay(kind):
    model = Decoder(TINY)
    made = build_optimizers(model, TrainConfig(optimizer=kind, weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for o in made for group in o.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))  # each one once
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and not name.startswith("embed")
        assert decay[id(parameter)] == (0.1 if matrix else 0.0), name
    if kind == "muon":
        by_muon = {id(p) for group in made[1].param_groups for p in group["params"]}
        inside = {id(p) for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2}
        assert by_muon == inside


def test_learned_positions_are_embeddings():
    model = Decoder(replace(TINY, position="learned"))
    made = build_optimizers(model, TrainConfig(optimizer="muon", weight_decay=0.1))
    group = next(g for g in made[0].param_groups if any(p is model.position.weight for p in g["params"]))
    assert group["weight_decay"] == 0


def test_adamw_takes_the_step_of_the_paper():
    model = torch.nn.Module()
    model.matrix = torch.nn.Parameter(torch.full((2, 2), 3.0))
    (adamw,) = build_optimizers(
        model, TrainConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0.5, beta1=0.9, beta2=0.95)
    )
    value, first, second = 3.0, 0.0, 0.0
    for step, gradient in enumerate((0.5, -2.0, 1.0), start=1):
        model.matrix.grad = torch.full((2, 2), gradient)
        adamw.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        value -= 0.1 * 0.5 * value
        value -= 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)) ** 0.5 + 1e-8)
    torch.testing.assert_close(model.matrix.detach(), torch.full((2, 2), value))


def test_nothing_to_train():
    model = Decoder(TINY).requires_grad_(False)
    with pytest.raises(TrainingError, match="frozen"):
        build_optimizers(model, TrainConfig())


def factors(steps: int = 100, **settings) -> list[float]:
    config = TrainConfig(**settings)
    return [learning_rate_factor(step, steps, config) for step in range(steps)]


def test_schedules_warm_up_and_end_where_they_say():
    for schedule in ("cosine", "wsd", "constant"):
        found = factors(schedule=schedule, warmup=0.1, decay=0.2, final_lr_ratio=0.1)
        assert found[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
        assert found[10] == pytest.approx(1)
        assert found[-1] == pytest.approx(1 if schedule == "constant" else 0.1)
        assert all(a >= b for a, b in pairwise(found[10:]))
    cosine = factors(schedule="cosine", warmup=0.0, final_lr_ratio=0.0, steps=101)
    assert cosine[50] == pytest.approx(0.5)
    wsd = factors(schedule="wsd", warmup=0.1, decay=0.2, final_lr_ratio=0.0)
    assert wsd[10:80] == [1.0] * 70 and wsd[90] == pytest.approx(0.45) and wsd[-1] == 0
    assert factors(steps=1, warmup=0.05) == [pytest.approx(1.0)]


def test_a_factor_scales_every_groups_own_rate():
    made = build_optimizers(Decoder(TINY), TrainConfig(optimizer="muon", learning_rate=1e-3, muon_learning_rate=0.02))
    set_learning_rate(made, 0.5)
    set_learning_rate(made, 0.25)  # of the full rate, not of the last one
    assert {group["lr"] for o in made for group in o.param_groups} == {0.25e-3, 0.005}
