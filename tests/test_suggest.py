"""`suggest`: the rule, budgets, profiles of a device, the cache, and trials on the user's own images."""

import json
import lzma
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import timm
from bingo_edge import measuring
from bingo_edge.measuring import measure
from edge_models import make_model
from helpers import TINY, Ran, interrupted_at, photos
from test_cli import one_error

from bingo_compress import options
from bingo_compress.errors import BingoError
from bingo_compress.models.names import FAMILIES
from bingo_compress.presenting.plots import scatter
from bingo_compress.runtime.made_of import file_digest
from bingo_compress.suggesting import cached, trials
from bingo_compress.suggesting.cached import PACKED, Size
from bingo_compress.suggesting.ranking import Budget, Row, ranked
from bingo_compress.suggesting.students import STUDENTS, estimated
from bingo_compress.suggesting.suggest import suggest

PAIR = "lcnet_050,mnasnet_small"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty, and no time spent on measuring."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "SECONDS", 0.0)
    return cached.folder()


@pytest.fixture
def filled(cache: Path) -> Path:
    """The cache with two students of PAIR at two sizes, as small networks."""
    cache.mkdir(parents=True)
    for number, name in enumerate(PAIR.split(",")):
        sizes = []
        for px in (96, 128):
            held = Path(make_model(cache / "x", size=px)).read_bytes()
            file = cache / f"{name}-{px}{PACKED}"
            file.write_bytes(lzma.compress(held))
            sizes.append(Size(name, px, 10**6 + number, file.name, file_digest(file), 10**6 * (number + 1), "so"))
        told = {"sizes": [size._asdict() for size in sizes], "refused": {}}
        (cache / f"{name}.json").write_text(json.dumps(told))
    return cache


@pytest.fixture
def profile(filled: Path, tmp_path: Path) -> Path:
    """What a device found: lcnet_050 2 and 4 ms, mnasnet_small 6 and 8 ms."""
    file = tmp_path / "profile.json"
    found = measure(filled, file)
    for name, times in found["files"].items():
        ms = (6.0 if "mnasnet" in name else 2.0) + (2.0 if "128" in name else 0.0)
        times |= {"p50_ms": ms, "p90_ms": ms}
    file.write_text(json.dumps(found))
    return file


def row(student: str, px: int, ms: float, parameters: int = 10**6, size: int = 4 * 10**6) -> Row:
    stated = STUDENTS.get(student)
    about = (stated.top1, stated.px) if stated else (None, None)
    return Row(student, px, ms, ms, size, parameters, *about, estimated(student, px))


# ---------------------------------------------------------------- the rule


def test_there_are_forty_students_that_timm_has_with_weights() -> None:
    assert len(STUDENTS) == 40
    assert all(timm.models.get_pretrained_cfg(name).has_weights for name in STUDENTS)
    assert all(50 < stated.top1 < 85 for stated in STUDENTS.values())


def test_an_estimate_falls_as_mobilenetv2_does_and_never_rises_above_what_is_stated() -> None:
    assert estimated("mobilenetv2_100", 224) == pytest.approx(72.976)
    assert estimated("mobilenetv2_100", 128) == pytest.approx(72.976 - (71.8 - 65.3))
    assert estimated("mobilenetv2_100", 96) == pytest.approx(72.976 - (71.8 - 60.3))
    beyond = (71.8 - 70.7) * math.log(288 / 224) / math.log(224 / 192)
    assert estimated("resnet18", 224) == pytest.approx(73.158 - beyond)
    assert estimated("tinynet_e", 224) == estimated("tinynet_e", 128) == 59.866
    assert estimated("test_resnet", 224) is None


