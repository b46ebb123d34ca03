"""Check what can be added from outside: names, refusals, plug-ins, and the cost of listing names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bd3_scale import registry
from bd3_scale.registry import Registry, import_plugins

# What a recipe names: a launcher checks it at once, and importing PyTorch takes seconds.
OF_RECIPES = ("schedules", "objectives", "optimizers", "attention_backends")


@pytest.fixture
def fruits() -> Registry:
    made: Registry = Registry("fruit", home="json")
    for name in ("apple", "apricot", "pear"):
        made.register(name)(type(name, (), {"__module__": "tests"}))
    return made


def test_a_thing_is_found_by_its_name_and_stays_what_it_was(fruits: Registry) -> None:
    @fruits.register("fig")
    class Fig:
        pass

    assert fruits.get("fig") is Fig
    assert fruits.name_of(Fig) == "fig"
    assert fruits.names() == ("apple", "apricot", "pear", "fig")


def test_a_wrong_name_lists_the_nearest_and_how_a_plug_in_s_is_known(fruits: Registry) -> None:
    with pytest.raises(ValueError, match=r"no fruit is called 'aple': did you mean apple\? .*`plugins: \[MODULE\]`"):
        fruits.get("aple")
    with pytest.raises(ValueError, match=r"'x': known are apple, apricot, pear\. If a plug-in defines it"):
        fruits.get("x")


def test_a_name_that_is_taken_is_refused_with_both_modules(fruits: Registry) -> None:
    with pytest.raises(ValueError, match="the fruit 'pear' of elsewhere has the same name as one of tests"):
        fruits.register("pear")(type("Pear", (), {"__module__": "elsewhere"}))
    assert fruits.get("pear").__module__ != "elsewhere"


def test_the_same_definition_run_again_takes_its_own_place(fruits: Registry) -> None:
    """Check a definition that is run again after an edit, as a notebook's cell is."""
    for value in (1, 2):

        @fruits.register("plum")
        class Plum:
            sweetness = value

    assert fruits.get("plum").sweetness == 2
    assert fruits.names().count("plum") == 1


def test_the_home_is_imported_when_a_name_is_asked_for_that_is_not_yet_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "orchard_of_test.py").write_text(
        "from bd3_scale import registry\nregistry.fruits_of_test.register('quince')(int)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kept: Registry = Registry("fruit", "orchard_of_test")
    monkeypatch.setattr(registry, "fruits_of_test", kept, raising=False)
    kept.register("lime")(str)
    assert kept.get("lime") is str
    assert "orchard_of_test" not in sys.modules
    assert kept.get("quince") is int
    assert kept.names() == ("lime", "quince")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def broken(", "SyntaxError: "),
        ("from bd3_scale.registry import schedules\nschedules.register('cosine')(int)", "ValueError: .*'cosine'"),
    ],
)
def test_a_plug_in_that_cannot_be_imported_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    registry.schedules.names()
    (tmp_path / "plug_in_of_test.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plug_in_of_test", raising=False)
    with pytest.raises(ValueError, match=rf"the plug-in plug_in_of_test cannot be imported \({reason}.*PYTHONPATH"):
        import_plugins(["plug_in_of_test"])


@pytest.mark.parametrize("name", ["my lab", "", "lab.", "../lab", "lab:main"])
def test_what_is_no_module_is_no_plug_in(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not the name of a module: give one such as my_lab\.bd3"):
        import_plugins([name])


def test_a_missing_plug_in_says_where_it_is_looked_for() -> None:
    with pytest.raises(
        ValueError, match=r"no_such_lab\.bd3 cannot be imported .*install it .* on PYTHONPATH; the current"
    ):
        import_plugins(["no_such_lab.bd3"])


@pytest.mark.launch
def test_what_a_recipe_names_is_known_without_pytorch() -> None:
    code = (
        "import sys\n"
        "from bd3_scale import registry\n"
        f"for name in {OF_RECIPES!r}:\n"
        "    print(name, *getattr(registry, name).names())\n"
        "loaded = {'torch', 'megatron', 'deepspeed', 'transformers'} & sys.modules.keys()\n"
        "assert not loaded, loaded"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    known = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines()}
    assert known["schedules"] == ["linear", "cosine", "square", "square_root", "log"]
    assert known["attention_backends"] == ["reference", "cpu", "triton", "flex"]
    assert set(known["objectives"]) == {"block_diffusion", "next_token", "score_entropy"}
    assert "adamw" in known["optimizers"]
