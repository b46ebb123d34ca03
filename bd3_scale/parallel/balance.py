"""Count the rows of each expert over a step, and adjust the routers' biases by the counts of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bd3_scale.model.build import Chunks


class Balance:
    """The routers of a rank's chunks; without mixtures of experts nothing is counted."""

    def __init__(self, chunks: Chunks) -> None:
        model = chunks[0].recipe
        self._routers = {layer: mixture.router for chunk in chunks for layer, mixture in chunk.mixtures.items()}
        self._first, experts = model.dense_layers, model.moe.num_experts if model.moe else 0
        self._shape = (model.num_layers - model.dense_layers, 2, experts)
        self._device = next(chunks[0].parameters()).device

    def begin_step(self, of_a_sequence: float) -> None:
        """Reset the counts; of_a_sequence: see `Router.begin_step`."""
        for router in self._routers.values():
            router.begin_step(of_a_sequence)

    def counts(self, num_noisy: int) -> list[Tensor]:
        """Return the numbers of rows that this rank has sent to each expert of each layer of the model, float64 [n].

        They are to be summed over data- and context-parallel ranks and over stages; each stage has zeros for the layers
        of others. An empty list without mixtures of experts.

        num_noisy: number of streams of noisy rows.
        """
        if not self._shape[0]:
            return []
        counts = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        for layer, router in self._routers.items():
            noisy, clean = router.load[:num_noisy].sum(0), router.load[num_noisy:].sum(0)
            counts[layer - self._first] = torch.stack([noisy, clean])
        return [counts.flatten()]

    def move(self, counts: Tensor) -> None:
        """Adjust the biases of this rank's routers by the counts of a global batch, in the form of `counts`."""
        if self._shape[0]:
            of_layers = counts.view(self._shape).sum(1)
            for layer, router in self._routers.items():
                router.balance(of_layers[layer - self._first])

    def by_layer(self, counts: Sequence[float]) -> Tensor | None:
        """Return the counts of a global batch as int64 [layers, 2, experts]; None without mixtures of experts."""
        return torch.tensor(counts).view(self._shape).long() if self._shape[0] else None
