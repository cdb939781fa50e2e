"""Several methods side by side on one folder: shared stages, equal student passes, several seeds, one table."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from bingo_compress.comparison.arms import Arm, make_arms, resolve_arms
from bingo_compress.comparison.tables import summarise, write
from bingo_compress.data import image_list
from bingo_compress.data.image_list import ImageList
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import probes, scores
from bingo_compress.evaluation.held_out import train
from bingo_compress.features import bagging, extract, near_copies, neighbours
from bingo_compress.models import encoder
from bingo_compress.models.encoder import Encoder
from bingo_compress.models.names import resolve_names
from bingo_compress.models.trained import Models, build_models
from bingo_compress.recipe import WORDS, Recipe, deciding
from bingo_compress.runtime import checkpoint, console, run_dir
from bingo_compress.runtime.devices import choose_device, peak_memory
from bingo_compress.runtime.made_of import FORMATS, MadeOf, file_digest, made_of
from bingo_compress.sources.opened import Data, absolute_recipe
from bingo_compress.training import metrics
from bingo_compress.training.material import Material, anchors_count, bag_facts, lessons_of, make_bags, prepare
from bingo_compress.training.plan import Plan, by_start, plan_run, schedule, take

FOLDS = 5


@dataclass(frozen=True)
class Labelled:
    """Labelled images as every student is judged on them. bank, test: folders (test None: cross-validated over the
    bank); teacher: its features; groups: (N,) the same for images of the bank that no split sets apart, as in
    `scores.Sides`; near: what is told of near-copies on both sides.
    """

    bank: ImageList
    test: ImageList | None
    labels: Tensor
    test_labels: Tensor
    classes: int
    teacher: dict[str, Tensor]
    groups: Tensor
    near: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shared:
    """What all arms have in common. folder: the files of --data; bank, test: as in `Labelled`, but all of their files;
    threads: of each student, settled once, so that its runs are alike to the last bit; judging: the labelled images by
    the teacher that sees them, embedded once.
    """

    folder: ImageList
    bank: ImageList
    test: ImageList | None
    out: Path
    device: torch.device
    threads: dict[str, int]
    judging: dict[str, Labelled]

    @property
    def work(self) -> Path:
        return self.out / "work"

    def figures(self, **inputs: Any) -> MadeOf:
        """What figures on the labelled images are made of, beside `inputs`."""
        return made_of("figures", **self._labelled_images, **inputs)

    @cached_property
    def _labelled_images(self) -> dict[str, str]:
        return {"bank": _with_labels(self.bank), "test": _with_labels(self.test) if self.test else ""}

    def labelled(self, models: Models) -> Labelled:
        """The labelled images as this teacher sees them."""
        which = f"{models.recipe.teacher} {models.recipe.teacher_size} {models.recipe.teacher_weights}"
        if which not in self.judging:
            self.judging[which] = _labelled(self.bank, self.test, models.teacher, self.device)
        return self.judging[which]


def compare(
    base: Recipe, labels: Data, test: Data | None, methods: str, seeds: list[int], out: Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Distil every arm with every seed and judge all students on the labelled images; table.txt, .json, .csv and .svg
    land in `out`.

    Called again with the same settings it goes on where it was. Raises BingoError.
    """
    folder = take(base)
    bank, tested = scores.open_labelled(labels, test, "--labels", work=out / "work")
    make_arms(methods, base)  # refused before anything is said
    device = choose_device(base.device)
    base = absolute_recipe(base)
    say = cache(console.say)  # what several arms share is said once
    named = resolve_names(base, say)
    epochs = {"epochs": by_start(named)["epochs"]}  # the same for all arms
    arms, base = resolve_arms(make_arms(methods, base.model_copy(update=epochs)), say), named.model_copy(update=epochs)
    for arm in arms:
        schedule(arm.recipe, len(folder.files))
    _open(out, base, overwrite)
    image_list.keep(out / "work", folder, bank, tested)
    shared = Shared(folder, bank, tested, out, device, {} if base.threads else _threads_kept(out), {})
    results: list[dict[str, Any]] = []
    for arm in arms:
        for seed in seeds:
            title = f"== {arm.name}, seed {seed} ({len(results) + 1} of {len(arms) * len(seeds)})"
            results.append(_result(shared, arm, seed, title))
    table = summarise(results, [arm.name for arm in arms], base, tested.where if tested else None)
    table["protocol"] |= _in_training(tested or bank, folder)
    table["references"] = _references(shared, base)
    write(table, out)
    return table


def _threads_file(out: Path) -> Path:
    return out / "runs" / "threads.json"


def _threads_kept(out: Path) -> dict[str, int]:
    with run_dir.made_by("compare", _threads_file(out)):
        return {name: int(count) for name, count in run_dir.read_json("compare", _threads_file(out)).items()}


