"""Where data comes from: names of the registry, or own files, resolved to files or a hub data set and read into items.

A registered source is looked for in a local folder, then in the Hugging Face cache, then on the hub; embedded ones are
files of the project. A source that is nowhere is a SourceError that lists the three places and the way out without a
network; nothing is left out silently.

Hub commits are pinned: by `revision` in the registry, or by the first load, which records the commit it found in
`revisions.json` of the cache folder; later loads take that commit or say that they cannot.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from basics import paths
from basics.errors import DataError, SourceError
from basics.files import atomic_write, read_note, sha256_file, sha256_json, write_note
from threefold.config import SourceConfig
from threefold.data import readers

REGISTRY = paths.DATA / "sources.toml"
SHUFFLE_SEED = 0  # of sources marked `shuffle`: one order for everybody
REVISIONS = "revisions.json"  # in the cache folder; unlike what else is there nothing makes it again
HUB_TIMEOUT = 20  # seconds for the hub to name a commit
LARGE = 32 << 20  # bytes; the hash of a larger file is kept for its path, size and time
FORMS = ("parquet", "json", "csv", "text", "arrow")  # of a hub's data set: rows of values, nothing that could be code
SPLIT_NAMES = ("train", "validation", "valid", "dev", "test")


@dataclass(frozen=True)
class Source:
    """An entry of the registry; its keys are explained at the head of data/sources.toml."""

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
    local: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)

    @property
    def all_splits(self) -> list[str]:
        """Splits that some place can have."""
        return list(dict.fromkeys([*self.splits, *self.local]))


@dataclass(frozen=True)
class Resolved:
    """A source that was found.

    kind: "embedded", "local", "cache", "hub" or "own" (a path). files: what is read; none for the cache and hub, one
    folder for a local clone of the hub's repository. content: what the data is: a hash over the files' contents, or the
    hub's commit. revision: the hub's commit, "" for files.
    """

    name: str
    split: str
    kind: str
    files: tuple[Path, ...]
    content: str
    revision: str
    licence: str
    reader: str
    source: Source | None = None

    @property
    def shuffle(self) -> bool:
        """Whether items are taken in the fixed random order."""
        return self.source is not None and self.source.shuffle

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the content, the reader or the order of the items; where it was found does
        not count.
        """
        return sha256_json([self.content, self.reader, self.shuffle])


def registry() -> dict[str, Source]:
    """The registered sources by name. Raises SourceError for a registry that cannot be meant."""
    return dict(_registry(REGISTRY, REGISTRY.stat().st_mtime_ns if REGISTRY.is_file() else 0))


def find(name: str) -> Source:
    """The registered source of this name. Raises SourceError with the near miss and all names."""
    known = registry()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        names = ", ".join(entry.name for entry in known.values() if entry.kind == "dataset")
        raise SourceError(f"no source {name!r} in data/sources.toml.{hint} There are: {names}; own files go by `path`")
    return known[name]


