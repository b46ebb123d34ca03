"""From a checkpoint of any topology to a Hugging Face folder, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bd3_scale.checkpoint.manifest import IMPORTED, TOKENIZER, CheckpointManifest, damaged_files, read_manifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.sizes import check_sizes
from bd3_scale.checkpoint.source_ids import GENERATION_CONFIG, KEYS, source_ids
from bd3_scale.checkpoint.tensors import TensorReader, same_bytes
from bd3_scale.convert.architectures import (
    EXPORT_FORMATS,
    Format,
    config_json,
    export_obstacles,
)
from bd3_scale.convert.check_export import check_export, expected_logits, round_weights
from bd3_scale.convert.folder import open_weights
from bd3_scale.convert.importer import MASK_ROWS
from bd3_scale.convert.names import HEAD, NATIVE_EMBEDDING, NamedTensor, named_tensors
from bd3_scale.convert.padding import Padding, with_padding
from bd3_scale.convert.remote_code_files import remote_code
from bd3_scale.convert.serving import ENGINE_MASK_IDS, SGLANG_CONFIG, Packing, model_card, sglang_config
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.data.tokenizer_folder import write_tokenizer
from bd3_scale.generate.text import checkpoint_tokenizer
from bd3_scale.recipe.vocabulary import MOST_IDS, Vocabulary
from bd3_scale.resilience.files import check_writable, new_folder
from bd3_scale.resilience.foreign import CONFIG, WEIGHTS, WEIGHTS_INDEX, file_in, object_in, safe_settings
from bd3_scale.resilience.readers import reader

Progress = Callable[[int, int], object]
Dtype = Literal["bfloat16", "float16", "float32"]
SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class ExportPlan:
    """All that an export will write. `dtype`: what every tensor is cast to; None: as each is stored. `padding`: see
    `with_padding`; None: the mean.
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
        """Return the training's tokeniser, which begins texts as that did, or None where there is none."""
        return checkpoint_tokenizer(self.checkpoint, self.manifest) if (self.checkpoint / TOKENIZER).is_dir() else None

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Return the bytes of every tensor that is written."""
        return {tensor.name: tensor.numel * self._dtype_of(tensor).itemsize for tensor in self.tensors}

    def _dtype_of(self, tensor: NamedTensor) -> torch.dtype:
        # A step moves an expert's bias by less than bfloat16 tells apart.
        stored = self.stored[self._stored_name(tensor)]
        return stored if self.dtype is None or tensor.key.endswith(".expert_bias") else self.dtype

    def _stored_name(self, tensor: NamedTensor) -> str:
        return f"{self.manifest.weights_state}.{tensor.key}"

    def read(self, reader: TensorReader, tensor: NamedTensor) -> Tensor:
        """Return the values of a tensor as they are written."""
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
            # Whoever draws the highest logit never meets the mask: its logit is the mean of the others. A tied row
            # would be its embedding.
            others = torch.arange(len(values)) != mask_id
            values[mask_id] = _mean(values[others])
        return values

    def _with_mask_moved(self, tensor: NamedTensor, values: Tensor) -> Tensor:
        """Return the rows of all ids, of rows of which the last is the mask's."""
        size = len(values) - 1
        moved = values.new_zeros(tensor.shape)
        moved[:size] = values[:size]
        if tensor.is_embedding:
            moved[self.mask_id] = values[size]
        else:
            # Never the highest logit of an engine that leaves no id out.
            row = None if self.padding is None else self.padding.row
            moved[size:] = _mean(values[:size]) if row is None else row
        return moved

    @property
    def is_block_diffusion(self) -> bool:
        return EXPORT_FORMATS[self.kind].is_block_diffusion

    @property
    def mask_id(self) -> int:
        """Return the id that the mask has in what is written."""
        return int(self.config.get("mask_token_id", self.manifest.vocabulary.mask_id))

    @property
    def padding_bytes(self) -> int:
        """Return the bytes of rows that no text has, of a mask with another id."""
        rows = int(self.config["vocab_size"])
        tables = [self.sizes[t.name] // rows for t in self.tensors if self.moves_mask and t.is_table]
        return (rows - self.manifest.vocabulary.size) * sum(tables)

    @property
    def moves_mask(self) -> bool:
        return self.mask_id != self.manifest.vocabulary.mask_id


def _mean(rows: Tensor) -> Tensor:
    return rows.float().mean(0).to(rows.dtype)


@reader("the rows that a mask took", path="checkpoint")
def rows_of_source(checkpoint: Path) -> dict[str, Tensor]:
    """Return the rows of the source that a new mask took, of an import; none of other checkpoints."""
    path = file_in(checkpoint / IMPORTED, MASK_ROWS)
    return {} if path is None else load_file(path)


def choose_format(manifest: CheckpointManifest, kind: Format | None) -> Format:
    """Return `kind` if the model can become it, else the first that it can. ValueError: it cannot, with the reason."""
    obstacles = export_obstacles(manifest.model, manifest.objective_kind())
    possible = [name for name, obstacle in obstacles.items() if obstacle is None]
    if kind is None and not possible:
        reasons = "; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items())
        raise ValueError(f"no format takes this model: {reasons}")
    if kind is not None and obstacles[kind] is not None:
        others = f"; it can become {' or '.join(possible)}" if possible else ""
        raise ValueError(f"this model cannot become {EXPORT_FORMATS[kind].architecture}: {obstacles[kind]}{others}")
    return kind or possible[0]


@reader("a checkpoint", path="checkpoint")
def plan_export(
    checkpoint: Path, kind: Format | None = None, dtype: Dtype | None = None, mask_id: int | None = None
) -> ExportPlan:
    """Check a checkpoint and decide what an export of it holds.

    Args:
        kind: format; default: the first that the model can become.
        dtype: default: the precision of its training, or of an import as it came.
        mask_id: of the mask in what is written, behind a vocabulary that is padded up to it; default: training's.

    Raises:
        ValueError: a damaged checkpoint, a format that the model cannot become, or a `mask_id` that it cannot have.
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
        # Of a source as it was; else without the mask's row, where that is the last.
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
        # What the engines of that format read beyond our own keys.
        ours = ("torch_dtype", "block_size", "vocab_size", "tie_word_embeddings")
        config |= safe_settings(original) | {key: config[key] for key in ours if key in config}
    plan = ExportPlan(checkpoint, manifest, kind, target, stored, config, tuple(tensors))
    return plan if mask_id in (None, vocabulary.mask_id) else _with_mask_at(plan, mask_id)


def _with_mask_at(plan: ExportPlan, mask_id: int) -> ExportPlan:
    """Return a plan whose mask has another id, and whose embedding and head have rows up to that; see `read`."""
    vocabulary = plan.manifest.vocabulary
    _check_mask_id(plan.kind, vocabulary, mask_id)
    config = plan.config | _mask_renumbered(plan.config, vocabulary.mask_id, mask_id)
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
            f"mask_id={mask_id} is for {served}, whose engines take an id of their own for the mask, and this is "
            f"an export to {EXPORT_FORMATS[kind].architecture}: leave it out"
        )
    if vocabulary.mask_id != vocabulary.size - 1:
        raise ValueError(
            f"mask_id={mask_id} would move the mask from {vocabulary.mask_id}, which lies among the "
            f"{vocabulary.size} ids of the vocabulary, and only one behind all tokens moves: leave it out"
        )
    if not vocabulary.size <= mask_id < MOST_IDS:
        raise ValueError(
            f"mask_id={mask_id} must lie behind the vocabulary of {vocabulary.size} ids, whose tokens have those "
            f"before, and below {MOST_IDS}: engines look for {ENGINE_MASK_IDS[kind]}"
        )


def _special_ids(checkpoint: Path, vocabulary: Vocabulary, block_diffusion: bool) -> dict[str, Any]:
    """Return the ids of beginning, end and padding, as the source's config.json has them, else those of training."""
    own = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id, "pad_token_id": vocabulary.eos_id}
    found = own | source_ids(checkpoint).config
    # Engines of block diffusion models need one for padding.
    must = ("eos_token_id", "pad_token_id") if block_diffusion else ("eos_token_id",)
    return found | {key: own[key] for key in must if found[key] is None}


