"""How much of remote data a node has in use at a time."""

from __future__ import annotations

import math

CANONICAL_NODES = 64
SHUFFLE_BLOCK_SAMPLES = 1 << 18
# Shards at the ends of shuffle blocks are used by two of them, as measured.
_SHARED = 1.25


def node_cache_bytes(*, seq_len: int, token_bytes: int, global_batch_size: int, nodes: int) -> float:
    """Return the bytes of shards that a node of `nodes` reads from at a time, at the most.

    Each canonical node of the order reads from one shuffle block of sequences. A cache that holds fewer fetches every
    shard again and again.
    """
    canonical = math.gcd(global_batch_size, CANONICAL_NODES)
    on_a_node = -(-canonical // nodes)
    return on_a_node * SHUFFLE_BLOCK_SAMPLES * _SHARED * seq_len * token_bytes
