"""Configure a block diffusion language model: Qwen3's keys, and switches for features of other models.

Runs on transformers 4 (4.51 or newer) and 5, and needs nothing else.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
ROPE_SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Bd3Config(PretrainedConfig):
    """The configuration of a model, as in config.json.

    Any other key of config.json becomes an attribute, too. A configuration created in another way lacks it, so read an
    option that is not declared here as `getattr(config, "its_name", default)`.

    Args:
        head_dim: dimensions of a query, key or value; hidden_size / num_attention_heads by default.
        hidden_act: "silu", "gelu" (exact) or "gelu_pytorch_tanh".
        gated_mlp: the MLP computes act(gate) · up; without it act(up).
        normalization: "rmsnorm" or "layernorm", the latter with or without `norm_bias`; `rms_norm_eps` is for both.
        qk_norm: RMSNorm over each head's query and key, before the rotation.
        attention_bias: biases of the query, key and value projections; the output projection never has one.
        rope_scaling: None, or Llama 3's, with `rope_type` "llama3", `factor`, `low_freq_factor`, `high_freq_factor`
            and `original_max_position_embeddings`.
        block_size: tokens per block; blocks are counted from the first token of a sequence.
        mask_token_id: id of the mask, which stands for a token that is still to be predicted.
        num_token_ids: ids from this one on pad the vocabulary and are never drawn; None: no id does.
        partial_rotary_factor: share of a head's channels that rotary embeddings rotate.
        num_experts: experts in every layer except the first `first_k_dense_replace`; 0: every layer has one MLP.
        num_experts_per_tok: experts that a token is sent to, each of width `moe_intermediate_size`.
        score_function: the router's scores: "softmax" over all experts, or "sigmoid". An expert's output is weighted by
            its score times `routed_scaling_factor`; with `norm_topk_prob` the chosen scores are normalised first.
        n_group, topk_group: number of groups of experts, and of groups that are considered for a token.
        moe_router_enable_expert_bias: a bias per expert is added for the choice of experts, but not to their weights.
        shared_expert_intermediate_size: width of an expert for all tokens; or `num_shared_experts`, as a multiple of
            the others' width.

    Raises:
        ValueError: a value, or a feature of another model, that this model does not implement.
    """

    model_type = "bd3"
    # In transformers 5 this is a property of the base class, an alias of `rope_parameters`; here it is a plain value.
    rope_scaling = None

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2048,
        intermediate_size: int = 6144,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        gated_mlp: bool = True,
        normalization: str = "rmsnorm",
        norm_bias: bool = False,
        rms_norm_eps: float = 1e-6,
        qk_norm: bool = True,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        head_bias: bool = False,
        rope_theta: float = 10_000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        max_position_embeddings: int = 32768,
        block_size: int = 4,
        mask_token_id: int = 151669,
        num_token_ids: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        use_sliding_window: bool = False,
        partial_rotary_factor: float = 1.0,
        num_experts: int = 0,
        num_experts_per_tok: int = 1,
        moe_intermediate_size: int = 0,
        norm_topk_prob: bool = True,
        first_k_dense_replace: int = 0,
        n_group: int = 1,
        topk_group: int | None = None,
        routed_scaling_factor: float = 1.0,
        score_function: str = "softmax",
        moe_router_enable_expert_bias: bool = False,
        num_shared_experts: int = 0,
        shared_expert_intermediate_size: int = 0,
        decoder_sparse_step: int = 1,
        mlp_only_layers: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.normalization = normalization
        self.norm_bias = norm_bias
        self.rms_norm_eps = rms_norm_eps
        self.qk_norm = qk_norm
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.head_bias = head_bias
        self.rope_theta = rope_theta
        self.partial_rotary_factor = partial_rotary_factor
        self.rope_scaling = rope_scaling
        if rope_parameters:
            self.rope_parameters = rope_parameters
        self.max_position_embeddings = max_position_embeddings
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.num_token_ids = num_token_ids
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.use_sliding_window = use_sliding_window
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.first_k_dense_replace = first_k_dense_replace
        self.n_group = n_group
        self.topk_group = topk_group or n_group
        self.routed_scaling_factor = routed_scaling_factor
        self.score_function = score_function
        self.moe_router_enable_expert_bias = moe_router_enable_expert_bias
        self.num_shared_experts = num_shared_experts
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.decoder_sparse_step = decoder_sparse_step
        self.mlp_only_layers = mlp_only_layers or []
        self._check()
        self._check_experts()
        # This model has one implementation of attention; transformers would refuse the name of another one.
        kwargs.pop("attn_implementation", None)
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Return the rotary parameters in the form of transformers 5; stored and saved are the three separate keys."""
        plain = {"rope_theta": self.rope_theta, "partial_rotary_factor": self.partial_rotary_factor}
        return {"rope_type": "default", **(self.rope_scaling or {}), **plain}

    @rope_parameters.setter
    def rope_parameters(self, parameters: dict[str, Any]) -> None:
        plain = ("rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in parameters.items() if key not in plain}
        self.rope_theta, self.partial_rotary_factor = (parameters.get(key, getattr(self, key)) for key in plain)
        self.rope_scaling = None if scaling.get("rope_type", "default") == "default" else scaling

    def _check_experts(self) -> None:
        experts, chosen, groups = self.num_experts, self.num_experts_per_tok, self.n_group
        for wrong, problem in (
            (
                experts and not 1 <= chosen <= experts,
                f"num_experts_per_tok={chosen} must be 1 to num_experts={experts}",
            ),
            (
                self.score_function not in ("softmax", "sigmoid"),
                f"score_function={self.score_function!r} must be 'softmax' or 'sigmoid'",
            ),
            (groups < 1 or experts % groups, f"n_group={groups} must divide num_experts={experts}"),
            (not 1 <= self.topk_group <= groups, f"topk_group={self.topk_group} must be 1 to n_group={groups}"),
            (
                self.decoder_sparse_step != 1 or self.mlp_only_layers,
                f"decoder_sparse_step={self.decoder_sparse_step}, mlp_only_layers={self.mlp_only_layers}: every layer "
                "has experts, except the first first_k_dense_replace",
            ),
        ):
            if wrong:
                raise ValueError(f"{type(self).__name__}: {problem}")

    def _check(self) -> None:
        scaling = self.rope_scaling or {}
        for wrong, problem in (
            (self.hidden_act not in ACTIVATIONS, f"hidden_act={self.hidden_act!r} must be one of {ACTIVATIONS}"),
            (
                self.normalization not in ("rmsnorm", "layernorm"),
                f"normalization={self.normalization!r} must be 'rmsnorm' or 'layernorm'",
            ),
            (self.norm_bias and self.normalization == "rmsnorm", "norm_bias=True needs normalization='layernorm'"),
            (
                self.num_attention_heads % self.num_key_value_heads != 0,
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}",
            ),
            (self.head_dim % 2 != 0, f"head_dim={self.head_dim} must be even: rotary embeddings rotate pairs"),
            (self.block_size < 1, f"block_size={self.block_size} must be at least 1"),
            (
                not 0 <= self.mask_token_id < self.vocab_size,
                f"mask_token_id={self.mask_token_id} must be one of vocab_size={self.vocab_size} ids",
            ),
            (self.tie_word_embeddings, "tie_word_embeddings must be false: the head has its own weights"),
            (self.use_sliding_window, "use_sliding_window must be false: every token sees its whole prefix"),
            (
                scaling and (scaling.get("rope_type") != "llama3" or not all(k in scaling for k in ROPE_SCALING_KEYS)),
                f"rope_scaling={scaling} must be null, or of rope_type 'llama3' with {', '.join(ROPE_SCALING_KEYS)}",
            ),
        ):
            if wrong:
                raise ValueError(f"{type(self).__name__}: {problem}")
