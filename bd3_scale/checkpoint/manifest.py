"""What a checkpoint says about itself; written last, so that a folder with a sound manifest is complete."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from bd3_scale.recipe.schema import ImportedRecipe, Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.resilience.files import file_hash
from bd3_scale.resilience.readers import in_one_line, read_regular, reader

MANIFEST = "manifest.json"
FORMAT: Literal[3] = 3
TOKENIZER = "tokenizer"
# Files of the checkpoint that this one was imported from, for an export to the same format.
IMPORTED = "imported"


# A path within the checkpoint: none of its parts begins with a dot.
_INSIDE = r"^[^./\\][^/\\]*(/[^./\\][^/\\]*)*$"


# Of pydantic's places, which of the two recipes is meant.
_RUN, _IMPORTED = "<run>", "<imported>"
_SEALED = re.compile(r'"checksum": "([0-9a-f]{32})"\s*\}\s*\Z')


class FileRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    xxh3: str


def file_record(path: Path) -> FileRecord:
    """Return the size and hash of a file as it is now; reads it."""
    return FileRecord(bytes=path.stat().st_size, xxh3=file_hash(path))


def _kind_of_recipe(recipe: Any) -> str:
    imported = "imported_from" in recipe if isinstance(recipe, Mapping) else isinstance(recipe, ImportedRecipe)
    return _IMPORTED if imported else _RUN


class CheckpointManifest(BaseModel):
    """Self-description of a checkpoint.

    Attributes:
        step: steps done, from which schedules, data position and noise follow.
        skipped: those of them whose gradients were not finite, and which left the optimiser as it was.
        recipe: of the run, or what is known of an imported model.
        data_hash: hash of the data manifest (tokeniser, sequences) that the position counts in; empty if imported.
        world_size: ranks that wrote it; any number may read it.
        states: tensors kept of every parameter, in fp32 but for imported masters, which stay as they came.
        attention_tiles: tiles of the attention kernels, which a bitwise resume needs; empty where none are used.
        intervals: the clipped interval of mask rates of every block size whose search has found one.
        ema_warms_up: the decay of the moving average rises from the first update on; absent in those of before, whose
            decay was constant.
        files: size in bytes and XXH3-128 of every other file.
        checksum: XXH3-128 of the manifest's own text, with this left empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[3] = FORMAT
    step: int
    skipped: int = 0
    recipe: Annotated[
        Annotated[Recipe, Tag(_RUN)] | Annotated[ImportedRecipe, Tag(_IMPORTED)], Discriminator(_kind_of_recipe)
    ]
    recipe_hash: str
    vocabulary: Vocabulary
    data_hash: str
    world_size: int
    states: tuple[str, ...]
    attention_tiles: dict[str, list[int]] = {}
    intervals: dict[int, tuple[float, float]] = {}
    ema_warms_up: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    files: dict[Annotated[str, Field(pattern=_INSIDE)], FileRecord] = {}
    checksum: str = ""

    @property
    def weights_state(self) -> str:
        """Whose values are the model's weights outside training: the moving average's where kept, else the masters'."""
        return "ema" if "ema" in self.states else "master"


class CheckpointDamagedError(ValueError):
    """A checkpoint is not what was written."""


@reader("a checkpoint", path="folder")
def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a complete checkpoint.

    Raises:
        CheckpointDamagedError: the folder was left half written, has lost or truncated a file, or another manifest.
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
        manifest = CheckpointManifest.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{path} cannot be read by this version: {_problem(error)}") from error
    for name, record in manifest.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != record.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointDamagedError(
                f"checkpoint {folder} is damaged: {name} {state}, {record.bytes} were written; use an earlier "
                "checkpoint"
            )
    return manifest


def _problem(error: ValidationError) -> str:
    unknown = [detail["loc"] for detail in error.errors() if detail["type"] == "extra_forbidden"]
    if unknown:
        key = ".".join(str(part) for part in unknown[0] if part not in (_RUN, _IMPORTED))
        return f"it has the key {key}, which a newer version wrote; use that version, or an earlier checkpoint"
    return re.sub(rf"^recipe\.({_RUN}|{_IMPORTED})", "recipe", in_one_line(error))


def _check_seal(path: Path, text: str) -> None:
    """Check that the text is what was written, whatever it means."""
    sealed = _SEALED.search(text)
    damaged = CheckpointDamagedError(f"{path} is damaged: it is not what was written; use an earlier checkpoint")
    if sealed and _digest(text[: sealed.start(1)] + text[sealed.end(1) :]) != sealed[1]:
        raise damaged
    if (written := re.search(r'"format":\s*(\d{1,9})', text)) and int(written[1]) != FORMAT:
        raise ValueError(
            f"{path} is of format {written[1]}, and format {FORMAT} is read here: use the version that wrote it"
        )
    if not sealed:
        raise damaged


def damaged_files(folder: Path, manifest: CheckpointManifest, share: slice = slice(None)) -> list[str]:
    """Files of a checkpoint, all or a `share` of them, whose bytes are not those that were written; reads them."""
    files = list(manifest.files.items())[share]
    return [name for name, record in files if file_hash(folder / name) != record.xxh3]


def write_manifest(folder: Path, manifest: CheckpointManifest, written: Mapping[str, FileRecord]) -> None:
    """Complete a folder whose other files are there.

    written: what is known of them from those who wrote them, who may be other processes on other nodes: it counts, and
    not what this process sees.
    """
    seen = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    mine = {name: file_record(path) for name, path in seen.items() if name not in written}
    files = dict(sorted({**mine, **written}.items()))
    text = manifest.model_copy(update={"files": files, "checksum": ""}).model_dump_json(indent=2)
    sealed = text.replace(_seal(""), _seal(_digest(text)))
    assert sealed != text
    (folder / MANIFEST).write_text(sealed)


def _seal(checksum: str) -> str:
    return f'"checksum": "{checksum}"'


def _digest(text: str) -> str:
    return xxhash.xxh3_128(text.encode()).hexdigest()
