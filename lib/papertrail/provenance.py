"""Where a result comes from: the fingerprint of a stage, and the machine and versions behind it."""

import ast
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from basics.errors import ConfigError, MissingInput, RecordError
from basics.files import sha256_bytes, sha256_json
from basics.names import first_few
from basics.source_code import code_hashes, imports, module_files
from papertrail.notebook_files import read_notebook

CODE_SHOWN = 4  # modules named in one reason
RESUMED = "up to rounding: interrupted, and resumed with"  # how `determinism` describes such work, and what differed

# Fingerprint --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fingerprint:
    """Everything a stage's result depends on. Equal digests mean that running it again would give the same result."""

    stage: str
    config: dict[str, Any]  # the parts of the configuration that the stage reads, by name
    code: dict[str, str]  # module or notebook -> hash of its code
    data: dict[str, str]  # source -> fingerprint
    parents: dict[str, str]  # stage -> hash of what this one takes from it
    versions: dict[str, str]
    seed: int

    @property
    def digest(self) -> str:
        """SHA-256 over all components."""
        return sha256_json(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """What run.json keeps: the digest and every component."""
        return {"digest": self.digest, **vars(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Fingerprint":
        """The fingerprint in a run.json. Raises RecordError if a component is missing or the digest is not theirs."""
        names = [entry.name for entry in fields(cls)]
        missing = [name for name in [*names, "digest"] if name not in values]
        if missing:
            raise RecordError(f"fingerprint without {', '.join(missing)}: run the stage again")
        fingerprint = cls(**{name: values[name] for name in names})
        if fingerprint.digest != values["digest"]:
            raise RecordError("fingerprint whose digest is not that of its components: run.json was changed by hand")
        return fingerprint

    def differences(self, other: "Fingerprint") -> list[str]:
        """What changed from this fingerprint to the other, one short line per input; empty when their digests agree.

        For example "config: sft.learning_rate 0.003 -> 0.001", "code: threefold.training.loop", "parent pretrain",
        "version torch 2.12 -> 2.13".
        """
        if self == other:
            return []

        def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
            for key in {**old, **new}:
                if key not in old or key not in new or old[key] != new[key]:
                    texts = (json.dumps(part[key]).strip('"') if key in part else "(none)" for part in (old, new))
                    yield key, " -> ".join(texts)

        lines = [f"stage {self.stage} -> {other.stage}"] if self.stage != other.stage else []
        lines += [f"config: {key} {values}" for key, values in changed(_flat(self.config), _flat(other.config))]
        code = [key for key, _ in changed(self.code, other.code)]
        lines += [f"code: {first_few(code, CODE_SHOWN)}"] if code else []
        lines += [f"data {key}" for key, _ in changed(self.data, other.data)]
        lines += [f"parent {key}" for key, _ in changed(self.parents, other.parents)]
        lines += [f"version {key} {values}" for key, values in changed(self.versions, other.versions)]
        lines += [f"seed {self.seed} -> {other.seed}"] if self.seed != other.seed else []
        return lines


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in _flat(item, f"{key}.{name}" if key else str(name)).items()}
    return {key: value}


# Code of notebooks --------------------------------------------------------------------------------------------------

MAGIC = re.compile(r"^\s*[%!?]")


def code_behind(path: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """{notebook or module of the packages: hash of its code}, of a notebook and everything that it imports. Comments,
    text cells and the parameters' values do not count: a parameter's value is part of the configuration.

    Raises MissingInput when there is no such notebook, ConfigError for a file that is not a notebook.
    """
    if not path.is_file():
        raise MissingInput(f"notebooks/{path.name} is not there: `make notebooks` writes it from notebooks/percent/")
    try:
        cells = read_notebook(path)["cells"]
    except RecordError as error:
        raise ConfigError(f"notebooks/{error}: `make notebooks` writes it again") from error
    modules, code = set(), []
    for cell in cells:
        if cell["cell_type"] != "code" or "parameters" in cell["metadata"].get("tags", []):
            continue
        try:
            tree = ast.parse("\n".join(line for line in cell["source"].split("\n") if not MAGIC.match(line)))
        except SyntaxError:
            code.append(cell["source"])  # the kernel will report what is wrong with it
            continue
        code.append(ast.dump(tree))
        modules.update(imports(tree))
    own = sha256_bytes("\n".join(code).encode())
    return {f"notebooks/{path.name}": own, **code_hashes(sorted(modules & module_files(packages).keys()), packages)}


# Surroundings -------------------------------------------------------------------------------------------------------


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of these distributions."""
    installed = {name: _version(name) for name in distributions}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **installed}


@lru_cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def hardware() -> dict[str, Any]:
    """The machine without its name: CPU model, cores this process may use, memory in GiB, GPUs.

    GPUs are those that torch sees; a process that has not loaded torch used none.
    """
    torch, cpuinfo = sys.modules.get("torch"), Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = torch.cuda.device_count() if torch is not None and torch.cuda.is_available() else 0
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": [torch.cuda.get_device_name(index) for index in range(gpus)],
    }


def threads() -> int:
    """Threads that torch splits its sums over in this process; 1 where it is not loaded."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else 1


def determinism(begun: Mapping[str, Any]) -> dict[str, Any]:
    """What repeating the work that this process completes gives on the same machine: {"device", "threads", "workers"
    (if several were used), "level"}.

    begun: run.json of the stage in progress, with the threads and workers of each attempt. fp32 sums are split over
    threads and over the processes that train together, so another number changes the last bits. Nothing here enables
    torch's deterministic algorithms: on a GPU the record says whether they were on. level: "bit-identical", or why not.
    """
    used, together = sorted(set(begun.get("threads", [threads()]))), sorted(set(begun.get("workers", [1])))
    made = {"device": "cpu", "threads": used, **({"workers": together} if together != [1] else {})}
    changed = [
        f"other {what} ({', '.join(map(str, numbers))})"
        for what, numbers in (("threads", used), ("workers", together))
        if len(numbers) > 1
    ]
    level = f"{RESUMED} {' and '.join(changed)}" if changed else "bit-identical"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        fixed = torch.are_deterministic_algorithms_enabled()
        level = level if fixed else "up to rounding: CUDA kernels that add in no fixed order are allowed"
        made |= {"device": "cuda", "deterministic_algorithms": fixed}
    return {**made, "level": level}


def git(root: Path, *arguments: str) -> str | None:
    """What a git command prints in the repository whose top folder is `root`; None where there is none, or it fails."""
    words = ["git", "-C", str(root)]
    try:
        done = [
            subprocess.run([*words, *asked], capture_output=True, text=True, check=False)
            for asked in (("rev-parse", "--show-toplevel"), arguments)
        ]
    except FileNotFoundError:
        return None
    top = done[0].stdout.rstrip("\n")
    same = done[0].returncode == 0 and Path(top).resolve() == root.resolve()
    return done[1].stdout.strip() if same and done[1].returncode == 0 else None


def git_state(root: Path) -> dict[str, Any]:
    """{"commit", "dirty"} of the repository whose top folder is `root`; both None where there is none."""
    changed = git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": git(root, "rev-parse", "HEAD"), "dirty": None if changed is None else changed != ""}
