"""Read and write the tensors of a checkpoint one at a time, without a model, for conversion and inspection."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bd3_scale.checkpoint.boxes import Box, Shape
from bd3_scale.checkpoint.manifest import FileRecord
from bd3_scale.checkpoint.storage import INDEX, IndexedBox, box_name, index_entry, read_index, write_tensors


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Tell whether both tensors hold the same bits; unlike `torch.equal`, equal NaNs count as equal."""
    return first.dtype == second.dtype and torch.equal(
        *(tensor.contiguous().view(torch.uint8) for tensor in (first, second))
    )


class TensorReader:
    """Reads any box of any tensor of a checkpoint. A context manager: files stay mapped inside.

    Attributes:
        shapes, dtypes: those of every tensor, by its name `<state>.<key>`.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._index = read_index(checkpoint)
        self._files: dict[str, safe_open] = {}
        self._by_first_index: dict[str, dict[int | None, list[IndexedBox]]] = {}
        self.shapes: Mapping[str, Shape] = {name: tuple(entry.shape) for name, entry in self._index.items()}
        self.dtypes: Mapping[str, torch.dtype] = {
            name: getattr(torch, entry.dtype) for name, entry in self._index.items()
        }

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._files.clear()

    def read(self, name: str, offset: Shape, shape: Shape) -> Tensor:
        """Return the box of `shape` at `offset` of the tensor `name`, in the stored dtype.

        ValueError: the checkpoint has no such tensor, or one of its files cannot be read.
        """
        if name not in self._index:
            raise ValueError(f"checkpoint {self._checkpoint} holds no tensor {name}")
        result = torch.empty(shape, dtype=self.dtypes[name])
        read = 0
        for box in self._candidates(name, offset, shape):
            if not all(
                a < o + m and o < a + n for a, n, o, m in zip(offset, shape, box.offset, box.shape, strict=True)
            ):
                continue
            low = [max(a, b) for a, b in zip(offset, box.offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, box.offset, box.shape, strict=True)]
            source = self._slice(box, box_name(name, box.offset), low, high)
            result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))] = source
            read += source.numel()
        if read != result.numel():
            raise ValueError(f"checkpoint {self._checkpoint} is damaged: the boxes of {name} do not cover it")
        return result

    def _candidates(self, name: str, offset: Shape, shape: Shape) -> Iterator[IndexedBox]:
        """Yield the stored boxes that may overlap the wanted one, chosen by their index on the first axis.

        An import writes one box for each matrix of each expert, so a tensor may have ten thousand; to compare each
        wanted box with each stored one would take quadratic time. Boxes that span several indices are listed under
        None.
        """
        if name not in self._by_first_index:
            self._by_first_index[name] = defaultdict(list)
            for box in self._index[name].boxes:
                self._by_first_index[name][box.offset[0] if box.shape[:1] == [1] else None].append(box)
        by_index = self._by_first_index[name]
        wanted = range(offset[0], offset[0] + shape[0]) if offset else range(0)
        for index in by_index if len(wanted) >= len(by_index) else (None, *wanted):
            if index is None or index in wanted:
                yield from by_index.get(index, ())

    def _slice(self, box: IndexedBox, name: str, low: list[int], high: list[int]) -> Tensor:
        file, offset = box.file, box.offset
        try:
            if file not in self._files:
                self._files[file] = safe_open(self._checkpoint / file, framework="pt")
            within = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            stored = self._files[file].get_slice(name)
            if stored.get_shape() != box.shape:
                raise ValueError(f"{self._checkpoint / file} is damaged: {name} has shape {stored.get_shape()}")
            return stored[within]
        except SafetensorError as error:
            raise ValueError(f"{self._checkpoint / file} is damaged ({error}); use an earlier checkpoint") from error


class TensorWriter:
    """Writes boxes into files of about `file_bytes` in `folder`, and at the end the index.

    Attributes:
        written: the files written so far.
    """

    def __init__(self, folder: Path, file_bytes: int = 1 << 30) -> None:
        self._folder, self._file_bytes = folder, file_bytes
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._boxes: dict[str, list[tuple[Shape, Shape, str]]] = {}
        self._tensors: dict[str, tuple[torch.dtype, Shape]] = {}
        self.written: dict[str, FileRecord] = {}

    def add(self, box: Box) -> None:
        """Add a box, whose data is copied; files are written as boxes add up to `file_bytes`."""
        self._tensors[box.key] = (box.data.dtype, box.full_shape)
        self._boxes.setdefault(box.key, []).append((box.offset, tuple(box.data.shape), self._file))
        self._pending[box_name(box.key, box.offset)] = box.data.clone(memory_format=torch.contiguous_format)
        self._bytes += box.data.nbytes
        if self._bytes >= self._file_bytes:
            self._flush()

    def finish(self) -> None:
        """Write the remaining boxes and the index."""
        self._flush()
        index = {key: index_entry(*self._tensors[key], boxes) for key, boxes in self._boxes.items()}
        (self._folder / INDEX).write_text(json.dumps(index))

    @property
    def _file(self) -> str:
        return f"part-{len(self.written):05d}.safetensors"

    def _flush(self) -> None:
        if self._pending:
            file = self._file
            self.written[file] = write_tensors(self._folder / file, self._pending)
            self._pending, self._bytes = {}, 0
