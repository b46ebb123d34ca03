"""Check what docs/extend.md says of adding an idea: its code, and how many files of the package each kind touches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bd3_scale import registry
from tests.support.recipes import tiny_recipe

REPOSITORY = Path(__file__).parents[1]
PACKAGE = Path(registry.__file__).parent
PAGE = (REPOSITORY / "docs/extend.md").read_text()
LAB = REPOSITORY / "tests/plugins/bd3_lab/__init__.py"
# The imports of an objective in a file of its own.
IMPORTS = """from bd3_scale.objective.block_diffusion import BlockDiffusion
from bd3_scale.registry import objectives"""
# It requests each entry as a run or a command does, and checks what the entry computes.
USES = """
import sys
from pathlib import Path
import numpy as np
import bd3_scale
from bd3_scale.diffusion import Schedule
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.recipe import check_recipe, load_recipe

assert bd3_scale.__file__.startswith(sys.argv[1]), bd3_scale.__file__
recipe = load_recipe(Path(sys.argv[2]))
check_recipe(recipe, 1)
print("schedule", Schedule(recipe.diffusion.noise_schedule).mask_rate(np.array([0.5])))
SamplingConfig(unmasking="left-to-right", steps=2)
from typing import get_type_hints
from bd3_scale.registry import unmasking_rules

assert "left-to-right: as many" in get_type_hints(SamplingConfig, include_extras=True)["unmasking"].__metadata__[0].help
print("rule", unmasking_rules.get("left-to-right")(4, 2).choose(np.array([False, True, True, True]), None, None, 0))
from bd3_scale.observe.loggers import LoggedRun
from bd3_scale.registry import loggers
logger = loggers.get("csv")()
logger.start(LoggedRun(Path(), "", {}))
logger.log(3, {"train/loss": 2.5})
print("logger", Path("loss.csv").read_text().strip())
assert not {"torch", "megatron"} & sys.modules.keys()

from bd3_scale.data import DocumentReader
from bd3_scale.evaluate import NamedText
print("format", [document.text for document in DocumentReader([sys.argv[3]])])
print("set", repr(NamedText.parse("verses=poem.txt").plain("a / b")))

import torch
from bd3_scale.attention import block_attention, make_spans
from bd3_scale.objective import objective_of
from bd3_scale.recipe import Vocabulary
from bd3_scale.registry import optimizers

objective = objective_of(recipe.diffusion, Vocabulary(size=258, eos_id=256, mask_id=257))
print("objective", objective.row_loss(torch.tensor([0.0, 1.0]), None))
family = optimizers.get(recipe.optimizer.family)(recipe.optimizer)
weight = torch.zeros(2)
family.update(weight, torch.tensor([3.0, -2.0]), {"momentum": torch.zeros(2)}, family.settings | {"weight_decay": 0.1})
print("optimizer", weight)
q, k, v = torch.randn(3, 1, 16, 2, 16).unbind(0)
spans = make_spans(torch.zeros(1, 8, dtype=torch.int32), 4)
double, plain = (block_attention(q, k, v, spans, backend=name) for name in (recipe.attention_backend, "reference"))
print("attention", float((double - plain).abs().max()) < 1e-5, bool((double != plain).any()))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", PAGE, re.DOTALL)


def table() -> dict[str, str]:
    """Return the registries of the page's table, each with the file of the package to which an entry is added."""
    rows = re.findall(r"^\| [\w ]+ \| `(\w+)` \|.*\| 0 \| 1: (.*) \|$", PAGE, re.MULTILINE)
    return {name: file.strip("`") for name, file in rows}


def parts() -> dict[str, str]:
    """Return what the page adds to each registry, the first entry of each."""
    found: dict[str, str] = {}
    for part in blocks("python")[1:]:
        found.setdefault(re.search(r"^@(\w+)\.register", part, re.MULTILINE)[1], part)
    return found


def test_the_code_of_the_page_is_the_module_that_tests_run() -> None:
    assert "\n\n\n".join(blocks("python")) + "\n" == LAB.read_text()


def test_the_page_has_every_registry() -> None:
    doors = {name for name, value in vars(registry).items() if isinstance(value, registry.Registry)}
    doors -= {"source_cuts"}  # optional for a source format, as the page says
    assert "`bd3_scale.registry.source_cuts`" in PAGE
    assert table().keys() == parts().keys() == doors


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """Copy the package to a folder, and add each entry to the one file that the table names."""
    copy = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name, file in table().items():
        if name == "objectives":
            assert file == "a new file in `objective/"
            (copy / "objective/focal.py").write_text(f"{IMPORTS}\n\n\n{parts()[name]}\n")
        else:
            with (copy / file).open("a") as home:
                home.write(f"\n\n{parts()[name]}\n")
    return tmp_path


def changed(before: Path, after: Path) -> list[str]:
    names = {path.relative_to(after).as_posix() for path in after.rglob("*.py*") if "__pycache__" not in path.parts}
    return sorted(
        n for n in names if not (before / n).exists() or (before / n).read_bytes() != (after / n).read_bytes()
    )


@pytest.mark.launch
def test_from_inside_each_thing_takes_one_file(extended: Path) -> None:
    (ideas,) = [block for block in blocks("yaml") if block.startswith("plugins:")]
    recipe = tiny_recipe() | yaml.safe_load(ideas) | {"plugins": []}
    (extended / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (extended / "texts.tsv").write_text("name\ttext\nfirst\tone\nsecond\ttwo\n")
    done = subprocess.run(
        [sys.executable, "-c", USES, extended, "recipe.yaml", "texts.tsv"],
        cwd=extended,
        env=os.environ | {"PYTHONPATH": str(extended)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "schedule [0.125]",
        "rule [False  True  True False]",
        "logger 3,2.5",
        "format ['one', 'two']",
        "set 'a\\nb'",
        "objective tensor([0.0000, 0.5026])",
        "optimizer tensor([-0.0010,  0.0010])",
        "attention True True",
    ]
    assert len(changed(PACKAGE, extended / PACKAGE.name)) == len(table()) == 8


@pytest.mark.launch
def test_a_model_option_takes_three_files(tmp_path: Path) -> None:
    """Check a copy of the package with the option by softcap_checks.py; the tests of exports need a value of it."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in (PACKAGE, REPOSITORY / "tests"):
        shutil.copytree(folder, tmp_path / folder.name, ignore=ignored)
    (diff,) = blocks("diff")
    no_repository = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    subprocess.run(["git", "apply"], cwd=tmp_path, env=no_repository, input=f"{diff}\n", text=True, check=True)
    options = tmp_path / "tests/convert/test_options.py"
    table = options.read_text()
    options.write_text(table.replace('    "init_std": ', '    "logit_softcap": (2.0,),\n    "init_std": '))
    assert options.read_text() != table
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/softcap_checks.py", tmp_path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert changed(PACKAGE, tmp_path / PACKAGE.name) == [
        "convert/remote_code/modeling_bd3.py",
        "model/head.py",
        "recipe/model.py",
    ]
