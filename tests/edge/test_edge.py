"""The edge kit's network, heads and commands, against numbers worked out here and not by the code under test."""

import ast
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bingo_edge import EdgeError, Embedder, ImageError, classify, load_head, preprocess
from bingo_edge.files import pictures, write_npz
from bingo_edge.heads import LinearHead, load_index, nearest
from bingo_edge.model import latency_ms
from edge_models import GREEN, RED, contract, make_model, plain, run, save, units, write_heads

EXPORT = Path(__file__).parents[2] / "export"


# ---------------------------------------------------------------- makers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "student.onnx")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, color in (("a.png", RED), ("b.png", GREEN), ("sub/c.png", (250, 10, 0))):
        save(tmp_path / "photos" / name, plain(color))
    (tmp_path / "photos" / "notes.jpg").write_text("not a picture")
    return tmp_path / "photos"


# ---------------------------------------------------------------- Embedder


def test_embedder_gives_known_numbers_and_skips_the_rest(model: str, photos: Path) -> None:
    sources = [
        photos / "a.png",
        plain((0, 30, 40)),
        str(photos / "notes.jpg"),
        plain(GREEN).astype(float),
        plain((0, 0, 0)),
        "gone\0.png",
    ]
    found = Embedder(model).embed(sources, batch_size=2)
    np.testing.assert_allclose(found.features, [RED, (0, 30, 40)], atol=1e-3)
    np.testing.assert_allclose(found.embeddings, [(1, 0, 0), (0, 0.6, 0.8)], atol=1e-6)
    assert found.embeddings.dtype == found.features.dtype == np.float32
    assert found.names == [str(photos / "a.png"), "array 1"]
    reasons = dict(found.skipped)
    assert reasons["array 3"] == "float64 array (6, 9, 3), not uint8 (height, width, 3)"
    assert reasons["array 4"] == "the network's output is not finite"
    assert "not an image" in reasons[str(photos / "notes.jpg")]
    assert len(reasons) == 4


def test_batches_do_not_change_the_result(model: str) -> None:
    embedder, noise = Embedder(model), np.random.default_rng(1)
    arrays = [noise.integers(0, 256, (20 + i, 31, 3), np.uint8) for i in range(7)]
    whole = embedder.embed(arrays, batch_size=100)
    for size in (1, 3, 7):
        np.testing.assert_allclose(embedder.embed(arrays, size).features, whole.features, rtol=1e-6)
    pixels = np.stack([preprocess(a, size=8, crop_pct=0.875, interpolation="bicubic") for a in arrays])
    np.testing.assert_allclose(whole.features, pixels.mean(axis=(1, 2)), rtol=1e-5)
    assert embedder.embed(arrays[0]).embeddings.shape == (1, 3)
    assert embedder.embed([]).embeddings.shape == (0, 3)


def test_stream_reads_no_further_than_its_batch(model: str) -> None:
    taken = []
    endless = (taken.append(1) or plain(RED) for _ in iter(int, 1))
    assert len(next(Embedder(model).stream(endless, batch_size=4)).names) == len(taken) == 4


