"""What this machine's processor is, and what it can do with whole numbers of 8 bits."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

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
    """{"processor": its name, "cores": logical ones that this process may use, "int8": its abilities in words, "int8_flags": those of INT8 it has}."""
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
    return next((words for flag, words in INT8.items() if flag in flags), "neither AVX2 nor a dot-product instruction for int8 here")


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