def resolve(config: SourceConfig, data_dir: str | Path = "") -> Resolved:
    """Find a source without reading it. data_dir: a local data folder; default $THREEFOLD_DATA.

    Asks the hub only for a source that is in no other place, and then for its commit alone.
    Raises SourceError if the source, its split or the path is nowhere; ConfigError never: presets were checked.
    """
    if config.path:
        return _own(config, data_dir)
    source = find(config.source)
    if source.kind != "dataset":
        raise SourceError(f"source {source.name!r} is a {source.kind}, not a data set")
    if config.split not in source.all_splits:
        raise SourceError(
            f"source {source.name!r} has no split {config.split!r}; it has: {', '.join(source.all_splits)}"
        )
    reader = config.reader or source.reader
    _check_reader(reader)
    common = {
        "name": source.name,
        "split": config.split,
        "licence": source.licence,
        "reader": reader,
        "source": source,
    }
    if source.embedded:
        files = _split_files(paths.DATA, source, config.split)
        if not files:
            missing = ", ".join(source.local[config.split][0])
            raise SourceError(
                f"embedded source {source.name!r}, split {config.split!r}: data/{missing} is missing: "
                "restore it with `git checkout data/sample`"
            )
        return Resolved(kind="embedded", files=files, content=_content(files), revision="", **common)

    tried = []
    folder = local_folder(data_dir)
    if folder is None:
        tried.append("no local data folder was given")
    else:
        if files := _split_files(folder, source, config.split):
            return Resolved(kind="local", files=files, content=_content(files), revision="", **common)
        clone = folder / source.hub
        if source.hub and clone.is_dir() and config.split in source.splits:
            return Resolved(kind="local", files=(clone,), content=_content(_inside(clone)), revision="", **common)
        wanted = [" + ".join(part) for part in source.local.get(config.split, ())]
        tried.append(f"{folder} holds none of {', '.join([*wanted, f'{source.hub}/'])}")

    if config.split not in source.splits:
        tried.append(f"the hub's {source.hub} has no such split")
        raise SourceError(_nowhere(source, config.split, tried))
    commit = source.revision or recorded_commit(source.hub)
    cached = _cached_commits(source, config.split)
    if commit in cached or (cached and not commit):
        commit = commit or next(iter(cached))
        return Resolved(
            kind="cache", files=(), content=_hub_name(source, commit, config.split), revision=commit, **common
        )
    where = f"the Hugging Face cache has no {_hub_label(source)}"
    tried.append(where + (f" at commit {commit[:12]}, only {', '.join(c[:12] for c in cached)}" if cached else ""))
    try:
        commit = _hub_commit(source.hub, commit, "dataset")
    except SourceError as error:
        tried.append(str(error))
        raise SourceError(_nowhere(source, config.split, tried)) from error
    return Resolved(kind="hub", files=(), content=_hub_name(source, commit, config.split), revision=commit, **common)


def iterate(config: SourceConfig, data_dir: str | Path = "") -> Iterator[Any]:
    """The items of a source, one by one, as its reader gives them (`threefold.data.templates` has the shapes).

    `skip_examples` and `max_examples` count items; for the reader "reviews" the labelled reviews of which documents are
    then made. Raises SourceError as `resolve`, DataError for content that cannot be read and for a split without items.
    """
    resolved = resolve(config, data_dir)
    return _items(resolved, config)


def load(config: SourceConfig, data_dir: str | Path = "") -> list[Any]:
    """All items of a source, as `iterate`."""
    return list(iterate(config, data_dir))


def _items(resolved: Resolved, config: SourceConfig) -> Iterator[Any]:
    items = _read(resolved)
    if resolved.shuffle:
        everything = list(items)
        order = np.random.default_rng(SHUFFLE_SEED).permutation(len(everything))
        items = (everything[index] for index in order)
    end = None if config.max_examples < 0 else config.skip_examples + config.max_examples
    chosen = islice(items, config.skip_examples, end)
    if resolved.reader == "reviews":
        chosen = iter(readers.reviews(list(chosen)))
    first = next(chosen, None)
    if first is None:
        skipped = f" after skip_examples = {config.skip_examples}" if config.skip_examples else ""
        raise DataError(f"{resolved.name}, split {resolved.split!r}: no items{skipped}")
    yield first
    yield from chosen


def _read(resolved: Resolved) -> Iterator[Any]:
    if resolved.kind in ("cache", "hub"):
        return readers.read_items(resolved.reader, _hub_rows(resolved))
    if len(resolved.files) == 1 and resolved.files[0].is_dir():
        return readers.read_items(resolved.reader, _clone_rows(resolved))
    return readers.read_files(resolved.reader, resolved.files)


