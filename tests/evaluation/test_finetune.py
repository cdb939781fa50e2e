"""Training with labels: which images are taken, what is trained and what is not, and that it learns."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, crop, encoder, filled_store, photo, whole_images
from torch import nn

from bingo_compress.data import augment
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import finetune
from bingo_compress.evaluation.finetune import (
    Labelled,
    crop_and_flip,
    fine_tune,
    linear_with_augmentation,
    literature_lr,
    parse_shots,
    subset,
)
from bingo_compress.features.extract import as_embed
from bingo_compress.models.encoder import Encoder

STUDENT = "test_efficientnet"


@pytest.fixture(scope="module")
def student() -> Encoder:
    return encoder(STUDENT)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plain(numbers: range) -> torch.Tensor:
    """uint8 (B, 32, 32, 3) of the three kinds in turn, never seen in a store of fewer."""
    return torch.stack([torch.from_numpy(photo(number % 3, number, 32, 32)) for number in numbers])


# ---------------------------------------------------------------- which images


def test_a_share_is_of_each_class_and_at_least_one_image() -> None:
    labels = torch.tensor([0] * 500 + [1] * 40 + [2] * 3)[
        torch.randperm(543, generator=torch.Generator().manual_seed(0))
    ]
    for spec, expected in (
        ("1%", [5, 1, 1]),
        ("10%", [50, 4, 1]),
        ("2.5%", [12, 1, 1]),
        ("5", [5, 5, 3]),
        ("100%", [500, 40, 3]),
    ):
        chosen = subset(labels, spec, 0)
        assert labels[chosen].bincount().tolist() == expected, spec
        assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_subsets_are_nested_the_same_each_time_and_others_with_another_seed() -> None:
    labels = torch.arange(300) % 4
    assert torch.equal(subset(labels, "10%", 3), subset(labels, "10%", 3))
    assert set(subset(labels, "1%", 3).tolist()) < set(subset(labels, "10%", 3).tolist())
    assert not torch.equal(subset(labels, "10%", 3), subset(labels, "10%", 4))


def test_every_image_of_a_class_is_as_likely() -> None:
    counts = torch.zeros(20)
    for seed in range(400):
        counts[subset(torch.zeros(20, dtype=torch.int64), "5", seed)] += 1
    assert counts.sum() == 2000
    assert float((counts - 100).abs().max()) < 4.5 * math.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize("spec", ["", "0", "0%", "101%", "-1", "5.5", "1 %", "%", "ten", "1e2", "٣"])
def test_a_bad_part_says_what_is_expected(spec: str) -> None:
    with pytest.raises(BingoError, match=r"1%, 10% or 5, found '"):
        subset(torch.tensor([0, 1]), spec, 0)
    with pytest.raises(BingoError, match="--shots"):
        parse_shots(f"1%,{spec}")


def test_parts_are_split_at_commas_and_taken_once() -> None:
    assert parse_shots(" 1%, 10%,5,1%") == ["1%", "10%", "5"]


# ---------------------------------------------------------------- views


def test_views_are_crops_of_eight_hundredths_and_flips_without_colours() -> None:
    drawn = crop_and_flip(torch.ones(4000), torch.Generator().manual_seed(0))
    assert bool((drawn.order == -1).all()) and not drawn.grey.any() and not drawn.sigma.any()
    area = (drawn.box[:, 2] - drawn.box[:, 0]) * (drawn.box[:, 3] - drawn.box[:, 1])
    assert 0.079 < float(area.min()) < 0.1 and float(area.max()) > 0.9
    assert float(drawn.flip.float().mean()) == pytest.approx(0.5, abs=0.03)
    red = torch.zeros(50, 40, 40, 3, dtype=torch.uint8)
    red[..., 0] = 200
    drawn = crop_and_flip(torch.ones(50), torch.Generator().manual_seed(1))
    views = augment.apply(crop(red, drawn.box, 32), drawn)
    assert torch.equal(views, torch.tensor([200 / 255, 0.0, 0.0]).view(1, 3, 1, 1).expand_as(views))


def test_a_pass_shows_every_image_once_with_its_label_and_no_batch_of_one(
    student: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune.augment, "apply", lambda crops, drawn: crops[:, :1, :1, :1].float())
    everything = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    monkeypatch.setattr(
        finetune,
        "crop_and_flip",
        lambda aspect, generator, scale_min: SimpleNamespace(box=everything.expand(len(aspect), 4)),
    )
    store = filled_store(13)
    marks = whole_images(store, torch.arange(13), student.preprocessing.size)[:, 0, 0, 0].float()
    seen: dict[int, list[float]] = {}
    sizes = []
    for epoch, views, labels in finetune.crops_and_flips(
        student, Labelled(store, torch.arange(12, -1, -1), marks.flip(0), 13), CPU, 2, 6, 0, "test"
    ):
        assert views[:, 0, 0, 0].tolist() == labels.tolist()
        seen.setdefault(epoch, []).extend(labels.tolist())
        sizes.append(len(labels))
    assert sizes == [5, 4, 4] * 2
    assert seen[0] != seen[1] and sorted(seen[0]) == sorted(seen[1]) == sorted(marks.tolist())


# ---------------------------------------------------------------- the literature's linear protocol


@pytest.mark.parametrize(
    ("name", "rate"),
    [("resnet18", 30), ("mobilenetv3_small_050", 3), ("tf_efficientnet_lite0", 3), ("test_efficientnet", 3)],
)
def test_the_learning_rate_goes_by_the_models_name(name: str, rate: float) -> None:
    assert literature_lr(name) == rate


def test_the_steps_are_those_of_plain_sgd_and_the_encoder_stays_frozen(
    student: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rows = filled_store(30), torch.arange(24)
    labels = rows % 3
    drawn = list(finetune.crops_and_flips(student, Labelled(store, rows, labels, 3), CPU, 10, 256, 0, "test"))
    before = copy.deepcopy(student.state_dict())
    head = linear_with_augmentation(student, Labelled(store, rows, labels, 3), CPU, epochs=10)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not student.training
    # The same by hand: gradient of the cross-entropy, momentum 0.9, 3 then 0.3 from the seventh epoch, then 0.03 from
    # the ninth.
    first = linear_with_augmentation(student, Labelled(store, rows, labels, 3), CPU, epochs=1, lr=1e-12)
    weight, bias = first.weight.double(), first.bias.double()
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch, views, wanted in drawn:
        with torch.no_grad():
            features = student(views).double()
        error = ((features @ weight.T + bias).softmax(1) - torch.eye(3, dtype=torch.float64)[wanted]) / len(wanted)
        momentum = [0.9 * old + new for old, new in zip(momentum, (error.T @ features, error.sum(0)), strict=True)]
        rate = 3 if epoch < 6 else 0.3 if epoch < 8 else 0.03
        weight, bias = weight - rate * momentum[0], bias - rate * momentum[1]
    assert head.weight.numpy() == pytest.approx(weight.numpy(), abs=1e-3)
    assert head.bias.numpy() == pytest.approx(bias.numpy(), abs=1e-3)


def test_the_linear_protocol_learns_three_kinds_of_photo(student: Encoder) -> None:
    rows = torch.arange(60)
    head = linear_with_augmentation(student, Labelled(filled_store(60), rows, rows % 3, 3), CPU, epochs=30)
    features = as_embed(student, CPU)[1](plain(range(300, 360)))
    assert float((head.predict(features) == torch.arange(60) % 3).float().mean()) > 0.9


# ---------------------------------------------------------------- fine-tuning


@pytest.mark.slow
def test_fine_tuning_learns_and_leaves_the_encoder_as_it_was(student: Encoder) -> None:
    rows = torch.arange(30)
    before = copy.deepcopy(student.state_dict())
    predict = fine_tune(student, Labelled(filled_store(30), rows, rows % 3, 3), CPU, epochs=20)
    predicted = predict(plain(range(300, 360)))
    assert predicted.dtype == torch.int64 and predicted.shape == (60,)
    assert float((predicted == torch.arange(60) % 3).float().mean()) > 0.9
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_everything_is_trained_and_the_same_each_time(student: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []
    real = nn.Sequential.train
    monkeypatch.setattr(nn.Sequential, "train", lambda self, mode=True: (made.append(self), real(self, mode))[1])
    rows, weights = torch.arange(9), []
    for seed in (0, 0, 1):
        made.clear()
        fine_tune(student, Labelled(filled_store(9), rows, rows % 3, 3), CPU, epochs=2, lr=0.01, seed=seed)
        weights.append({name: value.clone() for name, value in made[0].state_dict().items()})
    for name, parameter in student.named_parameters():
        assert not torch.equal(weights[0][f"0.{name}"], parameter), name
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not torch.equal(weights[0]["2.weight"], weights[2]["2.weight"])


def test_few_images_get_more_epochs(student: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def recorded(*arguments: object) -> list[object]:
        asked.append(int(str(arguments[3])))
        return []

    monkeypatch.setattr(finetune, "crops_and_flips", recorded)
    for count in (5, 64, 65, 64 * 40):
        fine_tune(
            student,
            Labelled(filled_store(3), *torch.zeros(2, count, dtype=torch.int64), 2),
            CPU,
            lr=0.01,
        )
    assert asked == [300, 300, 150, 30]


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_images_do_not_break_batchnorm(student: Encoder, count: int) -> None:
    rows = torch.arange(count)
    predict = fine_tune(student, Labelled(filled_store(3), rows, rows, 3), CPU, epochs=2)
    assert predict(plain(range(1))).shape == (1,)


def test_the_learning_rate_is_chosen_on_a_fifth_held_out(student: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = torch.arange(20) % 3
    trained: list[tuple[float, list[int]]] = []
    knows: dict[float, int] = {}

    def pretended(encoder: Encoder, images: Labelled, device: torch.device, *, lr: float, **_: object) -> object:
        """Right on as many of the images held out as `knows` says for the learning rate."""
        trained.append((lr, images.rows.tolist()))
        assert torch.equal(images.labels, answers[images.rows])
        order = torch.randperm(20, generator=torch.Generator().manual_seed(finetune.hash_seed("held out", 0)))
        assert set(order[:4].tolist()).isdisjoint(images.rows.tolist())
        return lambda batch: torch.where(torch.arange(4) < knows[lr], answers[order[:4]], -1)

    monkeypatch.setattr(finetune, "fine_tune", pretended)
    monkeypatch.setattr(finetune, "TUNE_LRS", (0.1, 0.2, 0.3))
    images = Labelled(filled_store(20), torch.arange(20), answers, 3)
    for known, best in (((1, 4, 3), 0.2), ((2, 2, 1), 0.1), ((0, 1, 3), 0.3)):
        trained.clear()
        knows.update(zip((0.1, 0.2, 0.3), known, strict=True))
        assert finetune._best_lr(student, images, CPU, 1, 0, "test") == best
        assert [(lr, len(set(rows))) for lr, rows in trained] == [(0.1, 16), (0.2, 16), (0.3, 16)]
    trained.clear()
    assert finetune._best_lr(student, images.only(torch.arange(4)), CPU, 1, 0, "test") == 0.1
    assert not trained  # nothing to hold out of four


def test_after_the_choice_all_rows_are_trained_on(student: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[int]] = []
    monkeypatch.setattr(
        finetune, "crops_and_flips", lambda encoder, images, *_: shown.append(images.rows.tolist()) or []
    )
    fine_tune(student, Labelled(filled_store(20), torch.arange(20), torch.arange(20) % 3, 3), CPU)
    assert [len(rows) for rows in shown] == [16] * len(finetune.TUNE_LRS) + [20]


@pytest.mark.slow
def test_features_of_any_scale_are_learned_from(student: Encoder) -> None:
    rows, found = torch.arange(24), []
    for scale in (1.0, 1e-2, 1e3):
        scaled = copy.deepcopy(student)
        with torch.no_grad():
            scaled.backbone.bn2.weight.mul_(scale)
            scaled.backbone.bn2.bias.mul_(scale)
        # The classifier alone: the backbone's learning rate is next to nothing.
        predicted = fine_tune(scaled, Labelled(filled_store(24), rows, rows % 3, 3), CPU, epochs=50, lr=1e-12)(
            plain(range(300, 345))
        )
        found.append(predicted)
        assert float((predicted == torch.arange(45) % 3).float().mean()) > 0.8
    assert all(float((other == found[0]).float().mean()) > 0.9 for other in found)
