"""Near-copies against scenes that were made: found whatever the teacher mistakes for them, and nothing else; bags whose
mates are other scenes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, digests_of, photos, unit
from PIL import Image
from torch import Tensor

from bingo_compress.data import listing, pixel_store
from bingo_compress.data.image_list import ImageList
from bingo_compress.features import bagging, extract, near_copies, neighbours
from bingo_compress.features.near_copies import REACH, SIDE, Limits, Photos
from bingo_compress.features.teacher_pass import TeacherPass
from bingo_compress.models.encoder import Encoder

ANY = Limits(-1.0, 0.7)  # whatever the features say


def scene(number: int) -> np.ndarray:
    """float (SIDE + 8, SIDE + 8, 3): large shapes that all scenes share, and creases of its own."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[: SIDE + 8, : SIDE + 8] / SIDE
    shared = 120 + 60 * np.sin(3 * x) * np.cos(2 * y)
    fine = np.asarray(
        Image.fromarray(random.integers(0, 255, (18, 18, 3), dtype=np.uint8)).resize((SIDE + 8, SIDE + 8)), float
    )
    return shared[..., None] + 0.25 * (fine - 127)


def frame(number: int, of: int) -> np.ndarray:
    """uint8 (SIDE, SIDE, 3): frame `of` of a scene, shifted, lighter or darker, with noise."""
    random = np.random.default_rng([number, of])
    left, top = random.integers(0, 5, 2)
    moved = scene(number)[top : top + SIDE, left : left + SIDE] * random.uniform(0.8, 1.2)
    return (moved + random.normal(0, 4, moved.shape)).clip(0, 255).astype(np.uint8)


def bursts(scenes: int, frames: int) -> Tensor:
    return torch.from_numpy(np.stack([frame(number, of) for number in range(scenes) for of in range(frames)]))


def of_pictures(pictures: Tensor, names: Sequence[str | None] = ()) -> Photos:
    """Photos whose features say nothing."""
    count = len(pictures)
    grey = pictures.permute(0, 3, 1, 2).float()
    return Photos(unit(count, 8), digests_of(names or map(str, range(count))), lambda images: grey[images])


def test_correlation_is_that_of_the_best_shift() -> None:
    one, other = torch.rand(3, 3, SIDE, SIDE), torch.rand(3, 3, SIDE, SIDE)
    other[0, :, 3:, 2:] = one[0, :, :-3, :-2]
    best = np.full(3, -1.0)
    inner = slice(REACH, SIDE - REACH)
    for pair in range(3):
        template = one[pair, :, inner, inner].double().numpy()
        template = template - template.mean((1, 2), keepdims=True)
        for down in range(2 * REACH + 1):
            for across in range(2 * REACH + 1):
                window = other[pair, :, down : down + SIDE - 2 * REACH, across : across + SIDE - 2 * REACH]
                rows = window.double().numpy()
                rows = rows - rows.mean((1, 2), keepdims=True)
                cosine = (template * rows).sum() / np.sqrt((template**2).sum() * (rows**2).sum())
                best[pair] = max(best[pair], cosine)
    assert near_copies.correlation(one, other).numpy() == pytest.approx(best, abs=1e-4)
    assert best[0] == pytest.approx(1) and best[1:].max() < 0.2


def test_frames_of_a_scene_are_found_and_lookalikes_are_not() -> None:
    found = near_copies.find(of_pictures(bursts(3, 5)), ANY)
    assert found.tolist() == [5 * number for number in range(3) for _ in range(5)]
    assert near_copies.groups(found) == [list(range(5 * number, 5 * number + 5)) for number in range(3)]


def test_what_the_teacher_tells_apart_is_not_looked_at() -> None:
    photos = of_pictures(bursts(1, 2))
    apart = Photos(torch.eye(2), photos.digests, photos.look)
    assert near_copies.find(apart, Limits(0.5, 0.7)).tolist() == [0, 1]
    assert near_copies.find(apart, Limits(0.0, 0.7)).tolist() == [0, 0]


def test_images_of_their_own_are_each_a_scene() -> None:
    assert near_copies.find(of_pictures(bursts(8, 1)), ANY).tolist() == list(range(8))
    assert near_copies.find(of_pictures(bursts(1, 1)), ANY).tolist() == [0]
    assert near_copies.describe(torch.arange(8), [str(number) for number in range(8)]) == ""


