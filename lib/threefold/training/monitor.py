"""What surrounds the steps of a training: its metrics, held-out losses, resumable states, messages and result."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from basics.errors import DISK_FULL, DivergedError, TrainingError
from threefold.config import TrainConfig
from threefold.data.packing import PairedRows
from threefold.memory import free_memory
from threefold.training.feed import Feed
from threefold.training.interruption import Interruption
from threefold.training.numerics import in_memory, matmul_flops, out_of_memory
from threefold.training.progress import Console, duration
from threefold.training.state import STATE, Metrics, State, StateWriter, collect

if TYPE_CHECKING:
    from threefold.training.loop import TrainStep

Progress = Callable[[str], None]

CHECKPOINT_SECONDS = 60.0  # between resumable states unless the config says
FLUSH_SECONDS = 2.0  # between metrics on a GPU: each time the host waits for it


@dataclass(frozen=True)
class TrainResult:
    """Summary of a training. Losses are nats per token (preferences: per pair)."""

    name: str
    steps: int
    tokens: int  # trained on, without padding and sinks
    padding: int  # positions that were computed and hold no token
    seconds: float  # wall-clock, in training steps
    evaluation_seconds: float  # in held-out losses
    tokens_per_second: float
    loss_first: float  # of the first step
    loss_last: float  # mean of the last tenth of the steps
    parameters: int
    note: str  # device, precision, compiler
    workers: int = 1  # processes that trained together
    matmul_flops: float | None = None  # CPUs only: FLOP/s of matrix products (`numerics.matmul_flops`) at the end
    heldout: list[dict[str, float]] = field(default_factory=list)  # {"step", "tokens", "loss", ...}, first to last
    spikes: list[dict[str, float]] = field(default_factory=list)  # of the loss, see `State.spike`

    @property
    def heldout_loss(self) -> float | None:
        """The held-out loss after the last step."""
        return self.heldout[-1]["loss"] if self.heldout else None


class Monitor:
    """Writes the metrics of a training's steps, evaluates, saves states and reports progress, each when it is due.

    Args:
        step, feed, config, folder, name, progress: of the training.
        state: its counters, which the monitor keeps.
        evaluate: computes the held-out loss and its metrics, with so many rows at a time; None without held-out rows.
    """

    def __init__(
        self,
        name: str,
        step: "TrainStep",
        feed: Feed,
        config: TrainConfig,
        folder: Path,
        state: State,
        evaluate: Callable[[int], dict[str, float]] | None,
        progress: Progress | None,
    ):
        self.name, self.step, self.feed, self.config = name, step, feed, config
        self.folder, self.state, self.evaluate = folder, state, evaluate
        self.say = Console(progress if step.workers.first else lambda message: None)
        self.unit = "pairs" if isinstance(feed.rows, PairedRows) else "rows"
        self.saved_step = self.first_step = state.step
        self.writer = StateWriter(folder, state.step)
        self.interruption = Interruption(patience=1.0 if step.workers.size > 1 else 0.0)
        # of steps whose metrics are not yet written: what the host knows, their rows, names and values on the device
        self.pending: list[tuple[dict[str, Any], list[int], list[str], Tensor]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model is in training mode and the metrics are open inside the block."""
        resumed = f", resumed after step {self.state.step}" if self.state.step else ""
        self.say(
            f"{self.name}: {self.feed.steps} steps of {self.feed.batch_size} {self.unit}{resumed}; "
            f"{self.step.n_parameters:,} parameters; {self.step.note}"
        )
        self.metrics = Metrics(self.folder, self.state.step) if self.step.workers.first else None
        model = self.step.model
        was_training = model.training
        model.train()
        try:
            with self.interruption:
                if self.evaluate is not None and not self.state.heldout:
                    self._evaluate()
                self.begun = self.mark = self.saved_at = time.perf_counter()
                self.next_message = self.begun + self.say.pause(0) / 2
                yield
                self.writer.wait()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise TrainingError(
                f"{self.name}: {error.strerror} after step {self.state.step}; {self._last_state()}. Free some space: "
                "the same command resumes from there"
            ) from error
        finally:
            self.writer.close()
            self.say.close()
            with contextlib.suppress(OSError):  # of a full disk, which is reported already
                if self.metrics:
                    self.metrics.close()
            model.train(was_training)
            model.zero_grad(set_to_none=True)

    def after_step(
        self, rows, tokens: int, padding: int, asked: int, rate: float, names: list[str], values: Tensor
    ) -> None:
        """Count a step. Write metrics, evaluate, save the state and report progress, each when it is due.

        asked: how many workers had been asked to end the training before the step. Then the state is saved and the
        signal takes effect: with SIGINT, KeyboardInterrupt is raised.
        """
        state, steps, every = self.state, self.feed.steps, self.config.evaluate_every
        state.step += 1
        state.tokens += tokens
        state.padding += padding
        self.pending.append(({"step": state.step, "tokens": state.tokens, "lr": rate}, rows, names, values))
        now = time.perf_counter()
        if self.step.numerics.synchronous or now - self.mark >= FLUSH_SECONDS or state.step == steps:
            self._flush()
        if self.evaluate is not None and (state.step == steps or (every > 0 and state.step % every == 0)):
            self._flush()
            self._evaluate()
        if self._checkpoint_due():
            self._flush()
            self._save()
        if asked or (self.step.workers.size == 1 and self.interruption.number):
            self._flush()
            if self.saved_step != state.step:
                self._save()
            self.writer.wait()
            self.say(
                f"{self.name}: interrupted after step {state.step} of {steps}; the same command resumes from there"
            )
            self.interruption.act()
        if now >= self.next_message and state.step < steps:
            self._flush()
            left = (now - self.begun) / (state.step - self.first_step) * (steps - state.step)
            message = f"{self.name} {state.step}/{steps}: {self.latest}, {duration(left)} left"
            self.say.state(message, state.step / steps)
            self.next_message = now + self.say.pause(now - self.begun)

    def _flush(self) -> None:
        """Write the metrics of the steps since the last time; the host waits for the device here."""
        if not self.pending:
            return
        table = torch.stack([values for *_, values in self.pending]).tolist()
        for (line, rows, _, _), values in zip(self.pending, table, strict=True):
            self.check(values, line["step"], rows)
        state, now, lines = self.state, time.perf_counter(), []
        speed, seconds = (state.tokens - state.metered) / max(1e-9, now - self.mark), (now - self.mark) / len(table)
        state.metered, self.mark = state.tokens, now
        for (line, _, names, _), values in zip(self.pending, table, strict=True):
            state.seconds += seconds
            spike = state.add_loss(line["step"], values[0], self.feed.steps)
            if spike:
                self.say(
                    f"{self.name}: the loss rose to {spike['loss']:.4f} in step {spike['step']} "
                    f"(median before {spike['median']:.4f})"
                )
            timing = {"tokens_per_second": round(speed, 1), "seconds": round(state.seconds, 4)}
            lines.append(
                {**line, **dict(zip(names, values, strict=True)), **timing, **({"spike": True} if spike else {})}
            )
        if self.metrics:
            self.metrics.write(lines)
        self.pending.clear()
        more = "".join(f", {name.replace('_', ' ')} {lines[-1][name]:.3f}" for name in names[2:])
        self.latest = f"loss {lines[-1]['loss']:.4f}{more}, {speed:,.0f} tokens/s"

    def _evaluate(self) -> None:
        state, started = self.state, time.perf_counter()
        with self.memory_errors(f"in the held-out loss after step {state.step}"):
            values = in_memory(self.evaluate, self.feed.micro_batch)
        if not math.isfinite(values["loss"]):
            raise TrainingError(
                f"{self.name}: the held-out loss is {values['loss']} after step {state.step}; {self._last_state()}"
            )
        state.heldout.append({"step": state.step, "tokens": state.tokens, **values})
        if self.metrics:
            line = {f"heldout_{key}": value for key, value in values.items()}
            self.metrics.write([{"step": state.step, "tokens": state.tokens, **line}])
        self.mark = time.perf_counter()
        state.evaluation_seconds += self.mark - started

    def _checkpoint_due(self) -> bool:
        step, every = self.state.step, self.config.checkpoint_every
        if step == self.feed.steps or every > 0:
            return step == self.feed.steps or step % every == 0
        return self.step.workers.agreed(time.perf_counter() - self.saved_at >= CHECKPOINT_SECONDS)

    def _save(self) -> None:
        self.writer.wait()  # before a second copy is made
        values = collect(self.step.model, self.step.optimizers)
        if self.step.workers.first:
            self.writer.write(self.state, values)
        self.saved_step = self.state.step
        self.mark = self.saved_at = time.perf_counter()

    def check(self, values: list[float], step: int, rows: list[int]) -> None:
        """Raise DivergedError if the loss or the gradient norm of a step is not finite."""
        loss, norm = values[:2]
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what, other = f"loss is {loss}", f"gradient norm {norm:.4g}"
        if math.isfinite(loss):
            what, other = f"gradient norm is {norm}", f"loss {loss:.4f}"
        shown = ", ".join(map(str, rows[:32])) + (f" and {len(rows) - 32} more" if len(rows) > 32 else "")
        rate = "learning_rate" if self.config.optimizer == "adamw" else "learning_rate and muon_learning_rate"
        raise DivergedError(
            f"{self.name}: the {what} in step {step} ({self.unit} {shown}), {other}; "
            f"{self._last_state()}. Lower {rate}, or look at these {self.unit}"
        )

    def _last_state(self) -> str:
        with contextlib.suppress(OSError):  # of a full disk: then the state before it is there
            self.writer.wait()
        if step := self.writer.step if self.step.workers.first else self.saved_step:
            return f"the last good state is that of step {step}, in {self.folder.name}/{STATE}"
        return "no state was saved before it"

    def halve_micro_batches(self, error: Exception, tokens_BT: Tensor) -> None:
        """Where memory ran out in the gradients of a step: have its rows computed in smaller micro-batches, which are
        accumulated to the same batch. Raises the error if it is another one, TrainingError if nothing is to be halved.

        The other workers wait inside the step, so several of them cannot take it again. Nor can a process without host
        memory: the next allocation may end it without a message.
        """
        if not out_of_memory(error):
            raise error
        where = f"in step {self.state.step + 1} with {' x '.join(map(str, tokens_BT.shape))} positions at a time"
        if not isinstance(error, torch.OutOfMemoryError) or self.step.workers.size > 1 or not self.feed.halve():
            with self.memory_errors(where):
                raise error
        self.step.model.zero_grad(set_to_none=True)
        free_memory(error)
        size, times = self.feed.micro_batch, self.feed.accumulate
        self.say(f"{self.name}: out of memory {where}; from here on micro-batches of {size}, {times} of them a step")

    @contextlib.contextmanager
    def memory_errors(self, where: str) -> Iterator[None]:
        """Raises TrainingError with a way out if memory runs out inside the block."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            size, accumulate = self.config.batch_size, self.config.accumulate
            smaller = next((n for n in range(size // 2, 0, -1) if size % n == 0), None)
            way = "lower model.context"
            if smaller is not None and self.feed.micro_batch > 1:
                way = (
                    f"set batch_size = {smaller} (now {size}) and accumulate = {accumulate * size // smaller} "
                    f"(now {accumulate}) for the same result in less memory"
                )
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise TrainingError(f"{self.name}: out of memory {where}; {way} ({reason})") from error

    def result(self) -> TrainResult:
        state, numerics, workers = self.state, self.step.numerics, self.step.workers
        rate = matmul_flops(torch.bfloat16 if numerics.bf16 else torch.float32) if numerics.device == "cpu" else None
        result = TrainResult(
            name=self.name,
            steps=state.step,
            tokens=state.tokens,
            padding=state.padding,
            seconds=round(state.seconds, 3),
            evaluation_seconds=round(state.evaluation_seconds, 3),
            tokens_per_second=round(state.tokens / max(1e-9, state.seconds), 1),
            loss_first=state.loss_first,
            loss_last=state.loss_end[0] / state.loss_end[1],
            parameters=self.step.n_parameters,
            note=self.step.note,
            workers=workers.size,
            matmul_flops=workers.sum(torch.tensor(rate)).item() if rate else None,
            heldout=state.heldout,
            spikes=state.spikes,
        )
        heldout = f", held-out {result.heldout[0]['loss']:.4f} -> {result.heldout_loss:.4f}" if result.heldout else ""
        self.say(
            f"{self.name}: done, loss {result.loss_first:.4f} -> {result.loss_last:.4f}{heldout}; "
            f"{result.tokens:,} tokens in {duration(result.seconds)} ({result.tokens_per_second:,.0f}/s)"
        )
        return result
