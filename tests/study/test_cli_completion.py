"""The completion script, asked by bash itself."""

import argparse
import shutil
import subprocess

import pytest

from study import cli
from study.cli.completion import script
from study.preset import preset_names

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash completes")


def complete(folder, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    asked = " ".join(f"'{word}'" for word in words)
    text = f"{script(cli.parser(), 'bash')}\nCOMP_WORDS=({asked}); COMP_CWORD={len(words) - 1}; _threefold\n"
    text += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-uc", text], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return found.choices


def test_commands_options_and_values(tmp_path, monkeypatch):
    monkeypatch.delenv("THREEFOLD_RUNS", raising=False)
    assert complete(tmp_path, "threefold", "st") == ["status"]
    assert set(commands()) < set(complete(tmp_path, "threefold", ""))
    for name, command in commands().items():
        assert set(complete(tmp_path, "threefold", name, "--")) == {
            flag for flag in command._option_string_actions if flag.startswith("--")
        }
    assert complete(tmp_path, "threefold", "run", "--preset", "") == preset_names()
    assert complete(tmp_path, "threefold", "generate", "--run", "smoke", "--stage", "d") == ["dpo", "distilgpt2"]
    assert complete(tmp_path, "threefold", "completion", "z") == ["zsh"]
    assert complete(tmp_path, "threefold", "no-such-command", "") == []


@pytest.mark.parametrize("words", [("status", "--run"), ("clean", "--run"), ("compare", "trial")])
def test_names_of_runs(tmp_path, monkeypatch, words):
    monkeypatch.delenv("THREEFOLD_RUNS", raising=False)
    assert complete(tmp_path, "threefold", *words, "s") == []  # no runs folder, and no error
    for name in ("smoke", "small.2", "trial"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").touch()
    (tmp_path / "runs" / "stray").mkdir()
    assert sorted(complete(tmp_path, "threefold", *words, "s")) == ["small.2", "smoke"]
    monkeypatch.setenv("THREEFOLD_RUNS", str(tmp_path / "elsewhere"))
    assert complete(tmp_path, "threefold", *words, "s") == []


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_reads_the_same_script(tmp_path):
    text = script(cli.parser(), "zsh") + "\nwhence -w _threefold; print ${_comps[threefold]}"
    done = subprocess.run(["zsh", "-fc", text], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "_threefold: function" in done.stdout and "_bash_complete" in done.stdout
