"""Check exported code in a new process, loaded as any user would load it; test_remote_code.py runs this."""

from __future__ import annotations

import json
import sys
from pathlib import Path

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # a CUDA build beside a torch for CPU; transformers takes None for "not installed"
    sys.modules["torchvision"] = None  # type: ignore[assignment]

import pytest
import torch
import transformers
from plain_model import dense_mask, hidden_states
from remote_code_folders import (
    EXPERTS,
    FFN,
    FIRST_UNUSED,
    GELU,
    HEAD,
    HEADS,
    HIDDEN,
    LAYERNORM,
    LAYERS,
    LLADA2,
    LLAMA,
    LLAMA3,
    MASK,
    PAD,
    SDAR,
    SDAR_MOE,
    VOCABULARY,
    write_folder,
)
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from bd3_scale.recipe.schema import ModelRecipe


def load(folder: Path):
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.dtype == torch.float32
    assert model.config.not_declared == 0.5, "what the configuration does not declare is an attribute of it"
    return model.eval()


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain_logits(model, tokens: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the logits of the same model in plain PyTorch, which has other names and one matrix for q, k and v."""
    config, state = model.config, model.state_dict()
    recipe = ModelRecipe(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=config.num_key_value_heads,
        head_dim=HEAD,
        ffn_hidden_size=FFN,
        activation={"silu": "swiglu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}[config.hidden_act],
        normalization=config.normalization,
        norm_bias=config.norm_bias,
        norm_eps=config.rms_norm_eps,
        qk_norm=config.qk_norm,
        mlp_bias=config.mlp_bias,
        attention_bias=config.attention_bias,
        rope_theta=config.rope_theta,
    )
    weights = {"embedding.word_embeddings.weight": state["model.embed_tokens.weight"]}
    for part in ("weight", "bias"):

        def every_layer(name: str, part: str = part) -> torch.Tensor:
            return torch.stack([state[f"model.layers.{i}.{name}.{part}"] for i in range(LAYERS)])

        def put(key: str, names: list[str], groups: int = 1, part: str = part) -> None:
            if f"model.layers.0.{names[0]}.{part}" in state:
                parts = [every_layer(name).unflatten(1, (groups, -1)) for name in names]
                weights[f"decoder.layers.{key}.{part}"] = torch.cat(parts, 2).flatten(1, 2)

        qkv = [f"self_attn.{x}_proj" for x in "qkv"]
        put("self_attention.linear_qkv", qkv, config.num_key_value_heads)
        put("self_attention.linear_proj", ["self_attn.o_proj"])
        put("self_attention.q_layernorm", ["self_attn.q_norm"])
        put("self_attention.k_layernorm", ["self_attn.k_norm"])
        put("input_layernorm", ["input_layernorm"])
        put("pre_mlp_layernorm", ["post_attention_layernorm"])
        put("mlp.linear_fc1", ["mlp.gate_proj", "mlp.up_proj"] if config.gated_mlp else ["mlp.up_proj"])
        put("mlp.linear_fc2", ["mlp.down_proj"])
        if f"model.norm.{part}" in state:
            weights[f"decoder.final_layernorm.{part}"] = state[f"model.norm.{part}"]
    length = tokens.shape[1]
    mask = dense_mask([0] * length, block_size)[length:, length:].expand(len(tokens), -1, -1)
    hidden = hidden_states(weights, recipe, tokens, torch.arange(length).expand(len(tokens), -1), mask)
    return hidden @ state["lm_head.weight"].t() + state.get("lm_head.bias", 0)


@torch.no_grad()
def check_forward(model) -> None:
    """Compare with the plain model, with and without a cache, at other block sizes, as AutoModel and in bf16."""
    tokens = random_tokens(2, 11)
    size = model.config.block_size
    out = model(tokens, use_cache=False, attention_mask=torch.ones_like(tokens), output_hidden_states=True)
    assert out.logits.dtype == torch.float32
    assert len(out.hidden_states) == LAYERS + 1
    assert "past_key_values" not in out
    if model.config.rope_scaling is None and not model.config.num_experts:
        for other in (1, size, 3, 11):
            assert_close(
                model(tokens, block_size=other).logits, plain_logits(model, tokens, other), rtol=1e-5, atol=1e-5
            )
    head, cache = 2 * size, DynamicCache()
    first = model(tokens[:, :head], past_key_values=cache)
    passing = model(tokens[:, head:], past_key_values=cache, store_kv=False)
    assert cache.get_seq_length() == head
    rest = model(tokens[:, head:], past_key_values=cache, position_ids=torch.arange(head, 11)[None])
    assert cache.get_seq_length() == 11
    assert torch.equal(passing.logits, rest.logits)
    assert_close(torch.cat([first.logits, rest.logits], 1), out.logits, rtol=1e-5, atol=1e-5)
    logits, returned = model(tokens, return_dict=False, use_cache=True)
    assert torch.equal(logits, out.logits)
    assert returned.get_seq_length() == 11
    base = AutoModel.from_pretrained(model.name_or_path, trust_remote_code=True).eval()
    assert torch.equal(base(tokens)[0], out.hidden_states[-1])
    half = AutoModelForCausalLM.from_pretrained(model.name_or_path, trust_remote_code=True, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    difference = half(tokens).logits - out.logits
    if model.config.num_experts:
        # Rounding sends some tokens to other experts.
        assert (difference.norm(dim=-1) / out.logits.norm(dim=-1)).median() < 0.1
    else:
        assert difference.norm() / out.logits.norm() < 0.1


def check_bias_of_experts(model) -> None:
    """Check that a bias decides a choice that half precision would change, and that it does not weight the experts."""
    half = AutoModelForCausalLM.from_pretrained(model.name_or_path, trust_remote_code=True, torch_dtype=torch.bfloat16)
    gates = [module.model.layers[1].mlp.gate for module in (model, half)]
    assert gates[0].expert_bias.dtype == gates[1].expert_bias.dtype == torch.float32
    assert torch.equal(gates[0].expert_bias, gates[1].expert_bias)
    assert gates[1].weight.dtype == torch.bfloat16


@torch.no_grad()
def check_next_token_twin(model, twin, more: dict) -> None:
    """Compare block size 1 with transformers' own model, also beyond the length that scaling knows."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    )
    config = {name: getattr(model.config, name) for name in [*names.split(), "rms_norm_eps", "rope_theta"]}
    config_class = getattr(transformers, twin.__name__.replace("ForCausalLM", "Config"))
    other_config = config_class(**config, **more, tie_word_embeddings=False)
    if model.config.num_experts:
        # transformers 5 stores a layer's experts in one tensor, and accepts these names only from files.
        other_config.architectures = [twin.__name__]
        other_config.save_pretrained(f"{model.name_or_path}-twin")
        save_file(model.state_dict(), f"{model.name_or_path}-twin/model.safetensors", metadata={"format": "pt"})
        other = twin.from_pretrained(f"{model.name_or_path}-twin", torch_dtype=torch.float32).eval()
    else:
        other = twin(other_config).eval()
        other.load_state_dict(model.state_dict())
    tokens = random_tokens(2, 70)
    assert_close(model(tokens, block_size=1).logits, other(tokens).logits, rtol=1e-5, atol=1e-5)


def naive_generate(model, prompt: list[int], new: int, size: int, steps: int, threshold: float | None) -> list[int]:
    """Generate one sequence greedily, without a cache or an early end; `threshold` is the dynamic rule's."""
    tokens, total = list(prompt), len(prompt) + new
    while len(tokens) < total:
        tokens += [MASK] * (size - len(tokens) % size)
        for step in range(steps):
            masked = [i for i, token in enumerate(tokens) if token == MASK]
            logits = model(torch.tensor([tokens]), block_size=size, use_cache=False).logits[0]
            logits[:, [MASK, *range(FIRST_UNUSED, VOCABULARY)]] = float("-inf")
            confidence, best = (x.tolist() for x in logits.double().softmax(-1).max(-1))
            at_least = size // steps + (step < size % steps)
            sure = [i for i in masked if threshold is not None and confidence[i] > threshold]
            ranked = sorted(masked, key=lambda i: (-confidence[i], i))
            for i in sure if len(sure) >= at_least else ranked[:at_least]:
                tokens[i] = best[i]
    return tokens[:total]


@torch.no_grad()
def check_generation(model) -> None:
    """Compare with naive generation; the model prefers the mask and ids that only pad the vocabulary."""
    assert model.config.num_token_ids == FIRST_UNUSED
    never = {"eos_token_id": []}
    for length in (0, 3, 6, 8):
        prompt = random_tokens(1, length, seed=length)
        for size, steps in ((4, 4), (4, 3), (4, 1), (3, 2), (1, 1), (5, 5)):
            for threshold in (None, 0.3):
                rule = {"unmasking": "static"} if threshold is None else {"threshold": threshold}
                got = model.generate(prompt, max_new_tokens=7, block_size=size, steps=steps, **rule, **never)
                wanted = naive_generate(model, prompt[0].tolist(), 7, size, steps, threshold)
                assert got.tolist() == [wanted], (length, size, steps, threshold)
    passes = []
    hook = model.model.register_forward_hook(lambda *_: passes.append(1))
    prompt, counts = random_tokens(2, 6), {}
    for rule in ({"unmasking": "static"}, {"threshold": 0.3}):
        together = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, **rule, **never)
        counts[str(rule)] = len(passes)
        alone = [model.generate(row[None], max_new_tokens=9, **rule, **never) for row in prompt]
        assert torch.equal(together, torch.cat(alone))
        assert not torch.isin(together, torch.tensor([MASK, *range(FIRST_UNUSED, VOCABULARY)])).any()
        passes.clear()
    hook.remove()
    # One pass over the prompt's whole block, 2 + 4 + 4 denoising passes, 2 that store a finished block.
    static, dynamic = counts.values()
    assert dynamic < static == 13
    check_stopping(model, prompt)
    check_sampling(model, prompt)
    check_arguments_of_transformers(model, prompt)


