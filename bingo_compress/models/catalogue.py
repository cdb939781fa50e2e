"""What can be a teacher or a student."""

import fnmatch

import timm
import torch

from bingo_compress.errors import BingoError, nearest
from bingo_compress.models.names import FAMILIES, has_pretrained
from bingo_compress.runtime import console

AT_MOST = 60
SHORT_LIST = [
    "mobilenetv3_small_050",
    "mobilenetv3_small_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small_050",
    "mobilenetv4_conv_small",
    "mobilenetv4_conv_medium",
    "tf_efficientnet_lite0",
    "efficientnet_b0",
    "ghostnet_100",
    "repvit_m0_9",
    "fastvit_t8",
    "convnext_atto",
    "levit_128s",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet152",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_dinov2",
]


def show(pattern: str) -> None:
    """Print the models whose names match `pattern` (a part, or with * and ?), or a short list. Raises BingoError when
    none does.
    """
    known = timm.list_models()
    wanted = pattern if set("*?[") & set(pattern) else f"*{pattern}*"
    found = fnmatch.filter(known, wanted) if pattern else SHORT_LIST
    # Some are known by whose weights they are: eupe, metaclip; or by neither: mobileclip.
    found = found or fnmatch.filter(timm.list_pretrained(), wanted)
    if not found and timm.is_model(FAMILIES.get(pattern, "").partition(".")[0]):
        found = [FAMILIES[pattern]]
    if not found:
        raise BingoError(
            f"models: no model matches {pattern!r}; the nearest are {', '.join(nearest(pattern, [*known, *FAMILIES]))}"
        )
    rows = []
    with (
        console.bar("models", len(found[:AT_MOST])) if len(found) > 20 and console.console.is_terminal else _quiet()
    ) as advance:
        for name in found[:AT_MOST]:
            rows.append(_row(name))
            advance(1)
    console.table("", ("model", "parameters", "MB (float)", "input", "weights in timm"), rows)
    if len(found) > AT_MOST:
        console.say(f"{len(found):,} match; the first {AT_MOST} are shown. Narrow the pattern to see the others")
    if not pattern:
        console.say(
            f"a short list of {len(known):,}; `bingo-compress models PATTERN` searches all. Family names work too:"
            f" {', '.join(sorted(FAMILIES))}"
        )


def _row(name: str) -> tuple[str, ...]:
    config = timm.models.get_pretrained_cfg(name)
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
    except (RuntimeError, NotImplementedError):  # builds that compute with their weights need real ones
        model = timm.create_model(name, num_classes=0)
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f"{config.input_size[-1]} px" if config else "224 px"
    return name, f"{count / 1e6:.2f} M", f"{count * 4 / 1e6:.1f}", size, "yes" if has_pretrained(name) else "no"


class _quiet:
    def __enter__(self) -> console.Advance:
        return lambda images, note=None: None

    def __exit__(self, *_: object) -> None:
        pass
