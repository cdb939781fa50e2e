"""What training changes: student, head, optimiser, the queue of negatives, the moving average. Saved as one, put back
as one.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm

from bingo_compress.models.encoder import Encoder, ProjectionHead, RegressionHead
from bingo_compress.runtime import checkpoint
from bingo_compress.runtime.machine import sent
from bingo_compress.runtime.made_of import hash_seed
from bingo_compress.training.plan import Plan


class FeatureQueue:
    """The negatives: the last `size` embeddings pushed, with the scene of the image each came from (its number, where
    it has no near-copies), in one preallocated tensor. Starts empty: a random row is never a negative.
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


@dataclass
class State:
    """All that training changes; no random number is of it, for each comes from (seed, step). step: taken so far; bags:
    (n, K) as they are now; best: weights of the student that the checks scored highest.
    """

    student: Encoder
    head: nn.Module
    optimizer: torch.optim.Optimizer
    queue: FeatureQueue
    average: Average | None
    bags: Tensor
    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -1.0

    def tensors(self) -> dict[str, Tensor]:
        """All that `restore` needs, beside `facts`, by name."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "student": self.student.backbone.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer),
            "queue": self.queue.state(),
            "best": self.best,
        }
        if self.average is not None:
            parts |= {
                "average": self.average.student.backbone.state_dict(),
                "average_head": self.average.head.state_dict(),
                "bags": {"now": self.bags},
            }
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    def facts(self) -> dict[str, int | float]:
        """What of it is no tensor."""
        return {"step": self.step, "best_score": self.best_score}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, object]) -> None:
        """Put back what `tensors` and `facts` gave."""
        self.student.backbone.load_state_dict(checkpoint.under(tensors, "student"))
        self.head.load_state_dict(checkpoint.under(tensors, "head"))
        checkpoint.load_optimizer(self.optimizer, checkpoint.under(tensors, "optimizer"))
        self.queue.load_state(checkpoint.under(tensors, "queue"))
        if self.average is not None:
            self.average.student.backbone.load_state_dict(checkpoint.under(tensors, "average"))
            self.average.head.load_state_dict(checkpoint.under(tensors, "average_head"))
            self.bags = checkpoint.under(tensors, "bags")["now"]
        self.best, self.best_score = checkpoint.under(tensors, "best"), float(str(facts["best_score"]))
        self.step = int(str(facts["step"]))

    def scored(self, score: float) -> None:
        """Keep the student's weights if no score was as high before."""
        if score > self.best_score:
            self.best_score = score
            self.best = {name: value.detach().clone() for name, value in self.student.backbone.state_dict().items()}


def first_state(plan: Plan, student: Encoder, bags: Tensor) -> State:
    """Of a run that begins: `student` on the plan's device and in training mode, its head random by the recipe's
    seed.
    """
    head = make_head(plan, student.width).to(plan.device)
    student.to(plan.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = make_optimizer(plan, {"student": student, "head": head})
    queue = FeatureQueue(plan.schedule.queue_size, plan.dim, plan.device)
    return State(student, head, optimizer, queue, Average(student, head) if plan.loss.momentum else None, bags)


def make_head(plan: Plan, width: int) -> nn.Module:
    """The head for training of a student of `width`, random by the recipe's seed: the paper's, or what the method
    defines.
    """
    torch.manual_seed(hash_seed(plan.recipe.seed, "head"))
    kind = RegressionHead if plan.loss.regression else ProjectionHead
    return kind(width, plan.recipe.head_hidden, plan.dim)


def make_optimizer(plan: Plan, modules: Mapping[str, nn.Module]) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 as in the paper, or AdamW, which leaves biases and norms undecayed. Each group has the
    name of its module.
    """
    rate, decay, sgd = plan.schedule.peak_lr, plan.recipe.weight_decay, plan.schedule.optimizer == "sgd"
    groups: list[dict[str, Any]] = []
    for name, module in modules.items():
        learnt = [parameter for parameter in module.parameters() if parameter.requires_grad]
        decayed = learnt if sgd else [parameter for parameter in learnt if parameter.ndim > 1]
        rest = [] if sgd else [parameter for parameter in learnt if parameter.ndim <= 1]
        groups += [
            {"name": name, "params": decayed, "weight_decay": decay},
            {"name": name, "params": rest, "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    if sgd:
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=rate, fused=True)


def set_learning(plan: Plan, state: State) -> None:
    """Student and head as the next step wants them: what learns, and whose statistics move."""
    whole = state.step >= plan.schedule.head_steps
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(whole or group["name"] == "head")
    state.student.train(whole)
    if plan.recipe.norms == "frozen":
        for module in state.student.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
