"""config.json of the supported Hugging Face architectures, read into a model's recipe and written from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from bd3_scale.convert import mixtures
from bd3_scale.convert.config_values import Config, check_kinds, integer, rope, rope_scaling
from bd3_scale.convert.mixtures import Mixtures
from bd3_scale.objective import BLOCK_DIFFUSION_FORMATS, BlockDiffusion, NextToken, Objective, objectives
from bd3_scale.recipe.schema import DiffusionRecipe, ModelRecipe, MoeRecipe

if TYPE_CHECKING:
    from bd3_scale.convert.names import Style

Format = Literal["sdar", "sdar_moe", "llada2", "bd3", "qwen3", "qwen3_moe", "qwen2", "llama"]

_ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# Options of a model of which every architecture has any value.
_SIZES = frozenset((
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size",
    "norm_eps", "rope_theta", "tie_embeddings", "init_std",
))  # fmt: skip
# Options that config.json has under names of Hugging Face; where an architecture has others, it is under their own.
_RENAMED = _SIZES | {"activation", "rope_scaling", "rotary_fraction", "moe"}


@dataclass(frozen=True)
class ExportFormat:
    """An architecture that models are exported to, as options of a recipe's model.

    Attributes:
        free: those of which it has any value, beside `_SIZES`.
        fixed: what it has of others, where that is not the recipe's default, which is Qwen3's.
        says: why it has no other value of one, where there is more to say.
        mixtures: the mixtures of experts that it has; None: dense models alone.
        dense: it has models without experts.
        style: whose names its tensors have.
        prefix: of the classes in the code beside the weights, which block diffusion models have.
        model_type: in config.json; the name by default.
        unsaid: what the published models have of what their config.json does not say.
    """

    name: Format
    architecture: str
    free: frozenset[str] = frozenset({"rope_scaling"})
    fixed: Mapping[str, Any] = field(default_factory=dict)
    says: Mapping[str, str] = field(default_factory=dict)
    mixtures: Mixtures | None = None
    dense: bool = True
    style: Style = "qwen3"
    prefix: str = ""
    model_type: str = ""
    unsaid: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_block_diffusion(self) -> bool:
        return self.name in BLOCK_DIFFUSION_FORMATS

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
        if model.moe is None and not self.dense:
            return "it has no experts"
        if model.moe is not None:
            found = self.mixtures.obstacle(model.moe, self.architecture) if self.mixtures else "it has experts"
            if found is not None:
                return found
        defaults = {name: f.get_default(call_default_factory=True) for name, f in ModelRecipe.model_fields.items()}
        has = {**defaults, **self.fixed}
        for option in (*says, *has):
            value = getattr(model, option)
            if option not in _SIZES | self.free | {"moe"} and value != has[option]:
                return says.get(option, f"it has {option}={value!r}, which {self.architecture} does not know")
        return None


_SDAR_SAYS = {
    "qk_norm": "it has no q/k norm, and a norm of unit weights is not the identity; train with model.qk_norm=true",
    "rope_scaling": "its rotary frequencies are scaled, which engines do not expect of it",
}
_EVERY_MIXTURE = frozenset(MoeRecipe.model_fields)
EXPORT_FORMATS: Mapping[Format, ExportFormat] = {
    f.name: f
    for f in (
        ExportFormat("sdar", "SDARForCausalLM", free=frozenset(), says=_SDAR_SAYS, prefix="SDAR"),
        ExportFormat(
            "sdar_moe",
            "SDARMoeForCausalLM",
            free=frozenset(),
            says=_SDAR_SAYS,
            mixtures=Mixtures(mixtures.read_qwen3_moe, mixtures.qwen3_moe_keys),
            dense=False,
            prefix="SDARMoe",
        ),
        ExportFormat(
            "llada2",
            "LLaDA2MoeModelLM",
            free=frozenset({"rotary_fraction"}),
            says=_SDAR_SAYS,
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
            unsaid={"block_size": 32, "mask_token_id": 156895},
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


def read_architecture(config: Config, block_size: int | None = None, mask_id: int | None = None) -> Architecture:
    """Return the model that a config.json describes.

    Args:
        block_size: in place of the one in a block diffusion model's config.
        mask_id: of a block diffusion model whose config does not say it.

    Raises:
        ValueError: an architecture, or a feature of it, that this package has no equal of.
    """
    check_kinds(config)
    names = config.get("architectures") or []
    name = names[0] if names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"architecture {name or config.get('model_type')!r} is not supported; these are: {', '.join(ARCHITECTURES)}"
            ", and the checkpoints of the official bd3lms code"
        )
    _refuse_unknown_features(name, config)
    of = ARCHITECTURES[name]
    num_token_ids = integer(config, "num_token_ids", 0) or None
    if of.is_block_diffusion:
        mask_id = _mask_id(name, config, mask_id, num_token_ids)
        block_size = block_size or integer(config, "block_size", of.unsaid.get("block_size"))
    else:
        _refuse_block_diffusion(name, block_size, mask_id)
    eos = config.get("eos_token_id")
    return Architecture(
        name=name,
        model=_model(name, config),
        diffusion=DiffusionRecipe(
            block_size=block_size or 1,
            objective=objectives.name_of(BlockDiffusion if of.is_block_diffusion else NextToken),
        ),
        vocab_rows=integer(config, "vocab_size"),
        eos_id=next(iter(eos), None) if isinstance(eos, list) else eos,
        mask_id=mask_id,
        num_token_ids=num_token_ids,
        max_position_embeddings=integer(config, "max_position_embeddings", 2048),
    )


def _mask_id(name: str, config: Config, given: int | None, num_token_ids: int | None) -> int:
    """Return the mask's id: what config.json says, else what is given, else that of the published models."""
    says = config.get("mask_token_id")
    if given is not None and says not in (None, given):
        raise ValueError(f"mask_id={given} is not the mask of {name}: its config.json says mask_token_id={says!r}")
    found = integer(
        config, "mask_token_id", ARCHITECTURES[name].unsaid.get("mask_token_id") if given is None else given
    )
    if num_token_ids is not None and found >= num_token_ids:
        raise ValueError(
            f"config.json of {name} says mask_token_id={found}, behind the {num_token_ids} ids in "
            "use: it was written with --mask-id for engines; import what it was made of, or an export without"
        )
    if says is None and found >= integer(config, "vocab_size"):
        raise ValueError(
            f"config.json of {name} says no mask_token_id, and {found} is none of its {config['vocab_size']} ids: "
            "give the mask's own with --mask-id"
        )
    return found


