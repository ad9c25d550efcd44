"""What a training leaves in its folder: metrics.jsonl, append-only, and resume.pt, the state to go on from."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from threefold.errors import TrainingError

METRICS = "metrics.jsonl"
STATE = "resume.pt"
_FORMAT = 1
LARGEST = 1e300  # of a number in the metrics; infinities and NaN are none


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
            lines = [old for old in lines if old["step"] <= values["resumed_from"]]
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
    model: dict[str, Any] = field(default_factory=dict)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    rng: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write resume.pt so that at every moment a whole one is there."""
        temporary = folder / f".{STATE}.tmp"
        with open(temporary, "wb") as file:
            torch.save({"format": _FORMAT, **vars(self)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / STATE)


def load_state(folder: Path, identity: dict[str, Any]) -> State | None:
    """The state in a folder, None if there is none.

    Raises:
        TrainingError: the file is damaged or belongs to another training; the message says what differs.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file, none of them its own
        raise TrainingError(
            f"{folder.name}/{STATE} cannot be read ({type(error).__name__}); remove it to start over"
        ) from error
    if content.pop("format", None) != _FORMAT:
        raise TrainingError(f"{folder.name}/{STATE} was written by another version; remove it to start over")
    state = State(**content)
    different = [
        f"{name} {state.identity.get(name)} there, {identity.get(name)} now"
        for name in {**state.identity, **identity}
        if state.identity.get(name) != identity.get(name)
    ]
    if different:
        raise TrainingError(
            f"{folder.name}/{STATE} belongs to another training ({'; '.join(different)}); "
            "remove it to start over, or train in another folder"
        )
    return state


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over a model's parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def random_state() -> dict[str, Any]:
    """torch's random number generators, as a state keeps them."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}


def restore_random_state(rng: dict[str, Any]) -> None:
    """Put them back."""
    torch.set_rng_state(rng["cpu"])
    if rng["cuda"] and torch.cuda.is_available() and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])
