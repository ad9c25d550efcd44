"""`threefold new`: a preset for a person's own text, instructions and preferences, with held-out parts split off.

The text of the preset is in new.toml; lines `#: NAME` divide it into parts that are used or left out.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from string import Template
from typing import Any

import psutil

from basics import paths
from basics.errors import ConfigError, DataError, SourceError
from basics.files import atomic_folder
from basics.machine import cores
from basics.names import check_name
from study import checks
from study.preset import OWN_MODELS, load_preset, preset_names
from study.sizes import TRAINING_BYTES, parameters
from threefold.config import SourceConfig
from threefold.data import sources
from threefold.data.templates import as_document
from threefold.graphics import Graphics

COLUMNS = {  # of the rows that each option reads, for messages
    "text": "plain text (.txt, .md), or rows with a column text",
    "instructions": "rows with the columns instruction, output and, where there is one, input",
    "preferences": "rows with the columns prompt, chosen and rejected",
}
PASSAGE = 600  # characters
# A passage ends at a blank line, else at a line's end, else between words, else anywhere.
_PASSAGES = re.compile(
    rf"(.{{1,{PASSAGE}}}\Z)|(.{{200,{PASSAGE}}})\n\s*\n|(.{{200,{PASSAGE}}})\n|(.{{1,{PASSAGE}}})\s|(.{{1,{PASSAGE}}})",
    re.S,
)
LEAST = 20  # passages, examples or pairs
HELD_OUT = {  # of each input: name of the part, share, most items
    "text": (("validation", 0.05, 200), ("test", 0.05, 200)),
    "instructions": (("heldout", 0.1, 500),),
    "preferences": (("heldout", 0.1, 500),),
}
LEAST_HELD_OUT = 5
BYTES_PER_TOKEN = 3  # of a small vocabulary, rather too few than too many


# Sizes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What sizes are chosen for. memory: bytes of the GPU, or of the computer where there is none."""

    cores: int
    memory: int
    gpu: str = ""

    @classmethod
    def this(cls) -> "Machine":
        graphics = Graphics.read()
        return cls(cores(), graphics.memory or psutil.virtual_memory().total, graphics.name)

    @property
    def flops(self) -> float:
        """Floating-point operations a second that training is assumed to reach: deliberately low."""
        return 5e13 if self.gpu else 1e10 * self.cores

    def __str__(self) -> str:
        return self.gpu or f"{self.cores} CPU core{'s' * (self.cores > 1)} and {self.memory / 2**30:.0f} GiB of memory"


SECONDS = 90  # for one training of a model
MODELS = ((6, 512, 8, 1408), (4, 256, 4, 768), (2, 128, 4, 320))  # n_layer, d_model, n_head, d_ff; the largest first
REPEATS = 10  # readings of the text in a training, where the time allows them


