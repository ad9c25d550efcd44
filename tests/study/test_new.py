"""Own data: `threefold new` writes a preset, and a preset is checked whole before anything runs."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from shared import ONE_STEP, call

from basics import paths
from basics.errors import ConfigError, DataError, EvaluationError
from study import checks, stages
from study.new import Machine, create, passages, sizes
from study.preset import (
    LINEAGE,
    Preset,
    evaluation_sources,
    from_dict,
    lineage,
    load_preset,
    model_names,
    to_dict,
    to_toml,
    validate,
)
from threefold.config import SourceConfig
from threefold.data import corpus, sources
from threefold.data.tokenizer import build_tokenizer


@cache
def sample_tokenizer():
    preset = load_preset("smoke")
    return build_tokenizer(preset.tokenizer, corpus.mixture_texts(preset.data.pretrain))


def without(*parts: str) -> Preset:
    """The smoke preset without these stages: neither data nor settings of them."""
    table, default = to_dict(load_preset("smoke")), to_dict(Preset())
    for part in parts:
        table[part] = default[part]
        table["data"] |= {part: [], f"{part}_heldout": []}
    return validate(from_dict(table, "own"), "own")


# Stages that a preset leaves out --------------------------------------------------------------------------------------


def test_a_preset_that_says_nothing_about_a_stage_has_no_such_stage():
    plan = stages.plan(without("sft", "dpo"))
    assert "pretrain" in plan and not {"sft", "dpo", "evaluate-sft", "evaluate-dpo"} & set(plan)
    assert plan["speed"].needs == ("data", "pretrain", "gpt2", "distilgpt2")
    assert model_names(without("dpo")) == ["random", "gpt2", "distilgpt2", "pretrain", "sft"]
    assert stages.plan(without("dpo"))["evaluate-sft"].needs == ("sft",)


# A preset is checked whole --------------------------------------------------------------------------------------------


def test_all_missing_data_is_named_in_one_message():
    table = to_dict(load_preset("smoke"))
    table["data"] |= {"pretrain_heldout": [], "sft": [], "dpo_heldout": []}
    table["evaluation"] |= {"sentiment_demonstrations": {}, "problem_demonstrations": {}, "problem_shots": 2}
    with pytest.raises(ConfigError) as caught:
        checks.check(validate(from_dict(table, "own"), "own"))
    for key in ("data.pretrain_heldout", "data.sft,", "data.dpo_heldout", "evaluation.sentiment_demonstrations"):
        assert key in str(caught.value)
    assert "evaluation.problem_shots = 0" in str(caught.value) and "data.sft_heldout" not in str(caught.value)


def test_dpo_without_sft_names_what_sft_lacks():
    table = to_dict(load_preset("smoke"))
    table["data"] |= {"sft": [], "sft_heldout": []}
    with pytest.raises(ConfigError, match=r"missing: data\.sft, data\.sft_heldout$"):
        checks.check(validate(from_dict(table, "own"), "own"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation.problem_shots": 5}, "sample-problems/5-shot.*change evaluation.problem_shots"),
        ({"evaluation.sentiment_shots": [0, 9]}, "sample-sentiment/9-shot.*change evaluation.sentiment_shots"),
        ({"evaluation.lines": {"source": "sample-stories"}, "model.context": 64}, "positions"),
        ({"evaluation.problem_shots": 2000}, "problem_demonstrations has 1500 items"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_when_the_tokenizer_is_known(changes, said):
    preset = load_preset("smoke", {"evaluation.window": 64, "evaluation.stride": 32} | changes)
    with pytest.raises(EvaluationError, match=said):
        checks.check_evaluations(preset, sample_tokenizer())


def test_what_fits_passes():
    checks.check(load_preset("smoke"))
    checks.check_evaluations(load_preset("smoke"), sample_tokenizer())


def test_a_window_that_is_longer_than_the_context_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"evaluation.window = 128: expected at most model.context = 96"):
        checks.check(load_preset("smoke", {"model.context": 96}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation.speed_prompt": 100}, "speed_prompt + evaluation.speed_new_tokens = 132: expected at most"),
        ({"data.sft": [{"source": "sample-text"}]}, "data.sft: reader 'wikitext-raw' does not give"),
        ({"data.dpo_heldout": [{"source": "sample-problems"}]}, "data.dpo_heldout: reader 'problems'"),
        (
            {"evaluation.instructions": {"source": "sample-preferences"}},
            "evaluation.instructions: reader 'preferences'",
        ),
        ({"evaluation.perplexity": {"source": "sample-problems"}}, "evaluation.perplexity: reader 'problems'"),
    ],
)
def test_what_cannot_be_used_in_its_place_is_refused_at_once(changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        checks.check(load_preset("smoke", changes))


@pytest.mark.parametrize("name", ["smoke", "laptop", "full", "tests/presets/tiny.toml"])
def test_the_presets_here_pass(name):
    checks.check(load_preset(name))


def test_relative_paths_count_from_the_presets_folder_then_from_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "own.txt").write_text("beside the preset")
    (tmp_path / "own.txt").write_text("in the current folder")
    (tmp_path / "other.txt").write_text("only in the current folder")
    monkeypatch.chdir(tmp_path)
    Path("study/p.toml").write_text(
        ONE_STEP
        + "[data]\n"
        + "pretrain = [{path = 'own.txt', reader = 'text'}, {path = 'other.txt', reader = 'text'}]\n"
    )
    preset = load_preset("study/p.toml")
    assert [sources.load(source) for source in preset.data.pretrain] == [
        ["beside the preset"],
        ["only in the current folder"],
    ]
    assert load_preset("study/p.toml", {"seed": 3}).data == preset.data
    assert from_dict(to_dict(preset), "config.toml") == preset  # as a run keeps it, wherever that lies


@pytest.mark.parametrize("rows", ["", '{"instruction": "a"}\n'])
def test_own_files_are_read_before_anything_runs(tmp_path, rows):
    (tmp_path / "mine.jsonl").write_text(rows)
    (tmp_path / "p.toml").write_text(
        to_toml(load_preset("smoke")).replace(
            'source = "sample-instructions"\nsplit = "test"\npath = ""\nreader = ""',
            'source = ""\nsplit = "test"\npath = "mine.jsonl"\nreader = "instructions"',
        )
    )
    with pytest.raises(DataError, match=r"mine\.jsonl"):
        checks.check(load_preset(tmp_path / "p.toml"))


# A preset for own data ------------------------------------------------------------------------------------------------

HERE = Machine(2, 8 << 30)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a text, instructions and preferences, which is the current one; there are no runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    stories = [story for story in sources.load(SourceConfig("sample-stories")) if len(story) > 150][:200]
    Path("notes.txt").write_text("\n\n".join(stories), encoding="utf-8")
    rows = sources.load(SourceConfig("sample-instructions", max_examples=60))
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    pairs = sources.load(SourceConfig("sample-preferences", max_examples=40))
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path


def test_a_study_of_own_data_is_valid_and_split_without_overlap(own):
    said = create("mine", "notes.txt", "mine.jsonl", "pairs.jsonl", machine=HERE)
    assert said[1] == "mine.jsonl: 54 examples to train on, 6 for measuring; 1 duplicate left out"
    preset = load_preset("mine/preset.toml")
    checks.check(preset)
    assert preset.name == "mine" and list(stages.plan(preset))[:4] == ["data", "pretrain", "sft", "dpo"]
    items = {name: sources.load(getattr(preset.data, name)[0]) for name in to_dict(preset.data)}
    for part in ("pretrain", "sft", "dpo"):
        train, heldout = items[part], items[f"{part}_heldout"]
        assert len(heldout) >= 5 and not [item for item in heldout if item in train]
    assert len(items["dpo"]) == 35
    given = sources.load(SourceConfig(path="pairs.jsonl", reader="preferences"))
    assert all(pair in given for pair in items["dpo"])  # prompts and sides come back as they were
    assert set(evaluation_sources(preset)) == {"perplexity", "instructions", "preferences"}
    checks.check_evaluations(preset, build_tokenizer(preset.tokenizer, corpus.mixture_texts(preset.data.pretrain)))


def test_the_same_data_is_always_split_in_the_same_way(own):
    create("one", "notes.txt", machine=HERE)
    create("two", "notes.txt", machine=Machine(64, 64 << 30))
    for part in ("train", "validation", "test"):
        assert Path(f"one/text-{part}.jsonl").read_bytes() == Path(f"two/text-{part}.jsonl").read_bytes()
    Path("more.jsonl").write_text(Path("mine.jsonl").read_text() * 2)
    create("three", "notes.txt", "mine.jsonl", machine=HERE)
    create("four", "notes.txt", "more.jsonl", machine=HERE)  # rows given twice are on one side only
    assert Path("three/instructions-train.jsonl").read_bytes() == Path("four/instructions-train.jsonl").read_bytes()


def test_a_folder_is_read_by_its_split_and_the_command_says_which_files(own):
    rows = Path("mine.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("train-1", rows[:25]), ("train-2", rows[25:50]), ("test", rows[50:])):
        Path("folder").mkdir(exist_ok=True)
        Path(f"folder/{name}.jsonl").write_text("".join(part))
    said = create("mine", "notes.txt", "folder", machine=HERE)[1]
    assert said.startswith("folder (train-1.jsonl, train-2.jsonl, not test.jsonl (not of split train)): 45 examples")


@pytest.mark.parametrize(
    ("given", "plan", "measured"),
    [
        ({"text": "notes.txt"}, ["pretrain"], {"perplexity"}),
        ({"text": "notes.txt", "instructions": "mine.jsonl"}, ["pretrain", "sft"], {"perplexity", "instructions"}),
        ({"text": "notes.txt", "preferences": "pairs.jsonl"}, [*LINEAGE], {"perplexity", "preferences"}),
        ({"model": "someone/its", "instructions": "mine.jsonl"}, ["pretrain", "sft"], {"perplexity", "instructions"}),
        ({"model": "openai-community/gpt2"}, ["pretrain"], {"perplexity"}),
    ],
)  # fmt: skip
def test_each_input_may_be_left_out(own, given, plan, measured):
    create("part", **given, machine=HERE)
    preset = load_preset("part/preset.toml")
    checks.check(preset)
    assert list(lineage(preset)) == plan and set(evaluation_sources(preset)) == measured
    assert [entry.location for entry in preset.baselines.external] == ([given["model"]] if "model" in given else [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mine"], "--text FILE"),
        (["mine", "--text", "no.txt"], "no.txt: no such file"),
        (["mine", "--text", "n" * 5000 + ".txt"], "no such file"),
        (["n" * 5000 + "/mine", "--text", "notes.txt"], "no such folder"),
        (["mine", "--model", "n" * 5000], "no such folder"),
        (["mine", "--text", "book.pdf"], "book.pdf"),
        (["mine", "--text", "empty.txt"], "empty.txt"),
        (["mine", "--text", "little.txt"], "little.txt: 2 passages"),
        (["mine", "--text", "mine.jsonl"], "mine.jsonl:1: no column 'text'"),
        (["mine", "--text", "latin.txt"], "latin.txt:1: not UTF-8"),
        (["mine", "--text", "notes.txt", "--instructions", "pairs.jsonl"], "columns instruction, output"),
        (["mine", "--text", "notes.txt", "--preferences", "mine.jsonl"], "columns prompt, chosen and rejected"),
        (["mine", "--text", "notes.txt", "--instructions", "few.jsonl"], "few.jsonl: 1 different rows"),
        (["mine", "--text", "notes.txt", "--instructions", "long.jsonl"], "0 of 25 rows fit a context of 512"),
        (["there", "--text", "notes.txt"], "there exists already"),
        (["smoke", "--text", "notes.txt"], "a preset or a run of this name"),
        (["no/mine", "--text", "notes.txt"], "no: no such folder"),
        (["notes.txt/mine", "--text", "notes.txt"], "notes.txt: no such folder"),
        (["my study", "--text", "notes.txt"], "a name has only"),
        (["mine", "--model", "there"], "no config.json"),
        (["mine", "--model", "./nowhere"], "no such folder"),
    ],
)  # fmt: skip
def test_wrong_input_ends_in_one_line_and_leaves_nothing(own, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(Machine, "this", lambda: HERE)
    Path("there").mkdir()
    Path("empty.txt").touch()
    Path("book.pdf").write_bytes(b"%PDF-1.7")
    Path("little.txt").write_text("A word and another. " * 80)
    Path("latin.txt").write_bytes("é".encode("latin-1") * 20)
    row = {"instruction": "Say it.", "output": "It."}
    Path("few.jsonl").write_text((json.dumps(row) + "\n") * 30)
    long = [{"instruction": f"Say {number}.", "output": "So it was. " * 300} for number in range(30)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    before = sorted(own.iterdir())
    status, _, error = call(capsys, "new", *arguments)
    assert status == 2 and said in error and error.count("\n") == 1
    assert sorted(own.iterdir()) == before


def test_sizes_follow_the_machine_and_the_data():
    small, large = sizes(HERE, 60_000, 2000), sizes(Machine(16, 80 << 30, "a GPU"), 9_000_000, 50_000)
    assert (small["n_layer"], small["context"], small["tokens"]) == (2, 128, 10 * 20_000)
    assert large["n_layer"] == 6 and large["vocab_size"] == 8448 and large["tokens"] == 10 * 3_000_000
    assert large["parameters"] < large["tokens"]
    assert sizes(Machine(200, 8 << 30), 3_000_000, 2000)["n_layer"] == 4
    assert sizes(Machine(200, 1 << 27), 3_000_000, 2000)["n_layer"] == 2  # no memory for more
    assert sizes(HERE, 10_000_000_000, 2000)["tokens"] < 1_000_000  # as many as the time allows
    assert sizes(HERE, 300_000, 2000, [100] * 90 + [900] * 10)["context"] == 128
    assert sizes(HERE, 300_000, 2000, [900] * 100)["context"] == 512
    assert sizes(HERE, 20_000, 3)["vocab_size"] == 258


def test_a_text_is_cut_at_blank_lines_where_it_has_some():
    paragraph = "One sentence after the other. " * 10
    assert passages(f"{paragraph}\n\n{paragraph}\n \n{paragraph}") == [paragraph.strip()] * 3
    assert max(map(len, passages("x" * 1500))) == 600 and "".join(passages("x" * 1500)) == "x" * 1500
    words = "word " * 1000
    assert " ".join(passages(words)).split() == words.split()


# The worked example of docs/extending.md ------------------------------------------------------------------------------


def example(title: str) -> list[str]:
    """The commands of a section of docs/extending.md."""
    page = (paths.PROJECT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section, re.M | re.S)
    return block.splitlines()


@pytest.mark.slow
def test_the_worked_example_leads_from_own_data_to_a_report_and_a_talk(tmp_path):
    (tmp_path / "data").symlink_to(paths.DATA)
    command = tmp_path / "threefold"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m study "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(paths.PACKAGES),
        "THREEFOLD_RUNS": str(tmp_path / "runs"),
    }
    said = []
    for line in [*example("A study of your own data"), *example("Talk to the models")]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        said.append(done.stdout)
    page = (paths.PROJECT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert "\n".join(said[0].splitlines()[:3]) in page  # what the document quotes of the first command
    for stage in ("pretrain", "sft", "dpo", "compare"):
        assert f"{stage}: done in" in said[1]
    report = (tmp_path / "runs" / "my-study" / "report" / "index.html").read_text(encoding="utf-8")
    for part in ("text-train.jsonl", "instructions-heldout.jsonl", "preferences-train.jsonl"):
        assert part in report
    assert said[3].strip()
    assert [line for line in said[4].splitlines() if line.startswith(("pretrain: ", "sft: ", "dpo: "))]
