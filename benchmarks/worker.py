"""One contestant in a process of its own: reads "check" or "round" line by line and answers in JSON.

Each process has its own allocator, thread pool and compiled graphs, so that contestants do not influence each other;
only one of them works at a time.
"""

import importlib
import json
import os
import sys
import time


def main() -> None:
    # What libraries print goes to stderr; only answers go to the real stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    target, threads, size, data = sys.argv[1:]
    torch.set_num_threads(int(threads))
    module, name = target.split(":")
    from benchmarks.setup import Setup

    setup = Setup(size, data)
    contestant = getattr(importlib.import_module(f"benchmarks.{module}"), name)(setup)
    for line in sys.stdin:
        begun = time.perf_counter()
        if line.strip() == "check":
            answer = {"values": contestant.check(), "settings": contestant.settings, "data": setup.used}
        else:
            answer = {"measures": contestant.round()}
        answers.write(json.dumps({**answer, "wall": time.perf_counter() - begun}) + "\n")


if __name__ == "__main__":
    main()
