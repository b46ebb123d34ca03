"""Check that runs that would hang are found."""

from __future__ import annotations

from bd3_scale.plan.matching import disagreements
from bd3_scale.plan.trace import Sent


def collective(*ranks: int, name: str = "allreduce_", tensors: str = "float32[4]") -> Sent:
    return Sent(ranks, name, tensors, None)


def send(ranks: tuple[int, ...], peer: int, tensors: str = "bfloat16[2]") -> Sent:
    return Sent(ranks, "send", tensors, peer)


def receive(ranks: tuple[int, ...], peer: int, tensors: str = "bfloat16[2]") -> Sent:
    return Sent(ranks, "recv_", tensors, peer)


def test_ranks_that_meet():
    both = [collective(0, 1), collective(0, 1, name="broadcast_")]
    assert disagreements({0: [*both, send((0, 1), 1)], 1: [receive((0, 1), 0), *both]}) == []


def test_another_shape_and_another_number():
    (found,) = disagreements({0: [collective(0, 1)], 1: [collective(0, 1, tensors="float32[5]")]})
    assert "float32[4] on rank 0" in found
    assert "float32[5] on rank 1" in found
    assert (
        "rank 0 has 2 collectives, and rank 1 1" in disagreements({0: [collective(0, 1)] * 2, 1: [collective(0, 1)]})[0]
    )


def test_a_rank_that_takes_no_part():
    found = disagreements({0: [collective(0, 1, 2)], 1: [collective(0, 1, 2)], 2: []})
    assert found == ["ranks (0, 1, 2): rank 0 has 1 collectives, and rank 2 0"]


def test_groups_that_wait_for_each_other():
    """Check groups whose ranks agree on the group's collectives, but which wait for each other."""
    orders = {
        0: [collective(0, 1), collective(0, 2)],
        1: [collective(1, 2), collective(0, 1)],
        2: [collective(0, 2), collective(1, 2)],
    }
    assert len(disagreements(orders)) == 3


def test_messages_that_are_not_expected():
    assert disagreements({0: [send((0, 1), 1)], 1: []}) == ["from rank 0 to rank 1: 1 messages are sent and 0 expected"]
    (found,) = disagreements({0: [send((0, 1), 1)], 1: [receive((0, 1), 0, "bfloat16[3]")]})
    assert "bfloat16[2] where bfloat16[3] is expected" in found
