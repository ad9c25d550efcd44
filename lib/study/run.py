"""Runs and stages of this study: the run folder of a preset, and a notebook's parameters turned into its stage."""

import ast
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from basics import files, machine, names, paths
from basics.errors import DISK_FULL, ConfigError
from basics.names import did_you_mean, shown
from papertrail import run as papertrail_run
from papertrail import stage as papertrail_stage
from papertrail.plan import Plan, Project, threads_for
from papertrail.provenance import Fingerprint
from study import stages
from study.preset import (
    LINEAGE,
    REPLICATED,
    TRAINED,
    Preset,
    format_overrides,
    kind_and_model,
    load_preset,
    model_names,
    parse_overrides,
    preset_names,
    replicated,
    section,
    to_dict,
    to_toml,
    trained,
)

COMMON_PARAMETERS = ("preset", "run", "data_dir", "overrides", "overwrite")  # of every notebook
CHOICE = "choice.json"  # of a stage that tunes: the learning rates that its trials chose
# Stages whose parameters are the keys of another section than the one of their name.
SECTIONS = {"tune": "tuning", "evaluate": "evaluation", "speed": "evaluation", "compare": "evaluation"}


def project() -> Project:
    """What papertrail has to know of this study."""
    return Project(
        root=paths.PROJECT,
        notebooks=paths.NOTEBOOKS,
        plan=paths.PLAN,
        packages=("basics", "papertrail", "study", "threefold"),
        distributions=(
            *("torch", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "numpy", "pandas", "scipy"),
        ),
        summary="compare",
        timed_files=("steps-preset.json", "steps-ablation.json", "speed.parquet"),
        timed_records=("speed/", "comparison/", "ablation-effects", "kernels"),
        readers={"metrics.jsonl": _metrics},
    )


def _metrics(file: Path) -> list[dict[str, Any]]:
    from threefold.training.state import read_metrics  # without the steps that an interrupted training repeated

    return read_metrics(file.parent)


@dataclass(frozen=True, kw_only=True)
class Run(papertrail_run.Run):
    """A run folder and the resolved preset that it belongs to."""

    preset: Preset
    data_dir: str = ""  # absolute, or "" when there is no local data folder

    @classmethod
    def of(cls, name: str, path: Path, preset: Preset, **options: Any) -> "Run":
        """The run of a preset in a folder. options: further fields."""
        return cls(name=name, path=path, preset=preset, plan=stages.plan(preset), project=project(), **options)

    def create(self) -> None:
        """Make the run's folders and write its config.toml if absent or changed. Raises ConfigError where the runs
        folder cannot be written."""
        text, file = papertrail_run.with_hash(to_toml(self.preset)), self.path / papertrail_run.CONFIG
        try:
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                files.atomic_write(file, text)
            self.notebook("").parent.mkdir(exist_ok=True)  # papermill does not make its output's folder
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise ConfigError(
                f"run {self.name} cannot be written to {self.path.parent} ({error.strerror}): set THREEFOLD_RUNS to a "
                "folder that can be"
            ) from error

    def config_of(self, stage: str) -> dict[str, Any]:
        return stages.sections(self.preset, stage)

    def data_of(self, stage: str, reread: dict[str, str] | None = None) -> dict[str, str]:
        return stages.data_fingerprints(self.preset, stage, self.data_dir, reread)

    def seed(self, stage: str) -> int:
        """The preset's seed, plus the place of a training's replicate. An evaluation's does not change with the
        replicate, so that every replicate gets the same prompts."""
        base, replicate = names.replicate_of(stage)
        return self.preset.seed + (replicate - 1 if base in REPLICATED else 0)

    def taken_from(self, parent: str, stage: str) -> str:
        """Of a model its weights; of trials the rates that they chose; of the data stage what it made (not its
        fingerprint: other data for DPO leaves the tokenizer, and so pretraining, as it was). The comparison reads
        measured times, so it takes whole results."""
        facts = self.finished(parent)
        if facts is None:
            return "missing"
        if stage == self.project.summary:
            return files.sha256_json(facts)
        outputs = facts["outputs"]
        return outputs.get("model.safetensors") or outputs.get(CHOICE) or files.sha256_json(outputs)

    def environment(self) -> dict[str, str]:
        return {
            "THREEFOLD_DATA": self.data_dir,
            "THREEFOLD_RUNS": str(self.path.parent),
            "THREEFOLD_CACHE": str(paths.cache_folder()),  # also where this run lies outside the runs folder
        }

    def private(self) -> dict[str, str]:
        """Absolute paths in the preset (own data, own models) become their last part."""

        def absolute(value: object) -> Iterator[str]:
            if isinstance(value, str) and Path(value).is_absolute():
                yield value
            for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
                yield from absolute(item)

        known = {path: Path(path).name for path in absolute(to_dict(self.preset))}
        return {**known, **({self.data_dir: "$THREEFOLD_DATA"} if self.data_dir else {})}


