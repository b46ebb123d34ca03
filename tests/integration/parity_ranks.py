"""One rank of the parity launch: `parity_ranks.py OUT TENSOR ZERO`. Rank 0 saves full weights, gradients and losses
to OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cases
import torch
import torch.distributed as dist

from bd3_scale.attention.spans import make_spans
from bd3_scale.data.corrupt import NoisyBatch
from bd3_scale.model.build import build_model
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.parallel.groups import process_groups
from bd3_scale.train.step import loss_sum


def micro_batches(batch, block_size, rank, ranks):
    """One sequence each, of this data-parallel rank's share."""
    spans = make_spans(batch["document_start"], block_size)
    share = cases.BATCH // ranks
    for i in range(rank * share, (rank + 1) * share):
        one = slice(i, i + 1)
        masked = batch["masked"][one]
        rows = masked.flatten().nonzero()[:, 0]
        clean = batch["clean"][one]
        yield NoisyBatch(
            clean.masked_fill(masked, cases.VOCABULARY.mask_id),
            clean,
            batch["positions"][one],
            spans[:, one].contiguous(),
            rows,
            (1 / batch["mask_rate"][one]).flatten()[rows],
        )


def full_tensors(layouts, values, groups):
    """Rank 0's view of the tensors of all ranks of a tensor-parallel group, put together from their boxes."""
    mine = [
        (
            p.key,
            p.full_shape,
            p.offset,
            values[id(layout.parameter)].flatten()[p.start : p.start + p.numel].reshape(p.shape),
        )
        for layout in layouts
        for p in layout.pieces
    ]
    everyone = [None] * groups.tp.size()
    dist.all_gather_object(everyone, mine, group=groups.tp)
    full = {}
    for key, shape, offset, value in [box for rank in everyone for box in rank]:
        target = full.setdefault(key, torch.full(shape, float("nan")))
        target[tuple(slice(o, o + s) for o, s in zip(offset, value.shape, strict=True))] = value
    return full


def forward_and_backward(name, tensor, groups):
    model_recipe, block_size, lengths = cases.CASES[name]
    recipe = cases.recipe(model_recipe, block_size, tensor=tensor)
    model = build_model(recipe, cases.VOCABULARY, groups, dtype=torch.float32, device=torch.device("cpu"), seed=3)
    layouts = parameter_layouts(model)
    weights = full_tensors(layouts, {id(p): p.detach().clone() for p in model.parameters()}, groups)
    loss = sum(loss_sum(model, micro) for micro in micro_batches(cases.batch(lengths, 1), block_size, 0, 1))
    loss.backward()
    for parameter in model.parameters():
        if parameter.partial_over_tp if hasattr(parameter, "partial_over_tp") else False:
            dist.all_reduce(parameter.grad, group=groups.tp)
    gradients = full_tensors(layouts, {id(p): p.grad for p in model.parameters()}, groups)
    return {"weights": weights, "gradients": gradients, "loss": loss.item()}


def three_steps(tensor, zero_stage, groups):
    model_recipe, block_size, lengths = cases.CASES["qwen-packed"]
    recipe = cases.recipe(model_recipe, block_size, tensor=tensor, zero_stage=zero_stage, ema_decay=0.5)
    model = build_model(recipe, cases.VOCABULARY, groups, dtype=torch.float32, device=torch.device("cpu"), seed=3)
    layouts = parameter_layouts(model)
    engine = TrainingEngine(model, groups, recipe.optimizer, recipe.parallel, loss_sum)
    results = []
    for step in range(3):
        micros = list(micro_batches(cases.batch(lengths, step), block_size, groups.dp.rank(), groups.dp.size()))
        results.append(engine.step(micros, tokens=cases.BATCH * cases.LENGTH, lr=0.01))
    kept = {id(p): p.detach().clone() for p in model.parameters()}
    weights = full_tensors(layouts, kept, groups)
    with engine.zero.evaluation_weights():
        ema = full_tensors(layouts, {id(p): p.detach().clone() for p in model.parameters()}, groups)
    assert all(torch.equal(p, kept[id(p)]) for p in model.parameters()), "weights differ after evaluation"
    return {
        "weights": weights,
        "ema": ema,
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
    }


def main() -> None:
    out, tensor, zero_stage = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    with process_groups(cases.recipe(cases.QWEN, 8, tensor=tensor).parallel) as groups:
        results = {name: forward_and_backward(name, tensor, groups) for name in cases.CASES}
        results["steps"] = three_steps(tensor, zero_stage, groups)
        if dist.get_rank() == 0:
            torch.save(results, out)


if __name__ == "__main__":
    main()
