"""Tokenised corpora: sources are read, turned into text, tokenised once, cached, and packed into rows.

The cache key of a tokenised source is made of its content, the part of it that is taken, the code of readers and
templates, the tokenizer and what was excluded. The bytes of a cached source are hashed each time it is opened (1 to
2 GB/s), and a damaged one is recomputed. Token files are memory-mapped: a 600M-token corpus needs no memory beyond the
rows in use.

An `Exclusion` leaves out what a source shares with evaluation sets; the tokenizer, too, is trained on text without it.
"""

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from basics.errors import DataError
from basics.files import damaged, read_note, sha256_json, sha256_tree, write_note
from basics.paths import cache_folder
from basics.source_code import code_fingerprint
from threefold.config import ModelConfig, SourceConfig
from threefold.data.documents import Documents
from threefold.data.exclusion import Exclusion
from threefold.data.packing import PackedRows, PairedRows, pack_documents, pack_examples, pack_pairs
from threefold.data.sources import iterate, resolve
from threefold.data.templates import as_document, as_prompt_response
from threefold.data.tokenizer import encode, sink_ids, tokenizer_hash

FORMAT = 2  # of the cached files
META = "meta.json"  # what a cached source is, with the hashes of its files
CODE = ("threefold.data.readers", "threefold.data.templates")  # and what they import: wikitext
EXAMPLE_READERS = ("instructions", "problems", "sentiment", "preferences")

Form = Literal["documents", "examples", "pairs"]


@dataclass(frozen=True)
class Tokenised:
    """A tokenised source. prompts: int64 [n], prompt lengths of examples and of sides of pairs, 0 of documents."""

    documents: Documents
    prompts: np.ndarray


# Texts ----------------------------------------------------------------------------------------------------------------


def texts(source: SourceConfig, data_dir: str | Path = "", exclude: Exclusion | None = None) -> Iterator[str]:
    """The documents of a source of any reader as text to pretrain on; empty ones are left out."""
    if exclude is not None:
        return exclude.documents(source)
    reader = resolve(source, data_dir).reader
    return (text for item in iterate(source, data_dir) if (text := as_document(reader, item)))


def mixture_texts(
    sources: Iterable[SourceConfig], data_dir: str | Path = "", exclude: Exclusion | None = None
) -> Iterator[str]:
    """The documents of several sources, one source after the other: what a tokenizer is trained on."""
    for source in sources:
        yield from texts(source, data_dir, exclude)


def examples(source: SourceConfig, data_dir: str | Path = "") -> Iterator[tuple[str, str]]:
    """(prompt, response) of every item of instructions, problems, sentiment or preferences (the chosen side)."""
    reader = resolve(source, data_dir).reader
    return (as_prompt_response(reader, item) for item in iterate(source, data_dir))


def describe(
    source: SourceConfig,
    data_dir: str | Path = "",
    tokenizer: PreTrainedTokenizerFast | None = None,
    exclude: Exclusion | None = None,
) -> dict[str, Any]:
    """What a source is and holds, as published: no paths.

    name, split, kind, reader, licence, revision, fingerprint; documents, words (between spaces) and UTF-8 bytes of its
    whole text as pretraining would read it; tokens, if a tokenizer is given.
    """
    resolved = resolve(source, data_dir)
    keys = ("name", "split", "kind", "reader", "licence", "revision", "fingerprint")
    facts = {key: getattr(resolved, key) for key in keys} | {"documents": 0, "words": 0, "bytes": 0}
    for text in texts(source, data_dir, exclude):
        facts["documents"] += 1
        facts["words"] += len(text.split())
        facts["bytes"] += len(text.encode())
    if tokenizer is not None:
        facts["tokens"] = tokenise(source, tokenizer, data_dir, exclude).documents.n_tokens
    return facts


# Rows -----------------------------------------------------------------------------------------------------------------


def pretraining_rows(
    sources: Iterable[SourceConfig],
    tokenizer: PreTrainedTokenizerFast,
    config: ModelConfig,
    data_dir: str | Path = "",
    exclude: Exclusion | None = None,
) -> PackedRows:
    """The rows of a mixture of sources for next-token training (and its held-out loss).

    The tokenizer must have as many sinks as `config.sinks`: see `with_sinks`.
    """
    parts = _mixture(sources, tokenizer, data_dir, exclude, "documents")
    return pack_documents([part.documents for part in parts], config, tokenizer.eos_token_id, sink_ids(tokenizer))


def example_rows(
    sources: Iterable[SourceConfig],
    tokenizer: PreTrainedTokenizerFast,
    config: ModelConfig,
    data_dir: str | Path = "",
    exclude: Exclusion | None = None,
) -> PackedRows:
    """The rows of a mixture of (prompt, response) sources for fine-tuning.

    `n_dropped` counts the examples that are too long for a row.
    """
    parts = _mixture(sources, tokenizer, data_dir, exclude, "examples")
    return pack_examples(_concatenated(parts), config, tokenizer.eos_token_id, sink_ids(tokenizer))


def preference_rows(
    sources: Iterable[SourceConfig],
    tokenizer: PreTrainedTokenizerFast,
    config: ModelConfig,
    data_dir: str | Path = "",
    exclude: Exclusion | None = None,
) -> PairedRows:
    """The pairs of a mixture of preference sources; `n_dropped` counts those with a side too long for a row."""
    parts = _mixture(sources, tokenizer, data_dir, exclude, "pairs")
    return pack_pairs(_concatenated(parts), config, tokenizer.eos_token_id, sink_ids(tokenizer))


