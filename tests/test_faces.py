"""Check that what people import from the package and its folders is listed once, in `__init__.pyi`."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import bd3_scale

PACKAGE = Path(bd3_scale.__file__).parent
STUBS = sorted(PACKAGE.rglob("__init__.pyi"))
FACES = {stub: f"{PACKAGE.name}.{stub.parent.name}" if stub.parent != PACKAGE else PACKAGE.name for stub in STUBS}


def offered(stub: Path) -> list[tuple[str, str]]:
    """Return module and name of all that a stub imports."""
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    return [(str(node.module), alias.name) for node in imports for alias in node.names]


@pytest.mark.parametrize("stub", STUBS, ids=FACES.get)
def test_what_a_room_offers_is_defined_in_it_under_a_name_of_its_own(stub: Path) -> None:
    for module, name in offered(stub):
        path = PACKAGE.parent / f"{module.replace('.', '/')}.py"
        assert name in {getattr(node, "name", "") for node in ast.parse(path.read_text()).body}, f"{module}.{name}"
        # Importing a module sets it as an attribute of its package, in place of anything of the same name.
        assert not (stub.parent / f"{name}.py").exists()
        assert not (stub.parent / name).exists()


def test_names_are_imported_when_they_are_used() -> None:
    from bd3_scale.attention import block_attention, make_spans
    from bd3_scale.attention.dispatch import block_attention as its_own
    from bd3_scale.diffusion import Schedule, draw_noise
    from bd3_scale.recipe import Recipe, load_recipe

    assert block_attention is its_own
    assert all(map(callable, (make_spans, Schedule, draw_noise, Recipe, load_recipe)))
    room = importlib.import_module("bd3_scale.attention")
    assert {"block_attention", "take_ranges"} <= set(dir(room))
    everything: dict[str, object] = {}
    exec("from bd3_scale.diffusion import *", everything)
    assert {"Curve", "Noise", "Schedule", "draw_noise"} <= everything.keys()
    with pytest.raises(AttributeError, match=r"module 'bd3_scale\.attention' has no attribute 'block_atention'"):
        _ = room.block_atention
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'bd3_scale'"):
        from bd3_scale import nothing  # noqa: F401


def test_the_version_is_the_distribution_s() -> None:
    assert bd3_scale.__version__ == version("bd3_scale")


@pytest.mark.launch
def test_importing_a_room_costs_nothing_before_a_name_of_it_is_used() -> None:
    # bd3_scale.model imports megatron-core.
    rooms = [face for face in FACES.values() if face != "bd3_scale.model"]
    code = (
        f"import sys, {', '.join(rooms)}\n"
        "outside = {name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
        "own = {name for name in sys.modules if name.startswith('bd3_scale.')}\n"
        f"assert own <= {{'bd3_scale.lazy', *{rooms!r}}}, own\n"
        "assert not outside & {'torch', 'numpy', 'pydantic', 'rich', 'transformers'}, outside\n"
        "from bd3_scale import Model, load\n"
        "from bd3_scale.recipe import Recipe\n"
        "assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
