"""The documentation is true: every command runs or is checked by the parser it would meet, every example is executed,
every file, module, function and test that is named exists.

The commands of a document run in its order, by bash, in a copy of the project whose preset `smoke` is a smaller model
on less data (`small_smoke`), so that README takes a minute. What cannot run offline or in seconds stands in
EXCEPTIONS with the reason, is printed, and goes through the real argument parser (or `make -n`) instead.
"""

import ast
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from basics import paths
from study.cli import parser
from study.preset import from_dict, load_preset, parse_overrides, to_dict, validate
from threefold.data import registry

ROOT = paths.PROJECT
PAGES = sorted(
    path for part in (".", "docs", "data", "data/sample") for path in (ROOT / part).glob("*.md") if path.is_file()
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# What is not executed: a pattern of the command, and why. It is parsed instead, as `parsed` says.
EXCEPTIONS = (
    (r"make (report|test|check|campaign|bench|lab|notebooks|protocols|env|lock)\b", "installs an environment first"),
    (r"pip install\b|python3 -m venv\b", "the network"),
    (r"threefold (run|doctor) --preset (full|laptop)\b", "needs real data, hours or a GPU"),
    (r".*\bmy-study\b", "tests/study/test_new.py runs these"),
    (r"threefold (tensorboard|wandb|clean)\b", "an optional package; a question at a terminal"),
    (r"threefold generate --stream\b", "goes on until Ctrl-C"),
    (r"jupyter lab\b", "serves until it is stopped"),
    (r"(tensorboard|wandb)\b", "an optional package; serves until it is stopped"),
    (r"quarto\b", "not in the package registries"),
    (r"(torchrun|sbatch|srun)\b", "several GPUs or a cluster"),
    (r"hf download\b", "the network"),
    (r".*python -m benchmarks\.gpu\b", "a GPU; tests/study/test_benchmarks_gpu.py runs the rehearsal"),
    (r"python data/facts\.py\b", "needs real data"),
    (r"lm[_-]eval\b", "minutes; tests/threefold/test_lm_eval_agreement.py compares the figures"),
    (r"(\./)?\.ci/run\b", "the whole of the checks"),
    (r"source \.venv/", "the environment of a fresh machine"),
)


def blocks(page: Path, *kinds: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind in kinds]


def commands(page: Path) -> list[str]:
    """The commands of a page's shell blocks, without prompts and comments; continued lines are one."""
    found = []
    for text in blocks(page, "bash", "sh", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ").strip()
            if words := shlex.split(line, comments=True):
                found.append(
                    shlex.join(words) if "$" not in line and "|" not in line else line.partition("  #")[0].strip()
                )
    return found


def exception(command: str) -> str:
    """Why a command is not executed; "" for one that is."""
    return next((reason for pattern, reason in EXCEPTIONS if re.match(pattern, command)), "")


def parsed(command: str) -> None:
    """Fails for a command that its own parser would refuse."""
    words = shlex.split(command)
    if words[0] == "threefold":
        said = io.StringIO()
        try:
            with redirect_stderr(said), redirect_stdout(said):
                options = parser().parse_args(words[1:])
        except SystemExit as left:
            assert left.code == 0, f"{command}: {said.getvalue()}"
            return
        if getattr(options, "preset", "") and "my-study" not in command:  # which `threefold new` writes first
            load_preset(options.preset, parse_overrides(getattr(options, "set", ())))
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    elif words[0] == "pip":
        assert words[1] == "install" and len(words) > 2
        extras = re.findall(r"\.\[(\w+)\]", words[-1])
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(extras) <= declared.keys(), f"{command}: no such extra"
    elif words[0] == "hf":
        known = tomllib.loads((ROOT / "data" / "sources.toml").read_text()).values()
        assert words[2] in {source.get("hub") for source in known}, f"{command}: not a source of the registry"
    else:
        for word in words[1:]:  # a program that is not here: the files it is given are
            if re.fullmatch(r"[\w.-]+(/[\w.-]*)+", word) and not word.startswith(("runs/", ".venv/")):
                assert (ROOT / word).exists() or "=" in word, f"{command}: no {word}"


# An environment without the test extra -------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def closure(requirements: list[str]) -> set[str]:
    """The distributions that pip would install for these requirements, as far as they are installed here."""
    found, waiting = set(), [Requirement(text) for text in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        extras = wanted.extras or {""}
        if (name, *sorted(extras)) in found:
            continue
        found.add((name, *sorted(extras)))
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                waiting.append(need)
    return {name for name, *_ in found}


def environment(requirements: list[str], folder: Path) -> Path:
    """The Python of a new virtual environment that holds only what pip would install for these requirements: links to
    the distributions that are installed here, and their commands."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in closure(requirements) - {"threefold"}:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of an optional need that is not installed here
            continue
        # a package's folder as a whole; what lies beside site-packages (commands, kernels) file by file
        files = {file if file.parts[0] == ".." else Path(file.parts[0]) for file in distribution.files}
        for file in files - {Path("__pycache__")}:
            target, link = Path(distribution.locate_file(file)), Path(os.path.normpath(site / file))
            if os.path.lexists(link) or not target.exists():
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.parent.name == "bin" and target.read_bytes().startswith(b"#!"):
                code = target.read_text(encoding="utf-8").partition("\n")[2]
                link.write_text(f"#!{folder}/bin/python\n{code}", encoding="utf-8")
                link.chmod(0o755)
            else:
                link.symlink_to(target.resolve())
    return folder / "bin" / "python"


def python(code: str, requirements: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Python code in an environment with only these requirements."""
    executable = environment(requirements, folder)
    variables = os.environ | {"PYTHONPATH": str(ROOT / "lib"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)


def test_an_environment_without_the_test_extra_lacks_what_it_installs(tmp_path):
    code = "import pandas, study.cli; from importlib import metadata, util; "
    code += "print(metadata.version('papermill'), *[util.find_spec(one) for one in ('trl', 'lm_eval', 'statsmodels')])"
    done = python(code, PROJECT["dependencies"], tmp_path / "core")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{metadata.version('papermill')} None None None\n"
    assert (tmp_path / "core" / "bin" / "papermill").read_text().startswith(f"#!{tmp_path}/core/bin/python\n")


def test_a_gguf_file_is_read_without_the_test_extra(tmp_path):
    """README's real data: SmolLM2 is a GGUF file, for which transformers asks for gguf and accelerate."""
    code = "from transformers.utils import is_accelerate_available, is_gguf_available as gguf; import accelerate; "
    done = python(code + "assert gguf() and is_accelerate_available()", PROJECT["dependencies"], tmp_path / "core")
    assert done.returncode == 0, done.stderr
    without = [name for name in PROJECT["dependencies"] if name != "accelerate"]
    assert python(code, without, tmp_path / "without").returncode, "the test would not notice that it is missing"


def test_the_recipe_for_lm_eval_installs_what_its_model_needs(tmp_path):
    (recipe,) = [command for command in commands(ROOT / "README.md") if "lm-eval" in command and "pip" in command]
    assert shlex.split(recipe)[-1] == "lm-eval[hf]"
    code = "import lm_eval.models.huggingface, accelerate, transformers, torch"
    done = python(code, [shlex.split(recipe)[-1]], tmp_path / "recipe")
    assert done.returncode == 0, done.stderr[-1500:]
    assert python(code, ["lm-eval"], tmp_path / "without").returncode, "without the extra it lacks something"


def test_optional_packages_are_extras_that_readme_names():
    """What lib imports is installed with the project, or with an extra that README's line for it installs."""
    owners, have = metadata.packages_distributions(), closure(PROJECT["dependencies"])
    optional = set()
    for file in (ROOT / "lib").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names):
                if module not in ("basics", "threefold", "papertrail", "study"):
                    distributions = {canonicalize_name(name) for name in owners.get(module, [module])}
                    optional |= set() if distributions & have else {module}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for module in optional:
        assert module in PROJECT["optional-dependencies"], f"{module} is neither a dependency nor an extra"
        assert f"pip install -e '.[{module}]'" in readme


# Commands ------------------------------------------------------------------------------------------------------------


def small_smoke() -> str:
    """The smoke preset of the copy: the end-to-end test's preset under its name, with one seed."""
    text = (ROOT / "tests" / "presets" / "tiny.toml").read_text(encoding="utf-8")
    return text.replace('name = "tiny"', 'name = "smoke"').replace("seeds = 2\n[model]", "[model]")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what git tracks, with the small smoke preset; an absolute path nowhere."""
    folder = tmp_path_factory.mktemp("copy") / "threefold"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git repository: what belongs to the project is not known")
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "lib" / "study" / "presets" / "smoke.toml").write_text(small_smoke(), encoding="utf-8")
    assert load_preset(folder / "lib" / "study" / "presets" / "smoke.toml").seeds == 1
    environment(PROJECT["dependencies"], folder.parent / "core")
    tools = folder.parent / "bin"
    tools.mkdir()
    (tools / "threefold").write_text('#!/bin/sh\nexec python -m study "$@"\n')
    (tools / "threefold").chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_command_runs_or_parses(project, name, capsys):
    variables = {key: value for key, value in os.environ.items() if not key.startswith("THREEFOLD")}
    # without the test extra, but for the page that runs tests
    tools = Path(sys.executable).parent if name == "CONTRIBUTING.md" else project.parent / "core" / "bin"
    variables |= {
        "PYTHONPATH": str(project / "lib"),
        "PATH": f"{project.parent / 'bin'}:{tools}:/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
    }
    for command in commands(ROOT / name):
        if reason := exception(command):
            with capsys.disabled():
                print(f"\n  parsed, not run ({reason}): {command}", end="")
            parsed(command)
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=project, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{name}: {command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one_that_the_parsers_take(name):
    """Quick, and for those that run as well: options, presets, make targets, parameters of notebooks."""
    for command in commands(ROOT / name):
        words = shlex.split(command)
        if words[0] in ("threefold", "make", "pip"):
            parsed(command)
        if words[0] == "papermill":
            known = nbformat.read(ROOT / words[1], as_version=4)
            (cell,) = [one for one in known.cells if "parameters" in one.metadata.get("tags", ())]
            given = [words[index + 1] for index, word in enumerate(words) if word == "-p"]
            for parameter in given:
                assert re.search(rf"^{parameter} = ", cell.source, re.MULTILINE), f"{command}: no parameter {parameter}"


def overridden(command: str) -> list[tuple[str, str]]:
    """(key, value) of every `--set` of a command, and of papermill's `-p` that a stage's section of the preset has."""
    words = shlex.split(command)
    pairs = [words[place + 1].split("=", 1) for place, word in enumerate(words) if word == "--set"]
    if words[0] == "papermill":
        section = Path(words[1]).stem.split("_")[-1]
        given = [words[place + 1 : place + 3] for place, word in enumerate(words) if word == "-p"]
        keys = to_dict(load_preset("smoke")).get(section, {})
        pairs += [(f"{section}.{key}", value) for key, value in given if key in keys]
    return [(key, value) for key, value in pairs if "VALUE" not in value]


@pytest.mark.parametrize("name", NAMES)
def test_a_documented_override_changes_something(name):
    """Every run that the pages name is of the smoke preset."""
    for command in commands(ROOT / name):
        for key, value in overridden(command):
            changed = to_dict(load_preset("smoke", parse_overrides([f"{key}={value}"])))
            assert changed != to_dict(load_preset("smoke")), f"{name}: {command}: {key}={value} is smoke's own value"


def test_an_override_that_changes_nothing_would_be_found():
    same = "threefold run --run trial --set sft.learning_rate=3e-3"
    assert overridden(same) == [("sft.learning_rate", "3e-3")]
    assert load_preset("smoke", parse_overrides(["sft.learning_rate=3e-3"])) == load_preset("smoke")
    assert overridden("papermill notebooks/02_sft.ipynb out.ipynb -p run trial -p learning_rate 1e-3")
    assert any(overridden(command) for command in commands(ROOT / "README.md"))


def test_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


PROGRAMS = ("threefold", "make", "pip", "python", "pytest", "torchrun", "hf", "lm_eval")
INLINE = [
    (name, span)
    for name in NAMES
    for span in re.findall(r"`([^`]+)`", BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8")))
    if span.split()[0] in PROGRAMS and " " in span.strip()
]


@pytest.mark.parametrize(("name", "span"), INLINE, ids=[f"{name}: {span}" for name, span in INLINE])
def test_every_command_in_a_sentence_is_one_that_the_parsers_take(name, span):
    words = span.split()
    if words[0] == "threefold" and len(words) == 2:  # the command as such
        words.append("--help")
    if not any(word.startswith("my") and word.endswith(".toml") for word in words):  # what a reader is to write
        parsed(shlex.join(words))


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda file: file.stem)
def test_workflows_run_commands_that_exist(file):
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert steps[0]["uses"].startswith("actions/checkout@")
    commands = [step["run"] for step in steps if "run" in step]
    assert any(command.startswith(("make", "quarto")) for command in commands)
    for command in commands:
        if command.startswith(("make", "quarto")):
            parsed(command)


def test_commands_stand_in_blocks_that_are_run():
    """Indented four spaces a command would be seen by a reader, and by no test."""
    for name in NAMES:
        text = BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8"))
        found = re.findall(rf"^    (?:{'|'.join((*PROGRAMS, 'papermill', 'jupyter', 'quarto', 'git'))}) .*", text, re.M)
        assert not found, f"{name}: {found}"
    assert {"threefold status", "make notebooks"} <= {span for _, span in INLINE}


def test_a_command_that_is_wrong_would_be_found():
    with pytest.raises(AssertionError):
        parsed("threefold run --presets smoke")
    with pytest.raises(AssertionError):
        parsed("make reprot")
    with pytest.raises(AssertionError):
        parsed("pip install -e '.[tensorbord]'")
    with pytest.raises(AssertionError):
        parsed("hf download openai/gsm9k --repo-type dataset")
    assert exception("threefold status --run smoke") == "" and exception("make test")


# Examples ------------------------------------------------------------------------------------------------------------


EXAMPLES = [(name, place, text) for name in NAMES for place, text in enumerate(blocks(ROOT / name, "python", "toml"))]


@pytest.mark.parametrize(("name", "place", "text"), EXAMPLES, ids=[f"{name}-{place}" for name, place, _ in EXAMPLES])
def test_every_example_holds(name, place, text, tmp_path, monkeypatch):
    """Python is executed (of what needs real data, the imports); TOML is a part of a preset (put into smoke) or of the
    registry of sources."""
    (tmp_path / "data").symlink_to(ROOT / "data")  # what an example writes goes to the temporary folder
    monkeypatch.chdir(tmp_path)
    if "from_pretrained(" in text:
        compile(text, name, "exec")  # needs a run: tests/study/test_end_to_end.py loads a checkpoint so
    elif '"DATA"' in text:  # needs real data: what it imports is there
        tree = ast.parse(text)
        tree.body = [line for line in tree.body if isinstance(line, ast.Import | ast.ImportFrom)]
        exec(compile(tree, name, "exec"), {"__name__": "example"})
    elif "import" in text or "assert" in text:
        exec(compile(text, f"{name}, example {place}", "exec"), {"__name__": "example"})
    elif text.startswith("# data/sources.toml"):
        (tmp_path / "sources.toml").write_text((ROOT / "data" / "sources.toml").read_text() + text)
        assert set(tomllib.loads(text)) < set(registry.read_registry(tmp_path / "sources.toml"))
    else:
        table, part = to_dict(load_preset("smoke")), tomllib.loads(text)
        for section, values in part.items():
            assert section in table, f"{name}: no section {section} in a preset"
            table[section] |= values
        validate(from_dict(table, name), name)


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_of_the_project(name):
    text = BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#|mailto:", target):
            assert ((ROOT / name).parent / target.partition("#")[0]).exists(), f"{name}: {target} is not there"


def resolved(dotted: str) -> bool:
    """Whether a dotted name of the package is a module, or something in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("name", NAMES)
def test_modules_functions_and_tests_that_are_named_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for dotted in set(re.findall(r"`((?:threefold|papertrail|study|basics)(?:\.\w+)+)`", text)):
        assert resolved(dotted), f"{name}: no {dotted}"
    for file, test in set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)):
        assert (ROOT / file).is_file(), f"{name}: no {file}"
        assert not test or re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{name}: no {test}"


def test_every_formula_names_its_source_its_code_and_its_test():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith(("|---", "| part", "| loss"))
    ]
    rows = [row for row in rows if " code | test |" not in row]
    assert len(rows) > 25
    for row in rows:
        assert not re.search(r"\| +\|", row), f"a place is empty: {row}"
        assert re.search(r"`(?:threefold|study)\.\S+` \| `tests/\S+::\S+` \|$", row), row


