"""Workers as a notebook starts them: what they leave, what is heard of them, and that they end when it does."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from basics import paths
from basics.errors import ConfigError, TrainingError
from study import cli
from study.cli.run import saved_step
from study.run import open_stage
from study.training import prepare, train_stage
from threefold.data import corpus
from threefold.data.tokenizer import build_tokenizer
from threefold.training.state import curve

PRESET = str(Path(__file__).parents[1] / "presets" / "tiny.toml")
SHORT = "pretrain.steps=8; pretrain.batch_size=4; pretrain.precision=fp32"
ENDLESS = "pretrain.steps=100000; pretrain.batch_size=4"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder; the tokenised text is kept in it."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", folder)
        yield folder


def opened(run: str, overrides: str, **parameters):
    """A run's pretraining, with a finished stage before it that made the tokenizer."""
    common = {"preset": PRESET, "run": run, "overrides": overrides}
    data = open_stage("data", **common)
    folder, preset = data.begin(), data.preset
    texts = corpus.mixture_texts(preset.data.pretrain)
    build_tokenizer(preset.tokenizer, texts, context=preset.model.context).save_pretrained(folder / "tokenizer")
    data.finish()
    stage = open_stage("pretrain", **common, **parameters)
    return stage, prepare(stage), stage.begin()


def workers_of(run: str) -> list[psutil.Process]:
    """Processes that train this run, torchrun among them."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if "train" in words and run in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until_gone(run: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while workers_of(run) and time.monotonic() < end:
        time.sleep(0.1)
    assert workers_of(run) == []


def test_a_notebook_trains_with_two_workers_as_alone(runs):
    said = []
    stage, inputs, folder = opened("launched-two", SHORT, nproc=2)
    found = train_stage(stage, inputs, folder, said.append)
    assert found.result.workers == 2 and "2 workers" in said[0] and 3 <= len(said) <= 6
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "metrics.jsonl", "training.json"}
    facts = stage.finish(training={"workers": 2})
    assert facts["attempts"] == 1 and facts["determinism"]["workers"] == [2]
    assert facts["determinism"]["level"] == "bit-identical"

    alone = train_stage(*opened("launched-one", SHORT, nproc=1), said.append)
    assert alone.result.workers == 1 and alone.result.tokens == found.result.tokens
    assert curve(alone.folder)["loss"] == pytest.approx(curve(stage.folder)["loss"], abs=1e-4)


def test_a_workers_error_is_told_with_its_rank(runs):
    stage, inputs, folder = opened("launched-odd", "pretrain.steps=3; pretrain.batch_size=5", nproc=2)
    with pytest.raises(TrainingError, match=r"worker \d of 2: ConfigError: batch_size x accumulate = 5 x 1"):
        train_stage(stage, inputs, folder, [].append)
    assert workers_of("launched-odd") == []


def test_a_stage_is_trained_without_its_notebook_which_then_finds_it_done(runs, capsys):
    _, _, folder = opened("alone", SHORT)
    assert cli.main(["train", "pretrain", "--run", "alone"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "8 steps" in out[0] and out[-1].endswith("`threefold run --run alone --only pretrain`")
    assert (folder / "training.json").is_file()

    stage, inputs, folder = opened("alone", SHORT, nproc=2)
    said = []
    assert train_stage(stage, inputs, folder, said.append).result.workers == 1
    assert said == ["pretrain: trained already, 8 steps; its checkpoint is loaded"]
    assert stage.finish()["attempts"] == 3

    assert cli.main(["train", "gpt3", "--run", "alone"]) == 2 and "pretrain, gpt2" in capsys.readouterr().err
    assert cli.main(["train", "dpo", "--run", "alone"]) == 2 and "stage sft" in capsys.readouterr().err


def test_nproc_is_a_whole_number(runs):
    for wrong in (0, -1, 1.5, "2", True):
        with pytest.raises(ConfigError, match="parameter nproc"):
            open_stage("sft", preset=PRESET, nproc=wrong)
    with pytest.raises(ConfigError, match="unknown parameter nproc"):
        open_stage("compare", preset=PRESET, nproc=2)


@pytest.mark.slow
def test_workers_end_with_the_notebook(runs):
    """By Ctrl-C, by the death of torchrun, and by that of one of them."""
    stage, inputs, folder = opened("launched-stopped", ENDLESS, nproc=2)

    def interrupt(line: str) -> None:
        assert len(workers_of("launched-stopped")) == 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stage(stage, inputs, folder, interrupt)
    wait_until_gone("launched-stopped")
    assert saved_step(folder) > 0  # they were asked to save their state first

    def kill(whose: str):
        def say(line: str) -> None:
            for process in workers_of("launched-stopped"):
                rank = "agent" if "torch.distributed.run" in process.cmdline() else process.environ()["RANK"]
                if rank == whose:
                    os.kill(process.pid, signal.SIGKILL)

        return say

    with pytest.raises(TrainingError, match="torchrun ended with status -9"):
        train_stage(stage, inputs, folder, kill("agent"))
    wait_until_gone("launched-stopped")
    with pytest.raises(TrainingError, match="worker 1 was killed by signal 9"):
        train_stage(stage, inputs, folder, kill("1"))
    wait_until_gone("launched-stopped")
