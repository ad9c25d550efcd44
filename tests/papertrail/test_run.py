import os
import shutil
import subprocess
import sys

import pytest
from shared import flip

from basics import files, paths
from basics.errors import CheckpointError, ConfigError, MissingInput, RecordError, ThreefoldError
from papertrail import provenance
from papertrail import stage as papertrail_stage
from papertrail.provenance import Fingerprint
from papertrail.run import read_run_file
from study.preset import TRAINED, Preset, load_preset, section, to_toml
from study.run import open_run, open_stage
from threefold.config import TrainConfig


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project with two presets, and its runs folder, in a temporary place."""
    monkeypatch.setattr(paths, "PROJECT", tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paths, "PRESETS", tmp_path / "presets")
    monkeypatch.delenv("THREEFOLD_DATA", raising=False)
    (tmp_path / "presets").mkdir()
    for name in ("smoke", "laptop"):
        preset = Preset(name=name, **dict.fromkeys(map(section, TRAINED), TrainConfig(steps=10)))
        (tmp_path / "presets" / f"{name}.toml").write_text(to_toml(preset))
    return tmp_path


def of(stage, **changes) -> Fingerprint:
    """A fingerprint that looks nothing up."""
    return Fingerprint(
        **{**dict(stage=stage, config={}, code={"c": "1"}, data={}, parents={}, versions={}, seed=1), **changes}
    )


def make(stage, text="1", **changes):
    """Run a stage that writes one output."""
    folder = stage.begin(of(stage.name, **changes))
    (folder / "model.safetensors").write_text(text)
    return stage.finish(tokens=5)


# The run folder


def test_opening_writes_the_resolved_preset_once(project):
    run = open_run("smoke", overrides="sft.learning_rate=1e-4; seed=3")
    assert (run.name, run.path) == ("smoke", project / "runs" / "smoke")
    file = run.path / "config.toml"
    assert load_preset(file) == run.preset and run.preset.sft.learning_rate == 1e-4 and run.preset.seed == 3
    before = file.stat().st_mtime_ns
    assert open_run("smoke", overrides={"sft.learning_rate": 1e-4, "seed": 3}).preset == run.preset
    assert file.stat().st_mtime_ns == before
    assert open_run("smoke").preset.seed == Preset().seed and load_preset(file).seed == Preset().seed
    assert sorted(path.name for path in run.path.iterdir()) == ["config.toml", "notebooks"]


def test_looking_at_a_run_writes_nothing(project):
    assert open_run("smoke", create=False).finished("sft") is None
    assert not (project / "runs").exists()


def test_without_a_preset_the_runs_own_config_counts(project):
    open_run("laptop", "mine", ["seed=5"])
    run = open_run("", "mine")
    assert (run.preset.name, run.preset.seed, run.name) == ("laptop", 5, "mine")
    with pytest.raises(ConfigError, match=r"no config.toml yet: name a preset"):
        open_run("", "other")
    assert not (project / "runs" / "other").exists()


@pytest.mark.parametrize("name", ["..", "../x", "/tmp/x", ".cache", "a/b", "", "a\\b"])
def test_a_run_cannot_leave_the_runs_folder(name, project):
    if name:
        with pytest.raises(ConfigError, match=r"run .*A-Z"):
            open_run("smoke", name)
    (project / "evil.toml").write_text((project / "presets" / "smoke.toml").read_text().replace('"smoke"', f"'{name}'"))
    if name:
        with pytest.raises(ConfigError, match=r"name .*A-Z"):
            open_run(project / "evil.toml")
        assert not (project / "runs").exists()
    else:  # an unnamed preset is called like its file
        assert open_run(project / "evil.toml").name == "evil"


def test_the_local_data_folder_is_found_from_here_or_from_the_project(project, monkeypatch, tmp_path_factory):
    (project / "mine").mkdir()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert open_run().data_dir == ""
    assert open_run(data_dir="mine").data_dir == str(project / "mine")
    (elsewhere / "mine").mkdir()
    assert open_run(data_dir="mine").data_dir == str(elsewhere / "mine")
    monkeypatch.setenv("THREEFOLD_DATA", str(project))
    assert open_run().data_dir == str(project)
    with pytest.raises(ConfigError, match="data_dir = 'nowhere': no such folder"):
        open_run(data_dir="nowhere")
    monkeypatch.setenv("THREEFOLD_DATA", "nowhere")
    with pytest.raises(ConfigError, match="THREEFOLD_DATA = 'nowhere'"):
        open_run()


def test_folders_and_notebooks_of_stages(project):
    run = open_run("smoke", overrides=["baselines.external=[{name='small-lm', location='x'}]"])
    assert run.stage_folder("sft") == run.path / "sft"
    assert run.stage_folder("evaluate-small-lm") == run.path / "evaluation" / "small-lm"
    assert run.partial_folder("evaluate-sft") == run.path / ".evaluate-sft.partial"
    assert run.notebook("02_sft") == run.path / "notebooks" / "02_sft.ipynb"
    executed = [run.plan[stage].executed for stage in ("pretrain", "gpt2", "evaluate-small-lm", "compare")]
    assert executed == ["01_pretrain", "01_pretrain-gpt2", "04_evaluate-small-lm", "06_compare"]
    assert run.plan["evaluate-dpo"].parameters == {"model": "dpo"}
    for name in ("sftt", "evaluate", "evaluate-", "sft-x-", "../x", "evaluate-../x"):
        with pytest.raises(ConfigError):
            run.stage_folder(name)
    with pytest.raises(ConfigError, match="unknown stage 'sftt', did you mean sft"):
        run.stage_folder("sftt")


# A stage's life


def test_a_missing_input_names_the_command_that_makes_it(project):
    stage = open_stage("sft", preset="smoke")
    with pytest.raises(MissingInput) as caught:
        stage.require("pretrain")
    assert str(caught.value) == (
        "stage pretrain of run smoke is not there yet: run "
        "`papermill notebooks/01_pretrain.ipynb runs/smoke/notebooks/01_pretrain.ipynb -p preset smoke`"
    )
    (project / "mine").mkdir()
    given = {"preset": "laptop", "run": "a", "data_dir": "mine", "overrides": "seed=2", "steps": 5}
    stage = open_stage("dpo", **given)
    stage.partial.parent.joinpath(".gpt2.partial").mkdir()
    with pytest.raises(MissingInput) as caught:
        stage.require("gpt2")
    assert "gpt2 of run a was begun but is not finished" in str(caught.value)
    assert str(caught.value).endswith(
        "`papermill notebooks/01_pretrain.ipynb runs/a/notebooks/01_pretrain-gpt2.ipynb -p preset laptop -p run a "
        "-p data_dir mine -p overrides 'seed=2; dpo.steps=5' -p model gpt2`"
    )


def test_a_stage_from_begin_to_finish(project):
    stage = open_stage("pretrain")
    assert stage.folder == project / "runs" / "smoke" / "pretrain" and stage.config == stage.preset.pretrain
    folder = stage.begin(of("pretrain"))
    assert folder == project / "runs" / "smoke" / ".pretrain.partial"
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "items").mkdir()
    (folder / "items" / "x.parquet").write_bytes(b"items")
    assert not stage.folder.exists()
    facts = stage.finish(tokens=100, device_seconds=1.5, loss=2.25)
    assert not folder.exists()
    assert read_run_file(stage.folder) == facts == stage.run.finished("pretrain")
    assert facts["outputs"] == {
        "items/x.parquet": files.sha256_bytes(b"items"),
        "model.safetensors": files.sha256_bytes(b"weights"),
    }
    assert facts["weights_sha256"] == files.sha256_bytes(b"weights")
    assert Fingerprint.from_dict(facts["fingerprint"]) == of("pretrain")
    assert (facts["stage"], facts["tokens"], facts["device_seconds"], facts["loss"]) == ("pretrain", 100, 1.5, 2.25)
    assert facts["wall_seconds"] >= 0 and facts["started"] <= facts["finished"] and facts["attempts"] == 1
    assert set(facts) >= {"git", "hardware"}
    assert open_stage("sft").require("pretrain") == stage.folder


def test_a_finished_stage_is_replaced_at_once_and_whole():
    stage = open_stage("sft")
    make(stage, "1")
    folder = stage.begin(of("sft", seed=2))
    (folder / "other").write_text("2")
    assert (stage.folder / "model.safetensors").read_text() == "1"
    stage.finish()
    assert sorted(path.name for path in stage.folder.iterdir()) == ["other", "run.json"]
    assert stage.run.finished("sft")["fingerprint"]["digest"] == of("sft", seed=2).digest
    assert sorted(path.name for path in stage.run.path.iterdir()) == ["config.toml", "notebooks", "sft"]


def test_an_interrupted_stage_is_resumed_only_with_the_same_inputs():
    stage = open_stage("sft")
    folder = stage.begin(of("sft"))
    started = read_run_file(folder)["started"]
    (folder / "state").write_text("step 5")
    (folder / ".metrics.0f.tmp").write_text("half")
    again = open_stage("sft")
    assert again.begin(of("sft")) == folder
    assert (folder / "state").read_text() == "step 5" and not (folder / ".metrics.0f.tmp").exists()
    again.begin(of("sft", code={"c": "2"}))
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    files.write_note(folder / "other", {"result": 1})
    for content in ('{"stage"', (folder / "other").read_text()):  # cut off; the note of something else
        (folder / "state").write_text("step 6")
        (folder / "run.json").write_text(content)
        again.begin(of("sft", code={"c": "2"}))
        assert [path.name for path in folder.iterdir()] == ["run.json"]
    again.begin(of("sft", code={"c": "2"}))
    facts = again.finish()
    assert facts["attempts"] == 2 and facts["started"] >= started


def test_a_crash_after_run_json_and_before_the_move_is_finished_by_the_next_attempt(monkeypatch):
    stage = open_stage("sft")
    folder = stage.begin(of("sft"))
    (folder / "model.safetensors").write_text("1")

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "replace_folder", crash)
        stage.finish()
    assert folder.exists() and not stage.folder.exists()
    again = open_stage("sft")
    assert (again.begin(of("sft")) / "model.safetensors").read_text() == "1"
    assert again.finish()["weights_sha256"] == files.sha256_bytes(b"1")
    assert again.folder.exists() and not folder.exists()


def test_a_stage_set_aside_by_a_crash_is_back_when_it_is_opened_again():
    stage = open_stage("sft")
    make(stage)
    os.rename(stage.folder, stage.folder.with_name(".sft.previous"))
    assert open_stage("sft").run.finished("sft")["tokens"] == 5


@pytest.mark.skipif(sys.platform == "win32", reason="no advisory locks")
def test_two_processes_do_not_work_on_one_stage(monkeypatch):
    stage = open_stage("sft")
    script = (
        "import sys; from pathlib import Path; from papertrail import stage\n"
        "stage.hold(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(stage.partial)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        monkeypatch.setattr(papertrail_stage, "PATIENCE", 0.1)
        with pytest.raises(ThreefoldError, match=r"smoke/\.sft\.partial: another process works on this stage"):
            stage.begin(of("sft"))
        assert papertrail_stage.at_work(stage.run.path) == ".sft.partial"
        other.kill()
        other.wait()
        monkeypatch.setattr(papertrail_stage, "PATIENCE", 10.0)  # a process that is killed is gone a moment later
        folder = stage.begin(of("sft"))
        open_stage("sft").begin(of("sft"))  # a notebook's first cell again, in the same kernel
        (folder / "x").write_text("1")
        assert papertrail_stage.at_work(stage.run.path) == ".sft.partial"
        stage.finish()
    assert papertrail_stage.at_work(stage.run.path) == "" and (stage.folder / "x").exists()


def test_what_a_stage_refuses():
    stage = open_stage("sft")
    with pytest.raises(RuntimeError, match="finish without begin"):
        stage.finish()
    with pytest.raises(ValueError, match="stage dpo given to stage sft"):
        stage.begin(of("dpo"))
    stage.begin(of("sft"))
    with pytest.raises(ValueError, match="outputs"):
        stage.finish(outputs={})
    with pytest.raises(ValueError, match="JSON"):
        stage.finish(loss=float("nan"))
    assert not stage.folder.exists()


def test_a_damaged_run_json_says_so():
    stage = open_stage("pretrain")
    make(stage)
    for content in ('{"stage": "pre', '{"stage": "pretrain"}', "[]"):
        (stage.folder / "run.json").write_text(content)
        with pytest.raises(RecordError, match=r"smoke/pretrain/run.json .*remove the folder"):
            open_stage("sft").require("pretrain")
    shutil.rmtree(stage.folder)
    assert stage.run.finished("pretrain") is None


def test_one_changed_byte_of_a_run_json_says_so():
    stage = open_stage("pretrain")
    make(stage)
    file = stage.folder / "run.json"
    content = file.read_bytes()
    for text in (b'"tokens": ', b'"wall_seconds": ', b'"seed": ', files.SELF.encode() + b'": "'):
        flip(file, content.index(text) + len(text))
        with pytest.raises(RecordError, match=r"smoke/pretrain/run.json is not as it was written; remove the folder"):
            open_stage("sft").require("pretrain")
        file.write_bytes(content)
    assert stage.run.require("pretrain")["tokens"] == 5


def test_an_input_that_is_not_what_its_stage_wrote_is_refused():
    """Every byte is read: a file's size and time may be what they were."""
    stage = open_stage("pretrain")
    make(stage)
    weights = stage.folder / "model.safetensors"
    assert open_stage("sft").require("pretrain") == stage.folder
    before = weights.stat()
    weights.write_text("2")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        CheckpointError, match=r"pretrain/model.safetensors of run smoke is not what .*threefold verify"
    ):
        open_stage("sft").require("pretrain")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"pretrain/model.safetensors .*missing"):
        open_stage("sft").require("pretrain")


