"""Workers that wait for each other: what they say, that Ctrl-C is heard, and that they give up."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from basics import paths
from basics.errors import ConfigError, TrainingError
from threefold.training import distributed, rendezvous

VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a worker; those not given are unset."""

    def put(**values: object) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return put


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"WORLD_SIZE": 2}, "RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two", "RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}, "WORLD_SIZE = 'two'"),
        ({"WORLD_SIZE": "", "RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": 2, "RANK": -1, "MASTER_ADDR": "a", "MASTER_PORT": 1}, "RANK = '-1'"),
        ({"WORLD_SIZE": 2, "RANK": 2, "MASTER_ADDR": "a", "MASTER_PORT": 1}, "a rank below the size"),
        ({"WORLD_SIZE": 0, "RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}, "a rank below the size"),
        ({"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 0}, "a port from 1"),
    ],
)
def test_variables_that_cannot_be_meant_are_one_line(environment, values, said):
    environment(**values)
    with pytest.raises(ConfigError, match=said) as caught, distributed.joined():
        pass
    assert "unset WORLD_SIZE" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values", [{}, {"WORLD_SIZE": 1}, {"RANK": 3}, {"MASTER_ADDR": "a", "WORLD_SIZE": 1, "RANK": 0}]
)
def test_a_process_alone_waits_for_nobody(environment, values):
    environment(**values)
    with distributed.joined() as workers:
        assert workers == distributed.Workers()


@pytest.mark.parametrize(("rank", "awaited"), [(0, 1), (1, 0)])
def test_the_others_are_named_and_given_up(environment, monkeypatch, rank, awaited):
    monkeypatch.setattr(rendezvous, "GIVE_UP", 1.0)
    port, said = free_port(), []
    environment(WORLD_SIZE=2, RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with pytest.raises(TrainingError, match=f"worker {awaited} of 2 at 127.0.0.1:{port} did not come"):
        rendezvous.meet(rank, 2, said.append)
    assert len(said) == 1 and said[0].startswith(f"waiting for worker {awaited} of 2 at 127.0.0.1:{port}, ")


def test_a_port_in_use_is_named(environment):
    with socket.socket() as opened:
        opened.bind(("", 0))
        opened.listen()
        environment(WORLD_SIZE=2, RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=opened.getsockname()[1])
        with pytest.raises(ConfigError, match="worker 0 of 2 cannot listen at 127"):
            rendezvous.meet(0, 2, print)


def test_workers_that_come_late_meet(environment):
    environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    stores = {}

    def worker(rank: int) -> None:
        stores[rank] = rendezvous.meet(rank, 2, print)

    late = threading.Thread(target=worker, args=(1,))
    late.start()  # before there is anybody to meet
    time.sleep(0.5)
    worker(0)
    late.join()
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"


def test_ctrl_c_ends_the_wait():
    code = (
        "import sys, threefold.training.distributed as d\n"
        "try:\n    with d.joined(lambda line: print(line, flush=True)): pass\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    place = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", code]
    worker = subprocess.Popen(
        command, env=os.environ | place | {"PYTHONPATH": str(paths.PACKAGES)}, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout.readline().startswith("waiting for worker 1 of 2 at 127.0.0.1")
    worker.send_signal(signal.SIGINT)
    assert worker.wait(20) == 130
    worker.stdout.close()
