"""The training loop of every model: a model, an objective, rows and a config become a checkpoint with its metrics.

The loop waits for the device only when it writes metrics. An interrupted training resumes exactly (bit-identical on a
CPU); SIGINT and SIGTERM end it after the step that it is in, with its state saved.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basics.errors import TrainingError
from basics.files import damaged, read_note, sha256_tree, write_note
from threefold.config import TrainConfig
from threefold.data.packing import PackedRows, PairedRows
from threefold.memory import keep_freed_memory
from threefold.model.decoder import Decoder
from threefold.model.hf import WEIGHTS, load_checkpoint, save_checkpoint
from threefold.training import distributed
from threefold.training.feed import Feed
from threefold.training.forward import CompiledForward, ForwardPass, mean_loss
from threefold.training.monitor import Monitor, Progress, TrainResult
from threefold.training.numerics import Numerics, choose
from threefold.training.objectives import HiddenStates, MicroBatch, Objective
from threefold.training.optimizers import Muon, learning_rate_factor, set_learning_rate
from threefold.training.state import STATE, State, different, load_state, restore, system_errors, tensors_digest

RESULT = "training.json"  # written last: result, identity and file hashes of a finished training
# Settings that do not change what is trained: a training may be resumed with other values of these.
_NOT_IDENTITY = ("precision", "compile", "shard", "checkpoint_every", "evaluate_every")


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
    identity = _identity(model, objective, rows, config, seed, feed.steps)
    if (folder / RESULT).exists():
        done = _finished(folder, identity)
        if workers.first:
            (progress or print)(f"{name}: trained already, {done['result']['steps']} steps; its checkpoint is loaded")
        model.load_state_dict(load_checkpoint(folder).state_dict())
        return Trained(model, TrainResult(**done["result"]), folder, done["notes"])
    folder.mkdir(parents=True, exist_ok=True)
    objective.prepare(model, rows, heldout, config, folder, device)
    keep_freed_memory()
    numerics = choose(config, sum(p.numel() for p in model.parameters()), feed.positions, device)
    step = TrainStep(model, objective, config, numerics)
    state = step.resume(folder, identity)
    evaluate = None
    if heldout is not None:
        evaluate = partial(mean_loss, step.module, objective.for_heldout(), heldout, numerics=numerics)
    monitor = Monitor(name, step, feed, config, folder, state, evaluate, progress)
    with monitor.running():
        while state.step < feed.steps:
            for batches, numbers in feed.run(state.step):
                batches = [MicroBatch.of(batch) for batch in batches]
                counts = [(batch.weight, batch.tokens, batch.padding) for batch in batches]
                interrupted = int(monitor.interruption.number > 0)
                weight, tokens, padding, asked = workers.totals(*map(sum, zip(*counts, strict=True)), interrupted)
                factor = learning_rate_factor(state.step, feed.steps, config)
                try:
                    names, values = step.gradients(batches, max(1, weight))
                except (RuntimeError, MemoryError) as error:
                    monitor.halve_micro_batches(error, batches[0].tokens_BT)
                    break  # take the same step again
                if numerics.synchronous:  # before the weights are changed by NaN or infinity
                    monitor.check(values.tolist(), state.step + 1, numbers)
                with monitor.memory_errors(f"in the update of step {state.step + 1}"):
                    step.update(factor)
                monitor.after_step(numbers, tokens, padding, asked, config.learning_rate * factor, names, values)
    result, model, noted = monitor.result(), distributed.whole_model(model), dict(notes())
    if workers.first:
        with system_errors(f"{folder.name}/{WEIGHTS}"):
            save_checkpoint(folder, model, tokenizer)
        _write_result(folder, {"result": asdict(result), "identity": identity, "notes": noted})
    return Trained(model, result, folder, noted)


def _identity(
    model: Decoder, objective: Objective, rows: PackedRows | PairedRows, config: TrainConfig, seed: int, steps: int
) -> dict[str, Any]:
    """What determines a training: two with equal identities take the same steps from the same weights."""
    return {
        "objective": objective.name,
        "initial_weights": tensors_digest(model.state_dict())[:16],
        "seed": seed,
        "rows": len(rows),
        "row_tokens": rows.n_tokens,
        **{key: value for key, value in asdict(config).items() if key not in _NOT_IDENTITY},
        "steps": steps,
    }


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


def _write_result(folder: Path, values: Mapping[str, Any]) -> None:
    """Finish a training: write training.json, which holds the hashes of the folder's files, and remove the state."""
    # Notes carry their own hash, and whoever writes one beside the checkpoint may rewrite it.
    hashes = {path: digest for path, digest in sha256_tree(folder).items() if path != STATE}
    files = {path: digest for path, digest in hashes.items() if not _is_note(folder / path)}
    write_note(folder / RESULT, {**values, "files": files})
    (folder / STATE).unlink(missing_ok=True)


