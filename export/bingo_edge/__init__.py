"""Run a compressed student on a device: pictures in, embeddings, neighbours and classes out. numpy, Pillow and
onnxruntime only.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bingo_edge.errors import EdgeError
    from bingo_edge.golden import selftest
    from bingo_edge.heads import classify, load_head, named
    from bingo_edge.image import ImageError, load_image, preprocess
    from bingo_edge.model import Embedder

# onnxruntime's Linux wheels report to their maker unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = [
    "EdgeError",
    "Embedder",
    "ImageError",
    "__version__",
    "classify",
    "load_head",
    "load_image",
    "named",
    "preprocess",
    "selftest",
]

_HOME = {
    "EdgeError": "errors",
    "classify": "heads",
    "load_head": "heads",
    "named": "heads",
    "Embedder": "model",
    "selftest": "golden",
}
_HOME |= dict.fromkeys(("ImageError", "load_image", "preprocess"), "image")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `bingo-edge --help` need not load numpy or Pillow."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
