"""Write random models as exports, for remote_code_checks.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from bd3_scale.convert.remote_code_files import remote_code

HIDDEN, HEADS, GROUPS, HEAD, FFN, LAYERS, VOCABULARY = 24, 4, 2, 8, 20, 2, 23
MASK, PAD, FIRST_UNUSED = 19, 0, 21
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SDAR = {"hidden_act": "silu", "attn_implementation": "flex_attention", "sliding_window": None, "rope_scaling": None}
LAYERNORM = {
    "hidden_act": "gelu_pytorch_tanh",
    "gated_mlp": False,
    "normalization": "layernorm",
    "norm_bias": True,
    "qk_norm": False,
    "mlp_bias": True,
    "attention_bias": True,
    "head_bias": True,
}
GELU = {"hidden_act": "gelu", "gated_mlp": False, "num_key_value_heads": HEADS, "num_token_ids": FIRST_UNUSED}
LLAMA = {"qk_norm": False, "rope_scaling": LLAMA3}
EXPERTS, WIDTH = 4, 12
SDAR_MOE = SDAR | {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LLADA2 = SDAR_MOE | {
    "score_function": "sigmoid",
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "num_shared_experts": 2,
    "moe_router_enable_expert_bias": True,
    "partial_rotary_factor": 0.5,
}


def write_folder(folder: Path, kind: str, changes: dict, block_size: int = 4) -> Path:
    """Write a random model as an export; every weight, norms and biases too, is far from its initial value."""
    prefix = {"sdar": "SDAR", "bd3": "Bd3", "sdar_moe": "SDARMoe", "llada2": "LLaDA2Moe"}[kind]
    module, architecture = kind, f"{prefix}ForCausalLM"
    if kind == "llada2":
        module, architecture = "llada2_moe", "LLaDA2MoeModelLM"
    config = {
        "architectures": [architecture],
        "auto_map": {
            "AutoConfig": f"configuration_{module}.{prefix}Config",
            "AutoModel": f"modeling_{module}.{prefix}Model",
            "AutoModelForCausalLM": f"modeling_{module}.{architecture}",
        },
        "model_type": module,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD,
        "rms_norm_eps": 1e-3,
        "rope_theta": 777.0,
        "block_size": block_size,
        "mask_token_id": MASK,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "not_declared": 0.5,
        **changes,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(config)
    save_file(
        named_as_llada2(weights, config) if kind == "llada2" else weights,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name, source in remote_code(kind).items():
        (folder / name).write_text(source)
    return folder


def random_weights(config: dict) -> dict[str, torch.Tensor]:
    heads = {"q": HEADS, "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{x}_proj": (count * HEAD, HIDDEN) for x, count in heads.items()}
        shapes[f"{layer}self_attn.o_proj"] = (HIDDEN, HEADS * HEAD)
        if config.get("qk_norm", True):
            shapes |= {f"{layer}self_attn.{x}_norm": (HEAD,) for x in "qk"}
        mlps = {"mlp": FFN}
        if "num_experts" in config and i >= config.get("first_k_dense_replace", 0):
            mlps = {f"mlp.experts.{expert}": WIDTH for expert in range(EXPERTS)}
            mlps |= {"mlp.shared_experts": 2 * WIDTH} if "num_shared_experts" in config else {}
            shapes[f"{layer}mlp.gate"] = (EXPERTS, HIDDEN)
        first = ("gate_proj", "up_proj") if config.get("gated_mlp", True) else ("up_proj",)
        for mlp, width in mlps.items():
            shapes |= {f"{layer}{mlp}.{name}": (width, HIDDEN) for name in first}
            shapes[f"{layer}{mlp}.down_proj"] = (HIDDEN, width)
    random = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        spread = 1.0 if len(shape) == 1 or name == "model.embed_tokens" else 2.5 / shape[-1] ** 0.5
        weights[f"{name}.weight"] = torch.randn(shape, generator=random) * spread
        if config.get(bias_key(name), False):
            weights[f"{name}.bias"] = torch.randn(shape[0], generator=random)
    return weights


def named_as_llada2(weights: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """Write the same with one matrix for queries, keys and values, LLaDA2's names, and a bias for each expert."""
    found = {}
    for name, tensor in weights.items():
        for theirs, ours in (
            ("embed_tokens", "word_embeddings"),
            ("self_attn.o_proj", "attention.dense"),
            ("self_attn.q_norm", "attention.query_layernorm"),
            ("self_attn.k_norm", "attention.key_layernorm"),
        ):
            name = name.replace(theirs, ours)
        if ".self_attn." not in name:
            found[name] = tensor
    for i in range(LAYERS):
        parts = [weights[f"model.layers.{i}.self_attn.{letter}_proj.weight"] for letter in "qkv"]
        found[f"model.layers.{i}.attention.query_key_value.weight"] = torch.cat(parts)
        if i >= config["first_k_dense_replace"]:
            found[f"model.layers.{i}.mlp.gate.expert_bias"] = torch.linspace(-0.3, 0.3, EXPERTS)
    return found


def bias_key(name: str) -> str:
    last = name.rpartition(".")[2]
    if last.endswith("norm"):
        return "no bias" if last in ("q_norm", "k_norm") else "norm_bias"
    if ".self_attn." in name:
        return "no bias" if last == "o_proj" else "attention_bias"
    return {"lm_head": "head_bias", "embed_tokens": "no bias"}.get(last, "mlp_bias")
