"""Where self-supervised methods keep trunk and projection head in their checkpoints: a table, and a head built from its
own tensors.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from bingo_compress.errors import BingoError

Tensors = dict[str, Tensor]
LISTED = 8
CLASSIFIERS = tuple(f"backbone.{name}." for name in ("fc", "head", "classifier"))


@dataclass(frozen=True)
class Layout:
    """What a method's file holds, by the beginnings of its keys; without a dot at the end it is the whole key. All
    other keys are an error.

    trunk: the backbone under timm's names ("": what is in no other part). head: the projection, at one of these places.
    forms: the heads that the method trains, a letter a layer (LETTERS). unneeded: known and left out. mean, std: what
    the method's training normalised pixels with, whatever timm's model of that name does.
    """

    method: str
    trunk: str
    head: tuple[str, ...]
    forms: tuple[str, ...]
    unneeded: tuple[str, ...]
    activation: type[nn.Module] = nn.ReLU
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD


DINO_FORMS = ("L.L.L", "LN.LN.L")  # to the bottleneck, which is what meets the prototypes in `last_layer`
LAYOUTS = (
    Layout("MoCo", "encoder_q.", ("encoder_q.fc.",), ("L.L", "L"), ("encoder_k.", "queue", "queue_ptr")),  # v2, v1
    # The base encoder is the one that its authors evaluate. The heads of ResNets, of ViTs.
    Layout(
        "MoCo-v3",
        "base_encoder.",
        ("base_encoder.fc.", "base_encoder.head."),
        ("lN.ln", "lN.lN.ln"),
        ("momentum_encoder.", "predictor."),
    ),
    Layout("SwAV", "", ("projection_head.",), ("LN.L", "L"), ("prototypes.",)),
    Layout("DINO", "backbone.", ("head.mlp.",), DINO_FORMS, ("head.last_layer.",), nn.GELU),
    Layout("DINOv2", "backbone.", ("dino_head.mlp.",), DINO_FORMS, ("dino_head.last_layer.", "ibot_head."), nn.GELU),
    Layout(
        "solo-learn",
        "backbone.",
        ("projector.",),
        ("LN.LN.L", "LN.L", "L.L", "L"),
        (
            *("classifier.", "predictor.", "prototypes.", "queue"),
            *(f"momentum_{part}." for part in ("backbone", "projector", "predictor", "classifier")),
        ),
    ),
    Layout(
        "DINOv2",  # the whole training state
        "teacher.backbone.",
        ("teacher.dino_head.mlp.",),
        DINO_FORMS,
        ("teacher.dino_head.last_layer.", "teacher.ibot_head.", "student.", "dino_loss.", "ibot_patch_loss."),
        nn.GELU,
    ),
)

# The layers of a head by the tensors they keep, each with its number of dimensions; "." keeps none.
LETTERS = {
    frozenset({"weight 2", "bias 1"}): "L",
    frozenset({"weight 2"}): "l",
    frozenset({"weight 1", "bias 1", "running_mean 1", "running_var 1"}): "N",
    frozenset({"running_mean 1", "running_var 1"}): "n",
}
WORDS = {"L": "Linear", "l": "Linear(no bias)", "N": "BatchNorm", "n": "BatchNorm(no weights)", "?": "another layer"}


def find(tensors: Tensors) -> Layout | None:
    """The layout of a file with these keys; None for a plain backbone. Of layouts with one trunk, the one with more of
    the keys.
    """

    def claimed(layout: Layout) -> int:
        return sum(_among(key, (*layout.head, *layout.unneeded)) for key in tensors)

    if all(key.startswith("backbone.") for key in tensors) and any(key.startswith(CLASSIFIERS) for key in tensors):
        return None  # no method trains one: a prefix like any other
    fitting = [layout for layout in LAYOUTS if (_under(tensors, layout.trunk) if layout.trunk else claimed(layout))]
    return max(fitting, key=claimed, default=None)


def split(layout: Layout, tensors: Tensors, where: str) -> tuple[Tensors, Tensors]:
    """(trunk, head) without their prefixes; the head is empty in a file of nothing but the trunk.

    where: the option and file, for messages. Raises BingoError for keys that the method does not have and for a head
    that is not there once.
    """
    aside = (*layout.head, *layout.unneeded)
    trunk = {key: value for key, value in tensors.items() if not _among(key, aside)}
    unknown = [key for key in trunk if not key.startswith(layout.trunk)]
    if unknown:
        raise BingoError(
            f"{where} is laid out like {layout.method}'s ({layout.trunk}*), but {len(unknown)} unexpected keys are no"
            f" part of one ({names(unknown)}); is it another method's? Save the backbone's tensors alone, under timm's"
            " names"
        )
    heads = [head for head in (_under(tensors, prefix) for prefix in layout.head) if head]
    if len(heads) != 1 and len(trunk) < len(tensors):
        raise BingoError(
            f"{where}: expected one projection head of {layout.method}"
            f" ({' or '.join(f'{prefix}*' for prefix in layout.head)}), found {len(heads) or 'none'}; is the file"
            " complete? To do without one, save the backbone's tensors alone"
        )
    return {key.removeprefix(layout.trunk): value for key, value in trunk.items()}, heads[0] if heads else {}


def build_head(layout: Layout, head: Tensors, width: int, where: str) -> nn.Module:
    """The projection (B, width) -> (B, D) in eval mode, as it was before any normalisation. head: tensors by "place in
    the Sequential.name".

    Raises BingoError for a layer that is missing or unknown, and for one that does not fit the layer before it or the
    trunk's width.
    """
    single = "weight" in head  # a layer that stands in no Sequential
    placed = {f"0.{key}": value for key, value in head.items()} if single else head
    form = _form(placed)
    if form not in layout.forms or single != (len(form) == 1):
        known = " or ".join(_words(one, layout) + " alone (weight, bias)" * (len(one) == 1) for one in layout.forms)
        raise BingoError(
            f"{where}: expected the projection head of {layout.method} to be {known}; "
            f"found {_words(form, layout)} ({names(head)}); is the file complete?"
        )
    layers: list[nn.Module] = []
    coming = width
    for place, letter in enumerate(form):
        if letter in "Ll":
            leaving = placed[f"{place}.weight"].shape[0]
            layers.append(nn.Linear(coming, leaving, bias=letter == "L"))
            coming = leaving
        else:
            layers.append(layout.activation() if letter == "." else nn.BatchNorm1d(coming, affine=letter == "N"))
    projection = nn.Sequential(*layers)
    wrong = misshapen(placed, projection.state_dict())
    if wrong:
        raise BingoError(
            f"{where}: the projection head does not fit features {width} wide: {len(wrong)} tensors of another shape"
            f" ({names(wrong)}); is it another model's?"
        )
    projection.load_state_dict(placed, strict=False)  # BatchNorm's counters may be missing
    return projection.eval()


def unchunked(trunk: Tensors) -> Tensors:
    """DINOv2's training keeps blocks in chunks, blocks.CHUNK.N with N counted through: named blocks.N, as in its public
    files.
    """
    if "mask_token" not in trunk:  # other models have stages with blocks of their own
        return trunk
    plain = {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", key): value for key, value in trunk.items()}
    return plain if len(plain) == len(trunk) else trunk


def misshapen(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """For each tensor of another shape than the wanted one of its name: the name and both shapes."""
    return [
        f"{key} {tuple(value.shape)} for {tuple(wanted[key].shape)}"
        for key, value in tensors.items()
        if key in wanted and value.shape != wanted[key].shape
    ]


def names(keys: Iterable[str]) -> str:
    """The first keys, and how many more there are."""
    listed = list(keys)
    return (", ".join(listed[:LISTED]) or "none") + (
        f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    )


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _among(key: str, known: tuple[str, ...]) -> bool:
    return any(key.startswith(part) if part.endswith(".") else key == part for part in known)


def _form(head: Tensors) -> str:
    """One letter a layer. A missing layer leaves one "." too many, or an end too few; "?" is a layer, or a key, of no
    known kind.
    """
    kept: dict[str, set[str]] = {}
    for key, value in head.items():
        place, _, name = key.partition(".")
        kept.setdefault(place, set()).add(f"{name} {value.ndim}")
    if not all(re.fullmatch("[0-9]|[1-9][0-9]", place) for place in kept):
        return "?"
    places = range(max(map(int, kept), default=-1) + 1)
    counter = {"num_batches_tracked 0"}
    return "".join(LETTERS.get(frozenset(kept[str(n)] - counter), "?") if str(n) in kept else "." for n in places)


def _words(form: str, layout: Layout) -> str:
    return "-".join(WORDS.get(letter, layout.activation.__name__) for letter in form) or "none"
