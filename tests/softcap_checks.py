"""Check the model option that docs/extend.md adds to the package; test_extend.py runs this where it is added."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import bd3_scale
from bd3_scale.attention.spans import make_spans
from bd3_scale.convert.architectures import export_obstacles
from bd3_scale.data.batch import Batch
from bd3_scale.evaluate.nelbo import evaluate_nelbo
from bd3_scale.model.build import build_model
from bd3_scale.model.config import transformer_config
from bd3_scale.model.head import OutputLayer
from bd3_scale.model.rows import ModelInputs
from bd3_scale.objective import BlockDiffusion, NextToken
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import DiffusionRecipe, ModelRecipe, ParallelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.support.forks import free_port

CAP, BLOCK, LENGTH, ROWS = 2.0, 4, 16, 20
VOCABULARY = Vocabulary(size=100, eos_id=0, mask_id=57)
PADDED = VOCABULARY.padded_size
ALLOWED = [i for i in range(VOCABULARY.size) if i != VOCABULARY.mask_id]
SHAPE = ModelRecipe(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    ffn_hidden_size=32,
    head_bias=True,
    init_std=0.5,
    logit_softcap=CAP,
)
ON_CPU = {"dtype": torch.float32, "device": torch.device("cpu")}


def check_gradients(tensor: int) -> None:
    """Compare loss and gradients of the head with plain autograd in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (ROWS, SHAPE.hidden_size), "weight": (PADDED, SHAPE.hidden_size), "bias": (PADDED,)}
    full = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    targets = torch.tensor(ALLOWED)[torch.randint(0, len(ALLOWED), (ROWS,), generator=generator)]
    weights = torch.rand(ROWS, generator=generator)

    exact = {name: value.double().requires_grad_() for name, value in full.items()}
    logits = CAP * torch.tanh((exact["hidden"] @ exact["weight"].t() + exact["bias"]) / CAP)
    nll = -logits[:, ALLOWED].log_softmax(-1)[torch.arange(ROWS), torch.tensor([ALLOWED.index(t) for t in targets])]
    (nll * weights).sum().backward()

    parallel = ParallelRecipe(tensor=tensor)
    with process_groups(parallel) as groups:
        config = transformer_config(SHAPE, parallel, **ON_CPU, deterministic=True)
        layer = OutputLayer(SHAPE, VOCABULARY, config, groups.tp)
        rank = groups.tp.rank()
        layer.weight.data, layer.bias.data = (full[name].chunk(tensor)[rank].clone() for name in ("weight", "bias"))
        hidden = full["hidden"].clone().requires_grad_()
        total, each = layer(hidden, None, targets, weights)
        total.backward()
        dist.all_reduce(hidden.grad, group=groups.tp)
    torch.testing.assert_close(each.double(), nll.detach(), rtol=1e-5, atol=1e-6)
    for name, found in {"hidden": hidden.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}.items():
        wanted = exact[name].grad if name == "hidden" else exact[name].grad.chunk(tensor)[rank]
        assert (found.double() - wanted).norm() < 1e-6 * wanted.norm(), name


def check_gradients_on_rank(rank: int, port: int) -> None:
    places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "BD3_SCALE_SECRET": str(Path("secret").absolute())}
    os.environ |= places | meeting
    check_gradients(2)


def built(groups, cap: float | None):
    shape = SHAPE.model_copy(update={"logit_softcap": cap})
    (model,) = build_model(shape, VOCABULARY, groups, seed=3, **ON_CPU)
    return model.requires_grad_(False).eval()


def check_decoding(groups) -> None:
    """Check that every token's loss in a training forward equals that of decoding, block after block."""
    model, generator = built(groups, CAP), torch.Generator().manual_seed(1)
    clean = torch.randint(0, VOCABULARY.mask_id, (2, LENGTH), generator=generator)
    noisy = clean.masked_fill(torch.rand(clean.shape, generator=generator) < 0.6, VOCABULARY.mask_id)
    positions = torch.arange(LENGTH).expand_as(clean)
    inputs = ModelInputs(
        tokens=torch.cat([noisy, clean], 1),
        positions=positions,
        spans=make_spans(torch.zeros(clean.shape, dtype=torch.int32), BLOCK),
        num_noisy=1,
        head_rows=torch.arange(2 * LENGTH),
        targets=clean.t().flatten(),
        weights=torch.ones(2 * LENGTH),
        noisy_pairs=0,
        clean_pairs=0,
    )
    training, cache = model(inputs)[1].view(LENGTH, 2).t(), model.new_cache(2, LENGTH)
    for start in range(0, LENGTH, BLOCK):
        block = slice(start, start + BLOCK)
        logits = model.decode(noisy[:, block], positions[:, block], cache)
        assert logits[..., ALLOWED].abs().max() < CAP
        nll = -logits.log_softmax(-1).gather(-1, clean[:, block, None])[..., 0]
        torch.testing.assert_close(nll, training[:, block], rtol=1e-5, atol=1e-5)
        model.prefill(clean[:, block], positions[:, block], cache)


def check_evaluation(groups) -> None:
    """Check that a very large cap changes nothing, and that a tiny one gives the loss of a model that knows nothing."""
    tokens = torch.randint(0, VOCABULARY.mask_id, (8, LENGTH), generator=torch.Generator().manual_seed(2))
    every, start = torch.ones(8, LENGTH, dtype=torch.bool), torch.zeros(8, LENGTH, dtype=torch.int32)
    positions, ids = torch.arange(LENGTH).expand(8, -1), torch.arange(8)
    batch = Batch(ids, ids, 0 * ids, 0 * ids, tokens, start, positions, every, ~every)
    objective = BlockDiffusion(DiffusionRecipe(block_size=BLOCK), VOCABULARY)

    def nelbo(model) -> float:
        return evaluate_nelbo([model], [batch], groups, objective=objective, draws=2).nelbo.nelbo

    knows_nothing = built(groups, None)
    for parameter in knows_nothing.output_layer.parameters():
        parameter.zero_()
    found = {cap: nelbo(built(groups, cap)) for cap in (None, 1e5, CAP, 1e-5)}
    assert math.isclose(found[1e5], found[None], rel_tol=1e-5)
    assert math.isclose(found[1e-5], nelbo(knows_nothing), rel_tol=1e-4)
    assert len({round(value, 3) for value in found.values()}) == 3


def check_formats() -> None:
    """Check that our format takes the option, and that another format names it as unknown."""
    assert export_obstacles(SHAPE, BlockDiffusion)["bd3"] is None
    plain = SHAPE.model_copy(update={"head_bias": False})
    words = f"it has logit_softcap={CAP}, which {{}}ForCausalLM does not support"
    assert export_obstacles(plain, BlockDiffusion)["sdar"] == words.format("SDAR")
    assert export_obstacles(plain, NextToken)["qwen3"] == words.format("Qwen3")


def main(folder: str) -> int:
    assert bd3_scale.__file__.startswith(folder), bd3_scale.__file__
    # These fork, which is safe only while autograd has no threads here.
    context, port = multiprocessing.get_context("fork"), free_port()
    ranks = [context.Process(target=check_gradients_on_rank, args=(rank, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    check_gradients(1)
    check_formats()
    with process_groups(ParallelRecipe()) as groups:
        check_decoding(groups)
        check_evaluation(groups)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    # The exported code is compared with the model, and with an import of it.
    tests = ["tests/convert/test_options.py", "-k", "logit_softcap or every_option"]
    return pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", *tests])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
