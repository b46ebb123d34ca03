"""`bd3-scale doctor`: what would keep a run from starting or lasting on this machine, or on a node of a cluster.

`python -m bd3_scale.launch.doctor` is what the job of `doctor --cluster` runs on its node; see `cluster_doctor`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bd3_scale.launch import machine, network
from bd3_scale.launch.findings import Finding, held_to
from bd3_scale.launch.gpus import Card, ask_driver, parse_links, read_cards, wrong_driver
from bd3_scale.launch.preflight import Report, check_node
from bd3_scale.observe.environment import Environment, read_environment
from bd3_scale.resilience.files import write_atomically

ANSWER, CLOCK, TOKEN = "node.json", "clock", ".bd3-doctor-token"
PIP_SECONDS = 120.0


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi told: the cards and their links, or why not, where it is not there or `failed`."""

    cards: tuple[Card, ...]
    links: dict[tuple[int, int], str]
    missing: str = ""
    failed: bool = False


def read_driver() -> Driver:
    """Ask nvidia-smi; a machine without one is no error."""
    try:
        cards = read_cards()
        return Driver(tuple(cards), parse_links(ask_driver("topo", "-m")) if len(cards) > 1 else {})
    except OSError as error:
        return Driver((), {}, str(error), failed=not isinstance(error, FileNotFoundError))


def examine(environment: Environment, folders: Sequence[Path], *, gpus: int, clustered: bool) -> list[Finding]:
    """Look at this machine, of which `environment` was read.

    folders: where runs and data lie. gpus: that are needed here; 0 takes what there is. clustered: whether it works
    with other machines.
    """
    driver = read_driver()
    seen, ports = len(driver.cards), network.rdma_ports()
    found = [*software(environment, driver, gpus), _packages(), *graphics(driver, gpus)]
    found += network.fabric(ports, os.environ, seen)
    found += network.interfaces(os.environ, clustered=clustered)
    for folder in folders:
        found += machine.storage(folder)
    found += [machine.shared_memory(seen), *machine.limits(rdma=bool(ports)), machine.clock()]
    return found + network.environment(os.environ, gpus=seen)


def software(environment: Environment, driver: Driver, gpus: int) -> Iterator[Finding]:
    """Yield versions, and whether torch's build fits the driver."""
    yield Finding("processor", "CPU", f"{environment.cpu}, {environment.cpu_cores} cores for this process")
    for name, version in environment.versions.items():
        yield Finding("software", name, version or "not installed")
    for acceleration in environment.accelerations:
        yield Finding("software", acceleration.name, acceleration.note)
    cuda = environment.cuda
    if not driver.cards and not gpus:
        yield Finding("software", "CUDA of torch's build", cuda or "none")
        return
    yield held_to(
        "software",
        "CUDA of torch's build",
        cuda or "none",
        rule="torch was built with CUDA where there are GPUs",
        advice="`make clean`, then `make install-cuda`",
        broken=cuda is None,
    )
    if cuda is None:
        return
    yield Finding("software", "NCCL", _nccl())
    if driver.cards:
        wrong = wrong_driver(driver.cards[0].driver, cuda)
        yield Finding(
            "software", "driver", driver.cards[0].driver, "problem" if wrong else "ok", f"fits CUDA {cuda}", wrong or ""
        )
        seen = len(environment.gpus)
        yield held_to(
            "software",
            "GPUs that torch sees",
            f"{seen} of {len(driver.cards)}",
            rule="all that the driver has, unless CUDA_VISIBLE_DEVICES chooses",
            advice="look at the lines above and at CUDA_VISIBLE_DEVICES",
            broken=seen == 0,
        )


def _nccl() -> str:
    """Return NCCL's version, which a CUDA build of torch alone can tell."""
    import torch

    return ".".join(map(str, torch.cuda.nccl.version()))


