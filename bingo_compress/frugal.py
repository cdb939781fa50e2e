"""Student and head in as little memory as they need: an out-of-memory becomes a smaller step with the same result, not the end of the run."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from bingo_compress import screen
from bingo_compress.errors import BingoError

Result = TypeVar("Result")
MOST_PARTS = 64


class Frugal:
    """`model` (views to embeddings) with a ladder for when memory runs out: nothing, then recomputed activations, then micro-batches.

    Every rung gives the same result. Recomputing runs BatchNorm a second time in the backward pass, so its running statistics stand still there.
    Micro-batches would change what BatchNorm sees; a student that has it stops on the second rung.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> None:
        self._run = run or model
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        buffers = [buffer for norm in self._norms for buffer in norm.buffers()]
        # By type, and copied together: a copy of each would be hundreds of small kernels a step.
        self._statistics = [found for kind in (True, False) if (found := [each for each in buffers if each.is_floating_point() == kind])]
        self._before = [[torch.empty_like(buffer) for buffer in each] for each in self._statistics]
        self._backbone: Any = backbone
        self.recomputes = False
        self.parts = 1

    def __call__(self, views: Tensor) -> Tensor:
        """Embeddings (B, D) of views (B, 3, S, S)."""
        if self.parts == 1:
            return self._run(views)
        return torch.cat([checkpoint(self._run, part, use_reentrant=False) for part in views.chunk(self.parts)])

    def step(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """work(*arguments), a step's forward and backward pass; again on the next rung when memory runs out. Raises BingoError on the last."""
        for before, statistics in zip(self._before, self._statistics, strict=True):
            torch._foreach_copy_(before, statistics)
        while True:
            try:
                return work(*arguments)
            except torch.OutOfMemoryError as error:
                found = str(error).splitlines()[0]
            # Outside of the handler: the traceback held the failed step's tensors.
            for before, statistics in zip(self._before, self._statistics, strict=True):
                torch._foreach_copy_(statistics, before)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._climb(found)

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Within it, BatchNorm computes but does not learn: what it sees there it has seen."""
        kept = [norm.momentum for norm in self._norms]
        for norm in self._norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(self._norms, kept, strict=True):
                norm.momentum = momentum

    def _climb(self, found: str) -> None:
        if not self.recomputes and self.parts == 1:
            self.recomputes = True
            with contextlib.suppress(AttributeError, AssertionError, NotImplementedError):  # timm's word for "this model cannot"
                self._backbone.set_grad_checkpointing(True)
                screen.say("out of memory: activations are recomputed from here on; slower, the same result")
                return
        if not self._norms and self.parts < MOST_PARTS:
            self.parts *= 2
            screen.say(f"out of memory: each step in {self.parts} micro-batches from here on; slower, the same result")
            return
        raise BingoError(
            f"out of memory, also with recomputed activations ({found}); lower --batch-size or --image-size, "
            "or share the batch among more GPUs with torchrun; the run goes on with the same settings only where memory allows it"
        )
