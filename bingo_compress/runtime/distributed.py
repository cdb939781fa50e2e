"""Several processes, started by torchrun: the only file that names torch.distributed. With one process everything here
is the identity. Array jobs, which share a folder and never talk, are at the end.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bingo_compress.errors import BingoError
from bingo_compress.runtime import machine, signals

Item = TypeVar("Item")
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connect timeout")  # of gloo

# Of a thread, not of the process: while the first process works by itself, a thread of it may be making its share of
# the next batch.
_by_itself = ContextVar("_by_itself", default=False)
_job = ContextVar("_job", default=(0, 1))  # this array job's number, and how many there are


def asked_for() -> bool:
    """Whether torchrun started this process as one of several."""
    return machine.processes() > 1


def start(device: torch.device) -> torch.device:
    """Join the other processes, if there are any (NCCL on GPUs, gloo on CPUs). Returns this process's own device."""
    if not asked_for():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo beside NCCL: small things on the CPU (paths, counts, refusals) are exchanged too.
        # The wait is long: while one process decodes or checks, the others stand at a barrier.
        with signals.fatal():  # the others may never come
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2)
            )
    return device


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Whether an error of gloo's or NCCL's says that another process of the run is gone."""
    return asked_for() and (
        isinstance(error, dist.DistError)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in GONE))
    )


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    """Number of processes; 1 within `from_first`, where the others wait."""
    return dist.get_world_size() if dist.is_initialized() and not _by_itself.get() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, by gloo: dist.barrier() would guess a GPU


def mine(items: Sequence[Item]) -> list[Item]:
    """Every world-th item, from the rank-th: together the processes have each item once."""
    return list(items[rank() :: world()])


def stretch(items: Sequence[Item]) -> Sequence[Item]:
    """The rank-th of `world` runs of consecutive items, equal within one: those of all processes, one after the other,
    are `items`.
    """
    start, stop = (-(-len(items) * number // world()) for number in (rank(), rank() + 1))
    return items[start:stop]


def exchange(thing: Any) -> list[Any]:
    """What every process brought, by rank. For small things: it is pickled between our own processes."""
    if world() == 1:
        return [thing]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, thing)
    return found


def from_first(make: Callable[[], Item]) -> Item:
    """make() called by rank 0, as if it were the only process, and what it returned in every process. If it raises, it
    raises in every process.
    """
    if world() == 1:
        return make()
    told: list[Any] = [None, None]
    if rank() == 0:
        before = _by_itself.set(True)
        try:
            told[0] = make()
        except Exception as error:
            told[1] = error
        finally:
            _by_itself.reset(before)
    dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise told[1]
    made: Item = told[0]
    return made


def joined(batches: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """All rows of the batches of all processes, by rank, in every process: batches of (n, ...), (n, ...), ... to [(N,
    ...), (N, ...), ...].

    n may differ, and so may the number of batches; [] where no process has one. On the CPU, no gradient. What one
    process raises while it makes its batches is raised in all.
    """
    if world() == 1:
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]
    own: list[Tensor] = []
    failure: Exception | None = None
    try:
        own = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    except Exception as error:
        failure = error
    told = exchange((failure, [(len(part), part.shape[1:], part.dtype) for part in own]))
    for raised in (failure, *(theirs for theirs, _ in told)):  # one's own first: it has its traceback
        if raised is not None:
            raise raised
    sizes = [kinds[0][0] if kinds else 0 for _, kinds in told]
    whole: list[Tensor] = []
    for place, (_, shape, dtype) in enumerate(next((kinds for _, kinds in told if kinds), [])):
        whole.append(torch.empty(sum(sizes), *shape, dtype=dtype))
        for source, part in enumerate(whole[-1].split(sizes)):
            if source == rank() and own:
                part.copy_(own[place])
            if len(part):
                dist.broadcast(part, source)
    return whole


def rows(tensor: Tensor) -> Tensor:
    """The rows of every process one after the other: (n, ...) to (world * n, ...), no gradient. Every process brings as
    many.
    """
    if world() == 1:
        return tensor
    found = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(found, tensor.contiguous())
    return torch.cat(found)


def mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over the processes of each scalar, for the log."""
    if world() == 1:
        return values
    together = torch.stack([value.detach() for value in values.values()])
    dist.all_reduce(together)
    return dict(zip(values, (together / world()).unbind(), strict=True))


