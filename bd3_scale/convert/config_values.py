"""Read values of a config.json and check their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bd3_scale.recipe.schema import RopeScaling

Config = Mapping[str, Any]

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "architectures": list,
    "eos_token_id": (int, list),
    "layer_types": list,
    "mlp_only_layers": list,
    "quantization_config": dict,
    "rope_parameters": dict,
    "rope_scaling": dict,
}


def check_types(config: Config) -> None:
    """Raise ValueError if a value has another type than transformers writes."""
    for key, types in _TYPES.items():
        value = config.get(key)
        if value is not None and not isinstance(value, types):
            raise ValueError(f"{key}={repr(value)[:80]} in config.json is not of the type that transformers writes")


def integer(config: Config, key: str, default: int | None = None) -> int:
    """Return the value of `key`, a whole number. ValueError: it is missing without a default, or another value."""
    value = default if config.get(key) is None else config[key]
    name = config["architectures"][0]
    if value is None:
        raise ValueError(f"config.json has no {key!r}, which {name} needs")
    if type(value) is not int or value < 0:
        raise ValueError(f"{key}={repr(value)[:80]} in config.json is not a whole number, which {name} needs")
    return value


def rope(config: Config) -> Config:
    """Return the rotary parameters: transformers 5 writes `rope_parameters` in place of several keys."""
    top_level = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    defaults = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    return defaults | top_level | (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})


def rope_scaling(config: Config) -> dict[str, Any] | None:
    """Return the values of Llama 3's rotary scaling, or None. ValueError: another type of scaling."""
    parameters = rope(config)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_scaling of type {kind!r} is not supported; none and llama3 are")
    return {key: parameters[key] for key in RopeScaling.model_fields if key in parameters}
