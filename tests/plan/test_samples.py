"""Check that small steps predict the trace of a large one, and that fake devices give the memory that PyTorch's
allocator measures on real ones.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from bd3_scale.plan.job import Job
from bd3_scale.plan.samples import samples
from bd3_scale.plan.trace import combine
from tests.plan.layouts import alone, job, trace

pytestmark = pytest.mark.launch

QUICK = "plain"
LARGE = {
    QUICK: ("ZeRO 2, two copies", 5, {}, {}, 4),
    "recomputation of some layers": ("ZeRO 0, full recomputation", 9, {"recompute_layers": 4}, {}, 6),
    "interleaved": ("SP 2, PP 2 x 2, tied", 20, {}, {}, 8),
    "context": ("CP 2, SP 2, mixed blocks", 6, {}, {}, 5),
    "experts": ("EP 4, CP 2", 7, {}, {}, 4),
    "experts, some layers recomputed": ("EP 2, SP 2, PP 2", 22, {"recompute": "full", "recompute_layers": 4}, {}, 6),
}


def large(name: str) -> Job:
    layout, layers, train, parallel, micro_batches = LARGE[name]
    found = job(layout)
    # It has more layers without experts than a small step otherwise has.
    moe = found.recipe.model.moe and found.recipe.model.moe.model_copy(update={"first_dense_layers": 2})
    recipe = found.recipe.model_copy(
        update={
            "model": found.recipe.model.model_copy(update={"num_layers": layers, "moe": moe}),
            "train": found.recipe.train.model_copy(update=train),
            "parallel": found.recipe.parallel.model_copy(update=parallel),
        }
    )
    return replace(found, recipe=recipe, micro_batches=micro_batches)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n != QUICK else ()) for n in LARGE])
def test_small_steps_tell_a_large_one(name):
    whole = large(name)
    parts = samples(whole, stage=0)
    assert len(parts) > 1
    assert max(part.job.recipe.model.num_layers for part in parts) < whole.recipe.model.num_layers
    *traces, exact = trace([*(part.job for part in parts), whole])
    told = combine([(part.weight, part.memory_weight, found) for part, found in zip(parts, traces, strict=True)])
    # Tensors as small as these are rounded up to 512 bytes, so what all layers share is not linear in their number.
    assert told.peak.bytes == pytest.approx(exact.peak.bytes, rel=3e-3)
    assert told.peak.name == exact.peak.name
    assert told.flops == exact.flops
    for attribute in ("calls", "flops", "bytes"):
        of_told, of_exact = ({k: getattr(v, attribute) for k, v in t.work.items() if k.part} for t in (told, exact))
        assert of_told == pytest.approx(of_exact, abs=0.1)
    messages = ({k: (v.calls, v.bytes) for k, v in t.messages.items() if k.phase == "gradients"} for t in (told, exact))
    told_messages, exact_messages = messages
    assert told_messages.keys() == exact_messages.keys()
    for key, (calls, size) in exact_messages.items():
        # Gradients of a layer that two ranks own are sent in two messages.
        assert key.direction == "data" or told_messages[key][0] == pytest.approx(calls, abs=0.1), key
        assert told_messages[key][1] == pytest.approx(size, abs=0.1), key


@pytest.mark.parametrize("kind", ["dense", pytest.param("experts", marks=pytest.mark.slow)])
def test_memory_is_what_the_allocator_of_a_real_step_sees(kind):
    """Check fp32: in bf16, the CPU's kernels allocate temporary tensors."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.plan.real_step", "fp32", kind],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    real = int(done.stdout.split()[-1])
    (told,) = trace([alone("fp32", kind)], device="cpu")
    # Sizes are rounded up to 512 bytes, as on a GPU.
    assert told.peak.bytes - told.segments[0].bytes == pytest.approx(real, rel=0.003)


def test_without_a_fake_gpu_what_is_sent_is_the_same():
    of_gpu, of_cpu = (trace([job("ZeRO 2, two copies")], device=device)[0] for device in ("cuda", "cpu"))
    sent = [sum(message.bytes for message in found.messages.values()) for found in (of_gpu, of_cpu)]
    assert sent[0] == sent[1]
    assert of_cpu.flops == of_gpu.flops
    # On the CPU, norms and activations are several kernels, which keep more.
    assert of_gpu.peak.bytes < of_cpu.peak.bytes < 1.6 * of_gpu.peak.bytes