def largest(number: int) -> int:
    """The largest of the processes' numbers, by gloo: it waits for the processes, not for a GPU's work."""
    if world() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def with_gradients(tensor: Tensor) -> Tensor:
    """`rows`, differentiable: every process gets the gradient of its own rows from the losses of all."""
    if world() == 1:
        return tensor
    blank = torch.zeros_like(tensor)
    return _sum(torch.cat([tensor if number == rank() else blank for number in range(world())]))


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(None, gradient)


def _sum(tensor: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(tensor)
    return total


def refuse_unshared(student: nn.Module) -> None:
    """Several processes: raises BingoError for a student with running statistics that `shared` does not share; each
    process would keep its own.
    """
    others = {
        type(module).__name__
        for module in student.modules()
        if not isinstance(module, _BatchNorm)
        and any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))
    }
    if others and world() > 1:
        raise BingoError(
            f"--student: expected BatchNorm or norms without running statistics, found {', '.join(sorted(others))} and"
            f" {world()} processes; start one process, or choose another student"
        )


def shared(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with gradients averaged over the processes (DistributedDataParallel) and BatchNorm over all their views;
    itself for one process.
    """
    if world() == 1:
        return model
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            # In place of nn.SyncBatchNorm, which knows no CPU and not timm's BatchNorm with activation: names and
            # weights stay as they are.
            module.forward = partial(_batch_norm, module, module.forward)  # type: ignore[method-assign]
    ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # Torch 2.15 has another name for broadcast_buffers, which 2.11 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        # static_graph: students with parameters that no output depends on, and recomputed activations.
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, static_graph=True)


def _batch_norm(norm: Any, alone: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """BatchNorm in training over the views of every process: mean and variance of them all (two passes, as torch does),
    the same running statistics.
    """
    if not norm.training or norm.running_mean is None:
        return alone(views)
    rest = [dim for dim in range(views.ndim) if dim != 1]
    shape = [1, -1, *[1] * (views.ndim - 2)]
    wide = views.float()
    count = wide.numel() // wide.shape[1] * world()
    middle = _sum(wide.sum(rest)) / count
    centred = wide - middle.view(shape)
    variance = _sum(centred.square().sum(rest)) / count
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(middle, share)
        norm.running_var.lerp_(variance * count / (count - 1), share)
    out = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    out = out.to(views.dtype)
    # timm's BatchNormAct2d: the activation is part of the layer.
    done: Tensor = norm.act(norm.drop(out)) if hasattr(norm, "act") else out
    return done


class Unfinished(Exception):
    """Other array jobs have parts of a stage to make yet, and nobody waits for them. stage: what becomes of an image in
    it; left, parts: how many there are.
    """

    def __init__(self, stage: str, left: int, parts: int) -> None:
        super().__init__(stage, left, parts)
        self.stage, self.left, self.parts = stage, left, parts


@contextmanager
def as_job(number: int, jobs: int) -> Iterator[None]:
    """Inside, this is array job `number`, from 0, of `jobs`: it makes its share of each stage, and no other job's."""
    before = _job.set((number, jobs))
    try:
        yield
    finally:
        _job.reset(before)


def jobs() -> int:
    """Number of array jobs; 1 outside of `as_job`."""
    return _job.get()[1]


def of_job(parts: Sequence[Item]) -> list[Item]:
    """Those of a stage's parts that this array job makes: together the jobs have each once."""
    return list(parts[_job.get()[0] :: jobs()])


def refuse_unfinished(stage: str, parts: Sequence[Item], there: Callable[[Item], bool]) -> None:
    """Raise Unfinished where an array job lacks parts that others make."""
    left = 0 if jobs() == 1 else sum(not there(part) for part in parts)
    if left:
        raise Unfinished(stage, left, len(parts))
