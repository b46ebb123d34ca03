"""Check the nodes of a job before its ranks start there: `python -m bd3_scale.launch.preflight`, one task a node.

Every node first checks its GPUs and its scratch folder and writes a report. Then all nodes together compare their
clocks and measure the interconnect. DIR/<node>.json is the report:

    {"node": "n3", "ok": false, "problems": ["..."], "job_problems": [], "measured": {"allreduce_gbps": 41.7}}

`problems` belong to this node and make it not ok. `job_problems` cannot be attributed to one node. Exit codes: 0 no
problem, 3 this node has a problem, 1 the job has one.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bd3_scale.launch.gpus import ask_driver
from bd3_scale.resilience.files import check_writable, write_atomically
from bd3_scale.resilience.terminal import tell

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

NODE_PROBLEM, JOB_PROBLEM = 3, 1
GPU_REDUCE_BYTES, CPU_REDUCE_BYTES, LINK_BYTES = 64 << 20, 16 << 20, 16 << 20
REPEATS = 5


@dataclass
class Report:
    """The report of a node. `doing` names the local check in progress since `since`; None while it waits for others."""

    path: Path
    node: str
    problems: list[str] = field(default_factory=list)
    job_problems: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    doing: str | None = None
    since: float = 0.0  # on the monotonic clock
    computes: bool = True  # whether its processors may take part in an exchange

    @property
    def exit_code(self) -> int:
        """Return the exit code of the process."""
        return NODE_PROBLEM if self.problems else JOB_PROBLEM if self.job_problems else 0

    def begin(self, check: str | None) -> None:
        """Note which local check begins now; None: none is in progress."""
        self.doing, self.since = check, time.monotonic()

    def write(self) -> None:
        """Write the report. OSError: the folder cannot be written."""
        found = {"problems": self.problems, "job_problems": self.job_problems, "measured": self.measured}
        write_atomically(self.path, json.dumps({"node": self.node, "ok": not self.problems, **found}, indent=1) + "\n")


def main() -> NoReturn:
    """Check this node by the command line and end the process with the exit code."""
    code = preflight()
    sys.stderr.flush()
    os._exit(code)  # torch's shutdown can hang or abort where other nodes are gone


def preflight(arguments: Sequence[str] | None = None) -> int:
    """Check this node, write its report and return the exit code."""
    options = _parse(arguments)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    report = Report(options.out / f"{node}.json", node)
    until = time.monotonic() + options.timeout
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with _end_in_time(report, options.timeout):
            try:
                check_node(report, options)
                report.write()  # before others are waited for: they may never come
                check_together(report, options, until)
            except ImportError as error:
                report.job_problems.append(f"{error}: install bd3_scale's requirements for {sys.executable}")
            report.write()
    except OSError as error:
        report.job_problems.append(f"{error}: --out must be a folder that this node can write")
    _print_problems(report)
    return report.exit_code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="preflight", description="Check the nodes of a job; srun starts it once on each."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="shared folder of the reports")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that a node must have; 0: it works on its CPUs")
    parser.add_argument("--scratch", type=Path, required=True, help="folder that must exist and be writable")
    parser.add_argument(
        "--min-free-gb", type=float, default=0.0, help="10^9 bytes in the scratch folder; 0: not checked"
    )
    parser.add_argument("--min-allreduce-gbps", type=float, default=0.0, help="bus bandwidth, GB/s; 0: only measured")
    parser.add_argument("--max-clock-skew", type=float, default=5.0, help="seconds from the median clock")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for all of it")
    return parser.parse_args(arguments)


def _print_problems(report: Report) -> None:
    for problem in [*report.problems, *report.job_problems]:
        tell(f"preflight: {report.node}: {problem}")


@contextmanager
def _end_in_time(report: Report, seconds: float) -> Iterator[None]:
    """End the process after `seconds`: drivers and NCCL can hang where no exception reaches them."""
    timer = threading.Timer(seconds, _give_up, (report, seconds))
    timer.daemon = True
    timer.start()
    # This timer needs no interpreter lock: a driver may hang in a call of torch that holds the lock.
    faulthandler.dump_traceback_later(seconds + 5, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _give_up(report: Report, seconds: float) -> None:
    try:
        late = f"not done {seconds:g} s after the start (--timeout)"
        if not report.doing:
            report.job_problems.append(_lost_other_nodes(late))
        elif time.monotonic() - report.since > seconds / 2:
            report.problems.append(f"{report.doing} hung: {late}")
        else:  # what came before took the time: imports from a slow shared folder
            report.job_problems.append(f"{report.doing} was {late}, and began late: give it more time")
        _print_problems(report)
        report.write()
    finally:
        os._exit(report.exit_code)


def _lost_other_nodes(why: str) -> str:
    return (
        "could not connect to the other nodes, or lost them, at "
        f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {why}. Look for "
        "nodes without a report, and set the profile's `interface` where a node's name resolves to a loopback address"
    )


def check_node(report: Report, options: argparse.Namespace) -> None:
    """Run the checks that need one node only."""
    # nvidia-smi first: where the driver hangs, it hangs in its own process and not in this one.
    if options.gpus:
        report.begin("nvidia-smi")
        _check_ecc(report)
    report.begin(None)  # a slow import is the shared storage's fault, not this node's
    import torch

    report.begin("matrix product")
    _check_processors(report, torch, options.gpus)
    report.begin(f"writing to {options.scratch}")
    _check_scratch(report, options.scratch, options.min_free_gb)
    report.begin(None)


def _check_ecc(report: Report) -> None:
    try:
        table = ask_driver("--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits")
    except TimeoutError as error:
        report.problems.append(str(error))
        return
    except OSError as error:
        report.measured["ecc"] = f"not read: {error}"
        return
    errors = uncorrected_errors(table)
    report.measured["ecc_uncorrected"] = sum(errors.values())
    report.problems += [f"GPU {gpu} has {n} uncorrected ECC errors: reset or replace it" for gpu, n in errors.items()]


def uncorrected_errors(table: str) -> dict[str, int]:
    """Return GPU index -> number of errors, where it is not 0; cards without ECC print [N/A]."""
    rows = (line.partition(",") for line in table.splitlines())
    counts = {gpu.strip(): int(count) for gpu, _, count in rows if count.strip().isdigit()}
    return {gpu: count for gpu, count in counts.items() if count}


def _check_processors(report: Report, torch: Any, gpus: int) -> None:
    visible = torch.cuda.device_count()
    report.measured["gpus"] = visible
    problems = []
    if visible < gpus:
        problems.append(f"{visible} GPUs are visible and {gpus} are needed: is one lost (nvidia-smi -L)?")
    for device in [f"cuda:{i}" for i in range(min(visible, gpus))] or ["cpu"]:
        try:
            if not _multiplies(torch, device):
                problems.append(f"{device} gives a wrong matrix product: take the node out of service")
        except RuntimeError as error:
            problems.append(f"{device} fails at a matrix product: {_first_line(error)}")
    report.computes = not problems
    report.problems += problems


def _first_line(error: Exception) -> str:
    """Return the first line of an error: torch appends a C++ stack."""
    return str(error).partition("\n")[0].rstrip(".")


def _multiplies(torch: Any, device: str) -> bool:
    """Return whether a matrix product is right to the last bit.

    Integers from -8 to 8 and their sums of 512 products (below 2^15) are exact in fp32, and in TF32, in any order.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (512, 512), generator=generator) for _ in range(2))
    product = a.to(device, torch.float32) @ b.to(device, torch.float32)
    return bool((product.cpu().long() == a @ b).all())


