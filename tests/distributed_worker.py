"""The trainings of tests/threefold/test_distributed.py. As a script, started by torchrun: what each worker trains."""

import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from shared import counting

from threefold.config import ModelConfig, TrainConfig
from threefold.data.packing import pack_documents, pack_examples, pack_pairs
from threefold.model.decoder import Decoder
from threefold.training import Distillation, NextToken, Preference, Trained, distributed, half_depth, train
from threefold.training.state import STATE

EOS, SINK, VOCABULARY = 0, 1, 37  # a table of 37 rows does not halve, nor do three matrices of a shape
TINY = ModelConfig(n_layer=3, d_model=16, n_head=2, d_ff=24, context=24, vocab_size=VOCABULARY)
SAVED = 20  # step of the only state before the last one
# fp32: another cut of a batch sums in another order, which bf16 would show. Two workers cut the 12 rows into 4 x 3.
COMMON: dict[str, Any] = {"batch_size": 4, "accumulate": 3, "precision": "fp32", "evaluate_every": 8}


def model(seed: int = 0) -> Decoder:
    decoder = Decoder(TINY)
    decoder.initialise(torch.Generator().manual_seed(seed))
    return decoder


def documents(seed: int, n: int):
    return pack_documents(counting(seed, n, 2, 40), TINY, EOS, [SINK])


def settings(folder: Path) -> dict[str, Any]:
    return {"folder": folder, "seed": 5, "device": "cpu", "progress": lambda message: None}


def pretrain(folder: Path, objective=None, **changes) -> Trained:
    config = TrainConfig(steps=50, checkpoint_every=SAVED, **COMMON, **changes)
    objective = objective or NextToken()
    return train(model(), objective, documents(1, 90), config, heldout=documents(2, 27), **settings(folder))


def sft(folder: Path, **changes) -> Trained:
    prompts, responses = counting(3, 40, 1, 8), counting(4, 40, 1, 9)
    rows = pack_examples(list(zip(prompts, responses, strict=True)), TINY, EOS, [SINK])
    config = TrainConfig(steps=20, replay=0.3, **COMMON, **changes)
    return train(model(1), NextToken(), rows, config, heldout=rows, replay=documents(1, 30), **settings(folder))


def preferences():
    parts = zip(counting(5, 29, 1, 6), counting(6, 29, 1, 6), counting(7, 29, 1, 12), strict=True)
    return pack_pairs(list(parts), TINY, EOS, [SINK])


def dpo(folder: Path, **changes) -> Trained:
    pairs = preferences()
    config = TrainConfig(steps=20, optimizer="adamw", learning_rate=1e-3, **COMMON, **changes)
    return train(model(2), Preference(config.beta), pairs, config, heldout=pairs, **settings(folder))


def distil(folder: Path, **changes) -> Trained:
    config = TrainConfig(steps=10, optimizer="adamw", **COMMON, **changes)
    teacher = model(3)
    objective, heldout = Distillation(teacher), documents(2, 27)
    return train(half_depth(teacher), objective, documents(1, 90), config, heldout=heldout, **settings(folder))


class Killed(Exception):
    pass


class Stops(NextToken):
    """Raises in the first step after a state was saved in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, decoder, batch):
        # the state is written in a thread: all workers stop together, where the first of them sees it
        (seen,) = distributed.current().totals(int((self.folder / STATE).exists()))
        if seen:
            raise Killed
        return super().__call__(decoder, batch)

    def for_heldout(self):
        return NextToken()


def killed(folder: Path, **changes) -> None:
    """Pretraining that ends right after its first state is saved."""
    with contextlib.suppress(Killed):
        pretrain(folder, Stops(folder), **changes)


class Signalled(NextToken):
    """Its second worker gets a Ctrl-C in a given call."""

    def __init__(self, call: int):
        self.left = call

    def __call__(self, decoder, batch):
        self.left -= 1
        if self.left == 0 and distributed.current().rank == 1:
            signal.raise_signal(signal.SIGINT)
        return super().__call__(decoder, batch)

    def for_heldout(self):
        return NextToken()


def worker(out: Path) -> None:
    with distributed.joined():
        with contextlib.suppress(KeyboardInterrupt):
            pretrain(out / "interrupted", Signalled(2 * 5 + 1))  # in the 6th step; all workers end after the 7th
        pretrain(out / "pretrain")
        pretrain(out / "pretrain-split", shard="on")
        killed(out / "resumed")
        killed(out / "resumed-split", shard="on")
        pretrain(out / "resumed-by-two", shard="on")
        sft(out / "sft")
        dpo(out / "dpo")
        dpo(out / "dpo-split", shard="on")
        distil(out / "distil-split", shard="on")


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
