"""Draw random attention problems for the tests of every backend."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from bd3_scale.attention.dispatch import block_attention
from bd3_scale.attention.reference import dense_mask
from bd3_scale.attention.spans import make_spans, take_ranges


class Problem(NamedTuple):
    """Shapes and packing of one call of `block_attention`. Its numbers follow from `seed`."""

    documents: list[list[int]]  # the lengths of every sequence's documents
    block_sizes: list[int]  # of every sequence
    ranges: list[tuple[int, int]] | None  # positions of a context-parallel rank
    num_noisy: int
    clean_queries: bool
    clean_stream: bool
    heads: int
    groups: int
    head_dim: int
    seed: int

    @property
    def seq_len(self) -> int:
        return sum(self.documents[0])

    def whole_spans(self) -> Tensor:
        starts = [document_start(lengths) for lengths in self.documents]
        return torch.cat([make_spans(s[None], n) for s, n in zip(starts, self.block_sizes, strict=True)], 1)

    def spans(self) -> Tensor:
        whole = self.whole_spans()
        return whole if self.ranges is None else take_ranges(whole, self.ranges)

    def mask(self) -> Tensor:
        """Return which query row sees which key row, by `dense_mask`: [B, rows, keys]."""
        num_keys = self.seq_len if self.clean_stream else 0
        return dense_mask(self.spans(), num_noisy=self.num_noisy, num_keys=num_keys, clean_queries=self.clean_queries)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v and the output's gradient in `dtype`; bfloat16 numbers, so that each precision has the
        same."""
        generator = torch.Generator().manual_seed(self.seed)
        batch, rows = len(self.documents), self.spans().shape[2]
        num_queries = (self.num_noisy + self.clean_queries) * rows
        num_keys = self.num_noisy * rows + self.clean_stream * self.seq_len

        def draw(num_rows: int, num_heads: int) -> Tensor:
            x = torch.randn(batch, num_rows, num_heads, self.head_dim, generator=generator)
            return x.bfloat16().to(dtype)

        return (
            draw(num_queries, self.heads),
            draw(num_keys, self.groups),
            draw(num_keys, self.groups),
            draw(num_queries, self.heads),
        )


# Several chunks each: sequences with the same documents, with different ones, and with different block sizes.
TRAINING = Problem([[7, 190, 3, 100], [201, 99]], [8, 8], None, 1, True, True, 4, 2, 16, 0)
FORMS = {
    "training": TRAINING,
    "one document": TRAINING._replace(documents=[[300]] * 2),
    "documents of whole chunks": TRAINING._replace(documents=[[160, 140]] * 2),
    "block sizes of their own": TRAINING._replace(block_sizes=[1, 300]),
    "large blocks": TRAINING._replace(documents=[[300]] * 2, block_sizes=[100] * 2),
    "two copies": TRAINING._replace(num_noisy=2),
    "last layer": TRAINING._replace(clean_queries=False),
    "prefill": TRAINING._replace(num_noisy=0),
    "next token": TRAINING._replace(num_noisy=0, block_sizes=[1, 1]),
    "no clean stream": TRAINING._replace(clean_queries=False, clean_stream=False, block_sizes=[300] * 2),
    "a rank's rows": TRAINING._replace(documents=[[300]] * 2, ranges=[(0, 72), (224, 300)]),
}


