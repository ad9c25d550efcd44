"""The data and the model that all contestants of a part share, built identically in each process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from threefold.config import ModelConfig, SourceConfig, TokenizerConfig
from threefold.data import corpus, sources
from threefold.data.packing import PackedRows, pack_documents
from threefold.data.templates import as_prompt_response
from threefold.data.tokenizer import build_tokenizer, encode, sink_ids
from threefold.model import Decoder

HELD_OUT = 100  # stories
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # the real data, where it lies beside the project


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of one round of each part."""

    model: ModelConfig
    rows: int  # of a step of pretraining
    examples: int  # of a step of fine-tuning
    pairs: int  # of a step of DPO
    steps: int  # of one round of training
    reference: int  # pairs of one reference pass
    items: int  # scored in a round
    shots: int
    prompts: int  # continued in a round
    new_tokens: int
    stories: int  # read to train the tokenizer and the model on


SIZES = {
    "7m": Size(
        ModelConfig(n_layer=8, d_model=256, n_head=4, d_ff=704, context=256, vocab_size=4096),
        rows=16, examples=32, pairs=16, steps=4, reference=64, items=128, shots=3, prompts=32, new_tokens=64,
        stories=4000,
    ),
    "tiny": Size(
        ModelConfig(n_layer=2, d_model=32, n_head=2, d_ff=64, context=192, vocab_size=1024),
        rows=2, examples=4, pairs=2, steps=2, reference=4, items=6, shots=2, prompts=3, new_tokens=6,
        stories=300,
    ),
}  # fmt: skip

REAL = {"stories": "tinystories", "examples": "alpaca", "pairs": "hh-rlhf", "sentiment": "sst2", "vocabulary": "4096"}
SAMPLE = {
    "stories": "sample-stories",
    "examples": "sample-instructions",
    "pairs": "sample-preferences",
    "sentiment": "sample-sentiment",
    "vocabulary": "960",
}


