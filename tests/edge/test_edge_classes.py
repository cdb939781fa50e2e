"""Classes inside a model file: named without a head beside it, refused where graph and contract differ."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from bingo_edge import EdgeError, Embedder, named
from bingo_edge.heads import LinearHead
from edge_models import GREEN, RED, contract, make_model, plain, run, save, write_heads

from bingo_compress.exporters.golden import write_golden
from bingo_compress.exporters.head import OUTPUTS, with_head
from bingo_compress.models.exported import runner_by_name

NAMES = ["red\tone", "green"]
MEANS = np.array([(1, 0, 0), (0, 1, 0)], np.float32)
HEAD = LinearHead(np.array([(0.01, 0, 0), (0, 0.01, 0)], "f4"), np.zeros(2, "f4"), np.array(NAMES))


def headed(path: Path, batch: int | str = "batch", known: bool = True, **changes: object) -> str:
    """Classes red and green by the mean colour; a picture further than 0.2 from both is of neither."""
    made = with_head(onnx.load(make_model(path, batch=batch)), HEAD._replace(means=MEANS if known else None))
    outputs = {"embedding": "", "features": "", **(OUTPUTS if known else {"scores": ""})}
    head = {"kind": "linear", **({"threshold": 0.2} if known else {})}
    meta = contract(outputs=outputs, classes=NAMES, head=head, **changes)
    onnx.helper.set_model_props(made, {"bingo_compress": json.dumps(meta)})
    onnx.save(made, path)
    return str(path)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    colours = {"a.png": RED, "b.png": GREEN, "c.png": (20, 20, 250)}
    return [save(tmp_path / name, plain(colour)) for name, colour in colours.items()]


@pytest.mark.parametrize("batch", ["batch", 1, 2])
def test_embed_gives_scores_and_distances(tmp_path: Path, photos: list[str], batch: int | str) -> None:
    model = Embedder(headed(tmp_path / "m.onnx", batch))
    assert model.classes == tuple(NAMES) and model.threshold == 0.2
    found = model.embed([*photos, plain((0, 0, 0)), "gone.png"])  # of black the embedding is not finite
    assert found.scores is not None and found.distances is not None
    sure = 1 / (1 + np.exp(-2.55))
    np.testing.assert_allclose(found.scores, [(sure, 1 - sure), (1 - sure, sure), (0.5, 0.5)], atol=1e-6)
    np.testing.assert_allclose(found.distances, [0, 0, 1 - 20 / np.linalg.norm((20, 20, 250))], atol=1e-6)
    assert [one.name for one in found.skipped] == ["array 3", "gone.png"] or len(found.skipped) == 2
    assert [one.known for one in named(model, found)] == [True, True, False]
    nothing = model.embed([])
    assert nothing.scores is not None and nothing.scores.shape == (0, 2) and nothing.distances is not None
    assert nothing.distances.shape == (0,) and named(model, nothing) == []


def test_a_model_without_classes_has_no_scores(tmp_path: Path, photos: list[str]) -> None:
    model = Embedder(make_model(tmp_path / "m.onnx"))
    found = model.embed(photos)
    assert found.scores is found.distances is model.threshold is None and model.classes == ()
    with pytest.raises(EdgeError, match="expected a model with classes in it, or a head"):
        named(model, found)


def test_classify_needs_nothing_beside_the_file(
    tmp_path: Path, photos: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    model = headed(tmp_path / "m.onnx")
    code, out, _ = run(capfd, "classify", model, *photos)
    assert code == 0 and out.splitlines() == [
        f"{photos[0]}\tred\\tone\t0.9276",
        f"{photos[1]}\tgreen\t0.9276",
        f"{photos[2]}\tnone of these\t0.5000\tnearest: red\\tone",
    ]
    told = json.loads(run(capfd, "classify", model, *photos, "--json")[1])["pictures"]
    assert [one["known"] for one in told] == [True, True, False] and told[1]["class"] == "green"
    linear, _, held = write_heads(tmp_path, Embedder(model).sha256, np.random.default_rng(0))
    code, out, _ = run(capfd, "classify", model, "--head", linear, *photos)  # a head beside it wins
    assert code == 0 and all(line.split("\t")[1] in held["classes"] for line in out.splitlines())
    assert json.loads(run(capfd, "classify", model, "--head", linear, *photos, "--json")[1])["pictures"][0].keys() == {
        "path",
        "class",
        "probability",
    }
    held |= {
        "means": MEANS,
        "threshold": np.array(0.2),
        "weight": HEAD.weight,
        "bias": HEAD.bias,
        "classes": HEAD.classes,
    }
    np.savez(linear, model_sha256=np.array(Embedder(model).sha256), **held)
    # the head beside it says what the file with that head in it does
    assert run(capfd, "classify", model, "--head", linear, *photos)[1] == run(capfd, "classify", model, *photos)[1]
    np.savez(linear, model_sha256=np.array(Embedder(model).sha256), **held | {"threshold": np.array(np.nan)})
    code, out, err = run(capfd, "classify", model, "--head", linear, *photos)
    assert code == 2 and out == "" and "expected a sound linear head" in err and "threshold float64 ()" in err
    bare = make_model(tmp_path / "bare.onnx")
    code, out, err = run(capfd, "classify", bare, photos[0])
    assert code == 2 and out == "" and "expected a model with classes in it, or --head" in err


def test_without_a_threshold_every_picture_is_of_a_class(
    tmp_path: Path, photos: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    model = headed(tmp_path / "m.onnx", known=False)
    assert "none of these" not in run(capfd, "classify", model, *photos)[1]
    assert Embedder(model).embed(photos).distances is None


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["one"]},
        {"classes": ["one", "two", "three"]},
        {"classes": ["one", 2]},
        {"classes": "ab"},
        {"classes": []},
        {"head": {"threshold": "near"}},
        {"head": {"threshold": float("nan")}},
        {"head": []},
    ],
)
def test_a_graph_that_is_not_what_its_classes_say_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    model = onnx.load(headed(tmp_path / "m.onnx"))
    meta = json.loads(model.metadata_props[0].value) | changes
    onnx.helper.set_model_props(model, {"bingo_compress": json.dumps(meta)})
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EdgeError) as caught:
        Embedder(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


def test_the_self_test_looks_at_scores(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = headed(tmp_path / "m.onnx")
    embedder = Embedder(model)
    folder = write_golden(Path(model), embedder.contract, runner_by_name(Path(model)))
    assert run(capfd, "selftest", model)[0] == 0
    held = json.loads((folder / "golden.json").read_text())
    held["images"][0]["scores"] = held["images"][0]["scores"][::-1]
    (folder / "golden.json").write_text(json.dumps(held))
    code, out, _ = run(capfd, "selftest", model)
    assert code == 3 and out.splitlines()[0].split("\t")[1] == "scores"


@pytest.mark.parametrize(("off", "passes"), [(0.05, True), (0.15, False)])
def test_the_self_test_compares_scores_of_16_bits_too(
    off: float, passes: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = headed(tmp_path / "m.onnx", precision="float16")
    folder = write_golden(Path(model), Embedder(model).contract, runner_by_name(Path(model)))
    held = json.loads((folder / "golden.json").read_text())
    first, second = held["images"][0]["scores"]
    held["images"][0]["scores"] = [first + off, second - off]  # a sum of 1 still
    (folder / "golden.json").write_text(json.dumps(held))
    code, out, _ = run(capfd, "selftest", model)
    assert (code, out.splitlines()[0].split("\t")[1]) == ((0, "ok") if passes else (3, "scores"))
