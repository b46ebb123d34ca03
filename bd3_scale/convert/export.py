"""Export a checkpoint of any topology to a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from bd3_scale.checkpoint.manifest import IMPORTED, TOKENIZER, CheckpointManifest, damaged_files, read_manifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.sizes import check_sizes
from bd3_scale.checkpoint.source_ids import source_ids
from bd3_scale.checkpoint.tensors import TensorReader, same_bytes
from bd3_scale.convert.architectures import (
    EXPORT_FORMATS,
    Format,
    config_json,
    export_obstacles,
)
from bd3_scale.convert.check_export import check_export, expected_logits, round_weights
from bd3_scale.convert.export_files import renumber_mask, write_companions, write_shards
from bd3_scale.convert.folder import open_weights
from bd3_scale.convert.importer import MASK_ROWS
from bd3_scale.convert.names import HEAD, NATIVE_EMBEDDING, NamedTensor, named_tensors
from bd3_scale.convert.padding import Padding, with_padding
from bd3_scale.convert.serving import ENGINE_MASK_IDS
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.generate.text import checkpoint_tokenizer
from bd3_scale.recipe.vocabulary import MOST_IDS, Vocabulary
from bd3_scale.resilience.files import check_writable, new_folder
from bd3_scale.resilience.foreign import CONFIG, file_in, object_in, safe_settings
from bd3_scale.resilience.readers import reader

Progress = Callable[[int, int], object]
Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class ExportPlan:
    """The plan of an export: what it will write.

    dtype: every tensor is cast to it; None: each keeps its dtype. padding: see `with_padding`; None: the mean.
    """

    checkpoint: Path
    manifest: CheckpointManifest
    kind: Format
    dtype: torch.dtype | None
    stored: Mapping[str, torch.dtype]
    config: dict[str, Any]
    tensors: tuple[NamedTensor, ...]
    padding: Padding | None = None

    def tokenizer(self) -> Tokenizer | None:
        """Return the training's tokeniser, with its BOS, or None if there is none."""
        return checkpoint_tokenizer(self.checkpoint, self.manifest) if (self.checkpoint / TOKENIZER).is_dir() else None

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Return the bytes of each tensor."""
        return {tensor.name: tensor.numel * self._dtype_of(tensor).itemsize for tensor in self.tensors}

    def _dtype_of(self, tensor: NamedTensor) -> torch.dtype:
        # An expert's bias keeps its fp32: one training step changes it by less than the spacing of bfloat16.
        stored = self.stored[self._stored_name(tensor)]
        return stored if self.dtype is None or tensor.key.endswith(".expert_bias") else self.dtype

    def _stored_name(self, tensor: NamedTensor) -> str:
        return f"{self.manifest.weights_state}.{tensor.key}"

    def read(self, reader: TensorReader, tensor: NamedTensor) -> Tensor:
        """Return the values of a tensor as they will be written."""
        boxes = [reader.read(self._stored_name(tensor), *box) for box in tensor.boxes]
        values = tensor.join(boxes).to(self._dtype_of(tensor))
        if self.moves_mask and tensor.is_table:
            return self._with_mask_moved(tensor, values)
        mask_id = self.manifest.vocabulary.mask_id
        predicts = tensor.name == HEAD or (tensor.is_embedding and not self.is_block_diffusion)
        if not predicts or mask_id >= len(values):
            return values
        if not self.is_block_diffusion and tensor.name in (kept := rows_of_source(self.checkpoint)):
            values[mask_id] = kept[tensor.name].to(values.dtype)
        elif not self.is_block_diffusion or self.manifest.model.tie_embeddings:
            # Software that does not exclude the mask must not draw it: as the mean of the other rows its logit is never
            # the highest. With a tied head the row would otherwise be the mask's embedding.
            others = torch.arange(len(values)) != mask_id
            values[mask_id] = _mean(values[others])
        return values

    def _with_mask_moved(self, tensor: NamedTensor, values: Tensor) -> Tensor:
        """Return a table in which the mask's row, the last of `values`, has moved to another id."""
        size = len(values) - 1
        moved = values.new_zeros(tensor.shape)
        moved[:size] = values[:size]
        if tensor.is_embedding:
            moved[self.mask_id] = values[size]
        else:
            # These rows must never have the highest logit, for engines that do not exclude unused ids.
            row = None if self.padding is None else self.padding.row
            moved[size:] = _mean(values[:size]) if row is None else row
        return moved

    @property
    def is_block_diffusion(self) -> bool:
        """Return whether the format is one of block diffusion."""
        return EXPORT_FORMATS[self.kind].is_block_diffusion

    @property
    def mask_id(self) -> int:
        """Return the id of the mask in the export."""
        return int(self.config.get("mask_token_id", self.manifest.vocabulary.mask_id))

    @property
    def padding_bytes(self) -> int:
        """Return the bytes of unused rows, if the mask moves to another id."""
        rows = int(self.config["vocab_size"])
        tables = [self.sizes[t.name] // rows for t in self.tensors if self.moves_mask and t.is_table]
        return (rows - self.manifest.vocabulary.size) * sum(tables)

    @property
    def moves_mask(self) -> bool:
        """Return whether the mask has another id in the export than in training."""
        return self.mask_id != self.manifest.vocabulary.mask_id


def _mean(rows: Tensor) -> Tensor:
    return rows.float().mean(0).to(rows.dtype)


@reader("the rows that a mask took", path="checkpoint")
def rows_of_source(checkpoint: Path) -> dict[str, Tensor]:
    """Return the source's rows that an import replaced by a new mask; empty for other checkpoints."""
    path = file_in(checkpoint / IMPORTED, MASK_ROWS)
    return {} if path is None else load_file(path)


def choose_format(manifest: CheckpointManifest, kind: Format | None) -> Format:
    """Return `kind`, or the first format that the model can be exported to. ValueError: there is none, and why."""
    obstacles = export_obstacles(manifest.model, manifest.objective_kind())
    possible = [name for name, obstacle in obstacles.items() if obstacle is None]
    if kind is None and not possible:
        reasons = "; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items())
        raise ValueError(f"no format can hold this model: {reasons}")
    if kind is not None and obstacles[kind] is not None:
        others = f"; it can become {' or '.join(possible)}" if possible else ""
        raise ValueError(f"this model cannot become {EXPORT_FORMATS[kind].architecture}: {obstacles[kind]}{others}")
    return kind or possible[0]


@reader("a checkpoint", path="checkpoint")
def plan_export(
    checkpoint: Path, kind: Format | None = None, dtype: Dtype | None = None, mask_id: int | None = None
) -> ExportPlan:
    """Check a checkpoint and decide what its export holds.

    Args:
        kind: format; default: the first that the model can be exported to.
        dtype: default: the precision of its training; an import keeps its dtypes.
        mask_id: id of the mask in the export, behind a vocabulary that is padded up to it; default: the training's.

    Raises:
        ValueError: a damaged checkpoint, a format that cannot hold the model, or an invalid `mask_id`.
    """
    manifest = read_manifest(checkpoint)
    check_sizes(checkpoint, manifest)
    kind = choose_format(manifest, kind)
    vocabulary = manifest.vocabulary
    with TensorReader(checkpoint) as reader:
        stored = reader.dtypes
    target = getattr(torch, dtype) if dtype else _default_dtype(manifest)
    block_diffusion = EXPORT_FORMATS[kind].is_block_diffusion
    if block_diffusion:
        rows = max(vocabulary.size, vocabulary.rows)
    else:
        # An imported model keeps its rows; others lose the mask's row if it is the last.
        rows = vocabulary.rows or vocabulary.size - (vocabulary.mask_id == vocabulary.size - 1)
    config = config_json(
        kind,
        manifest.model,
        block_size=manifest.block_size,
        vocab_rows=rows,
        special_ids=_special_ids(checkpoint, vocabulary, block_diffusion),
        mask_id=vocabulary.mask_id,
        max_position_embeddings=manifest.max_position_embeddings,
        dtype=str(target or stored[f"{manifest.weights_state}.{NATIVE_EMBEDDING}"]).removeprefix("torch."),
    )
    if block_diffusion and rows > vocabulary.size:
        config["num_token_ids"] = vocabulary.size
    tensors = named_tensors(
        manifest.model,
        vocab_rows=rows,
        padded_rows=vocabulary.padded_size,
        tied=config["tie_word_embeddings"],
        style=EXPORT_FORMATS[kind].style,
    )
    original = object_in(checkpoint / IMPORTED, CONFIG)
    if original.get("architectures") == config["architectures"]:
        # The source's config.json may have further keys that engines of that format read.
        ours = ("torch_dtype", "block_size", "vocab_size", "tie_word_embeddings")
        config |= safe_settings(original) | {key: config[key] for key in ours if key in config}
    plan = ExportPlan(checkpoint, manifest, kind, target, stored, config, tuple(tensors))
    return plan if mask_id in (None, vocabulary.mask_id) else _with_mask_at(plan, mask_id)


def _with_mask_at(plan: ExportPlan, mask_id: int) -> ExportPlan:
    """Return a plan whose mask has the id `mask_id`, with rows of embedding and head up to it; see `read`."""
    vocabulary = plan.manifest.vocabulary
    _check_mask_id(plan.kind, vocabulary, mask_id)
    config = plan.config | renumber_mask(plan.config, vocabulary.mask_id, mask_id)
    rows = max(config["vocab_size"], mask_id + 1)
    config |= {"vocab_size": rows, "num_token_ids": vocabulary.size - 1}

    def moved(tensor: NamedTensor) -> NamedTensor:
        hidden = tensor.shape[1:]
        return replace(tensor, shape=(rows, *hidden), boxes=(((0, 0), (vocabulary.size, *hidden)),))

    tensors = tuple(moved(t) if t.is_table else t for t in plan.tensors)
    return replace(plan, config=config, tensors=tensors)


def _check_mask_id(kind: Format, vocabulary: Vocabulary, mask_id: int) -> None:
    """Raise ValueError if the mask cannot have another id, or not this one."""
    if kind not in ENGINE_MASK_IDS:
        served = ", ".join(EXPORT_FORMATS[name].architecture for name in ENGINE_MASK_IDS)
        raise ValueError(
            f"mask_id={mask_id} is for {served}, whose engines expect a certain id of the mask, and this is "
            f"an export to {EXPORT_FORMATS[kind].architecture}: leave it out"
        )
    if vocabulary.mask_id != vocabulary.size - 1:
        raise ValueError(
            f"mask_id={mask_id} would move the mask from {vocabulary.mask_id}, which lies among the "
            f"{vocabulary.size} ids of the vocabulary; only a mask behind all tokens can move: leave it out"
        )
    if not vocabulary.size <= mask_id < MOST_IDS:
        raise ValueError(
            f"mask_id={mask_id} must be at least {vocabulary.size}, the size of the vocabulary, and below {MOST_IDS}: "
            f"engines expect {ENGINE_MASK_IDS[kind]}"
        )


def _special_ids(checkpoint: Path, vocabulary: Vocabulary, block_diffusion: bool) -> dict[str, Any]:
    """Return the ids of BOS, EOS and padding, from the source's config.json, else those of training."""
    trained = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id, "pad_token_id": vocabulary.eos_id}
    ids = trained | source_ids(checkpoint).config
    # Engines of block diffusion models need a padding id (LMDeploy reads it without a default).
    required = ("eos_token_id", "pad_token_id") if block_diffusion else ("eos_token_id",)
    return ids | {key: trained[key] for key in required if ids[key] is None}