def _refuse_block_diffusion(name: str, block_size: int | None, mask_id: int | None) -> None:
    if block_size is not None:
        raise ValueError(
            f"block_size={block_size} belongs to block diffusion models, and {name} predicts the next token: leave it "
            "out here, and give the recipe of the adaptation its diffusion.block_size"
        )
    if mask_id is not None:
        raise ValueError(
            f"mask_id={mask_id} is of a mask that a model knows, and {name} predicts the next token: leave it out; "
            "--mask-token says which token becomes the mask"
        )


def _model(name: str, config: Config) -> ModelRecipe:
    of = ARCHITECTURES[name]
    heads, hidden = integer(config, "num_attention_heads"), integer(config, "hidden_size")
    activations = {theirs: ours for ours, theirs in _ACTIVATIONS.items() if ours == "swiglu" or "activation" in of.free}
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
        "moe": None if of.mixtures is None else of.mixtures.read(name, config),
        **of.fixed,
        **{option: config[option] for option in of.own_names if option in config},
    }
    if of.name == "bd3" and config.get("initializer_range"):
        sections["init_std"] = config["initializer_range"]
    try:
        model = ModelRecipe.model_validate(sections)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc']))}: {p['msg']}, not {repr(p['input'])[:80]}" for p in error.errors()[:5]
        )
        raise ValueError(f"config.json of {name} describes no model: {problems}") from error
    mixtures.check_mixture(name, model)
    _check_rotary(name, of, model)
    return model


def _check_rotary(name: str, of: ExportFormat, model: ModelRecipe) -> None:
    turned = model.rotary_channels
    if model.rotary_fraction != 1 and "rotary_fraction" not in of.free:
        raise ValueError(f"{name} with partial_rotary_factor={model.rotary_fraction} is not supported: 1 is")
    if turned % 2 or turned == 0:
        raise ValueError(
            f"partial_rotary_factor={model.rotary_fraction} in config.json of {name} turns {turned} of "
            f"{model.head_size} channels, and pairs of channels turn: is it the model's own?"
        )


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
        found[f.name] = (shape or trained) if f.is_block_diffusion else (trained or shape)
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
    of, scaling = EXPORT_FORMATS[kind], model.rope_scaling
    config: dict[str, Any] = {
        "architectures": [of.architecture],
        "model_type": of.model_type or kind,
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
        "tie_word_embeddings": model.tie_embeddings and not of.is_block_diffusion,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if of.is_block_diffusion:
        config |= _block_diffusion_keys(of, model, block_size, mask_id)
    if model.moe is not None and of.mixtures is not None:
        config |= of.mixtures.keys(model.moe)
    if "rotary_fraction" in of.free and model.rotary_fraction != 1:
        config["partial_rotary_factor"] = model.rotary_fraction
    if kind == "bd3":
        config["gated_mlp"] = model.activation == "swiglu"
    if kind == "llada2":
        config["rotary_dim"] = model.rotary_channels
    return config | model.model_dump(mode="json", include=set(of.own_names))


def _block_diffusion_keys(of: ExportFormat, model: ModelRecipe, block_size: int, mask_id: int) -> dict[str, Any]:
    module = of.model_type or of.name
    return {
        "auto_map": {
            "AutoConfig": f"configuration_{module}.{of.prefix}Config",
            "AutoModel": f"modeling_{module}.{of.prefix}Model",
            "AutoModelForCausalLM": f"modeling_{module}.{of.architecture}",
        },
        "block_size": block_size,
        "mask_token_id": mask_id,
        "fuse_cross_entropy": True,
        "trained_with_tied_embeddings": model.tie_embeddings,
    }
