"""Find the text files that sources stand for, and log what is left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from bd3_scale.data.remote_files import RemoteFile, SourceFile, is_remote, remote_files
from bd3_scale.registry import source_formats
from bd3_scale.resilience.readers import read_regular

PACKINGS = ("", ".gz", ".zst")
# Read by seeking, so a compressed file cannot be used; they need the package pyarrow.
COLUMN_FORMATS = (".parquet", ".arrow")
NUM_NAMED = 5
STATE_FILE = "state.json"
# Files that the library `datasets` writes next to its data.
_DESCRIPTIONS = (STATE_FILE, "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_STATE_BYTES = 1 << 24

_HIDDEN = "hidden files and folders left out"
_DANGLING = "broken links left out"
_ALREADY = "files and folders left out as already read"
_CLOSED = "folders without permission left out"
_OTHER = "files of other kinds ignored"
_DATASET_FILES = "files of a saved data set that hold no data left out"

logger = logging.getLogger(__name__)


def find_files(sources: Sequence[str | Path], formats: Sequence[str] | None = None) -> list[SourceFile]:
    """Return the files of `sources` in order; a folder stands for the files below it, sorted by path.

    A source is a path, or a URL such as `s3://bucket/corpus`, see `remote_files`.

    formats: suffixes of the files, without compression suffix; default: those of all `source_formats`.

    Links are followed, and a file that several folders or links lead to is read once. Below a folder, hidden names,
    broken links and files of other kinds are left out, which is logged; so are all files but the data in a folder that
    the library `datasets` saved. Suffixes match in any case.

    Raises FileNotFoundError for a missing path; ValueError for a file of another kind, if nothing can be read, or if a
    package for a format is missing; OSError for remote storage that does not answer.
    """
    suffixes = _suffixes(formats or source_formats.names())
    files: list[SourceFile] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for source in sources:
        left_out: dict[str, list[PurePosixPath]] = {}
        leave_out = _into(left_out)
        below: list[SourceFile]
        if is_remote(source):
            below = list(_remote_files(str(source), suffixes, leave_out))
        elif Path(source).is_dir():
            below = list(_files_below(Path(source), suffixes, seen, leave_out))
        else:
            files.append(_named_file(Path(source), suffixes))
            continue
        files += below
        notes += [f"{source}: {len(paths)} {kind} ({named(paths)})" for kind, paths in left_out.items()]
        if not (below or left_out):
            notes.append(f"{source}: no file at all")
    if not files:
        raise ValueError(f"nothing to read in {'; '.join(notes) or 'no source'}; give {_expected(suffixes)}")
    _check_packages(files)
    for note in notes:
        logger.warning("%s", note)
    return files


def format_of(file: SourceFile) -> str:
    """Return the name in `source_formats` that fits a file's name; if two fit, the longer one."""
    name = file.name.lower()
    packing = next((end for end in PACKINGS[1:] if name.endswith(end)), "")
    return max((end for end in source_formats.names() if name.endswith(end + packing)), key=len)


def named(things: Sequence[object]) -> str:
    """Return the first few of `things` as text."""
    return ", ".join(map(str, things[:NUM_NAMED])) + ", …" * (len(things) > NUM_NAMED)


def _named_file(source: Path, suffixes: Sequence[str]) -> Path:
    if source.is_symlink() and not source.exists():
        raise FileNotFoundError(f"{source} is a broken link to {source.readlink()}")
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give {_expected(suffixes)}")
    if not source.name.lower().endswith(tuple(suffixes)):
        raise ValueError(f"{source} is not a kind of file that can be read here; give {_expected(suffixes)}")
    if not source.is_file():
        raise ValueError(f"{source} is not a regular file but a pipe, a device or a socket; give {_expected(suffixes)}")
    return source


LeaveOut = Callable[[str, PurePosixPath], None]


def _into(left_out: dict[str, list[PurePosixPath]]) -> LeaveOut:
    return lambda kind, path: left_out.setdefault(kind, []).append(path)


