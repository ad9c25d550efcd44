"""Folders of own data: which files are data, which of them belong to a split, and what is left open to be asked."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from fake_hub import card, parquet
from safetensors.torch import save_file

from basics.errors import SourceError
from threefold.config import SourceConfig
from threefold.data import corpus, readers, sources
from threefold.data.data_files import select
from threefold.data.rows import PLAIN, TABULAR, suffix
from threefold.data.tokenizer import load_tokenizer
from threefold.model import load_checkpoint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.delenv("THREEFOLD_DATA", raising=False)
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))


def folder_of(tmp_path: Path, *names: str) -> Path:
    """A folder with these files, each of which holds its own name as text or as a row."""
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": name})
        content = {".csv": f"text\n{name}\n", ".json": f"[{row}]"}.get(suffix(path), row)
        content = name if suffix(path) in PLAIN else content
        path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return tmp_path / "data"


def taken(folder: Path, split: str = "train") -> list[str]:
    return [path.relative_to(folder).as_posix() for path in select(folder, split)[0]]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        # folders name splits, at any depth
        (["train/a.jsonl", "test/a.jsonl"], "train", ["train/a.jsonl"]),
        (["train/a.jsonl", "test/a.jsonl"], "test", ["test/a.jsonl"]),
        (["aclImdb/train/pos/0.txt", "aclImdb/test/pos/0.txt"], "train", ["aclImdb/train/pos/0.txt"]),
        (["en_Training set/a.jsonl", "en_Validation set/a.jsonl"], "validation", ["en_Validation set/a.jsonl"]),
        (["train-test-split/train.csv", "train-test-split/test.csv"], "test", ["train-test-split/test.csv"]),
        # names of files, between delimiters
        (["x_train.jsonl", "x_test.jsonl"], "train", ["x_train.jsonl"]),
        (["my.data.eval.json", "my.data.train.json"], "test", ["my.data.eval.json"]),
        (["wiki.valid.tokens", "wiki.train.tokens"], "dev", ["wiki.valid.tokens"]),
        (["DEV.jsonl.gz", "TRAIN.jsonl.gz"], "validation", ["DEV.jsonl.gz"]),
        (["train2.ndjson", "train1.ndjson", "val.ndjson"], "train", ["train1.ndjson", "train2.ndjson"]),
        (["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv", "data/test-00000-of-00001.csv"], "test", 1),
        (["train_sft-0.jsonl", "test_sft-0.jsonl", "train_prefs-0.jsonl"], "train_prefs", ["train_prefs-0.jsonl"]),
        (["myTrain.txt", "myTest.txt"], "train", ["myTrain.txt"]),
        (["trainset.jsonl", "testData.jsonl", "dev_split.jsonl"], "test", ["testData.jsonl"]),
        (["trainset.jsonl", "testData.jsonl", "dev_split.jsonl"], "Testset", ["testData.jsonl"]),
        # a split word inside another word names nothing, so all files are read
        (["moby.txt", "testament.txt", "trainer.txt", "latest.txt"], "train", 4),
        (["evaluate.txt", "developers.txt", "invalid.txt"], "train", 3),
        (["b/2.txt", "a/1.txt"], "train", ["a/1.txt", "b/2.txt"]),
        # what is not data
        (["README.md", "LICENSE.txt", "stories.jsonl"], "train", ["stories.jsonl"]),
        (["readme_de.txt", "licence", "CITATION.cff", "NOTICE.txt", "a.txt", "b.txt"], "train", ["a.txt", "b.txt"]),
        (["dataset_infos.json", "dataset_info.json", "state.json", "a.json"], "train", ["a.json"]),
        (
            [".git/a.jsonl", ".cache/huggingface/b.jsonl", ".c.jsonl", "__MACOSX/d.jsonl", "~$e.jsonl", "e.jsonl"],
            "train",
            ["e.jsonl"],
        ),
        (["cache/x.jsonl", "a.jsonl"], "train", ["a.jsonl"]),
        (["notes.txt", "a.csv"], "train", ["a.csv"]),
        (["a.jsonl", "a.jsonl.zst"], "train", ["a.jsonl"]),
        (["notes.md", "a.txt"], "train", ["a.txt"]),
        (["train.csv", "test.csv", "stats.json", "labels.txt"], "train", ["train.csv"]),
        (["a.jsonl", "picture.png", "archive.zip"], "train", ["a.jsonl"]),
        # where nothing else is there, they are the data
        (["README.md", "LICENSE.txt"], "train", ["LICENSE.txt"]),
        (["README.md"], "train", ["README.md"]),
    ],
)
def test_the_files_of_a_split(tmp_path, names, split, expected):
    folder = folder_of(tmp_path, *names)
    if isinstance(expected, int):
        assert len(taken(folder, split)) == expected
    else:
        assert taken(folder, split) == expected
    files, left_out = select(folder, split)
    hidden = [name for name in names if any(part.startswith((".", "__", "~", "cache")) for part in Path(name).parts)]
    assert len(files) + len(left_out) + len(hidden) == len(names)


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (
            ["alice.txt", "moby.txt", "training-day.txt"],
            "train",
            "training-day.txt is named after split 'train', and alice",
        ),
        (
            ["train.jsonl", "holdout.jsonl"],
            "train",
            "train.jsonl is named after split 'train', and holdout.jsonl after",
        ),
        (["train/test-pilot.txt", "test/a.txt"], "train", "train/test-pilot.txt is named after test and train"),
        (["train_test.jsonl"], "test", "train_test.jsonl is named after test and train"),
        (
            ["train.jsonl", "test.jsonl"],
            "validation",
            "no file named after split 'validation'; there are test.jsonl, tra",
        ),
        (["test.jsonl"], "train", "no file named after split 'train'; there are test.jsonl"),
        (["train.jsonl", "train.csv"], "train", r"split 'train' has files of several forms (.csv, .jsonl)"),
        (["a.jsonl", "a.jsonl.gz"], "train", "a.jsonl.gz is there unpacked, too"),
        (["train-0.jsonl", "train-1.jsonl.zst", "test.jsonl"], "train", "train-1.jsonl.zst cannot be read: unpack it"),
        (["a.txt.xz"], "train", "a.txt.xz cannot be read: unpack it, or pack it with gzip"),
        (["a.png", "b.zip"], "train", "no data file in it"),
        ([".hidden.txt"], "train", "no data file in it"),
        (["dataset_infos.json"], "train", "no data file in it"),
    ],
)
def test_what_the_names_leave_open_is_asked(tmp_path, names, split, message):
    folder = folder_of(tmp_path, *names)
    with pytest.raises(SourceError) as raised:
        select(folder, split)
    assert str(raised.value).startswith(f"{folder}: ") and message in str(raised.value)
    if not any(words in message for words in ("no file", "no data", "cannot be read")):
        assert "name the files by `path`, which may be a pattern" in str(raised.value)


def test_a_pattern_names_files(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "books/alice.txt", "books/training-day.txt", "books/more/emma.txt", "books/x.jsonl")
    assert sources.load(SourceConfig(path="books/*.txt", reader="text"), folder) == [
        "books/alice.txt",
        "books/training-day.txt",
    ]
    monkeypatch.chdir(folder)
    assert len(sources.load(SourceConfig(path="books/**/*.txt", reader="text", split="test"))) == 3
    assert len(sources.load(SourceConfig(path=f"{folder}/books/[at]*.txt", reader="text"))) == 2
    (folder / "odd [1].txt").write_text("brackets")
    assert sources.load(SourceConfig(path="odd [1].txt", reader="text")) == ["brackets"]
    with pytest.raises(SourceError, match=r"path 'books/\*\.csv': no such file or folder; looked for "):
        sources.load(SourceConfig(path="books/*.csv", reader="text"))


def test_links_are_followed(tmp_path):
    folder = folder_of(tmp_path, "elsewhere/blobs/abc", "elsewhere/more/b.jsonl")
    own = tmp_path / "own"
    (own / "test").mkdir(parents=True)
    (own / "train").symlink_to(folder / "elsewhere" / "more")
    (own / "train" / "back").symlink_to(own)
    (own / "test" / "a.jsonl").symlink_to(folder / "elsewhere" / "blobs" / "abc")
    assert taken(own) == ["train/b.jsonl"]
    assert sources.load(SourceConfig(path=str(own), reader="text", split="test")) == ["elsewhere/blobs/abc"]
    assert sources.load(SourceConfig(path=str(own / "test" / "a.jsonl"), reader="text")) == ["elsewhere/blobs/abc"]
    (own / "train" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"gone\.jsonl: a link to a file that does not exist \(.*nowhere\)"):
        taken(own)


def test_the_data_card_names_splits(tmp_path):
    folder = folder_of(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl")
    files = "  data_files:\n  - split: train\n    path: a.*\n  - split: test\n    path: [b.jsonl]\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n{files}---\n# Card\n")
    assert taken(folder) == ["a.jsonl"] and taken(folder, "test") == ["b.jsonl"]
    with pytest.raises(SourceError, match="its card declares no split 'validation', only train, test"):
        select(folder, "validation")
    assert select(folder, "train")[1] == (
        "README.md (no data)",
        "b.jsonl (not of split train)",
        "c.jsonl (not of split train)",
    )
    two = card("main", ["train"]).decode().replace("---\n", "", 1).replace("configs:\n", "", 1)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: socratic\n{files}{two}")
    with pytest.raises(SourceError, match=r"its card has several configurations \(socratic, main\): name the files"):
        select(folder, "train")
    (folder / "README.md").write_text("---\nnot a card\n---\n")
    assert len(taken(folder)) == 3


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        *((f"a{ending}", "text") for ending in (*TABULAR, *PLAIN)),
        ("a.jsonl.gz", "text"),
        ("a.txt.gz", "stories"),
        ("train/a.tsv", "sentiment"),
    ],
)
def test_a_pointer_of_git_lfs_stops_in_one_line(tmp_path, name, reader):
    file = folder_of(tmp_path, name) / name
    file.write_text(POINTER)
    for path in (file, file.parent):
        with pytest.raises(SourceError, match=r"a Git LFS pointer, not the file itself: run `git lfs pull`"):
            sources.resolve(SourceConfig(path=str(path), reader=reader))
    with pytest.raises(SourceError, match="git lfs pull"):
        list(readers.read_files(reader, [file]))
    file.write_text("/annex/objects/SHA256E-s12345--ab.jsonl\n")
    with pytest.raises(SourceError, match="a git-annex pointer, not the file itself: run `git annex get`"):
        sources.resolve(SourceConfig(path=str(file), reader=reader))


def test_a_pointer_in_a_local_folder_a_clone_and_a_checkpoint(tmp_path):
    data = tmp_path / "data"
    for place in ("gsm8k/test.jsonl", "openai/gsm8k/main/test-00000-of-00001.parquet"):
        (data / place).parent.mkdir(parents=True, exist_ok=True)
        (data / place).write_text(POINTER)
        with pytest.raises(SourceError, match=rf"{place}: a Git LFS pointer"):
            sources.resolve(SourceConfig(source="gsm8k", split="test"), data)
        (data / place).unlink()
    (tmp_path / "tokenizer.json").write_text(POINTER)
    with pytest.raises(SourceError, match=r"tokenizer\.json: a Git LFS pointer"):
        load_tokenizer(tmp_path)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 4}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(SourceError, match=r"model\.safetensors: a Git LFS pointer, .* run `git lfs pull`"):
        load_checkpoint(tmp_path)


def test_what_was_taken_is_described(tmp_path):
    folder = folder_of(tmp_path, "train/a.jsonl", "test/a.jsonl", "README.md")
    facts = corpus.describe(SourceConfig(path=str(folder), reader="text"))
    assert facts["files"] == ["train/a.jsonl"] and facts["odd_rows"] == {}
    assert facts["left_out"] == ["README.md (no data)", "test/a.jsonl (not of split train)"]
    assert str(tmp_path) not in json.dumps(facts)
    facts = corpus.describe(SourceConfig(source="sample-problems"))
    assert (facts["files"], facts["left_out"]) == (["sample/problems.train.jsonl"], [])
    many = folder_of(tmp_path / "many", *(f"{i:03}.txt" for i in range(50)))
    facts = corpus.describe(SourceConfig(path=str(many), reader="text"))
    assert len(facts["files"]) == 21 and facts["files"][-1] == "and 30 more" and facts["documents"] == 50


def test_rows_of_parquet_are_read_from_a_folder_as_the_hub_leaves_it(tmp_path):
    folder = folder_of(tmp_path, "README.md", ".gitattributes", ".cache/huggingface/x.json")
    (folder / "data").mkdir()
    for split in ("train", "test"):
        (folder / "data" / f"{split}-00000-of-00001.parquet").write_bytes(parquet([{"text": split}]))
    assert sources.load(SourceConfig(path=str(folder), reader="text")) == ["train"]
    assert sources.load(SourceConfig(path=str(folder), reader="text", split="test")) == ["test"]
