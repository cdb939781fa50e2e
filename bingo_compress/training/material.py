"""What training starts from: pixels, split, the teacher's pass, bags and targets of a folder, each made once."""

import hashlib
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bingo_compress.data import image_list, pixel_store
from bingo_compress.data.shards import Kind
from bingo_compress.features import bagging, extract, near_copies, neighbours, targets, teacher_pass
from bingo_compress.features.memmap import Rows, TeacherPass
from bingo_compress.models import encoder
from bingo_compress.models.encoder import Encoder
from bingo_compress.models.trained import Models
from bingo_compress.recipe import Recipe, deciding
from bingo_compress.runtime import checkpoint, console, distributed, machine, run_dir
from bingo_compress.runtime.made_of import MadeOf, hash_seed, made_of
from bingo_compress.training.loader import Lessons
from bingo_compress.training.plan import Plan, held_out

DRAWN = 4096  # images looked at together for those to hold out


@dataclass(frozen=True)
class Material:
    """What stages before training give. store, folder and seen hold the same images in the same order; held and
    training are positions in them; scenes: (N,) as `near_copies.find` names them; space: of the targets; work: where
    later stages write; sources: digests of what it was made from.
    """

    store: pixel_store.PixelStore
    folder: image_list.ImageList
    held: Tensor
    training: Tensor
    seen: TeacherPass
    scenes: Tensor
    space: targets.TargetSpace
    work: Path
    sources: dict[str, str]


def sources_of(models: Models, folder: image_list.ImageList) -> dict[str, str]:
    """Digests by name of what a run is made from, beside its settings and its student's start."""
    return {"images": folder.fingerprint(), "teacher": encoder.weights_digest(models.teacher)}


def begun_with(models: Models, folder: image_list.ImageList) -> dict[str, Any]:
    """Digests and settings of a run before its first stage, by name."""
    return sources_of(models, folder) | {
        "start": encoder.weights_digest(models.student),
        "settings": deciding(models.recipe),
    }


def with_room(
    plan: Plan,
    asked: Recipe,
    student: Encoder,
    folder: image_list.ImageList,
    out: Path,
    *,
    new: bool,
    by_jobs: bool = False,
) -> tuple[Plan, Recipe]:
    """The plan and what was asked for, with what pixels=auto means here where the run is new. by_jobs: array jobs make
    the teacher's pass. Raises BingoError, before anything is written, where no image can be decoded or the disk is too
    small.
    """
    count = len(folder.files)
    stored = plan.joined_bytes if by_jobs else plan.stored_bytes
    beside = (stored + plan.target_bytes * distributed.world()) * count  # every process has a file of targets
    if new and plan.recipe.pixels == "auto":
        chosen = distributed.from_first(lambda: pixel_store.choose(count, plan.side, out.resolve() / "work", beside))
        if chosen == "encoded":
            plan = replace(plan, recipe=plan.recipe.model_copy(update={"pixels": chosen}))
            asked = asked.model_copy(update={"pixels": chosen})
            raw, encoded = (console.size(pixel_store.guess(count, plan.side, kind)) for kind in ("raw", "encoded"))
            console.say(
                f"pixels: encoded: the disk has no room for about {raw} of raw pictures, but for {encoded} of JPEGs,"
                " which change crops a little; --pixels stream keeps none, changes nothing and is slower"
            )
    if out.exists():
        return plan, asked
    extract.pixels_of(student.preprocessing, folder, range(count), 1)
    run_dir.need_space(out.resolve(), beside, "the teacher's embeddings")
    if plan.recipe.pixels not in ("auto", "stream"):  # auto streams where the store does not fit
        kind: Kind = "encoded" if plan.recipe.pixels == "encoded" else "raw"
        run_dir.need_space(out.resolve(), pixel_store.guess(count, plan.side, kind), "the pixel store")
    return plan, asked


def prepare(plan: Plan, models: Models, folder: image_list.ImageList, work: Path) -> Material:
    """Pixels, the teacher's pass, scenes and split, under `work`; what is there already is not made again. Raises
    BingoError.
    """
    sources = sources_of(models, folder)
    # Packed views come when their space is known.
    store, folder, seen = embed(plan, models.teacher, folder, work, 0 if plan.packed else plan.views)
    sources |= {"teacher's embeddings": seen.key}
    scenes = _scenes(plan, models.teacher, folder, store, seen, work)
    if len(scenes.unique()) < len(scenes):
        sources["near-copies"] = checkpoint.tensor_digest(scenes)
    held, training = split(scenes, plan.recipe)
    material = Material(store, folder, held, training, seen, scenes, targets.RAW, work, sources)
    return _with_targets(plan, models.teacher, material) if plan.loss.teacher else material


