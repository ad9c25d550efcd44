"""What a run needs of the machine is checked before its first stage starts, by `run` and by `doctor`."""

import importlib.util
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from shared import call

from basics import machine, paths
from basics.errors import ConfigError, EvaluationError, SourceError, ThreefoldError
from study import checks, doctor
from study.preset import load_preset, override
from study.run import Run
from study.training import train_stage
from threefold.data import hub
from threefold.graphics import Graphics


@pytest.fixture
def check(tmp_path, monkeypatch):
    """`doctor.check` of a smoke run with some keys changed."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)

    def check(selected=None, say=print, **changes):
        preset = override(load_preset("smoke"), {key.replace("__", "."): value for key, value in changes.items()})
        doctor.check(Run.of("x", tmp_path / "runs" / "x", preset), selected, say)

    return check


def external(location: str) -> list[dict]:
    return [{"name": "other", "location": location}]


def test_a_run_with_all_it_needs_passes(check):
    check()


def test_a_model_folder_without_its_files_is_named(check, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(SourceError, match=r"model other: model contains no config\.json"):
        check(baselines__external=external("model"))
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"model other: model contains no model\*\.safetensors"):
        check(baselines__external=external("model"))
    (tmp_path / "model" / "model-00001-of-00002.safetensors").touch()
    check(baselines__external=external("model"))
    check(selected={"data", "pretrain"}, baselines__external=external("nowhere/at/all"))  # not loaded by these


def test_a_model_of_the_hub_is_asked_for(check, monkeypatch):
    with pytest.raises(SourceError, match="model other: no folder /no/such/folder, and no name on the hub"):
        check(baselines__external=external("/no/such/folder"))

    def unreachable(location, revision, patterns):
        raise SourceError(f"the hub did not give {location} (no network)")

    monkeypatch.setattr(hub, "model_bytes", unreachable)
    with pytest.raises(
        SourceError, match="model gpt2: no folder owner/gpt2, not in the Hugging Face cache, and the hub"
    ):
        check(baselines__gpt2="owner/gpt2", baselines__distilgpt2="owner/distilgpt2")
    monkeypatch.setattr(hub, "model_bytes", lambda *asked: 10**9)
    check(baselines__gpt2="owner/gpt2", baselines__distilgpt2="owner/distilgpt2")


def test_a_package_that_reads_the_file_is_asked_for(check, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(ConfigError, match="needs accelerate: `pip install accelerate`"):
        check(baselines__external=external("package:some/model.gguf"))


def test_memory_and_disk_are_counted_before(check, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10**9))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=0))
    check()
    with pytest.raises(ConfigError, match=r"model\.d_model = 4096\) needs \d+ GB to train, this machine has 1 GB"):
        check(model__d_model=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    with pytest.raises(ThreefoldError, match=r"0\.0 GB are free: .*`threefold clean`"):
        check()
    check(selected={"compare"})


def test_prompts_are_measured_where_the_tokenizer_is_known(check, monkeypatch):
    from threefold.data import tokenizer

    built = SimpleNamespace()
    monkeypatch.setattr(tokenizer, "build_tokenizer", lambda config, **_: built)

    def refuse(preset, tokenizer, data_dir):
        assert tokenizer is built
        raise EvaluationError("gsm8k/5-shot: change evaluation.problem_shots")

    monkeypatch.setattr(checks, "check_evaluations", refuse)
    check()  # trained by stage data, which asks then
    with pytest.raises(EvaluationError, match=r"change evaluation\.problem_shots"):
        check(tokenizer__kind="gpt2")
    check(selected={"sft"}, tokenizer__kind="gpt2")


def test_the_command_says_so_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    words = ["--set", "baselines.external=[{name='other', location='/no/such/folder'}]"]
    status, out, err = call(capsys, "run", "--preset", "smoke", *words)
    assert (status, out, err.count("\n")) == (2, "", 1) and "model other: no folder /no/such/folder" in err
    assert not (tmp_path / "runs").exists()


# The machine --------------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A machine whose driver shows a GPU that torch does not see: an nvidia-smi that lists it."""
    command = tmp_path / "bin" / "nvidia-smi"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    command.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        for name in machine.HIDDEN:
            patch.setenv(name, "0")  # restored at the end, whatever the code under test sets
        patch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
        patch.setattr(paths, "RUNS", tmp_path / "runs")
        yield patch


@pytest.mark.skipif(Graphics.read().count > 0, reason="torch sees a GPU")
def test_a_gpu_that_torch_does_not_see_stops_every_run(driver, tmp_path, capsys):
    assert machine.has_gpu() and machine.gpu_name() == "NVIDIA H100 80GB HBM3"
    status, out, _ = call(capsys, "doctor", "--preset", "smoke")
    (stop,) = [line for line in out.splitlines() if line.startswith("stop")]
    assert status == 1 and stop.startswith("stop gpu       the driver shows a GPU (NVIDIA H100 80GB HBM3")
    assert "does not see it" in stop and "--device cpu" in stop
    status, out, err = call(capsys, "run", "--preset", "smoke")
    assert (status, out, err) == (2, "", f"threefold: {stop[15:]}\n") and not (tmp_path / "runs").exists()
    status, out, _ = call(capsys, "doctor", "--preset", "smoke", "--device", "cpu")
    assert status == 0 and "ok   gpu       none; models run on the CPU" in out


