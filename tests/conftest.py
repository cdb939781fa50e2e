"""Fixtures that several files share: a folder of odd-sized photos, what the program prints, the pictures outside of the
repository, and one trace of each network.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import traced
from helpers import Ran, command, picture
from rich.console import Console

from bingo_compress.runtime import console

# (width, height): wide, tall, square, one pixel thin, and nothing a multiple of eight.
SIZES = ((33, 57), (64, 64), (200, 31), (17, 90), (1, 40), (121, 80), (50, 49), (9, 7))
THREADS = torch.get_num_threads()
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with mock.patch.object(torch.onnx, "export", traced.once(tmp_path_factory.mktemp("graphs"))):
        yield


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A test that sets torch's threads, as every command does, sets them for itself alone; what a fixture of its module
    set before it holds no more.
    """
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def bingo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """bingo(*words): the command line in this process."""

    def run(*words: object) -> Ran:
        return command(monkeypatch, capsys, *words)

    return run


@pytest.fixture
def make_photo() -> Callable[..., Path]:
    """make_photo(path, number=0, width=40, height=30): writes a JPEG, making its folder."""

    def make(path: Path, number: int = 0, width: int = 40, height: int = 30) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, width, height).save(path, "JPEG", quality=90)
        return path

    return make


@pytest.fixture
def photos(tmp_path: Path, make_photo: Callable[..., Path]) -> Path:
    """A folder of eight JPEGs of odd sizes, in the folders `cats` and `dogs`."""
    root = tmp_path / "photos"
    for number, (width, height) in enumerate(SIZES):
        make_photo(root / ("cats", "dogs")[number % 2] / f"{number}.jpg", number, width, height)
    return root


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed on standard output, as to a log of 140 columns."""
    text = io.StringIO()
    monkeypatch.setattr(
        console, "console", Console(file=text, highlight=False, soft_wrap=True, width=140, force_terminal=False)
    )
    return text


@pytest.fixture
def clothing() -> Path:
    """The small photo set that lies beside the repository on the developers' machines."""
    folder = SHARED_DATA / "clothing"
    if not folder.is_dir():
        pytest.skip(f"no photos at {folder}")
    return folder
