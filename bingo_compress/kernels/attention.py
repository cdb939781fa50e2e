"""The queue in one reading: for every row the logarithm of its softmax's sum over the negatives, and their mean weighed
by it.

What the losses compute step by step would write and read a (B, Q) matrix a dozen times; here none is made (the softmax
as it goes is FlashAttention's, arXiv 2205.14135). Products are of float16, whose fraction is TF32's, sums of float32,
in a fixed order, so that a run is the same bit for bit. Written in Triton, which torch brings along on Linux.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Rows and negatives that a program holds at a time, and how it is run."""

    rows: int
    columns: int
    warps: int
    stages: int


# Fastest first of those tried on an H100; what a card has too little shared memory for is left to the next.
TILES = Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)
PROGRAMS = 132  # at once: one for each multiprocessor of the largest cards
WIDEST = 256  # numbers an embedding that a tile has room for


# fmt: off
@triton.jit
def _attend(rows, negatives, masked, scale, tops, sums, means, count, length, width, part,
            HIDE: tl.constexpr, MASKED: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    # fmt: on
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    real = row < count
    wide = (depth < width)[None, :]
    query = tl.load(rows + row[:, None] * width + depth[None, :], mask=real[:, None] & wide, other=0).to(tl.float16)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, DEPTH], tl.float32)
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, length), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < length
        place = negatives + column[:, None].to(tl.int64) * width + depth[None, :]
        key = tl.load(place, mask=there[:, None] & wide, other=0).to(tl.float16)
        logits = tl.dot(query, tl.trans(key)) * scale
        if HIDE:
            mask = masked + row[:, None].to(tl.int64) * length + column[None, :]
            hidden = tl.load(mask, mask=real[:, None] & there[None, :], other=0)
            logits = tl.where(hidden != 0, MASKED, logits)
        logits = tl.where(there[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        kept, weights = tl.exp2(top - higher), tl.exp2(logits - higher[:, None])
        total = total * kept + tl.sum(weights, 1)
        mean = mean * kept[:, None] + tl.dot(weights.to(tl.float16), key)
        top = higher
    out = tl.program_id(1) * count + row
    tl.store(tops + out, top, mask=real)
    tl.store(sums + out, total, mask=real)
    tl.store(means + out[:, None].to(tl.int64) * width + depth[None, :], mean, mask=real[:, None] & wide)


def attended(
    rows: Tensor, negatives: Tensor, masked: Tensor | None, temperature: float, least: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """(log of the sum over the negatives of exp(row . q / tau), (B,); their mean, weighed by that softmax, (B, D)).
    Neither has a gradient. rows: (B, D) of length one, D at most WIDEST; negatives: (Q, D), Q at least 1; masked:
    (B, Q) bool, whose logit is `least`, or None.
    """
    rows, negatives = rows.detach().float().contiguous(), negatives.float().contiguous()
    (count, width), length = rows.shape, len(negatives)
    tall = triton.cdiv(count, tile.rows)
    part = triton.cdiv(triton.cdiv(length, max(1, PROGRAMS // tall)), tile.columns) * tile.columns
    parts = triton.cdiv(length, part)
    tops, sums = rows.new_empty(parts, count), rows.new_empty(parts, count)
    means = rows.new_empty(parts, count, width)
    hidden = rows if masked is None else masked.contiguous().view(torch.uint8)
    _attend[tall, parts](
        rows, negatives, hidden, math.log2(math.e) / temperature, tops, sums, means, count, length, width, part,
        HIDE=masked is not None, MASKED=least * math.log2(math.e), ROWS=tile.rows, COLUMNS=tile.columns,
        DEPTH=max(16, triton.next_power_of_2(width)), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    top = tops.amax(0)
    shares = (tops - top).exp2()
    total = (sums * shares).sum(0)
    return (top + total.log2()) * math.log(2), (means * shares[:, :, None]).sum(0) / total[:, None]
