"""What training starts from: pixels, split, the teacher's pass, bags and targets of a folder, each made once."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bingo_compress.data import image_folder, pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.features import bagging, neighbours, targets, teacher_pass
from bingo_compress.features.memmap import Rows
from bingo_compress.models import encoder
from bingo_compress.models.encoder import Encoder
from bingo_compress.models.trained import Models
from bingo_compress.recipe import Recipe
from bingo_compress.runtime import console, devices, distributed, machine, run_dir
from bingo_compress.runtime.made_of import hash_seed, made_of
from bingo_compress.training.plan import loss_of, plan

AT_MOST = 1000


@dataclass(frozen=True)
class Material:
    """What stages before training give. store, folder and seen hold the same images in the same order; held and
    training are positions in them; work: where later stages write; sources: digests of what it was made from.
    """

    store: pixel_store.PixelStore
    folder: image_folder.Folder
    held: Tensor
    training: Tensor
    seen: teacher_pass.TeacherPass
    work: Path
    sources: dict[str, str]


def sources_of(models: Models, folder: image_folder.Folder) -> dict[str, str]:
    """Digests by name of what a run is made from, beside its settings and its student's start."""
    return {"images": folder.fingerprint(), "teacher": encoder.weights_digest(models.teacher)}


def prepare(
    models: Models, folder: image_folder.Folder, side: int, work: Path, device: torch.device, step: int = 0
) -> Material:
    """Pixels, split and the teacher's pass for a recipe, under `work`; what is there already is not made again.

    step: what `step_memory` gave, if it was asked before. Raises BingoError.
    """
    recipe = models.recipe
    step = step or step_memory(recipe, models.student, len(folder.files), device)
    sources = sources_of(models, folder)
    store, folder = pixel_store.build(
        folder, side, work, device, recipe.pixels, machine.parse_memory(recipe.memory), step
    )
    held, training = split(len(store), recipe)
    views = views_stored(recipe)
    features = loss_of(recipe).regression
    seen = teacher_pass.run(
        models.teacher, folder, store, views, recipe.crop_scale_min, work, device, of_features=features
    )
    return Material(store, folder, held, training, seen, work, sources | {"teacher's embeddings": seen.key})


def step_memory(recipe: Recipe, student: Encoder, count: int, device: torch.device) -> int:
    """Bytes of memory that this process needs for training on `count` images, beside what it holds and the pixels.
    Raises BingoError over recipe.memory.
    """
    if device.type == "cuda":
        return pixel_store.WORK
    planned = plan(recipe, count)
    views = planned.batch_size * planned.student_views // distributed.world()
    step, limit, held = (
        devices.step_bytes(student, student.preprocessing.size, views),
        machine.parse_memory(recipe.memory),
        machine.resident(),
    )
    if limit and held + step > limit:
        fits = int(planned.batch_size * (limit - held - devices.BESIDE) / (step - devices.BESIDE))
        way = f"lower --batch-size to {fits}" if fits >= 2 else "lower --image-size"
        raise BingoError(
            f"--memory: expected room for a step of {planned.batch_size} anchors, about {console.size(step)} beside the"
            f" {console.size(held)} in use, found {console.size(limit)}; {way}, or raise --memory"
        )
    return step


