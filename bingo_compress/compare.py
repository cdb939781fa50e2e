"""Several methods side by side on one folder: shared stages, equal student passes, several seeds, one table."""

import csv
import io
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from bingo_compress import chart, checkpoint, embed, evidence, figures, images, intake, probes, run_dir, screen
from bingo_compress.arms import make_arms, resolve_arms
from bingo_compress.distill import loss_of, plan
from bingo_compress.encoder import Encoder
from bingo_compress.errors import BingoError
from bingo_compress.images import Folder
from bingo_compress.made_of import FORMATS, MadeOf, file_digest, made_of
from bingo_compress.material import Material, bag_facts, make_bags, prepare
from bingo_compress.pipeline import choose_device, train
from bingo_compress.pixels import store_side
from bingo_compress.recipe import WORDS, Recipe, deciding
from bingo_compress.resolving import resolve_names, use_threads
from bingo_compress.trained import Models, build_models

FIGURES = ("knn", "linear", "neighbour_recall")
TITLES = {"knn": "kNN", "linear": "linear", "neighbour_recall": f"recall@{probes.RECALL_K}"}
FOLDS = 5


@dataclass(frozen=True)
class Labelled:
    """Labelled images as every student is judged on them. bank, test: folders (test None: cross-validated over the bank); teacher: its features."""

    bank: Folder
    test: Folder | None
    labels: Tensor
    test_labels: Tensor
    classes: int
    teacher: dict[str, Tensor]


