"""Check seconds by hand: rooflines, links, hidden messages, the bubble, and that the losses add up to the step."""

from __future__ import annotations

import pytest

from bd3_scale.plan.hardware import load_hardware
from bd3_scale.plan.timing import REMEDIES, StepTime, message_seconds, step_time
from bd3_scale.plan.trace import Key, Message, Segment, Trace, Work
from bd3_scale.recipe.schema import Recipe
from tests.plan.layouts import alone

H100 = load_hardware("h100")
PRODUCT = Key("gradients", "mlp", "forward", "mm", "1024x1024x1024")


def recipe(**parallel: int) -> Recipe:
    found = alone("bf16").recipe
    return found.model_copy(update={"parallel": found.parallel.model_copy(update=parallel)})


def trace(work: dict[Key, Work], messages: dict[Key, Message] | None = None, micro_batches: int = 1) -> Trace:
    flops = sum(each.flops for key, each in work.items() if key.direction != "recomputed")
    return Trace([Segment("before", {})], work, messages or {}, {}, micro_batches, flops)


def adds_up(time: StepTime) -> bool:
    return time.needed + sum(time.losses.values()) == pytest.approx(time.seconds) and set(time.losses) <= set(REMEDIES)


def test_a_product_takes_its_operations_or_its_traffic():
    by_operations = step_time(recipe(), {0: trace({PRODUCT: Work(1, 989e12, 1e6)})}, 1, H100)
    assert by_operations.seconds == pytest.approx(1 / 0.70)
    assert by_operations.mfu == pytest.approx(0.70)
    by_traffic = step_time(recipe(), {0: trace({PRODUCT: Work(1, 1e6, 3.35e12)})}, 1, H100)
    assert by_traffic.seconds == pytest.approx(1 / 0.82)
    assert adds_up(by_operations)
    assert adds_up(by_traffic)


def test_what_is_computed_again_is_no_need():
    again = PRODUCT._replace(direction="recomputed")
    time = step_time(recipe(), {0: trace({PRODUCT: Work(1, 989e12, 1), again: Work(1, 989e12, 1)})}, 1, H100)
    assert time.mfu == pytest.approx(0.35)
    assert time.losses["activations computed again"] == pytest.approx(1 / 0.70)
    assert adds_up(time)


def test_the_host_must_launch():
    small = Key("gradients", "norm", "forward", "mul", "")
    time = step_time(recipe(), {0: trace({small: Work(1000, 0, 1.0)})}, 1, H100)
    assert time.seconds == pytest.approx(1000 * H100.launch_seconds)
    assert adds_up(time)


@pytest.mark.parametrize(
    ("ranks", "stride", "bandwidth", "latency"),
    [(8, 1, 450e9, 15e-6), (2, 4, 450e9, 15e-6), (16, 1, 400e9, 40e-6), (16, 4, 100e9, 40e-6), (4, 8, 50e9, 40e-6)],
)
def test_a_message_takes_the_slowest_link_of_its_group(ranks, stride, bandwidth, latency):
    """Check that ranks of a group in a node share its network cards: at a stride of 4, two are in a node of 8."""
    message = Message(tuple(range(0, ranks * stride, stride)), calls=1, bytes=1e9)
    reduced = message_seconds(Key("gradients", "", "data", "allreduce_", ""), message, H100)
    assert reduced == pytest.approx(2 * (ranks - 1) / ranks * 1e9 / (0.8 * bandwidth) + latency)
    gathered = message_seconds(Key("gradients", "", "data", "_allgather_base_", ""), message, H100)
    assert gathered == pytest.approx((ranks - 1) / ranks * 1e9 / (0.8 * bandwidth) + latency)


