"""The pipeline with small notebooks in real kernels: order, skipping, failing, stopping, cleaning, pairs."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import reduce
from pathlib import Path

import nbformat
import psutil
import pytest
from shared import ONE_STEP, SAMPLE_DATA, flip

from basics import files, paths
from basics.errors import ConfigError, MissingInput, RecordError, SourceError, ThreefoldError
from papertrail import notebook_files, notebooks, provenance, records, scheduler, staleness, verify
from papertrail.plan import ancestors, dependents
from study import stages
from study.cli import folders
from study.preset import load_preset, override
from study.run import Run, open_run

PRESET = (
    """
name = "tiny"
"""
    + ONE_STEP
)

# One notebook for all stages: it opens the stage, hands on what its parents made, and publishes run.json.
CELLS = [
    "preset = 'tiny'\nrun = ''\ndata_dir = None\noverrides = ''\nmodel = None",
    """from pathlib import Path
from basics import paths
from papertrail import records
from study.run import open_stage
paths.NOTEBOOKS = Path({notebooks!r})
stage = open_stage({kind!r}, preset=preset, run=run, data_dir=data_dir, overrides=overrides{model})
folder = stage.begin()
needs = stage.run.plan[stage.name].needs
made = ";".join(f"{{name}}={{stage.run.taken_from(name, stage.name)}}" for name in needs)
print(f"working on {{stage.name}} in {{folder}}")
{extra}
if stage.name in ("pretrain", "gpt2", "sft"):
    (folder / "model.safetensors").write_text(f"{{stage.config}}{{made}}")
records.publish(f"stage/{{stage.name}}", stage.finish(tokens=1))""",
]
KINDS = {
    "00_data": "data",
    "01_pretrain": "pretrain",
    "02_sft": "sft",
    "03_dpo": "dpo",
    "04_evaluate": "evaluate",
    "04_speed": "speed",
    "06_compare": "compare",
}


def write(folder: Path, name: str, *sources: str) -> None:
    book = nbformat.v4.new_notebook(metadata=notebooks.METADATA)
    book.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, folder / f"{name}.ipynb")


def write_stage(folder: Path, name: str, extra: str = "") -> None:
    model = ", model=model" if KINDS[name] in ("pretrain", "evaluate") else ""
    cells = [cell.format(notebooks=str(folder), kind=KINDS[name], extra=extra, model=model) for cell in CELLS]
    if not model:
        cells[0] = cells[0].replace("\nmodel = None", "")
    write(folder, name, *cells)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with small notebooks and a runs folder, seen by this process and by the kernels."""
    books, runs, preset = tmp_path / "notebooks", tmp_path / "runs", tmp_path / "tiny.toml"
    books.mkdir()
    preset.write_text(PRESET)
    for name in KINDS:
        write_stage(books, name)
    monkeypatch.setattr(paths, "NOTEBOOKS", books)
    monkeypatch.setattr(paths, "RUNS", runs)
    monkeypatch.setenv("THREEFOLD_RUNS", str(runs))
    monkeypatch.setenv("THREEFOLD_DATA", "")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setattr(scheduler, "forking_is_safe", lambda: False)  # importing everything would not pay here
    return tmp_path


def opened(project: Path, *overrides: str) -> Run:
    return open_run(project / "tiny.toml", overrides=overrides)


def execute(run: Run, *selected: str, **options) -> tuple[scheduler.Outcome, list[str]]:
    lines: list[str] = []
    return scheduler.execute(run, selected=selected, say=lines.append, **options), lines


# Plan ---------------------------------------------------------------------------------------------------------------


def test_plan_of_trained_and_of_loaded_baselines(project):
    plan = opened(project).plan
    assert list(plan) == [
        *("data", "pretrain", "sft", "dpo", "gpt2", "distilgpt2"),
        *(f"evaluate-{model}" for model in ("random", "gpt2", "distilgpt2", "pretrain", "sft", "dpo")),
        "speed",
        "compare",
    ]
    assert plan["distilgpt2"].needs == ("gpt2",)
    assert plan["evaluate-dpo"].needs == ("sft", "dpo")
    assert plan["evaluate-random"].needs == ("data",)
    assert plan["speed"].needs == ("data", "pretrain", "sft", "dpo", "gpt2", "distilgpt2")
    assert [name for name, step in plan.items() if step.alone] == ["speed"]
    assert set(plan["compare"].needs) == set(plan) - {"compare"}
    assert plan["gpt2"].executed == "01_pretrain-gpt2"

    loaded = opened(project, "baselines.gpt2=some/hub-id", "baselines.distilgpt2=a/folder", "ablations.steps=2")
    plan = loaded.plan
    assert "gpt2" not in plan and "distilgpt2" not in plan
    assert plan["evaluate-distilgpt2"].needs == plan["evaluate-gpt2"].needs == plan["ablations"].needs == ("data",)


