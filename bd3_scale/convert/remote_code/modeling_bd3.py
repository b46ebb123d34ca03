"""Define a block diffusion language model (BD3-LM, Arriola et al., ICLR 2025) for transformers.

The logits at a position predict the token of that position, not of the next one. A token sees all tokens of its own
block, in both directions, and all blocks before it. Blocks are counted from position 0, so a prompt may end inside one.

Runs on transformers 4 (4.51 or newer) and 5, and needs nothing else but PyTorch.

Legend: B sequences, S new tokens, T tokens with those in the cache, X hidden size, H query heads, G key/value heads,
D dimensions per head, K tokens per block, V vocabulary entries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_bd3 import Bd3Config
from .generation_bd3 import Bd3GenerationMixin
from .mlp_bd3 import make_mlp


def rotary_table(positions: Tensor, config: Bd3Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles of positions [..., S], each [..., S, 1, D/2] (Su et al., 2021).

    They are computed in fp32 from the config in every forward pass. A buffer would not work: transformers creates a
    model on the meta device, and a buffer that no checkpoint holds would be left uninitialised.
    """
    rotary_dim = int(config.head_dim * config.partial_rotary_factor)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = _scale_frequencies(frequencies, config.rope_scaling)
    # Frequency 0 leaves the remaining pairs as they are.
    frequencies = F.pad(frequencies, (0, (config.head_dim - rotary_dim) // 2))
    angles = (positions.float()[..., None] * frequencies)[..., None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _scale_frequencies(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Scale rotary frequencies as Llama 3 does.

    Wavelengths above context / low_freq_factor are made `factor` times longer, those below context / high_freq_factor
    stay, and those between are interpolated; context is the original one.
    """
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [B, S, heads, D] by the angles of `rotary_table`, in pairs (i, i + D/2)."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat(
        [torch.addcmul(low * cos, high, sin, value=-1), torch.addcmul(high * cos, low, sin)],
        dim=-1,
    )


def block_causal_mask(start: int, end: int, block_size: int, device: torch.device) -> Tensor | None:
    """Return bool [S, T], true if a token of positions start…end−1 sees one of 0…end−1; None if each sees all."""
    if start // block_size == (end - 1) // block_size:
        return None
    blocks = torch.arange(end, device=device) // block_size
    return blocks <= blocks[start:, None]


def behind_padding(mask: Tensor | None, padding_B: Tensor, start: int, end: int) -> Tensor:
    """Extend `block_causal_mask` to sequences that begin behind `padding_B` positions, [B, 1, S, T].

    Padding sees padding, since the softmax of a row without any visible position would be NaN.
    """
    is_padding = torch.arange(end, device=padding_B.device) < padding_B[:, None]
    sees = is_padding[:, None, :] == is_padding[:, start:, None]
    return (sees if mask is None else sees & mask)[:, None]


def hidden_norm(config: Bd3Config) -> nn.Module:
    """Return the norm of hidden states that the config names."""
    if config.normalization == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps, bias=config.norm_bias)


class Bd3Attention(nn.Module):
    """Grouped-query attention with rotary positions and, by `config.qk_norm`, RMSNorm over each query and key."""

    def __init__(self, config: Bd3Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        """Return the attention of hidden [B, S, X], of the same shape; keys and values are appended to the cache."""
        q_BSHD, k_BSGD, v_BSGD = self.heads_of(hidden)
        q_BSHD, k_BSGD = rotate(q_BSHD, *rotary), rotate(k_BSGD, *rotary)
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSGD, v_BSGD))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if mask is not None:
            # PyTorch's fused kernels support a mask, or fewer key than query heads, but not both together.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=mask is None)
        return self.project(out.transpose(1, 2).flatten(2))

    def heads_of(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, S, H, D], keys and values [B, S, G, D], normalised by the model's norms, not yet
        rotated."""
        q_BSHD, k_BSGD, v_BSGD = (
            projection(hidden).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(q_BSHD), self.k_norm(k_BSGD), v_BSGD

    def project(self, out: Tensor) -> Tensor:
        """Apply the output projection: [B, S, H·D] → [B, S, X]."""
        return self.o_proj(out)


class Bd3DecoderLayer(nn.Module):
    """A pre-norm layer: attention and an MLP or mixture of experts, each with a residual connection."""

    def __init__(self, config: Bd3Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = hidden_norm(config)
        self.self_attn = Bd3Attention(config, layer)
        self.post_attention_layernorm = hidden_norm(config)
        self.mlp = make_mlp(config, layer)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        hidden = hidden + self.attend(self.input_layernorm(hidden), rotary, mask, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def attend(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        """Return the attention's output; a subclass may name the module otherwise."""
        return self.self_attn(hidden, rotary, mask, cache)


class Bd3PreTrainedModel(PreTrainedModel):
    """The base of both models: the config class, and settings that transformers reads."""

    config_class: type[Bd3Config] = Bd3Config
    base_model_prefix = "model"
    _no_split_modules = ["Bd3DecoderLayer"]  # noqa: RUF012  (transformers reads a plain class attribute)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: Bd3Config) -> None:
        super().__init__(config)
        if config.num_experts and config.moe_router_enable_expert_bias:
            # One training step changes the bias by less than the spacing of half precision.
            self._keep_in_fp32_modules_strict = ["expert_bias"]

    def _cache(self, given: DynamicCache | None, use_cache: bool | None) -> DynamicCache | None:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return DynamicCache() if given is None and use_cache else given


class Bd3Model(Bd3PreTrainedModel):
    """The transformer without its head."""

    def __init__(self, config: Bd3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Bd3DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = hidden_norm(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        store_kv: bool = True,
        block_size: int | None = None,
        padding: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Compute the hidden states of `input_ids` [B, S], whose positions follow those in the cache.

        Args:
            attention_mask: all ones, or None: the sequences of a batch have the same length.
            position_ids: those positions, or None.
            past_key_values: keys and values of whole blocks, which all S tokens see.
            use_cache: create a cache if none is given, `config.use_cache` by default; a given one is always used.
            store_kv: append the S tokens to the cache. A denoising pass does not, since its masked tokens will change;
                a pass over the finished block does.
            block_size: replaces `config.block_size`.
            padding: [B], positions on the left of each sequence, including those in the cache, that hold nothing; whole
                blocks. Positions are counted from behind them.

        Raises:
            ValueError: another attention mask, other positions, another kind of cache, or a cache that ends inside a
                block.
        """
        block_size = self.config.block_size if block_size is None else block_size
        cache = self._cache(past_key_values, use_cache)
        start = _cached_tokens(cache, block_size)
        end = start + input_ids.shape[1]
        positions = torch.arange(start, end, device=input_ids.device)
        _check_mask_and_positions(attention_mask, position_ids, positions)
        mask = block_causal_mask(start, end, block_size, input_ids.device)
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)
            mask = behind_padding(mask, padding, start, end)
        hidden = self.embed(input_ids)
        rotary = rotary_table(positions, self.config, hidden.dtype)
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, rotary, mask, cache)
            states.append(hidden)
        states[-1] = hidden = self.norm(hidden)
        if cache is not None and not store_kv:
            # A negative number removes as many tokens; it is the only form with one meaning in transformers 4 and 5.
            cache.crop(-input_ids.shape[1])
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        # Positional arguments, since the cache's field has different names in transformers 4 and 5.
        output = BaseModelOutputWithPast(hidden, cache, tuple(states) if keep else None)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of ids; a subclass may name the module otherwise."""
        return self.embed_tokens(input_ids)


def _cached_tokens(cache: Any, block_size: int) -> int:
    if cache is None:
        return 0
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"past_key_values must be a DynamicCache, not a {type(cache).__name__}")
    length = int(cache.get_seq_length())
    if length % block_size:
        raise ValueError(
            f"the cache holds {length} tokens, not whole blocks of {block_size}: its last tokens have not seen the "
            "rest of their block; store a block only when it is complete"
        )
    return length


def _check_mask_and_positions(mask: Tensor | None, position_ids: Tensor | None, positions_S: Tensor) -> None:
    if mask is not None and (mask.dim() != 2 or not bool((mask == 1).all())):
        raise ValueError(
            "attention_mask must be [B, T] and all ones, since forward accepts no padding: give sequences of one "
            "length, or one at a time; generate accepts padding on the left. The block-causal mask is created here"
        )
    if position_ids is not None and not bool((position_ids == positions_S.expand_as(position_ids)).all()):
        raise ValueError("position_ids must start at 0, or continue behind the cache: leave them out")


class Bd3ForCausalLM(Bd3PreTrainedModel, Bd3GenerationMixin):
    """The transformer with its head, and generation block by block."""

    model_class = Bd3Model

    def __init__(self, config: Bd3Config) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        store_kv: bool = True,
        block_size: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute fp32 logits [B, S, V], which predict the token of their own position; arguments as for `Bd3Model`.

        Raises:
            ValueError: `labels` are given, and what `Bd3Model` refuses.
        """
        if labels is not None:
            raise ValueError(
                "labels are not supported: a loss needs a noisy and a clean copy of the text in one pass, which this "
                "model, made for inference, does not run"
            )
        cache = self._cache(past_key_values, use_cache)
        base = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values=cache,
            use_cache=False,
            store_kv=store_kv,
            block_size=block_size,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        output = CausalLMOutputWithPast(None, self._logits(base[0]), cache, base.hidden_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()
