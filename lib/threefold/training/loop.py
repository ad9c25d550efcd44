"""The training loop of every model: a model, an objective, rows and a config become a checkpoint with its metrics.

The loop waits for the device only when it writes metrics. A training that was interrupted resumes as if it had not
been (bit for bit on a CPU).
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basics.errors import DISK_FULL, TrainingError
from basics.files import damaged, read_note, sha256_tree, write_note
from threefold.config import TrainConfig
from threefold.data.packing import PackedRows, PairedRows
from threefold.memory import keep_freed_memory
from threefold.model.decoder import Decoder
from threefold.model.hf import WEIGHTS, load_checkpoint, save_checkpoint
from threefold.training import distributed
from threefold.training import optimizers as optim
from threefold.training.feed import Feed
from threefold.training.numerics import Numerics, choose, matmul_flops
from threefold.training.objectives import HiddenStates, MicroBatch, NextToken, Objective
from threefold.training.progress import Console, duration
from threefold.training.state import (
    STATE,
    Metrics,
    State,
    collect,
    load_state,
    restore,
    save_state,
    system_errors,
    tensors_digest,
)

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
    identity = _identity(model, objective, feed, config)
    if (folder / RESULT).exists():
        done = _finished(folder, identity)
        if workers.first:
            (progress or print)(f"{name}: trained already, {done['result']['steps']} steps; its checkpoint is loaded")
        model.load_state_dict(load_checkpoint(folder).state_dict())
        return Trained(model, TrainResult(**done["result"]), folder, done["notes"])
    objective.prepare(model, rows, heldout, config, folder, device)
    training = _Training(model, objective, feed, config, folder, identity, heldout, device, progress, name)
    with training.running():
        for batches, numbers in feed.run(training.state.step):
            training.step(batches, numbers)
            training.after_step()
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


def _identity(model: nn.Module, objective: Objective, feed: Feed, config: TrainConfig) -> dict[str, Any]:
    """What defines a training: two with equal identities take the same steps from the same weights."""
    settings = {key: value for key, value in asdict(config).items() if key not in (*_NOT_IDENTITY, "steps")}
    identity = {
        "objective": objective.name,
        "initial_weights": tensors_digest(model.state_dict())[:16],
        "seed": feed.seed,
        "steps": feed.steps,
        "rows": len(feed.rows),
        "row_tokens": feed.rows.n_tokens,
        **settings,
    }
    return json.loads(json.dumps(identity))


def _finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """training.json of a finished training; TrainingError if it is damaged or another training's."""
    if changed := damaged(folder / RESULT):
        raise TrainingError(
            f"{folder.name}/{changed[0].name} is not what the training wrote; remove {RESULT} there to train again"
        )
    done = read_note(folder / RESULT)
    different = [key for key in {**identity, **done["identity"]} if identity.get(key) != done["identity"].get(key)]
    if different:
        raise TrainingError(
            f"{folder.name} holds another finished training ({', '.join(different)} differ); "
            "remove it, or train in another folder"
        )
    return done


def _is_note(path: Path) -> bool:
    return path.suffix == ".json" and read_note(path) is not None


def held_out_loss(
    model: nn.Module,
    rows: PackedRows | PairedRows,
    objective: Objective | None = None,
    *,
    batch_size: int = 16,
    device: str | None = None,
    precision: str = "auto",
) -> dict[str, float]:
    """The mean loss over rows, each of them once.

    Args:
        model: as in `train`; stays in the mode it was in.
        rows: packed rows, or pairs for a `Preference` objective.
        objective: default next-token prediction.
        batch_size: rows or pairs at a time.
        device, precision: as in `train`.

    Returns:
        {"loss": nats per token (or pair) over all rows, "targets" or "pairs": their number, further metrics}.
    """
    objective = objective or NextToken()
    numerics = choose(TrainConfig(precision=precision, compile="off"), 0, 0, device)
    model.to(numerics.device)
    objective.to(numerics.device)
    return _evaluate(_Pass(model), objective, rows, batch_size, numerics)


class CompiledForward:
    """A model whose layers are a compiled graph of one static shape."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._run = torch.compile(model.run, dynamic=False)

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor, segments_BT: Tensor) -> Tensor:
        context = self.model.prepare(tokens_BT, positions_BT, segments_BT, in_blocks=tokens_BT.is_cuda)
        return self._run(tokens_BT, context)

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight


class _Pass(nn.Module):
    """A forward pass as a module, so that distributed training can hook into its calls."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, objective: Objective, states: HiddenStates, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sums of the loss and of its metrics; `states` computes with the model's weights."""
        loss = objective(states, batch)
        return loss.sum.clone(), loss.metrics  # no view: FSDP2 hooks into what is returned


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients so that their norm is at most `largest` (-1: any). Returns the norm before, 0-d."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = distributed.whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
    if largest > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm


