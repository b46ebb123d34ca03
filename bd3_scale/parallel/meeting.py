"""How the ranks of a run find each other, so that nobody else can join them.

The ranks of a local launch meet in a file of its private folder. Others meet through a TCPStore, which answers whoever
can reach it: what is in it is sealed with a secret that lies in a file of the user's own. In both cases all ranks then
show each other that they know the secret, before they exchange anything else.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import FileStore, HashStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from bd3_scale.parallel.collective import gather_bytes
from bd3_scale.resilience.secret import RENDEZVOUS_VARIABLE, SECRET_VARIABLE, shared_secret

_LOG = logging.getLogger(__name__)
_SEAL_BYTES = 32


class Meeting(NamedTuple):
    """Where ranks find each other's addresses, and what they know each other by; no secret where one is alone."""

    store: Store
    rank: int
    world_size: int
    secret: bytes | None


def meet(secret_file: Path | None, timeout: timedelta) -> Meeting:
    """Wait for the ranks that the launcher's variables name; alone where there are none.

    secret_file: seen by all ranks; made by the first of them. $BD3_SCALE_SECRET names another.

    Raises:
        ValueError: the file is not private. RuntimeError, ConnectionError: the others do not come within `timeout`.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return Meeting(HashStore(), 0, 1, None)
    if folder := os.environ.get(RENDEZVOUS_VARIABLE):
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        secret = shared_secret(Path(folder, "secret"))
        found = Meeting(FileStore(str(Path(folder, "ranks")), world_size), rank, world_size, secret)
    else:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        found = _sealed(store, rank, world_size, secret_file)
    _wait_for_all(found, timeout)
    return found


def _sealed(store: Store, rank: int, world_size: int, secret_file: Path | None) -> Meeting:
    named = os.environ.get(SECRET_VARIABLE)
    if path := Path(named) if named else secret_file:
        secret = shared_secret(path)
        return Meeting(SealedStore(store, secret), rank, world_size, secret)
    if world_size > 1 and rank == 0:
        _LOG.warning(
            "whoever can reach %s:%s can join these %d ranks: set %s to a file that all of them see, which is made "
            "where it is missing",
            os.environ["MASTER_ADDR"],
            os.environ["MASTER_PORT"],
            world_size,
            SECRET_VARIABLE,
        )
    return Meeting(store, rank, world_size, None)


def _wait_for_all(meeting: Meeting, timeout: timedelta) -> None:
    """ConnectionError that names who is missing."""
    keys = [f"bd3_scale/joined/{rank}" for rank in range(meeting.world_size)]
    meeting.store.set(keys[meeting.rank], "")
    try:
        meeting.store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [rank for rank, key in enumerate(keys) if not meeting.store.check([key])]
        unseen = ", or do not see the same secret file" if meeting.secret is not None else ""
        raise ConnectionError(f"ranks {missing} did not come within {timeout.total_seconds():g} s{unseen}") from error


def show_secret(secret: bytes | None, group: dist.ProcessGroup | None = None) -> None:
    """Every rank of `group` shows the others that it knows the secret, which itself does not travel (collective).

    ConnectionError: a rank does not.
    """
    if secret is None:
        return
    # Drawn anew by every rank: what somebody has overheard of another meeting is no answer.
    drawn = gather_bytes(secrets.token_bytes(_SEAL_BYTES), group)
    told = hashlib.sha256(b"".join(drawn)).digest()

    def answer(rank: int) -> bytes:
        return hmac.digest(secret, b"rank %d of " % rank + told, "sha256")

    answers = gather_bytes(answer(dist.get_rank(group)), group)
    if wrong := [rank for rank, given in enumerate(answers) if not hmac.compare_digest(given, answer(rank))]:
        raise ConnectionError(
            f"ranks {wrong} do not know the secret of this run: strangers take its ports, or its ranks do not see the "
            "same file"
        )


class SealedStore(Store):
    """A store whose keys and values are sealed with a secret: others who reach it can take values away, not make any.

    `add` alone keeps a plain number, as the server must add to it; no address is agreed on by it.
    """

    def __init__(self, store: Store, secret: bytes) -> None:
        super().__init__()
        self._store: Any = store  # torch's stubs lack a part of it
        self._secret = secret
        self._clones: list[SealedStore] = []  # C++ code that asks for one does not keep it alive

    def _key(self, key: str) -> str:
        return hmac.digest(self._secret, b"key " + key.encode(), "sha256").hex()

    def _seal(self, key: str, value: bytes) -> bytes:
        return hmac.digest(self._secret, b"value " + hashlib.sha256(key.encode()).digest() + value, "sha256")

    def set(self, key: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._store.set(self._key(key), self._seal(key, data) + data)

    def get(self, key: str) -> bytes:
        """ConnectionError: the value is none that a rank of this run has put there."""
        sealed = self._store.get(self._key(key))
        seal, value = sealed[:_SEAL_BYTES], sealed[_SEAL_BYTES:]
        if not hmac.compare_digest(seal, self._seal(key, value)):
            raise ConnectionError(f"what {key} holds was not written by a rank of this run: a stranger takes its port")
        return value

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def add(self, key: str, amount: int) -> int:
        return self._store.add(self._key(key), amount)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        hidden = [self._key(key) for key in keys]
        self._store.wait(hidden, self._store.timeout if timeout is None else timeout)

    def check(self, keys: Sequence[str]) -> bool:
        return self._store.check([self._key(key) for key in keys])

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(self._key(key))

    def num_keys(self) -> int:
        return self._store.num_keys()

    def has_extended_api(self) -> bool:
        """What the extended interface has beyond this one would pass by the seal."""
        return False

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    def clone(self) -> SealedStore:
        self._clones.append(SealedStore(self._store.clone(), self._secret))
        return self._clones[-1]

    @property
    def timeout(self) -> timedelta:
        return self._store.timeout
