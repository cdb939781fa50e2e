"""This machine: its processor, its cores and threads, its memory and how a process asks for it, the way to its GPU.
Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bingo_compress.errors import BingoError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Item = TypeVar("Item")
Result = TypeVar("Result")

# Best first, in Linux's names: the first that a processor has is what onnxruntime's int8 kernels (MLAS) take there.
INT8 = {
    "amx_int8": "AMX: int8 has tile products here",
    "avx512_vnni": "AVX-512 VNNI: int8 has a dot-product instruction here",
    "avx_vnni": "AVX-VNNI: int8 has a dot-product instruction here",
    "i8mm": "Arm i8mm: int8 has matrix products here",
    "asimddp": "Arm dotprod: int8 has a dot-product instruction here",
    "avx512bw": "AVX-512 without VNNI: int8 has no dot-product instruction here",
    "avx2": "AVX2 only: int8 has no dot-product instruction here",
}
MAC = {
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.avx512vnni": "avx512_vnni",
    "hw.optional.avx512bw": "avx512bw",
    "hw.optional.avx2_0": "avx2",
}


def processor() -> dict[str, Any]:
    """{"processor": its name, "cores": logical ones that this process may use, "int8": its abilities in words,
    "int8_flags": those of INT8 it has}.
    """
    name, flags = from_sysctl(_sysctl()) if platform.system() == "Darwin" else from_cpuinfo(_cpuinfo())
    return {
        "processor": name or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "int8": int8(flags),
        "int8_flags": [flag for flag in INT8 if flag in flags],
    }


def int8(flags: set[str]) -> str:
    """What a processor with these flags has for int8, in words."""
    if not flags:
        return "unknown: this system does not say what its processor can do"
    return next(
        (words for flag, words in INT8.items() if flag in flags),
        "neither AVX2 nor a dot-product instruction for int8 here",
    )


def from_cpuinfo(text: str) -> tuple[str, set[str]]:
    """(name, flags that all cores share) from Linux's /proc/cpuinfo, x86 or Arm."""
    lines = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in text.splitlines())]
    names = [value for wanted in ("model name", "Model", "Hardware") for key, value in lines if key == wanted]
    flags = [set(value.split()) for key, value in lines if key in ("flags", "Features")]
    return (names or [""])[0], set.intersection(*flags) if flags else set()


def from_sysctl(text: str) -> tuple[str, set[str]]:
    """(name, flags in Linux's names) from `sysctl hw machdep.cpu` of macOS."""
    found = {key: value for key, _, value in (line.partition(": ") for line in text.splitlines())}
    return found.get("machdep.cpu.brand_string", ""), {flag for key, flag in MAC.items() if found.get(key) == "1"}


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sysctl() -> str:
    try:
        return subprocess.run(["sysctl", "hw", "machdep.cpu"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def processes() -> int:
    """Of how many processes this one is, by torchrun's variables; 1 where there are none. Raises BingoError where they
    are not whole, as what a cluster left behind is.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not (said.isdecimal() and int(said)):
        raise BingoError(
            f"WORLD_SIZE: expected a number of processes in this environment variable, found {said!r}; unset it, or"
            " start several processes with torchrun"
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if int(said) > 1 and missing:
        raise BingoError(
            f"WORLD_SIZE: expected {', '.join(missing)} beside WORLD_SIZE={said} in the environment, found none; unset"
            " WORLD_SIZE, or start several processes with torchrun"
        )
    return int(said)


def keep_memory() -> None:
    """Let glibc keep freed blocks: otherwise each large tensor is mapped and cleared anew by the kernel, half of a CPU
    run's time.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another libc
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)


def parse_memory(text: str) -> int:
    """Bytes from 4GB, 800MB or a plain number; 0 for "". Raises BingoError."""
    number, factor = text.strip().upper().removesuffix("B"), 1
    for unit, value in (("K", 10**3), ("M", 10**6), ("G", 10**9), ("T", 10**12)):
        if number.endswith(unit):
            number, factor = number[:-1], value
    try:
        return int(float(number or 0) * factor)
    except ValueError:
        raise BingoError(f"--memory: expected a size such as 4GB, found {text!r}") from None


def parse_time(text: str) -> float:
    """Seconds of 45m, 2h, 1h30m or 90s, as a recipe has them; 0 for ""."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([0-9.]+)([hms])", text))


def free_memory() -> int:
    """Bytes of memory that the machine could still give."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2


def resident() -> int:
    """Bytes of memory that this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident()


def peak_resident() -> int:
    """Bytes: the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(
    job: Callable[[Item], Result], items: Iterable[Item], threads: int = 0, ahead: int = 64
) -> Iterator[tuple[Item, Result]]:
    """(item, job(item)) in the order of `items`, computed by `threads` threads at most `ahead` items early."""
    queue = iter(items)
    pool = ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 16))
    pending: list[tuple[Item, Future[Result]]] = []
    try:
        pending = [(item, pool.submit(job, item)) for item in islice(queue, ahead)]
        while pending:
            item, future = pending.pop(0)
            result = future.result()
            pending.extend((more, pool.submit(job, more)) for more in islice(queue, 1))
            yield item, result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A GPU is not waited for: a plain copy would wait until all earlier work of its stream is
    done.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
