"""The run folder, and the door through which a notebook enters it.

    runs/<run>/config.toml              the resolved preset
    runs/<run>/data/                    tokenizer/ and what was read
    runs/<run>/<stage>/                 checkpoint or results, run.json (evaluations: evaluation/<model>/)
    runs/<run>/seeds/<n>/           the same for replicate n >= 2 of pretrain, sft and dpo: stage "sft-seed2"
    runs/<run>/.<stage>.partial/        a stage at work, kept for resuming
    runs/<run>/notebooks/               executed notebooks

A notebook opens its stage with `stage = open_stage("sft", globals())`, takes inputs with `stage.require("pretrain")`,
works in `folder = stage.begin(fingerprint)` and ends with `stage.finish(tokens=...)`.
"""

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from basics import files, names, paths
from basics.errors import CheckpointError, ConfigError, MissingInput, RecordError, ThreefoldError
from papertrail import provenance
from papertrail.provenance import Fingerprint
from study.preset import (
    REPEATED,
    TRAINED,
    Preset,
    format_overrides,
    load_preset,
    model_names,
    parse_overrides,
    preset_names,
    to_toml,
)

RUN_FILE = "run.json"
PATIENCE = 5.0  # seconds for a killed process that worked on the same stage to be gone
DOOR = ("preset", "run", "data_dir", "overrides")  # parameters every notebook takes

# stage -> (notebook, section of the preset whose fields are the notebook's parameters)
_STAGES = {
    "data": ("00_data", "data"),
    "pretrain": ("01_pretrain", "pretrain"),
    "gpt2": ("01_pretrain", "gpt2"),
    "distilgpt2": ("01_pretrain", "distilgpt2"),
    "sft": ("02_sft", "sft"),
    "dpo": ("03_dpo", "dpo"),
    "evaluate": ("04_evaluate", "evaluation"),
    "speed": ("04_speed", "evaluation"),
    "ablations": ("05_ablations", "ablations"),
    "compare": ("06_compare", "evaluation"),
}
_PRETRAINED = ("pretrain", "gpt2", "distilgpt2")  # the stages of notebook 01, by its parameter `model`
_FACTS = (
    "stage",
    "fingerprint",
    "git",
    "hardware",
    "determinism",
    "outputs",
    "attempts",
    "started",
    "finished",
)  # not for the caller to say


@dataclass(frozen=True)
class StageNotebook:
    """Which notebook makes a stage, with which parameters, and the name it is executed under."""

    source: str  # stem in notebooks/
    executed: str  # stem in runs/<run>/notebooks/
    parameters: dict[str, str | int]


def stage_notebook(stage: str) -> StageNotebook:
    """The notebook behind a stage: "gpt2" -> 01_pretrain with model=gpt2, executed as 01_pretrain-gpt2; "sft-seed2"
    -> 02_sft with replicate=2, executed as 02_sft-seed2."""
    base, replicate = names.replicate_of(stage)
    kind, _, model = base.partition("-")
    repeated = replicate == 1 or (model or kind) in REPEATED
    if kind not in _STAGES or (kind == "evaluate") != bool(model) or not repeated:
        raise ConfigError(f"unknown stage {stage!r}{_hint(stage, _STAGES)}; allowed: {_stage_list()}")
    if model:
        names.check_name(model, "model")
    source = _STAGES[kind][0]
    model = model or (kind if kind in _PRETRAINED[1:] else "")
    parameters: dict[str, str | int] = {"model": model} if model else {}
    parameters |= {"replicate": replicate} if replicate > 1 else {}
    executed = names.replicate_name(f"{source}-{model}" if model else source, replicate)
    return StageNotebook(source, executed, parameters)


