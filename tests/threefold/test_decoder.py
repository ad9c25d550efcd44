"""The decoder against transformers' own models, against itself uncached and unpacked, and its rotary positions."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import randomised

from basics.errors import ConfigError, DataError
from study.preset import load_preset
from threefold.config import ModelConfig
from threefold.model import Decoder, KVCache, kernels, parameter_counts
from threefold.model import attention as attention_module
from threefold.model import decoder as decoder_module
from threefold.model.attention import rotary_tables
from threefold.model.decoder import segment_positions
from threefold.model.kernels import rms_norm, rotate
from threefold.segments import TRUNK_SHIFT

BASE = ModelConfig(n_layer=2, d_model=32, n_head=4, d_ff=48, context=64, vocab_size=50)
GPT2 = {"norm": "layer", "ffn": "gelu", "position": "learned", "bias": True, "sinks": 0}
VARIANTS = {
    "llama": {},
    "gqa": {"n_kv_head": 2},
    "qwen3": {"n_kv_head": 1, "qk_norm": True},
    "biases": {"bias": True, "tie_embeddings": False},
    "gpt2": GPT2,
    "layer norm": {"norm": "layer"},
    "gelu": {"ffn": "gelu"},
    "learned": {"position": "learned"},
    "no positions": {"position": "none"},
}
variants = pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)


def decoder(seed: int = 0, attention: str = "auto", **parts) -> Decoder:
    return randomised(Decoder(replace(BASE, **parts), attention=attention), seed)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(BASE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor, scale: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=scale, atol=scale * float(b.abs().max()))


# Attention ----------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("block", [2, 3, 5, 1000], ids=["four blocks", "three", "halves", "at once"])
@pytest.mark.parametrize("side_by_side", [1, 1000], ids=["one product", "three products"])
def test_both_kernels_give_the_same_logits_and_gradients(parts, block, side_by_side, monkeypatch):
    monkeypatch.setattr(attention_module, "BLOCK", block)
    monkeypatch.setattr(kernels, "SIDE_BY_SIDE", 1000)
    segments = torch.tensor([[0, 1, 1, 1, 2, 2, 2, 2, 3, -1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    results = []
    for attention in ("sdpa", "explicit"):
        for layout in (None, segments):
            if attention == "explicit":
                monkeypatch.setattr(kernels, "SIDE_BY_SIDE", side_by_side)
            model = decoder(attention=attention, **parts)
            logits = model(tokens(2, 10), segments_BT=layout)
            logits.square().sum().backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
            results.append((logits.detach(), gradients))
    for fused, explicit in zip(results[:2], results[2:], strict=True):
        close(fused[0], explicit[0])
        close(fused[1], explicit[1], 1e-4)


@variants
@torch.no_grad()
def test_no_token_sees_a_later_one(parts):
    model = decoder(**parts)
    a = tokens(1, 12)
    b = a.clone()
    b[:, 7:] = (b[:, 7:] + 1) % BASE.vocab_size
    assert torch.equal(model(a)[:, :7], model(b)[:, :7])
    assert not torch.allclose(model(a)[:, 7:], model(b)[:, 7:])


# Rotary positions ---------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 900), st.integers(0, 900), st.integers(0, 900), st.sampled_from([10000.0, 500.0]))
def test_rotated_products_depend_on_distance_only(i, j, shift, theta):
    generator = torch.Generator().manual_seed(i)
    q, k = torch.randn(2, 1, 1, 16, generator=generator, dtype=torch.float64)

    def product(at_q: int, at_k: int) -> float:
        angles = [rotary_tables(torch.tensor([at]), 16, theta) for at in (at_q, at_k)]
        (q_cos, q_sin), (k_cos, k_sin) = [(c.double().unsqueeze(-2), s.double().unsqueeze(-2)) for c, s in angles]
        return float((rotate(q[None], q_cos, q_sin) * rotate(k[None], k_cos, k_sin)).sum())

    assert product(i, j) == pytest.approx(product(i + shift, j + shift), abs=2e-3)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-9), "position 0 turns nothing"


def test_a_rotation_turns_each_pair_by_its_own_frequency():
    cos, sin = rotary_tables(torch.tensor([3]), 4, 100.0)
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])  # pairs are (0, 2) and (1, 3)
    turned = rotate(x, cos.unsqueeze(-2), sin.unsqueeze(-2))[0, 0]
    fast, slow = torch.tensor(3.0), torch.tensor(0.3)
    expected = torch.stack((fast.cos(), -2 * slow.sin(), fast.sin(), 2 * slow.cos()))
    torch.testing.assert_close(turned, expected)


@torch.no_grad()
def test_moving_all_positions_changes_nothing_with_rope_and_something_with_learned_ones():
    for parts, same in (({}, True), ({"position": "learned"}, False)):
        model, x = decoder(**parts), tokens(2, 9)
        moved = model(x, positions_BT=torch.arange(9).expand(2, 9) + 20)
        assert torch.allclose(model(x), moved, atol=1e-3) is same


@torch.no_grad()
def test_rotary_angles_stay_exact_in_a_bf16_model():
    """Angles cast to bf16 are wrong by radians at position 1000; logits must not depend on where the row stands."""
    model = decoder().to(torch.bfloat16)
    x = tokens(1, 9)
    near, far = (model(x, positions_BT=torch.arange(9)[None] + start).float() for start in (0, 10_000))
    assert (near - far).abs().max() < 0.15 * near.abs().max()


# Packed rows --------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("sinks", [0, 1, 4])
@torch.no_grad()
def test_a_packed_document_is_computed_as_an_unpacked_one(parts, sinks):
    model = decoder(**{**parts, "sinks": sinks})
    head, lengths = tokens(sinks, seed=2), [7, 1, 12, 4]
    documents = [tokens(n, seed=10 + n) for n in lengths]
    padding = 5
    row = torch.cat([head, *documents, torch.zeros(padding, dtype=torch.long)])
    numbers = torch.tensor([0] * sinks + [i for i, n in enumerate(lengths, 1) for _ in range(n)] + [-1] * padding)
    packed = model(row[None], segments_BT=numbers[None])[0]
    assert packed.isfinite().all()
    explicit_positions = segment_positions(numbers[None])
    assert explicit_positions[0].tolist()[: sinks + 7] == list(range(sinks + 7))
    assert torch.equal(packed, model(row[None], explicit_positions, numbers[None])[0])
    start = sinks
    for document in documents:
        alone = model(torch.cat([head, document])[None])[0]
        close(packed[start : start + len(document)], alone[sinks:])
        start += len(document)


@variants
@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("sinks", [0, 2])
@torch.no_grad()
def test_branches_of_one_trunk_are_computed_as_two_texts(parts, attention, sinks):
    model = decoder(**{**parts, "sinks": sinks}, attention=attention)
    head, other, trunk, left, right = (tokens(n, seed=n) for n in (sinks, 4, 5, 6, 3))
    numbers = [0] * sinks + [1] * 4 + [2] * 5 + [3 + (2 << TRUNK_SHIFT)] * 6 + [4 + (2 << TRUNK_SHIFT)] * 3 + [-1] * 2
    row = torch.cat([head, other, trunk, left, right, torch.zeros(2, dtype=torch.long)])
    found = model(row[None], segments_BT=torch.tensor([numbers]))[0, sinks + 4 :]
    for begin, branch in ((5, left), (11, right)):
        alone = model(torch.cat([head, trunk, branch])[None])[0, sinks:]
        close(found[:5], alone[:5])
        close(found[begin : begin + len(branch)], alone[5:])


@torch.no_grad()
def test_padding_changes_no_real_token_without_a_cache():
    model = decoder()
    x = tokens(1, 8)
    padded = torch.cat([tokens(1, 3, seed=9), x, tokens(1, 2, seed=8)], dim=1)
    segments = torch.tensor([[-1] * 3 + [0] * 8 + [-1] * 2])
    close(model(padded, segments_BT=segments)[:, 3:11], model(x))


# The KV cache -------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@torch.no_grad()
def test_cached_equals_recomputed_in_any_pieces(parts, attention):
    model, x = decoder(attention=attention, **parts), tokens(3, 20)
    full = model(x)
    for pieces in ([20], [1] * 20, [5, 1, 1, 9, 4], [19, 1]):
        cache = KVCache.of(model, 3, 20)
        close(torch.cat([model(part, cache=cache) for part in x.split(pieces, dim=1)], dim=1), full)
        assert cache.length == 20


@variants
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padded_batches_equal_each_row_alone(parts, side):
    """Prompts of several lengths padded on either side, then further tokens; every row as if it were alone."""
    model, lengths, width = decoder(**parts), [3, 9, 1, 6], 11
    prompts = [tokens(n, seed=n) for n in lengths]
    later = tokens(4, 5, seed=77)
    batch, segments = torch.zeros(4, width, dtype=torch.long), torch.full((4, width), -1)
    starts = [{"left": width - n, "right": 0, "both": 1}[side] for n in lengths]
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        batch[row, start : start + len(prompt)] = prompt
        segments[row, start : start + len(prompt)] = 0
    cache = KVCache.of(model, 4, width + 5)
    first = model(batch, segments_BT=segments, cache=cache)
    assert first.isfinite().all()
    following = torch.cat(
        [model(later[:, :3], cache=cache), *(model(t, cache=cache) for t in later[:, 3:].split(1, 1))], 1
    )
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        alone = model(torch.cat([prompt, later[row]])[None])[0]
        close(first[row, start : start + len(prompt)], alone[: len(prompt)])
        close(following[row], alone[len(prompt) :])


@variants
@torch.no_grad()
def test_a_shared_prefix_equals_a_copied_one(parts):
    model = decoder(**parts)
    prefix, rest = tokens(1, 13), tokens(5, 8, seed=3)
    full = model(torch.cat([prefix.expand(5, -1), rest], dim=1))[:, 13:]
    start = KVCache.of(model, 1, 13)
    model(prefix, cache=start)
    shared = start.expand(5, 8)
    assert shared.length == 13 and shared.prefix[0].data_ptr() == start.keys.data_ptr(), "not a copy"
    close(torch.cat([model(part, cache=shared) for part in rest.split([4, 1, 3], dim=1)], dim=1), full)
    again = start.expand(5, 8)  # the prefix is as it was
    close(model(rest, cache=again), full)


@torch.no_grad()
def test_shared_prefixes_of_shared_prefixes_with_padding_and_fewer_rows():
    model = decoder(n_kv_head=2)
    a, b = tokens(1, 6), tokens(1, 5, seed=2)
    start = KVCache.of(model, 1, 6)
    model(a, cache=start)
    longer = start.expand(1, 5)
    model(b, cache=longer)
    cache = longer.expand(3, 9)
    rest, later = tokens(3, 4, seed=3), tokens(3, 1, seed=4)
    segments = torch.tensor([[0, 0, 0, 0], [-1, -1, 0, 0], [-1, 0, 0, 0]])
    model(rest, segments_BT=segments, cache=cache)
    rows = torch.tensor([2, 1])
    got = model(later[rows], cache=cache.select(rows))[:, 0]
    for logits, row in zip(got, rows.tolist(), strict=True):
        alone = torch.cat([a, b, rest[row : row + 1, segments[row] == 0], later[row : row + 1]], dim=1)
        close(logits, model(alone)[0, -1])


@variants
@torch.no_grad()
def test_documents_after_a_shared_prefix_see_it_and_themselves(parts):
    model = decoder(**parts)
    prefix, row = tokens(1, 11), tokens(2, 9, seed=3)
    start = KVCache.of(model, 1, 11)
    model(prefix, cache=start)
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2, -1, -1], [0, 0, 0, 0, 1, 2, 2, 2, 3]])
    cache = start.expand(2, 9)
    got = model(row, segments_BT=segments, cache=cache)
    for index, numbers in enumerate(segments):
        for document in range(1, int(numbers.max()) + 1):
            seen = (numbers == 0) | (numbers == document)
            alone = model(torch.cat([prefix[0], row[index, seen]])[None])[0, 11:]
            close(got[index, seen], alone)
    with pytest.raises(DataError, match="cannot take 1 tokens"):
        model(row[:, :1], cache=cache)


@variants
@torch.no_grad()
def test_packed_products_are_the_plain_ones(parts, monkeypatch):
    model = decoder(**parts)
    assert kernels.packs(model.embed.weight), "this torch has them"
    x = tokens(8, 9)
    plain = model(x)
    with model.packed(8, decoder_module.PACK_POSITIONS):
        assert all(block.attention.q.packed and block.ffn.down.packed for block in model.blocks)
        monkeypatch.setattr(kernels.F, "linear", None)  # none is left
        close(model(x), plain)
        close(model(x[:1, :1]), plain[:1, :1])
        monkeypatch.undo()
        with model.packed(8, decoder_module.PACK_POSITIONS):  # within another: the same copies
            pass
        assert model.blocks[0].attention.q.packed is not None
    with pytest.raises(KeyError), model.packed(8, decoder_module.PACK_POSITIONS):
        raise KeyError
    assert not any(getattr(module, "packed", None) for module in model.modules() if module is not model)
    assert torch.equal(model(x), plain)
    with model.packed(1, decoder_module.PACK_POSITIONS):
        assert model.blocks[0].attention.q.packed is None, "too few rows"
    with copy.deepcopy(model).double().packed(8, decoder_module.PACK_POSITIONS):
        assert model.blocks[0].attention.q.packed is None, "oneDNN has no fp64"
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        plain = model.bfloat16()(x)
        with model.packed(8, decoder_module.PACK_POSITIONS):
            assert model.blocks[0].attention.q.packed is not None
            close(model(x), plain, 0.05)  # a dozen roundings to 8 bits, of sums in another order


@torch.no_grad()
def test_a_cache_refuses_what_it_cannot_hold():
    model = decoder()
    cache = KVCache.of(model, 2, 4)
    model(tokens(2, 3), cache=cache)
    with pytest.raises(DataError, match="4 slots cannot take 2 tokens after 3"):
        model(tokens(2, 2), cache=cache)
    with pytest.raises(ValueError, match="one row"):
        cache.expand(4)
    with pytest.raises(ValueError, match="packed documents"):
        model(tokens(2, 1), segments_BT=torch.tensor([[1], [1]]), cache=cache)


def test_a_learned_position_past_the_table_is_an_error():
    model = decoder(position="learned")
    with pytest.raises(DataError, match="position 64 is past the 64 learned positions"):
        model(tokens(1, 65))
    with pytest.raises(DataError, match="position 70 is past"):
        model(tokens(1, 3), positions_BT=torch.tensor([[68, 69, 70]]))
    with torch.no_grad(), pytest.raises(DataError, match="position 64 is past"):
        cache = KVCache.of(model, 1, 80)
        model(tokens(1, 60), cache=cache)
        model(tokens(1, 5), cache=cache)
    assert decoder()(tokens(1, 80)).isfinite().all(), "rotary positions have no end"


# Size, start, precision ---------------------------------------------------------------------------------------------


def test_the_full_model_has_253_million_parameters():
    config = ModelConfig(
        n_layer=12, d_model=1024, n_head=16, d_ff=4096, context=1024, vocab_size=50258, tie_embeddings=True
    )
    counts = parameter_counts(config)
    assert counts == {
        "embeddings": 50258 * 1024,
        "positions": 0,
        "attention": 12 * 4 * 1024**2,
        "ffn": 12 * 3 * 1024 * 4096,
        "norms": 25 * 1024,
        "head": 0,
        "total": 252_816_384,
    }
    preset = load_preset("full").model
    total = parameter_counts(replace(preset, vocab_size=50257 + preset.sinks))["total"]
    assert 252e6 <= total <= 254e6


@variants
def test_parameters_by_component_are_all_of_them(parts):
    model = decoder(**parts)
    counts = parameter_counts(model)
    assert counts == parameter_counts(model.config)
    assert counts["total"] == sum(p.numel() for p in model.parameters()) == sum(list(counts.values())[:-1])


def test_gpt2_has_its_published_number_of_parameters():
    config = ModelConfig(n_layer=12, d_model=768, n_head=12, d_ff=3072, context=1024, vocab_size=50257, **GPT2)
    assert parameter_counts(config)["total"] == 124_439_808


def test_a_fresh_model_is_the_identity_in_every_block_and_close_to_uniform():
    torch.manual_seed(3)
    model = Decoder(replace(BASE, vocab_size=500))
    h = model.embed(tokens(2, 9))
    torch.testing.assert_close(model.hidden(tokens(2, 9)), model.norm(h))
    loss = torch.nn.functional.cross_entropy(model(tokens(8, 32)).flatten(0, 1), tokens(8, 32, seed=5).flatten())
    assert float(loss.detach()) == pytest.approx(torch.tensor(500.0).log().item(), abs=0.3)
    model(tokens(2, 9)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("parts", [{}, GPT2, {"tie_embeddings": False}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("width", [32, 128, 512, 1024])
@torch.no_grad()
def test_the_first_loss_is_that_of_a_uniform_distribution_at_every_width(parts, width):
    """A fresh model with tied embeddings knows nothing but its input token, which it must not be sure of."""
    model = Decoder(replace(BASE, n_layer=1, d_model=width, vocab_size=2000, **parts))
    model.initialise(torch.Generator().manual_seed(0))
    inputs = torch.randint(2000, (8, 32), generator=torch.Generator().manual_seed(1))
    logits = model(inputs).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, inputs.roll(1).flatten()).item()
    assert loss == pytest.approx(math.log(2000), rel=0.04)


def test_initialisation_follows_its_generator():
    a, b, c = Decoder(BASE), Decoder(BASE), Decoder(BASE)
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        model.initialise(torch.Generator().manual_seed(seed))
    assert torch.equal(a.embed.weight, b.embed.weight) and not torch.equal(a.embed.weight, c.embed.weight)
    assert float(a.embed.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@variants
@torch.no_grad()
def test_bf16_by_cast_and_by_autocast_stay_near_fp32(parts):
    segments = torch.tensor([[0] + [1] * 7 + [2] * 8] * 2)
    for attention in ("sdpa", "explicit", "auto"):
        model, x = decoder(attention=attention, **parts), tokens(2, 16)
        exact = model(x, segments_BT=segments)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x, segments_BT=segments).float()
        cast = model.to(torch.bfloat16)(x, segments_BT=segments).float()
        for rounded in (mixed, cast):
            assert (rounded - exact).square().mean().sqrt() < 0.1 * exact.std()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"vocab_size": -1}, "vocab_size is not set"),
        ({"n_head": 5}, "a multiple of n_head = 5"),
        ({"n_kv_head": 3}, "a divisor of n_head"),
        ({"d_model": 12}, "an even number"),
    ],
)
def test_impossible_sizes_are_refused(parts, message):
    with pytest.raises(ConfigError, match=message):
        Decoder(replace(BASE, **parts))


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ConfigError, match="auto, sdpa, explicit"):
        Decoder(BASE, attention="flash")


# Gradients written by hand


def rotary(T: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(part.to(dtype).unsqueeze(-2) for part in rotary_tables(torch.arange(T) * 5, width, 100.0))


def test_written_gradients_are_the_derivatives():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 3, 8), (8,)))
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, 1e-2), (x.requires_grad_(), weight))
    assert torch.autograd.gradcheck(lambda a: rms_norm(a, weight.detach(), 1e-2), (x,))
    assert torch.autograd.gradcheck(lambda a: rotate(a, *rotary(5, 8)), (x,))
    assert torch.autograd.gradcheck(lambda a: rotate(a.transpose(1, 2), *rotary(3, 8)), (x,)), "any layout"


@torch.no_grad()
def test_written_forms_equal_the_plain_ones_bit_for_bit():
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(8, generator=torch.Generator().manual_seed(1))
    tables = rotary(5, 8, torch.float32)
    plain = rms_norm(x, weight, 1e-5), rotate(x, *tables)
    with torch.enable_grad():
        written = rms_norm(x.clone().requires_grad_(), weight, 1e-5), rotate(x.clone().requires_grad_(), *tables)
    for a, b in zip(written, plain, strict=True):
        assert a.grad_fn is not None and not b.requires_grad
        torch.testing.assert_close(a.detach(), b, rtol=2e-7, atol=2e-7)


def test_autocast_leaves_the_norm_and_its_gradients_in_fp32():
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((6, 64), (64,), (6, 64)))
    found = []
    for autocast in (False, True):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = rms_norm(*leaves, 1e-5)
            out.backward(grad)
        found.append((out.detach(), leaves[0].grad, leaves[1].grad))
    for plain, cast in zip(*found, strict=True):
        assert cast.dtype == torch.float32
        assert torch.equal(plain, cast)


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_that_computes_the_same():
    """Traced as training compiles it, forward and backward, but run without the minutes of a C++ compiler."""
    segments = torch.tensor([[0, 1, 1, 1, 2, 2, 2, 2, 3, -1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    for parts in ({"n_kv_head": 2, "qk_norm": True}, GPT2):
        results = []
        for compiled in (False, True):
            model = decoder(**parts)
            run = torch.compile(model.run, dynamic=False, fullgraph=True, backend="aot_eager")
            context = model.prepare(tokens(2, 10), None, segments)
            states = (run if compiled else model.run)(tokens(2, 10), context)
            states.square().sum().backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            results.append((states.detach(), torch.cat(gradients)))
        close(results[1][0], results[0][0])
        close(results[1][1], results[0][1], 1e-4)


@variants
@torch.no_grad()
def test_documents_are_kept_apart_by_flex_attention_too(parts):
    """As on a GPU: masked in blocks that are made outside the graph, here without the compiler's kernels."""
    branch = 2 + (1 << TRUNK_SHIFT)
    first = torch.tensor([[0, 1, 1, 1, 2, 2, 2, 2, 3, -1], [0, 1, 1, 1, branch, branch, branch + 1, branch + 1, 4, 4]])
    model = decoder(**parts)
    torch.compiler.reset()  # each model is compiled anew, and there is a limit
    run = torch.compile(model.run, dynamic=False, fullgraph=True, backend="aot_eager")
    try:
        for segments in (first, first.flip(0), first.clamp(max=1)):
            x = tokens(2, 10, seed=int(segments.sum()))
            context = model.prepare(x, None, segments, in_blocks=True)
            assert context.block_mask is not None and context.mask is None and not context.causal
            close(run(x, context), model.hidden(x, segments_BT=segments))
            torch.compiler.set_stance("fail_on_recompile")  # other documents are not another graph
    finally:
        torch.compiler.set_stance("default")
