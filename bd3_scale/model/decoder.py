"""Run the layers of a pipeline chunk, one after the other.

Legend: N rows of a rank, B sequences, X hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bd3_scale.model.block import Block, Norm
from bd3_scale.model.rows import RowContext


class Decoder(nn.Module):
    """The layers of a chunk, and the norm after the model's last layer.

    Args:
        recompute_layers: the number of first layers that keep only their input and are computed again in backward.
    """

    def __init__(self, layers: Sequence[Block], final_layernorm: Norm | None, *, recompute_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.final_layernorm = final_layernorm
        self.recompute_layers = recompute_layers

    def forward(self, x_NBX: Tensor, rows: RowContext) -> Tensor:
        more_NBX = None
        for index, layer in enumerate(self.layers):
            if index < self.recompute_layers and torch.is_grad_enabled():
                # With `add` the next layer gets one tensor, so that one is kept for it and not two.
                x_NBX, more_NBX = checkpoint(
                    layer, x_NBX, more_NBX, rows, add=True, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_NBX, more_NBX = layer(x_NBX, more_NBX, rows)
        if self.final_layernorm is not None:
            return self.final_layernorm(x_NBX, more_NBX)[1]
        return x_NBX if more_NBX is None else x_NBX + more_NBX

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple, metadata: dict[str, Any]) -> dict[str, Any]:
        """Place the tensors of the layers: all layers share one tensor, whose first axis is the layer."""
        entries: dict[str, Any] = {}
        for layer in cast(Sequence[Block], self.layers):
            numbered, shared = f"{prefix}layers.{layer.layer}.", f"{prefix}layers."
            of_layer = layer.sharded_state_dict(numbered, ((0, layer.layer, layer.num_layers),), metadata)
            replace_prefix_for_sharding(of_layer, numbered, shared)
            entries |= of_layer
        if self.final_layernorm is not None:
            entries |= self.final_layernorm.sharded_state_dict(f"{prefix}final_layernorm.", (), metadata)
        return entries