# Opening a run ------------------------------------------------------------------------------------------------------


def run_names() -> list[str]:
    """Names of the runs in the runs folder."""
    return sorted(path.parent.name for path in paths.RUNS.glob("*/config.toml"))


def open_run(
    preset: str | Path = "smoke",
    run: str = "",
    overrides: Mapping[str, object] | Iterable[str] = (),
    data_dir: str | Path = "",
    *,
    create: bool = True,
) -> Run:
    """The run of that name (default: the preset's).

    preset: a name, a path to a .toml file, or "" for the config.toml that the run has.
    overrides: {dotted key: value}, or texts that `parse_overrides` reads.
    data_dir: local data folder, relative to the current folder or else to the project; default $THREEFOLD_DATA.
    create: make the run's folders, and write its config.toml if absent or changed. False writes nothing.
    Raises ConfigError.
    """
    if run:
        names.check_name(run, "run")
    if not isinstance(overrides, Mapping):
        overrides = parse_overrides(overrides)
    own_config = paths.RUNS / run / "config.toml"
    if not preset and not (run and own_config.is_file()):
        raise ConfigError(f"run {run!r} has no config.toml yet: name a preset ({', '.join(preset_names())})")
    resolved = load_preset(preset or own_config, overrides)
    name = run or resolved.name
    path = paths.RUNS / name
    if path.resolve() != paths.RUNS.resolve() / name:
        raise ConfigError(
            f"run {name} is a link out of the runs folder: choose another name, or set THREEFOLD_RUNS to the "
            "folder in which all runs are to lie"
        )
    parameters = {
        "preset": str(preset),
        "run": name if name != resolved.name or not preset else "",
        "data_dir": str(data_dir),
        "overrides": format_overrides(overrides),
    }
    opened = Run.of(
        name,
        path,
        resolved,
        parameters={key: value for key, value in parameters.items() if value},
        data_dir=_data_folder(str(data_dir)),
    )
    if not preset and (problem := opened.config_problem(hashed=False)):
        raise ConfigError(
            f"config.toml of run {name} {problem}: restore it, or take it as it is with --preset {own_config}"
        )
    if create:
        opened.create()
    return opened


def data_dir_of(run: str, given: str = "") -> str:
    """The data folder to open a run with: as given, else $THREEFOLD_DATA (`open_run` reads it), else the one the run
    was made with."""
    if given or os.environ.get("THREEFOLD_DATA"):
        return given
    note = paths.RUNS / run / ".data_dir"
    kept = note.read_text(encoding="utf-8", errors="replace").strip() if note.is_file() else ""
    return kept if kept and os.path.isdir(kept) else ""


def _data_folder(given: str) -> str:
    """The local data folder as an absolute path, "" when none is named. ConfigError when it is not there."""
    text = given or os.environ.get("THREEFOLD_DATA", "")
    if not text:
        return ""
    path = paths.expanded(text)
    for folder in (path, paths.PROJECT / path):
        if os.path.isdir(folder):  # False for what cannot be a name
            return str(folder.resolve())
    origin = "data_dir" if given else "$THREEFOLD_DATA"
    raise ConfigError(f"{origin} = {text!r:.300}: no such folder, neither from here nor from the project's folder")


# Opening a stage ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Stage(papertrail_stage.Stage):
    """One stage of a run, as its notebook works on it."""

    run: Run
    config: Any  # its section of the preset: TrainConfig, EvaluationConfig, ...
    nproc: int | None = None  # processes that train it together; None: one per GPU

    @property
    def preset(self) -> Preset:
        return self.run.preset

    @property
    def subject(self) -> str:
        """The model's name in records, with its replicate: "sft-seed2" of "evaluate-sft-seed2"."""
        return kind_and_model(self.name)[1]

    @property
    def model(self) -> str:
        """The model's name: "gpt2" of "gpt2", "sft" of "evaluate-sft-seed2"."""
        return names.replicate_of(self.subject)[0]

    @property
    def replicate(self) -> int:
        """Which training of the lineage this is about, from 1."""
        return names.replicate_of(self.name)[1]

    def require(self, stage: str) -> Path:
        """As in papertrail; of a stage with replicates this one's."""
        return super().require(names.replicate_name(stage, self.replicate) if stage in REPLICATED else stage)


