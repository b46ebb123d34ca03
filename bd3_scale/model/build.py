"""Build a rank's part of the model from a recipe."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from bd3_scale.attention.backends import choose_backend
from bd3_scale.model.block import Block
from bd3_scale.model.config import transformer_config
from bd3_scale.model.init import initialise_weights
from bd3_scale.model.mixture import Mixture
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.recipe.schema import ModelRecipe, ParallelRecipe, Recompute
from bd3_scale.recipe.vocabulary import Vocabulary

Chunks = list[BlockDiffusionTransformer]
_WHOLE = ParallelRecipe()


def build_model(
    model: ModelRecipe,
    vocabulary: Vocabulary,
    groups: ProcessGroupCollection,
    *,
    parallel: ParallelRecipe = _WHOLE,
    dtype: torch.dtype,
    device: torch.device,
    seed: int | None,
    deterministic: bool = True,
    attention_backend: str = "auto",
    recompute: tuple[Recompute, int | None] = ("none", None),
) -> Chunks:
    """Return this rank's part of the model on `device`: its chunks of the pipeline, one chunk without a pipeline.

    Args:
        seed: weights are drawn from it, the same on every layout; None: weights are left uninitialised, for a load.
        recompute: what is computed again in backward, and in how many layers of a chunk; see `TrainRecipe`.

    Raises:
        ValueError: the attention backend cannot run there.
    """
    config = transformer_config(model, parallel, dtype=dtype, device=device, deterministic=deterministic)
    assert not config.gradient_accumulation_fusion, "it writes main_grad, which ZeRO never reads"
    backend = choose_backend(attention_backend, device, dtype, model.head_size)
    every_stage = range(groups.pp.rank(), len(parallel.chunks(model.num_layers)), groups.pp.size())
    # megatron-core creates weights on the current GPU, whatever the default device is.
    with device, torch.cuda.device(device if device.type == "cuda" else -1):
        chunks = [
            BlockDiffusionTransformer(
                config,
                model,
                vocabulary,
                groups,
                parallel=parallel,
                chunk=chunk,
                attention_backend=backend,
                recompute=recompute,
            )
            for chunk in every_stage
        ]
    for chunk in chunks:
        _mark_split_weights(chunk)
        if seed is not None:
            initialise_weights(chunk, num_layers=model.num_layers, init_std=model.init_std, seed=seed)
            if chunk.post_process and not model.tie_embeddings:
                chunk.output_layer.zero_forbidden_rows()
    return chunks


def layer_shapes(model: ModelRecipe) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of each tensor of a layer, by its name in checkpoints after `decoder.layers.`.

    Not every layer has all of them, see `layers_with`.
    """
    config = transformer_config(model, _WHOLE, dtype=torch.float32, device=torch.device("cpu"), deterministic=False)
    # A group of one rank that needs no torch.distributed.
    single = dist.ProcessGroup(0, 1)  # type: ignore[call-arg]  # the stub lacks it
    groups = ProcessGroupCollection(tp=single, cp=single, ep=single, expt_dp=single)
    tensors: dict[str, Tensor] = {}
    with torch.device("meta"):
        if model.dense_layers:
            tensors |= Block(model, config, single, layer=0).state_dict()
        if model.moe is not None:
            tensors |= Block(model, config, single, layer=0, mlp=Mixture(model, config, groups)).state_dict()
    # megatron-core's linears have an `_extra_state` entry, which is None.
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def layers_with(model: ModelRecipe, name: str) -> range:
    """Return the layers that have a tensor of `layer_shapes`, in the order of its first axis in checkpoints."""
    if not name.startswith("mlp.") or model.moe is None:
        return range(model.num_layers)
    of_mixture = name.startswith(("mlp.router.", "mlp.experts.", "mlp.shared_experts."))
    return range(model.dense_layers, model.num_layers) if of_mixture else range(model.dense_layers)


def _mark_split_weights(model: BlockDiffusionTransformer) -> None:
    """Mark the weights that are split over ranks, for DeepSpeed's gradient norm, and those with partial gradients.

    DeepSpeed counts a weight without the mark as a replica, and counts replicas once. megatron sets the marks only
    where it initialises weights itself, which it does not do here; without them the gradient norm, and so the clipping,
    would be silently wrong.

    Under sequence parallelism each rank's gradient of an unsplit tensor, such as a norm's weight, comes from the rank's
    own rows only. The engine sums the gradients of what is marked `partial_over_tp`.
    """
    for module in model.modules():
        if (
            isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
            and module.weight is not None
        ):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)
    for parameter in model.decoder.parameters() if model.config.sequence_parallel else ():
        if not getattr(parameter, "tensor_model_parallel", False):
            parameter.partial_over_tp = True  # type: ignore[attr-defined]
    # DeepSpeed's norm must count a tied embedding once, although two pipeline stages hold it.
    if model.tied_weight is not None and not model.pre_process:
        model.tied_weight.ds_pipe_replicated = True  # type: ignore[attr-defined]
