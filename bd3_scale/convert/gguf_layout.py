"""What a GGUF file says of a model: the architectures that llama.cpp computes as ours, their keys and tensors.

An architecture is a graph of llama.cpp, read in its source (`src/models`); whatever a model has that the graph does not
compute closes it. Tensors are those of an export, under llama.cpp's names, with the experts of a layer in one.
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
            says={
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
# Graphs whose heads make up the hidden size together.
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
_MOST_EXPERTS = 1024  # more end the process
_SIGMOID = 2  # of llama.cpp's functions of a router
# Of the tensors outside of layers, those that take up a bias of the head where a graph has none.
_FOLDED = ("output.weight", "output.bias", "output_norm.bias")
_SHARE = 0.25  # how far the last norm's output is moved, of its own size: little, for a quantised head rounds that, too
_LEAST_SCALE = 1e-3
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OF_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)(\..+)")


def choose_architecture(model: ModelRecipe) -> str:
    """Return the graph of llama.cpp that computes a model exactly. ValueError: none does, with the reasons."""
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
        f"llama.cpp has no graph that computes this model ({reasons}): `--format bd3` writes it for transformers"
    )


def _obstacle(name: str, form: ExportFormat, model: ModelRecipe) -> str | None:
    if model.rope_scaling is not None and "rope_scaling" not in form.free:
        return "its rotary frequencies are scaled as Llama 3's, which this graph does not read"
    if name in _SQUARE and model.num_attention_heads * model.head_size != model.hidden_size:
        return f"its heads of {model.head_size} channels do not make up the hidden size {model.hidden_size}"
    if model.moe is not None and model.moe.num_experts > _MOST_EXPERTS:
        return f"it has {model.moe.num_experts} experts in a layer, and llama.cpp ends at {_MOST_EXPERTS}"
    if name == "bailingmoe2" and model.moe is not None and not model.moe.shared_ffn_hidden_size:
        return "it has no shared expert, and this graph adds one"
    return form.obstacle(model)


def architecture_keys(plan: ExportPlan, architecture: str) -> dict[str, Value]:
    """Return the keys that say what the graph computes, and how blocks are decoded."""
    model = plan.manifest.model
    norm = "layer_norm_epsilon" if model.normalization == "layernorm" else "layer_norm_rms_epsilon"
    own: dict[str, Value] = {
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
        own |= _mixture_keys(model.moe) | (_bailing_keys(model.moe) if architecture == "bailingmoe2" else {})
    decoding: dict[str, Value] = {SHIFT_LOGITS: False, BLOCK_LENGTH: plan.manifest.block_size}
    return {f"{architecture}.{key}": value for key, value in own.items()} | decoding


def _mixture_keys(moe: MoeRecipe) -> dict[str, Value]:
    return {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.top_k,
        "expert_feed_forward_length": moe.ffn_hidden_size,
    }


def _bailing_keys(moe: MoeRecipe) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "leading_dense_block_count": moe.first_dense_layers,
        # Times its count, the width of the one shared expert.
        "expert_shared_count": 1,
        "expert_shared_feed_forward_length": moe.shared_ffn_hidden_size,
        "expert_gating_func": _SIGMOID,
        # The score of a lone expert would become 1 there.
        "expert_weights_norm": moe.normalize_top_k and moe.top_k > 1,
        "expert_weights_scale": moe.scale,
    }
    # llama.cpp ends the process where all groups take part.
    if moe.top_groups is not None and moe.top_groups < moe.groups:
        keys |= {"expert_group_count": moe.groups, "expert_group_used_count": moe.top_groups}
    return keys


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: `read` gives its values in fp32. layer: None outside of layers.

    source: which of the export's it is made of; None of one that is computed.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    source: NamedTensor | None
    read: Callable[[TensorReader], Tensor]


def gguf_tensors(plan: ExportPlan, architecture: str) -> Iterator[GgufTensor]:
    """Yield all tensors of a file, in its order. ValueError: a layer of a plug-in has one that no graph reads."""
    model, names = plan.manifest.model, set()
    folds = architecture == "starcoder2" and model.head_bias
    for tensor in _experts_together(plan.tensors):
        name = _named(tensor.name)
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


def _experts_together(tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """Yield tensors, of those of the experts of a layer one, [E, …]: theirs lie one behind the other here, too."""
    for tensor in tensors:
        of_expert = _OF_EXPERT.fullmatch(tensor.name)
        if of_expert is None:
            yield tensor
        elif of_expert[2] == "0":
            ((offset, (layer, _, *sizes)),) = tensor.boxes
            experts = tensor.full_shape[1]
            box = offset, (layer, experts, *sizes)
            yield replace(tensor, name=of_expert[1] + of_expert[3], shape=(experts, *tensor.shape), boxes=(box,))


def _named(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    module, _, part = name.replace("mlp.gate.expert_bias", "mlp.expert_bias.bias").rpartition(".")
    if found := _IN_LAYER.fullmatch(module):
        if found[2] in _NAMES:
            return f"blk.{found[1]}.{_NAMES[found[2]]}.{part}"
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
        # Its rotary embedding turns neighbouring channels, ours those of two halves.
        return values.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(values.shape).contiguous()

    return read


def _without_head_bias(plan: ExportPlan) -> Iterator[GgufTensor]:
    """Yield head and last norm's bias of a graph whose head has none, so that its logits are what they were.

    What LayerNorm gives is h = g∘n + β with Σn = 0. So (1/g)ᵀ(g∘n) is 0, and a head W + u(1/g)ᵀ differs from W by the
    constant u(1/g)ᵀβ alone: β + cg in place of β makes that constant differ from 0, and u is what makes it the bias.
    """
    by_name = {_named(t.name): t for t in plan.tensors}
    head, norm = by_name["output.weight"], by_name["output_norm.weight"]

    def parts(reader: TensorReader) -> tuple[Tensor, Tensor, Tensor]:
        """Return g and β of the norm, and c, in fp64."""
        scale = plan.read(reader, norm).double()
        bias = by_name.get("output_norm.bias")
        shift = torch.zeros_like(scale) if bias is None else plan.read(reader, bias).double()
        if not scale.abs().min() > _LEAST_SCALE * scale.abs().max():
            raise ValueError(
                "llama.cpp has no bias of the head here, and the last norm, into which it would go, has a weight of "
                f"{float(scale.abs().min()):g} beside {float(scale.abs().max()):g}: `--format bd3` writes it as it is"
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
    """Yield what starcoder2's graph adds everywhere: name, size and layer."""
    sizes = {"attn_norm": model.hidden_size, "ffn_norm": model.hidden_size, "attn_output": model.hidden_size,
             "ffn_up": model.ffn_hidden_size, "ffn_down": model.hidden_size}  # fmt: skip
    for layer in range(model.num_layers):
        yield from ((f"blk.{layer}.{name}.bias", size, layer) for name, size in sizes.items())
    yield "output_norm.bias", model.hidden_size, None


def _zeros(name: str, size: int, layer: int | None) -> GgufTensor:
    return GgufTensor(name, (size,), layer, None, lambda reader: torch.zeros(size))
