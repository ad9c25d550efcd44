"""Overlap of training text with evaluation sets: found by n-grams and whole lines, and removed.

The method is GPT-3's (Brown et al. 2020, 2005.14165, appendix C), which lm-eval's and NeMo Curator's decontamination
also follow: a training text that shares a run of 13 words with an evaluation text contains a part of it, unless more
than 10 documents of the training source contain the run. Such a run is a template, not a leak. Differences to GPT-3:

- *Words* are runs of letters and digits in lower case, and everything else separates them. (GPT-3 deletes punctuation
  and ends words at spaces.) WikiText's `1 @,@ 000` and SST-2's `does n't` then have the words of `1,000` and `doesn't`;
  `<unk>` and PTB's brackets (`-lrb-`) are not words.
- An evaluation question (see `pieces`) of 8 to 12 words is searched for as a whole. GPT-3's analysis used runs of as
  few as 8 words; lm-eval skips such texts. A short answer alone is not evidence of its item.
- *Exact lines* of 8 words or more count as evidence. From 13 words on they count no matter how many documents contain
  them: a paragraph is copied, a phrase is common. A training item's question that equals the whole question of an
  evaluation item counts at any length. A shorter line inside running text does not.
- GPT-3 removes 200 characters around a match. Here the unit that contains it is removed: the lines of an article, one
  review of several, otherwise the whole item.

Hashes have 64 bits; the probability that any of 10^9 training n-grams collides with one of 10^6 others is 5e-5. Only
the evaluation texts are held in memory; the training text is streamed.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from threefold.data.arrays import ranges
from threefold.data.templates import REVIEWS, as_document

PARAGRAPH = 8  # words; an article of which only shorter lines are left is dropped
CHUNK = 1 << 20  # characters searched at a time
FILTER_BITS = 24  # a table of 16 MiB that rejects nearly all lookups before the sorted hashes are searched
LINES, BLOCKS = ("text", "wikitext", "wikitext-raw"), tuple(REVIEWS)  # readers whose documents lose parts
WORD_BASE, GRAM_BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd: no power is 0
BYTES = np.random.default_rng(0).integers(1, 1 << 63, 256, np.uint64)  # fixed, so that all runs have the same hashes


# Words and their hashes -----------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The words of a text as they are compared: `"Don't pay $1,000!"` -> `["don", "t", "pay", "1", "000"]`."""
    return _plain(text).split()


def _plain(text: str) -> str:
    """The words of a text, separated by spaces and newlines; newlines stay where they are."""
    return "\n".join(map(_plain_line, text.split("\n"))) if not text.isascii() else _plain_line(text)


def _plain_line(text: str) -> str:
    ascii = text.isascii()
    text = (text if ascii else unicodedata.normalize("NFKC", text)).lower()
    for mark, instead in (("<unk>", " "), ("-lrb-", " "), ("-rrb-", " "), (" n't", "n't")):
        text = text.replace(mark, instead)
    return text.translate(_SPACED) if ascii else re.sub(r"[^\w\n]+|_", " ", text)


_SPACED = "".join(char if char.isalnum() or char == "\n" else " " for char in map(chr, range(128)))