def _result(shared: Shared, arm: Arm, seed: int, title: str) -> dict[str, Any]:
    """What a student was judged to be, with `tensors`, the answers by test image; trained and judged where that is not
    there yet.
    """
    recipe = arm.recipe.model_copy(update={"seed": seed})
    name = f"{_file_name(arm.name)}-seed{seed}"
    student, judged, bags = (
        shared.out / "runs" / f"{name}.{kind}.safetensors" for kind in ("student", "figures", "bags")
    )
    made = _made_of(recipe, shared.folder, shared.device)
    of_figures = shared.figures(arm=made.key)
    if not checkpoint.is_sound(judged, of_figures):
        console.say(title)
        models = build_models(recipe)
        plan = plan_run(models, len(shared.folder.files), shared.device, shared.threads.get(recipe.student, 0))
        if recipe.student not in shared.threads and not recipe.threads:
            shared.threads[recipe.student] = plan.recipe.threads
            run_dir.write_text(_threads_file(shared.out), json.dumps(shared.threads) + "\n")
        if not checkpoint.is_sound(student, made):
            material = prepare(plan, models, shared.folder, shared.work)
            facts = _train(plan, models, material, bags, made)
            checkpoint.save(student, models.student.backbone.state_dict(), made, arm=arm.name, seed=seed, **facts)
        tensors, found = checkpoint.load(student)
        models.student.backbone.load_state_dict(tensors)
        measured, right = judge(models.student, shared.labelled(models), shared.device)
        told = {key: value for key, value in found.items() if key != "made_of"} | measured
        purity = scores.bag_purity(bags, shared.bank) if bags.exists() and checkpoint.made_of(bags) == made else {}
        told |= {"purity": purity, "near_copies": shared.labelled(models).near}
        checkpoint.save(judged, right, of_figures, **told, digest=encoder.weights_digest(models.student))
    right, found = checkpoint.load(judged)
    return {**found, "tensors": right}


def _references(shared: Shared, base: Recipe) -> list[dict[str, Any]]:
    """What the students are to be read against: the teacher, the student as it began where it knew something, and one
    with the random weights of seed 0.
    """
    found = []
    for name in ("teacher", "start", "random"):
        weights = base.student_weights if name == "start" else "random"
        if name == "start" and weights == "random":
            continue
        recipe = base.model_copy(update={"student_weights": weights, "seed": 0})
        made = shared.figures(settings=deciding(recipe), weights=_weights(recipe), program=_program(shared.device))
        file = shared.out / "runs" / f"{name}.reference.safetensors"
        if not checkpoint.is_sound(file, made):
            models = build_models(recipe)
            of_name = models.teacher if name == "teacher" else models.student
            measured, right = judge(of_name, shared.labelled(models), shared.device)
            checkpoint.save(file, right, made, name=f"{name} weights" if name == "random" else name, **measured)
        found.append({field: value for field, value in checkpoint.load(file)[1].items() if field != "made_of"})
    return found


def _made_of(recipe: Recipe, folder: ImageList, device: torch.device) -> MadeOf:
    """What an arm's student is made from; all students of a table are of one version of the program and of what it
    stands on.
    """
    return made_of(
        "arm",
        settings=deciding(recipe),
        weights=_weights(recipe),
        images=_with_labels(folder) if recipe.bags == "labels" else folder.fingerprint(),
        training=FORMATS["training"],
        program=_program(device),
    )


def _with_labels(folder: ImageList) -> str:
    """A digest of the images of a folder and of their labels, which stand in no image where a table gives them."""
    return hashlib.sha256(json.dumps([folder.fingerprint(), folder.labels()]).encode()).hexdigest()


def _weights(recipe: Recipe) -> dict[str, str]:
    """Digests of the weights files of a recipe: a file's name does not tell what is in it."""
    sources = {"teacher_weights": recipe.teacher_weights, "student_weights": recipe.student_weights}
    return {role: word if word in WORDS else file_digest(Path(word)) for role, word in sources.items()}


def _program(device: torch.device) -> dict[str, str]:
    return {"torch": torch.__version__, "timm": timm.__version__, "device": device.type}


def _file_name(arm: str) -> str:
    return "".join(
        letter if letter.isalnum() or letter in "=._-" else "+" if letter == ":" else f"+{ord(letter):x}"
        for letter in arm
    )


def _open(out: Path, base: Recipe, overwrite: bool) -> None:
    run_dir.refuse_taken(out, may_hold_files=True)
    marker = out / "compare.json"
    if out.is_dir() and any(out.iterdir()) and not marker.is_file():
        raise BingoError(f"--out: {out} holds something else than a comparison; name another folder")
    (out / "work").mkdir(parents=True, exist_ok=True)
    run_dir.hold(out, "--out")
    said = json.dumps({"base": base.model_dump()}, indent=2) + "\n"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != said:  # the tables are of other settings
        for path in out.glob("table.*"):
            path.unlink()
    if overwrite:
        for path in (out / "runs").glob("*"):
            path.unlink()
        checkpoint.forget(_state(out / "work"))
    (out / "runs").mkdir(exist_ok=True)
    run_dir.write_text(marker, said)


def _state(work: Path) -> Path:
    """Of the arm that is being trained: the loop refuses another's."""
    return work / "checkpoint.safetensors"


