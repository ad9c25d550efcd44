"""Where things are: the project's folders, from the editable install, and the runs folder."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOKS = PROJECT / "notebooks"
DATA = PROJECT / "data"
REPORT = PROJECT / "report"
PRESETS = Path(__file__).resolve().parent / "presets"
RUNS = Path(os.environ.get("THREEFOLD_RUNS", PROJECT / "runs")).resolve()
