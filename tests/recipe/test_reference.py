"""Check the reference of recipe keys: it has all keys, in words, and comes from the schema itself."""

from __future__ import annotations

import typing

import pytest
from pydantic import Field

from bd3_scale.recipe.reference import FieldDoc, explain, fields
from bd3_scale.recipe.schema import Recipe, RecipeError, Section
from bd3_scale.recipe.section import dotted_fields, nested_section

FIELDS = fields()


def holds_a_number(annotation: object) -> bool:
    if annotation in (int, float):
        return True
    if typing.get_origin(annotation) is typing.Literal:
        return any(isinstance(value, int) for value in typing.get_args(annotation))
    # A plug-in's options may be of any type.
    return bool not in typing.get_args(annotation) and any(map(holds_a_number, typing.get_args(annotation)))


def wanting(documented: list[FieldDoc], root: type[Section] = Recipe) -> list[str]:
    """Return the keys that lack a description or a unit."""
    annotations = {key: field.annotation for key, field in dotted_fields(root)}
    return [
        field.key
        for field in documented
        if len(field.description) < 5
        or not field.description.endswith(".")
        or (holds_a_number(annotations[field.key]) and nested_section(annotations[field.key]) is None)
        != bool(field.unit)
    ]


def test_every_field_has_a_description_and_every_quantity_a_unit() -> None:
    assert len(FIELDS) >= 140
    assert len({field.key for field in FIELDS}) == len(FIELDS)
    assert wanting(FIELDS) == []


def test_a_field_without_them_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(Section):
        steps: int = Field(3, description="Steps.")
        name: str = "x"

    monkeypatch.setattr("bd3_scale.recipe.reference.Recipe", Bare)
    assert wanting(fields(), Bare) == ["steps", "name"]


@pytest.mark.parametrize(
    ("key", "type_", "default", "unit"),
    [
        ("diffusion.block_size", "integer, 1 or more", "required", "tokens"),
        ("model.num_query_groups", "integer, 1 or more; or null", "null", "heads"),
        ("model.rotary_fraction", "number, above 0, 1 or less", "1.0", "ratio"),
        ("optimizer.betas", "list of 2: number, 0 or more, below 1 each", "[0.9, 0.95]", "ratio"),
        ("optimizer.schedule", "one of cosine, wsd, constant", '"cosine"', ""),
        ("data.sources[].weight", "number, above 0; or null", "null", "ratio"),
        ("diffusion.block_size_choices", "list of integers, 1 or more", "[]", "tokens"),
        ("seed", "integer, 0 or more, below 9223372036854775808", "1", "number"),
    ],
)
def test_a_key_is_explained_as_the_schema_has_it(key: str, type_: str, default: str, unit: str) -> None:
    (field,) = explain(key)
    assert (field.type, field.default, field.unit) == (type_, default, unit)


def test_a_section_is_explained_with_all_that_is_in_it() -> None:
    keys = [field.key for field in explain("optimizer")]
    assert keys[0] == "optimizer"
    assert {"optimizer.lr", "optimizer.groups[].match"} <= set(keys)
    assert all(key.startswith("optimizer") for key in keys)


def test_a_key_names_the_rules_that_it_takes_part_in() -> None:
    (field,) = explain("optimizer.warmup_steps")
    assert ("The warm-up is not longer than the training.", ("optimizer.warmup_steps", "train.steps")) in field.rules


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optimiser.lr", "optimizer.lr"),
        ("diffusion.blocksize", "diffusion.block_size"),
        ("model.moe.topk", "model.moe.top_k"),
        ("data.sources[].wieght", "data.sources[].weight"),
        ("sead", "seed"),
    ],
)
def test_a_wrong_key_is_refused_with_the_nearest(key: str, near: str) -> None:
    with pytest.raises(RecipeError) as refused:
        explain(key)
    assert f"did you mean {near}?" in str(refused.value)