KINDS = ("preset", "override", "parameter", "data file", "row", "checkpoint", "tokenizer", "run", "environment")


def test_every_boundary_names_what_is_checked_where_and_by_which_test():
    text = (ROOT / "docs" / "boundaries.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| input ")]
    assert len(rows) > 40 and all(kind in text.lower() for kind in KINDS)
    for row in rows:
        what, check, where, sees, tests, _ = (cell.strip() for cell in row.removeprefix("|").split(" |"))
        assert what and check and sees and re.fullmatch(r"`[\w.]+`", where), row
        for test in tests.split("<br>"):
            file, name = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test).groups()
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), test


def test_every_package_and_folder_of_lib_is_on_the_page():
    """CONTRIBUTING names every package below lib/, and every folder and module directly in one."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for package in sorted(path for path in (ROOT / "lib").iterdir() if (path / "__init__.py").is_file()):
        assert f"`{package.name}`" in text, package.name
        for part in sorted(package.iterdir()):
            name = part.stem if part.suffix == ".py" else part.name
            if part.suffix in ("", ".py") and not name.startswith("_"):
                assert f"`{name}`" in text, f"{package.name}/{part.name}"


def test_every_file_of_a_described_path_exists():
    """The paths of a parameter, a protocol's key and a metric, in CONTRIBUTING, at most six lines each."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for title in ("`sft.learning_rate`", "`evaluation.window`", "One metric"):
        (section,) = re.findall(rf"^### {re.escape(title)}[^\n]*\n\n((?:\d\. .*\n)+)", text, re.MULTILINE)
        lines = section.strip().split("\n")
        assert 2 <= len(lines) <= 6, title
        for file in re.findall(r"`((?:lib|notebooks|report)/[\w./-]+)`", section):
            assert (ROOT / file).is_file(), f"{title}: no {file}"
        assert all(re.search(r"`(?:lib|notebooks|report)/", line) for line in lines), title
