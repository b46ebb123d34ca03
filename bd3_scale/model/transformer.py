"""Define the block diffusion transformer: embedding, decoder layers and output head; whole, or a chunk of a pipeline.

Legend: B sequences, R positions of this rank, S streams, C noisy copies, N rows of this rank, M rows of the head,
X hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bd3_scale.attention.dispatch import decoder
from bd3_scale.model.attend import AttendToCache, AttendToRows
from bd3_scale.model.block import Block, Norm, rotary_table
from bd3_scale.model.decoder import Decoder
from bd3_scale.model.embedding import Embedding
from bd3_scale.model.exchange import gather_rows, own_rows
from bd3_scale.model.head import OutputLayer
from bd3_scale.model.kv_cache import Appending, KVCache
from bd3_scale.model.mixture import Mixture
from bd3_scale.model.rows import NOISE_ROWS, MaskNoise, ModelInputs, RowContext
from bd3_scale.recipe.schema import ModelRecipe, ParallelRecipe, Recompute
from bd3_scale.recipe.vocabulary import Vocabulary

EMBEDDING = "embedding.word_embeddings.weight"


class BlockDiffusionTransformer(MegatronModule):
    """A transformer over noisy and clean rows; its head never predicts the mask token or vocabulary padding.

    Args:
        chunk: the number of this chunk of the pipeline, in the order of the layers. The first chunk has the embedding,
            the last one the head; with tied embeddings, a last chunk that is not the first has its own copy of the
            embedding.
        recompute: see `build_model`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelRecipe,
        vocabulary: Vocabulary,
        groups: ProcessGroupCollection,
        *,
        parallel: ParallelRecipe,
        chunk: int,
        attention_backend: str,
        recompute: tuple[Recompute, int | None],
    ) -> None:
        super().__init__(config=config)
        chunks = parallel.chunks(model.num_layers)
        self.model_type = ModelType.encoder_or_decoder
        self.recipe = model
        self.vocabulary = vocabulary
        self.attention_backend = attention_backend
        self.cp_group = groups.cp
        self.tp_group = groups.tp
        self.dp_cp_group = groups.dp_cp
        self.input_tensor: Tensor | None = None
        self.vp_stage = chunk // parallel.pipeline if parallel.virtual_pipeline > 1 else None
        self.pre_process = chunk == 0
        self.post_process = chunk == len(chunks) - 1
        self.ties_across_stages = model.tie_embeddings and len(chunks) > 1
        if self.pre_process:
            self.embedding = Embedding(vocabulary, config, groups)
        recomputed, recomputed_layers = recompute
        first = sum(chunks[:chunk])
        self.decoder = Decoder(
            [
                Block(
                    model,
                    config,
                    groups.tp,
                    layer=layer,
                    recompute_attention=recomputed == "selective",
                    mlp=None if layer < model.dense_layers else Mixture(model, config, groups),
                )
                for layer in range(first, first + chunks[chunk])
            ],
            Norm(model, config, groups.tp) if self.post_process else None,
            recompute_layers=(recomputed_layers or chunks[chunk]) if recomputed == "full" else 0,
        )
        if self.post_process:
            owns_weight = not (model.tie_embeddings and self.pre_process)
            self.output_layer = OutputLayer(model, vocabulary, config, groups.tp, owns_weight=owns_weight)

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """Return this chunk's copy of an embedding that another stage also has, or None; the engine sums gradients."""
        if not self.ties_across_stages or not (self.pre_process or self.post_process):
            return None
        weight = self.embedding.word_embeddings.weight if self.pre_process else self.output_layer.weight
        return cast(nn.Parameter, weight)

    @property
    def mixtures(self) -> dict[int, Mixture]:
        """Return the mixtures of experts, by the number of their layer in the model."""
        layers = cast(Iterable[Block], self.decoder.layers)
        return {layer.layer: layer.mlp for layer in layers if isinstance(layer.mlp, Mixture)}

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Receive the previous stage's output; megatron's schedules call this. The first stage has none."""
        self.input_tensor = input_tensor[0]

    def forward(self, inputs: ModelInputs) -> Tensor | tuple[Tensor, Tensor]:
        """Return the rows for the next chunk, [N, B, X]; on the last chunk the losses.

        The losses are their weighted sum, a scalar in nats, and the loss of each row of the head, fp32 [M], without
        gradient.
        """
        hidden_NBX = self._decode(
            inputs.tokens, inputs.positions, inputs.num_noisy, inputs.spans, mask_noise=inputs.mask_noise
        )
        if not self.post_process:
            return hidden_NBX
        total, loss_M = self.output_layer(
            self._head_rows(hidden_NBX, inputs), self._head_weight(), inputs.targets, inputs.weights, inputs.row_loss
        )
        return total, loss_M

    def head_logits(self, inputs: ModelInputs) -> Tensor:
        """Return the logits of the head's rows, fp32 [M, padded vocabulary]; the model must be one chunk."""
        return self._gathered(self.output_layer(self.head_inputs(inputs), self._head_weight()))

    def head_inputs(self, inputs: ModelInputs) -> Tensor:
        """Return the inputs of the head, [M, X]; the model must be one chunk."""
        return self._head_rows(self._decode(inputs.tokens, inputs.positions, inputs.num_noisy, inputs.spans), inputs)

    def _head_rows(self, hidden_NBX: Tensor, inputs: ModelInputs) -> Tensor:
        """Return the rows that the head reads, [M, X].

        Only masked rows are predicted, so that the head computes nothing for the others.
        """
        if self.config.sequence_parallel:
            streams = inputs.num_noisy or inputs.num_streams
            return gather_rows(hidden_NBX, streams, self.tp_group).flatten(0, 1)[inputs.head_rows]
        hidden_MX = hidden_NBX.flatten(0, 1)[inputs.head_rows]
        return copy_to_tensor_model_parallel_region(hidden_MX, group=self.tp_group)

    def embed(self, inputs: ModelInputs) -> tuple[Tensor, RowContext]:
        """Return the arguments of the first layer: the embeddings [N, B, X] and the context of the rows."""
        rows = self._rows(inputs.tokens, inputs.positions, inputs.num_noisy, inputs.spans)
        return self._embed(inputs.tokens, rows, inputs.mask_noise), rows

    def clean_logits(self, clean_BL: Tensor, positions_BL: Tensor, spans: Tensor) -> Tensor:
        """Return the logits of a clean-only forward, fp32 [B, L, padded vocabulary]."""
        return self._all_logits(self._decode(clean_BL, positions_BL, 0, spans))

    def prefill(self, block_BL: Tensor, positions_BL: Tensor, cache: KVCache) -> None:
        """Append a clean block to each of the cache's first B sequences; a block sees the prefix and itself."""
        self._decode_block(block_BL, positions_BL, cache, torch.zeros_like(block_BL, dtype=torch.bool))
        cache.commit([block_BL.shape[1]] * len(block_BL))

    def append(self, blocks_BL: Tensor, positions_BL: Tensor, cache: KVCache, sequence: int) -> None:
        """Append several clean blocks to one sequence in one pass; each sees the prefix, earlier blocks and itself."""
        nowhere = torch.zeros_like(blocks_BL, dtype=torch.bool)
        self._decode_block(blocks_BL, positions_BL, Appending(cache, sequence), nowhere)
        cache.lengths[sequence] += blocks_BL.numel()

    def decode(self, block_BL: Tensor, positions_BL: Tensor, cache: KVCache, wanted_BL: Tensor | None = None) -> Tensor:
        """Return the logits of one block that sees the cached prefix and itself, fp32 [B, L, padded vocabulary].

        The prefix does not change. With `wanted_BL`, bool with M true values, only their logits are computed and
        returned: [M, padded vocabulary]. Passes with the same tensor object as `positions_BL`, unchanged, share its
        rotary table (`KVCache.positions`).
        """
        hidden = self._decode_block(block_BL, positions_BL, cache, wanted_BL)
        return self._gathered(self.output_layer(hidden, self._head_weight()))

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for `capacity` positions; it is valid while the weights do not change."""
        assert not self.config.sequence_parallel
        weight = self.embedding.word_embeddings.weight
        groups = self.recipe.query_groups // self.tp_group.size()
        shape = (batch_size, capacity, groups, self.recipe.head_size)
        layers = [layer.for_decoding() for layer in cast(Iterable[Block], self.decoder.layers)]
        return KVCache(layers, shape, weight.dtype, weight.device)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return megatron's names and offsets of the weights.

        The last stage's copy of a tied embedding gets the embedding's name and another replica id, so that it is loaded
        from the same tensor and not written.
        """
        metadata = {"dp_cp_group": self.dp_cp_group, **(metadata or {})}
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.ties_across_stages and self.post_process:
            copy = cast(ShardedTensor, entries[f"{prefix}output_layer.weight"])
            copy.key = f"{prefix}{EMBEDDING}"
            copy.replica_id = (1, *copy.replica_id[1:])
        return cast(dict[str, Any], entries)

    def _decode(
        self,
        tokens_BN: Tensor,
        positions_BR: Tensor,
        num_noisy: int,
        spans: Tensor,
        mask_noise: MaskNoise | None = None,
    ) -> Tensor:
        rows = self._rows(tokens_BN, positions_BR, num_noisy, spans)
        hidden = self._embed(tokens_BN, rows, mask_noise) if self.pre_process else self.input_tensor
        return self.decoder(hidden, rows)

    @torch.no_grad()
    def _decode_block(
        self, block_BL: Tensor, positions_BL: Tensor, cache: KVCache | Appending, wanted_BL: Tensor | None
    ) -> Tensor:
        """Return the hidden states of a block after the last norm, [B, L, X], or [M, X] of the wanted rows."""
        # All passes of a block share its rotary table. Tensors are compared by identity: comparing values would make
        # the host wait for the device.
        if cache.rotary is None or cache.rotary[0] is not positions_BL:
            cache.rotary = positions_BL, rotary_table(positions_BL, self.recipe, self.config.params_dtype)
        dtype, device = self.config.params_dtype, positions_BL.device
        attend = AttendToCache(cache, decoder(self.attention_backend, device, dtype, self.recipe.head_size))
        rows = RowContext(cache.rotary[1], attend, wanted=wanted_BL)
        hidden, more = self.embedding.word_embeddings(block_BL, 1), None
        for layer in cache.layers:
            hidden, more = layer(hidden, more, rows)
        assert self.decoder.final_layernorm is not None, "generation runs on one stage"
        return cast(Tensor, self.decoder.final_layernorm(hidden, more)[1])

    def _rows(self, tokens_BN: Tensor, positions_BR: Tensor, num_noisy: int, spans: Tensor) -> RowContext:
        streams = tokens_BN.shape[1] // positions_BR.shape[1]
        table = rotary_table(positions_BR.t(), self.recipe, self.config.params_dtype).repeat(1, streams, 1, 1)
        attend = AttendToRows(spans, streams, num_noisy, self.attention_backend, self.cp_group)
        return RowContext(table, attend, streams, num_noisy)

    def _embed(self, tokens_BN: Tensor, rows: RowContext, mask_noise: MaskNoise | None) -> Tensor:
        """Return embeddings [N, B, X]; under sequence parallelism of this rank's part of each stream's positions."""
        hidden = self.embedding.word_embeddings(tokens_BN.t(), rows.num_streams)
        return hidden if mask_noise is None else hidden + self._mask_noise(tokens_BN, rows.num_streams, mask_noise)

    def _mask_noise(self, tokens_BN: Tensor, num_streams: int, noise: MaskNoise) -> Tensor:
        """Return Gaussian noise [N, B, X] for the masked rows of `_embed`, zeros for the others."""
        rows = F.pad(noise.rows, (0, tokens_BN.shape[1] - noise.rows.shape[1]))
        rows = rows.masked_fill(tokens_BN != self.vocabulary.mask_id, 0).t()
        if self.config.sequence_parallel:
            rows = own_rows(rows, num_streams, self.tp_group)
        return noise.std * F.embedding(
            rows, noise_table(self.config.hidden_size, tokens_BN.device, self.config.params_dtype)
        )

    def _head_weight(self) -> Tensor | None:
        tied_here = self.recipe.tie_embeddings and self.pre_process
        return self.embedding.word_embeddings.weight if tied_here else None

    def _all_logits(self, hidden_NBX: Tensor) -> Tensor:
        logits = self.output_layer(hidden_NBX, self._head_weight())
        return self._gathered(logits).transpose(0, 1)

    def _gathered(self, logits: Tensor) -> Tensor:
        """Return logits of the whole vocabulary, gathered from the tensor-parallel ranks.

        One rank skips megatron's autograd function, which takes as long as three operators of a decoding pass.
        """
        if self.tp_group.size() == 1:
            return logits
        return cast(Tensor, gather_from_tensor_model_parallel_region(logits, self.tp_group))


@functools.lru_cache(maxsize=1)
def noise_table(hidden_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return [NOISE_ROWS, X]: zeros, then standard normal vectors, the same on every rank of every run."""
    table = torch.randn(NOISE_ROWS, hidden_size, generator=torch.Generator().manual_seed(0))
    table[0] = 0
    return table.to(device, dtype)
