"""Two processes train as one does: curves, weights, resuming, what ends them and what they say of it."""

import subprocess
import sys
from itertools import chain
from pathlib import Path

import distributed_worker as world
import numpy as np
import psutil
import pytest
import torch

from basics.errors import ConfigError
from threefold.config import TrainConfig
from threefold.training import distributed
from threefold.training.distributed import Workers
from threefold.training.feed import Feed
from threefold.training.state import curve

TOLERANCE = 1e-4  # of a loss, in nats


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """A folder of trainings by two processes over gloo."""
    out = tmp_path_factory.mktemp("together")
    world.killed(out / "resumed-by-two")  # by one process, which the two go on from
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, Path(__file__).parents[1] / "distributed_worker.py", out],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same trainings by this process, each made when it is asked for."""
    out, made = tmp_path_factory.mktemp("alone"), {}

    def get(name: str):
        if name not in made:
            made[name] = getattr(world, name)(out / name)
        return made[name]

    return get


def apart(one: Path, other: Path, key: str) -> float:
    a, b = (np.array(curve(folder)[key]) for folder in (one, other))
    assert a.shape == b.shape
    return np.abs(a - b).max()


@pytest.mark.parametrize("name", ["pretrain", "pretrain-split", "sft", "dpo", "dpo-split", "distil-split"])
def test_two_workers_train_as_one(together, alone, name):
    """`split`: by FSDP2, the others by DDP."""
    expected, found = alone(name.partition("-")[0]), together / name
    columns, own = curve(expected.folder), curve(found)
    assert all(own[key] == columns[key] for key in ("step", "tokens", "lr"))
    for key in columns.keys() - {"step", "tokens", "lr", "heldout", "seconds", "tokens_per_second"}:
        assert apart(expected.folder, found, key) < TOLERANCE, key
    assert own["heldout"]["step"] == columns["heldout"]["step"] and len(columns["heldout"]["step"]) > 2
    assert own["heldout"]["loss"] == pytest.approx(columns["heldout"]["loss"], abs=TOLERANCE)
    assert max(columns["loss"]) - min(columns["loss"]) > 100 * TOLERANCE  # something was learned meanwhile

    again = getattr(world, name.partition("-")[0])(found)  # finished: one process takes it as its own
    assert again.result.workers == 2 and again.result.note.startswith("2 workers ")
    assert ("split the model" in again.result.note) == name.endswith("split")
    assert again.result.tokens == expected.result.tokens
    if not name.startswith("dpo"):  # pairs are packed by the batch, and each worker has its own
        assert again.result.padding == expected.result.padding
    for parameter, other in zip(again.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "step"), [("resumed", 20), ("resumed-split", 20), ("interrupted", 7)])
def test_one_worker_goes_on_where_two_were_ended(together, alone, name, step):
    """`split`: their state is whole all the same. `interrupted`: by a Ctrl-C that one of them got."""
    expected, found = alone("pretrain"), world.pretrain(together / name)
    assert f'{{"resumed_from": {step}}}' in (together / name / "metrics.jsonl").read_text()
    assert curve(together / name)["step"] == list(range(1, 51)) and found.result.workers == 1
    assert apart(expected.folder, together / name, "loss") < TOLERANCE
    assert found.result.heldout_loss == pytest.approx(expected.result.heldout_loss, abs=TOLERANCE)


def test_two_workers_go_on_where_one_was_killed(together, alone):
    assert apart(alone("pretrain").folder, together / "resumed-by-two", "loss") < TOLERANCE
    assert '{"resumed_from": 20}' in (together / "resumed-by-two" / "metrics.jsonl").read_text()


# Sharing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_workers_share_each_steps_rows(size):
    """Together the rows of one process, none twice; micro-batches no larger than asked for, and all of one shape."""
    config = TrainConfig(steps=7, batch_size=4, accumulate=3, replay=0.3)
    rows, text = world.documents(1, 90), world.documents(2, 27)

    def taken(feed: Feed) -> list[list[list[int]]]:
        return [sorted(row for batch in step for row in batch.tokens_BT.tolist()) for step, _ in feed.run(2)]

    one = taken(Feed(rows, config, 0, text))
    feeds = [Feed(rows, config, 0, text, rank, size) for rank in range(size)]
    assert [sorted(chain(*parts)) for parts in zip(*map(taken, feeds), strict=True)] == one
    for feed in feeds:
        assert feed.micro_batch <= 4 and feed.micro_batch * feed.accumulate * size == 12 and feed.steps == 7
        assert [rows for _, rows in feed.run(2)] == [rows for _, rows in Feed(rows, config, 0, text).run(2)]


@pytest.mark.parametrize("size", [2, 3])
def test_workers_share_each_steps_pairs(size):
    config = TrainConfig(steps=5, batch_size=3, accumulate=2)
    pairs = world.preferences()

    def taken(feed: Feed) -> list[list[int]]:
        return [[pair for batch in step for pair in batch.pairs_P.tolist()] for step, _ in feed.run(1)]

    one = taken(Feed(pairs, config, 0))
    parts = [taken(Feed(pairs, config, 0, None, rank, size)) for rank in range(size)]
    assert [sorted(chain(*step)) for step in zip(*parts, strict=True)] == [sorted(step) for step in one]
    assert all(len(step) == 6 // size for part in parts for step in part)


def test_a_batch_that_cannot_be_shared_evenly_is_named():
    with pytest.raises(ConfigError, match=r"batch_size x accumulate = 4 x 3 = 12 rows a step .* 5 workers"):
        Feed(world.documents(1, 9), TrainConfig(steps=1, batch_size=4, accumulate=3), 0, None, 0, 5)


@pytest.mark.parametrize(("n", "size"), [(6, 3), (7, 3), (2, 3), (0, 2), (5, 1)])
def test_items_are_dealt_once_and_in_step(n, size):
    hands = [list(Workers(rank, size).deal(range(n))) for rank in range(size)]
    assert sorted(item for hand in hands for item, counts in hand if counts) == list(range(n))
    assert len({len(hand) for hand in hands}) == 1


def test_a_model_is_split_where_it_is_too_large(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    memory = psutil.virtual_memory().total
    many = int(memory / 2 / distributed.BYTES)
    two = Workers(0, 2)
    assert distributed.to_be_split("auto", many, "cpu", two) and not distributed.to_be_split("auto", 10**6, "cpu", two)
    assert distributed.to_be_split("on", 1, "cpu", two) and not distributed.to_be_split("off", many, "cpu", two)
    assert not any(distributed.to_be_split(shard, many, "cpu", Workers()) for shard in ("auto", "on", "off"))