def embed(
    plan: Plan, teacher: Encoder, folder: image_list.ImageList, work: Path, views: int
) -> tuple[pixel_store.PixelStore, image_list.ImageList, TeacherPass]:
    """(pixels, the images that can be decoded, the teacher's pass with so many `views`), of an array job its share
    alone. Raises BingoError, and distributed.Unfinished where other jobs have not made theirs.
    """
    recipe, room = plan.recipe, machine.parse_memory(plan.recipe.memory)
    store, folder = pixel_store.build(folder, plan.side, work, plan.device, recipe.pixels, room, plan.step_bytes)
    seen = teacher_pass.run(
        teacher,
        folder,
        store,
        views,
        recipe.crop_scale_min,
        work,
        plan.device,
        of_features=plan.loss.regression,
    )
    return store, folder, seen


def _scenes(
    plan: Plan,
    teacher: Encoder,
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    seen: TeacherPass,
    work: Path,
) -> Tensor:
    """Which images show one scene, kept under `work`: a run that goes on with other threads must find the same."""
    made = made_of(
        "near-copies",
        images=folder.fingerprint(),
        pictures=store.made_of,
        teacher=encoder.weights_digest(teacher),
        preprocessing=asdict(teacher.preprocessing),
        search=plan.recipe.search,
    )
    home = work / f"near-copies-{made.key}"
    file = home / "scenes.safetensors"
    distributed.from_first(lambda: run_dir.drop_stale(work, "near-copies", {home.name}))
    if not distributed.from_first(lambda: checkpoint.is_sound(file, made)):
        console.say("looking for near-copies")
        model = extract.as_embed(teacher, plan.device)
        limits = distributed.from_first(lambda: near_copies.fit(model, folder))
        photos = near_copies.of_store(seen.features, folder, store)
        found = near_copies.find(photos, limits, neighbours.Search(plan.recipe.search, plan.device, home))

        def keep() -> None:
            home.mkdir(exist_ok=True)
            checkpoint.save(file, {"scenes": found}, made)

        distributed.from_first(keep)
    return distributed.from_first(lambda: checkpoint.load(file)[0]["scenes"])


def _with_targets(plan: Plan, teacher: Encoder, material: Material) -> Material:
    """The same with the plan's target space and, where they are kept packed, the stored views in it. The space is kept:
    fitted again, by another processor or other threads, its axes may point the other way, and what goes on would learn
    towards other targets than it began with.
    """
    seen, plan = material.seen, plan.on(anchors_count(plan, material))
    made = made_of(
        "targets",
        teacher=seen.key,
        training=checkpoint.tensor_digest(material.training),
        target=plan.target,
        dim=plan.dim,
        lengths=plan.loss.lengths,
        of_features=plan.loss.regression,
    )
    home = seen.home / f"targets-{made.key}"
    space = distributed.from_first(lambda: _kept_space(plan, material, home / "space.safetensors", made))
    if plan.packed:
        viewing = teacher_pass.Viewing(
            teacher, material.folder, material.store, plan.recipe.crop_scale_min, plan.device, plan.loss.regression
        )
        project = space.project if plan.loss.lengths else space
        seen = teacher_pass.with_packed_views(seen, viewing, plan.views, project, home)
    digest = hashlib.sha256("".join(checkpoint.tensor_digest(part) for part in space.tensors().values()).encode())
    return replace(material, seen=seen, space=space, sources=material.sources | {"target space": digest.hexdigest()})


def _kept_space(plan: Plan, material: Material, file: Path, made: MadeOf) -> targets.TargetSpace:
    """The plan's target space out of `file`; fitted, and kept there, where it is not."""
    if not checkpoint.is_sound(file, made):
        space = targets.target_space(_plain(plan, material), plan.target, plan.dim)
        shutil.rmtree(file.parent, ignore_errors=True)  # views in a space that is gone
        file.parent.mkdir()
        checkpoint.save(file, space.tensors(), made)
    return targets.TargetSpace(**checkpoint.load(file)[0])


def _plain(plan: Plan, material: Material) -> Rows:
    """What the target space is fitted on."""
    seen = material.seen
    return Rows(seen.features if plan.loss.regression else seen.embeddings, material.training)


def anchors_count(plan: Plan, material: Material) -> int:
    """Anchors of an epoch: the training images, or with duplicates=near one of each scene."""
    training = material.training
    return len(material.scenes[training].unique()) if plan.recipe.duplicates == "near" else len(training)


