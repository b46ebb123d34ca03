"""Check how ranks of several nodes would reach each other, and environment variables that slow a run down or end it."""

from __future__ import annotations

import ctypes.util
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bd3_scale.launch.findings import Finding, checked

SYS = Path("/sys")


@dataclass(frozen=True)
class Port:
    """A port of an RDMA adapter by sysfs, such as mlx5_0/1, ACTIVE, 400 Gb/sec (4X NDR), InfiniBand."""

    name: str
    state: str
    rate: str
    layer: str

    @property
    def kind(self) -> str:
        """Return EFA, RoCE or InfiniBand."""
        if self.name.startswith("efa"):
            return "EFA"
        return "RoCE" if self.layer == "Ethernet" else self.layer


def rdma_ports(sys: Path = SYS) -> list[Port]:
    """Return the ports of all InfiniBand, RoCE and EFA adapters."""

    def read(path: Path) -> str:
        try:
            return path.read_text().strip()
        except OSError:
            return "unknown"

    return [
        Port(
            f"{port.parents[1].name}/{port.name}",
            read(port / "state").partition(": ")[2],
            read(port / "rate"),
            read(port / "link_layer"),
        )
        for port in sorted((sys / "class/infiniband").glob("*/ports/*"))
    ]


def fabric(ports: list[Port], env: Mapping[str, str], gpus: int) -> list[Finding]:
    """Check the RDMA adapters. gpus: GPUs of this machine; without GPUs it needs no adapter."""
    if not ports:
        return [
            checked(
                "network",
                "RDMA",
                "no InfiniBand, RoCE or EFA",
                rule="nodes with GPUs have one",
                fix="a run on several nodes exchanges gradients over TCP: ask the site which partition has RDMA, or "
                "stay on one node",
                broken=gpus > 0,
                verdict="warning",
            )
        ]
    active = [port for port in ports if port.state == "ACTIVE"]
    kinds = Counter(f"{port.kind} {port.rate}" for port in active)
    down = ", ".join(f"{port.name} {port.state}" for port in ports if port not in active)
    value = "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none is active"
    use = ",".join(port.name.partition("/")[0] for port in active)
    found = [
        checked(
            "network",
            "RDMA",
            f"{value}; down: {down}" if down else value,
            rule="every port is ACTIVE (/sys/class/infiniband)",
            fix=f"report it to the site; until then NCCL_IB_HCA={use} in the profile's environment uses the active ones"
            if active
            else "report it to the site: NCCL would fall back to TCP",
            broken=bool(down),
            verdict="warning" if active else "problem",
        )
    ]
    if any(port.kind == "EFA" for port in active):
        plugin = _nccl_plugin(env)
        found.append(
            checked(
                "network",
                "NCCL over EFA",
                plugin or "no libnccl-net.so",
                rule="the loader finds the plug-in aws-ofi-nccl",
                fix="add its lib folder to LD_LIBRARY_PATH in the profile's environment: without it NCCL uses TCP",
                broken=plugin is None,
                verdict="warning",
            )
        )
    return found