def test_a_student_needs_a_teacher_that_is_trained_here(project):
    with pytest.raises(ConfigError, match=r"baselines\.distilgpt2 = 'train': .* baselines\.gpt2 = 'some/hub-id'"):
        opened(project, "baselines.gpt2=some/hub-id")


def test_plan_comes_in_an_order_in_which_it_can_run(project):
    done: set[str] = set()
    for step in opened(project, "ablations.steps=2").plan.values():
        assert done.issuperset(step.needs)
        done.add(step.name)


def test_selecting_stages(project):
    preset = opened(project).preset
    assert len(stages.select(preset, "evaluate")) == 6
    assert stages.select(preset, "sft") == ["sft"]
    with pytest.raises(ConfigError, match="did you mean sft"):
        stages.select(preset, "stf")
    plan = stages.plan(preset)
    assert dependents(plan, "sft") == {"dpo", "evaluate-sft", "evaluate-dpo", "speed", "compare"}
    assert ancestors(plan, "evaluate-dpo") == {"dpo", "sft", "pretrain", "data"}


def test_threads_follow_from_the_plan(project, monkeypatch):
    monkeypatch.setattr("papertrail.plan.cores", lambda: 8)
    plan = opened(project).plan
    threads = {name: scheduler.threads_for(plan, step, 2) for name, step in plan.items()}
    assert threads.pop("data") == threads.pop("speed") == threads.pop("compare") == 8
    assert set(threads.values()) == {4}
    assert scheduler.threads_for(plan, plan["sft"], 1) == 8
    assert scheduler.threads_for(plan, plan["sft"], 16) == 1


def test_what_is_timed_runs_alone(project):
    plan = opened(project).plan
    speed, sft, gpt2 = plan["speed"], plan["sft"], plan["gpt2"]
    assert scheduler.can_start(sft, [gpt2], 2) and not scheduler.can_start(sft, [gpt2], 1)
    assert (
        scheduler.can_start(speed, [], 2)
        and not scheduler.can_start(speed, [gpt2], 2)
        and not scheduler.can_start(sft, [speed], 2)
    )


def test_the_longest_critical_path_starts_first(project):
    lengths = scheduler.critical_path(opened(project).plan)
    assert lengths["data"] > lengths["pretrain"] > lengths["gpt2"] > lengths["evaluate-random"] > lengths["compare"]
    assert lengths["sft"] > lengths["evaluate-pretrain"]


# Fingerprints -------------------------------------------------------------------------------------------------------


def test_a_learning_rate_touches_only_its_stage(project):
    one, other = opened(project), opened(project, "sft.learning_rate=0.5")
    plan = one.plan
    changed = {name for name in plan if one.fingerprint(name) != other.fingerprint(name)}
    assert changed == {"sft"}
    lines = one.fingerprint("sft").differences(other.fingerprint("sft"))
    assert lines == ["config: sft.learning_rate 0.003 -> 0.5"]


@pytest.mark.parametrize("key", ["learning_rate", "muon_learning_rate"])
@pytest.mark.parametrize("stage", ["pretrain", "gpt2", "distilgpt2", "sft", "dpo"])
def test_no_other_stage_reads_a_learning_rate(stage, key):
    one = load_preset("smoke")
    other = override(one, {f"{stage}.{key}": 0.5})
    plan = stages.plan(one)
    assert {name for name in plan if stages.sections(one, name) != stages.sections(other, name)} == {stage}


