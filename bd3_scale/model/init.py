"""Initialise all weights, equally on every parallel layout.

The full tensor of each layer is drawn from a generator keyed by (seed, name, layer), and a rank keeps its boxes of it.
A rank therefore draws more numbers than it keeps; in return, layouts can be compared weight by weight.
"""

from __future__ import annotations

import hashlib
import itertools
import math

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from bd3_scale.model.layout import Piece, parameter_layouts

# Projections that write into the residual stream. Their variance is divided by the number of writers, 2 · num_layers,
# so that the stream does not grow with depth (GPT-2: Radford et al., 2019, section 2.3).
_RESIDUAL_WRITERS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight", "experts.linear_fc2.weight")


@torch.no_grad()
def initialise_weights(model: MegatronModule, *, num_layers: int, init_std: float, seed: int) -> None:
    """Draw matrices from N(0, init_std²), residual writers scaled by 1/√(2·num_layers), and set biases to 0.

    A parameter with an attribute `initial` is filled with that number.

    Raises:
        ValueError: a parameter that is none of these.
    """
    for layout in parameter_layouts([model]):
        if not layout.is_trained:
            continue
        flat = layout.parameter.data.view(-1)
        initial = getattr(layout.parameter, "initial", None)
        if initial is not None:
            flat.fill_(initial)
            continue
        for piece in layout.pieces:
            values = initial_box(piece, num_layers, init_std, seed)
            flat[piece.start : piece.start + piece.numel].copy_(values.reshape(-1))


def initial_box(piece: Piece, num_layers: int, init_std: float, seed: int) -> Tensor:
    """Return the initial values of a box of a full tensor, fp32; see `initialise_weights`."""
    if piece.key.endswith("bias"):
        return torch.zeros(piece.shape)
    # Tensors of the decoder's layers have the layer as first axis; those of experts have the experts as next axes.
    is_expert = ".experts." in piece.key
    if len(piece.full_shape) != 2 + piece.key.startswith("decoder.layers.") and not is_expert:
        raise ValueError(f"{piece.key} is no matrix and has no initial value: give the parameter an `initial`")
    std = init_std / math.sqrt(2 * num_layers) if piece.key.endswith(_RESIDUAL_WRITERS) else init_std
    places = [range(o, o + s) for o, s in zip(piece.offset[:-2], piece.shape[:-2], strict=True)]
    rows, columns = (slice(o, o + s) for o, s in zip(piece.offset[-2:], piece.shape[-2:], strict=True))
    matrices = [
        _matrix("/".join(map(str, (seed, piece.key, *(place or (0,))))), piece.full_shape[-2:])[rows, columns] * std
        for place in itertools.product(*places)
    ]
    return torch.stack(matrices).view(piece.shape)


def _matrix(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal numbers that depend on the key alone."""
    # SHA-256, because Python's own hash of a string differs from process to process.
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
