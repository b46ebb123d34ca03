"""Make the configuration that megatron-core's schedules, linears and embedding read.

Our own layers read the recipe.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bd3_scale.recipe.schema import ModelRecipe, ParallelRecipe


def transformer_config(
    model: ModelRecipe, parallel: ParallelRecipe, *, dtype: torch.dtype, device: torch.device, deterministic: bool
) -> TransformerConfig:
    """Return megatron-core's configuration; weights are left uninitialised, see `initialise_weights`.

    Three settings avoid silent errors of megatron-core 0.16.1:

    - `gradient_accumulation_fusion` is off: it writes gradients to `main_grad`, which DeepSpeed's ZeRO never reads.
    - `overlap_p2p_comm` is on for the interleaved schedule. Without it two stages that are each other's neighbours in
      both directions take one message for another, and train on wrong gradients.
    - `deallocate_pipeline_outputs` frees a sent tensor's memory early. It is off on CPU, since gloo still reads that
      memory, and off for the interleaved schedule, where NCCL's overlapped messages do (Megatron-LM pull request 4047).
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
