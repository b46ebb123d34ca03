"""Compute the gradients of attention under spans (FlashAttention-2, Dao, 2023, algorithm 2).

With weights P = exp2(scale_log2 · Q Kᵀ − lse), recomputed from the log-sum-exp of the forward:

    dV = Pᵀ dO,   dP = dO Vᵀ,   dS = P ∘ (dP − delta),   dQ = scale · dS K,   dK = scale · dSᵀ Q,

where delta = Σ_d dO ∘ O of each row equals Σ_k P ∘ dP, the term that the softmax adds; `delta_kernel` computes it once.
The scale is applied when dQ and dK are stored, once an element and not once a pair.

Two forms:
- Deterministic: `query_gradient_kernel` for dq, `clean_key_gradient_kernel` and `noisy_key_gradient_kernel` for dk and
  dv, one program for each tile of one key/value head. Seven matrix products, since scores and dP are computed twice.
- Fused: the key kernels add each tile's part of dq to a float32 buffer by atomic additions. Five products, but the
  order of the additions, and so the rounding of dq, changes from run to run.
"""

import triton
import triton.language as tl

from bd3_scale.attention.kernels.common import key_tiles, load_tile, partial_tile


@triton.jit
def delta_kernel(
    OUT, GRAD, DELTA, num_heads, total_rows, o_b, o_n, o_h, g_b, g_n, g_h, BM: tl.constexpr, D: tl.constexpr
):
    """Write DELTA[b, h, row] = Σ_d OUT · GRAD, float32."""
    tiles = tl.cdiv(total_rows, BM)
    row0 = tl.program_id(0) % tiles * BM
    batch_head = tl.program_id(0) // tiles
    batch, head = batch_head // num_heads, batch_head % num_heads
    out = load_tile(OUT, batch, head, row0, total_rows, o_b, o_n, o_h, BM, D, True, False).to(tl.float32)
    grad = load_tile(GRAD, batch, head, row0, total_rows, g_b, g_n, g_h, BM, D, True, False).to(tl.float32)
    row = row0 + tl.arange(0, BM)
    tl.store(DELTA + batch_head.to(tl.int64) * total_rows + row, tl.sum(out * grad, 1), mask=row < total_rows)


