"""Test the verdicts of `bd3-scale doctor` with recorded output of tools and kernels of other machines."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest

from bd3_scale.launch import machine, network
from bd3_scale.launch.cluster_doctor import most_gpus, slurm_seconds
from bd3_scale.launch.doctor import Driver, graphics, read_driver, software
from bd3_scale.launch.findings import Finding, has_problem
from bd3_scale.launch.gpus import Card, parse_cards, parse_links, wrong_driver
from bd3_scale.observe.environment import Environment, Gpu

# As printed on a machine of eight cards with NVLink, cut to three, and on one of two cards behind a host bridge.
NVLINK = """\
\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tPIX\tNODE\t0-23,96-119\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNODE\tPIX\t0-23,96-119\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tSYS\tSYS\t24-47,120-143\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\t X \tNODE
NIC1\tNODE\tPIX\tSYS\tNODE\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""
BRIDGE = """\
\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tPHB\t0-63\t0\t\tN/A
GPU1\tPHB\t X \t0-63\t0\t\tN/A
"""
H100 = Card(0, "NVIDIA H100 80GB HBM3", 81559, "580.95.05", False)


def named(found: list[Finding], name: str) -> Finding:
    (finding,) = (each for each in found if each.name == name)
    return finding


def test_what_nvidia_smi_prints_is_read() -> None:
    assert parse_links(NVLINK) == {(0, 1): "NV18", (0, 2): "NV18", (1, 2): "NV18"}
    assert parse_links(BRIDGE) == {(0, 1): "PHB"}
    printed = "0, NVIDIA H100 80GB HBM3, 81559, 580.95.05, Disabled\n1, NVIDIA GB10, [N/A], 580.95.05, [N/A]\n"
    assert parse_cards(printed) == [H100, Card(1, "NVIDIA GB10", 0, "580.95.05", False)]
    assert parse_cards("No devices were found\n") == []


@pytest.mark.parametrize(
    ("driver", "cuda", "fits"),
    [
        ("580.65.06", "13.0", True),
        ("610.10", "13.0", True),
        ("570.124.06", "13.0", False),
        ("535.161.08", "12.8", True),
        ("470.57.02", "12.8", False),
    ],
)
def test_a_driver_fits_a_major_version_of_cuda(driver: str, cuda: str, fits: bool) -> None:
    assert (wrong_driver(driver, cuda) is None) == fits


def environment(cuda: str | None, gpus: int) -> Environment:
    seen = (Gpu(H100.name, 79.6, "9.0"),) * gpus
    return Environment({"python": "3.12.1", "torch": "2.13.0"}, "a CPU", 8, cuda, seen, ())


def test_a_build_without_cuda_and_an_old_driver_are_problems_where_there_are_gpus() -> None:
    none = Driver((), {}, "nvidia-smi is not on this machine")
    assert not has_problem([*software(environment(None, 0), none, 0), *graphics(none, 0)])
    assert named(list(graphics(none, 8)), "cards").verdict == "problem"
    assert named(list(software(environment(None, 0), Driver((H100,), {}), 0)), "CUDA of torch's build").fix


def test_cards_and_their_links() -> None:
    mixed = (H100, Card(1, "NVIDIA A100-SXM4-80GB", 81920, H100.driver, True))
    found = list(graphics(Driver(mixed, parse_links(BRIDGE)), 2))
    assert [(each.name, each.verdict) for each in found if each.verdict == "warning"] == [
        ("alike", "warning"),
        ("links", "warning"),
    ]
    assert named(found, "links").value == "1 pairs PHB"
    alike = list(graphics(Driver((H100,) * 3, parse_links(NVLINK)), 3))
    assert {each.verdict for each in alike if each.name != "compiler"} == {"ok"}
    assert named(alike, "cards").value == "3 x NVIDIA H100 80GB HBM3, 79.6 GiB"


