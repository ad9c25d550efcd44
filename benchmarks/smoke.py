"""The smoke run from start to report, as a user runs it. The warm-up round fills the caches."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = (sys.executable, "-m", "study", "run", "--preset", "smoke")


class SmokeRun:
    def __init__(self, setup):
        self.settings = {"command": "threefold run --preset smoke"}
        self.runs = Path(tempfile.mkdtemp(prefix="threefold-bench-"))

    def check(self):
        return {}

    def round(self) -> dict[str, tuple[float, float]]:
        shutil.rmtree(self.runs / "smoke", ignore_errors=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_"))}
        begun = time.perf_counter()
        subprocess.run(
            COMMAND,
            env={**environment, "THREEFOLD_RUNS": str(self.runs)},
            check=True,
        )
        return {"run": (1.0, time.perf_counter() - begun)}
