"""The command line: what it answers, what it refuses, and with which exit status."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from shared import ONE_STEP, SAMPLE_DATA, call

from basics import files, paths
from basics.errors import ReportError
from papertrail import notebooks, records
from papertrail.plan import dependents
from study import cli
from study.cli import results
from study.existing import open_existing
from study.preset import TRAINED, load_preset, preset_names
from study.run import Run, open_run, open_stage

PRESET = (
    """
name = "tiny"
[model]
n_layer = 1
d_model = 16
n_head = 2
d_ff = 32
context = 32
[tokenizer]
vocab_size = 265
[evaluation]
speed_prompt = 8
speed_new_tokens = 8
"""
    + SAMPLE_DATA
    + ONE_STEP
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A runs folder, notebooks that are never executed, and the preset tiny.toml in the current folder."""
    books = tmp_path / "notebooks"
    books.mkdir()
    for name in ("00_data", "01_tune", "01_pretrain", "02_sft", "03_dpo", "04_evaluate", "04_speed", "06_compare"):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), books / f"{name}.ipynb")
    (tmp_path / "tiny.toml").write_text(PRESET)
    monkeypatch.setattr(paths, "NOTEBOOKS", books)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.delenv("THREEFOLD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(stage: str, fill=lambda folder: (folder / "x.txt").write_text("x")) -> Run:
    """Finishes a stage of run tiny as its notebook would."""
    opened = open_stage(stage, preset="tiny.toml")
    fill(opened.begin())
    facts = opened.finish(tokens=1)
    data, metadata = records.bundle(f"stage/{stage}", facts)
    cell = nbformat.v4.new_code_cell(
        "1", outputs=[nbformat.v4.new_output("display_data", data=data, metadata=metadata)]
    )
    file = opened.run.notebook(opened.run.plan[stage].executed)
    file.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=notebooks.METADATA), file)
    return opened.run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rn"], "invalid choice: 'rn'"),
        (["--jobs", "x"], "invalid choice: 'x'"),
        (["run", "--preset", "smokee"], "unknown preset 'smokee'"),
        (["run", "--preset", "missing.toml"], "no such file"),
        (["run", "--preset", "tiny.toml", "--set", "sft.learning_rte=1"], "did you mean sft.learning_rate?"),
        (["run", "--preset", "tiny.toml", "--set", "sft.steps=many"], "expected a whole number"),
        (["run", "--preset", "tiny.toml", "--set", "sft.steps"], "expected key=value"),
        (["run", "--preset", "tiny.toml", "--run", "../elsewhere"], "a name has only"),
        (["run", "--preset", "tiny.toml", "--only", "stf"], "did you mean sft?"),
        (["run", "--preset", "tiny.toml", "--from", "ablations"], "stage 'ablations'"),
        (["run", "--preset", "tiny.toml", "--only", "sft", "--from", "sft"], "not allowed with"),
        (["run", "--preset", "tiny.toml", "--only", "sft"], "sft needs stage pretrain"),
        (["run", "--preset", "tiny.toml", "--data-dir", "nowhere"], "data_dir = 'nowhere': no such folder"),
        (["run", "--preset", "tiny.toml", "--jobs", "0"], "expected a whole number of at least 1"),
        (["status", "--run", "tiny"], "no run 'tiny'; runs: none yet"),
        (["status", "--run", "tiny", "--json"], "no run 'tiny'"),
        (["verify", "--run", "tiny"], "no run 'tiny'"),
        (["verify", "--run", "tiny", "--json"], "no run 'tiny'"),
        (["tensorboard", "--run", "tiny"], "no run 'tiny'"),
        (["wandb", "--run", "tiny"], "no run 'tiny'"),
        (["status", "--set", "sft.steps=1"], "--set goes with --run"),
        (["clean", "--run", "tiny"], "no run 'tiny'"),
        (["completion", "fish"], "invalid choice"),
        (["report", "--run", "tiny"], "no run 'tiny'"),
        (["generate", "--run", "tiny", "Once"], "no run 'tiny'"),
        (["generate", "--run", "tiny", "--stage", "sfft", "Once"], "invalid choice"),
        (["generate", "--stream", "--window", "0", "Once"], "expected a whole number of at least 1"),
        (["export", "--run", "../x", "out"], "a name has only"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(project, capsys, arguments, said):
    status, out, err = call(capsys, *arguments)
    assert status == 2 and out == ""
    assert said in err and err.count("\n") == 1 and err.startswith("threefold")
    assert not (project / "runs").exists()  # nothing half-written


@pytest.mark.parametrize("option", [["--window", "9"], ["--stop-at-eos"]])
def test_an_option_of_a_stream_goes_with_it(project, capsys, option):
    make("data")
    status, out, err = call(capsys, "generate", "--run", "tiny", *option, "Once")
    assert (status, out) == (2, "") and err == f"threefold: {option[0]} goes with --stream\n"


COMMANDS = [
    *("run", "train", "status", "verify", "compare", "tensorboard", "wandb", "clean", "report", "generate", "export"),
    *("new", "doctor", "chat", "completion"),
]


def test_help_and_version(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0
    assert all(name in out for name in COMMANDS)
    assert call(capsys, "--version")[1].startswith("threefold 0.")
    for name in COMMANDS:
        assert call(capsys, name, "--help")[0] == 0


@pytest.mark.parametrize("words", [["generate", "Once"], ["chat"], ["export", "out"]])
def test_the_checkpoint_of_every_training_can_be_named(words):
    for name in TRAINED:
        assert cli.parser().parse_args([*words, "--stage", name]).stage == name


def test_without_a_command_it_prints_examples_presets_and_stages(project, capsys):
    status, out, err = call(capsys)
    assert (status, err) == (0, "") and out == call(capsys, "--help")[1]
    examples = re.findall(r"^  (threefold .*)$", out, re.MULTILINE)
    assert {cli.parser().parse_args(shlex.split(example)[1:]).command for example in examples} == set(COMMANDS)
    for name in preset_names():
        assert re.search(rf"^  {name} +\S", out, re.MULTILINE)
    stages = re.search(r"^stages: (.*)$", out, re.MULTILINE)[1].split(", ")
    plan = Run.of("reference", project, load_preset("reference")).plan
    names = {re.sub("^(evaluate|tune)-.*", r"\1-MODEL", stage) for stage in plan if "-seed" not in stage}
    assert names == set(stages)


@pytest.mark.parametrize(
    "command", ["generate", "export", "compare", "verify", "report", "train", "tensorboard", "clean"]
)
def test_a_wrong_name_is_refused_before_anything_heavy_is_imported(project, command):
    make("data")
    words = {"compare": ["tiny", "tinny"]}.get(command, ["--run", "tinny"])
    words += {"generate": ["Once"], "export": ["out"], "train": ["sft"]}.get(command, [])
    heavy = ["torch", "transformers", "datasets", "pandas", "matplotlib", "papermill", "nbformat", "scipy"]
    script = (
        "import sys, study.cli as cli, basics.paths as paths; from pathlib import Path;"
        f"paths.RUNS = Path({str(paths.RUNS)!r}); status = cli.main({[command, *words]!r});"
        f"print(status, [name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n" and "no run 'tinny', did you mean tiny?" in done.stderr


def test_the_readme_lists_every_command_and_each_line_of_it_is_understood():
    text = (paths.PROJECT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    seen = {cli.parser().parse_args(words[1:]).command for words in lines if words[:1] == ["threefold"]}
    assert seen | {"completion", "chat"} == set(COMMANDS)
    assert "threefold completion bash" in text


def test_help_and_status_do_not_wait_for_torch(project):
    make("data")
    heavy = ["torch", "transformers", "datasets", "pandas", "matplotlib", "papermill", "nbformat", "jupytext"]
    script = (
        "import sys, study.cli as cli, basics.paths as paths; from pathlib import Path;"
        f"paths.RUNS = Path({str(paths.RUNS)!r}); paths.NOTEBOOKS = Path({str(paths.NOTEBOOKS)!r});"
        "cli.main(['status', '--run', 'tiny']); cli.main(['status']); cli.main(['completion', 'bash']);"
        "cli.main(['clean', '--run', 'tiny', '--keep-results', '--yes']); cli.main(['clean', '--cache', '--yes']);"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_status_tells_each_stage_and_why(project, capsys):
    make("data")
    make("pretrain")
    status, out, _ = call(capsys, "status", "--run", "tiny")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert status == 0 and list(lines) == list(open_run("tiny.toml").plan)
    assert " fresh " in lines["data"] and " s" in lines["pretrain"]
    assert "missing" in lines["sft"] and "not made yet" in lines["sft"]
    open_run("tiny.toml", overrides=["pretrain.learning_rate=0.5"])
    out = call(capsys, "status", "--run", "tiny")[1]
    assert "config: pretrain.learning_rate 0.003 -> 0.5" in out


def test_a_learning_rate_makes_its_stage_and_what_depends_on_it_stale_and_nothing_else(project, capsys):
    plan = open_run("tiny.toml").plan
    for stage in plan:
        make(stage)

    def states() -> dict[str, str]:
        told = json.loads(call(capsys, "status", "--run", "tiny", "--json")[1])["stages"]
        return {entry["stage"]: entry["state"] for entry in told}

    assert set(states().values()) == {"fresh"}
    asked = call(capsys, "status", "--run", "tiny", "--json", "--set", "sft.learning_rate=0.5")[1]
    assert set(states().values()) == {"fresh"}, "asking what a change would do changed the run"
    open_run("tiny.toml", overrides=["sft.learning_rate=0.5"])
    assert json.loads(asked) == json.loads(call(capsys, "status", "--run", "tiny", "--json")[1])
    stale = {stage for stage, state in states().items() if state == "stale"}
    assert stale == {"sft", *dependents(plan, "sft")} and set(states().values()) == {"fresh", "stale"}
    told = json.loads(call(capsys, "status", "--run", "tiny", "--json")[1])["stages"]
    reasons = {entry["stage"]: entry["reasons"] for entry in told}
    assert reasons["sft"] == ["config: sft.learning_rate 0.003 -> 0.5"]
    assert reasons["dpo"] == ["parent sft is stale"]


def test_run_without_preset_goes_on_with_the_runs_own(project, capsys, monkeypatch):
    seen = {}

    def execute(run, **options):
        seen.update(options, run=run)
        return cli_scheduler.Outcome()

    from papertrail import scheduler as cli_scheduler

    monkeypatch.setattr(cli_scheduler, "execute", execute)
    made = [f"evaluate-{model}" for model in ("random", "gpt2", "distilgpt2", "pretrain", "sft", "dpo")]
    for stage in ("pretrain", "gpt2", "distilgpt2", "sft", "dpo"):
        make(stage)
    assert call(capsys, "run", "--preset", "tiny.toml", "--set", "sft.steps=7")[0] == 0
    status, out, _ = call(
        capsys, "run", "--run", "tiny", "--only", "data", "--only", "evaluate", "--jobs", "2", "--force"
    )
    assert status == 0 and "run tiny: 0 stages executed" in out
    assert seen["run"].preset.sft.steps == 7 and seen["run"].preset.name == "tiny"
    assert seen["selected"] == {"data", *made}
    assert seen["jobs"] == 2 and seen["force"]


def test_the_data_folder_is_remembered(project, capsys, monkeypatch):
    from papertrail import scheduler

    monkeypatch.setattr(scheduler, "execute", lambda run, **_: scheduler.Outcome())
    (project / "mine").mkdir()
    call(capsys, "run", "--preset", "tiny.toml", "--data-dir", "mine")
    assert open_existing("tiny").data_dir == str(project / "mine")
    (project / "mine").rmdir()
    assert open_existing("tiny").data_dir == ""


def test_a_failed_stage_is_exit_1(project, capsys, monkeypatch):
    from papertrail import scheduler

    def fail(run, **_):
        raise scheduler.StageFailed("sft: rows.jsonl, line 3: no JSON")

    monkeypatch.setattr(scheduler, "execute", fail)
    assert call(capsys, "run", "--preset", "tiny.toml") == (1, "", "threefold: sft: rows.jsonl, line 3: no JSON\n")


def test_status_tells_a_stage_at_work_from_a_missing_one(project, capsys):
    from papertrail import scheduler, stage

    run = make("data")

    def states() -> dict[str, str]:
        lines = call(capsys, "status", "--run", "tiny")[1].splitlines()
        told = json.loads(call(capsys, "status", "--run", "tiny", "--json")[1])["stages"]
        assert [line.split()[0] for line in lines] == [entry["stage"] for entry in told]
        assert [" at work" in line for line in lines] == [entry["at_work"] for entry in told]
        return {entry["stage"]: entry["state"] for entry in told if entry["at_work"]}

    assert states() == {}
    work = run.partial_folder("pretrain")
    stage.hold(work)  # as a notebook by itself, which may train again what is there
    try:
        assert states() == {"pretrain": "missing"}
    finally:
        stage.release(work)
    assert states() == {}
    executing = run.path / ".executing" / "01_pretrain-gpt2.ipynb"
    executing.parent.mkdir()
    executing.touch()
    assert states() == {}, "left by a killed process"
    with scheduler.lock(run.path):
        assert states() == {"gpt2": "missing"}


def test_after_ctrl_c_it_says_from_which_step_each_training_resumes(project, capsys, monkeypatch):
    from papertrail import scheduler
    from threefold.training.state import State, save_state

    make("data")

    def interrupted(run, **_):
        for name, step in (("pretrain", 7), ("gpt2", None), ("sft", 3)):
            folder = open_stage(name, preset="tiny.toml").begin()
            if step is not None:
                save_state(folder, State({}, step=step), {})
        (open_stage("dpo", preset="tiny.toml").begin() / "training.json").write_text("{}")
        facts = json.loads((run.partial_folder("sft") / "run.json").read_text())
        del facts[files.SELF]
        facts["fingerprint"]["digest"] = "of another configuration"
        files.write_note(run.partial_folder("sft") / "run.json", facts)
        raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, "execute", interrupted)
    status, _, err = call(capsys, "run", "--preset", "tiny.toml")
    told = "pretrain from step 8, sft from step 1, dpo is trained, gpt2 from step 1"
    assert (status, err) == (130, f"threefold: stopped; the same command resumes the run: {told}\n")


def test_after_ctrl_c_it_says_from_which_step_of_which_trial_a_choice_resumes(project, capsys, monkeypatch):
    from papertrail import scheduler
    from threefold.training.state import State, save_state

    def interrupted(run, **_):
        folder = open_stage("tune-pretrain", preset="tiny.toml", overrides="tuning.multipliers=0.5,1").begin()
        files.write_note(folder / "trial-1.json", {})
        (folder / "trial-2").mkdir()
        save_state(folder / "trial-2", State({}, step=4), {})
        raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, "execute", interrupted)
    status, _, err = call(capsys, "run", "--preset", "tiny.toml", "--set", "tuning.multipliers=0.5,1")
    assert (status, err) == (
        130,
        "threefold: stopped; the same command resumes the run: tune-pretrain from step 5 of trial 2\n",
    )


def test_verify(project, capsys):
    run = make("data")
    assert call(capsys, "verify", "--run", "tiny")[:2] == (0, "run tiny: 3 files are what their run.json says\n")
    (run.stage_folder("data") / "x.txt").write_text("y")
    status, _, err = call(capsys, "verify", "--run", "tiny")
    assert (status, err) == (1, "threefold: tiny/data/x.txt: changed since the stage wrote it\n")
    facts = json.loads((run.stage_folder("data") / "run.json").read_text())
    facts["fingerprint"]["seed"] = 2
    (run.stage_folder("data") / "run.json").write_text(json.dumps(facts))
    assert "data/run.json is not as it was written" in call(capsys, "verify", "--run", "tiny")[2]
    del facts[files.SELF]
    files.write_note(run.stage_folder("data") / "run.json", facts)
    assert "digest is not that of its components" in call(capsys, "verify", "--run", "tiny")[2]


def test_json_for_scripts(project, capsys):
    """Its keys are what docs/scripts.md promises."""
    run = make("data")
    (run.stage_folder("data") / "x.txt").write_text("x")
    status, out, err = call(capsys, "status", "--run", "tiny", "--json")
    told = json.loads(out)
    assert (status, err, told["run"]) == (0, "", "tiny")
    data, *others = told["stages"]
    assert [data["stage"], *(other["stage"] for other in others)] == list(run.plan)
    facts = json.loads((run.stage_folder("data") / "run.json").read_text())
    assert data == {
        "stage": "data",
        "state": "fresh",
        "at_work": False,
        "reasons": [],
        "wall_seconds": facts["wall_seconds"],
        "finished": facts["finished"],
        "fingerprint": facts["fingerprint"]["digest"],
        "headline": None,
    }
    assert others[0]["state"] == "missing" and others[0]["reasons"] == ["not made yet"]
    assert others[0]["wall_seconds"] is None and others[0]["finished"] is None

    status, out, err = call(capsys, "verify", "--run", "tiny", "--json")
    assert (status, json.loads(out), err) == (0, {"run": "tiny", "files": 3, "problems": []}, "")
    (run.stage_folder("data") / "x.txt").write_text("y")
    status, out, err = call(capsys, "verify", "--run", "tiny", "--json")
    problem = {"path": "data/x.txt", "problem": "changed since the stage wrote it"}
    assert (status, json.loads(out), err) == (1, {"run": "tiny", "files": 3, "problems": [problem]}, "")


def test_report_check_says_what_is_wrong_in_one_exit(project, capsys, monkeypatch):
    from papertrail import report

    def require(folder):
        raise ReportError("report/index.qmd: no label tbl-x")

    monkeypatch.setattr(report, "require", require)
    status, _, err = call(capsys, "report", "--check")
    assert (status, err) == (2, "threefold: report/index.qmd: no label tbl-x\n")


def test_a_full_disk_is_one_line(project, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "runs/tiny/config.toml")

    monkeypatch.setattr(Run, "create", full)
    assert call(capsys, "run", "--preset", "tiny.toml")[::2] == (
        2,
        "threefold: No space left on device: runs/tiny/config.toml\n",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_runs_folder_that_cannot_be_written_is_one_line(project, capsys, monkeypatch):
    (project / "runs").mkdir(mode=0o500)
    status, out, err = call(capsys, "run", "--preset", "tiny.toml")
    assert (status, out, err.count("\n")) == (2, "", 1) and "(Permission denied): set THREEFOLD_RUNS" in err


@pytest.mark.parametrize(
    "arguments", [["run", "--preset", "tiny.toml"], ["run", "--preset", "tiny.toml", "--run", "x"]]
)
def test_a_runs_folder_that_can_never_be_one_is_one_line(project, capsys, monkeypatch, arguments):
    (project / "file").write_text("x")
    for place in (project / "file", project / "file" / "runs", Path("/proc/runs"), Path("/dev/null/runs")):
        monkeypatch.setattr(paths, "RUNS", place)
        status, out, err = call(capsys, *arguments)
        assert (status, out) == (2, "") and err.count("\n") == 1, err
        assert "THREEFOLD_RUNS" in err and str(place) in err


def test_every_command_prints_what_the_terminals_encoding_cannot_hold(project):
    """In an ASCII terminal other characters are question marks; no command ends in a traceback."""
    run = make("data")
    (run.path / "notebooks" / "größe.failed.ipynb").write_text("x")
    (project / "größe.toml").write_text("sft = 'ü'")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "THREEFOLD_RUNS": str(paths.RUNS), "PYTHONUTF8": "0"}
    environment["PYTHONPATH"] = str(paths.PACKAGES)
    for arguments, said in (
        (["clean", "--run", "tiny", "--keep-results"], "gr??e.failed.ipynb"),
        (["run", "--preset", "größe.toml"], "gr??e.toml: sft = '?'"),
        (["status", "--run", "größe"], "run 'gr??e'"),
        (["train", "größe", "--run", "tiny"], "gr??e: allowed are"),
        (["--help"], "usage"),
    ):
        command = [sys.executable, "-m", "study", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert said in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_generate_replaces_what_the_terminals_encoding_cannot_hold(checkpoint):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "THREEFOLD_RUNS": str(paths.RUNS), "PYTHONUTF8": "0"}
    environment["PYTHONPATH"] = str(paths.PACKAGES)
    command = [sys.executable, "-m", "study", "generate", "--run", "tiny", "--stage", "pretrain", "Thé old", "--stream"]
    done = subprocess.run([*command, "--max-new-tokens", "2"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("Th? old")


def test_world_size_alone_is_one_line(project, capsys, monkeypatch):
    make("data")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out, err = call(capsys, "train", "pretrain", "--run", "tiny")
    assert (status, out, err.count("\n")) == (2, "", 1) and "RANK, MASTER_ADDR, MASTER_PORT are not set" in err


@pytest.fixture
def checkpoint(project):
    import torch

    from threefold.data.tokenizer import build_tokenizer
    from threefold.model import Decoder, save_checkpoint

    preset = open_run("tiny.toml").preset
    tokenizer = build_tokenizer(preset.tokenizer, ["the cat sat on the mat. " * 20], preset.model.sinks)

    def fill(folder):
        import dataclasses

        torch.manual_seed(0)
        model = Decoder(dataclasses.replace(preset.model, vocab_size=len(tokenizer)))
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(std=0.3)  # or greedy text is one token again and again
        save_checkpoint(folder, model, tokenizer)

    return make("pretrain", fill)


def test_generate_says_what_transformers_says(checkpoint, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = ["generate", "--run", "tiny", "--stage", "pretrain", "the cat", "--max-new-tokens", "12"]
    status, out, _ = call(capsys, *arguments)
    folder = checkpoint.stage_folder("pretrain")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert status == 0 and out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
    assert out.startswith("the cat")

    sampled = [call(capsys, *arguments, "--temperature", "1", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]
    status, _, err = call(capsys, *arguments, "--top-p", "2")
    assert status == 2 and "top_p" in err


def test_a_stream_says_what_generate_says_and_goes_on(checkpoint, capsys):
    arguments = ["generate", "--run", "tiny", "--stage", "pretrain", "the cat", "--max-new-tokens"]
    for settings in ([], ["--temperature", "1", "--seed", "1"]):
        within = call(capsys, *arguments, "12", *settings)
        assert call(capsys, *arguments, "12", *settings, "--stream", "--stop-at-eos") == within
    status, out, err = call(capsys, *arguments, "80", "--stream", "--window", "9")  # the context has 32
    assert (status, err) == (0, "") and out.startswith("the cat") and len(out) > 60
    long = call(
        capsys, "generate", "--run", "tiny", "--stage", "pretrain", "cat " * 60, "--max-new-tokens", "3", "--stream"
    )
    assert long[0] == 0 and long[1].startswith("cat " * 60) and long[2] == ""


def test_ctrl_c_ends_a_stream_and_keeps_what_was_printed(checkpoint, capsys, monkeypatch):
    from threefold import model

    def interrupted(*arguments, **settings):
        assert arguments[3] == -1, "without an end"
        yield from arguments[1][1:]
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "stream", interrupted)
    arguments = ["generate", "--run", "tiny", "--stage", "pretrain", "the cat", "--stream"]
    assert call(capsys, *arguments) == (0, "the catthe cat\n", "")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--window", "32"], "window = 32: allowed is 1 to 31"),
        (["--top-k", "0"], "top_k = 0"),
        (["--temperature", "-1"], "temperature = -1.0"),
    ],
)
def test_an_impossible_stream_is_one_line_and_exit_2(checkpoint, capsys, settings, said):
    status, out, err = call(capsys, "generate", "--run", "tiny", "--stage", "pretrain", "a", "--stream", *settings)
    assert (status, out, err.count("\n")) == (2, "", 1) and said in err


def test_export_gives_a_folder_that_loads(checkpoint, project, capsys):
    from transformers import AutoModelForCausalLM

    arguments = ["export", "--run", "tiny", "--stage", "pretrain", "out"]
    assert call(capsys, *arguments)[0] == 0
    AutoModelForCausalLM.from_pretrained(project / "out")
    assert not (project / "out" / "run.json").exists()
    assert call(capsys, *arguments)[0] == 2  # not over what is there


def test_a_checkpoint_that_changed_is_not_used(checkpoint, capsys):
    with open(checkpoint.stage_folder("pretrain") / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    for command in (["generate", "the cat"], ["export", "out"]):
        status, out, err = call(capsys, command[0], "--run", "tiny", "--stage", "pretrain", *command[1:])
        assert status == 2 and out == ""
        assert "pretrain/model.safetensors of run tiny is not what the stage wrote" in err
    assert call(capsys, "generate", "--run", "tiny", "--stage", "dpo", "x")[0] == 2  # never made


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_report_as_an_exit(project, capsys, monkeypatch, number):
    """So that its renderer and its temporary folder go (tests/papertrail/test_report_render.py)."""
    make("data")
    monkeypatch.setattr(results, "report", lambda options: signal.raise_signal(number))
    before = signal.signal(number, signal.SIG_DFL)  # nohup, for one, has SIGHUP ignored
    try:
        assert call(capsys, "report", "--run", "tiny")[0] == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
