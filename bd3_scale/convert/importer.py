"""Import a checkpoint of other software, for any topology, one tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from bd3_scale.checkpoint.boxes import Box
from bd3_scale.checkpoint.folder import list_checkpoints, resolve_checkpoint
from bd3_scale.checkpoint.manifest import IMPORTED, MANIFEST, TOKENIZER, CheckpointManifest, write_manifest
from bd3_scale.checkpoint.source_ids import GENERATION_CONFIG, ids_of_model, keep_source_ids
from bd3_scale.checkpoint.tensors import TensorReader, TensorWriter, same_bytes
from bd3_scale.convert.architectures import ARCHITECTURES, read_architecture
from bd3_scale.convert.folder import Weights, check_sizes, open_weights, read_config
from bd3_scale.convert.import_vocabulary import as_official, vocabulary_of
from bd3_scale.convert.names import EMBEDDINGS, HEAD, NamedTensor, Style, named_tensors
from bd3_scale.convert.official import is_official, open_official
from bd3_scale.data.tokenizer import SENTENCEPIECE_FILE, TOKENIZER_FILES, Tokenizer
from bd3_scale.data.tokenizer_folder import write_tokenizer
from bd3_scale.objective import objectives
from bd3_scale.recipe.schema import DiffusionRecipe, ModelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.resilience.files import check_writable, new_folder
from bd3_scale.resilience.foreign import CONFIG, file_in, object_in, safe_settings
from bd3_scale.resilience.leftovers import temporary_folder
from bd3_scale.resilience.readers import reader

Progress = Callable[[int, int], object]
# Buffers in checkpoints that are no weights.
_NO_WEIGHTS = re.compile(r".*rotary_emb\.inv_freq")
_SOURCE_FILES = {".safetensors", ".bin", ".ckpt", ".pt", ".json"}
# The source's rows of embedding and head that a new mask replaced, for an export to the source's architecture.
MASK_ROWS = "mask_rows.safetensors"
GPT2_EOS, GPT2_SIZE = 50256, 50257


@dataclass(frozen=True)
class ImportPlan:
    """The plan of an import, made from the headers of the files alone.

    Attributes:
        vocab_rows: rows of the source's embedding.
        new_mask: the mask token is new, so its embedding is created here.
    """

    source: Path
    architecture: str
    model: ModelRecipe
    diffusion: DiffusionRecipe
    max_position_embeddings: int
    vocab_rows: int
    vocabulary: Vocabulary
    tokenizer: Tokenizer | None
    tokenizer_source: str | None
    new_mask: bool
    weights: Weights

    @property
    def tensors(self) -> list[NamedTensor]:
        """Return the tensors that are written; a head tied to the embedding is not."""
        return list(
            named_tensors(
                self.model,
                vocab_rows=self.vocab_rows,
                padded_rows=self.vocabulary.padded_size,
                tied=self.model.tie_embeddings,
                style=self.style,
            )
        )

    @property
    def style(self) -> Style:
        """Return the naming style of the source's tensors; those of the official code were renamed to Qwen3's."""
        return ARCHITECTURES[self.architecture].style if self.architecture in ARCHITECTURES else "qwen3"

    @property
    def embedding(self) -> str:
        """Return the name of the embedding in the source."""
        return EMBEDDINGS[self.style]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors that are written."""
        return sum(tensor.numel * self.weights.dtypes[tensor.name].itemsize for tensor in self.tensors)

    @property
    def fingerprint(self) -> str:
        """Return an identifier of the weights: a hash of names, sizes and times of the source's files."""
        source = self.source.resolve()
        files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.suffix in _SOURCE_FILES)
        entries = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return xxhash.xxh3_128_hexdigest(json.dumps([str(source), entries]))

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """Return the precision of the source's weights."""
        return "bf16" if self.weights.dtypes[self.embedding] == torch.bfloat16 else "fp32"


