"""The packages depend on each other as CONTRIBUTING says, and the library stays light to import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lint(project: Path) -> subprocess.CompletedProcess:
    """import-linter over a project's own packages, by the contracts of its pyproject.toml."""
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command as lint; lint()"]
    environment = {**os.environ, "PYTHONPATH": str(project / "lib")}
    return subprocess.run(
        [*command, "--no-cache"], cwd=project, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def project(tmp_path):
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_layers_hold(project):
    result = lint(project)
    assert result.returncode == 0, result.stdout[-3000:]


FORBIDDEN = {
    "threefold/config.py": "papertrail.records",
    "threefold/training/__init__.py": "study.stages",
    "papertrail/records.py": "threefold.config",
    "papertrail/__init__.py": "study.stages",
    "basics/__init__.py": "threefold.config",
    "threefold/model/__init__.py": "threefold.training",
    "threefold/data/__init__.py": "threefold.evaluation",
}


def test_imports_against_the_layers_are_found(project):
    for module, imports in FORBIDDEN.items():
        file = project / "lib" / module
        file.write_text(file.read_text(encoding="utf-8") + f"\nimport {imports}\n", encoding="utf-8")
    result = lint(project)
    assert result.returncode == 1
    for module, imports in FORBIDDEN.items():
        name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        assert f"{name} -> {imports}" in result.stdout, result.stdout[-3000:]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("threefold", ("torch", "pandas", "matplotlib", "papermill", "jupyter_client", "IPython")),
        ("threefold.training", ("pandas", "matplotlib", "papermill", "jupyter_client", "IPython")),
        ("threefold.model", ("pandas", "matplotlib", "papermill", "jupyter_client", "IPython")),
        ("study.cli", ("torch", "pandas", "matplotlib", "papermill", "jupyter_client", "IPython", "pydantic")),
    ],
)
def test_importing_stays_light(module, absent):
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