def test_one_row_a_student_the_best_within_the_budget_first() -> None:
    rows = [row("lcnet_050", 224, 4), row("lcnet_050", 96, 1), row("mnasnet_small", 224, 9), row("tinynet_e", 224, 8)]
    rows += [row("tinynet_e", 128, 3), row("own_small", 160, 1, 10), row("own_large", 96, 1, 20)]
    names = [(each.student, each.px) for each in ranked(rows, Budget(9, None))]
    unstated = [("own_large", 96), ("own_small", 160)]
    assert names == [("mnasnet_small", 224), ("lcnet_050", 224), ("tinynet_e", 128), *unstated]
    names = [(each.student, each.px) for each in ranked(rows, Budget(2, None))]
    assert names == [("lcnet_050", 96), *unstated]


def test_a_budget_that_nothing_is_within_names_one_that_something_is() -> None:
    rows = [row("lcnet_050", 96, 1.234, size=7_520_000), row("mnasnet_small", 96, 0.5, size=9_000_000)]
    with pytest.raises(BingoError, match=r"--latency-ms: .*mnasnet_small at 96 px with 0.5 ms; .* to 0\.5"):
        ranked(rows, Budget(0.4, None))
    with pytest.raises(BingoError, match=r"lcnet_050 .* to 1\.3$") as error:
        ranked(rows, Budget(1, 8))
    assert ranked(rows, Budget(float(str(error.value).rpartition(" ")[2]), 8))
    with pytest.raises(BingoError, match=r"--size-mb: .*within 2 ms and 3 MB.*lcnet_050 with 7\.52 MB; .* to 7\.6 "):
        ranked(rows, Budget(2, 3))


# ---------------------------------------------------------------- profiles


def test_a_device_s_profile_ranks_and_the_next_command_is_said(
    bingo: Callable[..., Ran], profile: Path, tmp_path: Path
) -> None:
    files = {"json": tmp_path / "out.json", "plot": tmp_path / "out.svg"}
    words = ("suggest", "--on", profile, "--students", PAIR, "--latency-ms", 7, "--json", files["json"])
    ran = bingo(*words, "--plot", files["plot"])
    assert ran.status == 0, ran.err
    assert "students within 7 ms: 2; " in ran.out and "best first: the ImageNet top-1" in ran.out
    assert "next: bingo-compress distill --teacher dinov2 --student lcnet_050 --image-size 128 --data PHOTOS" in ran.out
    told = json.loads(files["json"].read_text())
    order = [(each["student"], each["px"], each["p50_ms"]) for each in told["students"]]
    assert order == [("lcnet_050", 128, 4.0), ("mnasnet_small", 96, 6.0)] and "files" not in told["measured"]
    circles = ElementTree.fromstring(files["plot"].read_text()).iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(circles)) == 4
    one_error(bingo(*words[:6], 1), "the fastest is lcnet_050 at 96 px with 2 ms", "raise --latency-ms to 2")


def test_a_machine_that_was_busy_is_told_of(bingo: Callable[..., Ran], profile: Path) -> None:
    words = ("suggest", "--on", profile, "--students", PAIR)
    assert "warning" not in bingo(*words).out
    found = json.loads(profile.read_text())
    for times in found["files"].values():
        times["p90_ms"] = 2 * times["p50_ms"]
    profile.write_text(json.dumps(found))
    assert "warning: something else ran beside: one run in ten took 2.0 times the median" in bingo(*words).out