def definition(problem: Problem) -> Tensor:
    """Return which query row sees which key row, [B, rows, keys], computed pair by pair from documents and blocks."""
    positions = [p for a, b in problem.ranges or [(0, problem.seq_len)] for p in range(a, b)]
    noisy = [(copy, position) for copy in range(problem.num_noisy) for position in positions]
    queries = noisy + [(None, position) for position in positions] * problem.clean_queries
    keys = noisy + [(None, position) for position in range(problem.seq_len)] * problem.clean_stream
    masks = []
    for lengths, block_size in zip(problem.documents, problem.block_sizes, strict=True):
        place = [(document, offset // block_size) for document, n in enumerate(lengths) for offset in range(n)]

        def sees(query: tuple[int | None, int], key: tuple[int | None, int], place: list = place) -> bool:
            (copy, (document, block)), (key_copy, (key_document, key_block)) = (
                (stream, place[position]) for stream, position in (query, key)
            )
            if document != key_document:
                return False
            if key_copy is not None:
                return copy == key_copy and block == key_block
            return key_block <= block if copy is None else key_block < block

        masks.append([[sees(query, key) for key in keys] for query in queries])
    return torch.tensor(masks, dtype=torch.bool).view(len(masks), len(queries), len(keys))


def dense_attention(problem: Problem, dtype: torch.dtype, mask: Tensor) -> list[Tensor]:
    """Return output and gradients of PyTorch's attention under a mask [B, rows, keys]; key heads are repeated."""
    *qkv, grad = (x.to(mask.device) for x in problem.tensors(dtype))
    q, k, v = (x.requires_grad_() for x in qkv)
    repeated = (x.repeat_interleave(problem.heads // problem.groups, 2).transpose(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), *repeated, attn_mask=mask[:, None]).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def errors(got: list[Tensor], want: list[Tensor]) -> dict[str, float]:
    """Return the relative error (by the norm) of the output and of each gradient."""
    found = {}
    for name, g, w in zip(("output", "gradient of q", "gradient of k", "gradient of v"), got, want, strict=False):
        # A softmax over one key has no gradient; what remains is rounding of terms as large as the output.
        size = float(w.norm()) + 0.1 * float(want[0].norm())
        error = float((g.double() - w).norm())
        found[name] = error / size if size else error
    return found


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    """Check that outputs and gradients each differ by at most `tolerance` of their norm."""
    for name, error in errors(got, want).items():
        assert error <= tolerance, f"{name}: {error:.1e} of its norm"


def document_start(lengths: list[int]) -> Tensor:
    """Return, for every position of a sequence, the position at which its document starts."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return torch.tensor(starts).repeat_interleave(torch.tensor(lengths))


def outputs_and_gradients(
    problem: Problem, dtype: torch.dtype, backend: str, spans: Tensor | None = None, *, device: str = "cpu"
) -> list[Tensor]:
    """Return output and gradients of q, k and v; `spans`, where given, replaces the problem's own."""
    *qkv, grad = (x.to(device) for x in problem.tensors(dtype))
    leaves = [x.requires_grad_() for x in qkv]
    spans = (problem.spans() if spans is None else spans).to(device)
    out = block_attention(*leaves, spans, num_noisy=problem.num_noisy, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@st.composite
def problems(draw: st.DrawFn, *, max_len: int, max_batch: int = 3, max_heads: int = 4, head_dim: int = 16) -> Problem:
    """Draw a problem: packing, block size, form, grouping of heads and the rows of a context-parallel rank."""
    seq_len = draw(st.integers(1, max_len))
    batch = draw(st.integers(1, max_batch))
    documents = [draw(_packings(seq_len)) for _ in range(batch)]
    same = draw(st.booleans())
    sizes = st.one_of(st.integers(1, min(seq_len, 8)), st.integers(1, seq_len))
    block_sizes = [draw(sizes)] * batch if same else [draw(sizes) for _ in range(batch)]
    num_noisy = draw(st.sampled_from([1, 1, 1, 2, 0]))
    clean_stream = num_noisy == 0 or draw(st.sampled_from([True, True, True, False]))
    clean_queries = clean_stream and (num_noisy == 0 or draw(st.booleans()))
    groups = draw(st.sampled_from([n for n in (1, 2) if n <= max_heads]))
    heads = groups * draw(st.integers(1, max_heads // groups))
    problem = Problem(
        documents, block_sizes, None, num_noisy, clean_queries, clean_stream, heads, groups, head_dim,
        draw(st.integers(0, 2**16)),
    )  # fmt: skip
    if clean_stream and draw(st.booleans()):
        return problem._replace(ranges=draw(_ranges(problem.whole_spans())))
    return problem


@st.composite
def _packings(draw: st.DrawFn, seq_len: int) -> list[int]:
    cuts = sorted(draw(st.sets(st.integers(1, seq_len - 1), max_size=4)) if seq_len > 1 else ())
    edges = [0, *cuts, seq_len]
    return [b - a for a, b in itertools.pairwise(edges)]


@st.composite
def _ranges(draw: st.DrawFn, spans: Tensor) -> list[tuple[int, int]]:
    """Draw one to three ranges between positions at which every sequence starts a block."""
    seq_len = spans.shape[2]
    opens = (spans[1] == torch.arange(seq_len)).all(0)
    edges = [*opens.nonzero()[:, 0].tolist(), seq_len]
    most = min(3, len(edges) // 2)
    chosen = sorted(draw(st.sets(st.sampled_from(edges), min_size=2, max_size=2 * most)))
    return list(zip(chosen[: len(chosen) // 2 * 2 : 2], chosen[1::2], strict=True))
