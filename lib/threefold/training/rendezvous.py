"""How the workers of a training find each other: by the variables that torchrun, Kubeflow or SageMaker set.

`torch.distributed` would wait for an hour without a word and without hearing Ctrl-C.
"""

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from basics.errors import ConfigError, TrainingError
from basics.names import shown

GIVE_UP = 300.0  # seconds without the other workers
ATTEMPT = timedelta(seconds=2)  # of one attempt to reach the first worker, during which no signal is heard


def rank_and_size() -> tuple[int, int]:
    """This worker's rank and the number of workers, (0, 1) for a process alone. Raises ConfigError."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    values = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    way_out = "start the workers with torchrun, or unset WORLD_SIZE to train in this process alone"
    if missing := [name for name, value in values.items() if not value]:
        raise ConfigError(
            f"WORLD_SIZE = {values['WORLD_SIZE']} in the environment means several workers, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: {way_out}"
        )
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        value, least = os.environ.get(name), int(name == "LOCAL_WORLD_SIZE")
        if value is not None and not (re.fullmatch("[0-9]{1,9}", value) and int(value) >= least):
            raise ConfigError(
                f"{name} = {shown(value)} in the environment: expected a whole number of at least {least}: {way_out}"
            )
    rank, size = int(values["RANK"]), int(values["WORLD_SIZE"])
    if rank >= size or not 0 < int(values["MASTER_PORT"]) < 2**16:
        raise ConfigError(
            f"RANK = {rank}, WORLD_SIZE = {size}, MASTER_PORT = {values['MASTER_PORT']} in the environment: expected a "
            f"rank below the size and a port from 1 to 65535: {way_out}"
        )
    return rank, size


def meet(rank: int, size: int, say: Callable[[str], None]) -> dist.Store:
    """Wait until every worker is there and return the store over which they connect.

    say: receives one line that names the awaited workers, unless torchrun looks after that. Raises TrainingError after
    `GIVE_UP` seconds, ConfigError where the first worker cannot listen at its port.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun listens at the port
    listens, store, announced, deadline = rank == 0 and not hosted, None, hosted, time.monotonic() + GIVE_UP
    while True:
        try:
            store = store or dist.TCPStore(host, port, size, listens, ATTEMPT, wait_for_workers=False)
            store.set(f"here/{rank}", "")
            awaited = [other for other in range(size) if not store.check([f"here/{other}"])]
        except (dist.DistNetworkError, dist.DistStoreError) as error:  # the first worker is not there yet
            if listens:
                raise ConfigError(f"worker 0 of {size} cannot listen at {host}:{port}: {error}") from None
            awaited = [0]
        if not awaited:
            store.set_timeout(timedelta(hours=1))
            return dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        place = f"worker {', '.join(map(str, awaited[:8]))} of {size} at {host}:{port}"
        if not announced:
            say(f"waiting for {place}, at most {GIVE_UP / 60:.0f} minutes (WORLD_SIZE is set in the environment)")
            announced = True
        if time.monotonic() > deadline:
            raise TrainingError(f"{place} did not come; unset WORLD_SIZE to train in this process alone")
        time.sleep(0.2)
