"""Ablation variants: what differs, what is equal, what is kept, and workers that change nothing but the time."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch
from shared import counting, flip

from basics.errors import CheckpointError, ConfigError, TrainingError
from study.preset import AblationConfig, ablation_base, load_preset, preset_names
from threefold.config import ModelConfig, TrainConfig
from threefold.data.packing import pack_documents
from threefold.model.decoder import Decoder, parameter_counts
from threefold.training import NextToken, held_out_loss, side_by_side, timing, train, variants
from threefold.training.state import read_metrics

EOS, SINK, VOCABULARY = 0, 1, 37
TINY = ModelConfig(n_layer=2, d_model=16, n_head=2, d_ff=24, context=24, vocab_size=VOCABULARY)
SHORT = TrainConfig(steps=4, batch_size=3, optimizer="adamw", precision="fp32", evaluate_every=2)


def packed(model):
    ids = [SINK, *range(VOCABULARY, VOCABULARY + 8)][: model.sinks]
    return tuple(pack_documents(counting(seed, n, 2, 40), model, EOS, ids) for seed, n in ((1, 40), (2, 9)))


def run(names, folder, seeds=(1, 2), train_config=SHORT, **options):
    options = {"workers": 1, "progress": lambda line: None, "device": "cpu"} | options
    return variants.run_variants(TINY, names, train_config, packed, seeds=seeds, folder=folder, **options)


# Configurations -----------------------------------------------------------------------------------------------------

SWITCHED = {
    "norm=layer": {"model.norm"},
    "ffn=gelu": {"model.ffn", "model.d_ff"},
    "position=learned": {"model.position"},
    "position=none": {"model.position"},
    "sinks=0": {"model.sinks"},
    "sinks=4": {"model.sinks"},
    "qk_norm=true": {"model.qk_norm"},
    "optimizer=adamw": {"train.optimizer"},
    "optimizer=adamw,learning_rate=1e-4": {"train.optimizer", "train.learning_rate"},
}


def test_each_variant_differs_in_the_named_switch_alone():
    assert set(SWITCHED) >= set(AblationConfig().variants)
    base = replace(TINY, d_ff=48)
    found = variants.all_configs(base, TrainConfig(steps=2), list(SWITCHED))
    assert list(found) == ["base", *SWITCHED]

    def flat(configs):
        return {
            f"{part}.{key}": v
            for part, c in zip(("model", "train"), configs, strict=True)
            for key, v in asdict(c).items()
        }

    reference = flat(found["base"])
    for name, expected in SWITCHED.items():
        values = flat(found[name])
        assert {key for key in values if values[key] != reference[key]} == expected, name
    assert {configs[0].vocab_size for configs in found.values()} == {VOCABULARY + 3}  # room for four sinks in all


def test_presets_variants_have_equal_parameters_where_they_are_said_to():
    for name in preset_names():
        preset = load_preset(name)
        base = replace(ablation_base(preset), vocab_size=max(preset.tokenizer.vocab_size, 50_000))
        found = variants.all_configs(base, preset.ablations.train, preset.ablations.variants)
        assert len(found) == len(preset.ablations.variants) + 1  # none is what the base has already
        counts = {variant: parameter_counts(model)["total"] for variant, (model, _) in found.items()}
        for variant, count in counts.items():
            if "position=learned" not in variant:
                assert abs(count / counts["base"] - 1) < 0.01, (name, variant)


def test_variants_are_compared_at_equal_parameters():
    base = replace(TINY, d_ff=48)

    def changed(model, name):
        return variants.variant_configs(model, SHORT, name)[0]

    gelu = changed(base, "ffn=gelu")
    assert gelu.d_ff == 72
    count = {m: sum(p.numel() for p in Decoder(m).parameters()) for m in (base, gelu)}
    assert count[base] == count[gelu]
    assert changed(gelu, "ffn=swiglu") == base
    assert changed(base, "ffn=gelu,d_ff=60").d_ff == 60
    assert changed(base, "norm=layer,bias=true") == replace(base, norm="layer", bias=True)
    with pytest.raises(ConfigError, match=r"normm.*did you mean.*norm"):
        changed(base, "normm=layer")
    with pytest.raises(ConfigError, match=r"ffn=gelu: with d_ff = 4 .*-11\.1%"):
        changed(replace(base, d_ff=3), "ffn=gelu")


def test_what_the_base_has_already_is_left_out(tmp_path):
    said = []
    found = run(["norm=rms", "norm=layer"], tmp_path, seeds=[1], progress=said.append)
    assert [result.variant for result in found] == ["base", "norm=layer"]
    assert "norm=rms is what the base has already" in said[0]


# Trainings ----------------------------------------------------------------------------------------------------------


def test_variants_are_trained_alike_and_kept(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(variants, "train", lambda *a, **k: trained.append(k["name"]) or train(*a, **k))
    names = ["norm=layer", "sinks=0", "optimizer=adamw,learning_rate=1e-4"]
    found = run(names, tmp_path)
    assert [result.variant for result in found] == ["base", *names]
    assert len(trained) == 8
    configs = variants.all_configs(TINY, SHORT, names)
    for result in found:
        assert [r.seed for r in result.runs] == [1, 2] and result.runs[0].heldout_loss != result.runs[1].heldout_loss
        assert 0 < result.heldout_loss < 4
        model = configs[result.variant][0]
        assert result.parameters == sum(p.numel() for p in Decoder(model).parameters())
        kept = variants.load_variant(tmp_path, result.variant, 2)
        assert kept.config == model
        heldout = packed(replace(model, context=TINY.context + model.sinks - TINY.sinks))[1].without_openings()
        assert held_out_loss(kept, heldout, batch_size=3)["loss"] == result.runs[1].heldout_loss
        for one in result.runs:
            assert one.curve["loss"][-1] == one.heldout_loss and one.curve["tokens"][-1] == one.tokens
            metrics = read_metrics(variants.variant_folder(tmp_path, one.variant, one.seed))
            assert one.curve["loss"] == [line["heldout_loss"] for line in metrics if "heldout_loss" in line]
            assert len(one.curve["loss"]) == 3 and one.curve["tokens"][0] == 0

    assert run(names, tmp_path) == found
    assert len(trained) == 8  # kept
    more = run(["norm=layer"], tmp_path, train_config=replace(SHORT, steps=5))
    assert len(trained) == 12 and more[0].runs != found[0].runs  # another training: nothing kept serves

    with pytest.raises(ConfigError, match="sinks = 0 needs rows of 23 positions, not 24"):
        variants.run_variants(TINY, ["sinks=0"], SHORT, lambda model: packed(TINY), folder=tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        variants.load_variant(tmp_path, "sinks=0", 3)


def test_an_added_variant_reuses_what_an_earlier_call_trained(tmp_path):
    first = run(["norm=layer"], tmp_path / "a", seeds=[1])
    said = []
    second = run(["norm=layer", "qk_norm=true"], tmp_path / "b", seeds=[1], reuse=tmp_path / "a", progress=said.append)
    assert second[:2] == first and said[0] == "2 of 3 trainings are done already" and len(said) == 2
    assert variants.load_variant(tmp_path / "b", "norm=layer", 1).config.norm == "layer"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "metrics.jsonl", "training.json"])
def test_a_kept_training_of_which_a_byte_changed_is_trained_again(tmp_path, name):
    first = run(["norm=layer"], tmp_path / "a", seeds=[1])
    changed = variants.variant_folder(tmp_path / "a", "norm=layer", 1) / name
    content = changed.read_bytes()
    flip(changed, content.rindex(b'"loss": ') + 12 if name == "training.json" else -3)
    for folder in ("a", "b"):  # an interrupted call that goes on; another one that may copy
        said = []
        again = run(["norm=layer"], tmp_path / folder, seeds=[1], reuse=tmp_path / "a", progress=said.append)
        assert again == first and said[0] == "1 of 2 trainings are done already"
        if folder == "a":
            kept = variants.variant_folder(tmp_path / "a", "norm=layer", 1)
            assert name in ("metrics.jsonl", "training.json") or (kept / name).read_bytes() == content
            flip(kept / name)
    variants.load_variant(tmp_path / "b", "norm=layer", 1)


def test_variants_with_sinks_train_on_the_same_text_in_the_same_order():
    rows = variants._Packed(packed, sinks=1)
    for one, four in zip(rows(TINY), rows(replace(TINY, sinks=4)), strict=True):
        assert len(one) == len(four) and one.n_tokens == four.n_tokens
        a, b = one.rows(range(len(one))), four.rows(range(len(four)))
        assert torch.equal(a.tokens_BT[:, 1:], b.tokens_BT[:, 4:])
        assert torch.equal(a.targets_BT, b.targets_BT[:, 3:]) and (b.targets_BT[:, :3] < 0).all()


def test_the_heldout_loss_is_over_the_same_tokens_for_every_number_of_sinks():
    rows, tokens = variants._Packed(packed, sinks=1), {}
    for sinks in (0, 1, 4):
        (batch,) = rows(replace(TINY, sinks=sinks))[1].batches(1000, shuffle=False)
        tokens[sinks] = sorted(batch.targets_BT[batch.targets_BT >= 0].tolist())
    documents = counting(2, 9, 2, 40)
    assert tokens[0] == tokens[1] == tokens[4] == sorted(token for one in documents for token in [*one[1:], EOS])


# Workers ------------------------------------------------------------------------------------------------------------


def children():
    return [one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())]


def test_a_killed_worker_is_named_and_costs_no_finished_training(tmp_path):
    names, long = ["norm=layer", "sinks=4"], replace(SHORT, steps=60)
    alone = run(names, tmp_path / "alone", train_config=long)
    said = []

    def kill_one(line):
        said.append(line)
        if line.startswith("2/6"):
            children()[0].kill()

    with pytest.raises(TrainingError, match=r", seed \d: its worker ended by SIGKILL"):
        run(names, tmp_path / "two", train_config=long, workers=2, progress=kill_one)
    assert not children()  # the other one was ended
    finished = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("*/training.json")}
    assert 2 <= len(finished) < 6

    said.clear()
    assert run(names, tmp_path / "two", train_config=long, workers=2, progress=said.append) == alone
    assert said[0] == f"{len(finished)} of 6 trainings are done already"
    after = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("*/training.json")}
    assert len(after) == 6 and finished.items() <= after.items()
    for name in ("base", *names):
        same = [variants.load_variant(tmp_path / home, name, 2).state_dict() for home in ("alone", "two")]
        assert all(torch.equal(same[0][key], same[1][key]) for key in same[0])


def test_an_error_in_a_worker_names_the_variant_and_the_seed(tmp_path):
    wild = replace(SHORT, learning_rate=1e30, steps=20)
    for workers in (1, 2):
        with pytest.raises(TrainingError, match=r"(base|norm=layer), seed 1: the (loss|gradient norm) is"):
            run(["norm=layer"], tmp_path / str(workers), seeds=[1], train_config=wild, workers=workers)


def fail(task):
    raise KeyError(task)


def test_an_error_that_is_a_bug_keeps_its_type_and_gets_the_task():
    for workers in (1, 2):
        with pytest.raises(KeyError) as caught:
            list(side_by_side.side_by_side(fail, ["a", "a"], workers, "cpu"))
        assert "In a" in caught.value.__notes__


def test_workers_leave_when_the_parent_is_killed(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        sys.path[:0] = sys.argv[1:3]
        import test_variants
        from dataclasses import replace
        if __name__ == "__main__":
            long = replace(test_variants.SHORT, steps=100_000)
            print("ready", flush=True)
            test_variants.run(["norm=layer"], sys.argv[3], seeds=[1], train_config=long, workers=2)
        """
    )
    (tmp_path / "parent.py").write_text(script)
    here = Path(__file__).parent
    command = [sys.executable, *map(str, (tmp_path / "parent.py", here, here.parent, tmp_path / "out"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as parent:
        assert parent.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "out").glob("*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len([one for one in workers if "spawn_main" in " ".join(one.cmdline())]) == 2
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(30) == -signal.SIGTERM
    assert not psutil.wait_procs(workers, timeout=30)[1]


# Timing -------------------------------------------------------------------------------------------------------------


def test_step_times_come_in_rounds_and_are_kept(tmp_path, monkeypatch):
    names, file = ["norm=layer", "sinks=0"], tmp_path / "times.json"
    found = variants.time_variants(TINY, names, SHORT, packed, 3, file=file, device="cpu")
    assert list(found.seconds) == ["base", *names] and "CPU" in found.note
    assert all(len(taken) == 3 and min(taken) > 0 for taken in found.seconds.values())
    assert variants.time_variants(TINY, names, SHORT, packed, 3, file=file, device="cpu") == found
    assert variants.time_variants(TINY, names, SHORT, packed, 4, file=file, device="cpu") != found


def test_timed_steps_of_all_variants_have_rows_of_one_width(tmp_path, monkeypatch):
    widths = []

    def untimed(configs, rows, *_):
        widths.extend(rows(model).width for model, _ in configs.values())
        return timing.Timing({}, "")

    monkeypatch.setattr(variants, "time_steps", untimed)
    variants.time_variants(TINY, ["sinks=0", "sinks=4"], SHORT, packed, 3, file=tmp_path / "times.json")
    assert widths == [TINY.context] * 3


def test_every_round_takes_every_turn_once():
    taken = []
    times = timing.time_rounds({name: lambda name=name: taken.append(name) for name in "abc"}, 6, "cpu")
    assert {len(seconds) for seconds in times.values()} == {6}
    rounds = [taken[i : i + 3] for i in range(0, len(taken), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len({tuple(one) for one in rounds}) > 1


def test_a_timed_step_is_the_training_step(tmp_path, monkeypatch):
    """Weights after a timed step with accumulation 1 are those after one step of the loop on the same batch."""
    rows = packed(TINY)[0]
    one = replace(SHORT, steps=1, warmup=0.0, schedule="constant", batch_size=len(rows), compile="off")
    models, model = [], Decoder(TINY)

    def same_weights(config):
        models.append(Decoder(config))
        if not models[-1].embed.weight.is_meta:  # where its parameters are only counted
            models[-1].load_state_dict(model.state_dict())
        return models[-1]

    monkeypatch.setattr(timing, "Decoder", same_weights)
    monkeypatch.setattr(timing, "WARM_UP", 0)
    timing.time_steps({"base": (TINY, one)}, lambda config: rows, 1, "cpu")
    train(model, NextToken(), rows, one, tmp_path, seed=0, device="cpu", progress=lambda line: None)
    for (name, a), b in zip(model.state_dict().items(), models[-1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name, atol=1e-6, rtol=1e-4)


def test_kernels_are_timed_at_equal_parameters():
    small = ModelConfig(d_model=16, n_head=2, d_ff=32)
    for part, names in (("norm", ["RMSNorm", "LayerNorm"]), ("ffn", ["SwiGLU", "GELU"])):
        found = timing.time_kernels(part, 2, model=small, device="cpu")
        assert list(found.seconds) == names and {len(taken) for taken in found.seconds.values()} == {2}
        assert len(set(found.parameters.values())) == 1 and found.positions == timing.POSITIONS["cpu"][part]
