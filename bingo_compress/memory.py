"""How this process asks the system for memory, and how it hands a GPU what lies there."""

import ctypes
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` does without torch
    import torch


def keep_memory() -> None:
    """Let glibc keep freed blocks: otherwise each large tensor is mapped and cleared anew by the kernel, half of a CPU run's time."""
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another libc
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)


def sent(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """`tensor` on `device`. A GPU is not waited for: a plain copy would wait until all earlier work of its stream is done."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
