"""A mixture of experts in place of a layer's MLP: of each row, a few experts compute.

Every tensor-parallel rank has all rows and its channels of the experts, expert-parallel ranks each have some of the
experts: rows travel to these and back. No row is dropped, and what a rank computes varies from step to step.

Legend: R rows of a rank, k experts of each, M = R·k copies of rows, X hidden size.
"""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bd3_scale.model.block import MLP, Part
from bd3_scale.model.dispatch import Exchange, Order
from bd3_scale.model.exchange import add_partial_rows, whole_rows
from bd3_scale.model.experts import Experts
from bd3_scale.model.router import Router
from bd3_scale.recipe.schema import ModelRecipe


class Mixture(Part):
    """Router, experts, and where there is one an expert that every row takes."""

    def __init__(self, model: ModelRecipe, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config, groups.tp)
        assert model.moe is not None
        self.top_k = model.moe.top_k
        self.ep_group = groups.ep
        self.router = Router(model, config, groups)
        self.experts = Experts(model, config, groups)
        shared = model.moe.shared_ffn_hidden_size
        self.shared_experts = (
            MLP(model.model_copy(update={"ffn_hidden_size": shared}), config, groups.tp) if shared else None
        )

    def forward(self, x: Tensor, pieces: int = 1) -> Tensor:
        """Return […, X] for x […, X], whose rows travel in `pieces`, see `exchange`."""
        sequence = self.config.sequence_parallel
        whole = whole_rows(x, pieces, self.tp_group, shared_out=sequence)
        out = self._mixed(whole, pieces)
        out = add_partial_rows(out, pieces, self.tp_group, shared_out=sequence)
        return out if self.shared_experts is None else out + self.shared_experts(x, pieces)

    def _mixed(self, x: Tensor, pieces: int) -> Tensor:
        """Return what this rank's channels of the experts make of the rows, […, X]."""
        experts, weights, counts = self.router(x, pieces)
        order = Order.by(experts.flatten(), each=self.top_k)
        exchange = Exchange(counts, experts.numel(), self.ep_group)
        copies = exchange.send(order.spread(x.flatten(0, -2)))
        its_weights = exchange.send(order._replace(each=1).spread(weights.flatten()))
        found = exchange.send_back(self.experts(copies, its_weights, exchange.counts))
        return order.collect(found).view_as(x)
