"""Training: sums over micro-batches, resuming, errors, messages, checkpoints."""

import errno
import json
import math
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from shared import counting, flip

from basics.errors import ConfigError, DataError, TrainingError
from threefold.config import ModelConfig, TrainConfig
from threefold.data.packing import IGNORE, pack_documents, pack_examples, pack_pairs
from threefold.model.decoder import Decoder
from threefold.model.hf import load_checkpoint
from threefold.training import half_depth, held_out_loss, loop, monitor, numerics
from threefold.training.feed import Feed
from threefold.training.loop import Trained, train
from threefold.training.objectives import Distillation, Loss, MicroBatch, NextToken, Preference
from threefold.training.state import State, StateWriter, collect, curve, load_state, read_metrics, restore

EOS, SINK, VOCABULARY = 0, 1, 37
TINY = ModelConfig(n_layer=2, d_model=16, n_head=2, d_ff=24, context=24, vocab_size=VOCABULARY)
SHORT = TrainConfig(steps=8, batch_size=3, optimizer="muon", evaluate_every=3, checkpoint_every=3)


def model(seed: int = 0, config: ModelConfig = TINY) -> Decoder:
    decoder = Decoder(config)
    decoder.initialise(torch.Generator().manual_seed(seed))
    return decoder


@pytest.fixture(scope="module")
def text():
    return pack_documents(counting(1, 60, 2, 40), TINY, EOS, [SINK])


@pytest.fixture(scope="module")
def heldout():
    return pack_documents(counting(2, 9, 2, 40), TINY, EOS, [SINK])


@pytest.fixture(scope="module")
def examples():
    prompts, responses = counting(3, 40, 1, 8), counting(4, 40, 1, 9)
    return pack_examples(list(zip(prompts, responses, strict=True)), TINY, EOS, [SINK])


@pytest.fixture(scope="module")
def pairs():
    parts = zip(counting(5, 14, 1, 6), counting(6, 14, 1, 6), counting(7, 14, 1, 12), strict=True)
    return pack_pairs(list(parts), TINY, EOS, [SINK])


def quiet(message: str) -> None:
    pass


def trained(decoder, rows, config, folder, objective=None, **settings) -> Trained:
    settings = {"seed": 5, "device": "cpu", "progress": quiet, **settings}
    return train(decoder, objective or NextToken(), rows, config, folder, **settings)


def run(*arguments, **settings):
    return trained(*arguments, **settings).result


def weights(decoder) -> dict:
    return {name: value.clone() for name, value in decoder.state_dict().items()}


# What is trained ----------------------------------------------------------------------------------------------------


def test_training_learns_and_records_every_step(text, heldout, tmp_path):
    decoder = model()
    result = run(decoder, text, TrainConfig(steps=40, batch_size=4, learning_rate=5e-3), tmp_path, heldout=heldout)
    assert result.loss_first == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert result.heldout_loss < 0.75 * result.heldout[0]["loss"]
    assert result.heldout_loss == pytest.approx(held_out_loss(decoder, heldout, device="cpu")["loss"], abs=1e-6)
    columns = curve(tmp_path)
    assert columns["step"] == list(range(1, 41)) and columns["heldout"]["step"] == [0, 40]
    assert columns["tokens"][-1] == result.tokens and columns["heldout"]["loss"][-1] == result.heldout_loss
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "seconds"} <= columns.keys()
    assert result.loss_last == pytest.approx(sum(columns["loss"][-4:]) / 4)
    assert curve(tmp_path, points=12)["step"] == list(range(4, 41, 4))


def test_tokens_are_counted_without_padding_and_sinks(examples, tmp_path):
    config = TrainConfig(steps=7, batch_size=2, accumulate=2)
    result = run(model(), examples, config, tmp_path)
    batches = [batch for step, _ in Feed(examples, config, 5).run(0) for batch in step]
    assert len(batches) == 14
    assert result.tokens == sum(int((batch.segments_BT > 0).sum()) for batch in batches)
    assert result.padding == sum(int((batch.segments_BT < 0).sum()) for batch in batches) > 0


