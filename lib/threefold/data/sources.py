"""Data sources: names of the registry and own files, resolved to files or a hub data set and read into items.

A registered source is looked for in a local folder, then in the Hugging Face cache, then on the hub; embedded sources
are files of the project. If a source is in none of these places, a SourceError lists them and says how to proceed
without a network. No source is ever left out silently.
"""

import glob
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from basics import paths
from basics.errors import DataError, SourceError
from basics.files import refuse_pointer, sha256_cached, sha256_file, sha256_json
from threefold.config import SourceConfig
from threefold.data import hub, readers
from threefold.data.data_files import files_in, select
from threefold.data.registry import Source, check_reader, find
from threefold.data.rows import TABULAR, Row, read_rows, suffix
from threefold.data.templates import REVIEWS

SHUFFLE_SEED = 0  # of sources marked `shuffle`: the same order for every run
MOST_ODD = 0.01  # the largest share of odd rows in a source
PROGRESS_EVERY = 30  # seconds between messages while a source is read

_ROWS_OF: dict[tuple, int] = {}  # rows of the parts of sources that this process has read to the end


@dataclass(frozen=True)
class Resolved:
    """A source and the place where it was found.

    kind: "embedded", "local", "cache", "hub" or "own" (a path). files: the files to read; none for the cache and the
    hub, one folder for a local clone of the hub's repository. content: a hash over the files' contents, or the hub's
    commit. revision: the hub's commit, "" for files. names: the files as they are shown, without the folders above
    them. left_out: files of an own folder that are not read, with the reason.
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
    names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def shuffle(self) -> bool:
        """Whether items are taken in the fixed random order."""
        return self.source is not None and self.source.shuffle

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, the reader and the order of items; it does not depend on the place."""
        return sha256_json([self.content, self.reader, self.shuffle])


# Resolving ------------------------------------------------------------------------------------------------------------


def resolve(config: SourceConfig, data_dir: str | Path = "") -> Resolved:
    """Find a source without reading it. data_dir: a local data folder; default $THREEFOLD_DATA.

    Asks the hub only for a source that is in no other place, and only for its commit.
    Raises SourceError if the source, its split or the path is in none of the places.
    """
    if config.path:
        return _resolve_path(config, data_dir)
    source, split = find(config.source), config.split
    if source.kind != "dataset":
        raise SourceError(f"source {source.name!r} is a {source.kind}, not a data set")
    if split not in source.all_splits:
        raise SourceError(f"source {source.name!r} has no split {split!r}; it has: {', '.join(source.all_splits)}")
    reader = config.reader or source.reader
    check_reader(reader)

    def resolved(kind: str, files: tuple[Path, ...] = (), folder: Path = paths.DATA, commit: str = "") -> Resolved:
        on_hub = f"hub:{source.hub}@{commit}:{source.config or 'default'}:{source.splits.get(split)}"
        names = tuple(file.relative_to(folder).as_posix() for file in files)
        content = _content(files) if files else on_hub
        return Resolved(source.name, split, kind, files, content, commit, source.licence, reader, source, names)

    if source.embedded:
        if files := _local_files(paths.DATA, source, split):
            return resolved("embedded", files)
        raise SourceError(
            f"embedded source {source.name!r}, split {split!r}: data/{', '.join(source.local[split][0])} is missing: "
            "restore it with `git checkout data/sample`"
        )
    folder = local_folder(data_dir)
    if folder and (files := _local_files(folder, source, split)):
        return resolved("local", files, folder)
    places = [_not_local(folder, source, split)]
    if split not in source.splits:
        raise _not_found(source, split, [*places, f"the hub's {source.hub} has no such split"])
    commit = source.revision or hub.recorded_commit(source.hub)
    copy = hub.cached(source.hub, source.config, commit)
    if copy and source.splits[split] in copy.info.splits:
        return resolved("cache", commit=copy.hash)
    if _read_in_part(source, config) and hub.files_are_known(source.hub, source.config, source.splits[split], commit):
        return resolved("cache", commit=commit)
    other = hub.cached(source.hub, source.config) if commit else None
    cache = f"the Hugging Face cache has no {_hub_label(source)}"
    places.append(cache + (f" at commit {commit[:12]}, only {other.hash[:12]}" if other else ""))
    try:
        return resolved("hub", commit=hub.resolve_commit(source.hub, commit))
    except SourceError as error:
        raise _not_found(source, split, [*places, str(error)]) from error


