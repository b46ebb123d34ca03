"""Reading documents: `.txt` (one a file) and `.jsonl` (one a line), plain, `.gz` or `.zst`, and folders of them."""

from __future__ import annotations

import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

SUFFIXES = tuple(kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".zst"))
READ_BYTES = 1 << 17

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """`text`, and how many bytes of the source files, as stored, had been read when it was complete."""

    text: str
    position: int


class DocumentReader:
    """The documents of `sources` in order; a folder stands for the files below it, sorted by path.

    Reading streams: one document is in memory at a time. Documents without a visible character are skipped;
    `num_documents` and `num_empty` count what was met so far. Raises FileNotFoundError for a missing path; ValueError
    for a file of another kind or where nothing can be read, and, while iterating, for a damaged file, text that is not
    UTF-8 and a line that is not a JSON object with the string field `text`.
    """

    def __init__(self, sources: Sequence[str | Path]) -> None:
        self.files = [file for source in sources for file in _files(Path(source))]
        if not self.files:
            raise ValueError(f"nothing to read in {[str(source) for source in sources]}; give {_expected()}")
        self.num_documents = self.num_empty = 0

    @property
    def num_bytes(self) -> int:
        """Size of the source files as stored."""
        return sum(file.stat().st_size for file in self.files)

    def __iter__(self) -> Iterator[Document]:
        self.num_documents = self.num_empty = 0
        before = 0
        for file in self.files:
            with file.open("rb") as raw:
                for text in _texts(file, raw):
                    if text.isspace() or not text:
                        self.num_empty += 1
                    else:
                        self.num_documents += 1
                        yield Document(text, before + raw.tell())
            before += file.stat().st_size


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give {_expected()}")
    if not source.is_dir():
        if not source.name.endswith(SUFFIXES):
            raise ValueError(f"{source} is not a kind of file that can be read; give {_expected()}")
        return [source]
    found = sorted(path for path in source.rglob("*") if path.is_file())
    ignored = [path for path in found if not path.name.endswith(SUFFIXES)]
    if ignored:
        some = ", ".join(str(path.relative_to(source)) for path in ignored[:5])
        logger.warning(
            "%s: %d files of other kinds ignored (%s%s)", source, len(ignored), some, ", …" * (len(ignored) > 5)
        )
    return [path for path in found if path.name.endswith(SUFFIXES)]


def _expected() -> str:
    return f"files that end in {', '.join(SUFFIXES)}, or folders that hold some"


def _texts(file: Path, raw: BinaryIO) -> Iterator[str]:
    try:
        with _unpacked(file, raw) as stream:
            if ".jsonl" in file.suffixes[-2:]:
                for number, line in enumerate(stream, 1):
                    if not line.isspace():
                        yield _text_of_line(line, f"{file}:{number}")
            else:
                yield _decoded(stream.read(), str(file))
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); copy or make it again") from error


def _unpacked(file: Path, raw: BinaryIO) -> BinaryIO:
    if file.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if file.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw), READ_BYTES)
    return raw


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error}); convert it first") from error


def _text_of_line(line: bytes, where: str) -> str:
    try:
        record = json.loads(_decoded(line, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where} has no document; each line must be an object with a string field "text"')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise ValueError(f"{where} holds text that is not Unicode ({error})") from error
    return text


class _ZstdFile(io.RawIOBase):
    """The bytes packed in the zstd frames of `raw`; EOFError where the last frame is incomplete.

    `zstandard`'s own reader takes a file that was cut short for a complete one.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(READ_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is incomplete")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._unpacked = memoryview(frame.decompress(self._packed))
            self._packed = frame.unused_data
            self._frame = None if frame.eof else frame
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size
