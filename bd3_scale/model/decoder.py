"""The stack of layers: built and sharded by megatron-core, run here over noisy and clean rows.

Legend: N rows of a rank, B sequences, X hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bd3_scale.model.attention import BlockDiffusionSelfAttention, CoreAttention, QKVLinear
from bd3_scale.model.norm import head_norm, hidden_norm
from bd3_scale.model.rows import RowContext
from bd3_scale.recipe.schema import ModelRecipe


def decoder_spec(
    model: ModelRecipe, num_layers: int, *, attention_backend: str, recompute_core: bool
) -> TransformerBlockSubmodules:
    """What `num_layers` layers are made of, and the norm after the last one."""
    norm = hidden_norm(rms=model.normalization == "rmsnorm", bias=model.norm_bias)
    qk_norm = head_norm() if model.qk_norm else None
    attention = ModuleSpec(
        module=BlockDiffusionSelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask, "recompute_core": recompute_core},
        submodules=SelfAttentionSubmodules(
            linear_qkv=QKVLinear,
            core_attention=ModuleSpec(CoreAttention, params={"backend": attention_backend}),
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    layer = ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=IdentityFuncOp,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=IdentityFuncOp,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


class DecoderLayer(TransformerLayer):
    """Attention and MLP, pre-norm. The model's last layer returns no clean rows: nothing reads them (DESIGN §4.5)."""

    def forward(self, hidden_NBX: Tensor, rows: RowContext) -> Tensor:
        num_rows = hidden_NBX.shape[0]
        if self.layer_number == self.config.num_layers and rows.num_noisy:
            num_rows = num_rows // rows.num_streams * rows.num_noisy
        hidden_NBX = hidden_NBX[:num_rows] + self.self_attention(self.input_layernorm(hidden_NBX), rows, num_rows)
        output, bias = self.mlp(self.pre_mlp_layernorm(hidden_NBX))
        return hidden_NBX + (output if bias is None else output + bias)


class Decoder(TransformerBlock):
    """The layers of one pipeline chunk, and the final norm on the last one.

    `recompute_layers`: of the first so many layers, nothing but the input is kept for backward.
    """

    def __init__(self, *args: Any, recompute_layers: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recompute_layers = recompute_layers

    def forward(self, hidden_NBX: Tensor | None, rows: RowContext) -> Tensor:
        """hidden_NBX: [N, B, X] of the embedding; None where the schedule hands over the previous stage's output."""
        hidden = self.input_tensor if hidden_NBX is None else hidden_NBX
        assert hidden is not None
        for index, layer in enumerate(self.layers):
            if index < self.recompute_layers and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, rows, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(hidden, rows)
        return hidden if self.final_layernorm is None else self.final_layernorm(hidden)