def run_export(
    plan: ExportPlan, out: Path, progress: Progress = lambda done, total: None, *, check: bool = True
) -> Padding | None:
    """Write the folder `out`, read it again and compare every value before it appears; return what pads a head up to a
    moved mask.

    check: also load it with transformers in a fresh process, see `check_export`; it takes seconds, and the memory of
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
                raise ValueError(f"{tensor.name} was not written as it was read: is the disk sound?")
            done += sizes[tensor.name]
            progress(done, total)
        if check:
            _check(plan, folder)
    return plan.padding


def _check(plan: ExportPlan, folder: Path) -> None:
    """Raise ValueError if transformers makes something else of it."""
    # Where rounding chooses another expert, logits differ by more than it.
    rounds = plan.config["torch_dtype"] == "bfloat16" and plan.manifest.model.moe is None
    dtype = torch.bfloat16 if rounds else torch.float32
    ids, logits = _native_logits(plan, dtype)
    check_export(folder, plan.tokenizer(), plan.manifest.vocabulary, ids, logits, dtype)


def _native_logits(plan: ExportPlan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what `expected_logits` does, of the weights as they are written; the model is gone from memory then."""
    manifest = plan.manifest
    with open_model(plan.checkpoint, dtype) as (model, _, _):
        round_weights(model, getattr(torch, plan.config["torch_dtype"]))
        block_size = manifest.block_size if plan.is_block_diffusion else 1
        return expected_logits(model, block_size, manifest.max_position_embeddings)