@dataclass(frozen=True)
class _Hashed:
    """The words of some lines. words: uint64 [n], their hashes; line: int64 [n], the line of each; starts: int64
    [lines + 1], the place of each line's first word.
    """

    words: np.ndarray
    line: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, text: str) -> "_Hashed":
        """The hash of each word: a polynomial over its bytes modulo 2^64, mixed by splitmix64's finaliser."""
        data = np.frombuffer(_plain(text).encode(), np.uint8)
        inside = data > 32
        edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
        first, lengths = edges[::2], edges[1::2] - edges[::2]
        newlines = np.flatnonzero(data == 10)
        line = np.searchsorted(newlines, first)
        hashes = _polynomials(BYTES[data[inside]], lengths, WORD_BASE)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
        hashes ^= hashes >> np.uint64(31)
        return cls(hashes, line, np.searchsorted(line, np.arange(len(newlines) + 2)))

    def runs(self, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """uint64: the hash of words first[i] .. end[i], the same as in `grams`; no run may be empty."""
        return _polynomials(self.words[ranges(first, end - first)], end - first, GRAM_BASE)

    def grams(self, piece: np.ndarray, lengths: Iterable[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(length, first words, hashes) of every run of these lengths that is inside one piece; piece: int64 [n], the
        piece of each word.
        """
        wanted, running = set(lengths), np.zeros(len(self.words), np.uint64)
        powers = _powers(GRAM_BASE, max(wanted, default=1))
        for length in range(1, max(wanted, default=0) + 1):
            n = len(self.words) - length + 1
            if n <= 0:
                return
            running = running[:n] + self.words[length - 1 :] * powers[length - 1]
            if length in wanted:
                first = np.flatnonzero(piece[:n] == piece[length - 1 :])
                yield length, first, running[first]


def _polynomials(values: np.ndarray, lengths: np.ndarray, base: np.uint64) -> np.ndarray:
    """uint64 [n]: for each run of values, the sum over i of value i times base^i, modulo 2^64.

    values: uint64, the runs concatenated. lengths: int64 [n], of the runs, each at least 1.
    """
    if not len(lengths):
        return np.empty(0, np.uint64)
    powers = _powers(base, lengths.max())[ranges(np.zeros_like(lengths), lengths)]
    return np.add.reduceat(values * powers, np.cumsum(lengths) - lengths)


@lru_cache(maxsize=2)
def _table(base: int, size: int) -> np.ndarray:
    return np.concatenate(([np.uint64(1)], np.cumprod(np.full(size - 1, base, np.uint64))))


def _powers(base: np.uint64, size: int) -> np.ndarray:
    """uint64 [>= size]: base^0, base^1, ... modulo 2^64."""
    return _table(base, 1 << int(size).bit_length())


# Documents -------------------------------------------------------------------------------------------


def pieces(reader: str, item: str | Mapping) -> tuple[list[str], int]:
    """(the texts of an item that are searched, with the questions first; the number of questions).

    A question identifies an item: the sentence of a review, a problem, an instruction with its input, or a dialogue
    with one reply (many dialogues share their first turn). The wording of prompts is not searched, because training and
    evaluation prompts share it by design.
    """
    if reader == "instructions":
        return [f"{item['instruction']}\n{item['input']}".strip("\n"), item["output"]], 1
    if reader == "problems":
        return [item["question"], item["answer"]], 1
    if reader == "sentiment":
        return [item["sentence"]], 1
    if reader == "preferences":
        return [item["prompt"] + item["chosen"], item["prompt"] + item["rejected"]], 2
    if reader == "minimal-pairs":
        return [item["good"], item["bad"]], 2
    if reader in BLOCKS:
        marker = REVIEWS[reader]("").partition(":")[0]  # behind the sentence
        sentences = [block.partition(marker)[0] for block in item.split("\n\n")]
        return sentences, len(sentences)
    return [as_document(reader, item)], 0


@dataclass
class _Chunk:
    """Documents that are searched together. Lists have one entry per line; `question` has one per piece."""

    text: list[str] = field(default_factory=list)
    piece: list[int] = field(default_factory=list)
    unit: list[int] = field(default_factory=list)  # numbered within the chunk
    question: list[bool] = field(default_factory=list)
    owner: list[tuple[int, int]] = field(default_factory=list)  # of each unit: (document, unit within it)
    size: int = 0

    def add(self, number: int, reader: str, item: str | Mapping) -> None:
        texts, questions = pieces(reader, item)
        base = len(self.owner)
        for place, text in enumerate(texts):
            lines = text.count("\n") + 1
            units = range(lines) if reader in LINES else [place if reader in BLOCKS else 0] * lines
            self.piece += [len(self.question)] * lines
            self.unit += [base + unit for unit in units]
            self.question.append(place < questions)
            self.text.append(text)
            self.size += len(text) + 1
        self.owner += [(number, unit) for unit in range(self.unit[-1] + 1 - base)]

    def hashed(self) -> _Hashed:
        return _Hashed.of("\n".join(self.text))


def _chunks(reader: str, items: Iterable[str | Mapping]) -> Iterator[_Chunk]:
    chunk = _Chunk()
    for number, item in enumerate(items):
        chunk.add(number, reader, item)
        if chunk.size >= CHUNK:
            yield chunk
            chunk = _Chunk()
    if chunk.size:
        yield chunk


# The index ------------------------------------------------------------------------------------------------------------

# The kinds of evidence: n-grams, lines shorter than one, longer lines, and whole questions. Each has a tag in its
# hashes, so that one table holds all. From LINE on evidence counts no matter how many documents contain it.
GRAM, PHRASE, LINE, QUESTION = range(4)
TAGS = np.array([0, 0xE7037ED1A0B428DB, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64)


class Index:
    """The sorted hashes of the evaluation texts, and the sets that contain each.

    names: of the sets. hashes: uint64 [n]. sets: uint64 [n], bit s for set names[s]. ways: int64 [n], GRAM to QUESTION.
    lengths: of the n-grams, the preset's and those of shorter texts.
    """

    def __init__(
        self, sets: Mapping[str, tuple[str, Iterable[str | Mapping]]], ngram: int = 13, common: int = 10, line: int = 8
    ):
        """sets: {name: (reader, items)}. ngram: words of a run. common: an n-gram in more documents of a source than
        this is a template; -1: none is. line: the minimum words of a line, or of a whole evaluation text, as evidence.
        """
        self.names, self.ngram, self.common, self.line = list(sets), ngram, common, line
        parts: list[tuple[np.ndarray, int, int]] = []
        lengths = {ngram}
        for number, (reader, items) in enumerate(sets.values()):
            for chunk in _chunks(reader, items):
                for way, values, counts, _ in self._candidates(chunk, chunk.hashed(), None):
                    parts.append((values ^ TAGS[way], number, way))
                    lengths.update(counts.tolist() if way == GRAM else ())
        self.lengths = sorted(lengths)
        hashes = np.concatenate([part for part, _, _ in parts]) if parts else np.empty(0, np.uint64)
        masks = np.repeat([1 << number for _, number, _ in parts], [len(part) for part, _, _ in parts])
        ways = np.repeat([way for _, _, way in parts], [len(part) for part, _, _ in parts])
        order = np.argsort(hashes, kind="stable")
        self.hashes, starts = np.unique(hashes[order], return_index=True)
        self.sets = np.bitwise_or.reduceat(masks[order].astype(np.uint64), starts) if parts else hashes
        self.ways = ways[order][starts]
        self._filter = np.zeros(1 << FILTER_BITS, bool)
        self._filter[self.hashes >> np.uint64(64 - FILTER_BITS)] = True

    def _candidates(
        self, chunk: _Chunk, hashed: _Hashed, lengths: list[int] | None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """(way, hashes, words that each covers, first word of each) of everything in a chunk that can be evidence.

        lengths: of the n-grams; None: the preset's, and whole pieces that are shorter (to build an index).
        """
        piece = np.array(chunk.piece)[hashed.line]
        for length, first, values in hashed.grams(piece, lengths or [self.ngram]):
            yield GRAM, values, np.full(len(first), length), first
        first, end = hashed.starts[:-1], hashed.starts[1:]
        for way, least, below in ((PHRASE, self.line, self.ngram), (LINE, max(self.line, self.ngram), np.inf)):
            fits = (end - first >= least) & (end - first < below)
            yield way, hashed.runs(first[fits], end[fits]), (end - first)[fits], first[fits]
        edges = np.searchsorted(piece, np.arange(len(chunk.question) + 1))
        first, end = edges[:-1], edges[1:]
        asked = np.array(chunk.question) & (end > first)
        yield QUESTION, hashed.runs(first[asked], end[asked]), (end - first)[asked], first[asked]
        if lengths is None:
            short = asked & (end - first >= self.line) & (end - first < self.ngram)
            yield GRAM, hashed.runs(first[short], end[short]), (end - first)[short], first[short]

    def find(self, chunk: _Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a chunk of training text shares with the sets.

        -> (units int64 [h]; the hash found in each, int64 [h], as a place in `hashes`; words of every unit, int64).
        """
        units, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        hashed = chunk.hashed()
        unit = np.array(chunk.unit)[hashed.line]
        for way, values, lengths, first in self._candidates(chunk, hashed, self.lengths):
            values = values ^ TAGS[way]
            maybe = np.flatnonzero(self._filter[values >> np.uint64(64 - FILTER_BITS)])
            place = np.searchsorted(self.hashes, values[maybe])
            place[place == len(self.hashes)] = 0
            hit = self.hashes[place] == values[maybe]
            maybe, place = maybe[hit], place[hit]
            covered = ranges(first[maybe], lengths[maybe])  # all words of a hit: it may span several units
            units.append(unit[covered])
            places.append(np.repeat(place, lengths[maybe]))
        pairs = np.unique(np.stack([np.concatenate(units), np.concatenate(places)], axis=1), axis=0)
        return pairs[:, 0], pairs[:, 1], np.bincount(unit, minlength=len(chunk.owner))

    def search(self, reader: str, items: Iterable[str | Mapping]) -> "Overlap":
        """What a training source shares with the sets, in one pass."""
        hits = [np.empty((4, 0), np.int64)]  # of each: document, part of it, hash, words of the part
        holders = np.zeros(len(self.hashes), np.int64)  # documents that contain each hash
        copies = self.ways >= LINE
        common = self.common if self.common >= 0 else np.iinfo(np.int64).max
        documents = total = 0
        for chunk in _chunks(reader, items):
            unit, place, counts = self.find(chunk)
            total += int(counts.sum())
            documents = chunk.owner[-1][0] + 1
            document, part = np.array(chunk.owner)[unit].T
            np.add.at(holders, np.unique(np.stack([document, place], axis=1), axis=0)[:, 1], 1)
            wanted = copies[place] | (holders[place] <= common)  # a hash that is a template by now need not be kept
            hits.append(np.stack([document, part, place, counts[unit]])[:, wanted])
        overlap = Overlap(documents, total, templates=int(((holders > common) & ~copies).sum()))
        every = np.concatenate(hits, axis=1)
        document, part, place, size = every[:, copies[every[2]] | (holders[every[2]] <= common)]
        for number, name in enumerate(self.names):
            inside = (self.sets[place] >> np.uint64(number)) & np.uint64(1) == 1
            ways = {"ngram": inside & (self.ways[place] == GRAM), "exact": inside & (self.ways[place] != GRAM)}
            if inside.any():
                overlap.sets[name] = {way: len(np.unique(document[here])) for way, here in ways.items()}
        for number, piece, n_words in np.unique(np.stack([document, part, size], axis=1), axis=0).tolist():
            overlap.drop.setdefault(number, []).append(piece)
            overlap.words_dropped += n_words
        return overlap


@dataclass
class Overlap:
    """What a training source shares with the evaluation sets.

    documents, words: number searched. sets: {set: {"ngram": documents that share an n-gram, "exact": documents that
    share a line or a question}}. templates: runs and shorter lines of the sets that are not evidence, because more than
    `common` documents contain them. drop: {document: its parts with evidence}, both numbered from 0. words_dropped:
    words of these parts.
    """

    documents: int
    words: int
    templates: int = 0
    words_dropped: int = 0
    sets: dict[str, dict[str, int]] = field(default_factory=dict)
    drop: dict[int, list[int]] = field(default_factory=dict)


def without(reader: str, text: str, parts: Iterable[int]) -> str:
    """A document without some of its parts; "" if only headings and other lines of few words are left."""
    parts = set(parts)
    if reader in BLOCKS:
        return "\n\n".join(block for place, block in enumerate(text.split("\n\n")) if place not in parts)
    if reader not in LINES:
        return ""
    left = [part for place, part in enumerate(text.split("\n")) if place not in parts]
    return "\n".join(left) if any(len(words(part)) >= PARAGRAPH for part in left) else ""