def gpt2_tokenizer_file(data_dir: str | Path = "") -> Path:
    """GPT-2's tokenizer.json: from a local folder, the Hugging Face cache or the hub. Raises SourceError."""
    source = find("gpt2-bpe")
    folder = local_folder(data_dir)
    tried = ["no local data folder was given"]
    if folder is not None:
        if files := _split_files(folder, source, "all"):
            return files[0]
        if (clone := folder / source.hub / "tokenizer.json").is_file():
            return clone
        tried = [f"{folder} holds neither gpt2-bpe/tokenizer.json nor {source.hub}/tokenizer.json"]
    import huggingface_hub

    revision = source.revision or recorded_commit(source.hub) or None
    try:
        file = huggingface_hub.hf_hub_download(source.hub, "tokenizer.json", revision=revision, local_files_only=True)
        return Path(file)
    except OSError:
        tried.append(f"the Hugging Face cache has no tokenizer.json of {source.hub}")
    try:
        commit = _hub_commit(source.hub, revision or "", "model")
        file = Path(huggingface_hub.hf_hub_download(source.hub, "tokenizer.json", revision=commit))
    except SourceError as error:
        raise SourceError(_nowhere(source, "", [*tried, str(error)])) from error
    except _network_errors() as error:
        raise SourceError(_nowhere(source, "", [*tried, f"the hub failed ({_said(error)})"])) from error
    record_commit(source.hub, commit)
    return file


# Folders --------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where derived data is kept between runs: $THREEFOLD_CACHE, or .cache in the runs folder."""
    return Path(os.environ.get("THREEFOLD_CACHE") or paths.RUNS / ".cache").resolve()


def local_folder(data_dir: str | Path = "") -> Path | None:
    """The local data folder: data_dir, or $THREEFOLD_DATA, or none. Raises SourceError if it is not a folder."""
    given = str(data_dir) or os.environ.get("THREEFOLD_DATA", "")
    if not given:
        return None
    folder = paths.expanded(given)
    if not os.path.isdir(folder):  # nor is what can be no name
        origin = "data_dir" if str(data_dir) else "$THREEFOLD_DATA"
        raise SourceError(f"{origin} = {given!r:.300}: no such folder")
    return folder.resolve()


def _split_files(folder: Path, source: Source, split: str) -> tuple[Path, ...]:
    """The files of the first alternative of a split that is all there."""
    for alternative in source.local.get(split, ()):
        found = [sorted(folder.glob(pattern)) for pattern in alternative]
        if all(found):
            return tuple(dict.fromkeys(path for part in found for path in part))
    return ()


def _own(config: SourceConfig, data_dir: str | Path) -> Resolved:
    given = paths.expanded(config.path)
    folder = None if given.is_absolute() else local_folder(data_dir)
    bases = [Path()] if given.is_absolute() else [*([folder] if folder else []), Path.cwd(), paths.PROJECT]
    if "\0" in config.path:
        raise SourceError(f"path {config.path!r}: no file has such a name")
    places = list(dict.fromkeys((base / given).resolve() for base in bases))
    try:
        path = next((place for place in places if place.exists()), None)
    except OSError as error:
        raise SourceError(f"path {config.path[:40]!r}...: {error.strerror}") from error
    if path is None:
        raise SourceError(f"path {config.path!r}: no such file or folder; looked for {', '.join(map(str, places))}")
    if not config.reader:
        raise SourceError(f"path {config.path!r} needs a reader: {', '.join(readers.READERS)}")
    _check_reader(config.reader)
    files = (path,) if path.is_file() else _folder_files(path, config.split)
    return Resolved(
        given.name, config.split, "own", files, _content(files), "", "not stated (own files)", config.reader
    )


def _folder_files(folder: Path, split: str) -> tuple[Path, ...]:
    """The data files of an own folder: those named after the split if files are named after splits, else all."""
    suffixes = (*readers.TABULAR, *readers.PLAIN)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path, folder)]
    files = [path for path in files if readers.suffix(path) in suffixes]
    if not files:
        raise SourceError(f"{folder}: no data file in it ({', '.join(suffixes)}, or those with .gz)")
    named = {path: name for path in files for name in SPLIT_NAMES if path.name.lower().startswith(name)}
    if not named:
        return tuple(files)
    chosen = tuple(path for path in files if path.name.lower().startswith(split.lower()))
    if not chosen:
        raise SourceError(
            f"{folder}: no file named after split {split!r}; there are {', '.join(path.name for path in files[:8])}"
        )
    return chosen


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def reread(resolved: Resolved) -> Resolved:
    """The same with every byte of its files hashed now, whatever their sizes and times say. What the hub's library
    prepared is known by its commit alone."""
    files = resolved.files
    if len(files) == 1 and files[0].is_dir():
        files = _inside(files[0])
    return replace(resolved, content=sha256_json([sha256_file(path) for path in files])) if files else resolved


