"""Sample with the options of `SamplingConfig` together with those of the sampler."""

from __future__ import annotations

from typing import Any

from bd3_scale.generate import sampler
from bd3_scale.generate.config import SamplingConfig

OF_THE_SAMPLER = ("block_size", "window", "eos_ids", "ends")


def generate(model: Any, prompt: list[int], **how: Any) -> sampler.Sample:
    return generate_batch(model, [prompt], **how)[0]


def generate_batch(model: Any, prompts: list[list[int]], **how: Any) -> list[sampler.Sample]:
    options = {name: how.pop(name) for name in OF_THE_SAMPLER if name in how}
    return sampler.generate_batch(model, prompts, SamplingConfig(**how), **options)
