"""The block diffusion transformer: embedding, megatron-core decoder, vocabulary-parallel head.

Shapes: B sequences, L data tokens a sequence, S rows of the forward (2L in training), M masked rows, V vocabulary
entries of this tensor-parallel rank.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from bd3_scale.model.attention import BlockDiffusionCoreAttention, BlockDiffusionSelfAttention
from bd3_scale.model.kv_cache import KVCache
from bd3_scale.model.norm import head_norm, hidden_norm
from bd3_scale.model.rotary import rotary_table
from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary


def _block_spec(model: ModelRecipe, *, tensor_parallel: bool, attention_backend: str) -> TransformerBlockSubmodules:
    norm = hidden_norm(rms=model.normalization == "rmsnorm", bias=model.norm_bias)
    qk_norm = head_norm(tensor_parallel=tensor_parallel) if model.qk_norm else None
    attention = ModuleSpec(
        module=BlockDiffusionSelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ModuleSpec(BlockDiffusionCoreAttention, params={"backend": attention_backend}),
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * model.num_layers, layer_norm=norm)


class BlockDiffusionTransformer(MegatronModule):
    """A transformer over noisy and clean rows whose head never predicts the mask token or vocabulary padding."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelRecipe,
        vocabulary: Vocabulary,
        groups: ProcessGroupCollection,
        *,
        attention_backend: str,
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.recipe = model
        self.vocabulary = vocabulary
        self.tp_group = groups.tp
        self.embedding = LanguageModelEmbedding(
            config, vocabulary.padded_size, max_sequence_length=0, position_embedding_type="rope", tp_group=groups.tp
        )
        self.decoder = TransformerBlock(
            config,
            _block_spec(model, tensor_parallel=groups.tp.size() > 1, attention_backend=attention_backend),
            pg_collection=groups,
        )
        self.output_layer = ColumnParallelLinear(
            config.hidden_size,
            vocabulary.padded_size,
            config=config,
            init_method=config.init_method,
            bias=model.head_bias,
            skip_weight_param_allocation=model.tie_embeddings,
            tp_group=groups.tp,
        )
        ids = torch.arange(vocabulary.padded_size).chunk(groups.tp.size())[groups.tp.rank()]
        forbidden = (ids == vocabulary.mask_id) | (ids >= vocabulary.size)
        self.register_buffer("forbidden_V", forbidden, persistent=False)

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """megatron's schedules hand over the previous stage's output here; one stage has none."""
        assert input_tensor is None or input_tensor == [None]

    def forward(
        self, noisy_BL: Tensor, clean_BL: Tensor, positions_BL: Tensor, spans: Tensor, rows_M: Tensor
    ) -> Tensor:
        """Negative log-likelihood in nats, fp32 [M], of the clean tokens at the noisy rows `rows_M`.

        Args:
            noisy_BL, clean_BL: token ids, int64 [B, L].
            positions_BL: positions within the document, int64 [B, L].
            spans: int32 [3, B, L], see `bd3_scale.attention.spans`.
            rows_M: the masked rows as indices into the flattened [B, L], int64 [M]; the head sees no others.
        """
        length = noisy_BL.shape[1]
        hidden_SBH = self._decode(torch.cat([noisy_BL, clean_BL], dim=1), positions_BL.repeat(1, 2), spans)
        hidden_MH = hidden_SBH[:length].transpose(0, 1).flatten(0, 1)[rows_M]
        logits_MV = self._logits(hidden_MH[:, None])
        return tensor_parallel.vocab_parallel_cross_entropy(logits_MV, clean_BL.flatten()[rows_M][:, None])[:, 0]

    def clean_logits(self, clean_BL: Tensor, positions_BL: Tensor, spans: Tensor) -> Tensor:
        """Clean-only forward: logits fp32 [B, L, padded vocabulary]."""
        return self._all_logits(self._decode(clean_BL, positions_BL, spans))

    def prefill(self, clean_BL: Tensor, positions_BL: Tensor, spans: Tensor | None, cache: KVCache) -> None:
        """Append clean rows to the cached prefix.

        With `spans` (int32 [3, B, L]) they are whole blocks and the cache is empty; without, they are one block that
        sees the prefix and itself.
        """
        self._decode(clean_BL, positions_BL, spans, cache)
        cache.commit(clean_BL.shape[1])

    def decode(self, block_BL: Tensor, positions_BL: Tensor, cache: KVCache) -> Tensor:
        """Logits fp32 [B, L, padded vocabulary] of one block that sees the cached prefix and itself; the prefix
        stays.
        """
        return self._all_logits(self._decode(block_BL, positions_BL, None, cache))

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` positions."""
        weight = self.embedding.word_embeddings.weight
        groups = self.recipe.query_groups // self.tp_group.size()
        shape = (batch_size, capacity, groups, self.recipe.head_size)
        return KVCache(self.config.num_layers, shape, weight.dtype, weight.device)

    def _decode(
        self, tokens_BS: Tensor, positions_BS: Tensor, spans: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        table = rotary_table(positions_BS, self.recipe.head_size, self.recipe.rope_theta, self.config.params_dtype)
        return self.decoder(
            self.embedding(tokens_BS, positions_BS), attention_mask=spans, rotary_pos_emb=table, inference_context=cache
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        """This rank's part of the logits in fp32, with −∞ where a clean token cannot be."""
        weight = self.embedding.word_embeddings.weight if self.recipe.tie_embeddings else None
        logits, _ = self.output_layer(hidden, weight=weight)
        return logits.float().masked_fill(self.forbidden_V, float("-inf"))

    def _all_logits(self, hidden_SBH: Tensor) -> Tensor:
        return gather_from_tensor_model_parallel_region(self._logits(hidden_SBH), self.tp_group).transpose(0, 1)
