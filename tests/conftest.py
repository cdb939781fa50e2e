"""Fixtures that several files share: a folder of odd-sized photos, what the program prints, the pictures outside of the
repository, and one trace of each network.

torch and the program are imported within, by the processes that run tests and not by the one that hands them out.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

if TYPE_CHECKING:
    from helpers import Ran

# (width, height): wide, tall, square, one pixel thin, and nothing a multiple of eight.
SIZES = ((33, 57), (64, 64), (200, 31), (17, 90), (1, 40), (121, 80), (50, 49), (9, 7))
LONG = ("test_distributed.py", "test_soak.py", "test_stale_state.py")
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes a minute comes first, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import torch
    import traced

    home = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        home = home.parent  # of all processes of this session
    kept = home / "graphs"
    kept.mkdir(exist_ok=True)
    with mock.patch.object(torch.onnx, "export", traced.once(kept)), traced.one_registry():
        yield


@pytest.fixture(scope="session")
def threads_at_first() -> int:
    import torch

    return torch.get_num_threads()


@pytest.fixture(autouse=True)
def threads(threads_at_first: int) -> Iterator[None]:
    """A test that sets torch's threads, as every command does, sets them for itself alone; what a fixture of its module
    set before it holds no more.
    """
    import torch

    torch.set_num_threads(threads_at_first)
    yield
    torch.set_num_threads(threads_at_first)


@pytest.fixture
def bingo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """bingo(*words): the command line in this process."""

    from helpers import command

    def run(*words: object) -> Ran:
        return command(monkeypatch, capsys, *words)

    return run


@pytest.fixture
def make_photo() -> Callable[..., Path]:
    """make_photo(path, number=0, width=40, height=30): writes a JPEG, making its folder."""

    from helpers import picture

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
    from rich.console import Console

    from bingo_compress.runtime import console

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
