"""Check the direction of imports between the package's folders, read from the source without running it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "bd3_scale"

FLOORS = [
    {"registry", "lazy", "offline", "processor"},
    {"diffusion", "attention", "fused", "resilience"},
    {"recipe"},
    {"model", "observe"},
    {"parallel", "launch"},
    {"data"},
    {"objective"},
    {"checkpoint"},
    {"generate"},
    {"evaluate"},
    {"train", "convert"},
    {"api", "plan", "serve", "quickstart"},
    {"project"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Outside name -> the folders of the package that may import it.
RESERVED = {
    "megatron": {"model", "parallel"},
    "megatron.core.parallel_state": {"parallel"},
    "megatron.core.mpu": {"parallel"},
    "deepspeed": {"parallel"},
    "recipes": set(),
    "cluster": set(),
    "tools": set(),
    "reproduction": set(),
    "tests": set(),
}
# These import the package, and are tested in a folder of their name.
PRODUCTS = {"tools", "reproduction"}
# Optional: triton comes with a CUDA torch, NVIDIA's apex is built from source.
OPTIONAL = {"gguf", "lm_eval", "pyarrow", "sklearn", "triton", "amp_C", "apex"}
OPTIONAL |= {"fastapi", "prometheus_client", "starlette", "uvicorn"}
STANDARD_LIBRARY_ALONE = {
    "registry.py",
    "lazy.py",
    *(f"launch/{name}.py" for name in ("attempts", "gpus", "hangs", "local", "ranks", "records", "supervise")),
    *(
        f"resilience/{name}.py"
        for name in ("heartbeat", "leftovers", "limits", "output", "recorder", "secret", "signals", "terminal")
    ),
}


def imported_names(path: Path, package: Path) -> Iterator[str]:
    """Return dotted names that a file imports anywhere in it, `from a import b` as `a.b`."""
    parents = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "__import__"}:
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package).as_posix()
        room = relative.partition("/")[0].removesuffix(".py")
        if room != "__init__" and room not in FLOOR_OF:
            found.append(f"{relative}: is in no known room")
            continue
        for name in imported_names(path, package):
            found += [f"{relative} imports {name}: {rule}" for rule in broken_rules(relative, room, name, package.name)]
    return found


def broken_rules(relative: str, room: str, name: str, package: str) -> Iterator[str]:
    if relative == "__init__.py":
        if name.partition(".")[0] not in sys.stdlib_module_names and not is_within(name, f"{package}.lazy"):
            yield "the package itself imports nothing that takes time"
        return
    for reserved, rooms in RESERVED.items():
        if is_within(name, reserved) and room not in rooms:
            yield f"{reserved} is for {sorted(rooms) or 'no part of the package'}"
    if relative in STANDARD_LIBRARY_ALONE and name.partition(".")[0] not in sys.stdlib_module_names:
        modules = (f"{package}.{file.removesuffix('.py').replace('/', '.')}" for file in STANDARD_LIBRARY_ALONE)
        if not any(is_within(name, module) for module in modules):
            yield "this file uses the standard library alone"
    if room in {"attention", "fused", "offline"} and name.partition(".")[0] not in {
        *sys.stdlib_module_names,
        "torch",
        "triton",
        package,
    }:
        yield f"{room} runs where PyTorch and Triton alone are installed"
    if is_within(name, package):
        other = name.split(".")[1] if "." in name else "__init__"
        if other != room and FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[room]:
            yield f"{other} is not on a floor below {room}"


def test_the_package_keeps_the_direction() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "words"),
    [
        ("__init__.py", "from bd3_scale.recipe import schema", "imports nothing that takes time"),
        ("resilience/files.py", "from bd3_scale.recipe import schema", "recipe is not on a floor below resilience"),
        ("attention/cpu.py", "import bd3_scale.recipe.schema", "recipe is not on a floor below attention"),
        (
            "model/transformer.py",
            "def f():\n    from bd3_scale.parallel import groups",
            "parallel is not on a floor below",
        ),
        ("observe/plot.py", "from ..model import transformer", "model is not on a floor below observe"),
        ("data/stream.py", "from bd3_scale import train", "train is not on a floor below data"),
        (
            "train/loop.py",
            "import importlib\nimportlib.import_module('bd3_scale.convert.hf')",
            "convert is not on a floor",
        ),
        ("evaluate/nelbo.py", "from bd3_scale.nowhere import x", "nowhere is not on a floor below"),
        ("evaluate/nelbo.py", "import bd3_scale", "__init__ is not on a floor below"),
        ("train/loop.py", "from tools.quickstart import main", "tools is for no part"),
        ("train/loop.py", "import megatron.core", "megatron is for ['model', 'parallel']"),
        (
            "model/block.py",
            "from megatron.core import parallel_state",
            "megatron.core.parallel_state is for ['parallel']",
        ),
        ("model/block.py", "from megatron.core.parallel_state import x", "megatron.core.parallel_state is for"),
        ("checkpoint/save.py", "import deepspeed", "deepspeed is for ['parallel']"),
        ("launch/local.py", "import yaml", "standard library alone"),
        ("launch/ranks.py", "from bd3_scale.launch.profile import Profile", "standard library alone"),
        ("attention/spans.py", "import numpy", "PyTorch and Triton alone"),
        ("cellar/wine.py", "", "no known room"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, source: str, words: str) -> None:
    path = tmp_path / "bd3_scale" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (violation,) = violations(tmp_path / "bd3_scale")
    assert file in violation
    assert words in violation


def test_a_right_import_passes(tmp_path: Path) -> None:
    path = tmp_path / "bd3_scale/parallel/zero.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import deepspeed\nfrom megatron.core import parallel_state\nfrom . import groups\n"
        "from bd3_scale.parallel.groups import x\nfrom bd3_scale.model import y\nfrom ..recipe import schema\n"
    )
    assert violations(tmp_path / "bd3_scale") == []


def test_every_library_that_the_package_imports_is_declared() -> None:
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    declared_names = {re.split(r"[<>=!~ \[]", requirement)[0].lower().replace("_", "-") for requirement in declared}
    imported = {name.partition(".")[0] for path in PACKAGE.rglob("*.py") for name in imported_names(path, PACKAGE)}
    outside = imported - sys.stdlib_module_names - {PACKAGE.name} - OPTIONAL
    distributions = packages_distributions()
    undeclared = {
        name
        for name in outside
        if declared_names.isdisjoint(d.lower().replace("_", "-") for d in distributions.get(name, [name]))
    }
    assert undeclared == set()


def test_tests_take_public_names_and_leave_products_to_their_own() -> None:
    """Check that tests use public names only, so that they still hold when a module is rewritten."""
    found = []
    for path in sorted((REPOSITORY / "tests").rglob("*.py")):
        for name in imported_names(path, REPOSITORY / "tests"):
            room, *inner = name.split(".")
            if room in {PACKAGE.name, *PRODUCTS} and any(re.match("_[^_]", part) for part in inner):
                found.append(f"{path.name} imports {name}: it is private")
            if room in PRODUCTS and path.parent.name != room:
                found.append(f"{path.name} imports {name}: {room} is tested in tests/{room}")
    assert found == []


def test_products_take_public_names_of_the_package() -> None:
    found = [
        f"{path.name} imports {name}"
        for product in PRODUCTS
        for path in sorted((REPOSITORY / product).rglob("*.py"))
        for name in imported_names(path, REPOSITORY / product)
        if is_within(name, PACKAGE.name) and any(re.match("_[^_]", part) for part in name.split("."))
    ]
    assert found == []
