"""Describe the machine and the software of a run (versions, commit, processors), and measure its memory."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import resource
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bd3_scale import processor

_PACKAGES = (
    "bd3_scale",
    "torch",
    "torchvision",
    "triton",
    "megatron-core",
    "deepspeed",
    "mosaicml-streaming",
    "transformers",
    "tokenizers",
    "numpy",
    "wandb",
)


# Those that decide what a checkpoint contains.
_WRITERS = ("bd3_scale", "torch", "megatron-core", "deepspeed")


# Instructions that decide how fast a CPU multiplies matrices, by their names in /proc/cpuinfo: x86 first, then ARM.
_CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "bf16",
}


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    compute_capability: str


@dataclass(frozen=True)
class Acceleration:
    """Something optional that makes a run faster; `found`: on this machine, `used`: by this version of bd3_scale."""

    name: str
    found: bool
    used: bool
    note: str


@dataclass(frozen=True)
class Environment:
    """A machine as a run sees it: versions (None: not installed), CPU with the cores of this process, GPUs."""

    versions: dict[str, str | None]
    cpu: str
    cpu_cores: int
    cuda: str | None
    gpus: tuple[Gpu, ...]
    accelerations: tuple[Acceleration, ...]


def read_environment() -> Environment:
    """Inspect this machine; this imports torch, and apex and Triton if they are installed."""
    import torch

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Environment(
        versions=package_versions(),
        cpu=cpu_name(),
        cpu_cores=len(os.sched_getaffinity(0)),
        cuda=torch.version.cuda,
        gpus=tuple(Gpu(p.name, round(p.total_memory / 2**30, 1), f"{p.major}.{p.minor}") for p in properties),
        accelerations=(_bf16(), apex_acceleration(), _triton()),
    )


@functools.cache
def software() -> dict[str, str]:
    """Return the versions of what writes checkpoints, and the commit of this code; imports none of it."""
    versions = {name: version for name in _WRITERS if (version := _version(name)) is not None}
    return versions | {"commit": source_commit()}


def source_commit() -> str:
    """Return the commit of this code, with `+` if files differ from it; `unknown` outside a git checkout.

    Files in benchmarks/ do not count: they hold measurements, not code.
    """
    # git status would lock the index, and a commit at the same moment would fail.
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), "status", "--porcelain=v2", "--branch"]
    git += ["--", ":(top)", ":(top,exclude)benchmarks"]
    try:
        lines = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    head = next(line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid "))
    return head[:12] + "+" * any(not line.startswith("#") for line in lines)


def cpu_flags() -> list[str]:
    """Return the vector and matrix instructions of this CPU; [] if the system does not list them.

    Times of two CPUs compare only with them. The name does not tell: some CPUs named "AMD EPYC" have AVX-512 with bf16,
    some have neither.
    """
    present = processor.flags()
    return [name for flag, name in _CPU_FLAGS.items() if flag in present]


def cpu_in_words() -> str:
    """Describe this CPU for the caption of a benchmark: name, cores of this process, instructions."""
    flags = ", ".join(cpu_flags()) or "flags unknown"
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores ({flags})"


def has_fast_bf16() -> bool:
    """Return whether bf16 matrix products run in hardware: on every GPU, or on the CPU if there is no GPU.

    GPUs: from compute capability 8.0. CPUs: see `processor.multiplies_bf16`; elsewhere torch emulates bf16 at a loss.
    """
    import torch

    if torch.cuda.is_available():
        return all(torch.cuda.get_device_capability(i) >= (8, 0) for i in range(torch.cuda.device_count()))
    return processor.multiplies_bf16()


def _bf16() -> Acceleration:
    fast = has_fast_bf16()
    note = f"train.precision=auto takes {'bf16' if fast else 'fp32'}"
    return Acceleration("bf16", fast, fast, note)


def find_apex() -> Any:
    """Return NVIDIA apex's FusedAdam, or None; the package called apex on PyPI is an unrelated web toolkit."""
    try:
        importlib.import_module("amp_C")
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        return None


def apex_acceleration() -> Acceleration:
    """Return whether NVIDIA's apex is installed, and whether it is used."""
    import torch

    if find_apex() is not None:
        return Acceleration("NVIDIA apex", True, torch.cuda.is_available(), "FusedAdam updates weights on a GPU")
    note = "not installed: torch's fused AdamW updates the weights"
    if importlib.util.find_spec("apex"):
        note = "the installed `apex` is another program or was built without CUDA extensions"
    return Acceleration("NVIDIA apex", False, False, note)


def _triton() -> Acceleration:
    """Return whether attention uses Triton, for the most common head size."""
    import torch

    from bd3_scale.attention.backends import choose_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        backend = choose_backend("auto", device, torch.bfloat16 if has_fast_bf16() else torch.float32, head_dim=128)
        note = f"attention_backend=auto takes {backend}"
    except ValueError as error:
        backend, note = None, str(error)
    found = importlib.util.find_spec("triton") is not None
    return Acceleration("Triton", found, backend == "triton", note)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that a run depends on; None: it is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def cpu_name() -> str:
    """Return the name that the CPU gives itself, else the architecture."""
    return processor.fields().get("model name", platform.machine())


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process, in bytes (VmHWM of proc(5), Linux).

    getrusage(2) is no substitute: its maximum survives exec, so that a small program started by a large one looks
    large.
    """
    return _bytes(_fields("/proc/self/status")["VmHWM"])


def available_bytes() -> int:
    """Return the memory that this process can still allocate, in bytes (proc(5), cgroups(7), getrlimit(2); Linux).

    It is the minimum of the free memory of the machine, of the rest that the control groups allow, and of the rest of
    the limits of the process.
    """
    own = _fields("/proc/self/status")
    found = [_bytes(_fields("/proc/meminfo")["MemAvailable"])]
    groups = Path("/proc/self/cgroup")
    group = groups.read_text().rstrip().rpartition(":")[2] if groups.is_file() else ""
    for folder in Path("/sys/fs/cgroup", group.strip("/"), "memory.max").parents:
        limit = folder / "memory.max"
        if limit.is_file() and (text := limit.read_text().strip()) != "max":
            found.append(int(text) - _bytes(own["VmRSS"]))
    for kind, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        if (soft := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
            found.append(soft - _bytes(own[used]))
    return max(0, min(found))


def _fields(path: str) -> dict[str, str]:
    return dict(line.split(":", 1) for line in Path(path).read_text().splitlines())


def _bytes(kilobytes: str) -> int:
    return int(kilobytes.split()[0]) * 1024


def peak_cuda_bytes() -> int | None:
    """Return the peak of the memory that PyTorch allocated on the current CUDA device, in bytes; None without CUDA."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
