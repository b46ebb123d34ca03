"""Make the process groups: initialise torch.distributed by the launcher's variables, and split it by megatron-core."""

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
from bd3_scale.parallel.rendezvous import Rendezvous, find_ranks, show_secret
from bd3_scale.recipe.schema import ParallelRecipe
from bd3_scale.resilience.heartbeat import is_watched
from bd3_scale.resilience.secret import RENDEZVOUS_VARIABLE
from bd3_scale.resilience.terminal import tell

ProcessGroups: TypeAlias = ProcessGroupCollection
# The timeout of collectives where somebody watches the heartbeats: longer than any deadline of a run.
_WATCHED = timedelta(days=7)


def local_device() -> torch.device:
    """Return the GPU of this rank, or the CPU where there is none.

    Some sites let each task see one GPU only, as `cuda:0`, whatever LOCAL_RANK is; hence the remainder.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def cuda_variables(parallel: ParallelRecipe, *, deterministic: bool) -> dict[str, str]:
    """Return the environment variables to set for CUDA, NCCL and PyTorch, without those that a person has set.

    - PYTORCH_CUDA_ALLOC_CONF: sizes that vary from step to step, such as the number of the head's rows, fragment the
      memory unless its segments are expandable.
    - CUDA_DEVICE_MAX_CONNECTIONS, with tensor parallelism: with one queue of work a collective starts before the
      products that it should overlap with (Megatron-LM's documentation).
    - NCCL_NVLS_ENABLE, if deterministic: sums in NVLink's switches may differ from call to call (NVIDIA/nccl, issue
      1497). PyTorch's deterministic mode excludes the algorithm NVLS; this excludes its tree over nodes as well.
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
    """Return where this rank computes: the device of its part of a model, by default `local_device`."""
    device = next(chunks[0].parameters()).device if chunks else local_device()
    return Placement(device, (groups.cp.rank(), groups.cp.size()))


def lone_groups() -> ProcessGroups:
    """Return the groups of a process that holds a whole model, whatever torch.distributed is initialised for.

    Each group has one rank and no backend: there is no rendezvous, nothing is sent, and a collective is an error.
    """
    single = dist.ProcessGroup(0, 1)  # type: ignore[call-arg]  # the stub lacks this one
    return ProcessGroupCollection(**{field.name: single for field in fields(ProcessGroupCollection)})


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
    """Join the ranks that torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) name.

    Without these variables the process is the only rank. A process that does not know the secret of the run cannot
    join; see `parallel.rendezvous`.

    Args:
        secret_file: the file of the secret, for ranks that no local launch has started.
        agree: a text that must be equal on all ranks. It is compared before groups are made, since ranks with other
            recipes would make other groups and wait for each other for ever.
        timeout: of the rendezvous and of each collective. Where somebody watches the ranks' heartbeats, collectives
            have no such limit: the watcher tells a hang from a long wait, and names the rank that causes it.
        data_minutes: how long a rank may wait for its data, while other ranks wait for it in a collective.

    Raises:
        ValueError: the layout does not divide the world, ranks do not agree, or the launcher set only a part of the
            variables.
        ConnectionError: the ranks do not meet within `timeout`.
    """
    _check_environment()
    device = local_device()
    collectives = _WATCHED if is_watched() else timeout + timedelta(minutes=data_minutes)
    if device.type == "cuda":
        # CUDA and NCCL read them when the device is used for the first time, so they must be set before.
        variables = cuda_variables(parallel, deterministic=torch.are_deterministic_algorithms_enabled())
        if variables and os.environ.get("RANK", "0") == "0":
            listed = ", ".join(f"{name}={value}" for name, value in variables.items())
            tell(f"on a GPU: {listed}; what you set is kept")
        os.environ |= variables
        torch.cuda.set_device(device)
    else:
        megatron_on_cpu.install()
    try:
        _join(find_ranks(secret_file, timeout), "nccl" if device.type == "cuda" else "gloo", collectives)
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
            _Joined.rendezvous = None


