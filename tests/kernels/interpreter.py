"""Triton asks for its interpreter once, when it is imported first: tests of kernels run in a process that has it."""

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="another test starts it, with the interpreter")
outside = pytest.mark.skipif(INTERPRETED, reason="this is the process that it started")


def all_pass(file: str, count: int) -> None:
    """The tests of `file` that are `inside`, in a process with the interpreter: as many as `count` pass, and no other
    fails.
    """
    words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--no-cov", file]
    ran = subprocess.run(
        words, env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert ran.returncode == 0 and f"{count} passed" in ran.stdout, ran.stdout + ran.stderr
