"""`python -m benchmarks.gpu`; see the package."""

import argparse
import gc
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from basics.files import atomic_write
from benchmarks.gpu import oracles, speed
from benchmarks.gpu.box import Box

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers")


def machine(box: Box) -> dict[str, Any]:
    found = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
    }
    if box.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "memory_gb": card.total_memory / 1e9, "capability": f"{card.major}.{card.minor}"}
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True)
        found["driver, power limit, largest clock"] = asked.stdout.strip() or asked.stderr.strip()
    return found


# Name -> (what it does, seconds it may take at most), in the order of their worth.
SECTIONS: dict[str, tuple[Callable[[Box], dict[str, Any]], float]] = {
    "machine": (machine, 20),
    "matmul": (speed.matmul, 30),
    "oracle: flex attention": (oracles.flex_attention, 100),
    "oracle: transformers": (oracles.transformers_logits, 40),
    "oracle: objectives": (oracles.objectives, 40),
    "oracle: compiled losses": (oracles.compiled_losses, 60),
    "oracle: decoding": (oracles.decoding_steps, 30),
    "oracle: training": (oracles.training, 50),
    "oracle: fsdp2": (oracles.fsdp2, 40),
    "pretrain": (lambda box: speed.training(box, "pretrain"), 180),
    "sft": (lambda box: speed.training(box, "sft"), 120),
    "dpo": (lambda box: speed.training(box, "dpo"), 120),
    "decoding": (speed.decoding, 90),
    "scoring": (speed.scoring, 60),
    "profile": (speed.top_kernels, 60),
}


def wrong(found: Any, name: str = "") -> list[str]:
    """The checks in a section's results that are not within their tolerance."""
    if not isinstance(found, dict):
        return []
    if found.get("ok") is False:
        return [f"{name or 'it'}: relative error {found['relative_error']:.3g}, allowed is {found['tolerance']:g}"]
    return [line for key, value in found.items() for line in wrong(value, key)]


def run(box: Box, name: str, seconds: float) -> dict[str, Any]:
    """One section, ended by a TimeoutError after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"{name} took more than {seconds:.0f} s")

    box.deadline = time.monotonic() + seconds
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        found = SECTIONS[name][0](box)
        failed = wrong(found)
        return {**found, "error": "; ".join(failed)} if failed else found
    except Exception as error:  # of any kind: a rented machine is paid for, the other sections are to run
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="A first run on a GPU.")
    parser.add_argument("--seconds", type=float, default=520, help="in all, imports excepted (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results.json"), help="default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --rehearse runs on the CPU")
    box, end = Box("cpu" if options.rehearse else "cuda", options.rehearse), time.monotonic() + options.seconds
    for name, (_, most) in SECTIONS.items():
        begun = time.monotonic()
        left = end - begun
        found = run(box, name, min(most, left)) if left > 1 else {"skipped": "no time was left"}
        box.results[name] = {**found, "seconds": round(time.monotonic() - begun, 2)}
        state = found.get("error") or found.get("skipped") or "ok"
        print(f"{name}: {state} ({box.results[name]['seconds']} s)", flush=True)
        results = {"rehearsal": options.rehearse, "time": time.strftime("%F %T %z"), "sections": box.results}
        atomic_write(options.out, json.dumps(results, indent=1) + "\n")
        torch.compiler.reset()
        gc.collect()
        if box.device == "cuda":  # raises where an error has ended the use of the GPU: no other section could run
            torch.cuda.empty_cache()
    return int(any("error" in found or "skipped" in found for found in box.results.values()))


if __name__ == "__main__":
    sys.exit(main())
