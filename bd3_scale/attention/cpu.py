"""Compute block attention on CPU: one scaled-dot-product attention for each chunk of positions.

The queries of a chunk are its rows of every stream, and its keys are the ranges that any of these rows sees. This takes
L² + 3L·chunk query-key pairs in place of the 4L² of a dense mask (speed-ups: see `_chunk_size`). Inside a large block
every stream gets a call of its own, whose rows all see the same keys and need no mask. FlexAttention has no backward on
CPU.

Each call is PyTorch's flash kernel for CPU (FlashAttention-2, Dao, 2023). It takes grouped query heads without copying
keys and keeps no scores; the backward makes the masks again.

Legend: B batch, R positions, S streams of query rows (noisy copies, then clean), H query heads, G key/value heads,
D head size, N rows of a call, K keys of a call (clean ones, then those of noisy copies), C noisy copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bd3_scale import processor
from bd3_scale.attention.spans import own_block

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float) -> tuple[Tensor, Tensor]:
    """Compute `block_attention` and its log-sum-exp [B, H, rows]."""
    plan = _plan_of(spans, num_noisy, q.shape[1] // spans.shape[2])
    if plan.is_causal and q.shape[1] == k.shape[1]:
        out_BHND, lse = _flash(*(_dense(x).transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=scale)
        return torch.empty_like(q).copy_(out_BHND.transpose(1, 2)), lse.contiguous()
    # Rows that see no key are in no call, so their output must be zero from the start.
    out = torch.empty_like(q) if plan.is_whole else torch.zeros_like(q)
    lse = q.new_zeros((q.shape[0], q.shape[2], q.shape[1]), dtype=_wide(q))
    q, k, v = (_dense(x) for x in (q, k, v))
    q_BSRHD, out_BSRHD, lse_BSRH1 = (_streams(x, spans) for x in (q, out, lse.transpose(1, 2).unsqueeze(3)))
    keys, values = (_Keys(x, plan, x.dtype) for x in (k, v))
    for call in plan.forward_calls:
        out_BHND, lse_BHN = _flash(
            _take(q_BSRHD, call, q.dtype),
            keys.take(call),
            values.take(call),
            attn_mask=plan.mask(call, _wide(q)),
            scale=scale,
        )
        _at(out_BSRHD, call).copy_(_by_stream(out_BHND, call))
        _at(lse_BSRH1, call).copy_(_by_stream(lse_BHN.unsqueeze(3), call))
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spans: Tensor,
    num_noisy: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v; always deterministic.

    The gradients are computed in float32 at least, except for long causal rows (see `_LONG`), for two reasons. A key
    adds up gradients from every later chunk, and sums in 16 bits would lose digits. And PyTorch's kernel takes two to
    six times as long in 16 bits for calls of few rows, with AMX and without, because it converts every score.
    """
    plan = _plan_of(spans, num_noisy, q.shape[1] // spans.shape[2])
    wide = _wide(q)
    if plan.is_causal and q.shape[1] == k.shape[1]:
        is_quick = q.dtype is torch.bfloat16 and q.shape[1] >= _LONG and processor.multiplies_bf16()
        dtype = q.dtype if is_quick else wide
        operands = (_dense(x).to(dtype).transpose(1, 2) for x in (grad_out, q, k, v, out))
        grads = zip((q, k, v), _flash_backward(*operands, lse, 0.0, True, scale=scale), strict=True)
        grad_q, grad_k, grad_v = (torch.empty_like(x).copy_(grad.transpose(1, 2)) for x, grad in grads)
        return grad_q, grad_k, grad_v
    grad_q = torch.empty_like(q, dtype=wide) if plan.is_whole else torch.zeros_like(q, dtype=wide)
    grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (k, v))
    grad_out, q, k, v, out = (_dense(x) for x in (grad_out, q, k, v, out))
    of_rows = (grad_out, q, out, lse.transpose(1, 2).unsqueeze(3), grad_q)
    *rows_BSRHD, lse_BSRH1, grad_q_BSRHD = (_streams(x, spans) for x in of_rows)
    keys, values = (_Keys(x, plan, wide) for x in (k, v))
    for call in plan.backward_calls:
        grad_out_BHND, q_BHND, out_BHND = (_take(x, call, wide) for x in rows_BSRHD)
        grad_q_BHND, grad_k_BGKD, grad_v_BGKD = _flash_backward(
            grad_out_BHND,
            q_BHND,
            keys.take(call),
            values.take(call),
            out_BHND,
            _take(lse_BSRH1, call, wide).squeeze(3),
            0.0,
            False,
            attn_mask=plan.mask(call, wide),
            scale=scale,
        )
        rows = _at(grad_q_BSRHD, call)
        rows.add_(_by_stream(grad_q_BHND, call)) if call.adds else rows.copy_(_by_stream(grad_q_BHND, call))
        plan.add(grad_k, call, grad_k_BGKD)
        plan.add(grad_v, call, grad_v_BGKD)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    """Compute `decode_attention`: in one call if all sequences see equally many keys, else one call a sequence."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    if lengths is None:
        return _decode(q, k, v, scale)
    seen = lengths.clamp(max=k.shape[1]).tolist()
    if len(set(seen)) == 1:
        return _decode(q, k[:, : seen[0]], v[:, : seen[0]], scale)
    parts = [_decode(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n], scale) for i, n in enumerate(seen)]
    return torch.cat(parts)


def _decode(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    if q.shape[2] == k.shape[2]:
        return _flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)[0].transpose(1, 2)
    # The query heads of a group become rows of one head, so that each key is read once.
    q_BGND = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out_BGND, _ = _flash(q_BGND, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out_BGND.unflatten(2, (-1, q.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)


# From this number of causal rows on, PyTorch's backward is faster in bf16 than in float32 on CPUs with bf16 products.
# One Zen 4 core, 4 heads: 51 ms against 60 ms for two sequences of 1,024 rows, but 26 ms against 21 ms for eight of
# 256; a core with AMX behaves likewise.
_LONG = 768
# Upper limit of the numbers in the masks that a plan keeps: 64 MiB in float32.
_KEPT_MASKS = 1 << 24
# A pass needs two plans, since the last layer has fewer query rows than the layers before it.
_PLANS = 2
_last_plans: list[_Plan] = []


class _Call(NamedTuple):
    """One call of the flash kernel: positions of some streams, and the keys that any of their rows sees.

    Attributes:
        positions, streams: the query rows.
        clean: the range of clean keys that any row sees in any sequence.
        copies, noisy: the noisy copies, and the range of keys in each of them, that any row sees.
        shared: the clean keys that every row sees.
        masked: false where every row sees all keys of the call.
        adds: whether the gradients of the call's rows are added to those of earlier calls.
    """

    positions: slice
    streams: slice
    clean: slice
    copies: slice
    noisy: slice
    shared: slice
    masked: bool
    adds: bool = False

    @property
    def end(self) -> int:
        """Return the end of the keys when the noisy ones are put behind the clean ones."""
        return self.clean.stop + (self.copies.stop - self.copies.start) * (self.noisy.stop - self.noisy.start)


class _Plan:
    """The calls for one set of spans, and the keys that each row sees."""

    def __init__(self, spans: Tensor, num_noisy: int, num_streams: int) -> None:
        self.spans, self.num_noisy, self.num_streams = spans.clone(), num_noisy, num_streams
        self.num_rows = spans.shape[2]
        position = torch.arange(self.num_rows, dtype=spans.dtype)
        self.is_causal = bool(not (num_noisy or spans[0].any()) and (spans[2] == position + 1).all())
        every_call = _calls(spans, num_noisy, num_streams)
        calls = [call for call in every_call if call.end > call.clean.start]
        self.is_whole = len(calls) == len(every_call)
        # Calls with later keys come first: `_Keys` overwrites the buffer behind a call's clean keys with noisy keys,
        # and no call after it may read what stood there.
        self.forward_calls, self.backward_calls = (
            sorted(some, key=lambda call: (-call.clean.stop, call.adds))
            for some in (calls, _with_common_keys_apart(calls))
        )
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        if (spans == spans[:, :1]).all():
            spans = spans[:, :1]
        doc_start, block_start, block_end = spans[:3]
        own_start, own_end = own_block(spans)
        none = torch.zeros_like(own_start)
        seen = [
            torch.stack([doc_start, block_start, own_start + copy * self.num_rows, own_end + copy * self.num_rows])
            for copy in range(num_noisy)
        ]
        seen += [torch.stack([doc_start, block_end, none, none])] * (num_streams - num_noisy)
        # Start and end of the clean keys, and of the noisy keys, that each query row sees: [4, B or 1, S, R].
        self.seen = torch.stack(seen, 2)

    def fits(self, spans: Tensor, num_noisy: int, num_streams: int) -> bool:
        """Say whether the plan was made for these spans and streams."""
        same = (num_noisy, num_streams, spans.shape) == (self.num_noisy, self.num_streams, self.spans.shape)
        return same and torch.equal(spans, self.spans)

    def mask(self, call: _Call, dtype: torch.dtype) -> Tensor | None:
        """Return an additive mask [B or 1, 1, N, K]; None where every row sees every key."""
        if not call.masked:
            return None
        mask = self._masks.get((id(call), dtype))
        if mask is None:
            mask = self._make_mask(call, dtype)
            if mask.numel() + sum(kept.numel() for kept in self._masks.values()) <= _KEPT_MASKS:
                self._masks[id(call), dtype] = mask
        return mask

    def _make_mask(self, call: _Call, dtype: torch.dtype) -> Tensor:
        before, after = (
            torch.arange(start, end, dtype=torch.int32)
            for start, end in ((call.clean.start, call.shared.start), (call.shared.stop, call.clean.stop))
        )
        copies = torch.arange(call.copies.stop, dtype=torch.int32)[:, None] * self.num_rows
        noisy = (copies + torch.arange(call.noisy.start, call.noisy.stop, dtype=torch.int32)).flatten()
        clean_start, clean_end, own_start, own_end = self.seen[:, :, call.streams, call.positions].flatten(2)[..., None]
        mask = torch.zeros(*own_end.shape[:2], call.end - call.clean.start, dtype=dtype)
        mask[..., : len(before)].masked_fill_((before < clean_start) | (before >= clean_end), -torch.inf)
        # Keys behind `shared` lie after the start of every row's document; only their end is compared.
        behind = mask[..., call.shared.stop - call.clean.start :]
        behind[..., : len(after)].masked_fill_(after >= clean_end, -torch.inf)
        behind[..., len(after) :].masked_fill_((noisy < own_start) | (noisy >= own_end), -torch.inf)
        return mask[:, None]

    def add(self, grad_BKGD: Tensor, call: _Call, piece_BGKD: Tensor) -> None:
        """Add gradients of the call's keys to those of all keys."""
        noisy, clean = grad_BKGD.tensor_split([self.num_noisy * self.num_rows], 1)
        num_clean = call.clean.stop - call.clean.start
        piece_BKGD = piece_BGKD.transpose(1, 2)
        clean[:, call.clean] += piece_BKGD[:, :num_clean]
        noisy_rows = noisy.unflatten(1, (self.num_noisy, self.num_rows))[:, call.copies, call.noisy]
        noisy_rows += piece_BKGD[:, num_clean:].unflatten(1, noisy_rows.shape[1:3])


