"""What a late stage needs is asked before the first one starts."""

import importlib.util
import shutil
from types import SimpleNamespace

import psutil
import pytest
from shared import call

from basics import paths
from basics.errors import ConfigError, EvaluationError, SourceError, ThreefoldError
from study import checks, needs
from study.preset import load_preset, override
from study.run import Run
from threefold.data import hub


@pytest.fixture
def check(tmp_path, monkeypatch):
    """`needs.check` of a smoke run with some keys changed."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)

    def check(selected=None, **changes):
        preset = override(load_preset("smoke"), {key.replace("__", "."): value for key, value in changes.items()})
        needs.check(Run.of("x", tmp_path / "runs" / "x", preset), selected)

    return check


def external(location: str) -> list[dict]:
    return [{"name": "other", "location": location}]


def test_a_run_with_all_it_needs_passes(check):
    check()


def test_a_model_folder_without_its_files_is_named(check, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(SourceError, match=r"model other: model holds no config\.json"):
        check(baselines__external=external("model"))
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"model other: model holds no model\*\.safetensors"):
        check(baselines__external=external("model"))
    (tmp_path / "model" / "model-00001-of-00002.safetensors").touch()
    check(baselines__external=external("model"))
    check(selected={"data", "pretrain"}, baselines__external=external("nowhere/at/all"))  # not loaded by these


def test_a_model_of_the_hub_is_asked_for(check, monkeypatch):
    with pytest.raises(SourceError, match="model other: no folder /no/such/folder, and no name on the hub"):
        check(baselines__external=external("/no/such/folder"))

    def unreachable(location, revision, kind):
        raise SourceError(f"the hub did not give {location} (no network)")

    monkeypatch.setattr(hub, "resolve_commit", unreachable)
    with pytest.raises(
        SourceError, match="model gpt2: no folder owner/gpt2, not in the Hugging Face cache, and the hub"
    ):
        check(baselines__gpt2="owner/gpt2", baselines__distilgpt2="owner/distilgpt2")
    monkeypatch.setattr(hub, "resolve_commit", lambda *asked: 40 * "0")
    check(baselines__gpt2="owner/gpt2", baselines__distilgpt2="owner/distilgpt2")


def test_a_package_that_reads_the_file_is_asked_for(check, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(ConfigError, match="needs accelerate: `pip install accelerate`"):
        check(baselines__external=external("package:some/model.gguf"))


def test_memory_and_disk_are_counted_before(check, monkeypatch):
    monkeypatch.setattr(needs, "has_gpu", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10**9))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=0))
    check()
    with pytest.raises(ConfigError, match=r"model\.d_model = 4096\) needs \d+ GB to train, this machine has 1 GB"):
        check(model__d_model=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    with pytest.raises(ThreefoldError, match=r"0\.0 GB are free: `threefold clean`"):
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
