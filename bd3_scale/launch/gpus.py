"""Read NVIDIA's GPUs and driver from `nvidia-smi`, with the standard library alone: it runs before the installation.

python bd3_scale/launch/gpus.py --cuda 13.0
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

SMI_SECONDS = 30.0
# The oldest driver branch for each major version of CUDA; minor versions are compatible (NVIDIA, CUDA Compatibility).
MIN_DRIVER = {11: 450, 12: 525, 13: 580}
_QUERY = ("index", "name", "memory.total", "driver_version", "mig.mode.current")


@dataclass(frozen=True)
class Card:
    """A GPU as its driver reports it; `mig`: it is split into instances."""

    index: int
    name: str
    memory_mib: int
    driver: str
    mig: bool


def ask_driver(*arguments: str) -> str:
    """Return what `nvidia-smi` prints.

    FileNotFoundError: it is not installed; TimeoutError: no answer within 30 s; OSError: it fails.
    """
    if shutil.which("nvidia-smi") is None:
        raise FileNotFoundError("nvidia-smi is not on this machine: no NVIDIA driver is installed")
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SMI_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"nvidia-smi gave no answer within {SMI_SECONDS:g} s: the driver hangs") from None
    if done.returncode:
        output = " ".join((done.stdout + done.stderr).split())[:200]
        raise OSError(f"nvidia-smi fails: {output or f'exit code {done.returncode}'}")
    return done.stdout


def read_cards() -> list[Card]:
    """Return the GPUs of this machine. OSError as `ask_driver`."""
    return parse_cards(ask_driver(f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"))


def parse_cards(table: str) -> list[Card]:
    """Return the GPUs of nvidia-smi's table; some integrated GPUs report no memory, which counts as 0."""
    cards = []
    for line in table.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(_QUERY) or not fields[0].isdigit():
            continue
        index, name, memory, driver, mig = fields
        cards.append(Card(int(index), name, int(memory) if memory.isdigit() else 0, driver, mig == "Enabled"))
    return cards


def parse_links(matrix: str) -> dict[tuple[int, int], str]:
    """Return the link between each pair of GPUs, from `nvidia-smi topo -m`: NV18, PIX, PXB, PHB, NODE or SYS."""
    rows: dict[int, list[str]] = {}
    columns: list[int] = []
    for line in re.sub(r"\x1b\[[\d;]*m", "", matrix).splitlines():
        fields = line.split()
        if not columns:
            # The headings of other columns may hold spaces ("CPU Affinity"), but the GPUs come first.
            columns = [int(field[3:]) for field in fields if re.fullmatch(r"GPU\d+", field)]
        elif fields and re.fullmatch(r"GPU\d+", fields[0]):
            rows[int(fields[0][3:])] = fields[1 : 1 + len(columns)]
    return {
        (row, column): link
        for row, links in rows.items()
        for column, link in zip(columns, links, strict=False)
        if row < column
    }


def wrong_driver(driver: str, cuda: str) -> str | None:
    """Return a message if a driver is too old for builds of a CUDA version such as 13.0, else None."""
    minimum = MIN_DRIVER.get(int(cuda.partition(".")[0]))
    branch = driver.partition(".")[0]
    if minimum is None or not branch.isdigit() or int(branch) >= minimum:
        return None
    return (
        f"the NVIDIA driver is {driver}, and builds for CUDA {cuda} need {minimum} or newer: ask the site for a newer "
        "driver (or its cuda-compat package), or install a torch that is built for a CUDA of this driver"
    )


def main() -> None:
    """Print in one line why CUDA builds cannot run here and exit with code 1, or exit with 0."""
    parser = argparse.ArgumentParser(description="Check that a GPU and a driver for CUDA builds are here.")
    parser.add_argument("--cuda", required=True, help="the CUDA version of the builds, such as 13.0")
    cuda = parser.parse_args().cuda
    try:
        cards = read_cards()
        wrong = wrong_driver(cards[0].driver, cuda) if cards else "nvidia-smi finds no GPU"
    except OSError as error:
        wrong = str(error)
    if wrong:
        sys.exit(wrong)


if __name__ == "__main__":
    main()
