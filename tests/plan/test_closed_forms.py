"""Compare what a traced rank computes, sends and keeps with formulas: of a plain layer, by hand, from its sizes."""

from __future__ import annotations

from collections import defaultdict

import pytest

from bd3_scale.plan.job import Job
from bd3_scale.plan.samples import samples
from bd3_scale.plan.trace import Trace, combine
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import Recipe
from tests.plan.layouts import BASE, VOCABULARY, trace

pytestmark = pytest.mark.launch

# BASE has two layers of hidden size X, H heads and G of keys and values of size D, an MLP of F; B sequences of L.
LAYERS, X, H, G, D, F, B, L, BLOCK = 2, 64, 4, 2, 16, 96, 2, 64, 8
# Rows of logits are padded to a multiple of 128.
LOGITS = 384
QUERIES, KEYS = H * D, 2 * G * D
LAYER_PARAMETERS = X * (QUERIES + KEYS) + QUERIES * X + X * 2 * F + F * X + 2 * X + 2 * D
PARAMETERS = 2 * LOGITS * X + LAYERS * LAYER_PARAMETERS + X
ROUNDED = 512

# Each noisy row sees its block and the clean ones before it; each clean row sees its block and those before it.
NOISY_PAIRS = B * sum(BLOCK + i // BLOCK * BLOCK for i in range(L))
CLEAN_PAIRS = B * sum((i // BLOCK + 1) * BLOCK for i in range(L))

RECOMPUTED = "ZeRO 3, recomputed"
CASES: dict[str, tuple[int, dict[str, int | bool]]] = {
    "alone": (1, {}),
    "context": (2, {"context": 2}),
    "sequence": (4, {"tensor": 2, "sequence": True}),
    RECOMPUTED: (2, {"zero_stage": 3}),
}


def tiny(world: int, parallel: dict, recompute: str = "none", **model: int) -> Job:
    values = {**BASE, "parallel": parallel, "model": {**BASE["model"], "qk_norm": True, **model}}
    replicas = world // (parallel.get("tensor", 1) * parallel.get("context", 1) * parallel.get("pipeline", 1))
    micro_batches = parallel.get("pipeline", 1)
    values["train"] = BASE["train"] | {"global_batch_size": replicas * B * micro_batches, "recompute": recompute}
    recipe = Recipe.model_validate({"name": "tiny", **values})
    check_recipe(recipe, world)
    return Job(recipe, VOCABULARY, 0, world, micro_batches)


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    jobs = [tiny(*case, "full" if name == RECOMPUTED else "none") for name, case in CASES.items()]
    return dict(zip(CASES, trace(jobs), strict=True))


def flops(trace: Trace) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for key, work in trace.work.items():
        # The product itself adds a weight's gradient to its sum.
        found[key.part if key.name in ("mm", "addmm") else key.name] += work.flops
    return found


@pytest.mark.parametrize(("name", "ranks"), [("alone", 1), ("context", 2), ("sequence", 2)])
def test_flops(traces, name, ranks):
    """Check three times the forward pass; attention has 5 products in backward, since it recomputes the scores, and 2
    in forward."""
    noisy, clean = B * L, B * L
    # In the last layer, clean rows only give keys and values.
    rows = (LAYERS - 1) * (noisy + clean) + noisy
    pairs = (LAYERS - 1) * (NOISY_PAIRS + CLEAN_PAIRS) + NOISY_PAIRS
    projections = rows * 2 * X * (2 * QUERIES) + LAYERS * (noisy + clean) * 2 * X * KEYS
    found = flops(traces[name])
    assert found["attention"] == 3 * projections / ranks
    assert found["mlp"] == 3 * rows * 2 * X * 3 * F / ranks
    assert found["block_attention"] == 4 * QUERIES * pairs / ranks
    assert found["block_attention_backward"] == 10 * QUERIES * pairs / ranks


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_recomputed_flops(traces, part):
    """Check that recomputation costs as many FLOPs as forward, and is counted separately."""
    by_direction: dict[str, float] = defaultdict(float)
    for key, work in traces[RECOMPUTED].work.items():
        by_direction[key.direction] += work.flops * (key.part == part and key.name in ("mm", "block_attention"))
    assert by_direction["recomputed"] == by_direction["forward"] > 0
    assert traces[RECOMPUTED].flops == traces["alone"].flops


# A product of the rows of one stream with this number of a rank's features.
COLUMNS = {"attention": QUERIES + KEYS, "mlp": 2 * F}
ROWS = {"attention": QUERIES, "mlp": F}


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_products_beside_messages(traces, part):
    """Check two streams: in forward, and in the backward of summed rows, one is sent beside the product of the other.
    In backward, rows are gathered beside one product, and gradients leave beside the weight's product.
    """
    stream = 2 * B * L * X / 2
    column, row = stream * COLUMNS[part], stream * ROWS[part]
    # The first layer has both streams; the last one has noisy rows, and only the keys of clean ones.
    whole = 3 * column + (stream * KEYS if part == "attention" else 0)
    beside: dict[str, float] = defaultdict(float)
    for key, message in traces["sequence"].messages.items():
        beside[key.name] += message.exclusive.flops * (key.part == part)
    assert {name: flops for name, flops in beside.items() if flops} == {
        "_allgather_base_": column + row + whole,
        "_reduce_scatter_base_": row + whole,
    }


def test_weights_are_the_last_that_a_step_sends(traces):
    """Check that no message follows weights, as messages of a group run in order and later ones would wait."""
    names = [sent.name for sent in traces["context"].order if sent.ranks == (0, 1)]
    assert names[-1] == "broadcast_"


def test_gradients_of_the_head_leave_before_backward_comes_to_a_layer(traces):
    names = [sent.name for sent in traces["context"].order]
    assert names.index("reduce_") < names.index("_reduce_scatter_base_")


def test_flops_of_the_head(traces):
    """Check the FLOPs that the head makes, of padded logits, and those that count."""
    of_head = flops(traces["alone"])["head"]
    head_rows = of_head / (3 * 2 * X * LOGITS)
    assert head_rows == int(head_rows)
    assert 0.3 * B * L < head_rows < 0.8 * B * L
    made = flops(traces["alone"])
    needed = made["attention"] + made["mlp"] + 3 * made["block_attention"] + of_head * VOCABULARY.size / LOGITS
    assert traces["alone"].flops == pytest.approx(needed, rel=1e-12)


def sent(trace: Trace, group: str, part: str | None = None) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for key, message in trace.messages.items():
        if key.direction == group and key.phase == "gradients" and part in (None, key.part):
            found[key.name] += message.bytes
    return dict(found)


def test_bytes_between_tensor_parallel_ranks(traces):
    """Check bf16 rows: an all-gather and a reduce-scatter in forward and backward, and an all-gather for the weight's
    gradient.
    """
    a_row, noisy, every = 2 * X, B * L, 2 * B * L
    # The last layer's MLP has only noisy rows; its attention computes the keys of clean ones in a separate product.
    mlp = (every + noisy) * a_row
    assert sent(traces["sequence"], "tensor", "mlp") == {"_allgather_base_": 3 * mlp, "_reduce_scatter_base_": 2 * mlp}
    keys_and_queries, output = 2 * every * a_row, (every + noisy) * a_row
    attention = {
        "_allgather_base_": 2 * keys_and_queries + output,
        "_reduce_scatter_base_": keys_and_queries + output,
    }
    assert sent(traces["sequence"], "tensor", "attention") == attention


def test_bytes_between_context_parallel_ranks(traces):
    """Check that clean keys and values of the whole sequence come in forward, and their gradients go back."""
    everyone = LAYERS * B * L * KEYS * 2
    gathered = {"_allgather_base_": everyone, "_reduce_scatter_base_": everyone}
    assert sent(traces["context"], "context") == gathered


@pytest.mark.parametrize(("name", "operator"), [("context", "reduce_"), (RECOMPUTED, "_reduce_scatter_base_")])
def test_bytes_between_data_parallel_ranks(traces, name, operator):
    """Check that gradients are sent once, in fp32."""
    assert sent(traces[name], "data") == {operator: pytest.approx(4 * PARAMETERS, rel=0.01)}


@pytest.mark.parametrize(("name", "ranks"), [("alone", 1), ("context", 2), (RECOMPUTED, 2)])
def test_memory_before_a_step(traces, name, ranks):
    """Check weights in bf16, and masters, two moments and the moving average in fp32, divided by ZeRO."""
    before = traces[name].segments[0].memory
    weights = 2 * PARAMETERS / (ranks if name == RECOMPUTED else 1)
    tensors = 4 + LAYERS * 8 + 4
    assert traces[name].parameters == PARAMETERS
    assert before["weights"] == pytest.approx(weights, abs=tensors * ROUNDED)
    assert before["optimizer"] == pytest.approx(16 * PARAMETERS / ranks, abs=tensors * ROUNDED)


@pytest.mark.slow
def test_stages_of_other_numbers_of_layers_tell_the_whole_model():
    """Check operations and parameters of all layers, whichever stage the small steps belong to."""
    whole = tiny(2, {"pipeline": 2, "layers_per_chunk": [6, 4]}, num_layers=10)
    parts = samples(whole, stage=0)
    *traces, exact = trace([*(part.job for part in parts), whole])
    assert len(parts) > 1
    told = combine([(part.weight, part.memory_weight, found) for part, found in zip(parts, traces, strict=True)])
    assert told.parameters == exact.parameters == 2 * LOGITS * X + 10 * LAYER_PARAMETERS + X
    assert told.flops == exact.flops