def test_folder_walk_is_sorted_and_meets_each_file_once(tmp_path: Path) -> None:
    for name in ("b/z.png", "b/y", "a.txt", "c.png"):
        save(tmp_path / name, plain(RED))
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "d.png").symlink_to(tmp_path / "c.png")
    (tmp_path / "e.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "f.png")
    names = [os.path.relpath(name, tmp_path) for name, _ in pictures(tmp_path)]
    assert names == ["a.txt", "b/y", "b/z.png", "c.png", "e.png"]
    (_, load), *more = pictures(tmp_path / "f.png")  # named outright, a pipe is refused at once rather than waited for
    assert not more
    with pytest.raises(ImageError, match="not a regular file"):
        load()


RULE = {"crop_pct": 0.9, "interpolation": "bicubic"}
BAD_CONTRACTS = {
    "without it": False,
    "JSONDecodeError": "{",
    "KeyError": {"format": 1},
    "TypeError": "[1]",
    "format 2": contract(format=2),
    "NCHW": contract(input={**contract()["input"], "layout": "NCHW"}),
    "size 9": contract(input={**contract()["input"], "size": "9"}),
    "(batch, 9, 9, 3)": contract(input={**contract()["input"], "size": 9}),
    "(batch, 4)": contract(embedding_dim=4),
    "crop_pct": contract(preprocess={**RULE, "crop_pct": 1.5}),
    'crop_pct": 0': contract(preprocess={**RULE, "crop_pct": 0}),
    "magic": contract(preprocess={**RULE, "interpolation": "magic"}),
    "border": contract(preprocess={**RULE, "crop_mode": "border"}),
    "sharpen": contract(preprocess={**RULE, "sharpen": 1}),
}


@pytest.mark.parametrize("sign", BAD_CONTRACTS)
def test_a_model_with_a_bad_contract_is_refused(tmp_path: Path, sign: str) -> None:
    with pytest.raises(EdgeError) as caught:
        Embedder(make_model(tmp_path / "m.onnx", BAD_CONTRACTS[sign]))
    text = str(caught.value)
    assert text.startswith("expected ") and ", found " in text and "\n" not in text
    assert sign.replace("size 9", "size '9'") in text


# ---------------------------------------------------------------- heads


def test_heads_match_float64_loops(tmp_path: Path, model: str) -> None:
    embedder, rng = Embedder(model), np.random.default_rng(3)
    linear, bank, held = write_heads(tmp_path, embedder.sha256, rng, dim=16)
    features = rng.normal(size=(9, 16)).astype("f4")
    embeddings = units(features).astype("f4")
    names, shares = classify(load_head(linear, embedder), embeddings, features)
    for row, name, share in zip(features.astype(float), names, shares, strict=True):
        odds = np.exp(held["weight"].astype(float) @ row + held["bias"])
        np.testing.assert_allclose(share, odds / odds.sum(), rtol=1e-5)
        assert name == held["classes"][odds.argmax()]
    names, shares = classify(load_head(bank, embedder), embeddings, features)
    for row, name, share in zip(embeddings.astype(float), names, shares, strict=True):
        cosines = held["embeddings"].astype(float) @ row
        votes = np.zeros(4)
        for place in np.argsort(-cosines)[:7]:
            votes[held["labels"][place]] += np.exp(cosines[place] / 0.07)
        np.testing.assert_allclose(share, votes / votes.sum(), rtol=1e-4)
        assert name == held["classes"][votes.argmax()]
    assert len({*names}) > 1


def test_bank_extremes(tmp_path: Path, model: str) -> None:
    embedder, huge = Embedder(model), {"k": np.array(500), "temperature": np.array(1e-4)}  # exp(10,000) overflows
    _, bank, held = write_heads(tmp_path, embedder.sha256, np.random.default_rng(4), **huge)
    names, shares = classify(load_head(bank, embedder), held["embeddings"][:5], held["embeddings"][:5])
    assert list(names) == [held["classes"][label] for label in held["labels"][:5]]
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    places, cosines = nearest(np.array([[1.0, 0.0]]), np.array([[0, 1], [1, 0], [-1, 0], [1, 0]], np.float32), 3)
    assert places.tolist() == [[1, 3, 0]]  # a tie keeps the bank's order
    assert cosines.tolist() == [[1, 1, 0]]
    ties = np.tile(np.float32([[1, 0], [0.6, 0.8]]), (100, 1))
    assert nearest(ties[:1], ties, 150)[0].tolist() == [[*range(0, 200, 2), *range(1, 101, 2)]]


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.mark,)


def test_unsound_heads_are_refused(tmp_path: Path, model: str) -> None:
    embedder, rng = Embedder(model), np.random.default_rng(5)
    nan = units(rng.normal(size=(50, 3)))
    nan[7] = np.nan
    bad = [
        {"labels": np.full(50, 4)},
        {"k": np.array(0)},
        {"temperature": np.array(0.0)},
        {"embeddings": np.ones((50, 3))},
    ]
    bad += [{"embeddings": nan}, {"classes": np.array([Trap(str(tmp_path / "mark"))], object)}, {"k": np.array("x")}]
    for change in bad:
        with pytest.raises(EdgeError, match="found"):
            load_head(write_heads(tmp_path, embedder.sha256, rng, **change)[1], embedder)
    assert not (tmp_path / "mark").exists()  # nothing was unpickled
    head = load_head(write_heads(tmp_path, embedder.sha256, rng)[0], embedder)
    assert isinstance(head, LinearHead)
    with pytest.raises(EdgeError, match="rows of 3 values"):
        classify(head, np.ones((2, 5)), np.ones((2, 5)))


