"""Describe a checkpoint from its manifest and the headers of its files, without loading weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_scale.checkpoint.folder import GGUF_ENDING, resolve_checkpoint
from bd3_scale.checkpoint.formats import up_to_date
from bd3_scale.checkpoint.manifest import MANIFEST, TOKENIZER, CheckpointManifest, damaged_files, read_manifest
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.convert.architectures import ARCHITECTURES, Format, export_obstacles, read_architecture
from bd3_scale.convert.folder import open_weights, read_config
from bd3_scale.convert.gguf_types import FILE_TYPES
from bd3_scale.convert.official import is_official, open_official
from bd3_scale.data.tokenizer import TOKENIZER_FILES, load_tokenizer
from bd3_scale.generate.llama_file import FILE_TYPE, check_seal
from bd3_scale.generate.llama_file import MANIFEST as GGUF_MANIFEST
from bd3_scale.objective import BlockDiffusion, objectives
from bd3_scale.recipe.plain_yaml import dump_yaml
from bd3_scale.recipe.schema import DiffusionRecipe, ModelRecipe
from bd3_scale.resilience.foreign import CONFIG, file_in
from bd3_scale.resilience.readers import reader

LONGEST = 80  # characters; longer values are shown by their size


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """The description of a checkpoint.

    Attributes:
        kind: `bd3_scale`, or the architecture of other software.
        parameters: number of the model's parameters, without optimiser states.
        bytes: of all tensors.
        health: what was checked, and the result.
        exports: why it cannot be exported to a format, None if it can.
        details: recipe, step, topology and tokeniser, if the format has them.
    """

    path: str
    kind: str
    parameters: int
    bytes: int
    health: str
    sound: bool
    exports: Mapping[Format, str | None]
    details: Mapping[str, object]
    tensors: tuple[TensorInfo, ...]


@reader("a checkpoint")
def inspect(path: Path, *, verify: bool = False) -> Inspection:
    """Describe a checkpoint or run directory, a Hugging Face folder, an exported GGUF file, or an official bd3lms file.

    Args:
        verify: read every file and compare its hash with the one in the manifest.

    Raises:
        ValueError, FileNotFoundError: it is none of these, or damaged in a part that is read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == GGUF_ENDING:
        return _inspect_gguf(path)
    if is_official(path):
        return _inspect_official(path)
    if file_in(path, CONFIG):
        return _inspect_huggingface(path)
    return _inspect_native(resolve_checkpoint(path), verify)


def _inspect_native(path: Path, verify: bool) -> Inspection:
    manifest = read_manifest(path)
    with TensorReader(path) as reader:
        tensors = _infos(reader.shapes, {n: str(d).removeprefix("torch.") for n, d in reader.dtypes.items()})
        size = sum(math.prod(s) * reader.dtypes[n].itemsize for n, s in reader.shapes.items())
    damaged = damaged_files(path, manifest) if verify else []
    if not verify:
        health = f"all {len(manifest.files)} files have the right size; --verify checks their hashes"
    else:
        health = f"damaged: {', '.join(damaged)}" if damaged else f"all {len(manifest.files)} files have the right hash"
    details: dict[str, object] = {"step": manifest.step}
    if manifest.trained_with is None:
        details["imported from"] = manifest.imported_from
    else:
        ranks = f"{manifest.world_size} rank{'s' * (manifest.world_size > 1)}"
        parallel, layout = manifest.trained_parallel(), "a layout that this version cannot read"
        if parallel is not None:
            layout = f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, context {parallel.context}, "
            layout += f"expert {parallel.expert}, " * (parallel.expert > 1) + f"ZeRO {parallel.zero_stage}"
        details["written by"] = f"{ranks} ({layout}); any number can read it"
    if manifest.written_by:
        details["software"] = ", ".join(f"{name} {version}" for name, version in manifest.written_by.items())
    details |= {
        "states": ", ".join(manifest.states),
        "precision": manifest.precision,
        "vocabulary": manifest.vocabulary.model_dump(),
        "tokeniser": _tokenizer(path / TOKENIZER),
    }
    details |= _model_details(manifest.model, manifest.objective, manifest.block_size)
    if manifest.trained_with is not None:
        details["recipe"] = dump_yaml(manifest.trained_with)
    exports: Mapping[Format, str | None] = {}
    try:
        exports = export_obstacles(manifest.model, manifest.objective_kind())
    except ValueError as error:
        details["exports"] = f"unknown: {error}"
    weights = [t for t in tensors if t.name.startswith(f"{manifest.weights_state}.")]
    return Inspection(
        path=str(path),
        kind=f"bd3_scale {MANIFEST} format {manifest.format}",
        parameters=sum(math.prod(t.shape) for t in weights),
        bytes=size,
        health=health,
        sound=not damaged,
        exports=exports,
        details=details,
        tensors=tensors,
    )