def _check_scratch(report: Report, scratch: Path, min_free_gb: float) -> None:
    try:
        # A missing folder is not created: where a mount failed, data would fill the root disk.
        disk = os.statvfs(scratch)
        report.measured["free_gb"] = round(disk.f_bavail * disk.f_frsize / 1e9, 2)
        check_writable(scratch, int(min_free_gb * 1e9))
    except FileNotFoundError:
        report.problems.append(f"scratch folder {scratch} is missing: mount it, or name another in the profile")
    except OSError as error:
        report.problems.append(f"scratch folder: {error}")


def check_together(report: Report, options: argparse.Namespace, until: float) -> None:
    """Run the checks that need several nodes; nothing for a single one. until: deadline on the monotonic clock."""
    rank, nodes = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
    if nodes == 1:
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        report.job_problems.append(f"{' and '.join(missing)} not set: export where the {nodes} nodes meet")
        return
    import torch.distributed as dist

    # A second less than the process has: torch then reports which rank is missing.
    timeout = timedelta(seconds=max(1.0, until - time.monotonic() - 1))
    address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=nodes, timeout=timeout)
        _check_clocks(report, options.max_clock_skew)
        if (device := _agree_on_device(report, options.gpus)) is not None:
            _check_interconnect(report, device, options.min_allreduce_gbps, timeout)
        dist.destroy_process_group()
    except RuntimeError as error:  # torch's errors of network, store and NCCL are of this kind
        report.job_problems.append(_lost_other_nodes(_first_line(error)))


def _gather(value: float) -> list[float]:
    """Return the value of every rank, once all ranks have called this."""
    import torch
    import torch.distributed as dist

    values = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(values, torch.tensor([value], dtype=torch.float64))
    return [float(each) for each in values]


def _check_clocks(report: Report, limit: float) -> None:
    import torch.distributed as dist

    _gather(0)  # a barrier: all ranks read their clocks at the same moment
    offsets, wrong = wrong_clocks(_gather(time.time()), limit)
    mine = offsets[dist.get_rank()]
    report.measured["clock_offset_s"] = round(mine, 3)
    if not wrong and max(map(abs, offsets)) > limit:
        report.job_problems.append(
            f"clocks differ by {max(offsets) - min(offsets):.3g} s, more than {limit:g} s, and no majority agrees: "
            "synchronise them (chronyc tracking)"
        )
    if dist.get_rank() in wrong:
        report.problems.append(
            f"its clock is {mine:+.3g} s off the median, more than {limit:g} s: synchronise it (chronyc tracking)"
        )


