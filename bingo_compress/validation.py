"""The proof of a finished run: teacher, student, its start, random weights and the exported file, on a folder of labelled images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bingo_compress import embed, images, probes, run_dir, screen
from bingo_compress.encoder import build
from bingo_compress.errors import BingoError
from bingo_compress.exporters.onnx import onnx_runner
from bingo_compress.pipeline import Models, build_student, choose_device, closing_table, load_student, saved_recipe

TEST_SHARE = 0.25
LEAST_GAP = 0.05
NAMES = {
    "teacher": "teacher",
    "student": "student (distilled)",
    "start": "student before",
    "random": "student, random weights",
    "onnx": "exported ONNX file",
}


def validate(run_path: Path, data: Path, test: Path | None = None, json_file: Path | None = None, device: str = "auto") -> dict[str, Any]:
    """Probe every model of a run. data: the labelled bank; test: labelled queries, or None to set a quarter of each class of `data` aside.

    Returns and, with json_file, writes {"protocol": ..., "rows": ...}. Saves linear.npz and bank.npz for the edge kit. Raises BingoError.
    """
    run = run_dir.open_finished(run_path)
    recipe = saved_recipe(run)
    bank_folder = images.list_folder(data)
    classes, _ = images.labels_of(bank_folder)
    test_folder = images.list_folder(test, "--test") if test else None
    if test_folder:
        _same_classes(classes, images.labels_of(test_folder)[0])
    where = choose_device(device)
    torch.manual_seed(embed.hash_seed(recipe.seed, "teacher"))
    teacher = build(recipe.teacher, recipe.teacher_size, recipe.teacher_weights, "--teacher-weights")
    student = load_student(recipe, run.student)
    start = load_student(recipe, run.start) if run.start.exists() else None
    models = {"teacher": embed.as_embed(teacher, where), "student": embed.as_embed(student, where)}
    if start is not None:
        models["start"] = embed.as_embed(start, where)
    models["random"] = embed.as_embed(build_student(recipe, "random", "random row"), where)
    onnx_file = run.export / "student.onnx"
    if onnx_file.exists():
        session = onnx_runner(onnx_file)
        models["onnx"] = (student.preprocessing, lambda batch: session(batch)[1])

    bank, bank_labels, paths = _embedded(models, bank_folder, classes, "embed labelled images")
    if test_folder:
        queries, query_labels, _ = _embedded(models, test_folder, classes, "embed test images")
    else:
        chosen = _quarter(bank_labels)
        queries, query_labels = {name: rows[chosen] for name, rows in bank.items()}, bank_labels[chosen]
        bank, bank_labels = {name: rows[~chosen] for name, rows in bank.items()}, bank_labels[~chosen]
        paths = [path for path, taken in zip(paths, chosen.tolist(), strict=True) if not taken]

    rows = []
    heads: dict[str, probes.LinearHead] = {}
    for name in models:
        # The file is judged with the student's own head, as the device will run it: a head fitted anew may end elsewhere.
        heads[name] = heads["student"] if name == "onnx" else probes.fit_linear(bank[name], bank_labels, len(classes))
        rows.append({"name": name, **_scores(bank[name], bank_labels, queries[name], query_labels, heads[name], len(classes))})
        rows[-1]["neighbour_recall"] = probes.neighbour_recall((queries["teacher"], bank["teacher"]), (queries[name], bank[name]))
    result = {"protocol": _protocol(bank_folder, test_folder, len(bank_labels), len(query_labels), classes), "rows": rows}
    deployed = "onnx" if "onnx" in models else "student"
    save_heads(run.export, heads[deployed], bank[deployed], bank_labels, classes, paths)
    if json_file:
        run_dir.write_text(json_file, json.dumps(result, indent=2) + "\n")
    _show(result, run, Models(recipe, teacher, student))
    return result


def _same_classes(known: list[str], found: list[str]) -> None:
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise BingoError(f"--test: expected the classes of --data ({', '.join(known[:10])}), found others: {', '.join(unknown[:10])}")


def _embedded(models: dict[str, Any], folder: images.Folder, classes: list[str], what: str) -> tuple[dict[str, Tensor], Tensor, list[str]]:
    features, good = embed.plain(models, folder, range(len(folder.files)), what)
    if len(good) < len(folder.files) or folder.bad:
        screen.say(
            f"{len(folder.files) - len(good) + len(folder.bad):,} files in {folder.root} cannot be used and are left out; `bingo-compress check` names them"
        )
    names, labels = images.labels_of(folder)
    return features, torch.tensor([classes.index(names[labels[index]]) for index in good]), [folder.files[index] for index in good]


def _quarter(labels: Tensor) -> Tensor:
    """A quarter of each class, at random but always the same, as the test set. Returns bool (N,). Raises BingoError for a class of one."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        if len(rows) < 2:
            raise BingoError("--data: expected at least two images in every class, so that one can be tested on; add images or give --test")
        take = max(1, int(len(rows) * TEST_SHARE))
        chosen[rows[torch.randperm(len(rows), generator=generator)[:take]]] = True
    return chosen