def compare(
    base: Recipe, labels: Path, test: Path | None, methods: str, seeds: list[int], out: Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Distil every arm with every seed and judge all students on the labelled images; table.txt, .json, .csv and .svg land in `out`.

    Called again with the same settings it goes on where it was. Raises BingoError.
    """
    folder = intake.take(base)
    bank = images.list_folder(labels, "--labels")
    tested = images.list_folder(test, "--test") if test else None
    images.labels_of(bank)
    if tested:
        images.refuse_other_classes(bank, tested, "--labels")
    make_arms(methods, base)  # refused before anything is said
    device = choose_device(base.device)
    base = base.model_copy(update={"data": str(Path(base.data).resolve())})
    say = cache(screen.say)  # what several arms share is said once
    arms, base = resolve_arms(make_arms(methods, base), say), resolve_names(base, say)
    for arm in arms:
        plan(arm.recipe, len(folder.files))
    work = _open(out, base, overwrite)
    judging: dict[str, Labelled] = {}
    threads_file = out / "runs" / "threads.json"
    with run_dir.made_by("compare", threads_file):
        threads = {} if base.threads else {name: int(count) for name, count in run_dir.read_json("compare", threads_file).items()}

    def labelled(models: Models) -> Labelled:
        """The labelled images as this teacher sees them, embedded once."""
        which = f"{models.recipe.teacher} {models.recipe.teacher_size} {models.recipe.teacher_weights}"
        if which not in judging:
            judging[which] = _labelled(bank, tested, models.teacher, device)
        return judging[which]

    results: list[dict[str, Any]] = []
    for arm in arms:
        for seed in seeds:
            recipe = arm.recipe.model_copy(update={"seed": seed})
            name = f"{_file_name(arm.name)}-seed{seed}"
            student, judged = out / "runs" / f"{name}.student.safetensors", out / "runs" / f"{name}.figures.safetensors"
            made = _made_of(recipe, folder, device)
            of_figures = made_of("figures", arm=made.key, bank=bank.fingerprint(), test=tested.fingerprint() if tested else "")
            if not checkpoint.is_sound(judged, of_figures):
                screen.say(f"== {arm.name}, seed {seed} ({len(results) + 1} of {len(arms) * len(seeds)})")
                models = build_models(recipe)
                settled = use_threads(recipe, models.student, device, threads.get(recipe.student, 0)).threads
                if recipe.student not in threads and not base.threads:  # once a student: its runs are then alike to the last bit
                    threads[recipe.student] = settled
                    run_dir.write_text(threads_file, json.dumps(threads) + "\n")
                if not checkpoint.is_sound(student, made):
                    material = prepare(models, folder, store_side(models.recipe.image_size, models.recipe.teacher_size), work, device)
                    facts = _train(models, material, bank, work, device)
                    checkpoint.save(student, models.student.backbone.state_dict(), made, arm=arm.name, seed=seed, **facts)
                tensors, found = checkpoint.load(student)
                models.student.backbone.load_state_dict(tensors)
                scores, right = judge(models.student, labelled(models), device)
                found |= scores | {"digest": embed.weights_digest(models.student)}
                checkpoint.save(judged, right, of_figures, **{key: value for key, value in found.items() if key != "made_of"})
            right, found = checkpoint.load(judged)
            results.append({**found, "tensors": right})
    table = summarise(results, [arm.name for arm in arms], base, test)
    table["references"] = _references(base, bank, tested, out, labelled, device)
    write(table, out)
    return table


def _references(
    base: Recipe, bank: Folder, test: Folder | None, out: Path, labelled: Callable[[Models], Labelled], device: torch.device
) -> list[dict[str, Any]]:
    """What the students are to be read against: the teacher, and a student with the random weights of seed 0."""
    recipe = base.model_copy(update={"student_weights": "random", "seed": 0})
    made = made_of(
        "figures",
        settings=deciding(recipe),
        weights=_weights(recipe),
        program=_program(device),
        bank=bank.fingerprint(),
        test=test.fingerprint() if test else "",
    )
    found = []
    for name in ("teacher", "random"):
        file = out / "runs" / f"{name}.reference.safetensors"
        if not checkpoint.is_sound(file, made):
            models = build_models(recipe)
            scores, right = judge(models.teacher if name == "teacher" else models.student, labelled(models), device)
            checkpoint.save(file, right, made, name=f"{name} weights" if name == "random" else name, **scores)
        found.append({field: value for field, value in checkpoint.load(file)[1].items() if field != "made_of"})
    return found


def _made_of(recipe: Recipe, folder: Folder, device: torch.device) -> MadeOf:
    """What an arm's student is made from; all students of a table are of one version of the program and of what it stands on."""
    return made_of(
        "arm",
        settings=deciding(recipe),
        weights=_weights(recipe),
        images=folder.fingerprint(),
        training=FORMATS["training"],
        program=_program(device),
    )


def _weights(recipe: Recipe) -> dict[str, str]:
    """Digests of the weights files of a recipe: a file's name does not tell what is in it."""
    sources = {"teacher_weights": recipe.teacher_weights, "student_weights": recipe.student_weights}
    return {role: word if word in WORDS else file_digest(Path(word)) for role, word in sources.items()}


def _program(device: torch.device) -> dict[str, str]:
    return {"torch": torch.__version__, "timm": timm.__version__, "device": device.type}


def _file_name(arm: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "=._" else "+" for letter in arm)


def _open(out: Path, base: Recipe, overwrite: bool) -> Path:
    run_dir.refuse_taken(out, may_hold_files=True)
    marker = out / "compare.json"
    if out.is_dir() and any(out.iterdir()) and not marker.is_file():
        raise BingoError(f"--out: {out} holds something else than a comparison; name another folder")
    (out / "work").mkdir(parents=True, exist_ok=True)
    run_dir.hold(out, "--out")
    if overwrite:
        for path in (out / "runs").glob("*"):
            path.unlink()
        checkpoint.forget(_state(out / "work"))
    (out / "runs").mkdir(exist_ok=True)
    run_dir.write_text(marker, json.dumps({"base": base.model_dump()}, indent=2) + "\n")
    return out / "work"


def _state(work: Path) -> Path:
    """Of the arm that is being trained: the loop refuses another's."""
    return work / "checkpoint.safetensors"


def _labelled(bank: Folder, test: Folder | None, teacher: Encoder, device: torch.device) -> Labelled:
    classes = images.labels_of(bank)[0]
    features, labels, kept = {}, {}, {}
    for role, folder in {"bank": bank, "test": test}.items():
        if folder:
            found, labels[role], good = figures.embedded(
                {"teacher": embed.as_embed(teacher, device)}, folder, classes, f"teacher, {role} images"
            )
            features[role] = found["teacher"]
            kept[role] = folder.only(good)
    return Labelled(kept["bank"], kept.get("test"), labels["bank"], labels.get("test", labels["bank"]), len(classes), features)


def _train(models: Models, material: Material, bank: Folder, work: Path, device: torch.device) -> dict[str, Any]:
    """Distil one arm with one seed; says what it took."""
    recipe, loss = models.recipe, loss_of(models.recipe)
    bags = make_bags(recipe, models.teacher, material, device)
    saved, metrics = _state(work), work / "metrics.jsonl"
    began = time.monotonic()
    train(models, material, bags, metrics, saved, device, discard=True)
    seconds = time.monotonic() - began
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    checkpoint.forget(saved)
    planned = plan(recipe, len(material.training))
    passes = planned.steps * planned.batch_size
    stored = len(material.store) * (1 + (0 if recipe.views == "online" else int(recipe.views)))
    online = passes * (2 if loss.both else 1) if recipe.views == "online" else 0
    labels = _labels_of_training(material, bank)
    return {
        "student": recipe.student,
        "method": recipe.method,
        "epochs": recipe.epochs,
        "student_passes": passes * planned.student_views,
        "average_passes": passes * {"": 0, "views": 2, "fresh": 1}[loss.momentum],
        "teacher_passes": stored + online if loss.teacher else 0,
        "train_seconds": seconds,
        "memory_mb": _memory_mb(device),
        "bags": bag_facts(recipe, bags, material, labels),
        "checks": [[line["epoch"] + 1, line["neighbour_recall"]] for line in lines if line.get("neighbour_recall") is not None],
    }


def judge(student: Encoder, judged: Labelled, device: torch.device) -> tuple[dict[str, float], dict[str, Tensor]]:
    """kNN, linear and neighbour recall of a student, and per test image whether kNN and linear were right (uint8)."""
    student.eval()
    model = {"student": embed.as_embed(student, device)}
    bank = embed.plain(model, judged.bank, range(len(judged.bank.files)), "embed labelled images")[0]["student"]
    right: dict[str, Tensor] = {}
    if judged.test is not None:
        queries = embed.plain(model, judged.test, range(len(judged.test.files)), "embed test images")[0]["student"]
        parts = [(torch.arange(len(bank)), bank, queries, torch.arange(len(queries)))]
        recall = probes.neighbour_recall((judged.teacher["test"], judged.teacher["bank"]), (queries, bank))
    else:
        parts = []
        recalls = []
        fold = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0)) % FOLDS
        for number in range(FOLDS):
            inside, outside = (fold != number).nonzero()[:, 0], (fold == number).nonzero()[:, 0]
            parts.append((inside, bank[inside], bank[outside], outside))
            seen = judged.teacher["bank"]
            recalls.append(probes.neighbour_recall((seen[outside], seen[inside]), (bank[outside], bank[inside])))
        recall = statistics.fmean(recalls)
    for name in ("knn", "linear"):
        right[name] = torch.zeros(len(judged.test_labels), dtype=torch.uint8)
    for inside, rows, queries, places in parts:
        labels = judged.labels[inside]
        predicted = {
            "knn": probes.knn_predict(rows, labels, queries, judged.classes),
            "linear": probes.fit_linear(rows, labels, judged.classes).predict(queries),
        }
        for name, guess in predicted.items():
            right[name][places] = (guess == judged.test_labels[places]).to(torch.uint8)
    return {name: float(values.double().mean()) for name, values in right.items()} | {"neighbour_recall": recall}, right