def reread(resolved: Resolved) -> Resolved:
    """The same with all bytes of its files hashed again, without hashes kept from earlier runs. What the hub's library
    prepared is identified by its commit only.
    """
    return replace(resolved, content=_content(resolved.files, sha256_file)) if resolved.files else resolved


def local_folder(data_dir: str | Path = "") -> Path | None:
    """The local data folder: data_dir, or $THREEFOLD_DATA, or none. Raises SourceError if it is not a folder."""
    given = str(data_dir) or os.environ.get("THREEFOLD_DATA", "")
    if not given:
        return None
    folder = os.path.expanduser(given)
    if not os.path.isdir(folder):  # False, too, for a string that cannot be a path
        origin = "data_dir" if str(data_dir) else "$THREEFOLD_DATA"
        raise SourceError(f"{origin} = {given!r:.300}: no such folder")
    return Path(folder).resolve()


def _local_files(folder: Path, source: Source, split: str) -> tuple[Path, ...]:
    """The first alternative of a split of which all files exist, or the folder of a clone of the hub's repository."""
    for alternative in source.local.get(split, ()):
        matches = [sorted(folder.glob(pattern)) for pattern in alternative]
        if all(matches):
            return tuple(dict.fromkeys(path for part in matches for path in part))
    clone = folder / source.hub
    return (clone,) if source.hub and split in source.splits and clone.is_dir() else ()


def _not_local(folder: Path | None, source: Source, split: str) -> str:
    if folder is None:
        return "no local data folder was given"
    alternatives = [" + ".join(alternative) for alternative in source.local.get(split, ())]
    return f"{folder} holds none of {', '.join([*alternatives, f'{source.hub}/'])}"


def _not_found(source: Source, split: str, places: list[str]) -> SourceError:
    what = f"source {source.name!r}" + (f", split {split!r}" if split else "")
    kind = " --repo-type dataset" if source.kind == "dataset" else ""
    return SourceError(
        f"{what} was found in none of its places: "
        + "; ".join(f"({number}) {place}" for number, place in enumerate(places, start=1))
        + f". Without a network: run `hf download {source.hub}{kind} --local-dir DATA/{source.hub}` elsewhere, "
        "bring the folder DATA here and give it as --data-dir DATA or in THREEFOLD_DATA"
    )


def _hub_label(source: Source) -> str:
    return f"{source.hub}, config {source.config}" if source.config else source.hub


def _resolve_path(config: SourceConfig, data_dir: str | Path) -> Resolved:
    """Own files: a file, the files of a folder that belong to the split, or those that a pattern matches."""
    given = os.path.expanduser(config.path)
    folder = None if os.path.isabs(given) else local_folder(data_dir)
    bases = [base for base in (folder, Path.cwd(), paths.PROJECT) if base]
    places = list(dict.fromkeys(base / given for base in bases))
    try:
        path = next((place for place in places if os.path.exists(place)), None)
        matches = ([base / name for name in glob.glob(given, root_dir=base, recursive=True)] for base in bases)
        files = () if path else tuple(sorted(next(filter(None, matches), [])))
    except (OSError, ValueError, re.error) as error:
        raise SourceError(f"path {config.path[:40]!r}: no file has such a name ({error})") from error
    files = tuple(file for file in files if file.is_file())
    if path is None and not files:
        raise SourceError(f"path {config.path!r}: no such file or folder; looked for {', '.join(map(str, places))}")
    if path is not None and not (path.is_file() or path.is_dir()):
        raise SourceError(f"path {config.path!r}: a pipe or device, expected a file or folder")
    if not config.reader:
        raise SourceError(f"path {config.path!r} needs a reader: {', '.join(readers.READERS)}")
    check_reader(config.reader)
    if path is not None and path.is_dir():
        files, left_out = select(path, config.split)
        names = tuple(file.relative_to(path).as_posix() for file in files)
    else:
        files, left_out = files or (path,), ()
        names = tuple(file.name for file in files)
    name, licence, content = Path(given).name, "not stated (own files)", _content(files)
    return Resolved(name, config.split, "own", files, content, "", licence, config.reader, None, names, left_out)


