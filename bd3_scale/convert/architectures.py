"""Translate config.json of the supported Hugging Face architectures into a model's recipe, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from bd3_scale.convert import mixtures
from bd3_scale.convert.config_values import Config, check_types, integer, rope, rope_scaling
from bd3_scale.convert.mixtures import Mixtures
from bd3_scale.objective import BLOCK_DIFFUSION_FORMATS, BlockDiffusion, NextToken, Objective, objectives
from bd3_scale.recipe.schema import DiffusionRecipe, ModelRecipe, MoeRecipe

if TYPE_CHECKING:
    from bd3_scale.convert.names import Style

Format = Literal["sdar", "sdar_moe", "llada2", "bd3", "qwen3", "qwen3_moe", "qwen2", "llama"]

_ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# Model options that every architecture supports with any value.
_SIZES = frozenset((
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size",
    "norm_eps", "rope_theta", "tie_embeddings", "init_std",
))  # fmt: skip
# Options that config.json has under Hugging Face's names; further options of an architecture keep the recipe's names.
_RENAMED = _SIZES | {"activation", "rope_scaling", "rotary_fraction", "moe"}


@dataclass(frozen=True)
class ExportFormat:
    """An architecture that models are exported to, described by options of a recipe's model.

    Attributes:
        free: options that it supports with any value, besides `_SIZES`.
        fixed: values of other options, if they differ from the recipe's defaults, which are Qwen3's.
        reasons: messages for options that have another value, where the general message says too little.
        mixtures: the mixtures of experts that it supports; None: dense models only.
        dense: it supports models without experts.
        style: naming style of its tensors.
        prefix: of the class names in the exported code; only block diffusion models have exported code.
        model_type: in config.json; by default the name.
        published: values of the published models for keys that their config.json lacks.
    """

    name: Format
    architecture: str
    free: frozenset[str] = frozenset({"rope_scaling"})
    fixed: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    mixtures: Mixtures | None = None
    dense: bool = True
    style: Style = "qwen3"
    prefix: str = ""
    model_type: str = ""
    published: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_block_diffusion(self) -> bool:
        """Return whether its models fill blocks of masks, and do not predict the next token."""
        return self.name in BLOCK_DIFFUSION_FORMATS

    @property
    def recipe_keys(self) -> tuple[str, ...]:
        """Return the options that keep the recipe's names in its config.json, in the recipe's order."""
        return tuple(option for option in ModelRecipe.model_fields if option in self.free - _RENAMED)

    def obstacle(self, model: ModelRecipe) -> str | None:
        """Return why the architecture cannot represent a model, None if it can."""
        reasons = {
            "qk_norm": f"it has {'' if model.qk_norm else 'no '}q/k norm",
            "attention_bias": f"its query/key/value projection has {'a' if model.attention_bias else 'no'} bias",
            "normalization": "its norm is a LayerNorm",
            "activation": f"its activation is {model.activation}, not swiglu",
            "mlp_bias": "its projections have biases",
            "head_bias": "its projections have biases",
            **self.reasons,
        }
        if model.moe is None and not self.dense:
            return "it has no experts"
        if model.moe is not None:
            problem = self.mixtures.obstacle(model.moe, self.architecture) if self.mixtures else "it has experts"
            if problem is not None:
                return problem
        defaults = {name: f.get_default(call_default_factory=True) for name, f in ModelRecipe.model_fields.items()}
        supported = {**defaults, **self.fixed}
        for option in (*reasons, *supported):
            value = getattr(model, option)
            if option not in _SIZES | self.free | {"moe"} and value != supported[option]:
                return reasons.get(option, f"it has {option}={value!r}, which {self.architecture} does not support")
        return None


_SDAR_REASONS = {
    "qk_norm": "it has no q/k norm, and a norm of unit weights is not the identity; train with model.qk_norm=true",
    "rope_scaling": "its rotary frequencies are scaled, which engines do not support for it",
}
_EVERY_MIXTURE = frozenset(MoeRecipe.model_fields)
EXPORT_FORMATS: Mapping[Format, ExportFormat] = {
    f.name: f
    for f in (
        ExportFormat("sdar", "SDARForCausalLM", free=frozenset(), reasons=_SDAR_REASONS, prefix="SDAR"),
        ExportFormat(
            "sdar_moe",
            "SDARMoeForCausalLM",
            free=frozenset(),
            reasons=_SDAR_REASONS,
            mixtures=Mixtures(mixtures.read_qwen3_moe, mixtures.qwen3_moe_keys),
            dense=False,
            prefix="SDARMoe",
        ),
        ExportFormat(
            "llada2",
            "LLaDA2MoeModelLM",
            free=frozenset({"rotary_fraction"}),
            reasons=_SDAR_REASONS,
            mixtures=Mixtures(
                mixtures.read_llada2,
                mixtures.llada2_keys,
                free=_EVERY_MIXTURE - {"score", "bias", "normalize_top_k"},
                fixed={"score": "sigmoid", "bias": True},
                counts_shared=True,
            ),
            dense=False,
            style="llada2",
            prefix="LLaDA2Moe",
            model_type="llada2_moe",
            published={"block_size": 32, "mask_token_id": 156895},
        ),
        ExportFormat(
            "bd3",
            "Bd3ForCausalLM",
            free=frozenset(ModelRecipe.model_fields),
            mixtures=Mixtures(mixtures.read_bd3, mixtures.bd3_keys, free=_EVERY_MIXTURE),
            prefix="Bd3",
        ),
        ExportFormat("qwen3", "Qwen3ForCausalLM"),
        ExportFormat(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            mixtures=Mixtures(
                mixtures.read_qwen3_moe,
                mixtures.qwen3_moe_keys,
                free=frozenset({"normalize_top_k", "first_dense_layers"}),
            ),
            dense=False,
        ),
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
        mask_id: None for a model without a mask token.
        num_token_ids: number of ids in use, if the embedding has more rows.
    """

    name: str
    model: ModelRecipe
    diffusion: DiffusionRecipe
    vocab_rows: int
    eos_id: int | None
    mask_id: int | None
    num_token_ids: int | None
    max_position_embeddings: int


