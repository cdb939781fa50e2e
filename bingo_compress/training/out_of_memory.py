"""Student and head in as little memory as they need: an out-of-memory becomes a smaller step with the same result, not
the end of the run.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bingo_compress.errors import BingoError
from bingo_compress.runtime import console, distributed

Result = TypeVar("Result")
Groups = list[list[Tensor]]
MOST_PARTS = 64


class Frugal:
    """`model` (views to embeddings) with a ladder for when memory runs out: nothing, then recomputed activations, then
    micro-batches.

    A step that is taken again begins with the buffers (running statistics of any norm) and the random numbers of the
    first try, and what recomputing does to the buffers in the backward pass is undone: the result is the same. In
    micro-batches a dropout draws other masks, which is said; a student whose embedding of a view depends on the rest of
    the batch (BatchNorm) would see less of it, and stops on the second rung. Several processes stop at once: the others
    are past sums over all of them that one process alone cannot take again.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> None:
        self._model = model
        self._run = run or model
        # By type, and copied together: a copy of each would be hundreds of small kernels a step.
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            kinds.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(kinds.values())
        self._before = [[torch.empty_like(buffer) for buffer in group] for group in self._buffers]
        self._backbone: Any = backbone
        self._like: Tensor | None = None
        self._asked = False
        self.recomputes = False
        self.parts = 1

    def __call__(self, views: Tensor) -> Tensor:
        """Embeddings (B, D) of views (B, 3, S, S)."""
        if self._like is None:
            self._like = torch.empty_like(views[:3])
        if self.parts == 1:
            return self._run(views)
        return torch.cat([checkpoint(self._run, part, use_reentrant=False) for part in views.chunk(self.parts)])

    def step(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """work(*arguments), a step's forward and backward pass; again on the next rung when memory runs out. Raises
        BingoError on the last.
        """
        _copy(self._before, self._buffers)
        state, device_state = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        while True:
            try:
                return work(*arguments)
            except torch.OutOfMemoryError as error:
                found = str(error).splitlines()[0]
            # Outside of the handler: the traceback held the failed step's tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._climb(found)
            _copy(self._buffers, self._before)
            torch.set_rng_state(state)
            if device_state is not None:
                torch.cuda.set_rng_state(device_state)

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Within it the model may run again, and its buffers are afterwards what they were: what its norms see there
        they have seen.
        """
        if not self.recomputes and self.parts == 1:
            yield
            return
        learnt = [[buffer.clone() for buffer in group] for group in self._buffers]
        try:
            yield
        finally:
            _copy(self._buffers, learnt)

    def _climb(self, found: str) -> None:
        if distributed.world() > 1:
            raise BingoError(
                f"out of memory in process {distributed.rank()} of {distributed.world()} ({found}); lower --batch-size"
                " or --image-size, or share the batch among more GPUs: only a run in one process can make its steps"
                " smaller by itself"
            )
        if not self._asked:
            self._asked = True
            # Timm's word for "this model cannot".
            with contextlib.suppress(AttributeError, AssertionError, NotImplementedError):
                self._backbone.set_grad_checkpointing(True)
                self.recomputes = True
                console.say("out of memory: activations are recomputed from here on; slower, the same result")
                return
        if self.parts < MOST_PARTS and not self._mixes():
            self.parts *= 2
            console.say(
                f"out of memory: each step in {self.parts} micro-batches from here on; slower, the same result but for"
                " dropout's draws"
            )
            return
        tried = ", also with recomputed activations" if self.recomputes else ""
        raise BingoError(
            f"out of memory{tried} ({found}); lower --batch-size or --image-size, or share the batch among more GPUs"
            " with torchrun; the run goes on with the same settings only where memory allows it"
        )

    @torch.no_grad()
    def _mixes(self) -> bool:
        """Whether the embedding of a view depends on the others of its batch. Tried on noise; leaves traces in buffers
        and random numbers.
        """
        assert self._like is not None
        noise = torch.rand_like(self._like)
        found = []
        for rows in ([0, 1], [0, 2]):
            torch.manual_seed(0)
            found.append(self._model(noise[rows])[0])
        one, other = found
        return not torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def _copy(into: Groups, source: Groups) -> None:
    for mine, theirs in zip(into, source, strict=True):
        torch._foreach_copy_(mine, theirs)
