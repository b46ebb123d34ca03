"""Check what may change between the attempts of a run."""

from __future__ import annotations

import json
import re
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
    states = ("master", "ema") if recipe.optimizer.ema_decay else ("master",)
    about = {"step": 4, "vocabulary": data.vocabulary, "data_hash": data_hash(data), "states": states}
    return CheckpointManifest.of_run(recipe, **about, **more)


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
    other = recipe(False, 1).model_copy(update={"name": "someone-s", "seed": 9})
    said = r"step-4, of a run named 'someone-s', cannot be resumed:\n  - seed is 1, the checkpoint has 9\n.*or move"
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


def with_options(manifest: CheckpointManifest, **sections: dict[str, object]) -> CheckpointManifest:
    """Return a manifest as a version with other options wrote it; None removes an option."""
    assert manifest.trained_with is not None
    recipe = json.loads(json.dumps(manifest.trained_with))
    for name, options in sections.items():
        recipe[name] = {k: v for k, v in (recipe.get(name, {}) | options).items() if v is not None}
    writer = {"bd3_scale": "0.7", "commit": "0123456789ab"}
    return manifest.model_copy(update={"trained_with": recipe, "written_by": writer})


def test_a_resume_names_the_options_that_it_does_not_know_and_goes_on(tmp_path: Path) -> None:
    prepared = data(tmp_path, "a" * 100)
    manifest = with_options(
        manifest_of(recipe(False, 1), prepared, ema_warms_up=True),
        optimizer={"amsgrad": True, "schedule": "polynomial"},
        guard={"skip_steps": None, "skipped_steps": 5},
        data={"prefetch": "a\x1b[2J" + "b" * 999},
        telemetry={"every_steps": 5},
    )
    check_resumable(Path("r/c/s"), manifest, recipe(False, 1), prepared)
    notes = Start(Path("c"), manifest, resumes=True).notes(recipe(False, 1), prepared)
    said = "is no option of this version, and was one of bd3_scale 0.7 (commit 0123456789ab)"
    assert notes[0] == "optimizer.schedule polynomial → cosine"
    unknown = ["data.prefetch", "optimizer.amsgrad", "guard.skipped_steps", "telemetry"]
    assert [note.partition("=")[0] for note in notes[1:]] == unknown
    assert all(said in note and "goes on without it" in note and note.isprintable() for note in notes[1:])
    assert "guard.skipped_steps=5 is" in notes[3]
    assert max(map(len, notes)) < 400


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"diffusion": {"token_editing": 0.1}}, ["diffusion.token_editing=0.1"]),
        ({"model": {"experts": 2}}, ["model.experts=2"]),
        ({"data": {"shuffle": None, "shuffled": False}}, ["data.shuffled=False"]),
        ({"train": {"precision": None, "dtype": "bf16"}}, ["train.dtype=bf16", "train.precision is fp32"]),
        ({"data": {"seq_len": None}}, ["data.seq_len is 64, the checkpoint has unset"]),
        ({"diffusion": {"noise_schedule": "exotic"}}, ["noise_schedule is linear, the checkpoint has exotic"]),
    ],
)
def test_a_resume_refuses_unknown_options_that_no_run_may_change(sections, named, tmp_path: Path) -> None:
    prepared = data(tmp_path, "a" * 100)
    manifest = with_options(manifest_of(recipe(False, 1), prepared), **sections)
    with pytest.raises(ValueError, match="cannot be resumed") as caught:
        check_resumable(Path("r/c/s"), manifest, recipe(False, 1), prepared)
    assert all(words in str(caught.value) for words in named)
    if "=" in named[0]:
        way_out = r"bd3_scale 0\.7 \(commit 0123456789ab\), .* resume with that version, or .* init_from=r/c/s"
        assert re.search(way_out, str(caught.value))


def test_an_option_that_came_later_had_its_default(tmp_path: Path) -> None:
    prepared = data(tmp_path, "a" * 100)
    run = Recipe.model_validate(tiny_recipe())
    absent = {"diffusion": {"noise_steps": None, "noisy_copies": None}, "data": {"isolate_documents": None}}
    manifest = with_options(manifest_of(run, prepared, ema_warms_up=True), optimizer={"betas": None}, **absent)
    check_resumable(Path("r/c/s"), manifest, run, prepared)
    assert Start(Path("c"), manifest, resumes=True).notes(run, prepared) == []
    two = Recipe.model_validate(tiny_recipe(diffusion={"noisy_copies": 2}))
    with pytest.raises(ValueError, match=r"diffusion.noisy_copies is 2, the checkpoint has 1"):
        check_resumable(Path("r/c/s"), manifest, two, prepared)


@pytest.mark.parametrize(("decay", "step", "told"), [(0.9, 4, True), (0.9, 200, False), (0.0, 4, False)])
def test_an_average_of_before_is_told_as_long_as_the_warm_up_would_change_it(decay, step, told, tmp_path) -> None:
    run = Recipe.model_validate(tiny_recipe(optimizer={"ema_decay": decay}, train={"steps": 999}))
    prepared = data(tmp_path, "a" * 100)
    manifest = manifest_of(run, prepared).model_copy(update={"step": step})
    notes = Start(Path("c"), manifest, resumes=True).notes(run, prepared)
    assert [note.startswith("the moving average was kept at a constant decay so far") for note in notes] == [
        True
    ] * told