def test_accumulation_equals_one_large_batch(examples, tmp_path):
    """The micro-batches hold different numbers of targets: a mean of their means would be something else."""
    one, many = model(), model()
    settings = {"optimizer": "adamw", "steps": 6}
    whole = run(one, examples, TrainConfig(batch_size=6, **settings), tmp_path / "one")
    parts = run(many, examples, TrainConfig(batch_size=1, accumulate=6, **settings), tmp_path / "many")
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(many)[name], value, rtol=1e-4, atol=2e-6, msg=name)
    assert whole.tokens == parts.tokens
    losses = [curve(tmp_path / name)["loss"] for name in ("one", "many")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    counts = {int((examples.rows([i]).targets_BT != IGNORE).sum()) for i in range(len(examples))}
    assert len(counts) > 2


def test_the_gradient_norm_is_clipped(text, tmp_path):
    decoder = model()
    before = weights(decoder)
    config = TrainConfig(steps=1, batch_size=4, optimizer="adamw", clip=1e-12, weight_decay=0.0, warmup=0.0)
    run(decoder, text, config, tmp_path)
    assert read_metrics(tmp_path)[0]["grad_norm"] > 0.01  # as it was
    moved = max((value - before[name]).abs().max().item() for name, value in weights(decoder).items())
    assert moved < 1e-3 * config.learning_rate  # Adam's eps is larger than what is left of the gradient


def test_epochs_and_tokens_become_steps(text):
    assert Feed(text, TrainConfig(epochs=2, batch_size=3), 0).steps == round(2 * len(text) / 3)
    feed = Feed(text, TrainConfig(tokens=3000, batch_size=2, accumulate=2), 0)
    assert feed.steps * 4 * text.n_tokens / len(text) == pytest.approx(3000, rel=0.1)


def test_an_epoch_shows_every_row_once_in_the_seeds_order(text):
    def seen(seed, start=0):
        return [row for _, rows in Feed(text, TrainConfig(epochs=2, batch_size=3), seed).run(start) for row in rows]

    n = len(text)
    assert sorted(seen(0)[:n]) == list(range(n)) and seen(0)[:n] != seen(0)[n : 2 * n]
    assert seen(0) != seen(1)
    assert seen(0, start=5) == seen(0)[15:]


def test_replay_is_a_share_of_all_rows(examples, text, tmp_path):
    config = TrainConfig(steps=40, batch_size=3, accumulate=2, replay=0.3)
    feed = Feed(examples, config, 0, text)
    replayed = []
    for batches, rows in feed.run(0):
        assert all(batch.tokens_BT.shape == (3, 24) for batch in batches)
        replayed.append(6 - len(rows))
    assert sum(replayed) == 0.3 * 40 * 6 and set(replayed) == {1, 2}
    first, _ = next(feed.run(0))
    again, _ = next(Feed(examples, config, 0, text).run(0))
    assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(first, again, strict=True))
    run(model(), examples, replace(config, steps=2), tmp_path, replay=text)