@reader("a model", path="source")
def plan_import(
    source: Path,
    *,
    tokenizer: str | None = None,
    mask_token: str | None = None,
    block_size: int | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    bos: bool | None = None,
    unpack: bool = False,
) -> ImportPlan:
    """Read and check everything but the weights themselves.

    Args:
        source: a Hugging Face folder, or a file or folder of the official bd3lms code.
        tokenizer: replaces the one in `source`.
        mask_token: an unused token of the tokeniser that becomes the mask, or the name of a new token; a next-token
            model needs a mask for its adaptation.
        block_size: if the source does not say it.
        mask_id: for a block diffusion model whose config.json does not say it.
        eos_id: end of document, if there is no tokeniser.
        bos: whether texts begin with BOS; default: as in the tokeniser's template.
        unpack: unpack the weights of a quantised folder, to run it; else such a folder is refused.

    Raises:
        ValueError, FileNotFoundError: an unsupported architecture, damaged files, missing or extra tensors, or a
            tokeniser that does not fit.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    if source.is_file() and "architectures" in object_in(source.parent, CONFIG):
        raise ValueError(f"{source} is a part of a Hugging Face folder: give the folder, {source.parent}")
    tokenizer = _tokenizer_source(source, tokenizer)
    if tokenizer is not None and eos_id is not None:
        raise ValueError(f"eos_id={eos_id} is for models without a tokeniser, and {tokenizer} has one: leave it out")
    if is_official(source):
        if mask_id is not None:
            raise ValueError(
                f"mask_id={mask_id} is for Hugging Face folders; the mask of {source} is known: leave it out"
            )
        official = open_official(source)
        size = block_size or official.block_size
        if size is None:
            raise ValueError(f"{source} does not say its block size: give it with --block-size")
        if eos_id is None and official.vocab_size == GPT2_SIZE + 1:
            eos_id = GPT2_EOS
        vocabulary, loaded = vocabulary_of(
            tokenizer, mask_token, official.vocab_size, eos_id, official.mask_id, bos=bos
        )
        if official.begins_with_bos and bos is None:
            vocabulary, loaded = as_official(vocabulary, loaded)
        plan = ImportPlan(
            source, f"bd3lms DiT ({official.source})", official.model, DiffusionRecipe(block_size=size),
            official.max_position_embeddings, official.vocab_size, vocabulary, loaded, tokenizer, False,
            official.weights,
        )  # fmt: skip
    else:
        config = read_config(source)
        packing = config.pop("quantization_config", None) if unpack else None
        architecture = read_architecture(config, block_size, mask_id)
        weights = open_weights(source, quantised=packing is not None, experts_apart=True)
        if packing is not None:
            from bd3_scale.convert.compressed import unpacked_weights

            weights = unpacked_weights(weights, packing)
        check_sizes(str(source), architecture.model, weights.shapes)
        eos_id = architecture.eos_id if eos_id is None else eos_id
        rows, mask_id = architecture.vocab_rows, architecture.mask_id
        vocabulary, loaded = vocabulary_of(
            tokenizer, mask_token, rows, eos_id, mask_id, architecture.num_token_ids, bos=bos
        )
        plan = ImportPlan(
            source, architecture.name, architecture.model, architecture.diffusion,
            architecture.max_position_embeddings, rows, vocabulary, loaded, tokenizer, mask_id is None, weights,
        )  # fmt: skip
    _check_tensors(plan)
    return plan


def run_import(plan: ImportPlan, out: Path, progress: Progress = lambda done, total: None) -> None:
    """Write the checkpoint `out`; it is read again and every value compared before it appears.

    Raises:
        FileExistsError: `out` exists; OSError: it cannot be written; ValueError: the head of a model with tied weights
            differs from the embedding, or a tensor reads back differently.
    """
    check_writable(out.parent, plan.num_bytes)
    with new_folder(out) as folder:
        _check_tied_head(plan)
        writer = TensorWriter(folder)
        total, done = 2 * plan.num_bytes, 0
        for tensor in plan.tensors:
            for box in _native_boxes(plan, tensor):
                writer.add(box)
            done += tensor.numel * plan.weights.dtypes[tensor.name].itemsize
            progress(done, total)
        writer.finish()
        if plan.tokenizer is not None:
            assert plan.tokenizer_source is not None
            tokenizer_path = Path(plan.tokenizer_source)
            write_tokenizer(
                plan.tokenizer, tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent, folder / TOKENIZER
            )
            keep_source_ids(ids_of_model(plan.source), folder / TOKENIZER)
        _keep_source_files(plan, folder / IMPORTED)
        write_manifest(folder, _manifest(plan), writer.written)
        with TensorReader(folder) as reader:
            for tensor in plan.tensors:
                for box in _native_boxes(plan, tensor):
                    written = reader.read(box.key, box.offset, tuple(box.data.shape))
                    if not same_bytes(written, box.data):
                        raise ValueError(f"{box.key} reads back differently than it was written: check the disk")
                done += tensor.numel * plan.weights.dtypes[tensor.name].itemsize
                progress(done, total)


@contextmanager
def open_checkpoint(source: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield a checkpoint of `source`, and the folder of its chat template if it is a model of other software.

    source: a run directory, a checkpoint, or a folder or file of other software, which is imported into a temporary
    checkpoint.
    FileNotFoundError, ValueError: there is no model, or `plan_import` refuses it.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a run directory, a checkpoint or a Hugging Face folder")
    if (source / MANIFEST).is_file() or list_checkpoints(source / "checkpoints"):
        yield resolve_checkpoint(source), None
        return
    if not (is_official(source) or (source / CONFIG).is_file()):
        raise ValueError(
            f"{source} holds no model: it is neither a checkpoint ({MANIFEST}), nor a run directory with one in "
            f"checkpoints/, nor a Hugging Face folder ({CONFIG})"
        )
    with temporary_folder("import") as folder:
        plan = plan_import(source, unpack=True)
        run_import(plan, folder / "checkpoint")
        yield folder / "checkpoint", Path(plan.tokenizer_source) if plan.tokenizer_source else source


def _manifest(plan: ImportPlan) -> CheckpointManifest:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.source.resolve().name).lstrip("._-") or "imported"
    return CheckpointManifest(
        step=0,
        name=name,
        imported_from="".join(c if c.isprintable() else " " for c in f"{plan.architecture}, {plan.source.name}"),
        source_fingerprint=plan.fingerprint,
        model=plan.model,
        vocabulary=plan.vocabulary,
        precision=plan.precision,
        max_position_embeddings=plan.max_position_embeddings,
        objective=plan.diffusion.objective,
        fills_masks=objectives.get(plan.diffusion.objective).fills_masks,
        block_size=plan.diffusion.block_size,
        states=("master",),
    )


def _tokenizer_source(source: Path, tokenizer: str | None) -> str | None:
    if tokenizer is not None:
        return tokenizer
    folder = source if source.is_dir() else source.parent
    names = (TOKENIZER_FILES[0], SENTENCEPIECE_FILE)
    return str(folder) if any(file_in(folder, name) for name in names) else None


def _check_tensors(plan: ImportPlan) -> None:
    """Raise ValueError unless the source has exactly the model's tensors, in their shapes."""
    expected = {tensor.name: tensor.shape for tensor in plan.tensors}
    shapes = dict(plan.weights.shapes)
    if plan.model.tie_embeddings and shapes.get(HEAD) == expected[plan.embedding]:
        del shapes[HEAD]
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected and not _NO_WEIGHTS.fullmatch(name)]
    differ = [f"{n} {shapes[n]}, not {s}" for n, s in expected.items() if n in shapes and shapes[n] != s]
    problems = [
        f"{kind}: {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}"
        for kind, names in (("missing", missing), ("not part of the model", extra), ("of another shape", differ))
        if names
    ]
    if problems:
        raise ValueError(
            f"{plan.source} does not hold the tensors of {plan.architecture}:\n  - "
            + "\n  - ".join(problems)
            + "\ncheck that config.json belongs to these weights"
        )