def test_a_package_file_is_told_from_its_bytes(tmp_path, monkeypatch):
    (tmp_path / "packed_model").mkdir()
    file = tmp_path / "packed_model" / "x.gguf"
    file.write_bytes(b"weights")
    (tmp_path / "packed_model-1.2.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: packed-model\nVersion: 1.2\n"
    (tmp_path / "packed_model-1.2.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)

    def identity(digest=files.sha256_file) -> str:
        return stages.location_fingerprint("package:packed_model/x.gguf", "", "", digest)

    made = identity()
    assert made == identity(files.sha256_cached) and made.startswith("packed_model 1.2, x.gguf ")
    flip(file)
    assert identity() != made and identity().startswith("packed_model 1.2, x.gguf ")
    file.unlink()
    with pytest.raises(SourceError, match=r"packed_model has no file x\.gguf"):
        identity()


def test_a_model_folder_is_identified_by_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def identity() -> str:
        return stages.location_fingerprint(str(tmp_path), "", "", files.sha256_cached)

    made = identity()
    assert made == identity()
    flip(tmp_path / "model.safetensors")
    assert identity() != made


def test_notebook_code_counts_and_its_prose_does_not(project):
    run = opened(project)
    before = run.fingerprint("sft")
    path = paths.NOTEBOOKS / "02_sft.ipynb"
    book = nbformat.read(path, 4)
    book.cells.append(nbformat.v4.new_markdown_cell("More prose."))
    book.cells[0].source += "\nlearning_rate = None"
    book.cells[1].source += "\n\n# a comment"
    nbformat.write(book, path)
    assert run.fingerprint("sft") == before
    book.cells[1].source += "\nanswer = 42"
    nbformat.write(book, path)
    assert before.differences(run.fingerprint("sft")) == ["code: notebooks/02_sft.ipynb"]


def test_notebook_code_finds_the_modules_behind_imports(tmp_path):
    write(
        tmp_path,
        "book",
        "x = 1",
        "%matplotlib inline\nfrom papertrail import records\nimport papertrail.run as run\nimport json",
    )
    code = provenance.code_behind(tmp_path / "book.ipynb", ("papertrail", "threefold"))
    assert {"notebooks/book.ipynb", "papertrail", "papertrail.records", "papertrail.run"} <= code.keys()
    assert "papertrail.scheduler" not in code and not any(name.startswith(("json", "threefold")) for name in code)


def test_missing_notebook_is_named(project):
    (paths.NOTEBOOKS / "02_sft.ipynb").unlink()
    with pytest.raises(MissingInput, match=r"02_sft\.ipynb"):
        opened(project).fingerprint("sft")


def test_hash_of_a_large_file_is_kept_until_it_changes(project, monkeypatch):
    monkeypatch.setattr(files, "SMALL", 0)
    file = project / "big"
    file.write_bytes(b"one")
    first = files.sha256_cached(file)
    reads = []
    monkeypatch.setattr(files, "sha256_file", lambda path: reads.append(path) or "other")
    assert files.sha256_cached(file) == first and not reads
    os.utime(file, (1, 1))
    assert files.sha256_cached(file) == "other" and reads == [file]


# Execution ----------------------------------------------------------------------------------------------------------


def test_executes_skips_and_goes_stale(project):
    run = opened(project)
    done, lines = execute(run, "data", "pretrain", "gpt2", "sft", jobs=2)
    assert set(done.executed) == {"data", "pretrain", "gpt2", "sft"} and not done.skipped
    order = [line.partition(":")[0] for line in lines if line.endswith("threads)") or line.endswith("thread)")]
    assert order[0] == "data" and set(order[1:3]) == {"pretrain", "gpt2"} and order[3] == "sft"
    assert any(line.startswith("sft: working on sft") for line in lines)  # what a notebook prints is passed on
    assert sorted(path.name for path in (run.path / "notebooks").iterdir()) == [
        *("00_data.ipynb", "01_pretrain-gpt2.ipynb", "01_pretrain.ipynb", "02_sft.ipynb"),
    ]
    sealed = {"notebook_sha256": files.sha256_file(run.notebook("02_sft"))}
    assert {**records.read(run.notebook("02_sft"))["stage/sft"].values, **sealed} == run.finished("sft")
    text = run.notebook("02_sft").read_text()
    assert str(paths.RUNS) not in text and str(Path.home()) + "/" not in text
    assert "working on sft in runs/tiny/.sft.partial" in text

    began = time.process_time()
    done, lines = execute(run, "data", "pretrain", "gpt2", "sft", jobs=2)
    assert not done.executed and set(done.skipped) == {"data", "pretrain", "gpt2", "sft"}
    took = time.process_time() - began
    assert took < 2, took
    assert all("fresh, skipped (fingerprint " in line for line in lines)

    changed = opened(project, "sft.learning_rate=0.5")
    found = staleness.survey(changed)
    assert [name for name in found if found[name].kind == "fresh"] == ["data", "pretrain", "gpt2"]
    assert found["sft"].kind == "stale"
    assert found["sft"].reasons == ("config: sft.learning_rate 0.003 -> 0.5",)
    assert found["dpo"].kind == "missing"

    weights = run.stage_folder("sft") / "model.safetensors"
    run = opened(project)
    assert staleness.survey(run)["sft"].kind == "fresh" and verify.verify(run)[1] == []
    weights.write_text("other weights")
    assert staleness.state(run, "sft").reasons == ("output model.safetensors is not what the stage wrote",)
    assert verify.verify(run)[1] == ["sft/model.safetensors: changed since the stage wrote it"]
    (run.stage_folder("sft") / "stray.txt").write_text("")
    assert "sft/stray.txt: not written by the stage" in verify.verify(run)[1]
    run.notebook("01_pretrain").unlink()
    found = staleness.survey(run)
    assert found["pretrain"].reasons == ("the executed notebook 01_pretrain.ipynb is not there",)
    assert "parent pretrain is stale" in found["sft"].reasons

    # The same weights come out of pretraining, so what was built on them stays; only the damaged stage is made again.
    done, _ = execute(run, "pretrain", "sft", jobs=1)
    assert set(done.executed) == {"pretrain", "sft"}
    done, _ = execute(run, "sft", force=True)
    assert set(done.executed) == {"sft"}


def test_own_files_by_path_and_a_preset_by_path_leave_no_trace_of_the_machine(project):
    own = project / "rows.txt"
    own.write_text("A text.\n")
    run = opened(project, f"data.dpo=[{{path='{own}', reader='text'}}]")
    execute(run, "data")
    text = run.notebook("00_data").read_text().replace(str(paths.NOTEBOOKS), "")  # which its source names
    assert "rows.txt" in text and str(project) not in text
    assert staleness.survey(run)["data"].kind == "fresh" and verify.verify(run)[1] == []
    own.write_text("Another text.\n")
    assert staleness.survey(run)["data"].reasons == (f"data {own}:train",)


def test_failed_notebook_is_kept_aside_and_neighbours_stop(project):
    write_stage(
        paths.NOTEBOOKS, "01_pretrain", "import time\nif stage.name == 'pretrain': time.sleep(600)\nelse: 1 / 0"
    )
    run = opened(project)
    execute(run, "data")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(scheduler.StageFailed) as failure:
        execute(run, "pretrain", "gpt2", jobs=2)
    assert "gpt2: ZeroDivisionError: division by zero" in str(failure.value)
    assert "1 / 0" in str(failure.value) and "01_pretrain-gpt2.failed.ipynb" in str(failure.value)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before  # no orphan kernel
    assert sorted(path.name for path in (run.path / "notebooks").iterdir()) == [
        *("00_data.ipynb", "01_pretrain-gpt2.failed.ipynb"),
    ]
    assert run.finished("gpt2") is None and run.finished("pretrain") is None
    assert staleness.survey(run)["gpt2"].kind == "failed"

    write_stage(paths.NOTEBOOKS, "01_pretrain")
    execute(run, "gpt2")
    assert not run.notebook("01_pretrain-gpt2.failed").exists()
    assert staleness.survey(run)["gpt2"].kind == "fresh"


def test_an_error_with_a_known_cause_is_one_line(project):
    write_stage(
        paths.NOTEBOOKS,
        "00_data",
        "from basics.errors import DataError\nraise DataError('rows.jsonl, line 3: no JSON')",
    )
    with pytest.raises(scheduler.StageFailed) as failure:
        execute(opened(project), "data")
    assert str(failure.value) == "data: rows.jsonl, line 3: no JSON (kept: runs/tiny/notebooks/00_data.failed.ipynb)"


def test_a_dead_kernel_is_explained(project):
    write_stage(paths.NOTEBOOKS, "00_data", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(
        scheduler.StageFailed, match=r"kernel died \(killed\), most likely because memory ran out; lower .*max_examples"
    ):
        execute(opened(project), "data")


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("import numpy\nnumpy.ones(10**15)", r"out of memory \(Unable to allocate .*\); lower max_examples"),
        ("import torch\ntorch.ones(10**15)", r"out of memory \(.*DefaultCPUAllocator.*\); lower max_examples"),
        (
            "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, -1))\n"
            "(folder / 'x').write_bytes(bytes(1 << 17))",
            r"the disk is full \(.*File too large\); .*`threefold clean` frees it",
        ),
        ("import ctypes\nctypes.string_at(0)", "crashed with SIGSEGV, a fault in a native library"),
    ],
    ids=["numpy", "torch", "disk", "crash"],
)
def test_what_the_machine_lacks_is_explained(project, cell, said):
    write_stage(paths.NOTEBOOKS, "00_data", cell)
    with pytest.raises(scheduler.StageFailed, match=said) as failure:
        execute(opened(project), "data")
    assert str(failure.value).count("\n") == 0


def test_the_settings_to_lower_are_keys_of_the_preset():
    preset = load_preset("smoke")
    for step in stages.plan(preset).values():
        named = re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)+", step.memory_keys)
        assert named or step.name == "data", step.name
        for key in named:
            assert reduce(getattr, key.split("."), preset) is not None