@dataclass(frozen=True)
class Run:
    """One run folder and the resolved preset it belongs to."""

    name: str
    path: Path
    preset: Preset
    data_dir: str = ""  # absolute, or "" when there is no local data folder
    asked: dict[str, str] = field(default_factory=dict)  # the parameters that open this run again

    @classmethod
    def open(
        cls,
        preset: str | Path = "smoke",
        run: str = "",
        overrides: Mapping[str, object] | Iterable[str] = (),
        data_dir: str | Path = "",
        *,
        create: bool = True,
    ) -> "Run":
        """The run of that name (default: the preset's), with its config.toml written if absent or changed.

        preset: a name, a path to a .toml file, or "" for the config.toml that the run has.
        overrides: {dotted key: value}, or texts that `parse_overrides` reads.
        data_dir: local data folder; relative to the current folder or else to the project; default $THREEFOLD_DATA.
        create: False only looks, and writes nothing.
        Raises ConfigError.
        """
        if run:
            names.check_name(run, "run")
        if not isinstance(overrides, Mapping):
            overrides = parse_overrides(overrides)
        if not preset:
            if not run or not (paths.RUNS / run / "config.toml").is_file():
                raise ConfigError(f"run {run!r} has no config.toml yet: name a preset ({_listed(preset_names())})")
            resolved = load_preset(paths.RUNS / run / "config.toml", overrides)
        else:
            resolved = load_preset(preset, overrides)
        name = run or resolved.name
        path = paths.RUNS / name
        if path.resolve() != paths.RUNS.resolve() / name:
            raise ConfigError(
                f"run {name} is a link out of the runs folder: choose another name, or set THREEFOLD_RUNS to the "
                "folder in which all runs are to lie"
            )
        asked = {"preset": str(preset)} if preset else {}
        asked |= {"run": name} if name != resolved.name or not preset else {}
        asked |= {"data_dir": str(data_dir)} if data_dir else {}
        asked |= {"overrides": format_overrides(overrides)} if overrides else {}
        opened = cls(name, path, resolved, _data_folder(str(data_dir)), asked)
        if create:
            opened.create()
        return opened

    def create(self) -> None:
        """Make the run's folders and write its config.toml if absent or changed."""
        text = to_toml(self.preset)
        file = self.path / "config.toml"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            files.atomic_write(file, text)
        self.notebook("").parent.mkdir(exist_ok=True)  # papermill does not make its output's folder

    def stage_folder(self, stage: str) -> Path:
        """Where a finished stage lies: runs/<run>/<stage>, evaluations in runs/<run>/evaluation/<model>; those of a
        replicate n >= 2 in the same places below runs/<run>/seeds/<n>."""
        stage_notebook(stage)
        base, replicate = names.replicate_of(stage)
        home = replicate_folder(self.path, replicate)
        kind, _, model = base.partition("-")
        return home / "evaluation" / names.check_name(model, "model") if kind == "evaluate" else home / base

    def seed(self, stage: str) -> int:
        """The seed of a stage: the preset's; a replicate of a training adds its place, an evaluation does not, so that
        every replicate is asked the same prompts."""
        base, replicate = names.replicate_of(stage)
        return self.preset.seed + (replicate - 1 if base in REPEATED else 0)

    def partial_folder(self, stage: str) -> Path:
        """Where a stage works until it is finished."""
        stage_notebook(stage)
        return self.path / f".{stage}.partial"

    def notebook(self, name: str) -> Path:
        """Where an executed notebook lies, by its stem (see `stage_notebook(stage).executed`)."""
        return self.path / "notebooks" / f"{name}.ipynb"

    def command(self, stage: str) -> str:
        """The papermill command that makes this stage of this run, from the project's folder."""
        notebook = stage_notebook(stage)
        out = self.notebook(notebook.executed)
        if out.is_relative_to(paths.PROJECT):  # not so with $THREEFOLD_RUNS
            out = out.relative_to(paths.PROJECT)
        words = ["papermill", f"notebooks/{notebook.source}.ipynb", str(out)]
        for name, value in {**self.asked, **notebook.parameters}.items():
            words += ["-p", name, str(value)]
        return shlex.join(words)

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The run.json of a finished stage, None when it has not been made. Raises RecordError if it is damaged."""
        return read_run_file(self.stage_folder(stage))

    def require(self, stage: str) -> dict[str, Any]:
        """The run.json of a finished stage; MissingInput names the command that makes it."""
        facts = self.finished(stage)
        if facts is None:
            state = " was begun but is not finished" if self.partial_folder(stage).exists() else " is not there yet"
            raise MissingInput(f"stage {stage} of run {self.name}{state}: run `{self.command(stage)}`")
        return facts

    def intact(self, stage: str, *, gone: bool = False) -> Path:
        """Folder of a finished stage after every byte of it was read (1 to 2 GB/s) and found to be what the stage
        wrote; gone: files may be missing. Raises MissingInput, and CheckpointError that names the first other file."""
        facts, folder = self.require(stage), self.stage_folder(stage)
        for path, problem in damage(folder, facts):
            if problem == CHANGED or (problem == GONE and not gone):
                file = (folder / path).relative_to(self.path).as_posix()
                raise CheckpointError(
                    f"{file} of run {self.name} is not what the stage wrote ({problem}): "
                    f"`threefold verify --run {self.name}` tells all; run stage {stage} again"
                )
        return folder

    def seal(self, stage: str) -> None:
        """Note the executed notebook's hash in the stage's run.json: what the notebook's own record cannot hold."""
        facts = {**self.require(stage), "notebook_sha256": files.sha256_file(self._executed(stage))}
        _write_run_file(self.stage_folder(stage), facts)

    def take_up(self, stage: str, digest: str) -> None:
        """Make a stage that is finished but whose notebook never came through an interrupted one again, if it was made
        with that fingerprint: the next attempt finds its work done. A crash between the two, or a disk too full for
        the notebook, would else cost the whole training."""
        facts, partial = self.finished(stage), self.partial_folder(stage)
        if facts is None or "notebook_sha256" in facts or partial.exists():
            return
        folder = self.stage_folder(stage)
        if facts["fingerprint"].get("digest") == digest and next(damage(folder, facts), None) is None:
            used = facts.get("determinism", {})
            _write_run_file(folder, {**facts, "threads": used.get("threads", []), "workers": used.get("workers", [1])})
            os.rename(folder, partial)

    def check_notebook(self, stage: str) -> None:
        """Raises RecordError when the executed notebook is not what was sealed. One that was executed without
        `threefold run` is sealed by the next one."""
        sealed = (self.finished(stage) or {}).get("notebook_sha256")
        file = self._executed(stage)
        if sealed and file.is_file() and files.sha256_file(file) != sealed:
            raise RecordError(
                f"notebooks/{file.name} of run {self.name} was changed since it was executed: run stage {stage} again"
            )

    def _executed(self, stage: str) -> Path:
        return self.notebook(stage_notebook(stage).executed)


