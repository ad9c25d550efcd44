"""Readers: shapes of items, what a message names, and counts on the real sets."""

import gzip
import json
import math
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basics.errors import DataError
from threefold.data.readers import (
    OddRow,
    read_files,
    read_items,
    reviews,
    shared_prompt,
    with_final_number,
)
from threefold.data.rows import Row, read_rows, read_text
from threefold.data.templates import LABELS, REVIEWS, as_document, as_prompt_response, instruction_prompt
from threefold.data.wikitext import articles, hub_rows, natural_text, without_holes
from threefold.evaluation.sentiment import TEMPLATES

DATA = Path(os.environ.get("THREEFOLD_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
real = pytest.mark.skipif(not DATA.is_dir(), reason="no real data: THREEFOLD_DATA or ../shared/data")


HI = "\n\nHuman: hi\n\nAssistant:"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def items(reader: str, *paths: Path) -> list:
    return list(read_files(reader, paths))


# Files


def test_each_format_gives_the_same_rows(tmp_path):
    rows = [{"sentence": 'a "quoted one', "label": 1}, {"sentence": "line\u2028separator", "label": 0}]
    jsonl = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    paths = [
        write(tmp_path / "a.jsonl", jsonl),
        write(tmp_path / "a.json", json.dumps(rows)),
        write(tmp_path / "lines.json", jsonl),
        write(tmp_path / "a.ndjson", jsonl),
        write(tmp_path / "a.csv", 'sentence,label\r\n"a ""quoted one",1\r\nline\u2028separator,0\r\n'),
        write(tmp_path / "a.tsv", "sentence\tlabel\n" + "".join(f"{r['sentence']}\t{r['label']}\n" for r in rows)),
        write(
            tmp_path / "crlf.tsv", "sentence\tlabel\r\n" + "".join(f"{r['sentence']}\t{r['label']}\r\n" for r in rows)
        ),
        write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + jsonl.encode()),
        write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl.encode())),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in [*paths, tmp_path / "a.parquet"]:
        assert items("sentiment", path) == rows, path.name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"a": 1}\n{"a": \n', r"bad\.jsonl:2: not JSON: Expecting value"),
        ("array.jsonl", "[1, 2]\n", r"array\.jsonl:1: expected a JSON object, got an array"),
        ("bad.json", '[\n {"a": 1},\n {"a" 2}\n]', r"bad\.json:3: not JSON: Expecting ':' delimiter"),
        ("object.json", '{"a": 1}', r"object\.json: expected a JSON array of objects, got an object"),
        ("numbers.json", "[1]", r"numbers\.json: item 1: expected a JSON object, got a number"),
        (
            "short.tsv",
            "sentence\tlabel\nfine\t1\nbad\n",
            r"short\.tsv:3: 1 columns, the heading has 2 \(sentence, label\)",
        ),
        ("latin.jsonl", '{"a": 1}\n{"a": "caf\xe9"}\n'.encode("latin-1"), r"latin\.jsonl:2: not UTF-8 \(byte 0xe9\)"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], r"cut\.jsonl\.gz: not a whole gzip file"),
        ("not.parquet", b"PAR", r"not\.parquet: not a readable Parquet file"),
        ("table.xlsx", "x", r"no rows can be read from \.xlsx: \.jsonl, \.ndjson, \.json, \.csv, \.tsv, "),
        ("open.csv", 'text,label\n"a\nb,1\n', r"open\.csv:3: not CSV: unexpected end of data"),
        ("short.csv", 'text,label\n"a\nb",1\nc\n', r"short\.csv:4: 1 columns, the heading has 2 \(text, label\)"),
        ("lines.json", '{"a": 1}\n{"a": \n', r"lines\.json:2: not JSON: Expecting value"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        list(read_rows(write(tmp_path / name, content)))


def test_plain_text(tmp_path):
    whole = write(tmp_path / "whole.txt", "one\n\ntwo\n")
    parts = write(tmp_path / "parts.txt", "one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    assert items("text", whole) == ["one\n\ntwo"]
    assert items("stories", parts) == ["one", "two"]
    assert items("text", write(tmp_path / "rows.jsonl", '{"text": "one"}\n{"text": ""}\n')) == ["one"]
    with pytest.raises(DataError, match=r"reader 'problems' reads rows"):
        items("problems", whole)
    with pytest.raises(DataError, match=r"latin\.txt:2: not UTF-8"):
        read_text(write(tmp_path / "latin.txt", "a\n\xe9".encode("latin-1")))


# Readers


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        ("problems", {"question": "q"}, "x:7: no column 'answer'; it has: question"),
        ("problems", {"question": "q", "answer": 4}, "x:7: column 'answer' holds a number, expected text"),
        ("text", {"body": "b"}, "x:7: no column 'text'; it has: body"),
        ("instructions", {"instruction": " ", "output": "o"}, "x:7: column 'instruction' is empty"),
        ("sentiment", {"sentence": "s"}, "x:7: no column 'label'; expected 0 or negative, 1 or positive"),
        ("sentiment", {"sentence": "s", "label": -1}, "x:7: label -1; expected"),
        ("sentiment", {"sentence": "s", "label": True}, "x:7: label True; expected"),
        ("problems", {"question": "q", "answer": "eighteen"}, "x:7: no number can be read from the answer 'eighteen'"),
        ("problems", {"question": "q", "answer": "9 + 9 = 18"}, "x:7: no number can be read from the answer '9 + 9"),
        ("instructions", {"instruction": math.nan, "output": "o"}, "x:7: column 'instruction' holds NaN, expected"),
        ("text", {"text": None}, "x:7: column 'text' holds null, expected text"),
        ("sentiment", {"sentence": "s", "label": math.nan}, "x:7: label nan; expected"),
        ("preferences", {"prompt": "a", "chosen": "a b", "rejected": "c"}, "x:7: column 'prompt' is the beginning of"),
        ("preferences", {"prompt": "other", "chosen": HI + " a", "rejected": HI + " b"}, "x:7: column 'prompt' is the"),
        ("preferences", {"chosen": [], "rejected": "b"}, "x:7: column 'chosen' holds an array"),
        ("poems", {"text": "t"}, "no reader 'poems'; there are: text, stories, wikitext"),
    ],
)
def test_unusable_rows_are_named(reader, row, message):
    with pytest.raises(DataError) as raised:
        list(read_items(reader, [Row(row, "x:7")]))
    assert str(raised.value).startswith(message)


