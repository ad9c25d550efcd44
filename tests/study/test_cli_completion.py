"""Completion: the words that the command offers, and a shell that asks it."""

import argparse
import os
import shutil
import subprocess
import sys

import pexpect
import pytest

from basics import paths
from study import cli
from study.preset import preset_names


def complete(folder, *words: str) -> list[str]:
    """What bash offers for the last of the words: what the command that it registered prints."""
    line = " ".join(words)
    done = subprocess.run(
        [sys.executable, "-m", "study", "completion", "words", "threefold", words[-1], words[-2]],
        cwd=folder,
        env=os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(paths.PACKAGES)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return found.choices


def test_commands_options_and_values(tmp_path):
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
    monkeypatch.setenv("THREEFOLD_RUNS", str(tmp_path / "runs"))
    assert complete(tmp_path, "threefold", *words, "s") == []  # no runs folder, and no error
    for name in ("smoke", "small.2", "trial"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").touch()
    (tmp_path / "runs" / "stray").mkdir()
    assert sorted(complete(tmp_path, "threefold", *words, "s")) == ["small.2", "smoke"]
    monkeypatch.setenv("THREEFOLD_RUNS", str(tmp_path / "elsewhere"))
    assert complete(tmp_path, "threefold", *words, "s") == []


@pytest.fixture
def on_path(tmp_path):
    """Environment with the command `threefold` in it."""
    command = tmp_path / "bin" / "threefold"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m study "$@"\n')
    command.chmod(0o755)
    return os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(paths.PACKAGES)}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_puts_the_only_word_that_fits_on_the_line(on_path):
    shell = pexpect.spawn("bash", ["--norc", "--noprofile", "-i"], env=on_path, timeout=60)
    shell.sendline('eval "$(threefold completion bash)"')
    shell.send("threefold generate --stage distil\t")
    shell.expect("--stage distilgpt2 ")
    shell.close(force=True)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_reads_the_same_command(on_path):
    text = 'eval "$(threefold completion zsh)"\nprint ${_comps[threefold]}'
    done = subprocess.run(["zsh", "-fc", text], env=on_path, capture_output=True, text=True, check=True)
    assert "_bash_complete -o default -C" in done.stdout
