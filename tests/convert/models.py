"""Make small Hugging Face models of every architecture, with random weights, and save them as folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.checkpoint.store import boxes_to_save, save_boxes
from bd3_scale.convert.remote_code_files import remote_code
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.model.build import build_model
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.observe.libraries import without_broken_torchvision
from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import (
    CheckpointRecipe,
    DataRecipe,
    DiffusionRecipe,
    ModelRecipe,
    MoeRecipe,
    OptimizerRecipe,
    Recipe,
    RopeScaling,
    TrainRecipe,
)
from bd3_scale.recipe.vocabulary import Vocabulary

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "initializer_range": 0.2,
}
# The options of Qwen3-MoE.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def transformers_model(name: str, **config):
    """Return a transformers model by its prefix (`Qwen3`, `Llama` …), all of whose tensors are random."""
    with without_broken_torchvision():
        import transformers

        head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        classes = [getattr(transformers, f"{name}{part}") for part in (head, "Config")]

    torch.manual_seed(0)
    model = classes[0](classes[1](**SHAPE | config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def save_folder(folder: Path, model, *, tokenizer: str | None = "bytes", shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    if tokenizer:
        load_tokenizer(tokenizer).save(folder)
    return folder


def sdar_folder(folder: Path, **config) -> Path:
    """Write a random SDAR checkpoint in the published format: Qwen3's tensors and SDAR's config."""
    model = transformers_model("Qwen3", vocab_size=258, num_key_value_heads=2)
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")
    keys = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 258,
        "block_size": 4,
        "mask_token_id": 257,
        "pad_token_id": 0,
        "debug": False,
    }
    shape = SHAPE | {"num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(shape | keys | config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 3], "top_k": 20}))
    for name, source in remote_code("sdar").items():
        (folder / name).write_text(source)
    load_tokenizer("bytes").save(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def native_checkpoint(
    folder: Path,
    model: ModelRecipe,
    vocabulary: Vocabulary,
    *,
    block_size: int = 4,
    objective: str = "block_diffusion",
    tokenizer: str | Path = "bytes",
) -> Path:
    """Save what a training in one process saves before its first step, with random norms, biases and moving average."""
    recipe = Recipe(
        name="native",
        model=model,
        diffusion=DiffusionRecipe(block_size=block_size, objective=objective),
        data=DataRecipe(path="unused", seq_len=128),
        optimizer=OptimizerRecipe(ema_decay=0.9),
        train=TrainRecipe(steps=1, global_batch_size=1, micro_batch_size=1, precision="fp32"),
    )
    load_tokenizer(tokenizer).save(folder.parent / "tokenizer")
    generator = torch.Generator().manual_seed(3)
    with process_groups(recipe.parallel) as groups:
        how = {"dtype": torch.float32, "device": torch.device("cpu")}
        chunks = build_model(recipe.model, vocabulary, groups, seed=3, **how)
        for name, buffer in chunks[0].named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
        layouts = parameter_layouts(chunks)
        engine = TrainingEngine(chunks, groups, recipe.optimizer, recipe.parallel)
        for fragment in engine.zero.fragments():
            average = fragment.states["ema"]
            average.add_(torch.randn(average.shape, generator=generator), alpha=0.1)
        manifest = CheckpointManifest.of_run(recipe, step=0, vocabulary=vocabulary, states=engine.zero.names)
        return save_boxes(
            folder,
            manifest,
            boxes_to_save(engine.zero, layouts),
            tokenizer=folder.parent / "tokenizer",
            keep=CheckpointRecipe(keep_last=1),
        )


QWEN_SHAPE = ModelRecipe(
    num_layers=2, hidden_size=48, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=64, init_std=0.2
)
TIED = QWEN_SHAPE.model_copy(update={"tie_embeddings": True})
OFFICIAL_SHAPE = ModelRecipe(
    num_layers=2,
    hidden_size=48,
    num_attention_heads=4,
    ffn_hidden_size=96,
    activation="gelu_tanh",
    normalization="layernorm",
    norm_bias=True,
    norm_eps=1e-5,
    qk_norm=False,
    mlp_bias=True,
    attention_bias=True,
    head_bias=True,
    init_std=0.2,
)
LLAMA_SHAPE = QWEN_SHAPE.model_copy(update={"qk_norm": False, "rope_scaling": RopeScaling(**{
    key: value for key, value in LLAMA3_ROPE.items() if key != "rope_type"})})  # fmt: skip
SDAR_MOE_SHAPE = QWEN_SHAPE.model_copy(update={"moe": MoeRecipe(num_experts=4, top_k=2, ffn_hidden_size=24)})
LLADA2_SHAPE = QWEN_SHAPE.model_copy(update={
    "num_layers": 3, "head_dim": 16, "rotary_fraction": 0.5,
    "moe": MoeRecipe(
        num_experts=6, top_k=2, ffn_hidden_size=24, shared_ffn_hidden_size=48, first_dense_layers=1, score="sigmoid",
        groups=3, top_groups=2, scale=2.5, bias=True,
    )})  # fmt: skip
# Options that neither SDAR-MoE nor LLaDA2 has.
MIXTURE_SHAPE = LLADA2_SHAPE.model_copy(update={
    "qk_norm": False, "attention_bias": True, "moe": MoeRecipe(
        num_experts=6, top_k=3, ffn_hidden_size=24, shared_ffn_hidden_size=20, first_dense_layers=1,
        normalize_top_k=False, groups=2, top_groups=1, scale=1.5,
    )})  # fmt: skip
BYTES = Vocabulary(size=258, eos_id=256, mask_id=257)
