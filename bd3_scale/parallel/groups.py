"""Process groups: torch.distributed by the launcher's environment, split by megatron-core."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist

from bd3_scale.model import megatron_core  # noqa: F401

# isort: split
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from bd3_scale.model.rows import Placement
from bd3_scale.parallel import megatron_on_cpu
from bd3_scale.parallel.collective import gather_values
from bd3_scale.parallel.meeting import Meeting, meet, show_secret
from bd3_scale.recipe.schema import ParallelRecipe
from bd3_scale.resilience.heartbeat import is_watched
from bd3_scale.resilience.secret import RENDEZVOUS_VARIABLE
from bd3_scale.resilience.terminal import tell

ProcessGroups: TypeAlias = ProcessGroupCollection
# Beyond every deadline of a run.
_WATCHED = timedelta(days=7)


def local_device() -> torch.device:
    """Return the GPU of this rank, or the CPU where there is none.

    A site may show each task one GPU alone, whatever the task's number on its node.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def cuda_variables(parallel: ParallelRecipe, *, deterministic: bool) -> dict[str, str]:
    """Return what CUDA, NCCL and PyTorch are told by variables, without those that a person has set.

    Sizes that vary from step to step, as the rows of the head do, fragment memory unless its segments can grow. With
    tensor parallelism one queue of work keeps a collective before the products that it runs beside (Megatron-LM).
    Sums in NVLink's switches may differ from call to call (NVIDIA/nccl, issue 1497); PyTorch excludes the algorithm of
    that name where it is to be deterministic, and this its tree over nodes as well.
    """
    wanted = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if parallel.tensor > 1:
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if deterministic and "NCCL_ALGO" not in os.environ:
        wanted["NCCL_NVLS_ENABLE"] = "0"
    if "PYTORCH_ALLOC_CONF" in os.environ:
        del wanted["PYTORCH_CUDA_ALLOC_CONF"]
    return {name: value for name, value in wanted.items() if name not in os.environ}


def placement(groups: ProcessGroups, chunks: Sequence[torch.nn.Module] = ()) -> Placement:
    """Return where this rank computes its inputs: where its part of a model lies, by default `local_device`."""
    device = next(chunks[0].parameters()).device if chunks else local_device()
    return Placement(device, (groups.cp.rank(), groups.cp.size()))


def lone_groups() -> ProcessGroups:
    """Return the groups of a process that is alone with its model, whatever torch.distributed is set up for.

    Each is of one rank and has no backend: nobody is met, nothing is sent, and a collective over one is an error.
    """
    alone = dist.ProcessGroup(0, 1)  # type: ignore[call-arg]  # the stub lacks this one
    return ProcessGroupCollection(**{field.name: alone for field in fields(ProcessGroupCollection)})


def is_alone(groups: ProcessGroups) -> bool:
    """Return whether there is no other rank."""
    return groups.mp.size() * groups.dp_cp.size() == 1


