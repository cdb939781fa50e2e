"""From what a user gives to a list of images."""

from pathlib import Path

from bingo_compress.data.image_list import ImageList
from bingo_compress.sources.opened import Data, asked, numbers, open_sources


def list_images(data: Data, option: str = "--data", work: Path | None = None) -> ImageList:
    """Every image of one source or several, each real file once. work: of a run, if there is one: what `ImageList.keep`
    kept there is not found anew. Raises BingoError for a place that is none.
    """
    opened = open_sources(data, option, work)
    bands = numbers(asked(data).bands)
    return ImageList(opened.root, opened.names, opened.bad, passed=opened.passed, bands=bands, opened=opened)
