"""Training sources without what they share with the evaluation sets of a preset: `threefold.data.overlap` applied.

What was found in a source is kept in the cache folder under a key of both sides, so that every stage that reads the
source takes the same out of it and only the first one searches.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from basics.files import read_note, sha256_json, write_note
from basics.source_code import code_fingerprint
from threefold.config import OverlapConfig, SourceConfig
from threefold.data import sources as registry
from threefold.data.overlap import Found, Index, without
from threefold.data.templates import as_document

CODE = ("threefold.data.overlap", "threefold.data.readers")  # and what they import: templates, wikitext


class Exclusion:
    """The search of training sources against evaluation sets, and the sources without what was found.

    The index is made when it is first needed; results are kept in the cache folder under a key of both sides.
    """

    def __init__(self, config: OverlapConfig, sets: Mapping[str, SourceConfig], data_dir: str | Path = ""):
        self.config, self.sets, self.data_dir = config, dict(sets), data_dir

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the sets' content or part, the settings or the code; no set is read for it."""
        content = {
            name: [registry.resolve(source, self.data_dir).fingerprint, source.skip_examples, source.max_examples]
            for name, source in self.sets.items()
        }
        return sha256_json({"sets": content, "config": asdict(self.config), "code": code_fingerprint(*CODE)})

    @cached_property
    def index(self) -> Index:
        """Read and hashed on first use."""
        sets = {name: self._source(source) for name, source in self.sets.items()}
        return Index(sets, self.config.ngram, self.config.common, self.config.line)

    def search(self, source: SourceConfig) -> Found:
        """What a training source shares with the sets, from the cache or searched now."""
        resolved = registry.resolve(source, self.data_dir)
        part = [source.skip_examples, source.max_examples]
        key = sha256_json({"index": self.fingerprint, "data": resolved.fingerprint, "part": part})
        kept = registry.cache_folder() / "overlap" / f"{key}.json"
        facts = read_note(kept)
        if facts is None:  # not searched yet, or a damaged note
            found = self.index.search(*self._source(source))
            write_note(kept, json.loads(json.dumps(asdict(found))))
            return found
        drop = {int(number): parts for number, parts in facts.pop("drop").items()}
        return Found(**facts, drop=drop)

    def describe(self, source: SourceConfig) -> dict[str, Any]:
        """What was searched, found and removed in a training source, as published.

        name, split; documents, words: searched; sets: {set: documents found in it by n-gram and exactly}; found: the
        same as a text; templates: n-grams set aside; documents_found; parts_removed, words_removed: lines of articles,
        reviews or whole items. Words are those of `overlap.words`.
        """
        resolved, found = registry.resolve(source, self.data_dir), self.search(source)
        removed = self.config.remove
        return {
            "name": resolved.name,
            "split": resolved.split,
            "documents": found.documents,
            "words": found.words,
            "sets": found.sets,
            "found": "; ".join(f"{name} {n['ngram']:,} / {n['exact']:,}" for name, n in found.sets.items()) or "none",
            "templates": found.templates,
            "documents_found": len(found.drop),
            "parts_removed": found.parts_dropped if removed else 0,
            "words_removed": found.words_dropped if removed else 0,
        }

    def items(self, source: SourceConfig) -> Iterator[Any]:
        """The items of a source of examples or pairs without those that hold evidence."""
        drop = self._drop(source)
        return (item for number, item in enumerate(self._source(source)[1]) if number not in drop)

    def documents(self, source: SourceConfig) -> Iterator[str]:
        """The documents of a source to pretrain on without the parts that hold evidence; empty ones are left out."""
        drop = self._drop(source)
        reader, items = self._source(source)
        for number, item in enumerate(items):
            text = as_document(reader, item)
            if number in drop:
                text = without(reader, text, drop[number])
            if text:
                yield text

    def _drop(self, source: SourceConfig) -> dict[int, list[int]]:
        return self.search(source).drop if self.config.remove else {}

    def _source(self, source: SourceConfig) -> tuple[str, Iterator[Any]]:
        return registry.resolve(source, self.data_dir).reader, registry.iterate(source, self.data_dir)
