"""Where things are: the project's folders, from the editable install, and the runs folder."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
PROJECT = PACKAGE.parents[1]
NOTEBOOKS = PROJECT / "notebooks"
DATA = PROJECT / "data"
REPORT = PROJECT / "report"
PRESETS = PACKAGE / "presets"
RUNS = Path(os.environ.get("THREEFOLD_RUNS") or PROJECT / "runs").resolve()
