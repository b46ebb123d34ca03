"""Decode on ranks that split a model's matrices; rank 0 saves their results and those of one process."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
import torch.distributed as dist

from bd3_scale.model.build import Chunks
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.parallel.groups import lone_groups, process_groups
from bd3_scale.recipe.schema import ParallelRecipe
from tests.integration import cases
from tests.support.caches import read

BATCH, LENGTH, BLOCK, RANKS = 2, 16, 4, 2


def decode(case: str, out: Path) -> None:
    layout = cases.Layout(RANKS, case, {"tensor": RANKS})
    alone = cases.Layout(1, case)
    found = {"one": logits(cases.build(cases.recipe(alone), lone_groups()))}
    with process_groups(ParallelRecipe(tensor=RANKS)) as groups:
        found["ranks"] = logits(cases.build(cases.recipe(layout), groups))
        if dist.get_rank() == 0:
            torch.save(found, out)


@torch.no_grad()
def logits(chunks: Chunks) -> dict[str, torch.Tensor]:
    """Return logits of a block after a prompt, of some of its positions, and of the next block after the finished
    one."""
    draw_vectors(chunks)
    (model,) = chunks
    tokens = torch.randint(0, 57, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    cache = model.new_cache(BATCH, LENGTH)
    read(model, tokens[:, :8], BLOCK, cache)
    this, following = ((tokens[:, at : at + BLOCK], positions[:, at : at + BLOCK]) for at in (8, 12))
    wanted = torch.tensor([[True, False, False, True], [False, True, False, False]])
    found = {"whole": model.decode(*this, cache), "some": model.decode(*this, cache, wanted)}
    model.prefill(*this, cache)
    return found | {"following": model.decode(*following, cache)}


def draw_vectors(chunks: Chunks) -> None:
    """Draw biases, which start at zero, and norms, whose weights start equal, the same on every layout."""
    for layout in parameter_layouts(chunks):
        flat = layout.parameter.data.view(-1)
        for piece in layout.pieces:
            if "norm" in piece.key or piece.key.endswith("bias"):
                generator = torch.Generator().manual_seed(zlib.crc32(piece.key.encode()))
                full = 0.5 + torch.randn(piece.full_shape, generator=generator)
                box = full[tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shape, strict=True))]
                flat[piece.start : piece.start + piece.numel] = box.reshape(-1)
