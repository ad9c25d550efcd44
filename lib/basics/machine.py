"""What this machine gives a process: cores, memory, a GPU, and a compiler for kernels. Does not import torch."""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HIDDEN = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}  # environment of a process that uses no GPU
# Files with the memory limit of a container: of control groups, version 2 and 1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def cores() -> int:
    """Cores this process may use: its affinity, limited by a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    return count


def free_cores(seconds: float = 0.3) -> int:
    """How many of the cores this process may use are idle, at least 1, measured over so many seconds."""
    import psutil  # late: a machine that only trains may not have it

    shares = psutil.cpu_times_percent(seconds)
    return max(1, min(cores(), round((shares.idle + getattr(shares, "iowait", 0.0)) / 100 * psutil.cpu_count())))


class OtherLoad:
    """Measures how many cores other processes have kept busy since it was made."""

    def __init__(self) -> None:
        self._begun = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        import psutil

        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted as user and nice as well
        return time.perf_counter(), sum(times) - twice - idle - time.process_time()

    def cores(self) -> float:
        (begun, before), (now, after) = self._begun, self._now()
        return max(0.0, (after - before) / max(1e-3, now - begun))


def memory(limits: tuple[Path, ...] = LIMITS) -> int:
    """Bytes of memory this process may use: the machine's with its swap, or the limit of its container if lower.

    limits: files that hold a limit in bytes, or "max".
    """
    import psutil  # late: a machine that only trains may not have it

    total = psutil.virtual_memory().total + psutil.swap_memory().total
    for file in limits:
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(file.read_text()))
    return total


def hide_gpus() -> None:
    """Have this process and those it starts from here on run on the CPU. Call it before torch looks for a GPU."""
    os.environ.update(HIDDEN)


def has_gpu() -> bool:
    """Whether the driver shows a GPU: by a device file, or to nvidia-smi, which is all that shows one under WSL. Not
    where CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES hides all of them."""
    if any(os.environ.get(name) in ("", "-1") for name in HIDDEN):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or bool(gpu_name())


def gpu_name() -> str:
    """The name of the first GPU that nvidia-smi lists, "" if it lists none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.match(r"GPU 0: (.+?)(?: \(UUID|\n|$)", listed.stdout)
    return found[1] if found and listed.returncode == 0 else ""


def driver_cuda(library: str = "libcuda.so.1") -> tuple[int, int] | None:
    """The newest CUDA version, major and minor, that NVIDIA's driver supports; None without a driver.

    library: the driver's, as the loader finds it or as a path.
    """
    version = ctypes.c_int()
    try:
        if ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version)) != 0:  # CUDA_SUCCESS
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10  # 12040 is 12.4


def missing_to_compile(device: str, include: str = "") -> str:
    """What torch.compile lacks here to build kernels for a device, beside Triton; "" if nothing.

    include: the folder that Python's headers should be in; default this Python's. They are needed on both devices.
    """
    headers = Path(include or sysconfig.get_path("include")) / "Python.h"
    if device == "cpu":
        names, what = (os.environ.get("CXX", ""), "g++", "clang++", "c++"), "a C++ compiler (g++ or clang++)"
    else:
        names, what = (os.environ.get("CC", ""), "gcc", "clang"), "a C compiler (gcc or clang)"
    missing = [] if any(map(shutil.which, filter(None, names))) else [what]
    if not headers.is_file():
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        missing.append(f"Python.h (Debian and Ubuntu: apt-get install {version}-dev)")
    return " and ".join(missing)
