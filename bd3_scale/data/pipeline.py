"""Send the batches that the first stage of a pipeline reads to its other stages, which read no shard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from bd3_scale.data.batch import Batch
from bd3_scale.parallel.collective import outcome_of_error, raise_error_of
from bd3_scale.resilience.signals import StopRequestedError


class _Kind(IntEnum):
    BATCH = 0
    END = 1
    ERROR = 2
    STOP = 3


class PipelineBatches:
    """Sends batches as host messages, while the device computes.

    group: a gloo group of the stages of a pipeline, in their order, used for nothing else; None: there is one stage.
    All stages must ask for the same batches in the same order, because a message does not say which batch it is.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        # The sends under way, with their tensors: these must live until the send is complete.
        self._under_way: list[tuple[dist.Work, Tensor]] = []

    @property
    def reads(self) -> bool:
        """Return whether this rank belongs to the first stage, which reads the batches."""
        return self._group is None or self._group.rank() == 0

    def shared(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the first stage's `batches` on every stage; the iterators of later stages are not used.

        The first stage sends without waiting, but waits for the last batch to arrive before it sends the next. Errors
        of its `batches` are raised on every stage: ValueError and OSError as they are, RuntimeError for others,
        StopRequestedError if a signal ended its wait. ConnectionError: another stage is gone.
        """
        if self._group is None:
            return batches
        return self._sent(batches) if self.reads else self._received()

    def _sent(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            try:
                batch = next(batches, None)
            except StopRequestedError:
                self._send(_Kind.STOP, (0, 0), np.empty(0, np.uint8))
                raise
            except Exception as error:
                self._send(_Kind.ERROR, (1, 0), np.frombuffer(_encoded(error), np.uint8).copy())
                # After the error this rank ends and closes its connections: the message must arrive before.
                self._wait()
                raise
            if batch is None:
                self._send(_Kind.END, (0, 0), np.empty(0, np.uint8))
                return
            sequences, seq_len = batch.tokens.shape
            self._send(_Kind.BATCH, (sequences, seq_len), batch.to_bytes())
            yield batch

    def _received(self) -> Iterator[Batch]:
        while True:
            kind, size, *shape = self._receive(torch.empty(4, dtype=torch.long)).tolist()
            if kind == _Kind.END:
                return
            if kind == _Kind.STOP:
                raise StopRequestedError
            content = self._receive(torch.empty(size, dtype=torch.uint8)).numpy()
            if kind == _Kind.ERROR:
                message = json.loads(content.tobytes())
                raise_error_of(message)
                raise RuntimeError(message["failed"])
            yield Batch.from_bytes(content, *shape)

    def _send(self, kind: _Kind, shape: tuple[int, int], content: NDArray[np.uint8]) -> None:
        assert self._group is not None
        self._wait()
        parts = [torch.tensor([kind, len(content), *shape])]
        parts += [torch.from_numpy(content)] if len(content) else []
        with _peer_loss_as_connection_error():
            for part in parts:
                for stage in range(1, self._group.size()):
                    work = dist.isend(part, group=self._group, group_dst=stage)
                    assert work is not None
                    self._under_way.append((work, part))

    def _wait(self) -> None:
        with _peer_loss_as_connection_error():
            for work, _ in self._under_way:
                work.wait()
        self._under_way.clear()

    def _receive(self, into: Tensor) -> Tensor:
        with _peer_loss_as_connection_error():
            dist.recv(into, group=self._group, group_src=0)
        return into


def _encoded(error: Exception) -> bytes:
    if isinstance(error, (ValueError, OSError)):
        return json.dumps(outcome_of_error(error)).encode()
    return json.dumps({"failed": f"the first stage of this pipeline read no batch: {error!r}"}).encode()


@contextmanager
def _peer_loss_as_connection_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise ConnectionError(f"another stage of this rank's pipeline is gone, or hangs: {why}") from error
