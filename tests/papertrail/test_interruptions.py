"""Kills, a full disk, no memory and divergence, for real: tests/interruptions.py in a process of its own."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from basics import paths
from papertrail import records
from papertrail.verify import differences
from study.run import Run, open_run

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
    """Twenty SIGKILLs, half at a moment, half at an event on a file, from `open_stage` to run.json: whatever
    is in the stage's place is whole, and each stage ends with the weights and records of an uninterrupted one."""
    told = found["kills"]
    assert (told["first"], told["wrong"]) == ("done", [])
    assert told["kills"] >= KILLS and told["finished"] >= 1
    # a state is written while the next EVERY steps are taken, and the one after waits for it
    assert max(told["lost"]) <= 2 * EVERY and len(told["lost"]) >= KILLS // 3


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
        r"DivergedError: pretrain: the (loss|gradient norm) is (nan|inf) in step (\d+) \(rows \d+, \d+, \d+, \d+\), "
        r"(gradient norm|loss) \S+; the last good state is that of step \d+, in .*/resume\.safetensors",
        found["diverging"],
    )


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.mark.skipif(not os.environ.get("THREEFOLD_KILLS"), reason="an hour: THREEFOLD_KILLS=25 asks for it")
@pytest.mark.slow
def test_kills_over_all_stages_of_the_smoke_run(tmp_path, monkeypatch):
    """`threefold run --preset smoke`, ended again and again by SIGKILL, SIGTERM and SIGINT in turn, makes the weights
    and records of an uninterrupted run, times apart, and leaves no process and no temporary file."""
    scratch = Path(tempfile.mkdtemp(prefix="kills-"))  # short: sockets lie in it
    often = [f"--set={stage}.checkpoint_every=20" for stage in ("pretrain", "gpt2", "distilgpt2", "sft", "dpo")]

    def start(runs: Path) -> subprocess.Popen:
        places = {"THREEFOLD_RUNS": str(runs), "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "study", "run", "--preset", "smoke", *often]
        return subprocess.Popen(command, cwd=PROJECT, env={**os.environ, **places}, stdout=subprocess.DEVNULL)

    def opened(runs: Path) -> Run:
        monkeypatch.setattr(paths, "RUNS", runs)
        return open_run("", "smoke", create=False)

    began = time.monotonic()
    assert start(tmp_path / "straight").wait() == 0
    took, straight = time.monotonic() - began, opened(tmp_path / "straight")
    draw, left, rounds = random.Random(2026), int(os.environ["THREEFOLD_KILLS"]), 0
    while left or not rounds:
        runs = tmp_path / f"killed{rounds}"
        child = start(runs)
        try:
            status = child.wait(draw.uniform(0.02, 0.3) * took if left else None)
        except subprocess.TimeoutExpired:
            family, number = psutil.Process(child.pid).children(recursive=True), SIGNALS[left % len(SIGNALS)]
            at = sorted(folder.name for folder in (runs / "smoke").glob(".*.partial"))
            child.send_signal(number)
            # a signal before the command handles it, or after, ends the interpreter itself: 128 + number in a shell too
            assert child.wait(60) in (-number, 128 + number)
            _, alive = psutil.wait_procs(family, timeout=60)
            assert not alive
            assert list(scratch.glob("threefold-*")) == []
            left -= 1
            print(f"{number.name} in {', '.join(at) or 'no stage'}; {left} to go", flush=True)
            continue
        assert status == 0
        rounds += 1
        killed = opened(runs)
        for stage in killed.plan:
            if stage != killed.project.summary:
                assert list(differences(straight, killed, stage)) == []
        comparisons = [records.read(run.notebook("06_compare")) for run in (straight, killed)]
        assert list(comparisons[0]) == list(comparisons[1])
        entries = [path.name for path in killed.path.rglob(".*")]
        assert set(entries) <= {".lock", ".data_dir"}
        print(f"finished {rounds}: the same weights and records", flush=True)
    shutil.rmtree(scratch)