def check_stopping(model, prompt: torch.Tensor) -> None:
    free = model.generate(prompt, max_new_tokens=9, eos_token_id=[])
    first, second = free[:, 6:].tolist()
    only_first = next(i for i, token in enumerate(first) if token not in second and i < 8)
    stop = first[only_first]
    end = first.index(stop)
    stopped = model.generate(prompt, max_new_tokens=9, eos_token_id=stop, pad_token_id=17)
    assert stopped[0, 6:].tolist() == first[: end + 1] + [17] * (8 - end)
    assert torch.equal(stopped[1], free[1])
    alone = model.generate(prompt[:1], max_new_tokens=9, eos_token_id=[20, stop])
    assert alone[0].tolist() == free[0, : 6 + end + 1].tolist()
    model.generation_config.eos_token_id = stop
    padded = model.generate(prompt, max_new_tokens=9)
    assert padded[0, 6:].tolist() == first[: end + 1] + [PAD] * (8 - end)
    model.generation_config.eos_token_id = None
    # The token is in the prompt's part of the first block, and not among the two that this block adds.
    row, given = next((r, t) for r in (0, 1) for t in prompt[r, 4:].tolist() if t not in free[r, 6:8])
    end = [*free[row, 6:].tolist(), given].index(given)
    past_prompt = model.generate(prompt[row : row + 1], max_new_tokens=9, eos_token_id=given)
    assert past_prompt.tolist() == free[row : row + 1, : 6 + end + 1].tolist()


