"""Tiles of the kernels, from sizes alone, so that sums have the same order in every run and on every GPU."""

from __future__ import annotations

from typing import NamedTuple

# Channels of a program of SwiGLU: with four warps 16 bytes a thread and load, the widest there is.
BLOCK = 1024
# Numbers of a tile of rows or heads, where one of them is not more; a thread has 16 of them.
NUMBERS = 2048
# Parts in which the gradient of a norm's weight is added up: some programs for each processor of the largest GPU.
PARTS = 1024
# Tiles of a program at the least where it adds up: a part costs as much as half a row.
LEAST_TILES = 8


class LogitsTile(NamedTuple):
    """Entries that a program takes of a row at a time, and its warps."""

    block: int
    num_warps: int


class NormTile(NamedTuple):
    """Rows of a tile, the power of two that holds a row, and warps of a program."""

    rows: int
    block: int
    num_warps: int


class HeadTile(NamedTuple):
    """Heads of a tile, the power of two that holds half a head, and warps of a program."""

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
    """Return how many programs pass over `count` rows or heads, `of_tile` in a tile, and the tiles of each."""
    num_tiles = -(-count // of_tile)
    tiles = max(LEAST_TILES, -(-num_tiles // PARTS))
    return -(-num_tiles // tiles), tiles


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
