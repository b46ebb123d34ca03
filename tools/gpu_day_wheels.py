"""The wheels that `tools/gpu_day.py` takes beside PyTorch and what comes with it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# As the parts import them, each distribution by name; tests/tools/test_gpu_day.py runs them with all others hidden.
NEEDED = (
    "megatron-core", "mosaicml-streaming", "numpy", "pydantic", "pydantic_core", "annotated-types",
    "typing-inspection", "typing_extensions", "annotated-doc", "PyYAML", "rich", "typer", "shellingham",
    "tokenizers", "safetensors", "xxhash", "zstandard", "brotli", "catalogue", "cramjam", "python-snappy", "zstd",
    "tqdm", "pillow", "einops", "hjson", "msgpack", "packaging", "psutil", "matplotlib", "cycler", "fonttools",
    "kiwisolver", "pyparsing", "python-dateutil", "six", "hypothesis", "sortedcontainers", "pytest", "pluggy",
    "iniconfig",
)  # fmt: skip
# It comes as source alone; a wheel of it compiles nothing and fits every Python.
BUILT = ("deepspeed",)
# pip takes a wheel for an older glibc where it is named.
GLIBC = ("2_28", "2_27", "2_24", "2_17", "2_14", "2_12", "2_5")


def list_wheels() -> str:
    """Return the commands that fetch them for Python 3.12 on x86-64, at the tested versions, into wheels/."""
    platforms = " ".join(f"--platform manylinux_{version}_x86_64" for version in GLIBC)
    return "\n".join(
        (
            "# Where there is a network, in this repository. numpy, pillow, matplotlib, fonttools",
            "# and kiwisolver are most of it, and may stay out where the machine with the GPU has them.",
            ".venv/bin/pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\",
            f"  {platforms} \\",
            "  --dest wheels \\",
            *(f"  {pinned(name)} \\" for name in NEEDED[:-1]),
            f"  {pinned(NEEDED[-1])}",
            "DS_BUILD_OPS=0 .venv/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels "
            + " ".join(map(pinned, BUILT)),
        )
    )


def pinned(name: str) -> str:
    """Return `name==version` of constraints.txt."""
    text = (ROOT / "constraints.txt").read_text()
    found = re.search(rf"(?im)^{re.escape(name)}==.*$", text)
    if found is None:
        raise ValueError(
            f"constraints.txt pins no {name}: add it, or name what took its place in {Path(__file__).name}"
        )
    return found[0]


def install(wheels: Path, site: Path, deadline: float) -> Path:
    """Install the wheels of a folder into another one, by `deadline` (of `time.monotonic`); returns that one.

    Raises:
        subprocess.SubprocessError: pip fails or takes longer. FileNotFoundError: there is no wheel.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise FileNotFoundError(f"{wheels} holds no *.whl: --list-wheels prints how to fetch them")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    left = deadline - time.monotonic()
    subprocess.run([*pip, "--target", str(site), *map(str, found)], check=True, timeout=max(1.0, left))
    return site
