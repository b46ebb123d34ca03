"""Make two hosts of this machine's network namespaces, and run ranks on them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "cable"
RANKS = 2  # on each host
_CLONE_NEWNET, _PR_SET_PDEATHSIG = 0x40000000, 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Host:
    """A host; the process `pid` only keeps the namespace open, so that it needs no name, which could collide."""

    pid: int
    address: str

    def command(self, *argv: object) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--", *map(str, argv)]

    def run(self, *argv: object) -> str:
        done = subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"{' '.join(map(str, argv))}: {done.stderr}"
        return done.stdout

    def traffic(self) -> tuple[int, int]:
        """Return the bytes that came and went through the cable."""
        lines = self.run("cat", "/proc/net/dev").splitlines()
        numbers = next(line.split()[1:] for line in lines if line.split()[0] == f"{INTERFACE}:")
        return int(numbers[0]), int(numbers[8])


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Start hosts with their own addresses and loopbacks, joined by a cable; they end with this process in any case."""
    with ExitStack() as stack:
        hosts = [stack.enter_context(_host(address)) for address in ("10.77.0.1", "10.77.0.2")]
        end = [INTERFACE, "netns", hosts[1].pid]
        hosts[0].run("ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", *end)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                host.run("ip", "link", "set", interface, "up")
        yield hosts


@contextmanager
def _host(address: str) -> Iterator[Host]:
    keeper = ["unshare", "--net", "sh", "-c", "echo && exec cat"]  # ends when this process does, or closes its input
    with subprocess.Popen(keeper, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline(), "unshare makes no network namespace here"
        yield Host(process.pid, address)


def rank_by_variables(hosts: list[Host], layout: str, out: Path) -> None:
    """Move a rank of the fork server to its host and set the variables that a launcher without an agent would set."""
    host, local_rank = divmod(int(os.environ["RANK"]), RANKS)
    _move_to(hosts[host])
    os.environ |= {"MASTER_ADDR": hosts[0].address, "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(RANKS)}
    run(layout, out)


def torchrun(hosts: list[Host], layout: str, out: Path) -> None:
    """Run one torchrun on each host; it forks its ranks with the imports done, which its command line would not."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    node = os.environ["RANK"]
    _move_to(hosts[int(node)])
    options = {"--nnodes": len(hosts), "--node-rank": node, "--nproc-per-node": RANKS, "--start-method": "fork"}
    options |= {"--master-addr": hosts[0].address, "--master-port": os.environ["MASTER_PORT"]}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # torchrun must set them
    arguments = [str(word) for option in options.items() for word in option]
    config, _, _ = config_from_args(parse_args([*arguments, "run"]))
    elastic_launch(config, run)(layout, out)


def _move_to(host: Host) -> None:
    with open(f"/proc/{host.pid}/ns/net") as network:
        if _LIBC.setns(network.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns failed")
    # Without it, Gloo takes the address of the machine's name, often a loopback address.
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


def run(name: str, out: Path) -> None:
    """Run the steps of `parity_ranks`, where the tensor-parallel ranks must be on one host."""
    import torch
    import torch.distributed as dist

    from bd3_scale.parallel.groups import process_groups
    from tests.integration import cases
    from tests.integration.parity_ranks import take_steps

    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with process_groups(cases.recipe(cases.LAYOUTS[name]).parallel) as groups:
        first = dist.get_rank() - int(os.environ["LOCAL_RANK"])
        assert dist.get_process_group_ranks(groups.tp) == [first, first + 1]
        found = take_steps(cases.LAYOUTS[name], groups)
        if dist.get_rank() == 0:
            torch.save(found, out)
