"""An int8 file is chosen by some images and reported on others, and is trained on none of them."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from edge_models import make_model
from helpers import digests_of, encoder, photos, recipe, untrained_run

from bingo_compress import exporting
from bingo_compress.data import image_list, listing, pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.exporters.onnx import PROFILES, REFUSED, Gate, Making
from bingo_compress.exporting import Int8
from bingo_compress.features import extract, near_copies
from bingo_compress.int8 import gate, int8_file, quantization_aware
from bingo_compress.int8.ladder import LadderEnds, Rung
from bingo_compress.models.encoder import Preprocessing

SEEN = Preprocessing(8, 0.875, "bicubic", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
GALLERY = torch.randint(0, 256, (40, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def contents(*folders: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for folder in folders for path in folder.rglob("*.png")}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Its features are a picture's mean colour."""
    return Path(make_model(tmp_path / "student.onnx"))


# ---------------------------------------------------------------- which images


def test_the_part_to_choose_by_is_of_each_class_and_copies_are_on_one_side() -> None:
    labels = torch.tensor([0] * 12 + [1] * 8 + [2] * 2)
    names = [*(f"a{number // 3}" for number in range(12)), *(f"b{number}" for number in range(7)), "a0", "c0", "c1"]
    groups = near_copies.same_bytes(digests_of(names))
    chosen = gate._part(labels, groups)
    assert {names[row] for row in chosen.nonzero()[:, 0].tolist()}.isdisjoint(
        names[row] for row in (~chosen).nonzero()[:, 0].tolist()
    )
    for label, least in ((0, 1), (1, 2), (2, 1)):
        of_class = {names[row] for row in (chosen & (labels == label)).nonzero()[:, 0].tolist()} - (
            {"a0"} if label else set()
        )
        assert len(of_class) == least
    assert torch.equal(chosen, gate._part(labels, groups))


def test_choosing_looks_at_labels_alone_and_reporting_at_test_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, test = photos(tmp_path / "labels", 8), photos(tmp_path / "test", 4, start=50)
    asked: list[tuple[str, set[str]]] = []
    real = extract.plain

    def recorded(models: Any, folder: image_list.ImageList, order: Any, *rest: Any) -> Any:
        asked.append((folder.root.name, {folder.digests[place] for place in order}))
        return real(models, folder, order, *rest)

    judges = gate.make_gate(model, GALLERY, SEEN, gate.open_labelled(labels, test), 0.5)
    monkeypatch.setattr(extract, "plain", recorded)
    told, missed = judges.choose(model)
    assert missed == [] and [root for root, _ in asked] == ["labels"]
    assert told["knn"]["float"] == told["knn"]["int8"] and len(asked[0][1]) == 6  # a quarter of eight, of three classes
    assert (told["recall_k"], told["recall_chance"]) == (3, 3 / 39)
    reported, missed = judges.report(model)
    assert missed == [] and [root for root, _ in asked] == ["labels", "test"]
    assert asked[1][1] == contents(test) and reported["test_images"] == 12
    assert judges.labelled == asked[0][1] | asked[1][1]


