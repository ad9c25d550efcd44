"""Hashes of Python source that change with what code does, not with its comments, docstrings or layout."""

import ast
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from basics import paths
from basics.files import read_note, sha256_bytes, sha256_json, write_note

ROOT = Path(__file__).resolve().parents[1]  # the folder that holds the packages
DIGITS = 16  # of a module's hash
MOST_KEPT = 2000  # modules parsed, of all versions of the code


def code_fingerprint(*modules: str) -> str:
    """SHA-256 over the code of these modules and of everything in their packages and `basics` that they import."""
    return sha256_json(code_hashes(modules, {"basics", *(name.partition(".")[0] for name in modules)}))


def code_hashes(modules: Iterable[str], packages: Iterable[str]) -> dict[str, str]:
    """{module: hash of its code} of these modules and of every module of the packages that they import.

    Imports are followed statically, those inside functions too. The hash is that of the syntax tree without docstrings.
    Raises ValueError for a name that is not a module of the packages.
    """
    modules, files = tuple(modules), module_files(packages)
    for name in modules:
        if name not in files:
            raise ValueError(f"{name} is not a module of {', '.join(sorted(packages))}")
    return dict(_code_hashes(modules, tuple(files.items())))


def module_files(packages: Iterable[str]) -> dict[str, tuple[str, int, int]]:
    """{module: (its file, modification time in nanoseconds, size in bytes)} of every module of the packages."""
    found = {}
    for package in sorted(packages):
        for folder, _, names in os.walk(ROOT / package):
            for file in (f"{folder}/{name}" for name in names if name.endswith(".py")):
                module = file[len(f"{ROOT}/") : -len(".py")].replace("/", ".").removesuffix(".__init__")
                stat = os.stat(file)
                found[module] = (file, stat.st_mtime_ns, stat.st_size)
    return found


def imports(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Names that a syntax tree imports: modules, and what is taken from them, which may be a module too.

    package: the one that relative imports start from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


@lru_cache(maxsize=64)
def _code_hashes(modules: tuple[str, ...], files: tuple[tuple[str, tuple[str, int, int]], ...]) -> tuple:
    """The items of `code_hashes`. files: the items of `module_files`; their times and sizes are keys of the cache."""
    note = paths.cache_folder() / "code.json"
    known, hashes, waiting, kept = dict(files), {}, list(modules), _kept(note)
    before = len(kept)
    while waiting:
        name = waiting.pop()
        if name in known and name not in hashes:
            hashes[name], imported = _parsed(name, Path(known[name][0]), kept)
            waiting += [*imported, name.rpartition(".")[0]]  # importing it runs its package's __init__ too
    if len(kept) > before:
        with suppress(OSError):  # a cache that cannot be written: they are parsed again next time
            write_note(note, kept)
    return tuple(sorted(hashes.items()))


@lru_cache(maxsize=1)
def _kept(note: Path) -> dict[str, Any]:
    """What `_parsed` returned in earlier processes, by the hash of its input; empty again when it has grown large."""
    kept = read_note(note) or {}
    return kept if len(kept) < MOST_KEPT else {}


def _parsed(name: str, file: Path, kept: dict[str, Any]) -> tuple[str, list[str]]:
    """(hash of the module's syntax tree, names that it imports)."""
    package, text = name if file.name == "__init__.py" else name.rpartition(".")[0], file.read_text(encoding="utf-8")
    key = sha256_json([sys.version_info[:2], package, text])
    if key not in kept:
        kept[key] = _hashed(ast.parse(text), package)
    return kept[key]


def _hashed(tree: ast.Module, package: str) -> tuple[str, list[str]]:
    imported = list(imports(tree, package))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return sha256_bytes(ast.dump(tree).encode())[:DIGITS], imported
