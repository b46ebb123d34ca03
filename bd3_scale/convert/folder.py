"""A Hugging Face folder: its config.json and its safetensors files, sharded or not, read a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

# safetensors' names of the types that weights have.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PACKED_DTYPES: Mapping[str, torch.dtype] = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}


@dataclass(frozen=True)
class Weights:
    """Tensors of a model by their names in a Hugging Face checkpoint, read one at a time.

    Attributes:
        shapes, dtypes: of every tensor.
        read: gives one by its name; nothing else is in memory.
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


def open_weights(folder: Path, *, quantised: bool = False) -> Weights:
    """Open the tensors of a folder with `model.safetensors`, or shards and their index; of packed ones if `quantised`.

    Raises:
        FileNotFoundError: there are no safetensors files, or one that the index names is missing.
        ValueError: a file is truncated or corrupt, the index names a tensor that its file does not hold, or a tensor
            is of a type that is no weight's.
    """
    file_of: dict[str, Path] = {}
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
                file_of[name], shapes[name], dtypes[name] = path, tuple(view.get_shape()), known[view.get_dtype()]
    _check_index(folder, file_of)
    return Weights(shapes, dtypes, partial(_read, file_of))


def check_sizes(source: str, model: ModelRecipe, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where config.json of `source` says more layers, heads or features than its tensors have room
    for, before a layer is made of its numbers.
    """
    if model.num_layers > len(shapes):
        raise ValueError(
            f"config.json of {source} says num_hidden_layers={model.num_layers}, and its weights have {len(shapes)} "
            "tensors in all: is it the model's own?"
        )
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for key, size in (("hidden_size", model.hidden_size), ("intermediate_size", model.ffn_hidden_size)):
        if size > largest:
            raise ValueError(
                f"config.json of {source} says {key}={size}, and no tensor of its weights is as large: is it the "
                "model's own?"
            )
    for letter, key, heads in (
        ("q", "num_attention_heads", model.num_attention_heads),
        ("k", "num_key_value_heads", model.query_groups),
    ):
        weights = [shape for name, shape in shapes.items() if name.endswith(f".{letter}_proj.weight")]
        rows = max((shape[0] for shape in weights if shape and 0 not in shape), default=0)
        if heads * model.head_size > rows:
            raise ValueError(
                f"config.json of {source} says {key}={heads} of {model.head_size} channels, and {letter}_proj has "
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


def _read(file_of: Mapping[str, Path], name: str) -> Tensor:
    with _open(file_of[name]) as file:
        return file.get_tensor(name)
