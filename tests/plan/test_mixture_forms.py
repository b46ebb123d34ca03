"""Compare what a rank of a mixture of experts computes, sends and keeps with formulas, by hand, from its sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest

from bd3_scale.plan.forecast import UNEVEN, assemble
from bd3_scale.plan.hardware import load_hardware
from bd3_scale.plan.job import Job
from bd3_scale.plan.trace import Key, Trace
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import Recipe
from tests.plan.layouts import BASE, MOE, VOCABULARY, trace

pytestmark = pytest.mark.launch

# BASE has hidden size X, H heads and G of keys and values of size D, an MLP of MLP; B sequences of L.
X, H, G, D, MLP, B, L = 64, 4, 2, 16, 96, 2, 64
# MOE has E experts of F, K of them for a row, and a shared one of S; the first of three layers has none.
E, K, F, S, LAYERS, SPARSE = 8, 2, 32, 32, 3, 2
LOGITS = 384
ATTENTION = X * (H + 2 * G) * D + H * D * X + 2 * X + 2 * D
EXPERTS = SPARSE * E * 3 * F * X
OTHERS = LAYERS * ATTENTION + 3 * MLP * X + SPARSE * (E + 3 * S) * X + 2 * LOGITS * X + X
TENSORS = 4 + LAYERS * 12 + 4
ROUNDED = 512
# Rows of the sparse layers: the last one has only noisy rows.
ROWS = 2 * B * L + B * L

CASES: dict[str, tuple[int, dict[str, int | bool]]] = {
    "alone": (1, {}),
    "two of four": (4, {"expert": 2}),
    "sequence": (4, {"expert": 2, "tensor": 2, "sequence": True}),
}
HARDWARE = load_hardware("h100")


def tiny(world: int, parallel: dict[str, int | bool]) -> Job:
    values = {**BASE, "parallel": parallel, "model": {**BASE["model"], "num_layers": LAYERS, "moe": MOE}}
    values["train"] = BASE["train"] | {"global_batch_size": world // int(parallel.get("tensor", 1)) * B}
    recipe = Recipe.model_validate({"name": "tiny", **values})
    check_recipe(recipe, world)
    return Job(recipe, VOCABULARY, 0, world, 1)


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    return dict(zip(CASES, trace([tiny(*case) for case in CASES.values()]), strict=True))


def summed(trace: Trace, attribute: str, wanted: Callable[[Key], bool]) -> float:
    return sum(getattr(work, attribute) for key, work in trace.work.items() if wanted(key))


@pytest.mark.parametrize(("name", "tensor"), [("alone", 1), ("two of four", 1), ("sequence", 2)])
def test_flops(traces, name, tensor):
    """Check that a rank's experts get as many rows as it sends; every tensor-parallel rank routes all rows."""
    products: dict[str, float] = defaultdict(float)
    for key, work in traces[name].work.items():
        products[key.part] += work.flops * key.is_product
    assert products["experts"] == 3 * ROWS * K * 2 * X * 3 * F / tensor
    assert products["router"] == 3 * ROWS * 2 * X * E
    assert products["mlp"] == 3 * (2 * B * L * 2 * X * 3 * MLP + ROWS * 2 * X * 3 * S) / tensor


def test_the_router_multiplies_in_fp32_and_nothing_else_does(traces):
    in_fp32 = {key.part for key in traces["alone"].work if key.is_product and key.name.endswith("in fp32")}
    assert in_fp32 == {"router"}


@pytest.mark.parametrize("name", CASES)
def test_flops_that_count(traces, name):
    """Check products that run and logits that are not padding; attention counts three times its forward."""
    made: dict[str, float] = defaultdict(float)
    for key, work in traces["alone"].work.items():
        made[key.part if key.is_product else key.name] += work.flops
    layers = made["attention"] + made["mlp"] + made["router"] + made["experts"] + 3 * made["block_attention"]
    assert traces["alone"].flops == pytest.approx(layers + made["head"] * VOCABULARY.size / LOGITS, rel=1e-12)
    # The head's rows are random and differ between data-parallel ranks; rank 0 has the same rows in both.
    assert traces[name].flops == traces["alone"].flops
    assert traces[name].parameters == EXPERTS + OTHERS


