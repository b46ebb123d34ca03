"""What may change between the attempts of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.data.manifest import Manifest, data_hash
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.recipe.schema import Recipe
from bd3_scale.train.resume import DATA_FILE, Start, check_resumable
from tests.support.recipes import tiny_recipe


def recipe(search: bool, draws: int) -> Recipe:
    return Recipe.model_validate(
        tiny_recipe(diffusion={"search_interval": search}, evaluation={"every_steps": 2, "draws": draws})
    )


def data(tmp_path: Path, text: str) -> Manifest:
    (tmp_path / "t.txt").write_text(text)
    out = tmp_path / str(len(list(tmp_path.iterdir())))
    options = {"holdout": 0, "workers": 1, "progress": False}
    return prepare([tmp_path / "t.txt"], out, load_tokenizer("bytes"), 32, **options)


def manifest_of(recipe: Recipe, data: Manifest, **more: object) -> CheckpointManifest:
    return CheckpointManifest(
        step=4,
        recipe=recipe,
        recipe_hash="",
        vocabulary=data.vocabulary,
        data_hash=data_hash(data),
        world_size=1,
        states=("master", "ema"),
        **more,
    )


def test_evaluation_may_change_unless_training_follows_it(tmp_path: Path) -> None:
    prepared = data(tmp_path, "a" * 100)

    def resume(search: bool) -> None:
        check_resumable(Path("r/c/s"), manifest_of(recipe(search, 1), prepared), recipe(search, 2), prepared)

    resume(search=False)
    with pytest.raises(ValueError, match=r"evaluation.draws is 2, the checkpoint has 1"):
        resume(search=True)


def test_a_refusal_names_what_differs_in_the_data_where_the_run_kept_their_description(tmp_path: Path) -> None:
    old, new = data(tmp_path, "a" * 100), data(tmp_path, "a" * 140)
    manifest, checkpoint = manifest_of(recipe(False, 1), old), tmp_path / "run" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"are not those of the checkpoint \(\w+\)\n"):
        check_resumable(checkpoint, manifest, recipe(False, 1), new)
    (tmp_path / "run" / DATA_FILE).write_text(old.model_dump_json())
    said = (
        r"t.txt is 140 bytes, there 100 bytes; train has 1 documents in 5 sequences, there 1 documents in 4 sequences"
    )
    with pytest.raises(ValueError, match=said):
        check_resumable(checkpoint, manifest, recipe(False, 1), new)
    check_resumable(checkpoint, manifest, recipe(False, 1), old)


def test_a_resumed_run_tells_every_value_that_changed(tmp_path: Path) -> None:
    old = recipe(False, 1)
    changed = tiny_recipe(optimizer={"lr": 0.02}, evaluation={"every_steps": 2, "draws": 1}, run_dir="elsewhere")
    new = Recipe.model_validate(changed | {"checkpoint": {"every_steps": 3}})
    start = Start(Path("c"), manifest_of(old, data(tmp_path, "a" * 100), ema_warms_up=True), resumes=True)
    assert start.notes(old) == []
    assert start.notes(new) == ["optimizer.lr 0.001 → 0.02", "checkpoint.every_steps 0 → 3"]
    assert start.changes(new) == [("optimizer.lr", 0.001, 0.02), ("checkpoint.every_steps", 0, 3)]
    assert replace(start, resumes=False).notes(new) == []


@pytest.mark.parametrize(("decay", "step", "told"), [(0.9, 4, True), (0.9, 200, False), (0.0, 4, False)])
def test_an_average_of_before_is_told_as_long_as_the_warm_up_would_change_it(decay, step, told, tmp_path) -> None:
    run = Recipe.model_validate(tiny_recipe(optimizer={"ema_decay": decay}, train={"steps": 999}))
    manifest = manifest_of(run, data(tmp_path, "a" * 100)).model_copy(update={"step": step})
    notes = Start(Path("c"), manifest, resumes=True).notes(run)
    assert [note.startswith("the moving average was kept at a constant decay so far") for note in notes] == [
        True
    ] * told
