"""Several processes that train one model: how they connect, divide the work and combine their results.

`torchrun` starts them and `joined` connects them. Every worker computes a part of each step's rows; gradients are
summed over the workers, so that a step equals that of one process. Every worker holds all weights and optimizer states
(DistributedDataParallel), or a part of them (FSDP2, `fully_shard`) where one device could not hold them all. In a
single process these functions do nothing.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from basics.errors import ConfigError
from threefold.model.decoder import Decoder
from threefold.training import rendezvous

TIMEOUT = timedelta(hours=1)  # for waiting for another worker: the first one may have a corpus to tokenise
BYTES = 16  # per parameter in training: fp32 weight, gradient and AdamW's two moments
SHARE = 0.6  # of a device's memory for these; the rest is for activations and buffers

Item = TypeVar("Item")


@dataclass(frozen=True)
class Workers:
    """The processes of a training, seen from one of them."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this worker writes files and messages."""
        return self.rank == 0

    def totals(self, *counts: int) -> list[int]:
        """Each count summed over all workers, on the host, without waiting for a GPU."""
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
        """The first worker's answer to a question about time or files, which workers may answer differently."""
        if self.size == 1:
            return answer
        shared = torch.tensor([int(answer)])
        dist.broadcast(shared, 0)
        return bool(shared.item())

    def deal(self, items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
        """Every `size`-th item, with True. All workers get equally many, since workers of a split model must compute in
        step: at an uneven end, a worker without an item gets another worker's with False, which must not be counted."""
        group: list[Item] = []
        for item in items:
            group.append(item)
            if len(group) == self.size:
                yield group[self.rank], True
                group.clear()
        if group:
            yield group[self.rank % len(group)], self.rank < len(group)

    def gather(self, part_NAB: Tensor) -> Tensor:
        """The parts of all workers, equally long, concatenated in the order of their ranks."""
        if self.size == 1:
            return part_NAB
        parts = [torch.empty_like(part_NAB) for _ in range(self.size)]
        dist.all_gather(parts, part_NAB.contiguous())
        return torch.cat(parts)


def current() -> Workers:
    """The workers that this process belongs to; itself alone unless it has `joined` others."""
    if dist.is_available() and dist.is_initialized():
        return Workers(dist.get_rank(), dist.get_world_size())
    return Workers()


@contextmanager
def joined(say: Callable[[str], None] = print) -> Iterator[Workers]:
    """Connects the processes that torchrun started with this one, if any: one per GPU over NCCL, or on CPUs over gloo.

    Tensors in host memory go over gloo in both cases. say: receives a line that names the awaited workers.
    Raises ConfigError for more workers than GPUs, and what `rendezvous` raises.
    """
    rank, size = rendezvous.rank_and_size()
    if size == 1:
        yield Workers()
        return
    backend, device = "gloo", None
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
        if local >= gpus:
            raise ConfigError(f"worker {local} of this machine has no GPU, there are {gpus}: start one worker a GPU")
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", local)
        torch.cuda.set_device(device)  # "cuda" means this device from here on
    store = rendezvous.meet(rank, size, say)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device)
    yield current()
    dist.destroy_process_group()  # not after an error: the others may never reach it


# The model ----------------------------------------------------------------------------------------------------------


def to_be_split(shard: Literal["auto", "on", "off"], parameters: int, device: str, workers: Workers) -> bool:
    """Whether weights and optimizer states are split over the workers: as configured, or if they are too large."""
    if workers.size == 1 or shard != "auto":
        return workers.size > 1 and shard == "on"
    if device == "cuda":
        memory = torch.cuda.get_device_properties().total_memory
    else:
        import psutil  # only here: a GPU machine may not have it

        memory = psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", workers.size))
    return BYTES * parameters > SHARE * memory


def split(model: nn.Module, root: nn.Module, device: str, workers: Workers) -> None:
    """Split the parameters of `root`, which holds a decoder, over the workers, in place and onto the device.

    Each block is gathered when it is computed and freed afterwards. Weights are gathered in fp32 and cast by autocast,
    as in one process: exact, at twice the traffic of gathering them in bf16.
    """
    mesh = dist.init_device_mesh(device, (workers.size,))
    for module in (*model.blocks, root):
        fully_shard(module, mesh=mesh)


def replicated(module: nn.Module) -> DistributedDataParallel:
    """The module with gradients that are averaged over the workers during the backward pass."""
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def synchronised(module: nn.Module, last: bool) -> AbstractContextManager:
    """The context of one of a step's micro-batches: gradients are exchanged with the last one only."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor; itself if it is not split. All workers must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A complete tensor, equal on all workers, split as another one of its shape; itself if that is not split."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_model(model: Decoder) -> Decoder:
    """The model with all its weights; where it is split over workers a new one in host memory, on each of them."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    complete = Decoder(model.config, model.attention)
    complete.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return complete
