"""What megatron-core's schedules, linears and embedding read; the layer itself reads the recipe."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bd3_scale.recipe.schema import ModelRecipe, ParallelRecipe


def transformer_config(
    model: ModelRecipe, parallel: ParallelRecipe, *, dtype: torch.dtype, device: torch.device, deterministic: bool
) -> TransformerConfig:
    """Return megatron-core's configuration; weights are left uninitialised, see `initialise_weights`.

    `gradient_accumulation_fusion` stays off: it writes `main_grad`, which DeepSpeed's ZeRO never reads. The interleaved
    schedule always overlaps its messages, without which two stages, each other's neighbour on both sides, take one
    message for the other and train on wrong gradients. A sent tensor's memory is given back early only where nobody
    reads it any more: gloo still does, and so does NCCL where messages overlap (Megatron-LM, pull request 4047).
    """
    on_cpu, interleaved = device.type == "cpu", parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        deterministic_mode=deterministic and not on_cpu,
        gradient_accumulation_fusion=False,
        batch_p2p_comm=False,
        overlap_p2p_comm=interleaved,
        deallocate_pipeline_outputs=not on_cpu and not interleaved,
    )
