"""What a training leaves in its folder: metrics.jsonl, append-only, and resume.safetensors, the state to go on from."""

import hashlib
import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from basics.errors import TrainingError
from basics.files import sync

METRICS = "metrics.jsonl"
STATE = "resume.safetensors"
_FORMAT = 2
LARGEST = 1e300  # of a number in the metrics; infinities and NaN are none
# A loss stands out that lies this many robust standard deviations (1.4826 times the median absolute deviation) and a
# tenth above the median of the steps before it. Of normally scattered losses none in 10^15 does.
SPIKE_DEVIATIONS = 8.0
SPIKE_SHARE = 0.1
SPIKE_WINDOW, SPIKE_FROM = 64, 16  # steps looked back on; at least so many


class Metrics:
    """metrics.jsonl of one training. One JSON object a line; a line {"resumed_from": n} voids earlier steps above n."""

    def __init__(self, folder: Path, resumed_from: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        if path.exists():
            _cut_torn_line(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        if path.stat().st_size:
            self.write([{"resumed_from": resumed_from}])

    def write(self, lines: list[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a folder's metrics.jsonl that count: without those that a resumed training took again, and without
    the part of a line that is being written. Raises TrainingError naming the line that is none."""
    lines: list[dict[str, Any]] = []
    file = Path(folder) / METRICS
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
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
    """A training's course as columns, for plots and records: about `points` steps at most, evenly spaced.

    {"step", "tokens", "loss", "lr", "grad_norm", ... of the steps, "heldout": {"step", "tokens", "loss", ...}}.
    """
    lines = read_metrics(folder)
    steps = [line for line in lines if "heldout_loss" not in line]
    steps = steps[(len(steps) - 1) % (apart := -(-len(steps) // points)) :: apart] if steps else []
    held = [{k.replace("heldout_", ""): v for k, v in line.items()} for line in lines if "heldout_loss" in line]
    return {**_columns(steps), "heldout": _columns(held)}


def _columns(lines: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = list(lines[0]) if lines else []
    for line in lines:
        if missing := [name for name in names if name not in line]:
            raise TrainingError(f"{METRICS}: step {line['step']} has no {missing[0]}, which the first one has")
    return {name: [line[name] for line in lines] for name in names}


def _cut_torn_line(path: Path) -> None:
    """Remove the part of a line that a killed process left at the end: it is no record."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)


@dataclass
class State:
    """Everything a training needs to go on exactly where it was; the rows to come follow from `step` and the seed."""

    identity: dict[str, Any]  # of the training it belongs to
    step: int = 0  # steps taken
    tokens: int = 0
    padding: int = 0
    metered: int = 0  # tokens whose speed is in the metrics
    seconds: float = 0.0  # of training steps
    evaluation_seconds: float = 0.0
    loss_first: float | None = None
    loss_end: list[float] = field(default_factory=lambda: [0.0, 0])  # sum and number of the last tenth of the losses
    heldout: list[dict[str, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)  # losses a spike is told by
    spikes: list[dict[str, float]] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    rng: dict[str, Any] = field(default_factory=dict)

    def spike(self, step: int, loss: float) -> dict[str, float] | None:
        """Take a step's loss; what is noted of it where it stands out: {"step", "loss", "median" (of the steps before),
        "limit"}."""
        found = None
        if len(self.recent) >= SPIKE_FROM:
            median = statistics.median(self.recent)
            deviation = 1.4826 * statistics.median(abs(value - median) for value in self.recent)
            limit = median + max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(median))
            if loss > limit:
                found = {"step": step, "loss": loss, "median": median, "limit": limit}
                self.spikes.append(found)
        self.recent = [*self.recent[1 - SPIKE_WINDOW :], loss]
        return found

    def save(self, folder: Path) -> None:
        """Write the state so that at every moment a whole one is there. Raises OSError; the one before then stays."""
        tensors: dict[str, Tensor] = {}
        text = json.dumps(_plain(vars(self), "", tensors), allow_nan=False)
        metadata = {"format": str(_FORMAT), "state": text, "sha256": tensors_digest(tensors, text)}
        temporary = folder / f".{STATE}.tmp"
        try:
            with system_errors(f"{folder.name}/{STATE}"):
                save_file(tensors, temporary, metadata)
            sync(temporary)
            os.replace(temporary, folder / STATE)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def system_errors(file: str) -> Iterator[None]:
    """Raises as OSError what safetensors keeps as text of a system's error while it writes: a full disk, for one."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), file) from error


def load_state(folder: Path, identity: dict[str, Any]) -> State | None:
    """The state in a folder, None if there is none. Every byte is hashed and compared with what was written.

    Raises:
        TrainingError: the file is damaged or belongs to another training; the message says what differs.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise TrainingError(
            f"{folder.name}/{STATE} cannot be read ({type(error).__name__}); remove it to start over"
        ) from error
    if metadata.get("format") != str(_FORMAT):
        raise TrainingError(f"{folder.name}/{STATE} was written by another version; remove it to start over")
    text = metadata.get("state", "")
    if tensors_digest(tensors, text) != metadata.get("sha256"):
        raise TrainingError(f"{folder.name}/{STATE} is not what was written to it; remove it to start over")
    state = State(**_restored(json.loads(text), tensors))
    asked = json.loads(json.dumps(identity))
    different = [
        f"{name} {state.identity.get(name)} there, {asked.get(name)} now"
        for name in {**state.identity, **asked}
        if state.identity.get(name) != asked.get(name)
    ]
    if different:
        raise TrainingError(
            f"{folder.name}/{STATE} belongs to another training ({'; '.join(different)}); "
            "remove it to start over, or train in another folder"
        )
    return state


_TENSOR, _PAIRS = "$tensor", "$pairs"  # in the state's JSON: a tensor's name; a dictionary whose keys are not strings


def _plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, its tensors put into `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        parts = [(key, _plain(item, f"{name}.{key}" if name else str(key), tensors)) for key, item in value.items()]
        return dict(parts) if all(isinstance(key, str) for key in value) else {_PAIRS: parts}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _PAIRS in value:
        return {key: _restored(item, tensors) for key, item in value[_PAIRS]}
    return {key: _restored(item, tensors) for key, item in value.items()}


def tensors_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over tensors in the order of their names, names, types and shapes included, and a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over a model's parameters and buffers, names included."""
    return tensors_digest(model.state_dict())


def random_state() -> dict[str, Any]:
    """torch's random number generators, as a state keeps them."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}


def restore_random_state(rng: dict[str, Any]) -> None:
    """Put them back."""
    torch.set_rng_state(rng["cpu"])
    if rng["cuda"] and torch.cuda.is_available() and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])
