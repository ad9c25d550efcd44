"""One contestant in a process of its own: takes "check" and "round" line by line, answers in JSON.

Each has its own allocator, thread pool and compiled graphs, so that none runs on what another left behind; only one
of them works at a time.
"""

import importlib
import json
import os
import sys
import time
import warnings


def main() -> None:
    # Whatever libraries print goes to stderr; answers have the real stdout to themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")  # a peer's advice would fill the log
    import torch

    target, threads, size, data = sys.argv[1:]
    torch.set_num_threads(int(threads))
    module, name = target.split(":")
    from benchmarks.setup import Setup

    contestant = getattr(importlib.import_module(f"benchmarks.{module}"), name)(Setup(size, data))
    for line in sys.stdin:
        begun = time.perf_counter()
        if line.strip() == "check":
            answer = {"values": contestant.check(), "settings": contestant.settings}
        else:
            answer = {"measures": contestant.round()}
        answers.write(json.dumps({**answer, "wall": time.perf_counter() - begun}) + "\n")


if __name__ == "__main__":
    main()
