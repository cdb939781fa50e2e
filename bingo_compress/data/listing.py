"""From what a user gives to a list of images."""

from bingo_compress.data.image_list import ImageList
from bingo_compress.sources.opened import Data, asked, numbers, open_sources


def list_images(data: Data, option: str = "--data") -> ImageList:
    """Every image of one source or several, each real file once. Raises BingoError for a place that is none."""
    opened = open_sources(data, option)
    bands = numbers(asked(data).bands)
    return ImageList(opened.root, opened.names, opened.bad, passed=opened.passed, bands=bands, opened=opened)
