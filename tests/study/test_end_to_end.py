"""The whole road as a person goes it: the command line, every notebook in its own kernel, the rendered report."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest

from basics import paths
from papertrail import verify
from study import cli
from study.comparison import Comparison, seeds
from study.preset import load_preset
from study.run import Run

PROJECT = Path(__file__).parents[2]
PRESET = PROJECT / "tests" / "presets" / "tiny.toml"
STAGES = 21  # data, 5 trainings, 6 evaluations, 3 + 3 of the second seed, ablations, speed, compare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def call(runs: Path, *words: str, module: str = "study") -> subprocess.CompletedProcess:
    environment = {**os.environ, "THREEFOLD_RUNS": str(runs), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def papermill(runs: Path, notebook: str, *parameters: str) -> subprocess.CompletedProcess:
    out = runs / f"{notebook}.out.ipynb"
    words = [f"notebooks/{notebook}.ipynb", str(out), "--no-progress-bar"]
    return call(runs, *words, *parameters, module="papermill")


@pytest.fixture(scope="module")
def run(runs):
    """The tiny preset from nothing to a compared run."""
    done = call(runs, "run", "--preset", str(PRESET))
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return runs / "tiny"


def test_a_stage_without_its_input_names_the_notebook_that_makes_it(runs, tmp_path):
    done = papermill(tmp_path, "02_sft", "-p", "preset", str(PRESET))
    assert done.returncode != 0
    assert "MissingInput" in done.stderr
    assert "01_pretrain.ipynb" in done.stderr
    assert not (tmp_path / "tiny" / "sft").exists()


def test_a_misspelt_parameter_stops_with_the_near_miss(runs):
    done = papermill(runs, "02_sft", "-p", "preset", str(PRESET), "-p", "learning_rte", "1e-3")
    assert done.returncode != 0
    assert "did you mean learning_rate?" in done.stderr


def test_every_stage_left_a_checkpoint_or_results_and_an_executed_notebook(run):
    again = [f"seeds/2/{stage}" for stage in ("pretrain", "sft", "dpo")]
    for stage in ("pretrain", "gpt2", "distilgpt2", "sft", "dpo", *again):
        facts = json.loads((run / stage / "run.json").read_text())
        assert facts["tokens"] > 0
        assert facts["weights_sha256"] == facts["outputs"]["model.safetensors"]
        assert (run / stage / "metrics.jsonl").stat().st_size > 0
        assert facts["weights_sha256"] in (run / stage / "README.md").read_text(encoding="utf-8")
    assert len(list((run / "notebooks").glob("*.ipynb"))) == STAGES
    assert not list((run / "notebooks").glob("*.failed.ipynb"))


def test_a_second_seed_is_another_training_measured_on_the_same_items(run):
    comparison = Comparison.load(run)
    second = comparison.replicates[2]
    for stage in ("pretrain", "sft", "dpo"):
        ours, theirs = (one.stage(stage)["fingerprint"] for one in (comparison, second))
        assert theirs["seed"] == ours["seed"] + 1
        assert comparison.stage(stage)["weights_sha256"] != second.stage(stage)["weights_sha256"]
        for protocol, found in second.evaluations(stage).items():
            first = comparison.evaluations(stage)[protocol]
            assert found["settings"]["data"] == first["settings"]["data"]
            assert {name: m["n"] for name, m in found["metrics"].items()}.items() <= {
                name: m["n"] for name, m in first["metrics"].items()
            }.items()
    assert second.stage("sft")["fingerprint"]["parents"] == {
        "pretrain-seed2": second.stage("pretrain")["weights_sha256"]
    }
    assert {(one.measure.key, one.stage) for one in seeds.spreads(comparison)} >= {
        ("perplexity", "pretrain"),
        ("sentiment", "sft"),
        ("preferences", "dpo"),
    }


def test_a_second_run_skips_everything_quickly(runs, run):
    begin = time.monotonic()
    done = call(runs, "run", "--preset", str(PRESET))
    assert done.returncode == 0
    assert f"0 stages executed, {STAGES} fresh and skipped" in done.stdout
    assert time.monotonic() - begin < 60  # 10 s on an idle machine; tests may share it


def test_transformers_alone_generates_what_we_generate(runs, run):
    """A checkpoint is a standard one: no code of ours is needed to run it as it was trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "The old miller"
    done = call(runs, "generate", "--run", "tiny", "--stage", "dpo", "--max-new-tokens", "24", prompt)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(run / "dpo")
    tokenizer = AutoTokenizer.from_pretrained(run / "dpo")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    assert done.stdout.rstrip("\n") == tokenizer.decode(ids[0], skip_special_tokens=True).rstrip("\n")