def _packages() -> Finding:
    """Let pip tell whether what is installed fits together."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=PIP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        value = f"pip gave no answer within {PIP_SECONDS:g} s"
        return Finding("software", "packages", value, "warning", "pip check", "is the file system slow?")
    said = done.stdout.splitlines() or done.stderr.splitlines() or [f"pip ended with {done.returncode}"]
    return held_to(
        "software",
        "packages",
        "; ".join(said[:3]),
        rule="pip check finds no broken requirement",
        advice="install them as constraints.txt or constraints-cuda.txt name them",
        broken=done.returncode != 0,
        verdict="warning" if "No module named pip" in said[-1] else "problem",
    )


def graphics(driver: Driver, gpus: int) -> Iterator[Finding]:
    """Yield how many GPUs there are, whether they are alike, and how they reach each other."""
    cards = driver.cards
    kinds = Counter(f"{card.name}, {card.memory_mib / 1024:.1f} GiB" for card in cards)
    value = "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) or driver.missing or "none"
    yield held_to(
        "GPUs",
        "cards",
        value,
        rule=f"{gpus} or more, by the profile" if gpus else "nvidia-smi answers, where it is installed",
        advice="tell the site; on a node, look at what the job asked for (gpus_per_node), too",
        broken=len(cards) < gpus or driver.failed,
    )
    if not cards:
        return
    yield _compiler()
    yield held_to(
        "GPUs",
        "alike",
        "yes" if len(kinds) == 1 and not any(card.mig for card in cards) else "no",
        rule="cards of one kind, whole ones: all ranks wait for the slowest, and NCCL joins no parts of a card (MIG)",
        advice="choose the node's kind by the profile's `constraint`, and whole cards",
        broken=len(kinds) > 1 or any(card.mig for card in cards),
        verdict="warning",
    )
    if driver.links:
        links = Counter(driver.links.values())
        yield held_to(
            "GPUs",
            "links",
            ", ".join(f"{count} pairs {link}" for link, count in links.most_common()),
            rule="NVLink (NV…) between all cards of a node",
            advice="PCIe joins them: keep parallel.tensor at 1, or to the cards that NVLink joins (nvidia-smi topo -m)",
            broken=not all(link.startswith("NV") for link in links),
            verdict="warning",
        )


def _compiler() -> Finding:
    """Check what Triton needs besides the driver: it builds the launcher of each kernel where it runs."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return held_to(
        "GPUs",
        "compiler",
        f"{compiler or 'none'}, {'with' if headers else 'without'} Python.h",
        rule="a C compiler and Python's headers, with which Triton builds the launchers of kernels",
        advice="load a module with gcc in the profile's `modules`, and take a Python with headers (python3-dev)",
        broken=compiler is None or not headers,
    )


def main() -> None:
    """Examine a node of a job and write the answer: the findings, its clock, and what the folders hold there."""
    parser = argparse.ArgumentParser(description="Examine this node; the job of `bd3-scale doctor --cluster` runs it.")
    parser.add_argument("--out", type=Path, required=True, help="shared folder of the answer")
    parser.add_argument("--gpus", type=int, default=0, help="that the node must have")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--min-free-gb", type=float, default=0.0)
    parser.add_argument("--folder", type=Path, action="append", default=[], help="of runs or data; may be repeated")
    options = parser.parse_args()
    # In place, so that whoever has the file open sees it although a network file system caches the names of a folder.
    (options.out / CLOCK).write_text(f"{time.time()}\n")
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    tokens = {str(folder): _token(folder) for folder in options.folder}
    try:
        found = examine(read_environment(), options.folder, gpus=options.gpus, clustered=True)
        found += _by_preflight(node, options)
    except ImportError as error:
        advice = f"install bd3_scale's requirements for {sys.executable}"
        found = [Finding("software", "packages", str(error), "problem", "all can be imported", advice)]
    answer = {"node": node, "tokens": tokens, "findings": [asdict(finding) for finding in found]}
    write_atomically(options.out / ANSWER, json.dumps(answer))


def _token(folder: Path) -> str:
    """Return what the login node wrote into a folder, as this node reads it."""
    try:
        return (folder / TOKEN).read_text()
    except OSError as error:
        return str(error)


def _by_preflight(node: str, options: argparse.Namespace) -> list[Finding]:
    """Do what a job's preflight does on each node alone: ECC errors, matrix products, scratch."""
    report = Report(options.out / "preflight.json", node)
    check_node(report, options)
    rule = "no ECC errors, right matrix products, a scratch folder with room"
    found = [Finding("preflight", "node", problem, "problem", rule) for problem in report.problems]
    told = ", ".join(f"{name} {value}" for name, value in report.measured.items())
    return found or [Finding("preflight", "node", told, rule=rule)]


if __name__ == "__main__":
    main()
