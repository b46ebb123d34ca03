"""Write a checkpoint as a GGUF file, which `generate` and `evaluate` run through llama.cpp, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from bd3_scale.checkpoint.manifest import MANIFEST as MANIFEST_FILE
from bd3_scale.checkpoint.manifest import TOKENIZER, read_manifest
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.convert.calibration import weights_label
from bd3_scale.convert.export import ExportPlan, plan_export
from bd3_scale.convert.gguf_layout import (
    ARCHITECTURES,
    GgufTensor,
    architecture_keys,
    choose_architecture,
    gguf_tensors,
)
from bd3_scale.convert.gguf_tokenizer import TokenizerKeys, check_ids, tokenizer_keys
from bd3_scale.convert.gguf_types import FILE_TYPES, TYPES, FileType, encoded, is_quantized, tensor_type
from bd3_scale.convert.quantizer import SquareSum
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.data.tokenizer_folder import write_tokenizer
from bd3_scale.generate import llama_cpp
from bd3_scale.generate.llama_file import MANIFEST, MIN_ENTROPY, STOP_IDS, SUFFIX, seal
from bd3_scale.generate.text import checkpoint_tokenizer, default_min_entropy, stop_ids
from bd3_scale.resilience.leftovers import temporary_folder
from bd3_scale.resilience.readers import read_regular

# llama.cpp's tensor name -> the native linear layer that has the same input.
_LINEAR_OF = {
    "attn_q": "self_attention.linear_qkv",
    "attn_k": "self_attention.linear_qkv",
    "attn_v": "self_attention.linear_qkv",
    "attn_output": "self_attention.linear_proj",
    "ffn_gate": "mlp.linear_fc1",
    "ffn_up": "mlp.linear_fc1",
    "ffn_down": "mlp.linear_fc2",
    "ffn_gate_exps": "mlp.experts.linear_fc1",
    "ffn_up_exps": "mlp.experts.linear_fc1",
    "ffn_down_exps": "mlp.experts.linear_fc2",
    "ffn_gate_shexp": "mlp.shared_experts.linear_fc1",
    "ffn_up_shexp": "mlp.shared_experts.linear_fc1",
    "ffn_down_shexp": "mlp.shared_experts.linear_fc2",
    "attn_qkv": "self_attention.linear_qkv",
}
# (layer, name of a linear) -> sums of squared inputs: one, or one for each expert.
Importance = Mapping[tuple[int, str], Sequence[SquareSum]]


@dataclass(frozen=True)
class GgufPlan:
    """The content of a file, except its weights. types: the ggml type of each tensor, by name."""

    export: ExportPlan
    kind: FileType
    architecture: str
    tensors: tuple[GgufTensor, ...]
    types: Mapping[str, str]
    tokenizer: Tokenizer
    tokenizer_keys: TokenizerKeys

    @property
    def name(self) -> str:
        """Return the name of the file."""
        return f"{self.export.manifest.name}-{self.kind}{SUFFIX}"

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(TYPES[self.types[t.name]].size(t.shape) for t in self.tensors)

    @property
    def whole_bytes(self) -> int:
        """Return the bytes of all tensors in fp32."""
        return sum(TYPES["F32"].size(t.shape) for t in self.tensors)


def plan_gguf(checkpoint: Path, kind: FileType, *, importance: bool) -> GgufPlan:
    """Check a checkpoint and decide what a file of it holds.

    importance: whether an importance matrix will be used.

    ValueError: a damaged checkpoint, no tokeniser, a model or a tokeniser that llama.cpp does not implement, or its
        library is not installed.
    """
    llama_cpp.library()
    model = read_manifest(checkpoint).model
    architecture = choose_architecture(model)
    export = plan_export(checkpoint, ARCHITECTURES[architecture].name, "float32")
    tokenizer = checkpoint_tokenizer(checkpoint, export.manifest)
    with temporary_folder("tokeniser") as folder:
        write_tokenizer(tokenizer, checkpoint / TOKENIZER, folder)
        keys = tokenizer_keys(tokenizer, folder, int(export.config["vocab_size"]))
    tensors = tuple(gguf_tensors(export, architecture))
    types = {t.name: tensor_type(t.name, t.shape, t.layer, kind, model, importance=importance) for t in tensors}
    return GgufPlan(export, kind, architecture, tensors, types, tokenizer, keys)


def write_gguf(
    plan: GgufPlan, path: Path, importance: Importance | None = None, progress: Callable[[int], object] = lambda done: 0
) -> None:
    """Write a file, then read it again and compare every tensor. progress: called with the bytes of each, twice.

    ValueError: a weight that the type cannot hold, or a tensor that reads back differently.
    """
    import gguf

    writer = gguf.GGUFWriter(path, plan.architecture)
    _add_keys(writer, plan)
    for tensor in plan.tensors:
        form = TYPES[plan.types[tensor.name]]
        raw = gguf.GGMLQuantizationType(form.number)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), form.size(tensor.shape), raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    hashes = {}
    with TensorReader(plan.export.checkpoint) as reader:
        for tensor in plan.tensors:
            data = _encoded(tensor.read(reader), plan.types[tensor.name], _importance_of(tensor, importance))
            hashes[tensor.name] = xxhash.xxh3_128_hexdigest(data.tobytes())
            writer.write_tensor_data(data)
            progress(data.nbytes)
    writer.close()
    back = gguf.GGUFReader(path)
    for written in back.tensors:
        if hashes.pop(written.name) != xxhash.xxh3_128_hexdigest(written.data.tobytes()):
            raise ValueError(f"{written.name} reads back differently than it was written: check the disk")
        progress(written.data.nbytes)
    assert not hashes
    seal(path, back.data_offset)


def _importance_of(tensor: GgufTensor, importance: Importance | None) -> list[Tensor | None]:
    """Return the importance of columns, fp32 [columns], for each expert of a tensor; None without a matrix."""
    linear = None if tensor.layer is None or len(tensor.shape) < 2 else linear_of(tensor.name)
    if importance is None or tensor.layer is None or linear is None:
        return [None] * (tensor.shape[0] if len(tensor.shape) == 3 else 1)
    return [total.squares if total.is_enough else None for total in importance[tensor.layer, linear]]


def _encoded(values: Tensor, kind: str, importance: Sequence[Tensor | None]) -> NDArray[np.generic]:
    """Return the bytes of a tensor; each expert of a stack is quantised by its own importance."""
    if values.ndim < 3:
        return encoded(values, kind, *importance)
    return np.stack([encoded(*expert) for expert in zip(values, repeat(kind), importance)])


def linear_of(name: str) -> str | None:
    """Return the native linear with the same input as a tensor of llama.cpp; None if the tensor is not quantised."""
    return _LINEAR_OF.get(name.split(".")[2])


def undersampled_weights(importance: Importance) -> dict[str, int]:
    """Return the weights that saw too few rows for an importance matrix, and how many; see `weights_label`."""
    return {
        weights_label(layer, expert if ".experts." in name else None): total.rows
        for (layer, name), totals in importance.items()
        for expert, total in enumerate(totals)
        if not total.is_enough
    }


def _add_keys(writer: Any, plan: GgufPlan) -> None:
    manifest, keys = plan.export.manifest, plan.tokenizer_keys
    writer.add_name(manifest.name)
    writer.add_file_type(FILE_TYPES[plan.kind][0])
    if is_quantized(plan.kind):
        writer.add_quantization_version(2)
    for key, value in architecture_keys(plan.export, plan.architecture).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    for key, text in keys.strings.items():
        writer.add_string(key, text)
    for key, number in keys.numbers.items():
        writer.add_uint32(key, number)
    for key, flag in keys.flags.items():
        writer.add_bool(key, flag)
    writer.add_token_list(keys.tokens)
    writer.add_token_types(keys.types)
    if keys.merges is not None:
        writer.add_token_merges(keys.merges)
    if keys.scores is not None:
        writer.add_token_scores(keys.scores)
    checkpoint = plan.export.checkpoint
    writer.add_string(MANIFEST, read_regular(checkpoint / MANIFEST_FILE).decode())
    writer.add_string(STOP_IDS, json.dumps(stop_ids(checkpoint, manifest)))
    writer.add_string(MIN_ENTROPY, repr(default_min_entropy(manifest)))


def check_tokenizer_ids(plan: GgufPlan, path: Path) -> int:
    """Compare llama.cpp's ids of many texts with the training's; return the number of texts.

    ValueError: they differ.
    """
    with closing(llama_cpp.Model(path, vocabulary_only=True)) as opened:
        return check_ids(opened, plan.tokenizer, plan.tokenizer_keys)
