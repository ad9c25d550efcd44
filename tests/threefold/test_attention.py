"""Attention maps against transformers' own, and the share of the sinks by hand."""

from dataclasses import replace

import pytest
import torch

from basics.errors import DataError, EvaluationError
from threefold.config import ModelConfig, gpt2_counterpart
from threefold.evaluation import attention
from threefold.model import Decoder, to_transformers

BASE = ModelConfig(n_layer=3, d_model=32, n_head=4, d_ff=48, context=64, vocab_size=60)
STANDARD = {
    "llama": {},
    "llama, gqa, 4 sinks": {"n_kv_head": 2, "sinks": 4, "rope_theta": 100.0},
    "qwen3": {"qk_norm": True, "n_kv_head": 1},
    "gpt2": vars(gpt2_counterpart(BASE)),
}


def decoder(kernel: str = "auto", **parts) -> Decoder:
    model = Decoder(replace(BASE, **parts), attention=kernel)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def text(length: int) -> list[int]:
    return torch.randint(60, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("kernel", ["sdpa", "explicit"])
@pytest.mark.parametrize("parts", STANDARD.values(), ids=STANDARD)
def test_maps_equal_those_of_transformers(parts, kernel):
    model, tokens = decoder(kernel, **parts), text(48)
    theirs = to_transformers(model)
    theirs.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = torch.cat(theirs(torch.tensor([tokens]), output_attentions=True).attentions)
    found = attention.maps(model, tokens)
    assert found.shape == (3, 4, 48, 48) and float(expected.std()) > 0.02
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [{}, {"position": "none"}, {"norm": "layer", "ffn": "gelu"}])
def test_maps_are_causal_distributions_and_leave_the_model_as_it_was(parts):
    model, tokens = decoder(**parts), torch.tensor(text(30))
    with torch.inference_mode():
        before = model(tokens[None])
    found = attention.maps(model, tokens)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 4, 30))
    assert not found.triu(diagonal=1).any() and (found >= 0).all()
    with torch.inference_mode():
        assert torch.equal(model(tokens[None]), before)
    assert not any(block.attention._forward_pre_hooks for block in model.blocks)


def test_a_single_token_looks_at_itself():
    for n_kv_head in (4, 2):
        assert torch.equal(attention.maps(decoder(n_kv_head=n_kv_head), [3]), torch.ones(3, 4, 1, 1))


def test_bf16_maps_are_those_of_the_forward_in_bf16():
    model, tokens = decoder("explicit").bfloat16(), text(40)
    exact = attention.maps(decoder("explicit"), tokens)
    found = attention.maps(model, tokens)
    assert found.dtype == torch.float32 and 0 < float((found - exact).abs().mean()) < 0.02


def test_the_share_of_the_sinks_by_hand():
    """Two heads over five tokens: one gives 0.7 and 0.2 to two sinks, the other looks at itself."""
    maps = torch.zeros(1, 2, 5, 5)
    maps[0, 0, :, 0], maps[0, 0, :, 1], maps[0, 0, :, 2] = 0.7, 0.2, 0.1
    maps[0, 1] = torch.eye(5)
    torch.testing.assert_close(attention.sink_share(maps, 1, first=2), torch.tensor([[0.7, 0.0]]))
    torch.testing.assert_close(attention.sink_share(maps, 2, first=2), torch.tensor([[0.9, 0.0]]))
    maps[0, 0, 4] = torch.tensor([0.1, 0.0, 0.0, 0.0, 0.9])
    torch.testing.assert_close(attention.sink_share(maps, 1, first=3), torch.tensor([[0.4, 0.0]]))


def test_a_uniform_head_has_the_uniform_share():
    model, tokens = decoder(sinks=4), text(40)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.q.weight.zero_()
    expected = sum(4 / (t + 1) for t in range(16, 40)) / 24
    assert attention.uniform_share(40, 4) == pytest.approx(expected)
    share = attention.sink_share(attention.maps(model, tokens), 4)
    torch.testing.assert_close(share, torch.full((3, 4), expected))


@pytest.mark.parametrize(("sinks", "first"), [(0, 4), (5, 4), (1, 10), (1, 11)])
def test_a_share_of_nothing_is_refused(sinks, first):
    with pytest.raises(EvaluationError, match=f"share of {sinks} sinks"):
        attention.sink_share(torch.zeros(1, 1, 10, 10), sinks, first)


def test_maps_past_a_learned_table_are_refused_and_leave_no_hook():
    model = decoder(position="learned")
    with pytest.raises(DataError, match="64 learned positions"):
        attention.maps(model, text(65))
    assert not any(block.attention._forward_pre_hooks for block in model.blocks)
