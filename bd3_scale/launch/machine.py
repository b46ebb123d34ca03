"""Check what a machine gives any program: limits, shared memory, storage and its clock."""

from __future__ import annotations

import os
import re
import resource
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from bd3_scale.launch.findings import Finding, checked
from bd3_scale.resilience.files import check_writable, write_atomically
from bd3_scale.resilience.limits import WANTED_OPEN_FILES, check_limits

# NCCL exchanges data between the GPUs of a node through /dev/shm. The 64 MB that Docker gives a container by default
# end in "unhandled system error" (NCCL's troubleshooting guide).
ENOUGH_SHARED_MEMORY = 1 << 30
ENOUGH_PROCESSES = 4096
LITTLE_ROOM = 50e9
SLOW_WRITE_SECONDS = 0.25
WRITES = 5
TOOL_SECONDS = 10.0
_UNLIMITED = "unlimited"
# FUSE mounts of object stores and ssh: a rename is a copy there, and a flush may do nothing.
_NO_FILE_SYSTEM = re.compile(r"fuse\.(s3fs|gcsfuse|goofys|rclone|mountpoint-s3|sshfs|blobfuse2?)")


def limits(rdma: bool) -> list[Finding]:
    """Check the resource limits of this process. rdma: whether an adapter registers memory here."""
    found = [_least_limits()]
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    found.append(
        checked(
            "limits",
            "open files",
            _shown(files),
            rule=f"{WANTED_OPEN_FILES} or more (ulimit -Hn)",
            fix="ask the site to raise it: a rank opens files, and a socket for every other rank",
            broken=_less(files, WANTED_OPEN_FILES),
            verdict="warning",
        )
    )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found.append(
        checked(
            "limits",
            "locked memory",
            _shown(locked),
            rule="unlimited where there is InfiniBand, RoCE or EFA (ulimit -l)",
            fix="ask the site for LimitMEMLOCK=infinity of slurmd, and PropagateResourceLimitsExcept=MEMLOCK in "
            "slurm.conf: else NCCL ends with `ibv_reg_mr … Cannot allocate memory`",
            broken=rdma and locked != resource.RLIM_INFINITY,
        )
    )
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    found.append(
        checked(
            "limits",
            "processes",
            _shown(processes),
            rule=f"{ENOUGH_PROCESSES} or more (ulimit -u), threads of all ranks of a node included",
            fix="ask the site to raise it: else `can't start new thread`",
            broken=_less(processes, ENOUGH_PROCESSES),
            verdict="warning",
        )
    )
    core = resource.getrlimit(resource.RLIMIT_CORE)[0]
    found.append(
        checked(
            "limits",
            "core dumps",
            _shown(core),
            rule="not unlimited (ulimit -c)",
            fix="ulimit -c 0: every rank that crashes would write its whole memory",
            broken=core == resource.RLIM_INFINITY,
            verdict="warning",
        )
    )
    return found


def _least_limits() -> Finding:
    """Run the check of limits with which a rank begins."""
    try:
        check_limits()
    except ValueError as error:
        return Finding(
            "limits", "for a rank", "too little", "problem", "the limits that a rank checks at its start", str(error)
        )
    return Finding("limits", "for a rank", "enough", rule="the limits that a rank checks at its start")


