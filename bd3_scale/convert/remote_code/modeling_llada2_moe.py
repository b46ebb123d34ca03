"""Define LLaDA2-MoE for transformers: the block diffusion model of `modeling_bd3` with LLaDA2's names and order of
weights.

Legend: B sequences, S new tokens, X hidden size, H query heads, G key/value heads, D dimensions per head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache

# transformers 4 copies only modules that this file imports itself to the folder that it imports from.
from .configuration_bd3 import Bd3Config  # noqa: F401
from .configuration_llada2_moe import LLaDA2MoeConfig
from .generation_bd3 import Bd3GenerationMixin  # noqa: F401
from .mlp_bd3 import make_mlp
from .modeling_bd3 import Bd3Attention, Bd3DecoderLayer, Bd3ForCausalLM, Bd3Model, hidden_norm


def channel_order(size: int, rotary_dim: int) -> list[int]:
    """Return an order of a head's channels that turns LLaDA2's rotary pairs into those of `modeling_bd3`.

    LLaDA2 rotates the first `rotary_dim` of `size` channels, in pairs (i, i + turned / 2); `modeling_bd3` has pairs
    (i, i + size / 2), of which the first ones are rotated.
    """
    half, rest = rotary_dim // 2, (size - rotary_dim) // 2
    low, high = [*range(half)], [*range(half, rotary_dim)]
    return [*low, *range(rotary_dim, rotary_dim + rest), *high, *range(rotary_dim + rest, size)]


class LLaDA2MoeAttention(Bd3Attention):
    """Attention whose queries, keys and values come from one matrix, in this order."""

    def __init__(self, config: LLaDA2MoeConfig, layer: int) -> None:
        nn.Module.__init__(self)
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.order = channel_order(self.head_dim, int(self.head_dim * config.partial_rotary_factor))
        width = self.heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width + 2 * self.groups * self.head_dim, bias=False)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)
        self.query_layernorm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def heads_of(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.query_key_value(hidden).unflatten(-1, (-1, self.head_dim))
        q_BSHD, k_BSGD, v_BSGD = qkv.split([self.heads, self.groups, self.groups], dim=-2)
        order = torch.tensor(self.order, device=hidden.device)
        q_BSHD, k_BSGD = self.query_layernorm(q_BSHD), self.key_layernorm(k_BSGD)
        return q_BSHD.index_select(-1, order), k_BSGD.index_select(-1, order), v_BSGD

    def project(self, out: Tensor) -> Tensor:
        return self.dense(out)


class LLaDA2MoeDecoderLayer(Bd3DecoderLayer):
    """A layer with LLaDA2's name of the attention module."""

    def __init__(self, config: LLaDA2MoeConfig, layer: int) -> None:
        nn.Module.__init__(self)
        self.input_layernorm = hidden_norm(config)
        self.attention = LLaDA2MoeAttention(config, layer)
        self.post_attention_layernorm = hidden_norm(config)
        self.mlp = make_mlp(config, layer)

    def attend(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        return self.attention(hidden, rotary, mask, cache)


class LLaDA2MoeModel(Bd3Model):
    """The transformer without its head, with LLaDA2's name of the embedding."""

    config_class = LLaDA2MoeConfig
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]  # noqa: RUF012  (transformers reads a plain class attribute)

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super(Bd3Model, self).__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = hidden_norm(config)
        self.post_init()

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class LLaDA2MoeModelLM(Bd3ForCausalLM):
    """The transformer with its head, under the class name of the published models."""

    config_class = LLaDA2MoeConfig
    model_class = LLaDA2MoeModel
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]  # noqa: RUF012
