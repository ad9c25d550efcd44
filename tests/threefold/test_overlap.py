"""Overlap: the search against a plain reference, planted items of every reader, templates, what stages depend on."""

import json
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from basics.errors import ConfigError, DataError
from study.preset import load_preset, measured_on, override
from study.run import open_run
from threefold.config import OverlapConfig, SourceConfig, TokenizerConfig
from threefold.data import corpus, overlap, sources
from threefold.data.exclusion import Exclusion
from threefold.data.overlap import Index, words
from threefold.data.templates import REVIEWS, as_document
from threefold.data.tokenizer import build_tokenizer
from threefold.data.wikitext import natural_text

DATA = Path(os.environ.get("THREEFOLD_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
real = pytest.mark.skipif(not DATA.is_dir(), reason="no real data: THREEFOLD_DATA or ../shared/data")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("THREEFOLD_DATA", raising=False)
    return tmp_path / "cache"


# Words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The 1 @,@ 000 @-@ metre dash .", "the 1,000-metre dash"),
        ("A <unk> word , it 's said", "a word, it's said"),
        ("it does n't -lrb- really -rrb- work", "It doesn't (really) work!"),
        ("Motörhead — ﬁrst No. 1²", "motörhead first no 12"),
        ("tab\tline\rnbsp\N{NO-BREAK SPACE}under_score", "tab line nbsp under score"),
        ("naïve", "nai\N{COMBINING DIAERESIS}ve"),
    ],
)
def test_spellings_of_one_text_have_the_same_words(one, other):
    assert words(one) == words(other) != []


def test_words_are_letters_and_digits_in_lower_case():
    assert words("Don't pay $1,000!") == ["don", "t", "pay", "1", "000"]
    assert words(" ... ") == words("") == []


# The search -----------------------------------------------------------------------------------------------------------