def _inspect_huggingface(path: Path) -> Inspection:
    config = read_config(path)
    quantised = bool(config.get("quantization_config"))
    weights = open_weights(path, quantised=quantised)
    name = (config.get("architectures") or ["?"])[0]
    details: dict[str, object] = {"tokeniser": _tokenizer(path)}
    exports: Mapping[Format, str | None] = {}
    if quantised:
        details["quantised"] = config["quantization_config"].get("format", "yes")
    if name in ARCHITECTURES and not quantised:
        try:
            architecture = read_architecture(config)
        except ValueError as error:
            details["import"] = f"no: {error}"
        else:
            diffusion = architecture.diffusion
            details |= _model_details(architecture.model, diffusion.objective, diffusion.block_size)
            exports = export_obstacles(architecture.model, objectives.get(diffusion.objective))
    return Inspection(
        path=str(path),
        kind=name if name in ARCHITECTURES else f"{name}, which cannot be imported; {', '.join(ARCHITECTURES)} can",
        parameters=sum(math.prod(shape) for shape in weights.shapes.values()),
        bytes=sum(math.prod(s) * weights.dtypes[n].itemsize for n, s in weights.shapes.items()),
        health="all files open; the format keeps no hashes",
        sound=True,
        exports=exports,
        details=details,
        tensors=_infos(weights.shapes, {n: str(d).removeprefix("torch.") for n, d in weights.dtypes.items()}),
    )


def _inspect_gguf(path: Path) -> Inspection:
    check_seal(path)
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"{path} is read with the package gguf: pip install 'bd3_scale[gguf]'") from error
    file = gguf.GGUFReader(path)
    keys = {name: _shown_value(field) for name, field in file.fields.items() if not name.startswith("GGUF.")}
    manifest = CheckpointManifest.model_validate(up_to_date(json.loads(file.fields[GGUF_MANIFEST].contents())))
    kind = next(name for name, (number, _) in FILE_TYPES.items() if number == keys[FILE_TYPE])
    return Inspection(
        path=str(path),
        kind=f"file for llama.cpp, architecture {keys['general.architecture']}, type {kind}",
        parameters=sum(int(tensor.n_elements) for tensor in file.tensors),
        bytes=sum(int(tensor.n_bytes) for tensor in file.tensors),
        health="the header has the right hash; the format has no hashes of tensors",
        sound=True,
        exports={},
        details={
            "step": manifest.step,
            **_model_details(manifest.model, manifest.objective, manifest.block_size),
            **keys,
        },
        # GGUF lists the axes in reverse order.
        tensors=tuple(
            TensorInfo(t.name, t.tensor_type.name, tuple(int(size) for size in reversed(t.shape))) for t in file.tensors
        ),
    )


def _shown_value(field: Any) -> object:
    """Return the value of a key, or the size of an array or a long text."""
    if len(field.types) > 1:
        return f"{len(field.data):,} values"
    value = field.contents()
    return f"{len(value):,} characters" if isinstance(value, str) and len(value) > LONGEST else value


def _inspect_official(path: Path) -> Inspection:
    official = open_official(path)
    diffusion = DiffusionRecipe(block_size=official.block_size or 1)
    weights = official.weights
    return Inspection(
        path=str(path),
        kind=f"official bd3lms DiT ({official.source})",
        parameters=sum(math.prod(shape) for shape in weights.shapes.values()),
        bytes=sum(math.prod(s) * weights.dtypes[n].itemsize for n, s in weights.shapes.items()),
        health="all files open; the format keeps no hashes",
        sound=True,
        exports=export_obstacles(official.model, BlockDiffusion),
        details=_model_details(official.model, diffusion.objective, official.block_size or "unknown"),
        tensors=_infos(weights.shapes, {n: str(d).removeprefix("torch.") for n, d in weights.dtypes.items()}),
    )


def _model_details(model: ModelRecipe, objective: str, block_size: int | str) -> dict[str, object]:
    return {
        "objective": objective,
        "block size": block_size,
        "model": model.model_dump(mode="json", exclude_none=True),
    }


def _tokenizer(folder: Path) -> str:
    try:
        if file_in(folder, TOKENIZER_FILES[0]) is None:
            return "none"
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        return f"unusable: {error}"
    return f"{tokenizer.vocabulary.size} ids with the mask, hash {tokenizer.hash[:12]}"


def _infos(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name, dtypes[name], tuple(shape)) for name, shape in shapes.items())
