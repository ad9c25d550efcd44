"""Data sets of the Hugging Face Hub: commits, the local cache of the `datasets` library, and rows.

A commit is pinned by `revision` in the registry, or by the first load, which records the commit it got in
`revisions.json` of the cache folder; later loads take that commit or fail. A part of a data set is read file by file,
so that only the files that hold it are downloaded.
"""

import fnmatch
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from basics.errors import SourceError
from basics.files import atomic_write, read_note, sha256_json, write_note
from basics.paths import cache_folder

REVISIONS = "revisions.json"  # in the cache folder; unlike the other files there it cannot be recomputed
TIMEOUT = 20  # seconds for the hub to name a commit
FORMS = ("parquet", "json", "csv", "text", "arrow")  # file formats that are read: rows of values, never code


@lru_cache(maxsize=64)
def resolve_commit(repository: str, revision: str, kind: str = "dataset") -> str:
    """The commit of a revision on the hub, of its main branch for "". Raises SourceError if the hub does not answer."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    info = api.dataset_info if kind == "dataset" else api.model_info
    try:
        return info(repository, revision=revision or None, timeout=TIMEOUT).sha
    except network_errors() as error:
        at = f" at {revision[:12]}" if revision else ""
        raise SourceError(f"the hub did not give {repository}{at} ({first_line(error)})") from error


def cached(repository: str, config: str, commit: str = "") -> Any | None:
    """The builder of a prepared data set in the Hugging Face cache: of a commit, or of the newest copy for "".

    `builder.hash` is the commit. None if there is no such copy.
    """
    from datasets.packaged_modules.cache.cache import Cache

    name = {"repo_id": repository, "dataset_name": repository.rpartition("/")[2], "config_name": config or "default"}
    with _quiet():
        try:
            builder = Cache(**name, version="auto", hash="auto")
        except ValueError:  # nothing is cached
            return None
        if commit not in ("", builder.hash):
            builder = Cache(**name, hash=commit)
    return builder if builder.info.splits else None


def load(location: str, config: str, split: str, revision: str, label: str, builder: Any | None = None) -> Any:
    """The rows of a split: of a hub repository at a revision, of a local clone of one, or of a cached builder. The
    config "*" means all configs of the repository, one after the other.

    Raises SourceError, which starts with `label`, if they cannot be loaded or the files are not of an allowed format.
    """
    import datasets

    with _quiet(), _loading(label):
        if config == "*":
            names = datasets.get_dataset_config_names(location, revision=revision or None)
            return chain.from_iterable(load(location, name, split, revision, label) for name in names)
        if builder is None:
            builder = _builder(location, config, revision, label)
            builder.download_and_prepare()
        return builder.as_dataset(split=split)


def files(repository: str, config: str, split: str, commit: str, label: str) -> list[str]:
    """The data files of a split of a hub repository at a commit, in order. Asks the hub once and keeps the answer.

    Raises SourceError as `load`.
    """
    note = _note_of_files(repository, config, split, commit)
    kept = read_note(note)
    if kept is None:
        with _quiet(), _loading(label):
            urls = _builder(repository, config, commit, label).config.data_files[split]
        kept = {"names": [url.rpartition(f"@{commit}/")[2] for url in urls]}
        write_note(note, kept)
    return kept["names"]


def files_are_known(repository: str, config: str, split: str, commit: str) -> bool:
    """Whether `files` can answer without the hub."""
    return bool(commit) and read_note(_note_of_files(repository, config, split, commit)) is not None


def download(repository: str, file: str, commit: str, label: str) -> Path:
    """A data file of a hub repository, from the Hugging Face cache or downloaded. Raises SourceError as `load`."""
    import huggingface_hub

    with _quiet(), _loading(label):
        return Path(huggingface_hub.hf_hub_download(repository, file, repo_type="dataset", revision=commit))


def download_bytes(repository: str, config: str, split: str, commit: str, label: str, rows: int = -1) -> int:
    """About how many bytes the hub sends for a data set: all splits of a config, or those files of one split that hold
    its first `rows` rows. At least, where the data card does not say how many rows there are. Config "*": 0, unknown.

    Raises SourceError as `load`.
    """
    import huggingface_hub

    if config == "*":
        return 0
    with _quiet(), _loading(label):
        builder = _builder(repository, config, commit, label)
        urls = builder.config.data_files[split] if rows >= 0 else chain(*builder.config.data_files.values())
        names = [url.rpartition(f"@{commit}/")[2] for url in urls]
        api = huggingface_hub.HfApi()
        size = sum(entry.size for entry in api.get_paths_info(repository, names, revision=commit, repo_type="dataset"))
    if rows < 0:
        return size
    there = builder.info.splits[split].num_examples if split in (builder.info.splits or {}) else 0
    needed = rows * len(names) // there + 1 if there else 1
    return size * min(needed, len(names)) // len(names)


def model_bytes(repository: str, revision: str, patterns: Sequence[str]) -> int:
    """Bytes of the files of a model's repository that match one of the patterns; none in folders. Raises SourceError
    if the hub does not answer."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        files = api.model_info(repository, revision=revision or None, timeout=TIMEOUT, files_metadata=True).siblings
    except network_errors() as error:
        raise SourceError(f"the hub did not give {repository} ({first_line(error)})") from error
    taken = (file for file in files if any(fnmatch.fnmatchcase(file.rfilename, pattern) for pattern in patterns))
    return sum(file.size or 0 for file in taken if "/" not in file.rfilename)


