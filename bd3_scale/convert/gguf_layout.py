"""Describe a model in GGUF: the architectures of llama.cpp that compute it exactly, their keys and tensors.

An architecture is a computation graph of llama.cpp, read in its source (`src/models`); a feature that the graph does
not compute excludes it. Tensors are those of an export under llama.cpp's names, with the experts of a layer in one
tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.convert.architectures import EXPORT_FORMATS, ExportFormat
from bd3_scale.convert.export import ExportPlan
from bd3_scale.convert.names import NamedTensor
from bd3_scale.generate.llama_file import BLOCK_LENGTH, SHIFT_LOGITS
from bd3_scale.model.block import plain_frequencies, stretch
from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe

Value = bool | int | float | str

ARCHITECTURES: Mapping[str, ExportFormat] = {
    f.architecture: f
    for f in (
        ExportFormat("bd3", "qwen3", free=frozenset()),
        ExportFormat("bd3", "qwen2", free=frozenset({"head_bias"}), fixed={"qk_norm": False, "attention_bias": True}),
        ExportFormat("bd3", "llama", free=frozenset({"rope_scaling", "mlp_bias"}), fixed={"qk_norm": False}),
        ExportFormat(
            "bd3",
            "starcoder2",
            free=frozenset({"norm_bias", "mlp_bias", "attention_bias", "head_bias"}),
            fixed={"qk_norm": False, "normalization": "layernorm", "activation": "gelu_tanh"},
            reasons={
                "normalization": "its norm is no LayerNorm",
                "activation": "its activation is not gelu_tanh, and llama.cpp has no other there",
            },
        ),
        ExportFormat("bd3", "qwen3moe", free=frozenset(), mixtures=EXPORT_FORMATS["sdar_moe"].mixtures, dense=False),
        ExportFormat(
            "llada2",
            "bailingmoe2",
            free=frozenset({"rotary_fraction"}),
            mixtures=EXPORT_FORMATS["llada2"].mixtures,
            dense=False,
        ),
    )
}
# Graphs that assume num_heads × head_size = hidden_size.
_SQUARE = ("qwen2", "starcoder2", "bailingmoe2")
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.expert_bias": "exp_probs_b",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "attention.query_layernorm": "attn_q_norm",
    "attention.key_layernorm": "attn_k_norm",
}
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.word_embeddings": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_MOST_EXPERTS = 1024  # llama.cpp aborts the process with more (LLAMA_MAX_EXPERTS)
_SIGMOID = 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
# Tensors that absorb a bias of the head for a graph that has none; see `_without_head_bias`.
_FOLDED = ("output.weight", "output.bias", "output_norm.bias")
# Mean of β/g after `_without_head_bias`: how far the last norm's output is shifted, relative to its size. It is small,
# since a quantised head rounds in proportion to its input.
_SHARE = 0.25
_LEAST_SCALE = 1e-3  # of the norm's weights to their largest: 1/g must not blow up rounding errors
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OF_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)(\..+)")


def choose_architecture(model: ModelRecipe) -> str:
    """Return the architecture of llama.cpp that computes a model exactly. ValueError: none does, and why."""
    obstacles = {
        name: _obstacle(name, f, model)
        for name, f in ARCHITECTURES.items()
        if (f.mixtures is None) == (model.moe is None)
    }
    for name, obstacle in obstacles.items():
        if obstacle is None:
            return name
    reasons = "; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items())
    raise ValueError(
        f"llama.cpp has no architecture that computes this model ({reasons}): `--format bd3` writes it for transformers"
    )


def _obstacle(name: str, form: ExportFormat, model: ModelRecipe) -> str | None:
    if model.rope_scaling is not None and "rope_scaling" not in form.free:
        return "its rotary frequencies are scaled as Llama 3's, which this graph does not read"
    if name in _SQUARE and model.num_attention_heads * model.head_size != model.hidden_size:
        return f"its heads of {model.head_size} channels do not make up the hidden size {model.hidden_size}"
    if model.moe is not None and model.moe.num_experts > _MOST_EXPERTS:
        return f"it has {model.moe.num_experts} experts in a layer, and llama.cpp allows {_MOST_EXPERTS}"
    if name == "bailingmoe2" and model.moe is not None and not model.moe.shared_ffn_hidden_size:
        return "it has no shared expert, and this graph needs one"
    return form.obstacle(model)


def architecture_keys(plan: ExportPlan, architecture: str) -> dict[str, Value]:
    """Return the keys that configure the graph and the decoding of blocks."""
    model = plan.manifest.model
    norm = "layer_norm_epsilon" if model.normalization == "layernorm" else "layer_norm_rms_epsilon"
    keys: dict[str, Value] = {
        "block_count": model.num_layers,
        "context_length": plan.manifest.max_position_embeddings,
        "embedding_length": model.hidden_size,
        "feed_forward_length": model.ffn_hidden_size,
        "attention.head_count": model.num_attention_heads,
        "attention.head_count_kv": model.query_groups,
        "attention.key_length": model.head_size,
        "attention.value_length": model.head_size,
        f"attention.{norm}": model.norm_eps,
        "attention.causal": False,
        "rope.freq_base": model.rope_theta,
        "rope.dimension_count": model.rotary_channels,
        "vocab_size": int(plan.config["vocab_size"]),
    }
    if model.moe is not None:
        keys |= _mixture_keys(model.moe) | (_bailing_keys(model.moe) if architecture == "bailingmoe2" else {})
    decoding: dict[str, Value] = {SHIFT_LOGITS: False, BLOCK_LENGTH: plan.manifest.block_size}
    return {f"{architecture}.{key}": value for key, value in keys.items()} | decoding


def _mixture_keys(moe: MoeRecipe) -> dict[str, Value]:
    return {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.top_k,
        "expert_feed_forward_length": moe.ffn_hidden_size,
    }


def _bailing_keys(moe: MoeRecipe) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "leading_dense_block_count": moe.first_dense_layers,
        # llama.cpp multiplies the shared expert's width by this count.
        "expert_shared_count": 1,
        "expert_shared_feed_forward_length": moe.shared_ffn_hidden_size,
        "expert_gating_func": _SIGMOID,
        # llama.cpp would normalise a single expert's score to 1; training leaves it.
        "expert_weights_norm": moe.normalize_top_k and moe.top_k > 1,
        "expert_weights_scale": moe.scale,
    }
    # llama.cpp aborts the process if all groups take part.
    if moe.top_groups is not None and moe.top_groups < moe.groups:
        keys |= {"expert_group_count": moe.groups, "expert_group_used_count": moe.top_groups}
    return keys


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: `read` returns its values in fp32. layer: None outside of layers.

    source: the tensor of the export that it is made from; None if it is computed.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    source: NamedTensor | None
    read: Callable[[TensorReader], Tensor]


def gguf_tensors(plan: ExportPlan, architecture: str) -> Iterator[GgufTensor]:
    """Yield all tensors of a file, in its order. ValueError: a plug-in's layer has a tensor that no graph reads."""
    model, names = plan.manifest.model, set()
    folds = architecture == "starcoder2" and model.head_bias
    for tensor in _stack_experts(plan.tensors):
        name = _gguf_name(tensor.name)
        if folds and name in _FOLDED:
            continue
        names.add(name)
        yield GgufTensor(name, tensor.shape, tensor.layer, tensor, _reader(plan, tensor, architecture))
    if folds:
        yield from _without_head_bias(plan)
        names.update(_FOLDED)
    if model.rope_scaling is not None:
        plain = plain_frequencies(model)
        factors = plain / stretch(plain, model.rope_scaling)
        yield GgufTensor("rope_freqs.weight", tuple(factors.shape), None, None, lambda reader: factors)
    if architecture == "starcoder2":
        yield from (_zeros(name, size, layer) for name, size, layer in _biases(model) if name not in names)