def test_what_cannot_be_fed(text, pairs):
    for settings, message in [
        ({"batch_size": 3}, "exactly one of steps"),
        ({"steps": 3, "epochs": 1}, "steps and epochs"),
        ({"steps": 3, "replay": 0.5}, "needs pretraining rows"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Feed(text, TrainConfig(**settings), 0)
    with pytest.raises(ConfigError, match="cannot be mixed"):
        Feed(pairs, TrainConfig(steps=3, replay=0.5), 0, text)
    empty = pack_documents([[3]], TINY, EOS, [SINK])
    empty._offsets = empty._offsets[:1]
    with pytest.raises(DataError, match="no rows"):
        Feed(empty, TrainConfig(steps=3), 0)


# Resuming -----------------------------------------------------------------------------------------------------------


class Stops(NextToken):
    """A training that is interrupted in a given call."""

    def __init__(self, call: int, error: type[BaseException] = KeyboardInterrupt, message: str = ""):
        self.left, self.error, self.message = call, error, message

    def __call__(self, decoder, batch):
        self.left -= 1
        if self.left == 0:
            raise self.error(self.message)
        return super().__call__(decoder, batch)

    def for_heldout(self):
        return NextToken()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(text, heldout, examples, tmp_path, optimizer):
    config = replace(SHORT, optimizer=optimizer, replay=0.4, accumulate=2)
    settings = {"heldout": heldout, "replay": text}
    straight, resumed = model(), model()
    expected = run(straight, examples, config, tmp_path / "straight", **settings)

    with pytest.raises(KeyboardInterrupt):
        run(resumed, examples, config, tmp_path / "resumed", Stops(2 * 5 + 2), **settings)  # in the 6th step
    torch.rand(3)  # whatever else draws random numbers in between
    resumed = model()
    found = run(resumed, examples, config, tmp_path / "resumed", **settings)

    for name, value in weights(straight).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert (found.tokens, found.padding, found.heldout) == (expected.tokens, expected.padding, expected.heldout)
    assert (found.loss_first, found.loss_last) == (expected.loss_first, expected.loss_last)
    a, b = curve(tmp_path / "straight"), curve(tmp_path / "resumed")
    assert b["step"] == list(range(1, 9))
    assert all(a[key] == b[key] for key in ("step", "tokens", "loss", "lr", "grad_norm", "heldout"))
    lines = (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line).get("step") == 4 for line in lines) == 2  # append-only: the step stands there twice


def interrupted(rows, folder, config=SHORT) -> None:
    """A training that stops in its fifth step; the last state is that of the third."""
    with pytest.raises(KeyboardInterrupt):
        run(model(), rows, config, folder, Stops(5))


class Signals(NextToken):
    """A training that gets signals in a given call."""

    def __init__(self, call: int, *numbers: int):
        self.left, self.numbers = call, numbers

    def __call__(self, decoder, batch):
        self.left -= 1
        for number in self.numbers if self.left == 0 else ():
            signal.raise_signal(number)
        return super().__call__(decoder, batch)

    def for_heldout(self):
        return NextToken()


class Terminated(Exception):
    pass


def test_a_signal_saves_the_state_after_the_step_and_a_second_one_ends_at_once(text, heldout, tmp_path):
    def terminate(number, frame):
        raise Terminated

    config, said = replace(SHORT, checkpoint_every=-1), []  # no state is due before a minute
    straight, resumed = model(), model()
    expected = run(straight, text, config, tmp_path / "straight", heldout=heldout)
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        for call, number, error in ((3, signal.SIGINT, KeyboardInterrupt), (2, signal.SIGTERM, Terminated)):
            with pytest.raises(error):
                trained(
                    *(model(), text, config, tmp_path / "resumed", Signals(call, number)),
                    heldout=heldout,
                    progress=said.append,
                )
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert signal.getsignal(signal.SIGTERM) is terminate
        with pytest.raises(KeyboardInterrupt):
            run(model(), text, config, tmp_path / "resumed", Signals(2, signal.SIGTERM, signal.SIGINT), heldout=heldout)
    finally:
        signal.signal(signal.SIGTERM, before)
    ends = [line for line in said if "interrupted" in line]
    assert ends == [f"training: interrupted after step {n} of 8; the same command resumes from there" for n in (3, 5)]
    found = run(resumed, text, config, tmp_path / "resumed", heldout=heldout)
    lines = (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()
    assert [line for line in lines if "resumed" in line] == [f'{{"resumed_from": {n}}}' for n in (3, 5, 5)]
    assert (found.loss_last, found.heldout) == (expected.loss_last, expected.heldout)
    for name, value in weights(straight).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_signals_are_left_alone_outside_the_main_thread_and_where_they_are_ignored(text, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(model(), text, SHORT, tmp_path / "ignored", Signals(3, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, model(), text, SHORT, tmp_path / "thread").result()
    assert curve(tmp_path / "ignored")["loss"] == curve(tmp_path / "thread")["loss"]


def test_resumed_preferences_are_bit_identical(pairs, tmp_path, monkeypatch):
    config = TrainConfig(steps=7, batch_size=3, optimizer="adamw", checkpoint_every=2)

    def preferred(folder):
        return trained(model(1), pairs, config, folder, Preference(0.1), heldout=pairs, seed=3).model

    straight = preferred(tmp_path / "a")
    saves = []

    def interrupt(writer, state, values, write=StateWriter.write):
        write(writer, state, values)
        saves.append(state.step)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StateWriter, "write", interrupt)
        preferred(tmp_path / "b")
    assert saves == [2, 4]
    resumed = preferred(tmp_path / "b")
    for name, value in weights(straight).items():
        assert torch.equal(weights(resumed)[name], value), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_state_is_written_while_the_next_steps_are_taken(text, tmp_path, optimizer):
    config = replace(SHORT, optimizer=optimizer)
    step = loop.TrainStep(model(2), NextToken(), config, numerics.choose(config, 0, 0, "cpu"))
    batches = [MicroBatch.of(batch) for batch in text.batches(4, seed=0, steps=1)]
    writer, state = StateWriter(tmp_path, 0), State({}, step=1)
    for number in range(2):  # the optimizers' states are there from the first step on
        if number:
            writer.write(state, collect(step.model, step.optimizers))
            kept = {name: value.clone() for name, value in step.model.state_dict().items()}
            state.step = 99
        step.gradients(batches, 100)
        step.update()
    writer.wait()
    written, values = load_state(tmp_path, {})
    assert written.step == writer.step == 1
    assert all(torch.equal(values[f"model/{name}"], value) for name, value in kept.items())
    before = step.optimizers[0].state_dict()["state"]
    restore(values, step.model, step.optimizers)
    after = step.optimizers[0].state_dict()["state"]
    assert any(not torch.equal(before[0][key], after[0][key]) for key in before[0])  # of one step less
    writer.close()
    lost = StateWriter(tmp_path / "gone", 7)
    lost.write(State({}, step=8), {})
    with pytest.raises(OSError):
        lost.wait()
    assert lost.step == 7
    lost.wait()  # said once
    lost.close()


def test_what_was_noted_before_the_first_state_does_not_count_twice(text, heldout, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(model(), text, SHORT, tmp_path, Stops(2), heldout=heldout)  # in the second step; the first state is at 3
    run(model(), text, SHORT, tmp_path, heldout=heldout)
    assert curve(tmp_path)["heldout"]["step"] == [0, 3, 6, 8] and curve(tmp_path)["step"] == list(range(1, 9))


def test_a_state_whose_bytes_changed_is_not_resumed(text, tmp_path):
    interrupted(text, tmp_path)
    file = tmp_path / "resume.safetensors"
    content = file.read_bytes()
    for place in (len(content) - 1, len(content) // 2, content.index(b'\\"tokens\\": ') + 12, 40):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(TrainingError, match=r"resume.safetensors (is not what|cannot be|was written|belongs)"):
            run(model(), text, SHORT, tmp_path)
    file.write_bytes(content)
    run(model(), text, SHORT, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "metrics.jsonl", "training.json"])
def test_a_finished_training_of_which_a_byte_changed_is_not_loaded(text, tmp_path, name):
    first = trained(model(1), text, SHORT, tmp_path)
    content = (tmp_path / name).read_bytes()
    flip(tmp_path / name, content.index(b'"loss_last": ') + 16 if name == "training.json" else -4)
    with pytest.raises(TrainingError, match=rf"{name} is not what the training wrote; remove training.json there"):
        run(model(1), text, SHORT, tmp_path)
    (tmp_path / "training.json").unlink()
    again = trained(model(1), text, SHORT, tmp_path)
    assert all(torch.equal(weights(again.model)[key], value) for key, value in weights(first.model).items())


def test_a_disk_full_at_the_checkpoint_is_an_os_error_and_costs_no_step(text, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    save = loop.save_checkpoint

    def without_room(*arguments):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="File too large") as caught:
        patch.setattr(loop, "save_checkpoint", without_room)
        run(model(), text, SHORT, tmp_path)
    assert caught.value.errno == errno.EFBIG and caught.value.filename.endswith("/model.safetensors")
    run(model(), text, SHORT, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[-1] == '{"resumed_from": 8}'  # no step was taken again


def test_reference_log_probabilities_of_which_a_byte_changed_are_computed_again(pairs, tmp_path):
    config = replace(SHORT, optimizer="adamw")
    first = trained(model(), pairs, config, tmp_path / "a", Preference(0.1))
    for number, place in enumerate((0, 20, -1)):  # the header's length, the header, a value
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(tmp_path / "a" / "reference.safetensors", folder)
        flip(folder / "reference.safetensors", place)
        again = trained(model(), pairs, config, folder, Preference(0.1))
        assert (folder / "reference.safetensors").read_bytes() == (tmp_path / "a/reference.safetensors").read_bytes()
        assert all(torch.equal(weights(again.model)[key], value) for key, value in weights(first.model).items())


def test_a_loss_that_stands_out_is_noted(text, tmp_path):
    class Jumps(NextToken):
        """In the 30th of 40 steps the loss is thrice what it is."""

        calls = 0

        def __call__(self, decoder, batch):
            loss = super().__call__(decoder, batch)
            self.calls += 1
            return Loss(loss.sum * 3, loss.weight) if self.calls == 30 else loss

    said = []
    config = TrainConfig(steps=40, batch_size=3, checkpoint_every=7)
    result = run(model(), text, config, tmp_path, Jumps(), progress=said.append)
    (spike,) = result.spikes
    losses = curve(tmp_path)["loss"]
    assert spike["step"] == 30 and spike["loss"] == losses[29] > spike["limit"] > spike["median"]
    assert spike["median"] == pytest.approx(sorted(losses[:29])[14])
    assert [line["step"] for line in read_metrics(tmp_path) if line.get("spike")] == [30]
    assert any("the loss rose to" in line and "in step 30" in line for line in said)


def test_a_finished_training_is_not_repeated(text, tmp_path):
    first, again, messages = model(), model(), []
    expected = run(first, text, SHORT, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert run(again, text, SHORT, tmp_path, progress=messages.append, name="sft") == expected
    assert messages == ["sft: trained already, 8 steps; its checkpoint is loaded"]
    assert all(torch.equal(weights(again)[name], value) for name, value in weights(first).items())
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    with pytest.raises(TrainingError, match=r"another finished training \(steps differ\)"):
        run(model(), text, replace(SHORT, steps=9), tmp_path)


def test_another_trainings_state_is_refused(text, tmp_path):
    interrupted(text, tmp_path)
    with pytest.raises(TrainingError, match=r"another training .*learning_rate 0.003 there, 0.001 now"):
        run(model(), text, replace(SHORT, learning_rate=1e-3), tmp_path)
    with pytest.raises(TrainingError, match=r"another training .*initial_weights"):
        run(model(7), text, SHORT, tmp_path)
    content = (tmp_path / "resume.safetensors").read_bytes()
    (tmp_path / "resume.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainingError, match="cannot be read"):
        run(model(), text, SHORT, tmp_path)


def test_a_line_torn_by_a_kill_is_cut(text, tmp_path):
    interrupted(text, tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    run(model(), text, SHORT, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))


# What stops it ------------------------------------------------------------------------------------------------------


class Spoils(NextToken):
    """A loss or a gradient that is not finite from some step on."""

    def __init__(self, call: int, factor: float):
        self.left, self.factor = call, factor

    def __call__(self, decoder, batch):
        loss = super().__call__(decoder, batch)
        self.left -= 1
        if self.left > 0:
            return loss
        if math.isnan(self.factor):
            return Loss(loss.sum * self.factor, loss.weight)
        return Loss(_InfiniteGradient.apply(loss.sum), loss.weight)

    def for_heldout(self):
        return NextToken()


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize(("factor", "what"), [(math.nan, "loss is nan"), (1.0, "gradient norm is (nan|inf)")])
def test_what_is_not_finite_stops_before_it_spoils_the_weights(text, tmp_path, factor, what):
    decoder = model()
    with pytest.raises(TrainingError) as caught:
        run(decoder, text, SHORT, tmp_path, Spoils(6, factor), name="pretrain")
    rows = next(Feed(text, SHORT, 5).run(5))[1]
    message = str(caught.value)
    assert message.startswith("pretrain: the ") and "\n" not in message
    caught.match(f"{what} in step 6")
    assert f"(rows {', '.join(map(str, rows))})" in message
    assert f"last good state is that of step 3, in {tmp_path.name}/resume.safetensors" in message
    assert "learning_rate" in message
    assert all(value.isfinite().all() for value in weights(decoder).values())
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_gpu_is_asked_only_now_and_then_and_tells_the_same(text, heldout, tmp_path, monkeypatch):
    """Where reading a result would wait, several steps are read at once; a bad step is still named and not saved."""
    expected = run(model(), text, SHORT, tmp_path / "a", heldout=heldout)
    monkeypatch.setattr(numerics.Numerics, "synchronous", property(lambda self: False))
    reads = []
    monkeypatch.setattr(loop.torch, "stack", lambda ts, *a, stack=torch.stack: reads.append(len(ts)) or stack(ts, *a))
    found = run(model(), text, SHORT, tmp_path / "b", heldout=heldout)
    assert (found.tokens, found.loss_last, found.heldout) == (expected.tokens, expected.loss_last, expected.heldout)
    a, b = curve(tmp_path / "a"), curve(tmp_path / "b")
    assert all(a[key] == b[key] for key in ("step", "tokens", "loss", "lr", "grad_norm", "heldout"))
    assert reads.count(3) == 2  # steps 1-3 and 4-6 at their held-out losses, 7 and 8 at the end

    with pytest.raises(TrainingError, match=r"loss is nan in step 5 .*state is that of step 3"):
        run(model(), text, SHORT, tmp_path / "c", Spoils(5, math.nan))
    assert [line["step"] for line in read_metrics(tmp_path / "c")] == [1, 2, 3]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "c" / "resume.safetensors").values())


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"


class Fits(NextToken):
    """A device whose memory holds some rows at a time, from some call on."""

    def __init__(self, rows: int, call: int = 1, error: type[Exception] = torch.OutOfMemoryError):
        self.rows, self.left, self.error = rows, call, error

    def __call__(self, decoder, batch):
        loss = super().__call__(decoder, batch)
        self.left -= 1
        if self.left <= 0 and len(MicroBatch.of(batch).tokens_BT) > self.rows:
            raise self.error(NO_MEMORY)
        return loss


def test_a_step_that_does_not_fit_is_accumulated_from_smaller_micro_batches(examples, text, heldout, tmp_path):
    """Bit for bit as if the smaller size had been configured; 6 rows at a time become 3, then 1."""
    settings = {"heldout": heldout, "replay": text}
    config, said = TrainConfig(steps=5, batch_size=6, accumulate=2, replay=0.3), []
    expected, found = model(), model()
    one = replace(config, batch_size=1, accumulate=12)
    whole = run(expected, examples, one, tmp_path / "one", **settings)
    parts = run(found, examples, config, tmp_path / "six", Fits(2), progress=said.append, **settings)
    assert all(torch.equal(weights(found)[name], value) for name, value in weights(expected).items())
    assert (parts.tokens, parts.padding, parts.steps) == (whole.tokens, whole.padding, 5)
    assert parts.heldout_loss == pytest.approx(whole.heldout_loss, rel=1e-6)
    assert curve(tmp_path / "one")["loss"] == curve(tmp_path / "six")["loss"]
    halved = [line for line in said if "out of memory in step 1 with" in line]
    assert "6 x 24 positions at a time; from here on micro-batches of 3, 4 of them a step" in halved[0]
    assert "3 x 24 positions at a time; from here on micro-batches of 1, 12 of them a step" in halved[1]
    assert len(halved) == 2  # found once


def test_gradients_of_a_step_that_ran_out_of_memory_count_once(text, tmp_path):
    """The second micro-batch of the fourth step does not fit: the first one's gradients are computed again."""
    config = TrainConfig(steps=6, batch_size=4, accumulate=2, optimizer="adamw")
    expected, found = model(), model()
    run(expected, text, config, tmp_path / "a")
    result = run(found, text, config, tmp_path / "b", Fits(3, call=8))
    assert result.steps == 6
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-4, atol=2e-6, msg=name)


def test_pairs_that_do_not_fit_are_accumulated(pairs, tmp_path):
    class FewPairs(Preference):
        def __call__(self, decoder, batch):
            if len(batch.pairs_P) > 2:
                raise torch.OutOfMemoryError(NO_MEMORY)
            return super().__call__(decoder, batch)

        def for_heldout(self):
            return FewPairs(self.beta, self.heldout_reference_P2)

    config = TrainConfig(steps=5, batch_size=6, optimizer="adamw")
    expected = trained(model(1), pairs, config, tmp_path / "a", Preference(0.1), heldout=pairs)
    found = trained(model(1), pairs, config, tmp_path / "b", FewPairs(0.1), heldout=pairs)
    for name, value in weights(expected.model).items():
        torch.testing.assert_close(weights(found.model)[name], value, rtol=1e-4, atol=2e-6, msg=name)
    assert found.result.heldout_loss == pytest.approx(expected.result.heldout_loss, abs=1e-5)
    assert found.result.tokens == expected.result.tokens


def test_what_does_not_fit_row_by_row_names_the_settings_to_change(text, tmp_path, monkeypatch):
    config = replace(SHORT, batch_size=4, accumulate=3)
    for error in (RuntimeError, MemoryError):  # of the host, where another attempt may end the process
        with pytest.raises(TrainingError, match=r"out of memory in step 1 .*batch_size = 2 .*accumulate = 6 "):
            run(model(), text, config, tmp_path, Fits(0, error=error))
    for error in (torch.OutOfMemoryError,):
        with pytest.raises(TrainingError, match=r"out of memory in step 1 with 1 x 24 .* lower model.context"):
            run(model(), text, config, tmp_path, Fits(0, error=error))
    with pytest.raises(RuntimeError, match="something else"):
        run(model(), text, SHORT, tmp_path, Stops(1, RuntimeError, "something else"))

    def update(step, factor):
        raise MemoryError

    monkeypatch.setattr(loop.TrainStep, "update", update)
    with pytest.raises(TrainingError, match=r"memory in the update of step 1; .*batch_size = 2 .*accumulate = 6 "):
        run(model(), text, config, tmp_path / "update")


# What it says and chooses -------------------------------------------------------------------------------------------


def test_progress_comes_in_few_messages(text, tmp_path, monkeypatch):
    said = []
    clock = iter(range(10**6))  # every look at the clock is a second later
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: float(next(clock)))
    config = TrainConfig(steps=300, batch_size=1, evaluate_every=-1)
    run(model(), text, config, tmp_path, progress=said.append, name="pretrain")
    assert "300 steps of 1 rows" in said[0] and "fp32" in said[0]
    assert "loss" in said[1] and "tokens/s" in said[1] and "left" in said[1]
    assert said[-1].startswith("pretrain: done")
    assert 5 < len(said) < 40  # in about 1000 seconds of this clock


def test_silent_by_a_function_and_printed_by_default(text, tmp_path, capsys):
    run(model(), text, SHORT, tmp_path / "a")
    assert capsys.readouterr().out == ""
    run(model(), text, SHORT, tmp_path / "b", progress=None)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_precision_and_compiler_are_chosen_by_the_hardware(monkeypatch):
    monkeypatch.setattr(numerics, "fast_bf16", lambda device: False)
    monkeypatch.setattr(numerics, "missing_to_compile", lambda device: "")
    small, large = (10**6, 10**6), (10**8, 10**8)
    chosen = numerics.choose(TrainConfig(), *small, "cpu")
    assert (chosen.bf16, chosen.compile) == (False, False) and "too few steps" in chosen.note
    assert numerics.choose(TrainConfig(), *large, "cpu").compile
    assert not numerics.choose(TrainConfig(compile="off"), *large, "cpu").compile
    assert "emulates" in numerics.choose(TrainConfig(precision="bf16"), *small, "cpu").note
    monkeypatch.setattr(numerics, "fast_bf16", lambda device: True)
    assert numerics.choose(TrainConfig(), *small, "cpu").bf16
    assert not numerics.choose(TrainConfig(precision="fp32"), *small, "cpu").bf16
    monkeypatch.setattr(numerics, "missing_to_compile", lambda device: "a C++ compiler")
    assert "not compiled (not found: a C++ compiler)" in numerics.choose(TrainConfig(), *large, "cpu").note
    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        numerics.choose(TrainConfig(compile="on"), *small, "cpu")
    with pytest.raises(ConfigError, match="allowed are cpu and cuda"):
        numerics.choose(TrainConfig(), *small, "mps")


def test_a_gpu_compiles_ablations_and_says_when_it_has_no_bf16(monkeypatch):
    monkeypatch.setattr(numerics, "fast_bf16", lambda device: False)
    monkeypatch.setattr(numerics, "missing_to_compile", lambda device: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    ablation = numerics.choose(TrainConfig(), 53 * 10**6, 400 * 64 * 509, "cuda")  # those of preset full
    assert ablation.note == "Tesla T4; fp32 (no fast bf16 on this machine); compiled block by block"
    assert ablation.compile and ablation.by_block
    whole = numerics.choose(TrainConfig(), 253 * 10**6, 600 * 10**6, "cuda")
    assert whole.compile and not whole.by_block and whole.note.endswith("; compiled")
    assert not numerics.choose(TrainConfig(), 53 * 10**6, 100 * 64 * 512, "cuda").compile


@pytest.mark.parametrize("objective", ["text", "pairs"])
def test_bf16_trains_like_fp32(text, pairs, objective, tmp_path):
    rows = text if objective == "text" else pairs
    results = {}
    for precision in ("fp32", "bf16"):
        config = TrainConfig(steps=10, batch_size=4, optimizer="adamw", precision=precision)
        goal = NextToken() if objective == "text" else Preference(0.1)
        results[precision] = run(model(), rows, config, tmp_path / precision, goal, seed=1).loss_last
    assert results["bf16"] == pytest.approx(results["fp32"], rel=0.03) and results["bf16"] != results["fp32"]


@pytest.mark.slow
@pytest.mark.skipif(numerics.missing_to_compile("cpu") != "", reason="no C++ compiler")
def test_compiled_training_equals_eager(text, tmp_path):
    shallow = replace(TINY, n_layer=1)  # compiling takes a quarter of a minute, and longer on a busy machine
    eager, compiled = model(0, shallow), model(0, shallow)
    run(eager, text, replace(SHORT, compile="off", optimizer="adamw"), tmp_path / "eager")
    run(compiled, text, replace(SHORT, compile="on", optimizer="adamw"), tmp_path / "compiled")
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(compiled)[name], value, rtol=1e-3, atol=1e-5, msg=name)


# Held-out losses ----------------------------------------------------------------------------------------------------


def test_held_out_loss_is_weighted_by_targets(examples):
    decoder = model(3)
    batch = examples.rows(range(len(examples)))
    logprobs = decoder(batch.tokens_BT, batch.positions_BT, batch.segments_BT).log_softmax(-1)
    used = batch.targets_BT != IGNORE
    expected = -logprobs[used].gather(1, batch.targets_BT[used][:, None]).mean().item()
    for size in (1, 4, 100):
        found = held_out_loss(decoder, examples, batch_size=size, device="cpu")
        assert found["loss"] == pytest.approx(expected, rel=1e-5) and found["targets"] == int(used.sum())
    assert decoder.training  # left as it was


# Checkpoints --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_trained_further(text, heldout, examples, pairs, tmp_path):
    config = TrainConfig(steps=12, batch_size=4)
    pretrained = trained(model(1), text, config, tmp_path / "pretrain", heldout=heldout, notes=lambda: {"by": "hand"})
    loaded = load_checkpoint(tmp_path / "pretrain")
    assert all(torch.equal(weights(loaded)[n], v) for n, v in weights(pretrained.model).items())
    assert not (tmp_path / "pretrain" / "resume.safetensors").exists()
    assert json.loads((tmp_path / "pretrain" / "training.json").read_text())["result"]["steps"] == 12

    again = trained(model(1), text, config, tmp_path / "pretrain", heldout=heldout)
    assert (again.result, again.notes) == (pretrained.result, {"by": "hand"})

    replayed = {"heldout": examples, "replay": text}
    tuned = run(loaded, examples, replace(config, replay=0.25), tmp_path / "sft", **replayed)
    assert tuned.heldout_loss < tuned.heldout[0]["loss"]

    config = TrainConfig(steps=30, batch_size=4, optimizer="adamw", learning_rate=1e-3)
    policy = load_checkpoint(tmp_path / "sft")
    preferred = run(policy, pairs, config, tmp_path / "dpo", Preference(config.beta), heldout=pairs)
    first, last = preferred.heldout[0], preferred.heldout[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["pairs"] == len(pairs)
    assert last["reward_accuracy"] > 0.9 and last["reward_margin"] > 0
    assert (tmp_path / "dpo" / "reference.safetensors").exists()
    assert {"reward_margin", "reward_accuracy"} <= curve(tmp_path / "dpo").keys()


def test_distillation_makes_a_student_of_half_the_depth(text, heldout, tmp_path):
    teacher = model(1, replace(TINY, n_layer=5))
    for parameter in teacher.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    student = half_depth(teacher)
    assert student.config == replace(TINY, n_layer=3)
    for new, old in enumerate((0, 2, 4)):
        for name, value in student.blocks[new].named_parameters():
            assert torch.equal(value, teacher.blocks[old].get_parameter(name))
            assert value.data_ptr() != teacher.blocks[old].get_parameter(name).data_ptr()
    assert torch.equal(student.embed.weight, teacher.embed.weight)
    with pytest.raises(ConfigError, match="no half-depth student"):
        half_depth(model(1, replace(TINY, n_layer=1)))

    before, untrained = weights(teacher), held_out_loss(student, heldout, device="cpu")["loss"]
    config = TrainConfig(steps=20, batch_size=4, optimizer="adamw")
    result = run(student, text, config, tmp_path, Distillation(teacher, weight=1.0), heldout=heldout)
    assert all(torch.equal(weights(teacher)[name], value) for name, value in before.items())
    columns = curve(tmp_path)
    assert columns["kl"][-1] < 0.5 * columns["kl"][0]
    assert result.heldout[0]["loss"] == pytest.approx(untrained, abs=1e-6)
