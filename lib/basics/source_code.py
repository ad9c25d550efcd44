"""Hashes of Python source that change with what code does, not with its comments, docstrings or layout."""

import ast
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from basics.files import sha256_bytes, sha256_json

ROOT = Path(__file__).resolve().parents[1]  # the folder in which the packages lie side by side
DIGITS = 16  # of a module's hash


def code_fingerprint(*modules: str) -> str:
    """SHA-256 over the code of these modules and of everything in their packages and `basics` that they import."""
    return sha256_json(code_hashes(modules, {"basics", *(name.partition(".")[0] for name in modules)}))


def code_hashes(modules: Iterable[str], packages: Iterable[str], root: Path | None = None) -> dict[str, str]:
    """{module: hash of its code} of these modules and of every module of the packages that they import.

    Imports are followed statically, those inside functions too. The hash is that of the syntax tree without docstrings.
    root: the folder in which the packages lie; default: the one of this package.
    Raises ValueError for a name that is no module of the packages.
    """
    packages, root, waiting = frozenset(packages), root or ROOT, list(modules)
    for name in waiting:
        if module_file(name, packages, root) is None:
            raise ValueError(f"{name} is no module of {', '.join(sorted(packages))}")
    hashes: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        file = module_file(name, packages, root)
        if name in hashes or file is None:
            continue
        stat = file.stat()
        hashes[name], imported = _parsed(name, file, stat.st_mtime_ns, stat.st_size)
        waiting += imported
        waiting += [name.rpartition(".")[0]] if "." in name else []  # importing it runs its package's __init__ too
    return dict(sorted(hashes.items()))


def module_file(name: str, packages: Iterable[str], root: Path | None = None) -> Path | None:
    """The source of a module of the packages; None for any other name (another package, a name inside a module)."""
    package, *parts = name.split(".")
    base = (root or ROOT).joinpath(package, *parts)
    candidates = (base / "__init__.py", base.with_suffix(".py")) if package in packages else ()
    return next((file for file in candidates if file.is_file()), None)


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


@lru_cache(maxsize=512)
def _parsed(name: str, file: Path, _mtime: int, _size: int) -> tuple[str, tuple[str, ...]]:
    """(hash of the module's syntax tree, names that it imports); time and size are keys of the cache."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = tuple(imports(tree, name if file.name == "__init__.py" else name.rpartition(".")[0]))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return sha256_bytes(ast.dump(tree).encode())[:DIGITS], imported