@contextmanager
def process_groups(
    parallel: ParallelRecipe,
    *,
    agree: str = "",
    secret_file: Path | None = None,
    timeout: timedelta = timedelta(minutes=10),
    data_minutes: float = 0,
) -> Iterator[ProcessGroups]:
    """Join the ranks that torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) name; alone without them.

    Nobody joins who does not know the secret of the run; see `parallel.meeting`.

    Args:
        secret_file: of ranks that no local launch has started.
        agree: what must be the same on all ranks before groups are made, or they would wait for each other for ever.
        timeout: of their meeting, and of each collective unless somebody reads the ranks' heartbeats, who tells a hang
            from a long wait, and names the culprit.
        data_minutes: for which a rank may wait for its data, while others wait for it in a collective.

    Raises:
        ValueError: the layout does not divide the world, ranks do not agree, or the launcher set only a part of the
        variables; ConnectionError: the ranks do not meet within `timeout`.
    """
    _check_environment()
    device = local_device()
    collectives = _WATCHED if is_watched() else timeout + timedelta(minutes=data_minutes)
    if device.type == "cuda":
        # They are read when the device is first used.
        told = cuda_variables(parallel, deterministic=torch.are_deterministic_algorithms_enabled())
        if told and os.environ.get("RANK", "0") == "0":
            tell("on a GPU: " + ", ".join(f"{name}={value}" for name, value in told.items()) + "; what you set is kept")
        os.environ |= told
        torch.cuda.set_device(device)
    else:
        megatron_on_cpu.install()
    try:
        _join(meet(secret_file, timeout), "nccl" if device.type == "cuda" else "gloo", collectives)
    except (RuntimeError, ConnectionError) as error:
        raise ConnectionError(
            f"rank {os.environ.get('RANK', '0')} did not meet the others at {os.environ.get('MASTER_ADDR', 'itself')}: "
            f"{error}\nAre all started, and can they reach that address? Where a host's name stands for a loopback "
            "address, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to its network interface"
        ) from error
    done = False
    try:
        show_secret(_secret())
        _check_agreement(agree)
        minutes = max(1, int(collectives.total_seconds() // 60))
        yield split_ranks(parallel, timeout_minutes=minutes, beside_gpu=device.type == "cuda")
        done = True
    finally:
        if done or not _waits_for_others(device):
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
            _Joined.meeting = None


def split_ranks(parallel: ParallelRecipe, *, timeout_minutes: int = 1, beside_gpu: bool = False) -> ProcessGroups:
    """Split the world as `parallel` says (collective); beside_gpu: with groups for what is on the CPU, too.

    ValueError: the layout does not divide the world.
    """
    if dist.get_world_size() % parallel.model_size:
        raise ValueError(
            f"{dist.get_world_size()} processes cannot be split by parallel.tensor={parallel.tensor} x "
            f"pipeline={parallel.pipeline} x context={parallel.context}: start a multiple of {parallel.model_size}"
        )
    if dist.get_world_size() // (parallel.tensor * parallel.pipeline) % parallel.expert:
        raise ValueError(
            f"{dist.get_world_size()} processes / (tensor={parallel.tensor} x pipeline={parallel.pipeline}) do not "
            f"divide into parallel.expert={parallel.expert}: start a multiple of "
            f"{parallel.tensor * parallel.pipeline * parallel.expert}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        # Neighbours talk most: tensor-parallel ranks within a node, stages, which exchange least, farthest apart.
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=beside_gpu,
        distributed_timeout_minutes=timeout_minutes,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def _waits_for_others(device: torch.device) -> bool:
    """Return whether the groups' end would wait for ranks that still compute: NCCL's does, for minutes, and where one
    rank fails it would hide the error (torchtitan, pull request 1342).
    """
    return device.type == "cuda" and dist.get_world_size() > 1


def is_left_open() -> bool:
    """Return whether an error has left process groups open, whose end would wait for other ranks."""
    return _Joined.meeting is not None and _waits_for_others(local_device())


def _check_agreement(mine: str) -> None:
    everyone = gather_values(mine)
    different = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if different:
        raise ValueError(
            f"ranks {different} were started with another recipe than rank 0: give all the same file and overrides"
        )


def _check_environment() -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    names += [] if RENDEZVOUS_VARIABLE in os.environ else ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in names if name not in os.environ]
    if missing and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise ValueError(
            f"RANK and WORLD_SIZE are set, {', '.join(missing)} not: use torchrun, or export them before "
            "(under SLURM, `bd3-scale submit` does it)"
        )


def _join(meeting: Meeting, backend: str, collectives: timedelta) -> None:
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    dist.init_process_group(
        backend, store=meeting.store, rank=meeting.rank, world_size=meeting.world_size, timeout=collectives
    )
    _Joined.meeting, _Joined.timeout = meeting, collectives


class _Joined:
    """What belongs to the default group, which torch.distributed keeps for the process, too.

    C++ code alone does not keep the store of a meeting alive where that is written in Python.
    """

    meeting: Meeting | None = None
    timeout: timedelta


def _secret() -> bytes | None:
    assert _Joined.meeting is not None, "no process groups are open"
    return _Joined.meeting.secret


def group_beside_training(timeout: timedelta) -> dist.ProcessGroup:
    """Return a gloo group of all ranks, for a thread whose messages cannot be mistaken for training's (collective).

    Its connections are new ones: its ranks have shown each other that they know the secret.
    """
    group = dist.new_group(backend="gloo", timeout=timeout)
    show_secret(_secret(), group)
    return group


def group_of_pipeline(groups: ProcessGroups) -> dist.ProcessGroup | None:
    """Return a gloo group of this rank's pipeline, by stage, for what lies on the host; None where it has one stage
    (collective).
    """
    if groups.pp.size() == 1:
        return None
    pipelines = sorted(map(list, {tuple(ranks) for ranks in gather_values(dist.get_process_group_ranks(groups.pp))}))
    group, _ = dist.new_subgroups_by_enumeration(pipelines, timeout=_Joined.timeout, backend="gloo")
    show_secret(_secret(), group)
    return group


class DeepSpeedTopology:
    """The process groups under the names that DeepSpeed asks of its `mpu` argument; megatron-core dropped some of them.

    DeepSpeed calls "model parallel" all ranks that hold parts of one model replica, over which norms are reduced; its
    data-parallel ranks are all that hold the same weights, among whom it divides the optimiser.
    """

    def __init__(self, groups: ProcessGroups, *, divide_optimizer: bool) -> None:
        self._groups = groups
        # ZeRO 0 divides among nobody: every rank is alone, and the engine reduces the gradients.
        self._sharers = (
            groups.dp_cp if divide_optimizer else dist.new_group([dist.get_rank()], use_local_synchronization=True)
        )

    def sharers_of(self, ranks: dist.ProcessGroup) -> dist.ProcessGroup:
        """Return among whom ZeRO divides the states of weights that `ranks` share."""
        return ranks if self._sharers is self._groups.dp_cp else self._sharers

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._sharers

    def get_data_parallel_rank(self) -> int:
        return self._sharers.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._sharers.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.mp

    def get_model_parallel_rank(self) -> int:
        return self._groups.mp.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._groups.mp.size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tp

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.tp.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.tp.size()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.pp

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._groups.pp.rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._groups.pp.size()
