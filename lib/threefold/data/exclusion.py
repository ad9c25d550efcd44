"""Training sources without what they share with evaluation sets: `threefold.data.overlap` applied to sources.

The result of a search is kept in the cache folder under a key of both sides, so that every stage that reads the source
removes the same parts and only the first one searches.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from basics.files import read_note, sha256_json, write_note
from basics.paths import cache_folder
from basics.source_code import code_fingerprint
from threefold.config import OverlapConfig, SourceConfig
from threefold.data.overlap import Index, Overlap, without
from threefold.data.sources import iterate, resolve
from threefold.data.templates import as_document

CODE = ("threefold.data.overlap", "threefold.data.readers")  # and what they import: templates, wikitext


class Exclusion:
    """Searches training sources for text of evaluation sets, and gives the sources without it.

    sets: the evaluation sets by name.
    """

    def __init__(self, config: OverlapConfig, sets: Mapping[str, SourceConfig], data_dir: str | Path = ""):
        self.config, self.sets, self.data_dir = config, dict(sets), data_dir

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the sets' content and part, the settings and the code; no set is read for it."""
        content = {
            name: [resolve(source, self.data_dir).fingerprint, source.skip_examples, source.max_examples]
            for name, source in self.sets.items()
        }
        return sha256_json({"sets": content, "config": asdict(self.config), "code": code_fingerprint(*CODE)})

    @cached_property
    def index(self) -> Index:
        """The index of the sets, read and hashed on first use."""
        sets = {name: self._read(source) for name, source in self.sets.items()}
        return Index(sets, self.config.ngram, self.config.common, self.config.line)

    def search(self, source: SourceConfig) -> Overlap:
        """What a training source shares with the sets, from the cache or searched now."""
        data = resolve(source, self.data_dir).fingerprint
        part = [source.skip_examples, source.max_examples]
        key = sha256_json({"index": self.fingerprint, "data": data, "part": part})
        note = cache_folder() / "overlap" / f"{key}.json"
        kept = read_note(note)
        if kept is not None:
            kept["drop"] = {int(number): parts for number, parts in kept["drop"].items()}
            return Overlap(**kept)
        overlap = self.index.search(*self._read(source))
        write_note(note, json.loads(json.dumps(asdict(overlap))))
        return overlap

    def describe(self, source: SourceConfig) -> dict[str, Any]:
        """What was searched, found and removed in a training source, as published.

        name, split; documents, words: searched; sets: {set: documents found in it by n-gram and exactly}; found: the
        same as text; templates: n-grams set aside; documents_found; parts_removed, words_removed: lines of articles,
        reviews or whole items. Words are those of `overlap.words`.
        """
        resolved, overlap, removed = resolve(source, self.data_dir), self.search(source), self.config.remove
        found = "; ".join(f"{name} {n['ngram']:,} / {n['exact']:,}" for name, n in overlap.sets.items())
        return {
            "name": resolved.name,
            "split": resolved.split,
            "documents": overlap.documents,
            "words": overlap.words,
            "sets": overlap.sets,
            "found": found or "none",
            "templates": overlap.templates,
            "documents_found": len(overlap.drop),
            "parts_removed": sum(map(len, overlap.drop.values())) if removed else 0,
            "words_removed": overlap.words_dropped if removed else 0,
        }

    def items(self, source: SourceConfig) -> Iterator[Any]:
        """The items of a source of examples or pairs without those that share text with a set."""
        drop = self._drop(source)
        return (item for number, item in enumerate(self._read(source)[1]) if number not in drop)

    def documents(self, source: SourceConfig) -> Iterator[str]:
        """The documents of a source to pretrain on without the parts that share text with a set; empty documents are
        left out."""
        drop = self._drop(source)
        reader, items = self._read(source)
        for number, item in enumerate(items):
            text = as_document(reader, item)
            if number in drop:
                text = without(reader, text, drop[number])
            if text:
                yield text

    def _drop(self, source: SourceConfig) -> dict[int, list[int]]:
        return self.search(source).drop if self.config.remove else {}

    def _read(self, source: SourceConfig) -> tuple[str, Iterator[Any]]:
        return resolve(source, self.data_dir).reader, iterate(source, self.data_dir)


def no_exclusion(data_dir: str | Path = "") -> Exclusion:
    """An `Exclusion` that searches for nothing and removes nothing."""
    return Exclusion(OverlapConfig(remove=False), {}, data_dir)
