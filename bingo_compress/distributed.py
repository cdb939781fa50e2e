"""Several processes, started by torchrun: the only file that names torch.distributed. With one process everything here is the identity."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def asked_for() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start(device: torch.device) -> torch.device:
    """Join the other processes, if there are any (NCCL on GPUs, gloo on CPUs). Returns this process's own device."""
    if not asked_for():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo beside NCCL: small things on the CPU (paths, counts, refusals) are exchanged too.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, by gloo: dist.barrier() would guess a GPU


def mine(items: Sequence[Item]) -> list[Item]:
    """Every world-th item, from the rank-th: together the processes have each item once."""
    return list(items[rank() :: world()])


def exchange(thing: Any) -> list[Any]:
    """What every process brought, by rank. For small things: it is pickled between our own processes."""
    if world() == 1:
        return [thing]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, thing)
    return found


def from_first(make: Callable[[], Any]) -> Any:
    """make() called by rank 0 alone, and what it returned in every process. If it raises, it raises in every process."""
    if world() == 1:
        return make()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = make()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def rows(tensor: Tensor) -> Tensor:
    """The rows of every process one after the other: (n, ...) to (world * n, ...), no gradient. Every process brings as many."""
    if world() == 1:
        return tensor
    found = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(found, tensor.contiguous())
    return torch.cat(found)