def _note_of_files(*key: str) -> Path:
    return cache_folder() / "hub" / f"{sha256_json(key)[:32]}.json"


def _builder(location: str, config: str, revision: str, label: str) -> Any:
    import datasets

    builder = datasets.load_dataset_builder(location, config or None, revision=revision or None)
    form = type(builder).__module__.rpartition(".")[2]
    if form not in FORMS:
        raise SourceError(f"{label}: files of the form {form!r} are not read; allowed: {', '.join(FORMS)}")
    return builder


@contextmanager
def _loading(label: str) -> Iterator[None]:
    """Raise SourceError in place of what `datasets` and the hub's client raise."""
    import datasets

    try:
        yield
    except (*network_errors(), ValueError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(f"{label}: datasets could not load it ({first_line(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the progress bars and log lines of `datasets` and the hub, which would end up in executed notebooks."""
    import datasets
    from huggingface_hub import utils

    verbosity = datasets.logging.get_verbosity()
    loud = [library for library in (datasets, utils) if not library.are_progress_bars_disabled()]
    datasets.logging.set_verbosity_error()
    for library in loud:
        library.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        for library in loud:
            library.enable_progress_bars()


def network_errors() -> tuple[type[Exception], ...]:
    """Exceptions of a failed request: the hub client's, the base of its HTTP library's and the system's."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# Recorded commits -----------------------------------------------------------------------------------------------------


def recorded_commit(repository: str) -> str:
    """The commit that the first load of a repository recorded, or "". Raises SourceError for an unreadable record."""
    return _recorded().get(repository, "")


def record_commit(repository: str, commit: str) -> None:
    """Record the commit of a first load; later calls change nothing."""
    recorded = _recorded()
    if repository not in recorded:
        content = json.dumps({**recorded, repository: commit}, indent=2, sort_keys=True)
        atomic_write(cache_folder() / REVISIONS, content + "\n")


def _recorded() -> dict[str, str]:
    file = cache_folder() / REVISIONS
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: not JSON ({error}): repair it, or remove it to record new commits") from error
    if not isinstance(recorded, dict) or not all(isinstance(commit, str) for commit in recorded.values()):
        raise SourceError(
            f"{file}: expected an object of hub id to commit: repair it, or remove it to record new commits"
        )
    return recorded