def _check_tied_head(plan: ImportPlan) -> None:
    if plan.model.tie_embeddings and HEAD in plan.weights.shapes:
        head, embedding = plan.weights.read(HEAD), plan.weights.read(plan.embedding)
        # Exports for engines write another row at the mask's id in the head, which is never predicted.
        differs = (head != embedding).any(1)
        differs[plan.vocabulary.mask_id : plan.vocabulary.mask_id + 1] = False
        if differs.any():
            raise ValueError(
                f"config.json of {plan.source} ties the head to the embedding, and {HEAD} differs from "
                f"{plan.embedding}: set tie_word_embeddings and trained_with_tied_embeddings to false there"
            )


def _native_boxes(plan: ImportPlan, tensor: NamedTensor) -> Iterator[Box]:
    values = plan.weights.read(tensor.name)
    mask_id = plan.vocabulary.mask_id
    per_row = tensor.is_table or tensor.name == "lm_head.bias"
    if tensor.is_embedding and plan.new_mask and mask_id < plan.vocab_rows:
        values = values.clone()
        values[mask_id] = _mask_embedding(plan, values)
    elif tensor.name == HEAD and plan.new_mask and mask_id < plan.vocab_rows:
        # The mask is never predicted here; software that does not exclude it gets a logit of zero.
        values = values.clone()
        values[mask_id] = 0
    for offset, data in tensor.split(values):
        yield Box(f"master.{tensor.key}", data, offset, tensor.full_shape)
    if per_row and plan.vocab_rows < plan.vocabulary.padded_size:
        rest = values.new_zeros(plan.vocabulary.padded_size - plan.vocab_rows, *tensor.shape[1:])
        if tensor.is_embedding and plan.new_mask and mask_id >= plan.vocab_rows:
            rest[mask_id - plan.vocab_rows] = _mask_embedding(plan, values)
        offset = (plan.vocab_rows, *(0,) * (len(tensor.shape) - 1))
        yield Box(f"master.{tensor.key}", rest, offset, tensor.full_shape)


def _mask_embedding(plan: ImportPlan, embedding: Tensor) -> Tensor:
    """Return a random embedding with the mean and, in every channel, the standard deviation of the others."""
    known = embedding[: min(plan.vocab_rows, plan.vocabulary.size)]
    known = torch.cat([known[: plan.vocabulary.mask_id], known[plan.vocabulary.mask_id + 1 :]]).float()
    noise = torch.randn(known.shape[1], generator=torch.Generator().manual_seed(0))
    return (known.mean(0) + known.std(0) * noise).to(embedding.dtype)


def _keep_source_files(plan: ImportPlan, folder: Path) -> None:
    """Keep the files that an export to the same architecture writes again, and the rows that a new mask replaces."""
    contents = {name: safe_settings(object_in(plan.source, name)) for name in (CONFIG, GENERATION_CONFIG)}
    if plan.architecture in ARCHITECTURES:
        contents[CONFIG]["architectures"] = [plan.architecture]
    for name, content in contents.items():
        if content:
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    mask_id = plan.vocabulary.mask_id
    if plan.new_mask and mask_id < plan.vocab_rows:
        folder.mkdir(exist_ok=True)
        names = [t.name for t in plan.tensors if t.is_table]
        save_file({name: plan.weights.read(name)[mask_id].clone() for name in names}, folder / MASK_ROWS)
