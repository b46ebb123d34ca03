"""Mixtures of experts as config.json says them, and which of them each format has.

Qwen3-MoE and SDAR-MoE have one set of keys, LLaDA2-MoE another, which our own format has, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bd3_scale.convert.config_values import Config, integer
from bd3_scale.recipe.moe_rules import mixture_problems
from bd3_scale.recipe.schema import MOE_TRAINING, ModelRecipe, MoeRecipe

# Options of a mixture of which every format has any value.
_SIZES = frozenset({"num_experts", "top_k", "ffn_hidden_size"})
# What LLaDA2's code computes whatever its config.json says, and switches of its kin that nothing here is equal to.
_OF_LLADA2 = {
    "score_function": "sigmoid", "norm_topk_prob": True, "use_rmsnorm": True, "use_qk_norm": True, "use_bias": False,
    "use_qkv_bias": False, "norm_head": False, "norm_softmax": False, "using_split_qkv_in_self_attention": False,
}  # fmt: skip


@dataclass(frozen=True)
class Mixtures:
    """The mixtures that an architecture has, as options of a recipe's `model.moe`.

    Attributes:
        read: returns `model.moe` of an architecture's name and config.json, None of a dense model; ValueError: it has
            what nothing here is equal to.
        keys: what config.json says of a mixture.
        free: those of which it has any value, beside the sizes.
        fixed: what it has of others, where that is not the recipe's default, which is SDAR-MoE's.
        counts_shared: its shared expert is so many times as wide as the others.
    """

    read: Callable[[str, Config], dict[str, Any] | None]
    keys: Callable[[MoeRecipe], dict[str, Any]]
    free: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    counts_shared: bool = False

    def obstacle(self, moe: MoeRecipe, architecture: str) -> str | None:
        """Return what the architecture does not have of a mixture, None where it has everything."""
        has = {**{name: f.default for name, f in MoeRecipe.model_fields.items()}, **self.fixed}
        for option, known in has.items():
            value = getattr(moe, option)
            if option not in _SIZES | MOE_TRAINING | self.free and value != known and option != "top_groups":
                return f"it has moe.{option}={value!r}, and {architecture} knows {known!r} alone"
        shared = moe.shared_ffn_hidden_size
        if self.counts_shared and shared % moe.ffn_hidden_size:
            return f"its shared expert of {shared} is no multiple of the {moe.ffn_hidden_size} of the others"
        return None


def read_qwen3_moe(name: str, config: Config) -> dict[str, Any]:
    """Return `model.moe` of Qwen3-MoE or SDAR-MoE. ValueError: other layers than the first ones are dense."""
    return _sizes(config) | {
        "first_dense_layers": _first_dense_layers(name, config),
        "normalize_top_k": bool(config.get("norm_topk_prob")),
    }


def read_llada2(name: str, config: Config) -> dict[str, Any]:
    """Return `model.moe` of LLaDA2-MoE. ValueError: a feature that its code does not have."""
    for key, value in _OF_LLADA2.items():
        if config.get(key, value) not in (value, None):
            raise ValueError(
                f"{name} with {key}={config[key]!r} is not supported: its published code computes with {value!r} alone"
            )
    sizes = _sizes(config)
    return sizes | _kin(config) | {
        "shared_ffn_hidden_size": integer(config, "num_shared_experts", 0) * sizes["ffn_hidden_size"],
        "score": "sigmoid",
        "bias": bool(config.get("moe_router_enable_expert_bias", True)),
    }  # fmt: skip


def read_bd3(name: str, config: Config) -> dict[str, Any] | None:
    """Return `model.moe` of our own format, None of a dense model."""
    if not config.get("num_experts"):
        return None
    return _sizes(config) | _kin(config) | {
        "shared_ffn_hidden_size": integer(config, "shared_expert_intermediate_size", 0),
        "score": config.get("score_function", "softmax"),
        "normalize_top_k": config.get("norm_topk_prob", True),
        "bias": config.get("moe_router_enable_expert_bias", False),
    }  # fmt: skip


def _sizes(config: Config) -> dict[str, Any]:
    # transformers 5 has another name for the first one.
    experts = integer(config, "num_experts", config.get("num_local_experts"))
    top_k, width = (integer(config, key) for key in ("num_experts_per_tok", "moe_intermediate_size"))
    return {"num_experts": experts, "top_k": top_k, "ffn_hidden_size": width}


def _kin(config: Config) -> dict[str, Any]:
    groups = integer(config, "n_group", 1)
    top = integer(config, "topk_group", groups)
    return {
        "first_dense_layers": integer(config, "first_k_dense_replace", 0),
        "groups": groups,
        "top_groups": None if top == groups else top,
        "scale": config.get("routed_scaling_factor", 1.0),
    }


def _first_dense_layers(name: str, config: Config) -> int:
    """Return how many first layers are dense; layer i is where it is in one key, or i + 1 no multiple of the other."""
    only, step = config.get("mlp_only_layers") or [], integer(config, "decoder_sparse_step", 1)
    layers = integer(config, "num_hidden_layers")
    first = len(only) if step == 1 else step - 1
    if step not in (1, layers) or sorted(map(repr, only)) != sorted(map(repr, range(len(only)))) or len(only) > first:
        raise ValueError(
            f"{name} with mlp_only_layers={repr(only)[:80]} and decoder_sparse_step={step} has layers without experts "
            f"among its {layers}, and here the first ones alone can be"
        )
    return first


def check_mixture(name: str, model: ModelRecipe) -> None:
    """Raise ValueError if the sizes of a mixture that a config.json says do not go together."""
    if problems := list(mixture_problems(model)):
        raise ValueError(f"config.json of {name} describes no model: {'; '.join(problems)}")


def qwen3_moe_keys(moe: MoeRecipe) -> dict[str, Any]:
    """Return what config.json of Qwen3-MoE and SDAR-MoE says of a mixture."""
    dense = list(range(moe.first_dense_layers))
    return _common_keys(moe) | {"decoder_sparse_step": 1, "mlp_only_layers": dense, "output_router_logits": False}


def llada2_keys(moe: MoeRecipe) -> dict[str, Any]:
    """Return what config.json of LLaDA2-MoE says of a mixture, with what SGLang reads besides."""
    return _kin_keys(moe) | {
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
    """Return what config.json of our own format says of a mixture."""
    return _kin_keys(moe) | {"shared_expert_intermediate_size": moe.shared_ffn_hidden_size}


def _common_keys(moe: MoeRecipe) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "norm_topk_prob": moe.normalize_top_k,
    }


def _kin_keys(moe: MoeRecipe) -> dict[str, Any]:
    return _common_keys(moe) | {
        "first_k_dense_replace": moe.first_dense_layers,
        "n_group": moe.groups,
        "topk_group": moe.top_groups or moe.groups,
        "routed_scaling_factor": moe.scale,
        "score_function": moe.score,
        "moe_router_enable_expert_bias": moe.bias,
    }
