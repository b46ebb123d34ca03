from __future__ import annotations

import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from bd3_scale.recipe.load import load_recipe, recipe_hash, resolved_yaml
from bd3_scale.recipe.schema import Recipe, RecipeError
from bd3_scale.registry import MODULE_NAME

BASE = """
name: base
model: {num_layers: 2, hidden_size: 128, num_attention_heads: 4, ffn_hidden_size: 256}
diffusion: {block_size: 8}
data: {path: shards, seq_len: 256}
optimizer: {lr: 1e-3}
train: {steps: 10, global_batch_size: 8, micro_batch_size: 4}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def problems(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_a_file_sets_what_it_names_and_defaults_fill_the_rest(base: Path) -> None:
    recipe = load_recipe(base)
    assert recipe.model.hidden_size == 128
    assert recipe.optimizer.lr == 0.001
    assert recipe.optimizer.betas == (0.9, 0.95)


def test_extends_merges_mappings_key_by_key_through_a_chain_of_folders(base: Path) -> None:
    (base.parent / "sub").mkdir()
    middle, top = base.parent / "sub/middle.yaml", base.parent / "top.yaml"
    middle.write_text("extends: ../base.yaml\nname: middle\nmodel: {num_layers: 3}\noptimizer: {betas: [0.8, 0.9]}\n")
    top.write_text("extends: sub/middle.yaml\nname: top\noptimizer: {betas: [0.5, 0.6]}\n")
    recipe = load_recipe(top, ["model.num_layers=5", "optimizer={lr: 2e-4, eps: 1e-6}", "model.num_layers=6"])
    assert recipe.name == "top"
    assert (recipe.model.num_layers, recipe.model.hidden_size) == (6, 128)
    assert (recipe.optimizer.lr, recipe.optimizer.eps, recipe.optimizer.betas) == (2e-4, 1e-6, (0.5, 0.6))


def test_extends_in_a_circle_is_an_error_that_shows_the_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml")
    (problem,) = problems(tmp_path / "a.yaml")
    assert "circle" in problem
    assert problem.index("a.yaml") < problem.index("b.yaml") < problem.rindex("a.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-3", 0.001), ("3", 3.0), ("1E+2", 100.0), (".5", 0.5), ("2.", 2.0), ("1_000", 1000.0), ("1.5e3", 1500.0)],
)
def test_every_way_to_write_a_number(base: Path, text: str, expected: float) -> None:
    assert load_recipe(base, [f"optimizer.lr={text}"]).optimizer.lr == expected


@pytest.mark.parametrize("text", ["no", "on", "012", "2024-01-01", "1:30", "0x10"])
def test_text_that_older_yaml_would_convert_stays_text(base: Path, text: str) -> None:
    assert load_recipe(base, [f"data.path={text}"]).data.path == text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps='12'", ["train.steps", "integer", '"12"']),
        ("train.steps=true", ["train.steps", "integer", "true"]),
        ("train.steps=1.0", ["train.steps", "integer", "1.0"]),
        ("train.steps=", ["train.steps", "integer", "null"]),
        ("optimizer.lr=fast", ["optimizer.lr", "number", '"fast"']),
        ("optimizer.lr=true", ["optimizer.lr", "number", "true"]),
        ("deterministic=1", ["deterministic", "boolean", "1"]),
        ("deterministic=yes", ["deterministic", "boolean", '"yes"']),
        ("name=3", ["name", "string", "3"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas.1"]),
        ("optimizer.betas=[0.9, 1.0]", ["optimizer.betas.1", "less than 1"]),
        ("optimizer.schedule=cosin", ["optimizer.schedule", "'cosine'", '"cosin"']),
        ("model=big", ["model", "mapping", '"big"']),
        ("optimizer.lr=0", ["optimizer.lr", "greater than 0"]),
        ("optimizer.groups=[{match: '*', lr_scale: -1}]", ["optimizer.groups.0.lr_scale", "greater than or equal"]),
        ("data.cache_limit=3 apples", ["data.cache_limit", "3 apples"]),
    ],
)
def test_a_wrong_value_is_reported_with_its_path_the_rule_and_the_value(
    base: Path, override: str, words: list[str]
) -> None:
    (problem,) = problems(base, override)
    assert [word for word in words if word not in problem] == []


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("optimizer.lrr=1", "did you mean optimizer.lr?"),
        ("optimiser.lr=1", "did you mean optimizer?"),
        ("seq_len=3", "did you mean data.seq_len?"),
        ("block-size=3", "did you mean diffusion.block_size?"),
        ("logging.wandb.mod=auto", "did you mean logging.wandb.mode?"),
        ("optimizer.zzz=1", "known here: family, lr, betas"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(base: Path, override: str, suggestion: str) -> None:
    (problem,) = problems(base, override)
    assert override.partition("=")[0].split(".")[0] in problem
    assert suggestion in problem


def test_all_problems_are_listed_at_once(base: Path) -> None:
    found = problems(base, "train.steps=x", "optimizer.lr=-1", "model.depth=3")
    assert {problem.split(":")[0] for problem in found} == {"train.steps", "optimizer.lr", "model.depth"}


def test_a_missing_required_key_is_named(base: Path) -> None:
    base.write_text(BASE.replace("diffusion: {block_size: 8}", "diffusion: {}"))
    assert problems(base) == ("diffusion.block_size: is missing and has no default",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "mapping"),
        (b"- a\n", "mapping"),
        (b"name: [", "not valid YAML"),
        (b"\xff\xfe\xfa", "not valid YAML"),
        (b"name: a\nname: b\n", "'name' appears twice"),
        (b"extends: [a, b]\n", "one file"),
        (b"extends: nowhere.yaml\n", "bad.yaml extends"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="yaml") as caught:
        load_recipe(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("override", ["lr", "=3", "a..b=3", ".a=3", "train={"])
def test_an_override_that_is_not_key_and_value_is_shown(base: Path, override: str) -> None:
    (problem,) = problems(base, override)
    assert override in problem


def values_of(annotation: object, metadata: tuple[object, ...]) -> st.SearchStrategy[object]:
    """Draw values of a field's type; validation filters those that are out of the field's range."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return section_values(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is typing.Annotated:
        return values_of(arguments[0], metadata)
    if origin is tuple and arguments[-1] is ...:
        return st.lists(values_of(arguments[0], ()), max_size=4).map(tuple)
    if origin is dict:
        return st.dictionaries(*(values_of(argument, ()) for argument in arguments), max_size=4)
    if origin is tuple:
        return st.tuples(*(values_of(argument, ()) for argument in arguments))
    if origin is dict:
        return st.dictionaries(*(values_of(argument, ()) for argument in arguments), max_size=3)
    if arguments:
        return st.one_of(*(values_of(argument, metadata) for argument in arguments))
    if annotation is str:
        return st.sampled_from(
            ["no", "1e5", "a: b", "~", "true", "#", "ä  b ", "0", "- x", "'", "", "1_0", "x" * 200 + " y"]
        )
    return {
        int: st.integers(1, 10**9),
        float: st.floats(0, 1, exclude_min=True, exclude_max=True, allow_subnormal=False),
        bool: st.booleans(),
        type(None): st.none(),
    }[annotation]


