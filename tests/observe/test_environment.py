from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bd3_scale.observe.environment import Environment, cpu_flags, cpu_in_words, has_fast_bf16, read_environment

READ_APEX = """
import dataclasses, json
from bd3_scale.observe import environment
print(json.dumps(dataclasses.asdict(environment.apex_acceleration())))
"""


@pytest.fixture(scope="module")
def environment() -> Environment:
    return read_environment()


def test_versions_are_those_that_import(environment: Environment) -> None:
    import numpy
    import pydantic
    import tokenizers

    assert environment.versions["torch"] == torch.__version__
    assert environment.versions["numpy"] == numpy.__version__
    assert environment.versions["tokenizers"] == tokenizers.__version__
    assert environment.versions["python"] == sys.version.split()[0]
    assert "pydantic" not in environment.versions
    assert pydantic.VERSION


def test_hardware_is_what_torch_sees(environment: Environment) -> None:
    assert len(environment.gpus) == torch.cuda.device_count()
    assert environment.cuda == torch.version.cuda
    assert 1 <= environment.cpu_cores <= (os.cpu_count() or 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about the GPU where there is one")
@pytest.mark.skipif(not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="x86 flags")
def test_fast_bf16_on_the_cpu_agrees_with_torch() -> None:
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert has_fast_bf16() == in_hardware


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="x86 flags")
def test_flags_of_the_cpu_are_those_that_torch_reads_from_it() -> None:
    # torch asks the processor (cpuid); the package reads what the kernel reports.
    asked = {
        "AVX2": torch.cpu._is_avx2_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX-512 bf16": torch.cpu._is_avx512_bf16_supported(),
        "AMX bf16": torch.cpu._is_amx_tile_supported(),
    }
    assert cpu_flags() == [name for name, found in asked.items() if found]
    assert cpu_in_words().endswith(f"({', '.join(cpu_flags())})")


def test_a_commit_is_marked_where_code_differs_and_not_for_a_table(tmp_path: Path) -> None:
    source = tmp_path / "bd3_scale/observe/environment.py"
    source.parent.mkdir(parents=True)
    source.write_bytes(Path(sys.modules[Environment.__module__].__file__).read_bytes())
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/table.md").write_text("old")
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]):
        subprocess.run([*git, *words], check=True)
    spec = importlib.util.spec_from_file_location("copied_environment", source)
    copied = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout[:12]
    (tmp_path / "benchmarks/table.md").write_text("new")
    assert copied.source_commit() == head
    (tmp_path / "tool.py").touch()
    assert copied.source_commit() == head + "+"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("modules", "found", "words"),
    [
        ({}, False, "not installed"),
        ({"apex/__init__.py": ""}, False, "another program"),
        ({"apex/optimizers.py": "class FusedAdam: pass"}, False, "another program"),
        ({"amp_C.py": "", "apex/optimizers.py": "class FusedAdam: pass"}, True, "FusedAdam"),
        ({"amp_C.py": "", "apex/optimizers.py": ""}, False, "another program"),
    ],
)
def test_apex_is_known_by_nvidias_own_modules(tmp_path: Path, modules: dict[str, str], found: bool, words: str) -> None:
    for name, source in modules.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    done = subprocess.run(
        [sys.executable, "-c", READ_APEX],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    apex = json.loads(done.stdout)
    assert apex["found"] is found
    assert words in apex["note"]


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ("", "attention_backend=auto takes " + ("triton" if torch.cuda.is_available() else "cpu")),
        ("reference", "takes reference"),
        ("fast", "$BD3_SCALE_ATTENTION is neither 'auto' nor a known name: no attention backend is called 'fast'"),
    ],
)
def test_the_attention_that_would_run_is_told(monkeypatch: pytest.MonkeyPatch, wish: str, words: str) -> None:
    monkeypatch.setenv("BD3_SCALE_ATTENTION", wish)
    (triton,) = (a for a in read_environment().accelerations if a.name == "Triton")
    assert words in triton.note
    assert triton.used == ("takes triton" in triton.note)