def _suffixes(formats: Sequence[str]) -> tuple[str, ...]:
    return tuple(end + packing for end in formats for packing in (PACKINGS[:1] if end in COLUMN_FORMATS else PACKINGS))


def _check_packages(files: Sequence[SourceFile]) -> None:
    """Raise ValueError if a file needs a missing package, now and not after hours of other files."""
    file = next((file for file in files if file.name.lower().endswith(COLUMN_FORMATS)), None)
    if file is not None and find_spec("pyarrow") is None:
        raise ValueError(f"{file} is read with pyarrow, which is not installed: pip install 'bd3_scale[parquet]'")


def _files_below(source: Path, suffixes: tuple[str, ...], seen: set[Path], leave_out_below: LeaveOut) -> Iterator[Path]:
    """Yield the files of a folder by path; add the files that they resolve to to `seen`; report what is left out."""

    def leave_out(kind: str, path: Path) -> None:
        leave_out_below(kind, PurePosixPath(path.relative_to(source)))

    waiting = [source]
    saved: dict[Path, list[str] | None] = {}
    while waiting:
        path = waiting.pop()
        is_dir = path.is_dir()
        if path != source and path.name.startswith("."):
            leave_out(_HIDDEN, path)
        elif not path.exists():
            leave_out(_DANGLING, path)
        elif not is_dir and not (path.is_file() and path.name.lower().endswith(suffixes)):
            leave_out(_OTHER, path)
        elif not is_dir and _is_beside_data(path, path.parent, saved):
            leave_out(_DATASET_FILES, path)
        elif path.resolve() in seen:
            leave_out(_ALREADY, path)
        else:
            seen.add(path.resolve())
            if not is_dir:
                yield path
                continue
            try:
                waiting += sorted(path.iterdir(), reverse=True)
            except PermissionError:
                leave_out(_CLOSED, path)


def _remote_files(url: str, suffixes: tuple[str, ...], leave_out: LeaveOut) -> Iterator[RemoteFile]:
    """Yield the files of a URL by path, and report what is left out. ValueError: the URL is a file of another kind."""
    saved: dict[tuple[str, ...], list[str] | None] = {}
    for file, parts in remote_files(url):
        is_of_kind = file.name.lower().endswith(suffixes)
        if not parts and not is_of_kind:
            raise ValueError(f"{file} is not a kind of file that can be read here; give {_expected(suffixes)}")
        if any(part.startswith(".") for part in parts):
            leave_out(_HIDDEN, PurePosixPath(*parts))
        elif not is_of_kind:
            leave_out(_OTHER, PurePosixPath(*parts))
        elif parts and _is_beside_data(file, parts[:-1], saved):
            leave_out(_DATASET_FILES, PurePosixPath(*parts))
        else:
            yield file


def _is_beside_data(file: SourceFile, folder: Hashable, saved: dict[Any, list[str] | None]) -> bool:
    """Return whether a file belongs to a data set saved by `datasets` but holds no data: a description, or a cache.

    saved: by folder, the names of the files that hold the data, or None if the folder holds no saved data set.
    """
    if file.name in _DESCRIPTIONS:
        return True
    if not file.name.lower().endswith(".arrow"):
        return False
    if folder not in saved:
        saved[folder] = _saved_names(file.with_name(STATE_FILE))
    names = saved[folder]
    return names is not None and file.name not in names


def _saved_names(state: SourceFile) -> list[str] | None:
    """Return the names of the data files of a saved data set, or None if `state` is not the file of one."""
    try:
        if isinstance(state, Path):
            content = json.loads(read_regular(state, _STATE_BYTES))
        else:
            with state.open("rb") as file:
                content = json.loads(file.read(_STATE_BYTES))
        return [str(entry["filename"]) for entry in content["_data_files"]]
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _expected(suffixes: Sequence[str]) -> str:
    return f"files that end in {', '.join(suffixes)}, or folders that hold some"
