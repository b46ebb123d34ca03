"""Read source files by URL with fsspec: `s3://bucket/corpus`, `gs://…`, `https://…` and its other file systems."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from bd3_scale.resilience.readers import in_one_line

# How much is fetched at a time, and how much of it a reader gets at once.
FETCH_BYTES = 1 << 23
READ_BYTES = 1 << 18


class Size(NamedTuple):
    """The part of `os.stat_result` that a remote file has."""

    st_size: int


@dataclass(frozen=True)
class RemoteFile:
    """A file by its URL, with the methods of `Path` that readers use; `size` is in bytes as stored."""

    url: str
    size: int

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Return the last part of its path."""
        return self.url.rpartition("/")[2]

    def with_name(self, name: str) -> RemoteFile:
        """Return the file of that name in the same folder; its size is not known."""
        return RemoteFile(self.url.removesuffix(self.name) + name, 0)

    def stat(self) -> Size:
        """Return its size, as `Path.stat`."""
        return Size(self.size)

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """Open it for reading. Raises FileNotFoundError, and OSError of one line for other errors of the storage."""
        with storage_errors(self.url):
            fs, path = _file_system(self.url)
            file = fs.open(path, mode, block_size=FETCH_BYTES)
        return cast(BinaryIO, io.BufferedReader(_Fetched(file, self.url, fs.info(path)["size"]), READ_BYTES))


SourceFile = Path | RemoteFile


def is_remote(source: str | Path) -> bool:
    """Return whether a source is a URL."""
    return "://" in str(source)


def remote_files(url: str) -> Iterator[tuple[RemoteFile, tuple[str, ...]]]:
    """Yield the files of a URL, each with the parts of its path below the URL; a single file has no parts.

    Files of a folder are sorted by path. Raises FileNotFoundError: nothing is there; ValueError: fsspec does not know
    the file system, or lacks a package for it; OSError of one line for other errors of the storage.
    """
    with storage_errors(url):
        fs, root = _file_system(url)
        info = fs.info(root)
        entries = {root: info} if info["type"] == "file" else fs.find(root, detail=True)
    below = {_parts(path, root): entry for path, entry in entries.items() if entry["type"] == "file"}
    for parts in sorted(below):
        size = below[parts]["size"]
        if size is None:
            raise ValueError(f"{url} does not report the size of {'/'.join(parts) or 'the file'}: copy it here first")
        yield RemoteFile("/".join([url.rstrip("/"), *parts]), int(size)), parts


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn errors of remote storage inside the block into an OSError of one line with the URL and a way out."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} does not exist") from error
    except PermissionError as error:
        raise PermissionError(f"{url} may not be read ({in_one_line(error)}): check the credentials") from error
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # each file system of fsspec has its own classes
        lacks = "redential" in f"{type(error).__name__} {error}"
        way_out = "set them as for any other program that reads there" if lacks else "try again later"
        raise ConnectionError(f"{url} cannot be read ({in_one_line(error)}): {way_out}") from error


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = "'bd3_scale[s3]'" if protocol in ("s3", "s3a") else "what it names"
        raise ValueError(f"{url} needs another package ({in_one_line(error)}): pip install {package}") from error
    except ValueError as error:
        raise ValueError(f"{url} cannot be read ({error}): give a path, or a URL that fsspec knows") from error
    return fs, path


def _parts(path: str, root: str) -> tuple[str, ...]:
    return tuple(part for part in path.removeprefix(root).split("/") if part)


class _Fetched(io.RawIOBase):
    """The bytes of an fsspec file; unlike there, an end before `size` bytes is an error."""

    def __init__(self, file: Any, url: str, size: int) -> None:
        self._file, self._url, self._size = file, url, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with storage_errors(self._url):
            data = self._file.read(len(buffer))
        if not data and self._file.tell() < self._size:
            place = f"byte {self._file.tell():,} of {self._size:,}"
            raise ConnectionError(f"{self._url} ends at {place}: it was replaced or cut off; try again")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