def _scores(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, head: probes.LinearHead, classes: int) -> dict[str, float]:
    predicted = head.predict(queries)
    scores = {
        "knn": probes.accuracy(probes.knn_predict(bank, bank_labels, queries, classes), labels),
        "linear": probes.accuracy(predicted, labels),
        "linear_balanced": probes.balanced_accuracy(predicted, labels),
    }
    if classes == 2:
        scores["linear_auc"] = probes.auc(head.scores(queries)[:, 0], labels == 0)
    return scores


def _protocol(bank: images.Folder, test: images.Folder | None, bank_count: int, query_count: int, classes: list[str]) -> dict[str, Any]:
    return {
        "knn": f"weighted vote exp(cos/{probes.KNN_TEMPERATURE}), k = {probes.KNN_K} (DINO), plain view",
        "linear": "logistic regression (L-BFGS) on frozen standardised features; L2 strength chosen on a fifth of the bank held out, never on the test set; refitted on the whole bank",
        "neighbour_recall": f"share of the teacher's {probes.RECALL_K} nearest bank images of each test image that are also the model's; no labels used",
        "onnx": "the student's linear head on the features that the exported file gives",
        "linear_balanced": "mean over classes of the linear probe's recall",
        "bank": str(bank.root),
        "test": str(test.root) if test else f"a quarter of each class of {bank.root}, set aside",
        "bank_images": bank_count,
        "test_images": query_count,
        "classes": classes,
    }


def save_heads(folder: Path, head: probes.LinearHead, bank: Tensor, labels: Tensor, classes: list[str], paths: list[str]) -> None:
    """linear.npz and bank.npz beside the ONNX file, for `bingo-edge classify`: arrays only, no pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.array(classes)
    contents = {
        "linear.npz": {"weight": head.weight.numpy(), "bias": head.bias.numpy(), "classes": names},
        "bank.npz": {
            "embeddings": probes.normalised(bank).half().numpy(),
            "labels": labels.int().numpy(),
            "classes": names,
            "paths": np.array([path.encode("utf-8", "backslashreplace").decode() for path in paths]),
            "k": np.array(probes.KNN_K),
            "temperature": np.array(probes.KNN_TEMPERATURE),
        },
    }
    for file, arrays in contents.items():
        with run_dir.atomic(folder / file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]


def _show(result: dict[str, Any], run: run_dir.RunDir, models: Models) -> None:
    protocol = result["protocol"]
    header = ["", "kNN", "linear", "balanced", *(["AUC"] if "linear_auc" in result["rows"][0] else []), f"recall@{probes.RECALL_K}"]
    cells = []
    for row in result["rows"]:
        figures = [
            row["knn"],
            row["linear"],
            row["linear_balanced"],
            *([row["linear_auc"]] if "linear_auc" in row else []),
            row["neighbour_recall"],
        ]
        cells.append((NAMES[row["name"]], *(f"{value:.3f}" for value in figures)))
    screen.table(
        f"{protocol['test_images']:,} test images, bank of {protocol['bank_images']:,}, {len(protocol['classes'])} classes", header, cells
    )
    closing_table(models, {row["name"]: row for row in result["rows"]})
    values = {row["name"]: row["linear"] for row in result["rows"]}
    gap = f"between random weights ({values['random']:.3f}) and the teacher ({values['teacher']:.3f})"
    if values["teacher"] - values["random"] < LEAST_GAP:
        screen.say(f"linear probe: there is hardly a gap {gap}; these labels do not tell good features from bad")
    else:
        screen.say(
            f"linear probe: the student closed {probes.gap_closed(values['random'], values['student'], values['teacher']):.0%} of the gap {gap}"
        )
    if "onnx" not in values:
        screen.say(f"no exported file yet. next: bingo-compress export --run {run.path}")
    else:
        screen.say(f"next: bingo-edge classify {run.export / 'student.onnx'} --head {run.export / 'linear.npz'} PHOTOS")
