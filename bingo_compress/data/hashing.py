"""The files of a list, read and hashed by several processes together."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bingo_compress.data.image_list import Contents, ImageList, read_contents
from bingo_compress.errors import BingoError
from bingo_compress.runtime import distributed


def hashed(folder: ImageList) -> ImageList:
    """The same images, whose files several processes have read, each a stretch of them; one process reads them when
    they are asked for.

    Every process must come here, or one within `from_first`: a process alone would wait for ever. What one raises is
    raised in all, and BingoError where they list other files.
    """
    if distributed.world() == 1:
        return folder
    _refuse_other_files(folder)

    def own() -> Iterator[list[Tensor]]:
        read = read_contents(folder, distributed.stretch(range(len(folder.files))))
        yield [torch.from_numpy(read.digests), torch.from_numpy(read.stamps)]

    digests, stamps = distributed.joined(own())
    return replace(folder, read=Contents(digests.numpy(), stamps.numpy()))


def _refuse_other_files(folder: ImageList) -> None:
    told = distributed.exchange((len(folder.files), folder.hash_of_names().digest()))
    other = next((number for number, listed in enumerate(told) if listed != told[0]), 0)
    if other:
        counts = [f"{told[number][0]:,} in process {number}" for number in (0, other)]
        raise BingoError(
            f"{folder.where}: expected the same files in every process, found {' and '.join(counts)}, whose names"
            " differ; let every machine see the same folder, with nothing writing to it, and start again"
        )
