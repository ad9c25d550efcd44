"""`threefold generate` and `threefold export`: what is done with a stage's checkpoint."""

import argparse
from itertools import chain
from pathlib import Path

from basics.errors import ConfigError
from study.chat import Speaker
from study.cli import common


def generate(options: argparse.Namespace) -> int:
    """Prints the continuation of a prompt, at once or as a stream. A stream ends after as many tokens as asked for, or
    with Ctrl-C, which is a good end."""
    if not options.stream and (options.window or options.stop_at_eos):
        raise ConfigError(f"{'--window' if options.window else '--stop-at-eos'} goes with --stream")
    if options.stream and options.form != "text":
        raise ConfigError(f"--form {options.form} asks for an answer, which ends; --stream continues a text")
    folder = common.checkpoint(options)
    if any("\ud800" <= char <= "\udfff" for char in options.prompt):
        raise ConfigError("the prompt is not UTF-8: the shell handed over bytes that are no text")
    import torch  # late, as it takes seconds: after what can be refused without it

    from threefold import model as models
    from threefold.data.tokenizer import decode_stream, load_tokenizer

    tokenizer = load_tokenizer(folder)
    model = models.load_checkpoint(folder, device=models.pick_device())
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    sampling["generator"] = torch.Generator().manual_seed(options.seed)
    if options.form != "text":
        answer = Speaker(options.stage, options.form, model, tokenizer).answer
        for piece in chain(answer(options.prompt, options.max_new_tokens or 64, **sampling), ["\n"]):
            print(piece, end="", flush=True)
        return 0
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
        for piece in decode_stream(tokenizer, chain(prompt, new)):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        print(flush=True)
    return 0


def export(options: argparse.Namespace) -> int:
    folder, out = common.checkpoint(options), Path(options.out)
    from transformers.utils import logging

    from threefold.model import export

    logging.disable_progress_bar()
    kind = export(folder, out)
    print(f"{out}: stage {options.stage} of run {options.run} as {kind}, its logits checked against transformers'")
    return 0
