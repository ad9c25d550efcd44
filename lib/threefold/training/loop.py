"""The training loop of every model: a model, an objective, rows and a config become a checkpoint with its metrics.

The loop waits for the device only when it writes metrics. An interrupted training resumes exactly (bit-identical on a
CPU).
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from basics.errors import DISK_FULL, TrainingError
from basics.files import damaged, read_note, sha256_tree, write_note
from threefold.config import TrainConfig
from threefold.data.packing import PackedRows, PairedRows
from threefold.memory import keep_freed_memory
from threefold.model.decoder import Decoder
from threefold.model.hf import WEIGHTS, load_checkpoint, save_checkpoint
from threefold.training import distributed
from threefold.training.feed import Feed
from threefold.training.numerics import choose, matmul_flops
from threefold.training.objectives import MicroBatch, Objective
from threefold.training.optimizers import learning_rate_factor
from threefold.training.progress import Console, duration
from threefold.training.state import (
    STATE,
    Metrics,
    State,
    collect,
    different,
    load_state,
    restore,
    save_state,
    system_errors,
    tensors_digest,
)
from threefold.training.step import TrainStep, memory_errors

Progress = Callable[[str], None]

RESULT = "training.json"  # written last: result, identity and file hashes of a finished training
CHECKPOINT_SECONDS = 60.0  # between resumable states unless the config says
FLUSH_SECONDS = 2.0  # between metrics on a GPU: each time the host waits for it
# Settings that do not change what is trained: a training may be resumed with other values of these.
_NOT_IDENTITY = ("precision", "compile", "shard", "checkpoint_every", "evaluate_every")


@dataclass(frozen=True)
class TrainResult:
    """Summary of a training. Losses are nats per token (preferences: per pair)."""

    name: str
    steps: int
    tokens: int  # trained on, without padding and sinks
    padding: int  # positions computed in vain
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


@dataclass(frozen=True)
class Trained:
    """A trained model, in memory and in its folder."""

    model: Decoder
    result: TrainResult
    folder: Path
    notes: Mapping[str, Any] = field(default_factory=dict)  # what the caller of the training noted of it


def train(
    model: Decoder,
    objective: Objective,
    rows: PackedRows | PairedRows,
    config: TrainConfig,
    folder: str | Path,
    *,
    seed: int,
    tokenizer: Any = None,
    heldout: PackedRows | PairedRows | None = None,
    replay: PackedRows | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    name: str = "training",
    notes: Callable[[], Mapping[str, Any]] = dict,
) -> Trained:
    """Train a model in place and save it as a checkpoint in a folder.

    A finished training found in the folder is loaded instead, an interrupted one is resumed. In processes that have
    `distributed.joined` each other, all workers must call this together.

    Args:
        model: an fp32 decoder.
        objective: what is minimised: `NextToken()`, `Preference(beta)` or `Distillation(teacher)`.
        rows: packed rows of documents or examples; pairs for `Preference`. See `threefold.data.packing`.
        config: optimisation settings.
        folder: receives the checkpoint, metrics.jsonl, training.json and, until it is finished, resume.safetensors.
        seed: of the order of the rows.
        tokenizer: saved with the checkpoint.
        heldout: rows whose loss is computed before the first step, every `evaluate_every` steps and after the last.
        replay: pretraining rows that make up `config.replay` of each batch.
        device: "cpu" or "cuda"; default the GPU if there is one.
        progress: called with a line of text from time to time; default: see `progress.Console`.
        name: of the training, for messages.
        notes: called once training has ended; its values are kept in training.json.

    Returns:
        Trained; where the model was split over workers, with a new complete model in host memory.

    Raises:
        ConfigError, DataError: the config or the rows cannot be trained with.
        TrainingError: a loss or gradient that is not finite, too little memory, a full disk, or a folder that holds
            another training or a damaged one.
    """
    folder, workers = Path(folder), distributed.current()
    feed = Feed(rows, config, seed, replay, workers.rank, workers.size)
    identity = {  # two trainings with equal identities take the same steps from the same weights
        "objective": objective.name,
        "initial_weights": tensors_digest(model.state_dict())[:16],
        "seed": seed,
        "rows": len(rows),
        "row_tokens": rows.n_tokens,
        **{key: value for key, value in asdict(config).items() if key not in _NOT_IDENTITY},
        "steps": feed.steps,
    }
    if (folder / RESULT).exists():
        done = _finished(folder, identity)
        if workers.first:
            (progress or print)(f"{name}: trained already, {done['result']['steps']} steps; its checkpoint is loaded")
        model.load_state_dict(load_checkpoint(folder).state_dict())
        return Trained(model, TrainResult(**done["result"]), folder, done["notes"])
    folder.mkdir(parents=True, exist_ok=True)
    objective.prepare(model, rows, heldout, config, folder, device)
    training = _Training(model, objective, feed, config, folder, identity, heldout, device, progress, name)
    with training.running() as step:
        for batches, numbers in feed.run(training.state.step):
            batches = [MicroBatch.of(batch) for batch in batches]
            counts = [(batch.weight, batch.tokens, batch.padding) for batch in batches]
            weight, tokens, padding = workers.totals(*map(sum, zip(*counts, strict=True)))
            taken, shape = training.state.step, " x ".join(map(str, batches[0].tokens_BT.shape))
            with memory_errors(f"{name}: out of memory in step {taken + 1} with {shape} positions at a time", config):
                names, values = step.gradients(batches, max(1, weight))
                if step.numerics.synchronous:  # stop before the weights are spoilt
                    training.check(values.tolist(), taken + 1, numbers)
                factor = learning_rate_factor(taken, feed.steps, config)
                step.update(factor)
            training.after_step(numbers, tokens, padding, config.learning_rate * factor, names, values)
    result, model, noted = training.result(), distributed.whole_model(model), dict(notes())
    if workers.first:
        with system_errors(f"{folder.name}/{WEIGHTS}"):
            save_checkpoint(folder, model, tokenizer)
        # Notes carry their own hash, and whoever writes one beside the checkpoint may rewrite it.
        hashes = {path: digest for path, digest in sha256_tree(folder).items() if path != STATE}
        files = {path: digest for path, digest in hashes.items() if not _is_note(folder / path)}
        write_note(folder / RESULT, {"result": asdict(result), "identity": identity, "notes": noted, "files": files})
        (folder / STATE).unlink(missing_ok=True)
    return Trained(model, result, folder, noted)


def _finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """training.json of a finished training; TrainingError if it is damaged or another training's."""
    if changed := damaged(folder / RESULT):
        raise TrainingError(
            f"{folder.name}/{changed[0].name} is not what the training wrote; remove {RESULT} there to train again"
        )
    done = read_note(folder / RESULT)
    if keys := different(done["identity"], identity):
        raise TrainingError(
            f"{folder.name} holds another finished training ({', '.join(keys)} differ); "
            "remove it, or train in another folder"
        )
    return done