def _less(limit: int, wanted: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < wanted


def _shown(limit: int) -> str:
    return _UNLIMITED if limit == resource.RLIM_INFINITY else f"{limit:,}"


def shared_memory(gpus: int, folder: Path = Path("/dev/shm")) -> Finding:
    """Check the size of /dev/shm for the GPUs of a node."""
    try:
        size = os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize
    except OSError as error:
        return Finding("memory", str(folder), str(error), "problem", "it exists", "mount a tmpfs there")
    return checked(
        "memory",
        str(folder),
        f"{size / 2**30:.2f} GiB",
        rule=f"{ENOUGH_SHARED_MEMORY >> 30} GiB or more where a node has several GPUs",
        fix="start the container with more (docker run --shm-size=16g, or the host's /dev/shm mounted into it)",
        broken=gpus > 1 and size < ENOUGH_SHARED_MEMORY,
    )


def storage(folder: Path) -> list[Finding]:
    """Check a folder of runs or data: its file system, its free space, and the time of a small write."""
    name = str(folder)
    # The folder is not created: on a node where the shared file system is not mounted, it would be on the local disk.
    if not folder.is_dir():
        return [
            Finding(
                "storage",
                name,
                "no such folder",
                "problem",
                "it exists",
                "create it, or mount the file system that holds it",
            )
        ]
    try:
        check_writable(folder)
    except OSError as error:
        return [
            Finding(
                "storage", name, str(error), "problem", "it is writable", "mount it writable, or name another folder"
            )
        ]
    kind, source = file_system(folder.resolve(), Path("/proc/self/mountinfo").read_text())
    kind_of_storage = checked(
        "storage",
        name,
        f"{kind} ({source})",
        rule="a file system that renames and flushes files, and keeps them after a job",
        fix="put runs on a parallel or network file system; data alone may lie in an object store (data.remote)",
        broken=kind in ("tmpfs", "ramfs") or _NO_FILE_SYSTEM.fullmatch(kind) is not None,
        verdict="warning",
    )
    free = shutil.disk_usage(folder).free
    room = checked(
        "storage",
        f"{name}: free",
        f"{free / 1e9:,.1f} GB",
        rule=f"{LITTLE_ROOM / 1e9:g} GB or more; `bd3-scale plan` predicts the size of a run's checkpoints",
        fix="free space: a checkpoint that does not fit is not written, and the run goes on without it",
        broken=free < LITTLE_ROOM,
        verdict="warning",
    )
    return [kind_of_storage, room, _write_cost(folder)]


def _write_cost(folder: Path) -> Finding:
    """Measure a small write, flush and rename, as of heartbeats and manifests."""
    probe, seconds = folder / f".doctor-{os.uname().nodename}-{os.getpid()}", []
    try:
        for _ in range(WRITES):
            start = time.perf_counter()
            write_atomically(probe, b"\0" * 4096)
            seconds.append(time.perf_counter() - start)
    except OSError as error:
        return Finding(
            "storage",
            f"{folder}: write",
            str(error),
            "problem",
            "files can be flushed and renamed",
            "put runs on another file system",
        )
    finally:
        probe.unlink(missing_ok=True)
    median = statistics.median(seconds)
    return checked(
        "storage",
        f"{folder}: write",
        f"{1e3 * median:.1f} ms, at most {1e3 * max(seconds):.1f} ms",
        rule=f"a small file is written, flushed and renamed in {1e3 * SLOW_WRITE_SECONDS:g} ms",
        fix="put runs on a faster file system: metrics, heartbeats and checkpoints wait for such writes",
        broken=median > SLOW_WRITE_SECONDS,
        verdict="warning",
    )


def file_system(folder: Path, mountinfo: str) -> tuple[str, str]:
    """Return type and source of the file system of an absolute path, from /proc/self/mountinfo (proc(5))."""
    best: tuple[int, str, str] = (-1, "unknown", "unknown")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4]))
        # Of two mounts at one point the later one hides the earlier one.
        if folder.is_relative_to(point) and len(point.parts) >= best[0]:
            kind, source = after.split()[:2]
            best = (len(point.parts), kind, source)
    return best[1:]


def clock() -> Finding:
    """Check that chrony or systemd synchronises the clock, where one of them answers."""
    synchronised = clock_is_synchronised(_output("chronyc", "-n", "tracking"), _output("timedatectl", "show"))
    return checked(
        "clock",
        "synchronised",
        {True: "yes", False: "no", None: "unknown"}[synchronised],
        rule="chrony or systemd-timesyncd synchronises it, where either is there",
        fix="start chrony or systemd-timesyncd, or ask the site: heartbeats of nodes are compared by their times",
        broken=synchronised is False,
        verdict="warning",
    )


def clock_is_synchronised(tracking: str, timedate: str) -> bool | None:
    """Return whether the clock is synchronised by `chronyc tracking` and `timedatectl show`; None: neither says."""
    if leap := re.search(r"^Leap status\s*: (.+)$", tracking, re.MULTILINE):
        return leap[1].strip() != "Not synchronised"
    if found := re.search(r"^NTPSynchronized=(yes|no)$", timedate, re.MULTILINE):
        return found[1] == "yes"
    return None


def _output(*command: str) -> str:
    """Return the output of a tool; "" where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if not done.returncode else ""