def split_ranks(parallel: ParallelRecipe, *, timeout_minutes: int = 1, beside_gpu: bool = False) -> ProcessGroups:
    """Split the world as `parallel` says (collective).

    beside_gpu: also make gloo groups, for tensors on the CPU.
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
        # Ranks with neighbouring numbers are on one node. Tensor-parallel ranks exchange most and are neighbours;
        # pipeline stages exchange least and lie farthest apart.
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=beside_gpu,
        distributed_timeout_minutes=timeout_minutes,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def _waits_for_others(device: torch.device) -> bool:
    """Say whether destroying the groups would wait for ranks that still compute.

    NCCL's `destroy_process_group` does, for minutes: after an error on one rank it would hang there and hide the error
    (torchtitan, pull request 1342).
    """
    return device.type == "cuda" and dist.get_world_size() > 1


def is_left_open() -> bool:
    """Say whether an error has left process groups open, because destroying them would wait for other ranks."""
    return _Joined.rendezvous is not None and _waits_for_others(local_device())


def _check_agreement(text: str) -> None:
    texts = gather_values(text)
    different = [rank for rank, other in enumerate(texts) if other != texts[0]]
    if different:
        raise ValueError(
            f"ranks {different} were started with another recipe than rank 0: give all ranks the same file and "
            "overrides"
        )


def _check_environment() -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    names += [] if RENDEZVOUS_VARIABLE in os.environ else ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in names if name not in os.environ]
    if missing and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise ValueError(
            f"RANK and WORLD_SIZE are set, but {', '.join(missing)} not: start with torchrun, or export them "
            "(under SLURM, `bd3-scale submit` does it)"
        )


def _join(rendezvous: Rendezvous, backend: str, collectives: timedelta) -> None:
    # DeepSpeed reads LOCAL_RANK without a default.
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group(
        backend, store=rendezvous.store, rank=rendezvous.rank, world_size=rendezvous.world_size, timeout=collectives
    )
    _Joined.rendezvous, _Joined.timeout = rendezvous, collectives


class _Joined:
    """State that lives as long as the default group of torch.distributed, which is global to the process, too.

    The reference to the store is needed: torch's C++ code does not keep a store alive that is a Python object.
    """

    rendezvous: Rendezvous | None = None
    timeout: timedelta


def _secret() -> bytes | None:
    assert _Joined.rendezvous is not None, "no process groups are open"
    return _Joined.rendezvous.secret


def group_beside_training(timeout: timedelta) -> dist.ProcessGroup:
    """Return a gloo group of all ranks for another thread, whose messages do not mix with training's (collective).

    It has connections of its own, so its ranks prove to each other again that they know the secret.
    """
    group = dist.new_group(backend="gloo", timeout=timeout)
    show_secret(_secret(), group)
    return group


def group_of_pipeline(groups: ProcessGroups) -> dist.ProcessGroup | None:
    """Return a gloo group of the ranks of this rank's pipeline, in the order of stages, for tensors on the host
    (collective); None for a pipeline of one stage.
    """
    if groups.pp.size() == 1:
        return None
    pipelines = sorted(map(list, {tuple(ranks) for ranks in gather_values(dist.get_process_group_ranks(groups.pp))}))
    group, _ = dist.new_subgroups_by_enumeration(pipelines, timeout=_Joined.timeout, backend="gloo")
    show_secret(_secret(), group)
    return group


class DeepSpeedTopology:
    """The process groups under the method names that DeepSpeed expects of its `mpu` argument.

    megatron-core no longer has some of these names. DeepSpeed's "model parallel" ranks are all that hold parts of one
    model replica; norms are reduced over them. Its data-parallel ranks hold the same weights, and it divides the
    optimiser among them.
    """

    def __init__(self, groups: ProcessGroups, *, divide_optimizer: bool) -> None:
        self._groups = groups
        # At ZeRO stage 0 nothing is divided: DeepSpeed is given a group of one rank, and the engine reduces gradients.
        self._sharers = (
            groups.dp_cp if divide_optimizer else dist.new_group([dist.get_rank()], use_local_synchronization=True)
        )

    def sharers_of(self, ranks: dist.ProcessGroup) -> dist.ProcessGroup:
        """Return the ranks among which ZeRO divides the states of weights that `ranks` share."""
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