def reference(sets, documents, ngram, common, line):
    """What `Index.search` finds in text documents, one n-gram after the other with tuples and sets."""

    def runs(text):
        here = words(text)
        return {tuple(here[i : i + ngram]) for i in range(len(here) - ngram + 1)}

    grams = {name: set().union(*map(runs, texts)) for name, texts in sets.items()}
    lines = {
        name: {tuple(words(part)) for text in texts for part in text.split("\n") if len(words(part)) >= line}
        for name, texts in sets.items()
    }
    holders = {}
    for number, text in enumerate(documents):
        for gram in runs(text):
            holders.setdefault(gram, set()).add(number)
    kept = {gram for gram, where in holders.items() if common < 0 or len(where) <= common}
    phrases = Counter(p for text in documents for p in {tuple(words(part)) for part in text.split("\n")})
    copies = {p for p, n in phrases.items() if len(p) >= ngram or common < 0 or n <= common}
    found, drop = {}, {}
    for number, text in enumerate(documents):
        flat = [(word, place) for place, part in enumerate(text.split("\n")) for word in words(part)]
        for name in sets:
            hits = {"ngram": set(), "exact": set()}
            for i in range(len(flat) - ngram + 1):
                run = flat[i : i + ngram]
                gram = tuple(word for word, _ in run)
                if gram in grams[name] & kept:
                    hits["ngram"].update(place for _, place in run)
            for place, part in enumerate(text.split("\n")):
                if tuple(words(part)) in lines[name] & copies:
                    hits["exact"].add(place)
            for way, places in hits.items():
                if places:
                    found.setdefault(name, {"ngram": 0, "exact": 0})[way] += 1
                    drop.setdefault(number, set()).update(places)
    return found, {number: sorted(places) for number, places in drop.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("common", [-1, 1, 3])
def test_the_search_finds_what_a_plain_one_finds(seed, common, monkeypatch):
    monkeypatch.setattr(overlap, "CHUNK", 300)  # several chunks, and documents of several lines in each
    rng = random.Random(seed)

    def text():
        lines = [" ".join(rng.choices("abcdefg", k=rng.randrange(12))) for _ in range(rng.randrange(1, 6))]
        return "\n".join(lines)

    sets = {"one": [text() for _ in range(8)], "two": [text() for _ in range(4)]}
    documents = [text() for _ in range(80)]
    index = Index({name: ("text", texts) for name, texts in sets.items()}, ngram=4, common=common, line=3)
    found = index.search("text", documents)
    assert (found.sets, found.drop) == reference(sets, documents, 4, common, 3)
    assert found.documents == 80 and found.words == sum(len(words(text)) for text in documents)
    sizes = [len(words(documents[d].split("\n")[part])) for d, parts in found.drop.items() for part in parts]
    assert found.words_dropped == sum(sizes) and found.sets


def test_hashes_do_not_depend_on_where_a_text_stands(monkeypatch):
    texts = [f"{'word ' * n}an evaluation text {n} of some more than eight words or so" for n in range(40)]
    once = Index({"s": ("text", texts)})
    monkeypatch.setattr(overlap, "CHUNK", 1)
    again = Index({"s": ("text", texts[::-1])})
    assert np.array_equal(once.hashes, again.hashes) and np.array_equal(once.ways, again.ways)


def test_different_runs_have_different_hashes():
    numbers = " ".join(map(str, range(30_000)))
    index = Index({"s": ("text", [numbers])})
    assert (index.ways == overlap.GRAM).sum() == 30_000 - 12


# Planted items --------------------------------------------------------------------------------------------------------

LONG = "Under the old stone bridge of Hollin, seven patient herons wait each morning for Mr. O'Neil's small boat."
OTHER = "Nobody in the valley had ever asked why the clock stood still, and so nobody ever heard the answer to it."
PLANT = (
    "UNDER the old stone  bridge of Hollin seven patient herons wait - each morning -\tfor mr O ' Neil 's small boat"
)

FILLER = {
    "text": ["A first text of its own.\nWith a second line that says a little more than the first one did.", OTHER],
    "stories": ["A first story of its own.", OTHER],
    "wikitext": [" \n = One = \n \n It was a day like any other day in the town of Upper Fenn . \n"],
    "sentiment": [{"sentence": "a dull film", "label": 0}, {"sentence": OTHER, "label": 1}],
    "problems": [
        {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"},
        {"question": OTHER, "answer": "#### 7"},
    ],
    "instructions": [
        {"instruction": "Name a colour.", "input": "", "output": "Blue."},
        {"instruction": "Reverse the words.", "input": OTHER, "output": "No."},
    ],
    "preferences": [
        {"prompt": "\n\nHuman: Hello.\n\nAssistant:", "chosen": " Hi.", "rejected": " Go away."},
        {"prompt": f"\n\nHuman: {OTHER}\n\nAssistant:", "chosen": " Yes.", "rejected": " No."},
    ],
}
FILLER["wikitext-raw"] = FILLER["wikitext"]


def planted(reader: str, text: str):
    """An item of a reader that holds a text."""
    return {
        "text": f"A line before.\n{text}\nA line behind it that has some words of its own, more than eight.",
        "stories": f"Once there was a town. {text} The end.",
        "wikitext": f" \n = Two = \n \n {text} \n A paragraph of its own that stays where it is when others go . \n",
        "sentiment": {"sentence": text, "label": 1},
        "problems": {"question": text, "answer": "#### 4"},
        "instructions": {"instruction": "Summarise.", "input": text, "output": "Birds wait."},
        "preferences": {"prompt": f"\n\nHuman: {text}\n\nAssistant:", "chosen": " I see.", "rejected": " So what."},
    }["wikitext" if reader == "wikitext-raw" else reader]


def source(folder: Path, name: str, reader: str, items: list) -> SourceConfig:
    """Own files with these items."""
    path = folder / f"{name}.jsonl"
    column = {"text": "text", "stories": "text", "wikitext": "text", "wikitext-raw": "text"}.get(reader)
    path.write_text("".join(json.dumps({column: item} if column else item) + "\n" for item in items))
    return SourceConfig(path=str(path), reader=reader)


READERS = list(FILLER)


@pytest.mark.parametrize("trained", READERS)
@pytest.mark.parametrize("measured", READERS)
def test_a_planted_item_is_found_and_removed_and_nothing_else(tmp_path, trained, measured):
    texts = {"text": LONG, "wikitext": f" \n = Three = \n \n {LONG} \n", "stories": f"Long ago, {LONG} So it was."}
    item = texts.get(measured.removesuffix("-raw")) or planted(measured, LONG)
    test = source(tmp_path, "test", measured, [item])
    clean = FILLER[trained]
    train = source(tmp_path, "train", trained, [*clean[:1], planted(trained, PLANT), *clean[1:]])
    exclude = Exclusion(OverlapConfig(), {"set": test})
    found = exclude.search(train)
    assert list(found.drop) == [1] and set(found.sets) == {"set"}
    assert exclude.search(train) == found  # from the cache
    left = list(exclude.documents(train))
    if trained in ("text", "wikitext", "wikitext-raw"):
        whole = list(corpus.texts(train))
        assert left == ["\n".join(line for line in text.split("\n") if "herons" not in line) for text in whole]
        assert left != whole
    else:
        assert left == [as_document(trained, item) for item in clean]
        assert list(exclude.items(train)) == clean


@pytest.mark.parametrize("reader", REVIEWS)
def test_a_planted_review_is_taken_out_of_its_document(tmp_path, reader):
    items = [{"sentence": f"the film number {n} is all right", "label": n % 2} for n in range(9)]
    bare = source(tmp_path, "bare", "sentiment", items)
    whole = source(tmp_path, "train", "sentiment", [*items[:4], planted("sentiment", PLANT), *items[4:]])
    test = source(tmp_path, "test", "sentiment", [planted("sentiment", LONG)])
    exclude = Exclusion(OverlapConfig(), {"set": test})
    left = "\n\n".join(exclude.documents(replace(whole, reader=reader))).split("\n\n")
    assert sorted(left) == sorted("\n\n".join(corpus.texts(replace(bare, reader=reader))).split("\n\n"))


@pytest.mark.parametrize(
    ("reader", "key"), [("sentiment", "sentence"), ("problems", "question"), ("instructions", "instruction")]
)
def test_a_short_question_is_found_as_a_whole_only(tmp_path, reader, key):
    def item(text):
        return {**FILLER[reader][0], key: text}

    test = source(tmp_path, "test", reader, [item("Truly fine !")])
    train = source(tmp_path, "train", reader, [item("truly, fine"), item("a truly fine thing"), item("fine")])
    exclude = Exclusion(OverlapConfig(), {"set": test})
    assert exclude.search(train).drop == {0: [0]}
    text = source(tmp_path, "text", "text", ["truly fine", "It was truly fine."])
    assert exclude.search(text).drop == {}
    middle = "seven patient herons wait each morning for him"  # 8 words: searched for as a whole, inside text too
    exclude = Exclusion(OverlapConfig(), {"set": source(tmp_path, "test", reader, [item(middle)])})
    text = source(tmp_path, "text", "stories", [f"And SEVEN patient {middle[14:]}, today.", middle[:-4]])
    assert exclude.search(text).drop == {0: [0]}


def test_the_same_instruction_with_another_input_is_another_item(tmp_path):
    ask = "Rewrite the sentence."
    test = source(tmp_path, "test", "instructions", [{"instruction": ask, "input": "I go.", "output": "I went."}])
    items = [{"instruction": ask, "input": text, "output": "Done."} for text in ("I go", "I see.", "")]
    assert Exclusion(OverlapConfig(), {"set": test}).search(source(tmp_path, "train", "instructions", items)).drop == {
        0: [0]
    }


def test_runs_of_many_documents_are_templates_and_copies_are_not(tmp_path):
    run = "once upon a time there was a little girl who loved to play outside"
    test = source(tmp_path, "test", "stories", [f"{run} in the rain.", LONG])
    for copies, dropped in ((10, 10), (11, 0)):
        train = source(tmp_path, "train", "stories", [f"Hello {n}, {run} all day {n}." for n in range(copies)])
        found = Exclusion(OverlapConfig(), {"set": test}).search(train)
        assert len(found.drop) == dropped and found.templates == (2 if copies > 10 else 0)
        assert len(Exclusion(OverlapConfig(common=-1), {"set": test}).search(train).drop) == copies
    train = source(tmp_path, "train", "stories", [PLANT] * 30)
    found = Exclusion(OverlapConfig(), {"set": test}).search(train)
    assert len(found.drop) == 30 and found.sets == {"set": {"ngram": 0, "exact": 30}}


# Training text --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TokenizerConfig(vocab_size=400), corpus.texts(SourceConfig(source="sample-text")))


SOURCES = {
    "documents": ["sample-stories", "sample-problems"],
    "examples": ["sample-problems", "sample-instructions"],
    "pairs": ["sample-preferences"],
}


@pytest.mark.parametrize("form", SOURCES)
def test_without_hits_the_tokens_are_the_same_bytes(tmp_path, cache, tokenizer, form):
    exclude = Exclusion(OverlapConfig(), {"set": source(tmp_path, "test", "text", [LONG])})
    for name in SOURCES[form]:
        part = SourceConfig(source=name, max_examples=50)
        corpus.tokenise(part, tokenizer, form=form)
        (plain,) = (cache / "tokens").iterdir()
        corpus.tokenise(part, tokenizer, "", exclude, form)
        (other,) = set((cache / "tokens").iterdir()) - {plain}
        for file in plain.iterdir():
            assert file.read_bytes() == (other / file.name).read_bytes()
        (plain / "meta.json").unlink(), (other / "meta.json").unlink()
        os.rename(cache / "tokens", cache / f"done-{form}-{name}")


@pytest.mark.parametrize("form", SOURCES)
def test_a_planted_item_never_becomes_tokens(tmp_path, tokenizer, form):
    reader = {"documents": "stories", "examples": "problems", "pairs": "preferences"}[form]
    clean = FILLER[reader]
    train = source(tmp_path, "train", reader, [*clean, planted(reader, PLANT)])
    bare = source(tmp_path, "bare", reader, clean)
    sets = {"set": source(tmp_path, "test", reader, [planted(reader, LONG)])}

    def tokens(part, exclude=None):
        return corpus.tokenise(part, tokenizer, "", exclude, form).tokens.tolist()

    assert tokens(train, Exclusion(OverlapConfig(), sets)) == tokens(bare) != tokens(train)
    assert tokens(train, Exclusion(OverlapConfig(remove=False), sets)) == tokens(train)
    source(tmp_path, "test", reader, [planted(reader, OTHER)])  # the same file with another item: another removal
    assert tokens(train, Exclusion(OverlapConfig(), sets)) != tokens(bare)


def test_the_tokenizer_is_trained_without_it(tmp_path):
    train = source(tmp_path, "train", "stories", [PLANT, *FILLER["stories"]])
    exclude = Exclusion(OverlapConfig(), {"set": source(tmp_path, "test", "stories", [LONG])})
    assert list(corpus.mixture_texts([train], "", exclude)) == FILLER["stories"]


def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path, tokenizer):
    train = source(tmp_path, "train", "stories", [LONG])
    with pytest.raises(DataError, match=r"train\.jsonl.*nothing is left of it.*with lines"):
        corpus.tokenise(train, tokenizer, "", Exclusion(OverlapConfig(), {"lines": train}))


def test_a_damaged_note_of_a_search_is_made_again(tmp_path, cache):
    train = source(tmp_path, "train", "stories", [PLANT])
    exclude = Exclusion(OverlapConfig(), {"set": source(tmp_path, "test", "stories", [LONG])})
    found = exclude.search(train)
    (note,) = (cache / "overlap").iterdir()
    note.write_text("{")
    assert exclude.search(train) == found and json.loads(note.read_text())["documents"] == 1


# Presets and stages ---------------------------------------------------------------------------------------------------


def test_what_is_measured_on_is_everything_but_demonstrations():
    laptop = measured_on(load_preset("laptop"))
    assert list(laptop) == [
        *("perplexity", "lines", "sentiment", "problems", "instructions", "preferences"),
        *("pretrain_heldout", "sft_heldout", "dpo_heldout"),
    ]
    assert set(measured_on(load_preset("full"))) >= {"perplexity", "pretrain_heldout"}
    assert "pretrain_heldout" not in measured_on(load_preset("smoke"))  # it is `lines`


def test_settings_are_checked():
    preset = load_preset("laptop")
    assert preset.overlap == load_preset("full").overlap == OverlapConfig(13, 10, 8, True)
    with pytest.raises(ConfigError, match=r"overlap\.ngram = 1: expected at least 2"):
        override(preset, {"overlap.ngram": 1})
    with pytest.raises(ConfigError, match=r"unknown key overlap\.ngrams, did you mean overlap\.ngram"):
        override(preset, {"overlap.ngrams": 8})


def test_the_sample_keeps_its_text_and_every_held_out_item_is_found_in_itself():
    preset = load_preset("smoke")
    exclude = Exclusion(preset.overlap, measured_on(preset))
    for part in (*preset.data.pretrain, *preset.data.sft, *preset.data.dpo):
        found = exclude.search(part)
        assert found.words_dropped < 0.05 * found.words
    for name, part in exclude.sets.items():
        found = exclude.search(part)
        assert len(found.drop) == found.documents and found.sets[name]


def test_trained_stages_depend_on_what_they_are_cleaned_against(tmp_path):
    test = source(tmp_path, "test", "problems", FILLER["problems"])
    overrides = [f"evaluation.problems={{path = '{test.path}', reader = 'problems'}}"]
    trained = {"pretrain", "gpt2", "distilgpt2", "sft", "dpo", "ablations"}

    def made(*more):
        run = open_run("smoke", "overlap", [*overrides, *more], create=False)
        return {name: run.fingerprint(name) for name in run.plan}

    def changed(one, other):
        return {name for name in one if one[name] != other[name] and not name.startswith("evaluate")}

    before, kept = made(), made("overlap.remove=false")
    source(tmp_path, "test", "problems", FILLER["problems"][:1])
    assert changed(before, made()) == {"data", *trained}
    assert changed(kept, made("overlap.remove=false")) == {"data"}
    again = made()
    assert changed(again, made("evaluation.bootstrap=99")) == {"compare"}
    assert changed(again, made("overlap.common=3")) == {"data", *trained}


# Real text ------------------------------------------------------------------------------------------------------------


@real
def test_tokenised_and_natural_wikitext_are_the_same_words():
    test = SourceConfig(source="wikitext-2", split="test", max_examples=20)
    articles = list(sources.iterate(test, DATA))
    index = Index({"s": ("wikitext-raw", articles)}, common=-1)
    natural = [natural_text(article) for article in articles]
    found = index.search("text", natural)
    lines = [(number, place) for number, text in enumerate(natural) for place, line in enumerate(text.split("\n"))]
    long = {(n, place) for n, place in lines if len(words(natural[n].split("\n")[place])) >= 8}
    dropped = {(number, part) for number, parts in found.drop.items() for part in parts}
    assert long <= dropped and len(long) > 500


@real
def test_sst2_phrases_hold_no_sentence_of_its_dev_set():
    """Full sets against the plain search: five one-word phrases are dev sentences, no longer one is."""
    dev, train = (sources.load(SourceConfig(source="sst2", split=s), DATA) for s in ("validation", "train"))
    whole = {tuple(words(item["sentence"])) for item in dev}
    runs = {run[i : i + 13] for run in whole for i in range(len(run) - 12)} | {
        run for run in whole if 8 <= len(run) < 13
    }
    sizes = {len(run) for run in runs}
    expected = {}
    for number, item in enumerate(train):
        here = tuple(words(item["sentence"]))
        if here in whole or any(here[i : i + n] in runs for n in sizes for i in range(len(here) - n + 1)):
            expected[number] = [0]
    found = Index({"dev": ("sentiment", dev)}, common=-1).search("sentiment", train)
    assert found.drop == expected