def _plan_of(spans: Tensor, num_noisy: int, num_streams: int) -> _Plan:
    """Return the plan of these rows; all layers of a pass share it and its masks, in forward and backward."""
    for plan in _last_plans:
        if plan.fits(spans, num_noisy, num_streams):
            return plan
    plan = _Plan(spans, num_noisy, num_streams)
    _last_plans[:] = [*_last_plans[1 - _PLANS :], plan]
    return plan


def _calls(spans: Tensor, num_noisy: int, num_streams: int) -> list[_Call]:
    """Return one call for each chunk of positions, or one for each stream of a chunk that lies within one block.

    Spans never decrease from one position to the next, so a chunk's first and last position bound all others.
    """
    num_rows = spans.shape[2]
    chunk = _chunk_size(spans)
    first = torch.arange(0, num_rows, chunk)
    last = (first + chunk - 1).clamp(max=num_rows - 1)
    lowest, highest = spans[:, :, first].amin(1), spans[:, :, last].amax(1)
    # Merge neighbouring chunks that lie within one block: all their rows see the same keys.
    opens = torch.ones_like(first, dtype=torch.bool)
    opens[1:] = (lowest[:, :-1] != highest[:, 1:]).any(0)
    closes = opens.roll(-1)
    positions = zip(first[opens].tolist(), (last[closes] + 1).tolist(), strict=True)
    bounds = zip(lowest[:, opens].T.tolist(), highest[:, closes].T.tolist(), strict=True)
    calls = []
    for (start, end), (low, high) in zip(positions, bounds, strict=True):
        masked = low != high
        shared = slice(high[0], low[1])
        for first_stream in range(1 if masked else num_streams):
            streams = slice(first_stream, num_streams if masked else first_stream + 1)
            copies = slice(first_stream, min(streams.stop, num_noisy))
            # Noisy rows do not see the clean keys of their own block, so their clean keys end at block_start.
            clean = slice(low[0], high[2 if streams.stop > num_noisy else 1])
            calls.append(_Call(slice(start, end), streams, clean, copies, slice(low[-2], high[-1]), shared, masked))
    return calls