@pytest.mark.parametrize(
    ("ranks", "stride", "seconds"),
    [
        (8, 1, 7 / 8 * 1e9 / 450e9 + 15e-6 * 0.8),
        (16, 1, 8 / 16 * 1e9 / 50e9 + 40e-6 * 0.8),
        (8, 2, 4 / 8 * 1e9 / 50e9 + 40e-6 * 0.8),
        (1, 1, 0),
    ],
)
def test_of_an_all_to_all_what_leaves_a_node_goes_over_each_ranks_own_card(ranks, stride, seconds):
    """Check a group with several ranks in a node; what stays in the node travels at the same time."""
    message = Message(tuple(range(0, ranks * stride, stride)), calls=1, bytes=1e9)
    found = message_seconds(Key("gradients", "mixture", "expert", "alltoall_base_", "8"), message, H100)
    assert found == pytest.approx(seconds / 0.8)
    slow_node = H100.model_copy(update={"node_bandwidth": 1e9})
    inside = (min(ranks, 8 // stride) - 1) / ranks
    found = message_seconds(Key("gradients", "mixture", "expert", "alltoall_base_", "8"), message, slow_node)
    assert found == pytest.approx(inside / 0.8, abs=1e-4)


def test_products_in_fp32_take_longer():
    router = Key("gradients", "router", "forward", "mm in fp32", "1024x256x1024")
    time = step_time(recipe(), {0: trace({router: Work(1, 0.7 * 67e12, 1)})}, 1, H100)
    assert time.seconds == pytest.approx(1)
    assert time.losses["router in fp32"] == pytest.approx(1 - 0.7 * 67 / 989)
    assert adds_up(time)


def test_both_kinds_of_replicas_share_links():
    """Check messages of all weights and of experts: computation beside both hides the second once the first is done."""
    first, second = (Key("gradients", "", group, "reduce_", "beside") for group in ("data", "expert-data"))
    beside = Work(1, 0.1 * 0.70 * 989e12, 0)
    messages = {
        first: Message((0, 1), 0, 0.02 * 360e9, beside, beside),
        second: Message((0, 1), 0, 0.1 * 360e9, beside, Work()),
    }
    time = step_time(recipe(), {0: trace({PRODUCT: Work(1, 989e12, 1)}, messages)}, 2, H100)
    exposed = sum(time.losses[f"{key.direction}-parallel messages"] for key in messages)
    assert exposed == pytest.approx(0.02 + 0.1 - 0.1)
    assert adds_up(time)


def test_computation_beside_a_message_hides_it():
    key = Key("gradients", "mlp", "tensor", "_allgather_base_", "1 beside 2")
    seconds = message_seconds(key, Message((0, 1), 1, 36e9), H100)
    work = {PRODUCT: Work(1, 989e12, 1)}

    def exposed(beside: Work) -> float:
        time = step_time(recipe(), {0: trace(work, {key: Message((0, 1), 1, 36e9, beside, beside)})}, 2, H100)
        assert adds_up(time)
        return time.losses.get("tensor-parallel messages", 0.0)

    assert exposed(Work()) == pytest.approx(seconds)
    half = Work(1, seconds / 2 * 0.70 * 989e12, 0)
    assert exposed(half) == pytest.approx(seconds / 2)
    assert exposed(Work(1, seconds * 989e12, 0)) == 0


def test_messages_of_a_group_wait_for_each_other():
    """Check that four messages, begun and awaited together, hide no more than the computation meanwhile."""
    key = Key("gradients", "mlp", "tensor", "_allgather_base_", "1 beside 2")
    seconds = message_seconds(key, Message((0, 1), 4, 4 * 36e9), H100)
    meanwhile = Work(1, seconds / 2 * 0.70 * 989e12, 0)
    each_beside = Work(4, 4 * meanwhile.flops, 0)
    work = {PRODUCT: Work(1, 989e12, 1)}
    time = step_time(recipe(), {0: trace(work, {key: Message((0, 1), 4, 4 * 36e9, each_beside, meanwhile)})}, 2, H100)
    assert time.losses["tensor-parallel messages"] == pytest.approx(seconds / 2)


def test_a_pipeline_has_its_bubble_and_the_pace_of_its_slowest_stage():
    slow, quick = (trace({PRODUCT: Work(8, 989e12 * share, 1)}, micro_batches=8) for share in (1.0, 0.5))
    for stage in (slow, quick):
        stage.flops = 4 * 989e12
    one, two = (
        step_time(recipe(pipeline=4, virtual_pipeline=chunks), {0: slow, 3: quick}, 4, H100) for chunks in (1, 2)
    )
    assert one.seconds == pytest.approx((8 + 3) / 8 / 0.70)
    assert two.seconds == pytest.approx((8 + 1.5) / 8 / 0.70)
    assert one.losses["pipeline bubble"] == pytest.approx(3 / 8 / 0.70)
    assert adds_up(one)


def test_hardware_of_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: h100\ndevice: My card\npeak_flops: 1.0e+15\nmatmul: 0.5\n")
    mine = load_hardware(str(file))
    assert (mine.peak, mine.matmul, mine.memory_gb) == (1e15, 0.5, H100.memory_gb)
    for text, why in (
        ("extends: h99", "extends 'h99'"),
        ("extends: h100\nmatmul: 2", "matmul"),
        ("extends: h100\nspeed: 2", "speed"),
        ("extends: h100\ndevice: My card", "give peak_flops"),
        ("- 1", "keys and values"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=why):
            load_hardware(str(file))
    with pytest.raises(ValueError, match="is neither one of h100"):
        load_hardware("h99")


def attention(direction: str) -> Key:
    return Key("gradients", "attention", direction, "block_attention" + "_backward" * (direction == "backward"), "128")


def test_attention_takes_what_its_kernels_reach():
    """Check that the deterministic backward has seven products where the atomic one has five."""
    work = {attention("forward"): Work(1, 350e12, 1), attention("backward"): Work(1, 280e12, 1)}
    for deterministic, backward in ((True, 1.4), (False, 1.0)):
        made = recipe().model_copy(update={"deterministic": deterministic})
        assert step_time(made, {0: trace(work)}, 1, H100).seconds == pytest.approx(1 + backward)


def test_ranks_share_what_their_positions_need():
    """Check that two tensor-parallel ranks have the same positions, and two context-parallel ranks different ones."""
    found = trace({PRODUCT: Work(1, 989e12, 1)})
    assert step_time(recipe(tensor=2), {0: found}, 8, H100).needed == pytest.approx(1 / 2)
    assert step_time(recipe(context=2), {0: found}, 8, H100).needed == pytest.approx(1)


def test_messages_between_stages_are_part_of_the_pace():
    """Check that the bubble waits for these messages, too, unless an interleaved schedule can compute meanwhile."""
    key = Key("gradients", "", "pipeline", "send", "")
    message = Message((0, 8), calls=4, bytes=40e9)
    found = trace({PRODUCT: Work(4, 4 * 0.70 * 989e12, 1)}, {key: message}, micro_batches=4)
    seconds = 40e9 / (0.8 * 50e9) + 4 * 40e-6
    one, two = (step_time(recipe(pipeline=2, virtual_pipeline=chunks), {0: found}, 2, H100) for chunks in (1, 2))
    assert one.losses["pipeline-parallel messages"] == pytest.approx(seconds)
    assert one.seconds == pytest.approx((4 + seconds) * (1 + 1 / 4))
    assert two.seconds == pytest.approx(4 * (1 + 1 / 8))
    message.bytes *= 10
    long = step_time(recipe(pipeline=2, virtual_pipeline=2), {0: found}, 2, H100)
    assert long.losses["pipeline-parallel messages"] == pytest.approx(400e9 / (0.8 * 50e9) + 4 * 40e-6 - 4)


def test_neighbours_of_two_nodes_are_apart():
    """Check that ranks 4 and 8 are as far from each other as 0 and 4, which share a node."""
    key = Key("gradients", "", "pipeline", "send", "")
    near, far = (message_seconds(key, Message(ranks, 1, 36e9), H100) for ranks in ((0, 4), (4, 8)))
    assert near == pytest.approx(0.1 + 15e-6)
    assert far == pytest.approx(0.9 + 40e-6)


def test_the_update_of_the_slowest_stage_counts():
    update = Key("update", "", "", "fused_adam", "")
    stages = [trace({PRODUCT: Work(1, 0.70 * 989e12, 1), update: Work(1, 0, size)}) for size in (0.82 * 3.35e12, 1)]
    assert step_time(recipe(pipeline=2), dict(enumerate(stages)), 2, H100).seconds == pytest.approx(1 * 2 + 1)


def test_a_node_sends_no_more_than_its_gpus_and_lists_are_gathered_whole():
    message = Message(tuple(range(32)), calls=0, bytes=1e9)
    fast = H100.model_copy(update={"network_bandwidth": 100e9})
    gathered = message_seconds(Key("gradients", "", "data", "_allgather_base_", ""), message, fast)
    assert gathered == pytest.approx(31 / 32 * 1e9 / (0.8 * 450e9))
    of_list = message_seconds(Key("gradients", "", "data", "allgather_", ""), message, fast)
    assert of_list == pytest.approx(31e9 / (0.8 * 450e9))