def run_export(
    plan: ExportPlan, out: Path, progress: Progress = lambda done, total: None, *, check: bool = True
) -> Padding | None:
    """Write the folder `out`; it is read again and every value compared before it appears.

    Returns the padding of a moved mask, if any.

    check: also load it with transformers in a fresh process, see `check_export`. That takes seconds, and memory for
    the model.

    Raises:
        FileExistsError: `out` exists; OSError: it cannot be written; ValueError: what was written differs.
    """
    check_undamaged(plan)
    check_writable(out.parent, plan.num_bytes)
    plan = with_padding(plan)
    sizes = plan.sizes
    total = 2 * plan.num_bytes
    with new_folder(out) as folder, TensorReader(plan.checkpoint) as reader:
        tensors = ((t.name, plan.read(reader, t)) for t in plan.tensors)
        write_shards(folder, tensors, sizes, lambda done: progress(done, total))
        write_companions(folder, plan)
        written = open_weights(folder)
        done = plan.num_bytes
        for tensor in plan.tensors:
            if not same_bytes(written.read(tensor.name), plan.read(reader, tensor)):
                raise ValueError(f"{tensor.name} reads back differently than it was written: check the disk")
            done += sizes[tensor.name]
            progress(done, total)
        if check:
            _check(plan, folder)
    return plan.padding