def check_sampling(model, prompt: torch.Tensor) -> None:
    def sample(seed: int, **options) -> list[list[int]]:
        random = torch.Generator().manual_seed(seed)
        return model.generate(prompt, max_new_tokens=9, generator=random, eos_token_id=[], **options).tolist()

    hot = {"do_sample": True, "temperature": 1.5}
    assert sample(0, **hot) == sample(0, **hot) != sample(1, **hot)
    assert sample(0, do_sample=True, top_k=1) == sample(1)  # greedy
    module = sys.modules[type(model).__module__.replace("modeling", "generation")]
    rule = module.Unmasking(4, 4, "dynamic", 0.9, temperature=2.0, top_k=4, top_p=0.7)
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, float("-inf"), 2.0])
    shares = (logits.double() / 2).softmax(0)
    drawn, confidence = rule.draw(logits.expand(1, 40_000, 6), torch.Generator().manual_seed(0))
    assert torch.equal(confidence, shares[drawn])
    # Of ids 1, 3, 5 and 2 the first two hold 0.65 of the four's share, the first three 0.84.
    kept = torch.where(torch.tensor([False, True, False, True, False, True]), shares, 0)
    frequency = torch.bincount(drawn[0], minlength=6).double() / drawn.numel()
    assert_close(frequency, kept / kept.sum(), rtol=0, atol=0.01)
    equal = torch.full((1, 4), 0.5)
    assert rule.choose(equal, torch.tensor([[False, True, True, True]]), 0).tolist() == [[False, True, False, False]]


def check_arguments_of_transformers(model, prompt: torch.Tensor) -> None:
    """Check transformers' arguments; test_exported_generate.py checks each more closely, on one version."""
    streamer, streamed = transformers.generation.BaseStreamer(), []
    streamer.put, streamer.end = (lambda value: streamed.append(value.tolist())), (lambda: streamed.append("end"))
    given = transformers.GenerationConfig(max_new_tokens=9, eos_token_id=[], pad_token_id=PAD)
    first, second = prompt[:1], prompt[1:, 2:]
    alone = [
        model.generate(first, given)[0, 6:].tolist(),
        model.generate(second, given, streamer=streamer)[0, 4:].tolist(),
    ]
    assert streamed == [second.tolist(), alone[1][:4], alone[1][4:8], alone[1][8:], "end"]
    out = model.generate(
        inputs=torch.cat([first, torch.nn.functional.pad(second, (2, 0), value=PAD)]),
        attention_mask=torch.tensor([[1] * 6, [0] * 2 + [1] * 4]),
        generation_config=given,
        stopping_criteria=[lambda ids, scores, **more: ids.shape[1] == 6 + 7],
        return_dict_in_generate=True,
    )
    assert out.sequences[:, 6:].tolist() == [new[:7] for new in alone]
    model.generation_config.repetition_penalty = 1.1  # the value of the model's source
    assert model.generate(first, given)[0, 6:].tolist() == alone[0]
    model.generation_config.repetition_penalty = None


