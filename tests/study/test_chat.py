"""Talking to checkpoints: `threefold chat` and `threefold generate --form`."""

import fcntl
import io
import os
import pty
import subprocess
import sys
import termios
import time
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from shared import call

from basics import paths
from basics.errors import DataError
from study import chat
from study.preset import load_preset
from study.run import open_stage
from threefold.config import ModelConfig, SourceConfig
from threefold.data import sources
from threefold.data.templates import FORMS, as_prompt_response, dialogue_prompt, instruction_prompt
from threefold.data.tokenizer import build_tokenizer
from threefold.model import Decoder, generate, save_checkpoint

TEXT = [
    "Ann met Bob. Then they went home.",
    "\n\nHuman: Who?\n\nAssistant: Bob.",
    "### Instruction:\nSay.\n\n### Response:\n",
]


@pytest.fixture(scope="module")
def parts():
    """An untrained model and its tokenizer."""
    preset = load_preset("smoke", {"tokenizer.vocab_size": 290})
    tokenizer = build_tokenizer(preset.tokenizer, TEXT * 3)
    torch.manual_seed(4)
    config = ModelConfig(n_layer=1, d_model=16, n_head=2, d_ff=32, context=64, vocab_size=len(tokenizer))
    model = Decoder(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(std=0.3)
    return model.eval(), tokenizer


@pytest.fixture
def run(parts, tmp_path, monkeypatch):
    """A finished run `tiny` of an untrained model in all three stages."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    for name in ("pretrain", "sft", "dpo"):
        stage = open_stage(name, preset="smoke", run="tiny")
        save_checkpoint(stage.begin(), *parts)
        stage.finish(tokens=1)
    return stage.run


def speaker(parts, form: str) -> chat.Speaker:
    return chat.Speaker("sft", form, *parts)


# Forms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "reader", "source"),
    [
        ("dialogue", "preferences", "sample-preferences"),
        ("instruction", "instructions", "sample-instructions"),
        ("question", "problems", "sample-problems"),
    ],
)
def test_a_form_asks_exactly_as_training_did(form, reader, source):
    for item in islice(sources.iterate(SourceConfig(source)), 40):
        prompt, _ = as_prompt_response(reader, item)
        if form == "instruction":
            asked = f"{item['instruction']} ### {item['input']}" if item["input"] else item["instruction"]
        elif form == "question":
            asked = item["question"]
        else:  # the last message, after the turns before it
            *before, asked = prompt.removesuffix("\n\nAssistant:").split("\n\nHuman: ")[1:]
            turns = [tuple(turn.split("\n\nAssistant: ")) for turn in before]
            assert dialogue_prompt(asked, turns) == prompt
            continue
        assert FORMS[form].prompt(asked) == prompt


def test_a_stage_is_asked_as_it_was_taught_to_answer():
    smoke = load_preset("smoke")
    assert chat.forms(smoke, "pretrain") == chat.forms(smoke, "gpt2") == ["text"]
    assert chat.forms(smoke, "sft-seed2") == ["instruction", "question"]
    assert chat.forms(smoke, "dpo") == ["instruction", "question", "dialogue"]
    pairs = [{"path": "pairs.jsonl", "reader": "preferences"}]
    assert chat.forms(load_preset("smoke", {"data.sft": pairs}), "dpo") == ["dialogue"]


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_an_answer_ends_at_a_stop_however_its_pieces_are_cut(size):
    text = "Bob.\n\nHu\n\nHuman: Who?"
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert "".join(chat.until(pieces, ["\n\nHuman:", "###"])) == "Bob.\n\nHu"
    assert "".join(chat.until(pieces, ["never"])) == text == "".join(chat.until(pieces, []))


def test_pieces_come_before_the_answer_is_whole():
    def pieces():
        yield from "ab"
        raise AssertionError("asked for more than was needed")

    assert list(islice(chat.until(pieces(), ["\n\n"]), 2)) == ["a", "b"]


def test_an_answer_is_what_generate_gives(parts):
    model, tokenizer = parts
    ids = tokenizer(instruction_prompt("Say."))["input_ids"]
    (new,) = generate(model, [ids], 12, eos_id=tokenizer.eos_token_id)
    said = "".join(speaker(parts, "instruction").answer("Say.", 12))
    assert said and tokenizer.decode(new, skip_special_tokens=True).lstrip().startswith(said)


def test_a_dialogue_remembers_and_forgets_what_no_longer_fits(parts):
    asked = speaker(parts, "dialogue")
    first = "".join(asked.answer("Who?", 4)).strip()
    assert asked.turns == [("Who?", first)]
    assert len(asked.ids("And then?")) > len(speaker(parts, "dialogue").ids("And then?"))
    for number in range(12):
        list(asked.answer(f"And {number}?", 4))
    assert asked.turns[-1][0] == "And 11?" and asked.turns[0][0] != "Who?"
    other = speaker(parts, "instruction")
    list(other.answer("Who?", 4))
    assert other.turns == []


def test_a_message_that_is_too_long_is_named(parts):
    with pytest.raises(DataError, match="the context 64: shorten it"):
        list(speaker(parts, "text").answer("Ann met Bob " * 40, 4))


def test_special_tokens_in_a_message_are_text(parts):
    _, tokenizer = parts
    ids = speaker(parts, "text").ids("a<|endoftext|>b")
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids[1:]) == "a<|endoftext|>b"


# Commands -------------------------------------------------------------------------------------------------------------


def typed(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(content)))


def test_chat_asks_all_stages_or_one(run, capsys, monkeypatch):
    typed(monkeypatch, b"Who?\n\n/new\nAnd \xff?")
    status, out, _ = call(capsys, "chat", "--run", "tiny", "--max-new-tokens", "3")
    assert status == 0
    assert [out.count(f"{stage}: ") for stage in ("pretrain", "sft", "dpo")] == [2, 2, 2]
    typed(monkeypatch, b"Who?\n")
    status, out, _ = call(capsys, "chat", "--run", "tiny", "--stage", "sft", "--max-new-tokens", "3")
    assert status == 0 and "sft" not in out
    typed(monkeypatch, b"")
    assert call(capsys, "chat", "--run", "tiny") == (0, "", "")


def test_generate_takes_a_form(run, capsys, parts):
    status, out, _ = call(capsys, "generate", "--run", "tiny", "--form", "instruction", "--max-new-tokens", "6", "Say.")
    assert status == 0 and out == "".join(speaker(parts, "instruction").answer("Say.", 6)) + "\n"
    status, _, error = call(capsys, "generate", "--run", "tiny", "--form", "dialogue", "--stream", "Say.")
    assert status == 2 and "--stream continues a text" in error and error.count("\n") == 1


def test_what_cannot_be_talked_to_is_one_line(run, capsys, monkeypatch):
    (run.path / "sft" / "run.json").unlink()
    typed(monkeypatch, b"Who?\n")
    status, _, error = call(capsys, "chat", "--run", "tiny", "--stage", "sft")
    assert status == 2 and "stage sft of run tiny" in error and error.count("\n") == 1
    status, _, error = call(capsys, "chat", "--run", "other")
    assert status == 2 and "no run 'other'" in error


@pytest.mark.parametrize("end", [b"\x04", b"\x03"], ids=["Ctrl-D", "Ctrl-C"])
def test_chat_at_a_terminal_ends_cleanly(run, end):
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "study", "chat", "--run", "tiny", "--max-new-tokens", "3"],
        stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C becomes a signal
        env={**os.environ, "THREEFOLD_RUNS": str(run.path.parent), "PYTHONPATH": str(paths.PACKAGES), "TERM": "dumb"},
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    until = time.monotonic() + 120
    while seen.count(b"> ") < 1 and time.monotonic() < until:
        seen += os.read(master, 4096)
    os.write(master, b"Who?\n")
    while seen.count(b"> ") < 2 and time.monotonic() < until:
        seen += os.read(master, 4096)
    time.sleep(0.5)  # a signal that comes before Python's readline waits is only seen at the next key
    os.write(master, end)
    assert process.wait(60) == 0 and process.stderr.read() == b""
    assert b"Ctrl-D ends" in seen and b"pretrain: " in seen and b"dpo: " in seen
