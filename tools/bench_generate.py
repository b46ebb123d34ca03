"""Tokens a second of the sampler on this machine, one CPU thread, beside a plain PyTorch twin in the same run.

    python tools/bench_generate.py
    python tools/bench_generate.py --checkpoint runs/mine --tokens 512
    python tools/bench_generate.py --preset 1b --tokens 255 --json         a 1B model in bf16, without a twin: for a GPU

Without a checkpoint the model is random (hidden 256, 4 layers, 4 heads, 1,024 tokens, blocks of 16): what it writes
does not matter to first hitting, which takes one pass a token. The twin has a key/value cache as ours has, and takes as
many passes; it has no rotation and no bookkeeping of sampling, but logits of every row. On CPU seconds are the
process's. Parallel unmasking is worth measuring with a trained model alone: tokens a pass beside the NELBO of what was
written.
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
from bd3_scale.generate.sampler import Sample, generate_batch
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
    """The same work in plain PyTorch: a block of rows against cached keys, layer after layer."""

    def __init__(
        self, hidden: int = 256, layers: int = 4, heads: int = 4, vocabulary: int = 384, device: str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        sizes = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden), "up": (4 * hidden, hidden)}
        sizes["down"] = (hidden, 4 * hidden)
        self.layers = [
            {name: (torch.randn(shape, generator=generator) * 0.02).to(device) for name, shape in sizes.items()}
            for _ in range(layers)
        ]
        self.head = (torch.randn(vocabulary, hidden, generator=generator) * 0.02).to(device)
        self.heads, self.hidden = heads, hidden
        self.keys = torch.zeros(layers, 2, heads, 1024, hidden // heads, device=device)

    def forward(self, x: Tensor, length: int) -> Tensor:
        """Logits of a block [L', hidden] after `length` cached positions."""
        rows = len(x)
        for layer, cache in zip(self.layers, self.keys, strict=True):
            normed = F.layer_norm(x, (self.hidden,))
            query, key, value = (normed @ layer["qkv"].t()).view(rows, 3, self.heads, -1).permute(1, 2, 0, 3)
            cache[0, :, length : length + rows] = key
            cache[1, :, length : length + rows] = value
            seen = cache[:, :, : length + rows]
            mixed = F.scaled_dot_product_attention(query[None], seen[0][None], seen[1][None])[0]
            x = x + mixed.transpose(0, 1).flatten(1) @ layer["out"].t()
            wide = F.gelu(F.layer_norm(x, (self.hidden,)) @ layer["up"].t(), approximate="tanh")
            x = x + wide @ layer["down"].t()
        return F.layer_norm(x, (self.hidden,)) @ self.head.t()

    @torch.no_grad()
    def seconds(self, tokens: int) -> float:
        """Of a pass a token and one more a block, as first hitting takes them."""
        block = torch.randn(BLOCK, self.hidden, device=self.head.device)
        began = now()
        for start in range(0, tokens, BLOCK):
            for _ in range(BLOCK + 1):
                self.forward(block, start)[0].softmax(-1).cumsum(-1)
        return now() - began


def now() -> float:
    """Seconds: the clock's on a GPU, after what it has to do, and the process's on CPU."""
    if local_device().type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(
    model: BlockDiffusionTransformer, block_size: int, batch: int, tokens: int, **how: Any
) -> tuple[float, list[Sample]]:
    prompts = [[0]] * batch
    sampling = SamplingConfig(max_new_tokens=tokens, min_entropy=0.0, **how)
    began = now()
    samples = generate_batch(model, prompts, sampling, block_size=block_size)
    return now() - began, samples


def speeds(model: BlockDiffusionTransformer, twin: Twin | None, tokens: int, repeats: int) -> dict[str, float]:
    """Medians of first hitting at batch 1 and 8 and of the twin, in turns: tokens a second."""
    # No text ends by chance.
    assert model.output_layer.weight is not None
    model.output_layer.forbidden_V[model.vocabulary.eos_id] = True
    found: dict[str, list[float]] = {"batch 1": [], "batch 8": []} | ({"plain twin": []} if twin else {})
    timed(model, BLOCK, 1, min(tokens, 64))
    for _ in range(repeats):
        for batch in (1, 8):
            seconds, samples = timed(model, BLOCK, batch, tokens)
            assert all(sample.nfe == tokens for sample in samples)
            found[f"batch {batch}"].append(batch * tokens / seconds)
        if twin:
            found["plain twin"].append(tokens / twin.seconds(tokens))
    return {name: statistics.median(values) for name, values in found.items()}


def qualities(
    model: BlockDiffusionTransformer, groups: ProcessGroups, objective: Objective, tokens: int, batch: int
) -> list[dict[str, Any]]:
    """Every rule: tokens a second, tokens a pass, and the nats a token that the model itself gives what it wrote."""
    longest = -(-(tokens + 1) // objective.block_size) * objective.block_size
    bounds, rows = ContinuationBounds(model, groups, objective, max_length=longest, draws=4), []
    for name, how in RULES.items():
        seconds, samples = timed(model, objective.block_size, batch, tokens, **how)
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
            twin = Twin(device=str(local_device())) if options.preset == "small" else None
            result["tokens_per_second"] = speeds(model, twin, options.tokens, options.repeats)
        else:
            model, manifest, groups = stack.enter_context(open_model(resolve_checkpoint(options.checkpoint)))
            result["rules"] = qualities(model, groups, manifest.block_size, options.tokens, options.batch)
    if options.json:
        print(json.dumps(result))
        return
    if options.checkpoint is None:
        found = result["tokens_per_second"]
        print("| | tokens/s | × batch 1 |\n|---|---|---|")
        for name, value in found.items():
            print(f"| {name} | {value:.1f} | {value / found['batch 1']:.2f} |")
    else:
        print("| unmasking | tokens/s | tokens/pass | nats/token | perplexity |\n|---|---|---|---|---|")
        for row in result["rules"]:
            print(
                f"| {row['rule']} | {row['tokens_per_second']:.1f} | {row['tokens_per_pass']:.2f} | {row['nats']:.3f} "
                f"| {math.exp(row['nats']):.1f} |"
            )


if __name__ == "__main__":
    main()