def test_items_have_their_shapes():
    def one(reader, **columns):
        return next(read_items(reader, [Row(columns, "x:1")]))

    instruction = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert one("instructions", **instruction, text="ignored") == instruction
    for missing in (None, math.nan):
        assert one("instructions", instruction="Add.", input=missing, output="3")["input"] == ""
        assert one("preferences", prompt=missing, chosen=HI + " a", rejected=HI + " b")["prompt"] == HI
    assert one("sentiment", sentence="good", label=1.0)["label"] == 1
    assert one("sentiment", sentence="good ", label="positive", idx=3) == {"sentence": "good ", "label": 1}
    assert one("problems", question=" q\n", answer="4 ") == {"question": "q", "answer": "4"}


def test_preferences_share_their_prompt():
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    expected = {"prompt": prompt, "chosen": " Because.", "rejected": " Before."}
    for row in (
        {"chosen": prompt + " Because.", "rejected": prompt + " Before."},
        {"prompt": prompt, "chosen": " Because.", "rejected": " Before."},
        {"prompt": prompt, "chosen": prompt + " Because.", "rejected": prompt + " Before."},
    ):
        assert list(read_items("preferences", [Row(row, "x:1")])) == [expected]
    longer = prompt + " Why not?\n\nHuman: No.\n\nAssistant: Yes."
    assert shared_prompt(prompt + " Because.", longer) == prompt
    assert shared_prompt(prompt, prompt) == prompt
    assert shared_prompt("", "x") == ""


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        (HI + " ", HI + " a", HI + "b", (HI, " a", "b")),  # white space of the prompt's own
        (HI.strip(), HI + " a", HI + " b", (HI, " a", " b")),
        ("Human: hi", HI + " a", HI + " b", (HI, " a", " b")),  # a part of the dialogue
        ("hi", HI + " a", HI + " b", (HI, " a", " b")),
        ("Q: hi\nA:\n", "Q: hi\nA: yes", "Q: hi\nA: no", ("Q: hi\nA:", " yes", " no")),
        ("hi", "It is hi.", "hm", ("hi", "It is hi.", "hm")),  # responses
        ("I", "It is.", "No.", ("I", "It is.", "No.")),
        (HI, " a\n\nHuman: b\n\nAssistant: c", " a\n\nHuman: b\n\nAssistant: d", None),  # responses of several turns
    ],
)
def test_a_prompt_that_is_no_prefix_of_both_sides(prompt, chosen, rejected, expected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    expected = dict(zip(row, expected or row.values(), strict=True))
    assert list(read_items("preferences", [Row(row, "x:1")])) == [expected]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (HI + " a", HI, "a response is empty"),
        (HI + " \n", HI + " b", "a response is empty"),
        (HI + " a", HI + " a", "chosen and rejected are equal"),
        ("a", "b", "chosen and rejected share no dialogue"),
    ],
)
def test_odd_pairs_are_set_aside(chosen, rejected, reason):
    (odd,) = read_items("preferences", [Row({"chosen": chosen, "rejected": rejected}, "x:1")])
    assert isinstance(odd, OddRow) and odd.reason.startswith(reason) and odd.place == "x:1"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("9+9=18\n#### 18", None),
        ("#### 1,800", None),
        ("18", None),
        ("$18.", None),
        ("The answer is 18", "The answer is 18\n#### 18"),
        ("I have 2 bags of 9.\nAnswer: $1,800.00.", "I have 2 bags of 9.\nAnswer: $1,800.00.\n#### 1800"),
        ("so 9+9 is \\boxed{18}.", "so 9+9 is \\boxed{18}.\n#### 18"),
        ("9+9=18\n####18", "9+9=18\n#### 18"),
        ("9+9=18\n#### 18 apples", "9+9=18\n#### 18"),
        ("#### Solution\nIt is -5.", "#### Solution\nIt is -5.\n#### -5"),
        ("It is \N{MINUS SIGN}5", "It is \N{MINUS SIGN}5\n#### -5"),
        (r"\boxed{1,800}", "\\boxed{1,800}\n#### 1800"),
        ("18.0", "18"),
        ("#### 18.00", "#### 18"),
        ("#### 007", "#### 7"),
        ("-.5", "-0.5"),
        ("$.50", "0.50"),
        ("It is .0", "It is .0\n#### 0"),
    ],
)
def test_a_final_number_is_read_where_there_is_one(answer, expected):
    assert with_final_number(answer) == (expected or answer)
    final = (expected or answer).rpartition("#### ")[2]
    assert re.fullmatch(r"-?[0-9.]+", re.sub(r"[,$]", "", final).removesuffix("."))  # what its scorer compares


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "x",
        "H2O",
        "2e3",
        "6:30",
        "1/2",
        "The answer is 1/2",
        "9+9=18",
        r"\boxed{\frac{1}{2}}",
        "1,8 km",
        "#### 3 or 4",
        "#### 1.800,50",
    ],
)
def test_no_number_is_made_up(answer):
    assert with_final_number(answer) is None


