"""Tensors of a checkpoint of other software, whatever its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """Tensors of a model by their names in a Hugging Face checkpoint, read one at a time.

    Attributes:
        shapes, dtypes: of every tensor.
        read: gives one by its name; nothing else is in memory.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]