def test_the_report_is_rendered_and_loads_nothing_from_outside(runs, run):
    done = call(runs, "report", "--run", "tiny")
    assert done.returncode == 0, done.stderr
    html = (run / "report" / "index.html").read_text(encoding="utf-8")
    for section in ("Seed spread", "Claims ledger", "Limitations", "Provenance", "References"):
        assert section in html
    page = Page(html)
    assert "{{<" not in page.text and "?@" not in page.text
    assert page.loaded == []


class Page(HTMLParser):
    """The text that a reader sees of a page, and what the page loads from elsewhere, whichever program rendered it.

    Quarto embeds its scripts; one of them, anchor.js, holds the text `?@`."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.loaded, self._inside = "", [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self._inside = tag if tag in ("script", "style") else ""
        values = dict(attributes)
        target = values.get("src") or (values.get("href") if tag == "link" else "") or ""
        if target and not target.startswith(("data:", "#")):
            self.loaded.append(target)

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "style":
            self.loaded += re.findall(r"@import\b[^;]*|url\(\s*['\"]?(?:https?:)?//[^)]*", data)
        elif not self._inside:
            self.text += data


def test_a_page_that_loads_something_or_shows_a_missing_reference_is_found():
    quarto = '<script src="data:,x"></script><script>anchor = "?@"</script><style>p { color: red }</style><p>text</p>'
    assert Page(quarto).text == "text" and Page(quarto).loaded == []
    assert "?@" in Page("<p>see ?@tbl-x</p>").text
    for loading in (
        '<script src="https://x/a.js">',
        '<link rel="stylesheet" href="https://x/a.css">',
        '<img src="//x/a">',
    ):
        assert len(Page(loading).loaded) == 1
    assert len(Page("<style>@import 'a.css'; b { background: url(https://x/y) }</style>").loaded) == 2


def test_a_report_names_no_place_on_this_machine(run):
    for notebook in (run / "notebooks").glob("*.ipynb"):
        text = notebook.read_text(encoding="utf-8")
        assert str(PROJECT) not in text, notebook.name
        assert str(run.parent) not in text, notebook.name


def test_swapped_weights_are_refused_with_both_hashes(runs, run, tmp_path):
    """Results of other weights than the stage's checkpoint never enter the comparison."""
    copy = tmp_path / "tiny"
    shutil.copytree(run, copy)
    shutil.copyfile(copy / "pretrain" / "model.safetensors", copy / "sft" / "model.safetensors")
    hashes = [json.loads((run / s / "run.json").read_text())["weights_sha256"] for s in ("pretrain", "sft")]
    done = papermill(tmp_path, "06_compare", "-p", "preset", str(PRESET))
    assert done.returncode != 0
    for digest in hashes:
        assert digest[:12] in done.stderr


# To the bit -----------------------------------------------------------------------------------------------------------


@contextmanager
def archived(runs: Path) -> Iterator[None]:
    """Inside the block no folder of the runs can be written; root gives up its right to write all the same."""
    modes = {folder: folder.stat().st_mode for folder in [runs, *runs.rglob("*/")] if not folder.is_symlink()}
    for folder, mode in modes.items():
        folder.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)


EXPLORED = """
from study.explore import read
run = read.open_run("tiny")
print(read.checkpoint(run, "sft") is not None, read.loss_curve(run, "sft", 9)["step"][0], read.evaluated(run)[1])"""


