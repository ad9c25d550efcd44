"""The pairs: `notebooks/percent/NAME.py` (py:percent, what is reviewed) and `notebooks/NAME.ipynb` (what is run).

    python -m papertrail.notebooks                 percent scripts -> notebooks
    python -m papertrail.notebooks --from-notebooks  notebooks edited in JupyterLab -> percent scripts
    python -m papertrail.notebooks --check         exit 1 and name the pairs that differ

jupytext alone writes no kernelspec (papermill then stops) and draws new cell ids each time; both are mended here.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from basics import paths
from basics.errors import ThreefoldError
from basics.files import atomic_write, sha256_bytes
from papertrail.notebook_files import read_notebook, write_notebook
from papertrail.verify import first_difference

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Tags and labels are meant; what JupyterLab adds (folding, scroll state, execution times) is not.
CELL_METADATA = "tags,label,editable,deletable,-all"
LABEL = re.compile(r"^#\|\s*label:\s*([A-Za-z0-9_-]{1,64})\s*$", re.MULTILINE)


def to_notebook(script: str) -> dict:
    """A notebook's JSON (nbformat 4.5, no outputs) from a percent script.

    A cell's id is its Quarto label, else a digest of its text, so that the same script always gives the same file and
    an inserted cell changes no other cell's id.
    """
    import jupytext  # imports nbformat, which takes a second or two

    cells, seen = jupytext.reads(script, fmt="py:percent").cells, Counter()
    for cell in cells:
        label = LABEL.search(cell.source) if cell.cell_type == "code" else None
        identity = label[1] if label else sha256_bytes(f"{cell.cell_type}\n{cell.source}".encode())[:12]
        seen[identity] += 1
        cell["id"] = identity if seen[identity] == 1 else f"{identity[:56]}-{seen[identity]}"
        cell.metadata.pop("lines_to_next_cell", None)
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def to_script(notebook: dict) -> str:
    """The percent script of a notebook's JSON: text, tags and labels, without outputs."""
    import jupytext
    import nbformat

    metadata = {"jupytext": {"cell_metadata_filter": CELL_METADATA, "notebook_metadata_filter": "-all"}}
    return jupytext.writes(nbformat.from_dict({**notebook, "metadata": metadata}), fmt="py:percent")


def pairs(folder: Path | None = None) -> list[tuple[Path, Path]]:
    """(percent script, notebook) for every name that has either, sorted. Default: the project's."""
    folder = folder or paths.NOTEBOOKS
    names = {path.stem for path in (folder / "percent").glob("*.py")} | {path.stem for path in folder.glob("*.ipynb")}
    return [(folder / "percent" / f"{name}.py", folder / f"{name}.ipynb") for name in sorted(names)]


def sync(folder: Path | None = None, *, from_notebooks: bool = False) -> list[Path]:
    """Writes each pair's other half where it differs; returns the files written. Unchanged files are not touched."""
    written = []
    for script, notebook in pairs(folder):
        if from_notebooks and notebook.exists():
            text = to_script(read_notebook(notebook))
            if not script.exists() or script.read_text(encoding="utf-8") != text:
                atomic_write(script, text)
                written.append(script)
        if script.exists():
            # In both directions the notebook ends up as the script's own: no outputs, stable ids.
            wanted = to_notebook(script.read_text(encoding="utf-8"))
            if not notebook.exists() or read_notebook(notebook) != wanted:
                write_notebook(notebook, wanted)
                written.append(notebook)
    return written


def check(folder: Path | None = None) -> list[str]:
    """One line for each pair that does not agree, naming the first difference; empty when all agree."""
    problems = []
    for script, notebook in pairs(folder):
        if not script.exists():
            problems.append(f"{notebook.name}: no percent/{script.name} beside it")
        elif not notebook.exists():
            problems.append(f"percent/{script.name}: no {notebook.name} beside it")
        elif difference := first_difference(to_notebook(script.read_text(encoding="utf-8")), read_notebook(notebook)):
            problems.append(f"{notebook.name} differs from percent/{script.name}: {difference}")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m papertrail.notebooks", description="Keep the pairs together.")
    parser.add_argument("--from-notebooks", action="store_true", help="the notebooks were edited: update the scripts")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a pair differs")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            problems = check()
            print("\n".join(problems) or f"{len(pairs())} pairs agree")
            return 1 if problems else 0
        for path in sync(from_notebooks=options.from_notebooks):
            print(f"wrote {path.relative_to(paths.PROJECT)}")
        return 0
    except ThreefoldError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
