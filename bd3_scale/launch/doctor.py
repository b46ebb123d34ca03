"""Examine a machine for `bd3-scale doctor`: what would keep a run from starting or lasting here.

The job of `doctor --cluster` runs `python -m bd3_scale.launch.doctor` on its node; see `cluster_doctor`.
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
from bd3_scale.launch.findings import Finding, checked
from bd3_scale.launch.gpus import Card, ask_driver, parse_links, read_cards, wrong_driver
from bd3_scale.launch.preflight import Report, check_node
from bd3_scale.observe.environment import Environment, read_environment
from bd3_scale.resilience.files import write_atomically

ANSWER, CLOCK, TOKEN = "node.json", "clock", ".bd3-doctor-token"
PIP_SECONDS = 120.0


@dataclass(frozen=True)
class Driver:
    """The answer of nvidia-smi.

    Attributes:
        cards: the GPUs.
        links: NVLink or PCIe between two GPUs, by their indices.
        missing: why there are no cards; "" where there are.
        failed: whether nvidia-smi is there and ended with an error.
    """

    cards: tuple[Card, ...]
    links: dict[tuple[int, int], str]
    missing: str = ""
    failed: bool = False


def read_driver() -> Driver:
    """Ask nvidia-smi for the cards. A machine without it is no error."""
    try:
        cards = read_cards()
        return Driver(tuple(cards), parse_links(ask_driver("topo", "-m")) if len(cards) > 1 else {})
    except OSError as error:
        return Driver((), {}, str(error), failed=not isinstance(error, FileNotFoundError))


def examine(environment: Environment, folders: Sequence[Path], *, gpus: int, clustered: bool) -> list[Finding]:
    """Examine this machine.

    Args:
        environment: versions and devices of this process.
        folders: folders of runs and data.
        gpus: GPUs that are needed here; 0 accepts what there is.
        clustered: whether this machine works with other machines.
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
    """Yield versions, and check that torch's build fits the driver."""
    yield Finding("processor", "CPU", f"{environment.cpu}, {environment.cpu_cores} cores for this process")
    for name, version in environment.versions.items():
        yield Finding("software", name, version or "not installed")
    for acceleration in environment.accelerations:
        yield Finding("software", acceleration.name, acceleration.note)
    cuda = environment.cuda
    if not driver.cards and not gpus:
        yield Finding("software", "CUDA of torch's build", cuda or "none")
        return
    yield checked(
        "software",
        "CUDA of torch's build",
        cuda or "none",
        rule="torch was built with CUDA where there are GPUs",
        fix="`make clean`, then `make install-cuda`",
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
        yield checked(
            "software",
            "GPUs that torch sees",
            f"{seen} of {len(driver.cards)}",
            rule="all that the driver has, unless CUDA_VISIBLE_DEVICES chooses",
            fix="look at the lines above and at CUDA_VISIBLE_DEVICES",
            broken=seen == 0,
        )


def _nccl() -> str:
    """Return NCCL's version. Only a CUDA build of torch knows it."""
    import torch

    return ".".join(map(str, torch.cuda.nccl.version()))


def _packages() -> Finding:
    """Check with pip that the installed packages fit together."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=PIP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        value = f"pip gave no answer within {PIP_SECONDS:g} s"
        return Finding(
            "software",
            "packages",
            value,
            "warning",
            "pip check answers",
            "run `pip check` by hand: a slow file system under the environment slows every start, too",
        )
    lines = done.stdout.splitlines() or done.stderr.splitlines() or [f"pip ended with {done.returncode}"]
    return checked(
        "software",
        "packages",
        "; ".join(lines[:3]),
        rule="pip check finds no broken requirement",
        fix="install them as constraints.txt or constraints-cuda.txt name them",
        broken=done.returncode != 0,
        verdict="warning" if "No module named pip" in lines[-1] else "problem",
    )


def graphics(driver: Driver, gpus: int) -> Iterator[Finding]:
    """Check how many GPUs there are, whether they are of one model, and how they are connected."""
    cards = driver.cards
    models = Counter(f"{card.name}, {card.memory_mib / 1024:.1f} GiB" for card in cards)
    value = "; ".join(f"{count} x {model}" for model, count in models.items()) or driver.missing or "none"
    yield checked(
        "GPUs",
        "cards",
        value,
        rule=f"{gpus} or more, by the profile" if gpus else "nvidia-smi answers, where it is installed",
        fix="ask the site's support; on a node, compare what the job requested (gpus_per_node in the profile)",
        broken=len(cards) < gpus or driver.failed,
    )
    if not cards:
        return
    yield _compiler()
    yield checked(
        "GPUs",
        "alike",
        "yes" if len(models) == 1 and not any(card.mig for card in cards) else "no",
        rule="whole cards of one model: all ranks wait for the slowest; NCCL connects no parts of a card (MIG)",
        fix="select nodes of one kind with the profile's `constraint`, and request whole cards",
        broken=len(models) > 1 or any(card.mig for card in cards),
        verdict="warning",
    )
    if driver.links:
        links = Counter(driver.links.values())
        yield checked(
            "GPUs",
            "links",
            ", ".join(f"{count} pairs {link}" for link, count in links.most_common()),
            rule="NVLink (NV…) between all cards of a node",
            fix="PCIe connects them: keep parallel.tensor at 1, or within cards that NVLink connects",
            broken=not all(link.startswith("NV") for link in links),
            verdict="warning",
        )


def _compiler() -> Finding:
    """Check for a C compiler and Python's headers: Triton compiles the launchers of kernels with them."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return checked(
        "GPUs",
        "compiler",
        f"{compiler or 'none'}, {'with' if headers else 'without'} Python.h",
        rule="a C compiler and Python's headers, with which Triton builds the launchers of kernels",
        fix="load a module with gcc in the profile's `modules`, and take a Python with headers (python3-dev)",
        broken=compiler is None or not headers,
    )


