"""Where a result comes from: hashes, fingerprints, atomic files, and the machine and versions behind a stage."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import psutil

from basics import paths
from basics.errors import RecordError
from basics.files import sha256_json
from basics.source_code import code_hashes

# Packages whose version can change a stage's numbers.
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "numpy", "pandas", "scipy")
OWN = ("basics", "papertrail", "study", "threefold")  # packages whose code counts in a fingerprint
CODE_SHOWN = 4  # modules named in one reason


# Surroundings -------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a stage's numbers."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """The machine without its name: CPU model, cores this process may use, memory in GiB, GPUs.

    GPUs are those that torch sees; a process that has not loaded torch used none.
    """
    torch = sys.modules.get("torch")
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpus,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def threads() -> int:
    """Threads that torch splits its sums over in this process; 1 where it is not loaded."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else 1


def determinism(used_threads: Iterable[int], used_workers: Iterable[int] = (1,)) -> dict[str, Any]:
    """What doing this process's work again on the same machine gives: {"device", "threads", "workers" (where there
    were several), "level"}.

    used_threads, used_workers: one number for each attempt that the work took; fp32 sums are split by thread, and over
    the processes that train together, so another number gives other last bits. Nothing here switches torch's
    deterministic algorithms on: on a GPU the record says whether they were. level: "bit-identical", or why not.
    """
    used, together = sorted(set(used_threads)), sorted(set(used_workers))
    workers = {"workers": together} if together != [1] else {}
    gone_on = [
        f"other {what} ({', '.join(map(str, numbers))})"
        for what, numbers in (("threads", used), ("workers", together))
        if len(numbers) > 1
    ]
    level = f"up to rounding: interrupted, and gone on with {' and '.join(gone_on)}" if gone_on else "bit-identical"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        fixed = torch.are_deterministic_algorithms_enabled()
        level = level if fixed else "up to rounding: CUDA kernels that add in no fixed order are allowed"
        return {"device": "cuda", "threads": used, **workers, "deterministic_algorithms": fixed, "level": level}
    return {"device": "cpu", "threads": used, **workers, "level": level}


def git_state() -> dict[str, Any]:
    """{"commit", "dirty"} of the project's own repository; both None where there is none (an unpacked archive)."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != paths.PROJECT:
        return {"commit": None, "dirty": None}
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changed is None else changed != ""}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(paths.PROJECT), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# Fingerprint --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fingerprint:
    """Everything a stage's result depends on; equal digests mean that running it again would make the same."""

    stage: str
    config: dict[str, Any]  # the preset's sections the stage reads, by name
    code: dict[str, str]  # module or notebook -> hash of its code
    data: dict[str, str]  # source -> fingerprint
    parents: dict[str, str]  # stage -> hash of what this one takes from it
    versions: dict[str, str]
    seed: int

    @classmethod
    def of(
        cls,
        stage: str,
        preset_sections: Mapping[str, Any],
        modules: tuple[str, ...],
        data: Mapping[str, str],
        parents: Mapping[str, str],
        seed: int,
    ) -> "Fingerprint":
        """The fingerprint of a stage about to run: code and versions are looked up here.

        `preset_sections`: name -> config dataclass, dict or scalar, e.g. {"model": preset.model, "sft": preset.sft}.
        """
        config = {name: asdict(part) if is_dataclass(part) else part for name, part in preset_sections.items()}
        config = json.loads(json.dumps(config, allow_nan=False))  # tuples become lists, as they come back from run.json
        return cls(stage, config, code_hashes(modules, OWN), dict(data), dict(parents), versions(), seed)

    @property
    def digest(self) -> str:
        """SHA-256 over all components."""
        return sha256_json(asdict(self))

    def to_dict(self) -> dict[str, Any]:
        """What run.json keeps: the digest and every component."""
        return {"digest": self.digest, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Fingerprint":
        """The fingerprint in a run.json. Raises RecordError if a component is missing or the digest is not theirs."""
        names = [entry.name for entry in fields(cls)]
        missing = [name for name in [*names, "digest"] if name not in values]
        if missing:
            raise RecordError(f"fingerprint without {', '.join(missing)}: the stage is to be run again")
        fingerprint = cls(**{name: values[name] for name in names})
        if fingerprint.digest != values["digest"]:
            raise RecordError("fingerprint whose digest is not that of its components: run.json was changed by hand")
        return fingerprint

    def differences(self, other: "Fingerprint") -> list[str]:
        """What changed from this fingerprint to the other, one short line an input; empty when their digests agree.

        For example "config: sft.learning_rate 0.003 -> 0.001", "code: threefold.training.loop", "parent pretrain",
        "version torch 2.12 -> 2.13".
        """
        lines = [f"stage {self.stage} -> {other.stage}"] if self.stage != other.stage else []
        lines += [
            f"config: {key} {old} -> {new}" for key, old, new in _changed(_flat(self.config), _flat(other.config))
        ]
        parts = [code if isinstance(code, Mapping) else {"code": code} for code in (self.code, other.code)]  # once one
        changed = [key for key, _, _ in _changed(*parts)]
        more = f" and {len(changed) - CODE_SHOWN} more" if len(changed) > CODE_SHOWN else ""
        lines += [f"code: {', '.join(changed[:CODE_SHOWN])}{more}"] if changed else []
        lines += [f"data {key}" for key, _, _ in _changed(self.data, other.data)]
        lines += [f"parent {key}" for key, _, _ in _changed(self.parents, other.parents)]
        lines += [f"version {key} {old} -> {new}" for key, old, new in _changed(self.versions, other.versions)]
        lines += [f"seed {self.seed} -> {other.seed}"] if self.seed != other.seed else []
        return lines


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in _flat(item, f"{key}.{name}" if key else str(name)).items()}
    return {key: value}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    def show(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key]).strip('"') if key in values else "(none)"

    absent = object()
    keys = [*old, *(key for key in new if key not in old)]
    return [(key, show(old, key), show(new, key)) for key in keys if old.get(key, absent) != new.get(key, absent)]
