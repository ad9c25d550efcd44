"""What a training keeps in its folder: metrics.jsonl, append-only, and resume.safetensors, the state to resume from."""

import contextlib
import copy
import hashlib
import json
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from basics.errors import TrainingError
from basics.files import sync

METRICS = "metrics.jsonl"
STATE = "resume.safetensors"
_CONTENT = "content-4"  # name and format of the JSON in a file of tensors
LARGEST = 1e300  # magnitude of a number in the metrics; excludes infinities and NaN
# A loss is a spike if it lies this many robust standard deviations (1.4826 times the median absolute deviation) and
# a tenth above the median of the steps before it. Of normally distributed losses fewer than one in 10^15 does.
SPIKE_DEVIATIONS = 8.0
SPIKE_SHARE = 0.1
SPIKE_WINDOW, SPIKE_FROM = 64, 16  # preceding steps that are compared with; the fewest that suffice


# Metrics ------------------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl of one training: one JSON object per line. {"resumed_from": n} voids earlier steps above n."""

    def __init__(self, folder: Path, resumed_from: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        if path.exists():  # remove the part of a line that a killed process left at the end
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        if path.stat().st_size:
            self.write([{"resumed_from": resumed_from}])

    def write(self, lines: list[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The valid lines of a folder's metrics.jsonl: without steps that a resumed training repeated, and without an
    unfinished last line. Raises TrainingError naming a malformed line."""
    lines: list[dict[str, Any]] = []
    file = Path(folder) / METRICS
    complete, _, _ = file.read_bytes().rpartition(b"\n")
    for number, line in enumerate(complete.split(b"\n") if complete else (), start=1):
        try:
            values = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise TrainingError(f"{file.parent.name}/{METRICS}:{number}: not JSON: {error}") from error
        numbers = values.values() if isinstance(values, dict) else [None]
        if not all(isinstance(value, int | float) and -LARGEST < value < LARGEST for value in numbers):
            raise TrainingError(f"{file.parent.name}/{METRICS}:{number}: expected an object of finite numbers")
        if not values.keys() & {"step", "resumed_from"}:
            raise TrainingError(f"{file.parent.name}/{METRICS}:{number}: no step")
        if "resumed_from" in values:
            start = values["resumed_from"]  # 0: from the beginning, the first held-out loss included
            lines = [old for old in lines if 0 < start >= old["step"]]
        else:
            lines.append(values)
    return lines


def curve(folder: str | Path, points: int = 2000) -> dict[str, Any]:
    """A training's metrics as columns, for plots and records: about `points` steps at most, evenly spaced.

    {"step", "tokens", "loss", "lr", "grad_norm", ... of the steps, "heldout": {"step", "tokens", "loss", ...}}.
    """
    lines = read_metrics(folder)
    steps = [line for line in lines if "heldout_loss" not in line]
    steps = steps[(len(steps) - 1) % (apart := -(-len(steps) // points)) :: apart] if steps else []
    heldout = [{k.replace("heldout_", ""): v for k, v in line.items()} for line in lines if "heldout_loss" in line]
    return {**_columns(steps), "heldout": _columns(heldout)}


def _columns(lines: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = list(lines[0]) if lines else []
    for line in lines:
        if missing := [name for name in names if name not in line]:
            raise TrainingError(f"{METRICS}: step {line['step']} has no {missing[0]}, which the first one has")
    return {name: [line[name] for line in lines] for name in names}


# The state to resume from -------------------------------------------------------------------------------------------


@dataclass
class State:
    """Counters of a training, which the resumable state keeps beside weights, optimizers and random number generators.
    The rows still to come follow from `step` and the seed."""

    identity: dict[str, Any]  # of the training it belongs to
    step: int = 0  # steps taken
    tokens: int = 0
    padding: int = 0
    metered: int = 0  # tokens whose speed is in the metrics
    seconds: float = 0.0  # in training steps
    evaluation_seconds: float = 0.0
    loss_first: float | None = None
    loss_end: list[float] = field(default_factory=lambda: [0.0, 0])  # sum and number of the last tenth of the losses
    heldout: list[dict[str, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)  # losses that a spike is detected against
    spikes: list[dict[str, float]] = field(default_factory=list)

    def add_loss(self, step: int, loss: float, steps: int) -> dict[str, float] | None:
        """Add the loss of one of all `steps`; if it is a spike, returns {"step", "loss", "median" (of the steps
        before), "limit"}."""
        self.loss_first = loss if self.loss_first is None else self.loss_first
        if step > steps - max(1, steps // 10):
            self.loss_end = [self.loss_end[0] + loss, self.loss_end[1] + 1]
        spike = None
        if len(self.recent) >= SPIKE_FROM:
            median = statistics.median(self.recent)
            deviation = 1.4826 * statistics.median(abs(value - median) for value in self.recent)
            limit = median + max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(median))
            if loss > limit:
                spike = {"step": step, "loss": loss, "median": median, "limit": limit}
                self.spikes.append(spike)
        self.recent = [*self.recent[1 - SPIKE_WINDOW :], loss]
        return spike


# Complete tensors in host memory on the first worker, whatever the weights are split over.
_COMPLETE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def collect(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Weights, optimizer states and random number generators under unique names, as one process has them: copies, which
    later steps do not change.

    All workers must call it together; the first one gets the result.
    """
    values = {f"model/{name}": value for name, value in get_model_state_dict(model, options=_COMPLETE).items()}
    for number, optimizer in enumerate(optimizers):  # one by one: torch mixes up several of a split model
        states = get_optimizer_state_dict(model, optimizer, options=_COMPLETE)
        values[f"groups{number}"] = states.get("param_groups")
        for name, state in states.get("state", {}).items():
            values |= {f"optimizer{number}/{name}/{key}": value for key, value in state.items()}
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    for name, value in values.items():
        if not isinstance(value, Tensor):
            values[name] = copy.deepcopy(value)
        elif on_cpu:  # torch copied tensors of a GPU, and gives those of a CPU themselves
            values[name] = value.clone()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return values | {"rng/cpu": torch.get_rng_state()} | {f"rng/cuda{i}": value for i, value in enumerate(cuda)}


def restore(values: Mapping[str, Any], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Load what `collect` returned, split over the workers as the model is."""
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in values.items():
        part, _, name = key.partition("/")
        parts[part][name] = value
    for number, optimizer in enumerate(optimizers):
        states: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, value in parts[f"optimizer{number}"].items():
            parameter, _, key = name.rpartition("/")
            states[parameter][key] = value
        complete = {"state": dict(states), "param_groups": values[f"groups{number}"]}
        set_optimizer_state_dict(model, optimizer, complete, options=_COMPLETE)
    set_model_state_dict(model, parts["model"], options=_COMPLETE)
    torch.set_rng_state(parts["rng"].pop("cpu"))
    if parts["rng"] and torch.cuda.is_available() and len(parts["rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(list(parts["rng"].values()))


def save_state(folder: Path, state: State, values: Mapping[str, Any]) -> None:
    """Write counters and the values of `collect`. On an OSError the previous state remains."""
    tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    settings = {name: value for name, value in values.items() if name not in tensors}
    write_tensors(folder / STATE, tensors, {"state": asdict(state), "settings": settings})


class StateWriter:
    """Writes the states of a training in a thread of its own, one after the other, while the next steps are taken.

    step: of the newest state on the disk.
    """

    def __init__(self, folder: Path, step: int):
        self.folder, self.step = folder, step
        self._thread = ThreadPoolExecutor(1, "state")
        self._writing: tuple[int, Future] | None = None

    def write(self, state: State, values: Mapping[str, Any]) -> None:
        """Begin to write counters, as they are now, and the values of `collect`."""
        self.wait()
        self._writing = (state.step, self._thread.submit(save_state, self.folder, copy.deepcopy(state), values))

    def wait(self) -> None:
        """Wait for the state that is being written. Raises its OSError; the one before it then remains."""
        if self._writing is not None:
            (step, writing), self._writing = self._writing, None
            writing.result()
            self.step = step

    def close(self) -> None:
        self._thread.shutdown()


def load_state(folder: Path, identity: dict[str, Any]) -> tuple[State, dict[str, Any]] | None:
    """Counters and values in a folder, None if there are none.

    Raises:
        TrainingError: the file is damaged or belongs to another training; the message says what differs.
    """
    if not (folder / STATE).exists():
        return None
    tensors, content = read_tensors(folder / STATE)
    state = State(**content["state"])
    if keys := different(state.identity, identity):
        changes = (f"{key} {state.identity.get(key)} there, {identity.get(key)} now" for key in keys)
        raise TrainingError(
            f"{folder.name}/{STATE} belongs to another training ({'; '.join(changes)}); "
            "remove it to start over, or train in another folder"
        )
    return state, {**content["settings"], **tensors}


def different(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, or that only one of the two has."""
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


# Tensors with values ------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Keep tensors, JSON values and a hash of both in a safetensors file. A complete file exists at every moment."""
    content = {**values, "sha256": tensors_digest(tensors, json.dumps(values, allow_nan=False))}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with system_errors(f"{path.parent.name}/{path.name}"):
            # one entry: safetensors writes several in varying order, which would change the file's bytes
            save_file(dict(tensors), temporary, {_CONTENT: json.dumps(content)})
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and values that `write_tensors` kept. Raises TrainingError if a byte of them has changed."""
    name = f"{path.parent.name}/{path.name}"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise TrainingError(f"{name} cannot be read ({type(error).__name__}); remove it to start over") from error
    if _CONTENT not in metadata:
        raise TrainingError(f"{name} was written by another version; remove it to start over")
    content: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # a changed byte may leave no JSON
        content = json.loads(metadata[_CONTENT])
    if content.pop("sha256", None) != tensors_digest(tensors, json.dumps(content)):
        raise TrainingError(f"{name} is not what was written to it; remove it to start over")
    return tensors, content


@contextlib.contextmanager
def system_errors(file: str) -> Iterator[None]:
    """Raises as OSError what safetensors reports as the text of a system error while it writes, such as a full disk."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), file) from error


def tensors_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over tensors sorted by name, with names, types and shapes, and a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
