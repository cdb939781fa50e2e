"""What a word means as a model: family names, and timm's own, looked up in timm when they must be."""

from bingo_compress.errors import BingoError, nearest

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


def resolve_name(word: str, option: str) -> str:
    """The timm model that `word` means. Raises BingoError with the three nearest names for one that means none."""
    if not word:
        raise BingoError(
            f"{option}: expected a model name, found none; for example {option} mobilenetv3 (see `bingo-compress"
            " models`)"
        )
    import timm

    from bingo_compress.models import extra_models  # noqa: F401  # timm knows them from here on

    name, separator, tag = word.removeprefix("timm/").partition(".")
    if timm.is_model(name):
        if not separator or word.removeprefix("timm/") in timm.list_pretrained(f"{name}*"):
            return word.removeprefix("timm/")
        known = timm.list_pretrained(f"{name}.*") or [name]
        raise BingoError(
            f"{option}: unknown weights tag {tag!r} of {name}; the nearest are {', '.join(nearest(word, known))}"
        )
    if name in FAMILIES:
        return FAMILIES[name]
    known = [*timm.list_models(), *FAMILIES]
    raise BingoError(
        f"{option}: unknown model {word!r}; the nearest are {', '.join(nearest(name, known))}; see `bingo-compress"
        " models`"
    )


def has_pretrained(name: str) -> bool:
    """Whether timm knows weights for this model."""
    import timm

    config = timm.models.get_pretrained_cfg(name)
    return config is not None and config.has_weights
