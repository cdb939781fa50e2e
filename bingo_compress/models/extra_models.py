"""Teachers of published methods that timm does not have, registered in timm."""

from typing import Any

import timm
from torch import nn

NAMES = ("resnet50x2", "vit_small_moco_v3")


@timm.models.register_model  # type: ignore[untyped-decorator]
def resnet50x2(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """SwAV's ResNet-50 with every layer twice as wide, the paper's R-50x2 teacher (timm's wide_resnet50_2 widens only
    the inner layers).
    """
    from timm.models.resnet import Bottleneck, ResNet

    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        arguments.pop(key, None)
    model: Any = ResNet(Bottleneck, [3, 4, 6, 3], channels=(128, 256, 512, 1024), **arguments)
    first = model.layer1[0]
    model.conv1 = nn.Conv2d(3, 128, 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(128)
    first.conv1 = nn.Conv2d(128, 128, 1, bias=False)
    first.downsample[0] = nn.Conv2d(128, 512, 1, bias=False)
    backbone: nn.Module = model
    return backbone


@timm.models.register_model  # type: ignore[untyped-decorator]
def vit_small_moco_v3(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """MoCo-v3's ViT-S: 12 attention heads, where timm's vit_small_patch16_224 has 6."""
    from timm.models.vision_transformer import VisionTransformer

    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        arguments.pop(key, None)
    backbone: nn.Module = VisionTransformer(embed_dim=384, num_heads=12, **{"dynamic_img_size": True, **arguments})
    return backbone