def _with_common_keys_apart(calls: list[_Call]) -> Iterator[_Call]:
    """Yield the calls; where four in a row lie within one document, their common earlier keys become one call.

    That call has four times the rows and no mask, which makes a faster matrix product, and it adds fewer gradients of
    keys: backward takes a tenth to a seventh less time. The forward cannot do this: the outputs of two calls would have
    to be combined after each was rounded.
    """
    for first in range(0, len(calls), 4):
        group = calls[first : first + 4]
        common = group[0].shared
        if common.start < common.stop and all(
            call.masked and call.clean.start == call.shared.start == common.start for call in group
        ):
            positions = slice(group[0].positions.start, group[-1].positions.stop)
            yield group[0]._replace(positions=positions, clean=common, copies=slice(0, 0), masked=False, adds=True)
            group = [
                call._replace(clean=slice(common.stop, call.clean.stop), shared=slice(common.stop, call.shared.stop))
                for call in group
            ]
        yield from group


def _chunk_size(spans: Tensor) -> int:
    """Return the number of positions of a chunk: 96, or 32 in short sequences, rounded down to whole blocks.

    Smaller chunks mask fewer pairs; larger ones make faster matrix products. PyTorch's kernel takes tiles of 64 rows
    from 192 rows on, which are 96 positions of two streams. Measured speed-up over a dense mask, forward and backward,
    head size 64, one thread of a Zen 4 core:

    - chunks of 32, 64, 96: 1.66×, 1.64×, 1.54× at 256 positions; 2.29×, 2.25×, 2.06× at 512;
    - chunks of 64, 96, 128: 3.31×, 3.30×, 3.22× at 2,048 positions; 2.73×, 3.22×, 3.17× at 4,096 in bfloat16.
    """
    _, block_start, block_end = spans[:3, 0, 0].tolist()
    size = 96 if spans.shape[2] >= 1024 else 32
    return size - size % max(block_end - block_start, 1) or size


