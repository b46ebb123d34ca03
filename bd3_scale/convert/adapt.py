"""Prepare a run that adapts an autoregressive model of other software to block diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from bd3_scale.checkpoint.manifest import MANIFEST, TOKENIZER, read_manifest
from bd3_scale.convert.architectures import Format, export_obstacles
from bd3_scale.convert.importer import ImportPlan, plan_import, run_import
from bd3_scale.data.manifest import MANIFEST_FILE
from bd3_scale.data.prepare import DOCUMENT_MULTIPLE, prepare
from bd3_scale.data.stored import StoredData
from bd3_scale.data.waste import waste_note
from bd3_scale.generate.text import checkpoint_tokenizer
from bd3_scale.objective import objectives
from bd3_scale.recipe.checks import check_recipe, world_size_for_launch
from bd3_scale.recipe.load import load_recipe, resolved_yaml, with_plugins
from bd3_scale.recipe.preparation import least_multiple
from bd3_scale.resilience.files import write_atomically

INITIAL = "initial"
RECIPE = "adapt.yaml"


def prepare_adaptation(
    source: Path,
    recipe_file: Path,
    overrides: Sequence[str],
    *,
    text: Sequence[Path],
    validation: Sequence[Path],
    mask_token: str | None,
    bos: bool | None = None,
    plugins: Sequence[str] = (),
    progress: Callable[[int, int], object] = lambda done, total: None,
    note: Callable[[str], object] = lambda text: None,
) -> Path:
    """Prepare a run that adapts `source`, and return the path of its recipe.

    It imports `source` into the run directory, prepares the text with the model's tokeniser if `data.path` holds no
    prepared data, and writes the whole recipe. `plugins` of the command line join the recipe's; `note` is called with
    what the adapted model cannot be exported to.

    Raises:
        ValueError, FileNotFoundError: the source cannot be imported or is no next-token model, the recipe is wrong,
            there is neither prepared data nor text, or one of several data sources is not prepared.
    """
    plan = plan_import(source, mask_token=mask_token, bos=bos)
    if objectives.get(plan.diffusion.objective).fills_masks or plan.tokenizer is None:
        raise ValueError(
            f"{source} is {plan.architecture}, not an autoregressive model with a tokeniser: import it with "
            "`bd3-scale convert import`, and train with init_from"
        )
    fixed = {"model": plan.model.model_dump(mode="json"), "init_from": None}
    recipe = with_plugins(load_recipe(recipe_file, overrides, fixed), plugins)
    check_recipe(recipe, world_size_for_launch(recipe))
    served: Format = "sdar" if plan.model.moe is None else "sdar_moe"
    if obstacle := export_obstacles(plan.model, objectives.get(recipe.diffusion.objective))[served]:
        note(f"the adapted model will not run in SGLang or LMDeploy, but in transformers: {obstacle}")
    initial = recipe.run_path / INITIAL
    unprepared = [path for path in recipe.data.folders if not Path(path, MANIFEST_FILE).is_file()]
    if unprepared and recipe.data.sources:
        raise ValueError(
            f"{', '.join(unprepared)} of data.sources hold no prepared data, and --text is prepared for data.path "
            f"alone: `bd3-scale convert import {source} --out {initial}`, with the options of this command, and then "
            f"for each `bd3-scale data prepare --tokenizer {initial / TOKENIZER}`"
        )
    if unprepared and not text:
        raise ValueError(f"data.path={unprepared[0]} holds no prepared data: give the text to train on with --text")
    if missing := [str(path) for path in (*text, *validation) if not path.exists()]:
        raise FileNotFoundError(f"{', '.join(missing)} does not exist")
    if not (initial / MANIFEST).is_file():
        run_import(plan, initial, progress)
    _check_same_import(initial, plan)
    recipe = recipe.model_copy(update={"init_from": str(initial)})
    if unprepared:
        multiple = math.lcm(DOCUMENT_MULTIPLE, least_multiple(recipe))
        if recipe.data.seq_len % multiple:
            multiple = least_multiple(recipe)
        prepare(
            text,
            Path(recipe.data.path),
            checkpoint_tokenizer(initial, read_manifest(initial)),
            recipe.data.seq_len,
            document_multiple=multiple,
            validation=validation,
        )
        if message := waste_note(StoredData(recipe.data.path)):
            note(message)
    write_atomically(recipe.run_path / RECIPE, resolved_yaml(recipe))
    return recipe.run_path / RECIPE


def _check_same_import(initial: Path, plan: ImportPlan) -> None:
    """Raise ValueError if the run began with another model, or with other ids."""
    manifest = read_manifest(initial)
    same_weights = manifest.source_fingerprint == plan.fingerprint
    # Whether texts begin with BOS was decided when the run began.
    vocabulary = plan.vocabulary.model_copy(update={"bos_id": manifest.vocabulary.bos_id})
    if not same_weights or manifest.model != plan.model or manifest.vocabulary != vocabulary:
        raise ValueError(
            f"{initial} was imported from {manifest.imported_from}, with mask id {manifest.vocabulary.mask_id}, "
            f"and {plan.source} has changed since or is another model: choose another run_dir=FOLDER, or remove "
            f"{initial}"
        )
