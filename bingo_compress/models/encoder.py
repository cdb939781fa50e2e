"""Any timm model as an encoder of pixels in 0..1, with its own normalisation, size, interpolation and pooling."""

import contextlib
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from bingo_compress.errors import BingoError, first_line
from bingo_compress.models import checkpoint_layouts, extra_models, weights  # timm knows them from here on
from bingo_compress.models.names import HUB, has_pretrained, on_hub, page
from bingo_compress.runtime import checkpoint, console, run_dir

HUB_SECONDS = 3.0


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a model's input: size in pixels a side, crop_pct in 0..1 of the short side kept,
    interpolation (bicubic, bilinear, lanczos or nearest), crop_mode (center or squash), mean and std in 0..1, one a
    channel.
    """

    size: int
    crop_pct: float
    interpolation: str
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def geometry(self) -> dict[str, Any]:
        """The keyword arguments of bingo_edge.image.preprocess."""
        return {
            "size": self.size,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "crop_mode": self.crop_mode,
        }

    def describe(self) -> str:
        """One line for the screen."""
        part = (
            "the whole picture, squashed"
            if self.crop_mode == "squash"
            else f"the centred {self.crop_pct:g} of the short side"
        )
        mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (self.mean, self.std))
        return f"{part}, {self.interpolation} to {self.size} px, less mean {mean}, by std {std}"


class Encoder(nn.Module):
    """A timm backbone without classifier. forward: float (B, 3, S, S) in 0..1 -> float (B, width), pooled as the model
    pools.

    `projection`, where a checkpoint brought one (MoCo, SwAV, DINO), maps features to the embedding that the method's
    targets use. Raises BingoError where features are not (B, width).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, backbone: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.name = name
        self.backbone = backbone
        self.projection: nn.Module | None = None
        self.preprocessing = preprocessing
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)
        self.width = self._measured_width()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone((images - self.mean) / self.std)
        return features

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features (B, width), embedding (B, D)): the embedding is the projection's output, or the features where
        there is none.
        """
        features = self(images)
        return features, features if self.projection is None else self.projection(features)

    def normalised_by(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "Encoder":
        """The same backbone behind another normalisation, without projection."""
        return Encoder(self.name, self.backbone, replace(self.preprocessing, mean=mean, std=std)).train(self.training)

    def parameters_count(self) -> int:
        """Parameters of the backbone: what is exported."""
        return sum(parameter.numel() for parameter in self.backbone.parameters())

    def is_timms(self) -> bool:
        """Whether timm by itself can build the backbone by its name, with just these tensors."""
        config = getattr(self.backbone, "pretrained_cfg", None)
        return bool(config) and timm.is_model(self.name.partition(".")[0]) and self.name not in extra_models.NAMES

    def save_timm(self, folder: str | Path) -> None:
        """Write the backbone as `folder`, config.json and model.safetensors, which timm reads by itself:
        timm.create_model("local-dir:FOLDER", pretrained=True), with its mean, std and size. Replaces one that is there,
        whole or not at all. Raises BingoError for a model that is not timm's.
        """
        if not self.is_timms():
            raise BingoError(f"{self.name}: expected a model that timm can build by its name; save its state_dict")
        rule = self.preprocessing
        seen: dict[str, Any] = {
            "input_size": (3, rule.size, rule.size),
            "interpolation": rule.interpolation,
            "crop_pct": rule.crop_pct,
            "crop_mode": rule.crop_mode,
            "mean": rule.mean,
            "std": rule.std,
        }
        config: dict[str, Any] = self.backbone.pretrained_cfg  # type: ignore[assignment]
        arguments = {"img_size": rule.size} if config.get("fixed_input_size") else {}
        told = {
            "architecture": self.name.partition(".")[0],
            "num_classes": 0,
            "num_features": self.width,
            "pretrained_cfg": seen
            | {
                "num_classes": 0,
                "fixed_input_size": bool(config.get("fixed_input_size")),
                "first_conv": config.get("first_conv"),
                "classifier": config.get("classifier"),
                "pool_size": None,
                "license": None,
            },
            "model_args": arguments,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.backbone.state_dict().items()}
        target = Path(os.path.expanduser(folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        run_dir.need_space(target.parent, sum(tensor.nbytes for tensor in tensors.values()), target.name)
        with run_dir.atomic_folder(target) as made:
            safetensors.torch.save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
            (made / "config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    @torch.inference_mode()
    def embedding_width(self) -> int:
        """Dimensions of the embedding that targets are made of."""
        if self.projection is None:
            return self.width
        size, device = self.preprocessing.size, next(self.parameters()).device
        return self.embed(torch.zeros(1, 3, size, size, device=device))[1].shape[1]

    def _measured_width(self) -> int:
        size = self.preprocessing.size
        try:
            with evaluating(self), torch.inference_mode():
                features = self(torch.zeros(1, 3, size, size))
        except Exception as error:  # Whatever a model raises for a size it cannot take.
            raise BingoError(
                f"{self.name} cannot take images of {size} x {size} pixels ({first_line(error)}); choose another size"
            ) from None
        if features.ndim != 2:
            raise BingoError(
                f"{self.name} gives features of shape {tuple(features.shape)}, expected (batch, width); it cannot be"
                " used as an encoder"
            )
        return int(features.shape[1])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every layer in eval mode; afterwards each as it was, frozen ones among others that train included."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class ProjectionHead(nn.Sequential):
    """The paper's student head, used in training only: Linear(width, hidden)-ReLU-Linear(hidden, dim), (B, width) ->
    (B, dim).
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))


