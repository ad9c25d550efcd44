import dataclasses
import errno
import hashlib
import json
import os
import platform
import subprocess

import nbformat
import pytest

from basics import files, source_code
from basics.errors import RecordError
from papertrail import provenance
from papertrail.plan import Project, StageSpec
from papertrail.provenance import Fingerprint
from papertrail.run import Run


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in the place of threefold: a imports b (inside a function), b imports sub.c, d stands alone."""
    files = {
        "__init__.py": "",
        "a.py": '"""Doc."""\n\ndef f(x):\n    """Doc."""\n    from threefold import b\n    return b.g(x) + 1  # why\n',
        "b.py": "from .sub.c import h\n\ndef g(x):\n    return h(x)\n",
        "sub/__init__.py": "",
        "sub/c.py": "import os\n\nclass K:\n    'Only a docstring.'\n\ndef h(x):\n    return x\n",
        "d.py": "y = 1\n",
    }
    for name, text in files.items():
        file = tmp_path / "threefold" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(source_code, "ROOT", tmp_path)
    return tmp_path / "threefold"


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "counts"),
    [
        ("a.py", '"""Doc."""\n\n', '"""Another doc."""\n\n\n# and a comment\n', False),
        ("a.py", '    """Doc."""\n', "", False),
        ("a.py", "  # why", "", False),
        ("a.py", "b.g(x) + 1", "(b.g(x)\n        + 1)", False),
        ("sub/c.py", "'Only a docstring.'", "'Changed.'", False),
        ("d.py", "y = 1", "y = 2", False),
        ("a.py", "+ 1", "+ 2", True),
        ("a.py", "def f(x)", "def f(x: int)", True),
        ("sub/c.py", "return x", "return -x", True),
        ("sub/__init__.py", "", "z = 1\n", True),
    ],
)
def test_code_fingerprint_sees_code_of_all_it_imports_and_nothing_else(package, file, old, new, counts):
    before = source_code.code_fingerprint("threefold.a")
    assert source_code.code_fingerprint("threefold.a") == before
    edit(package / file, old, new)
    assert (source_code.code_fingerprint("threefold.a") != before) == counts


def test_code_fingerprint_of_what_is_no_module(package):
    for name in ("threefold.nothing", "json"):
        with pytest.raises(ValueError, match=name):
            source_code.code_fingerprint(name)


def test_code_fingerprint_of_the_real_package():
    one = source_code.code_fingerprint("threefold.data.corpus")
    assert one == source_code.code_fingerprint("threefold.data.corpus", "threefold.config")  # among its imports
    assert one != source_code.code_fingerprint("threefold.config")


def test_hashes(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.bin").write_bytes(b"abc" * 10**6)
    (tmp_path / "y").write_bytes(b"")
    expected = hashlib.sha256(b"abc" * 10**6).hexdigest()
    assert files.sha256_file(tmp_path / "a" / "b" / "x.bin") == expected
    assert files.sha256_tree(tmp_path) == {"a/b/x.bin": expected, "y": files.sha256_bytes(b"")}
    assert files.sha256_json({"a": 1, "b": [2.5]}) == files.sha256_json({"b": [2.5], "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.sha256_json(float("nan"))


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path, monkeypatch):
    file = tmp_path / "new" / "x.txt"
    files.atomic_write(file, "één\n")
    assert file.read_bytes() == "één\n".encode()
    files.atomic_write(file, b"two")
    assert file.read_bytes() == b"two"

    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        files.atomic_write(file, "three")
    assert file.read_bytes() == b"two"
    assert [path.name for path in file.parent.iterdir()] == ["x.txt"]


def test_atomic_folder_replaces_only_on_success(tmp_path):
    target = tmp_path / "out"
    with files.atomic_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError), files.atomic_folder(target) as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert (target / "x").read_text() == "1"
    with files.atomic_folder(target) as folder:
        (folder / "y").write_text("2")
    assert [path.name for path in target.iterdir()] == ["y"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_an_error_of_the_system_whoever_writes(tmp_path):
    """safetensors and tokenizers have errors of their own for it."""
    with (
        pytest.raises(OSError, match="No space left on device") as caught,
        files.atomic_folder(tmp_path / "out") as made,
    ):
        (made / "x").write_text("half")
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_a_crash_between_the_renames_is_mended(tmp_path, monkeypatch):
    target, new = tmp_path / "out", tmp_path / "new"
    target.mkdir()
    (target / "x").write_text("old")
    new.mkdir()
    (new / "x").write_text("new")
    real = os.rename

    class Crash(BaseException):
        pass

    def crash(source, destination):
        if source == new:
            raise Crash
        real(source, destination)

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(Crash):
        files.replace_folder(new, target)
    monkeypatch.undo()
    assert not target.exists()
    files.recover_folder(target)
    assert (target / "x").read_text() == "old"
    files.replace_folder(new, target)
    assert (target / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError):
        files.replace_folder(tmp_path / "never made", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_surroundings_name_versions_and_machine_but_not_its_name():
    versions = provenance.versions(["torch", "nothing"])
    assert versions["python"] == ".".join(platform.python_version_tuple()[:2])
    assert versions["torch"] != "not installed" == versions["nothing"]
    hardware = provenance.hardware()
    assert hardware["cores"] >= 1 and hardware["memory_gib"] > 0 and hardware["cpu"]
    assert not platform.node() or platform.node() not in json.dumps(hardware)


def test_git_state(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)

    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": None}
    git("init", "-q")
    (tmp_path / "x").write_text("1")
    git("add", "x")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m")
    state = provenance.git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "x").write_text("2")
    assert provenance.git_state(tmp_path) == {**state, "dirty": True}
    (tmp_path / "inner").mkdir()
    inner = provenance.git_state(tmp_path / "inner")  # an unpacked archive inside another repository
    assert inner == {"commit": None, "dirty": None}


@pytest.fixture
def notebooks(tmp_path):
    """A folder with two notebooks that import two modules."""
    for name, module in (("02_sft", "basics.names"), ("other", "basics.errors")):
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"import {module}")])
        nbformat.write(book, tmp_path / f"{name}.ipynb")
    return tmp_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed(Run):
    """A run of one stage that is made from what it is given."""

    config: dict
    data: dict
    parents: dict
    own_seed: int

    def config_of(self, stage):
        return self.config

    def data_of(self, stage, reread=None):
        return self.data

    def taken_from(self, parent, stage):
        return self.parents[parent]

    def seed(self, stage):
        return self.own_seed


def fingerprint(folder, notebook="02_sft", **changes) -> Fingerprint:
    given = {
        "config": {"model": {"norm": "rms"}, "sft": {"learning_rate": 0.003, "shots": (0, 3)}},
        "data": {"stories": "aa"},
        "parents": {"pretrain": "bb"},
        "own_seed": 1,
        **changes,
    }
    plan = {"sft": StageSpec("sft", notebook, notebook, {}, tuple(given["parents"]), "sft")}
    project = Project(folder, folder, packages=("basics",), distributions=("torch",))
    return Fixed(name="x", path=folder / "x", plan=plan, project=project, **given).fingerprint("sft")


def test_fingerprint_survives_json_and_says_when_it_was_changed(notebooks):
    one = fingerprint(notebooks)
    kept = json.loads(json.dumps(one.to_dict()))
    assert Fingerprint.from_dict(kept) == one and kept["digest"] == one.digest == fingerprint(notebooks).digest
    assert one.differences(Fingerprint.from_dict(kept)) == []
    with pytest.raises(RecordError, match="changed by hand"):
        Fingerprint.from_dict({**kept, "seed": 2})
    del kept["code"]
    with pytest.raises(RecordError, match="without code"):
        Fingerprint.from_dict(kept)


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"own_seed": 2}, ["seed 1 -> 2"]),
        ({"parents": {"pretrain": "cc"}}, ["parent pretrain"]),
        ({"parents": {}}, ["parent pretrain"]),
        ({"data": {"stories": "aa", "poems": "dd"}}, ["data poems"]),
        ({"notebook": "other"}, ["code: notebooks/02_sft.ipynb, basics.names, notebooks/other.ipynb"]),
        (
            {"config": {"model": {"norm": "layer"}, "sft": {"learning_rate": 0.001, "shots": (0, 5)}}},
            [
                "config: model.norm rms -> layer",
                "config: sft.learning_rate 0.003 -> 0.001",
                "config: sft.shots.1 3 -> 5",
            ],
        ),
        (
            {"config": {"model": {"norm": "rms"}, "sft": {"learning_rate": 0.003, "shots": ()}}},
            ["config: sft.shots.0 0 -> (none)", "config: sft.shots.1 3 -> (none)", "config: sft.shots (none) -> []"],
        ),
    ],
)
def test_differences_name_what_changed(notebooks, changes, lines):
    one, other = fingerprint(notebooks), fingerprint(notebooks, **changes)
    assert one.digest != other.digest
    assert one.differences(other) == lines


def test_a_new_version_is_a_difference(notebooks):
    one = fingerprint(notebooks)
    other = dataclasses.replace(one, versions={**one.versions, "torch": "99"})
    assert one.differences(other) == [f"version torch {one.versions['torch']} -> 99"]
