"""Sources: each of their places, in order, and what is said when they are in none."""

import gzip
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fake_hub import FakeHub, card, parquet

from basics import files, paths
from basics.errors import DataError, SourceError
from study.preset import load_preset, preset_names
from threefold.config import SourceConfig
from threefold.data import readers, registry, sources

DATA = Path(os.environ.get("THREEFOLD_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
real = pytest.mark.skipif(not DATA.is_dir(), reason="no real data: THREEFOLD_DATA or ../shared/data")
COMMIT, LATER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No local data folder, no network, caches of its own."""
    monkeypatch.delenv("THREEFOLD_DATA", raising=False)
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))


def problem(number: int) -> dict:
    return {"question": f"q{number}", "answer": f"#### {number}"}


def folder_with(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return tmp_path / "data"


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# The registry


def test_the_registry_is_whole():
    known = registry.registry()
    for name in ("wikitext-2", "wikitext-103", "wikipedia", "tinystories", "alpaca", "hh-rlhf", "sst2", "gsm8k"):
        source = known[name]
        assert source.hub.count("/") == 1 and source.licence and source.homepage.startswith("https://")
        assert set(source.local) <= set(source.splits)
    assert {source.name for source in known.values() if source.embedded} == {
        f"sample-{part}"
        for part in ("text", "stories", "sentiment", "instructions", "preferences", "problems", "pairs")
    }
    for source in known.values():
        assert source.revision == "" or (len(source.revision) == 40 and int(source.revision, 16) >= 0)


def test_every_preset_names_registered_sources():
    def used(value):
        if isinstance(value, SourceConfig):
            yield value
        elif isinstance(value, tuple):
            for part in value:
                yield from used(part)

    for name in preset_names():
        preset = load_preset(name)
        for section in (preset.data, preset.evaluation):
            for value in vars(section).values():
                for source in used(value):
                    if source.source:
                        assert source.split in registry.find(source.source).all_splits
                    assert not source.reader or source.reader in readers.READERS


def test_unknown_names_are_near_misses():
    with pytest.raises(SourceError, match=r"no source 'wikitxt-2' in data/sources\.toml, did you mean wikitext-2\?"):
        sources.resolve(SourceConfig(source="wikitxt-2"))
    with pytest.raises(SourceError, match="'gsm8k' has no split 'validation'; it has: train, test"):
        sources.resolve(SourceConfig(source="gsm8k", split="validation"))
    with pytest.raises(SourceError, match=r"no reader 'storys', did you mean stories"):
        sources.resolve(SourceConfig(source="sample-text", reader="storys"))
    with pytest.raises(SourceError, match="is a tokenizer, not a data set"):
        sources.resolve(SourceConfig(source="gpt2-bpe"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[a]\nlicence = "x"\nuse = "y"\nreader = "text"\nrevison = ""\n',
            "a.revison: no such key, did you mean revision?",
        ),
        ('[a]\nlicence = "x"\nreader = "text"\n', "a: use is missing"),
        ('[a]\nlicence = "x"\nuse = "y"\nreader = "txt"\n', "a.reader: no reader 'txt', did you mean text?"),
        ("[a\n", "sources.toml: "),
    ],
)
def test_a_registry_that_cannot_be_meant(tmp_path, monkeypatch, text, message):
    file = tmp_path / "sources.toml"
    file.write_text(text)
    monkeypatch.setattr(registry, "REGISTRY", file)
    with pytest.raises(SourceError) as raised:
        registry.registry()
    assert message in str(raised.value)


# Embedded and local


def test_the_embedded_sample_is_found_without_anything():
    for source in registry.registry().values():
        for split in source.all_splits if source.embedded else ():
            config = SourceConfig(source=source.name, split=split)
            resolved = sources.resolve(config)
            assert resolved.kind == "embedded" and all(path.is_relative_to(paths.DATA) for path in resolved.files)
            assert len(sources.load(config)) >= 20


def test_a_local_folder_comes_first_and_its_alternatives_in_order(tmp_path, monkeypatch):
    data = folder_with(tmp_path, {"wikitext-2/wiki.train.tokens": " \n = A = \n \n b <unk> . \n"})
    config = SourceConfig(source="wikitext-2")
    resolved = sources.resolve(config, data)
    assert (resolved.kind, [path.name for path in resolved.files]) == ("local", ["wiki.train.tokens"])
    folder_with(tmp_path, {"wikitext-2/wiki.train.raw": " \n = A = \n \n b c . \n"})
    monkeypatch.setenv("THREEFOLD_DATA", str(data))
    raw = sources.resolve(config)
    assert [path.name for path in raw.files] == ["wiki.train.raw"]
    assert raw.fingerprint != resolved.fingerprint
    assert sources.load(config) == [" \n = A = \n \n b c . \n"]
    with pytest.raises(SourceError, match=r"data_dir = '/nowhere': no such folder"):
        sources.resolve(config, "/nowhere")


def test_the_fingerprint_is_the_contents(tmp_path):
    one = folder_with(tmp_path / "1", {"gsm8k/test.jsonl": jsonl(problem(1))})
    two = folder_with(tmp_path / "2", {"gsm8k/test.jsonl": jsonl(problem(1))})
    config = SourceConfig(source="gsm8k", split="test")
    assert sources.resolve(config, one).fingerprint == sources.resolve(config, two).fingerprint
    changed = folder_with(tmp_path / "2", {"gsm8k/test.jsonl": jsonl(problem(1), problem(2))})
    assert sources.resolve(config, one).fingerprint != sources.resolve(config, changed).fingerprint


def test_the_hash_of_a_large_file_is_kept(tmp_path, monkeypatch):
    data = folder_with(tmp_path, {"gsm8k/test.jsonl": jsonl(problem(1))})
    config = SourceConfig(source="gsm8k", split="test")
    expected = sources.resolve(config, data).fingerprint
    monkeypatch.setattr(files, "SMALL", 1)
    assert sources.resolve(config, data).fingerprint == expected
    monkeypatch.setattr(files, "sha256_file", None)  # not called again
    assert sources.resolve(config, data).fingerprint == expected


def test_skip_and_max_cut_disjoint_parts_of_one_order(tmp_path):
    pairs = [
        {"chosen": f"\n\nHuman: {i}\n\nAssistant: yes", "rejected": f"\n\nHuman: {i}\n\nAssistant: no"}
        for i in range(40)
    ]
    files = {"hh-rlhf/harmless-base.test.jsonl.gz": pairs[:20], "hh-rlhf/helpful-base.test.jsonl.gz": pairs[20:]}
    data = tmp_path / "data"
    for name, rows in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(gzip.compress(jsonl(*rows).encode()))
    config = {"source": "hh-rlhf", "split": "test"}
    whole = sources.load(SourceConfig(**config), data)
    first = sources.load(SourceConfig(**config, max_examples=15), data)
    rest = sources.load(SourceConfig(**config, skip_examples=15, max_examples=100), data)
    assert first + rest == whole and len(whole) == 40
    prompts = [int(item["prompt"].split()[1]) for item in whole]
    assert sorted(prompts) == list(range(40))
    assert {number // 20 for number in prompts[:10]} == {0, 1}  # both files from the start
    with pytest.raises(DataError, match="hh-rlhf, split 'test': no items after skip_examples = 40"):
        sources.load(SourceConfig(**config, skip_examples=40), data)


def test_an_empty_split_is_an_error(tmp_path):
    data = folder_with(tmp_path, {"gsm8k/test.jsonl": "\n", "sst2/dev.tsv": "sentence\tlabel\n"})
    with pytest.raises(DataError, match="gsm8k, split 'test': no items"):
        sources.load(SourceConfig(source="gsm8k", split="test"), data)
    with pytest.raises(DataError, match="sst2, split 'validation': no items"):
        sources.load(SourceConfig(source="sst2", split="validation"), data)


def test_reviews_count_the_reviews(tmp_path):
    rows = "".join(f"review {i}\t{i % 2}\n" for i in range(50))
    data = folder_with(tmp_path, {"sst2/train.tsv": f"sentence\tlabel\n{rows}"})
    documents = sources.load(SourceConfig(source="sst2", reader="reviews", skip_examples=10, max_examples=20), data)
    blocks = [block for document in documents for block in document.split("\n\n")]
    assert len(blocks) == 20 and len(documents) < 6
    assert {int(block.split()[1]) for block in blocks} == set(range(10, 30))


@real
def test_real_folder():
    expected = {
        ("wikitext-2", "train"): 600,
        ("wikitext-2", "validation"): 60,
        ("wikitext-2", "test"): 60,
        ("wikitext-103", "train"): 155,
        ("hh-rlhf", "test"): 2354 + 2312 - 10,  # odd rows
        ("sst2", "validation"): 872,
        ("gsm8k", "test"): 1319,
    }
    for (name, split), count in expected.items():
        config = SourceConfig(source=name, split=split)
        assert sources.resolve(config, DATA).kind == "local"
        assert len(sources.load(config, DATA)) == count
    assert sources.odd_rows(SourceConfig(source="hh-rlhf", split="test"), DATA) == {
        "a response is empty": 8,
        "chosen and rejected are equal": 2,
    }


def test_long_reads_say_how_far_they_are(tmp_path, monkeypatch, capsys):
    data = folder_with(tmp_path, {"a.jsonl": jsonl(*({"text": f"text {i}"} for i in range(40)))})
    config = SourceConfig(path="a.jsonl", reader="text")
    assert len(sources.load(config, data)) == 40 and capsys.readouterr().out == ""
    monkeypatch.setattr(sources, "PROGRESS_EVERY", 0)
    sources.load(config, data)  # an earlier pass says how many rows there are
    lines = capsys.readouterr().out.splitlines()
    assert lines[29].startswith("a.jsonl, split 'train': 30 of 40 rows, ") and " s left (" in lines[29]
    assert len(sources.load(SourceConfig(path="a.jsonl", reader="text", max_examples=20), data)) == 20
    assert "split 'train': 20 of 20 rows, 0 s left (" in capsys.readouterr().out
    (data / "a.jsonl").write_text(jsonl({"text": "another"}))
    sources.load(config, data)
    assert capsys.readouterr().out.startswith("a.jsonl, split 'train': 1 rows (")


# Odd rows


def pair(number: int, chosen: str = " yes", rejected: str = " no") -> dict:
    prompt = f"\n\nHuman: {number}\n\nAssistant:"
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def test_odd_rows_are_left_out_and_counted(tmp_path):
    rows = [pair(i) for i in range(198)]
    rows[7:7] = [pair(-1, chosen="")]
    rows[99:99] = [pair(-2, rejected=" yes")]
    data = folder_with(tmp_path, {"a.jsonl": jsonl(*rows), "hh-rlhf/harmless-base.test.jsonl": ""})
    config = SourceConfig(path="a.jsonl", reader="preferences")
    kept = sources.load(config, data)
    assert [item["prompt"].split()[1] for item in kept] == [str(i) for i in range(198)]
    assert sources.odd_rows(config, data) == {"a response is empty": 1, "chosen and rejected are equal": 1}
    part = SourceConfig(path="a.jsonl", reader="preferences", skip_examples=8, max_examples=150)
    assert sources.odd_rows(part, data) == {"chosen and rejected are equal": 1}
    assert len(sources.load(part, data)) == 149


def test_too_many_odd_rows_stop_and_the_first_is_named(tmp_path):
    data = folder_with(
        tmp_path,
        {"a.jsonl": jsonl(*[pair(i) for i in range(150)], {"chosen": "a", "rejected": "b"}, pair(1, chosen=""))},
    )
    with pytest.raises(DataError) as raised:
        sources.load(SourceConfig(path="a.jsonl", reader="preferences"), data)
    assert str(raised.value).startswith(f"{data / 'a.jsonl'}:151: chosen and rejected share no dialogue up to an ")
    assert "2 of 152 rows of a.jsonl are odd" in str(raised.value) and "a response is empty: 1" in str(raised.value)


# Own files


def test_own_files_by_path_and_reader(tmp_path, monkeypatch):
    data = folder_with(
        tmp_path, {"mine/train.jsonl": jsonl({"text": "a"}), "mine/test.jsonl": jsonl({"text": "b"}), "all/x.txt": "c"}
    )
    for path, base in ((str(data / "mine"), ""), ("mine", data)):
        config = SourceConfig(path=path, reader="text", split="test")
        assert sources.resolve(config, base).kind == "own"
        assert sources.load(config, base) == ["b"]
    monkeypatch.chdir(data)
    assert sources.load(SourceConfig(path="all", reader="stories")) == ["c"]
    assert sources.load(SourceConfig(path="mine/train.jsonl", reader="text", split="test")) == ["a"]
    with pytest.raises(SourceError, match=r"path 'none\.jsonl': no such file or folder; looked for "):
        sources.load(SourceConfig(path="none.jsonl", reader="text"))
    with pytest.raises(
        SourceError, match=r"no file named after split 'validation'; there are test\.jsonl, train\.jsonl"
    ):
        sources.load(SourceConfig(path="mine", reader="text", split="validation"))
    (data / "empty").mkdir()
    with pytest.raises(SourceError, match="no data file in it"):
        sources.load(SourceConfig(path="empty", reader="text"))
    with pytest.raises(DataError, match=r"train\.jsonl:1: no column 'question'; it has: text"):
        sources.load(SourceConfig(path="mine", reader="problems"))


# The hub's form, in other processes: Hugging Face libraries read their environment once


def in_process(code: str, tmp_path: Path, **environment: str) -> dict:
    """Run code that assigns `out`; its value, or {"error": ...} for a ThreefoldError."""
    program = f"""
import json
import os
from pathlib import Path
from threefold.config import SourceConfig
from threefold.data import sources
from basics.errors import ThreefoldError
try:
{chr(10).join("    " + line for line in code.strip().splitlines())}
except ThreefoldError as error:
    out = {{"error": f"{{type(error).__name__}}: {{error}}"}}
print(json.dumps(out))
"""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "THREEFOLD_CACHE": str(tmp_path / "cache"),
        "no_proxy": "127.0.0.1",
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


LOAD = """
config = SourceConfig(source="gsm8k", split="train")
resolved = sources.resolve(config, {data!r})
out = {{"kind": resolved.kind, "revision": resolved.revision, "content": resolved.content}}
out["items"] = sources.load(config, {data!r})
"""
FORGED = """
Path(os.environ["THREEFOLD_CACHE"], "revisions.json").write_text(json.dumps({"openai/gsm8k": "c" * 40}))
try:
    sources.resolve(config)
except ThreefoldError as error:
    out = {"loaded": out, "error": str(error)}
"""
FILES = {
    "README.md": card("main", ["train", "test"]),
    "main/train-00000-of-00001.parquet": parquet([problem(i) for i in range(3)]),
    "main/test-00000-of-00001.parquet": parquet([problem(9)]),
}


def test_the_hub_its_cache_and_the_recorded_commit(tmp_path):
    load = LOAD.format(data="")
    items = [problem(i) for i in range(3)]
    with FakeHub({"datasets/openai/gsm8k": FILES}, [COMMIT]) as hub:
        first = in_process(load, tmp_path, HF_ENDPOINT=hub.url)
        assert first == {
            "kind": "hub",
            "revision": COMMIT,
            "content": f"hub:openai/gsm8k@{COMMIT}:main:train",
            "items": items,
        }
        assert json.loads((tmp_path / "cache" / "revisions.json").read_text()) == {"openai/gsm8k": COMMIT}
        # The hub moves on; the recorded commit stays, from the hub with an empty cache, and from the cache. A commit
        # that the hub no longer has is an error, not another commit.
        hub.commits.append(LATER)
        assert in_process(load, tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "other")) == first
        both = in_process(load + FORGED, tmp_path, HF_ENDPOINT=hub.url)
        assert both["loaded"] == first | {"kind": "cache"}
        gone = both["error"]
        assert f"cache has no openai/gsm8k, config main at commit cccccccccccc, only {COMMIT[:12]}; (3)" in gone
        assert "(3) the hub did not give openai/gsm8k at cccccccccccc (RevisionNotFoundError" in gone
    # Without a network, and with nothing recorded: what the cache holds is taken and recorded.
    (tmp_path / "cache" / "revisions.json").unlink()
    assert in_process(load, tmp_path, HF_HUB_OFFLINE="1") == first | {"kind": "cache"}
    assert json.loads((tmp_path / "cache" / "revisions.json").read_text()) == {"openai/gsm8k": COMMIT}


PART = """
config = SourceConfig(source="wikipedia", skip_examples=1, max_examples={most})
out = {{"kind": sources.resolve(config).kind, "items": sources.load(config)}}
"""


def test_only_the_files_that_hold_the_part_are_downloaded(tmp_path):
    shards = [f"20231101.en/train-{i:05}-of-00005.parquet" for i in range(5)]
    texts = [f"article {i}" for i in range(15)]
    files = {name: parquet([{"text": text} for text in texts[3 * i : 3 * i + 3]]) for i, name in enumerate(shards)}
    files["README.md"] = card("20231101.en", ["train"])
    with FakeHub({"datasets/wikimedia/wikipedia": files}, [COMMIT]) as hub:
        first = in_process(PART.format(most=4), tmp_path, HF_ENDPOINT=hub.url)
        assert first == {"kind": "hub", "items": texts[1:5]}
        assert [name for name in hub.served if name in shards] == shards[:2]
        assert in_process(PART.format(most=4), tmp_path, HF_ENDPOINT=hub.url) == first | {"kind": "cache"}
        more = in_process(PART.format(most=7), tmp_path, HF_ENDPOINT=hub.url)
        assert more["items"] == texts[1:8] and [name for name in hub.served if name in shards] == shards[:3]
    assert in_process(PART.format(most=7), tmp_path, HF_HUB_OFFLINE="1") == more | {"kind": "cache"}
    said = in_process(PART.format(most=11), tmp_path, HF_HUB_OFFLINE="1")["error"]
    assert "wikipedia (wikimedia/wikipedia, config 20231101.en), split 'train': datasets could not load it" in said


def test_offline_the_error_lists_the_three_places_and_the_way_out(tmp_path):
    data = folder_with(tmp_path, {"other/x.txt": ""})
    said = in_process(LOAD.format(data=str(data)), tmp_path, HF_HUB_OFFLINE="1")["error"]
    assert said.startswith("SourceError: source 'gsm8k', split 'train' was found in none of its places: ")
    assert f"(1) {data} holds none of gsm8k/train.jsonl, gsm8k/train*.parquet, openai/gsm8k/; " in said
    assert "(2) the Hugging Face cache has no openai/gsm8k, config main; " in said
    assert "(3) the hub did not give openai/gsm8k (OfflineModeIsEnabled" in said
    assert "run `hf download openai/gsm8k --repo-type dataset --local-dir DATA/openai/gsm8k`" in said
    assert "--data-dir DATA" in said and "\n" not in said


def test_a_local_clone_of_the_hubs_repository(tmp_path):
    data = tmp_path / "data"
    for name, content in FILES.items():
        path = data / "openai" / "gsm8k" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = in_process(LOAD.format(data=str(data)), tmp_path, HF_HUB_OFFLINE="1")
    assert (found["kind"], found["revision"]) == ("local", "")
    assert found["items"] == [problem(i) for i in range(3)]
    assert not (tmp_path / "cache" / "revisions.json").exists()


def test_gpt2s_tokenizer_offline(tmp_path):
    said = in_process("out = str(sources.gpt2_tokenizer_file())", tmp_path, HF_HUB_OFFLINE="1")["error"]
    assert "source 'gpt2-bpe' was found in none of its places: (1) no local data folder was given; (2) " in said
    assert "(3) the hub did not give openai-community/gpt2 (OfflineModeIsEnabled" in said
    assert "`hf download openai-community/gpt2 --local-dir DATA/openai-community/gpt2`" in said


def test_a_broken_record_of_commits_is_named(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "revisions.json").write_text("{")
    said = in_process(LOAD.format(data=""), tmp_path, HF_HUB_OFFLINE="1")["error"]
    assert "revisions.json: not JSON" in said and "remove it to record new commits" in said


def test_the_registry_file_is_plain_toml():
    tables = tomllib.loads((paths.DATA / "sources.toml").read_text(encoding="utf-8"))
    assert set(tables) == set(registry.registry())
