"""Describe a rank's states as boxes of the full tensors.

A checkpoint must be readable under any topology, so it stores tensors and not ranks. ZeRO cuts a *flattened* parameter
into equal shares, at any element: a rank's share is a stretch of the tensor in row-major order, and a stretch is seldom
a rectangle. torch.distributed.checkpoint describes shards by an offset and a shape, that is by rectangles; a stretch of
an n-dimensional tensor makes up at most 2n − 1 of them (n − 1 ragged beginnings, one middle, n − 1 ragged ends).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from bd3_scale.model.layout import Piece

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """`data`, shaped like the box, at `offset` of the full tensor `key` of `full_shape`."""

    key: str
    data: Tensor
    offset: Shape
    full_shape: Shape


def split_stretch(shape: Shape, start: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    """Yield (offset, shape) of the boxes that elements [start, end) of a row-major tensor of `shape` make up."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    # The rows [first_whole, last_whole) lie in the stretch as a whole; a ragged row before and one behind are split
    # again.
    first_whole, last_whole = -(-start // row), end // row
    if first_whole > last_whole:
        yield from _within_row(shape, start // row, start % row, end - start // row * row)
        return
    if start % row:
        yield from _within_row(shape, start // row, start % row, row)
    if first_whole < last_whole:
        yield (first_whole, *(0,) * (len(shape) - 1)), (last_whole - first_whole, *shape[1:])
    if end % row:
        yield from _within_row(shape, last_whole, 0, end % row)


def _within_row(shape: Shape, index: int, start: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    for offset, size in split_stretch(shape[1:], start, end):
        yield (index, *offset), (1, *size)


def boxes_of(pieces: Iterable[Piece], start: int, states: Mapping[str, Tensor]) -> Iterator[Box]:
    """Yield the boxes of flat `states`, which hold the elements from `start` on of the parameter that `pieces` lay out.

    A box's tensor is named `<state>.<key of the piece>`.
    """
    numel = next(iter(states.values())).numel()
    for piece in pieces:
        low = max(start, piece.start)
        high = min(start + numel, piece.start + piece.numel)
        position = low - start
        for offset, size in split_stretch(piece.shape, low - piece.start, high - piece.start):
            count = math.prod(size)
            origin = tuple(a + b for a, b in zip(piece.offset, offset, strict=True))
            for name, flat in states.items():
                yield Box(
                    f"{name}.{piece.key}",
                    flat[position : position + count].view(size),
                    origin,
                    piece.full_shape,
                )
            position += count
