"""Run one stage of a pipeline of three: batches and errors of the first stage must reach all of them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bd3_scale.data.batch import Batch, collate
from bd3_scale.data.pipeline import PipelineBatches
from bd3_scale.parallel.groups import group_of_pipeline, process_groups
from bd3_scale.recipe.schema import ParallelRecipe
from bd3_scale.resilience.signals import StopRequestedError

STAGES = 3


class Untouched(Iterator[Batch]):
    """The batches of a later stage."""

    def __next__(self) -> Batch:
        raise AssertionError("a later stage reads")


def batch(number: int, sequences: int = 2, seq_len: int = 12) -> Batch:
    rng = np.random.default_rng(number)
    samples = [
        {
            "tokens": rng.integers(0, 60_000, seq_len).astype(np.uint16),
            "document_lengths": np.array([5, seq_len - 5], np.int32),
            "counted_lengths": np.array([4, seq_len - 5], np.int32),
            "shown": np.array([[0, 1]], np.int32),
        }
        for _ in range(sequences)
    ]
    ids = np.arange(sequences) + 100 * number
    keys = rng.integers(0, 2**62, sequences)
    return collate(samples, ids, ids % 7, True, epochs=ids * 0 + number, source_keys=keys)


def check_same(found: Batch, expected: Batch) -> None:
    for name, value in vars(expected).items():
        assert torch.equal(vars(found)[name], value), name


def share() -> None:
    with process_groups(ParallelRecipe(pipeline=STAGES)) as groups:
        pipeline = PipelineBatches(group_of_pipeline(groups))
        assert pipeline.reads == (dist.get_rank() == 0)
        check_that_the_first_does_not_wait(pipeline)
        check_that_streams_may_take_turns(pipeline)
        check_errors(pipeline)


def shared(pipeline: PipelineBatches, batches: Iterator[Batch]) -> Iterator[Batch]:
    return pipeline.shared(batches if pipeline.reads else Untouched())


def check_that_the_first_does_not_wait(pipeline: PipelineBatches) -> None:
    large = batch(0, sequences=64, seq_len=4096)  # more than sockets hold
    batches = shared(pipeline, iter([large, batch(1)]))
    if not pipeline.reads:
        dist.barrier()
    check_same(next(batches), large)
    if pipeline.reads:
        dist.barrier()
    check_same(next(batches), batch(1))
    assert next(batches, None) is None


def check_that_streams_may_take_turns(pipeline: PipelineBatches) -> None:
    """Check that two streams may alternate, as training and held-out batches do."""
    endless = shared(pipeline, map(batch, range(10, 20)))
    check_same(next(endless), batch(10))
    check_same(next(endless), batch(11))
    found = list(shared(pipeline, iter([batch(3, sequences=1), batch(4, seq_len=30)])))
    check_same(found[0], batch(3, sequences=1))
    check_same(found[1], batch(4, seq_len=30))
    assert list(shared(pipeline, iter([]))) == []
    check_same(next(endless), batch(12))


def check_errors(pipeline: PipelineBatches) -> None:
    for error, kind, words in (
        (ValueError("shard 3 is damaged"), ValueError, "shard 3 is damaged"),
        (FileNotFoundError("s3://corpus/x is not there"), OSError, "s3://corpus/x is not there"),
        (OSError(errno.ENOENT, "No such file", "x.mds"), FileNotFoundError, "x.mds"),
        (ConnectionError("nothing has come for 30 minutes"), ConnectionError, "30 minutes"),
        (StopRequestedError(), StopRequestedError, ""),
    ):
        batches = shared(pipeline, failing(error))
        check_same(next(batches), batch(7))
        with pytest.raises(kind, match=words):
            next(batches)
    batches = shared(pipeline, failing(KeyError("tokens")))
    next(batches)
    with pytest.raises(KeyError if pipeline.reads else RuntimeError, match="tokens"):
        next(batches)


def failing(error: BaseException) -> Iterator[Batch]:
    yield batch(7)
    raise error


def leave(rank: int) -> None:
    with process_groups(ParallelRecipe(pipeline=STAGES)) as groups:
        pipeline = PipelineBatches(group_of_pipeline(groups))
        batches = shared(pipeline, iter([batch(0), batch(1), batch(2)]))
        check_same(next(batches), batch(0))
        dist.barrier()
        if dist.get_rank() == rank:
            os._exit(0)
        if rank == 0 or pipeline.reads:
            with pytest.raises(ConnectionError, match=r"another stage of this rank's pipeline is gone, or hangs: .+"):
                list(batches)
        os._exit(0)  # nobody is left to close groups with


def end_with_an_error() -> None:
    """Check that late stages get the error of the first stage, which ends as soon as it may."""
    with process_groups(ParallelRecipe(pipeline=STAGES)) as groups:
        pipeline = PipelineBatches(group_of_pipeline(groups))
        batches = shared(pipeline, map(int, ["not a batch"]))  # type: ignore[arg-type]
        if not pipeline.reads:
            time.sleep(1)
        with pytest.raises(ValueError, match="not a batch"):
            next(batches)
        os._exit(0)
