"""The one training loop of all stages and baselines.

It knows rows, an objective and a config, and writes metrics.jsonl and a resumable state. It waits for the device only
when it writes metrics, and a run that was interrupted goes on as if it had not been (bit for bit on a CPU).
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basics.errors import DISK_FULL, TrainingError
from threefold.config import TrainConfig
from threefold.data.packing import PackedRows, PairedRows
from threefold.memory import keep_freed_memory
from threefold.training import distributed
from threefold.training import optimizers as optim
from threefold.training.distributed import Workers
from threefold.training.feed import Feed
from threefold.training.numerics import Numerics, choose, matmul_flops
from threefold.training.objectives import HiddenStates, NextToken, Objective, Work, sequence_logprobs
from threefold.training.progress import Console
from threefold.training.state import (
    STATE,
    Metrics,
    State,
    load_state,
    random_state,
    restore_random_state,
    weights_digest,
)

Progress = Callable[[str], None]

CHECKPOINT_SECONDS = 60.0  # between resumable states, where the config leaves it open
FLUSH_SECONDS = 2.0  # between metrics on a GPU: each time the host waits for it
# Neither changes what is trained, so a training may be resumed with other values of these.
_NOT_IDENTITY = ("precision", "compile", "shard", "checkpoint_every", "evaluate_every")


@dataclass(frozen=True)
class TrainResult:
    """What a training did. Losses are nats a token (preferences: a pair)."""

    name: str
    steps: int
    tokens: int  # trained on, without padding and sinks
    padding: int  # positions computed for nothing
    seconds: float  # in training steps, by the clock
    evaluation_seconds: float  # in held-out losses
    tokens_per_second: float
    loss_first: float  # of the first step
    loss_last: float  # mean of the last tenth of the steps
    parameters: int
    note: str  # device, precision, compiler
    workers: int = 1  # processes that trained together
    matmul_flops: float | None = (
        None  # on CPUs: FLOP/s of matrix products, as `numerics.matmul_flops` measured at the end
    )
    heldout: list[dict[str, float]] = field(default_factory=list)  # {"step", "tokens", "loss", ...}, first to last
    spikes: list[dict[str, float]] = field(default_factory=list)  # of the loss, as `State.spike` tells them

    @property
    def heldout_loss(self) -> float | None:
        """The held-out loss after the last step."""
        return self.heldout[-1]["loss"] if self.heldout else None


def train(
    model: nn.Module,
    objective: Objective,
    rows: PackedRows | PairedRows,
    config: TrainConfig,
    *,
    folder: str | Path,
    seed: int,
    heldout: PackedRows | PairedRows | None = None,
    replay: PackedRows | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    name: str = "training",
) -> TrainResult:
    """Train a model in place; together with the other workers where this process has `distributed.joined` some.

    Args:
        model: a `threefold.model` decoder, fp32.
        objective: what is minimised.
        rows: what is trained on: packed rows, or preference pairs for `Preference`.
        config: the stage's section of the preset.
        folder: takes metrics.jsonl and resume.safetensors; a state found there is gone on from.
        seed: of the rows' order.
        heldout: rows whose loss is taken before the first step, every `evaluate_every` steps and after the last.
        replay: pretraining rows of which `config.replay` of each batch is made (SFT).
        device: "cpu" or "cuda"; default the GPU if there is one.
        progress: takes a line of text now and then; default: as `progress.Console` prints.
        name: of the stage, for messages.

    Raises:
        ConfigError, DataError: the config or the rows cannot be trained with.
        TrainingError: a loss or gradient that is not finite, too little memory, a full disk, or a folder with
            another's state.
    """
    return _Training(model, objective, rows, config, Path(folder), seed, heldout, replay, device, progress, name).run()


def identity(model: nn.Module, objective: Objective, feed: Feed, config: TrainConfig) -> dict[str, Any]:
    """What makes a training this one: two with equal identities take the same steps from the same weights."""
    return {
        "objective": objective.name,
        "initial_weights": weights_digest(model)[:16],
        "seed": feed.seed,
        "steps": feed.steps,
        "rows": len(feed.rows),
        "row_tokens": feed.rows.n_tokens,
        **{key: value for key, value in asdict(config).items() if key not in (*_NOT_IDENTITY, "steps")},
    }


def clear_state(folder: str | Path) -> None:
    """Remove the resumable state, once what the training made is saved."""
    (Path(folder) / STATE).unlink(missing_ok=True)


def held_out_loss(
    model: nn.Module,
    rows: PackedRows | PairedRows,
    objective: Objective | None = None,
    *,
    batch_size: int = 16,
    device: str | None = None,
    precision: str = "auto",
) -> dict[str, float]:
    """The mean loss over rows, every one of them once.

    Args:
        model: as in `train`; left in the mode it was in.
        rows: packed rows, or pairs for a `Preference` objective.
        objective: default next-token prediction.
        batch_size: rows or pairs at a time.
        device, precision: as in `train`.

    Returns:
        {"loss": nats a token (or pair) over all rows, "targets" or "pairs": how many, further metrics}.
    """
    objective = objective or NextToken()
    numerics = choose(TrainConfig(precision=precision, compile="off"), 0, 0, device)
    model.to(numerics.device)
    objective.to(numerics.device)
    return _evaluate(_Pass(model), objective, rows, batch_size, numerics)


def reference_logprobs(
    model: nn.Module,
    pairs: PairedRows,
    *,
    batch_size: int = 16,
    device: str | None = None,
    precision: str = "auto",
) -> Tensor:
    """Log-probabilities (nats) of every pair's chosen and rejected response, (pairs, 2), fp32, on the CPU."""
    numerics, workers = choose(TrainConfig(precision=precision, compile="off"), 0, 0, device), distributed.current()
    model.to(numerics.device)
    found_P2 = torch.zeros(len(pairs), 2)
    with torch.no_grad(), numerics.autocast():
        for batch, counts in workers.deal(pairs.batches(batch_size, shuffle=False)):
            if counts:
                found_P2[batch.pairs_P] = sequence_logprobs(model, Work.of(batch).to(numerics.device)).float().cpu()
    workers.sum(found_P2)  # every pair is one worker's
    if not found_P2.isfinite().all():
        bad = found_P2.isfinite().all(dim=1).logical_not().nonzero()[0].item()
        raise TrainingError(f"the reference gives pair {bad} a log-probability that is not finite")
    return found_P2