def test_a_run_says_how_far_it_can_be_repeated(monkeypatch):
    stage = open_stage("sft")
    monkeypatch.setattr(provenance, "threads", lambda: 2)
    make(stage)
    told = stage.run.finished("sft")["determinism"]
    assert told == {"device": "cpu", "threads": [2], "level": "bit-identical"}
    stage.begin(of("sft"))
    monkeypatch.setattr(provenance, "threads", lambda: 1)
    again = open_stage("sft")
    again.begin(of("sft"))
    told = again.finish()["determinism"]
    assert told["threads"] == [1, 2] and told["level"].startswith("up to rounding: interrupted")
    for workers in (1, 2):
        again.begin(of("sft"))
        again.count_workers(workers)
    told = again.finish()["determinism"]
    assert told["workers"] == [1, 2] and told["threads"] == [1]
    assert told["level"] == "up to rounding: interrupted, and resumed with other workers (1, 2)"


# Opening a stage from a notebook


def test_parameters_of_a_notebook():
    parameters = {
        "preset": "laptop",
        "run": 2024,
        "overrides": "seed=5; dpo.beta=0.2",
        "learning_rate": "3e-4",
        "steps": None,
        "epochs": 2,
        "compile": "off",
        "data_dir": "",
    }
    stage = open_stage("sft", **parameters)
    assert (stage.name, stage.run.name, stage.preset.name, stage.preset.seed) == ("sft", "2024", "laptop", 5)
    assert (stage.config.learning_rate, stage.config.epochs, stage.config.steps) == (3e-4, 2.0, -1)
    assert stage.config.compile == "off" and stage.preset.dpo.beta == 0.2
    assert stage.preset.pretrain.learning_rate == TrainConfig().learning_rate
    assert open_stage("dpo", overrides=["dpo.beta=0.3"], beta=0.4).config.beta == 0.4
    assert open_stage("ablations", steps=1, seeds=2, variants="ffn=gelu").config.variants == ("ffn=gelu",)