def make_bags(plan: Plan, teacher: Encoder, material: Material) -> Tensor:
    """Bags (n, K) over the training images, by the teacher's plain features; (n, 0) for a method that does not use
    them. Raises BingoError.
    """
    recipe, seen, training = plan.recipe, material.seen, material.training
    if not (
        plan.loss.mates and plan.loss.teacher
    ):  # two views of the anchor, or bags that the student makes for itself
        return torch.empty(len(training), 0, dtype=torch.int64)
    scenes = near_copies.within(material.scenes, training)
    split_digest = hashlib.sha256(training[scenes.unique()].numpy().tobytes()).hexdigest()
    # Arms of a comparison share one folder; what is stale is the bags of another teacher's pass.
    run_dir.drop_stale(material.work, "bags", {path.name for path in material.work.glob(f"bags-{seen.key}-*")})
    key = made_of("bags", training=split_digest, bag_size=recipe.bag_size, search=recipe.search).key
    search = neighbours.Search(recipe.search, plan.device, material.work / f"bags-{seen.key}-{key}")

    def bags(firsts: Tensor) -> Tensor:
        draws = hash_seed(recipe.seed, "bags")
        looked = bagging.Seen(seen, material.folder, training[firsts], recipe.clusters, draws, search)
        return bagging.BAGGERS[recipe.bags](looked, recipe.bag_size)

    return bagging.over_scenes(bags, scenes)


def bag_facts(plan: Plan, bags: Tensor, material: Material) -> dict[str, float]:
    """`bagging.report` of the teacher's bags; nothing for a method that does not use them."""
    if not (plan.loss.mates and plan.loss.teacher):
        return {}
    scenes = near_copies.within(material.scenes, material.training)
    return bagging.report(bags, Rows(material.seen.features, material.training), scenes=scenes)


def lessons_of(plan: Plan, teacher: Encoder, material: Material, bags: Tensor) -> Lessons:
    """What the loop takes of all this."""
    source = _target_source(plan, teacher, material)
    scenes = near_copies.within(material.scenes, material.training)
    return Lessons(material.store, material.training, bags, source, material.sources, material.folder.files, scenes)


def _target_source(plan: Plan, teacher: Encoder, material: Material) -> targets.TargetOf | None:
    """The teacher's targets for the plan's method; None for a method without teacher."""
    recipe, loss, seen = plan.recipe, plan.loss, material.seen
    if not loss.teacher:
        return None
    mean = recipe.stored_views == "mean"
    if plan.packed:
        return targets.PackedTargets(seen.views, plan.device, lengths=loss.lengths, mean=mean)
    if not plan.online:
        return targets.StoredTargets(
            seen.views, material.space, plan.device, lengths=loss.lengths, mean=mean, work=material.work
        )
    return targets.OnlineTargets(
        teacher,
        material.store,
        material.space,
        recipe.crop_scale_min,
        plan.device,
        features=loss.regression,
        lengths=loss.lengths,
    )


def split(scenes: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(held out, training): positions of the images, each ascending, the same for every seed, no scene (N,) in both;
    the share held out is the recipe's, at most HELD_AT_MOST, and less where no whole scene would fit any more. Where
    every scene is larger than the share, the smallest one is held out, if it is at most a quarter of the images.
    """
    keep = held_out(recipe, len(scenes))
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(hash_seed("hold-out")))
    sizes, room = scenes.bincount(minlength=1), keep
    taken: set[int] = set()
    # A few at a time: as Python's numbers those of a hundred million images are 10 GB.
    for scene in (scene for part in order.split(DRAWN) for scene in scenes[part].tolist()):
        if not room:
            break
        if scene not in taken and sizes[scene] <= room:
            taken.add(scene)
            room -= int(sizes[scene])
    if keep and not taken:
        smallest = int(torch.where(sizes > 0, sizes, len(scenes) + 1).argmin())
        if 4 * sizes[smallest] <= len(scenes):
            taken.add(smallest)
    held = torch.isin(scenes, torch.tensor(sorted(taken), dtype=scenes.dtype))
    return held.nonzero()[:, 0], (~held).nonzero()[:, 0]


def halves(material: Material, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(images that the checks during training are of, images that the closing figure is of): both all that are held
    out, but their halves where the checks choose, no scene in both.

    The best of ten students by some images looks better on them than it is.
    """
    held = material.held
    if not recipe.keep_best:
        return held, held
    number = near_copies.within(material.scenes, held).unique(return_inverse=True)[1]
    return held[number % 2 == 0], held[number % 2 == 1]