def section_values(section: type[BaseModel]) -> st.SearchStrategy[dict[str, object]]:
    special = {"name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True), "cache_limit": st.just("1gb")}
    special["plugins"] = st.lists(st.from_regex(MODULE_NAME, fullmatch=True), max_size=4)
    fields = {name: values_of(f.annotation, tuple(f.metadata)) for name, f in section.model_fields.items()}
    return st.fixed_dictionaries({name: special.get(name, strategy) for name, strategy in fields.items()})


@given(section_values(Recipe))
def test_the_resolved_recipe_loads_back_equal_with_the_same_hash(tmp_path_factory, values: dict[str, object]) -> None:
    recipe = Recipe.model_validate(values)
    path = tmp_path_factory.mktemp("resolved") / "recipe.yaml"
    path.write_text(resolved_yaml(recipe))
    again = load_recipe(path)
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


@pytest.mark.parametrize("character", list("\0\n\x1b\x7f\x85\u2028\u2029\udcff"))
@pytest.mark.parametrize("place", ["run_dir={}", "data.path={}", "logging.wandb={{entity: {}}}"])
def test_no_text_of_a_recipe_holds_a_control_character(base: Path, character: str, place: str) -> None:
    """Check also lone surrogates, which Python makes of bytes of a command line that are not UTF-8."""
    with pytest.raises(RecipeError, match=r"(must be text|unicode)") as refused:
        load_recipe(base, [place.format(f'"a\\u{ord(character):04x}b"')])
    assert len(str(refused.value).splitlines()) == 1
    assert load_recipe(base, [place.format("'a ✓ü $`\\ b'")])


def test_the_hash_depends_on_every_value_and_not_on_how_it_was_given(base: Path) -> None:
    recipe = load_recipe(base)
    default_spelt_out = load_recipe(base, ["optimizer.weight_decay=0.1"])
    assert recipe_hash(recipe) == recipe_hash(default_spelt_out)
    changes = ["seed=2", "optimizer.lr=1.0000001e-3", "model.qk_norm=false", "logging.every_steps=2", "data.path=x"]
    hashes = {recipe_hash(recipe), *(recipe_hash(load_recipe(base, [change])) for change in changes)}
    assert len(hashes) == 1 + len(changes)
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)


def test_plain_yaml_tools_read_the_resolved_recipe_alike(base: Path) -> None:
    recipe = load_recipe(base)
    assert yaml.safe_load(resolved_yaml(recipe)) == recipe.model_dump(mode="json")
