"""The GPU run in a box, rehearsed on a CPU as on a bare machine: every section runs and writes what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]

# Packages that a rented GPU machine does not have are hidden from a program, and the network is closed to it.
BARE = """
import runpy, socket, sys
from importlib.machinery import PathFinder

HIDDEN = {"papermill", "jupytext", "nbformat", "ipykernel", "datasets", "pandas", "pyarrow", "matplotlib", "scipy",
          "psutil", "trl", "accelerate", "lm_eval", "sklearn"}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)

def closed(*_):
    raise OSError("no network")

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
socket.getaddrinfo = closed
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""

TRAINING = {"tokens_per_second", "quartiles", "tflops", "share_of_989_tflops", "share_of_matmul", "peak_memory_gb"}
INFERENCE = {"tokens_per_second", "transformers"}


def bare(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(PROJECT), str(PROJECT / "lib")))}
    command = [sys.executable, "-c", BARE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_rehearsal_runs_every_section_on_a_bare_machine(tmp_path):
    done = bare("--rehearse", "--seconds", 540, "--out", tmp_path / "results.json")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    sections = results["sections"]
    assert results["rehearsal"] and not any({"error", "skipped"} & set(found) for found in sections.values())
    oracles = {"flex attention", "transformers", "objectives", "compiled losses", "decoding", "training", "fsdp2"}
    speeds = ["pretrain", "sft", "dpo", "decoding", "scoring", "profile"]
    assert set(sections) == {"machine", "matmul", *(f"oracle: {name}" for name in oracles), *speeds}
    assert {"device", "versions"} <= set(sections["machine"]) and sections["matmul"]["fastest_tflops"] > 0
    for stage in ("pretrain", "sft", "dpo"):
        found = sections[stage]
        assert set(found) >= TRAINING and found["tokens_per_second"] > 0 and found["steps"] == 2
        assert found["share_of_matmul"] > 0 and found["tflops"] == pytest.approx(found["share_of_989_tflops"] * 989)
    assert sections["dpo"]["reference_pairs_per_second"] > 0
    assert sections["dpo"]["loss"][0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: the reference is the model itself
    assert set(sections["oracle: objectives"]) >= {"preference", "distillation, gradient"}
    for found in sections["oracle: training"]["resume"], sections["oracle: training"]["determinism"]:
        assert found["ok"] and found["bit_identical"]
    for part in (*(sections["decoding"][f"batch {n}"] for n in (1, 32)), sections["scoring"]["windows"]):
        assert set(part) >= INFERENCE and all(part[name] > 0 for name in INFERENCE)
    assert all(sections["scoring"][name]["difference"] < 1e-4 for name in ("windows", "few-shot"))
    kernels = sections["profile"]["kernels"]
    assert kernels and kernels[0]["milliseconds"] >= kernels[-1]["milliseconds"] and sections["profile"]["seconds"] > 0


def test_a_section_that_fails_is_recorded_and_the_others_run(monkeypatch, tmp_path, capsys):
    from benchmarks.gpu import __main__ as program

    def broken(box):
        raise RuntimeError("no such kernel")

    def slow(box):
        while True:
            pass

    off = {"part": {"relative_error": 0.5, "tolerance": 0.1, "ok": False}}
    sections = {"a": (broken, 5), "b": (slow, 0.05), "c": (lambda box: off, 5), "d": (lambda box: {"value": 1}, 5)}
    monkeypatch.setattr(program, "SECTIONS", sections)
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--out", str(out)])
    assert program.main() == 1
    found = json.loads(out.read_text())["sections"]
    assert found["a"]["error"] == "RuntimeError: no such kernel"
    assert found["b"]["error"].startswith("TimeoutError: b took more than")
    assert found["c"]["error"] == "part: relative error 0.5, allowed is 0.1" and found["c"]["part"] == off["part"]
    assert found["d"]["value"] == 1 and "error" not in found["d"]
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--seconds", "0", "--out", str(out)])
    assert program.main() == 1
    assert all("skipped" in section for section in json.loads(out.read_text())["sections"].values())
