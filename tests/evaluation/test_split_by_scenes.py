"""Frames of one burst stand on one side of every split: in a comparison, at the int8 gate, among images held out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edge_models import make_model
from helpers import CPU, encoder, recipe
from PIL import Image

from bingo_compress.comparison import side_by_side
from bingo_compress.data import listing
from bingo_compress.evaluation import probes
from bingo_compress.features import extract
from bingo_compress.int8 import gate
from bingo_compress.models.encoder import Preprocessing
from bingo_compress.training.material import halves, split
from bingo_compress.training.plan import held_out

FRAMES = 6
HELD = [0, 2, 10, 13, 14, 15]  # of 20 images, at c4c8d66


def clips(root: Path, *counts: int) -> Path:
    """A folder a class, of so many clips of FRAMES all but equal frames each."""
    number = 0
    for label, count in enumerate(counts):
        for _ in range(count):
            base = np.kron(np.random.default_rng(number).integers(0, 255, (8, 8, 3)), np.ones((8, 8, 1)))
            for frame in range(FRAMES):
                noisy = base + np.random.default_rng(frame).normal(0, 2, base.shape)
                file = root / f"kind{label}" / f"clip{number:02d}_{frame}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file)
            number += 1
    return root


def shared(*sides: Any) -> set[str]:
    """The clips that have frames on more than one of these sides, of files' names."""
    named = [{Path(file).name[:6] for file in side} for side in sides]
    return {clip for number, one in enumerate(named) for other in named[number + 1 :] for clip in one & other}


def test_no_clip_is_in_two_folds_of_a_comparison(tmp_path: Path) -> None:
    bank = listing.list_images(clips(tmp_path / "bank", 6, 6))
    judged = side_by_side._labelled(bank, None, encoder("test_resnet", 64), CPU)
    fold = probes.folds(judged.labels, side_by_side.FOLDS, judged.groups)
    assert len(fold.unique()) == side_by_side.FOLDS
    assert shared(*([bank.files[row] for row in (fold == each).nonzero()[:, 0].tolist()] for each in range(5))) == set()


def test_a_comparison_says_which_test_images_have_a_near_copy_in_the_bank(tmp_path: Path, printed: Any) -> None:
    bank = clips(tmp_path / "bank", 3, 3)
    for number in (0, 4):
        file = next(bank.rglob(f"clip{number:02d}_0.png"))
        moved = tmp_path / "test" / file.parent.name / file.name
        moved.parent.mkdir(parents=True)
        file.rename(moved)
    folders = listing.list_images(bank), listing.list_images(tmp_path / "test")
    judged = side_by_side._labelled(*folders, encoder("test_resnet", 64), CPU)
    assert len(judged.groups) == 34 and len(judged.groups.unique()) == 6
    assert "2 of 2 test images (100%) have a near-copy in the bank" in " ".join(printed.getvalue().split())


@pytest.mark.parametrize("counts", [(8, 8), (4, 2), (1, 4)])
def test_no_clip_is_in_two_parts_of_the_gate(
    counts: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(make_model(tmp_path / "student.onnx"))
    labels = clips(tmp_path / "labels", *counts)
    seen = Preprocessing(8, 0.875, "bicubic", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    gallery = torch.randint(0, 256, (12, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    judges = gate.make_gate(model, gallery, seen, gate.open_labelled(labels, None), 0.5)
    parts: list[list[str]] = []
    real = extract.plain

    def recorded(models: Any, folder: Any, order: Any, *rest: Any) -> Any:
        parts.append([folder.files[place] for place in order])
        return real(models, folder, order, *rest)

    monkeypatch.setattr(extract, "plain", recorded)
    judges.choose(model)
    judges.report(model)
    assert len(parts) == 2 and all(parts)
    everything = listing.list_images(labels).files
    bank = sorted(set(everything) - {*parts[0], *parts[1]})
    few = {f"clip{number:02d}" for number, label in enumerate([0] * counts[0] + [1] * counts[1]) if counts[label] < 3}
    assert shared(*parts, bank) <= few  # a class of fewer scenes than parts must stand on more sides than one
    assert {Path(file).parent.name for file in bank} == {"kind0", "kind1"}


def test_held_out_images_share_no_scene_with_those_trained_on_nor_their_halves() -> None:
    scenes = torch.arange(60) // 4 * 4
    scenes[40:] = torch.arange(40, 60)
    chosen = recipe(hold_out=0.3, keep_best=True)
    held, training = split(scenes, chosen)
    assert len(held) == held_out(chosen, 60) and sorted(torch.cat((held, training)).tolist()) == list(range(60))
    assert not set(scenes[held].tolist()) & set(scenes[training].tolist())
    assert (scenes[held].bincount() > 1).any()  # some burst is among them
    choosing, reporting = halves(SimpleNamespace(held=held, scenes=scenes), chosen)  # type: ignore[arg-type]
    assert sorted(torch.cat((choosing, reporting)).tolist()) == held.tolist()
    assert not set(scenes[choosing].tolist()) & set(scenes[reporting].tolist())


def test_without_near_copies_the_images_held_out_and_their_halves_are_as_they_were() -> None:
    chosen = recipe(hold_out=0.3, keep_best=True)
    held, training = split(torch.arange(20), chosen)
    assert held.tolist() == HELD and sorted({*range(20)} - {*HELD}) == training.tolist()
    choosing, reporting = halves(SimpleNamespace(held=held, scenes=torch.arange(20)), chosen)  # type: ignore[arg-type]
    assert (choosing.tolist(), reporting.tolist()) == (HELD[::2], HELD[1::2])


def test_a_folder_of_one_scene_has_none_to_hold_out() -> None:
    held, training = split(torch.zeros(20, dtype=torch.int64), recipe(hold_out=0.3))
    assert held.tolist() == [] and training.tolist() == list(range(20))


def test_where_every_scene_is_larger_than_the_share_the_smallest_is_held_out_whole() -> None:
    scenes = torch.cat((torch.full((5,), 0), torch.full((8,), 5), torch.full((8,), 13)))
    held, training = split(scenes, recipe(hold_out=0.05))
    assert held.tolist() == list(range(5)) and training.tolist() == list(range(5, 21))