def open_stage(stage: str, /, **parameters: Any) -> Stage:
    """The stage of a notebook, from the notebook's parameters.

    stage: "sft", ...; "pretrain" with model="gpt2" is stage "gpt2", "evaluate" with model="sft" is "evaluate-sft",
        "sft" with replicate=2 is "sft-seed2".
    parameters: preset, run, data_dir, overrides ("a.b=c; d.e=f", or a list), overwrite (replace results of the run
        that were made with other settings), `model` (notebooks 01_pretrain, 01_tune and 04), `replicate` (01_pretrain
        to 04: which of the preset's `seeds` trainings, from 1), `nproc` (01_pretrain to 03: processes that train
        together), and keys of the stage's section of the preset. None means the preset's value.

    Raises ConfigError, also where the notebook's parameters cells assign a name that is not passed on here: papermill
    only warns about an unknown parameter, and a typo would run for hours.
    """
    base, replicate = names.replicate_of(stage)
    kind = kind_and_model(base)[0]
    if kind not in stages.NOTEBOOKS:
        raise ConfigError(f"unknown stage {base!r}{did_you_mean(base, stages.NOTEBOOKS)}")
    part = SECTIONS.get(kind, section(kind))
    takes_model = kind in stages.PRETRAINED or kind in ("evaluate", "tune")
    keys = [
        *COMMON_PARAMETERS,
        *(["model"] if takes_model else []),
        *(["replicate"] if kind != "tune" and (takes_model or kind in LINEAGE) else []),
        *(["nproc"] if kind in TRAINED else []),
        *sorted(to_dict(getattr(Preset(), part))),
    ]
    _check_known(parameters, keys, stages.NOTEBOOKS[kind])
    if parameters:
        _check_known(assigned_parameters(), list(parameters), stages.NOTEBOOKS[kind])
    given = {name: value for name, value in parameters.items() if value is not None}

    model, replicate = given.pop("model", None), given.pop("replicate", replicate)
    if base == "pretrain" and model:
        if model not in stages.PRETRAINED:
            hint = did_you_mean(str(model), stages.PRETRAINED)
            raise ConfigError(f"model {shown(model)}{hint}; allowed: {', '.join(stages.PRETRAINED)}")
        base, part = model, section(model)
    if base in ("evaluate", "tune"):
        base = f"{base}-{model or 'pretrain'}"
    nproc = given.pop("nproc", None)
    if nproc is not None and (type(nproc) is not int or nproc < 1):
        raise ConfigError(f"parameter nproc = {shown(nproc)}: expected None or a whole number of at least 1")
    common = {name: given.pop(name) for name in COMMON_PARAMETERS if name in given}
    overrides, overwrite = common.pop("overrides", ()), common.pop("overwrite", False)
    if overwrite not in (True, False, "true", "false"):  # papermill's -p leaves true a string
        raise ConfigError(f"parameter overwrite = {shown(overwrite)}: expected true or false")
    if not isinstance(overrides, str | list | tuple):
        raise ConfigError(f"parameter overrides = {shown(overrides)}: expected 'key=value; key=value', or a list")
    values = parse_overrides(overrides) | {f"{part}.{name}": value for name, value in given.items()}
    common = {name: text_parameter(name, value) for name, value in common.items()}
    run = open_run(**common, overrides=values, create=False)
    model = kind_and_model(base)[1]
    if kind in ("evaluate", "tune"):
        models = model_names(run.preset) if kind == "evaluate" else trained(run.preset)
        if model not in models:
            hint = did_you_mean(model, models)
            raise ConfigError(f"model {model!r}{hint}; allowed in this preset: {', '.join(models)}")
    if kind == "tune" and not run.preset.tuning.multipliers:
        raise ConfigError(
            "tuning.multipliers is empty: no learning rate is tuned; overrides='tuning.multipliers=0.5,1,2'"
        )
    name = _with_replicate(base, replicate, run.preset)
    run.spec(name)
    if overwrite in (False, "false"):
        _check_overwriting(run)
    run.create()  # only now, so that a wrong parameter leaves nothing behind
    if kind not in ("data", "compare"):
        _choose_threads(run.plan, name)
    return Stage(
        name=name, run=run, config=getattr(run.preset, section(model) if kind == "tune" else part), nproc=nproc
    )