class RegressionHead(nn.Sequential):
    """SimReg's student head, used in training only: four linear layers with BatchNorm and ReLU between them, the last
    to the teacher's width.
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        layers: list[nn.Module] = []
        for before, after in ((width, hidden), (hidden, hidden // 2), (hidden // 2, hidden)):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Linear(hidden, dim))


def build(name: str, size: int, source: str, option: str, ema: bool = False) -> Encoder:
    """An encoder in eval mode with weights from `source`: "random", "pretrained" (timm's hub) or a file.

    name: of timm, or hf-hub:OWNER/NAME, whose settings come from the hub whatever the source. size: pixels a side, 0
    for the model's own; ema: as in `weights.read_tensors`. Raises BingoError for a size or weights that do not fit and
    for a hub out of reach.
    """
    fetched = "pretrained weights" if source == "pretrained" else "the settings" if on_hub(name) else ""
    if source == "pretrained" and not has_pretrained(name):
        raise BingoError(
            f"{option}: timm has no pretrained weights for {name}; give a file with {option} PATH, or say {option}"
            " random"
        )
    arguments: dict[str, Any] = {"num_classes": 0}
    config: Any = None
    by_page = source == "pretrained" and on_hub(name)
    try:
        with _hub() if fetched else contextlib.nullcontext(), _saying_what_is_missing(name, option):
            config = _hub_config(name, option) if on_hub(name) else timm.models.get_pretrained_cfg(name)
            own = min(config.input_size[1:]) if config else 224
            if size and size != own and config and config.fixed_input_size:
                arguments["img_size"] = size
            # Of a page our own loader: timm's leaves what does not fit as it was drawn.
            apart = timm.models.load_state_dict_from_hf(name.removeprefix(HUB)) if by_page else {}
            backbone = timm.create_model(name, pretrained=source == "pretrained" and not by_page, **arguments)
    except BingoError:
        raise
    except Exception as error:
        if not fetched:
            raise BingoError(
                f"{name} cannot be built at {size} x {size} pixels ({first_line(error)}); choose another size"
            ) from None
        _refuse_damaged(page(name) if on_hub(name) else config.hf_hub_id, option)
        raise BingoError(
            f"{option}: {fetched} of {name} could not be fetched ({first_line(error)}). Ways out: try again online,"
            f" fill the hub's cache on a machine that is (HF_HOME), give a local file with {option} PATH, or say"
            f" {option} random"
        ) from None
    data = timm.data.resolve_model_data_config(backbone)
    encoder = Encoder(
        name,
        backbone,
        Preprocessing(
            size=size or own,
            crop_pct=float(data["crop_pct"]),
            interpolation=data["interpolation"] if data["interpolation"] != "random" else "bicubic",
            crop_mode="squash" if data["crop_mode"] == "squash" else "center",
            mean=tuple(map(float, data["mean"])),
            std=tuple(map(float, data["std"])),
        ),
    )
    if by_page:
        encoder.projection = weights.put_into(backbone, name, apart, f"{option}: {name}", ema)[1]
    elif source not in ("pretrained", "random"):
        layout, projection = weights.load_into(encoder.backbone, name, Path(source), option, ema)
        encoder = _normalised(encoder, layout, Path(source), option, quiet=projection is not None)
        encoder.projection = projection
    return encoder.eval()


def _normalised(encoder: Encoder, layout: Any, file: Path, option: str, *, quiet: bool) -> Encoder:
    """`encoder` with the mean and std that the weights of `file` were trained with, as far as it tells; says so where
    they are not timm's.
    """
    told = (layout.mean, layout.std) if layout else weights.normalised_with(file)
    made = encoder.normalised_by(*told) if told else encoder
    if made.preprocessing != encoder.preprocessing and not quiet:
        by = f"it is laid out like {layout.method}'s, which" if layout else "its file says that it"
        console.say(f"{option}: {file}: {by} sees {made.preprocessing.describe()}; timm's own mean and std are others")
    return made


def _hub_config(name: str, option: str) -> Any:
    """timm's settings of a model on the hub. Raises BingoError where the page is of no model that timm has."""
    try:
        settings, architecture, _ = timm.models.load_model_config_from_hf(name.removeprefix(HUB))
    except KeyError:
        architecture = ""
    if not timm.is_model(architecture):
        found = f"{architecture}, which timm {timm.__version__} does not have" if architecture else "none"
        raise BingoError(
            f"{option.removesuffix('-weights')}: expected a page of a timm model, whose config.json names its"
            f" architecture; found {found} at {name}; `bingo-compress models` lists what timm has"
        )
    return timm.models.PretrainedCfg(**settings)


def _refuse_damaged(repository: str | None, option: str) -> None:
    """Raise BingoError if a file of `repository` in the hub's cache cannot be read: going online would change nothing,
    since it is there.
    """
    import huggingface_hub

    cached = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{(repository or '').replace('/', '--')}")
    for file in sorted(cached.glob("snapshots/*/*")):
        if file.is_file() and (why := weights.damage(file)):
            raise BingoError(
                f"{option}: {file.resolve()} in the hub's cache is damaged ({why}); delete it, and start again online"
                " or with a whole copy"
            )


@contextlib.contextmanager
def _saying_what_is_missing(name: str, option: str) -> Iterator[None]:
    """Tensors that pretrained weights do not have stay random, of which timm tells its log alone; and no line of that
    log reaches the screen.
    """
    log, told = logging.getLogger("timm.models._builder"), list[str]()
    handler, level = logging.Handler(), log.level
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    for line in told:
        if line.startswith("Missing keys ("):
            missing = line.partition("(")[2].rpartition(")")[0].split(", ")
            console.say(
                f"warning: {option}: the pretrained weights of {name} have nothing for {len(missing):,} of its tensors"
                f" ({checkpoint_layouts.names(missing)}), which are random; is the file in the hub's cache another"
                " model's?"
            )


@contextlib.contextmanager
def _hub() -> Iterator[None]:
    """timm's own loader, without its minute of retries where there is no network: then the local cache alone is
    asked.
    """
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(address: str) -> bool:
    if any(name.lower() in ("https_proxy", "http_proxy", "all_proxy") for name in os.environ):
        return True  # A proxy resolves names that we cannot.
    url = urlparse(address)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=HUB_SECONDS).close()
    except OSError:
        return False
    return True


def weights_digest(encoder: Encoder) -> str:
    """A hash of the encoder's name, normalisation and weights."""
    digest = hashlib.sha256(f"{encoder.name} {encoder.preprocessing.mean} {encoder.preprocessing.std}".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {checkpoint.tensor_digest(tensor)}".encode())
    return digest.hexdigest()
