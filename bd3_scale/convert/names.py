"""Map each tensor of a Hugging Face checkpoint to the boxes of the native tensors that hold its values.

Native tensors stack layers on their first axis. Query, key and value are one matrix, whose rows are grouped by
key/value head (its queries, its key, its value). Gate and up projection are one matrix. The experts of a layer are one
tensor. Names on the Hugging Face side are those of Qwen3 and Qwen3-MoE; every supported architecture except LLaDA2 uses
a subset of them, with biases where a model has them. Which native tensors a layer has, and in which shapes, comes from
the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bd3_scale.checkpoint.boxes import Shape
from bd3_scale.model.build import layer_shapes, layers_with
from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe

# The naming style of a checkpoint's tensors.
Style = Literal["qwen3", "llada2"]
EMBEDDINGS: Mapping[Style, str] = {"qwen3": "model.embed_tokens.weight", "llada2": "model.word_embeddings.weight"}
HEAD = "lm_head.weight"
NATIVE_EMBEDDING = "embedding.word_embeddings.weight"
NATIVE_HEAD = "output_layer.weight"


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of a Hugging Face checkpoint and the native boxes with its values.

    Attributes:
        name, shape: on the Hugging Face side.
        key, full_shape: of the native tensor.
        boxes: (offset, shape) in the native tensor; in this order they are the rows of this tensor.
        layer: None outside of layers.
    """

    name: str
    shape: Shape
    key: str
    full_shape: Shape
    boxes: tuple[tuple[Shape, Shape], ...]
    layer: int | None = None

    @property
    def is_embedding(self) -> bool:
        """Return whether it is the token embedding."""
        return self.name in EMBEDDINGS.values()

    @property
    def is_table(self) -> bool:
        """Return whether it has a row for each id of the vocabulary."""
        return self.is_embedding or self.name == HEAD

    @property
    def expert(self) -> int | None:
        """Return the index of its expert in the layer, None if it belongs to no expert."""
        return self.boxes[0][0][1] if ".mlp.experts." in self.key else None

    @property
    def numel(self) -> int:
        """Return the number of its values."""
        return math.prod(self.shape)

    def split(self, tensor: Tensor) -> Iterator[tuple[Shape, Tensor]]:
        """Yield offset and data of each native box of `tensor`."""
        rows = [math.prod(shape) // math.prod(self.shape[1:]) for _, shape in self.boxes]
        for (offset, shape), part in zip(self.boxes, tensor.split(rows), strict=True):
            yield offset, part.reshape(shape)

    def join(self, boxes: list[Tensor]) -> Tensor:
        """Return the tensor made of its native boxes' values."""
        return torch.cat([box.reshape(-1, *self.shape[1:]) for box in boxes])


def named_tensors(
    model: ModelRecipe, *, vocab_rows: int, padded_rows: int, tied: bool, style: Style = "qwen3"
) -> Iterator[NamedTensor]:
    """Yield all tensors of a model, in Hugging Face's order.

    Args:
        vocab_rows: rows of embedding and head on the Hugging Face side; native ones have `padded_rows`.
        tied: leave out the head; else it is written, from the embedding if the native model ties them.
    """
    hidden = model.hidden_size
    vocabulary = (((0, 0), (vocab_rows, hidden)),)
    yield NamedTensor(EMBEDDINGS[style], (vocab_rows, hidden), NATIVE_EMBEDDING, (padded_rows, hidden), vocabulary)
    shapes = layer_shapes(model)
    layer_tensors = [(tensor, layers_with(model, tensor.key)) for tensor in _layer_tensors(model, shapes, style)]
    for layer in range(model.num_layers):
        yield from (tensor.of_layer(layer, layers) for tensor, layers in layer_tensors if layer in layers)
    for part in _parts("input_layernorm", shapes):
        whole = (((0,), (hidden,)),)
        yield NamedTensor(f"model.norm.{part}", (hidden,), f"decoder.final_layernorm.{part}", (hidden,), whole)
    if not tied:
        key = NATIVE_EMBEDDING if model.tie_embeddings else NATIVE_HEAD
        yield NamedTensor(HEAD, (vocab_rows, hidden), key, (padded_rows, hidden), vocabulary)
    if model.head_bias:
        box = (((0,), (vocab_rows,)),)
        yield NamedTensor("lm_head.bias", (vocab_rows,), "output_layer.bias", (padded_rows,), box)


# Maps the shape of a native tensor, without its layer axis, to the shape of the exported tensor and its boxes.
_Selection = Callable[[Shape], tuple[Shape, list[tuple[Shape, Shape]]]]


def _whole(shape: Shape) -> tuple[Shape, list[tuple[Shape, Shape]]]:
    return shape, [((0,) * len(shape), shape)]


def _rows(*ranges: tuple[int, int]) -> _Selection:
    """Return a selection of rows, given as ranges of (first, count)."""

    def place(shape: Shape) -> tuple[Shape, list[tuple[Shape, Shape]]]:
        tail = shape[1:]
        boxes = [((start, *(0,) * len(tail)), (count, *tail)) for start, count in ranges if count]
        return (sum(count for _, count in ranges), *tail), boxes

    return place


def _at(*index: int) -> _Selection:
    """Return a selection of one index on each of the first axes."""

    def place(shape: Shape) -> tuple[Shape, list[tuple[Shape, Shape]]]:
        inner = shape[len(index) :]
        return inner, [((*index, *(0,) * len(inner)), (*(1,) * len(index), *inner))]

    return place


@dataclass(frozen=True)
class _LayerTensor:
    """A tensor of every layer: its name there, the native tensor's key and shape, and the selection of its values."""

    name: str
    key: str
    native: Shape
    place: _Selection

    def of_layer(self, layer: int, layers: range) -> NamedTensor:
        """Return the tensor of one of the layers that have it."""
        shape, boxes = self.place(self.native)
        return NamedTensor(
            name=f"model.layers.{layer}.{self.name}",
            shape=shape,
            key=f"decoder.layers.{self.key}",
            full_shape=(len(layers), *self.native),
            boxes=tuple(((layers.index(layer), *offset), (1, *size)) for offset, size in boxes),
            layer=layer,
        )


def _layer_tensors(model: ModelRecipe, shapes: Mapping[str, Shape], style: Style) -> Iterator[_LayerTensor]:
    """Yield the tensors of layers whose native tensors have `shapes`.

    Native tensors that `_renamed` does not know, such as a plug-in's, come last, unchanged and under their native name,
    except that attention is called `self_attn`.

    Raises:
        ValueError: two tensors would have the same name.
    """
    others, names = dict.fromkeys(shapes), set()
    for name, key, place in _renamed(model, style):
        for part in _parts(key, shapes):
            tensor = f"{key}.{part}"
            others.pop(tensor, None)
            names.add(f"{name}.{part}")
            yield _LayerTensor(f"{name}.{part}", tensor, shapes[tensor], place)
    for tensor in others:
        name = tensor.replace("self_attention.", "self_attn.")
        if name in names:
            raise ValueError(f"an export already has a tensor {name}: rename the layer's {tensor}")
        yield _LayerTensor(name, tensor, shapes[tensor], _whole)


def _parts(key: str, shapes: Mapping[str, Shape]) -> list[str]:
    return [part for part in ("weight", "bias", "expert_bias") if f"{key}.{part}" in shapes]


def _renamed(model: ModelRecipe, style: Style) -> Iterator[tuple[str, str, _Selection]]:
    """Yield Hugging Face's and the native name of each module, and the selection from the native one."""
    yield "input_layernorm", "input_layernorm", _whole
    yield from _attention_as_llada2(model) if style == "llada2" else _attention(model)
    yield "post_attention_layernorm", "pre_mlp_layernorm", _whole
    ffn = model.ffn_hidden_size
    for index, name in enumerate(("gate_proj", "up_proj") if model.activation == "swiglu" else ("up_proj",)):
        yield f"mlp.{name}", "mlp.linear_fc1", _rows((index * ffn, ffn))
    yield "mlp.down_proj", "mlp.linear_fc2", _whole
    if model.moe is not None:
        yield from _mixture(model.moe)


def _attention(model: ModelRecipe) -> Iterator[tuple[str, str, _Selection]]:
    head, groups = model.head_size, model.query_groups
    queries = model.num_attention_heads // groups * head
    for letter, start, count in (("q", 0, queries), ("k", queries, head), ("v", queries + head, head)):
        ranges = [(group * (queries + 2 * head) + start, count) for group in range(groups)]
        yield f"self_attn.{letter}_proj", "self_attention.linear_qkv", _rows(*ranges)
    yield "self_attn.o_proj", "self_attention.linear_proj", _whole
    yield "self_attn.q_norm", "self_attention.q_layernorm", _whole
    yield "self_attn.k_norm", "self_attention.k_layernorm", _whole


def _attention_as_llada2(model: ModelRecipe) -> Iterator[tuple[str, str, _Selection]]:
    """Yield the modules of LLaDA2's attention, which differ in two orders.

    Rows: its matrix has all queries, then all keys, then all values; the native one groups them by key/value head.
    Channels: only the first `rotary_channels` of a head are rotated, in pairs (i, i + rotary_channels / 2); native
    pairs are (i, i + head / 2) over all channels, of which the first pairs are rotated.
    """
    head, groups = model.head_size, model.query_groups
    half, turned = head // 2, model.rotary_channels // 2
    channels = [(0, turned), (half, turned), (turned, half - turned), (half + turned, half - turned)]
    queries = model.num_attention_heads // groups
    starts = [group * (queries + 2) * head for group in range(groups)]
    heads = [start + query * head for start in starts for query in range(queries)]
    keys = [start + queries * head for start in starts]
    turning = [(start + first, count) for start in (*heads, *keys) for first, count in channels]
    values = [(start + head, head) for start in keys]
    yield "attention.query_key_value", "self_attention.linear_qkv", _rows(*turning, *values)
    yield "attention.dense", "self_attention.linear_proj", _whole
    yield "attention.query_layernorm", "self_attention.q_layernorm", _rows(*channels)
    yield "attention.key_layernorm", "self_attention.k_layernorm", _rows(*channels)


def _mixture(moe: MoeRecipe) -> Iterator[tuple[str, str, _Selection]]:
    yield "mlp.gate", "mlp.router", _whole
    for expert in range(moe.num_experts):
        yield f"mlp.experts.{expert}.gate_proj", "mlp.experts.linear_fc1", _at(expert, 0)
        yield f"mlp.experts.{expert}.up_proj", "mlp.experts.linear_fc1", _at(expert, 1)
        yield f"mlp.experts.{expert}.down_proj", "mlp.experts.linear_fc2", _at(expert)
    shared = moe.shared_ffn_hidden_size
    yield "mlp.shared_experts.gate_proj", "mlp.shared_experts.linear_fc1", _rows((0, shared))
    yield "mlp.shared_experts.up_proj", "mlp.shared_experts.linear_fc1", _rows((shared, shared))
    yield "mlp.shared_experts.down_proj", "mlp.shared_experts.linear_fc2", _whole
