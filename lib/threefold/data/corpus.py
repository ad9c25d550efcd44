"""Tokenised corpora: sources read, turned into text, tokenised once and kept, then packed into rows.

A tokenised source lies in the cache folder under a key made of its content, the part of it that is taken, the reader's
and templates' code, the tokenizer and what was excluded; whatever of these changes, another one is made. Its bytes are
hashed each time it is opened (1 to 2 GB/s), and a damaged one is made again. Token files are memory-mapped: a
600M-token corpus takes no memory beyond the rows in use.

`exclude`, wherever it can be given, leaves out what a source shares with the evaluation sets of a preset; the
tokenizer, too, is trained on text without it.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from basics.errors import DataError
from basics.files import damaged, read_note, sha256_json, sha256_tree, write_note
from basics.source_code import code_fingerprint
from threefold.config import ModelConfig, SourceConfig
from threefold.data import sources as registry
from threefold.data.exclusion import Exclusion
from threefold.data.packing import Documents, PackedRows, PairedRows, pack_documents, pack_examples, pack_pairs
from threefold.data.templates import as_document, as_prompt_response
from threefold.data.tokenizer import encode, sink_ids, tokenizer_hash

FORMAT = 1  # of the cached files
META = "meta.json"  # what a cached stream is, with the hashes of its files
CODE = ("threefold.data.readers", "threefold.data.templates")  # and what they import: wikitext
CHUNK = 2048  # texts tokenised at a time
EXAMPLE_READERS = ("instructions", "problems", "sentiment", "preferences")


@dataclass(frozen=True)
class Tokenised:
    """A tokenised source. prompts: int64 [n] prompt lengths of examples and preference sides, None for documents."""

    documents: Documents
    prompts: np.ndarray | None


# Texts ----------------------------------------------------------------------------------------------------------------


def texts(source: SourceConfig, data_dir: str | Path = "", exclude: Exclusion | None = None) -> Iterator[str]:
    """A source's documents as text to pretrain on, whatever its reader; empty ones are left out."""
    if exclude is not None:
        return exclude.documents(source)
    reader = registry.resolve(source, data_dir).reader
    return (text for item in registry.iterate(source, data_dir) if (text := as_document(reader, item)))


def mixture_texts(
    sources: Iterable[SourceConfig], data_dir: str | Path = "", exclude: Exclusion | None = None
) -> Iterator[str]:
    """The documents of several sources, one source after the other: what a tokenizer is trained on."""
    for source in sources:
        yield from texts(source, data_dir, exclude)


def examples(source: SourceConfig, data_dir: str | Path = "") -> Iterator[tuple[str, str]]:
    """(prompt, response) of every item of instructions, problems, sentiment or preferences (the chosen side)."""
    reader = registry.resolve(source, data_dir).reader
    return (as_prompt_response(reader, item) for item in registry.iterate(source, data_dir))


# Tokens ---------------------------------------------------------------------------------------------------------------


def tokenise_documents(
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerFast,
    data_dir: str | Path = "",
    exclude: Exclusion | None = None,
) -> Documents:
    """A source's documents as tokens, from the cache or made now."""
    return _tokenised("documents", source, tokenizer, data_dir, exclude).documents


def tokenise_examples(
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerFast,
    data_dir: str | Path = "",
    exclude: Exclusion | None = None,
) -> Tokenised:
    """A source's examples as tokens, one document an example. Prompt and response are tokenised apart, as in
    generation.
    """
    return _tokenised("examples", source, tokenizer, data_dir, exclude)


def tokenise_pairs(
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerFast,
    data_dir: str | Path = "",
    exclude: Exclusion | None = None,
) -> Tokenised:
    """A source's preference pairs as tokens: documents 2i and 2i + 1 are the chosen and rejected sides of pair i."""
    return _tokenised("pairs", source, tokenizer, data_dir, exclude)


# Rows -----------------------------------------------------------------------------------------------------------------


def pretraining_rows(
    sources: Iterable[SourceConfig],
    tokenizer: PreTrainedTokenizerFast,
    config: ModelConfig,
    data_dir: str | Path = "",
    exclude: Exclusion | None = None,
) -> PackedRows:
    """The rows of a mixture of sources for next-token training (and its held-out loss).

    The tokenizer's sinks are the model's: `with_sinks` or `without_bos` make one that has as many as `config.sinks`.
    """
    parts = [tokenise_documents(source, tokenizer, data_dir, exclude) for source in _some(sources)]
    return pack_documents(parts, config, tokenizer.eos_token_id, sink_ids(tokenizer))


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
    parts = [tokenise_examples(source, tokenizer, data_dir, exclude) for source in _some(sources)]
    return pack_examples(_joined(parts), config, tokenizer.eos_token_id, sink_ids(tokenizer))


def preference_rows(
    sources: Iterable[SourceConfig],
    tokenizer: PreTrainedTokenizerFast,
    config: ModelConfig,
    data_dir: str | Path = "",
    exclude: Exclusion | None = None,
) -> PairedRows:
    """The pairs of a mixture of preference sources; `n_dropped` counts those with a side too long for a row."""
    parts = [tokenise_pairs(source, tokenizer, data_dir, exclude) for source in _some(sources)]
    return pack_pairs(_joined(parts), config, tokenizer.eos_token_id, sink_ids(tokenizer))


