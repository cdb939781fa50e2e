"""Training with labels on top of a student, for proof only: subsets of the labels, the literature's linear protocol,
and full fine-tuning.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bingo_compress.data import augment
from bingo_compress.data.pixel_store import PixelStore
from bingo_compress.errors import BingoError
from bingo_compress.evaluation.probes import LinearHead
from bingo_compress.features.extract import Embed, plain_views, to_float
from bingo_compress.models.encoder import Encoder
from bingo_compress.runtime import console
from bingo_compress.runtime.made_of import hash_seed
from bingo_compress.training.plan import learning_rate

SCALE_MIN = 0.08
LINEAR_BATCH, LINEAR_EPOCHS = 256, 100
TUNE_BATCH, TUNE_EPOCHS, TUNE_STEPS = 64, 30, 300
# On 279 photos of clothing a distilled student did best with the one, random weights with the other.
TUNE_LRS = (
    0.01,
    0.1,
)
HEAD_LR = 1.0


@dataclass(frozen=True)
class Labelled:
    """Images to train on: rows, labels: (n,) positions in the store, and their classes; classes: how many there are."""

    store: PixelStore
    rows: Tensor
    labels: Tensor
    classes: int

    def only(self, which: Tensor) -> "Labelled":
        """Those at the positions `which` alone."""
        return replace(self, rows=self.rows[which], labels=self.labels[which])


def parse_shots(text: str) -> list[str]:
    """ "1%,10%,5" to its parts, each once. Raises BingoError for a part that `subset` would not take."""
    specs = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for spec in specs:
        _amount(spec)
    return specs


def _amount(spec: str) -> tuple[float, bool]:
    """(share of a class, True) for a percentage, (images a class, False) for a whole number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%|(\d+)", spec, re.ASCII)
    value = float(found[1] or found[2]) if found else 0.0
    if found is None or value <= 0 or (found[1] and value > 100):
        raise BingoError(
            f"--shots: expected a share or a number of images a class such as 1%, 10% or 5, found {spec!r}"
        )
    return (value / 100, True) if found[1] else (value, False)


def subset(labels: Tensor, spec: str, seed: int) -> Tensor:
    """Positions, ascending, of a part of each class drawn at random: "1%" of it, at least one image, or "5" images, all
    where there are fewer.

    labels: (N,). The same seed gives nested subsets: 1% lies in 10%. Raises BingoError for a spec that is neither.
    """
    amount, is_share = _amount(spec)
    generator = torch.Generator().manual_seed(hash_seed("subset", seed))
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        take = max(1, round(amount * len(members))) if is_share else int(amount)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:take]])
    return torch.cat(chosen).sort().values


def literature_lr(name: str) -> float:
    """The protocol's peak learning rate for a timm model: 30, and 3 for EfficientNets and MobileNets."""
    return 3.0 if "efficientnet" in name or "mobilenet" in name else 30.0


def linear_with_augmentation(
    encoder: Encoder,
    images: Labelled,
    device: torch.device,
    *,
    lr: float = 0.0,
    epochs: int = LINEAR_EPOCHS,
    seed: int = 0,
    what: str = "linear, augmented",
) -> LinearHead:
    """MoCo's linear protocol (arXiv 1911.05722; SEED, DisCo and BINGO use it too): a classifier on the frozen encoder's
    features of random crops and flips.

    SGD, momentum 0.9, no weight decay, batches of 256,
    x0.1 at 60% and 80% of the epochs; lr: 0 for `literature_lr`. Returns a head on raw features, on the CPU.
    """
    encoder.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    peak = lr or literature_lr(encoder.name)
    generator = torch.Generator().manual_seed(hash_seed("linear head", seed))
    weight = (0.01 * torch.randn(images.classes, encoder.width, generator=generator)).to(device).requires_grad_()
    bias = torch.zeros(images.classes, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=peak, momentum=0.9)
    for epoch, views, wanted in crops_and_flips(encoder, images, device, epochs, LINEAR_BATCH, seed, what):
        optimizer.param_groups[0]["lr"] = peak * 0.1 ** sum(epoch >= share * epochs for share in (0.6, 0.8))
        with torch.no_grad():
            features = encoder(views)
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(features @ weight.T + bias, wanted).backward()
        optimizer.step()
    return LinearHead(weight.detach().cpu(), bias.detach().cpu(), 0.0)


