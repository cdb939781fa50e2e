"""How this process asks the system for memory."""

import ctypes
import os
import sys


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