def _labels_of_training(material: Material, bank: Folder) -> Tensor | None:
    """Labels (n,) of the training images that are also in --labels, -1 for others; None where hardly any is."""
    known = images.labels_by_path(bank)
    labels = torch.tensor([known.get(material.folder.path(index).resolve(), -1) for index in material.training.tolist()])
    return labels if int((labels >= 0).sum()) > 1 else None


def _memory_mb(device: torch.device) -> float:
    """The most memory so far: of the GPU, else of this process (which has also run the arms before)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def summarise(results: list[dict[str, Any]], arms: list[str], base: Recipe, test: Path | None) -> dict[str, Any]:
    """Mean and spread (standard deviation over seeds) of every arm; its paired difference from the first arm; recall's rank correlation with labels."""
    rows = []
    first = [run for run in results if run["arm"] == arms[0]]
    for arm in arms:
        runs = [run for run in results if run["arm"] == arm]
        row: dict[str, Any] = {
            "name": arm,
            "seeds": [run["seed"] for run in runs],
            "student": runs[0]["student"],
            "epochs": runs[0]["epochs"],
        }
        for figure in FIGURES:
            row[figure], row[f"{figure}_spread"] = evidence.mean_and_spread([run[figure] for run in runs])
        for count in ("student_passes", "average_passes", "teacher_passes"):
            row[count] = runs[0][count]
        row["train_seconds"] = statistics.fmean(run["train_seconds"] for run in runs)
        row["memory_mb"] = max(run["memory_mb"] for run in runs)
        row["bags"] = runs[0]["bags"]
        for figure in ("knn", "linear"):
            # Per test image, the share of seeds that were right: the pairing is over images, which both arms share.
            mine, theirs = (torch.stack([run["tensors"][figure].double() for run in part]).mean(0) for part in (runs, first))
            row[f"{figure}_minus_first"] = float((mine - theirs).mean())
            row[f"{figure}_minus_first_interval"] = list(evidence.mean_interval(mine - theirs))
        rows.append(row)
    ranks = {
        figure: evidence.spearman([run["neighbour_recall"] for run in results], [run[figure] for run in results])
        for figure in ("knn", "linear")
    }
    return {
        "protocol": {
            "knn": f"weighted vote exp(cos/{probes.KNN_TEMPERATURE}), k = {probes.KNN_K} (DINO), plain view",
            "linear": "logistic regression on frozen standardised features, strength chosen inside the bank",
            "queries": f"all images of {test}" if test else f"every labelled image once, {FOLDS}-fold cross-validated",
            "spread": "standard deviation over seeds (student's weights, order, augmentation and mates; teacher views and split are shared)",
            "minus_first": "mean over test images of the difference from the first arm, 95% bootstrap over images",
            "student_passes": "views through the student, forward and backward",
            "memory_mb": "highest so far in this process: it also holds the arms before",
        },
        "settings": base.model_dump(),
        "rank_correlation_of_recall": {
            **{name: None if math.isnan(value) else value for name, value in ranks.items()},
            "runs": len(results),
        },
        "rows": rows,
        "runs": [{key: value for key, value in run.items() if key not in ("tensors", "key")} for run in results],
    }


