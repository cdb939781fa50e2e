"""What a stage computes, and its number in made_of.FORMATS: the one never changes without the other, or an artefact of
the old code would be read as the new's.

After a change that is meant: raise the stage's number, then `python tests/test_stages.py` records the new outputs in
stages.json.
"""

import io
import json
import math
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import CPU, kind_targets, photos, planned, recipe, unit
from torch import Tensor

from bingo_compress.data import image_list, listing
from bingo_compress.evaluation import probes
from bingo_compress.features import bagging, extract, near_copies, targets, teacher_pass
from bingo_compress.features.memmap import TeacherPass
from bingo_compress.models import trained
from bingo_compress.models.encoder import Encoder
from bingo_compress.runtime import checkpoint
from bingo_compress.runtime.made_of import FORMATS
from bingo_compress.sources import tar
from bingo_compress.sources.listed import stamp_of
from bingo_compress.training import loop
from bingo_compress.training.loader import Lessons
from bingo_compress.training.material import prepare
from bingo_compress.training.plan import plan_run, settle

RECORD = Path(__file__).with_name("stages.json")
COMPOSED = {"student", "start", "arm"}  # the training's state under another name
SHOWN = {"looks", "mistakes"}  # for the page on a run, out of what other stages give: tests/html_report
TOLERANCE = 0.02  # of processors and versions of torch; a change of the code is larger


def indexed(file: Path) -> list[float]:
    """Where the members of a tar file lie; one is there twice, one is a folder, one has a long name."""
    with tarfile.open(file, "w") as archive:
        for name, size in (("a", 5), ("b/" + "c" * 120, 600), ("d/", 0), ("a", 7)):
            member = tarfile.TarInfo(name.rstrip("/"))
            member.size, member.type = size, tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(bytes(size)))
    return [float(number) for _, *place in tar.index_of(file, stamp_of(file)) for number in place]


def by_formula(encoder: Encoder) -> Encoder:
    """Weights that no version of torch or timm draws otherwise."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(encoder.backbone.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (1.37 + number / 50)).view_as(
                parameter
            )
            fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
            parameter.copy_(
                wave * math.sqrt(2 / fan)
                if parameter.ndim > 1
                else 1 + 0.1 * wave
                if name.endswith("weight")
                else 0.1 * wave
            )
    return encoder


def few(tensor: Tensor, count: int = 12) -> list[float]:
    """Some of the numbers, and their mean and spread."""
    flat = tensor.detach().double().flatten()
    return [*flat[:: max(1, len(flat) // count)][:count].tolist(), float(flat.mean()), float(flat.std())]


def told_apart(features: Tensor) -> Tensor:
    """Features (N, D) without what all images share, at the scale of their spread."""
    rows = features.double() - features.double().mean(0)
    return rows / rows.std()


def outputs(folder: Path) -> dict[str, list[float]]:
    """What each stage gives on drawn pictures."""
    found = {}
    settings = settle(recipe(data=str(photos(folder / "photos", 8)), epochs=2, crop_scale_min=0.2))
    models = trained.build_models(settings)
    for encoder in (models.teacher, models.student):
        by_formula(encoder).eval()
    listed = listing.list_images(folder / "photos")
    (folder / "work").mkdir()
    material = prepare(plan_run(models, len(listed.files), CPU), models, listed, folder / "work")
    whole = material.store.crops(
        torch.arange(len(material.store)), torch.tensor([[0.1, 0.2, 0.8, 0.9]]).expand(len(material.store), 4), 16
    )
    found["pixels"] = few(whole.float() / 255)
    seen = material.seen
    found["teacher"] = (
        few(told_apart(seen.features[:]), 24)
        + few(told_apart(seen.embeddings[:]), 24)
        + few(told_apart(seen.views[:].flatten(1)), 24)
    )
    viewing = teacher_pass.Viewing(models.teacher, material.folder, material.store, 0.2, CPU, of_features=False)
    space = targets.target_space(seen.embeddings, "pca", 8)
    packed = teacher_pass.with_packed_views(seen, viewing, 2, space, folder / "work")
    rows = targets.unpacked(packed.views).flatten(1)
    found["targets"] = few(rows @ rows.T, 24) + few(packed.closeness(torch.arange(len(seen.features))))
    limits = near_copies.fit(extract.as_embed(models.teacher, CPU), listed)
    small = near_copies.of_store(seen.features, material.folder, material.store).look(torch.arange(len(seen.features)))
    found["near-copies"] = [
        limits.similar,
        limits.alike,
        *near_copies.correlation(small[:-1], small[1:]).tolist(),
        *near_copies.repeats(small).tolist(),
    ]
    found["index"] = indexed(folder / "indexed.tar")
    rows, labels = kind_targets(60, 1, 16)[:, 0], torch.arange(60) % 3
    images = image_list.ImageList(
        Path(), tuple(f"{label}/{place}.jpg" for place, label in enumerate(labels.tolist())), ()
    )
    taught = TeacherPass(rows, torch.ones(60, 1), torch.ones(60, 1, 1), "")
    looked = bagging.Seen(taught, images, torch.arange(60), 4, seed=3)
    found["bags"] = [
        value for how in ("knn", "adaptive", "labels") for value in few(bagging.BAGGERS[how](looked, 3).double(), 30)
    ]
    plain, _ = extract.plain(
        {"student": extract.as_embed(models.student, CPU)}, listed, range(len(listed.files)), "plain"
    )
    found["embeddings"] = few(told_apart(plain["student"]), 40)
    bags = bagging.knn(kind_targets(len(material.training), 1, 16)[:, 0], 3)[0]
    source = targets.StoredTargets(kind_targets(len(material.store), 2, 16), targets.TargetSpace(None, None), CPU)
    files = folder / "metrics.jsonl", folder / "state.safetensors"
    lessons = Lessons(material.store, material.training, bags, source)
    loop.distill(planned(settings, len(material.training)), models.student, lessons, *files)
    losses = [json.loads(line)["loss"] for line in files[0].read_text(encoding="utf-8").splitlines()]
    state = checkpoint.load(files[1])[0]
    found["training"] = [
        *losses,
        *few(
            torch.cat([value.double().flatten() for name, value in sorted(state.items()) if name.startswith("head.")])
        ),
    ]
    noisy = rows + 0.8 * unit(60, 16, seed=7)
    head = probes.fit_linear(noisy[:40], labels[:40], 3)
    found["figures"] = [
        *probes.knn_predict(noisy[:40], labels[:40], noisy[40:], 3).double().tolist(),
        *head.predict(noisy[40:]).double().tolist(),
        probes.neighbour_recall((rows[40:], rows[:40]), (noisy[40:], noisy[:40])),
    ]
    return found


@pytest.mark.slow
def test_no_stage_computes_something_else_under_its_old_number(tmp_path: Path) -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    found = outputs(tmp_path)
    assert set(recorded) == set(found) == set(FORMATS) - COMPOSED - SHOWN
    for role, values in found.items():
        same = values == pytest.approx(recorded[role]["values"], abs=TOLERANCE)
        if FORMATS[role] != recorded[role]["format"]:
            pytest.fail(f"FORMATS[{role!r}] was raised: record what the stage gives now, python tests/test_stages.py")
        assert same, (
            f"{role} gives something else than it did: raise FORMATS[{role!r}], then python tests/test_stages.py"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made = {
            role: {"format": FORMATS[role], "values": [round(value, 5) for value in values]}
            for role, values in outputs(Path(temporary)).items()
        }
    RECORD.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{RECORD}: {len(made)} stages\n")
