"""Load tiles, and find the keys that a tile of query rows sees, from the spans alone.

Legend: BM rows and BN keys of a tile, D head size, R query positions a stream.

A program works on one tile of one stream (a noisy copy, or the clean rows after them). It loops over the tiles of the
other side in two loop bodies:

1. full tiles, where every row sees every key; nothing is compared;
2. all partial tiles, which are compared with the spans: at the left end of the document, at the right end of what the
   rows see, and in the rows' own noisy block.

Two bodies and not one for each sort of partial tile: with five bodies the compiler spilled registers. A tile outside of
these ranges is never loaded, which is where the two-stream mask saves its work.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    X, batch, head, row, limit, stride_b, stride_n, stride_h,
    ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load [ROWS, D]: rows [row, row + ROWS) of X[batch, :, head].

    X is a pointer, or with TMA a descriptor of [B, heads, rows, D]. A descriptor gives zeros beyond the last row of the
    tensor; rows between `limit` and that row are loaded, so the caller must mask them. With a pointer, MASKED gives
    zeros from row `limit` on; without MASKED every row must exist.
    """
    if TMA:
        tile = X.load([batch, head, row, 0]).reshape([ROWS, D])
    else:
        i = tl.arange(0, ROWS)
        # int64: an offset of batch or head may exceed 2^31 elements, where int32 would wrap around silently.
        base = X + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_n
        pointers = base + i[:, None] * stride_n + tl.arange(0, D)[None, :]
        tile = tl.load(pointers, mask=(row + i < limit)[:, None], other=0.0) if MASKED else tl.load(pointers)
    return tile


@triton.jit
def key_tiles(DOC_START, UPPER, OWN_START, OWN_END, first, last, noisy, BN: tl.constexpr):
    """Find the key tiles that the query rows [first, last] see.

    Spans never decrease from row to row, so the first and the last row bound all rows between them.

    Returns the full tiles [full_start, full_end) of clean keys, the starts of the partial tiles left of them and of the
    tiles of the rows' own noisy blocks, and the numbers of partial tiles left, right and own. The partial tiles on the
    right start at full_end.
    """
    seen_start = tl.load(DOC_START + first)
    seen_end = tl.load(UPPER + last)
    # A full tile is seen by every row: it starts after the last row's document start and ends before the first row's
    # upper bound.
    full_start = tl.cdiv(tl.load(DOC_START + last), BN) * BN
    full_end = tl.maximum(tl.load(UPPER + first) // BN * BN, full_start)
    left = seen_start // BN * BN
    num_left = (full_start - left) // BN
    num_right = tl.maximum(tl.cdiv(seen_end - full_end, BN), 0)
    own = tl.load(OWN_START + first) // BN * BN
    num_own = tl.where(noisy, tl.cdiv(tl.load(OWN_END + last) - own, BN), 0)
    return full_start, full_end, left, num_left, num_right, own, num_own


@triton.jit
def partial_tile(j, full_end, left, num_left, num_right, own, BN: tl.constexpr):
    """Return the start of the j-th partial key tile, and whether its keys are noisy."""
    is_own = j >= num_left + num_right
    clean = tl.where(j < num_left, left + j * BN, full_end + (j - num_left) * BN)
    return tl.where(is_own, own + (j - num_left - num_right) * BN, clean), is_own
