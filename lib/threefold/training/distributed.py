"""Several processes that train one model: how they meet, share work and put together what each of them found.

`torchrun` starts them and `joined` connects them. Every worker computes its share of a step's rows; gradients are
summed over the workers, so that a step is that of one process. Weights and optimizer states are the same on every
worker (DistributedDataParallel), or split over them (FSDP2, `fully_shard`) where one device could not hold them. In a
single process everything here does nothing.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from basics.errors import ConfigError

TIMEOUT = timedelta(hours=1)  # of a worker that waits for another: the first may have a corpus to tokenise
BYTES = 16  # of a parameter in training: fp32 weight, gradient and AdamW's two moments
SHARE = 0.6  # of a device's memory that these may take; the rest is for activations and buffers

Item = TypeVar("Item")


@dataclass(frozen=True)
class Workers:
    """The processes of a training, seen from one of them."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files and messages."""
        return self.rank == 0

    def totals(self, *counts: int) -> list[int]:
        """Each count summed over all workers, on the host: no GPU is waited for."""
        if self.size == 1:
            return list(counts)
        total = torch.tensor(counts)
        dist.all_reduce(total)
        return total.tolist()

    def sum(self, values: Tensor) -> Tensor:
        """The values summed over all workers, in place, on their device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agreed(self, answer: bool) -> bool:
        """The first worker's answer, where clocks or disks may tell the workers different ones."""
        if self.size == 1:
            return answer
        told = torch.tensor([int(answer)])
        dist.broadcast(told, 0)
        return bool(told.item())

    def deal(self, items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
        """Every `size`-th item, with True. All workers get equally many, since those of a split model compute in step:
        where items do not come out even, a worker without one gets another's with False, not to be counted."""
        group: list[Item] = []
        for item in items:
            group.append(item)
            if len(group) == self.size:
                yield group[self.rank], True
                group.clear()
        if group:
            yield group[self.rank % len(group)], self.rank < len(group)

    def gather(self, part_NAB: Tensor) -> Tensor:
        """The parts of all workers, equally long, end to end in the order of their ranks."""
        if self.size == 1:
            return part_NAB
        parts = [torch.empty_like(part_NAB) for _ in range(self.size)]
        dist.all_gather(parts, part_NAB.contiguous())
        return torch.cat(parts)


def current() -> Workers:
    """The workers this process is one of; itself alone unless it has `joined` others."""
    if dist.is_available() and dist.is_initialized():
        return Workers(dist.get_rank(), dist.get_world_size())
    return Workers()


@contextmanager
def joined() -> Iterator[Workers]:
    """Joins the processes that torchrun started with this one, if it did: one a GPU over NCCL, or on CPUs over gloo.

    The host's own messages go over gloo in both cases. Raises ConfigError for more workers than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Workers()
        return
    if torch.cuda.is_available():
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ConfigError(f"worker {local} of this machine has no GPU, there are {there}: start one worker a GPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)  # "cuda" means this one from here on
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    yield current()
    dist.destroy_process_group()  # not after an error: the others may never come to it


# The model ----------------------------------------------------------------------------------------------------------


def to_be_split(shard: Literal["auto", "on", "off"], parameters: int, device: str, workers: Workers) -> bool:
    """Whether weights and optimizer states are split over the workers: as asked for, or where they are too large."""
    if workers.size == 1 or shard != "auto":
        return workers.size > 1 and shard == "on"
    if device == "cuda":
        memory = torch.cuda.get_device_properties().total_memory
    else:
        memory = psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", workers.size))
    return BYTES * parameters > SHARE * memory


def split(model: nn.Module, root: nn.Module, device: str, workers: Workers) -> None:
    """Split the parameters of `root`, which holds a decoder, over the workers, in place and onto the device.

    Each block is gathered when it is computed and let go after it. Weights are gathered in fp32 and cast by autocast,
    as in one process: exact, at twice the traffic of gathering them in bf16.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device, (workers.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)


def replicated(module: nn.Module) -> DistributedDataParallel:
    """The module with gradients that are averaged over the workers while the backward pass goes on."""
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def synchronised(module: nn.Module, last: bool) -> AbstractContextManager:
    """For one of a step's micro-batches: gradients go to the other workers with the last one's only."""
    if isinstance(module, DistributedDataParallel):
        return nullcontext() if last else module.no_sync()
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2's
        module.set_requires_gradient_sync(last)
    return nullcontext()


def is_split(value: Any) -> bool:
    """Whether this is a tensor that is split over the workers."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together; itself if it is not split. All workers must call it in step."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal on all workers, split as another one of its shape is; itself if that is not split."""
    if not is_split(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_state(state: Any, keep: bool) -> Any:
    """A state dictionary as one process has it: split tensors are put together, one at a time, in host memory. Workers
    that do not keep it get None in their place."""
    if is_split(state):
        tensor = whole(state)
        return tensor.cpu() if keep else None
    if isinstance(state, dict):
        return type(state)((key, whole_state(value, keep)) for key, value in state.items())
    return [whole_state(value, keep) for value in state] if isinstance(state, list) else state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state as one process has it, split as the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split_state = {
        index: {
            name: split_like(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in of.items()
        }
        for index, of in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": split_state})