def _nccl_plugin(env: Mapping[str, str]) -> str | None:
    """Return NCCL's network plug-in that the loader would find, or None."""
    for folder in filter(None, env.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        for name in sorted(_names(folder)):
            if re.fullmatch(r"libnccl-net[\w-]*\.so.*", name):
                return f"{folder}/{name}"
    return ctypes.util.find_library("nccl-net")


def interfaces(env: Mapping[str, str], *, clustered: bool, sys: Path = SYS) -> list[Finding]:
    """Check the interfaces that gloo and NCCL's bootstrap would use. clustered: other nodes must reach them."""
    present = sorted(path.name for path in (sys / "class/net").iterdir()) if (sys / "class/net").is_dir() else []
    up = [name for name in present if _is_up(sys / "class/net" / name)]
    others = [name for name in up if name != "lo"]
    choice = f"one of {' '.join(others)}" if others else "the one that joins the nodes (ip link)"
    return [
        _interface(variable, env.get(variable), up, choice, clustered)
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    ]


def _is_up(interface: Path) -> bool:
    try:
        return (interface / "operstate").read_text().strip() in ("up", "unknown")
    except OSError:  # it was removed since it was listed, as interfaces of containers are
        return False


def _interface(variable: str, wish: str | None, up: list[str], choice: str, clustered: bool) -> Finding:
    library = variable.partition("_")[0]
    name = {"GLOO": "gloo", "NCCL": "NCCL's bootstrap"}[library]
    if wish:
        taken = matching(wish, up) if library == "NCCL" else [each for each in wish.split(",") if each in up]
        value = f"{' '.join(taken) or 'none'}, by {variable}={wish}"
        if not taken:
            fix = f"no interface of that name is up: set the profile's `interface` to {choice}"
            return Finding("network", name, value, "problem", "an interface that is up", fix)
        fix = f"it reaches this machine only: set the profile's `interface` to {choice}"
        return checked(
            "network",
            name,
            value,
            rule="it is not loopback between nodes",
            fix=fix,
            broken=clustered and taken == ["lo"],
            verdict="warning",
        )
    if library == "NCCL":
        # NCCL's own order (ncclFindInterfaces): ib… first, then any but docker… and lo, then docker…, then lo.
        ranked = sorted(up, key=lambda each: (not each.startswith("ib"), each.startswith("docker"), each == "lo"))
        return Finding("network", name, ranked[0] if ranked else "none", rule="chosen by NCCL")
    address = address_of_this_host()
    return checked(
        "network",
        name,
        f"the one with {address}, to which this machine's name resolves",
        rule="a machine's name resolves to an address that other nodes reach",
        fix=f"set the profile's `interface` to {choice}",
        broken=clustered and (address.startswith("127.") or address == "no address"),
    )


def matching(wish: str, names: list[str]) -> list[str]:
    """Return the interfaces that NCCL_SOCKET_IFNAME selects: prefixes, exact names after `=`, all others after `^`."""
    exact, other = wish.startswith(("=", "^=")), wish.startswith("^")
    words = wish.lstrip("^=").split(",")
    return [name for name in names if any(name == word if exact else name.startswith(word) for word in words) != other]


def address_of_this_host() -> str:
    """Return the address to which this machine's name resolves, or `no address`."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "no address"


@dataclass(frozen=True)
class _HarmfulVariable:
    """A variable and the values of it that slow a run down or end it."""

    name: str
    values: str  # a regular expression
    why: str
    fix: str = "unset it"


_VARIABLES = (
    _HarmfulVariable("NCCL_P2P_DISABLE", "1", "the GPUs of a node exchange through host memory"),
    _HarmfulVariable("NCCL_SHM_DISABLE", "1", "the GPUs of a node exchange through the network"),
    _HarmfulVariable("NCCL_IB_DISABLE", "1", "nodes exchange over TCP"),
    _HarmfulVariable(
        "NCCL_DEBUG",
        "(?i:INFO|TRACE)",
        "every rank writes pages, and NCCL is slower",
        "set it to WARN, which shows errors",
    ),
    _HarmfulVariable("CUDA_LAUNCH_BLOCKING", "1", "the host waits for every kernel"),
    _HarmfulVariable("TORCH_NCCL_BLOCKING_WAIT", "1", "the host waits for every collective"),
    _HarmfulVariable("TORCH_DISTRIBUTED_DEBUG", "DETAIL", "every collective is checked on all ranks first"),
    _HarmfulVariable("PYTORCH_NO_CUDA_MEMORY_CACHING", ".+", "every tensor is allocated by the driver"),
    _HarmfulVariable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "(?!.*expandable_segments:True).+",
        "the run keeps this value, and memory becomes fragmented",
        "add expandable_segments:True",
    ),
    _HarmfulVariable("LD_PRELOAD", ".+", "functions of another library replace those that were tested"),
    _HarmfulVariable("PYTHONHOME", ".+", "Python looks for its standard library elsewhere"),
)
_LIBRARIES = re.compile(r"lib(cudart|cublas|cudnn|nccl|nvrtc)\.so.*")


def environment(env: Mapping[str, str], *, gpus: int) -> list[Finding]:
    """Check variables that slow a run down or end it. gpus: GPUs of this machine."""
    found = [
        Finding("environment", v.name, env[v.name], "warning", f"unset, else {v.why}", v.fix)
        for v in _VARIABLES
        if v.name in env and re.fullmatch(v.values, env[v.name])
    ]
    found += [*_ranks(env), *_devices(env, gpus), *_foreign_libraries(env)]
    return found or [Finding("environment", "variables", "none that slows a run down or ends it")]


def _ranks(env: Mapping[str, str]) -> Iterator[Finding]:
    if {"RANK", "WORLD_SIZE"} <= env.keys():
        value = f"RANK={env['RANK']} WORLD_SIZE={env['WORLD_SIZE']}"
        rule = "only a launcher sets them: `train` would wait for the other ranks"
        yield Finding("environment", "ranks", value, "problem", rule, "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR")


def _devices(env: Mapping[str, str], gpus: int) -> Iterator[Finding]:
    visible = env.get("CUDA_VISIBLE_DEVICES")
    # In a job SLURM sets it.
    if visible is not None and "SLURM_JOB_ID" not in env and gpus:
        hidden = visible in ("", "-1")
        rule = "unset outside of a job"
        value = visible or "(empty)"
        yield Finding(
            "environment", "CUDA_VISIBLE_DEVICES", value, "problem" if hidden else "warning", rule, "unset it"
        )


def _foreign_libraries(env: Mapping[str, str]) -> Iterator[Finding]:
    """Yield folders whose libraries or modules are loaded in place of the installed ones."""
    for folder in filter(None, env.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        names = sorted(name for name in _names(folder) if _LIBRARIES.fullmatch(name))
        if names:
            shown = f"{folder}: {' '.join(names[:4])}{' …' if len(names) > 4 else ''}"
            rule = "torch's wheels contain CUDA, cuDNN and NCCL; those of a module would be loaded instead"
            fix = "take that module out of the profile's `modules`, or its folder out of LD_LIBRARY_PATH"
            yield Finding("environment", "LD_LIBRARY_PATH", shown, "warning", rule, fix)
    for folder in filter(None, env.get("PYTHONPATH", "").split(os.pathsep)):
        names = sorted(
            {"torch", "numpy", "deepspeed", "megatron", "transformers", "triton"}.intersection(_names(folder))
        )
        if names:
            rule = "packages come from the installed environment"
            fix = "unset PYTHONPATH, or take the module that sets it out of the profile"
            yield Finding("environment", "PYTHONPATH", f"{folder}: {' '.join(names)}", "problem", rule, fix)


def _names(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()
