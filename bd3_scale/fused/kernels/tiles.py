"""Choose the tiles of the kernels by sizes alone, so that sums have the same order in every run and on every GPU."""

from __future__ import annotations

from typing import NamedTuple

# Channels of a program of SwiGLU: with four warps a thread loads 16 bytes at a time, the widest load.
BLOCK = 1024
# Numbers of a tile of rows or heads, unless a single row or head has more. With four warps 16 for each thread.
NUMBERS = 2048
# The most parts in which the gradient of a norm's weight is summed: several programs for each multiprocessor of the
# largest GPU.
PARTS = 1024
# The least tiles of a program that sums: writing and reading a part costs as much memory traffic as half a row.
LEAST_TILES = 8


class LogitsTile(NamedTuple):
    """The number of entries of a row that a program takes at a time, and its warps."""

    block: int
    num_warps: int


class NormTile(NamedTuple):
    """The rows of a tile, the power of two that holds a row, and the warps of a program."""

    rows: int
    block: int
    num_warps: int


class HeadTile(NamedTuple):
    """The heads of a tile, the power of two that holds half a head, and the warps of a program."""

    heads: int
    padded: int
    num_warps: int


LOGITS = LogitsTile(4096, 8)


def norm_tile(size: int) -> NormTile:
    """Return the tile of rows of `size` numbers."""
    block = max(16, _power_of_two(size))
    rows = max(1, NUMBERS // block)
    return NormTile(rows, block, max(4, rows * block // 512))


def head_tile(size: int) -> HeadTile:
    """Return the tile of heads of `size` numbers."""
    padded = _power_of_two(size // 2)
    return HeadTile(NUMBERS // (2 * padded), padded, 4)


def programs(count: int, of_tile: int) -> tuple[int, int]:
    """Return the number of programs for `count` rows or heads, `of_tile` in a tile, and the tiles of each program."""
    num_tiles = -(-count // of_tile)
    tiles = max(LEAST_TILES, -(-num_tiles // PARTS))
    return -(-num_tiles // tiles), tiles


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