class _Training:
    """One call of `train`: its steps, metrics, evaluations, states and messages."""

    def __init__(self, model, objective, feed, config, folder, identity, heldout, device, progress, name):
        self.model, self.objective, self.feed, self.config = model, objective, feed, config
        self.folder, self.heldout, self.name = folder, heldout, name
        self.workers = distributed.current()
        self.say = Console(progress if self.workers.first else lambda message: None)
        self.n_parameters = sum(p.numel() for p in model.parameters())
        self.numerics = choose(config, self.n_parameters, feed.positions, device)
        self.evaluator = objective.for_heldout() if heldout is not None else objective
        self.batch_name = "pairs" if isinstance(feed.rows, PairedRows) else "rows"
        self.split = distributed.to_be_split(config.shard, self.n_parameters, self.numerics.device, self.workers)
        many = f"{self.workers.size} workers {'that split the model' if self.split else 'with a copy each'}; "
        self.note = (many if self.workers.size > 1 else "") + self.numerics.note
        self.state, self.restored = load_state(folder, identity) or (State(identity), {})
        self.saved_step = self.first_step = self.state.step
        # of steps whose metrics are not yet written: what the host knows, their rows, and values on the device
        self.pending: list[tuple[dict[str, Any], list[int], Tensor]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model and the optimizers are ready for steps inside the block."""
        keep_freed_memory()
        self._place()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = optim.build(self.model, self.config)
        if self.restored:
            restore(self.restored, self.model, self.optimizers)
            self.restored = {}
        resumed = f", resumed after step {self.state.step}" if self.state.step else ""
        self.say(
            f"{self.name}: {self.feed.steps} steps of {self.feed.batch_size} {self.batch_name}{resumed}; "
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
            yield
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
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)

    def _place(self) -> None:
        """Put the model where it is trained: on the device, a copy on each worker's, or split over them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        device = self.numerics.device
        self.objective.to(device)
        self.evaluator.to(device)
        self.module = self.trained = _Pass(self.model)
        self.forward: HiddenStates = self.model
        if self.split:
            distributed.split(self.model, self.module, device, self.workers)
        else:
            self.model.to(device)
            if self.workers.size > 1:
                self.trained = distributed.replicated(self.module)
        if self.numerics.compile:
            if self.split:  # block by block, as they are gathered
                for block in self.model.blocks:
                    block.forward = torch.compile(block.forward, dynamic=False)
            else:
                self.forward = CompiledForward(self.model)
            self.objective.compile(CompiledForward)

    # Steps ----------------------------------------------------------------------------------------------------------

    def step(self, batches: list, rows: list[int]) -> None:
        """One update of the weights."""
        state, step = self.state, self.state.step
        factor = optim.learning_rate_factor(step, self.feed.steps, self.config)
        optim.set_learning_rate(self.optimizers, factor)
        batches = [MicroBatch.of(batch) for batch in batches]
        weight, tokens, padding = self.workers.totals(
            sum(map(self.objective.weight, batches)),
            sum(batch.tokens for batch in batches),
            sum(batch.padding for batch in batches),
        )
        weight = max(1, weight)
        sums: dict[str, Tensor] = {}
        with self._memory_errors(f"in step {step + 1} with {{}} x {{}} positions at a time", batches[0]):
            for number, batch in enumerate(batches, 1):
                with distributed.synchronised(self.trained, number == len(batches)):
                    with self.numerics.autocast():
                        loss, metrics = self.trained(self.objective, self.forward, batch.to(self.numerics.device))
                    # gradients are averaged over the workers; multiplied by their number that is the sum
                    (loss * self.workers.size / weight).backward()
                for key, value in {"loss": loss.detach(), **metrics}.items():
                    sums[key] = sums[key] + value if key in sums else value
            norm = clip_gradients(self.parameters, self.config.clip)
            means = self.workers.sum(torch.stack(list(sums.values()))) / weight
            values = torch.cat([means[:1], norm.unsqueeze(0), means[1:]])
            if self.numerics.synchronous:  # stop before the weights are spoilt
                self._check(values.tolist(), step + 1, rows)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += tokens
        state.padding += padding
        names = [key for key in sums if key != "loss"]
        line = {"step": step + 1, "tokens": state.tokens, "lr": self.config.learning_rate * factor, "names": names}
        self.pending.append((line, rows, values))

    def after_step(self) -> None:
        """Write metrics, evaluate, save the state and report progress, each when it is due."""
        state, steps, every = self.state, self.feed.steps, self.config.evaluate_every
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
        table = torch.stack([values for _, _, values in self.pending]).tolist()
        for (line, rows, _), values in zip(self.pending, table, strict=True):
            self._check(values, line["step"], rows)
        state, now = self.state, time.perf_counter()
        speed = (state.tokens - state.metered) / max(1e-9, now - self.mark)
        each = (now - self.mark) / len(table)
        state.metered, self.mark = state.tokens, now
        lines = []
        for (line, _, _), (loss, norm, *metrics) in zip(self.pending, table, strict=True):
            step, names = line["step"], line["names"]
            state.seconds += each
            state.loss_first = loss if state.loss_first is None else state.loss_first
            if step > self.feed.steps - max(1, self.feed.steps // 10):
                state.loss_end = [state.loss_end[0] + loss, state.loss_end[1] + 1]
            spike = state.spike(step, loss)
            if spike:
                self.say(
                    f"{self.name}: the loss rose to {loss:.4f} in step {step} (median before {spike['median']:.4f})"
                )
            lines.append(
                {
                    "step": step,
                    "tokens": line["tokens"],
                    "loss": loss,
                    "lr": line["lr"],
                    "grad_norm": norm,
                    "tokens_per_second": round(speed, 1),
                    "seconds": round(state.seconds, 4),
                    **dict(zip(names, metrics, strict=True)),
                    **({"spike": True} if spike else {}),
                }
            )
        if self.metrics:
            self.metrics.write(lines)
        self.pending.clear()
        more = "".join(f", {name.replace('_', ' ')} {lines[-1][name]:.3f}" for name in names)
        self.latest = f"loss {lines[-1]['loss']:.4f}{more}, {speed:,.0f} tokens/s"

    def _evaluate(self) -> None:
        state, started = self.state, time.perf_counter()
        with self._memory_errors(f"in the held-out loss after step {state.step}"):
            values = _evaluate(self.module, self.evaluator, self.heldout, self.feed.micro_batch, self.numerics)
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
        values = collect(self.model, self.optimizers)
        if self.workers.first:
            save_state(self.folder, self.state, values)
        self.saved_step = self.state.step
        self.mark = self.saved_at = time.perf_counter()

    # Errors and the result ------------------------------------------------------------------------------------------

    def _check(self, values: list[float], step: int, rows: list[int]) -> None:
        """Raise if the loss or the gradient of a step is not finite."""
        loss, norm = values[:2]
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what, other = f"loss is {loss}", f"gradient norm {norm:.4g}"
        if math.isfinite(loss):
            what, other = f"gradient norm is {norm}", f"loss {loss:.4f}"
        shown = ", ".join(map(str, rows[:32])) + (f" and {len(rows) - 32} more" if len(rows) > 32 else "")
        rate = "learning_rate" if self.config.optimizer == "adamw" else "learning_rate and muon_learning_rate"
        raise TrainingError(
            f"{self.name}: the {what} in step {step} ({self.batch_name} {shown}), {other}; "
            f"{self._last_state()}. Lower {rate}, or look at these {self.batch_name}"
        )

    def _last_state(self) -> str:
        if self.saved_step:
            return f"the last good state is that of step {self.saved_step}, in {self.folder.name}/{STATE}"
        return "no state was saved before it"

    @contextlib.contextmanager
    def _memory_errors(self, where: str, batch: MicroBatch | None = None) -> Iterator[None]:
        """Raises TrainingError with a way out where memory runs short. `{}` in `where` are the batch's sizes.

        torch has a type for exhausted GPU memory only; its CPU allocator raises a RuntimeError.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            texts = ("DefaultCPUAllocator", "std::bad_alloc")
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(t in str(error) for t in texts):
                raise
            size, accumulate = self.config.batch_size, self.config.accumulate
            smaller = next((n for n in range(size // 2, 0, -1) if size % n == 0), None)
            way = "lower model.context"
            if smaller is not None:
                way = (
                    f"set batch_size = {smaller} (now {size}) and accumulate = {accumulate * size // smaller} "
                    f"(now {accumulate}) for the same result in less memory"
                )
            where = where.format(*batch.tokens_BT.shape) if batch else where
            reason = str(error).splitlines()[0][:160]
            raise TrainingError(f"{self.name}: out of memory {where}; {way} ({reason})") from error

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


def _evaluate(
    module: _Pass, objective: Objective, rows: PackedRows | PairedRows, batch_size: int, numerics: Numerics
) -> dict[str, float]:
    """Mean loss and metrics over all rows, each weighted by its targets (or as one pair); sums are kept in fp64."""
    sums: dict[str, Tensor] = {}
    weight, workers = 0, distributed.current()
    was_training = module.model.training
    module.model.eval()
    try:
        with torch.no_grad(), numerics.autocast():
            for batch, counts in workers.deal(rows.batches(batch_size, shuffle=False)):
                micro_batch = MicroBatch.of(batch).to(numerics.device)
                loss, metrics = module(objective, module.model, micro_batch)
                weight += objective.weight(micro_batch) if counts else 0
                for key, value in {"loss": loss, **metrics}.items():
                    sums[key] = sums.get(key, 0) + value.double() * counts
    finally:
        module.model.train(was_training)
    (weight,) = workers.totals(weight)
    totals = workers.sum(torch.stack(list(sums.values()))).tolist()
    return {**{key: total / weight for key, total in zip(sums, totals, strict=True)}, objective.unit: weight}