class _Forward:
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
    """A forward pass, as the module whose calls distributed training hooks into."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, states: HiddenStates, work: Work) -> tuple[Tensor, dict[str, Tensor]]:
        """The sums of the loss and of its metrics; `states` computes with the model's weights."""
        loss = objective(states, work)
        return loss.sum.clone(), loss.metrics  # no view: FSDP2 hooks into what is returned


class _Training:
    """One call of `train`."""

    def __init__(self, model, objective, rows, config, folder, seed, heldout, replay, device, progress, name):
        self.model, self.objective, self.config = model, objective, config
        self.folder, self.heldout, self.name = folder, heldout, name
        self.workers: Workers = distributed.current()
        self.say = Console(progress if self.workers.first else _silent)
        self.feed = Feed(rows, config, seed, replay, self.workers.rank, self.workers.size)
        self.n_parameters = sum(p.numel() for p in model.parameters())
        self.numerics = choose(config, self.n_parameters, self.feed.positions, device)
        self.evaluator = objective.for_heldout() if heldout is not None else objective
        self.batch_name = "pairs" if isinstance(rows, PairedRows) else "rows"
        self.identity = identity(model, objective, self.feed, config)
        self.split = distributed.to_be_split(config.shard, self.n_parameters, self.numerics.device, self.workers)
        many = f"{self.workers.size} workers {'that split the model' if self.split else 'with a copy each'}; "
        self.note = (many if self.workers.size > 1 else "") + self.numerics.note

    def run(self) -> TrainResult:
        keep_freed_memory()
        device = self.numerics.device
        self.objective.to(device)
        self.evaluator.to(device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = load_state(self.folder, self.identity) or State(self.identity)
        self.saved_step = self.state.step
        if self.state.step:
            self.model.load_state_dict(self.state.model)
        self._place()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = optim.build(self.model, self.config)
        if self.state.step:
            self._restore()
        self._announce()
        self.metrics = Metrics(self.folder, self.state.step) if self.workers.first else None
        was_training = self.model.training
        self.model.train()
        try:
            self._steps()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise TrainingError(
                f"{self.name}: {error.strerror} after step {self.state.step}; {self._last()}. Free some space: "
                "the same command goes on from there"
            ) from error
        finally:
            self.say.close()
            with contextlib.suppress(OSError):  # of a disk that is full; what is to be said of it was
                if self.metrics:
                    self.metrics.close()
            self.model.train(was_training)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
        return self._result()

    def _place(self) -> None:
        """Put the model where it is trained: on the device, a copy on each worker's, or split over them."""
        self.module = self.trained = _Pass(self.model)
        self.forward: HiddenStates = self.model
        if self.split:
            distributed.split(self.model, self.module, self.numerics.device, self.workers)
        else:
            self.model.to(self.numerics.device)
            if self.workers.size > 1:
                self.trained = distributed.replicated(self.module)
        if self.numerics.compile:
            if self.split:  # block by block, as they are gathered
                for block in self.model.blocks:
                    block.forward = torch.compile(block.forward, dynamic=False)
            else:
                self.forward = _Forward(self.model)
            self.objective.compile(_Forward)

    # The steps ------------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        state, steps = self.state, self.feed.steps
        self.pending: list[tuple[dict[str, Any], list[int], Tensor]] = []
        if self.heldout is not None and not state.heldout:
            self._evaluate()
        begun = self.mark = self.saved_at = time.perf_counter()
        first_step, next_state, every = state.step, begun + self.say.pause(0) / 2, self.config.evaluate_every
        for batches, rows in self.feed.run(state.step):
            values = self._step(batches, rows)
            state.step += 1
            self.pending.append(values)
            now = time.perf_counter()
            if self.numerics.synchronous or now - self.mark >= FLUSH_SECONDS or state.step == steps:
                self._flush()
            if self.heldout is not None and (state.step == steps or (every > 0 and state.step % every == 0)):
                self._flush()
                self._evaluate()
            if self._checkpoint_due():
                self._flush()
                self._save()
            if now >= next_state and state.step < steps:
                self._flush()
                left = (now - begun) / (state.step - first_step) * (steps - state.step)
                told = f"{self.name} {state.step}/{steps}: {self.latest}, {_duration(left)} left"
                self.say.state(told, state.step / steps)
                next_state = now + self.say.pause(now - begun)

    def _step(self, batches: list, rows: list[int]) -> tuple[dict[str, Any], list[int], Tensor]:
        """One update. -> what the host knows of it, its rows, and on the device its loss, gradient norm and metrics."""
        state, step = self.state, self.state.step
        factor = optim.learning_rate_factor(step, self.feed.steps, self.config)
        optim.set_learning_rate(self.optimizers, factor)
        works = [Work.of(batch) for batch in batches]
        weight, tokens, padding = self.workers.totals(
            sum(map(self.objective.weight, works)),
            sum(work.tokens for work in works),
            sum(work.padding for work in works),
        )
        weight = max(1, weight)
        sums: dict[str, Tensor] = {}
        try:
            for number, work in enumerate(works, 1):
                with distributed.synchronised(self.trained, number == len(works)):
                    with self.numerics.autocast():
                        loss, metrics = self.trained(self.objective, self.forward, work.to(self.numerics.device))
                    # gradients are averaged over the workers: their sum, as the weight is that of all of them
                    (loss * self.workers.size / weight).backward()
                for key, value in {"loss": loss.detach(), **metrics}.items():
                    sums[key] = sums[key] + value if key in sums else value
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = distributed.whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
            if self.config.clip > 0:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm, foreach=True)
            means = self.workers.sum(torch.stack(list(sums.values()))) / weight
            values = torch.cat([means[:1], norm.unsqueeze(0), means[1:]])
            if self.numerics.synchronous:  # stop before the weights are spoilt
                self._check(values.tolist(), step + 1, rows)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        except (RuntimeError, MemoryError) as error:
            if not _is_memory(error):
                raise
            n_rows, width = works[0].tokens_BT.shape
            where = f"in step {step + 1} with {n_rows} x {width} positions at a time"
            raise self._out_of_memory(error, where) from error
        state.tokens += tokens
        state.padding += padding
        names = [key for key in sums if key != "loss"]
        line = {"step": step + 1, "tokens": state.tokens, "lr": self.config.learning_rate * factor, "names": names}
        return line, rows, values

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
            state.seconds += each
            state.loss_first = loss if state.loss_first is None else state.loss_first
            if line["step"] > self.feed.steps - max(1, self.feed.steps // 10):
                state.loss_end = [state.loss_end[0] + loss, state.loss_end[1] + 1]
            names = line.pop("names")
            spike = state.spike(line["step"], loss)
            if spike:
                median = spike["median"]
                self.say(
                    f"{self.name}: the loss rose to {loss:.4f} in step {line['step']} (median before {median:.4f})"
                )
            lines.append(
                {
                    "step": line["step"],
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
        try:
            found = _evaluate(self.module, self.evaluator, self.heldout, self.feed.micro_batch, self.numerics)
        except (RuntimeError, MemoryError) as error:
            if not _is_memory(error):
                raise
            raise self._out_of_memory(error, f"in the held-out loss after step {state.step}") from error
        self.model.train()
        if not math.isfinite(found["loss"]):
            raise TrainingError(
                f"{self.name}: the held-out loss is {found['loss']} after step {state.step}; {self._last()}"
            )
        state.heldout.append({"step": state.step, "tokens": state.tokens, **found})
        if self.metrics:
            line = {f"heldout_{key}": value for key, value in found.items()}
            self.metrics.write([{"step": state.step, "tokens": state.tokens, **line}])
        spent = time.perf_counter() - started
        state.evaluation_seconds += spent
        self.mark = time.perf_counter()

    # The state ------------------------------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        state, every = self.state, self.config.checkpoint_every
        if state.step == self.feed.steps:
            return True
        if every > 0:
            return state.step % every == 0
        return self.workers.agreed(time.perf_counter() - self.saved_at >= CHECKPOINT_SECONDS)

    def _save(self) -> None:
        """The state as one process has it, so that any number of workers can go on from it."""
        state, first = self.state, self.workers.first
        state.model = distributed.whole_state(self.model.state_dict(), first)
        state.optimizers = [distributed.whole_state(optimizer.state_dict(), first) for optimizer in self.optimizers]
        state.rng = random_state()
        if first:
            state.save(self.folder)
        state.model, state.optimizers, state.rng = {}, [], {}
        self.saved_step = state.step
        self.mark = self.saved_at = time.perf_counter()

    def _restore(self) -> None:
        state = self.state
        for optimizer, values in zip(self.optimizers, state.optimizers, strict=True):
            distributed.load_optimizer(optimizer, values)
        restore_random_state(state.rng)
        state.model, state.optimizers, state.rng = {}, [], {}

    # Messages -------------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        state = self.state
        resumed = f", resumed after step {state.step}" if state.step else ""
        self.say(
            f"{self.name}: {self.feed.steps} steps of {self.feed.batch_size} {self.batch_name}{resumed}; "
            f"{self.n_parameters:,} parameters; {self.note}"
        )

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
            f"{self._last()}. "
            f"Lower {rate}, or look at these {self.batch_name}"
        )

    def _last(self) -> str:
        if self.saved_step:
            return f"the last good state is that of step {self.saved_step}, in {self.folder.name}/{STATE}"
        return "no state was saved before it"

    def _out_of_memory(self, error: BaseException, where: str) -> TrainingError:
        size, accumulate = self.config.batch_size, self.config.accumulate
        smaller = next((n for n in range(size // 2, 0, -1) if size % n == 0), None)
        way = "lower model.context"
        if smaller is not None:
            way = (
                f"set batch_size = {smaller} (now {size}) and accumulate = {accumulate * size // smaller} "
                f"(now {accumulate}) for the same result in less memory"
            )
        return TrainingError(f"{self.name}: out of memory {where}; {way} ({str(error).splitlines()[0][:160]})")

    def _result(self) -> TrainResult:
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
        held = f", held-out {result.heldout[0]['loss']:.4f} -> {result.heldout_loss:.4f}" if result.heldout else ""
        self.say(
            f"{self.name}: done, loss {result.loss_first:.4f} -> {result.loss_last:.4f}{held}; "
            f"{result.tokens:,} tokens in {_duration(result.seconds)} ({result.tokens_per_second:,.0f}/s)"
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
                work = Work.of(batch).to(numerics.device)
                loss, metrics = module(objective, module.model, work)
                weight += objective.weight(work) if counts else 0
                for key, value in {"loss": loss, **metrics}.items():
                    sums[key] = sums.get(key, 0) + value.double() * counts
    finally:
        module.model.train(was_training)
    (weight,) = workers.totals(weight)
    totals = workers.sum(torch.stack(list(sums.values()))).tolist()
    return {**{key: total / weight for key, total in zip(sums, totals, strict=True)}, objective.unit: weight}


def _is_memory(error: BaseException) -> bool:
    """torch has a type for a GPU's exhausted memory only; the CPU's allocator raises a RuntimeError."""
    said = ("DefaultCPUAllocator", "std::bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in said)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _silent(message: str) -> None:
    """Takes the messages of all workers but the first."""
