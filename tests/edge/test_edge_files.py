"""Heads and indexes serve the model file that they were made for and no other; a time counts the pictures that it is
of.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from bingo_edge import Embedder
from bingo_edge.model import latency_ms
from edge_models import RED, contract, make_model, plain, run, save, write_heads


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "student.onnx")


def test_a_head_and_an_index_serve_the_very_file_that_they_were_made_for(
    tmp_path: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run exported at another size has the same run_id, the same width and other features: only the file's digest
    tells.
    """
    other = make_model(tmp_path / "other.onnx", contract(input={**contract()["input"], "size": 9}), size=9)
    digest, query = Embedder(model).sha256, save(tmp_path / "query.png", plain(RED))
    linear, bank, held = write_heads(tmp_path, digest, np.random.default_rng(6))
    assert run(capfd, "embed", model, query, "--out", tmp_path / "index.npz")[0] == 0
    unsigned = tmp_path / "unsigned.npz"  # as bingo-compress wrote them before
    np.savez(unsigned, **{key: held[key] for key in ("weight", "bias", "classes")})
    calls = [
        ("classify", query, "--head", linear),
        ("classify", query, "--head", bank),
        ("nearest", query, "--index", bank),
    ]
    for word, *rest in (*calls, ("nearest", query, "--index", tmp_path / "index.npz")):
        assert run(capfd, word, model, *rest)[0] == 0
        code, out, err = run(capfd, word, other, *rest)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"sha256 {Embedder(other).sha256}, found that of {digest} in " in err
        assert ("run bingo-compress validate again" if word == "classify" else "make it again with this model") in err
    code, _, err = run(capfd, "classify", model, "--head", unsigned, query)
    assert code == 2 and "one that does not say whose it is" in err


def test_an_index_is_of_the_file_that_made_it_whatever_is_put_in_its_place(tmp_path: Path, model: str) -> None:
    path = tmp_path / "student.onnx"
    path.write_bytes(Path(model).read_bytes())
    embedder = Embedder(path)
    path.write_bytes(b"another")
    assert embedder.sha256 == hashlib.sha256(Path(model).read_bytes()).hexdigest()


def test_the_time_of_a_fixed_batch_is_told_by_the_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fixed = make_model(tmp_path / "fixed.onnx", batch=4)
    seen, embedder = [], Embedder(fixed)
    real = embedder.run
    embedder.run = lambda batch: seen.append(batch) or real(batch)  # type: ignore[method-assign,func-returns-value]
    latency_ms(embedder, 1, warm_up=0)
    assert seen[0].shape == (4, 8, 8, 3) and len(np.unique(seen[0])) > 100  # four pictures, not one and padding
    times = json.loads(run(capfd, "time", fixed, "--runs", 5, "--json")[1])
    assert times["batch"] == 4
    assert times["p50_ms_per_picture"] == pytest.approx(times["p50_ms"] / 4)
    assert times["pictures_per_second"] == pytest.approx(4000 / times["p50_ms"])
    said = run(capfd, "time", fixed, "--runs", 5)[1]
    assert "4 pictures a run (the batch is fixed in the file)" in said and "one picture" not in said
