"""Check that the embedding's gradient is the sum over each id's rows, and that the mask's sum is separate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_scale.model.config import transformer_config
from bd3_scale.model.embedding import Embedding
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import ModelRecipe, ParallelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.support.forks import run_ranks

HIDDEN = 16
ROWS, SEQUENCES = 600, 4
# 128 rows: two ranks hold 64 each.
SIZE = 128
CPU = torch.device("cpu")


class Sums(TorchDispatchMode):
    """A record of the operators that add up rows by their ids."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(("index_", "scatter", "embedding_dense")):
            self.seen.append((name, args))
        return func(*args, **(kwargs or {}))


def check(parallel: ParallelRecipe, mask_id: int, dtype: torch.dtype, groups) -> None:
    """Compare vectors and gradient with products of one-hot rows in fp64."""
    shape = ModelRecipe(num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, ffn_hidden_size=HIDDEN)
    config = transformer_config(shape, parallel, dtype=dtype, device=CPU, deterministic=True)
    vocabulary = Vocabulary(size=mask_id + 1, eos_id=1, mask_id=mask_id, rows=SIZE)
    words = Embedding(vocabulary, config, groups).word_embeddings
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, HIDDEN, generator=generator).to(dtype)
    own = slice(words.vocab_start_index, words.vocab_end_index)
    words.weight.data.copy_(weight[own])
    tokens = torch.randint(0, mask_id, (ROWS, SEQUENCES), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.5] = mask_id
    tokens[torch.rand(tokens.shape, generator=generator) < 0.05] = 0
    gradient = torch.randn(ROWS, SEQUENCES, HIDDEN, generator=generator).to(dtype)
    # Each sequence-parallel rank has a part of the rows.
    part = slice(None)
    if parallel.sequence:
        part = slice(groups.tp.rank() * ROWS // 2, (groups.tp.rank() + 1) * ROWS // 2)

    vectors = words(tokens, 1)
    assert torch.equal(vectors, weight[tokens][part])
    with Sums() as sums:
        vectors.backward(gradient[part])
    one_hot = torch.nn.functional.one_hot(tokens.flatten(), SIZE).double()
    expected = (one_hot.T @ gradient.flatten(0, 1).double())[own]
    error = (words.weight.grad.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-9)
    # On a CPU, sums of a few rows are rounded after each row, and the many rows of the mask once.
    assert error.max() < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]
    if 0 <= (row := mask_id - words.vocab_start_index) < len(expected):
        assert error[row] < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    ((name, (_, places, _, left_out, _)),) = sums.seen
    assert name == "embedding_dense_backward"
    summed = places[places != left_out] + words.vocab_start_index
    assert len(summed) < 0.6 * tokens.numel()
    assert mask_id not in summed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_is_the_sum_of_each_ids_rows(groups, dtype: torch.dtype) -> None:
    check(ParallelRecipe(), 101, dtype, groups)


def test_so_is_that_of_a_rank_that_holds_a_range_of_ids(tmp_path: Path) -> None:
    run_ranks(check_on_two_ranks, 2, logs=tmp_path)


def check_on_two_ranks() -> None:
    with process_groups(ParallelRecipe(tensor=2)) as groups:
        for sequence in (False, True):
            for mask_id in (101, 63, 64):
                check(ParallelRecipe(tensor=2, sequence=sequence), mask_id, torch.float64, groups)
