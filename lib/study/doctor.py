"""What the stages of a run need from this machine, checked before the first of them starts: packages, a GPU that torch
can use, a compiler, memory, room on the disk, data and models from outside, and prompts that fit the context.

`threefold doctor` prints a row for each check; `threefold run` makes the same checks and stops at the first error.
"""

import importlib.metadata
import importlib.util
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basics import files, machine, paths
from basics.errors import ConfigError, SourceError, ThreefoldError
from basics.names import replicate_of
from study import checks, sizes, stages
from study.preset import TRAINED, section
from study.run import Run
from threefold.config import GPT2_VOCABULARY
from threefold.graphics import Graphics, missing_to_compile

READS_GGUF = ("gguf", "accelerate")  # packages that transformers needs to read a GGUF file
PREPARED = 3  # bytes on the disk for a byte of a whole data set from the hub: compressed, and as `datasets` prepares it
CPU_FLOPS, DAY = 1e12, 86400  # more than a CPU trains at; seconds
USABLE = 0.9  # of a GPU's memory; the rest is for its context, buffers and fragments


class Note(str):
    """What a check found that does not stop the run, but makes it slower or larger."""


@dataclass
class Case:
    """A run with its stages that are not made yet. downloads: bytes that the hub will send, by data set or model."""

    run: Run
    todo: list[str]
    downloads: dict[str, int] = field(default_factory=dict)
    missing: bool = False  # a source is nowhere to be found

    def __post_init__(self) -> None:
        self.preset, self.model = self.run.preset, self.run.preset.model
        self.trained = [name for name in self.todo if replicate_of(name)[0] in TRAINED]
        self.trainings = [getattr(self.preset, section(replicate_of(name)[0])) for name in self.trained]
        if "ablations" in self.todo:
            self.trainings.append(self.preset.ablations.train)
        self.tokens = max([0, *(config.tokens for config in self.trainings)])  # 0 if none is set in tokens
        self.graphics = Graphics.read()
        model, tokenizer = self.model, self.preset.tokenizer
        vocabulary = GPT2_VOCABULARY if tokenizer.kind == "gpt2" else tokenizer.vocab_size
        positions = model.context if model.position == "learned" else 0
        ff = model.d_ff if model.ffn == "swiglu" else model.d_ff * 2 // 3  # two matrices, not three
        self.parameters = sizes.parameters(model.n_layer, model.d_model, ff, positions, vocabulary)


def rows(run: Run, selected: Collection[str] | None = None) -> Iterator[tuple[str, str, str | ThreefoldError]]:
    """(mark, check, what it found) of the selected stages (default: all) that are not made yet. mark: "ok", "note", or
    "stop" where the check found the error that stops the run."""
    todo = [name for name in run.plan if (selected is None or name in selected) and run.finished(name) is None]
    case = Case(run, todo)
    for check in CHECKS:
        for found in _until_error(check, case):
            mark = "stop" if isinstance(found, ThreefoldError) else "note" if isinstance(found, Note) else "ok"
            yield mark, check.__name__.removeprefix("_"), found


def _until_error(check: Callable[[Case], Iterator[Any]], case: Case) -> Iterator[str | ThreefoldError]:
    try:
        yield from check(case)
    except ThreefoldError as error:
        yield error


