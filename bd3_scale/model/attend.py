"""Attend to the keys that a layer's queries see: of the same pass, gathered from other ranks, or of a cache.

Legend: S streams, R positions of this rank, B sequences, L tokens of a block, H query heads and G key/value heads of
this tensor-parallel rank, D dimensions a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from bd3_scale.attention.dispatch import Decoder, block_attention
from bd3_scale.model.kv_cache import Appending, KVCache


class Attend(Protocol):
    """Attention of a layer, after its projections, norms and rotation."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [a, b, H·D] for query [a, b, H, D], key and value [a', b, G, D], for any a, a' and b.

        layer: counted from zero through all pipeline stages.
        """
        ...


@dataclass(frozen=True)
class AttendToRows:
    """Attention among noisy and clean rows, under the block diffusion mask that the spans give.

    Queries are [rows, B, H, D] of the first streams or of all streams; keys are [S·R, B, G, D] of all streams.

    Attributes:
        spans, num_streams, num_noisy: see `ModelInputs`.
        backend: see `bd3_scale.attention.backends.choose_backend`.
        group: of the context-parallel ranks, whose clean keys are gathered.
    """

    spans: Tensor
    num_streams: int
    num_noisy: int
    backend: str
    group: ProcessGroup

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_noisy = self.num_noisy
        if self.group.size() > 1:
            key, value = self._gather(key, value)
            # In MDLM noisy keys of all ranks are gathered. They take the place of clean keys, which rows see by the
            # ranges doc_start to block_end of the spans.
            num_noisy = num_noisy if self._has_clean else 0
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        out = block_attention(q, k, v, self.spans, num_noisy=num_noisy, backend=self.backend)
        return out.transpose(0, 1).flatten(2)

    @property
    def _has_clean(self) -> bool:
        return self.num_streams > self.num_noisy

    def _gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's noisy keys and values, then the clean ones of the whole sequence, by one collective.

        The backward of the gather sums the gradients over ranks and scatters them. Noisy keys are not gathered, since
        only their own block sees them, and it is on this rank. In MDLM, where a block is the whole sequence and there
        is no clean stream, they are gathered instead.
        """
        num_local = key.shape[0] // self.num_streams * self.num_noisy if self._has_clean else 0
        to_gather = torch.cat([key[num_local:], value[num_local:]], dim=2)
        gathered = gather_from_sequence_parallel_region(to_gather, group=self.group)
        # Every rank holds an early and a late range, see `zigzag_ranges`: the late ones come in reverse order.
        early, late = gathered.unflatten(0, (self.group.size(), 2, -1)).unbind(1)
        k, v = torch.cat([early, late.flip(0)]).flatten(0, 1).chunk(2, dim=2)
        return torch.cat([key[:num_local], k]), torch.cat([value[:num_local], v])


@dataclass(frozen=True)
class AttendToCache:
    """Attention of the rows of a block, [B, L, …], to the cached prefix and to each other.

    The block's keys are written behind the prefix in the cache, so that prefix and block are one view.
    """

    cache: KVCache | Appending
    decoder: Decoder

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values, lengths = self.cache.write(layer, key, value)
        return self.decoder(query, keys, values, lengths, query.shape[-1] ** -0.5).flatten(2)
