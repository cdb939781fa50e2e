"""SIGTERM and SIGINT: a stage in small finished parts is left at once; one with state of its own saves it first; a wait
that Python cannot leave ends the process. A second SIGINT leaves without saving.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
AGAIN_AFTER = 0.01  # seconds: longer than most finalisers take, and what comes too early comes once more


class Stopped(KeyboardInterrupt):
    """The program was asked to end by a signal."""


_heard: list[int] = []  # signals, in order
_waiting: list[bool] = []
_unraisable: list[Callable[..., object]] = []  # sys.unraisablehook before `listen`


def listen() -> None:
    """From now on SIGTERM and SIGINT raise Stopped, or wait for the end of a `deferred` block."""
    for number in STATUS:
        signal.signal(number, _hear)
    if sys.unraisablehook is not _again:
        _unraisable[:] = [sys.unraisablehook]
        sys.unraisablehook = _again


def leave() -> None:
    """From now on they end the process by themselves: nothing is left to save, and Python would show where it was in
    its own end.
    """
    for number in STATUS:
        if signal.getsignal(number) is _hear:
            signal.signal(number, signal.SIG_DFL)
    if sys.unraisablehook is _again:
        sys.unraisablehook = _unraisable[0]


def end_with_parent() -> None:
    """From now on, on Linux, the end of the process that started this one, however it comes, is a SIGTERM: torchrun's
    workers outlive a torchrun that is killed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _hear(number: int, _: FrameType | None) -> None:
    if _heard and number == signal.SIGINT:
        os._exit(STATUS[signal.SIGINT])
    _heard.append(number)
    if not _waiting:
        raise Stopped


def _again(dropped: "sys.UnraisableHookArgs") -> None:
    """Send a signal once more whose Stopped came up in a finaliser, as in the end of a generator that nobody holds:
    Python drops exceptions there.
    """
    if dropped.exc_type is not Stopped:
        _unraisable[0](dropped)
        return
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    threading.Timer(AGAIN_AFTER, signal.pthread_kill, (main_thread, _heard.pop())).start()


def heard() -> int:
    """The signal that asked this process, or another of the run, to end; 0 if none did."""
    return _heard[0] if _heard else 0


def pass_on(number: int) -> None:
    """Count a signal that another process of the run has heard as heard here; 0 is none. Within a `deferred` block."""
    if number and not _heard:
        _heard.append(number)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal changes nothing but what `heard` gives; at the end of the block Stopped is raised."""
    _waiting.append(True)
    try:
        yield
    finally:
        _waiting.pop()
    if _heard and not _waiting:
        raise Stopped


@contextmanager
def fatal() -> Iterator[None]:
    """Inside, a signal that `listen` hears ends the process by itself: for a wait in C++, which Python's handlers
    cannot end, while there is nothing to save.
    """
    listening = signal.getsignal(signal.SIGTERM) is _hear
    leave()
    try:
        yield
    finally:
        if listening:
            listen()


def status() -> int:
    """The exit status of a program that was asked to end: 128 and the signal's number."""
    return STATUS[signal.Signals(heard() or signal.SIGINT)]
