"""Apply RMSNorm and rotation to queries and keys, forward and backward, in fp32 with one rounding at the end.

Legend: M rows. A row of QKV has GROUPS key/value heads, each with its Q queries, its key and its value as neighbours,
of D dimensions. A program takes tiles of HEADS heads, counted through all rows. It loads each head as two halves of
HALF = D/2 channels (padded to PADDED, a power of two), because the rotation mixes channel i with channel i + D/2.
"""

import triton
import triton.language as tl


@triton.jit
def _halves(P, at, i, valid, HALF: tl.constexpr):
    """Load the halves of heads that start `at` [HEADS] numbers from P, each [HEADS, PADDED] in fp32."""
    first = P + at[:, None] + i[None, :]
    low = tl.load(first, mask=valid, other=0.0).to(tl.float32)
    return low, tl.load(first + HALF, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(P, at, i, valid, low, high, HALF: tl.constexpr):
    first = P + at[:, None] + i[None, :]
    tl.store(first, low.to(P.dtype.element_ty), mask=valid)
    tl.store(first + HALF, high.to(P.dtype.element_ty), mask=valid)


@triton.jit
def _weights(QW, KW, of_group, i, Q: tl.constexpr, HALF: tl.constexpr):
    """Load the halves of the norm's weight of each head, [HEADS, PADDED]; 1 for values."""
    valid = i < HALF
    of_query, of_key = (of_group < Q)[:, None], (of_group == Q)[:, None]
    low = tl.load(KW + i, mask=valid, other=0.0).to(tl.float32)[None, :]
    high = tl.load(KW + HALF + i, mask=valid, other=0.0).to(tl.float32)[None, :]
    low, high = tl.where(of_key, low, 1.0), tl.where(of_key, high, 1.0)
    q_low = tl.load(QW + i, mask=valid, other=0.0).to(tl.float32)[None, :]
    q_high = tl.load(QW + HALF + i, mask=valid, other=0.0).to(tl.float32)[None, :]
    return tl.where(of_query, q_low, low), tl.where(of_query, q_high, high)


@triton.jit
def _scale(low, high, eps, HALF: tl.constexpr):
    """Return 1 / √(mean of squares + eps) of each head, [HEADS, 1]."""
    return tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]


