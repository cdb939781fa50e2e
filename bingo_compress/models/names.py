"""What a word means as a model: family names, timm's own, looked up in timm when they must be, and the hub's; and what
timm calls a model that others name otherwise.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from bingo_compress.errors import BingoError, nearest
from bingo_compress.recipe import GIVEN, Recipe
from bingo_compress.runtime import console

HUB = "hf-hub:"
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
    "dinov3": "vit_small_patch16_dinov3",
    "dinov2": "vit_small_patch14_dinov2",
    "dino": "vit_small_patch16_224.dino",
    "eupe": "vit_small_patch16_dinov3_qkvb.eupe_lvd1689m",
    "mae": "vit_base_patch16_224.mae",
    "clip": "vit_base_patch16_clip_quickgelu_224.openai",
    "siglip": "vit_base_patch16_siglip_224.webli",
    "siglip2": "vit_base_patch16_siglip_224.v2_webli",
    "mobileclip": "fastvit_mci0.apple_mclip",
    "mobileclip2": "fastvit_mci0.apple_mclip2_dfndr2b",
    "tipsv2": "vit_base_patch14_reg1_tipsv2",
    "radio": "vit_base_patch16_radio_v3",
    "pe_core": "vit_pe_core_base_patch16_224",
}
# How torch.hub, torchvision and the hubs' pages name models, to timm's names of the same; parts by WORDS.
THEIRS = (
    (r"dino_vit_?(?P<size>[sb])_?(?P<patch>\d+)", "vit_{size}_patch{patch}_224.dino"),
    (r"dinov2_vit_?(?P<size>[sblg])_?14(?P<more>_reg)?", "vit_{size}_patch14{more}_dinov2"),
    (r"dinov2(?P<more>_with_registers)?_(?P<size>small|base|large|giant)", "vit_{size}_patch14{more}_dinov2"),
    (r"dinov3_vit_?(?P<size>7b|[sblh])_?16(?P<more>plus)?", "vit_{size}{more}_patch16_dinov3"),
    (r"eupe_vit_?(?P<size>[tsb])_?16", "vit_{size}_patch16_dinov3_qkvb.eupe_lvd1689m"),
    (r"(?P<method>dinov3|eupe)_convnext_(?P<size>[a-z]+)", "convnext_{size}.{method}_lvd1689m"),
    (
        r"siglip2?_(?P<size>base|large|so400m)_patch(?P<patch>\d+)_(?P<side>\d+)",
        "vit_{size}_patch{patch}_siglip_{side}",
    ),
    (r"clip_vit_(?P<size>base|large|huge)_patch(?P<patch>\d+)", "vit_{size}_patch{patch}_clip_224"),
    (r"mobileclip2?_s(?P<size>\d)", "fastvit_mci{size}"),
    (r"vit_(?P<size>[sblh])_(?P<patch>\d+)$", "vit_{size}_patch{patch}_224"),
    (r"swin_(?P<size>[tsb])$", "swin_{size}_patch4_window7_224"),
)
WORDS = {"t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant", "plus": "_plus"}
WORDS |= {"_reg": "_reg4", "_with_registers": "_reg4"}


def resolve_name(word: str, option: str) -> str:
    """The timm model that `word` means, or hf-hub:OWNER/NAME as it is. Raises BingoError with the three nearest names
    for one that means none.
    """
    if not word:
        raise BingoError(
            f"{option}: expected a model name, found none; for example {option} mobilenetv3 (see `bingo-compress"
            " models`)"
        )
    import timm

    from bingo_compress.models import extra_models  # noqa: F401  # timm knows them from here on

    plain = word.removeprefix(HUB if word.startswith(f"{HUB}timm/") else "").removeprefix("timm/")
    name, separator, tag = plain.partition(".")
    listed = timm.is_model(name) and (not separator or plain in timm.list_pretrained(f"{name}*"))
    if listed:
        return plain
    if on_hub(word):
        return _on_page(word, option)
    if timm.is_model(name):
        known = timm.list_pretrained(f"{name}.*") or [name]
        raise BingoError(
            f"{option}: unknown weights tag {tag!r} of {name}; the nearest are {', '.join(nearest(word, known))}"
        )
    if name not in FAMILIES:
        raise unknown(word, option, [*timm.list_models(), *FAMILIES])
    meant = FAMILIES[name]
    if not timm.is_model(meant.partition(".")[0]):
        raise BingoError(
            f"{option}: {word} means {meant}, which timm {timm.__version__} does not have; install a newer timm"
        )
    return meant


def on_hub(name: str) -> bool:
    """Whether a model is named by its page on the hub: its settings are there too."""
    return name.startswith(HUB)


def page(name: str) -> str:
    """OWNER/NAME of hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION."""
    return name.removeprefix(HUB).partition("@")[0]


def _on_page(word: str, option: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", page(word)):
        raise BingoError(f"{option}: expected {HUB}OWNER/NAME, found {word!r}; for example {HUB}timm/resnet50.a1_in1k")
    return word


def unknown(word: str, option: str, known: Iterable[str]) -> BingoError:
    """The error of a word that means no model, with the nearest of the `known` ones: first timm's name of a model that
    others call so.
    """
    known = list(known)
    same = _timms(word)
    if same.partition(".")[0] in known:
        known.append(same)
    hint = f"; a model of timm's on the hub is named {HUB}{word}" if re.fullmatch(r"[\w.-]+/[\w.-]+", word) else ""
    return BingoError(
        f"{option}: unknown model {word!r}; the nearest are {', '.join(nearest(same, known))}{hint}; see"
        " `bingo-compress models`"
    )


def _timms(word: str) -> str:
    """timm's name of a model that others name otherwise (dinov2_vits14, google/vit-base-patch16-224); the word itself
    where that is not known.
    """
    name = word.rpartition("/")[2].partition(".")[0].lower().replace("-", "_")
    for pattern, theirs in THEIRS:
        if found := re.match(pattern, name):
            return theirs.format(**{key: WORDS.get(part or "", part or "") for key, part in found.groupdict().items()})
    return name


def has_pretrained(name: str) -> bool:
    """Whether timm knows weights for this model."""
    import timm

    config = timm.models.get_pretrained_cfg(name)
    return on_hub(name) or (config is not None and config.has_weights)


def resolve_names(recipe: Recipe, say: Callable[[str], None] = console.say) -> Recipe:
    """Family names to models and `auto` student weights to what they mean; says what it chose. Raises BingoError."""
    names: dict[str, Any] = {}
    for role in ("teacher", "student"):
        if getattr(recipe, f"{role}_weights") == GIVEN:
            continue  # a module of the user's own: its name is no model's
        names[role] = resolve_name(getattr(recipe, role), f"--{role}")
        if names[role] != getattr(recipe, role):
            say(f"{role}: {getattr(recipe, role)} means {names[role]}")
    if recipe.student_weights == "auto":
        names["student_weights"] = "pretrained" if has_pretrained(names["student"]) else "random"
        say(
            f"student weights: {names['student_weights']} (timm"
            f" {'has' if names['student_weights'] == 'pretrained' else 'has no'} weights for {names['student']})"
        )
    return recipe.model_copy(update=names)