def test_a_notebook_that_never_finishes_its_stage_is_a_failure(project):
    write(paths.NOTEBOOKS, "00_data", "preset = run = overrides = None", "1 + 1")
    with pytest.raises(scheduler.StageFailed, match="without finishing its stage"):
        execute(opened(project), "data")


def test_what_lies_outside_the_selection_must_be_there(project):
    with pytest.raises(MissingInput, match=r"sft needs stage pretrain.*threefold run .*--run tiny --only pretrain"):
        execute(opened(project), "sft")


def test_one_pipeline_a_run(project):
    run = opened(project)
    with scheduler.lock(run.path), pytest.raises(ThreefoldError, match=f"process {os.getpid()}"):
        execute(run, "data")


def running(project: Path) -> subprocess.Popen:
    """`threefold run` of a data stage that has said it is here."""
    (project / "tiny.toml").write_text(PRESET + SAMPLE_DATA)
    opened(project)
    script = (
        "import sys; from pathlib import Path; from basics import paths; from study import cli, doctor;"
        "doctor.check = lambda *_: None;"  # the notebooks here read no data
        f"paths.NOTEBOOKS = Path({str(paths.NOTEBOOKS)!r});"
        f"sys.exit(cli.main(['run', '--preset', {str(project / 'tiny.toml')!r}, '--only', 'data']))"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("data: here"):
            break
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_no_process_and_nothing_half_written(project, number):
    write_stage(paths.NOTEBOOKS, "00_data", "print('here', flush=True)\nimport time\ntime.sleep(600)")
    child = running(project)
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(family) >= 2  # the fork server and its kernel
    child.send_signal(number)
    _, said = child.communicate(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert not (paths.RUNS / "tiny" / "data").exists()
    assert not list((paths.RUNS / "tiny").glob("notebooks/*"))
    if number == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
    else:
        assert child.returncode == 128 + number
        assert said == "threefold: stopped; the same command resumes the run\n"
        assert not (paths.RUNS / "tiny" / ".executing").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parents are watched on Linux only")
@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT), (signal.SIGKILL,)]
)
def test_a_kernel_deep_in_native_code_and_its_children_go_too(project, numbers):
    """It holds the interpreter's lock, so nothing of Python in it can hear; and the person is impatient."""
    cell = (
        "import ctypes, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('here', flush=True)\nimport time\ntime.sleep(1)\nctypes.PyDLL(None).sleep(600)"
    )
    write_stage(paths.NOTEBOOKS, "00_data", cell)
    child = running(project)
    time.sleep(1.5)
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(family) >= 3  # the fork server, its kernel and what that started
    for number in numbers:
        child.send_signal(number)
        time.sleep(0.05)
    child.communicate(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert child.returncode == (-numbers[0] if numbers[0] == signal.SIGKILL else 128 + numbers[0])


def test_a_changed_notebook_is_noticed_wherever_it_changed(project):
    run = opened(project)
    execute(run, "data")
    file = run.notebook("00_data")
    content = file.read_bytes()
    assert run.finished("data")["notebook_sha256"] == files.sha256_bytes(content)
    assert staleness.survey(run)["data"].kind == "fresh" and verify.verify(run)[1] == []
    place = content.index(b"python3")  # metadata that no record holds
    file.write_bytes(content[:place] + b"q" + content[place + 1 :])
    assert staleness.survey(run)["data"].reasons == (
        "the executed notebook 00_data.ipynb was changed since it was executed",
    )
    (problem,) = verify.verify(run)[1]
    assert problem.startswith("notebooks/00_data.ipynb: ") and "changed since it was executed" in problem
    with pytest.raises(RecordError, match=r"notebooks/00_data\.ipynb .*changed"):
        run.check_notebook("data")
    done, _ = execute(run, "data")
    assert set(done.executed) == {"data"}


def test_no_headline_comes_from_a_changed_notebook(project):
    write_stage(paths.NOTEBOOKS, "00_data", "records.publish('tokenizer', {'vocabulary': 1234})")
    run = opened(project)
    execute(run, "data")
    other = opened(project, "seed=7")  # stale for another reason, which is told first
    assert folders.headline(other, staleness.survey(other)["data"]) == "vocabulary 1,234"
    file = run.notebook("00_data")
    file.write_text(file.read_text().replace("1234", "9234"))
    assert folders.headline(other, staleness.survey(other)["data"]) is None


def test_a_stage_made_from_another_parent_is_named(project):
    run = opened(project)
    execute(run, "data", "pretrain")
    write_stage(paths.NOTEBOOKS, "00_data", "(folder / 'vocabulary').write_text('other')")
    execute(run, "data")
    assert verify.verify(run)[1] == ["pretrain: made from another data than the one that is there"]


def test_a_notebook_executed_by_papermill_itself_is_sealed_by_the_next_run(project):
    run = opened(project)
    execute(run, "data")
    file = run.stage_folder("data") / "run.json"
    facts = json.loads(file.read_text())
    sealed = facts.pop("notebook_sha256")
    del facts[files.SELF]
    files.write_note(file, facts)
    assert staleness.survey(run)["data"].kind == "fresh" and verify.verify(run)[1] == []
    done, _ = execute(run, "data")
    assert done.skipped == ["data"] and run.finished("data")["notebook_sha256"] == sealed


def test_what_a_stage_made_is_not_lost_with_its_notebook(project, monkeypatch):
    """The stage is finished, its notebook not yet in place: the next attempt takes up what was made."""
    extra = """
import json
kept = folder / "trained.json"
attempts = json.loads((folder / "run.json").read_text())["attempts"]
kept.exists() or kept.write_text(f"{attempts}")
"""
    write_stage(paths.NOTEBOOKS, "01_pretrain", extra)
    run = opened(project)
    execute(run, "data")

    def full(path, notebook):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(notebook_files, "write_notebook", full)
        execute(run, "pretrain")
    assert run.finished("pretrain")["attempts"] == 1 and not run.notebook("01_pretrain").exists()
    execute(run, "pretrain")
    made = run.stage_folder("pretrain") / "trained.json"
    assert made.read_text() == "1" and run.finished("pretrain")["attempts"] == 2
    assert staleness.survey(run)["pretrain"].kind == "fresh" and verify.verify(run)[1] == []

    execute(run, "pretrain", force=True)  # forced, it is made again
    assert made.read_text() == "1" and run.finished("pretrain")["attempts"] == 1
    for changed in ("seed", "bytes"):  # of other inputs, or damaged: made again
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(notebook_files, "write_notebook", full)
            execute(run, "pretrain", force=True)
        if changed == "bytes":
            flip(made)
        run = opened(project, "seed=7")
        execute(run, "pretrain")
        assert made.read_text() == "1" and run.finished("pretrain")["attempts"] == 1


def test_data_that_changed_is_told_from_its_bytes(project):
    own = project / "rows.txt"
    own.write_text("A text.\n")
    run = opened(project, f"data.dpo=[{{path='{own}', reader='text'}}]")
    execute(run, "data")
    before = own.stat()
    own.write_text("B text.\n")
    os.utime(own, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert verify.verify(run)[1] == [f"data {own}:train: not what data was made from"]


def test_a_stage_made_again_is_compared_file_by_file_and_record_by_record(project):
    write_stage(
        paths.NOTEBOOKS, "00_data", "(folder / 'x.txt').write_text('same')\nrecords.publish('a', {'seconds': 1})"
    )
    run = opened(project)
    execute(run, "data", "pretrain")
    assert verify.rerun(run, "data", lambda line: None) == []
    assert verify.rerun(run, "pretrain", lambda line: None) == []
    before = run.finished("data")
    write_stage(
        paths.NOTEBOOKS,
        "00_data",
        "import os\n(folder / 'x.txt').write_text('other')\nrecords.publish('a', {'seconds': 2, 'b': [1]})",
    )
    assert verify.rerun(run, "data", lambda line: None) == [
        "data/x.txt: other bytes",
        "record a: b was null and is now [1]",
        "data: now made from other inputs: code: notebooks/00_data.ipynb",
    ]
    assert run.finished("data") == before and verify.verify(run)[1] == []


def test_a_training_made_again_may_take_another_time(tmp_path):
    for name, seconds, loss in (("one", 1.0, 2.5), ("two", 3.0, 2.5), ("three", 3.0, 2.75)):
        result = {"seconds": seconds, "loss_last": loss}
        note = {"result": result, "files": {"metrics.jsonl": f"a hash over {seconds}"}}
        files.write_note(tmp_path / name / "training.json", note)
    one, two, three = (tmp_path / name / "training.json" for name in ("one", "two", "three"))
    assert verify.file_difference(one, two, {}) == ""
    assert verify.file_difference(one, three, {}) == "result.loss_last was 2.5 and is now 2.75"


def test_weights_that_differ_are_named_with_the_largest_difference(tmp_path):
    import torch
    from safetensors.torch import save_file

    one = {"a": torch.zeros(3), "b": torch.ones(2, 2), "c": torch.ones(1)}
    other = {**one, "b": one["b"] + torch.tensor([0.0, 0.25]), "c": torch.tensor([3.0])}
    save_file(one, tmp_path / "1.safetensors")
    save_file(other, tmp_path / "2.safetensors")
    assert verify.file_difference(tmp_path / "1.safetensors", tmp_path / "2.safetensors", {}) == (
        "2 of 3 parameters differ, b first (largest absolute difference 0.25), c most (2)"
    )
    save_file({"a": one["a"]}, tmp_path / "2.safetensors")
    assert (
        verify.file_difference(tmp_path / "1.safetensors", tmp_path / "2.safetensors", {}) == "other parameters: b, c"
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are forked on Linux only")
@pytest.mark.slow
def test_kernels_from_the_fork_server(project, monkeypatch):
    monkeypatch.setattr(scheduler, "forking_is_safe", lambda: True)
    monkeypatch.setattr(scheduler, "PRELOAD_FROM", 1)
    monkeypatch.setattr(scheduler, "threads_for", lambda *_: 3)
    extra = """
import os, random, sys, time
began = 'torch' in sys.modules
import psutil, torch
(torch.ones(300, 300) @ torch.ones(300, 300)).sum().item()
print('forked', began, torch.get_num_threads(), psutil.Process().parent().cmdline()[2:3], os.getcwd(), random.random())
if stage.name == 'gpt2':
    sys.stdout.flush()
    time.sleep(2)  # what was printed is on its way
    os.kill(os.getpid(), 9)
"""
    write_stage(paths.NOTEBOOKS, "01_pretrain", extra)
    lines: list[str] = []
    with pytest.raises(scheduler.StageFailed, match=r"gpt2: the notebook's kernel died \(killed\)"):
        scheduler.execute(opened(project), selected=["data", "pretrain", "gpt2"], jobs=1, say=lines.append)
    said = [line.split()[2:] for line in lines if " forked " in line]
    where = str(paths.PROJECT)
    assert [line[:-1] for line in said] == [["True", "3", "['papertrail.kernel_forkserver']", where]] * 2
    assert said[0][-1] != said[1][-1]  # no two kernels draw the same
    assert not [
        child for child in psutil.Process().children(recursive=True) if "forkserver" in " ".join(child.cmdline())
    ]


def test_the_end_of_the_fork_server_is_reported(project):
    write_stage(paths.NOTEBOOKS, "00_data", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)")
    with pytest.raises(scheduler.StageFailed, match=r"kernel died \(killed\)"):
        execute(opened(project), "data")