class Setup:
    """data: "real" (`../shared/data` or $THREEFOLD_DATA), "sample" (the embedded one) or "auto": real if present.

    used: what has been asked for, by name: its source, how many items, and their tokens: the mean, and the range of
        nine in ten.
    """

    SPLITS: ClassVar = {"examples": "train", "pairs": "test"}  # of a local folder's HH-RLHF the small files suffice

    def __init__(self, size: str = "7m", data: str = "auto"):
        self.size = SIZES[size]
        self.folder = "" if data == "sample" else sources.local_folder() or (SHARED if SHARED.is_dir() else "")
        if data == "real" and not self.folder:
            raise SystemExit("data: no ../shared/data and no $THREEFOLD_DATA; --data sample runs without")
        self.names = REAL if self.folder else SAMPLE
        self.used: dict[str, dict[str, Any]] = {}

    def _note(self, what: str, items: Sequence[Sequence[int] | tuple], called: str = "") -> None:
        """Keep how long items are: of a tuple, its parts together. what: as in `names`; called: in the pages."""
        lengths = [sum(map(len, item)) if isinstance(item, tuple) else len(item) for item in items]
        low, high = np.quantile(lengths, [0.05, 0.95])
        self.used[called or what] = {
            "source": self.names[what],
            "items": len(items),
            "tokens": [float(np.mean(lengths)), float(low), float(high)],
            "vocabulary": len(self.tokenizer),
        }

    def _items(self, what: str, n: int, split: str = "train", skip: int = 0) -> list[Any]:
        source = SourceConfig(source=self.names[what], split=split, max_examples=n, skip_examples=skip)
        return sources.load(source, self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        texts = [*self.stories, *("".join(self._text(what, item)) for what, item in self._labelled())]
        config = TokenizerConfig(kind="train", vocab_size=int(self.names["vocabulary"]))
        return build_tokenizer(config, texts, self.size.model.sinks, context=self.size.model.context)

    @cached_property
    def stories(self) -> list[str]:
        source = SourceConfig(source=self.names["stories"], max_examples=self.size.stories)
        return list(corpus.texts(source, self.folder))

    def _labelled(self) -> Iterator[tuple[str, Any]]:
        for what, reader in (("examples", "instructions"), ("pairs", "preferences")):
            yield from ((reader, item) for item in self._items(what, 500, self.SPLITS[what]))

    @staticmethod
    def _text(reader: str, item: Any) -> tuple[str, str]:
        return as_prompt_response(reader, item)

    @property
    def sinks(self) -> list[int]:
        return sink_ids(self.tokenizer)

    @property
    def eos(self) -> int:
        return self.tokenizer.eos_token_id

    def model(self) -> Decoder:
        """Seeded weights, every matrix drawn: with the projections of a fresh model, which are 0, no check of what is
        computed would see the blocks."""
        generator = torch.Generator().manual_seed(0)
        model = Decoder(self.size.model)
        model.initialise(generator)
        with torch.no_grad():
            for block in model.blocks:
                for weight in (block.attention.o.weight, block.ffn.down.weight):
                    weight.normal_(std=0.02, generator=generator)
        return model

    def small(self, layers: int, width: int, d_ff: int) -> tuple[ModelConfig, PackedRows, PackedRows]:
        """A model of heads of 64 and 128 positions, and rows of stories: to train on, and the last `HELD_OUT`."""
        sizes = {"n_layer": layers, "d_model": width, "n_head": width // 64, "d_ff": d_ff}
        model = ModelConfig(**sizes, context=128, vocab_size=len(self.tokenizer))
        stories = [ids.tolist() for ids in encode(self.tokenizer, self.stories)]
        rows, heldout = (
            pack_documents(part, model, self.eos, self.sinks) for part in (stories[:-HELD_OUT], stories[-HELD_OUT:])
        )
        return model, rows, heldout

    def stream(self) -> list[int]:
        """The stories as one document: every packed row is full and sees only its own past, as in a plain loop."""
        ids: list[int] = []
        stories = list(encode(self.tokenizer, self.stories))
        self._note("stories", stories)
        for story in stories:
            ids += [*story.tolist(), self.eos]
        return ids

    def examples(self, n: int) -> list[tuple[list[int], list[int]]]:
        """(prompt, response) ids of the first examples that fit a row."""
        texts = [self._text("instructions", item) for item in self._items("examples", 2 * n, self.SPLITS["examples"])]
        return self._fitting("examples", texts, n)

    def pairs(self, n: int) -> list[tuple[list[int], list[int], list[int]]]:
        """(prompt, chosen, rejected) ids of the first pairs that fit a row."""
        items = self._items("pairs", 3 * n, self.SPLITS["pairs"])
        texts = [(item["prompt"], item["chosen"], item["rejected"]) for item in items]
        return self._fitting("pairs", texts, n)

    def _fitting(self, what: str, texts: list[tuple[str, ...]], n: int) -> list[tuple[list[int], ...]]:
        # EOS ends a response; what is left out are the few long ones that TRL would cut and we would not train on.
        room = self.size.model.context - self.size.model.sinks
        encoded = zip(
            *([ids.tolist() for ids in encode(self.tokenizer, part)] for part in zip(*texts, strict=True)), strict=True
        )
        fitting = [ids for ids in encoded if all(map(len, ids)) and len(ids[0]) + max(map(len, ids[1:])) < room]
        if len(fitting) < n:
            raise SystemExit(f"only {len(fitting)} of {len(texts)} texts fit the context; {n} are needed")
        self._note(what, fitting[:n])
        return fitting[:n]

    def sentiment(self) -> tuple[list[dict], list[dict]]:
        """(items to score, demonstrations)."""
        items = self._items("sentiment", self.size.items, "validation")
        self._note("sentiment", list(encode(self.tokenizer, [item["sentence"] for item in items])), "sentences")
        return items, self._items("sentiment", 50, "train")

    def prompts(self) -> list[list[int]]:
        """Starts of stories of several lengths, BOS first."""
        texts = encode(self.tokenizer, self.stories[: self.size.prompts])
        prompts = [[*self.sinks, *ids.tolist()[: 8 + 5 * index % 41]] for index, ids in enumerate(texts)]
        self._note("stories", prompts, "starts of stories")
        return prompts