def sizes(machine: Machine, text_bytes: int, words: int, example_bytes: Sequence[int] = ()) -> dict[str, Any]:
    """Keys of a preset's [model], [tokenizer] and trainings, chosen for a machine and its data.

    The model is the largest that has no more parameters than tokens to train on.

    words: different words of the text, of which the tokenizer's vocabulary takes at most half. example_bytes: lengths
    of the instructions and preferences; nine in ten are to fit the context, a power of two.
    """
    longest = sorted(example_bytes)[int(0.9 * (len(example_bytes) - 1))] / BYTES_PER_TOKEN if example_bytes else 0
    most = 1024 if machine.gpu else 512
    context = next((size for size in (128, 256, 512) if longest + 2 <= size <= most), most)
    available = text_bytes // BYTES_PER_TOKEN
    for shape in MODELS:
        n_layer, d_model, _, d_ff = shape
        vocab_size = max(258, (258 + min(words // 2, 16 * d_model)) // 64 * 64)  # 258: bytes, end of text and a sink
        size = parameters(n_layer, d_model, d_ff, 0, vocab_size)
        tokens = min(REPEATS * available, int(SECONDS * machine.flops / (6 * size)))
        # and fp32 activations of a batch of eight rows, forward and backward
        memory = TRAINING_BYTES * size + 8 * context * 4 * (40 * n_layer * d_model + 3 * vocab_size)
        if size <= tokens and memory <= machine.memory / 4:
            break
    tokens = max(8 * context, tokens)
    named = dict(zip(("n_layer", "d_model", "n_head", "d_ff"), shape, strict=True))
    return {**named, "context": context, "vocab_size": vocab_size, "parameters": size, "tokens": tokens}


# Data ---------------------------------------------------------------------------------------------------------------


def passages(text: str) -> list[str]:
    """A text in passages of at most PASSAGE characters, cut at blank lines where there are some."""
    cut = (match[match.lastindex].strip() for match in _PASSAGES.finditer(text))
    return [passage for passage in cut if passage]


@dataclass(frozen=True)
class Input:
    """A person's own data, split. parts: {"train": items, "heldout": items}, in the order in which they were given."""

    kind: str
    file: str
    parts: dict[str, list[Any]]
    duplicates: int

    @classmethod
    def read(cls, kind: str, given: str) -> "Input":
        """kind: "text", "instructions" or "preferences". given: a file, or a folder of files.

        What is held out is decided by each item's SHA-256, so that the same data is always split in the same way.
        Raises SourceError or DataError, with the file.
        """
        path = paths.expanded(given).absolute()
        if not os.path.exists(path):
            raise SourceError(f"--{kind} {given}: no such file or folder")
        try:
            source = SourceConfig(path=str(path), reader=kind)
            resolved, items = sources.resolve(source), sources.load(source)
        except (DataError, SourceError) as error:
            raise type(error)(f"{error}; --{kind} reads {COLUMNS[kind]}") from None
        if kind == "text":
            items = [passage for text in items for passage in passages(text)]
        keyed = {sha256(json.dumps(item).encode()).hexdigest(): item for item in reversed(items)}
        if len(keyed) < LEAST:
            what = f"passages of at most {PASSAGE} characters" if kind == "text" else "different rows"
            raise DataError(
                f"{given}: {len(keyed)} {what}, too little to train and to measure: --{kind} needs {LEAST} or more"
            )
        order, parts = sorted(keyed), {}
        for name, share, most in HELD_OUT[kind]:
            size = max(LEAST_HELD_OUT, min(most, round(share * len(keyed))))
            parts[name], order = set(order[:size]), order[size:]
        parts["train"] = set(order)
        parts = {name: [keyed[key] for key in reversed(keyed) if key in keys] for name, keys in parts.items()}
        left_out = f", not {'; '.join(resolved.left_out)}" if resolved.left_out else ""
        read = f"{given} ({', '.join(resolved.names)}{left_out})" if path.is_dir() else given
        return cls(kind, read, parts, len(items) - len(keyed))

    def write(self, folder: Path) -> None:
        """One JSONL file a part. The sides of a pair are written with their prompt, as whole dialogues."""
        for name, items in self.parts.items():
            rows = [{"text": item} if self.kind == "text" else item for item in items]
            if self.kind == "preferences":
                sides = ("chosen", "rejected")
                rows = [row | {side: row["prompt"] + row[side] for side in sides} for row in rows]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{self.kind}-{name}.jsonl").write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        unit = {"text": "passages", "instructions": "examples", "preferences": "pairs"}[self.kind]
        held = " and ".join(f"{len(items):,} for {name}" for name, items in self.parts.items() if name != "train")
        twice = f"; {self.duplicates:,} duplicate{'s' * (self.duplicates > 1)} left out" if self.duplicates else ""
        train = f"{len(self.parts['train']):,} {unit} to train on"
        return f"{self.file}: {train}, {held.replace('heldout', 'measuring')}{twice}"


# The preset ---------------------------------------------------------------------------------------------------------


def create(
    study: str,
    text: str = "",
    instructions: str = "",
    preferences: str = "",
    model: str = "",
    machine: Machine | None = None,
) -> list[str]:
    """Write the folder `study` with preset.toml and the split data; returns what was done, in lines.

    Without text, pretraining reads the embedded sample; without instructions, SFT learns the chosen answers of the
    preferences; without both there is no SFT, and without preferences no DPO. Nothing is left behind by an error:
    ConfigError (the name, nothing given), SourceError and DataError (a file).
    """
    folder = Path(study)
    name = check_name(folder.name, "study")
    if not os.path.isdir(folder.absolute().parent):  # False, too, for a name that is too long for any folder
        raise ConfigError(f"{folder.parent}: no such folder")
    if folder.exists():
        raise ConfigError(f"{study} exists already: choose another name, or remove it")
    if name in preset_names() or (paths.RUNS / name).exists():
        raise ConfigError(f"study {name!r}: a preset or a run of this name exists already: choose another name")
    if not text and not model:
        raise ConfigError("name a text to pretrain on, --text FILE, or a model to measure, --model FOLDER_OR_HUB_ID")
    location = _location(model) if model else ""
    with atomic_folder(folder) as written:  # also finds out whether the folder can be written
        given = {"text": text, "instructions": instructions, "preferences": preferences}
        inputs = {kind: Input.read(kind, file) for kind, file in given.items() if file}
        for read in inputs.values():
            read.write(written)
        values = _values(name, folder, inputs, location, machine or Machine.this())
        parts = [*inputs, "model"] if model else [*inputs]
        (written / "preset.toml").write_text(_preset(parts, values), encoding="utf-8")
        checks.check(load_preset(written / "preset.toml"))
    shape = "{n_layer} layers of width {d_model}, context {context}, vocabulary {vocab_size:,}, {parameters} parameters"
    return [
        *map(str, inputs.values()),
        f"{shape.format(**values)}; trained on {values['tokens']:,} tokens (chosen for {values['machine']})",
        f"wrote {folder / 'preset.toml'}; `threefold run --preset {folder / 'preset.toml'}` runs it",
    ]


def _location(model: str) -> str:
    """A local folder as its absolute path; anything else as it is, a hub id or package:NAME/FILE.gguf."""
    path = paths.expanded(model).absolute()
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise SourceError(f"--model {model}: no model in this folder, it has no config.json")
        return str(path)
    if not re.fullmatch(r"package:[\w.-]+/[\w./-]+|\w[\w.-]*(/\w[\w.-]*)?", model[:200]) or model[200:]:
        raise SourceError(f"--model {model}: no such folder, and no name of a model on the hub (OWNER/NAME)")
    return model


def _values(name: str, folder: Path, inputs: dict[str, Input], model: str, machine: Machine) -> dict[str, Any]:
    """What new.toml has a place for."""
    examples = {kind: [as_document(kind, item) for item in read.parts["train"]] for kind, read in inputs.items()}
    texts = examples.pop("text", None)
    if texts is None:
        texts = [text for source in ("sample-stories", "sample-text") for text in sources.load(SourceConfig(source))]
        texts += chain(*examples.values())
    lengths = {kind: [len(text.encode()) for text in documents] for kind, documents in examples.items()}
    words = {word for text in texts for word in re.findall(r"[^\W\d_]{2,}", text)}
    chosen = sizes(machine, sum(len(text.encode()) for text in texts), len(words), [*chain(*lengths.values())])
    for kind, counted in lengths.items():
        fit = sum(length / BYTES_PER_TOKEN + 2 <= chosen["context"] for length in counted)
        if fit < LEAST / 2:
            raise DataError(
                f"{inputs[kind].file}: {fit} of {len(counted)} rows fit a context of {chosen['context']} tokens, the "
                f"longest for {machine}: shorten them"
            )
    sft = "instructions" if "instructions" in inputs else "preferences"

    def epochs(kind: str, share: float, most: float) -> float:
        tokens = sum(lengths.get(kind, [])) / BYTES_PER_TOKEN
        return float(f"{min(most, share * chosen['tokens'] / max(1, tokens)):.2g}")

    counts = {f"{kind}_{part}": f"{len(own):,}" for kind, read in inputs.items() for part, own in read.parts.items()}
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2])[:60].strip("._-") or "model"
    return {
        **chosen,
        **counts,
        "name": name,
        "shown": folder / "preset.toml",
        "machine": machine,
        "seconds": SECONDS,
        "rate": f"{machine.flops / 1e9:,.0f}",
        "parameters": f"{chosen['parameters']:,}",
        "passage": PASSAGE,
        "half_tokens": chosen["tokens"] // 2,
        "half_context": chosen["context"] // 2,
        "new_tokens": chosen["context"] // 4,
        "batch_size": 32 if machine.gpu else 8,
        "compile": "auto" if machine.gpu else "off",
        "sft": sft,
        "sft_what": "your instructions" if sft == "instructions" else "the chosen answers of your preferences",
        "sft_epochs": epochs(sft, 0.5, 10),
        "dpo_epochs": epochs("preferences", 0.25, 3),
        "model": json.dumps(model, ensure_ascii=False),
        "model_name": f"{last}-given" if last in OWN_MODELS else last,
    }


def _preset(given: Sequence[str], values: dict[str, Any]) -> str:
    """The parts of new.toml that what was given (text, instructions, preferences, model) asks for, filled in."""
    examples = [kind for kind in given if kind in ("instructions", "preferences")]
    parts = {"head", "training", "evaluation", "end", *given, *(["sft"] if examples else [])}
    template = Path(__file__).with_name("new.toml").read_text(encoding="utf-8")
    kept = []
    for part, lines in re.findall(r"^#: (\w+)\n(.*?)(?=^#: |\Z)", template, re.S | re.M):
        if part in parts or (part == "sample" and "text" not in given):
            kept.append(lines)
        elif part == "also" and "text" not in given:
            kept += [lines.replace("$part", kind) for kind in examples]
    return Template("".join(kept)).substitute(values)
