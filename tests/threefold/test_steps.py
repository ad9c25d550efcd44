"""What would slow a step on a GPU, counted without one: waits of the host, graph breaks and recompilations."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from shared import counting
from torch.utils._python_dispatch import TorchDispatchMode

from study.preset import load_preset, preset_names
from threefold.config import ModelConfig, TrainConfig, apply_variant, gpt2_counterpart
from threefold.data.packing import pack_documents, pack_examples, pack_pairs
from threefold.model.decoder import Decoder, segment_block_mask
from threefold.training import Distillation, NextToken, Preference, forward, half_depth, numerics, train, variants
from threefold.training.loop import TrainStep
from threefold.training.objectives import MicroBatch

EOS, SINK, VOCABULARY = 0, 1, 37
TINY = ModelConfig(n_layer=2, d_model=16, n_head=2, d_ff=24, context=24, vocab_size=VOCABULARY)
CONFIG = TrainConfig(steps=6, batch_size=3, precision="fp32")
VARIANTS = sorted({variant for name in preset_names() for variant in load_preset(name).ablations.variants})
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}


def documents(model: ModelConfig = TINY):
    ids = [SINK, *range(VOCABULARY, VOCABULARY + 8)][: model.sinks]
    return pack_documents(counting(1, 40, 2, 40), model, EOS, ids)


def examples():
    parts = zip(counting(3, 23, 1, 8), counting(4, 23, 1, 9), strict=True)
    return pack_examples(list(parts), TINY, EOS, [SINK])


def pairs():
    parts = zip(counting(5, 14, 1, 6), counting(6, 14, 1, 6), counting(7, 14, 1, 12), strict=True)
    return pack_pairs(list(parts), TINY, EOS, [SINK])


class Waits(TorchDispatchMode):
    """Operations whose result the host reads, or whose size depends on values."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        if operation.name().split(".")[0] in WAITS:
            self.found.append(operation.name())
        return operation(*arguments, **(settings or {}))


def waits(model: Decoder, objective, rows, config: TrainConfig) -> list[str]:
    step = TrainStep(model, objective, config, numerics.choose(replace(config, compile="off"), 0, 0, "cpu"))
    batches = [MicroBatch.of(batch) for batch in rows.batches(3, seed=0, steps=2)]
    with Waits() as counted:
        for _ in range(2):
            step.gradients(batches, 100)
            step.update(0.5)
    return counted.found


def test_a_wait_is_counted():
    with Waits() as counted:
        assert torch.ones(3).max().item() == 1 and len(torch.ones(3).nonzero()) == 3
    assert len(counted.found) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_of_a_variant_waits_for_the_device(variant):
    model, config = apply_variant(TINY, CONFIG, variant)
    model = replace(model, vocab_size=VOCABULARY + 8)
    assert waits(Decoder(model), NextToken(), documents(model), config) == []


@pytest.mark.parametrize("stage", ["gpt2", "sft", "dpo", "distilgpt2"])
def test_no_step_of_a_stage_waits_for_the_device(stage):
    model = Decoder(gpt2_counterpart(TINY) if stage == "gpt2" else TINY)
    objective, rows = NextToken(), documents(model.config)
    if stage == "sft":
        rows = examples()
    elif stage == "dpo":
        objective, rows = Preference(0.1, torch.zeros(14, 2)), pairs()
    elif stage == "distilgpt2":
        objective, model = Distillation(model), half_depth(model)
    assert waits(model, objective, rows, CONFIG) == []


def test_the_mask_of_flex_attention_is_made_without_waiting():
    segments_BT = documents().rows([0, 1]).segments_BT
    with Waits() as counted:
        segment_block_mask(segments_BT)
    assert counted.found == []


# Compiled steps -----------------------------------------------------------------------------------------------------