@pytest.mark.parametrize(
    ("stage", "parameters", "parts"),
    [
        (
            "sft",
            {"learning_rte": 1e-3},
            ["unknown parameter learning_rte, did you mean learning_rate?", "02_sft takes"],
        ),
        ("sft", {"learning_rte": None}, ["unknown parameter learning_rte"]),
        ("sft", {"model": "gpt2"}, ["unknown parameter model"]),
        ("sft", {"learning_rate": "fast"}, ["sft.learning_rate = 'fast'", "finite number"]),
        ("sft", {"warmup": 2}, ["sft.warmup = 2", "from 0 to 1"]),
        ("sft", {"preset": "smok"}, ["unknown preset 'smok', did you mean smoke?"]),
        ("sft", {"preset": 1.5}, ["parameter preset = 1.5", "a string"]),
        ("sft", {"overrides": "sft.stepz=1"}, ["sft.stepz", "did you mean sft.steps?"]),
        ("sftt", {}, ["unknown stage 'sftt', did you mean sft?"]),
        ("pretrain", {"model": "gtp2"}, ["model 'gtp2', did you mean gpt2?", "pretrain, gpt2, gpt2-adamw, distilgpt2"]),
        ("evaluate", {"model": "spt"}, ["model 'spt', did you mean sft?", "random, gpt2"]),
        ("compare", {"bootstraps": 10}, ["unknown parameter bootstraps, did you mean bootstrap?"]),
    ],
)
def test_a_parameter_that_cannot_be_meant_stops(stage, parameters, parts, project):
    with pytest.raises(ConfigError) as caught:
        open_stage(stage, **parameters)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert stage == "evaluate" or not (project / "runs").exists()


