"""Store tensors of torch.distributed.checkpoint as safetensors files and a JSON index.

DCP's own storage (`FileSystemWriter`) pickles its metadata, and to read a pickle is to run what it says; a checkpoint
may come from a stranger. Here nothing is pickled. A rank writes its boxes to one file; `index.json` says which file
holds which box of which tensor. A reader maps a file and copies from it only the part of a box that it needs.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from bd3_scale.checkpoint.manifest import FileRecord
from bd3_scale.resilience import faults
from bd3_scale.resilience.readers import read_regular, reader

INDEX = "index.json"
# The dtypes of the safetensors format that are written here.
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Bytes hashed and written at a time: few enough that they are still in the CPU's last-level cache when they are
# written.
_CHUNK_BYTES = 1 << 24
# Largest index that is read: a thousand ranks that write a thousand boxes each, at a hundred bytes a box, and some
# room.
_LIMIT_BYTES = 1 << 30


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write contiguous floating-point tensors of host memory as a safetensors file, flushed to disk.

    Returns its size and the hash of its bytes. `safetensors.torch.save_file` holds Python's global lock for most of its
    time, so training would stand still during a save, and the file would have to be read again to hash it.

    OSError: it cannot be written.
    """
    # The format has no padding between tensors; wide dtypes first keeps each tensor aligned to its element size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, end = {}, 0
    for name, tensor in ordered:
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        flat = [memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) for _, tensor in ordered]
        for part in (memoryview(len(text).to_bytes(8, "little") + text), *flat):
            for start in range(0, len(part), _CHUNK_BYTES):
                chunk = part[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                while chunk:  # an unbuffered write may write less than it was given
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return FileRecord(bytes=8 + len(text) + end, xxh3=digest.hexdigest())


class IndexedBox(BaseModel):
    """One box of a tensor in the index."""

    model_config = ConfigDict(strict=True, extra="forbid")

    offset: list[NonNegativeInt]
    shape: list[NonNegativeInt]
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the checkpoint's own folder")]


class IndexedTensor(BaseModel):
    """One tensor in the index: the boxes tile it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Literal["float32", "float16", "bfloat16"]
    shape: list[NonNegativeInt]
    boxes: list[IndexedBox]


_INDEX = TypeAdapter(dict[str, IndexedTensor])


@reader("an index of tensors", path="checkpoint")
def read_index(checkpoint: Path) -> dict[str, IndexedTensor]:
    """Return the tensors of a checkpoint with their boxes and the files that hold them.

    ValueError: the index is damaged, names something outside the checkpoint, or boxes that its files cannot hold.
    """
    path = checkpoint / INDEX
    try:
        index = _INDEX.validate_json(read_regular(path, _LIMIT_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        outside = ": this is no file of the checkpoint" if first["loc"][-1:] == ("file",) else ""
        raise ValueError(f"{path} is damaged ({key}: {first['msg']}{outside}); use an earlier checkpoint") from error
    sizes: dict[str, int] = defaultdict(int)
    for name, tensor in index.items():
        for box in tensor.boxes:
            ends = [offset + size for offset, size in zip(box.offset, box.shape, strict=False)]
            fits = len(box.offset) == len(box.shape) == len(tensor.shape)
            if not fits or any(end > size for end, size in zip(ends, tensor.shape, strict=False)):
                raise ValueError(f"{path} is damaged: a box of {name} exceeds the tensor; use an earlier checkpoint")
            sizes[box.file] += math.prod(box.shape) * getattr(torch, tensor.dtype).itemsize
        if sum(math.prod(box.shape) for box in tensor.boxes) != math.prod(tensor.shape):
            raise ValueError(
                f"{path} is damaged: the boxes of {name} do not cover the tensor; use an earlier checkpoint"
            )
    for file, size in sizes.items():
        if not (checkpoint / file).is_file() or (checkpoint / file).stat().st_size < size:
            raise ValueError(f"{checkpoint / file} is smaller than {INDEX} says, or missing; use an earlier checkpoint")
    return index


def box_name(key: str, offset: Iterable[int]) -> str:
    """Return the name that the box of tensor `key` at `offset` has in its file."""
    return f"{key}@{','.join(map(str, offset))}"


def index_entry(
    dtype: torch.dtype, shape: Iterable[int], boxes: Iterable[tuple[Iterable[int], Iterable[int], str]]
) -> dict[str, Any]:
    """Return the index's entry of a tensor; boxes are (offset, shape, file)."""
    listed = [{"offset": list(offset), "shape": list(size), "file": file} for offset, size, file in boxes]
    return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "boxes": listed}


def _name(index: MetadataIndex) -> str:
    return box_name(index.fqn, index.offset or ())


def _on_host(data: Any) -> torch.Tensor:
    assert isinstance(data, torch.Tensor)
    return data.detach().cpu().contiguous()


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class SafetensorsWriter(StorageWriter):
    """Writes this rank's boxes into `folder`, which must exist.

    written: name, size and hash of the file that this rank wrote, if any.
    """

    def __init__(self, folder: Path, rank: int, step: int) -> None:
        self._folder, self._step = folder, step
        self._file = f"rank-{rank:05d}.safetensors"
        self.written: dict[str, FileRecord] = {}

    def reset(self, checkpoint_id: object = None) -> None:
        """Do nothing: no state is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder exists already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors = {_name(item.index): _on_host(planner.resolve_data(item)) for item in plan.items}
        faults.reach("save.write", step=self._step, folder=self._folder)
        if tensors:
            self.written[self._file] = write_tensors(self._folder / self._file, tensors)
        return _done([WriteResult(item.index, tensors[_name(item.index)].nbytes, self._file) for item in plan.items])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {_name(result.index): result.storage_data for rank in results for result in rank}
        index = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            boxes = [(c.offsets, c.sizes, files[box_name(key, c.offsets)]) for c in tensor.chunks]
            index[key] = index_entry(tensor.properties.dtype, tensor.size, boxes)
        (self._folder / INDEX).write_text(json.dumps(index))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return True


class SafetensorsReader(StorageReader):
    """Reads what `SafetensorsWriter` wrote to `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[MetadataIndex, str] = {}

    def reset(self, checkpoint_id: object = None) -> None:
        """Do nothing: no state is kept between loads."""

    def read_metadata(self) -> Metadata:
        tensors: dict[str, STORAGE_TYPES] = {}
        files: dict[MetadataIndex, str] = {}
        for key, entry in read_index(self._folder).items():
            chunks = [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in entry.boxes]
            files |= {MetadataIndex(key, box.offset): box.file for box in entry.boxes}
            properties = TensorProperties(dtype=getattr(torch, entry.dtype))
            tensors[key] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        return Metadata(state_dict_metadata=tensors, storage_data=files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self._files[item.storage_index]].append(item)
        for file, items in by_file.items():
            with safe_open(self._folder / file, framework="pt") as tensors:
                for item in items:
                    box = tensors.get_slice(_name(item.storage_index))
                    source = box[tuple(_ranges(item.storage_offsets, item.lengths))]
                    target = planner.resolve_tensor(item)
                    target.copy_(source.view(target.shape))
                    planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return True


def _ranges(offsets: Iterable[int], lengths: Iterable[int]) -> Iterable[slice]:
    return (slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
