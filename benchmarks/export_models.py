"""Which timm students become a file in both profiles that equals torch? No GPU and no weights needed: random weights,
drawn pictures.

python benchmarks/export_models.py [--models NAME,NAME] [--json FILE]

A model that cannot is listed with the reason. The size of the pictures is the model's own.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bingo_compress.errors import BingoError
from bingo_compress.exporters.onnx import PROFILES, export_onnx
from bingo_compress.models.encoder import build

MODELS = """mobilenetv3_large_100 mobilenetv3_small_050 mobilenetv4_conv_small
mobilenetv4_hybrid_medium efficientnet_b0 efficientnet_lite0 resnet18
fastvit_t8 repvit_m0_9 mobileone_s0 vit_tiny_patch16_224 mobilevit_xs convnext_atto
levit_128s efficientformerv2_s0 edgenext_xx_small tiny_vit_5m_224
ghostnet_100"""
PICTURES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS.split()))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows = []
    print(f"{'student':<28}{'profile':<9}{'opset':>6}{'IR':>4}{'MB':>8}{'difference':>12}{'cosine':>11}{'seconds':>9}")
    for name in chosen.models.split(","):
        for profile in PROFILES:
            row = exported(name, profile)
            rows.append(row)
            told = row.get("refused") or (
                f"{row['opset']:>6}{row['ir_version']:>4}{row['bytes'] / 1e6:>8.2f}{row['max_difference']:>12.1e}"
                f"{row['min_cosine']:>11.6f}{row['seconds']:>9.1f}"
            )
            print(f"{name:<28}{profile:<9}{told}", flush=True)
    passed = {
        name
        for name in chosen.models.split(",")
        if not any(row.get("refused") for row in rows if row["student"] == name)
    }
    print(f"\n{len(passed)} of {len(chosen.models.split(','))} pass in both profiles")
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")


def exported(name: str, profile: str) -> dict[str, Any]:
    """One export: what the written file is, or why it was refused."""
    torch.manual_seed(0)
    began = time.perf_counter()
    try:
        student = build(name, 0, "random", "--models")
        size = student.preprocessing.size
        pictures = torch.randint(0, 256, (PICTURES, size, size, 3), dtype=torch.uint8)
        with tempfile.TemporaryDirectory() as folder:
            contract = export_onnx(student, pictures, Path(folder, "student.onnx"), {}, PROFILES[profile])
    except BingoError as error:
        return {"student": name, "profile": profile, "refused": str(error)}
    seconds = time.perf_counter() - began
    return {
        "student": name,
        "profile": profile,
        "size": size,
        "seconds": seconds,
        "bytes": contract["bytes"],
        **contract["onnx"],
        **contract["parity"],
    }


if __name__ == "__main__":
    main()
