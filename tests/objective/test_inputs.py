"""Compare the inputs of a rank's model with loops over sequences, copies and positions, for every context rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.attention.spans import make_spans
from bd3_scale.data.batch import Batch
from bd3_scale.diffusion.noise import Noise
from bd3_scale.model.rows import ModelInputs
from bd3_scale.objective.inputs import corrupt, masked_positions, next_tokens

MASK_ID, LENGTH, BLOCK = 99, 32, 2
CPU = torch.device("cpu")
CONTEXTS = [1, 2, 4]

# The blocks of a sequence with which documents start, besides the first.
documents = st.sets(st.integers(1, LENGTH // BLOCK - 1), max_size=4)


def batch_of(sequences: list[set[int]], seed: int = 0) -> Batch:
    """Make sequences of `documents` in which every token is a different number."""
    document_start = torch.tensor(
        [[max(s * BLOCK for s in {0, *starts} if s * BLOCK <= p) for p in range(LENGTH)] for starts in sequences],
        dtype=torch.int32,
    )
    tokens = 100 + torch.randperm(document_start.numel(), generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(len(sequences))
    return Batch(
        ids=ids,
        slots=ids,
        epochs=torch.zeros_like(ids),
        source_keys=torch.zeros_like(ids),
        tokens=tokens.view_as(document_start),
        document_start=document_start,
        positions=torch.arange(LENGTH) - document_start,
        counted=torch.ones_like(document_start, dtype=torch.bool),
        shown=torch.zeros_like(document_start, dtype=torch.bool),
    )


def noise_of(batch: Batch, seed: int) -> Noise:
    """Draw any masks and rates, the only parts of the noise that are used."""
    generator = torch.Generator().manual_seed(seed)
    rate = 0.1 + 0.9 * torch.rand(batch.tokens.shape, generator=generator)
    return Noise(torch.rand(batch.tokens.shape, generator=generator) < 0.5, rate, 1 / rate)


def places_of(rank: int, size: int) -> list[int]:
    """Return the positions of a context rank: of 2·size equal parts, the rank-th from either end, in order."""
    part = [position * 2 * size // LENGTH for position in range(LENGTH)]
    return [position for position in range(LENGTH) if min(part[position], 2 * size - 1 - part[position]) == rank]


def head_rows(inputs: ModelInputs) -> dict[int, tuple[int, float]]:
    """Return target and weight of each row of the head."""
    rows = inputs.head_rows.tolist()
    assert len(set(rows)) == len(rows)
    return dict(zip(rows, zip(inputs.targets.tolist(), inputs.weights.tolist(), strict=True), strict=True))


@pytest.mark.parametrize("size", CONTEXTS)
@pytest.mark.parametrize("copies", [1, 2])
@given(st.lists(documents, min_size=1, max_size=3), st.integers(0, 9))
@settings(max_examples=15)
def test_every_rank_holds_its_positions_of_all_streams_and_all_ranks_every_masked_token_once(
    size: int, copies: int, sequences: list[set[int]], seed: int
) -> None:
    batch = batch_of(sequences)
    noises = [noise_of(batch, seed + copy) for copy in range(copies)]
    seen = []
    for rank in range(size):
        places = places_of(rank, size)
        inputs = corrupt(batch, noises, BLOCK, mask_id=MASK_ID, device=CPU, context=(rank, size))
        tokens, expected = [], {}
        for sequence in range(len(sequences)):
            streams = []
            for copy, noise in enumerate(noises):
                for row, position in enumerate(places):
                    token = int(batch.tokens[sequence, position])
                    masked = bool(noise.masked[sequence, position])
                    streams.append(MASK_ID if masked else token)
                    if masked:
                        index = (copy * len(places) + row) * len(sequences) + sequence
                        weight = 1 / float(noise.mask_rate[sequence, position]) / copies
                        expected[index] = (token, pytest.approx(weight))
                        seen.append((copy, sequence, position))
            tokens.append(streams + [int(batch.tokens[sequence, position]) for position in places])
        assert inputs.tokens.tolist() == tokens
        assert (inputs.num_noisy, inputs.num_streams) == (copies, copies + 1)
        assert head_rows(inputs) == expected
        assert inputs.weights.dtype == torch.float32
        assert torch.equal(inputs.positions, batch.positions[:, places])
        assert torch.equal(inputs.spans[:3], make_spans(batch.document_start, BLOCK)[:, :, places])
        if size > 1:
            assert inputs.spans[3:, 0].tolist() == [
                [row - position % BLOCK for row, position in enumerate(places)],
                [row - position % BLOCK + BLOCK for row, position in enumerate(places)],
            ]
    every = [(copy, *place) for copy, noise in enumerate(noises) for place in noise.masked.nonzero().tolist()]
    assert sorted(seen) == every


@pytest.mark.parametrize("size", CONTEXTS)
@pytest.mark.parametrize("copies", [1, 2])
def test_a_block_that_is_the_sequence_needs_no_clean_stream(size: int, copies: int) -> None:
    batch = batch_of([set(), set()])
    noises = [noise_of(batch, copy) for copy in range(copies)]
    rows = 0
    for rank in range(size):
        places = places_of(rank, size)
        inputs = corrupt(batch, noises, LENGTH, mask_id=MASK_ID, device=CPU, context=(rank, size))
        noisy = [torch.where(noise.masked, MASK_ID, batch.tokens)[:, places] for noise in noises]
        assert torch.equal(inputs.tokens, torch.cat(noisy, 1))
        assert (inputs.num_noisy, inputs.num_streams) == (copies, copies)
        at_head = inputs.tokens.unflatten(1, (copies, -1)).permute(1, 2, 0).flatten()[inputs.head_rows]
        assert (at_head == MASK_ID).all()
        # Noisy keys of all ranks are treated as clean ones, and the rank has no noisy keys of its own besides.
        assert inputs.spans[:3].flatten(1).unique(dim=1).tolist() == [[0], [0], [LENGTH]]
        if size > 1:
            assert torch.equal(inputs.spans[3], inputs.spans[4])
        rows += len(inputs.head_rows)
    assert rows == sum(int(noise.masked.sum()) for noise in noises)


def test_documents_whose_blocks_the_ranks_would_cut_are_refused() -> None:
    batch = batch_of([set()])
    batch.document_start[:, LENGTH // 4 - 1 :] = LENGTH // 4 - 1
    noises = [noise_of(batch, 0)]
    corrupt(batch, noises, BLOCK, mask_id=MASK_ID, device=CPU)
    with pytest.raises(ValueError, match="cuts a block of sequence 0"):
        corrupt(batch, noises, BLOCK, mask_id=MASK_ID, device=CPU, context=(1, 2))


@pytest.mark.parametrize("size", CONTEXTS)
@given(st.lists(documents, min_size=1, max_size=3))
@settings(max_examples=15)
def test_each_token_predicts_the_next_one_of_its_document(size: int, sequences: list[set[int]]) -> None:
    batch = batch_of(sequences)
    predictions = []
    for rank in range(size):
        places = places_of(rank, size)
        inputs = next_tokens(batch, device=CPU, context=(rank, size))
        assert torch.equal(inputs.tokens, batch.tokens[:, places])
        assert torch.equal(inputs.positions, batch.positions[:, places])
        assert (inputs.num_noisy, inputs.num_streams) == (0, 1)
        assert inputs.spans[2, 0].tolist() == [position + 1 for position in places]
        for index, (target, weight) in head_rows(inputs).items():
            row, sequence = divmod(index, len(sequences))
            predictions.append((sequence, places[row], target))
            assert weight == 1
    expected = []
    for sequence, starts in enumerate(sequences):
        for position in range(LENGTH - 1):
            if position + 1 not in {start * BLOCK for start in starts}:
                expected.append((sequence, position, int(batch.tokens[sequence, position + 1])))
    assert sorted(predictions) == expected


@pytest.mark.parametrize("size", CONTEXTS)
@given(st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=15)
def test_masked_positions_follow_the_rows_of_the_head(size: int, sequences: int, seed: int) -> None:
    batch = batch_of([set()] * sequences)
    noise = noise_of(batch, seed)
    for rank in range(size):
        inputs = corrupt(batch, [noise], BLOCK, mask_id=MASK_ID, device=CPU, context=(rank, size))
        sequence, position = masked_positions(noise, (rank, size))
        rows = inputs.head_rows.tolist()
        assert sequence.tolist() == [row % sequences for row in rows]
        assert position.tolist() == [places_of(rank, size)[row // sequences] for row in rows]


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_token_that_is_shown_is_predicted_by_none_and_counted_by_no_rank(context):
    plain = batch_of([set(), {3, 9}])
    shown = torch.rand(plain.tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    batch = replace(plain, shown=shown)
    targets, trained = [], torch.zeros(2, dtype=torch.int64)
    for rank in range(context):
        inputs = next_tokens(batch, device=CPU, context=(rank, context))
        targets += inputs.targets.tolist()
        trained += torch.tensor(inputs.trained_tokens)
    first = batch.document_start == torch.arange(LENGTH)
    assert sorted(targets) == sorted(batch.tokens[~shown & ~first].tolist())
    assert trained.tolist() == (~shown).sum(1).tolist()
