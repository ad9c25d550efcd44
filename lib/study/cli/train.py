"""`threefold train`: a stage's training without its notebook, alone or as one of the workers that torchrun started.

What is trained stays in the stage's work folder; the stage's notebook then finds it done and finishes the stage.
"""

import argparse
import contextlib
import os
import sys
import threading
import traceback

from basics import names
from basics.errors import ConfigError, ThreefoldError
from study.cli.common import say
from study.existing import open_existing
from study.preset import TRAINED
from study.run import Run, open_stage


def train(options: argparse.Namespace) -> int:
    """Train a stage of a run. --begun: a notebook has begun it and waits; this worker ends when the notebook does."""
    run, stage = open_existing(options.run, options.data_dir), options.stage
    if names.replicate_of(stage)[0] not in TRAINED:
        raise ConfigError(f"{stage}: allowed are {', '.join(TRAINED)} and their replicates, as in sft-seed2")
    run.spec(stage)
    for need in run.plan[stage].needs:
        run.require(need)
    from threefold.training import rendezvous  # late: torch takes seconds

    rank, size = rendezvous.rank_and_size()
    if options.begun:
        threading.Thread(target=_leave_with_stdin, daemon=True).start()
    try:
        _train(run, stage, options.begun)
    except Exception as error:
        if size == 1:
            raise
        if not isinstance(error, ThreefoldError):
            traceback.print_exc()
        print(f"threefold: worker {rank} of {size}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # connections to the others may block an orderly end
    return 0


def _train(run: Run, stage: str, begun: bool) -> None:
    from papertrail import scheduler, staleness
    from study.training import prepare, train_stage
    from threefold.training import distributed

    fingerprint = run.fingerprint(stage)
    with distributed.joined(say) as workers, contextlib.ExitStack() as held:
        opened = open_stage(stage, preset="", run=run.name, data_dir=run.data_dir, nproc=1)
        if workers.first and not begun:
            held.enter_context(scheduler.lock(run.path))
        if workers.agreed(not begun and staleness.state(run, stage).kind == "fresh"):
            if workers.first:
                say(f"{stage}: fresh, nothing to train")
            return
        if workers.first:  # the others find its folder, and its tokens in the cache
            inputs = prepare(opened)
            folder = opened.partial if begun else opened.begin(fingerprint)
        workers.agreed(True)
        if not workers.first:
            inputs, folder = prepare(opened), opened.partial
        train_stage(opened, inputs, folder)
        if workers.first and not begun:
            say(f"{stage}: its notebook finishes the stage: `threefold run --run {run.name} --only {stage}`")


def _leave_with_stdin() -> None:
    """End this process when stdin is closed, because the process that started it has ended."""
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    os._exit(1)
