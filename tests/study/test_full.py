"""Presets `full` and `gpu` against a stand-in for the hub: every source and model they name; and, if asked for, the
whole run of `full` at its true size with few steps, which takes about an hour and 12 GB of memory:

    THREEFOLD_FULL=1 python -m pytest -s tests/study/test_full.py -k true_size
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_hub import FakeHub
from stand_ins import NEVER_TAKEN, SHARDS, data_sets, models

COMMIT = "a" * 40
LOADED = """
import json
from study import cli, stages
from study.preset import load_preset
from threefold.data import sources
from threefold.evaluation import LanguageModel

cli.main(["doctor", "--preset", "full"])
counts = {}
for preset, stage in ((preset, stage) for preset in map(load_preset, ("full", "gpu")) for stage in stages.plan(preset)):
    for source in stages.sources(preset, stage):
        counts[f"{source.source} {source.split} {source.skip_examples}"] = len(sources.load(source))
    for name, location, revision in stages.models_from_outside(preset, stage):
        counts[name] = len(LanguageModel.from_location(location, revision, name=name).encode(["any text"])[0])
print(json.dumps(counts))
"""
# Few steps of one row, and small evaluations; the models keep their size.
CUT = """
pretrain.tokens=-1 pretrain.steps=2 pretrain.batch_size=1 pretrain.accumulate=1
sft.epochs=-1 sft.steps=2 sft.batch_size=1
dpo.epochs=-1 dpo.steps=2 dpo.batch_size=1
data.sft_heldout=[{source='alpaca',max_examples=4}]
ablations.steps=2 ablations.seeds=2 ablations.variants=['norm=layer'] ablations.train.batch_size=1 ablations.rounds=1
ablations.length_streams=1 ablations.length_factor=2
evaluation.sentiment_templates=1 evaluation.sentiment_draws=1 evaluation.problem_new_tokens=4
evaluation.instruction_new_tokens=4 evaluation.instruction_generations=2 evaluation.instructions.max_examples=2
evaluation.batch_tokens=2048 evaluation.bootstrap=200
evaluation.speed_batch_sizes=[1] evaluation.speed_prompt=16 evaluation.speed_new_tokens=4 evaluation.speed_repeats=2
"""


def environment(hub: FakeHub, folder: Path) -> dict[str, str]:
    """Of a process that finds nothing but this hub."""
    folders = {"HF_HOME": "home", "THREEFOLD_CACHE": "cache", "THREEFOLD_RUNS": "runs"}
    hidden = {"HF_ENDPOINT": hub.url, "no_proxy": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "-1", "THREEFOLD_DATA": ""}
    return os.environ | hidden | {name: str(folder / value) for name, value in folders.items()}


@pytest.mark.slow
def test_every_source_and_model_is_found_on_a_hub(tmp_path):
    with FakeHub(data_sets() | models(tmp_path / "models", n_layer=1, n_embd=8, n_head=2), [COMMIT]) as hub:
        settings = {"env": environment(hub, tmp_path), "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", LOADED], **settings)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line[5:].startswith(("sources", "models", "prompts"))] == [
        "ok   sources   found: 14 on the hub, 0.0 GB",
        *(f"ok   models    {name}: on the hub, 0.0 GB" for name in ("gpt2", "distilgpt2")),
        "ok   prompts   all fit the context of 1024 tokens",
    ]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["wikipedia train 0"] == 3 * SHARDS and counts["tinystories train 0"] == 80
    assert counts["wikitext-103 train 0"] == 40 and counts["wikitext-103 validation 0"] == 2
    assert counts["hh-rlhf train 0"] == 12 and counts["hh-rlhf test 0"] == 4  # of four folders
    assert counts["alpaca train 0"] == 1000 and counts["alpaca train 1000"] == 60
    assert counts["sst2 train 0"] == 60 and counts["gsm8k test 0"] == 2
    assert counts["gpt2"] == counts["distilgpt2"] == 6  # tokens of two bytes or one
    taken = set(hub.served)
    assert not taken & set(NEVER_TAKEN) and not any("red-team" in name or "cola" in name for name in taken)


@pytest.mark.slow
@pytest.mark.skipif("THREEFOLD_FULL" not in os.environ, reason="takes an hour; asked for by THREEFOLD_FULL=1")
def test_all_stages_at_true_size(tmp_path):
    words = [word for key in CUT.split() for word in ("--set", key)]
    command = [sys.executable, "-m", "study", "run", "--preset", "full", "--jobs", "1", *words]
    with FakeHub(data_sets() | models(tmp_path / "models"), [COMMIT]) as hub:
        begun, largest, together = time.monotonic(), {}, 0
        process = subprocess.Popen(command, env=environment(hub, tmp_path))
        while process.poll() is None:
            used = peaks(psutil.Process(process.pid))
            largest |= {pid: peak for pid, (peak, _) in used.items()}
            together = max(together, sum(now for _, now in used.values()))
            time.sleep(1)
    assert process.returncode == 0
    runs = json.loads(
        subprocess.run(
            [sys.executable, "-m", "study", "status", "--run", "full", "--json"],
            env=environment(hub, tmp_path),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert [row["stage"] for row in runs["stages"] if row["state"] != "fresh"] == []
    size = sum(file.stat().st_size for file in (tmp_path / "runs").rglob("*") if file.is_file())
    print(
        f"\n{len(runs['stages'])} stages in {time.monotonic() - begun:,.0f} s; largest process "
        f"{max(largest.values()) / 1e9:.1f} GB, all at once {together / 1e9:.1f} GB; runs folder {size / 1e9:.1f} GB"
    )
    for row in runs["stages"]:
        print(f"{row['stage']:<24}{row['wall_seconds']:>9.1f} s")


def peaks(parent: psutil.Process) -> dict[int, tuple[int, int]]:
    """{pid: (most bytes of memory it has had, bytes it has now)} of a process and all below it (Linux)."""
    found = {}
    for process in [parent, *parent.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        values = dict(line.split(":", 1) for line in lines)
        if "VmHWM" in values:
            found[process.pid] = tuple(1024 * int(values[key].split()[0]) for key in ("VmHWM", "VmRSS"))
    return found
