"""Take optimiser steps as one rank of a layout; rank 0 saves losses, norms, times and full weights."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from bd3_scale.checkpoint.boxes import boxes_of
from bd3_scale.data.batch import Batch
from bd3_scale.diffusion.noise import Noise
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.objective import objective_of
from bd3_scale.objective.inputs import corrupt, mask_noise, next_tokens
from bd3_scale.parallel import engine as engine_module
from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import DiffusionRecipe
from tests.integration import cases

# ZeRO-3 divides some of the tiny weights, as it does large ones.
engine_module.WHOLE_BELOW = 3000


def micro_batches(case: cases.Case, seed: int, groups, size: int = 1) -> list:
    """Return this rank's micro-batches, of `size` sequences each."""
    batch = cases.batch(case, seed)
    share = cases.BATCH // groups.dp.size()
    context = (groups.cp.rank(), groups.cp.size())
    inputs = []
    for i in range(groups.dp.rank() * share, (groups.dp.rank() + 1) * share, size):
        one = slice(i, i + size)
        sequences = Batch(
            ids=torch.arange(i, i + size),
            slots=torch.arange(i, i + size),
            epochs=torch.zeros(size, dtype=torch.int64),
            source_keys=torch.zeros(size, dtype=torch.int64),
            tokens=batch["clean"][one],
            document_start=batch["document_start"][one].int(),
            positions=batch["positions"][one],
            counted=torch.ones(size, cases.LENGTH, dtype=torch.bool),
            shown=torch.zeros(size, cases.LENGTH, dtype=torch.bool),
        )
        placed = {"device": torch.device("cpu"), "context": context}
        if case.objective == "next_token":
            inputs.append(next_tokens(sequences, **placed))
            continue
        objective = objective_of(
            DiffusionRecipe(block_size=case.block_size, objective=case.objective), cases.VOCABULARY
        )
        rates = batch["mask_rate"][:, one]
        noises = [Noise(batch["masked"][c, one], rates[c], 1 / rates[c]) for c in range(case.copies)]
        made = corrupt(
            sequences, noises, case.block_size, mask_id=cases.VOCABULARY.mask_id, row_loss=objective.row_loss, **placed
        )
        if case.mask_noise_std:
            noise = mask_noise(sequences, case.mask_noise_std, copies=case.copies, seed=seed, **placed)
            made = replace(made, mask_noise=noise)
        inputs.append(made)
    return inputs


def full_states(engine, layouts) -> dict[str, torch.Tensor]:
    """Return the optimiser's states of all ranks, put together from their boxes; replicas must be equal."""
    by_parameter = {id(layout.parameter): layout for layout in layouts}
    mine = [
        (box.key, box.full_shape, box.offset, box.data.clone())
        for fragment in engine.zero.fragments()
        for box in boxes_of(by_parameter[id(fragment.parameter)].pieces, fragment.start, fragment.states)
    ]
    full: dict[str, torch.Tensor] = {}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for key, shape, offset, data in [box for rank in everyone for box in rank]:
        target = full.setdefault(key, torch.full(shape, float("nan")))
        place = target[tuple(slice(o, o + s) for o, s in zip(offset, data.shape, strict=True))]
        assert place.isnan().all() or torch.equal(place, data), f"replicas of {key} differ"
        place.copy_(data)
    assert not any(tensor.isnan().any() for tensor in full.values()), "boxes do not cover a tensor"
    return full


def routers(chunks) -> dict[int, torch.nn.Module]:
    """Return this rank's routers by number of layer from 0, in the order of the layers."""
    layers = sorted((layer.layer, layer.mlp) for chunk in chunks for layer in chunk.decoder.layers)
    return {number: mlp.router for number, mlp in layers if hasattr(mlp, "router")}


def expert_bias(chunks) -> torch.Tensor | None:
    """Return the biases of all layers' experts, fp32 [layers, E], or None if the model has none; ranks with the same
    layer must have equal ones.
    """
    mine = {number: getattr(router, "expert_bias", None) for number, router in routers(chunks).items()}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {number: bias.clone() for number, bias in mine.items() if bias is not None})
    whole: dict[int, torch.Tensor] = {}
    for rank in everyone:
        for number, bias in rank.items():
            assert bias.dtype == torch.float32
            assert torch.equal(whole.setdefault(number, bias), bias), f"ranks have other biases in layer {number}"
    return torch.stack([whole[number] for number in sorted(whole)]) if whole else None


def take_steps(layout: cases.Layout, groups) -> dict:
    case, recipe = cases.CASES[layout.case], cases.recipe(layout)
    check_recipe(recipe, dist.get_world_size())
    chunks = cases.build(recipe, groups)
    if case.unchosen is not None:
        for router in routers(chunks).values():
            router.expert_bias[case.unchosen] = -10
    layouts = parameter_layouts(chunks)
    engine = TrainingEngine(chunks, groups, recipe.optimizer, recipe.parallel)
    initial, initial_bias = full_states(engine, layouts), expert_bias(chunks)
    results, seconds = [], []
    for step in range(case.steps):
        micros = micro_batches(case, step, groups, layout.micro_batch_size)
        began = time.perf_counter()
        results.append(engine.step(micros, tokens=cases.BATCH * cases.LENGTH, lr=0.01))
        seconds.append(time.perf_counter() - began)
    assert engine.zero.step == case.steps
    routed = [] if case.model.moe is None else [r.routed.long() for r in results]
    return {
        "initial_bias": initial_bias,
        "bias": expert_bias(chunks),
        "routed": routed,
        "initial": {key: value for key, value in initial.items() if key.startswith("master.")},
        "states": full_states(engine, layouts),
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "seconds": seconds,
    }


def run_layout(name: str, out: Path) -> None:
    layout = cases.LAYOUTS[name]
    with process_groups(cases.recipe(layout).parallel) as groups:
        first = take_steps(layout, groups)
        for _ in range(layout.repeats - 1):
            again = take_steps(layout, groups)
            assert again["losses"] == first["losses"], (again["losses"], first["losses"])
            assert again["norms"] == first["norms"], (again["norms"], first["norms"])
            assert all(torch.equal(again["states"][key], first["states"][key]) for key in first["states"])
        if dist.get_rank() == 0:
            torch.save(first, out)