@triton.jit
def _query_step(dq, q, grad, lse, delta, k, v, seen, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Add to dq, without the scale, what one tile of keys gives."""
    weights = tl.math.exp2(tl.dot(q, k.T, input_precision=PRECISION) * scale_log2 - lse[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    grad_scores = weights * (tl.dot(grad, v.T, input_precision=PRECISION) - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def query_gradient_kernel(
    Q, K, V, GRAD, DQ, LSE, DELTA, SPANS,
    scale, scale_log2, batch_size, num_heads, num_rows, num_noisy, num_streams, num_keys,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, g_b, g_n, g_h, dq_b, dq_n, dq_h,
    NUM_SPANS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile of rows; the loops are those of `forward_kernel`."""
    tiles = tl.cdiv(num_rows, BM)
    program = tl.program_id(0)
    stream = program % num_streams
    tile = tiles - 1 - (program // num_streams) % tiles
    batch_head = program // (num_streams * tiles)
    batch, head = batch_head // num_heads, batch_head % num_heads
    noisy = stream < num_noisy
    first = tile * BM
    last = tl.minimum(first + BM, num_rows) - 1
    i = tl.arange(0, BM)
    row = tl.minimum(first + i, last)

    sequences = batch_size * num_rows
    DOC_START = SPANS + batch * num_rows
    UPPER = DOC_START + tl.where(noisy, sequences, 2 * sequences)
    OWN_START = DOC_START + (NUM_SPANS - 2) * sequences
    OWN_END = OWN_START + sequences
    full_start, full_end, left, num_left, num_right, own, num_own = key_tiles(
        DOC_START, UPPER, OWN_START, OWN_END, first, last, noisy, BN
    )

    row0 = stream * num_rows + first
    limit = stream * num_rows + num_rows
    q = load_tile(Q, batch, head, row0, limit, q_b, q_n, q_h, BM, D, True, False)
    grad = load_tile(GRAD, batch, head, row0, limit, g_b, g_n, g_h, BM, D, True, False)
    valid = first + i < num_rows
    statistics = batch_head.to(tl.int64) * (num_streams * num_rows) + row0 + i
    # exp2(score − inf) is 0: rows that do not exist have no weights.
    lse = tl.load(LSE + statistics, mask=valid, other=float("inf"))
    delta = tl.load(DELTA + statistics, mask=valid, other=0.0)
    group = head // GROUP
    clean0 = num_noisy * num_rows
    dq = tl.zeros([BM, D], tl.float32)
    for n0 in range(full_start, full_end, BN):
        k = load_tile(K, batch, group, clean0 + n0, num_keys, k_b, k_n, k_h, BN, D, False, TMA)
        v = load_tile(V, batch, group, clean0 + n0, num_keys, v_b, v_n, v_h, BN, D, False, TMA)
        dq = _query_step(dq, q, grad, lse, delta, k, v, True, scale_log2, False, PRECISION)

    doc_start, upper = tl.load(DOC_START + row), tl.load(UPPER + row)
    own_start, own_end = tl.load(OWN_START + row), tl.load(OWN_END + row)
    for j in tl.range(0, num_left + num_right + num_own, num_stages=1):
        n0, is_own = partial_tile(j, full_end, left, num_left, num_right, own, BN)
        key0 = tl.where(is_own, stream * num_rows, clean0) + n0
        k = load_tile(K, batch, group, key0, num_keys, k_b, k_n, k_h, BN, D, True, TMA)
        v = load_tile(V, batch, group, key0, num_keys, v_b, v_n, v_h, BN, D, True, TMA)
        n = (n0 + tl.arange(0, BN))[None, :]
        seen = (n >= tl.where(is_own, own_start, doc_start)[:, None]) & (n < tl.where(is_own, own_end, upper)[:, None])
        dq = _query_step(dq, q, grad, lse, delta, k, v, seen, scale_log2, True, PRECISION)

    base = DQ + batch.to(tl.int64) * dq_b + head.to(tl.int64) * dq_h + row0.to(tl.int64) * dq_n
    pointers = base + i[:, None] * dq_n + tl.arange(0, D)[None, :]
    tl.store(pointers, (dq * scale).to(DQ.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _key_step(
    dk, dv, k, v, Q, GRAD, DQ, LSE, DELTA, START, END, n, m0, row0, batch, head, num_heads, num_rows, total_rows,
    scale_log2, q_b, q_n, q_h, g_b, g_n, g_h, dq_b, dq_n, dq_h,
    BM: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv, without the scale, what the BM rows from m0 of one head and stream give; with FUSED also to DQ.

    START and END bound the keys that each row of the stream sees; row0 is the stream's first row in q.
    """
    m = m0 + tl.arange(0, BM)
    valid = m < num_rows
    q = load_tile(Q, batch, head, row0 + m0, row0 + num_rows, q_b, q_n, q_h, BM, D, MASKED, TMA)
    statistics = (batch * num_heads + head).to(tl.int64) * total_rows + row0 + m
    lse = tl.load(LSE + statistics, mask=valid, other=float("inf")) if MASKED else tl.load(LSE + statistics)
    weights = tl.math.exp2(tl.dot(k, q.T, input_precision=PRECISION) * scale_log2 - lse[None, :])
    if MASKED:
        row = tl.minimum(m, num_rows - 1)
        seen = (tl.load(START + row)[None, :] <= n[:, None]) & (n[:, None] < tl.load(END + row)[None, :])
        weights = tl.where(seen, weights, 0.0)
    grad = load_tile(GRAD, batch, head, row0 + m0, row0 + num_rows, g_b, g_n, g_h, BM, D, MASKED, TMA)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
    delta = tl.load(DELTA + statistics, mask=valid, other=0.0) if MASKED else tl.load(DELTA + statistics)
    grad_scores = (weights * (tl.dot(v, grad.T, input_precision=PRECISION) - delta[None, :])).to(k.dtype)
    dk = tl.dot(grad_scores, q, dk, input_precision=PRECISION)
    if FUSED:
        dq = tl.dot(grad_scores.T, k, input_precision=PRECISION)
        if TMA:
            DQ.atomic_add([batch, head, row0 + m0, 0], dq.reshape([1, 1, BM, D]))
        else:
            base = DQ + batch.to(tl.int64) * dq_b + head.to(tl.int64) * dq_h + (row0 + m0).to(tl.int64) * dq_n
            pointers = base + tl.arange(0, BM)[:, None] * dq_n + tl.arange(0, D)[None, :]
            tl.atomic_add(pointers, dq, mask=valid[:, None], sem="relaxed")
    return dk, dv


@triton.jit
def _store_key_gradients(
    DK,
    DV,
    dk,
    dv,
    scale,
    batch,
    group,
    key0,
    valid,
    dk_b,
    dk_n,
    dk_h,
    dv_b,
    dv_n,
    dv_h,
    BN: tl.constexpr,
    D: tl.constexpr,
):
    """Store the gradients of one tile of keys; dk gets its scale here."""
    i, d = tl.arange(0, BN)[:, None], tl.arange(0, D)[None, :]
    base = DK + batch.to(tl.int64) * dk_b + group.to(tl.int64) * dk_h + key0.to(tl.int64) * dk_n
    tl.store(base + i * dk_n + d, (dk * scale).to(DK.dtype.element_ty), mask=valid[:, None])
    base = DV + batch.to(tl.int64) * dv_b + group.to(tl.int64) * dv_h + key0.to(tl.int64) * dv_n
    tl.store(base + i * dv_n + d, dv.to(DV.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _rows_below(SPAN, num_rows, low, high, SCAN: tl.constexpr):
    """Count the rows with a SPAN of at most `low`, and of at most `high`.

    SPAN never decreases, so the counts are the indices where those rows end. All rows are compared, SCAN at a time:
    these loads do not wait for each other, as those of a binary search would.
    """
    at_low = tl.zeros([SCAN], tl.int32)
    at_high = tl.zeros([SCAN], tl.int32)
    for r in tl.range(0, num_rows, SCAN, num_stages=1):
        row = r + tl.arange(0, SCAN)
        span = tl.load(SPAN + row, mask=row < num_rows, other=2147483647)
        at_low += (span <= low).to(tl.int32)
        at_high += (span <= high).to(tl.int32)
    return tl.sum(at_low, 0), tl.sum(at_high, 0)


@triton.jit
def clean_key_gradient_kernel(
    Q, K, V, GRAD, DQ, DK, DV, LSE, DELTA, SPANS,
    scale, scale_log2, batch_size, num_heads, num_rows, num_noisy, num_streams, num_keys,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, g_b, g_n, g_h, dq_b, dq_n, dq_h, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of clean keys, from all streams and all query heads that share the key/value head."""
    clean0 = num_noisy * num_rows
    tiles = tl.cdiv(num_keys - clean0, BN)
    n0 = tl.program_id(0) % tiles * BN
    batch_group = tl.program_id(0) // tiles
    num_groups = num_heads // GROUP
    batch, group = batch_group // num_groups, batch_group % num_groups
    n = n0 + tl.arange(0, BN)
    last = tl.minimum(n0 + BN, num_keys - clean0) - 1
    k = load_tile(K, batch, group, clean0 + n0, num_keys, k_b, k_n, k_h, BN, D, True, False)
    v = load_tile(V, batch, group, clean0 + n0, num_keys, v_b, v_n, v_h, BN, D, True, False)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)

    # Spans never decrease, so the rows that see key n are a range: from the first with upper > n to the last with
    # doc_start <= n. Over the keys [n0, last] of the tile this gives the rows that see any key and that see all keys.
    sequences = batch_size * num_rows
    DOC_START = SPANS + batch * num_rows
    full_stop, seen_stop = _rows_below(DOC_START, num_rows, n0, last, SCAN)
    for stream in tl.range(0, num_streams, num_stages=1):
        UPPER = DOC_START + tl.where(stream < num_noisy, sequences, 2 * sequences)
        seen_start, full_start = _rows_below(UPPER, num_rows, n0, last, SCAN)
        full_start = tl.cdiv(full_start, BM) * BM
        full_end = tl.maximum(full_stop // BM * BM, full_start)
        left = seen_start // BM * BM
        num_left = (full_start - left) // BM
        num_partial = num_left + tl.maximum(tl.cdiv(seen_stop - full_end, BM), 0)
        num_full = (full_end - full_start) // BM
        row0 = stream * num_rows
        for j in tl.range(0, GROUP * num_partial, num_stages=1):
            t = j % num_partial
            m0 = tl.where(t < num_left, left + t * BM, full_end + (t - num_left) * BM)
            dk, dv = _key_step(
                dk, dv, k, v, Q, GRAD, DQ, LSE, DELTA, DOC_START, UPPER, n, m0, row0, batch,
                group * GROUP + j // num_partial, num_heads, num_rows, num_streams * num_rows,
                scale_log2, q_b, q_n, q_h, g_b, g_n, g_h, dq_b, dq_n, dq_h, BM, D, True, FUSED, TMA, PRECISION,
            )  # fmt: skip
        for j in range(0, GROUP * num_full):
            dk, dv = _key_step(
                dk, dv, k, v, Q, GRAD, DQ, LSE, DELTA, DOC_START, UPPER, n, full_start + j % num_full * BM, row0, batch,
                group * GROUP + j // num_full, num_heads, num_rows, num_streams * num_rows,
                scale_log2, q_b, q_n, q_h, g_b, g_n, g_h, dq_b, dq_n, dq_h, BM, D, False, FUSED, TMA, PRECISION,
            )  # fmt: skip
    _store_key_gradients(
        DK, DV, dk, dv, scale, batch, group, clean0 + n0, n <= last, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h, BN, D
    )


@triton.jit
def noisy_key_gradient_kernel(
    Q, K, V, GRAD, DQ, DK, DV, LSE, DELTA, SPANS,
    scale, scale_log2, batch_size, num_heads, num_rows, num_noisy, num_streams, num_keys,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, g_b, g_n, g_h, dq_b, dq_n, dq_h, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h,
    NUM_SPANS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    FUSED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of noisy keys, which only rows of the same block and the same copy see."""
    tiles = tl.cdiv(num_rows, BN)
    n0 = tl.program_id(0) % tiles * BN
    copy = tl.program_id(0) // tiles % num_noisy
    batch_group = tl.program_id(0) // (tiles * num_noisy)
    num_groups = num_heads // GROUP
    batch, group = batch_group // num_groups, batch_group % num_groups
    n = n0 + tl.arange(0, BN)
    last = tl.minimum(n0 + BN, num_rows) - 1
    row0 = copy * num_rows
    k = load_tile(K, batch, group, row0 + n0, row0 + num_rows, k_b, k_n, k_h, BN, D, True, False)
    v = load_tile(V, batch, group, row0 + n0, row0 + num_rows, v_b, v_n, v_h, BN, D, True, False)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)

    OWN_START = SPANS + (NUM_SPANS - 2) * batch_size * num_rows + batch * num_rows
    OWN_END = OWN_START + batch_size * num_rows
    # The rows of a block are the positions of its keys, so the keys' own spans give the rows.
    start = tl.load(OWN_START + n0) // BM * BM
    num_tiles = tl.cdiv(tl.load(OWN_END + last) - start, BM)
    for j in range(0, GROUP * num_tiles):
        dk, dv = _key_step(
            dk, dv, k, v, Q, GRAD, DQ, LSE, DELTA, OWN_START, OWN_END, n, start + j % num_tiles * BM, row0, batch,
            group * GROUP + j // num_tiles, num_heads, num_rows, num_streams * num_rows,
            scale_log2, q_b, q_n, q_h, g_b, g_n, g_h, dq_b, dq_n, dq_h, BM, D, True, FUSED, TMA, PRECISION,
        )  # fmt: skip
    _store_key_gradients(
        DK, DV, dk, dv, scale, batch, group, row0 + n0, n <= last, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h, BN, D
    )
