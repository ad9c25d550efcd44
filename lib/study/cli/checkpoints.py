"""`threefold generate`, `threefold chat` and `threefold export`: what is done with the checkpoints of a run."""

import argparse
import contextlib
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from basics import files
from basics.errors import ConfigError, DataError, MissingInput
from study import existing
from study.chat import Speaker, forms
from study.cli import common
from study.preset import lineage
from threefold.config import check_sampling

# torch is imported late, as it takes seconds: after what can be refused without it


def generate(options: argparse.Namespace) -> int:
    """Prints the continuation of a prompt, at once or as a stream. A stream ends after as many tokens as asked for, or
    with Ctrl-C, which counts as success."""
    if not options.stream and (options.window or options.stop_at_eos):
        raise ConfigError(f"{'--window' if options.window else '--stop-at-eos'} goes with --stream")
    if options.stream and options.form != "text":
        raise ConfigError(f"--form {options.form} asks for an answer, which ends; --stream continues a text")
    sampling = _sampling(options)
    folder = common.checkpoint(options)
    if any("\ud800" <= char <= "\udfff" for char in options.prompt):
        raise ConfigError("the prompt is not UTF-8: the shell passed bytes that are not text")
    from threefold import model as models
    from threefold.data.tokenizer import decode_stream

    speaker = Speaker.load(options.stage, options.form, folder)
    sampling["generator"] = _generator(options)
    if options.form != "text":
        _print(chain(speaker.answer(options.prompt, options.max_new_tokens or 64, **sampling), ["\n"]))
        return 0
    model, tokenizer = speaker.model, speaker.tokenizer
    prompt = tokenizer(options.prompt, verbose=False)["input_ids"]  # verbose: a warning about the length, ours to judge
    eos, most = tokenizer.eos_token_id, options.max_new_tokens
    if not options.stream:
        (new,) = models.generate(model, [prompt], most or 64, eos_id=eos, **sampling)
        print(tokenizer.decode([*prompt, *new], skip_special_tokens=True))
        return 0
    # Unless the text may end at EOS, it is never drawn: a model with sinks has not learned how text continues after it.
    ends = {"eos_id": eos} if options.stop_at_eos else {"eos_id": None, "suppress": (eos,)}
    cache = models.StreamingCache.of(model, 1, options.window or -1)
    new = models.stream(model, prompt, cache, most or -1, **ends, **sampling)
    try:
        _print(decode_stream(tokenizer, chain(prompt, new)))
    except KeyboardInterrupt:
        pass
    finally:
        print(flush=True)
    return 0


def chat(options: argparse.Namespace) -> int:
    """The checkpoints of a run answer what is typed, or the lines of stdin."""
    sampling = _sampling(options)
    run = existing.open_existing(options.run)
    stages = [options.stage] if options.stage else [name for name in lineage(run.preset) if run.finished(name)]
    if not stages:
        raise MissingInput(f"run {run.name} has no finished stage to talk to: `threefold run --run {run.name}`")
    speakers = []
    for stage in stages:
        folder = common.checkpoint(argparse.Namespace(run=run.name, stage=stage))
        speakers.append(Speaker.load(stage, options.form or forms(run.preset, stage)[0], folder))
    sampling["generator"], terminal = _generator(options), sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # Windows has its own
            import readline  # noqa: F401  (arrow keys and earlier lines)
        asked = ", ".join(f"{speaker.name} by {speaker.form}" for speaker in speakers)
        common.say(f"Asked: {asked}; --form chooses another. /new forgets what was said, Ctrl-D ends.")
    try:
        while (message := _message(terminal)) is not None:
            for speaker in speakers:
                if message == "/new":
                    speaker.turns.clear()
                elif message:
                    print(f"{speaker.name}: " if len(speakers) > 1 else "", end="", flush=True)
                    try:
                        _print(speaker.answer(message, options.max_new_tokens, **sampling))
                    except DataError as error:
                        print(f"({error})", end="")
                    print(flush=True)
    except KeyboardInterrupt:
        print()
    return 0


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    settings = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    check_sampling(**settings)
    return settings


def _generator(options: argparse.Namespace) -> Any:
    import torch

    return torch.Generator().manual_seed(options.seed)


def _print(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)


def _message(terminal: bool) -> str | None:
    """The next line without spaces around it, bytes that are not text replaced; None at the end."""
    try:
        line = input("> ") if terminal else sys.stdin.buffer.readline().decode(errors="replace")
    except EOFError:
        print()
        return None
    return line.encode(errors="replace").decode().strip() if terminal or line else None


def export(options: argparse.Namespace) -> int:
    folder, out = common.checkpoint(options), Path(options.out)
    files.require_empty(out)
    from transformers.utils import logging

    from threefold.model import export

    logging.disable_progress_bar()
    kind = export(folder, out)
    print(f"{out}: stage {options.stage} of run {options.run} as {kind}, its logits checked against transformers'")
    return 0
