"""Run ranks, one of which changes a bit of a weight that others hold, too."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

from bd3_scale.model.layout import parameter_layouts
from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.parallel.groups import process_groups
from bd3_scale.parallel.replicas import check_replicas
from tests.integration import cases

# World size, case, parallel, the parameter that changes, and where: it is shared by at least two ranks.
LAYOUTS = {
    "three replicas": (3, "packed", {}, "linear_qkv.weight", 1),
    "tensor-parallel norm": (2, "packed", {"tensor": 2, "sequence": True}, "layernorm", 1),
    "tied over stages": (2, "tied", {"pipeline": 2}, "word_embeddings|output_layer", 1),
    "one of two copies of experts at ZeRO-1": (4, "moe", {"expert": 2}, "experts.linear_fc1", 3),
    "biases of experts": (3, "moe", {}, "expert_bias", 1),
    "tensor-parallel norm at ZeRO-3": (4, "packed", {"tensor": 2, "zero_stage": 3}, "layernorm", 3),
}


def drift(name: str) -> None:
    world, case_name, parallel, pattern, culprit = LAYOUTS[name]
    recipe = cases.recipe(cases.Layout(world, case_name, parallel))
    with process_groups(recipe.parallel) as groups:
        chunks = cases.build(recipe, groups)
        layouts = parameter_layouts(chunks)
        TrainingEngine(chunks, groups, recipe.optimizer, recipe.parallel)
        check_replicas(chunks, layouts, groups, 0)
        tensors = [named for chunk in chunks for named in (*chunk.named_parameters(), *chunk.named_buffers())]
        named = [(n, tensor) for n, tensor in tensors if re.search(pattern, n)]
        weight = getattr(named[0][1], "ds_tensor", named[0][1]).data
        if dist.get_rank() == culprit:
            weight.view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
        try:
            check_replicas(chunks, layouts, groups, 7)
        except ValueError as error:
            text = str(error)
        else:
            raise AssertionError("nothing was found")
        assert text.startswith("after step 7 ranks that share weights hold different ones: ")
        assert text.count(" at [") == 1, text
        if world > 2 and "ZeRO" not in name:
            assert f": rank {culprit}." in text, text
        else:
            # Of two copies nobody can say which is right.
            assert re.search(r": rank \d+\.", text), text
        if dist.get_rank() == culprit:
            weight.view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
        check_replicas(chunks, layouts, groups, 8)
