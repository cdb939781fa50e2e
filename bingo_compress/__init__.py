"""bingo-compress: distil any timm model into any smaller one on a plain folder of images, without labels."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bingo_compress.api import (
        check,
        compare,
        distill,
        embed,
        export,
        latency,
        load_student,
        report,
        suggest,
        validate,
        verify,
    )
    from bingo_compress.errors import BingoError
    from bingo_compress.models.encoder import Encoder, Preprocessing
    from bingo_compress.recipe import Recipe

# onnxruntime's Linux wheels report to their maker unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = [
    "BingoError",
    "Encoder",
    "Preprocessing",
    "Recipe",
    "check",
    "compare",
    "distill",
    "embed",
    "export",
    "latency",
    "load_student",
    "report",
    "suggest",
    "validate",
    "verify",
]
# Where a name that is no function of api.py comes from; all of them are imported when they are first asked for.
_ELSEWHERE = {
    "BingoError": "errors",
    "Recipe": "recipe",
    "Encoder": "models.encoder",
    "Preprocessing": "models.encoder",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