def read_architecture(config: Config, block_size: int | None = None, mask_id: int | None = None) -> Architecture:
    """Return the model that a config.json describes.

    Args:
        block_size: replaces the one in a block diffusion model's config.
        mask_id: for a block diffusion model whose config lacks it.

    Raises:
        ValueError: an architecture, or a feature of it, that this package does not implement.
    """
    check_types(config)
    names = config.get("architectures") or []
    name = names[0] if names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"architecture {name or config.get('model_type')!r} is not supported; these are: {', '.join(ARCHITECTURES)}"
            ", and the checkpoints of the official bd3lms code"
        )
    _refuse_unknown_features(name, config)
    form = ARCHITECTURES[name]
    num_token_ids = integer(config, "num_token_ids", 0) or None
    if form.is_block_diffusion:
        mask_id = _mask_id(name, config, mask_id, num_token_ids)
        block_size = block_size or integer(config, "block_size", form.published.get("block_size"))
    else:
        _refuse_block_diffusion(name, block_size, mask_id)
    eos = config.get("eos_token_id")
    return Architecture(
        name=name,
        model=_model(name, config),
        diffusion=DiffusionRecipe(
            block_size=block_size or 1,
            objective=objectives.name_of(BlockDiffusion if form.is_block_diffusion else NextToken),
        ),
        vocab_rows=integer(config, "vocab_size"),
        eos_id=next(iter(eos), None) if isinstance(eos, list) else eos,
        mask_id=mask_id,
        num_token_ids=num_token_ids,
        max_position_embeddings=integer(config, "max_position_embeddings", 2048),
    )


def _mask_id(name: str, config: Config, given: int | None, num_token_ids: int | None) -> int:
    """Return the mask's id: from config.json, else `given`, else that of the published models."""
    configured = config.get("mask_token_id")
    if given is not None and configured not in (None, given):
        raise ValueError(
            f"mask_id={given} is not the mask of {name}: its config.json says mask_token_id={configured!r}"
        )
    mask_id = integer(
        config, "mask_token_id", ARCHITECTURES[name].published.get("mask_token_id") if given is None else given
    )
    if num_token_ids is not None and mask_id >= num_token_ids:
        raise ValueError(
            f"config.json of {name} says mask_token_id={mask_id}, behind the {num_token_ids} ids in "
            "use: it was exported with --mask-id for engines; import its checkpoint, or an export without --mask-id"
        )
    if configured is None and mask_id >= integer(config, "vocab_size"):
        raise ValueError(
            f"config.json of {name} has no mask_token_id, and {mask_id} is none of its {config['vocab_size']} ids: "
            "give the mask's id with --mask-id"
        )
    return mask_id


def _refuse_block_diffusion(name: str, block_size: int | None, mask_id: int | None) -> None:
    if block_size is not None:
        raise ValueError(
            f"block_size={block_size} is for block diffusion models, and {name} predicts the next token: leave it "
            "out here, and set diffusion.block_size in the recipe of the adaptation"
        )
    if mask_id is not None:
        raise ValueError(
            f"mask_id={mask_id} is for models with a mask token, and {name} predicts the next token: leave it out; "
            "--mask-token names the token that becomes the mask"
        )


