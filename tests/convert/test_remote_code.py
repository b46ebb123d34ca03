"""Check the modelling code of exports: what it may contain, and its results on two major versions of transformers."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_scale.convert.remote_code_files import remote_code

pytestmark = pytest.mark.launch

REPOSITORY = Path(__file__).parents[2]
TRANSFORMERS_5 = REPOSITORY / ".venv/transformers-5"


def run_checks(folder: Path, version: str, *more: Path) -> None:
    """Run remote_code_checks.py in a new process, which shares no cache of modules with any other."""
    folder.mkdir()
    paths = [REPOSITORY, REPOSITORY / "tests/integration", *([TRANSFORMERS_5] if version == "5" else [])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_MODULES_CACHE", None)
    script = Path(__file__).with_name("remote_code_checks.py")
    done = subprocess.run(
        [sys.executable, script, folder, version, *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture(scope="module")
def saved_by_5(tmp_path_factory) -> Path:
    assert (TRANSFORMERS_5 / "transformers").is_dir(), f"{TRANSFORMERS_5} is missing: run `make install`"
    folder = tmp_path_factory.mktemp("transformers") / "5"
    run_checks(folder, "5")
    return folder


def test_on_transformers_5(saved_by_5):
    """Run the checks of remote_code_checks.py on transformers 5."""
    assert (saved_by_5 / "sdar-saved/config.json").is_file()
    assert (saved_by_5 / "llada2-saved/config.json").is_file()


def test_on_transformers_4_which_reads_what_5_saved(tmp_path, saved_by_5):
    run_checks(tmp_path / "4", "4", saved_by_5)


@pytest.mark.parametrize(
    ("kind", "model_type", "architecture"),
    [
        ("sdar", "sdar", "SDARForCausalLM"),
        ("sdar_moe", "sdar_moe", "SDARMoeForCausalLM"),
        ("llada2", "llada2_moe", "LLaDA2MoeModelLM"),
        ("bd3", "bd3", "Bd3ForCausalLM"),
    ],
)
def test_a_folder_needs_torch_and_transformers_alone(kind, model_type, architecture):
    sources = remote_code(kind)
    assert f"class {architecture}(" in sources[f"modeling_{model_type}.py"]
    assert f'model_type = "{model_type}"' in sources[f"configuration_{model_type}.py"]
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source, name)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in sources
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                roots = {module.partition(".")[0] for module in modules}
                assert roots <= {"torch", "transformers", *sys.stdlib_module_names}, name
        assert "bd3_scale" not in source
        assert "sdar_scale" not in source
        assert kind in ("bd3", "llada2") or "bd3" not in source.replace("BD3-LM", "").lower()
