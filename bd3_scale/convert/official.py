"""Read models of the official bd3lms code (github.com/kuleshov-group/bd3lms) as plain pre-norm transformers.

Their DiT modulates every norm, x(1 + scale) + shift, and gates every branch by adaLN (Peebles & Xie, 2023). Without
time conditioning the noise level that adaLN gets is always zero, so scales, shifts and gates are constants. They are
folded into
weights: scale and shift become the norm's weight and bias, and a gate scales the rows of the projection before it. The
outputs are the same; see `official_fold`.

The weight files do not say whether a model is time-conditioned, causal or otherwise parameterised; configurations do. A
configuration is read from config.json next to the weights, or from a Lightning checkpoint's hyperparameters. Without
one, the model is assumed to be of `algo=bd3lm` or `algo=mdlm`, the code's block diffusion models, which have no time
conditioning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bd3_scale.convert.folder import DTYPES, Weights, open_weights
from bd3_scale.convert.official_fold import fold, parameters
from bd3_scale.convert.official_pickle import load_pickle, plain
from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.resilience.foreign import CONFIG, WEIGHTS, WEIGHTS_INDEX, file_in, object_in
from bd3_scale.resilience.readers import reader

ROPE_THETA = 10_000.0
NORM_EPS = 1e-5  # the default of F.layer_norm, which the code uses
DEFAULT_LENGTH = 1024  # `model.length` of the published models

_MODEL_TYPES = ("bd3lm", "mdlm")
_PICKLED = "pytorch_model.bin"
# Size of a vocabulary -> its mask id. Otherwise the mask is a new last id; BERT's uncased vocabulary (LM1B) has one.
_KNOWN_MASKS = {30522: 103}
_PREFIX = re.compile(r"(?:(?:backbone|_orig_mod|module)\.)+")
_INV_FREQ = "rotary_emb.inv_freq"
# Buffers: the searched mask-rate interval, the noise schedule and the attention mask.
_NO_WEIGHTS = re.compile(r"sampling_eps_(min|max)|noise\..*|(block_diff_|cross_attn_)?mask")


@dataclass(frozen=True)
class OfficialModel:
    """An official model as a plain transformer.

    Attributes:
        block_size: None if no configuration says it; the whole length for a model without a clean stream (MDLM).
        mask_id: the last row of the vocabulary, or BERT's mask.
        max_position_embeddings: tokens of a training sequence; by default that of the published models.
        begins_with_bos: the code puts BOS before every sequence (`ignore_bos`), as for its block diffusion models
            unless their configuration says otherwise.
        source: which weights were read, those of the moving average if there is one.
        weights: under Qwen3's names, in the dtype of the file.
    """

    model: ModelRecipe
    block_size: int | None
    mask_id: int
    vocab_size: int
    max_position_embeddings: int
    begins_with_bos: bool
    source: Literal["weights", "ema"]
    weights: Weights


def is_official(path: Path) -> bool:
    """Tell whether `open_official` reads `path`: a single file, or a folder whose config.json is of that code."""
    return path.is_file() or (path.is_dir() and bool(_config_in(path)))


@reader("a model of bd3lms")
def open_official(path: Path) -> OfficialModel:
    """Read and check a checkpoint; its weights are folded when they are read.

    Args:
        path: a state dict from `torch.save`, a Lightning checkpoint, a safetensors file, or a folder of
            `save_pretrained` or `push_to_hub`.

    Raises:
        ValueError: another model or a variant that cannot be folded, missing or extra tensors, a damaged file, or a
            pickle that could run code.
        FileNotFoundError: the folder has no weights.
    """
    tensors, shadow, config = _open(path)
    options = _flatten(config)
    _refuse_variants(path, options)
    expected = _check_tensors(path, tensors, options)
    averaged = _averaged(path, shadow, expected) if shadow else None
    model = _recipe(path, tensors, expected, options)
    vocab_size = expected["vocab_embed.embedding"][0]
    _check_sizes(path, options, model, vocab_size)
    length = _integer(options, "model_length")
    return OfficialModel(
        model=model,
        block_size=_integer(options, "block_size") if options.get("cross_attn", True) else length,
        mask_id=_KNOWN_MASKS.get(vocab_size, vocab_size - 1),
        vocab_size=vocab_size,
        max_position_embeddings=length or DEFAULT_LENGTH,
        begins_with_bos=options.get("ignore_bos") is not False,
        source="ema" if averaged else "weights",
        weights=fold(averaged or tensors, model.num_layers),
    )


def _config_in(folder: Path) -> dict[str, Any]:
    """Return config.json if the official code wrote it, as a transformers model or a Hugging Face mixin; else {}."""
    config = object_in(folder, CONFIG)
    nested = config.get("config")
    hydra = isinstance(nested, Mapping) and "model" in nested
    return config if hydra or config.get("model_type") in _MODEL_TYPES else {}


def _open(path: Path) -> tuple[Weights, list[Tensor], Mapping[str, Any]]:
    """Return the tensors, the moving average's tensors without names, and the configuration."""
    if path.is_dir():
        safe = any(file_in(path, name) for name in (WEIGHTS, WEIGHTS_INDEX))
        if safe or file_in(path, _PICKLED) is None:
            return _without_prefix(path, open_weights(path)), [], _config_in(path)
        path = path / _PICKLED
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: give a file or a folder of the bd3lms code")
    if _is_safetensors(path):
        return _without_prefix(path, _open_safetensors(path)), [], _config_in(path.parent)
    content = load_pickle(path)
    state, ema = content.get("state_dict", content), content.get("ema") or {}
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        names = ", ".join(map(str, list(content)[:8]))
        raise ValueError(f"{path} holds {names}: neither a state dict nor a Lightning checkpoint with one")
    shadow = ema.get("shadow_params", []) if isinstance(ema, Mapping) else []
    config = plain(content.get("hyper_parameters")) if state is not content else None
    return _without_prefix(path, _of_tensors(state)), shadow, config or _config_in(path.parent)


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _open_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
            # uint8 stands for all dtypes that weights cannot have; `_check_tensors` refuses weights with it by name.
            dtypes = {name: DTYPES.get(view.get_dtype(), torch.uint8) for name, view in views.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or truncated ({error}): download it again") from error
    return Weights(shapes, dtypes, partial(_read_safetensors, path))


def _read_safetensors(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _of_tensors(tensors: Mapping[str, Tensor]) -> Weights:
    for name, tensor in tensors.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            # A tensor with stride 0 claims any size from a few stored bytes; folding it would allocate that size.
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is larger than its stored data: no weight is")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return Weights(shapes, dtypes, lambda name: tensors[name].detach())


def _without_prefix(path: Path, weights: Weights) -> Weights:
    """Rename tensors as in the DiT itself, without prefixes of wrappers: Lightning, transformers, compile, DDP."""
    origin: dict[str, str] = {}
    for name in weights.shapes:
        short = _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
        if short in origin and not _NO_WEIGHTS.fullmatch(short):
            raise ValueError(f"{path} holds two models, with {origin[short]} and {name}: save only one of them")
        origin[short] = name
    return Weights(
        shapes={short: weights.shapes[name] for short, name in origin.items()},
        dtypes={short: weights.dtypes[name] for short, name in origin.items()},
        read=lambda short: weights.read(origin[short]),
    )


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration under the names of the transformers one (models/hf/configuration_bd3lm.py)."""
    hydra = config.get("config")
    if not isinstance(hydra, Mapping):
        return {"cross_attn": config.get("model_type") != "mdlm", **config}
    algo, model = hydra.get("algo") or hydra, hydra.get("model") or {}  # the MDLM code has no `algo`
    options = {
        "block_size": hydra.get("block_size"),
        "model_length": model.get("length"),
        "hidden_dim": model.get("hidden_size"),
        "n_blocks": model.get("n_blocks"),
        "n_heads": model.get("n_heads"),
        "vocab_size": config.get("vocab_size"),
        "time_conditioning": algo.get("time_conditioning"),
        "causal": model.get("causal_attention", algo.get("causal_attention")),
        "cross_attn": algo.get("cross_attn", False),
        "parameterization": algo.get("parameterization"),
        "backbone": algo.get("backbone"),
        "ignore_bos": algo.get("ignore_bos"),
    }
    if options["block_size"] == "${model.length}":
        options["block_size"] = options["model_length"]
    return options


def _integer(options: Mapping[str, Any], name: str) -> int | None:
    value = options.get(name)
    return value if type(value) is int and value > 0 else None


def _refuse_variants(path: Path, options: Mapping[str, Any]) -> None:
    if options.get("causal") or options.get("parameterization") == "ar":
        raise ValueError(_AUTOREGRESSIVE.format(path=path))
    if (parameterization := options.get("parameterization")) not in (None, "subs"):
        raise ValueError(
            f"{path} has parameterization={parameterization}, and only `subs` predicts logits of clean tokens: "
            "use a model of algo=bd3lm or algo=mdlm"
        )
    if options.get("time_conditioning"):
        raise ValueError(
            f"{path} is time-conditioned (time_conditioning=true): its modulations depend on the noise level, and "
            "cannot be folded into weights; use a model that was trained with time_conditioning=false"
        )
    if (backbone := options.get("backbone")) not in (None, "dit", "hf_dit"):
        raise ValueError(f"{path} has backbone={backbone}, and only the DiT (dit, hf_dit) can be imported")


_AUTOREGRESSIVE = (
    "{path} is the causal next-token (AR) model of the official code, not a diffusion model: use a model of "
    "algo=bd3lm or algo=mdlm, or a next-token model of a supported Hugging Face architecture"
)


def _check_tensors(path: Path, tensors: Weights, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the backbone's parameters in their order, after a check that the file has exactly them."""
    shapes = tensors.shapes
    if len(shapes.get("vocab_embed.embedding", ())) != 2:
        some = ", ".join(list(shapes)[:4]) or "no tensors"
        raise ValueError(f"{path} is no DiT of bd3lms: it has no matrix vocab_embed.embedding; it has {some}")
    if "blocks.0.attn_qkv.weight" in shapes and not any("adaLN_modulation" in name for name in shapes):
        raise ValueError(_AUTOREGRESSIVE.format(path=path))
    expected = parameters(shapes, _integer(options, "n_blocks"))
    known = {*expected, _INV_FREQ}
    groups = {
        "missing": [name for name in expected if name not in shapes],
        "not part of the model": [name for name in shapes if name not in known and not _NO_WEIGHTS.fullmatch(name)],
        "of another shape": [f"{n} {shapes[n]}, not {s}" for n, s in expected.items() if shapes.get(n, s) != s],
        "no floating-point numbers": [n for n in expected if n in shapes and not tensors.dtypes[n].is_floating_point],
    }
    if any(groups.values()):
        raise ValueError(f"{path} is no DiT of bd3lms, or not all of one:\n  - " + "\n  - ".join(_listed(groups)))
    return expected


def _listed(groups: Mapping[str, list[str]]) -> Iterator[str]:
    for kind, names in groups.items():
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            yield f"{kind}: {', '.join(names[:6])}{more}"


def _averaged(path: Path, shadow: list[Tensor], expected: Mapping[str, tuple[int, ...]]) -> Weights:
    """Name the moving average's tensors, a list in the order of the backbone's parameters (models/ema.py)."""
    shapes = [tuple(tensor.shape) if isinstance(tensor, Tensor) else None for tensor in shadow]
    if shapes != list(expected.values()):
        wrong = [f"{n} {f}, not {s}" for f, (n, s) in zip(shapes, expected.items(), strict=False) if f != s]
        raise ValueError(
            f"the moving average in {path} is of another model: it has {len(shapes)} tensors, the model {len(expected)}"
            + f"; {', '.join(wrong[:3])}" * bool(wrong)
            + "; remove `ema` from the file to import the weights of the last step"
        )
    return _of_tensors(dict(zip(expected, shadow, strict=True)))


def _recipe(
    path: Path, tensors: Weights, expected: Mapping[str, tuple[int, ...]], options: Mapping[str, Any]
) -> ModelRecipe:
    hidden = expected["vocab_embed.embedding"][1]
    return ModelRecipe(
        num_layers=sum(name.endswith(".attn_qkv.weight") for name in expected),
        hidden_size=hidden,
        num_attention_heads=_heads(path, tensors, hidden, options),
        ffn_hidden_size=expected["blocks.0.mlp.0.weight"][0],
        activation="gelu_tanh",
        normalization="layernorm",
        norm_bias=True,
        norm_eps=NORM_EPS,
        qk_norm=False,
        mlp_bias=True,
        attention_bias=False,
        head_bias=True,
        tie_embeddings=False,
        rope_theta=ROPE_THETA,
    )


def _heads(path: Path, tensors: Weights, hidden: int, options: Mapping[str, Any]) -> int:
    if _INV_FREQ not in tensors.shapes:
        if (heads := _integer(options, "n_heads")) is None:
            raise ValueError(
                f"{path} lacks {_INV_FREQ}, so its number of heads is unknown: put a config.json with n_heads next to "
                "it"
            )
        return heads
    inv_freq = tensors.read(_INV_FREQ).double()
    count = inv_freq.numel()
    if inv_freq.dim() != 1 or not count or hidden % (2 * count):
        raise ValueError(f"{path}: {_INV_FREQ} {tuple(inv_freq.shape)} does not fit a hidden size of {hidden}")
    # The tolerance allows for bf16, which has two to three digits.
    if not torch.allclose(inv_freq, ROPE_THETA ** -(torch.arange(count).double() / count), rtol=1e-2):
        raise ValueError(f"{path}: {_INV_FREQ} is not that of base {ROPE_THETA:.0f}, the only one that bd3lms has")
    return hidden // (2 * count)


def _check_sizes(path: Path, options: Mapping[str, Any], model: ModelRecipe, vocab_size: int) -> None:
    sizes = {"hidden_dim": model.hidden_size, "n_heads": model.num_attention_heads, "vocab_size": vocab_size}
    for name, size in sizes.items():
        if _integer(options, name) not in (None, size):
            raise ValueError(
                f"the configuration of {path} says {name}={options[name]}, and its tensors say {size}: use the "
                "config.json of this model, or remove it"
            )
