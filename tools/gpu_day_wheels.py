"""List and install the wheels that `tools/gpu_day.py` needs besides PyTorch and its dependencies."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The distributions that the parts import; tests/tools/test_gpu_day.py runs the parts with all others hidden.
NEEDED = (
    "megatron-core", "mosaicml-streaming", "numpy", "pydantic", "pydantic_core", "annotated-types",
    "typing-inspection", "typing_extensions", "annotated-doc", "PyYAML", "rich", "typer", "shellingham",
    "tokenizers", "safetensors", "xxhash", "zstandard", "brotli", "catalogue", "cramjam", "python-snappy", "zstd",
    "tqdm", "pillow", "einops", "hjson", "msgpack", "packaging", "psutil", "matplotlib", "cycler", "fonttools",
    "kiwisolver", "pyparsing", "python-dateutil", "six", "hypothesis", "sortedcontainers", "pytest", "pluggy",
    "iniconfig",
)  # fmt: skip
# Published as source only; its wheel compiles nothing and fits every Python.
BUILT = ("deepspeed",)
# pip considers a wheel for an older glibc only if that platform is named.
GLIBC = ("2_28", "2_27", "2_24", "2_17", "2_14", "2_12", "2_5")


def list_wheels() -> str:
    """Return the commands that download the tested versions for Python 3.12 on x86-64 into wheels/."""
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
    """Return `name==version` from constraints.txt."""
    text = (ROOT / "constraints.txt").read_text()
    found = re.search(rf"(?im)^{re.escape(name)}==.*$", text)
    if found is None:
        raise ValueError(f"constraints.txt does not pin {name}: add it, or replace its name in {Path(__file__).name}")
    return found[0]


def install(wheels: Path, site: Path, deadline: float) -> Path:
    """Install the wheels of a folder into the folder `site` before `deadline` (`time.monotonic`); return `site`.

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