def wrong_clocks(times: Sequence[float], limit: float) -> tuple[list[float], list[int]]:
    """Return the seconds of each rank's clock from the median, and the ranks off by more than `limit`.

    None is named unless most ranks agree: of two clocks nobody knows which is wrong.
    """
    median = statistics.median_low(times)
    offsets = [t - median for t in times]
    wrong = [rank for rank, offset in enumerate(offsets) if abs(offset) > limit]
    return offsets, wrong if 2 * len(wrong) < len(times) else []


def _agree_on_device(report: Report, gpus: int) -> torch.device | None:
    """Return the device for the exchange; None where a node lacks its GPUs: the others would wait for it for ever."""
    import torch

    wanted = torch.device("cuda", 0) if gpus else torch.device("cpu")
    gpus_by_rank = _gather(gpus if report.computes else -1)
    if min(gpus_by_rank) < 0 or min(gpus_by_rank) != max(gpus_by_rank):
        report.measured["interconnect"] = "not measured: not every node's processors are in order"
        return None
    return wanted


def _check_interconnect(report: Report, device: torch.device, floor: float, timeout: timedelta) -> None:
    """Measure an all-reduce over one GPU of each node, and single links where it is slower than `floor` (GB/s)."""
    import torch
    import torch.distributed as dist

    group = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl", timeout=timeout)
    nodes, rank = dist.get_world_size(), dist.get_rank()
    data = torch.zeros((GPU_REDUCE_BYTES if group else CPU_REDUCE_BYTES) // 4, device=device)
    # The slowest rank's time counts for all: with different verdicts, some ranks would wait for the others below.
    seconds = max(_gather(_time(lambda: dist.all_reduce(data, group=group), device)))
    bandwidth = 2 * (nodes - 1) / nodes * data.nbytes / seconds / 1e9
    report.measured["allreduce_gbps"] = round(bandwidth, 3)
    if bandwidth >= floor:
        return
    links = _measure_links(device, group) if nodes > 2 else []
    report.measured["links_gbps"] = [round(link, 3) for link in links]
    slow = slow_nodes(links, floor)
    what = f"all-reduce runs at {bandwidth:.3g} GB/s, {floor:g} GB/s are needed"
    if not slow:
        report.job_problems.append(f"{what}; no node stands out: look at the fabric, or lower min_allreduce_gbps")
    elif rank in slow:
        mine = f"{links[rank - 1]:.3g} and {links[rank]:.3g} GB/s"
        report.problems.append(f"{what}; this node's links to both neighbours are slow ({mine}): check its adapter")


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one `work`, after a first one that sets connections up."""
    import torch

    work()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(REPEATS):
        work()
    wait()
    return (time.perf_counter() - start) / REPEATS


def _measure_links(device: torch.device, group: dist.ProcessGroup | None) -> list[float]:
    """Return GB/s each way between ranks i and i + 1, the last with the first; a rank measures one link at a time."""
    import torch
    import torch.distributed as dist

    nodes, rank = dist.get_world_size(), dist.get_rank()
    out, back = (torch.zeros(LINK_BYTES // 4, device=device) for _ in range(2))
    links = [0.0] * nodes
    # Links that share no rank are measured at the same time: even links, odd links, and in a ring of odd length the
    # link that closes it.
    rounds = [range(0, nodes - 1, 2), range(1, nodes - nodes % 2, 2), range(nodes - 1, nodes - 1 + nodes % 2)]
    for links_now in rounds:
        seconds = 0.0
        for link in links_now:
            ends = (link, (link + 1) % nodes)
            if rank in ends:
                other = ends[1 - ends.index(rank)]
                seconds = _time(lambda other=other: _swap(out, back, other, group), device)  # type: ignore[misc]
        seconds_by_rank = _gather(seconds)
        for link in links_now:
            links[link] = LINK_BYTES / seconds_by_rank[link] / 1e9
    return links


def _swap(out: torch.Tensor, back: torch.Tensor, other: int, group: dist.ProcessGroup | None) -> None:
    import torch.distributed as dist

    operations = [dist.P2POp(dist.isend, out, other, group), dist.P2POp(dist.irecv, back, other, group)]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


def slow_nodes(links: Sequence[float], floor: float) -> list[int]:
    """Return the ranks that explain the slow links of a ring: `links[i]` in GB/s joins rank i and the next.

    Such a rank has two slow links between fast ones. In a longer row of slow links, no rank can be identified.
    """
    n, slow = len(links), [link < floor for link in links]
    return [i for i in range(n) if slow[i - 1] and slow[i] and not slow[i - 2] and not slow[(i + 1) % n]]


if __name__ == "__main__":
    main()
