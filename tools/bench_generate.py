"""Measure the sampler's tokens per second on this machine, one CPU thread, against a plain PyTorch twin in the same
run.

    python tools/bench_generate.py
    python tools/bench_generate.py --checkpoint runs/mine --tokens 512
    python tools/bench_generate.py --preset 1b --tokens 255 --json         a 1B model in bf16, without a twin: for a GPU

Without a checkpoint the model is random (hidden 256, 4 layers, 4 heads, 1,024 tokens, blocks of 16): first hitting
takes one pass per token, whatever the text is. The twin has the same weights and takes as many passes, see `Twin`.
Without its cache every pass computes the whole text; that is timed once, on a quarter of the tokens, where it is
fastest. On a CPU seconds are CPU seconds of the process. Parallel unmasking is measured with a trained model only:
tokens per pass, and the NELBO of the generated text.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.checkpoint.folder import resolve_checkpoint
from bd3_scale.checkpoint.model import open_model
from bd3_scale.evaluate.bounds import ContinuationBounds
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.draft import Sample
from bd3_scale.generate.sampler import generate_batch
from bd3_scale.model.build import build_model
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.objective import Objective
from bd3_scale.observe.libraries import quieten_libraries
from bd3_scale.parallel.groups import ProcessGroups, local_device, process_groups
from bd3_scale.recipe.schema import ModelRecipe, ParallelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tools.bench_step import PRESETS

BLOCK = 16
RULES: dict[str, dict[str, Any]] = {
    "first-hitting": {},
    "static, 8 passes a block": {"unmasking": "static", "steps": 8},
    "static, 4 passes a block": {"unmasking": "static", "steps": 4},
    "static, 2 passes a block": {"unmasking": "static", "steps": 2},
    "dynamic, above 0.9": {"unmasking": "dynamic"},
    "dynamic, above 0.5": {"unmasking": "dynamic", "threshold": 0.5},
    "entropy, 0.1 nats": {"unmasking": "entropy"},
    "entropy, 1 nat": {"unmasking": "entropy", "threshold": 1.0},
}


def random_model(stack: ExitStack, preset: str) -> BlockDiffusionTransformer:
    if preset == "1b":
        shape = ModelRecipe.model_validate(PRESETS["1b"]["model"])
        vocabulary, dtype = PRESETS["1b"]["vocabulary"], torch.bfloat16
    else:
        shape = ModelRecipe(
            num_layers=4,
            hidden_size=256,
            num_attention_heads=4,
            ffn_hidden_size=1024,
            activation="gelu_tanh",
            normalization="layernorm",
            qk_norm=False,
        )
        vocabulary, dtype = 258, torch.float32
    groups = stack.enter_context(process_groups(ParallelRecipe()))
    ids = Vocabulary(size=vocabulary, eos_id=vocabulary - 2, mask_id=vocabulary - 1)
    (model,) = build_model(shape, ids, groups, dtype=dtype, device=local_device(), seed=1)
    return model


class Twin:
    """The sampler in plain PyTorch for one text, with the weights of `model`.

    A pass does what the official code does (github.com/kuleshov-group/bd3lms): embeddings of a block's rows, layers
    with rotated queries and keys against cached keys, logits of every row without the mask's, their softmax in float64,
    a token for every row, and one random masked position that takes its token; one more pass caches a finished block.
    Its
    cache is better than the official one: it holds rotated keys, where the official code copies the cached projections
    and rotates them again in every pass.

    cached: if false, every pass computes all blocks up to the last, with a block-causal mask.
    """

    def __init__(self, model: BlockDiffusionTransformer, *, cached: bool = True, longest: int = 1024) -> None:
        self.heads, self.head_size = model.recipe.num_attention_heads, model.recipe.head_size
        self.shape, self.eps = (model.recipe.hidden_size,), model.recipe.norm_eps
        self.mask_id, self.cached = model.vocabulary.mask_id, cached
        weights = {name: value.detach() for name, value in model.named_parameters()}
        self.embedding, self.head = weights["embedding.word_embeddings.weight"], weights["output_layer.weight"]
        self.norm, self.forbidden = weights["decoder.final_layernorm.weight"], model.output_layer.forbidden_V
        names = {
            "norm1": "input_layernorm",
            "qkv": "self_attention.linear_qkv",
            "out": "self_attention.linear_proj",
            "norm2": "pre_mlp_layernorm",
            "up": "mlp.linear_fc1",
            "down": "mlp.linear_fc2",
        }
        self.layers = [
            {name: weights[f"decoder.layers.{layer}.{theirs}.weight"] for name, theirs in names.items()}
            for layer in range(model.recipe.num_layers)
        ]
        device = self.head.device
        angle = torch.arange(longest)[:, None] * 1e4 ** -(torch.arange(0, self.head_size, 2) / self.head_size)
        angle = torch.cat([angle, angle], -1).to(device)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.keys = torch.zeros(len(self.layers), 2, self.heads, longest, self.head_size, device=device)
        block = torch.arange(longest, device=device) // BLOCK
        self.mask = block[:, None] >= block

    def forward(self, tokens: Tensor, length: int) -> Tensor:
        """Return the logits of int64 tokens [N] behind `length` cached positions (0 without a cache)."""
        rows = len(tokens)
        x = F.embedding(tokens, self.embedding)
        cos, sin = self.cos[length : length + rows], self.sin[length : length + rows]
        for layer, cache in zip(self.layers, self.keys, strict=True):
            normed = F.layer_norm(x, self.shape, layer["norm1"], None, self.eps)
            qkv = F.linear(normed, layer["qkv"]).view(rows, self.heads, 3, self.head_size)
            query, key, value = qkv.permute(2, 1, 0, 3)
            query, key = (x * cos + rotate_half(x) * sin for x in (query, key))
            mask = None
            if self.cached:
                cache[0, :, length : length + rows] = key
                cache[1, :, length : length + rows] = value
                key, value = cache[:, :, : length + rows]
            else:
                mask = self.mask[:rows, :rows]
            mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask)[0]
            x = x + F.linear(mixed.transpose(0, 1).flatten(1), layer["out"])
            wide = F.linear(F.layer_norm(x, self.shape, layer["norm2"], None, self.eps), layer["up"])
            x = x + F.linear(F.gelu(wide, approximate="tanh"), layer["down"])
        logits = F.linear(F.layer_norm(x, self.shape, self.norm, None, self.eps), self.head)
        return logits.masked_fill(self.forbidden, float("-inf"))

    @torch.no_grad()
    def write(self, count: int) -> Tensor:
        """Generate `count` tokens, whole blocks; the first token is given and is 0."""
        tokens = torch.full((count,), self.mask_id, device=self.head.device)
        tokens[0] = 0
        for start in range(0, count, BLOCK):
            block = tokens[start : start + BLOCK]
            while (masked := block == self.mask_id).any():
                logits = self.forward(block, start) if self.cached else self.forward(tokens[: start + BLOCK], 0)[start:]
                shares = logits.double().softmax(-1)
                # The official code draws with exponential noise, a form of the Gumbel-max trick.
                drawn = (shares / -torch.rand_like(shares).log()).argmax(-1)
                places = masked.nonzero()[:, 0]
                place = places[torch.randint(len(places), ())]
                block[place] = drawn[place]
            if self.cached:
                self.forward(block, start)
        return tokens

    def seconds(self, count: int) -> float:
        """Return the seconds to generate `count` tokens."""
        began = now()
        self.write(count)
        return now() - began


def rotate_half(x: Tensor) -> Tensor:
    """Map the halves (low, high) of heads to (−high, low)."""
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)


def now() -> float:
    """Return seconds: wall time on a GPU, after its work is done, and CPU time of the process on a CPU."""
    if local_device().type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def time_generation(
    model: BlockDiffusionTransformer, block_size: int, batch: int, tokens: int, **rule_options: Any
) -> tuple[float, list[Sample]]:
    prompts = [[0]] * batch
    sampling = SamplingConfig(max_new_tokens=tokens, min_entropy=0.0, **rule_options)
    began = now()
    samples = generate_batch(model, prompts, sampling, block_size=block_size)
    return now() - began, samples


def speeds(model: BlockDiffusionTransformer, twin: bool, tokens: int, repeats: int) -> dict[str, float]:
    """Return tokens per second of first hitting at batch 1 and 8, and of the twins: medians of runs in turns."""
    # No text may end early.
    assert model.output_layer.weight is not None
    model.output_layer.forbidden_V[model.vocabulary.eos_id] = True
    twins = {"plain twin": Twin(model), "plain twin without a cache": Twin(model, cached=False)} if twin else {}
    speeds_by_name: dict[str, list[float]] = {name: [] for name in ("batch 1", "batch 8", *twins)}
    time_generation(model, BLOCK, 1, min(tokens, 64))
    for turn in range(repeats):
        for batch in (1, 8):
            seconds, samples = time_generation(model, BLOCK, batch, tokens)
            assert all(sample.nfe == tokens for sample in samples)
            speeds_by_name[f"batch {batch}"].append(batch * tokens / seconds)
        for name, plain in twins.items():
            count = tokens + 1 if plain.cached else max(BLOCK, (tokens + 1) // 4 // BLOCK * BLOCK)
            if plain.cached or turn == 0:
                speeds_by_name[name].append((count - 1) / plain.seconds(count))
    return {name: statistics.median(values) for name, values in speeds_by_name.items()}


def qualities(
    model: BlockDiffusionTransformer, groups: ProcessGroups, objective: Objective, tokens: int, batch: int
) -> list[dict[str, Any]]:
    """Return tokens per second and per pass for every rule, and the model's NELBO of the texts in nats per token."""
    longest = -(-(tokens + 1) // objective.block_size) * objective.block_size
    bounds, rows = ContinuationBounds(model, groups, objective, max_length=longest, draws=4), []
    for name, rule_options in RULES.items():
        seconds, samples = time_generation(model, objective.block_size, batch, tokens, **rule_options)
        written = sum(len(sample.tokens) for sample in samples)
        passes = sum(sample.nfe for sample in samples)
        nats = -sum(bounds.of([([0], sample.tokens) for sample in samples], range(batch))) / written
        rows.append(
            {"rule": name, "tokens_per_second": written / seconds, "tokens_per_pass": written / passes, "nats": nats}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="compares the rules of unmasking, too")
    parser.add_argument("--preset", choices=("small", "1b"), default="small", help="the size of the random model")
    parser.add_argument("--tokens", type=int, default=1023)
    parser.add_argument("--batch", type=int, default=8, help="texts a rule, with --checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.checkpoint is None and (options.tokens + 1) % BLOCK:
        whole = max(BLOCK, options.tokens // BLOCK * BLOCK)
        parser.error(
            f"--tokens is {options.tokens}: give whole blocks of {BLOCK} less the prompt's token, such as {whole - 1}"
        )
    quieten_libraries()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    with ExitStack() as stack:
        if options.checkpoint is None:
            model = random_model(stack, options.preset)
            has_twin = options.preset == "small"
            result["tokens_per_second"] = speeds(model, has_twin, options.tokens, options.repeats)
        else:
            model, manifest, groups = stack.enter_context(open_model(resolve_checkpoint(options.checkpoint)))
            objective = manifest.trained_objective()
            result["rules"] = qualities(model, groups, objective, options.tokens, options.batch)
    if options.json:
        print(json.dumps(result))
        return
    if options.checkpoint is None:
        speeds_by_name = result["tokens_per_second"]
        print("| | tokens/s | × batch 1 |\n|---|---|---|")
        for name, value in speeds_by_name.items():
            print(f"| {name} | {value:.1f} | {value / speeds_by_name['batch 1']:.2f} |")
    else:
        print("| unmasking | tokens/s | tokens/pass | nats/token | perplexity |\n|---|---|---|---|---|")
        for row in result["rules"]:
            print(
                f"| {row['rule']} | {row['tokens_per_second']:.1f} | {row['tokens_per_pass']:.2f} | {row['nats']:.3f} "
                f"| {math.exp(row['nats']):.1f} |"
            )


if __name__ == "__main__":
    main()
