"""List the tile sizes of each kernel, and keep the choices made among them.

Other tiles add in another order and round differently. A run that must resume bitwise therefore keeps `choices()` in
its checkpoint and passes them to `use_choices` before its next step. Without a choice the first tile of the list is
used: only `tuning.tune` measures times.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

KERNELS = ("forward", "query_gradient", "clean_key_gradient", "noisy_key_gradient", "fused_gradient")

# Upper limit of the parts of the keys in decoding: `combine_kernel` holds all parts of a row in registers.
MOST_SPLITS = 128
# Rows of a program of `delta_kernel`.
DELTA_ROWS = 64
# Spans that a program of `clean_key_gradient_kernel` loads at a time, to find the rows that see its keys.
SCAN = 512


class Tile(NamedTuple):
    """The numbers of query rows and keys of a tile, warps of a program, and stages of the pipeline that loads tiles."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


_Table = Mapping[str, Mapping[int, tuple[Tile, ...]]]

# By kernel and head dimension (16 and 32 take the tiles of 64), for 16-bit tensors. None spills more registers than
# `tests/attention/test_kernels_compile.py` allows. This first table fits chips with 99 KiB of shared memory a program.
_POINTERS: _Table = {
    "forward": {
        64: (Tile(128, 64, 4, 3), Tile(128, 128, 8, 2)),
        128: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
        256: (Tile(64, 32, 8, 2),),
    },
    "query_gradient": {
        64: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
        128: (Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),
        256: (Tile(32, 32, 8, 2),),
    },
    "clean_key_gradient": {
        64: (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)),
        128: (Tile(32, 128, 8, 2), Tile(64, 64, 8, 2)),
        256: (Tile(32, 32, 8, 2),),
    },
    "fused_gradient": {
        64: (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)),
        128: (Tile(64, 64, 8, 2), Tile(32, 128, 8, 2)),
        256: (Tile(32, 32, 8, 2),),
    },
    "noisy_key_gradient": {
        64: (Tile(64, 64, 4, 1), Tile(32, 32, 4, 1)),
        128: (Tile(32, 64, 8, 1), Tile(32, 32, 4, 1)),
        256: (Tile(32, 32, 8, 1),),
    },
}
_HOPPER: _Table = {
    "forward": {
        64: (Tile(128, 128, 8, 3), Tile(128, 64, 4, 3)),
        128: (Tile(128, 64, 8, 3), Tile(128, 128, 8, 2)),
        256: (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
    },
    "query_gradient": {
        64: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
        128: (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        256: (Tile(64, 32, 8, 2), Tile(64, 32, 4, 2)),
    },
    "clean_key_gradient": {
        64: (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)),
        # Triton 3.6 spills registers in the second ones: 288 and 416 bytes a thread.
        128: (Tile(32, 128, 8, 2), Tile(64, 128, 8, 2)),
        256: (Tile(32, 32, 8, 2),),
    },
    "fused_gradient": {
        64: (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)),
        128: (Tile(32, 128, 8, 2), Tile(64, 128, 8, 2)),
        256: (Tile(32, 32, 8, 2),),
    },
    "noisy_key_gradient": _POINTERS["noisy_key_gradient"],
}
_BLACKWELL: _Table = {
    **_HOPPER,
    "clean_key_gradient": {**_HOPPER["clean_key_gradient"], 256: (Tile(32, 64, 8, 1), Tile(32, 32, 8, 2))},
    # A tile of 64×128 with 128 dimensions would need more tensor memory than a multiprocessor has.
    "fused_gradient": {**_HOPPER["fused_gradient"], 128: (Tile(64, 64, 8, 2), Tile(32, 128, 8, 2))},
}
_FLOAT32 = {64: (Tile(32, 32, 8, 2),), 128: (Tile(16, 16, 8, 1),)}

_chosen: dict[str, Tile] = {}


def candidates(kernel: str, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Tile, ...]:
    """Return the tiles that `kernel` may use, the default first."""
    tables = {9: _HOPPER, 10: _BLACKWELL}.get(capability[0], _POINTERS)
    by_head_dim = tables[kernel] if dtype.itemsize == 2 else _FLOAT32
    return by_head_dim[max(head_dim, 64)]


def candidates_on(device: torch.device, kernel: str, head_dim: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Return `candidates` for the chip of `device`."""
    return candidates(kernel, head_dim, dtype, _capability(device))


def tile_for(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """Return the tile chosen for `kernel`, or the default."""
    chosen = _chosen.get(_key(kernel, head_dim, dtype, _capability(device)))
    return chosen or candidates_on(device, kernel, head_dim, dtype)[0]


def decode_tile(num_rows: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """Return the tile of the decoding kernel: at least `num_rows` rows where the registers can hold them."""
    if dtype.itemsize == 4:
        return Tile(16, 32, 4, 1) if head_dim <= 64 else Tile(16, 16, 8, 1)
    most = 64 if head_dim <= 128 else 32
    return Tile(min(max(16, 1 << (num_rows - 1).bit_length()), most), most, 4 if head_dim <= 64 else 8, 3)


def uses_tma(capability: tuple[int, int]) -> bool:
    """Say whether loops load by the tensor memory accelerator: on chips with it and with 227 KiB of shared memory."""
    return capability[0] in (9, 10)


def choices() -> dict[str, list[int]]:
    """Return every choice made so far, as plain values for a checkpoint."""
    return {key: list(tile) for key, tile in _chosen.items()}


def use_choices(kept: Mapping[str, Sequence[int]]) -> None:
    """Replace the choices of this process by those of another process or of a checkpoint."""
    _chosen.clear()
    _chosen.update({key: Tile(*tile) for key, tile in kept.items()})


def choose(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device, tile: Tile) -> None:
    """Use `tile` from now on for calls of `kernel` with this head_dim, dtype and kind of chip."""
    _chosen[_key(kernel, head_dim, dtype, _capability(device))] = tile


def is_chosen(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether a tile was chosen for such calls, here or by `use_choices`."""
    return _key(kernel, head_dim, dtype, _capability(device)) in _chosen


def _key(kernel: str, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> str:
    return f"{kernel} head_dim={head_dim} {str(dtype).removeprefix('torch.')} sm_{capability[0]}{capability[1]}"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability; (0, 0) under Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
