"""bingo-compress: distil any timm model into any smaller one on a plain folder of images, without labels."""

import os

# onnxruntime's Linux wheels report to their maker unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


__version__ = "0.1.0"
