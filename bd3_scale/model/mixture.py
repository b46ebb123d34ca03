"""Replace a layer's MLP by a mixture of experts: a few experts compute for each row.

Every tensor-parallel rank has all rows and its channels of the experts. Every expert-parallel rank has some of the
experts, and rows are sent to them and back. No row is dropped, so the work of a rank varies from step to step.

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
    """A router, its experts, and optionally a shared expert that every row takes (DeepSeekMoE: Dai et al., 2024)."""

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
        """Return […, X] for x […, X]; under sequence parallelism rows are exchanged in `pieces`, see `exchange`."""
        sequence = self.config.sequence_parallel
        whole = whole_rows(x, pieces, self.tp_group, scattered=sequence)
        out = self._mixed(whole, pieces)
        out = add_partial_rows(out, pieces, self.tp_group, scattered=sequence)
        return out if self.shared_experts is None else out + self.shared_experts(x, pieces)

    def _mixed(self, x: Tensor, pieces: int) -> Tensor:
        """Return the rows' outputs of this rank's channels of the experts, […, X]."""
        experts, weights, counts = self.router(x, pieces)
        order = Order.by(experts.flatten(), each=self.top_k)
        exchange = Exchange(counts, experts.numel(), self.ep_group)
        copies = exchange.send(order.spread(x.flatten(0, -2)))
        # A weight belongs to a copy and not to a row, hence each=1.
        copy_weights = exchange.send(order._replace(each=1).spread(weights.flatten()))
        outputs = exchange.send_back(self.experts(copies, copy_weights, exchange.counts))
        return order.collect(outputs).view_as(x)
