"""config.json of the supported Hugging Face architectures, read into a model's recipe and written from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from bd3_scale.objective import BlockDiffusion, NextToken, Objective, objectives
from bd3_scale.recipe.schema import DiffusionRecipe, ModelRecipe, RopeScaling

Config = Mapping[str, Any]
Format = Literal["sdar", "bd3", "qwen3", "qwen2", "llama"]

_ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_BLOCK_DIFFUSION = ("sdar", "bd3")
# Options of a model of which every architecture has any value.
_SIZES = frozenset((
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size",
    "norm_eps", "rope_theta", "tie_embeddings", "init_std",
))  # fmt: skip
# Options that config.json has under names of Hugging Face; where an architecture has others, it is under their own.
_RENAMED = _SIZES | {"activation", "rope_scaling"}


@dataclass(frozen=True)
class ExportFormat:
    """An architecture that models are exported to, as options of a recipe's model.

    Attributes:
        free: those of which it has any value, beside `_SIZES`.
        fixed: what it has of others, where that is not the recipe's default, which is Qwen3's.
        says: why it has no other value of one, where there is more to say.
    """

    name: Format
    architecture: str
    free: frozenset[str] = frozenset({"rope_scaling"})
    fixed: Mapping[str, Any] = field(default_factory=dict)
    says: Mapping[str, str] = field(default_factory=dict)

    @property
    def own_names(self) -> tuple[str, ...]:
        """Return the options that its config.json has under the recipe's names, in the recipe's order."""
        return tuple(option for option in ModelRecipe.model_fields if option in self.free - _RENAMED)

    def obstacle(self, model: ModelRecipe) -> str | None:
        """Return what the architecture does not have of a model, None where it has everything."""
        says = {
            "qk_norm": f"it has {'' if model.qk_norm else 'no '}q/k norm",
            "attention_bias": f"its query/key/value projection has {'a' if model.attention_bias else 'no'} bias",
            "normalization": "its norm is a LayerNorm",
            "activation": f"its activation is {model.activation}, not swiglu",
            "mlp_bias": "its projections have biases",
            "head_bias": "its projections have biases",
            **self.says,
        }
        defaults = {name: f.get_default(call_default_factory=True) for name, f in ModelRecipe.model_fields.items()}
        has = {**defaults, **self.fixed}
        for option in (*says, *has):
            value = getattr(model, option)
            if option not in _SIZES | self.free and value != has[option]:
                return says.get(option, f"it has {option}={value!r}, which {self.architecture} does not know")
        return None


EXPORT_FORMATS: Mapping[Format, ExportFormat] = {
    f.name: f
    for f in (
        ExportFormat(
            "sdar",
            "SDARForCausalLM",
            free=frozenset(),
            says={
                "qk_norm": "it has no q/k norm, and a norm of unit weights is not the identity; train with "
                "model.qk_norm=true",
                "rope_scaling": "its rotary frequencies are scaled, which engines do not expect of SDAR",
            },
        ),
        ExportFormat("bd3", "Bd3ForCausalLM", free=frozenset(ModelRecipe.model_fields)),
        ExportFormat("qwen3", "Qwen3ForCausalLM"),
        ExportFormat("qwen2", "Qwen2ForCausalLM", fixed={"qk_norm": False, "attention_bias": True}),
        ExportFormat(
            "llama", "LlamaForCausalLM", free=frozenset({"rope_scaling", "mlp_bias"}), fixed={"qk_norm": False}
        ),
    )
}
ARCHITECTURES: Mapping[str, ExportFormat] = {
    **{f.architecture: f for f in EXPORT_FORMATS.values()},
    "MistralForCausalLM": EXPORT_FORMATS["llama"],
}


@dataclass(frozen=True)
class Architecture:
    """A model as a config.json describes it.

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
    """Return the model that a config.json describes.

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
    block_diffusion = ARCHITECTURES[name].name in _BLOCK_DIFFUSION
    if block_size is not None and not block_diffusion:
        raise ValueError(
            f"block_size={block_size} belongs to block diffusion models, and {name} predicts the next token: leave it "
            "out here, and give the recipe of the adaptation its diffusion.block_size"
        )
    num_token_ids = _integer(config, "num_token_ids", 0) or None
    if block_diffusion and num_token_ids is not None and _integer(config, "mask_token_id") >= num_token_ids:
        raise ValueError(
            f"config.json of {name} says mask_token_id={config['mask_token_id']}, behind the {num_token_ids} ids in "
            "use: it was written with --mask-id for engines; import what it was made of, or an export without"
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
        num_token_ids=num_token_ids,
        max_position_embeddings=_integer(config, "max_position_embeddings", 2048),
    )


def _model(name: str, config: Config) -> ModelRecipe:
    of = ARCHITECTURES[name]
    heads, hidden = _integer(config, "num_attention_heads"), _integer(config, "hidden_size")
    activations = {theirs: ours for ours, theirs in _ACTIVATIONS.items() if ours == "swiglu" or "activation" in of.free}
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
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(config.get("tie_word_embeddings") or config.get("trained_with_tied_embeddings")),
        "rope_theta": _rope(config)["rope_theta"],
        "rope_scaling": _rope_scaling(config),
        **of.fixed,
        **{option: config[option] for option in of.own_names if option in config},
    }
    if of.name == "bd3" and config.get("initializer_range"):
        sections["init_std"] = config["initializer_range"]
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


def export_obstacles(model: ModelRecipe, objective: type[Objective]) -> dict[Format, str | None]:
    """Return why a model that was trained for an objective cannot be exported to each format, None where it can."""
    found: dict[Format, str | None] = {}
    for f in EXPORT_FORMATS.values():
        shape, trained = f.obstacle(model), objective.export_obstacle(f.name)
        # What no training changes comes first, so that it is known before an adaptation.
        found[f.name] = (shape or trained) if f.name in _BLOCK_DIFFUSION else (trained or shape)
    return found


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
    block_diffusion = kind in _BLOCK_DIFFUSION
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
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        **special_ids,
        "tie_word_embeddings": model.tie_embeddings and not block_diffusion,
        "torch_dtype": dtype,
        "use_cache": True,
    }
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
        config["gated_mlp"] = model.activation == "swiglu"
    return config | model.model_dump(mode="json", include=set(EXPORT_FORMATS[kind].own_names))