def test_a_family_is_the_model_that_it_means_with_what_is_stated_of_it(
    bingo: Callable[..., Ran], profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "lcnet", "lcnet_050")
    ran = bingo("suggest", "--on", profile, "--students", "lcnet,mnasnet_small,mnasnet_small", "--latency-ms", 7)
    assert ran.status == 0 and "student: lcnet means lcnet_050" in ran.out and "not stated" not in ran.out
    assert "--student lcnet_050 " in ran.out and "7 ms: 2; " in ran.out
    assert STUDENTS[FAMILIES["mobilenetv3"]].top1 == 75.766
    assert not [word for word in FAMILIES if timm.is_model(word)]  # timm's own name would be meant


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lcnet_050-96.onnx.xz": {"sha256": "0" * 64, "p50_ms": 1, "p90_ms": 1}}, "found 1 that are others, first lc"),
        ({"lcnet_050-96.onnx.xz": {"sha256": "0", "p50_ms": float("nan"), "p90_ms": 1}}, "does not write"),
        ({"lcnet_050-96.onnx.xz": {"sha256": "0", "p50_ms": "1", "p90_ms": 1}}, "something else"),
        ({"lcnet_050-96.onnx.xz": {"p50_ms": 1}}, "something else"),
    ],
)
def test_a_profile_of_other_files_or_none_is_refused(
    change: dict[str, Any], said: str, bingo: Callable[..., Ran], profile: Path
) -> None:
    found = json.loads(profile.read_text())
    found["files"] |= change
    profile.write_text(json.dumps(found))
    one_error(bingo("suggest", "--on", profile, "--students", PAIR), "--on", said, "measure again")


def test_a_profile_without_its_files_is_refused_and_one_with_some_is_taken(
    bingo: Callable[..., Ran], profile: Path, filled: Path, tmp_path: Path
) -> None:
    found = json.loads(profile.read_text())
    some = found | {"files": {name: times for name, times in found["files"].items() if "mnas" in name}}
    profile.write_text(json.dumps(some))
    ran = bingo("suggest", "--on", profile, "--students", PAIR)
    assert ran.status == 0 and "2 of 4 files are not in" in ran.out and "--student mnasnet_small" in ran.out
    profile.write_text(json.dumps(found | {"files": {"other.onnx": found["files"]["lcnet_050-96.onnx.xz"]}}))
    one_error(bingo("suggest", "--on", profile, "--students", PAIR), "found none of them")
    one_error(bingo("suggest", "--on", tmp_path / "gone.json"), "no file at", "check the path")
    for file in filled.glob("*.json"):
        file.unlink()
    one_error(bingo("suggest", "--on", profile, "--students", PAIR), "found none", "suggest --files FOLDER")


def test_files_for_a_device_are_written_and_its_profile_comes_back(
    bingo: Callable[..., Ran], filled: Path, tmp_path: Path
) -> None:
    ran = bingo("suggest", "--students", PAIR, "--files", tmp_path / "device")
    assert ran.status == 0 and "4 files" in ran.out and "bingo-edge measure device" in ran.out
    assert {file.name for file in (tmp_path / "device").iterdir()} == {file.name for file in filled.glob(f"*{PACKED}")}
    measure(tmp_path / "device", tmp_path / "device" / "profile.json", threads=2)
    ran = bingo("suggest", "--students", PAIR, "--on", tmp_path / "device" / "profile.json")
    assert ran.status == 0 and "2 threads" in ran.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--latency-ms", 0), "--latency-ms: expected a number above 0"),
        (("--size-mb", -1), "--size-mb"),
        (("--top", 0), "--top"),
        (("--epochs", "nan"), "--epochs"),
        (("--plot", "x.png"), "FILE.svg"),
        (("--json", "gone/x.json"), "make gone first"),
        (("--on", "a", "--files", "b"), "found both"),
        (("--files", "f", "--json", "x.json", "--students", "a/b"), "--files: expected no --json beside it"),
        (("--files", "f", "--plot", "x.svg", "--students", "a/b"), "--files: expected no --plot beside it"),
        (("--files", "f", "--data", "photos", "--students", "a/b"), "--files: expected no --data beside it"),
        (("--students", "a/b"), "'a/b'"),
        (("--data", "gone", "--teacher", "test_resnet"), "found nothing"),
        (("--data", "photos"), "--teacher"),
        (("--teacher", "test_resnet"), "--teacher: expected --data beside it"),
        (("--set", "lrr=1"), "--set: expected --data beside it"),
        (("--data", "photos", "--teacher", "test_resnet", "--set", "lrr=1"), "lrr"),
        (("--data", "photos", "--teacher", "test_resnet", "--set", "clusters=7"), "clusters"),
        (("--data", "photos", "--teacher", "test_resnet", "--set", "epochs=7"), "found epochs"),
    ],
)
def test_bad_words_are_one_line_and_nothing_is_written(
    words: Sequence[object], said: str, bingo: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 2)
    before = sorted(tmp_path.rglob("*"))
    one_error(bingo("suggest", *words), said)
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- the cache


