"""Which boxes of which native tensor make up each tensor of a Hugging Face checkpoint.

Native tensors stack the layers on their first axis; query, key and value are one matrix, whose rows are grouped by
key/value head (its queries, its key, its value); gate and up projection are one matrix. Names on the other side are
Qwen3's, of which every supported architecture uses a subset, with biases where a model has them; which tensors a layer
has, and of what shape, it says itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_scale.checkpoint.boxes import Shape
from bd3_scale.model.build import layer_shapes
from bd3_scale.recipe.schema import ModelRecipe

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NATIVE_EMBEDDING = "embedding.word_embeddings.weight"
NATIVE_HEAD = "output_layer.weight"


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of a Hugging Face checkpoint and where its values lie.

    Attributes:
        name, shape: on the Hugging Face side.
        key, full_shape: the native tensor.
        boxes: (offset, shape) in the native tensor; one after the other they are the rows of this tensor.
    """

    name: str
    shape: Shape
    key: str
    full_shape: Shape
    boxes: tuple[tuple[Shape, Shape], ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def split(self, tensor: Tensor) -> Iterator[tuple[Shape, Tensor]]:
        """Return `tensor` as the native boxes: offset and data of each."""
        rows = [math.prod(shape) // math.prod(self.shape[1:]) for _, shape in self.boxes]
        for (offset, shape), part in zip(self.boxes, tensor.split(rows), strict=True):
            yield offset, part.reshape(shape)

    def join(self, boxes: list[Tensor]) -> Tensor:
        """Return the tensor of the values of its native boxes."""
        return torch.cat([box.reshape(-1, *self.shape[1:]) for box in boxes])


def named_tensors(model: ModelRecipe, *, vocab_rows: int, padded_rows: int, tied: bool) -> Iterator[NamedTensor]:
    """Yield all tensors of a model, as Hugging Face orders them.

    Args:
        vocab_rows: rows of embedding and head there; here they have `padded_rows`.
        tied: the head is not written; else it is, from the embedding where the native model ties them.
    """
    hidden, shapes = model.hidden_size, layer_shapes(model)
    vocabulary = (((0, 0), (vocab_rows, hidden)),)
    yield NamedTensor(EMBEDDING, (vocab_rows, hidden), NATIVE_EMBEDDING, (padded_rows, hidden), vocabulary)
    for layer in range(model.num_layers):
        for name, key, ranges in _layer_tensors(model, shapes):
            yield _of_layer(layer, model.num_layers, name, key, shapes[key], ranges)
    for part in _parts("input_layernorm", shapes):
        whole = (((0,), (hidden,)),)
        yield NamedTensor(f"model.norm.{part}", (hidden,), f"decoder.final_layernorm.{part}", (hidden,), whole)
    if not tied:
        key = NATIVE_EMBEDDING if model.tie_embeddings else NATIVE_HEAD
        yield NamedTensor(HEAD, (vocab_rows, hidden), key, (padded_rows, hidden), vocabulary)
    if model.head_bias:
        box = (((0,), (vocab_rows,)),)
        yield NamedTensor("lm_head.bias", (vocab_rows,), "output_layer.bias", (padded_rows,), box)


# First rows in the native tensor, and how many.
_Ranges = list[tuple[int, int]]


def _layer_tensors(model: ModelRecipe, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, str, _Ranges]]:
    """Yield name and key of each tensor within a layer, and its rows of the native one.

    What `_renamed` does not know comes last, whole and under its own name, but that attention is `self_attn` there.

    Raises:
        ValueError: two tensors have one name there.
    """
    others, names = dict.fromkeys(shapes), set()
    for name, key, ranges in _renamed(model):
        for part in _parts(key, shapes):
            tensor = f"{key}.{part}"
            others.pop(tensor, None)
            names.add(f"{name}.{part}")
            yield f"{name}.{part}", tensor, ranges or [(0, shapes[tensor][0])]
    for tensor in others:
        name = tensor.replace("self_attention.", "self_attn.")
        if name in names:
            raise ValueError(f"an export has another tensor of the name {name}: call the layer's {tensor} otherwise")
        yield name, tensor, [(0, shapes[tensor][0])]


def _parts(key: str, shapes: Mapping[str, Shape]) -> list[str]:
    return [part for part in ("weight", "bias") if f"{key}.{part}" in shapes]


def _renamed(model: ModelRecipe) -> Iterator[tuple[str, str, _Ranges | None]]:
    """Yield the names of modules there and here, and the rows of the module here; None: all."""
    yield "input_layernorm", "input_layernorm", None
    head, ffn, groups = model.head_size, model.ffn_hidden_size, model.query_groups
    queries = model.num_attention_heads // groups * head
    for letter, start, count in (("q", 0, queries), ("k", queries, head), ("v", queries + head, head)):
        ranges = [(group * (queries + 2 * head) + start, count) for group in range(groups)]
        yield f"self_attn.{letter}_proj", "self_attention.linear_qkv", ranges
    yield "self_attn.o_proj", "self_attention.linear_proj", None
    yield "self_attn.q_norm", "self_attention.q_layernorm", None
    yield "self_attn.k_norm", "self_attention.k_layernorm", None
    yield "post_attention_layernorm", "pre_mlp_layernorm", None
    for index, name in enumerate(("gate_proj", "up_proj") if model.activation == "swiglu" else ("up_proj",)):
        yield f"mlp.{name}", "mlp.linear_fc1", [(index * ffn, ffn)]
    yield "mlp.down_proj", "mlp.linear_fc2", None


def _of_layer(layer: int, num_layers: int, name: str, key: str, shape: Shape, ranges: _Ranges) -> NamedTensor:
    tail = shape[1:]
    zeros = (0,) * len(tail)
    return NamedTensor(
        name=f"model.layers.{layer}.{name}",
        shape=(sum(count for _, count in ranges), *tail),
        key=f"decoder.layers.{key}",
        full_shape=(num_layers, *shape),
        boxes=tuple(((layer, start, *zeros), (1, count, *tail)) for start, count in ranges),
    )
