"""SIGTERM and SIGINT: a stage in small finished parts is left at once; one with state of its own saves it first. A second SIGINT leaves without saving."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Stopped(KeyboardInterrupt):
    """The program was asked to end by a signal."""


_heard: list[int] = []
_waiting: list[bool] = []


def listen() -> None:
    """From now on SIGTERM and SIGINT raise Stopped, or wait for the end of a `deferred` block."""
    for number in STATUS:
        signal.signal(number, _hear)


def end_with_parent() -> None:
    """From now on, on Linux, the end of the process that started this one, however it comes, is a SIGTERM: torchrun's workers outlive a torchrun that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _hear(number: int, _: FrameType | None) -> None:
    if _heard and number == signal.SIGINT:
        os._exit(STATUS[signal.SIGINT])
    _heard.append(number)
    if not _waiting:
        raise Stopped


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Inside, a signal changes nothing but the yielded function, which then gives True; at the end of the block Stopped is raised."""
    _waiting.append(True)
    try:
        yield lambda: bool(_heard)
    finally:
        _waiting.pop()
    if _heard and not _waiting:
        raise Stopped


def status() -> int:
    """The exit status of a program that was asked to end: 128 and the signal's number."""
    return STATUS[signal.Signals(_heard[0])] if _heard else STATUS[signal.SIGINT]
