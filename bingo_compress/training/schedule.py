"""The learning rate: a pure function of the step."""

import math


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to zero at `total` (SGDR without restarts). step counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