def test_what_is_cached_is_shown_without_torch_and_measured_once(bingo: Callable[..., Ran], filled: Path) -> None:
    assert bingo("suggest", "--students", PAIR).status == 0
    before = (filled / "profile.json").read_bytes()
    code = (
        "import sys; sys.argv[0] = 'bingo-compress'\nfrom bingo_compress.cli import main\n"
        "try: main()\nexcept SystemExit as stop: print(stop.code, sorted({'torch', 'timm'} & sys.modules.keys()))"
    )
    words = [sys.executable, "-c", code, "suggest", "--students", PAIR]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "0 []", ran.stderr
    assert (filled / "profile.json").read_bytes() == before


@pytest.mark.slow
def test_students_are_made_once_and_go_on_where_they_were_stopped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bingo_compress.suggesting import making

    words = options.Suggest(students="test_resnet,test_vit")
    with interrupted_at(monkeypatch, making, "resolve_name", 2), pytest.raises(KeyboardInterrupt):
        suggest(words, no_trials, (64, 160))
    assert not list(cache.glob(".making*")) and cached.sizes_of("test_vit", cache) is None
    kept = {size.file: size for size in cached.sizes_of("test_resnet", cache) or []}
    assert [size.made for size in kept.values()] == [making.EXPORTED, making.SAME_GRAPH]
    (cache / ".making-dead").mkdir()  # what a process that is killed leaves
    stamps = {name: (cache / name).stat().st_mtime_ns for name in kept}
    rows = [row for row, _ in suggest(words, no_trials, (64, 160))]
    assert {name: (cache / name).stat().st_mtime_ns for name in kept} == stamps
    assert {row.student for row in rows} == {"test_resnet", "test_vit"}
    assert not list(cache.glob(".making*"))
    rigid = cached.sizes_of("test_vit", cache) or []
    assert rigid and {size.made for size in rigid} == {making.EXPORTED}
    (cache / "test_resnet-64.onnx.xz").write_bytes(b"damaged")
    suggest(words, no_trials, (64, 160))
    assert cached.sizes_of("test_resnet", cache) == list(kept.values())  # the same weights, the same bytes


@pytest.mark.slow
def test_a_file_is_the_network_at_its_size_but_for_its_weights(cache: Path) -> None:
    import numpy as np
    import onnx
    import onnxruntime
    from bingo_edge import Embedder

    from bingo_compress.suggesting.making import PERIOD, make

    make("test_efficientnet", (96, 64), cache)
    for size in cached.sizes_of("test_efficientnet", cache) or []:
        held = lzma.decompress((cache / size.file).read_bytes())
        assert len(held) == size.bytes and (cache / size.file).stat().st_size < len(held) / 4
        weights = [onnx.numpy_helper.to_array(each).ravel() for each in onnx.load_from_string(held).graph.initializer]
        plain = [each for each in weights if each.dtype == np.float32 and each.size > 2 * PERIOD]
        assert plain and all((each[:PERIOD] == each[PERIOD : 2 * PERIOD]).all() for each in plain)
        (given,) = onnxruntime.InferenceSession(held, providers=["CPUExecutionProvider"]).get_inputs()
        assert given.shape.count(size.px) == 2
        (cache / "x.onnx").write_bytes(held)
        embedder = Embedder(cache / "x.onnx")
        assert embedder.contract["input"]["size"] == size.px
        assert np.isfinite(embedder.embed(np.zeros((50, 60, 3), np.uint8)).embeddings).all()