def _stack_experts(tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """Yield tensors with the experts of a layer stacked, [E, …]; in the native tensor they lie one behind another."""
    for tensor in tensors:
        match = _OF_EXPERT.fullmatch(tensor.name)
        if match is None:
            yield tensor
        elif match[2] == "0":
            ((offset, (layer, _, *sizes)),) = tensor.boxes
            experts = tensor.full_shape[1]
            box = offset, (layer, experts, *sizes)
            yield replace(tensor, name=match[1] + match[3], shape=(experts, *tensor.shape), boxes=(box,))


def _gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    module, _, part = name.replace("mlp.gate.expert_bias", "mlp.expert_bias.bias").rpartition(".")
    if match := _IN_LAYER.fullmatch(module):
        if match[2] in _NAMES:
            return f"blk.{match[1]}.{_NAMES[match[2]]}.{part}"
    elif module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{part}"
    raise ValueError(f"no graph of llama.cpp reads a tensor such as {name}, which a plug-in's layer has")


def _reader(plan: ExportPlan, tensor: NamedTensor, architecture: str) -> Callable[[TensorReader], Tensor]:
    heads = {"q_proj": plan.manifest.model.num_attention_heads, "k_proj": plan.manifest.model.query_groups}
    count = heads.get(tensor.name.split(".")[-2]) if architecture == "llama" else None

    def read(reader: TensorReader) -> Tensor:
        values = plan.read(reader, tensor).float()
        if count is None:
            return values
        # The llama graph rotates pairs of neighbouring channels (2i, 2i + 1), this package pairs (i, i + D/2): the rows
        # of each head are interleaved.
        return values.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(values.shape).contiguous()

    return read


def _without_head_bias(plan: ExportPlan) -> Iterator[GgufTensor]:
    """Yield a head and a last norm's bias with the same logits as a head with a bias, for a graph whose head has none.

    LayerNorm returns h = g∘n + β, where the normalised n has Σn = 0, so (1/g)ᵀ(g∘n) = 0. A head W + u(1/g)ᵀ therefore
    changes the logits by the constant u·(1/g)ᵀβ alone. β is first replaced by β + cg, which makes (1/g)ᵀβ differ from
    0; then u is chosen so that the constant is the bias, less what the change of β adds to Wh.
    """
    by_name = {_gguf_name(t.name): t for t in plan.tensors}
    head, norm = by_name["output.weight"], by_name["output_norm.weight"]

    def parts(reader: TensorReader) -> tuple[Tensor, Tensor, Tensor]:
        """Return g and β of the norm, and c, in fp64."""
        scale = plan.read(reader, norm).double()
        bias = by_name.get("output_norm.bias")
        shift = torch.zeros_like(scale) if bias is None else plan.read(reader, bias).double()
        if not scale.abs().min() > _LEAST_SCALE * scale.abs().max():
            raise ValueError(
                "llama.cpp has no bias of the head here, and it cannot be moved into the last norm, which has weights "
                f"of {float(scale.abs().min()):g} and {float(scale.abs().max()):g}: use `--format bd3`"
            )
        return scale, shift, _SHARE - (shift / scale).mean()

    def weight(reader: TensorReader) -> Tensor:
        scale, _, extra = parts(reader)
        values, bias = (plan.read(reader, by_name[name]).double() for name in ("output.weight", "output.bias"))
        missing = (bias - values @ (extra * scale)) / (_SHARE * len(scale))
        return (values + missing[:, None] / scale).float()

    def shifted(reader: TensorReader) -> Tensor:
        scale, shift, extra = parts(reader)
        return (shift + extra * scale).float()

    yield GgufTensor("output.weight", head.shape, None, head, weight)
    yield GgufTensor("output_norm.bias", norm.shape, None, None, shifted)


def _biases(model: ModelRecipe) -> Iterator[tuple[str, int, int | None]]:
    """Yield name, size and layer of the biases that starcoder2's graph always adds."""
    sizes = {"attn_norm": model.hidden_size, "ffn_norm": model.hidden_size, "attn_output": model.hidden_size,
             "ffn_up": model.ffn_hidden_size, "ffn_down": model.hidden_size}  # fmt: skip
    for layer in range(model.num_layers):
        yield from ((f"blk.{layer}.{name}.bias", size, layer) for name, size in sizes.items())
    yield "output_norm.bias", model.hidden_size, None


def _zeros(name: str, size: int, layer: int | None) -> GgufTensor:
    return GgufTensor(name, (size,), layer, None, lambda reader: torch.zeros(size))
