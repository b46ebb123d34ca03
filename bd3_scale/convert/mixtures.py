"""Translate mixtures of experts between config.json and the recipe, and tell which of them each format supports.

Qwen3-MoE and SDAR-MoE have one set of keys. LLaDA2-MoE has another, that of DeepSeek-V3, which this package's own
format uses, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bd3_scale.convert.config_values import Config, integer
from bd3_scale.recipe.moe_rules import mixture_problems
from bd3_scale.recipe.schema import MOE_TRAINING, ModelRecipe, MoeRecipe

# Options of a mixture that every format supports with any value.
_SIZES = frozenset({"num_experts", "top_k", "ffn_hidden_size"})
# Values that LLaDA2's code computes with whatever its config.json says, and switches of related models that this
# package does not implement.
_LLADA2_VALUES = {
    "score_function": "sigmoid", "norm_topk_prob": True, "use_rmsnorm": True, "use_qk_norm": True, "use_bias": False,
    "use_qkv_bias": False, "norm_head": False, "norm_softmax": False, "using_split_qkv_in_self_attention": False,
}  # fmt: skip


@dataclass(frozen=True)
class Mixtures:
    """The mixtures that an architecture supports, as options of a recipe's `model.moe`.

    Attributes:
        read: returns `model.moe` from an architecture's name and config.json, None for a dense model; ValueError: it
            has a feature that is not implemented here.
        keys: returns the keys of config.json for a mixture.
        free: options that it supports with any value, besides the sizes.
        fixed: values of other options, if they differ from the recipe's defaults, which are SDAR-MoE's.
        counts_shared: the width of its shared expert is a multiple of the others'.
    """

    read: Callable[[str, Config], dict[str, Any] | None]
    keys: Callable[[MoeRecipe], dict[str, Any]]
    free: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    counts_shared: bool = False

    def obstacle(self, moe: MoeRecipe, architecture: str) -> str | None:
        """Return why the architecture cannot represent a mixture, None if it can."""
        supported = {**{name: f.default for name, f in MoeRecipe.model_fields.items()}, **self.fixed}
        for option, known in supported.items():
            value = getattr(moe, option)
            if option not in _SIZES | MOE_TRAINING | self.free and value != known and option != "top_groups":
                return f"it has moe.{option}={value!r}, and {architecture} supports only {known!r}"
        shared = moe.shared_ffn_hidden_size
        if self.counts_shared and shared % moe.ffn_hidden_size:
            return f"its shared expert of width {shared} is no multiple of the others' width {moe.ffn_hidden_size}"
        return None


def read_qwen3_moe(name: str, config: Config) -> dict[str, Any]:
    """Return `model.moe` of Qwen3-MoE or SDAR-MoE. ValueError: layers other than the first ones are dense."""
    return _sizes(config) | {
        "first_dense_layers": _first_dense_layers(name, config),
        "normalize_top_k": bool(config.get("norm_topk_prob")),
    }


def read_llada2(name: str, config: Config) -> dict[str, Any]:
    """Return `model.moe` of LLaDA2-MoE. ValueError: a feature that its code does not have."""
    for key, value in _LLADA2_VALUES.items():
        if config.get(key, value) not in (value, None):
            raise ValueError(
                f"{name} with {key}={config[key]!r} is not supported: its published code only computes with {value!r}"
            )
    sizes = _sizes(config)
    return sizes | _deepseek_values(config) | {
        "shared_ffn_hidden_size": integer(config, "num_shared_experts", 0) * sizes["ffn_hidden_size"],
        "score": "sigmoid",
        "bias": bool(config.get("moe_router_enable_expert_bias", True)),
    }  # fmt: skip


def read_bd3(name: str, config: Config) -> dict[str, Any] | None:
    """Return `model.moe` of this package's own format, None for a dense model."""
    if not config.get("num_experts"):
        return None
    return _sizes(config) | _deepseek_values(config) | {
        "shared_ffn_hidden_size": integer(config, "shared_expert_intermediate_size", 0),
        "score": config.get("score_function", "softmax"),
        "normalize_top_k": config.get("norm_topk_prob", True),
        "bias": config.get("moe_router_enable_expert_bias", False),
    }  # fmt: skip


def _sizes(config: Config) -> dict[str, Any]:
    # transformers 5 calls `num_experts` `num_local_experts`.
    experts = integer(config, "num_experts", config.get("num_local_experts"))
    top_k, width = (integer(config, key) for key in ("num_experts_per_tok", "moe_intermediate_size"))
    return {"num_experts": experts, "top_k": top_k, "ffn_hidden_size": width}


def _deepseek_values(config: Config) -> dict[str, Any]:
    groups = integer(config, "n_group", 1)
    top = integer(config, "topk_group", groups)
    return {
        "first_dense_layers": integer(config, "first_k_dense_replace", 0),
        "groups": groups,
        "top_groups": None if top == groups else top,
        "scale": config.get("routed_scaling_factor", 1.0),
    }


def _first_dense_layers(name: str, config: Config) -> int:
    """Return how many first layers are dense.

    In Qwen3-MoE's config layer i is dense if `mlp_only_layers` lists it or `decoder_sparse_step` does not divide i + 1.
    """
    only, step = config.get("mlp_only_layers") or [], integer(config, "decoder_sparse_step", 1)
    layers = integer(config, "num_hidden_layers")
    first = len(only) if step == 1 else step - 1
    if step not in (1, layers) or sorted(map(repr, only)) != sorted(map(repr, range(len(only)))) or len(only) > first:
        raise ValueError(
            f"{name} with mlp_only_layers={repr(only)[:80]} and decoder_sparse_step={step} has dense layers among its "
            f"{layers}, but only the first layers may be dense here"
        )
    return first


def check_mixture(name: str, model: ModelRecipe) -> None:
    """Raise ValueError if the sizes of a config.json's mixture contradict each other."""
    if problems := list(mixture_problems(model)):
        raise ValueError(f"config.json of {name} describes no model: {'; '.join(problems)}")


def qwen3_moe_keys(moe: MoeRecipe) -> dict[str, Any]:
    """Return the keys of a mixture in config.json of Qwen3-MoE and SDAR-MoE."""
    dense = list(range(moe.first_dense_layers))
    return _common_keys(moe) | {"decoder_sparse_step": 1, "mlp_only_layers": dense, "output_router_logits": False}


def llada2_keys(moe: MoeRecipe) -> dict[str, Any]:
    """Return the keys of a mixture in config.json of LLaDA2-MoE, with those that SGLang reads besides."""
    return _deepseek_keys(moe) | {
        "num_shared_experts": moe.shared_ffn_hidden_size // moe.ffn_hidden_size,
        "router_dtype": "fp32",
        "use_qkv_bias": False,
        "use_bias": False,
        "use_rmsnorm": True,
        "use_qk_norm": True,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "output_router_logits": False,
    }


def bd3_keys(moe: MoeRecipe) -> dict[str, Any]:
    """Return the keys of a mixture in config.json of this package's own format."""
    return _deepseek_keys(moe) | {"shared_expert_intermediate_size": moe.shared_ffn_hidden_size}


def _common_keys(moe: MoeRecipe) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "norm_topk_prob": moe.normalize_top_k,
    }


def _deepseek_keys(moe: MoeRecipe) -> dict[str, Any]:
    return _common_keys(moe) | {
        "first_k_dense_replace": moe.first_dense_layers,
        "n_group": moe.groups,
        "topk_group": moe.top_groups or moe.groups,
        "routed_scaling_factor": moe.scale,
        "score_function": moe.score,
        "moe_router_enable_expert_bias": moe.bias,
    }