def _labelled(bank: ImageList, test: ImageList | None, teacher: Encoder, device: torch.device) -> Labelled:
    classes = image_list.labels_of(bank)[0]
    seer = extract.as_embed(teacher, device)
    features, labels, kept = {}, {}, {}
    for role, folder in {"bank": bank, "test": test}.items():
        if folder:
            found, labels[role], good = scores.embedded({"teacher": seer}, folder, classes, f"teacher, {role} images")
            features[role] = found["teacher"]
            kept[role] = folder.only(good)
    scenes = scores.scenes_of(seer, [(features[role], kept[role]) for role in kept])
    if test:
        near = scores.near_bank(scenes, len(labels["bank"]))
        groups = scenes[: len(labels["bank"])]
    else:
        copied = near_copies.same_bytes(kept["bank"].contents.digests)
        groups, whole = near_copies.parted(scenes, labels["bank"], copied)
        near = scores.near_data(scenes, [classes[label] for label in whole])
    return Labelled(
        kept["bank"],
        kept.get("test"),
        labels["bank"],
        labels.get("test", labels["bank"]),
        len(classes),
        features,
        groups,
        near,
    )


def _in_training(judged: ImageList, folder: ImageList) -> dict[str, Any]:
    """How many of the images that students are judged on are, by content, also in --data: without their labels, which
    is legitimate, but is to be known.
    """
    known = set(folder.digests)
    return {
        "judged_images": len(judged.files),
        "judged_images_in_data": sum(digest in known for digest in judged.digests),
    }


def _train(plan: Plan, models: Models, material: Material, bags_file: Path, made: MadeOf) -> dict[str, Any]:
    """Distil one arm with one seed, its bags in `bags_file` if it has some; says what it took."""
    plan = plan.on(anchors_count(plan, material))
    recipe, loss, schedule = plan.recipe, plan.loss, plan.schedule
    bags = make_bags(plan, models.teacher, material)
    saved, log = _state(material.work), material.work / "metrics.jsonl"
    lessons = lessons_of(plan, models.teacher, material, bags)
    train(plan, models.student, material, lessons, log, saved, discard=True)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    checkpoint.forget(saved)
    if bags.numel():  # to be judged by whatever labels there will be
        bagging.save(bags_file, bags.int(), material.folder.only(material.training.numpy()), made)
    passes = schedule.steps * schedule.batch_size
    return {
        "student": recipe.student,
        "method": recipe.method,
        "epochs": round(recipe.epochs, 2),
        "student_passes": passes * schedule.student_views,
        "average_passes": passes * {"": 0, "views": 2, "fresh": 1}[loss.momentum],
        "teacher_passes": len(material.store) * (1 + plan.views) + passes * plan.asked if loss.teacher else 0,
        "train_seconds": metrics.seconds_of(log),
        "memory_mb": peak_memory(plan.device) / 1e6,
        "bags": bag_facts(plan, bags, material),
        "checks": [
            [line["epoch"] + 1, line["neighbour_recall"]] for line in lines if line.get("neighbour_recall") is not None
        ],
    }


def judge(student: Encoder, judged: Labelled, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """kNN, linear and neighbour recall of a student, and per test image whether kNN and linear were right (uint8).

    Raises BingoError where an image can no longer be read: rows would be told another image's label.
    """
    student.eval()
    model = {"student": extract.as_embed(student, device)}
    bank = scores.again(model, judged.bank, range(len(judged.bank.files)), "embed labelled images")["student"]
    seen, parts = judged.teacher["bank"], []
    if judged.test is not None:
        queries = scores.again(model, judged.test, range(len(judged.test.files)), "embed test images")["student"]
        parts.append((torch.arange(len(bank)), queries, judged.teacher["test"], torch.arange(len(queries))))
    else:
        fold = probes.folds(judged.labels, FOLDS, judged.groups)
        for number in fold.unique().tolist():
            inside, outside = (fold != number).nonzero()[:, 0], (fold == number).nonzero()[:, 0]
            parts.append((inside, bank[outside], seen[outside], outside))
    gallery = min(len(inside) for inside, *_ in parts)
    k = neighbours.recall_k(gallery)
    right = {name: torch.zeros(len(judged.test_labels), dtype=torch.uint8) for name in ("knn", "linear")}
    recalls, strengths = torch.zeros(len(judged.test_labels), dtype=torch.float64), []
    for inside, queries, wanted, places in parts:
        rows, labels = bank[inside], judged.labels[inside]
        head = probes.fit_linear(rows, labels, judged.classes, groups=judged.groups[inside])
        strengths.append(head.strength)
        predicted = {"knn": probes.knn_predict(rows, labels, queries, judged.classes), "linear": head.predict(queries)}
        for name, guess in predicted.items():
            right[name][places] = (guess == judged.test_labels[places]).to(torch.uint8)
        if k:
            recalls[places] = probes.neighbour_recalls((wanted, seen[inside]), (queries, rows), k)
    found: dict[str, Any] = {name: float(values.double().mean()) for name, values in right.items()}
    recall = {"neighbour_recall": float(recalls.mean())} if k else {}
    return found | recall | {"gallery": gallery, "linear_strengths": strengths}, right
