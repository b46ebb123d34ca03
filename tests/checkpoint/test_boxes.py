"""Compare boxes with numpy's indexing."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.checkpoint.boxes import boxes_of, split_stretch
from bd3_scale.model.layout import Piece

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_of_a_stretch_hold_its_elements_in_order(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(start, numel))
    full = torch.arange(numel).view(shape)
    boxes = list(split_stretch(shape, start, end))
    found = [full[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].flatten() for box in boxes]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *found]), torch.arange(start, end))
    assert len(boxes) <= 2 * len(shape) - 1


@given(st.integers(0, 11), st.data())
def test_fragments_of_a_gated_weight_land_in_both_halves(start, data):
    """Check that a rank's fused gate/up parameter [4, 3] is rows 2..3 of gate and of up in the full [8, 3]."""
    numel = data.draw(st.integers(1, 12 - start))
    full = torch.arange(24.0).view(8, 3)
    parameter = torch.cat([full[2:4], full[6:8]]).flatten()
    pieces = (
        Piece("w", 0, (1, 2, 3), (0, 2, 0), (1, 8, 3)),
        Piece("w", 6, (1, 2, 3), (0, 6, 0), (1, 8, 3)),
    )
    rebuilt = torch.full((1, 8, 3), -1.0)
    for box in boxes_of(pieces, start, {"master": parameter[start : start + numel]}):
        assert box.key == "master.w"
        region = tuple(slice(o, o + s) for o, s in zip(box.offset, box.data.shape, strict=True))
        rebuilt[region] = box.data
    written = rebuilt[0][rebuilt[0] >= 0]
    assert torch.equal(written.sort().values, parameter[start : start + numel].sort().values)
    assert torch.equal(rebuilt[0][rebuilt[0] >= 0], full[rebuilt[0] >= 0])
