"""What the kernels share: loads of tiles, and which keys a tile of query rows sees.

Legend: BM rows and BN keys of a tile, D head size, R query positions a stream. A program works on one tile of one
stream (a noisy copy, or the clean rows after them) and loops over the tiles of the other side in two bodies: full
tiles, where every row sees every key, without a comparison; then every partial tile, compared with the spans.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    X, batch, head, row, limit, stride_b, stride_n, stride_h,
    ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, D]: rows [row, row + ROWS) of X[batch, :, head].

    X is a pointer, or with TMA a descriptor of [B, heads, rows, D], which gives zeros beyond the last row. MASKED
    gives zeros from row `limit` on to a pointer; otherwise every row must exist.
    """
    if TMA:
        tile = X.load([batch, head, row, 0]).reshape([ROWS, D])
    else:
        i = tl.arange(0, ROWS)
        base = X + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_n
        pointers = base + i[:, None] * stride_n + tl.arange(0, D)[None, :]
        tile = tl.load(pointers, mask=(row + i < limit)[:, None], other=0.0) if MASKED else tl.load(pointers)
    return tile


@triton.jit
def key_tiles(DOC_START, UPPER, OWN_START, OWN_END, first, last, noisy, BN: tl.constexpr):
    """The key tiles that the query rows [first, last] see, from their first and last row alone: spans never fall.

    Returns full tiles [full_start, full_end) of clean keys, the starts of the partial ones left and right of them and
    of the own block's, and how many of each there are.
    """
    seen_start = tl.load(DOC_START + first)
    seen_end = tl.load(UPPER + last)
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
    """Start of the j-th partial key tile, and whether its keys are noisy."""
    is_own = j >= num_left + num_right
    clean = tl.where(j < num_left, left + j * BN, full_end + (j - num_left) * BN)
    return tl.where(is_own, own + (j - num_left - num_right) * BN, clean), is_own