@pytest.mark.skipif(Graphics.read().count > 0, reason="torch sees a GPU")
def test_a_training_outside_of_a_run_does_not_fall_back_to_the_cpu_either(driver, tmp_path):
    with pytest.raises(ConfigError, match="does not see it"):
        train_stage(None, None, tmp_path)  # checked before anything else


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"torch": "2.13.0+cpu"}, r"torch 2\.13\.0\+cpu does not see it; this torch is built without CUDA: install"),
        ({"cuda": "13.0"}, "for CUDA 12.4.* built for CUDA 13.0: update the driver, or install torch for CUDA 12;"),
        ({"cuda": "12.6", "reason": "no devices"}, "it says: no devices; to run on the CPU"),
        ({"count": 1, "name": "GTX", "capability": (6, 1), "kernels": ("sm_75", "sm_90a")}, "no kernels for GTX"),
        ({"count": 1, "capability": (8, 9), "kernels": ("sm_90", "compute_90")}, r"capability 8\.9, built for sm_90"),
    ],
)
def test_what_keeps_torch_from_a_gpu_is_named(known, said):
    with pytest.raises(ConfigError, match=said):
        Graphics(shown="T4", driver=(12, 4), **known).check()


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [((8, 9), ("sm_80", "sm_90")), ((12, 0), ("sm_90", "compute_90")), ((9, 4), ("gfx942",)), ((9, 0), ("sm_90a",))],
)
def test_a_gpu_that_torch_has_kernels_for(capability, kernels):
    versions = {"driver": (13, 0), "torch": "2.11", "cuda": "13.0"}
    cards = {"count": 2, "name": "Card", "memory": 80 * 10**9, "capability": capability, "kernels": kernels}
    known = Graphics(shown="a device file", **versions, **cards)
    assert known.check() == "2 x Card, 80 GB, driver for CUDA 13.0; torch 2.11"


@pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler")
def test_the_drivers_cuda_version(tmp_path):
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
    source.write_text("int cuDriverGetVersion(int *version) { *version = 12040; return 0; }")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    assert machine.driver_cuda(str(library)) == (12, 4)
    assert machine.driver_cuda(str(tmp_path / "none.so")) is None


def test_what_the_compiler_lacks(tmp_path, monkeypatch):
    version = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    (tmp_path / "Python.h").touch()
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.missing_to_compile("cpu", str(tmp_path)) == "a C++ compiler (g++ or clang++)"
    said = f"a C compiler (gcc or clang) and Python.h (Debian and Ubuntu: apt-get install {version})"
    assert machine.missing_to_compile("cuda", str(tmp_path / "empty")) == said
    (tmp_path / "clang").write_text("#!/bin/sh\n")
    (tmp_path / "clang").chmod(0o755)
    assert machine.missing_to_compile("cuda", str(tmp_path)) == ""


def test_a_missing_compiler_is_a_note_unless_it_is_asked_for(check, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    said = []
    check(say=said.append, pretrain__compile="auto")
    assert said == [
        "compiler: not found: a C++ compiler (g++ or clang++); trainings are not compiled, and long ones take longer"
    ]
    with pytest.raises(ConfigError, match='compile = "on" needs a C'):
        check(pretrain__compile="on")


def test_the_memory_of_a_container(tmp_path):
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("1000000\n")
    assert machine.memory((tmp_path / "limit", tmp_path / "none")) == 10**6 < machine.memory((tmp_path / "max",))


def test_missing_and_old_packages_are_named_with_the_command(check, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "PROJECT", tmp_path)
    packages = '["torch>=99", "surely-not-there>=2", "numpy"]'
    (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = {packages}")
    with pytest.raises(ConfigError, match=r"missing: torch>=99 \(there is .*\), surely-not-there>=2: `pip install -c"):
        check()


def test_a_command_without_its_packages_names_one_and_the_way_out(tmp_path):
    script = "import sys; sys.modules['psutil'] = None; from study import cli; sys.exit(cli.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "package psutil is missing: `pip install -c requirements.lock -e .`" in done.stderr


def test_what_a_gpu_means_for_a_run(tmp_path):
    def found(check, preset="full", **known) -> list[str]:
        case = doctor.Case(Run.of("x", tmp_path / "x", load_preset(preset)), ["pretrain"])
        case.graphics = Graphics(**known)
        return list(check(case))

    (none,) = found(doctor._gpu)  # 6 x 253M x 600M operations at 1e12 a second
    assert isinstance(none, doctor.Note) and none == "none; one training alone takes more than 11 days on a CPU"
    _, note = found(doctor._gpu, count=1, name="Tesla T4", bf16=False)
    assert isinstance(note, doctor.Note) and note.startswith("Tesla T4 has no bf16, so trainings run in fp32")
    states = "GPU: 4.0 GB of weights and optimizer states, 0.8 GB a row"
    assert found(doctor._memory, count=1, memory=80 * 10**9)[0] == states
    assert found(doctor._memory, count=1, memory=12 * 10**9)[0] == (
        f"{states}; micro-batches of 32 rows are halved until they fit"
    )
    card = found(doctor._memory, "gpu", count=1, memory=12 * 10**9)[0]
    assert card == "GPU: 0.8 GB of weights and optimizer states, 0.3 GB a row"  # all 32 rows at a time
    with pytest.raises(ConfigError, match="needs 5 GB of a GPU to train one row at a time, T4 has 4 GB for it"):
        found(doctor._memory, count=1, name="T4", memory=4 * 10**9)
    assert "micro-batches" in found(doctor._memory, count=2, name="T4", memory=4 * 10**9)[0]  # split over both