class _Keys:
    """The keys, or the values, of each call, as views of one buffer: a call needs clean and noisy keys side by side.

    The noisy keys of a call are copied behind its clean ones, over clean keys that no later call reads.
    """

    def __init__(self, k: Tensor, plan: _Plan, dtype: torch.dtype) -> None:
        noisy, clean = k.transpose(1, 2).tensor_split([plan.num_noisy * plan.num_rows], 2)
        self.noisy_BGCRD = noisy.unflatten(2, (plan.num_noisy, plan.num_rows))
        num_keys = max([clean.shape[2], *(call.end for call in plan.forward_calls)])
        self.buffer = k.new_empty(*clean.shape[:2], num_keys, k.shape[3], dtype=dtype)
        self.buffer[:, :, : clean.shape[2]] = clean

    def take(self, call: _Call) -> Tensor:
        """Return the keys of a call, [B, G, K, D]; valid until the next call of `take`."""
        if call.copies.stop > call.copies.start:
            noisy = self.noisy_BGCRD[:, :, call.copies, call.noisy]
            self.buffer[:, :, call.clean.stop : call.end].unflatten(2, noisy.shape[2:4]).copy_(noisy)
        return self.buffer[:, :, call.clean.start : call.end]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _dense(x: Tensor) -> Tensor:
    """Return `x` with stride 1 along head_dim, which the flash kernel assumes without checking."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _streams(x_BNHD: Tensor, spans: Tensor) -> Tensor:
    """Return rows [B, S·R, H, D] as [B, S, R, H, D]."""
    return x_BNHD.unflatten(1, (-1, spans.shape[2]))


def _at(x_BSRHD: Tensor, call: _Call) -> Tensor:
    return x_BSRHD[:, call.streams, call.positions]


def _take(x_BSRHD: Tensor, call: _Call, dtype: torch.dtype) -> Tensor:
    """Return the call's rows in a dtype, [B, H, N, D], one stream after the other."""
    rows = _at(x_BSRHD, call).permute(0, 3, 1, 2, 4)
    return rows.to(dtype, memory_format=torch.contiguous_format).flatten(2, 3)


def _by_stream(x_BHND: Tensor, call: _Call) -> Tensor:
    """Return rows [B, H, N, D] of a call as [B, streams, positions, H, D]: the inverse of `_take`."""
    num_streams = call.streams.stop - call.streams.start
    return x_BHND.unflatten(2, (num_streams, -1)).permute(0, 2, 3, 1, 4)
