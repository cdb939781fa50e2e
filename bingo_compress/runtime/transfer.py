"""How a GPU is handed what lies in memory."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A GPU is not waited for: a plain copy would wait until all earlier work of its stream is done."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