def test_a_driver_that_fails_is_a_problem_and_one_that_is_missing_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    missing = read_driver()
    assert [each.verdict for each in graphics(missing, 0)] == ["ok"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho no communication with the driver; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (cards,) = graphics(read_driver(), 0)
    assert (cards.verdict, cards.value) == ("problem", "nvidia-smi fails: no communication with the driver")
    found = list(graphics(Driver((H100,), {}), 1))
    assert "none, with" in named(found, "compiler").value, "a PATH without a compiler"
    assert named(found, "compiler").verdict == "problem"


def adapter(sys: Path, name: str, state: str, rate: str = "400 Gb/sec (4X NDR)", layer: str = "InfiniBand") -> None:
    port = sys / "class/infiniband" / name / "ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "rate").write_text(f"{rate}\n")
    (port / "link_layer").write_text(f"{layer}\n")


def test_adapters_by_what_sysfs_has_of_them(tmp_path: Path) -> None:
    assert [each.verdict for each in network.fabric(network.rdma_ports(tmp_path), {}, 8)] == ["warning"]
    assert [each.verdict for each in network.fabric([], {}, 0)] == ["ok"]
    adapter(tmp_path, "mlx5_0", "4: ACTIVE")
    adapter(tmp_path, "mlx5_1", "4: ACTIVE", "100 Gb/sec (2X HDR)", "Ethernet")
    (both,) = network.fabric(network.rdma_ports(tmp_path), {}, 8)
    assert (both.verdict, both.value) == ("ok", "1 x InfiniBand 400 Gb/sec (4X NDR); 1 x RoCE 100 Gb/sec (2X HDR)")
    adapter(tmp_path, "mlx5_2", "1: DOWN")
    (one_down,) = network.fabric(network.rdma_ports(tmp_path), {}, 8)
    assert one_down.verdict == "warning"
    assert one_down.value.endswith("; down: mlx5_2/1 DOWN")
    assert "NCCL_IB_HCA=mlx5_0,mlx5_1 " in one_down.fix


def test_efa_needs_a_plug_in(tmp_path: Path) -> None:
    adapter(tmp_path, "rdmap16s27", "1: DOWN")
    (down,) = network.fabric(network.rdma_ports(tmp_path), {}, 8)
    assert down.verdict == "problem"
    adapter(tmp_path, "efa_0", "4: ACTIVE", "100 Gb/sec (4X EDR)", "Unspecified")
    without = network.fabric(network.rdma_ports(tmp_path), {}, 8)
    assert named(without, "NCCL over EFA").verdict == "warning"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libnccl-net-ofi.so").touch()
    paths = {"LD_LIBRARY_PATH": f"/nowhere:{tmp_path}/lib"}
    assert named(network.fabric(network.rdma_ports(tmp_path), paths, 8), "NCCL over EFA").verdict == "ok"


@pytest.mark.parametrize(
    ("variables", "clustered", "gloo", "nccl"),
    [
        ({"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib"}, True, "ok", "ok"),
        ({"GLOO_SOCKET_IFNAME": "ib1", "NCCL_SOCKET_IFNAME": "=ib"}, True, "problem", "problem"),
        ({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "^ib,eth"}, True, "warning", "warning"),
        ({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}, False, "ok", "ok"),
        ({"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "^lo"}, True, "problem", "ok"),
    ],
)
def test_interfaces(tmp_path: Path, variables: dict[str, str], clustered: bool, gloo: str, nccl: str) -> None:
    for name, state in {"lo": "unknown", "eth0": "up", "eth1": "down", "ib0": "up"}.items():
        (tmp_path / "class/net" / name).mkdir(parents=True)
        (tmp_path / "class/net" / name / "operstate").write_text(f"{state}\n")
    (tmp_path / "class/net" / "veth1").mkdir()  # goes away while it is looked at
    found = network.interfaces(variables, clustered=clustered, sys=tmp_path)
    assert [each.verdict for each in found] == [gloo, nccl]
    assert all("eth0 ib0" in each.fix for each in found if each.verdict != "ok")


def test_a_name_that_stands_for_loopback_is_no_way_to_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    assert network.interfaces({}, clustered=True)[0].verdict == "problem"
    assert network.interfaces({}, clustered=False)[0].verdict == "ok"


def test_variables_that_hurt(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/libcudart.so.12").touch()
    (tmp_path / "site/torch").mkdir(parents=True)
    sick = {
        "NCCL_IB_DISABLE": "1",
        "NCCL_DEBUG": "info",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512",
        "CUDA_VISIBLE_DEVICES": "",
        "LD_LIBRARY_PATH": f"/usr/lib/nowhere:{tmp_path}/cuda",
        "PYTHONPATH": f"{tmp_path}/site",
        "RANK": "0",
        "WORLD_SIZE": "8",
    }
    found = {each.name: each.verdict for each in network.environment(sick, gpus=1)}
    problems = {"CUDA_VISIBLE_DEVICES", "PYTHONPATH", "ranks"}
    assert found == {name: "problem" if name in problems else "warning" for name in [*list(sick)[:-2], "ranks"]}
    well = {
        "NCCL_IB_DISABLE": "0",
        "NCCL_DEBUG": "WARN",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "SLURM_JOB_ID": "7",
        "LD_LIBRARY_PATH": str(tmp_path),
    }
    assert [each.verdict for each in network.environment(well, gpus=2)] == ["ok"]


def test_limits_where_an_adapter_registers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(machine.limits(rdma=False), "locked memory").verdict == "ok"
    everything = {"RLIMIT_MEMLOCK": (8 << 20, 8 << 20), "RLIMIT_NOFILE": (1024, 4096), "RLIMIT_CORE": (-1, -1)}
    real = resource.getrlimit
    told = {getattr(resource, name): limit for name, limit in everything.items()}
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(resource, "getrlimit", lambda which: told.get(which) or real(which))
    found = machine.limits(rdma=True)
    assert named(found, "locked memory").verdict == "problem"
    assert [named(found, name).verdict for name in ("open files", "core dumps")] == ["warning"] * 2
    told[resource.RLIMIT_NOFILE] = (64, 64)
    assert "ulimit -n" in named(machine.limits(rdma=True), "for a rank").fix


MOUNTS = """\
22 27 0:21 / / rw,relatime - overlay overlay rw,lowerdir=/a
40 22 0:44 / /shared rw shared:3 - lustre 10.0.0.1@o2ib:/fs rw,flock
41 40 0:45 / /shared/home\\040of\\040all rw - nfs4 server:/export rw,vers=4.2
42 22 0:46 / /dev/shm rw - tmpfs tmpfs rw
43 22 0:47 / /bucket rw - fuse.s3fs s3fs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/shared/runs/mine", "lustre"),
        ("/shared/home of all/me", "nfs4"),
        ("/sharedness", "overlay"),
        ("/bucket/runs", "fuse.s3fs"),
    ],
)
def test_the_file_system_of_a_folder(folder: str, kind: str) -> None:
    assert machine.file_system(Path(folder), MOUNTS)[0] == kind


def test_a_folder_on_this_machine(tmp_path: Path) -> None:
    kind, room, write = machine.storage(tmp_path)
    assert (kind.topic, write.verdict) == ("storage", "ok")
    assert float(re.sub("[^0-9.]", "", room.value)) > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for name in ("file", "nowhere"):
        (wrong,) = machine.storage(tmp_path / name)
        assert (wrong.verdict, wrong.value) == ("problem", "no such folder")
    assert not (tmp_path / "nowhere").exists()
    (volatile, *_) = machine.storage(Path("/dev/shm"))
    assert volatile.verdict == "warning"


def test_shared_memory(tmp_path: Path) -> None:
    assert machine.shared_memory(8, tmp_path).verdict == "ok"
    assert machine.shared_memory(8, tmp_path / "nowhere").verdict == "problem"
    no_room = Path("/proc")
    assert [machine.shared_memory(gpus, no_room).verdict for gpus in (1, 2)] == ["ok", "problem"]


TRACKING = """\
Reference ID    : A9FEA97B (169.254.169.123)
Stratum         : 4
System time     : 0.000001501 seconds slow of NTP time
Leap status     : {}
"""


@pytest.mark.parametrize(
    ("tracking", "timedate", "kept"),
    [
        (TRACKING.format("Normal"), "", True),
        (TRACKING.format("Not synchronised"), "NTPSynchronized=yes\n", False),
        ("", "Timezone=Etc/UTC\nNTP=yes\nNTPSynchronized=no\n", False),
        ("", "Timezone=Etc/UTC\nNTP=yes\nNTPSynchronized=yes\n", True),
        ("", "", None),
    ],
)
def test_who_keeps_the_clock(tracking: str, timedate: str, kept: bool | None) -> None:
    assert machine.clock_is_synchronised(tracking, timedate) is kept


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("30:00", 1800), ("1:30:00", 5400), ("1-00", 86400), ("1-02:30", 95400), ("2-00:00:30", 172830)],
)
def test_time_limits_as_sbatch_reads_them(limit: str, seconds: int) -> None:
    assert slurm_seconds(limit) == seconds


@pytest.mark.parametrize(
    ("gres", "most"),
    [
        ("gpu:h100:8(S:0-1)\n", 8),
        ("gpu:4\n(null)\n", 4),
        ("gpu:a100:2(S:0),gpu:v100:1,nvme:1\n", 3),
        ("gpu:a100:4(S:0),nvme:no_consume:7\ngpu:h100_80g:8\n", 8),
        ("(null)\n", 0),
    ],
)
def test_gpus_of_a_node_as_sinfo_prints_them(gres: str, most: int) -> None:
    assert most_gpus(gres) == most