def check_undamaged(plan: ExportPlan) -> None:
    """Raise ValueError if a file of the checkpoint is not what was written, by its hash."""
    if damaged := damaged_files(plan.checkpoint, plan.manifest):
        raise ValueError(f"checkpoint {plan.checkpoint} is damaged: {', '.join(damaged)}; use an earlier one")


def write_shards(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    sizes: Mapping[str, int],
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write tensors as model.safetensors, or as shards with an index; `sizes`: bytes of each, in their order."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    files = [WEIGHTS] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    done = 0
    for file, names in zip(files, shards, strict=True):
        shard = {}
        for name in names:
            given, tensor = next(tensors)
            assert given == name
            shard[name] = tensor.contiguous()
            done += sizes[name]
            progress(done)
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2))


def write_companions(
    folder: Path, plan: ExportPlan, extra_config: Mapping[str, Any] | None = None, packing: Packing | None = None
) -> None:
    """Write everything but the weights: configuration, tokeniser, code, model card and what engines need."""
    (folder / CONFIG).write_text(json.dumps(plan.config | dict(extra_config or {}), indent=2) + "\n")
    _write_generation_config(folder, plan)
    if (tokenizer := plan.tokenizer()) is not None:
        write_tokenizer(
            tokenizer,
            plan.checkpoint / TOKENIZER,
            folder,
            with_mask=plan.is_block_diffusion,
            mask_id=plan.mask_id,
            settings=_tokenizer_settings(plan, tokenizer),
        )
    if plan.is_block_diffusion:
        for name, source in remote_code(plan.kind).items():
            (folder / name).write_text(source, encoding="utf-8")
    if plan.kind in ENGINE_MASK_IDS:
        (folder / SGLANG_CONFIG).write_text(sglang_config(plan.config["block_size"]))
    card = model_card(plan.kind, plan.config, plan.manifest, packing, plan.padding.says if plan.padding else None)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _tokenizer_settings(plan: ExportPlan, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what `generate(**tokenizer(texts, padding=True, return_tensors="pt"))` needs."""
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    if not plan.is_block_diffusion:
        return inputs
    pad = plan.config["pad_token_id"]
    name = tokenizer.name_of(pad) if pad >= 0 else None
    return inputs | {"padding_side": "left"} | ({} if name is None else {"pad_token": name})


def _write_generation_config(folder: Path, plan: ExportPlan) -> None:
    """Write what the source's says, where there is one, else the special ids, and that tokens are drawn from the
    distribution that the model was trained for.
    """
    # transformers has top_k=50 where nothing is said, and other engines refuse the 0 that ends it there.
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": plan.config["vocab_size"], "top_p": 1.0}
    content = source_ids(plan.checkpoint).generation_config or {key: plan.config[key] for key in KEYS} | drawn
    content |= _mask_renumbered(content, plan.manifest.vocabulary.mask_id, plan.mask_id)
    (folder / GENERATION_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _mask_renumbered(content: Mapping[str, Any], mask_id: int, new_id: int) -> dict[str, int]:
    """Return what a configuration says of the mask, as of padding with it, with the mask's new id."""
    return {key: new_id for key, value in content.items() if key.endswith("_token_id") and value == mask_id}


def _default_dtype(manifest: CheckpointManifest) -> torch.dtype | None:
    """A training's masters are fp32, and its weights of the precision that it computed in; an import's stay as they
    came.
    """
    trained = manifest.trained_with is not None
    return torch.bfloat16 if trained and manifest.precision == "bf16" else None