def _check(plan: ExportPlan, folder: Path) -> None:
    """Raise ValueError if transformers computes other logits with the folder."""
    # With experts it is compared in float32: in bfloat16 rounding may choose another expert, and logits differ by much.
    rounds = plan.config["torch_dtype"] == "bfloat16" and plan.manifest.model.moe is None
    dtype = torch.bfloat16 if rounds else torch.float32
    ids, logits = _native_logits(plan, dtype)
    check_export(folder, plan.tokenizer(), plan.manifest.vocabulary, ids, logits, dtype)


def _native_logits(plan: ExportPlan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `expected_logits` with the weights as they are written; the model is freed before the check loads it."""
    manifest = plan.manifest
    with open_model(plan.checkpoint, dtype) as (model, _, _):
        round_weights(model, getattr(torch, plan.config["torch_dtype"]))
        block_size = manifest.block_size if plan.is_block_diffusion else 1
        return expected_logits(model, block_size, manifest.max_position_embeddings)


def check_undamaged(plan: ExportPlan) -> None:
    """Raise ValueError if a file of the checkpoint has another hash than was written."""
    if damaged := damaged_files(plan.checkpoint, plan.manifest):
        raise ValueError(f"checkpoint {plan.checkpoint} is damaged: {', '.join(damaged)}; use an earlier one")


def _default_dtype(manifest: CheckpointManifest) -> torch.dtype | None:
    """Return the dtype of an export: the precision that a training computed in, though its masters are fp32; None for
    an import, which keeps its dtypes.
    """
    trained = manifest.trained_with is not None
    return torch.bfloat16 if trained and manifest.precision == "bf16" else None
