"""Compare the collectives and messages of all ranks of a run, before any of them runs.

A collective that one rank omits, or that two ranks call in different orders, makes a run hang for ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from bd3_scale.plan.trace import Sent


def disagreements(orders: Mapping[int, Sequence[Sent]]) -> list[str]:
    """Return what does not match between the collectives and messages of all ranks, for people; empty if all match.

    orders: the collectives and messages of each rank of the world, in their order.
    """
    collectives = {rank: [sent for sent in order if sent.peer is None] for rank, order in orders.items()}
    differences = list(_of_groups(collectives))
    # A difference within a group also causes a deadlock, whose description would say less.
    return [*(differences or _deadlock(collectives)), *_of_pairs(orders)]


def _of_groups(orders: Mapping[int, Sequence[Sent]]) -> Iterator[str]:
    """Yield the collectives of a group that are not equal on all its ranks."""
    by_group: dict[tuple[int, ...], dict[int, list[Sent]]] = defaultdict(dict)
    for rank, order in orders.items():
        for sent in order:
            by_group[sent.ranks].setdefault(rank, []).append(sent)
    for ranks, of_rank in by_group.items():
        first = of_rank.get(ranks[0], [])
        for rank in ranks[1:]:
            mine = of_rank.get(rank, [])
            for number, (a, b) in enumerate(zip(first, mine, strict=False)):
                if (a.name, a.tensors) != (b.name, b.tensors):
                    here, there = f"{a.name} of {a.tensors}", f"{b.name} of {b.tensors}"
                    yield f"ranks {ranks}: collective {number} is {here} on rank {ranks[0]} and {there} on rank {rank}"
                    break
            else:
                if len(first) != len(mine):
                    yield f"ranks {ranks}: rank {ranks[0]} has {len(first)} collectives, and rank {rank} {len(mine)}"


def _deadlock(orders: Mapping[int, Sequence[Sent]]) -> list[str]:
    """Simulate all ranks, each until the collective that it waits in, until no rank can go on; return who waits."""
    at = dict.fromkeys(orders, 0)

    def waits_in(rank: int) -> Sent | None:
        return orders[rank][at[rank]] if at[rank] < len(orders[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in orders:
            sent = waits_in(rank)
            if sent is not None and all((other := waits_in(r)) and other.ranks == sent.ranks for r in sent.ranks):
                for member in sent.ranks:
                    at[member] += 1
                moved = True
    left = {rank: sent for rank in orders if (sent := waits_in(rank)) is not None}
    return [f"rank {rank} waits for ever in {sent.name} of ranks {sent.ranks}" for rank, sent in left.items()]


def _of_pairs(orders: Mapping[int, Sequence[Sent]]) -> Iterator[str]:
    """Yield the messages between two ranks that are not received as they are sent."""
    sent_to: dict[tuple[int, int, tuple[int, ...]], list[str]] = defaultdict(list)
    received: dict[tuple[int, int, tuple[int, ...]], list[str]] = defaultdict(list)
    for rank, order in orders.items():
        for sent in order:
            if sent.peer is not None and sent.name == "send":
                sent_to[rank, sent.peer, sent.ranks].append(sent.tensors)
            elif sent.peer is not None:
                received[sent.peer, rank, sent.ranks].append(sent.tensors)
    for pair in sorted(sent_to.keys() | received.keys()):
        mine, theirs = sent_to[pair], received[pair]
        if mine != theirs:
            number = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
            what = (
                f"message {number} is {mine[number]} where {theirs[number]} is expected"
                if number is not None
                else f"{len(mine)} messages are sent and {len(theirs)} expected"
            )
            yield f"from rank {pair[0]} to rank {pair[1]}: {what}"