def fine_tune(
    encoder: Encoder,
    images: Labelled,
    device: torch.device,
    *,
    epochs: int = 0,
    lr: float = 0.0,
    seed: int = 0,
    what: str = "fine-tune",
) -> Embed:
    """Train a copy of the encoder and a linear classifier on a few labels, after SimCLR's and SwAV's semi-supervised
    protocols (2002.05709, 2006.09882).

    Crops and flips only, Nesterov SGD, no weight decay,
    cosine. lr: the backbone's, 0 for the one of TUNE_LRS that does best on a fifth of the rows held out; the
    classifier's is HEAD_LR, as for features of length one: BatchNorm without weights before it (as MAE's probe has,
    2111.06377) makes it fit features of any scale. epochs: 0 for TUNE_EPOCHS, more where that is under TUNE_STEPS
    steps. Returns a function of plain views as `embed.as_embed` takes them, uint8 (B, S, S, 3), to classes (B,) int64.
    """
    lr = lr or _best_lr(encoder, images, device, epochs, seed, what)
    tuned = copy.deepcopy(encoder)
    head = nn.Linear(encoder.width, images.classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(tuned, nn.BatchNorm1d(encoder.width, eps=1e-8, affine=False), head)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    peaks = (lr, HEAD_LR / encoder.width)
    groups = [{"params": list(part.parameters())} for part in (tuned.backbone, head)]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    each = _steps(len(images.rows), TUNE_BATCH)
    epochs = epochs or max(TUNE_EPOCHS, -(-TUNE_STEPS // each))
    # A single image has no spread to normalise by: BatchNorm then keeps its statistics.
    model.train(len(images.rows) > 1)
    torch.manual_seed(hash_seed("fine-tune", seed))  # for students with dropout
    for step, (_, views, wanted) in enumerate(crops_and_flips(encoder, images, device, epochs, TUNE_BATCH, seed, what)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = learning_rate(step, epochs * each, 0, peak)
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(views), wanted).backward()
        optimizer.step()
    model.eval()

    @torch.inference_mode()
    def predict(batch: Tensor) -> Tensor:
        classes: Tensor = model(to_float(batch.to(device))).argmax(1)
        return classes.cpu()

    return predict


def _best_lr(
    encoder: Encoder,
    images: Labelled,
    device: torch.device,
    epochs: int,
    seed: int,
    what: str,
) -> float:
    """The learning rate that does best on a fifth of the rows, held out; a tie, or fewer than five rows, takes the
    smaller.
    """
    order = torch.randperm(len(images.rows), generator=torch.Generator().manual_seed(hash_seed("held out", seed)))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    right = [0] * len(TUNE_LRS)
    for number, lr in enumerate(TUNE_LRS if len(held) else ()):
        words = f"{what}, learning rate {lr}"
        predict = fine_tune(encoder, images.only(kept), device, epochs=epochs, lr=lr, seed=seed, what=words)
        for part in held.split(TUNE_BATCH):
            plain = plain_views(images.store, images.rows[part], encoder.preprocessing)
            right[number] += int((predict(plain.permute(0, 2, 3, 1)) == images.labels[part]).sum())
    return TUNE_LRS[right.index(max(right))]


def _steps(count: int, batch: int) -> int:
    return -(-count // batch)


def crops_and_flips(
    encoder: Encoder,
    images: Labelled,
    device: torch.device,
    epochs: int,
    batch: int,
    seed: int,
    what: str,
    scale_min: float = SCALE_MIN,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(epoch, views (B, 3, S, S), labels (B,)) of `epochs` passes in random order; batches differ by one image at most,
    so none is left with a single one.
    """
    with console.bar(what, epochs * len(images.rows)) as advance:
        for epoch in range(epochs):
            generator = torch.Generator().manual_seed(hash_seed("labelled", seed, epoch))
            for part in torch.randperm(len(images.rows), generator=generator).tensor_split(
                _steps(len(images.rows), batch)
            ):
                rows = images.rows[part]
                drawn = crop_and_flip(images.store.aspect[rows], generator, scale_min)
                views = augment.apply(images.store.crops(rows, drawn.box, encoder.preprocessing.size), drawn)
                yield epoch, views.contiguous(memory_format=torch.channels_last), images.labels[part].to(device)
                advance(len(part))


def crop_and_flip(aspect: Tensor, generator: torch.Generator, scale_min: float = SCALE_MIN) -> augment.Draw:
    """Parameters of supervised training's views: RandomResizedCrop of scale_min-1 and a flip, colours left alone.
    aspect: (B,) width / height.
    """
    drawn = augment.draw(aspect, generator, scale_min)
    return replace(
        drawn,
        order=torch.full_like(drawn.order, -1),
        grey=torch.zeros_like(drawn.grey),
        sigma=torch.zeros_like(drawn.sigma),
    )