@pytest.mark.skipif(
    os.name != "posix" or (os.geteuid() == 0 and not shutil.which("setpriv")), reason="root writes everywhere"
)
def test_a_run_in_an_archive_is_what_its_run_json_says_and_its_tables_come_out_again(runs, run, tmp_path):
    """What reads a run needs to write nothing in it: status, verify, compare, report, explore."""
    home = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    shutil.copytree(home / "tiny", home / "trial")
    shutil.rmtree(home / "trial" / "report", ignore_errors=True)
    unprivileged = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []

    def read(*words: str) -> str:
        environment = os.environ | {"THREEFOLD_RUNS": str(home), "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        command = [*unprivileged, sys.executable, *words]
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with archived(home):
        assert "Permission denied" in read("-c", f"try: open({str(home / 'x')!r}, 'w')\nexcept OSError as e: print(e)")
        before = {path: path.lstat().st_mtime_ns for path in home.rglob("*")}
        assert read("-m", "study", "status").count(f"{STAGES} fresh") == 2
        assert re.search(
            r"run tiny: \d+ files are what their run\.json says", read("-m", "study", "verify", "--run=tiny")
        )
        assert "The presets are the same." in read("-m", "study", "compare", "tiny", "trial")
        said = read("-m", "study", "report", "--run", "trial").splitlines()
        assert Path(said[-1]).is_file() and "trial cannot be written: rendering into" in "".join(said)
        assert read("-c", EXPLORED) == "True 1 []\n"
        assert {path: path.lstat().st_mtime_ns for path in home.rglob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", Path(said[-1]).parents[1].name]


@pytest.mark.parametrize("stage", ["sft", "evaluate-sft"])
def test_a_stage_made_again_is_the_same_to_the_bit(runs, run, stage):
    done = call(runs, "verify", "--run", "tiny", "--rerun", stage)
    assert done.returncode == 0, done.stderr
    assert f"stage {stage} came out the same, times apart" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="cores are taken away on Linux only")
def test_another_number_of_jobs_with_as_many_threads_gives_the_same_bits(runs, run, tmp_path):
    """Threads split fp32 sums, jobs do not: one notebook at a time on as many cores as each of two had."""
    first = json.loads((run / "pretrain" / "run.json").read_text())["determinism"]
    assert first["level"] == "bit-identical"
    (threads,) = first["threads"]
    script = (
        f"import os, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{threads}]);"
        "from study.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["run", "--preset", str(PRESET), "--only", "data", "--only", "pretrain", "--jobs", "1"]
    environment = {**os.environ, "THREEFOLD_RUNS": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    for stage in ("data", "pretrain"):
        assert list(verify.differences(_run_in(runs), _run_in(tmp_path), stage)) == []


def _run_in(runs: Path) -> Run:
    preset = load_preset(runs / "tiny" / "config.toml")
    return Run.of(preset.name, runs / "tiny", preset)


FLIPPED = {
    "checkpoint": "sft/model.safetensors",
    "items": "evaluation/sft/items/*.parquet",
    "notebook": "notebooks/02_sft.ipynb",
    "cache": ".cache/tokens/*/tokens.bin",
}


@pytest.fixture
def copied(runs, run, tmp_path, monkeypatch):
    """The run and its cache, to be damaged."""
    for name in ("tiny", ".cache"):
        shutil.copytree(runs / name, tmp_path / name)
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    return tmp_path


def flip(runs: Path, kind: str) -> str:
    """Change one bit in the middle of a file and nothing of its size and times; its path below the runs folder."""
    file = sorted(runs.glob(FLIPPED[kind] if kind == "cache" else f"tiny/{FLIPPED[kind]}"))[0]
    before, content = file.stat(), file.read_bytes()
    place = content.index(b'"nbformat_minor": ') + 18 if kind == "notebook" else len(content) // 2
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return file.relative_to(runs).as_posix()


@pytest.mark.parametrize("kind", FLIPPED)
def test_one_changed_byte_is_named_by_verify(copied, capsys, kind):
    changed = flip(copied, kind)
    assert cli.main(["verify", "--run", "tiny"]) == 1
    assert changed.removeprefix("tiny/") in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["checkpoint", "items", "notebook"])
@pytest.mark.parametrize(
    "words", [["compare", "tiny", "other"], ["report", "--run", "tiny"], ["report", "--run", "tiny", "--publish"]]
)
def test_what_reads_results_refuses_one_changed_byte(copied, capsys, kind, words):
    shutil.copytree(copied / "tiny", copied / "other")
    shutil.rmtree(copied / "tiny" / "report", ignore_errors=True)
    changed = flip(copied, kind)
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert changed.removeprefix("tiny/") in said.err and said.out == ""
    assert not (copied / "tiny" / "report").exists()


@pytest.mark.parametrize("words", [["generate", "The old miller"], ["export", "out"]])
def test_what_runs_a_model_refuses_one_changed_byte(copied, capsys, words):
    changed = flip(copied, "checkpoint")
    words = [words[0], "--run", "tiny", "--stage", "sft", *(str(copied / w) if w == "out" else w for w in words[1:])]
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert changed.removeprefix("tiny/") in said.err and said.out == "" and not (copied / "out").exists()


@pytest.mark.parametrize("notebook", ["04_evaluate", "03_dpo"])
def test_a_notebook_that_reads_a_checkpoint_refuses_one_changed_byte(copied, notebook):
    changed = flip(copied, "checkpoint")
    model = ["-p", "model", "sft"] if notebook == "04_evaluate" else []
    done = papermill(copied, notebook, "-p", "preset", str(PRESET), *model)
    assert done.returncode != 0
    assert f"CheckpointError: {changed.removeprefix('tiny/')} of run tiny is not what the stage wrote" in done.stderr


def test_exploring_says_where_a_view_would_stand_that_a_byte_changed(copied):
    changed = flip(copied, "checkpoint")
    done = papermill(copied, "explore", "-p", "run", "tiny")
    assert done.returncode == 0, done.stderr
    shown = (copied / "explore.out.ipynb").read_text()
    assert f"{changed.removeprefix('tiny/')} of run tiny is not what the stage wrote" in shown
