"""Data files of any content, through every reader: items of the documented shapes, or a DataError that names file and
line."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import as_json, damaged, documented, examples, mutated

from threefold.config import SourceConfig
from threefold.data import readers, sources
from threefold.data.data_files import files_in, select
from threefold.data.templates import REVIEWS, TEXT_READERS, as_document
from threefold.evaluation.problems import extract_strict, matches

ROWS = {
    "text": {"text": "A fox ran over the hill."},
    "stories": {"story": "Once there was a fox."},
    "wikitext": {"text": " = Fox = \n A fox is an animal . \n"},
    "wikitext-raw": {"text": " = Fox = \n A fox is an animal . \n"},
    **{reader: {"sentence": "a fine film ", "label": 1} for reader in REVIEWS},
    "instructions": {"instruction": "Say hello.", "input": "", "output": "Hello."},
    "preferences": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
    "sentiment": {"sentence": "a fine film ", "label": "positive"},
    "problems": {"question": "1 + 1?", "answer": "#### 2"},
    "minimal-pairs": {"sentence_good": "A fox runs.", "sentence_bad": "A fox run.", "UID": "agreement"},
}
KEYS = {
    "instructions": {"instruction", "input", "output"},
    "preferences": {"prompt", "chosen", "rejected"},
    "sentiment": {"sentence", "label"},
    "problems": {"question", "answer"},
    "minimal-pairs": {"good", "bad", "phenomenon", "group"},
}


def read(reader, file):
    """The items, checked: text that every tokenizer takes under the documented keys."""
    items = documented(lambda: list(readers.read_files(reader, [file])), file.name)
    for item in items or ():
        if isinstance(item, readers.OddRow):
            assert reader == "preferences" and item.reason and item.place.startswith(str(file))
            continue
        if reader in ("sentiment", *REVIEWS):
            assert item["label"] in (0, 1) and item["sentence"].encode() is not None
            continue
        assert isinstance(item, str) if reader in TEXT_READERS else item.keys() == KEYS[reader]
        as_document(reader, item).encode()
    return items


def test_every_reader_has_a_row_here(tmp_path):
    assert ROWS.keys() == readers.READERS.keys()
    for reader, row in ROWS.items():
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
        assert read(reader, tmp_path / "a.jsonl")


@examples("row", 250)
@given(data=st.data(), reader=st.sampled_from(sorted(ROWS)))
def test_rows_with_values_of_any_kind(tmp_path_factory, data, reader):
    row = data.draw(mutated(ROWS[reader]))
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    file.write_text(as_json(ROWS[reader]) + "\n" + as_json(row) + "\n", encoding="utf-8")
    read(reader, file)


@examples("data file", 200)
@given(data=st.data(), reader=st.sampled_from(sorted(ROWS)), kind=st.sampled_from([".jsonl", ".json", ".tsv", ".txt"]))
def test_damaged_files(tmp_path_factory, data, reader, kind):
    row = ROWS[reader]
    content = {
        ".jsonl": json.dumps(row) + "\n",
        ".json": json.dumps([row, row]),
        ".tsv": "\t".join(row) + "\n" + "\t".join(str(cell).strip() for cell in row.values()) + "\n",
        ".txt": "A fox.\n<|endoftext|>\n = Fox = \n",
    }[kind].encode()
    file = tmp_path_factory.getbasetemp() / f"damaged{kind}"
    file.write_bytes(data.draw(damaged(content)))
    read(reader, file)


@examples("row", 200)
@given(
    answer=st.lists(
        st.sampled_from(["18", "18.0", "007", ".5", ".0", "1.800,50", "-3", "1,200", "$"])
        | st.sampled_from(["####", " ", "\n", "x", "is ", "answer ", "."])
    )
)
def test_answers_of_word_problems_score_or_are_refused(answer):
    marked = readers.with_final_number("".join(answer))
    if marked is not None:
        said = marked if "####" in marked else f"#### {marked}"
        assert matches(extract_strict(said[said.rindex("#### ") :].replace("$", "")), marked)
        assert readers.with_final_number(marked) == marked


NAMES = st.lists(
    st.sampled_from(["train", "test", "dev", "valid", "my", "2", "testament", "README", "LICENSE", ".git", "__x"]),
    min_size=1,
    max_size=3,
)


@examples("data file", 150)
@given(data=st.data())
def test_folders_of_any_names(tmp_path_factory, data):
    """The files of one split never include one whose name says another, and none is left out unsaid."""
    folder = tmp_path_factory.mktemp("folder")
    for _ in range(data.draw(st.integers(1, 5))):
        parts = data.draw(NAMES)
        path = folder.joinpath(
            *parts[:-1], parts[-1] + data.draw(st.sampled_from([".txt", ".jsonl", ".csv.gz", ".md", ""]))
        )
        if not any(parent.is_file() for parent in path.parents) and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    split = data.draw(st.sampled_from(["train", "validation", "test"]))
    selection = documented(lambda: select(folder, split))
    if selection is None:
        return
    files, left_out = selection
    assert len(files) + len(left_out) == len(files_in(folder)) and files
    others = {"train": {"test", "dev", "valid"}, "validation": {"train", "test"}, "test": {"train", "dev", "valid"}}[
        split
    ]
    for file in files:
        words = {word for part in file.relative_to(folder).parts for word in part.split(".")}
        assert not words & others and not any(word.startswith("__") for word in words)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    file = tmp_path_factory.mktemp("parquet") / "whole.parquet"
    pq.write_table(pa.table({"text": ["A fox.", "An owl."] * 20, "label": [0, 1] * 20}), file)
    return file.read_bytes()


@examples("data file", 150)
@given(data=st.data())
def test_damaged_parquet_and_gzip(tmp_path_factory, parquet, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / "damaged.parquet").write_bytes(data.draw(damaged(parquet)))
    read("text", folder / "damaged.parquet")
    (folder / "damaged.txt.gz").write_bytes(data.draw(damaged(gzip.compress(b"A fox ran. " * 40, mtime=0))))
    read("text", folder / "damaged.txt.gz")


def test_what_was_tried_by_hand(tmp_path):
    """A gzip bomb, brackets without end, numbers without end, columns twice, bytes for text, text that is not UTF-8."""
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"\0" * (80 << 20), 1, mtime=0))
    assert read("text", tmp_path / "bomb.txt.gz") is None
    for text in ("[" * 100_000, '{"text": ' + "1" * 5000 + "}", '{"text": "\\ud800"}', '{"text": NaN}', '{"text": {}}'):
        (tmp_path / "a.jsonl").write_text(text + "\n")
        assert read("text", tmp_path / "a.jsonl") is None
    (tmp_path / "a.tsv").write_text("sentence\tsentence\tlabel\na\tb\t1\n")
    assert read("sentiment", tmp_path / "a.tsv") is None
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\x01\0\0\0"), pa.py_buffer(b"\xff"))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    for table in (pa.table({"text": broken}), pa.table({"text": pa.array([b"a"], pa.binary())}), twice):
        pq.write_table(table, tmp_path / "a.parquet")
        assert read("text", tmp_path / "a.parquet") is None


@examples("data file", 30)
@given(
    path=st.text(max_size=20)
    | st.sampled_from(["a" * 5000, "a/" * 3000, "\0", "~no-such-user/x", "/dev/null", "/dev/zero", "pipe"])
)
def test_own_paths_of_any_text(tmp_path_factory, path):
    if path == "pipe":
        path = str(tmp_path_factory.mktemp("pipe") / "pipe.txt")
        os.mkfifo(path)
    documented(lambda: sources.load(SourceConfig(path=path, reader="text", split="x")) if path else None)
    folder = documented(lambda: sources.local_folder(path))
    assert folder is None or folder.is_dir()


def test_a_clone_whose_files_could_be_code_is_refused(tmp_path, monkeypatch):
    """A data set's repository brought here by hand: only forms that hold rows of values are read."""
    clone = tmp_path / "openai" / "gsm8k"
    clone.mkdir(parents=True)
    (clone / "train.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = SourceConfig(source="gsm8k", split="train")
    assert documented(lambda: sources.load(source, tmp_path), "gsm8k") is None
    (clone / "train.pkl").unlink()
    (clone / "train.xml").write_text("<rows><row/></rows>")
    assert documented(lambda: sources.load(source, tmp_path), "gsm8k") is None
    assert not (tmp_path / "ran").exists()
