"""Compute statistics and gradient of a vocabulary-parallel cross-entropy of logits [M, V], with arithmetic in fp32."""

import triton
import triton.language as tl


@triton.jit
def row_statistics_kernel(LOGITS, TARGETS, FORBIDDEN, FOUND, num_rows, size, first_id, logits_row, BLOCK: tl.constexpr):
    """Write FOUND [3, M] of one row: maximum, Σ exp(logit − maximum), and the target's logit, in one pass.

    This is online softmax (Milakov & Gimelshein, 2018). The maximum is one number for the whole program, so that every
    logit takes one exponential; the sum stays distributed over the lanes until the end.
    """
    row = tl.program_id(0)
    base = LOGITS + row.to(tl.int64) * logits_row
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        forbidden = tl.load(FORBIDDEN + i, mask=inside, other=1)
        logits = tl.load(base + i, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(forbidden != 0, float("-inf"), logits)
        new = tl.maximum(highest, tl.max(logits, 0))
        # If all entries so far are −∞, the difference −∞ − (−∞) would be nan.
        reference = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(highest - reference) + tl.exp(logits - reference)
        highest = new
    place = tl.load(TARGETS + row) - first_id
    here = (place >= 0) & (place < size)
    place = tl.where(here, place, 0)
    own = tl.load(base + place).to(tl.float32)
    own = tl.where(tl.load(FORBIDDEN + place) != 0, float("-inf"), own)
    tl.store(FOUND + row, highest)
    tl.store(FOUND + num_rows + row, tl.sum(total, 0))
    tl.store(FOUND + 2 * num_rows + row, tl.where(here, own, 0.0))


@triton.jit
def logit_gradient_kernel(
    LOGITS, TARGETS, FORBIDDEN, LOG_TOTAL, SOFTMAX_SCALE, TARGET_SCALE, size, first_id, logits_row, BLOCK: tl.constexpr
):
    """Write LOGITS = exp(LOGITS − LOG_TOTAL) · SOFTMAX_SCALE − [is the target] · TARGET_SCALE, for BLOCK entries."""
    blocks = tl.cdiv(size, BLOCK)
    row = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    at = LOGITS + row.to(tl.int64) * logits_row + i
    forbidden = tl.load(FORBIDDEN + i, mask=inside, other=1)
    logits = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    softmax = tl.exp(logits - tl.load(LOG_TOTAL + row)) * tl.load(SOFTMAX_SCALE + row)
    is_target = i == tl.load(TARGETS + row) - first_id
    grad = tl.where(forbidden != 0, 0.0, softmax) - tl.where(is_target, tl.load(TARGET_SCALE + row), 0.0)
    tl.store(at, grad.to(LOGITS.dtype.element_ty), mask=inside)
