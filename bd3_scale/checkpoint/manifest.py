"""Write and read a checkpoint's manifest. It is written last, so a folder with a sound manifest is complete."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bd3_scale.checkpoint.formats import FORMAT, OLDEST, up_to_date
from bd3_scale.data.order import EARLIER, DataOrder
from bd3_scale.objective import Objective, objective_of, objectives
from bd3_scale.observe.environment import software
from bd3_scale.recipe.load import recipe_hash
from bd3_scale.recipe.schema import (
    NAME,
    DataRecipe,
    DiffusionRecipe,
    ModelRecipe,
    ParallelRecipe,
    PositiveInt,
    Recipe,
    Section,
    without_controls,
)
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.registry import MODULE_NAME
from bd3_scale.resilience.files import file_hash
from bd3_scale.resilience.readers import in_one_line, read_regular, reader

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
# Files of the checkpoint that this one was imported from, for an export to the same format.
IMPORTED = "imported"


# A path within the checkpoint: relative, and no part of it begins with a dot, so a hostile manifest cannot name `../x`.
_PATH_INSIDE = r"^[^./\\][^/\\]*(/[^./\\][^/\\]*)*$"
Text = Annotated[str, AfterValidator(without_controls)]
S = TypeVar("S", bound=Section)


# The checksum is the last field of the file; the text before and behind it is what the checksum covers.
_SEALED = re.compile(r'"checksum": "([0-9a-f]{32})"\s*\}\s*\Z')


class FileRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    xxh3: str


def file_record(path: Path) -> FileRecord:
    """Return the size and hash of a file as it is now; reads it."""
    return FileRecord(bytes=path.stat().st_size, xxh3=file_hash(path))


def weights_state(states: Collection[str]) -> str:
    """Return which of a checkpoint's states is the model's weights outside training, see `CheckpointManifest`."""
    return "ema" if "ema" in states else "master"


class CheckpointManifest(BaseModel):
    """Self-description of a checkpoint: what a reader of its weights needs, and what a resume of its run does.

    Attributes:
        step: steps done, from which schedules, data position and noise follow.
        skipped: those of them whose gradients were not finite, and which left the optimiser as it was.
        precision: dtype of the forward in training, or of an imported model's weights.
        max_position_embeddings: longest sequence of the training, in tokens.
        objective: name of the training objective, as in a recipe; block_size: tokens per block.
        objective_options: options that the recipe set for a plug-in's objective.
        fills_masks: models of that objective fill the masks of a block, and so can generate text here.
        imported_from: the model of other software that was imported; empty for a run.
        source_fingerprint: identifies the files that an import's weights came from.
        trained_with: the whole recipe of the run, as JSON; None for an import. Its options change between versions, so
            only a resume interprets them.
        written_by: versions of this package, its commit, and of the libraries that wrote the checkpoint.
        data_hash: hash of the manifest of the training data (tokeniser, sequences); the data position refers to that
            data. Empty for an import.
        world_size: ranks that wrote it; any number may read it.
        states: states kept of every parameter, in fp32, except imported masters, which keep their dtype.
        attention_tiles: tiles of the attention kernels, which a bitwise resume needs; empty where none are used.
        intervals: the clipped interval of mask rates, for every block size whose search has found one.
        ema_warms_up: the decay of the moving average rises from the first update on; absent in older checkpoints, whose
            decay was constant.
        data_order: how the run orders its data; absent in checkpoints older than `data.shuffle_window`, which have
            version 1.
        files: size in bytes and XXH3-128 of every other file.
        checksum: XXH3-128 of the manifest's own text, with this left empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[4] = FORMAT
    step: int
    skipped: int = 0
    name: Annotated[str, Field(pattern=NAME)]
    model: ModelRecipe
    vocabulary: Vocabulary
    precision: Literal["bf16", "fp32"]
    max_position_embeddings: PositiveInt
    objective: Text
    block_size: PositiveInt
    objective_options: dict[str, bool | int | float | str] = {}
    fills_masks: bool = True
    imported_from: Text = ""
    source_fingerprint: str = ""
    trained_with: dict[str, Any] | None = None
    written_by: dict[str, Text] = {}
    recipe_hash: str = ""
    data_hash: str = ""
    world_size: int = 1
    states: tuple[str, ...]
    attention_tiles: dict[str, list[int]] = {}
    intervals: dict[int, tuple[float, float]] = {}
    ema_warms_up: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    data_order: Annotated[DataOrder, Field(exclude_if=lambda value: value == EARLIER)] = EARLIER
    files: dict[Annotated[str, Field(pattern=_PATH_INSIDE)], FileRecord] = {}
    checksum: str = ""

    @classmethod
    def of_run(cls, recipe: Recipe, **more: Any) -> Self:
        """Return the manifest of a checkpoint of a run, with `more` of its fields."""
        return cls(
            name=recipe.name,
            model=recipe.model,
            precision="bf16" if recipe.train.precision == "bf16" else "fp32",
            max_position_embeddings=recipe.data.seq_len,
            objective=recipe.diffusion.objective,
            block_size=recipe.diffusion.block_size,
            objective_options=recipe.diffusion.objective_options,
            fills_masks=objectives.get(recipe.diffusion.objective).fills_masks,
            trained_with=recipe.model_dump(mode="json"),
            recipe_hash=recipe_hash(recipe),
            **more,
        )

    @property
    def writer(self) -> str:
        """Return the version and commit that wrote the checkpoint, for messages."""
        version, commit = (self.written_by.get(key, "unknown") for key in ("bd3_scale", "commit"))
        return f"bd3_scale {version} (commit {commit})"

    @property
    def plugins(self) -> tuple[str, ...]:
        """Return the plug-in modules of its run, for messages: code is not run because a file names it."""
        named = (self.trained_with or {}).get("plugins")
        modules = named if isinstance(named, list) else []
        return tuple(name for name in modules if isinstance(name, str) and re.fullmatch(MODULE_NAME, name))

    def trained_objective(self) -> Objective:
        """Return the training objective. ValueError: it comes from a plug-in that is not imported."""
        if self.objective not in objectives.names():
            raise ValueError(self._missing)
        diffusion = DiffusionRecipe(
            block_size=self.block_size, objective=self.objective, objective_options=self.objective_options
        )
        return objective_of(diffusion, self.vocabulary)

    def objective_kind(self) -> type[Objective]:
        """Return the class of the training objective, which says what the model may be converted to.

        For the objective of a plug-in that is not imported, return the base class, which allows what any model that
        fills masks may become. ValueError: models of that objective fill no masks.
        """
        if self.objective in objectives.names():
            objective: type[Objective] = objectives.get(self.objective)
            return objective
        if not self.fills_masks:
            raise ValueError(self._missing)
        return Objective

    @property
    def _missing(self) -> str:
        named = " ".join(f"--plugin {module}" for module in self.plugins or ("MODULE",))
        return (
            f"the model was trained for the objective {self.objective!r}, which comes from a plug-in that is not "
            f"imported: name its module, as in `bd3-scale {named} …`"
        )

    def trained_data(self) -> DataRecipe | None:
        """Return the data section of its recipe; None for an import, or if this version cannot read the section."""
        return self._trained("data", DataRecipe)

    def trained_parallel(self) -> ParallelRecipe | None:
        """Return how ranks split the model in training; None as in `trained_data`."""
        return self._trained("parallel", ParallelRecipe)

    def _trained(self, name: str, kind: type[S]) -> S | None:
        """Return a section of the run's recipe, without the options that this version does not know."""
        section = (self.trained_with or {}).get(name)
        if not isinstance(section, dict):
            return None
        try:
            return kind.model_validate({key: section[key] for key in section if key in kind.model_fields})
        except ValidationError:
            return None

    @property
    def weights_state(self) -> str:
        """Return the state that is the model's weights outside training: the average where kept, else the masters."""
        return weights_state(self.states)