def _content(files: tuple[Path, ...], digest: Callable[[Path], str] = sha256_cached) -> str:
    """SHA-256 over the contents of files, in their order, and of the files in folders; names do not count."""
    every = [file for path in files for file in (files_in(path) if path.is_dir() else [path])]
    try:
        for file in every:
            refuse_pointer(file)
        return sha256_json([digest(file) for file in every])
    except OSError as error:
        raise SourceError(f"{error.filename or file}: cannot be read ({error.strerror or error})") from error


# Reading --------------------------------------------------------------------------------------------------------------


def iterate(config: SourceConfig, data_dir: str | Path = "") -> Iterator[Any]:
    """The items of a source, one by one, in the shapes that `threefold.data.templates` lists.

    `skip_examples` and `max_examples` count rows, odd ones included (see `odd_rows`); for the readers of reviews they
    count the labelled reviews that the documents are then made of. Raises SourceError as `resolve`, DataError for
    unreadable content, an empty split, or too many odd rows.
    """
    resolved = resolve(config, data_dir)
    rows = _with_progress(_rows(resolved, config), resolved, config)
    selected = (row for row in rows if not isinstance(row, readers.OddRow))
    if resolved.reader in REVIEWS:
        selected = iter(readers.reviews(list(selected), reader=resolved.reader))
    empty = True
    for item in selected:
        empty = False
        yield item
    if empty:
        skipped = f" after skip_examples = {config.skip_examples}" if config.skip_examples else ""
        raise DataError(f"{resolved.name}, split {resolved.split!r}: no items{skipped}")


def load(config: SourceConfig, data_dir: str | Path = "") -> list[Any]:
    """All items of a source, as `iterate`."""
    return list(iterate(config, data_dir))


def odd_rows(config: SourceConfig, data_dir: str | Path = "") -> dict[str, int]:
    """{reason: rows that are left out for it} of the part of a source that is used. Reads a source of preferences; the
    other readers leave no row out."""
    resolved = resolve(config, data_dir)
    if resolved.reader != "preferences":
        return {}
    return dict(Counter(row.reason for row in _rows(resolved, config) if isinstance(row, readers.OddRow)))


def _rows(resolved: Resolved, config: SourceConfig) -> Iterator[Any]:
    """The items and odd rows of the part of a source that is used."""
    if resolved.files and not resolved.files[0].is_dir():
        items = readers.read_files(resolved.reader, resolved.files)
    else:
        items = readers.read_items(resolved.reader, _dataset_rows(resolved, config))
    end = None if config.max_examples < 0 else config.skip_examples + config.max_examples
    if not resolved.shuffle:
        return _few_odd(resolved, islice(items, config.skip_examples, end))
    import numpy as np  # late, as in `readers.reviews`: `threefold status` does not wait for it

    everything = list(_few_odd(resolved, items))
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(everything))
    return (everything[index] for index in order[config.skip_examples : end])


def _with_progress(rows: Iterator[Any], resolved: Resolved, config: SourceConfig) -> Iterator[Any]:
    """The same rows. Prints how many were read, at what rate, every PROGRESS_EVERY seconds, and the time left where
    `max_examples` or an earlier pass says how many there are."""
    part = (resolved.fingerprint, config.skip_examples, config.max_examples)
    total = _ROWS_OF.get(part, config.max_examples)
    number, started = 0, time.monotonic()
    last = started
    for row in rows:
        yield row
        number, now = number + 1, time.monotonic()
        if now - last >= PROGRESS_EVERY:
            rate, last = number / max(now - started, 1e-9), now
            of = f" of {total:,} rows, {(total - number) / rate:,.0f} s left" if total >= number else " rows"
            print(f"{resolved.name}, split {resolved.split!r}: {number:,}{of} ({rate:,.0f} rows/s)", flush=True)
    _ROWS_OF[part] = number