def _is_note(path: Path) -> bool:
    return path.suffix == ".json" and read_note(path) is not None


class TrainStep:
    """A model on its device with its optimizers. `gradients` and `update` together are one training step.

    In a process that has joined others, each worker holds a copy of the model (DDP) or a part of it (FSDP2), and
    gradients are summed over the workers: a step equals that of one process.

    Args:
        model, objective, config: as in `train`.
        numerics: device, precision and compiler.
    """

    def __init__(self, model: nn.Module, objective: Objective, config: TrainConfig, numerics: Numerics):
        self.model, self.objective, self.numerics, self.clip = model, objective, numerics, config.clip
        self.n_parameters = sum(p.numel() for p in model.parameters())
        self.workers = distributed.current()
        split = distributed.to_be_split(config.shard, self.n_parameters, numerics.device, self.workers)
        many = f"{self.workers.size} workers {'that split the model' if split else 'with a copy each'}; "
        self.note = (many if self.workers.size > 1 else "") + numerics.note
        self.module = self.trained = ForwardPass(model)
        self.forward: HiddenStates = model
        objective.to(numerics.device)
        if split:
            distributed.split(model, self.module, numerics.device, self.workers)
        else:
            model.to(numerics.device)
            if self.workers.size > 1:
                self.trained = distributed.replicated(self.module)
        if numerics.compile:
            if split:  # block by block, as they are gathered
                for block in model.blocks:
                    block.forward = torch.compile(block.forward, dynamic=False)
            else:
                self.forward = CompiledForward(model, by_block=numerics.by_block)
            objective.compile(CompiledForward)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = build_optimizers(model, config)

    def resume(self, folder: Path, identity: dict[str, Any]) -> State:
        """The counters of an interrupted training, after restoring its weights and optimizers; else new ones."""
        state, values = load_state(folder, identity) or (State(identity), {})
        if values:
            restore(values, self.model, self.optimizers)
        return state

    def gradients(self, batches: Sequence[MicroBatch], weight: int) -> tuple[list[str], Tensor]:
        """Compute the gradients of a step and clip their norm.

        Args:
            batches: this worker's micro-batches.
            weight: what the sum of all workers' losses is divided by: their targets, or pairs.

        Returns:
            Names and values [k], on the device: "loss", "grad_norm" (before clipping) and the objective's metrics.
        """
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            with distributed.synchronised(self.trained, number == len(batches)):
                with self.numerics.autocast():
                    loss, metrics = self.trained(self.objective, self.forward, batch.to(self.numerics.device))
                # gradients are averaged over the workers; multiplied by their number that is the sum
                (loss * self.workers.size / weight).backward()
            for key, value in {"loss": loss.detach(), **metrics}.items():
                sums[key] = sums[key] + value if key in sums else value
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = distributed.whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
        if self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm, foreach=True)
        means = self.workers.sum(torch.stack(list(sums.values()))) / weight
        return ["loss", "grad_norm", *list(sums)[1:]], torch.cat([means[:1], norm.unsqueeze(0), means[1:]])

    def update(self, learning_rate_factor: float = 1.0) -> None:
        """Change the weights by the gradients, and clear these."""
        set_learning_rate(self.optimizers, learning_rate_factor)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: AdamW alone, or Muon for the hidden matrices and AdamW for the rest.

    Hidden matrices are the 2-D weights inside the blocks. They and an untied output head decay; embeddings, norms and
    biases do not. Every parameter group keeps its full learning rate as `base_lr`; `set_learning_rate` scales it.

    Raises TrainingError for a model whose parameters are all frozen.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and id(p) not in embeddings}
    plain = [parameter for name, parameter in parameters.items() if name not in matrices]
    # `unembed`: an untied output head, as the decoder names it
    hidden = [parameter for name, parameter in matrices.items() if not name.startswith("unembed.")]
    head = [parameter for name, parameter in matrices.items() if name.startswith("unembed.")]
    muon, decay = config.optimizer == "muon", config.weight_decay
    groups = [
        {"params": head if muon else hidden + head, "weight_decay": decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups := [group for group in groups if group["params"]]:
        settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": 1e-8}
        optimizers.append(torch.optim.AdamW(groups, fused=True, **settings))
    if muon and hidden:
        settings = {"lr": config.muon_learning_rate, "weight_decay": decay, "momentum": 0.95}
        optimizers.append(Muon(hidden, fp32=config.precision == "fp32", **settings))
    if not optimizers:
        raise TrainingError("the model has no parameter to train: every one of them is frozen")
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["base_lr"] = group["lr"]
    return optimizers