@contextmanager
def graphs(monkeypatch) -> Iterator[dict]:
    """Counts of the graphs that are captured inside the block; they run without a compiler."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **settings: compile_with(run, backend="eager", **settings))
    monkeypatch.setattr(numerics, "missing_to_compile", lambda device: "")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "distilgpt2"])
def test_a_training_is_one_graph_without_breaks_and_recompilations(stage, tmp_path, monkeypatch):
    """Over batches of different lengths and a last one that is not full: one more graph would be a recompilation. A
    student and its teacher are two."""
    config, model = replace(CONFIG, steps=-1, epochs=2.5, compile="on"), Decoder(TINY)
    objective, rows = NextToken(), documents()
    if stage == "sft":
        rows = examples()
    elif stage == "dpo":
        objective, rows = Preference(0.1), pairs()
    elif stage == "distilgpt2":
        objective, model = Distillation(model), half_depth(model)
    settings = {"seed": 0, "heldout": rows, "device": "cpu", "progress": lambda message: None}
    with graphs(monkeypatch) as counters:
        result = train(model, objective, rows, config, tmp_path, **settings).result
    assert result.steps > 4 and "; compiled" in result.note
    assert counters["stats"]["unique_graphs"] == (2 if stage == "distilgpt2" else 1)
    assert not counters["graph_break"]


@pytest.mark.parametrize("variant", ["", *VARIANTS])
def test_every_variant_is_one_graph(variant, monkeypatch):
    config = replace(apply_variant(TINY, CONFIG, variant)[0] if variant else TINY, vocab_size=VOCABULARY + 8)
    model, batch = Decoder(config), documents(config).rows([0, 1])
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model.run)(
        batch.tokens_BT, model.prepare(batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    )
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


def test_seeds_of_a_variant_share_its_graph(tmp_path, monkeypatch):
    config = replace(CONFIG, steps=2, compile="on")
    settings = {"folder": tmp_path, "workers": 1, "device": "cpu", "progress": lambda message: None}
    with graphs(monkeypatch) as counters:
        variants._keep_graphs_of.cache_clear()
        results = variants.run_variants(
            TINY, ["norm=layer"], config, lambda m: (documents(m),) * 2, (1, 2, 3), **settings
        )
    assert [len(result.runs) for result in results] == [3, 3]
    assert counters["stats"]["unique_graphs"] == 2


def test_rows_that_are_almost_a_multiple_are_padded_for_the_compiled_graph(monkeypatch):
    """On a GPU 1,023 positions are computed as 1,024, here 23 as 24; 20 stay 20. No value changes."""
    monkeypatch.setitem(forward.MULTIPLE, "cpu", 8)
    monkeypatch.setattr(forward, "ALMOST", 1 / 16)
    widths, prepare = [], Decoder.prepare

    def counted(model, tokens_BT, *rest, **settings):
        widths.append(tokens_BT.shape[1])
        return prepare(model, tokens_BT, *rest, **settings)

    monkeypatch.setattr(Decoder, "prepare", counted)
    with graphs(monkeypatch):
        for width, computed in ((23, 24), (20, 20), (24, 24)):
            for position in ("rope", "learned"):
                config = replace(TINY, context=width, position=position)
                model, batch = Decoder(config), documents(config).rows([0, 1, 2])
                for block in model.blocks:
                    torch.nn.init.normal_(block.attention.o.weight)
                inputs = batch.tokens_BT, batch.positions_BT, batch.segments_BT
                torch.testing.assert_close(forward.CompiledForward(model).hidden(*inputs), model.hidden(*inputs))
                assert widths == [computed, width]
                widths.clear()


def test_blocks_that_are_compiled_one_by_one_share_a_graph(monkeypatch):
    model, batch = Decoder(TINY), documents().rows([0, 1])
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.o.weight)
    inputs = batch.tokens_BT, batch.positions_BT, batch.segments_BT
    with graphs(monkeypatch) as counters:
        found = forward.CompiledForward(model, by_block=True).hidden(*inputs)
    assert len(model.blocks) == 2 and counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found, model.hidden(*inputs))