def _inside(clone: Path) -> tuple[Path, ...]:
    return tuple(path for path in sorted(clone.rglob("*")) if path.is_file() and not _hidden(path, clone))


def _content(files: tuple[Path, ...]) -> str:
    """SHA-256 over the contents of the files, in their order; names and folders do not count."""
    return sha256_json([_file_hash(path) for path in files])


def _file_hash(path: Path) -> str:
    stat = path.stat()
    if stat.st_size < LARGE:
        return _hash(path, stat.st_size, stat.st_mtime_ns)
    kept = cache_folder() / "hashes" / f"{sha256_json([str(path), stat.st_size, stat.st_mtime_ns])}.json"
    known = read_note(kept)
    if known is None:
        known = {"sha256": _hash(path, stat.st_size, stat.st_mtime_ns)}
        write_note(kept, known)
    return known["sha256"]


@lru_cache(maxsize=4096)
def _hash(path: Path, _size: int, _mtime_ns: int) -> str:
    return sha256_file(path)


# The registry -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _registry(file: Path, _mtime_ns: int) -> dict[str, Source]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{file} is missing: the registry of data sources comes with the project") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: {error}") from error
    allowed = {entry.name: entry for entry in fields(Source)}
    sources = {}
    for name, table in tables.items():
        for key in table:
            if key not in allowed or key == "name":
                near = difflib.get_close_matches(key, allowed, n=1)
                raise SourceError(
                    f"{file}: {name}.{key}: no such key" + (f"; did you mean {near[0]!r}?" if near else "")
                )
        for key in ("licence", "use"):
            if key not in table:
                raise SourceError(f"{file}: {name}: {key} is missing")
        if table.get("kind", "dataset") == "dataset":
            _check_reader(table.get("reader", ""), f"{file}: {name}.reader")
        local = {
            split: tuple(tuple(part) for part in alternatives) for split, alternatives in table.get("local", {}).items()
        }
        sources[name] = Source(**{**table, "name": name, "local": local})
    return sources


