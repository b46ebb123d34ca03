"""Define layouts of tiny models whose every rank runs on fake GPUs.

`python -m tests.plan.layouts` rewrites golden.json, which has what a rank of each layout needs; run it only after an
intended change.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from bd3_scale.plan.hardware import load_hardware
from bd3_scale.plan.job import Job
from bd3_scale.plan.trace import Trace
from bd3_scale.plan.workers import trace_all
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary

GOLDEN = Path(__file__).with_name("golden.json")
BESIDE_STEPS = ("replicas", "evaluation", "save")
VOCABULARY = Vocabulary(size=300, eos_id=0, mask_id=299)

MOE: dict[str, Any] = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 32, "shared_ffn_hidden_size": 32}
MOE |= {"first_dense_layers": 1, "score": "sigmoid", "bias": True, "groups": 4, "top_groups": 2}

# Number of ranks, and the values that differ from BASE.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ZeRO 2, two copies": (2, {"parallel": {"zero_stage": 2}, "diffusion": {"noisy_copies": 2}}),
    "ZeRO 3, TP 2": (4, {"parallel": {"zero_stage": 3, "tensor": 2}}),
    "SP 2, PP 2 x 2, tied": (
        4,
        {
            "parallel": {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2},
            "model": {"num_layers": 4, "tie_embeddings": True},
        },
    ),
    "PP 4, next token": (
        4,
        {
            "parallel": {"pipeline": 4},
            "model": {"num_layers": 4},
            "diffusion": {"objective": "next_token", "block_size": 1, "mask_rate_low": 0.0, "mask_rate_high": 1.0},
        },
    ),
    "CP 2, SP 2, mixed blocks": (
        4,
        {"parallel": {"context": 2, "tensor": 2, "sequence": True}, "diffusion": {"block_size_choices": [4, 8]}},
    ),
    "ZeRO 0, full recomputation": (2, {"parallel": {"zero_stage": 0}, "train": {"recompute": "full"}}),
    "offload": (2, {"parallel": {"offload_optimizer": True}}),
    "EP 4, CP 2": (4, {"parallel": {"expert": 4, "context": 2}, "model": {"moe": MOE | {"aux_loss": 0.01}}}),
    "EP 2, SP 2, PP 2": (
        8,
        {
            "parallel": {"expert": 2, "tensor": 2, "sequence": True, "pipeline": 2, "zero_stage": 2},
            "model": {"num_layers": 4, "moe": MOE},
        },
    ),
}
BASE: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
    | {"ffn_hidden_size": 96},
    "diffusion": {"block_size": 8, "mask_rate_low": 0.3, "mask_rate_high": 0.8},
    "data": {"path": "none", "seq_len": 64},
    "optimizer": {"ema_decay": 0.999},
    "train": {"steps": 4, "micro_batch_size": 2, "precision": "bf16"},
    "parallel": {},
}


def job(name: str, rank: int = 0, *, more: int = 0, **settings: Any) -> Job:
    """Return a rank of a layout; its step has as many micro-batches as there are stages, plus `more` times that
    many."""
    world, changes = LAYOUTS[name]
    values: dict[str, Any] = {section: value | changes.get(section, {}) for section, value in BASE.items()}
    parallel = values["parallel"]
    stages = parallel.get("pipeline", 1)
    micro_batches = stages * (1 + more)
    replicas = world // (parallel.get("tensor", 1) * stages * parallel.get("context", 1))
    values["train"] |= {"global_batch_size": replicas * values["train"]["micro_batch_size"] * micro_batches}
    found = Recipe.model_validate({"name": "tiny", **values})
    check_recipe(found, world)
    return Job(found, VOCABULARY, rank, world, micro_batches, **settings)


def alone(precision: str, kind: str = "dense") -> Job:
    """Return one process whose activations are larger than all else; kind: dense, or experts."""
    values = {**BASE, "data": {"path": "none", "seq_len": 512}}
    values["model"] = values["model"] | ({"moe": MOE, "num_layers": 3} if kind == "experts" else {})
    values["train"] = values["train"] | {"global_batch_size": 4, "precision": precision}
    return Job(Recipe.model_validate({"name": "alone", **values}), VOCABULARY, 0, 1, micro_batches=2)


def trace(jobs: list[Job], device: str = "cuda") -> list[Trace]:
    """Return traces of what the ranks do on fake devices."""
    return trace_all(jobs, load_hardware("h100"), device=device)


def measured(trace: Trace) -> dict[str, float]:
    """Return what golden.json keeps of a rank's step."""
    step = ("gradients", "update")
    work = [work for key, work in trace.work.items() if key.phase in step]
    peak = max((each for each in trace.segments if each.name not in BESIDE_STEPS), key=lambda each: each.bytes)
    groups: dict[str, float] = defaultdict(float)
    for key, message in trace.messages.items():
        if key.phase in step:
            groups[key.direction] += message.bytes
    return {
        **{f"bytes of {kind}": size for kind, size in sorted(peak.memory.items()) if size},
        **{f"bytes over {group}": size for group, size in sorted(groups.items())},
        "moved_bytes": sum(each.bytes for each in work),
        "launches": sum(each.calls for each in work),
        "waits": sum(count for what, count in trace.waits.items() if what.startswith(step)),
    }


def main() -> None:
    traces = trace([job(name) for name in LAYOUTS])
    golden = {name: measured(found) for name, found in zip(LAYOUTS, traces, strict=True)}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
