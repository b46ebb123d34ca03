"""Read a Hugging Face folder: its config.json and its safetensors files, sharded or not, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.resilience.files import read_object
from bd3_scale.resilience.foreign import CONFIG, WEIGHTS_INDEX, file_in, weight_files, weight_map

# safetensors' names of the dtypes that weights may have.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Tensors that stack all experts of a layer, as transformers 5 writes them; their names lack ".weight".
_STACKED = re.compile(r"(.+\.mlp\.experts)\.((?:gate|up|down)_proj)")
_PACKED_DTYPES: Mapping[str, torch.dtype] = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}


@dataclass(frozen=True)
class Weights:
    """Tensors of a model by their names in a Hugging Face checkpoint, read one at a time.

    Attributes:
        shapes, dtypes: of every tensor, by name.
        read: reads one tensor by its name; no other one is in memory.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json. ValueError: not a JSON object, see `file_in`; FileNotFoundError: there is none."""
    path = file_in(folder, CONFIG)
    if path is None:
        raise FileNotFoundError(f"{folder / CONFIG} does not exist: a Hugging Face model folder has one")
    return read_object(path)


def open_weights(folder: Path, *, quantised: bool = False, experts_apart: bool = False) -> Weights:
    """Open the tensors of a folder with `model.safetensors`, or with shards and their index.

    quantised: allow the integer dtypes of packed weights. experts_apart: list each expert of a tensor that stacks the
    experts of a layer as a tensor, under Qwen3-MoE's names.

    Raises:
        FileNotFoundError: there are no safetensors files, or one that the index names is missing.
        ValueError: a file is truncated or corrupt, the index names a tensor that its file does not hold, or a tensor
            has a dtype that weights cannot have.
    """
    file_of: dict[str, Path] = {}
    parts: dict[str, tuple[Path, str, int | None]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    known = {**DTYPES, **_PACKED_DTYPES} if quantised else DTYPES
    for path in weight_files(folder).values():
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                view = file.get_slice(name)
                if view.get_dtype() not in known:
                    raise ValueError(
                        f"{path}: {name} is of type {view.get_dtype()}, and weights are of {', '.join(DTYPES)}: import "
                        "the weights that a quantised checkpoint was made from"
                    )
                file_of[name] = path
                for part, index, shape in _parts(name, tuple(view.get_shape()), experts_apart):
                    parts[part], shapes[part] = (path, name, index), shape
                    dtypes[part] = known[view.get_dtype()]
    _check_index(folder, file_of)
    return Weights(shapes, dtypes, partial(_read, parts, {}))


def _parts(name: str, shape: tuple[int, ...], experts_apart: bool) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """Yield the tensors that a stored tensor is listed as: name, index on its first axis or None for all, shape."""
    stacked = _STACKED.fullmatch(name) if experts_apart and len(shape) == 3 else None
    if stacked is None:
        yield name, None, shape
        return
    for expert in range(shape[0]):
        yield f"{stacked[1]}.{expert}.{stacked[2]}.weight", expert, shape[1:]


def check_sizes(source: str, model: ModelRecipe, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError if config.json of `source` has more layers, heads or features than its tensors can hold.

    This runs before a layer is allocated by these numbers: a hostile file could ask for any amount of memory.
    """
    if model.num_layers > len(shapes):
        raise ValueError(
            f"config.json of {source} says num_hidden_layers={model.num_layers}, and its weights have {len(shapes)} "
            "tensors in all: is it the model's own?"
        )
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    sizes = {"hidden_size": model.hidden_size}
    if model.dense_layers:
        sizes["intermediate_size"] = model.ffn_hidden_size
    if model.moe is not None:
        sizes["moe_intermediate_size"] = model.moe.ffn_hidden_size
    for key, size in sizes.items():
        if size > largest:
            raise ValueError(
                f"config.json of {source} says {key}={size}, and no tensor of its weights is as large: is it the "
                "model's own?"
            )
    routed = max((shape[0] for name, shape in shapes.items() if name.endswith(".mlp.gate.weight") and shape), default=0)
    if model.moe is not None and model.moe.num_experts > routed:
        raise ValueError(
            f"config.json of {source} says num_experts={model.moe.num_experts}, and mlp.gate has {routed} rows in its "
            "weights: is it the model's own?"
        )
    fused = any(name.endswith(".query_key_value.weight") for name in shapes)
    for module, key, heads in (
        ("query_key_value" if fused else "q_proj", "num_attention_heads", model.num_attention_heads),
        ("query_key_value" if fused else "k_proj", "num_key_value_heads", model.query_groups),
    ):
        weights = [shape for name, shape in shapes.items() if name.endswith(f".{module}.weight")]
        rows = max((shape[0] for shape in weights if shape and 0 not in shape), default=0)
        if heads * model.head_size > rows:
            raise ValueError(
                f"config.json of {source} says {key}={heads} of {model.head_size} channels, and {module} has "
                f"{rows} rows in its weights: is it the model's own?"
            )


def _check_index(folder: Path, file_of: Mapping[str, Path]) -> None:
    index = file_in(folder, WEIGHTS_INDEX)
    if index is not None:
        named = weight_map(folder)
        wrong = [
            n for n in sorted(named.keys() | file_of.keys()) if n not in file_of or named.get(n) != file_of[n].name
        ]
        if wrong:
            raise ValueError(
                f"{index} and the files disagree about {len(wrong)} tensors, such as {', '.join(wrong[:3])}: "
                "download the folder again"
            )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}): download it again") from error


def _read(parts: Mapping[str, tuple[Path, str, int | None]], files: dict[Path, Any], name: str) -> Tensor:
    """Return a tensor. files: open files; they stay open, since headers with many experts take long to parse."""
    path, whole, index = parts[name]
    if path not in files:
        files[path] = _open(path)
    tensor: Tensor = files[path].get_tensor(whole) if index is None else files[path].get_slice(whole)[index]
    return tensor