def _check_reader(reader: str, where: str = "reader") -> None:
    if reader not in readers.READERS:
        near = difflib.get_close_matches(reader, readers.READERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SourceError(f"{where}: no reader {reader!r}.{hint} There are: {', '.join(readers.READERS)}")


# The hub --------------------------------------------------------------------------------------------------------------


def _hub_label(source: Source) -> str:
    return f"{source.hub}, config {source.config}" if source.config else source.hub


def _hub_name(source: Source, commit: str, split: str) -> str:
    return f"hub:{source.hub}@{commit}:{source.config or 'default'}:{source.splits[split]}"


def _nowhere(source: Source, split: str, tried: list[str]) -> str:
    what = f"source {source.name!r}" + (f", split {split!r}" if split else "")
    kind = " --repo-type dataset" if source.kind == "dataset" else ""
    return (
        f"{what} was found in none of its places: "
        + "; ".join(f"({number}) {place}" for number, place in enumerate(tried, start=1))
        + f". Without a network: run `hf download {source.hub}{kind} --local-dir DATA/{source.hub}` elsewhere, "
        "bring the folder DATA here and give it as --data-dir DATA or in THREEFOLD_DATA"
    )


def _cached_commits(source: Source, split: str) -> dict[str, Path]:
    """{commit: folder} of the data set's prepared copies in the Hugging Face cache that hold the split, newest
    first.
    """
    import datasets

    owner, _, name = source.hub.rpartition("/")
    label = "___".join([*([owner] if owner else []), datasets.naming.camelcase_to_snakecase(name)])
    base = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / label / (source.config or "default")
    folders = [folder for folder in base.glob("*/*") if folder.is_dir() and _arrow_files(folder, source.splits[split])]
    return {folder.name: folder for folder in sorted(folders, key=lambda folder: -folder.stat().st_mtime)}


def _arrow_files(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a split in a prepared data set: one, or all of its numbered shards."""
    shards = sorted(folder.glob(f"*-{split}-[0-9]*-of-[0-9]*.arrow"))
    if shards:
        count = int(shards[0].stem.rpartition("-of-")[2])
        return shards if len(shards) == count else []
    return sorted(folder.glob(f"*-{split}.arrow"))[:1]


def _hub_rows(resolved: Resolved) -> Iterator[readers.Row]:
    import datasets

    source = resolved.source
    label = f"{resolved.name} ({_hub_label(source)}), split {resolved.split!r}"
    split = source.splits[resolved.split]
    if resolved.kind == "cache":
        folder = _cached_commits(source, resolved.split)[resolved.revision]
        parts = [datasets.Dataset.from_file(str(file)) for file in _arrow_files(folder, split)]
        rows = datasets.concatenate_datasets(parts)
    else:
        rows = _load_dataset(source.hub, source.config, split, resolved.revision, label)
    record_commit(source.hub, resolved.revision)
    return _numbered(rows, label)


def _clone_rows(resolved: Resolved) -> Iterator[readers.Row]:
    source = resolved.source
    label = f"{resolved.name} ({resolved.files[0]}), split {resolved.split!r}"
    return _numbered(
        _load_dataset(str(resolved.files[0]), source.config, source.splits[resolved.split], "", label), label
    )


def _load_dataset(hub_or_folder: str, config: str, split: str, revision: str, label: str) -> Any:
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # an executed notebook is no place for them
    try:
        builder = datasets.load_dataset_builder(hub_or_folder, config or None, revision=revision or None)
        form = type(builder).__module__.rpartition(".")[2]
        if form not in FORMS:
            raise SourceError(f"{label}: files of the form {form!r} are not read; allowed: {', '.join(FORMS)}")
        return datasets.load_dataset(hub_or_folder, config or None, split=split, revision=revision or None)
    except (*_network_errors(), ValueError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(f"{label}: datasets could not load it ({_said(error)})") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _numbered(rows: Any, label: str) -> Iterator[readers.Row]:
    for number, row in enumerate(rows, start=1):
        yield readers.Row(row, f"{label}: row {number}")


@lru_cache(maxsize=64)
def _hub_commit(hub: str, revision: str, kind: str) -> str:
    """The commit a revision stands for on the hub, "" being its main branch. Raises SourceError if the hub is not
    there.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    info = api.dataset_info if kind == "dataset" else api.model_info
    try:
        return info(hub, revision=revision or None, timeout=HUB_TIMEOUT).sha
    except _network_errors() as error:
        at = f" at {revision[:12]}" if revision else ""
        raise SourceError(f"the hub did not give {hub}{at} ({_said(error)})") from error


def _network_errors() -> tuple[type[Exception], ...]:
    """What a failed request to the hub raises: the hub's own errors, its HTTP library's (their base) and the
    system's.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def _said(error: BaseException) -> str:
    """An error's first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# Commits --------------------------------------------------------------------------------------------------------------


def _revisions_file() -> Path:
    return cache_folder() / REVISIONS


def _recorded() -> dict[str, str]:
    """{hub id: commit of the first load}."""
    file = _revisions_file()
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: not JSON ({error}): mend it, or remove it to record commits anew") from error
    if not isinstance(recorded, dict) or not all(isinstance(commit, str) for commit in recorded.values()):
        raise SourceError(f"{file}: expected an object of hub id to commit: mend it, or remove it to record anew")
    return recorded


def recorded_commit(hub: str) -> str:
    """The commit of the first load of something on the hub that names none; "" before it. Raises SourceError for a
    record that cannot be read."""
    return _recorded().get(hub, "")


def record_commit(hub: str, commit: str) -> None:
    """Record the commit of a first load."""
    recorded = _recorded()
    if hub not in recorded:
        atomic_write(_revisions_file(), json.dumps({**recorded, hub: commit}, indent=2, sort_keys=True) + "\n")
