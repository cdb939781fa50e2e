"""Family names of models."""

# What people call a model, where timm's own list does not make it plain which member of the family they mean.
FAMILIES = {
    "resnet": "resnet50",
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv3": "mobilenetv3_large_100",
    "mobilenetv3_large": "mobilenetv3_large_100",
    "mobilenetv3_small": "mobilenetv3_small_100",
    "mobilenetv4": "mobilenetv4_conv_medium",
    "mobilenetv4_small": "mobilenetv4_conv_small",
    "efficientnet": "efficientnet_b0",
    "efficientnet_lite": "tf_efficientnet_lite0",
    "fastvit": "fastvit_t8",
    "repvit": "repvit_m0_9",
    "ghostnet": "ghostnet_100",
    "levit": "levit_128s",
    "convnext": "convnext_tiny",
    "swin": "swin_tiny_patch4_window7_224",
    "vit": "vit_base_patch16_224",
    "dinov2": "vit_small_patch14_dinov2",
    "dino": "vit_small_patch16_224.dino",
}
