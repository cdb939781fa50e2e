"""The negatives: a first-in first-out queue of teacher embeddings of earlier anchors, one preallocated tensor."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bingo_compress.models.encoder import Encoder
from bingo_compress.runtime.machine import (
    sent,
)


class FeatureQueue:
    """The last `size` embeddings pushed, with the image each came from. Starts empty: a random row is never a
    negative.
    """

    def __init__(self, size: int, dim: int, device: torch.device) -> None:
        self._rows = torch.zeros(size, dim, device=device)
        self._images = torch.full((size,), -1, dtype=torch.int64, device=device)
        self._pushed = 0

    def __len__(self) -> int:
        return min(self._pushed, len(self._rows))

    def push(self, embeddings: Tensor, images: Tensor) -> None:
        """Add embeddings (B, D) of the images (B,); the oldest rows give way."""
        size = len(self._rows)
        if len(embeddings) > size:
            embeddings, images = embeddings[-size:], images[-size:]
        slots = torch.arange(self._pushed, self._pushed + len(embeddings), device=self._rows.device) % size
        self._rows[slots] = embeddings
        self._images[slots] = sent(images, self._images.device)
        self._pushed += len(embeddings)

    def negatives(self) -> Tensor:
        """(len, D): the rows that hold an embedding."""
        return self._rows[: len(self)]

    def holding(self, images: Tensor) -> Tensor:
        """(B, len) bool: row q holds an embedding of one of the images[b] (B, M)."""
        held = self._images[: len(self)]
        found = torch.zeros(len(images), len(held), dtype=torch.bool, device=held.device)
        for column in sent(images, held.device).unbind(1):
            found |= held[None] == column[:, None]
        return found

    def state(self) -> dict[str, Tensor]:
        """All there is to save."""
        return {"rows": self._rows, "images": self._images, "pushed": torch.tensor(self._pushed)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self._rows.copy_(state["rows"])
        self._images.copy_(state["images"])
        self._pushed = int(state["pushed"])


class Average:
    """The moving average of student and head (MoCo's key encoder), buffers included and always in eval mode (EMAN,
    arXiv 2101.08482): no batch leaks in.
    """

    def __init__(self, student: Encoder, head: nn.Module) -> None:
        self.student, self.head = copy.deepcopy(student).eval(), copy.deepcopy(head).eval()

    @torch.no_grad()
    def follow(self, student: Encoder, head: nn.Module, share: float) -> None:
        """Keep `share` of the average, take the rest from the models; counters are copied."""
        for mine, theirs in ((self.student, student), (self.head, head)):
            for own, new in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
                if own.is_floating_point():
                    own.lerp_(new, 1 - share)
                else:
                    own.copy_(new)

    @torch.no_grad()
    def __call__(self, views: Tensor) -> Tensor:
        """Keys (B, dim) of length one."""
        keys: Tensor = self.head(self.student(views))
        return normalize(keys.float(), dim=1)
