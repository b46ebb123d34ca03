"""Let the ranks of a run find each other, and nobody else join them.

The ranks of a local launch use a file in its private folder. Other ranks use a TCPStore, which answers everyone who can
reach its port; therefore all keys and values in it are authenticated with a secret, which is in a file that only the
user can read. In both cases all ranks then prove to each other that they know the secret, before they exchange anything
else.
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


class Rendezvous(NamedTuple):
    """The store in which ranks find each other's addresses, and their common secret; a single rank has no secret."""

    store: Store
    rank: int
    world_size: int
    secret: bytes | None


def find_ranks(secret_file: Path | None, timeout: timedelta) -> Rendezvous:
    """Wait for the ranks that the launcher's variables name; without these variables there is one rank.

    secret_file: a path that all ranks see; the first rank to come makes the file. $BD3_SCALE_SECRET overrides it.

    Raises:
        ValueError: the file is not private. RuntimeError, ConnectionError: the others do not come within `timeout`.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return Rendezvous(HashStore(), 0, 1, None)
    if folder := os.environ.get(RENDEZVOUS_VARIABLE):
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        secret = shared_secret(Path(folder, "secret"))
        joined = Rendezvous(FileStore(str(Path(folder, "ranks")), world_size), rank, world_size, secret)
    else:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        joined = _sealed(store, rank, world_size, secret_file)
    _wait_for_all(joined, timeout)
    return joined


def _sealed(store: Store, rank: int, world_size: int, secret_file: Path | None) -> Rendezvous:
    named = os.environ.get(SECRET_VARIABLE)
    if path := Path(named) if named else secret_file:
        secret = shared_secret(path)
        return Rendezvous(SealedStore(store, secret), rank, world_size, secret)
    if world_size > 1 and rank == 0:
        _LOG.warning(
            "everyone who can reach %s:%s can join these %d ranks: set %s to a path that all of them see; the file is "
            "made if it is missing",
            os.environ["MASTER_ADDR"],
            os.environ["MASTER_PORT"],
            world_size,
            SECRET_VARIABLE,
        )
    return Rendezvous(store, rank, world_size, None)


def _wait_for_all(joined: Rendezvous, timeout: timedelta) -> None:
    """Wait until all ranks have come. ConnectionError: some did not; the message names them."""
    keys = [f"bd3_scale/joined/{rank}" for rank in range(joined.world_size)]
    joined.store.set(keys[joined.rank], "")
    try:
        joined.store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [rank for rank, key in enumerate(keys) if not joined.store.check([key])]
        # A rank with another secret writes under other keys, so it looks like a missing one.
        unseen = ", or do not see the same secret file" if joined.secret is not None else ""
        raise ConnectionError(f"ranks {missing} did not come within {timeout.total_seconds():g} s{unseen}") from error


def show_secret(secret: bytes | None, group: dist.ProcessGroup | None = None) -> None:
    """Prove to the other ranks of `group` that this rank knows the secret, and check their proofs (collective).

    The secret itself is not sent: each rank answers a common challenge with an HMAC.

    ConnectionError: the proof of a rank is wrong.
    """
    if secret is None:
        return
    # Every rank adds random bytes to the challenge, so that an answer recorded in another run is of no use.
    drawn = gather_bytes(secrets.token_bytes(_SEAL_BYTES), group)
    challenge = hashlib.sha256(b"".join(drawn)).digest()

    def answer(rank: int) -> bytes:
        return hmac.digest(secret, b"rank %d of " % rank + challenge, "sha256")

    answers = gather_bytes(answer(dist.get_rank(group)), group)
    if wrong := [rank for rank, given in enumerate(answers) if not hmac.compare_digest(given, answer(rank))]:
        raise ConnectionError(
            f"ranks {wrong} do not know the secret of this run: other programs use its ports, or its ranks do not see "
            "the same secret file"
        )


class SealedStore(Store):
    """A store whose keys and values are authenticated with a secret: others can delete values, but not forge them.

    Only `add` keeps a plain number, because the server must add to it; no address is exchanged by it.
    """

    def __init__(self, store: Store, secret: bytes) -> None:
        super().__init__()
        self._store: Any = store  # torch's stubs lack a part of it
        self._secret = secret
        # torch's C++ code calls `clone` and does not keep the Python object alive.
        self._clones: list[SealedStore] = []

    def _key(self, key: str) -> str:
        return hmac.digest(self._secret, b"key " + key.encode(), "sha256").hex()

    def _seal(self, key: str, value: bytes) -> bytes:
        return hmac.digest(self._secret, b"value " + hashlib.sha256(key.encode()).digest() + value, "sha256")

    def set(self, key: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._store.set(self._key(key), self._seal(key, data) + data)

    def get(self, key: str) -> bytes:
        """Return a value. ConnectionError: it was not written by a rank of this run."""
        sealed = self._store.get(self._key(key))
        seal, value = sealed[:_SEAL_BYTES], sealed[_SEAL_BYTES:]
        if not hmac.compare_digest(seal, self._seal(key, value)):
            raise ConnectionError(
                f"the value of {key} was not written by a rank of this run: another program uses its port"
            )
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
        """Return False: the further methods of the extended interface would bypass the authentication."""
        return False

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    def clone(self) -> SealedStore:
        self._clones.append(SealedStore(self._store.clone(), self._secret))
        return self._clones[-1]

    @property
    def timeout(self) -> timedelta:
        return self._store.timeout
