"""Find the checkpoint that a run starts or resumes from, and check that it fits recipe and data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import BaseModel

from bd3_scale.checkpoint.folder import resolve_checkpoint
from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest, read_manifest
from bd3_scale.checkpoint.newest import check_together, newest_sound
from bd3_scale.checkpoint.store import load_initial_weights, load_training_state
from bd3_scale.data.manifest import (
    Manifest,
    bos_option,
    check_tokenizer,
    data_hash,
    differences_of,
    earlier_data_hash,
    parse_manifest,
)
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.model.layout import ParameterLayout
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.parallel.zero import ZeroState, ema_decay
from bd3_scale.recipe.schema import MOE_TRAINING, MixtureStage, ModelRecipe, Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.resilience.readers import read_regular

_LOG = logging.getLogger(__name__)
# The manifest of the data that the run began with, in the run directory.
DATA_FILE = "data.json"
_WIDTH = 200
# What may not change within a run: the weights, the noise and the position in the data would mean something else, and
# another family of optimisers would miss its states.
_FIXED = (
    "seed",
    "model",
    "diffusion",
    "data.seq_len",
    "data.isolate_documents",
    "data.shuffle",
    "optimizer.family",
    "train.global_batch_size",
    "train.precision",
)
# Fixed as well if evaluations search the interval of mask rates: other evaluations would find other noise.
_SEARCHED = ("evaluation.every_steps", "evaluation.sequences", "evaluation.draws")


@dataclass(frozen=True)
class Start:
    """A checkpoint that the run resumes from, or one of another run whose weights it begins with."""

    checkpoint: Path
    manifest: CheckpointManifest
    resumes: bool

    def changes(self, recipe: Recipe) -> list[tuple[str, Any, Any]]:
        """Return the changed values, see `changed_values`; none if no run is resumed."""
        return changed_values(self.manifest.trained_with or {}, recipe) if self.resumes else []

    def notes(self, recipe: Recipe, data: Manifest) -> list[str]:
        """Return the notes for people about a resumed run."""
        notes = [f"{key} {_show(old)} → {_show(new)}" for key, old, new in self.changes(recipe)]
        if self.resumes:
            notes += [
                f"{_show(key)}={_show(value)} is no option of this version, and was one of {self.manifest.writer}, "
                "which wrote the checkpoint: the run goes on without it"
                for key, value in unknown_options(self.manifest.trained_with or {}, _values(recipe))
            ]
        average = recipe.optimizer.ema_decay
        if self.resumes and average and not self.manifest.ema_warms_up:
            updates = self.manifest.step - self.manifest.skipped
            if ema_decay(average, updates + 1) < average:
                notes.append(
                    "the moving average was kept at a constant decay so far, and is warmed up from here on: it is not "
                    "bitwise that of the version that began the run"
                )
        if self.resumes and self.manifest.data_hash != data_hash(data, recipe.data.used_before(self.step)):
            notes.append(
                f"{self.checkpoint.name} knows its data by the hash of an earlier version, which covers counts and "
                "sizes: whether the text is still the same is not known; checkpoints from here on know the contents"
            )
        return notes

    @property
    def step(self) -> int:
        """Return the finished steps of the run."""
        return self.manifest.step if self.resumes else 0

    def load(self, zero: ZeroState, layouts: Sequence[ParameterLayout]) -> None:
        """Load the training state, or the weights alone, in place (collective)."""
        load = load_training_state if self.resumes else load_initial_weights
        load(self.checkpoint, self.manifest, zero, layouts)


def find_start(recipe: Recipe, checkpoints: Path, data: Manifest) -> Start | None:
    """Return the newest sound checkpoint of the run, else what `init_from` names, checked before any work (collective).

    A checkpoint of a run of another name gives a warning: a renamed run resumes from its own ones.

    Raises:
        ValueError: none is sound, or recipe or data do not fit it.
    """
    if own := newest_sound(checkpoints, recipe.checkpoint.verify):
        check_resumable(*own, recipe, data)
        if (name := _other_name(own[1], recipe)) and dist.get_rank() == 0:
            _LOG.warning(
                "%s was written by a run named %r, and this one is named %r: if it is not this run's, stop here and "
                "move it out of %s",
                *(own[0], name, recipe.name, checkpoints),
            )
        return Start(*own, resumes=True)
    return find_initial(recipe, data)


def find_initial(recipe: Recipe, data: Manifest) -> Start | None:
    """Return the checkpoint of `init_from`, checked like one of the run (collective). ValueError: it does not fit."""
    if recipe.init_from is None:
        return None
    # On one rank: if the other run is still saving, each rank might see another newest checkpoint.
    initial = Path(recipe.init_from)
    checkpoint = Path(on_rank_zero(lambda: str(resolve_checkpoint(initial))))
    if problem := check_together(checkpoint, recipe.checkpoint.verify):
        raise ValueError(problem)
    manifest = read_manifest(checkpoint)
    check_initial(checkpoint, manifest, recipe, data)
    return Start(checkpoint, manifest, resumes=False)


def check_initial(checkpoint: Path, manifest: CheckpointManifest, recipe: Recipe, data: Manifest) -> None:
    """Check that a training of `recipe` on `data` can begin with the weights of a checkpoint.

    Raises:
        ValueError: model, vocabulary or tokeniser differ; every difference is named.
    """
    old, new = _shape(manifest.model), _shape(recipe.model)
    differences = [
        f"{key} is {_show(b)}, the checkpoint has {_show(a)}" for key, a, b in _differences("model", old, new)
    ]
    # An imported embedding may have more rows than the tokeniser has ids.
    vocabulary = Vocabulary(**manifest.vocabulary.model_dump(exclude={"rows"}))
    if vocabulary.model_copy(update={"bos_id": data.vocabulary.bos_id}) == data.vocabulary != vocabulary:
        differences.append(
            f"its documents begin with {vocabulary.bos_id}, those of the data with {data.vocabulary.bos_id}: prepare "
            f"the data again with {bos_option(vocabulary)}"
        )
    elif vocabulary != data.vocabulary:
        differences.append(f"the data's vocabulary is {data.vocabulary}, the checkpoint's {vocabulary}")
    if differences:
        raise ValueError(
            f"init_from={checkpoint} does not fit:\n  - " + "\n  - ".join(differences) + "\ntake the model section of "
            "the checkpoint's manifest.json, and data prepared with its tokenizer folder"
        )
    if (checkpoint / TOKENIZER).is_dir():
        check_tokenizer(data, load_tokenizer(checkpoint / TOKENIZER))


def _shape(model: ModelRecipe) -> dict[str, Any]:
    """Return what two models must share to have the same weights, with derived defaults filled in."""
    explicit = {"head_dim": model.head_size, "num_query_groups": model.query_groups}
    return model.model_dump(mode="json", exclude={"init_std": True, "moe": set(MOE_TRAINING)}) | explicit


def check_resumable(checkpoint: Path, manifest: CheckpointManifest, recipe: Recipe, data: Manifest) -> None:
    """Check that a run of `recipe` can continue from a checkpoint.

    Raises:
        ValueError: the recipe or the data differ in what a run may not change; every difference is named.
    """
    if manifest.trained_with is None:
        raise ValueError(f"{checkpoint} is an import, and no run goes on from one: name it with init_from={checkpoint}")
    differences = list(_recipe_differences(checkpoint, manifest, manifest.trained_with, recipe))
    own_hash = data_hash(data, recipe.data.used_before(manifest.step))
    if manifest.data_hash not in (own_hash, earlier_data_hash(data)):
        details = "; ".join(_data_differences(checkpoint.parent.parent / DATA_FILE, manifest.data_hash, data))
        differences.append(
            f"the prepared data (hash {own_hash}) are not those of the checkpoint ({manifest.data_hash})"
            + f": {details}" * bool(details)
        )
    if manifest.step > recipe.train.steps:
        differences.append(f"train.steps is {recipe.train.steps}, the checkpoint has done {manifest.step}")
    if differences:
        name = _other_name(manifest, recipe)
        raise ValueError(
            f"{checkpoint}{f', of a run named {name!r},' if name else ''} cannot be resumed:\n  - "
            + "\n  - ".join(differences)
            + "\nput these values back, start another run with run_dir=FOLDER, or move the checkpoint away if it is of "
            "another run"
        )


def _recipe_differences(
    checkpoint: Path, manifest: CheckpointManifest, written: Mapping[str, Any], recipe: Recipe
) -> Iterator[str]:
    """Yield the values of `recipe` that no run may change and that differ from the checkpoint's."""
    fixed = (*_FIXED, *((*_SEARCHED,) if recipe.diffusion.search_interval else ()))
    old, new = with_defaults(written, Recipe), _values(recipe)
    for path in fixed:
        for key, before, after in _differences(path, _at(old, path), _at(new, path)):
            yield f"{key} is {_show(after)}, the checkpoint has {_show(before)}"
    for key, value in unknown_options(written, new):
        if _may_matter(key, written, fixed):
            yield (
                f"{_show(key)}={_show(value)} is no option of this version, and was one of {manifest.writer}, which "
                "wrote the checkpoint; no run may change such a one: resume with that version, or begin anew with "
                f"init_from={checkpoint}"
            )
    trained = manifest.trained_data()
    before, now = (data.mixed_before(manifest.step) if data else () for data in (trained, recipe.data))
    if before != now:
        yield f"data.stages: the first {manifest.step} steps are {_mixture(now)}, the checkpoint has {_mixture(before)}"
    window, kept = recipe.data.shuffle_window, manifest.data_order.shuffle_window
    if window not in (None, kept):
        yield f"data.shuffle_window is {window}, the checkpoint has {_show(kept)}"
    if ("ema" in manifest.states) != bool(recipe.optimizer.ema_decay):
        yield (
            f"optimizer.ema_decay is {recipe.optimizer.ema_decay}, the checkpoint has "
            f"{_show(_at(old, 'optimizer.ema_decay'))}: a moving average is kept from the start"
        )