# What there is --------------------------------------------------------------------------------------------------------


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
    resolved = registry.resolve(source, data_dir)
    documents = words = size = 0
    for text in texts(source, data_dir, exclude):
        documents, words, size = documents + 1, words + len(text.split()), size + len(text.encode())
    facts = {
        "name": resolved.name,
        "split": resolved.split,
        "kind": resolved.kind,
        "reader": resolved.reader,
        "licence": resolved.licence,
        "revision": resolved.revision,
        "fingerprint": resolved.fingerprint,
        "documents": documents,
        "words": words,
        "bytes": size,
    }
    if tokenizer is not None:
        facts["tokens"] = tokenise_documents(source, tokenizer, data_dir, exclude).n_tokens
    return facts


# The cache ------------------------------------------------------------------------------------------------------------


def _tokenised(
    form: str,
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerFast,
    data_dir: str | Path,
    exclude: Exclusion | None,
) -> Tokenised:
    resolved = registry.resolve(source, data_dir)
    reader = resolved.reader
    if form == "examples" and reader not in EXAMPLE_READERS:
        raise DataError(
            f"{resolved.name}: reader {reader!r} gives no prompts and responses; allowed: {', '.join(EXAMPLE_READERS)}"
        )
    if form == "pairs" and reader != "preferences":
        raise DataError(f"{resolved.name}: reader {reader!r} gives no preference pairs; allowed: preferences")
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
    folder = registry.cache_folder() / "tokens" / key
    if not _whole(folder):
        if folder.is_dir():
            print(f"{resolved.name}: its tokens in the cache are not as they were written; they are made again")
        if form == "documents":
            pieces = ((ids, 0) for ids in encode(tokenizer, texts(source, data_dir, exclude), CHUNK))
        else:
            items = exclude.items(source) if exclude else registry.iterate(source, data_dir)
            pieces = _encoded(form, reader, items, tokenizer)
        facts = {"source": resolved.name, "split": resolved.split, "form": form}
        _write(folder, pieces, tokenizer, form != "documents", facts)
    tokenised = _open(folder)
    if not len(tokenised.documents):
        raise DataError(
            f"{resolved.name}, split {resolved.split!r}: nothing is left of it, every document shares text with "
            f"{', '.join(exclude.sets) if exclude else 'nothing'}: train on another split, or measure on one"
        )
    return tokenised


def _encoded(
    form: str, reader: str, items: Iterable[Any], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[np.ndarray, int]]:
    """(ids of an example or of a pair's side, prompt length)."""
    sides: Callable[[Any], list[tuple[str, str]]]
    if form == "pairs":
        sides = lambda item: [(item["prompt"], item["chosen"]), (item["prompt"], item["rejected"])]  # noqa: E731
    else:
        sides = lambda item: [as_prompt_response(reader, item)]  # noqa: E731
    flat = encode(tokenizer, (text for item in items for side in sides(item) for text in side), CHUNK)
    for prompt, response in zip(flat, flat, strict=True):
        yield np.concatenate([prompt, response]), len(prompt)


def _write(
    folder: Path,
    pieces: Iterator[tuple[np.ndarray, int]],
    tokenizer: PreTrainedTokenizerFast,
    with_prompts: bool,
    facts: dict,
) -> None:
    """Write a token stream beside its place and move it there; another process may have been first, with the same
    bytes.
    """
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    eos = np.array([tokenizer.eos_token_id], dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name[:16]}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        lengths, prompts = [], []
        with open(temporary / "tokens.bin", "wb") as file:
            file.write(eos.tobytes())
            for ids, prompt in pieces:
                file.write(ids.astype(dtype).tobytes())
                file.write(eos.tobytes())
                lengths.append(len(ids) + 1)
                prompts.append(prompt)
        offsets = np.concatenate(([1], 1 + np.cumsum(lengths, dtype=np.int64)))
        np.save(temporary / "offsets.npy", offsets)
        if with_prompts:
            np.save(temporary / "prompts.npy", np.array(prompts, np.int64))
        meta = {**facts, "dtype": dtype.str, "documents": len(lengths), "tokens": int(offsets[-1])}
        meta["files"] = sha256_tree(temporary)
        write_note(temporary / META, meta)
        shutil.rmtree(folder, ignore_errors=True)  # nothing, or one that is not whole
        try:
            os.rename(temporary, folder)
        except OSError:
            if not _whole(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _whole(folder: Path) -> bool:
    """Whether a cached stream is there, every byte of it as it was written."""
    return folder.is_dir() and not damaged(folder / META)


def _open(folder: Path) -> Tokenised:
    meta = read_note(folder / META)
    tokens = np.memmap(folder / "tokens.bin", np.dtype(meta["dtype"]), mode="r")
    prompts = folder / "prompts.npy"
    documents = Documents(tokens, np.load(folder / "offsets.npy"))
    return Tokenised(documents, np.load(prompts) if prompts.is_file() else None)


def _joined(parts: list[Tokenised]) -> tuple[Documents, np.ndarray]:
    """Examples of several sources as one stream; they are small enough to copy."""
    if len(parts) == 1:
        return parts[0].documents, parts[0].prompts
    tokens, offsets, prompts = [parts[0].documents.tokens[:1]], [np.array([1])], []
    for part in parts:
        documents = part.documents
        offsets.append(documents.offsets[1:] - documents.offsets[0] + offsets[-1][-1])
        tokens.append(documents.tokens[documents.offsets[0] :])
        prompts.append(part.prompts)
    return Documents(np.concatenate(tokens), np.concatenate(offsets)), np.concatenate(prompts)


def _some(sources: Iterable[SourceConfig]) -> list[SourceConfig]:
    sources = list(sources)
    if not sources:
        raise DataError("no source is named in this part of the preset's data section")
    return sources
