"""Compute softmax attention in one pass over the keys, under spans (FlashAttention-2, Dao, 2023, algorithm 1).

Scores never leave the chip: `softmax_step` keeps a running maximum `top`, a running sum `total` of exponentials and a
running output `acc`, and rescales them when the maximum grows.

Exponentials are in base 2, since exp2 is one instruction of the GPU: `scale_log2` is the scale times log2(e). The
log-sum-exp is therefore kept in base 2, too. It is −inf in a row that sees nothing; a tile with such a row is never a
full one, so only the masked body meets it.

Capitals in signatures are pointers (or descriptors) and compile-time constants; `x_b, x_n, x_h` are the strides of
batch, row and head.
"""

import triton
import triton.language as tl

from bd3_scale.attention.kernels.common import key_tiles, load_tile, partial_tile


@triton.jit
def softmax_step(acc, top, total, scores, v, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Take one tile of scores and values into the running maximum, sum and output (online softmax)."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    # −inf − (−inf) would be NaN in a row that has seen nothing yet.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    weights = tl.math.exp2(scores * scale_log2 - shift[:, None])
    decay = tl.math.exp2(top - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, SPANS,
    scale_log2, batch_size, num_heads, num_rows, num_noisy, num_streams, num_keys,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h,
    NUM_SPANS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the output and the base-2 log-sum-exp of one tile of rows of one head and stream."""
    # Neighbouring programs are the streams of one tile: they read the same clean keys, which are then in the L2 cache.
    # The last tiles see the most keys and start first, so that no long program is left alone at the end.
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
    # Rows beyond the last one repeat it, so that their spans can be loaded; they are not stored.
    row = tl.minimum(first + i, last)

    # SPANS is [NUM_SPANS, B, R]: doc_start, block_start, block_end and, on a context-parallel rank, own_start and
    # own_end. The upper bound of the clean keys is block_start for a noisy row and block_end for a clean one; the last
    # two of the NUM_SPANS are the row's own noisy block.
    sequences = batch_size * num_rows
    DOC_START = SPANS + batch * num_rows
    UPPER = DOC_START + tl.where(noisy, sequences, 2 * sequences)
    OWN_START = DOC_START + (NUM_SPANS - 2) * sequences
    OWN_END = OWN_START + sequences
    full_start, full_end, left, num_left, num_right, own, num_own = key_tiles(
        DOC_START, UPPER, OWN_START, OWN_END, first, last, noisy, BN
    )

    row0 = stream * num_rows + first
    q = load_tile(Q, batch, head, row0, stream * num_rows + num_rows, q_b, q_n, q_h, BM, D, True, False)
    group = head // GROUP
    clean0 = num_noisy * num_rows
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for n0 in range(full_start, full_end, BN):
        k = load_tile(K, batch, group, clean0 + n0, num_keys, k_b, k_n, k_h, BN, D, False, TMA)
        v = load_tile(V, batch, group, clean0 + n0, num_keys, v_b, v_n, v_h, BN, D, False, TMA)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        acc, top, total = softmax_step(acc, top, total, scores, v, scale_log2, False, PRECISION)

    doc_start, upper = tl.load(DOC_START + row), tl.load(UPPER + row)
    own_start, own_end = tl.load(OWN_START + row), tl.load(OWN_END + row)
    # One stage: there are few partial tiles, and prefetching them would take shared memory from the loop above.
    for j in tl.range(0, num_left + num_right + num_own, num_stages=1):
        n0, is_own = partial_tile(j, full_end, left, num_left, num_right, own, BN)
        key0 = tl.where(is_own, stream * num_rows, clean0) + n0
        k = load_tile(K, batch, group, key0, num_keys, k_b, k_n, k_h, BN, D, True, TMA)
        v = load_tile(V, batch, group, key0, num_keys, v_b, v_n, v_h, BN, D, True, TMA)
        n = (n0 + tl.arange(0, BN))[None, :]
        seen = (n >= tl.where(is_own, own_start, doc_start)[:, None]) & (n < tl.where(is_own, own_end, upper)[:, None])
        scores = tl.where(seen, tl.dot(q, k.T, input_precision=PRECISION), float("-inf"))
        acc, top, total = softmax_step(acc, top, total, scores, v, scale_log2, True, PRECISION)

    # A row that sees nothing: 0 / 1 is its output, and −inf + log2(1) its log-sum-exp.
    total = tl.where(total > 0.0, total, 1.0)
    out = (acc / total[:, None]).to(OUT.dtype.element_ty)
    lse = top + tl.math.log2(total)
    valid = first + i < num_rows
    base = OUT + batch.to(tl.int64) * o_b + head.to(tl.int64) * o_h + row0.to(tl.int64) * o_n
    tl.store(base + i[:, None] * o_n + tl.arange(0, D)[None, :], out, mask=valid[:, None])
    tl.store(LSE + batch_head.to(tl.int64) * (num_streams * num_rows) + row0 + i, lse, mask=valid)
