"""Which boxes of which native tensor make up each tensor of a Hugging Face checkpoint.

Native tensors stack the layers on their first axis; query, key and value are one matrix, whose rows are grouped by
key/value head (its queries, its key, its value); gate and up projection are one matrix. Names on the other side are
Qwen3's, of which every supported architecture uses a subset, with biases where a model has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_scale.checkpoint.boxes import Shape
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
        """`tensor` as the native boxes: offset and data of each."""
        rows = [math.prod(shape) // math.prod(self.shape[1:]) for _, shape in self.boxes]
        for (offset, shape), part in zip(self.boxes, tensor.split(rows), strict=True):
            yield offset, part.reshape(shape)

    def join(self, boxes: list[Tensor]) -> Tensor:
        """The tensor of the values of its native boxes."""
        return torch.cat([box.reshape(-1, *self.shape[1:]) for box in boxes])


def named_tensors(model: ModelRecipe, *, vocab_rows: int, padded_rows: int, tied: bool) -> Iterator[NamedTensor]:
    """All tensors of a model, as Hugging Face orders them.

    Args:
        vocab_rows: rows of embedding and head there; here they have `padded_rows`.
        tied: the head is not written; else it is, from the embedding where the native model ties them.
    """
    hidden = model.hidden_size
    vocabulary = (((0, 0), (vocab_rows, hidden)),)
    yield NamedTensor(EMBEDDING, (vocab_rows, hidden), NATIVE_EMBEDDING, (padded_rows, hidden), vocabulary)
    for layer in range(model.num_layers):
        for name, key, rows, full_rows, columns in _layer_tensors(model):
            yield _of_layer(layer, model.num_layers, name, key, rows, full_rows, columns)
    for part in _norm_parts(model):
        yield _whole(f"model.norm.{part}", f"decoder.final_layernorm.{part}", hidden)
    if not tied:
        key = NATIVE_EMBEDDING if model.tie_embeddings else NATIVE_HEAD
        yield NamedTensor(HEAD, (vocab_rows, hidden), key, (padded_rows, hidden), vocabulary)
    if model.head_bias:
        box = (((0,), (vocab_rows,)),)
        yield NamedTensor("lm_head.bias", (vocab_rows,), "output_layer.bias", (padded_rows,), box)


# Name and key within a layer, ranges of rows in the native tensor, all its rows, and columns or None for a vector.
_Entry = tuple[str, str, list[tuple[int, int]], int, int | None]


def _layer_tensors(model: ModelRecipe) -> Iterator[_Entry]:
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size, model.head_size
    heads, groups = model.num_attention_heads, model.query_groups
    for part in _norm_parts(model):
        yield f"input_layernorm.{part}", f"input_layernorm.{part}", [(0, hidden)], hidden, None
    group = (heads // groups + 2) * head
    starts = {"q": (0, heads // groups * head), "k": (group - 2 * head, head), "v": (group - head, head)}
    for letter, (start, count) in starts.items():
        ranges = [(g * group + start, count) for g in range(groups)]
        yield _matrix(f"self_attn.{letter}_proj", "self_attention.linear_qkv", ranges, groups * group, hidden)
        if model.attention_bias:
            name, key = f"self_attn.{letter}_proj.bias", "self_attention.linear_qkv.bias"
            yield name, key, ranges, groups * group, None
    yield _matrix("self_attn.o_proj", "self_attention.linear_proj", [(0, hidden)], hidden, heads * head)
    if model.qk_norm:
        for letter in "qk":
            name, key = f"self_attn.{letter}_norm.weight", f"self_attention.{letter}_layernorm.weight"
            yield name, key, [(0, head)], head, None
    for part in _norm_parts(model):
        yield f"post_attention_layernorm.{part}", f"pre_mlp_layernorm.{part}", [(0, hidden)], hidden, None
    gated = model.activation == "swiglu"
    first = ("gate_proj", "up_proj") if gated else ("up_proj",)
    for index, name in enumerate(first):
        ranges = [(index * ffn, ffn)]
        yield _matrix(f"mlp.{name}", "mlp.linear_fc1", ranges, len(first) * ffn, hidden)
        if model.mlp_bias:
            yield f"mlp.{name}.bias", "mlp.linear_fc1.bias", ranges, len(first) * ffn, None
    yield _matrix("mlp.down_proj", "mlp.linear_fc2", [(0, hidden)], hidden, ffn)
    if model.mlp_bias:
        yield "mlp.down_proj.bias", "mlp.linear_fc2.bias", [(0, hidden)], hidden, None


def _matrix(name: str, key: str, ranges: list[tuple[int, int]], full_rows: int, columns: int) -> _Entry:
    return f"{name}.weight", f"{key}.weight", ranges, full_rows, columns


def _norm_parts(model: ModelRecipe) -> tuple[str, ...]:
    return ("weight", "bias") if model.norm_bias else ("weight",)


def _of_layer(
    layer: int,
    num_layers: int,
    name: str,
    key: str,
    ranges: list[tuple[int, int]],
    full_rows: int,
    columns: int | None,
) -> NamedTensor:
    tail = () if columns is None else (columns,)
    zeros = (0,) * len(tail)
    boxes = tuple(((layer, start, *zeros), (1, count, *tail)) for start, count in ranges)
    return NamedTensor(
        name=f"model.layers.{layer}.{name}",
        shape=(sum(count for _, count in ranges), *tail),
        key=f"decoder.layers.{key}",
        full_shape=(num_layers, full_rows, *tail),
        boxes=boxes,
    )


def _whole(name: str, key: str, size: int) -> NamedTensor:
    return NamedTensor(name, (size,), key, (size,), (((0,), (size,)),))
