"""`threefold generate`: a checkpoint goes on with a prompt, once or as a stream."""

import argparse
from itertools import chain
from pathlib import Path

import torch

from threefold.data.tokenizer import decode_stream, load_tokenizer
from threefold.model import StreamingCache, load_checkpoint, stream
from threefold.model import generate as generated


def generate(options: argparse.Namespace, folder: Path) -> int:
    """Prints the continuation; returns the exit status."""
    tokenizer = load_tokenizer(folder)
    model = load_checkpoint(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    prompt = tokenizer(options.prompt, verbose=False)["input_ids"]  # verbose: a warning about the length, ours to judge
    sampling = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "generator": torch.Generator().manual_seed(options.seed),
    }
    if options.stream:
        return _stream(options, tokenizer, model, prompt, sampling)
    (new,) = generated(model, [prompt], options.max_new_tokens or 64, eos_id=tokenizer.eos_token_id, **sampling)
    print(tokenizer.decode([*prompt, *new], skip_special_tokens=True))
    return 0


def _stream(options: argparse.Namespace, tokenizer, model, prompt: list[int], sampling: dict) -> int:
    """Prints until as many tokens as asked for have come, or Ctrl-C, which is a good end. Unless the text may end at
    EOS, that is never drawn: a model with sinks has not learned how text goes on after it."""
    eos = tokenizer.eos_token_id
    new = stream(
        model,
        prompt,
        StreamingCache.of(model, 1, options.window or -1),
        options.max_new_tokens or -1,
        eos_id=eos if options.stop_at_eos else None,
        suppress=() if options.stop_at_eos else (eos,),
        **sampling,
    )
    try:
        for piece in decode_stream(tokenizer, chain(prompt, new)):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        print(flush=True)
    return 0