def _model(name: str, config: Config) -> ModelRecipe:
    form = ARCHITECTURES[name]
    heads, hidden = integer(config, "num_attention_heads"), integer(config, "hidden_size")
    activations = {
        theirs: ours for ours, theirs in _ACTIVATIONS.items() if ours == "swiglu" or "activation" in form.free
    }
    act = config.get("hidden_act", "silu")
    if act not in activations:
        raise ValueError(f"hidden_act={act!r} of {name} is not supported; {', '.join(activations)} is")
    sections = {
        "num_layers": integer(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": integer(config, "num_key_value_heads", heads),
        "head_dim": integer(config, "head_dim", hidden // max(1, heads)),
        "ffn_hidden_size": integer(config, "intermediate_size"),
        "activation": activations[act],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(config.get("tie_word_embeddings") or config.get("trained_with_tied_embeddings")),
        "rope_theta": rope(config)["rope_theta"],
        "rope_scaling": rope_scaling(config),
        "rotary_fraction": rope(config)["partial_rotary_factor"],
        "moe": None if form.mixtures is None else form.mixtures.read(name, config),
        **form.fixed,
        **{option: config[option] for option in form.recipe_keys if option in config},
    }
    if form.name == "bd3" and config.get("initializer_range"):
        sections["init_std"] = config["initializer_range"]
    try:
        model = ModelRecipe.model_validate(sections)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc']))}: {p['msg']}, not {repr(p['input'])[:80]}" for p in error.errors()[:5]
        )
        raise ValueError(f"config.json of {name} describes no model: {problems}") from error
    mixtures.check_mixture(name, model)
    _check_rotary(name, form, model)
    return model


def _check_rotary(name: str, form: ExportFormat, model: ModelRecipe) -> None:
    turned = model.rotary_channels
    if model.rotary_fraction != 1 and "rotary_fraction" not in form.free:
        raise ValueError(f"{name} with partial_rotary_factor={model.rotary_fraction} is not supported: 1 is")
    if turned % 2 or turned == 0:
        raise ValueError(
            f"partial_rotary_factor={model.rotary_fraction} in config.json of {name} turns {turned} of "
            f"{model.head_size} channels, and pairs of channels turn: is config.json the model's own?"
        )


def _refuse_unknown_features(name: str, config: Config) -> None:
    uses_window = config.get("use_sliding_window", name == "MistralForCausalLM")
    window = config.get("sliding_window")
    windowed_layers = any(kind != "full_attention" for kind in config.get("layer_types") or ())
    if windowed_layers or (uses_window and window is not None):
        raise ValueError(f"{name} with sliding_window={window}: sliding windows are not supported")
    if config.get("attention_bias") and name != "Bd3ForCausalLM":
        raise ValueError(f"{name} with attention_bias=true has a bias on its output projection, which is not supported")
    if config.get("quantization_config"):
        raise ValueError("the checkpoint is quantised: import the weights that it was made from")


def export_obstacles(model: ModelRecipe, objective: type[Objective]) -> dict[Format, str | None]:
    """Return why a model trained for an objective cannot be exported to each format, None for those where it can."""
    obstacles: dict[Format, str | None] = {}
    for f in EXPORT_FORMATS.values():
        shape, trained = f.obstacle(model), objective.export_obstacle(f.name)
        # First the obstacle in the model's shape: no training changes it, and it is known before an adaptation.
        obstacles[f.name] = (shape or trained) if f.is_block_diffusion else (trained or shape)
    return obstacles


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
    """Return config.json of an export; written by hand, since transformers drops or renames keys that engines read.

    special_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`.
    """
    form, scaling = EXPORT_FORMATS[kind], model.rope_scaling
    config: dict[str, Any] = {
        "architectures": [form.architecture],
        "model_type": form.model_type or kind,
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
        "tie_word_embeddings": model.tie_embeddings and not form.is_block_diffusion,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if form.is_block_diffusion:
        config |= _block_diffusion_keys(form, model, block_size, mask_id)
    if model.moe is not None and form.mixtures is not None:
        config |= form.mixtures.keys(model.moe)
    if "rotary_fraction" in form.free and model.rotary_fraction != 1:
        config["partial_rotary_factor"] = model.rotary_fraction
    if kind == "bd3":
        config["gated_mlp"] = model.activation == "swiglu"
    if kind == "llada2":
        config["rotary_dim"] = model.rotary_channels
    return config | model.model_dump(mode="json", include=set(form.recipe_keys))


def _block_diffusion_keys(form: ExportFormat, model: ModelRecipe, block_size: int, mask_id: int) -> dict[str, Any]:
    module = form.model_type or form.name
    return {
        "auto_map": {
            "AutoConfig": f"configuration_{module}.{form.prefix}Config",
            "AutoModel": f"modeling_{module}.{form.prefix}Model",
            "AutoModelForCausalLM": f"modeling_{module}.{form.architecture}",
        },
        "block_size": block_size,
        "mask_token_id": mask_id,
        "fuse_cross_entropy": True,
        "trained_with_tied_embeddings": model.tie_embeddings,
    }
