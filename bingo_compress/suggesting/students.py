"""The students that are measured, and what is known of their accuracy without measuring it."""

import math
from typing import NamedTuple

SIZES = (96, 128, 160, 224)


class Stated(NamedTuple):
    """ImageNet top-1 in percent of the weights that timm gives a student by default, at so many pixels a side."""

    top1: float
    px: int


TIMMS = "results/results-imagenet.csv of huggingface/pytorch-image-models at 0173a139"
AUTHORS = "their authors' or timm's READMEs"
# From TIMMS; from READMEs, since that table is older than they are: mobilenetv4_* (timm's, June 12, 2024), mobileone_s0
# and fastvit_* (Apple's), repvit_* (THU-MIG's, 300 epochs).
STUDENTS = {
    "mobilenetv2_050": Stated(65.950, 224),
    "mobilenetv2_100": Stated(72.976, 224),
    "mobilenetv2_140": Stated(76.520, 224),
    "mobilenetv3_small_050": Stated(57.910, 224),
    "mobilenetv3_small_075": Stated(65.234, 224),
    "mobilenetv3_small_100": Stated(67.656, 224),
    "mobilenetv3_large_100": Stated(75.766, 224),
    "mobilenetv4_conv_small": Stated(73.756, 224),
    "mobilenetv4_conv_medium": Stated(79.928, 256),
    "efficientnet_lite0": Stated(75.480, 224),
    "tf_efficientnet_lite1": Stated(76.644, 240),
    "efficientnet_b0": Stated(77.694, 224),
    "resnet10t": Stated(68.358, 224),
    "resnet14t": Stated(72.254, 224),
    "resnet18": Stated(73.158, 288),
    "repvgg_b0": Stated(75.142, 224),
    "repvit_m0_9": Stated(78.7, 224),
    "repvit_m1_0": Stated(80.0, 224),
    "mobileone_s0": Stated(71.4, 224),
    "fastvit_t8": Stated(76.2, 256),
    "fastvit_t12": Stated(79.3, 256),
    "ghostnet_100": Stated(73.982, 224),
    "lcnet_050": Stated(63.120, 224),
    "lcnet_075": Stated(68.782, 224),
    "lcnet_100": Stated(72.096, 224),
    "tinynet_a": Stated(77.658, 192),
    "tinynet_b": Stated(74.978, 188),
    "tinynet_c": Stated(71.240, 184),
    "tinynet_d": Stated(66.974, 152),
    "tinynet_e": Stated(59.866, 106),
    "mnasnet_small": Stated(66.196, 224),
    "mnasnet_100": Stated(74.650, 224),
    "semnasnet_075": Stated(72.992, 224),
    "hardcorenas_a": Stated(75.930, 224),
    "regnety_002": Stated(70.278, 224),
    "vit_tiny_patch16_224": Stated(75.454, 224),
    "levit_128s": Stated(76.526, 224),
    "edgenext_xx_small": Stated(71.878, 288),
    "mobilevit_xxs": Stated(68.932, 256),
    "convnext_atto": Stated(77.008, 288),
}

# (pixels a side, top-1) of MobileNetV2 1.0 trained at each size: research/slim/nets/mobilenet/README.md of
# tensorflow/models at 0ba83cf0.
TRAINED_AT = ((96, 60.3), (128, 65.3), (160, 68.8), (192, 70.7), (224, 71.8))


def estimated(name: str, px: int) -> float | None:
    """ImageNet top-1 in percent of a student that is trained at `px`: what is stated, less what MobileNetV2 loses
    between the two sizes, and no more than is stated where `px` is the larger one. None where nothing is stated.
    """
    stated = STUDENTS.get(name)
    return stated and stated.top1 - max(0.0, _reached(stated.px) - _reached(px))


def _reached(px: int) -> float:
    """Top-1 of MobileNetV2 at a size: a straight line over the logarithm between two that were trained, and on beyond
    the ends.
    """
    at = next((place for place, (side, _) in enumerate(TRAINED_AT[1:-1], 1) if px <= side), len(TRAINED_AT) - 1)
    (low, less), (high, more) = TRAINED_AT[at - 1], TRAINED_AT[at]
    return less + (more - less) * math.log(px / low) / math.log(high / low)