def test_the_first_and_the_last_frame_of_a_video_are_one_scene() -> None:
    wide = np.random.default_rng(0).integers(0, 255, (SIDE // 4, SIDE, 3), dtype=np.uint8)
    whole = np.asarray(Image.fromarray(wide).resize((4 * SIDE, SIDE)))
    video = torch.from_numpy(np.stack([whole[:, step : step + SIDE] for step in range(0, 60, 3)]))
    rows = torch.stack([torch.tensor([np.cos(angle), np.sin(angle)]) for angle in np.linspace(0, 1, len(video))])
    told = Photos(rows.float(), of_pictures(video).digests, of_pictures(video).look)
    assert near_copies.find(told, ANY).tolist() == [0] * len(video)


def test_exact_copies_are_one_scene_and_unreadable_files_are_not() -> None:
    names = ["a", "b", "a", None, None]
    assert near_copies.find(of_pictures(bursts(5, 1), names), ANY).tolist() == [0, 1, 0, 3, 4]


def test_folder_and_store_show_the_same_scenes(tmp_path: Path, teacher: Encoder) -> None:
    for number, picture in enumerate(bursts(4, 3).numpy()):
        Image.fromarray(picture).save(tmp_path / f"{number:02d}.png")
    folder = listing.list_images(tmp_path)
    (tmp_path / "work").mkdir()
    store = pixel_store.build(folder, SIDE, tmp_path / "work", CPU)[0]
    rows = unit(12, 8)
    told = [photos.look(torch.arange(12)) for photos in (near_copies.of_folder(rows, folder),)]
    told.append(near_copies.of_store(rows, folder, store).look(torch.arange(12)))
    assert torch.equal(*told)
    model = extract.as_embed(teacher, CPU)
    parts = [(rows[:6], folder.only(range(6))), (rows[6:], folder.only(range(6, 12)))]
    limits = near_copies.fit(model, folder)
    whole = near_copies.find(near_copies.of_folder(rows, folder), Limits(-1, limits.alike))
    assert whole.tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]
    joined = near_copies.find(
        near_copies._joined_photos(*(near_copies.of_folder(*part) for part in parts)), Limits(-1, limits.alike)
    )
    assert torch.equal(joined, whole)


def test_limits_are_the_folders_own_and_the_same_each_time(tmp_path: Path, teacher: Encoder) -> None:
    for number, picture in enumerate(bursts(12, 1).numpy()):
        Image.fromarray(picture).save(tmp_path / f"{number:02d}.png")
    model, folder = extract.as_embed(teacher, CPU), listing.list_images(tmp_path)
    limits = near_copies.fit(model, folder)
    assert limits == near_copies.fit(model, folder) != near_copies.fit(model, folder, seed=1)
    assert near_copies.LEAST <= limits.alike < 1


def test_parts_on_one_fixture_are_not_called_near_copies(tmp_path: Path, teacher: Encoder) -> None:
    fixture = scene(0)[:SIDE, :SIDE]
    for number in range(12):
        own = 2 * np.random.default_rng(number).normal(0, 1, (SIDE, SIDE, 3))
        Image.fromarray((fixture + own).clip(0, 255).astype(np.uint8)).save(tmp_path / f"{number:02d}.png")
    folder, model = listing.list_images(tmp_path), extract.as_embed(teacher, CPU)
    limits = near_copies.fit(model, folder)
    photos = near_copies.of_folder(unit(12, 8), folder)
    assert near_copies.find(photos, limits).tolist() == list(range(12))
    assert len(near_copies.find(photos, Limits(-1, 0.8)).unique()) == 1


def test_scenes_of_some_images_are_named_by_the_first_of_them() -> None:
    scenes = torch.tensor([0, 0, 2, 0, 2, 5])
    assert near_copies.within(scenes, torch.tensor([1, 2, 3, 4, 5])).tolist() == [0, 1, 0, 1, 4]
    assert near_copies.within(torch.arange(6), torch.tensor([1, 3, 5])).tolist() == [0, 1, 2]


def test_a_label_of_one_scene_is_parted_by_exact_copies() -> None:
    scenes, labels = torch.tensor([0, 0, 0, 3, 3, 5]), torch.tensor([0, 0, 0, 1, 1, 1])
    groups, whole = near_copies.parted(scenes, labels, torch.tensor([0, 0, 1, 2, 3, 4]))
    assert whole == [0]
    assert groups[0] == groups[1] != groups[2] and len(groups.unique()) == 4 and groups[3] == groups[4]


@pytest.mark.parametrize("how", ["knn", "adaptive", "kmeans", "labels"])
def test_mates_are_of_other_scenes(how: str) -> None:
    scene_of = torch.arange(24) // 4 * 4
    images = ImageList(Path(), tuple(f"{number // 12}/{number}.jpg" for number in range(24)), ())
    rows = torch.nn.functional.normalize(unit(6, 16)[torch.arange(24) // 4] + 0.05 * unit(24, 16, seed=1), dim=1)

    taught = TeacherPass(rows, rows, torch.empty(24, 0, 16), "")

    def make(firsts: Tensor) -> Tensor:
        return bagging.BAGGERS[how](bagging.Seen(taught, images, firsts, 2, seed=0), 3)

    alone = bagging.knn(rows, 3)[0]
    assert (scene_of[alone] == scene_of[:, None]).all()  # what was found before: a burst fills its own bags
    bags = bagging.over_scenes(make, scene_of)
    assert bags.shape == (24, 3) and (bags >= 0).any()
    for image, bag in enumerate(bags.tolist()):
        others = [int(scene_of[mate]) for mate in bag if mate >= 0]
        assert int(scene_of[image]) not in others and len(set(others)) == len(others)
    share = bagging.report(bags, rows, scenes=scene_of).get("mutual", 0.0)
    assert share == pytest.approx(bagging.report(make(torch.arange(0, 24, 4)), rows[::4]).get("mutual", 0.0))
    shown = bags[bags >= 0]
    assert len(shown.unique()) > len(scene_of.unique())  # not always the scene's first image


def test_bags_without_near_copies_are_as_they_were() -> None:
    rows = unit(30, 16)
    made = bagging.over_scenes(lambda firsts: bagging.knn(rows[firsts], 4)[0], torch.arange(30))
    assert torch.equal(made, bagging.knn(rows, 4)[0])
    assert bagging.over_scenes(lambda firsts: bagging.knn(rows[firsts], 4)[0], torch.zeros(30, dtype=int)).numel() == 0


def test_a_look_that_finds_nothing_says_so(
    tmp_path: Path, teacher: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = listing.list_images(photos(tmp_path, 1))
    assert near_copies.said(extract.as_embed(teacher, CPU), folder) == []
    assert "no near-copies" in capsys.readouterr().out


def test_pairs_in_parts_are_those_of_the_whole_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As they were listed when neighbours and similarities were held whole."""
    count, least = 200, 0.2
    photos = Photos(unit(count, 6), digests_of(map(str, range(count))), lambda images: torch.empty(0))
    asked: list[list[int]] = []
    monkeypatch.setattr(near_copies, "PAIRS", 10**6)
    monkeypatch.setattr(near_copies, "ROWS", 3)
    alike = lambda pairs: (pairs.sum(0) % 7 == 0) & (pairs[1] - pairs[0] < 9)  # noqa: E731
    monkeypatch.setattr(
        near_copies, "_are_copies", lambda look, pairs, _: (asked.extend(pairs.tolist()), alike(pairs))[1]
    )
    found = near_copies.find(photos, Limits(least, 0.7))
    indices, similar = neighbours.mates(photos.features, near_copies.NEIGHBOURS, neighbours.IN_MEMORY)
    scenes, wanted = torch.arange(count), []
    for images in torch.arange(count).chunk(near_copies.ROUNDS):
        first, place = (similar[images] >= least).nonzero(as_tuple=True)
        image, other = images[first], indices[images][first, place]
        before = ((indices[other] == image[:, None]) & (similar[other] >= least)).any(1) & (other < images[0])
        pairs = torch.stack((image, other))[:, ~before & (scenes[image] != scenes[other])]
        pairs = pairs.sort(dim=0).values.unique(dim=1)
        wanted.extend(pairs.tolist())
        scenes = near_copies._joined(scenes, pairs[:, alike(pairs)])
    assert asked == wanted and len(scenes.unique()) < count
    assert found.tolist() == scenes.tolist()

    # The neighbours of a folder of more than a block are in files.
    asked.clear()
    monkeypatch.setattr(neighbours, "BLOCK", 64)
    search = neighbours.Search("exact", CPU, tmp_path)
    assert torch.equal(near_copies.find(photos, Limits(least, 0.7), search), found) and asked == wanted
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}  # the table of them is gone
