"""Values of a config.json, checked for their kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bd3_scale.recipe.schema import RopeScaling

Config = Mapping[str, Any]

_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "architectures": list,
    "eos_token_id": (int, list),
    "layer_types": list,
    "mlp_only_layers": list,
    "quantization_config": dict,
    "rope_parameters": dict,
    "rope_scaling": dict,
}


def check_kinds(config: Config) -> None:
    """Raise ValueError if a value is of another kind than transformers writes."""
    for key, kinds in _KINDS.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"{key}={repr(value)[:80]} in config.json is not of the kind that transformers writes")


def integer(config: Config, key: str, default: int | None = None) -> int:
    """Return a whole number. ValueError: there is none and no default, or another value."""
    value = default if config.get(key) is None else config[key]
    name = config["architectures"][0]
    if value is None:
        raise ValueError(f"config.json has no {key!r}, which {name} needs")
    if type(value) is not int or value < 0:
        raise ValueError(f"{key}={repr(value)[:80]} in config.json is no count: {name} needs a whole number")
    return value


def rope(config: Config) -> Config:
    """Return what it says of rotary embeddings: transformers 5 writes `rope_parameters` in place of several keys."""
    own = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    found = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0, **own, **(config.get("rope_scaling") or {})}
    return found | (config.get("rope_parameters") or {})


def rope_scaling(config: Config) -> dict[str, Any] | None:
    """Return Llama 3's stretch, or None. ValueError: another kind."""
    found = rope(config)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_scaling of type {kind!r} is not supported; none and llama3 are")
    return {key: found[key] for key in RopeScaling.model_fields if key in found}
