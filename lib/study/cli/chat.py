"""`threefold chat`: the checkpoints of a run answer what is typed, or what stands in the lines of stdin."""

import argparse
import contextlib
import sys

import torch

from basics.errors import DataError, MissingInput
from study import chat as conversations
from study.cli import common
from study.preset import lineage


def chat(options: argparse.Namespace) -> int:
    run = common.open_existing(options.run)
    stages = [options.stage] if options.stage else [name for name in lineage(run.preset) if run.finished(name)]
    if not stages:
        raise MissingInput(f"run {run.name} has no finished stage to talk to: `threefold run --run {run.name}`")
    speakers = []
    for stage in stages:
        folder = common.checkpoint(argparse.Namespace(run=run.name, stage=stage))
        form = options.form or conversations.forms(run.preset, stage)[0]
        speakers.append(conversations.Speaker.load(stage, form, folder))
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    sampling["generator"] = torch.Generator().manual_seed(options.seed)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # Windows has its own
            import readline  # noqa: F401  (arrow keys and earlier lines)
        asked = ", ".join(f"{speaker.name} by {speaker.form}" for speaker in speakers)
        common.say(f"Asked: {asked}; --form chooses another. /new forgets what was said, Ctrl-D ends.")
    try:
        while (message := _message(terminal)) is not None:
            if message == "/new":
                for speaker in speakers:
                    speaker.turns.clear()
            elif message:
                for speaker in speakers:
                    _say(speaker, message, len(speakers) > 1, options.max_new_tokens, sampling)
    except KeyboardInterrupt:
        print()
    return 0


def _message(terminal: bool) -> str | None:
    """The next line without spaces around it, bytes that are no text replaced; None where there is none."""
    try:
        line = input("> ") if terminal else sys.stdin.buffer.readline().decode(errors="replace")
    except EOFError:
        print()
        return None
    return line.encode(errors="replace").decode().strip() if terminal or line else None


def _say(speaker: conversations.Speaker, message: str, named: bool, most: int, sampling: dict) -> None:
    print(f"{speaker.name}: " if named else "", end="", flush=True)
    try:
        for piece in speaker.answer(message, most, **sampling):
            print(piece, end="", flush=True)
    except DataError as error:
        print(f"({error})", end="")
    print(flush=True)
