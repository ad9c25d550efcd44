"""Names in files and messages: which are allowed, which one was probably meant, and how a value is quoted."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from basics.errors import ConfigError

LARGEST_INTEGER = 2**63 - 1  # TOML's

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_NAME = 100  # files are named after it, with up to 60 characters more; a file system takes 255
_WINDOWS = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))}
_REPLICATE = re.compile(r"(.+)-seed([2-9]|[1-9][0-9]{1,5})")  # replicates count from 1, which has no suffix


def check_name(name: str, what: str) -> str:
    """Return the name if it is a valid file name everywhere and cannot leave its folder. Raises ConfigError."""
    device = name.partition(".")[0].upper() in _WINDOWS
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME or name.endswith(".") or device:
        raise ConfigError(
            f"{what} {shown(name)}: a name has only A-Z a-z 0-9 . _ -, at most {_LONGEST_NAME} of them, starts with a "
            "letter or digit, does not end in a dot and is none that Windows keeps for a device (CON, NUL, ...)"
        )
    return name


def near_miss(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name most similar to this one, or None when none is similar enough."""
    return next(iter(difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)), None)


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`, did you mean ...?` with the near miss, for the end of a message; empty when there is none."""
    miss = near_miss(name, allowed)
    return f", did you mean {miss}?" if miss else ""


def first_few(names: Sequence[str], most: int) -> str:
    """The first of these names and how many more there are: "a, b and 3 more"."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def shown(value: Any) -> str:
    """A value as an error message quotes it: as it is written, cut after 60 characters."""
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return f"a number of {value.bit_length()} bits"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def replicate_name(name: str, replicate: int) -> str:
    """The name of a stage, model or notebook in a replicate: ("sft", 2) -> "sft-seed2"; the first keeps its name."""
    return name if replicate == 1 else f"{name}-seed{replicate}"


def replicate_of(name: str) -> tuple[str, int]:
    """The inverse of `replicate_name`: "sft-seed2" -> ("sft", 2), "sft" -> ("sft", 1)."""
    match = _REPLICATE.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 1)
