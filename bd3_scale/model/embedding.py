"""Look up token vectors, split by vocabulary over tensor-parallel ranks, with a fast deterministic backward.

Up to half of all rows are the mask token. The backward sums these rows separately, see `_Lookup`.

Legend: N rows, B sequences, X hidden size, V vocabulary entries of this tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bd3_scale.model.exchange import sum_rows
from bd3_scale.recipe.vocabulary import Vocabulary


class Embedding(MegatronModule):
    """The embedding, under the name that it has in megatron-core's models and checkpoints."""

    def __init__(self, vocabulary: Vocabulary, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.tp_group = groups.tp
        self.word_embeddings = WordEmbeddings(vocabulary, config, groups)


class WordEmbeddings(VocabParallelEmbedding):
    """The vectors of tokens; each tensor-parallel rank holds a range of ids."""

    def __init__(self, vocabulary: Vocabulary, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(
            vocabulary.padded_size, config.hidden_size, init_method=None, config=config, tp_group=groups.tp
        )
        self.mask_id = vocabulary.mask_id
        self.sequence_parallel = config.sequence_parallel

    def forward(self, tokens: Tensor, pieces: int) -> Tensor:
        """Return the vectors [N, B, X] of int64 tokens [N, B].

        Under sequence parallelism only this rank's part of the rows, which are exchanged in `pieces`, see `exchange`.
        """
        if self.tp_group.size() == 1 and not torch.is_grad_enabled():
            # The cost of an autograd function is noticeable in the short passes of decoding.
            return F.embedding(tokens, self.weight)
        vectors = _Lookup.apply(self.weight, tokens, self.vocab_start_index, self.mask_id, self.tp_group.size() > 1)
        if self.sequence_parallel:
            return sum_rows(vectors, pieces, self.tp_group)
        return reduce_from_tensor_model_parallel_region(vectors, group=self.tp_group)


class _Lookup(torch.autograd.Function):
    """weight[tokens − first], and zeros for tokens of other ranks.

    Why not `weight[ids]`: in deterministic mode its backward sorts the ids and adds the rows of one id one after the
    other. On a GPU this takes milliseconds, because half of all rows have the mask's id, and with tensor parallelism
    the rows of other ranks' tokens share one id, too. The backward of `F.embedding` is deterministic as well (PyTorch,
    pull request 187682) and skips the rows of a padding id. Here the padding id is the mask's: its rows, and those of
    other ranks, are skipped, and the mask's gradient is one product of a vector and a matrix. Not run on a GPU yet.
    """

    @staticmethod
    def forward(ctx: Any, weight_VX: Tensor, tokens: Tensor, first: int, mask_id: int, is_split: bool) -> Tensor:
        size = len(weight_VX)
        # Not through `save_for_backward`: other micro-batches add to it before this backward runs, and autograd refuses
        # a saved tensor that has changed.
        ctx.total = getattr(weight_VX, "main_grad", None)
        # If another rank holds the mask's vector, any id of this rank can be the skipped one.
        left_out = mask_id - first if first <= mask_id < first + size else 0
        ctx.size, ctx.left_out = size, left_out
        if not is_split:
            ctx.save_for_backward(tokens, tokens == left_out)
            return F.embedding(tokens, weight_VX)
        foreign = (tokens < first) | (tokens >= first + size)
        local_ids = (tokens - first).masked_fill(foreign, left_out)
        ctx.save_for_backward(local_ids, (local_ids == left_out) & ~foreign)
        return F.embedding(local_ids, weight_VX).masked_fill_(foreign[..., None], 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        local_ids, is_left_out = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        grad_weight = torch.ops.aten.embedding_dense_backward(rows, local_ids.flatten(), ctx.size, ctx.left_out, False)
        grad_weight[ctx.left_out] = torch.mv(rows.t(), is_left_out.flatten().to(rows.dtype))
        if ctx.total is not None:
            ctx.total.add_(grad_weight)
            return (None,) * 5
        return grad_weight, None, None, None, None