# ---------------------------------------------------------------- commands


def test_embed_and_nearest(capfd: pytest.CaptureFixture[str], model: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "index.npz"
    code, text, err = run(capfd, "embed", model, photos, "--out", out)
    assert code == 0 and "3 pictures x 3" in text
    assert err == f"skipped {photos}/notes.jpg: not an image that Pillow can read\n"
    with np.load(out) as held:
        assert held["paths"].tolist() == [f"{photos}/{name}" for name in ("a.png", "b.png", "sub/c.png")]
        np.testing.assert_allclose(
            held["embeddings"], [(1, 0, 0), (0, 1, 0), units(np.array([[250, 10, 0]]))[0]], atol=1e-6
        )
    code, text, _ = run(capfd, "embed", model, photos / "b.png")
    assert code == 0 and text == f"{photos}/b.png\t0\t1\t0\n"
    nasty = save(tmp_path / "e\x1b[31m\n.png", plain(RED))
    code, text, err = run(capfd, "embed", model, photos / "notes.jpg", *[nasty] * 40)
    assert (code, text.count("\n"), err.count("\n")) == (0, 40, 1) and "\x1b" not in text
    document = json.loads(run(capfd, "embed", model, photos, "--json")[1])
    assert np.shape(document["embeddings"]) == (3, 3) and len(document["skipped"]) == 1
    query = save(tmp_path / "query.png", plain((255, 20, 0)))
    for index in (out, photos):
        code, text, _ = run(capfd, "nearest", model, query, "--index", index, "--k", 2, "--json")
        found = json.loads(text)["nearest"]
        assert code == 0 and [Path(one["path"]).name for one in found] == ["c.png", "a.png"]
        assert found[1]["cosine"] == pytest.approx(255 / np.hypot(255, 20), abs=1e-6)
    assert (
        run(capfd, "nearest", model, query, "--index", out)[1].splitlines()[-1]
        == f"{20 / np.hypot(255, 20):.6f}\t{photos}/b.png"
    )


def test_classify_time_info(capfd: pytest.CaptureFixture[str], model: str, photos: Path, tmp_path: Path) -> None:
    head, digest = tmp_path / "linear.npz", np.array(Embedder(model).sha256)
    classes = np.array(["red", "green", "blue"])
    np.savez(head, weight=np.eye(3, dtype="f4") / 255, bias=np.zeros(3, "f4"), classes=classes, model_sha256=digest)
    code, text, err = run(capfd, "classify", model, "--head", head, photos / "b.png", photos / "notes.jpg")
    sure = np.e / (np.e + 2)
    assert code == 0 and text == f"{photos}/b.png\tgreen\t{sure:.4f}\n" and err.startswith("skipped ")
    document = json.loads(run(capfd, "classify", model, "--head", head, photos, "--json")[1])
    assert [one["class"] for one in document["pictures"]] == ["red", "green", "red"]
    code, text, _ = run(capfd, "time", model, "--runs", 30, "--json")
    times = json.loads(text)
    assert code == 0 and 0 < times["p50_ms"] <= times["p90_ms"] <= times["p99_ms"] and times["load_ms"] > 0
    assert latency_ms(Embedder(model), 5).shape == (5,)
    assert times["runs"] == 30 and times["preprocessing_included"] is False
    assert "preprocessing not included" in run(capfd, "time", model, "--runs", 3)[1]
    info = json.loads(run(capfd, "info", model, "--json")[1])
    assert info.items() >= contract().items()
    assert (
        info["sha256"] == hashlib.sha256(Path(model).read_bytes()).hexdigest()
        and info["bytes"] == Path(model).stat().st_size
    )
    assert "run_id: run-a" in run(capfd, "info", model)[1].splitlines()


def test_every_user_error_is_one_line_and_status_2(
    capfd: pytest.CaptureFixture[str], model: str, photos: Path, tmp_path: Path
) -> None:
    good, junk, other = photos / "a.png", tmp_path / "junk", tmp_path / "other.npz"
    junk.write_bytes(b"PK\x03\x04 not really")
    write_npz(other, paths=np.array(["x"]), embeddings=np.eye(3, dtype="f4")[:1], model_sha256=np.array("0" * 64))
    wide = write_heads(tmp_path, Embedder(model).sha256, np.random.default_rng(0), dim=5)[1]
    bare = make_model(tmp_path / "bare.onnx", meta=False)
    (tmp_path / "none").mkdir()
    cases: list[list[object]] = [
        [],
        ["fly"],
        ["embed"],
        ["embed", model],
        ["info", model, "--wings"],
        ["time", model, "--threads", "two"],
    ]
    cases += [["info", path] for path in (tmp_path / "gone.onnx", tmp_path, junk, bare)]
    cases += [
        ["embed", model, path] for path in (tmp_path / "gone.png", tmp_path / "none", photos / "notes.jpg", "a\nb")
    ]
    cases += [["embed", model, good, "--out", path] for path in (tmp_path, tmp_path / "no" / "x.npz")]
    cases += [
        ["nearest", model, good, "--index", path]
        for path in (junk, other, wide, good, tmp_path / "gone", tmp_path / "none")
    ]
    cases += [["nearest", model, query, "--index", photos] for query in (junk, photos)]
    cases += [
        ["nearest", model, good, "--index", photos, "--k", "0"],
        ["time", model, "--runs", "0"],
        ["time", model, "--threads", "0"],
    ]
    cases += [["classify", model, "--head", path, good] for path in (junk, other, wide, tmp_path / "gone", model)]
    for argv in cases:
        code, out, err = run(capfd, *argv)
        assert (code, out, err.count("\n")) == (2, "", 1), (argv, out, err)
        assert err.startswith("error: expected ") and ", found " in err and "; " in err and "Traceback" not in err, err


def test_an_npz_file_that_unpacks_to_far_more_than_it_is_is_not_unpacked(tmp_path: Path, model: str) -> None:
    bomb, packed, embedder = tmp_path / "bomb.npz", tmp_path / "packed.npz", Embedder(model)
    digest = np.array(embedder.sha256)
    np.savez_compressed(bomb, paths=np.array(["x"]), embeddings=np.zeros((1 << 16, 256), "f4"), model_sha256=digest)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(EdgeError, match=r"67,\d+,\d+ bytes when unpacked"):
        load_index(bomb, embedder)
    rows = np.random.default_rng(0).normal(size=(3, 8)).astype("f4")
    np.savez_compressed(
        packed,
        paths=np.array(["a", "b", "c"]),
        embeddings=rows / np.linalg.norm(rows, axis=1, keepdims=True),
        model_sha256=digest,
    )
    load_index(packed, embedder)


def test_out_is_written_whole_or_not_at_all(
    capfd: pytest.CaptureFixture[str], model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "folder" / "index.npz"
    out.parent.mkdir()
    out.write_text("old")

    def full(file: io.BufferedWriter, **_: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    code, _, err = run(capfd, "embed", model, photos / "a.png", "--out", out)
    assert code == 2 and "No space left" in err and err.count("\n") == 1
    err = run(capfd, "embed", "gone.onnx", photos, "--out", tmp_path / "no" / "x.npz")[2]
    assert "choose another --out" in err  # told before any work
    assert out.read_text() == "old" and os.listdir(out.parent) == ["index.npz"]


def python(code: str, *argv: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(EXPORT)}
    return subprocess.run(
        [sys.executable, *code.split(" ", 1), *argv], env=env, capture_output=True, text=True, check=True
    ).stdout


def test_the_kit_is_light_and_never_torch(model: str) -> None:
    files = list(EXPORT.rglob("*.py"))
    assert len(files) >= 7
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "torchvision", "timm", "bingo_compress"}, file
    heavy = "[m for m in ('numpy', 'PIL', 'onnxruntime', 'torch') if m in sys.modules]"
    assert python(f"-c import sys, bingo_edge.cli; print({heavy})") == "[]\n"
    assert (
        python(f"-c import sys, bingo_edge; bingo_edge.Embedder(sys.argv[1]); print({heavy})", model)
        == "['numpy', 'PIL', 'onnxruntime']\n"
    )
    assert python("-m bingo_edge", "--help").startswith("usage: bingo-edge")
