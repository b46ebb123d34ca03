"""config.json of the supported Hugging Face architectures, read into a model's recipe and written from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from bd3_scale.objective import BlockDiffusion, NextToken, Objective, objectives
from bd3_scale.recipe.schema import DiffusionRecipe, ModelRecipe, RopeScaling

Config = Mapping[str, Any]
Format = Literal["sdar", "bd3", "qwen3", "qwen2", "llama"]

_ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_BLOCK_DIFFUSION = {"SDARForCausalLM": "sdar", "Bd3ForCausalLM": "bd3"}
_NEXT_TOKEN = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
}
ARCHITECTURES: Mapping[str, str] = _BLOCK_DIFFUSION | _NEXT_TOKEN


@dataclass(frozen=True)
class Architecture:
    """What config.json says of a model.

    Attributes:
        mask_id: None of a model that knows no mask.
        num_token_ids: ids in use, where the embedding has more rows.
    """

    name: str
    model: ModelRecipe
    diffusion: DiffusionRecipe
    vocab_rows: int
    eos_id: int | None
    mask_id: int | None
    num_token_ids: int | None
    max_position_embeddings: int


def read_architecture(config: Config, block_size: int | None = None) -> Architecture:
    """The model that a config.json describes.

    Args:
        block_size: in place of the one in a block diffusion model's config.

    Raises:
        ValueError: an architecture, or a feature of it, that this package has no equal of.
    """
    _check_kinds(config)
    names = config.get("architectures") or []
    name = names[0] if names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"architecture {name or config.get('model_type')!r} is not supported; these are: {', '.join(ARCHITECTURES)}"
            ", and the checkpoints of the official bd3lms code"
        )
    _refuse_unknown_features(name, config)
    block_diffusion = name in _BLOCK_DIFFUSION
    if block_size is not None and not block_diffusion:
        raise ValueError(
            f"block_size={block_size} belongs to block diffusion models, and {name} predicts the next token: leave it "
            "out here, and give the recipe of the adaptation its diffusion.block_size"
        )
    block_size = (block_size or _integer(config, "block_size")) if block_diffusion else 1
    eos = config.get("eos_token_id")
    return Architecture(
        name=name,
        model=_model(name, config),
        diffusion=DiffusionRecipe(
            block_size=block_size, objective=objectives.name_of(BlockDiffusion if block_diffusion else NextToken)
        ),
        vocab_rows=_integer(config, "vocab_size"),
        eos_id=next(iter(eos), None) if isinstance(eos, list) else eos,
        mask_id=_integer(config, "mask_token_id") if block_diffusion else None,
        num_token_ids=_integer(config, "num_token_ids", 0) or None,
        max_position_embeddings=_integer(config, "max_position_embeddings", 2048),
    )


def _model(name: str, config: Config) -> ModelRecipe:
    own = name == "Bd3ForCausalLM"
    heads, hidden = _integer(config, "num_attention_heads"), _integer(config, "hidden_size")
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()} if own else {"silu": "swiglu"}
    act = config.get("hidden_act", "silu")
    if act not in activations:
        raise ValueError(f"hidden_act={act!r} of {name} is not supported; {', '.join(activations)} is")
    sections = {
        "num_layers": _integer(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": _integer(config, "num_key_value_heads", heads),
        "head_dim": _integer(config, "head_dim", hidden // max(1, heads)),
        "ffn_hidden_size": _integer(config, "intermediate_size"),
        "activation": activations[act],
        "normalization": config.get("normalization", "rmsnorm") if own else "rmsnorm",
        "norm_bias": config.get("norm_bias", False) if own else False,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "qk_norm": config.get("qk_norm", True) if own else name in ("SDARForCausalLM", "Qwen3ForCausalLM"),
        "mlp_bias": config.get("mlp_bias", False),
        "attention_bias": config.get("attention_bias", False) if own else name == "Qwen2ForCausalLM",
        "head_bias": config.get("head_bias", False) if own else False,
        "tie_embeddings": bool(config.get("tie_word_embeddings") or config.get("trained_with_tied_embeddings")),
        "rope_theta": _rope(config)["rope_theta"],
        "rope_scaling": _rope_scaling(config),
    }
    try:
        return ModelRecipe.model_validate(sections)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc']))}: {p['msg']}, not {repr(p['input'])[:80]}" for p in error.errors()[:5]
        )
        raise ValueError(f"config.json of {name} describes no model: {problems}") from error


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "architectures": list,
    "eos_token_id": (int, list),
    "layer_types": list,
    "quantization_config": dict,
    "rope_parameters": dict,
    "rope_scaling": dict,
}


def _check_kinds(config: Config) -> None:
    for key, kinds in _KINDS.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"{key}={repr(value)[:80]} in config.json is not of the kind that transformers writes")


def _integer(config: Config, key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    name = config["architectures"][0]
    if value is None:
        raise ValueError(f"config.json has no {key!r}, which {name} needs")
    if type(value) is not int or value < 0:
        raise ValueError(f"{key}={repr(value)[:80]} in config.json is no count: {name} needs a whole number")
    return value


def _rope(config: Config) -> Config:
    """transformers 5 writes `rope_parameters` in place of `rope_theta` and `rope_scaling`."""
    found = {"rope_theta": config.get("rope_theta") or 10_000.0, **(config.get("rope_scaling") or {})}
    return found | (config.get("rope_parameters") or {})


def _rope_scaling(config: Config) -> dict[str, Any] | None:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_scaling of type {kind!r} is not supported; none and llama3 are")
    return {key: rope[key] for key in RopeScaling.model_fields if key in rope}


def _refuse_unknown_features(name: str, config: Config) -> None:
    uses_window = config.get("use_sliding_window", name == "MistralForCausalLM")
    window = config.get("sliding_window") is not None and uses_window
    window |= any(kind != "full_attention" for kind in config.get("layer_types") or ())
    if window:
        raise ValueError(
            f"{name} with sliding_window={config.get('sliding_window')}: sliding windows are not supported"
        )
    if config.get("attention_bias") and name != "Bd3ForCausalLM":
        raise ValueError(f"{name} with attention_bias=true has a bias on its output projection, which is not supported")
    if config.get("quantization_config"):
        raise ValueError("the checkpoint is quantised: import the weights that it was made from")


@dataclass(frozen=True)
class ExportFormat:
    """An architecture that models are exported to. `obstacle`: why a model cannot be one; None where it can."""

    name: Format
    architecture: str
    obstacle: Callable[[ModelRecipe], str | None]


def export_obstacles(model: ModelRecipe, objective: type[Objective]) -> dict[Format, str | None]:
    """Return why a model that was trained for an objective cannot be exported to each format, None where it can."""
    found: dict[Format, str | None] = {}
    for f in EXPORT_FORMATS.values():
        shape, trained = f.obstacle(model), objective.export_obstacle(f.name)
        # What no training changes comes first, so that it is known before an adaptation.
        found[f.name] = (shape or trained) if f.name in _BLOCK_DIFFUSION.values() else (trained or shape)
    return found


def _sdar_obstacle(model: ModelRecipe) -> str | None:
    if not model.qk_norm:
        return "it has no q/k norm, and a norm of unit weights is not the identity; train with model.qk_norm=true"
    scaled = "its rotary frequencies are scaled, which engines do not expect of SDAR" if model.rope_scaling else None
    return _unlike_qwen(model) or scaled


def _causal_obstacle(model: ModelRecipe, *, qk_norm: bool, attention_bias: bool, mlp_bias: bool = False) -> str | None:
    if model.qk_norm != qk_norm:
        return f"it has {'' if model.qk_norm else 'no '}q/k norm"
    if model.attention_bias != attention_bias:
        return f"its query/key/value projection has {'a' if model.attention_bias else 'no'} bias"
    return _unlike_qwen(model.model_copy(update={"attention_bias": False, "mlp_bias": model.mlp_bias and not mlp_bias}))


def _unlike_qwen(model: ModelRecipe) -> str | None:
    for differs, what in (
        (model.normalization != "rmsnorm", "its norm is a LayerNorm"),
        (model.activation != "swiglu", f"its activation is {model.activation}, not swiglu"),
        (model.mlp_bias or model.attention_bias or model.head_bias, "its projections have biases"),
    ):
        if differs:
            return what
    return None


EXPORT_FORMATS: Mapping[Format, ExportFormat] = {
    f.name: f
    for f in (
        ExportFormat("sdar", "SDARForCausalLM", _sdar_obstacle),
        ExportFormat("bd3", "Bd3ForCausalLM", lambda m: None),
        ExportFormat(
            "qwen3",
            "Qwen3ForCausalLM",
            lambda m: _causal_obstacle(m, qk_norm=True, attention_bias=False),
        ),
        ExportFormat(
            "qwen2",
            "Qwen2ForCausalLM",
            lambda m: _causal_obstacle(m, qk_norm=False, attention_bias=True),
        ),
        ExportFormat(
            "llama",
            "LlamaForCausalLM",
            lambda m: _causal_obstacle(m, qk_norm=False, attention_bias=False, mlp_bias=True),
        ),
    )
}


def config_json(
    kind: Format,
    model: ModelRecipe,
    *,
    block_size: int,
    vocab_rows: int,
    special_ids: Config,
    mask_id: int,
    max_position_embeddings: int,
    dtype: str,
) -> dict[str, Any]:
    """config.json of an export; written by hand, since transformers drops or renames keys that engines read.

    special_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`.
    """
    block_diffusion = kind in _BLOCK_DIFFUSION.values()
    scaling = model.rope_scaling
    config: dict[str, Any] = {
        "architectures": [EXPORT_FORMATS[kind].architecture],
        "model_type": kind,
        "vocab_size": vocab_rows,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_size,
        "hidden_act": _ACTIVATIONS[model.activation],
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **scaling.model_dump()},
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": model.num_layers,
        "max_position_embeddings": max_position_embeddings,
        "attention_bias": kind == "bd3" and model.attention_bias,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        **special_ids,
        "tie_word_embeddings": model.tie_embeddings and not block_diffusion,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if kind == "llama":
        config["mlp_bias"] = model.mlp_bias
    if block_diffusion:
        module, prefix = kind, {"sdar": "SDAR", "bd3": "Bd3"}[kind]
        config |= {
            "auto_map": {
                "AutoConfig": f"configuration_{module}.{prefix}Config",
                "AutoModel": f"modeling_{module}.{prefix}Model",
                "AutoModelForCausalLM": f"modeling_{module}.{prefix}ForCausalLM",
            },
            "block_size": block_size,
            "mask_token_id": mask_id,
            "fuse_cross_entropy": True,
            "trained_with_tied_embeddings": model.tie_embeddings,
        }
    if kind == "bd3":
        config |= {
            "gated_mlp": model.activation == "swiglu",
            "normalization": model.normalization,
            "norm_bias": model.norm_bias,
            "qk_norm": model.qk_norm,
            "mlp_bias": model.mlp_bias,
            "head_bias": model.head_bias,
        }
    return config