def _few_odd(resolved: Resolved, items: Iterator[Any]) -> Iterator[Any]:
    """The same items. Raises DataError at their end if more than MOST_ODD of them are odd rows."""
    odd: list[readers.OddRow] = []
    number = 0
    for item in items:
        number += 1
        if isinstance(item, readers.OddRow):
            odd.append(item)
        yield item
    if len(odd) > MOST_ODD * number:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in Counter(row.reason for row in odd).items())
        raise DataError(
            f"{odd[0].place}: {odd[0].reason}; {len(odd):,} of {number:,} rows of {resolved.name} are odd ({reasons}), "
            f"more than {MOST_ODD:.0%}: correct or remove them"
        )


def _dataset_rows(resolved: Resolved, config: SourceConfig) -> Iterator[Row]:
    """The rows of a data set on the hub, in the Hugging Face cache, or in a local clone of its repository."""
    source, commit = resolved.source, resolved.revision
    place = str(resolved.files[0]) if resolved.files else _hub_label(source)
    label = f"{resolved.name} ({place}), split {resolved.split!r}"
    location = str(resolved.files[0]) if resolved.files else source.hub
    split = source.splits[resolved.split]
    copy = hub.cached(source.hub, source.config, commit) if resolved.kind == "cache" else None
    if commit and copy is None and _read_in_part(source, config):
        names = hub.files(source.hub, source.config, split, commit, label)
        hub.record_commit(source.hub, commit)
        if len(names) > 1 and all(suffix(Path(name)) in TABULAR for name in names):
            # a file is downloaded when its first row is asked for
            return (row for name in names for row in read_rows(hub.download(source.hub, name, commit, label)))
    rows = hub.load(location, source.config, split, commit, label, copy)
    if commit:
        hub.record_commit(source.hub, commit)
    return (Row(row, f"{label}: row {number}") for number, row in enumerate(rows, start=1))


def rows_needed(source: Source, config: SourceConfig) -> int:
    """How many rows of a data set of the hub are downloaded at least, -1 for all of them."""
    return config.skip_examples + config.max_examples if _read_in_part(source, config) else -1


def _read_in_part(source: Source, config: SourceConfig) -> bool:
    """Whether a source of the hub need not be downloaded whole."""
    return config.max_examples >= 0 and not source.shuffle and source.config != "*"


def gpt2_tokenizer_file(data_dir: str | Path = "") -> Path:
    """GPT-2's tokenizer.json: from a local folder, the Hugging Face cache or the hub. Raises SourceError."""
    import huggingface_hub

    source = find("gpt2-bpe")
    folder = local_folder(data_dir)
    if folder and (files := _local_files(folder, source, "all")):
        return files[0]
    places = [_not_local(folder, source, "all")]
    revision = source.revision or hub.recorded_commit(source.hub) or None
    try:
        file = huggingface_hub.hf_hub_download(source.hub, "tokenizer.json", revision=revision, local_files_only=True)
        return Path(file)
    except OSError:
        places.append(f"the Hugging Face cache has no tokenizer.json of {source.hub}")
    try:
        commit = hub.resolve_commit(source.hub, revision or "", "model")
        file = huggingface_hub.hf_hub_download(source.hub, "tokenizer.json", revision=commit)
    except SourceError as error:
        raise _not_found(source, "", [*places, str(error)]) from error
    except hub.network_errors() as error:
        raise _not_found(source, "", [*places, f"the hub failed ({hub.first_line(error)})"]) from error
    hub.record_commit(source.hub, commit)
    return Path(file)