@given(st.text("ab", max_size=30), st.text("ab", max_size=30))
def test_shared_prompt_is_a_prefix_of_both(a, b):
    mark = "\n\nAssistant:"
    chosen, rejected = f"x{mark}{a}{mark}{b}", f"x{mark}{b}{mark}{a}"
    prompt = shared_prompt(chosen, rejected)
    assert prompt.endswith(mark) and chosen.startswith(prompt) and rejected.startswith(prompt)


# Templates


def test_prompt_and_response_are_the_whole_document():
    cases = {
        "instructions": {"instruction": "Add.", "input": "1 2", "output": "3"},
        "problems": {"question": "1 + 1?", "answer": "#### 2"},
        "sentiment": {"sentence": "fine .", "label": 1},
        "preferences": {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"},
    }
    texts = {
        "instructions": "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3",
        "problems": "Question: 1 + 1?\nAnswer: #### 2",
        "sentiment": "fine .\nQuestion: Is this sentence positive or negative?\nAnswer: positive",
        "preferences": "\n\nHuman: a\n\nAssistant: b",
    }
    for reader, item in cases.items():
        prompt, response = as_prompt_response(reader, item)
        assert prompt + response == as_document(reader, item) == texts[reader]
    assert instruction_prompt("Add.", "") == "### Instruction:\nAdd.\n\n### Response:\n"
    with pytest.raises(DataError, match="gives text"):
        as_prompt_response("stories", "once")


@given(st.integers(0, 60), st.integers(0, 5), st.sampled_from(list(REVIEWS)))
def test_reviews_hold_four_to_eight_and_lose_none(n, seed, reader):
    made = [{"sentence": f"s{i}.", "label": i % 2} for i in range(n)]
    documents = reviews(made, seed, reader)
    blocks = [document.split("\n\n") for document in documents]
    assert sorted(block for part in blocks for block in part) == sorted(
        f"{REVIEWS[reader](item['sentence'])} {LABELS[item['label']]}" for item in made
    )
    assert all(4 <= len(part) <= 8 for part in blocks) or n < 4
    assert documents == reviews(made, seed, reader)


def test_reviews_are_worded_as_a_sentiment_prompt_or_as_none():
    worded = {reader: prompt("It sings.") for reader, prompt in REVIEWS.items()}
    prompts = [template.text("It sings.") for template in TEMPLATES]
    assert worded["reviews"] == prompts[0] and worded["reviews-reworded"] not in prompts


# WikiText

WIKI = (
    " \n = First = \n \n Text of 1 @,@ 000 words , and a well @-@ known ( one ) . \n = 1 henry and = \n"
    " \n = = Part = = \n \n It 's <unk> here . It is whole . \n \n = = Gone = = \n \n All of <unk> . \n"
    ' \n \n = Second = \n \n He said " yes " : it didn \'t cost $ 5 . \n'
)


def test_articles_end_to_end_are_the_file():
    found = list(articles(WIKI.splitlines(keepends=True)))
    assert len(found) == 2 and "".join(found) == WIKI
    assert found[0].startswith(" \n = First") and found[1].startswith(" = Second")
    rows = [row for article in found for row in hub_rows(article)]
    assert rows == ["" if not line.strip() else line for line in WIKI.splitlines(keepends=True)]
    # The hub's rows, and rows of whole pages, read to the same articles.
    assert list(read_items("wikitext", [Row({"text": row}, "x") for row in rows])) == found
    assert list(read_items("wikitext", [Row({"page": page}, "x") for page in found])) == found
    assert list(articles([" \n", " \n"])) == []
    assert list(articles(["no title\n", "here"])) == ["no title\nhere\n"]


def test_natural_text():
    first, second = articles(WIKI.splitlines(keepends=True))
    assert natural_text(first) == (
        "= First =\n\nText of 1,000 words, and a well-known (one).\n\n= 1 henry and =\n\n== Part ==\n\nIt is whole."
    )
    assert natural_text(second) == '= Second =\n\nHe said "yes": it didn\'t cost $5.'
    assert as_document("wikitext", second) == natural_text(second)
    assert as_document("wikitext-raw", second) == second
    assert "<unk>" not in without_holes(first) and " It is whole . \n" in without_holes(first)
    assert "1 @,@ 000" in without_holes(first)


# The real sets


@real
@pytest.mark.parametrize(
    ("file", "lines", "count"),
    [("wiki.test.raw", 4358, 60), ("wiki.valid.raw", 3760, 60), ("wiki.train.tokens", None, 600)],
)
def test_wikitext2_has_its_published_articles(file, lines, count):
    path = DATA / "wikitext-2" / file
    found = items("wikitext", path)
    assert len(found) == count
    assert "".join(found) == path.read_text(encoding="utf-8")
    if lines:
        assert sum(len(hub_rows(article)) for article in found) == lines
    if file.endswith(".tokens"):
        assert sum(len(line.split()) + 1 for article in found for line in article.split("\n")[:-1]) == 2_088_628
        natural = [natural_text(article) for article in found]
        assert all(natural) and not any("<unk>" in text or "@-@" in text for text in natural)
        assert sum(len(text.split()) for text in natural) > 900_000


@real
def test_wikitext2_test_is_the_hubs_text():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2-bpe")
    rows = [row for article in items("wikitext", DATA / "wikitext-2" / "wiki.test.raw") for row in hub_rows(article)]
    ids = tokenizer.backend_tokenizer.encode("\n\n".join(rows), add_special_tokens=False).ids
    assert len(ids) == 287_644


@real
@pytest.mark.parametrize(
    ("reader", "file", "count"),
    [
        ("stories", "tinystories/stories.jsonl", 13_258),
        ("instructions", "alpaca/alpaca_data.json", 52_002),
        ("preferences", "hh-rlhf/helpful-base.test.jsonl.gz", 2_354),
        ("preferences", "hh-rlhf/harmless-base.test.jsonl.gz", 2_312),
        ("sentiment", "sst2/train.tsv", 67_349),
        ("sentiment", "sst2/dev.tsv", 872),
        ("problems", "gsm8k/train.jsonl", 7_473),
        ("problems", "gsm8k/test.jsonl", 1_319),
    ],
)
def test_real_counts(reader, file, count):
    found = items(reader, DATA / file)
    assert len(found) == count
    if reader == "preferences":
        raw = [json.loads(line) for line in gzip.decompress((DATA / file).read_bytes()).decode().splitlines()]
        pairs = [(item, row) for item, row in zip(found, raw, strict=True) if not isinstance(item, OddRow)]
        assert (
            len(found) - len(pairs)
            == {"helpful-base.test.jsonl.gz": 6, "harmless-base.test.jsonl.gz": 4}[Path(file).name]
        )
        for item, row in pairs:
            assert item["prompt"] + item["chosen"] == row["chosen"]
            assert item["prompt"] + item["rejected"] == row["rejected"]
            assert item["prompt"].endswith("\n\nAssistant:")
        last_turn = sum(item["prompt"] == r["chosen"][: r["chosen"].rfind("\n\nAssistant:") + 12] for item, r in pairs)
        assert len(pairs) - last_turn < 10
    if file == "sst2/dev.tsv":
        assert sum(item["label"] for item in found) == 444
    if reader == "problems":
        assert all("\n#### " in item["answer"] for item in found)
