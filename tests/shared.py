"""What several test modules begin with."""

import os
from pathlib import Path

import torch

from study import cli

# The trainings of a preset, each of one step.
ONE_STEP = "".join(f"[{name}]\nsteps = 1\n" for name in ("pretrain", "gpt2", "distilgpt2", "sft", "dpo"))

# What a preset names for them that `threefold run` executes.
SAMPLE_DATA = """
[data]
pretrain = [{source = "sample-text"}]
pretrain_heldout = [{source = "sample-text", split = "validation"}]
sft = [{source = "sample-instructions"}]
sft_heldout = [{source = "sample-instructions", split = "test"}]
dpo = [{source = "sample-preferences"}]
dpo_heldout = [{source = "sample-preferences", split = "test"}]
"""


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command."""
    try:
        status = cli.main(arguments)
    except SystemExit as left:
        status = left.code
    return status, *capsys.readouterr()


def flip(file: Path, place: int = -1) -> None:
    """Change one bit of a file and nothing of its size and times."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def counting(seed: int, n: int, low: int, high: int, vocabulary: int = 37) -> list[list[int]]:
    """Sequences that count up, which a small model learns; ids 0 and 1 are left to EOS and the sink."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, vocabulary - 2, (n,), generator=generator).tolist()
    lengths = torch.randint(low, high, (n,), generator=generator).tolist()
    return [[2 + (a + i) % (vocabulary - 2) for i in range(m)] for a, m in zip(starts, lengths, strict=True)]


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with every weight large and random, so that an error in any part of it shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()
