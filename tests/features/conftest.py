"""A folder of 18 photos, its pixel store and a teacher, for every file of this room."""

import pytest
from helpers import CPU, encoder, photos

from bingo_compress.data import image_list, listing, pixel_store
from bingo_compress.models.encoder import Encoder

COUNT = 18


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> image_list.ImageList:
    return listing.list_images(photos(tmp_path_factory.mktemp("photos"), COUNT // 3))


@pytest.fixture(scope="session")
def store(folder: image_list.ImageList, tmp_path_factory: pytest.TempPathFactory) -> pixel_store.PixelStore:
    return pixel_store.build(folder, 40, tmp_path_factory.mktemp("work"), CPU)[0]


@pytest.fixture(scope="session")
def teacher() -> Encoder:
    return encoder()
