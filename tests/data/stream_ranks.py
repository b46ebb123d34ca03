"""Run ranks that read batches and write down what they saw; the tests of the stream start them.

usage: stream_ranks.py JSON-FILE, which holds {"worlds": [2], "worlds_with_group": [2], "data": {…}, "out": folder,
"cases": [{…}]}.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bd3_scale.data.batch import Batch
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.node import load_sources_of_node
from bd3_scale.data.stream import TrainingStream, held_out_batches
from bd3_scale.recipe.schema import DataRecipe


def seen(batch: Batch) -> dict[str, Any]:
    return {name: getattr(batch, name).tolist() for name in ("ids", "epochs", "slots", "tokens")}


def run_rank(rank: int, world: int, port: int, plan: dict[str, Any]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if plan["group"]:
        dist.init_process_group("gloo")
    opened: list[str] = []
    sys.addaudithook(lambda event, about: opened.append(str(about[0])) if event == "open" else None)
    if plan["group"]:
        manifest = load_sources_of_node(DataRecipe(**plan["data"]))
    else:
        manifest = load_manifest(plan["data"]["path"], plan["data"].get("remote"))
    Path(plan["out"], f"{rank}-of-{world}.opened").write_text(
        json.dumps([place for place in opened if place.endswith("index.json")])
    )
    results = []
    for case in plan["cases"]:
        data = DataRecipe(**plan["data"], num_workers=case["num_workers"])
        ranks = {"dp_rank": rank // case["replicas"], "dp_size": world // case["replicas"]}
        stream = TrainingStream(
            data, manifest, global_batch_size=case["global_batch_size"], seed=case["seed"], step=case["step"], **ranks
        )
        train = [seen(next(stream)) for _ in range(case["count"])]
        held_out = [seen(batch) for batch in held_out_batches(data, manifest, batch_size=3, sequences=11, **ranks)]
        results.append(ranks | {"train": train, "held_out": held_out})
    Path(plan["out"], f"{rank}-of-{world}.json").write_text(json.dumps(results))
    if plan["group"]:
        dist.barrier()
        dist.destroy_process_group()


def run_world(world: int, plan: dict[str, Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked after the slow imports; each rank has its environment and its group from the start all the same.
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            run_rank(rank, world, port, plan)
            sys.exit(0)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * world, codes


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    for world in plan["worlds"]:
        run_world(world, plan | {"group": world in plan["worlds_with_group"]})