def same_students(runs: list[dict[str, Any]]) -> list[str]:
    """A line for each set of runs that ended with the very same weights: what tells them apart changed nothing."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for run in runs:
        alike[run["digest"]].append(f"{run['arm']} (seed {run['seed']})")
    return [
        f"the very same student, so what differs in the settings changed nothing: {', '.join(names)}"
        for names in alike.values()
        if names[1:]
    ]


def write(table: dict[str, Any], out: Path) -> None:
    """table.json, table.csv, table.txt and table.svg, and the table on screen."""
    rows = table["rows"]
    run_dir.write_text(out / "table.json", json.dumps(table, indent=2) + "\n")
    buffer = io.StringIO()
    flat = [{key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows]
    writer = csv.DictWriter(buffer, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in flat)
    run_dir.write_text(out / "table.csv", buffer.getvalue())
    quality = [("", *TITLES.values(), "kNN - first", "linear - first")]
    cost = [("", "epochs", "student passes", "teacher passes", "own average's", "time", "memory", "mates", "purity")]
    for row in rows:
        means = [f"{row[figure]:.3f} ± {row[f'{figure}_spread']:.3f}" for figure in FIGURES]
        differences = [
            "-"
            if row is rows[0]
            else "{:+.3f} [{:+.3f}, {:+.3f}]".format(row[f"{figure}_minus_first"], *row[f"{figure}_minus_first_interval"])
            for figure in ("knn", "linear")
        ]
        quality.append((row["name"], *means, *differences))
        passes = [f"{row[name]:,}" for name in ("epochs", "student_passes", "teacher_passes", "average_passes")]
        bags = [f"{row['bags'][name]:.{digits}f}" if name in row["bags"] else "-" for name, digits in (("size_mean", 1), ("purity", 2))]
        cost.append((row["name"], *passes, screen.duration(row["train_seconds"]), f"{row['memory_mb']:,.0f} MB", *bags))
    for reference in table["references"]:
        quality.append((str(reference["name"]), *(f"{reference[figure]:.3f}" for figure in FIGURES), "-", "-"))
    ranks = table["rank_correlation_of_recall"]
    correlation = "not defined" if ranks["linear"] is None else f"{ranks['linear']:.2f}"
    closing = f"recall@{probes.RECALL_K} against linear over {ranks['runs']} runs: rank correlation {correlation}"
    closing = "\n".join([closing, *same_students(table["runs"])])
    text = "\n\n".join(screen.table_text(part[0], part[1:]) for part in (quality, cost))
    run_dir.write_text(out / "table.txt", f"{text}\n\n{closing}\n")
    run_dir.write_text(out / "table.svg", chart.dots(rows, FIGURES, TITLES))
    for title, part in (("mean ± spread over seeds", quality), ("cost of one seed", cost)):
        screen.table(title, part[0], part[1:])
    screen.say(closing)
    screen.say(f"the tables: {out / 'table.txt'}, .json, .csv, .svg")
