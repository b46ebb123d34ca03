"""Define the recipe sections of the model: `model`, `model.moe` and `model.rope_scaling`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bd3_scale.recipe.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Unit


class RopeScaling(Section):
    """Llama 3's scaling of the low rotary frequencies (Grattafiori et al., 2024; `rope_type: llama3`)."""

    factor: Annotated[PositiveFloat, Unit("ratio")] = Field(
        description="The low frequencies are divided by this factor, which lengthens the context."
    )
    low_freq_factor: Annotated[PositiveFloat, Unit("ratio")] = Field(
        description="Frequencies with fewer periods than this in the original context are divided by the whole factor."
    )
    high_freq_factor: Annotated[PositiveFloat, Unit("ratio")] = Field(
        description="Frequencies with more periods than this in the original context stay as they are."
    )
    original_max_position_embeddings: Annotated[PositiveInt, Unit("tokens")] = Field(
        description="The context length that the model was trained with before the scaling."
    )


# The fields of `model.moe` that matter in training only: models with other values of these have the same tensors.
MOE_TRAINING = frozenset({"bias_update_rate", "aux_loss", "z_loss"})


class MoeRecipe(Section):
    """A mixture of SwiGLU experts in place of the MLP: a router sends each row to `top_k` of `num_experts` experts."""

    num_experts: Annotated[PositiveInt, Unit("experts")] = Field(description="Routed experts in a layer.")
    top_k: Annotated[PositiveInt, Unit("experts")] = Field(description="Experts that each row is sent to.")
    ffn_hidden_size: Annotated[PositiveInt, Unit("channels")] = Field(description="Width of one expert's hidden layer.")
    shared_ffn_hidden_size: Annotated[NonNegativeInt, Unit("channels")] = Field(
        0, description="Width of the shared expert, which takes every row. 0: no shared expert."
    )
    first_dense_layers: Annotated[NonNegativeInt, Unit("layers")] = Field(
        0, description="The first so many layers have an MLP of model.ffn_hidden_size instead of experts."
    )
    score: Literal["softmax", "sigmoid"] = Field(
        "softmax",
        description="Router's score of a row for each expert: softmax over all experts (Qwen3-MoE, SDAR-MoE), or a "
        "sigmoid for each (LLaDA2).",
    )
    normalize_top_k: bool = Field(
        True, description="Divide the scores of the chosen experts of a row by their sum, so that they add up to 1."
    )
    scale: Annotated[PositiveFloat, Unit("ratio")] = Field(
        1.0, description="Factor of the sum of the routed experts' outputs; the shared expert's output is not scaled."
    )
    groups: Annotated[PositiveInt, Unit("groups")] = Field(
        1, description="Groups that the experts are divided into. A row chooses groups first, then experts in them."
    )
    top_groups: Annotated[PositiveInt | None, Unit("groups")] = Field(
        None, description="Groups from which a row may choose its experts. Default: all groups."
    )
    bias: bool = Field(
        False,
        description="Balance the experts by a bias that counts in the choice only, and grows for an expert that is "
        "chosen less often than the others (DeepSeek-V3).",
    )
    bias_update_rate: Annotated[NonNegativeFloat, Unit("ratio")] = Field(
        0.001, description="Amount by which each step raises or lowers the bias of an expert."
    )
    aux_loss: Annotated[NonNegativeFloat, Unit("ratio")] = Field(
        0.0,
        description="Factor of the load-balancing loss, which is 1 for a sequence whose rows spread evenly over the "
        "experts. 0: none.",
    )
    z_loss: Annotated[NonNegativeFloat, Unit("ratio")] = Field(
        0.0,
        description="Factor of the router z-loss, the mean square of the logits' log-sum-exp, which keeps the logits "
        "small (ST-MoE). 0: none.",
    )


class ModelRecipe(Section):
    """The transformer. The defaults give the shape of Qwen3, which the serving formats need."""

    num_layers: Annotated[PositiveInt, Unit("layers")] = Field(description="Transformer layers.")
    hidden_size: Annotated[PositiveInt, Unit("channels")] = Field(description="Width of the residual stream.")
    num_attention_heads: Annotated[PositiveInt, Unit("heads")] = Field(description="Query heads of a layer.")
    num_query_groups: Annotated[PositiveInt | None, Unit("heads")] = Field(
        None, description="Key/value heads of a layer (grouped-query attention). Default: num_attention_heads."
    )
    head_dim: Annotated[PositiveInt | None, Unit("channels")] = Field(
        None, description="Width of one head. Default: hidden_size / num_attention_heads."
    )
    ffn_hidden_size: Annotated[PositiveInt, Unit("channels")] = Field(description="Width of the MLP's hidden layer.")
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = Field(
        "swiglu", description="Activation of the MLP. swiglu has a gate, a third matrix; gelu_tanh approximates gelu."
    )
    normalization: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm", description="Normalisation before attention, before the MLP and before the head."
    )
    norm_bias: bool = Field(False, description="Give layernorm a bias. rmsnorm has none.")
    norm_eps: Annotated[PositiveFloat, Unit("number")] = Field(
        1e-6, description="Constant added to the variance in a normalisation, against a division by zero."
    )
    qk_norm: bool = Field(True, description="Apply RMSNorm to the query and key of each head, before RoPE.")
    mlp_bias: bool = Field(False, description="Give the matrices of the MLP a bias.")
    attention_bias: bool = Field(False, description="Give the query, key and value projection a bias.")
    head_bias: bool = Field(False, description="Give the output head a bias.")
    tie_embeddings: bool = Field(False, description="Use one matrix for the embedding and the output head.")
    rope_theta: Annotated[PositiveFloat, Unit("number")] = Field(
        10_000.0, description="Base of the rotary frequencies (RoPE)."
    )
    rope_scaling: RopeScaling | None = Field(
        None, description="Scaling of the rotary frequencies for a longer context, as Llama 3's. Default: none."
    )
    rotary_fraction: Annotated[float, Field(gt=0, le=1), Unit("ratio")] = Field(
        1.0, description="Share of a head's channels that rotary embeddings turn."
    )
    moe: MoeRecipe | None = Field(
        None, description="Mixture of experts in place of the MLP. Default: every layer has one MLP."
    )
    init_std: Annotated[PositiveFloat, Unit("number")] = Field(
        0.02,
        description="Standard deviation of the initial weights; matrices that write into the residual stream begin "
        "smaller. About 1/sqrt(hidden_size) suits narrow models.",
    )

    @property
    def query_groups(self) -> int:
        """Return the number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Return the channels of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_channels(self) -> int:
        """Return how many channels of a head rotary embeddings turn."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def dense_layers(self) -> int:
        """Return the number of layers with an MLP; the layers after them, if any, have a mixture of experts."""
        return self.num_layers if self.moe is None else self.moe.first_dense_layers