def make_bags(recipe: Recipe, teacher: Encoder, material: Material, device: torch.device) -> Tensor:
    """Bags (n, K) over the training images, by the teacher's plain features; (n, 0) for a method that does not use
    them. Raises BingoError.
    """
    seen, training, loss = material.seen, material.training, loss_of(recipe)
    if not (loss.mates and loss.teacher):  # two views of the anchor, or bags that the student makes for itself
        return torch.empty(len(training), 0, dtype=torch.int64)
    own = torch.empty(len(training), 0)
    if recipe.bags == "adaptive" and teacher.projection is None and seen.views.shape[1]:
        parts = training.split(targets.ROWS)
        own = torch.cat(
            [torch.einsum("nd,nvd->nv", seen.embeddings[rows].float(), seen.views[rows].float()) for rows in parts]
        )
    labels = None
    if recipe.bags == "labels":
        names, indices = image_folder.labels_of(material.folder)
        console.say(
            f"warning: bags by {len(names)} folder names are an oracle for comparison; a real run has no labels"
        )
        labels = torch.tensor(indices)[training]
    split_digest = hashlib.sha256(training.numpy().tobytes()).hexdigest()
    # Arms of a comparison share one folder; what is stale is the bags of another teacher's pass.
    run_dir.drop_stale(material.work, "bags", {path.name for path in material.work.glob(f"bags-{seen.key}-*")})
    key = made_of("bags", training=split_digest, bag_size=recipe.bag_size, search=recipe.search).key
    search = neighbours.Search(recipe.search, device, material.work / f"bags-{seen.key}-{key}")
    features = Rows(seen.features, training)
    looked = bagging.Seen(features, own, labels, recipe.clusters, hash_seed(recipe.seed, "bags"), search)
    return bagging.BAGGERS[recipe.bags](looked, recipe.bag_size)


def bag_facts(recipe: Recipe, bags: Tensor, material: Material, labels: Tensor | None = None) -> dict[str, float]:
    """`bagging.report` of the teacher's bags; nothing for a method that does not use them."""
    loss = loss_of(recipe)
    return (
        bagging.report(bags, Rows(material.seen.features, material.training), labels)
        if loss.mates and loss.teacher
        else {}
    )


def views_stored(recipe: Recipe) -> int:
    """Teacher views that are stored an image."""
    return 0 if recipe.views == "online" or not loss_of(recipe).teacher else int(recipe.views)


def target_kind(recipe: Recipe, teacher: Encoder) -> str:
    """What `embed.target_space` makes of the teacher's embeddings."""
    if recipe.target != "auto":
        return recipe.target
    return "raw" if loss_of(recipe).regression or teacher.projection is not None else "pca"


def target_width(recipe: Recipe, teacher: Encoder, count: int) -> int:
    """Dimensions of a target, and of the student's head, for a training set of `count` images."""
    loss = loss_of(recipe)
    if not loss.teacher:
        return recipe.target_dim
    width = teacher.width if loss.regression else teacher_pass.embedding_width(teacher)
    return min(recipe.target_dim, width, count - 1) if target_kind(recipe, teacher) in ("pca", "whitened") else width


def target_source(models: Models, material: Material, device: torch.device) -> tuple[targets.TargetOf | None, int]:
    """(the teacher's targets, their width) for the recipe's method; None for a method without teacher."""
    recipe, loss, seen = models.recipe, loss_of(models.recipe), material.seen
    dim = target_width(recipe, models.teacher, len(material.training))
    if not loss.teacher:
        return None, dim
    source = seen.features if loss.regression else seen.embeddings
    space = targets.target_space(
        Rows(source, material.training), target_kind(recipe, models.teacher), recipe.target_dim
    )
    if recipe.views == "online":
        return (
            targets.OnlineTargets(
                models.teacher,
                material.store,
                space,
                recipe.crop_scale_min,
                device,
                dim,
                features=loss.regression,
                lengths=loss.lengths,
            ),
            dim,
        )
    return (
        targets.StoredTargets(seen.views, space, device, lengths=loss.lengths, mean=recipe.stored_views == "mean"),
        dim,
    )


def split(count: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(held out, training): positions of the images, each ascending, the same for every seed; the share is the
    recipe's, at most AT_MOST.
    """
    keep = min(int(count * recipe.hold_out), AT_MOST)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(hash_seed("hold-out")))
    return order[:keep].sort().values, order[keep:].sort().values


def halves(held: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(images that the checks during training are of, images that the closing figure is of): both `held`, but its
    halves where the checks choose.

    The best of ten students by some images looks better on them than it is.
    """
    return (held[::2], held[1::2]) if recipe.keep_best else (held, held)