def sent(trace: Trace, group: str, name: str, phase: str = "gradients") -> float:
    return sum(
        message.bytes
        for key, message in trace.messages.items()
        if (key.direction, key.name, key.phase) == (group, name, phase)
    )


@pytest.mark.parametrize("name", ["two of four", "sequence"])
def test_bytes_between_expert_parallel_ranks(traces, name):
    """Check rows that go and come back, their weights, the gradients of both, and first the number of rows."""
    copies = ROWS * K
    assert sent(traces[name], "expert", "alltoall_base_") == copies * (4 * 2 * X + 2 * 4) + SPARSE * 8 * E
    assert sent(traces["alone"], "expert", "alltoall_base_") == 0


def test_bytes_between_ranks_that_share_experts(traces):
    """Check that experts' gradients go once, in fp32, and weights return in bf16; one replica sends nothing."""
    of_rank = EXPERTS / 2
    assert sent(traces["two of four"], "expert-data", "reduce_") == 4 * of_rank
    assert sent(traces["two of four"], "expert-data", "broadcast_", "update") == 2 * of_rank
    assert sent(traces["two of four"], "data", "reduce_") == pytest.approx(4 * OTHERS, rel=0.01)
    assert sent(traces["sequence"], "expert-data", "reduce_") == 0


@pytest.mark.parametrize(("name", "tensor", "expert", "world"), [("alone", 1, 1, 1), ("two of four", 1, 2, 4)])
def test_memory_before_a_step(traces, name, tensor, expert, world):
    """Check that experts are shared out; their masters, moments and averages are divided among their replicas."""
    before = traces[name].segments[0].memory
    of_rank = OTHERS + EXPERTS / expert
    slack = TENSORS * ROUNDED
    assert before["weights"] == pytest.approx(2 * of_rank, abs=slack)
    assert before["gradients"] == pytest.approx(4 * of_rank, abs=slack)
    assert before["optimizer"] == pytest.approx(16 * (OTHERS + EXPERTS) / world, abs=slack)


def test_memory_of_rows_that_are_kept_for_backward(traces):
    """Check the memory when the head begins: copies of rows and the first products' outputs, of all sparse layers."""
    (head,) = [segment for segment in traces["two of four"].segments if segment.name == "head forward"]
    kept = ROWS * K * 2 * (X + 2 * F)
    # The orders of copies, their weights and their counts are kept, too.
    assert kept < head.memory["routed"] < kept + ROWS * K * 8 * 6 + SPARSE * 16 * ROUNDED


def test_memory_is_kept_for_rows_beyond_the_mean(traces):
    """Check ranks with different experts."""
    for name, (world, parallel) in CASES.items():
        recipe = tiny(world, parallel).recipe
        told = assemble(recipe, VOCABULARY, world, HARDWARE, {0: traces[name]})
        (rank,) = told.ranks
        uneven = UNEVEN * rank.memory["routed"] if "expert" in parallel else 0.0
        assert rank.uneven_bytes == pytest.approx(uneven, abs=1)
        with_margin = (rank.peak_bytes + uneven) * (1 + HARDWARE.fragmentation) + HARDWARE.overhead_gb * 1e9
        assert rank.card_bytes == pytest.approx(with_margin, abs=2)
        assert any("25% more rows" in note for note in told.notes) == ("expert" in parallel)


def test_sorting_is_memory_traffic(traces):
    """Check that rows are copied once for each of their experts in forward, and that a copy is read and written."""
    forward = summed(
        traces["alone"], "bytes", lambda key: (key.part, key.direction, key.name) == ("mixture", "forward", "index")
    )
    copies = ROWS * K
    # Rows go out to the experts and back, with their weights and positions.
    assert forward >= 2 * copies * 2 * 2 * X
    assert forward == pytest.approx(2 * copies * 2 * 2 * X, rel=0.2)


def test_the_host_waits_once_a_layer_for_how_many_rows_come(traces):
    waits = {name: sum(n for what, n in traces[name].waits.items() if what.startswith("gradients:")) for name in CASES}
    assert waits == {"alone": 0, "two of four": SPARSE, "sequence": SPARSE}