def main() -> None:
    """Examine a node of a job, and write the answer: findings, its clock, and the tokens in the folders."""
    parser = argparse.ArgumentParser(description="Examine this node; the job of `bd3-scale doctor --cluster` runs it.")
    parser.add_argument("--out", type=Path, required=True, help="shared folder of the answer")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that the node must have")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--min-free-gb", type=float, default=0.0)
    parser.add_argument(
        "--folder", type=Path, action="append", default=[], help="folder of runs or data; may be repeated"
    )
    options = parser.parse_args()
    # Written in place: a network file system caches the names of a folder, and a reader that has the file open sees it.
    (options.out / CLOCK).write_text(f"{time.time()}\n")
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    tokens = {str(folder): _token(folder) for folder in options.folder}
    try:
        found = examine(read_environment(), options.folder, gpus=options.gpus, clustered=True)
        found += _by_preflight(node, options)
    except ImportError as error:
        fix = f"install bd3_scale's requirements for {sys.executable}"
        found = [Finding("software", "packages", str(error), "problem", "all can be imported", fix)]
    answer = {"node": node, "tokens": tokens, "findings": [asdict(finding) for finding in found]}
    write_atomically(options.out / ANSWER, json.dumps(answer))


def _token(folder: Path) -> str:
    """Return the token that the login node wrote into a folder, as this node reads it, or the error."""
    try:
        return (folder / TOKEN).read_text()
    except OSError as error:
        return str(error)


def _by_preflight(node: str, options: argparse.Namespace) -> list[Finding]:
    """Run the checks of a job's preflight that need one node only: ECC errors, matrix products, scratch."""
    report = Report(options.out / "preflight.json", node)
    check_node(report, options)
    rule = "no ECC errors, right matrix products, a scratch folder with room"
    fix = f"repair what it says, or leave the node out of jobs (`bd3-scale submit --exclude {node}`)"
    found = [Finding("preflight", "node", problem, "problem", rule, fix) for problem in report.problems]
    measured = ", ".join(f"{name} {value}" for name, value in report.measured.items())
    return found or [Finding("preflight", "node", measured, rule=rule)]


if __name__ == "__main__":
    main()
