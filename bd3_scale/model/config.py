"""The recipe's model in megatron-core's terms."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from bd3_scale.recipe.schema import ModelRecipe, ParallelRecipe

_ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


def transformer_config(
    model: ModelRecipe, parallel: ParallelRecipe, *, dtype: torch.dtype, device: torch.device, deterministic: bool
) -> TransformerConfig:
    """megatron-core's configuration of `model`; weights are left uninitialised, see `initialise_weights`.

    Fusions stay off where they need Transformer Engine or apex: `gradient_accumulation_fusion` writes `main_grad`,
    which DeepSpeed's ZeRO never reads. The interleaved schedule always overlaps its messages, without which two stages,
    each other's neighbour on both sides, take one message for the other and train on wrong gradients; and gloo still
    reads a sent tensor whose memory the schedules would have given back.
    """
    on_cpu = device.type == "cpu"
    chunks = parallel.chunks(model.num_layers)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_hidden_size,
        activation_func=_ACTIVATIONS[model.activation],
        gated_linear_unit=model.activation == "swiglu",
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        add_bias_linear=model.mlp_bias,
        add_qkv_bias=model.attention_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_layout(chunks) if parallel.pipeline > 1 else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        deterministic_mode=deterministic and not on_cpu,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=False,
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        deallocate_pipeline_outputs=not on_cpu,
    )


def _layout(chunks: tuple[int, ...]) -> list[list[str]]:
    """megatron's names of what each chunk holds."""
    layout = [["decoder"] * layers for layers in chunks]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
