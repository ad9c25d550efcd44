"""Atomic files, locks, hashes, and JSON files that carry their own hash."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from basics import paths
from basics.errors import DISK_FULL, CheckpointError, SourceError

# Hashes -------------------------------------------------------------------------------------------------------------

SMALL = 1 << 20  # bytes; a smaller file is read at once, and hashed each time


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex; a large file is read in pieces."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < SMALL:  # without the buffer that reading in pieces takes
            return sha256_bytes(file.read())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(folder: str | Path) -> dict[str, str]:
    """{path relative to the folder, with /: SHA-256} of every file under it, sorted by path."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: equal values hash equal, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return sha256_bytes(text.encode())


# Reading ------------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a file. Raises ValueError for a folder, pipe or device: reading one may never end."""
    if os.path.lexists(path) and not path.is_file():
        raise ValueError("not a regular file")
    return path.read_text(encoding="utf-8")


POINTERS = {  # how a file begins that refers to another, and the command that fetches that one
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer, not the file itself: run `git annex get`",
}


def refuse_pointer(path: Path) -> None:
    """Raise SourceError for a file that Git LFS or git-annex has not fetched, which holds a pointer instead of its
    content."""
    with open(path, "rb") as file:
        begins = file.read(max(map(len, POINTERS)))
    for pointer, what in POINTERS.items():
        if begins.startswith(pointer):
            raise SourceError(f"{path}: {what} where it was cloned")


# Atomic files -------------------------------------------------------------------------------------------------------


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill that takes its place, replacing what was there, only if the block ends without an error.

    Raises OSError where the disk is full, by whatever library the files are written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, path)
    except Exception as error:
        full = [number for number in DISK_FULL if os.strerror(number) in str(error)]
        if isinstance(error, OSError) or not full:
            raise
        # safetensors and tokenizers report a full disk by errors of their own
        raise OSError(full[0], os.strerror(full[0]), str(path)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_empty(destination: Path) -> None:
    """Raise CheckpointError unless there is nothing at a destination, or an empty folder."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} is not empty; name another destination")


def replace_folder(new: Path, path: Path) -> None:
    """Move a finished folder into place. The folder it replaces is set aside first and removed last, so that a whole
    one is on the disk at every moment; `recover_folder` puts it back after a crash between the two renames. The new
    files reach the disk before the folder takes its place. Not for two writers at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in new.rglob("*"):
        if file.is_file():
            sync(file)
    recover_folder(path)
    if path.exists():
        os.rename(path, _aside(path))
    try:
        os.rename(new, path)
    except OSError:
        recover_folder(path)
        raise
    recover_folder(path)


def recover_folder(path: Path) -> None:
    """Undo what a crash inside `replace_folder` left: put the folder set aside back, or remove it if replaced."""
    aside = _aside(path)
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        os.rename(aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk, not only on its way there."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """Lock a file or folder for this process: the descriptor that holds the lock until it is closed, or None while
    another process holds it. On Windows, and on file systems that cannot lock, nothing is held."""
    opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would be waited for
    try:
        import fcntl

        fcntl.flock(opened, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        return None
    except (ImportError, OSError):
        pass
    return opened


def is_locked(path: Path) -> bool:
    """Whether a process, this one or another, holds the lock on a file or folder; False where there is none."""
    if not path.exists():
        return False
    opened = try_lock(path, shared=True)
    if opened is not None:
        os.close(opened)
    return opened is None


# Notes --------------------------------------------------------------------------------------------------------------


SELF = "note_sha256"  # a note's hash over its own values


def write_note(path: Path, values: Mapping[str, Any], indent: int | None = None) -> None:
    """Keep JSON values with their hash. Raises ValueError for what is not finite JSON."""
    content = {**values, SELF: sha256_json(values)}
    atomic_write(path, json.dumps(content, indent=indent, allow_nan=False, ensure_ascii=False) + "\n")


def read_note(path: Path) -> dict[str, Any] | None:
    """The values that `write_note` kept; None when there are none or they are not what was written."""
    try:
        values = json.loads(read_text(path))
        return values if values.pop(SELF) == sha256_json(values) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def damaged(note: Path) -> list[Path]:
    """What is not as it was written: the note, or files beside it of those it names under "files" ({name: SHA-256})."""
    if (values := read_note(note)) is None:
        return [note]
    files = {note.parent / name: digest for name, digest in values.get("files", {}).items()}
    return [file for file, digest in files.items() if not file.is_file() or sha256_file(file) != digest]


# Hashes used again ----------------------------------------------------------------------------------------------------

_memory: dict[tuple, Any] | None = None


@contextmanager
def remembering() -> Iterator[None]:
    """Until the block ends, look at each file once: for a survey of many stages, not for running any."""
    global _memory
    before, _memory = _memory, {} if _memory is None else _memory
    try:
        yield
    finally:
        _memory = before


def remembered(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, inside `remembering` that of its first call with these arguments."""
    if _memory is None:
        return function(*arguments)
    key = (function, *arguments)
    if key not in _memory:
        _memory[key] = function(*arguments)
    return _memory[key]


def sha256_cached(path: Path) -> str:
    """SHA-256 of a file; of a large one the hash kept for its path, size, inode and times, of which the last
    change (ctime) cannot be set back.

    Good enough to decide what to run; `threefold verify` reads every byte.
    """
    stat = path.stat()
    if stat.st_size < SMALL:
        return remembered(sha256_file, path)
    kept = paths.cache_folder() / "hashes" / f"{sha256_bytes(str(path.resolve()).encode())[:32]}.json"
    state = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    known = read_note(kept)
    if known is None or known.get("state") != state:
        known = {"state": state, "sha256": sha256_file(path)}
        with suppress(OSError):  # a cache that cannot be written: it is hashed again next time
            write_note(kept, known)
    return known["sha256"]