def _mixture(stages: Sequence[MixtureStage]) -> str:
    stages_shown = [f"{dict(sorted(stage.weights.items()))} until {stage.until}" for stage in stages]
    return ", ".join(stages_shown) or "of one data set"


def _other_name(manifest: CheckpointManifest, recipe: Recipe) -> str:
    """Return the name of the run that wrote a checkpoint; empty if it is the name of this run."""
    return "" if manifest.name == recipe.name or manifest.trained_with is None else manifest.name


def _data_differences(recorded: Path, known_hash: str, data: Manifest) -> list[str]:
    """Return the differences from the data of the run, if it kept their manifest."""
    try:
        old = parse_manifest(recorded, read_regular(recorded))
    except (ValueError, OSError):  # the manifest only helps to explain
        return []
    return differences_of(old, data) if known_hash in (data_hash(old), earlier_data_hash(old)) else []


def changed_values(written: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """Return the changed options of a resumed run that this version knows: dotted key, value before, value now.

    written: the recipe that a checkpoint was trained with; an option that is not in it had its default.
    """
    old, new = with_defaults(written, Recipe), _values(recipe)
    return [change for key in new if key != "run_dir" for change in _differences(key, old.get(key), new[key])]


def unknown_options(written: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options of a recipe that this version does not know: dotted key and value."""
    for key, value in written.items():
        if key not in known:
            yield key, value
        elif isinstance(value, dict) and isinstance(known[key], dict):
            yield from ((f"{key}.{inner}", option) for inner, option in unknown_options(value, known[key]))


def with_defaults(written: Mapping[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """Return a recipe, or a section of one, as JSON, with the defaults of options that came after it was written."""
    filled = dict(written)
    for name, field in section.model_fields.items():
        kind, value = field.annotation, filled.get(name, {})
        if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(value, dict):
            filled[name] = with_defaults(value, kind)
        elif name not in filled and not field.is_required():
            filled[name] = json.loads(json.dumps(field.get_default(call_default_factory=True)))
    return filled


def _may_matter(key: str, written: Mapping[str, Any], fixed: Sequence[str]) -> bool:
    """Return whether an unknown option may be a fixed one: in a fixed section, or a fixed option under another name."""
    section = key.rpartition(".")[0]
    return any(
        f"{key}.".startswith(f"{path}.") or (path.rpartition(".")[0] == section and _at(written, path) is None)
        for path in fixed
    )


def _values(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _at(recipe: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted key, None if there is none."""
    value: Any = recipe
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the differences of the options that `new` has; for the others see `unknown_options`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            yield from _differences(f"{path}.{key}", old.get(key), new[key])
    elif old != new:
        yield path, old, new


def _show(value: Any) -> str:
    """Return a value as one short line: a checkpoint may come from a stranger."""
    text = "unset" if value is None else str(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}…"