def test_one_notebook_serves_several_models():
    assert open_stage("pretrain", model=None).name == "pretrain"
    gpt2 = open_stage("pretrain", model="gpt2", steps=7)
    assert (gpt2.name, gpt2.model, gpt2.config.steps, gpt2.preset.pretrain.steps) == ("gpt2", "gpt2", 7, 10)
    evaluation = open_stage("evaluate", model="sft", bootstrap=50)
    assert (evaluation.name, evaluation.model, evaluation.config.bootstrap) == ("evaluate-sft", "sft", 50)
    assert open_stage("evaluate-dpo", model="dpo").folder.name == "dpo"


def cells_run(monkeypatch, *cells):
    """As in a kernel that has run these cells."""
    from IPython.testing.globalipapp import start_ipython

    shell = start_ipython() or sys.modules["IPython"].get_ipython()
    monkeypatch.setattr(shell.history_manager, "input_hist_raw", ["", *cells])


def test_a_name_in_the_parameters_cells_that_no_notebook_takes_stops(monkeypatch):
    """papermill injects it and only warns."""
    own = 'preset = "smoke"  # a comment\nsteps = None\nbatch = [1, -2]'
    cells_run(monkeypatch, own.replace("\nbatch = [1, -2]", ""), "# Parameters\nsteps = 5\nlearning_rte = 1\n")
    with pytest.raises(
        ConfigError, match=r"learning_rte, did you mean learning_rate\?; notebook 02_sft takes: preset,"
    ):
        open_stage("sft", preset="smoke", steps=5, learning_rate=None)
    cells_run(monkeypatch, own)
    with pytest.raises(ConfigError, match="unknown parameter batch"):
        open_stage("sft", preset="smoke", steps=None)
    # one of the section's keys that the notebook does not hand on
    cells_run(monkeypatch, 'preset = "smoke"', "warmup = 0.5")
    with pytest.raises(ConfigError, match=r"unknown parameter warmup; .*overrides='section.key=value'"):
        open_stage("sft", preset="smoke")


def test_the_readers_own_variables_are_left_alone(monkeypatch):
    cells_run(monkeypatch, 'preset = "smoke"\nsteps = None', "import json\nloss = 2.5", "mine = 3")
    assert open_stage("sft", preset="smoke", steps=3).config.steps == 3
    cells_run(monkeypatch, "%matplotlib inline", "x = 1")
    assert open_stage("sft", preset="smoke").config.steps == 10
