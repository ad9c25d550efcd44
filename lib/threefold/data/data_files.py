"""Which files of a folder are data, and which of them belong to a split.

Names decide, in the manner of `datasets`' data_files resolution: a split is named by a word between delimiters in the
name of a file or of a folder above it (`test/part-1.jsonl`, `myData.train.txt`, but not `testament.txt`), or by the
data card at the top of the folder (README.md, `configs`). Where `datasets` guesses, a SourceError names the files.
"""

import fnmatch
import os
import re
from pathlib import Path

import yaml

from basics.errors import SourceError
from basics.names import first_few
from threefold.data.rows import PLAIN, TABULAR, suffix

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ENDINGS = ("", "set", "data", "split")  # of a split's word: "trainset", "testdata"
SPLIT_OF = {word + ending: name for name, words in SPLIT_WORDS.items() for word in words for ending in ENDINGS}
HIDDEN = (".", "__", "~")  # "~$notes.txt" is the lock of an office program
CACHES = ("cache", "caches")
OTHER_PACKING = (".bz2", ".xz", ".zst", ".lz4")  # not read; a file packed so must not go unnoticed
NOT_DATA = re.compile(  # stems of files that describe data
    r"(readme|licen[cs]e|copying)([-_.]\w{1,12})?|notice|citation|authors|contributors|contributing|code_of_conduct|"
    r"changelog|changes|security|acknowledge?ments|credits|disclaimer|terms|datasheet|(data|dataset|model)_?card|"
    r"dataset_infos?|dataset_dict|state|config|metadata|croissant|datapackage|requirements|manifest|(md5|sha\d+)sums?|"
    r"checksums?",
    re.IGNORECASE,
)
WAY_OUT = "name the files by `path`, which may be a pattern such as 'books/*.txt'"


def files_in(folder: Path) -> list[Path]:
    """The files under a folder, sorted; links are followed. Hidden files, caches and what begins with `__` are left
    out, as `datasets` does. Raises SourceError for a link to nothing."""
    files, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN) and name not in CACHES)
        files += [Path(root, name) for name in names if not name.startswith(HIDDEN)]
    for path in files:
        if not path.exists():
            raise SourceError(f"{path}: a link to a file that does not exist ({os.readlink(path)})")
    return sorted(path for path in files if path.is_file())


