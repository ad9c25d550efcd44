"""Tokenised corpora: sources are read, turned into text, tokenised once, cached, and packed into rows.

The cache key of a tokenised source covers its content, the part of it that is used, the code of readers and templates,
the tokenizer and what was excluded. The bytes of a cached source are hashed each time it is opened (1 to 2 GB/s), and a
damaged one is recomputed. Token files are memory-mapped, so a corpus of 600M tokens needs no memory beyond the rows in
use.

An `Exclusion` leaves out what a source shares with evaluation sets; the tokenizer is trained on text without it, too.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from basics.errors import DataError
from basics.files import atomic_folder, damaged, read_note, sha256_json, sha256_tree, write_note
from basics.paths import cache_folder
from basics.source_code import code_fingerprint
from threefold.config import ModelConfig, SourceConfig
from threefold.data.arrays import Documents
from threefold.data.exclusion import Exclusion, no_exclusion
from threefold.data.packing import PackedRows, PairedRows, pack_documents, pack_examples, pack_pairs
from threefold.data.sources import iterate, odd_rows, resolve
from threefold.data.templates import EXAMPLE_READERS, as_prompt_response
from threefold.data.tokenizer import encode, sink_ids, tokenizer_hash

FORMAT = 2  # of the cached files
META = "meta.json"  # what a cached source is, with the hashes of its files
NAMES = 20  # of files, listed as those of a source
CODE = ("threefold.data.readers", "threefold.data.templates")  # and what they import: wikitext

Form = Literal["documents", "examples", "pairs"]


# Texts ----------------------------------------------------------------------------------------------------------------


def texts(source: SourceConfig, data_dir: str | Path = "", exclude: Exclusion | None = None) -> Iterator[str]:
    """The documents of a source of any reader as text to pretrain on; empty ones are left out."""
    return (exclude or no_exclusion(data_dir)).documents(source)


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

    name, split, kind, reader, licence, revision, fingerprint; files: the names of those it was read from, left_out: of
    those in the same folder that were not, with the reason (each list at most NAMES long, then a count); odd_rows:
    {reason: rows left out for it}; documents, words (between spaces) and UTF-8 bytes of its whole text as pretraining
    would read it; tokens, if a tokenizer is given.
    """
    resolved = resolve(source, data_dir)
    keys = ("name", "split", "kind", "reader", "licence", "revision", "fingerprint")
    facts = {key: getattr(resolved, key) for key in keys}
    facts |= {"files": _shortened(resolved.names), "left_out": _shortened(resolved.left_out)}
    facts |= {"odd_rows": odd_rows(source, data_dir), "documents": 0, "words": 0, "bytes": 0}
    for text in texts(source, data_dir, exclude):
        facts["documents"] += 1
        facts["words"] += len(text.split())
        facts["bytes"] += len(text.encode())
    if tokenizer is not None:
        facts["tokens"] = tokenise(source, tokenizer, data_dir, exclude).n_tokens
    return facts


def _shortened(names: tuple[str, ...]) -> list[str]:
    more = [f"and {len(names) - NAMES:,} more"] if len(names) > NAMES else []
    return [*names[:NAMES], *more]


# Rows -----------------------------------------------------------------------------------------------------------------


def rows(
    form: Form,
    sources: Iterable[SourceConfig],
    tokenizer: PreTrainedTokenizerFast,
    config: ModelConfig,
    data_dir: str | Path = "",
    exclude: Exclusion | None = None,
) -> PackedRows | PairedRows:
    """The rows of a mixture of sources in a form (see `tokenise`): "documents" for next-token training and its held-out
    loss, "examples" for fine-tuning, "pairs" for preferences. `n_dropped` counts the examples, or pairs, that are too
    long for a row.

    The tokenizer must have as many sinks as `config.sinks`: see `with_sinks`.
    """
    streams = [tokenise(source, tokenizer, data_dir, exclude, form) for source in sources]
    if not streams:
        raise DataError("no source is named in this part of the preset's data section")
    pack = {"documents": pack_documents, "examples": pack_examples, "pairs": pack_pairs}[form]
    return pack(streams, config, tokenizer.eos_token_id, sink_ids(tokenizer))


# `rows` of each form: (sources, tokenizer, config, data_dir, exclude) -> PackedRows, of pairs PairedRows
pretraining_rows, example_rows, preference_rows = (partial(rows, form) for form in ("documents", "examples", "pairs"))


# Tokens and their cache -----------------------------------------------------------------------------------------------


def tokenise(
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerFast,
    data_dir: str | Path = "",
    exclude: Exclusion | None = None,
    form: Form = "documents",
) -> Documents:
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
    exclude = exclude or no_exclusion(data_dir)
    key = sha256_json(
        {
            "format": FORMAT,
            "form": form,
            "data": resolved.fingerprint,
            "part": [source.skip_examples, source.max_examples],
            "code": code_fingerprint(*CODE),
            "tokenizer": tokenizer_hash(tokenizer),
            "exclude": exclude.fingerprint if exclude.config.remove else "",
        }
    )
    folder = cache_folder() / "tokens" / key
    if not _intact(folder):
        if folder.is_dir():
            print(f"{resolved.name}: its tokens in the cache are damaged and are recomputed")
        if form == "documents":
            pieces = ((ids, 0) for ids in encode(tokenizer, exclude.documents(source)))
        else:
            pieces = _encoded_examples(form, resolved.reader, exclude.items(source), tokenizer)
        _write(folder, pieces, tokenizer, {"source": resolved.name, "split": resolved.split, "form": form})
    tokens = np.memmap(folder / "tokens.bin", np.dtype(read_note(folder / META)["dtype"]), mode="r")
    documents = Documents(tokens, np.load(folder / "offsets.npy"), np.load(folder / "prompts.npy"))
    if not len(documents):
        raise DataError(
            f"{resolved.name}, split {resolved.split!r}: nothing is left of it, every document shares text with "
            f"{', '.join(exclude.sets) or 'nothing'}: train on another split, or measure on one"
        )
    return documents


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
    """Write a token stream. Another process may do the same at the same time: then either one's files stay."""
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    eos = np.array([tokenizer.eos_token_id], dtype).tobytes()
    try:
        with atomic_folder(folder) as temporary:
            lengths, prompts = [], []
            with open(temporary / "tokens.bin", "wb") as file:
                file.write(eos)
                for ids, prompt in pieces:
                    file.write(ids.astype(dtype).tobytes() + eos)
                    lengths.append(len(ids) + 1)
                    prompts.append(prompt)
            np.save(temporary / "offsets.npy", np.concatenate(([1], 1 + np.cumsum(lengths, dtype=np.int64))))
            np.save(temporary / "prompts.npy", np.array(prompts, np.int64))
            write_note(temporary / META, {**facts, "dtype": dtype.str, "files": sha256_tree(temporary)})
    except OSError:
        if not _intact(folder):
            raise


def _intact(folder: Path) -> bool:
    return folder.is_dir() and not damaged(folder / META)
