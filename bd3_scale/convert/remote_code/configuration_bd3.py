"""Configuration of a block diffusion language model: Qwen3's keys, and switches for what other models do differently.

Runs on transformers 4 (4.51 or newer) and 5, and needs nothing else.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
ROPE_SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Bd3Config(PretrainedConfig):
    """The shape of a model, and its switches, as config.json has them.

    Every other key there is an attribute, too, and a configuration made in another way lacks it: an option that is not
    declared here is read as `getattr(config, "its name", default)`.

    Args:
        head_dim: of queries, keys and values; hidden_size / num_attention_heads by default.
        hidden_act: "silu", "gelu" (exact) or "gelu_pytorch_tanh".
        gated_mlp: act(gate) · up, where an MLP without a gate is act(up).
        normalization: "rmsnorm" or "layernorm", the latter with `norm_bias` or without; `rms_norm_eps` is either's.
        qk_norm: RMSNorm over each head's query and key, before the rotation.
        attention_bias: of the query, key and value projections; the output projection never has one.
        rope_scaling: None, or Llama 3's, with `rope_type` "llama3", `factor`, `low_freq_factor`, `high_freq_factor`
            and `original_max_position_embeddings`.
        block_size: tokens a block; blocks are counted from the first token of a sequence.
        mask_token_id: what stands for a token that is still to be predicted.
        num_token_ids: ids from this one on pad the vocabulary, and are never drawn; None where none does.

    Raises:
        ValueError: a value, or a feature of another model, that this one does not have.
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
        self._check()
        # There is one implementation of this model's attention, whatever a file from elsewhere names.
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
        """`rope_theta` and `rope_scaling` as transformers 5 writes them; what is stored and saved are those two."""
        return {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}

    @rope_parameters.setter
    def rope_parameters(self, parameters: dict[str, Any]) -> None:
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        self.rope_theta = parameters.get("rope_theta", self.rope_theta)
        self.rope_scaling = None if scaling.get("rope_type", "default") == "default" else scaling

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
            (self.head_dim % 2 != 0, f"head_dim={self.head_dim} must be even: rotary embedding turns pairs"),
            (self.block_size < 1, f"block_size={self.block_size} must be at least 1"),
            (
                not 0 <= self.mask_token_id < self.vocab_size,
                f"mask_token_id={self.mask_token_id} must be one of vocab_size={self.vocab_size} ids",
            ),
            (self.tie_word_embeddings, "tie_word_embeddings must be false: the head has weights of its own"),
            (self.use_sliding_window, "use_sliding_window must be false: every token sees its whole prefix"),
            (
                scaling and (scaling.get("rope_type") != "llama3" or not all(k in scaling for k in ROPE_SCALING_KEYS)),
                f"rope_scaling={scaling} must be null, or of rope_type 'llama3' with {', '.join(ROPE_SCALING_KEYS)}",
            ),
        ):
            if wrong:
                raise ValueError(f"{type(self).__name__}: {problem}")
