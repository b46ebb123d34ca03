"""What may change between the attempts of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.data.manifest import Manifest, data_hash, earlier_data_hash
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.recipe.schema import Recipe
from bd3_scale.train.resume import DATA_FILE, Start, check_resumable
from tests.support.recipes import tiny_recipe


def recipe(search: bool, draws: int) -> Recipe:
    return Recipe.model_validate(
        tiny_recipe(diffusion={"search_interval": search}, evaluation={"every_steps": 2, "draws": draws})
    )


def data(tmp_path: Path, text: str, name: str = "t.txt", workers: int = 1) -> Manifest:
    (tmp_path / name).write_text(text)
    out = tmp_path / str(len(list(tmp_path.iterdir())))
    return prepare([tmp_path / name], out, load_tokenizer("bytes"), 32, holdout=0, workers=workers, progress=False)


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


def test_a_run_keeps_its_family_of_optimisers_and_may_change_its_groups(tmp_path: Path) -> None:
    prepared, old = data(tmp_path, "a" * 100), recipe(False, 1)

    def resume(**optimizer: object) -> None:
        new = Recipe.model_validate(tiny_recipe(evaluation={"every_steps": 2, "draws": 1}, optimizer=optimizer))
        check_resumable(Path("r/c/s"), manifest_of(old, prepared), new, prepared)

    resume(groups=[{"match": "*", "lr_scale": 0.5}])
    with pytest.raises(ValueError, match=r"optimizer.family is lion, the checkpoint has adamw\n"):
        resume(family="lion")


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


def test_text_of_equal_length_is_other_data_and_equal_text_of_another_place_is_not(tmp_path: Path) -> None:
    old = data(tmp_path, "a" * 100)
    manifest, checkpoint = manifest_of(recipe(False, 1), old), tmp_path / "run" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / DATA_FILE).write_text(old.model_dump_json())
    changed = data(tmp_path, "a" * 99 + "b")
    said = "train has as many documents as there, but other contents in 1 of 1 shards"
    with pytest.raises(ValueError, match=rf"are not those of the checkpoint \(\w+\): {said}"):
        check_resumable(checkpoint, manifest, recipe(False, 1), changed)
    check_resumable(checkpoint, manifest, recipe(False, 1), data(tmp_path, "a" * 100, "elsewhere.txt", workers=2))


def test_a_refused_checkpoint_of_another_run_is_named_with_it(tmp_path: Path) -> None:
    prepared = data(tmp_path, "a" * 100)
    other = recipe(False, 1).model_copy(update={"name": "some\none's", "seed": 9})
    said = (
        r"step-4, of a run named \"some\\none's\", cannot be resumed:\n  - seed is 1, the checkpoint has 9\n.*or move"
    )
    with pytest.raises(ValueError, match=said):
        check_resumable(Path("r/c/step-4"), manifest_of(other, prepared), recipe(False, 1), prepared)


def test_a_run_of_before_goes_on_by_its_old_hash_and_is_told(tmp_path: Path) -> None:
    prepared, changed = data(tmp_path, "a" * 100), data(tmp_path, "a" * 140)
    manifest = manifest_of(recipe(False, 1), prepared, ema_warms_up=True)
    earlier = manifest.model_copy(update={"data_hash": earlier_data_hash(prepared)})
    start = Start(tmp_path / "step-00000004", earlier, resumes=True)
    check_resumable(start.checkpoint, earlier, recipe(False, 1), prepared)
    (note,) = start.notes(recipe(False, 1), prepared)
    assert note.startswith("step-00000004 knows its data by the hash of an earlier version, which covers counts")
    assert replace(start, resumes=False).notes(recipe(False, 1), prepared) == []
    assert replace(start, manifest=manifest).notes(recipe(False, 1), prepared) == []
    with pytest.raises(ValueError, match="are not those of the checkpoint"):
        check_resumable(start.checkpoint, earlier, recipe(False, 1), changed)


def test_a_resumed_run_tells_every_value_that_changed(tmp_path: Path) -> None:
    old = recipe(False, 1)
    changed = tiny_recipe(optimizer={"lr": 0.02}, evaluation={"every_steps": 2, "draws": 1}, run_dir="elsewhere")
    new = Recipe.model_validate(changed | {"checkpoint": {"every_steps": 3}})
    prepared = data(tmp_path, "a" * 100)
    start = Start(Path("c"), manifest_of(old, prepared, ema_warms_up=True), resumes=True)
    assert start.notes(old, prepared) == []
    assert start.notes(new, prepared) == ["optimizer.lr 0.001 → 0.02", "checkpoint.every_steps 0 → 3"]
    assert start.changes(new) == [("optimizer.lr", 0.001, 0.02), ("checkpoint.every_steps", 0, 3)]
    assert replace(start, resumes=False).notes(new, prepared) == []


@pytest.mark.parametrize(("decay", "step", "told"), [(0.9, 4, True), (0.9, 200, False), (0.0, 4, False)])
def test_an_average_of_before_is_told_as_long_as_the_warm_up_would_change_it(decay, step, told, tmp_path) -> None:
    run = Recipe.model_validate(tiny_recipe(optimizer={"ema_decay": decay}, train={"steps": 999}))
    prepared = data(tmp_path, "a" * 100)
    manifest = manifest_of(run, prepared).model_copy(update={"step": step})
    notes = Start(Path("c"), manifest, resumes=True).notes(run, prepared)
    assert [note.startswith("the moving average was kept at a constant decay so far") for note in notes] == [
        True
    ] * told
