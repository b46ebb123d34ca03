"""Define a profile: the properties of a site's SLURM that a job needs and that recipes do not hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from bd3_scale.recipe.load import load_section
from bd3_scale.recipe.schema import Deadlines, NonNegativeInt, PositiveFloat, PositiveInt, RecipeError, Section
from bd3_scale.resilience.heartbeat import FOLDER_VARIABLE
from bd3_scale.resilience.readers import reader
from bd3_scale.resilience.secret import RENDEZVOUS_VARIABLE

FOLDER = Path("cluster/profiles")
TIME_LIMIT = r"^(\d+-)?\d+(:\d+){0,2}$"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Variables by which the supervisor finds its job and the ranks find each other. LD_PRELOAD and the like are allowed:
# whoever chooses a profile trusts its author.
_RESERVED = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_RESTART_COUNT"),
    *("SLURMD_NODENAME", FOLDER_VARIABLE, RENDEZVOUS_VARIABLE),
}


class Container(Section):
    """The container of the ranks: pyxis and enroot, through srun's `--container-*` options, or Apptainer."""

    engine: Literal["pyxis", "apptainer"] = "pyxis"
    image: str = Field(pattern="^[^-]")
    mounts: Annotated[tuple[Annotated[str, Field(pattern="^[^,]+$")], ...], Field(strict=False)] = Field(
        (), description="SOURCE:TARGET[:FLAGS]"
    )
    python: str = Field(
        "python3", pattern="^[^-]", description="Python in the image; the supervisor runs outside, with the site's own"
    )


class Preflight(Section):
    """The checks that every node must pass before ranks start there; a node that fails is excluded from the run."""

    min_free_gb: Annotated[float, Field(ge=0)] = Field(0, description="free space of `scratch`; 0: not checked")
    min_allreduce_gbps: Annotated[float, Field(ge=0)] = Field(0, description="bus bandwidth, GB/s; 0: measured only")
    max_clock_skew: PositiveFloat = Field(5, description="seconds")
    timeout: PositiveFloat = Field(300, description="seconds for all checks together")


class Profile(Section):
    """A site, or one partition of it, as described in `cluster/profiles/*.yaml`."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: NonNegativeInt = 0
    processes_per_node: PositiveInt | None = Field(None, description="default: gpus_per_node")
    cpus_per_process: PositiveInt = 1
    memory: str | None = Field(None, description="memory of a node, such as 200G; 0 takes all")
    exclusive: bool = False
    time_limit: str = Field(pattern=TIME_LIMIT, description="in sbatch's format, such as 1-00:00:00")
    requeue: bool = Field(True, description="false if the site forbids requeueing: then submit with --chain")
    warning_seconds: Annotated[int, Field(ge=20)] = Field(
        300,
        description="seconds before the time limit at which ranks are asked to save; they get three quarters of them, "
        "which must be enough for two saves, since one may have begun already",
    )
    max_failures: PositiveInt = Field(3, description="crashes and hangs in a row without a newer checkpoint")
    deadlines: Deadlines = Deadlines()
    modules: Annotated[tuple[str, ...], Field(strict=False)] = ()
    environment: dict[str, str] = Field({}, description="variables of every rank")
    interface: str | None = Field(None, description="network interface of gloo and NCCL's bootstrap")
    scratch: str | None = Field(None, description="node-local folder, for the cache of data.remote")
    shared_storage: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="folders that all nodes see; run directories elsewhere are refused"
    )
    container: Container | None = None
    preflight: Preflight | None = None

    @field_validator("environment")
    @classmethod
    def _variables_have_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                raise ValueError("must have names of letters, digits and _ that do not begin with a digit")
            if name in _RESERVED:
                raise ValueError(f"must not set {name}: the supervisor sets it")
        return value

    @property
    def processes(self) -> int:
        """Return the number of ranks on a node."""
        return self.processes_per_node or self.gpus_per_node


@reader("a profile", path="name")
def load_profile(name: str) -> Profile:
    """Return a profile by its name in `cluster/profiles`, or by the path of a YAML file.

    Raises:
        ValueError: there is no such profile (the message lists those that exist), or it has wrong keys (all listed).
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml"))) or "none, and no such folder"
        raise ValueError(
            f"no profile {name!r}: {path} is missing. {FOLDER} has: {known}. Copy one and describe your site, or give "
            "the path of a YAML file"
        )
    profile = load_section(path, Profile)
    if not profile.processes:
        raise RecipeError(["set gpus_per_node, or processes_per_node if there are no GPUs"], str(path))
    return profile