def _is_note(path: Path) -> bool:
    return path.suffix == ".json" and read_note(path) is not None


class _Training:
    """What surrounds the steps of one call of `train`: metrics, held-out losses, states and messages."""

    def __init__(self, model, objective, feed, config, folder, identity, heldout, device, progress, name):
        self.model, self.objective, self.feed, self.config = model, objective, feed, config
        self.folder, self.heldout, self.name = folder, heldout, name
        self.workers = distributed.current()
        self.say = Console(progress if self.workers.first else lambda message: None)
        self.n_parameters = sum(p.numel() for p in model.parameters())
        self.numerics = choose(config, self.n_parameters, feed.positions, device)
        self.evaluator = objective.for_heldout() if heldout is not None else objective
        self.unit = "pairs" if isinstance(feed.rows, PairedRows) else "rows"
        self.split = distributed.to_be_split(config.shard, self.n_parameters, self.numerics.device, self.workers)
        many = f"{self.workers.size} workers {'that split the model' if self.split else 'with a copy each'}; "
        self.note = (many if self.workers.size > 1 else "") + self.numerics.note
        self.state, self.restored = load_state(folder, identity) or (State(identity), {})
        self.saved_step = self.first_step = self.state.step
        # of steps whose metrics are not yet written: what the host knows, their rows, names and values on the device
        self.pending: list[tuple[dict[str, Any], list[int], list[str], Tensor]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[TrainStep]:
        """The model and the optimizers are ready for steps inside the block."""
        keep_freed_memory()
        self.step = TrainStep(self.model, self.objective, self.config, self.numerics, self.split)
        if self.restored:
            restore(self.restored, self.model, self.step.optimizers)
            self.restored = {}
        resumed = f", resumed after step {self.state.step}" if self.state.step else ""
        self.say(
            f"{self.name}: {self.feed.steps} steps of {self.feed.batch_size} {self.unit}{resumed}; "
            f"{self.n_parameters:,} parameters; {self.note}"
        )
        self.metrics = Metrics(self.folder, self.state.step) if self.workers.first else None
        was_training = self.model.training
        self.model.train()
        try:
            if self.heldout is not None and not self.state.heldout:
                self._evaluate()
            self.begun = self.mark = self.saved_at = time.perf_counter()
            self.next_message = self.begun + self.say.pause(0) / 2
            yield self.step
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise TrainingError(
                f"{self.name}: {error.strerror} after step {self.state.step}; {self._last_state()}. Free some space: "
                "the same command resumes from there"
            ) from error
        finally:
            self.say.close()
            with contextlib.suppress(OSError):  # of a full disk, which is reported already
                if self.metrics:
                    self.metrics.close()
            self.model.train(was_training)
            self.model.zero_grad(set_to_none=True)

    def after_step(self, rows, tokens: int, padding: int, rate: float, names: list[str], values: Tensor) -> None:
        """Count a step. Write metrics, evaluate, save the state and report progress, each when it is due."""
        state, steps, every = self.state, self.feed.steps, self.config.evaluate_every
        state.step += 1
        state.tokens += tokens
        state.padding += padding
        self.pending.append(({"step": state.step, "tokens": state.tokens, "lr": rate}, rows, names, values))
        now = time.perf_counter()
        if self.numerics.synchronous or now - self.mark >= FLUSH_SECONDS or state.step == steps:
            self._flush()
        if self.heldout is not None and (state.step == steps or (every > 0 and state.step % every == 0)):
            self._flush()
            self._evaluate()
        if self._checkpoint_due():
            self._flush()
            self._save()
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
        with memory_errors(f"{self.name}: out of memory in the held-out loss after step {state.step}", self.config):
            values = self.step.evaluate(self.evaluator, self.heldout, self.feed.micro_batch)
        self.model.train()
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
        return self.workers.agreed(time.perf_counter() - self.saved_at >= CHECKPOINT_SECONDS)

    def _save(self) -> None:
        values = collect(self.model, self.step.optimizers)
        if self.workers.first:
            save_state(self.folder, self.state, values)
        self.saved_step = self.state.step
        self.mark = self.saved_at = time.perf_counter()

    def check(self, values: list[float], step: int, rows: list[int]) -> None:
        """Raise TrainingError if the loss or the gradient norm of a step is not finite."""
        loss, norm = values[:2]
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what, other = f"loss is {loss}", f"gradient norm {norm:.4g}"
        if math.isfinite(loss):
            what, other = f"gradient norm is {norm}", f"loss {loss:.4f}"
        shown = ", ".join(map(str, rows[:32])) + (f" and {len(rows) - 32} more" if len(rows) > 32 else "")
        rate = "learning_rate" if self.config.optimizer == "adamw" else "learning_rate and muon_learning_rate"
        raise TrainingError(
            f"{self.name}: the {what} in step {step} ({self.unit} {shown}), {other}; "
            f"{self._last_state()}. Lower {rate}, or look at these {self.unit}"
        )

    def _last_state(self) -> str:
        if self.saved_step:
            return f"the last good state is that of step {self.saved_step}, in {self.folder.name}/{STATE}"
        return "no state was saved before it"

    def result(self) -> TrainResult:
        state, numerics = self.state, self.numerics
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
            parameters=self.n_parameters,
            note=self.note,
            workers=self.workers.size,
            matmul_flops=self.workers.sum(torch.tensor(rate)).item() if rate else None,
            heldout=state.heldout,
            spikes=state.spikes,
        )
        heldout = f", held-out {result.heldout[0]['loss']:.4f} -> {result.heldout_loss:.4f}" if result.heldout else ""
        self.say(
            f"{self.name}: done, loss {result.loss_first:.4f} -> {result.loss_last:.4f}{heldout}; "
            f"{result.tokens:,} tokens in {duration(result.seconds)} ({result.tokens_per_second:,.0f}/s)"
        )
        return result
