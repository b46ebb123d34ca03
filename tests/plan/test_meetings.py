"""Run every rank of a layout on a fake GPU: each message is expected by its receiver, in the same order, and the golden
numbers stay the same.
"""

from __future__ import annotations

import json

import pytest

from bd3_scale.plan.matching import disagreements
from tests.plan.layouts import GOLDEN, LAYOUTS, job, measured, trace

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_meet_and_need_what_they_needed(name):
    """Check steps, an evaluation, a check of replicas and a save."""
    ranks = range(LAYOUTS[name][0])
    traces = trace([job(name, rank, beyond=True) for rank in ranks])
    assert disagreements({rank: found.order for rank, found in zip(ranks, traces, strict=True)}) == []
    assert traces[0].order
    golden = json.loads(GOLDEN.read_text())[name]
    # If the change is intended: `python -m tests.plan.layouts`.
    assert measured(traces[0]) == pytest.approx(golden, rel=0.02)


def test_the_host_never_waits_for_the_gpu_in_a_micro_batch():
    """Check that twice as many micro-batches make the host wait as often, once all counters have started."""
    names = ["ZeRO 3, TP 2", "SP 2, PP 2 x 2, tied"]
    # DeepSpeed counts two steps before it measures its speed.
    traces = trace([job(name, steps=3, more=more) for name in names for more in (0, 1)])
    for name, few, more in zip(names, traces[::2], traces[1::2], strict=True):
        assert few.waits == more.waits, name
        assert few.waits
    assert not [what for what in traces[-1].waits if what.startswith("gradients:")]