def test_a_name_that_means_no_model_is_one_line(bingo: Callable[..., Ran]) -> None:
    ran = bingo("suggest", "--students", "resnet18,lcnet_05")
    one_error(ran, "--students: unknown model 'lcnet_05'", "lcnet_050")
    assert "resnet18 (1 of 2)" not in ran.out


# ---------------------------------------------------------------- trials


def no_trials(*_: object, **__: object) -> dict[Row, dict[float, float]]:
    raise AssertionError("nothing is to be trained")


def test_half_of_a_round_goes_on_to_three_times_the_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    worth = {"lcnet_050": 0.1, "lcnet_075": 0.4, "lcnet_100": 0.3, "tinynet_e": 0.2}

    def recall(recipe: Any, largest: int, out: Path, name: str) -> float:
        asked.append((recipe.student, recipe.image_size, recipe.epochs))
        return worth[recipe.student] if recipe.epochs == 1 else 1 - worth[recipe.student]

    monkeypatch.setattr(trials, "_recall", recall)
    rows = [row(name, 96, 1) for name in worth]
    found = trials.halving(rows, {"data": "x", "teacher": "resnet18"}, 1.0, tmp_path / "out")
    assert asked == [(name, 96, 1) for name in worth] + [("lcnet_075", 96, 3), ("lcnet_100", 96, 3)]
    assert [each.student for each in found] == ["lcnet_100", "lcnet_075", "tinynet_e", "lcnet_050"]
    assert found[rows[2]] == {1.0: 0.3, 3.0: 0.7}
    asked.clear()
    alone = trials.halving(rows[:1], {"data": "x", "teacher": "resnet18"}, 1.0, tmp_path / "out")
    assert alone == {rows[0]: {1.0: 0.1}}
    assert len(asked) == 1


def teacher_passes(out: Path) -> dict[str, int]:
    """Files below work/ of what is seen before training, with their times."""
    found = {str(file.relative_to(out)): file.stat().st_mtime_ns for file in (out / "work").rglob("*teacher*")}
    assert found
    return found


@pytest.mark.slow
def test_trials_rank_by_recall_and_go_on_where_they_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: Mapping[str, Any] = {key: value for key, value in TINY.items() if key not in ("student", "image_size")}
    named = {**named, "data": [str(photos(tmp_path / "photos", 10))], "hold_out": 0.3}
    rows = [row("test_resnet", 32, 1), row("test_efficientnet", 64, 1)]
    with interrupted_at(monkeypatch, trials, "train", 2), pytest.raises(KeyboardInterrupt):
        trials.halving(rows, named, 0.5, tmp_path / "out")
    first = (tmp_path / "out" / "test_resnet-32-0.5.json").read_bytes()
    passes = teacher_passes(tmp_path / "out")
    found = trials.halving(rows, named, 0.5, tmp_path / "out")
    assert passes == teacher_passes(tmp_path / "out")  # one, for students of two sizes
    assert (tmp_path / "out" / "test_resnet-32-0.5.json").read_bytes() == first
    (best, recalls), (_, less) = found.items()
    assert recalls[0.5] >= less[0.5] and all(0 <= value <= 1 for each in found.values() for value in each.values())
    monkeypatch.setattr(trials, "train", no_trials)
    assert trials.halving(rows, named, 0.5, tmp_path / "out") == found
    assert next(iter(trials.halving(rows, named, 0.5, tmp_path / "out"))) == best
    with pytest.raises(AssertionError, match="nothing is to be trained"):
        trials.halving(rows, {**named, "seed": 7}, 0.5, tmp_path / "out")


def test_a_dot_alone_is_a_picture() -> None:
    dots = [{"name": "a<b", "x": 3.0, "y": 70.0, "size": 1.0, "marked": True}]
    assert "a<b" in "".join(ElementTree.fromstring(scatter(dots, ("ms", "%"), "here")).itertext())