def _mixture(
    sources: Iterable[SourceConfig],
    tokenizer: PreTrainedTokenizerFast,
    data_dir: str | Path,
    exclude: Exclusion | None,
    form: Form,
) -> list[Tokenised]:
    parts = [tokenise(source, tokenizer, data_dir, exclude, form) for source in sources]
    if not parts:
        raise DataError("no source is named in this part of the preset's data section")
    return parts


def _concatenated(parts: list[Tokenised]) -> tuple[Documents, np.ndarray]:
    """Examples of several sources as one stream; they are small enough to copy."""
    if len(parts) == 1:
        return parts[0].documents, parts[0].prompts
    streams = [part.documents for part in parts]
    tokens = np.concatenate([streams[0].tokens[:1], *(stream.tokens[1:] for stream in streams)])
    ends = np.cumsum([0, *(stream.offsets[-1] - 1 for stream in streams)])
    offsets = [stream.offsets[1:] + end for stream, end in zip(streams, ends[:-1], strict=True)]
    return Documents(tokens, np.concatenate([[1], *offsets])), np.concatenate([part.prompts for part in parts])


# Tokens and their cache -----------------------------------------------------------------------------------------------


def tokenise(
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerFast,
    data_dir: str | Path = "",
    exclude: Exclusion | None = None,
    form: Form = "documents",
) -> Tokenised:
    """A source as tokens, from the cache or made now.

    form: "documents" to pretrain on; "examples", one document per example; or "pairs", where documents 2i and 2i + 1
    are the chosen and rejected sides of pair i. Prompt and response are tokenised separately, as in generation.
    Raises DataError if the reader does not give this form or nothing is left after exclusion.
    """
    resolved = resolve(source, data_dir)
    if form == "examples" and resolved.reader not in EXAMPLE_READERS:
        raise DataError(
            f"{resolved.name}: reader {resolved.reader!r} gives no prompts and responses; "
            f"allowed: {', '.join(EXAMPLE_READERS)}"
        )
    if form == "pairs" and resolved.reader != "preferences":
        raise DataError(f"{resolved.name}: reader {resolved.reader!r} gives no preference pairs; allowed: preferences")
    key = sha256_json(
        {
            "format": FORMAT,
            "form": form,
            "data": resolved.fingerprint,
            "part": [source.skip_examples, source.max_examples],
            "code": code_fingerprint(*CODE),
            "tokenizer": tokenizer_hash(tokenizer),
            "exclude": exclude.fingerprint if exclude and exclude.config.remove else "",
        }
    )
    folder = cache_folder() / "tokens" / key
    if not _intact(folder):
        if folder.is_dir():
            print(f"{resolved.name}: its tokens in the cache are damaged and are recomputed")
        if form == "documents":
            pieces = ((ids, 0) for ids in encode(tokenizer, texts(source, data_dir, exclude)))
        else:
            items = exclude.items(source) if exclude else iterate(source, data_dir)
            pieces = _encoded_examples(form, resolved.reader, items, tokenizer)
        _write(folder, pieces, tokenizer, {"source": resolved.name, "split": resolved.split, "form": form})
    tokens = np.memmap(folder / "tokens.bin", np.dtype(read_note(folder / META)["dtype"]), mode="r")
    offsets, prompts = np.load(folder / "offsets.npy"), np.load(folder / "prompts.npy")
    if len(offsets) == 1:
        raise DataError(
            f"{resolved.name}, split {resolved.split!r}: nothing is left of it, every document shares text with "
            f"{', '.join(exclude.sets) if exclude else 'nothing'}: train on another split, or measure on one"
        )
    return Tokenised(Documents(tokens, offsets), prompts)


def _encoded_examples(
    form: Form, reader: str, items: Iterable[Any], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[np.ndarray, int]]:
    """(ids of an example or of one side of a pair, prompt length)."""

    def parts() -> Iterator[str]:
        for item in items:
            if form == "pairs":
                yield from (item["prompt"], item["chosen"], item["prompt"], item["rejected"])
            else:
                yield from as_prompt_response(reader, item)

    ids = encode(tokenizer, parts())
    for prompt, response in zip(ids, ids, strict=True):
        yield np.concatenate([prompt, response]), len(prompt)


def _write(
    folder: Path, pieces: Iterator[tuple[np.ndarray, int]], tokenizer: PreTrainedTokenizerFast, facts: dict[str, str]
) -> None:
    """Write a token stream to a temporary folder and rename it. Another process may do the same at the same time."""
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    eos = np.array([tokenizer.eos_token_id], dtype).tobytes()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name[:16]}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        lengths, prompts = [], []
        with open(temporary / "tokens.bin", "wb") as file:
            file.write(eos)
            for ids, prompt in pieces:
                file.write(ids.astype(dtype).tobytes() + eos)
                lengths.append(len(ids) + 1)
                prompts.append(prompt)
        offsets = np.concatenate(([1], 1 + np.cumsum(lengths, dtype=np.int64)))
        np.save(temporary / "offsets.npy", offsets)
        np.save(temporary / "prompts.npy", np.array(prompts, np.int64))
        facts = {**facts, "dtype": dtype.str, "documents": len(lengths), "tokens": int(offsets[-1])}
        write_note(temporary / META, {**facts, "files": sha256_tree(temporary)})
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        try:
            os.rename(temporary, folder)
        except OSError:
            if not _intact(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _intact(folder: Path) -> bool:
    return folder.is_dir() and not damaged(folder / META)