def _choose_threads(plan: Plan, stage: str) -> None:
    """Set torch's threads where OMP_NUM_THREADS does not: as many as `threefold run` would choose, so that sums come
    out the same, but no more than there are idle cores. Prints the choice."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch  # late: it takes seconds; the stages that choose need it anyway

    most, free = threads_for(plan, plan[stage], min(2, machine.cores())), machine.free_cores()
    threads = min(most, free)
    why = f"as in threefold run, of {machine.cores()} cores"
    if threads < most:
        why = f"threefold run would take {most}, but {free} of {machine.cores()} cores are idle; last digits may differ"
    torch.set_num_threads(threads)
    print(f"{stage}: {threads} {'thread' if threads == 1 else 'threads'} ({why}); OMP_NUM_THREADS sets another number")


def _with_replicate(stage: str, replicate: Any, preset: Preset) -> str:
    """The stage's name in that replicate. Raises ConfigError for one that the preset does not ask for."""
    parameter, model = f"parameter replicate = {shown(replicate)}", kind_and_model(stage)[1]
    if type(replicate) is not int or replicate < 1:
        raise ConfigError(f"{parameter}: expected a whole number of at least 1")
    if replicate > 1 and model not in (again := replicated(preset)):
        raise ConfigError(f"{parameter}: {model} is trained once; seeds repeats {', '.join(again)}")
    if replicate > preset.seeds:
        raise ConfigError(
            f"{parameter}: preset {preset.name} has seeds = {preset.seeds}; overrides='seeds={replicate}' asks for more"
        )
    return names.replicate_name(stage, replicate)


def _check_overwriting(run: Run) -> None:
    """Raise ConfigError for settings that are not the run's and would make one of its finished stages stale."""
    config = run.path / "config.toml"
    if not config.is_file() or config.read_text(encoding="utf-8") == papertrail_run.with_hash(to_toml(run.preset)):
        return
    for stage in run.plan:
        if (facts := run.finished(stage)) is None:
            continue
        made = Fingerprint.from_dict(facts["fingerprint"])
        asked = replace(made, config=run.config_of(stage), seed=run.seed(stage))
        if changes := [line.removeprefix("config: ") for line in made.differences(asked)]:
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise ConfigError(
                f"stage {stage} of run {run.name} is finished, with other settings ({', '.join(changes[:3])}{more}): "
                f"`-p run NAME` makes another run, `-p run {run.name} -p preset ''` keeps this run's settings, "
                "`-p overwrite true` replaces its results"
            )


def text_parameter(name: str, value: Any) -> str:
    """A notebook's parameter that is a text. papermill's -p makes numbers of texts such as 2024, 001 and 1e3.

    Raises ConfigError where the text cannot be known from the number.
    """
    text = value if isinstance(value, str) else passed_to_papermill(name)
    if isinstance(value, bool | float) or text not in (None, str(value)):
        way_out = f": papermill's -p reads {text} as {value!r}, use `-r {name} {text}`" if text else ""
        raise ConfigError(f"parameter {name} = {shown(value)}: expected a string{way_out}")
    return str(value)


def passed_to_papermill(parameter: str) -> str | None:
    """The text after `-p PARAMETER` on the command line of the papermill that started this kernel, if one did."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # it has ended, or is another user's
        return None
    for flag, name, text in zip(words, words[1:], words[2:], strict=False):
        if flag in ("-p", "--parameters") and name == parameter:
            return text
    return None


def _check_known(parameters: Iterable[str], allowed: list[str], notebook: str) -> None:
    for name in parameters:
        if name not in allowed:
            raise ConfigError(
                f"unknown parameter {name}{did_you_mean(name, allowed)}; notebook {notebook} takes: "
                f"{', '.join(allowed)} (other keys: overrides='section.key=value')"
            )


def assigned_parameters() -> list[str]:
    """The names that the parameters cells of the running notebook assign; none outside of a notebook.

    Those are the first cells that were run, as long as they hold nothing but assignments of literals: the notebook's
    own and the one that papermill injects after it. IPython keeps the source of each cell, so that nothing has to be
    guessed from the notebook's variables.
    """
    ipython, assigned = sys.modules.get("IPython"), []
    shell = ipython.get_ipython() if ipython is not None else None
    for cell in shell.history_manager.input_hist_raw[1:] if shell is not None else ():
        try:
            statements = ast.parse(cell).body
            for statement in statements:
                ast.literal_eval(statement.value)
            assigned += [target.id for statement in statements for target in statement.targets]
        except (SyntaxError, ValueError, AttributeError):  # not only assignments of literals
            break
    return assigned