def check(run: Run, selected: Collection[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Raise the first error of `rows`; notes are said."""
    for mark, name, found in rows(run, selected):
        if mark == "stop":
            raise found
        if mark == "note":
            say(f"{name}: {found}")


# The machine --------------------------------------------------------------------------------------------------------


def _packages(_case: Case) -> Iterator[str]:
    from packaging.requirements import Requirement

    table = tomllib.loads((paths.PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted, missing = [Requirement(text) for text in table["project"]["dependencies"]], []
    for requirement in wanted:
        try:
            version = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(version, prereleases=True):
                missing.append(f"{requirement} (there is {version})")
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(requirement))
    if missing:
        raise ConfigError(
            f"missing: {', '.join(missing)}: `pip install -c requirements.lock -e .` in the project's folder"
        )
    yield f"all {len(wanted)} are installed"


def _preset(case: Case) -> Iterator[str]:
    checks.check(case.preset, case.run.data_dir)
    yield f"{case.preset.name}: {len(case.todo)} of {len(case.run.plan)} stages are to be made"


def _gpu(case: Case) -> Iterator[str]:
    found = case.graphics.check()
    longest = 6 * case.parameters * case.tokens / CPU_FLOPS
    if not case.graphics.count and longest > DAY:
        found = Note(f"none; one training alone takes more than {longest / DAY:,.0f} days on a CPU")
    yield found
    if not case.graphics.bf16:
        yield Note(f"{case.graphics.name} has no bf16, so trainings run in fp32, which is slower; fp16 is not used")


def _compiler(case: Case) -> Iterator[str]:
    if all(config.compile == "off" for config in case.trainings):
        return
    device = "cuda" if case.graphics.count else "cpu"
    if not (missing := missing_to_compile(device)):
        yield f"found; long trainings on {'a GPU' if device == 'cuda' else 'the CPU'} are compiled"
    elif any(config.compile == "on" for config in case.trainings):
        raise ConfigError(f'compile = "on" needs {missing}, which is not found; "auto" or "off" runs without')
    else:
        yield Note(f"not found: {missing}; trainings are not compiled, and long ones take longer")


def _memory(case: Case) -> Iterator[str]:
    if not case.trained:
        return
    model, parameters = case.model, case.parameters
    states, host = sizes.TRAINING_BYTES * parameters, machine.memory()
    size = f"a model of {parameters:,} parameters (model.n_layer = {model.n_layer}, model.d_model = {model.d_model})"
    if gpus := case.graphics.count:
        row = sizes.ROW_BYTES * model.context * model.n_layer * model.d_model
        split = gpus if all(config.shard != "off" for config in case.trainings) else 1
        there = USABLE * case.graphics.memory
        if states / split + row > there:
            raise ConfigError(
                f"{size} needs {(states / split + row) / 1e9:,.0f} GB of a GPU to train one row at a time, "
                f"{case.graphics.name} has {there / 1e9:,.0f} GB for it: lower them or model.context"
            )
        fit, largest = (there - states / split) / row, max(config.batch_size for config in case.trainings)
        halved = "" if fit >= largest else f"; micro-batches of {largest} rows are halved until they fit"
        yield f"GPU: {states / 1e9:,.1f} GB of weights and optimizer states, {row / 1e9:,.1f} GB a row{halved}"
    # the host holds the state that is being written, and without a GPU all that is trained
    needed = sizes.STATE_BYTES * parameters + (0 if gpus else states)
    if needed > host:
        raise ConfigError(f"{size} needs {needed / 1e9:,.0f} GB to train, this machine has {host / 1e9:,.0f} GB")
    yield f"host: {needed / 1e9:,.1f} of {host / 1e9:,.0f} GB for weights and optimizer states"


# Data and models from outside ---------------------------------------------------------------------------------------


def _sources(case: Case) -> Iterator[str | ThreefoldError]:
    from threefold.data import hub, sources

    wanted = dict.fromkeys(source for stage in case.todo for source in stages.sources(case.preset, stage))
    found: Counter[str] = Counter()
    for config in wanted:
        try:
            resolved = files.remembered(sources.resolve, config, case.run.data_dir)
            found[resolved.kind] += 1
            if resolved.kind == "hub":
                source, rows = resolved.source, sources.rows_needed(resolved.source, config)
                split = source.splits[config.split]
                size = hub.download_bytes(source.hub, source.config, split, resolved.revision, config.source, rows)
                of = f"{source.hub} {source.config}".strip()
                case.downloads[of] = max(case.downloads.get(of, 0), size * (1 if rows >= 0 else PREPARED))
        except SourceError as error:
            case.missing = True
            yield error
    if found:
        counts = ", ".join(f"{count} {PLACES[kind]}" for kind, count in found.items())
        size = f", {sum(case.downloads.values()) / 1e9:,.1f} GB" if case.downloads else ""
        yield f"found: {counts}{size}"


PLACES = {
    "embedded": "in the project",
    "local": "in the data folder",
    "own": "of your own",
    "cache": "in the Hugging Face cache",
    "hub": "on the hub",
}


def _models(case: Case) -> Iterator[str | ThreefoldError]:
    models = dict.fromkeys(entry for stage in case.todo for entry in stages.models_from_outside(case.preset, stage))
    for name, location, revision in models:
        try:
            yield f"{name}: {_place_of_model(case, name, location, revision)}"
        except ThreefoldError as error:
            yield error


def _place_of_model(case: Case, name: str, location: str, revision: str) -> str:
    """Where a model from outside is. Raises SourceError or ConfigError if it cannot be had."""
    if location.startswith("package:"):
        missing = [package for package in READS_GGUF if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"model {name}: reading {location} needs {' and '.join(missing)}: `pip install {' '.join(missing)}`, "
                "or take it out of the preset's [[baselines.external]]"
            )
        stages.location_fingerprint(location, revision, case.run.data_dir, files.sha256_cached)  # looks for the file
        return "in its package"
    folder = next((folder for folder in paths.model_folders(location, case.run.data_dir) if folder.is_dir()), None)
    if folder is not None:
        for needed in ("config.json", "model*.safetensors"):
            if not any(folder.glob(needed)):
                raise SourceError(f"model {name}: {folder} contains no {needed}")
        return "in its folder"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from threefold.data import hub
    from threefold.evaluation.loading import FILES

    try:
        cached = try_to_load_from_cache(location, "config.json", revision=revision or None)
    except HFValidationError:
        raise SourceError(f"model {name}: no folder {location}, and no name on the hub") from None
    if isinstance(cached, str):
        return "in the Hugging Face cache"
    try:
        case.downloads[location] = hub.model_bytes(location, revision, FILES)
    except SourceError as error:
        raise SourceError(
            f"model {name}: no folder {location}, not in the Hugging Face cache, and {error}: offline, name a "
            "checkpoint folder in the preset's [baselines]"
        ) from error
    return f"on the hub, {case.downloads[location] / 1e9:,.1f} GB"


def _disk(case: Case) -> Iterator[str]:
    from huggingface_hub import constants

    # fp32 weights of each training, the state of the one that is at work, and the tokens of the text
    written = len(case.trained) * 4 * case.parameters + bool(case.trained) * sizes.STATE_BYTES * case.parameters
    if "data" in case.todo:
        written += case.tokens * sizes.TOKEN_BYTES
    places = (
        (paths.RUNS, written, "THREEFOLD_RUNS puts runs elsewhere, `threefold clean` frees what they take"),
        (Path(constants.HF_HUB_CACHE), sum(case.downloads.values()), "HF_HOME puts downloads elsewhere"),
    )
    disks: dict[int, list[tuple[Path, int, str]]] = {}
    for folder, size, way in places:
        if size:
            disks.setdefault(_existing(folder).stat().st_dev, []).append((folder, size, way))
    for parts in disks.values():
        folders, needs, ways = zip(*parts, strict=True)
        needed, free = sum(needs), shutil.disk_usage(_existing(folders[0])).free
        room = f"at least {needed / 1e9:,.1f} GB will be written to {' and '.join(map(str, folders))}"
        if needed > free:
            raise ThreefoldError(f"{room}, and {free / 1e9:,.1f} GB are free: {'; '.join(ways)}")
        yield f"{room}, {free / 1e9:,.0f} GB are free"


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _prompts(case: Case) -> Iterator[str]:
    if "data" not in case.todo or case.preset.tokenizer.kind != "gpt2" or case.missing:
        return  # another tokenizer is known when stage data has trained it, which checks the prompts then
    from threefold.data.tokenizer import build_tokenizer

    preset, model, data_dir = case.preset, case.model, case.run.data_dir
    tokenizer = build_tokenizer(preset.tokenizer, sinks=model.sinks, data_dir=data_dir, context=model.context)
    checks.check_evaluations(preset, tokenizer, data_dir)
    yield f"all fit the context of {model.context} tokens"


# A row is named after the check's function.
CHECKS = (_packages, _preset, _gpu, _compiler, _memory, _sources, _models, _disk, _prompts)
