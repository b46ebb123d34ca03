"""Compute a block's attention over a cached prefix, split along the keys (Flash-Decoding, Dao et al., 2023).

A block has few queries and the prefix many keys, so that one program a head would leave most of the GPU idle.
`decode_kernel` gives a part of the keys to each program, and `combine_kernel` adds the parts.

The query heads that share a key/value head are rows of one tile, GROUP·Q rows padded to BM: every key is read once.
There is no mask: each row sees every key of its sequence.
"""

import triton
import triton.language as tl

from bd3_scale.attention.kernels.common import load_tile
from bd3_scale.attention.kernels.forward import softmax_step


@triton.jit
def decode_kernel(
    Q, K, V, PART, LSE, LENGTHS,
    scale_log2, num_heads, num_queries, num_keys, num_splits, keys_per_split,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    GROUP: tl.constexpr, HAS_LENGTHS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write PART, float32 [B, H, Q, splits, D], and LSE (base 2), [B, H, Q, splits], of one split of the keys."""
    split = tl.program_id(0) % num_splits
    row_tile = tl.program_id(0) // num_splits % tl.cdiv(GROUP * num_queries, BM)
    batch_group = tl.program_id(0) // (num_splits * tl.cdiv(GROUP * num_queries, BM))
    num_groups = num_heads // GROUP
    batch, group = batch_group // num_groups, batch_group % num_groups
    r = row_tile * BM + tl.arange(0, BM)
    valid = r < GROUP * num_queries
    head, query = group * GROUP + r // num_queries, r % num_queries
    d = tl.arange(0, D)[None, :]
    q_rows = Q + batch.to(tl.int64) * q_b + head[:, None].to(tl.int64) * q_h + query[:, None] * q_n
    q = tl.load(q_rows + d, mask=valid[:, None], other=0.0)

    start = split * keys_per_split
    length = num_keys
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(LENGTHS + batch).to(tl.int32), num_keys)
    end = tl.minimum(start + keys_per_split, length)
    num_full = tl.maximum(end - start, 0) // BN
    full_end = start + num_full * BN
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for j in range(0, num_full):
        k = load_tile(K, batch, group, start + j * BN, end, k_b, k_n, k_h, BN, D, False, False)
        v = load_tile(V, batch, group, start + j * BN, end, v_b, v_n, v_h, BN, D, False, False)
        acc, top, total = softmax_step(
            acc, top, total, tl.dot(q, k.T, input_precision=PRECISION), v, scale_log2, False, PRECISION
        )
    if full_end < end:
        k = load_tile(K, batch, group, full_end, end, k_b, k_n, k_h, BN, D, True, False)
        v = load_tile(V, batch, group, full_end, end, v_b, v_n, v_h, BN, D, True, False)
        seen = (full_end + tl.arange(0, BN) < end)[None, :]
        scores = tl.where(seen, tl.dot(q, k.T, input_precision=PRECISION), float("-inf"))
        acc, top, total = softmax_step(acc, top, total, scores, v, scale_log2, True, PRECISION)

    part = ((batch * num_heads + head).to(tl.int64) * num_queries + query) * num_splits + split
    total = tl.where(total > 0.0, total, 1.0)
    tl.store(PART + part[:, None] * D + d, acc / total[:, None], mask=valid[:, None])
    tl.store(LSE + part, top + tl.math.log2(total), mask=valid)


@triton.jit
def combine_kernel(
    PART, LSE, OUT, num_heads, num_queries, num_splits, o_b, o_n, o_h, SPLITS: tl.constexpr, D: tl.constexpr
):
    """Write OUT of one row: the sum of its splits, each weighted by its share of the sum of exponentials."""
    row = tl.program_id(0)
    query = row % num_queries
    head = row // num_queries % num_heads
    batch = row // (num_queries * num_heads)
    s = tl.arange(0, SPLITS)
    part = row.to(tl.int64) * num_splits + s
    lse = tl.load(LSE + part, mask=s < num_splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.math.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    d = tl.arange(0, D)
    values = tl.load(PART + part[:, None] * D + d[None, :], mask=(s < num_splits)[:, None], other=0.0)
    out = tl.sum(values * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    base = OUT + batch.to(tl.int64) * o_b + head.to(tl.int64) * o_h + query.to(tl.int64) * o_n
    tl.store(base + d, out.to(OUT.dtype.element_ty))