class CheckpointDamagedError(ValueError):
    """Says that a checkpoint's files differ from what was written."""


@reader("a checkpoint", path="folder")
def read_manifest(folder: Path) -> CheckpointManifest:
    """Return the manifest of a complete checkpoint.

    Raises:
        CheckpointDamagedError: the folder is half written, a file is missing or truncated, or the manifest was changed.
        ValueError: another version wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointDamagedError(
            f"{folder} is no complete checkpoint: it has no {MANIFEST}, which is written last; "
            "give a folder like RUN/checkpoints/step-00000100, or remove a half-written one"
        )
    text = read_regular(path).decode(errors="replace")
    _check_seal(path, text)
    try:
        manifest = CheckpointManifest.model_validate(up_to_date(json.loads(text)))
    except ValidationError as error:
        raise ValueError(f"{path} cannot be read by this version: {_problem(error)}") from error
    for name, record in manifest.files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != record.bytes:
            state = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointDamagedError(
                f"checkpoint {folder} is damaged: {name} {state}, {record.bytes} were written; use an earlier "
                "checkpoint"
            )
    return manifest


def _problem(error: ValidationError) -> str:
    unknown = [detail["loc"] for detail in error.errors() if detail["type"] == "extra_forbidden"]
    if unknown:
        key = ".".join(map(str, unknown[0]))
        return f"it has the key {key}, which a newer version wrote; use that version, or an earlier checkpoint"
    return in_one_line(error)


def _check_seal(path: Path, text: str) -> None:
    """Check the manifest's own checksum before anything in its text is interpreted."""
    sealed = _SEALED.search(text)
    damaged = CheckpointDamagedError(f"{path} is damaged: it is not what was written; use an earlier checkpoint")
    if sealed and _digest(text[: sealed.start(1)] + text[sealed.end(1) :]) != sealed[1]:
        raise damaged
    if (written := re.search(r'"format":\s*(\d{1,9})', text)) and not OLDEST <= int(written[1]) <= FORMAT:
        raise ValueError(
            f"{path} has format {written[1]}; this version reads formats {OLDEST} to {FORMAT}: use the version that "
            "wrote it"
        )
    if not sealed:
        raise damaged


def damaged_files(folder: Path, manifest: CheckpointManifest, share: slice = slice(None)) -> list[str]:
    """Return the files of a checkpoint, all or a `share` of them, whose hash differs from the written one."""
    files = list(manifest.files.items())[share]
    return [name for name, record in files if file_hash(folder / name) != record.xxh3]


def write_manifest(folder: Path, manifest: CheckpointManifest, written: Mapping[str, FileRecord]) -> None:
    """Write the manifest of a folder whose other files are complete.

    written: size and hash of files as their writers know them. The writers may be processes on other nodes, and a
    shared file system may show this process an older state, so these records count, and not what this process would
    read.
    """
    files_here = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    other = {name: file_record(path) for name, path in files_here.items() if name not in written}
    files = dict(sorted({**other, **written}.items()))
    whole = manifest.model_copy(update={"written_by": software(), "files": files, "checksum": ""})
    text = whole.model_dump_json(indent=2)
    sealed = text.replace(_seal(""), _seal(_digest(text)))
    assert sealed != text
    (folder / MANIFEST).write_text(sealed)


def _seal(checksum: str) -> str:
    return f'"checksum": "{checksum}"'


def _digest(text: str) -> str:
    return xxhash.xxh3_128(text.encode()).hexdigest()