@triton.jit
def qkv_heads_kernel(
    QKV, QW, KW, COS, SIN, QUERY, KEY, num_rows, eps, qkv_row,
    Q: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Write QUERY [M, GROUPS·Q, D] and KEY [M, GROUPS, D] of a tile of query and key heads."""
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    row = (head // (GROUPS * (Q + 1))).to(tl.int64)
    group = head // (Q + 1) % GROUPS
    of_group = head % (Q + 1)
    i = tl.arange(0, PADDED)
    valid = (row < num_rows)[:, None] & (i < HALF)[None, :]
    low, high = _halves(QKV, row * qkv_row + (group * (Q + 2) + of_group) * (2 * HALF), i, valid, HALF)
    if NORM:
        scale = _scale(low, high, eps, HALF)
        w_low, w_high = _weights(QW, KW, of_group, i, Q, HALF)
        low *= scale * w_low
        high *= scale * w_high
    cos_low, cos_high = _halves(COS, row * (2 * HALF), i, valid, HALF)
    sin_low, sin_high = _halves(SIN, row * (2 * HALF), i, valid, HALF)
    turned_low = low * cos_low + high * sin_low
    turned_high = high * cos_high + low * sin_high
    at = ((row * GROUPS + group) * Q + of_group) * (2 * HALF)
    _store_halves(QUERY, at, i, valid & (of_group < Q)[:, None], turned_low, turned_high, HALF)
    at = (row * GROUPS + group) * (2 * HALF)
    _store_halves(KEY, at, i, valid & (of_group == Q)[:, None], turned_low, turned_high, HALF)


@triton.jit
def _gradient(
    GRAD_QUERY, GRAD_KEY, GRAD_VALUE, row, group, of_group, i, valid,
    Q: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Load the gradients of a tile of query, key and value heads, as halves."""
    own = ((row * GROUPS + group) * Q + of_group) * (2 * HALF)
    shared = (row * GROUPS + group) * (2 * HALF)
    low, high = _halves(GRAD_QUERY, own, i, valid & (of_group < Q)[:, None], HALF)
    k_low, k_high = _halves(GRAD_KEY, shared, i, valid & (of_group == Q)[:, None], HALF)
    v_low, v_high = _halves(GRAD_VALUE, shared, i, valid & (of_group > Q)[:, None], HALF)
    # A head is of one of the three sorts, and the masks make the other two loads 0.
    return low + k_low + v_low, high + k_high + v_high


@triton.jit
def qkv_heads_backward_kernel(
    GRAD_QUERY, GRAD_KEY, GRAD_VALUE, QKV, QW, KW, COS, SIN, GRAD, PART, num_rows, tiles, eps, qkv_row,
    Q: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Write GRAD [M, GROUPS·(Q + 2)·D] of `tiles` tiles of heads, and PART [programs, 2, D].

    PART has the sums over these tiles of the gradients of the two norms' weights. Each program has the same tiles in
    every run, and parts are summed afterwards: atomic additions would change the rounding from run to run.
    """
    i = tl.arange(0, PADDED)
    q_part_low = tl.zeros([HEADS, PADDED], tl.float32)
    q_part_high, k_part_low, k_part_high = q_part_low, q_part_low, q_part_low
    for tile in range(0, tiles):
        head = (tl.program_id(0) * tiles + tile) * HEADS + tl.arange(0, HEADS)
        row = (head // (GROUPS * (Q + 2))).to(tl.int64)
        group = head // (Q + 2) % GROUPS
        of_group = head % (Q + 2)
        valid = (row < num_rows)[:, None] & (i < HALF)[None, :]
        turned = valid & (of_group <= Q)[:, None]
        low, high = _gradient(GRAD_QUERY, GRAD_KEY, GRAD_VALUE, row, group, of_group, i, valid, Q, GROUPS, HALF)
        cos_low, cos_high = _halves(COS, row * (2 * HALF), i, turned, HALF)
        sin_low, sin_high = _halves(SIN, row * (2 * HALF), i, turned, HALF)
        back_low = low * cos_low + high * sin_high
        back_high = high * cos_high + low * sin_low
        low, high = tl.where(turned, back_low, low), tl.where(turned, back_high, high)
        if NORM:
            x_low, x_high = _halves(QKV, row * qkv_row + (group * (Q + 2) + of_group) * (2 * HALF), i, turned, HALF)
            scale = _scale(x_low, x_high, eps, HALF)
            x_low *= scale
            x_high *= scale
            of_query, of_key = (of_group < Q)[:, None], (of_group == Q)[:, None]
            q_part_low += tl.where(of_query, low * x_low, 0.0)
            q_part_high += tl.where(of_query, high * x_high, 0.0)
            k_part_low += tl.where(of_key, low * x_low, 0.0)
            k_part_high += tl.where(of_key, high * x_high, 0.0)
            w_low, w_high = _weights(QW, KW, of_group, i, Q, HALF)
            low *= w_low
            high *= w_high
            mean = ((tl.sum(low * x_low, 1) + tl.sum(high * x_high, 1)) / (2 * HALF))[:, None]
            # Values have no norm: their gradient is unchanged.
            scale = tl.where((of_group <= Q)[:, None], scale, 1.0)
            low = (low - x_low * mean) * scale
            high = (high - x_high * mean) * scale
        _store_halves(GRAD, head.to(tl.int64) * (2 * HALF), i, valid, low, high, HALF)
    if NORM:
        part = PART + tl.program_id(0) * (4 * HALF) + i
        tl.store(part, tl.sum(q_part_low, 0), mask=i < HALF)
        tl.store(part + HALF, tl.sum(q_part_high, 0), mask=i < HALF)
        tl.store(part + 2 * HALF, tl.sum(k_part_low, 0), mask=i < HALF)
        tl.store(part + 3 * HALF, tl.sum(k_part_high, 0), mask=i < HALF)
