"""torch takes five seconds to trace the smallest network: the same network of the same weights is traced once, and
without coverage's eyes, which double the time and see nothing of ours.
"""

import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch


@contextmanager
def unwatched() -> Iterator[None]:
    """What runs within is not measured by coverage."""
    watching = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(watching)


@contextmanager
def one_registry() -> Iterator[None]:
    """torch reads its translations to ONNX, the same 500 functions, anew for every file, which is a fifth of the time:
    here once a process.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)
    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(read)):
        yield


def once(kept: Path) -> Callable[..., None]:
    """torch.onnx.export, but that a file of the same module, weights, shapes and settings is copied from `kept`."""
    export = torch.onnx.export

    def written(module: torch.nn.Module, example: Any, path: Path, **settings: Any) -> None:
        shown = [(part.dtype, part.shape) for part in example]
        told = hashlib.sha256(repr((module, shown, sorted(settings.items()))).encode())
        # Buffers that no state dict has are constants of the graph too.
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            told.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy(force=True).tobytes())
        graph = kept / f"{told.hexdigest()}.onnx"
        if not graph.exists():
            with unwatched():
                export(module, example, path, **settings)
            copy = graph.with_suffix(f".{os.getpid()}")
            shutil.copyfile(path, copy)
            copy.replace(graph)  # whole or not at all: the soak test kills processes
        shutil.copyfile(graph, path)

    return written
