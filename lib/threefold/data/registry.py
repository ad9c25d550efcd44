"""The registry of data sources, data/sources.toml."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

from basics import paths
from basics.errors import SourceError
from basics.names import did_you_mean
from threefold.data import readers

REGISTRY = paths.DATA / "sources.toml"


@dataclass(frozen=True)
class Source:
    """An entry of the registry; the head of data/sources.toml explains its keys."""

    name: str
    licence: str
    use: str
    reader: str = ""
    kind: str = "dataset"
    hub: str = ""
    config: str = ""
    revision: str = ""
    homepage: str = ""
    shuffle: bool = False
    embedded: bool = False
    splits: Mapping[str, str] = field(default_factory=dict)
    local: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

    @property
    def all_splits(self) -> list[str]:
        """Splits that the hub or a local folder can have."""
        return list(dict.fromkeys([*self.splits, *self.local]))


def registry() -> dict[str, Source]:
    """The registered sources by name. Raises SourceError for an invalid registry."""
    return read_registry(REGISTRY)


@lru_cache(maxsize=4)
def read_registry(file: Path) -> dict[str, Source]:
    """The sources of a registry file by name. Raises SourceError that names the file and key."""
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{file} is missing: the registry of data sources comes with the project") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: {error}") from error
    allowed = {entry.name for entry in fields(Source)} - {"name"}
    for name, table in tables.items():
        for key in table:
            if key not in allowed:
                raise SourceError(f"{file}: {name}.{key}: no such key{did_you_mean(key, allowed)}")
        for key in ("licence", "use"):
            if key not in table:
                raise SourceError(f"{file}: {name}: {key} is missing")
        if table.get("kind", "dataset") == "dataset":
            check_reader(table.get("reader", ""), f"{file}: {name}.reader")
    return {name: Source(name=name, **table) for name, table in tables.items()}


def find(name: str) -> Source:
    """The registered source of this name. Raises SourceError with the most similar name and all names."""
    known = registry()
    if name not in known:
        names = ", ".join(entry.name for entry in known.values() if entry.kind == "dataset")
        raise SourceError(
            f"no source {name!r} in data/sources.toml{did_you_mean(name, known)}: allowed are {names}; "
            "name own files by `path`"
        )
    return known[name]


def check_reader(reader: str, where: str = "reader") -> None:
    """Raise SourceError for a name that no reader has."""
    if reader not in readers.READERS:
        near = did_you_mean(reader, readers.READERS)
        raise SourceError(f"{where}: no reader {reader!r}{near}: allowed are {', '.join(readers.READERS)}")
