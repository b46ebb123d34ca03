"""Measure the memory of a real step on the CPU. `python -m tests.plan.real_step PRECISION KIND` prints the peak of
PyTorch's allocator in the second step, in bytes above what was there before it; see `layouts.alone`.
"""

from __future__ import annotations

import os
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from bd3_scale.parallel import megatron_on_cpu
from bd3_scale.parallel.engine import open_engine
from bd3_scale.parallel.simulated import simulated_groups
from bd3_scale.plan.rank import example_inputs
from bd3_scale.train.step import train_on
from tests.plan.layouts import alone


def main() -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    torch.set_num_threads(1)
    job = alone(*sys.argv[1:])
    megatron_on_cpu.install()
    groups = simulated_groups(job.recipe.parallel, rank=0, world_size=1)
    engine = open_engine(job.recipe, job.vocabulary, groups, device=torch.device("cpu"), seed=1)
    micro_batches = [example_inputs(job, groups)] * job.micro_batches

    def step(number: int) -> None:
        train_on(engine, job.recipe, micro_batches, step=number, tokens=1000)

    step(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step(2)
    now = peak = 0
    events = seen.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    print(peak)


if __name__ == "__main__":
    main()
