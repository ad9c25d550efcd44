"""Tokenised corpora: what a cache key depends on, that caches are whole, and rows from sources."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from basics.errors import DataError
from basics.files import damaged
from threefold.config import ModelConfig, SourceConfig, TokenizerConfig
from threefold.data import corpus
from threefold.data.packing import IGNORE
from threefold.data.sources import iterate, resolve
from threefold.data.templates import as_prompt_response
from threefold.data.tokenizer import build_tokenizer, encode, sink_ids, with_sinks
from threefold.segments import TRUNK_SHIFT

DATA = Path(os.environ.get("THREEFOLD_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
real = pytest.mark.skipif(not DATA.is_dir(), reason="no real data: THREEFOLD_DATA or ../shared/data")
TEXT = SourceConfig(source="sample-text", split="validation")
STORIES = SourceConfig(source="sample-stories", max_examples=40)
INSTRUCTIONS = SourceConfig(source="sample-instructions", split="test")
PROBLEMS = SourceConfig(source="sample-problems", split="test")
PREFERENCES = SourceConfig(source="sample-preferences", split="test")
REVIEWS = SourceConfig(source="sample-sentiment", split="validation", reader="reviews")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("THREEFOLD_DATA", raising=False)
    return tmp_path / "cache" / "tokens"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TokenizerConfig(vocab_size=512), corpus.mixture_texts([TEXT, STORIES]))


def config(context=128, sinks=1) -> ModelConfig:
    return ModelConfig(context=context, sinks=sinks, vocab_size=512)


def decoded(tokenizer, documents) -> list[str]:
    return [tokenizer.decode(documents[index]) for index in range(len(documents))]


def test_documents_are_the_texts_and_are_mapped(tokenizer, cache):
    for source in (TEXT, STORIES, REVIEWS, INSTRUCTIONS, PROBLEMS, PREFERENCES):
        documents = corpus.tokenise(source, tokenizer)
        assert decoded(tokenizer, documents) == list(corpus.texts(source))
        assert isinstance(documents.tokens, np.memmap) and documents.tokens.dtype == np.uint16
    assert len(list(cache.iterdir())) == 6
    assert len(corpus.tokenise(STORIES, tokenizer)) == 40


def test_a_cache_is_read_again_and_not_made_again(tokenizer, cache, monkeypatch):
    first = corpus.tokenise(TEXT, tokenizer)
    monkeypatch.setattr(corpus, "encode", None)
    again = corpus.tokenise(TEXT, tokenizer)
    assert np.array_equal(first.tokens, again.tokens) and np.array_equal(first.offsets, again.offsets)
    assert len(list(cache.iterdir())) == 1


def test_the_key_depends_on_content_part_reader_and_tokenizer(tokenizer, cache, tmp_path):
    own = tmp_path / "own.txt"
    source = SourceConfig(path=str(own), reader="text")

    def made() -> int:
        before = len(list(cache.iterdir())) if cache.exists() else 0
        corpus.tokenise(source, tokenizer)
        return len(list(cache.iterdir())) - before

    own.write_text("one.<|endoftext|>two.<|endoftext|>three.")
    assert made() == 1
    moved = own.with_name("moved.txt")
    own.rename(moved)
    source = SourceConfig(path=str(moved), reader="text")
    assert made() == 0  # the same content in another place
    moved.write_text("one.<|endoftext|>two.<|endoftext|>four.")
    assert made() == 1
    for changed in ({"max_examples": 2}, {"skip_examples": 1}, {"reader": "stories"}):
        source = SourceConfig(**{"path": str(moved), "reader": "text", **changed})
        assert made() == 1
    tokenizer = with_sinks(tokenizer, 0)
    assert made() == 0  # sinks are not in the stream
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=300), corpus.texts(TEXT))
    assert made() == 1


def test_a_cut_cache_is_made_again(tokenizer, cache):
    documents = decoded(tokenizer, corpus.tokenise(TEXT, tokenizer))
    (folder,) = cache.iterdir()
    with open(folder / "tokens.bin", "r+b") as file:
        file.truncate(100)
    assert decoded(tokenizer, corpus.tokenise(TEXT, tokenizer)) == documents
    (folder / "meta.json").unlink()
    assert decoded(tokenizer, corpus.tokenise(TEXT, tokenizer)) == documents


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "meta.json"])
def test_a_cache_with_one_changed_byte_is_made_again_and_said(tokenizer, cache, name, capsys):
    documents = decoded(tokenizer, corpus.tokenise(TEXT, tokenizer))
    (folder,) = cache.iterdir()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert damaged(folder / "meta.json") == [folder / name]
    assert decoded(tokenizer, corpus.tokenise(TEXT, tokenizer)) == documents
    assert "in the cache are damaged and are recomputed" in capsys.readouterr().out
    assert damaged(folder / "meta.json") == [] and (folder / name).read_bytes() == content


def test_a_failed_read_leaves_nothing(tokenizer, cache, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "fine"}\n' * 10 + "{broken\n")
    with pytest.raises(DataError, match=r"own\.jsonl:11: not JSON"):
        corpus.tokenise(SourceConfig(path=str(own), reader="text"), tokenizer)
    assert not list(cache.glob("*"))


def test_two_processes_make_one_cache(tokenizer, cache, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = (
        "import sys\nfrom threefold.config import SourceConfig\nfrom threefold.data import corpus\n"
        "from threefold.data.tokenizer import load_tokenizer\n"
        "source = SourceConfig(source='sample-stories')\n"
        "print(corpus.tokenise(source, load_tokenizer(sys.argv[1])).n_tokens)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "tokenizer")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0] and len(counts) == 1
    (folder,) = cache.iterdir()
    assert json.loads((folder / "meta.json").read_text())["source"] == "sample-stories"


def test_pretraining_rows_hold_every_token_once(tokenizer):
    sources = [TEXT, STORIES, REVIEWS]
    expected = sorted(
        token for source in sources for ids in encode(tokenizer, corpus.texts(source)) for token in ids.tolist()
    )
    rows = corpus.pretraining_rows(sources, tokenizer, config())
    batch = rows.rows(range(len(rows)))
    assert sorted(batch.tokens_BT[batch.segments_BT > 0].tolist()) == expected
    assert rows.n_tokens == len(expected) == batch.n_tokens
    assert rows.utilisation > 0.93
    assert batch.tokens_BT[:, 0].unique().tolist() == sink_ids(tokenizer)
    bare = corpus.pretraining_rows(sources, with_sinks(tokenizer, 0), config(sinks=0))
    assert bare.rows([0]).segments_BT[0, 0] == 1


def test_example_rows_learn_each_response(tokenizer):
    sources = [INSTRUCTIONS, PROBLEMS]
    rows = corpus.example_rows(sources, tokenizer, config(160))
    batch = rows.rows(range(len(rows)))
    found = set()
    for row in range(len(rows)):
        for segment in range(1, int(batch.segments_BT[row].max()) + 1):
            here = batch.segments_BT[row] == segment
            targets = batch.targets_BT[row][here]
            learned = targets[targets != IGNORE].tolist()
            assert learned[-1] == tokenizer.eos_token_id
            tokens = batch.tokens_BT[row][here].tolist()
            found.add((tokenizer.decode(tokens[: len(tokens) - len(learned) + 1]), tokenizer.decode(learned[:-1])))
    expected = {pair for source in sources for pair in corpus.examples(source)}
    assert len(expected - found) == rows.n_dropped and found <= expected
    assert rows.n_documents + rows.n_dropped == sum(1 for source in sources for _ in corpus.examples(source))


def test_preference_rows_hold_both_sides(tokenizer):
    rows = corpus.preference_rows([PREFERENCES], tokenizer, config(192))
    assert len(rows) + rows.n_dropped == 150
    items = list(iterate(PREFERENCES))
    batch = next(rows.batches(150, shuffle=False))
    for place, pair in enumerate(batch.pairs_P.tolist()):
        item = items[rows.kept[pair]]
        for side, name in enumerate(("chosen", "rejected")):
            here = batch.sides_BT == 2 * place + side
            row, segment = here.any(dim=1), batch.segments_BT[here][0]
            shared = batch.segments_BT[row] == segment >> TRUNK_SHIFT  # the prompt but its last token, in all of these
            assert segment >> TRUNK_SHIFT and shared.any()
            text = tokenizer.decode([*batch.tokens_BT[row][shared], *batch.tokens_BT[here]])
            assert text == item["prompt"] + item[name]
    both = corpus.preference_rows([PREFERENCES, PREFERENCES], tokenizer, config(192))
    assert len(both) == 2 * len(rows) and both.n_tokens == 2 * rows.n_tokens


def test_wrong_kinds_are_refused(tokenizer):
    with pytest.raises(DataError, match="sample-text: reader 'wikitext-raw' gives no prompts and responses"):
        corpus.example_rows([TEXT], tokenizer, config())
    with pytest.raises(DataError, match="sample-problems: reader 'problems' gives no preference pairs"):
        corpus.preference_rows([PROBLEMS], tokenizer, config())
    with pytest.raises(DataError, match="no source is named"):
        corpus.pretraining_rows([], tokenizer, config())


def test_describe_names_no_path(tokenizer, tmp_path):
    facts = corpus.describe(TEXT, "", tokenizer)
    assert facts["documents"] == 30 and facts["kind"] == "embedded" and facts["licence"]
    text = "".join(corpus.texts(TEXT))
    assert (facts["words"], facts["bytes"]) == (len(text.split()), len(text.encode()))
    assert facts["tokens"] == sum(len(ids) for ids in encode(tokenizer, corpus.texts(TEXT)))
    own = tmp_path / "own.txt"
    own.write_text("one two")
    facts = corpus.describe(SourceConfig(path=str(own), reader="text"))
    assert facts["name"] == "own.txt" and str(tmp_path) not in json.dumps(facts)


def test_prompt_and_response_meet_as_in_generation(tokenizer):
    for source in (INSTRUCTIONS, PROBLEMS, PREFERENCES):
        for item in list(iterate(source))[:40]:
            prompt, response = as_prompt_response(resolve(source).reader, item)
            apart = [token for ids in encode(tokenizer, [prompt, response]) for token in ids.tolist()]
            together = next(encode(tokenizer, [prompt + response])).tolist()
            assert apart == together


@real
def test_real_sources_become_rows(tokenizer):
    sources = [
        SourceConfig(source="wikitext-2", split="validation"),
        SourceConfig(source="tinystories", max_examples=100),
    ]
    rows = corpus.pretraining_rows(sources, tokenizer, config(512), DATA)
    assert rows.utilisation > 0.97 and rows.n_documents == 160
    mixture = [SourceConfig(source="alpaca", max_examples=300), SourceConfig(source="gsm8k", max_examples=100)]
    examples = corpus.example_rows(mixture, tokenizer, config(512), DATA)
    assert examples.n_documents + examples.n_dropped == 400 and examples.utilisation > 0.9
    half = {"source": "hh-rlhf", "split": "test"}
    train = corpus.preference_rows([SourceConfig(**half, skip_examples=4500)], tokenizer, config(512), DATA)
    assert len(train) + train.n_dropped == 166
    batches = list(train.batches(16, seed=1, steps=train.steps(16, epochs=1)))
    lengths = [  # of each side in full: behind one sink its last position
        int(batch.positions_BT[batch.sides_BT == side].max())
        for batch in batches
        for side in range(2 * len(batch.pairs_P))
    ]
    # More than the rows have positions: no layout holds that in which prompts are computed twice.
    assert sum(lengths) > sum(batch.tokens_BT.numel() for batch in batches)
    counts = torch.bincount(torch.cat([batch.pairs_P for batch in batches]), minlength=len(train))
    assert counts.max() <= 2  # the last batch is filled up from the next epoch