def select(folder: Path, split: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """(the data files of a split, sorted; the names of those left out, with the reason). If no file names a split, all
    files belong to it.

    Raises SourceError if there are none, or if the names do not say which are meant.
    """
    every = files_in(folder)
    packed = [path for path in every if path.suffix in OTHER_PACKING and path.with_suffix("") not in every]
    unpacked = {path: path.with_suffix("") if path in packed else path for path in every}
    readable = [path for path in every if suffix(unpacked[path]) in (*TABULAR, *PLAIN)]
    data = [path for path in readable if not NOT_DATA.fullmatch(path.name.partition(".")[0])]
    data = data or [path for path in readable if suffix(path) in PLAIN]
    if not data:
        there = f"; there are {_names(folder, every)}" if every else ""
        raise SourceError(f"{folder}: no data file in it ({', '.join((*TABULAR, *PLAIN))}, or those with .gz){there}")
    reasons = {path: "no data" for path in every if path not in data}
    chosen = _of_split(folder, data, split)
    if unread := [path for path in chosen if path in packed]:
        raise SourceError(f"{folder}: {_names(folder, unread)} cannot be read: unpack it, or pack it with gzip")
    reasons |= {path: f"not of split {split}" for path in data if path not in chosen}
    if any(suffix(path) in TABULAR for path in chosen):
        reasons |= {path: "text beside tables" for path in chosen if suffix(path) in PLAIN}
    elif any(suffix(path) != ".md" for path in chosen):
        reasons |= {path: "Markdown beside text" for path in chosen if suffix(path) == ".md"}
    chosen = [path for path in chosen if path not in reasons]
    forms = sorted({suffix(path) for path in chosen})
    if len(forms) > 1:
        raise SourceError(f"{folder}: split {split!r} has files of several forms ({', '.join(forms)}): {WAY_OUT}")
    if twice := [path for path in chosen if path.suffix == ".gz" and path.with_suffix("") in chosen]:
        raise SourceError(f"{folder}: {_names(folder, twice)} is there unpacked, too: remove one, or {WAY_OUT}")
    return tuple(chosen), tuple(f"{_name(folder, path)} ({reason})" for path, reason in sorted(reasons.items()))


def _of_split(folder: Path, data: list[Path], split: str) -> list[Path]:
    """Those of the data files that the card or their names give to a split."""
    canonical = SPLIT_OF.get(split.lower(), split)
    declared = _declared(folder, data)
    if declared is not None:
        if not (chosen := declared.get(split) or declared.get(canonical)):
            raise SourceError(f"{folder}: its card declares no split {split!r}, only {', '.join(declared)}")
        return chosen
    splits = {path: _splits(path.relative_to(folder), canonical) for path in data}
    if not any(splits.values()):
        return data
    chosen = [path for path in data if canonical in splits[path]]
    if not chosen:
        raise SourceError(f"{folder}: no file named after split {split!r}; there are {_names(folder, data)}")
    if several := [path for path in chosen if len(splits[path]) > 1]:
        names = " and ".join(sorted(splits[several[0]]))
        raise SourceError(f"{folder}: {_names(folder, several)} is named after {names}: {WAY_OUT}")
    forms = {suffix(path) for path in data if splits[path]}
    if unnamed := [path for path in data if not splits[path] and suffix(path) in forms]:
        raise SourceError(
            f"{folder}: {_names(folder, chosen)} is named after split {split!r}, and {_names(folder, unnamed)} after "
            f"none: {WAY_OUT}, or put each split into a folder of its name"
        )
    return chosen


def _splits(path: Path, asked: str) -> set[str]:
    """The splits that a relative path names. A part that names exactly one outweighs one that names several."""
    parts = []
    for part in path.parts:
        words = re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", part)  # "myTest.txt": my, Test, txt
        named = {SPLIT_OF[word.lower()] for word in words if word.lower() in SPLIT_OF}
        if asked not in SPLIT_WORDS and re.search(rf"(?<![^\W\d_]){re.escape(asked)}(?![^\W\d_])", part, re.IGNORECASE):
            named = {asked}
        parts.append(named)
    return set().union(*(named for named in parts if len(named) == 1)) or set().union(*parts)


def _declared(folder: Path, data: list[Path]) -> dict[str, list[Path]] | None:
    """{split: files} of the data card's one or default configuration; None if it declares none."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        configs = (metadata_load(card) or {}).get("configs") if card.is_file() else None
    except (ValueError, yaml.YAMLError):  # a README that is not a data card
        return None
    configs = [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []
    default = [entry for entry in configs if entry.get("default") is True or entry.get("config_name") == "default"]
    if len(configs) > 1 and not default:
        names = ", ".join(str(entry.get("config_name")) for entry in configs)
        raise SourceError(f"{folder}: its card has several configurations ({names}): {WAY_OUT}")
    config = (default or configs or [{}])[0]
    if not config.get("data_files"):
        return None
    from datasets.data_files import sanitize_patterns

    try:
        patterns = sanitize_patterns(config["data_files"])
    except (ValueError, TypeError) as error:
        raise SourceError(f"{card}: its data_files cannot be read: {error}") from error
    patterns = {name: [str(part).removeprefix("./") for part in parts] for name, parts in patterns.items()}
    return {
        name: [path for path in data if any(fnmatch.fnmatch(_name(folder, path), part) for part in parts)]
        for name, parts in patterns.items()
    }


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _names(folder: Path, paths: list[Path]) -> str:
    return first_few([_name(folder, path) for path in paths], 8)