def check_refusals(model) -> None:
    tokens = random_tokens(2, 6)
    padded = torch.ones_like(tokens)
    padded[0, 0] = 0
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    for words, options in {
        "attention_mask": {"attention_mask": padded},
        "attention_mask must": {"attention_mask": torch.ones(2, 1, 6, 6)},
        "position_ids": {"position_ids": torch.arange(1, 7)[None]},
        "labels": {"labels": tokens},
        "whole blocks": {"past_key_values": cache},
        "DynamicCache": {"past_key_values": ((tokens, tokens),)},
    }.items():
        with pytest.raises(ValueError, match=words):
            model(tokens, **options)
    for words, options in {
        "padding_side": {"attention_mask": padded.flip(1)},
        "max_new_tokens": {"max_new_tokens": 0},
        "steps=5": {"steps": 5},
        "block_size=0": {"block_size": 0},
        "unmasking='all'": {"unmasking": "all"},
        "threshold": {"threshold": 1.5},
        "temperature": {"temperature": -1.0, "do_sample": True},
        "top_k": {"top_k": -1},
        "top_p": {"top_p": 0.0},
        "mask token": {"input_ids": tokens.masked_fill(tokens == tokens[0, 0], MASK)},
        "does not support num_beams": {"num_beams": 2},
        "does not support assistant_model": {"assistant_model": model},
        "does not support min_p, repetition_penalty": {"repetition_penalty": 1.1, "min_p": 0.1},
        "does not support max_new_token:": {"max_new_token": 2},
    }.items():
        with pytest.raises(ValueError, match=words):
            model.generate(**{"input_ids": tokens, "max_new_tokens": 2, **options})
    for key, value in {
        "hidden_act": "relu",
        "normalization": "batchnorm",
        "norm_bias": True,
        "num_key_value_heads": 3,
        "head_dim": 7,
        "block_size": 0,
        "mask_token_id": VOCABULARY,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "num_experts_per_tok": 5,
        "score_function": "relu",
        "n_group": 3,
        "topk_group": 2,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
    }.items():
        with pytest.raises(ValueError, match=key):
            type(model.config)(**{**model.config.to_dict(), "num_experts": EXPERTS, key: value})


@torch.no_grad()
def check_saved(model, folder: Path) -> None:
    """Check that transformers saves a folder like ours, with its code."""
    again = load(folder)
    tokens = random_tokens(2, 70)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    written, original = (json.loads((Path(f) / "config.json").read_text()) for f in (folder, model.name_or_path))
    # transformers renames torch_dtype to dtype, and does not write the attention's implementation.
    for key in original.keys() - {"torch_dtype", "attn_implementation"}:
        assert written.get(key) == original[key] or key == "auto_map", key
    assert again.config.rope_parameters == model.config.rope_parameters


def main(folder: Path, version: str, saved_elsewhere: Path | None) -> None:
    assert transformers.__version__.startswith(f"{version}."), transformers.__version__
    torch.set_num_threads(1)
    sdar = load(write_folder(folder / "sdar", "sdar", SDAR))
    llama = load(write_folder(folder / "llama", "bd3", LLAMA))
    layernorm = load(write_folder(folder / "layernorm", "bd3", LAYERNORM, block_size=3))
    gelu = load(write_folder(folder / "gelu", "bd3", GELU))
    sdar_moe = load(write_folder(folder / "sdar_moe", "sdar_moe", SDAR_MOE))
    llada2 = load(write_folder(folder / "llada2", "llada2", LLADA2))
    for model in (sdar, llama, layernorm, gelu, sdar_moe, llada2):
        check_forward(model)
    check_bias_of_experts(llada2)
    check_next_token_twin(sdar, transformers.Qwen3ForCausalLM, {})
    experts = {key: getattr(sdar_moe.config, key) for key in SDAR_MOE.keys() - SDAR.keys()}
    check_next_token_twin(sdar_moe, transformers.Qwen3MoeForCausalLM, experts)
    check_next_token_twin(llama, transformers.LlamaForCausalLM, {"rope_scaling": LLAMA3})
    with torch.no_grad():
        gelu.lm_head.weight[MASK] = gelu.lm_head.weight[FIRST_UNUSED] = 3 * gelu.lm_head.weight[7]
    check_generation(gelu)
    check_refusals(gelu)
    for model, name in (
        (sdar, "sdar-saved"),
        (llama, "llama-saved"),
        (sdar_moe, "sdar_moe-saved"),
        (llada2, "llada2-saved"),
    ):
        model.save_pretrained(folder / name)
        for place in filter(None, (folder, saved_elsewhere)):
            check_saved(model, place / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else None)
