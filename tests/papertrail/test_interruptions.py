"""Kills, a full disk, no memory and divergence, for real: tests/interruptions.py in a process of its own."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from papertrail.run import read_run_file

PROJECT = Path(__file__).parents[2]
KILLS = 20
EVERY = 3  # steps between states in interruptions.py

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits by Linux's resource module")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    command = [sys.executable, "tests/interruptions.py", str(tmp_path_factory.mktemp("runs")), "2026", str(KILLS)]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=900,
        check=True,
    )
    return json.loads(done.stdout)


def test_kills_at_random_moments_change_nothing(found):
    """Twenty SIGKILLs, half at a moment, half at an event on a file, from the notebook's door to run.json: whatever
    stands in the stage's place is whole, and each stage ends with the weights and records of an uninterrupted one."""
    told = found["kills"]
    assert (told["first"], told["wrong"]) == ("done", [])
    assert told["kills"] >= KILLS and told["finished"] >= 1
    assert max(told["lost"]) <= EVERY and len(told["lost"]) >= KILLS // 3


def test_a_full_disk_leaves_the_last_good_state(found):
    told = found["full_disk"]
    assert re.fullmatch(
        r"TrainingError: pretrain: File too large after step \d+; the last good state is that of step \d+, in "
        r"\.pretrain\.partial/resume\.safetensors\. Free some space: the same command resumes from there",
        told["said"],
    )
    assert told["same"] and told["left"] == []
    assert told["again"] == "done" and told["result"]


def test_no_memory_names_the_setting(found):
    assert "set batch_size = 4096 (now 8192) and accumulate = 2 (now 1)" in found["no_memory"]
    assert found["no_memory"].startswith("TrainingError: pretrain: out of memory in ")


def test_divergence_names_step_rows_norm_and_the_last_good_state(found):
    assert re.match(
        r"TrainingError: pretrain: the (loss|gradient norm) is (nan|inf) in step (\d+) \(rows \d+, \d+, \d+, \d+\), "
        r"(gradient norm|loss) \S+; the last good state is that of step \d+, in .*/resume\.safetensors",
        found["diverging"],
    )


TRAINED = ("pretrain", "gpt2", "distilgpt2", "sft", "dpo")


@pytest.mark.skipif(not os.environ.get("THREEFOLD_KILLS"), reason="minutes: THREEFOLD_KILLS=20 asks for it")
@pytest.mark.slow
def test_kills_over_the_smoke_stages(tmp_path):
    """`threefold run --preset smoke` killed again and again ends with the weights of an uninterrupted run."""
    often = [f"{stage}.checkpoint_every=20" for stage in TRAINED]
    words = [word for stage in ("data", *TRAINED) for word in ("--only", stage)]
    words += [word for key in often for word in ("--set", key)]

    def start(runs: Path) -> subprocess.Popen:
        environment = {**os.environ, "THREEFOLD_RUNS": str(runs), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "study", "run", "--preset", "smoke", *words]
        return subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL)

    def weights(runs: Path) -> dict[str, str]:
        return {stage: read_run_file(runs / "smoke" / stage)["weights_sha256"] for stage in TRAINED}

    began = time.monotonic()
    assert start(tmp_path / "straight").wait() == 0
    took = time.monotonic() - began
    draw, left, finished = random.Random(2026), int(os.environ["THREEFOLD_KILLS"]), 0
    runs = tmp_path / "killed"
    while left or not finished:
        child = start(runs)
        moment = draw.uniform(0.1, 0.6) * took
        try:
            status = child.wait(moment if left else None)
        except subprocess.TimeoutExpired:
            family = psutil.Process(child.pid).children(recursive=True)
            child.kill()
            child.wait()
            left -= 1
            _, alive = psutil.wait_procs(family, timeout=60)
            assert not alive
            print(f"killed after {moment:.0f} s; {left} to go", flush=True)
            continue
        assert status == 0
        finished += 1
        assert weights(runs) == weights(tmp_path / "straight")
        print(f"finished {finished} with the same weights", flush=True)
        shutil.rmtree(runs)