def data_dir_of(run: str, given: str = "") -> str:
    """The data folder to open a run with: as given, else $THREEFOLD_DATA (`Run.open` reads it), else the one the run
    was made with."""
    if given or os.environ.get("THREEFOLD_DATA"):
        return given
    note = paths.RUNS / run / ".data_dir"
    kept = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
    return kept if kept and Path(kept).is_dir() else ""


def replicate_folder(run: Path, replicate: int) -> Path:
    """Where the stages of a replicate lie in a run's folder; the first's lie in the run itself."""
    return run if replicate == 1 else run / "seeds" / str(replicate)


GONE, CHANGED, STRAY = "missing", "changed since the stage wrote it", "not written by the stage"


def damage(folder: Path, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(path in the folder, what is wrong with it) of everything in a finished stage's folder that is not as its
    run.json says; every byte is read."""
    have = {path: digest for path, digest in files.sha256_tree(folder).items() if path != RUN_FILE}
    for path, digest in facts["outputs"].items():
        if path not in have:
            yield path, GONE
        elif have[path] != digest:
            yield path, CHANGED
    yield from ((path, STRAY) for path in have if path not in facts["outputs"])


def read_run_file(folder: Path) -> dict[str, Any] | None:
    """The run.json in a folder, None when there is none. Raises RecordError if it is not what was written."""
    file = folder / RUN_FILE
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        written = facts.pop(files.SELF, None) if isinstance(facts, dict) else None  # none in those of before
        same = written is None or written == files.sha256_json(facts)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{_shown(file)} is damaged ({error}); remove the folder and run the stage again") from error
    if not same:
        raise RecordError(f"{_shown(file)} is not as it was written; remove the folder and run the stage again")
    kinds = {"stage": str, "fingerprint": dict, "outputs": dict}
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), kind) for name, kind in kinds.items()):
        raise RecordError(f"{_shown(file)} lacks stage, fingerprint or outputs; remove the folder and run it again")
    return facts


# Work folders -------------------------------------------------------------------------------------------------------

_HELD: dict[Path, int] = {}  # work folders that this process began, and the open folder that holds the lock of each


def _hold(folder: Path) -> None:
    """Make a work folder and take it for this process; the lock goes with the process, however it ends."""
    _let_go(folder)
    patience = time.monotonic() + PATIENCE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        opened = _locked_folder(folder)
        if opened is not None and os.path.samestat(os.fstat(opened), os.stat(folder)):
            _HELD[folder] = opened
            return
        if opened is not None:  # it took its stage's place in between
            os.close(opened)
        elif time.monotonic() > patience:
            raise ThreefoldError(f"{_shown(folder)}: another process works on this stage; wait for it")
        time.sleep(0.05)


def _let_go(folder: Path) -> None:
    if folder in _HELD:
        os.close(_HELD.pop(folder))


def _locked_folder(folder: Path) -> int | None:
    """The folder opened with its lock; None where another process, or this one, has that."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        return None
    except (ImportError, OSError):  # Windows, and file systems that lock no folders: nothing is held there
        pass
    return opened


def at_work(run: Path) -> str:
    """Name of the work folder in which a process makes a stage of the run, "" where there is none."""
    for folder in sorted(run.glob(".*.partial")):
        opened = _locked_folder(folder)
        if opened is None:
            return folder.name
        os.close(opened)
    return ""


def attempts_determinism(begun: Mapping[str, Any]) -> dict[str, Any]:
    """`provenance.determinism` of the work that this process ends, after the attempts that a run.json lists."""
    return provenance.determinism(begun.get("threads", [provenance.threads()]), begun.get("workers", [1]))


def _write_run_file(folder: Path, facts: Mapping[str, Any]) -> None:
    files.write_note(folder / RUN_FILE, facts, indent=2)


@dataclass
class Stage:
    """One stage of a run, as a notebook works on it."""

    name: str
    run: Run
    config: Any  # its section of the preset: TrainConfig, EvaluationConfig, ...
    folder: Path  # where it lies once finished
    nproc: int | None = None  # processes that train it together; None: one a GPU
    determinism: dict[str, Any] | None = None  # of what trained it; None: this process does all its work
    _fingerprint: Fingerprint | None = None
    _clock: float = 0.0

    @property
    def preset(self) -> Preset:
        return self.run.preset

    @property
    def model(self) -> str:
        """Which model a stage of notebook 01 or 04 is about: "gpt2" of "gpt2", "sft" of "evaluate-sft-seed2"."""
        return names.replicate_of(self.subject)[0]

    @property
    def subject(self) -> str:
        """The model's name in records, where a replicate's is its own: "sft-seed2" of "evaluate-sft-seed2"."""
        return self.name.removeprefix("evaluate-")

    @property
    def replicate(self) -> int:
        """Which training of the lineage this is about, from 1."""
        return names.replicate_of(self.name)[1]

    @property
    def seed(self) -> int:
        return self.run.seed(self.name)

    @property
    def partial(self) -> Path:
        return self.run.partial_folder(self.name)

    def require(self, stage: str) -> Path:
        """Folder of a finished stage this one builds on, of the same replicate where there are several. MissingInput
        names the notebook that makes it, CheckpointError a file in it that is not what that stage wrote."""
        if stage in REPEATED:
            stage = names.replicate_name(stage, self.replicate)
        return self.run.intact(stage)

    def begin(self, fingerprint: Fingerprint) -> Path:
        """The folder to work in. What an interrupted attempt with the same fingerprint left there is kept, so that the
        work can be resumed; anything else is removed first. Until `finish` it is this process's: ThreefoldError where
        another one works in it."""
        if fingerprint.stage != self.name:
            raise ValueError(f"fingerprint of stage {fingerprint.stage} given to stage {self.name}")
        folder = self.partial
        _hold(folder)
        begun = self._interrupted(fingerprint)
        if begun is None:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            begun = {"stage": self.name, "fingerprint": fingerprint.to_dict(), "outputs": {}, "started": _now()}
        for leftover in folder.rglob(".*.tmp"):  # of an atomic write that was interrupted
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
        begun["attempts"] = begun.get("attempts", 0) + 1
        begun["threads"] = [*begun.get("threads", []), provenance.threads()]
        _write_run_file(folder, begun)
        self._fingerprint = fingerprint
        self._clock = time.monotonic()
        return folder

    def count_workers(self, number: int) -> None:
        """Note in a begun stage's run.json that its training goes on in so many processes from here."""
        begun = read_run_file(self.partial) or {}
        if number not in begun.get("workers", []):
            _write_run_file(self.partial, {**begun, "workers": [*begun.get("workers", []), number]})

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write run.json, move the work folder into place (a folder there before is replaced at once), return run.json.

        Facts: `tokens` trained on, `device_seconds`, and any more that are finite JSON. `wall_seconds` is the time
        since `begin` unless given; `weights_sha256` the hash of model.safetensors unless given.
        """
        if self._fingerprint is None:
            raise RuntimeError(f"stage {self.name}: finish without begin")
        taken = [name for name in _FACTS if name in facts]
        if taken:
            raise ValueError(f"finish() finds {', '.join(taken)} itself")
        folder = self.partial
        begun = read_run_file(folder) or {}
        outputs = {path: digest for path, digest in files.sha256_tree(folder).items() if path != RUN_FILE}
        content = {
            "stage": self.name,
            "fingerprint": self._fingerprint.to_dict(),
            "git": provenance.git_state(),
            "hardware": provenance.hardware(),
            "determinism": self.determinism or attempts_determinism(begun),
            "wall_seconds": round(time.monotonic() - self._clock, 3),
            "device_seconds": None,
            "tokens": None,
            "weights_sha256": outputs.get("model.safetensors"),
            "outputs": outputs,
            "attempts": begun.get("attempts", 1),  # more than one: resumed, and wall_seconds is the last one's
            "started": begun.get("started"),
            "finished": _now(),
            **facts,
        }
        _write_run_file(folder, content)
        files.replace_folder(folder, self.folder)
        _let_go(folder)
        self._fingerprint = None
        return read_run_file(self.folder)

    def _interrupted(self, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """The run.json of an attempt with the same fingerprint that did not end, if there is one."""
        try:
            begun = read_run_file(self.partial)
        except RecordError:  # nothing to resume from; the folder is emptied
            return None
        return begun if begun and begun["fingerprint"].get("digest") == fingerprint.digest else None


def open_stage(stage: str, namespace: dict[str, Any]) -> Stage:
    """The stage a notebook is about, from the parameters among the notebook's `globals()`.

    Parameters are the public names that hold None, a string, a number or a truth value: preset, run, data_dir,
    overrides ("a.b=c; d.e=f", or a list), `model` (notebooks 01 and 04), `replicate` (01 to 04: which of the preset's
    `seeds` trainings, from 1), `nproc` (01 to 03: processes that train together), and every field of the stage's
    section of the preset; None means the preset's value. An unknown one stops: papermill only warns, and a typo would
    run for hours.
    When a stage is opened again in the same kernel, names that came after the first time are ordinary variables.

    stage: "sft", ...; "pretrain" with model=gpt2 is stage "gpt2", "evaluate" with model=sft is "evaluate-sft", "sft"
    with replicate=2 is "sft-seed2".
    Raises ConfigError.
    """
    stage, replicate = names.replicate_of(stage)
    kind = stage.partition("-")[0]
    if kind not in _STAGES:
        raise ConfigError(f"unknown stage {stage!r}{_hint(stage, _STAGES)}; allowed: {_stage_list()}")
    takes_model = kind in _PRETRAINED or kind == "evaluate"
    section = _STAGES[kind][1]
    known = {entry.name for entry in fields(type(getattr(Preset(), section)))}
    repeats = takes_model or kind in REPEATED
    trains = section in TRAINED
    own = [*(["model"] if takes_model else []), *(["replicate"] if repeats else []), *(["nproc"] if trains else [])]
    allowed = [*DOOR, *own, *sorted(known)]
    given = _parameters(namespace, allowed, _STAGES[kind][0])

    model, replicate = given.pop("model", None), given.pop("replicate", replicate)
    if stage == "pretrain" and model:
        if model not in _PRETRAINED:
            raise ConfigError(
                f"model {names.shown(model)}{_hint(str(model), _PRETRAINED)}; allowed: {', '.join(_PRETRAINED)}"
            )
        stage = section = model
    if stage == "evaluate":
        stage = f"evaluate-{model or 'pretrain'}"
    nproc = given.pop("nproc", None)
    if nproc is not None and (type(nproc) is not int or nproc < 1):
        raise ConfigError(f"parameter nproc = {names.shown(nproc)}: expected None or a whole number of at least 1")
    door = {name: given.pop(name) for name in DOOR if name in given}
    overrides = door.pop("overrides", ())
    if not isinstance(overrides, str | list | tuple):
        raise ConfigError(f"parameter overrides = {names.shown(overrides)}: expected 'key=value; key=value', or a list")
    values = parse_overrides(overrides) | {f"{section}.{name}": value for name, value in given.items()}
    for name, value in door.items():
        if isinstance(value, bool | float):
            raise ConfigError(f"parameter {name} = {names.shown(value)}: expected a string")
        door[name] = str(value)  # papermill's -p makes a number of a run named 2024
    run = Run.open(**door, overrides=values, create=False)
    if kind == "evaluate":
        models = model_names(run.preset)
        name = stage.partition("-")[2]
        if name not in models:
            raise ConfigError(f"model {name!r}{_hint(name, models)}; allowed in this preset: {', '.join(models)}")
    stage = _replicate(stage, replicate, run.preset)
    run.create()  # only now, so that a wrong parameter leaves nothing behind
    folder = run.stage_folder(stage)
    files.recover_folder(folder)
    return Stage(stage, run, getattr(run.preset, section), folder, nproc)


def _replicate(stage: str, replicate: Any, preset: Preset) -> str:
    """The stage's name in that replicate. Raises ConfigError for one that the preset does not ask for."""
    if type(replicate) is not int or replicate < 1:
        raise ConfigError(f"parameter replicate = {names.shown(replicate)}: expected a whole number of at least 1")
    model = stage.removeprefix("evaluate-")
    if replicate > 1 and model not in REPEATED:
        raise ConfigError(
            f"parameter replicate = {names.shown(replicate)}: {model} is trained once; seeds repeats "
            f"{', '.join(REPEATED)}"
        )
    if replicate > preset.seeds:
        raise ConfigError(
            f"parameter replicate = {names.shown(replicate)}: preset {preset.name} has seeds = {preset.seeds}; "
            f"overrides='seeds={replicate}' asks for more"
        )
    return names.replicate_name(stage, replicate)


_SEEN = (
    "_threefold_parameters"  # kept in the notebook's globals: the names that stood there when its stage first opened
)


def _parameters(namespace: dict[str, Any], allowed: list[str], notebook: str) -> dict[str, Any]:
    """The parameters among a notebook's globals that are not None. Raises ConfigError for an unknown one."""
    found = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and (value is None or isinstance(value, str | int | float) or name == "overrides")
    }
    seen = namespace.get(_SEEN, found)
    unknown = [name for name in found if name not in allowed and name in seen]
    if unknown:
        raise ConfigError(
            f"unknown parameter {unknown[0]}{_hint(unknown[0], allowed)}; notebook {notebook} takes: "
            f"{', '.join(allowed)} (other keys: overrides='section.key=value')"
        )
    namespace[_SEEN] = frozenset(seen)
    return {name: value for name, value in found.items() if name in allowed and value is not None}


def _data_folder(given: str) -> str:
    """The local data folder as an absolute path, "" when none is named. ConfigError when it is not there."""
    text = given or os.environ.get("THREEFOLD_DATA", "")
    if not text:
        return ""
    path = paths.expanded(text)
    for folder in (path, paths.PROJECT / path):
        if os.path.isdir(folder):  # no for what can be no name
            return str(folder.resolve())
    origin = "data_dir" if given else "$THREEFOLD_DATA"
    raise ConfigError(f"{origin} = {text!r:.300}: no such folder, neither from here nor from the project's folder")


def _hint(name: str, allowed: Iterable[str]) -> str:
    miss = names.near_miss(name, allowed)
    return f", did you mean {miss}?" if miss else ""


def _stage_list() -> str:
    return _listed(f"{name}-<model>" if name == "evaluate" else name for name in _STAGES)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _shown(file: Path) -> str:
    return file.relative_to(paths.RUNS).as_posix() if file.is_relative_to(paths.RUNS) else file.name


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