def test_without_a_test_folder_three_parts_of_labels_do_not_meet(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = photos(tmp_path / "labels", 8)
    for number in range(3):  # copies
        shutil.copy(labels / "kind0" / "000.png", labels / "kind0" / f"copy{number}.png")
    parts: list[set[str]] = []
    real = extract.plain

    def recorded(models: Any, folder: image_list.ImageList, order: Any, *rest: Any) -> Any:
        parts.append({folder.digests[place] for place in order})
        return real(models, folder, order, *rest)

    judges = gate.make_gate(model, GALLERY, SEEN, gate.open_labelled(labels, None), 0.5)
    monkeypatch.setattr(extract, "plain", recorded)
    judges.choose(model)
    judges.report(model)
    assert judges.labelled == parts[0] | parts[1] and judges.labelled < contents(labels)
    lonely = photos(tmp_path / "lonely", 2)
    with pytest.raises(BingoError, match="--labels: expected at least three different images in every class"):
        gate.make_gate(model, GALLERY, SEEN, gate.open_labelled(lonely, None), 0.5)


def test_without_labels_there_is_nothing_to_report(model: Path) -> None:
    judges = gate.make_gate(model, GALLERY, SEEN, None, 0.5)
    assert judges.report(model) == ({}, []) and judges.labelled == set()
    assert judges.choose(model)[1] == []


def test_a_chosen_file_below_the_gate_on_the_test_images_is_refused_and_no_further_one_is_tried(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    climbed: list[str] = []
    row = {"rung": "first", "missed": [], "images": 30, "mean_cosine": 1.0, "min_cosine": 1.0, "bytes": 1}
    row |= {"recall": 1.0, "recall_k": 2}

    def quantise(*_: Any) -> Any:
        climbed.append("ladder")
        return model, Rung("first"), [row]

    monkeypatch.setattr(int8_file, "quantise", quantise)
    judges = Gate(lambda file: ({}, []), lambda file: ({}, ["knn accuracy 3.00 points below"]), set())
    making = Making(model, model, GALLERY, PROFILES["modern"], tmp_path, judges, lambda: pytest.fail("trained"))
    with pytest.raises(
        BingoError, match="first passed where it was chosen, but on the test images misses knn accuracy"
    ) as caught:
        int8_file.make(making)
    assert caught.value.exit_status == REFUSED and climbed == ["ladder"]


@pytest.mark.parametrize(
    ("given", "said"),
    [({"labels": "nowhere"}, "--labels"), ({}, "--format all: expected at least 12 images .* found 9")],
)
def test_what_int8_cannot_be_judged_by_is_refused_before_a_float_file_is_written(
    given: dict[str, str], said: str, tmp_path: Path
) -> None:
    run = untrained_run(tmp_path, 3)
    with pytest.raises(BingoError, match=said):
        exporting.export(run.path, fmt="all", int8=Int8(**{key: tmp_path / value for key, value in given.items()}))
    assert not run.export.exists()


# ---------------------------------------------------------------- fine-tuning


def test_what_the_gate_judges_by_is_not_trained_on_nor_are_copies_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(tmp_path / "photos", 6)
    apart = contents(folder / "kind0") | contents(folder / "kind1")
    shutil.copy(folder / "kind0" / "000.png", folder / "kind2" / "copy.png")
    trained: list[image_list.ImageList] = []

    def build(chosen: image_list.ImageList, *_: Any) -> Any:
        trained.append(chosen)
        raise KeyboardInterrupt

    monkeypatch.setattr(pixel_store, "build", build)
    settings, student = recipe(data=str(folder)), encoder("test_efficientnet", 32)
    with pytest.raises(KeyboardInterrupt):
        quantization_aware.finetune(settings, student, listing.list_images(folder), tmp_path, apart)
    assert trained[0].files == tuple(f"kind2/{number:03d}.png" for number in range(6))
    with pytest.raises(BingoError, match=r"--finetune: expected images in .* beside those that int8 is judged by"):
        quantization_aware.finetune(settings, student, listing.list_images(folder), tmp_path, apart | contents(folder))


@pytest.mark.parametrize("labelled", [False, True])
def test_export_keeps_its_gate_and_its_calibration_out_of_fine_tuning(
    labelled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained_run(tmp_path, 12)
    data = tmp_path / "photos"
    float_model = make_model(tmp_path / "float.onnx", size=32)
    used: dict[str, Any] = {}

    def export_float(student: Any, shown: torch.Tensor, target: Path, facts: Any, wanted: Any) -> Path:
        return Path(shutil.copy(float_model, target))

    def ladder(*_: Any) -> Any:
        raise LadderEnds(
            [
                {
                    "rung": "first",
                    "missed": ["x"],
                    "images": 12,
                    "mean_cosine": 0.5,
                    "min_cosine": 0.5,
                    "recall": 0.5,
                    "recall_k": 2,
                    "bytes": 1,
                }
            ]
        )

    def finetune(settings: Any, student: Any, folder: image_list.ImageList, work: Path, apart: set[str]) -> Any:
        used["apart"], used["folder"] = apart, folder
        raise KeyboardInterrupt

    real = gate.make_gate

    def make_gate(file: Path, gallery: torch.Tensor, *rest: Any) -> Gate:
        used["gallery"], used["gate"] = gallery, real(file, gallery, *rest)
        return used["gate"]

    for owner, name, stand_in in (
        (exporting, "_export_float", export_float),
        (exporting, "published", lambda whole, path, wanted, put: Path(shutil.copy(whole, path))),
        (int8_file, "quantise", ladder),
        (quantization_aware, "finetune", finetune),
        (gate, "make_gate", make_gate),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    with pytest.raises(KeyboardInterrupt):
        exporting.export(run.path, fmt="onnx-int8", int8=Int8(data if labelled else None, finetune=True))
    apart = used["apart"]
    judged = {digest for digest in used["folder"].digests if digest in apart}
    assert judged == apart == apart | used["gate"].labelled and len(used["gate"].labelled) == (15 if labelled else 0)
    assert len(used["gallery"]) == 12 and len(apart) >= 18  # six more are calibrated on, of half the folder
    shown = extract.pixels_of(
        encoder("test_efficientnet", 32).preprocessing,
        used["folder"],
        [place for place, digest in enumerate(used["folder"].digests) if digest not in apart],
        36,
    )
    assert not any((picture == other).all() for picture in shown for other in used["gallery"])
