"""Finding the files of text that sources stand for, and saying what is left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from bd3_scale.registry import source_formats

PACKINGS = ("", ".gz", ".zst")
NUM_NAMED = 5

_HIDDEN = "hidden files and folders left out"
_DANGLING = "links that lead nowhere left out"
_ALREADY = "files and folders left out as already read"
_CLOSED = "folders that may not be opened left out"
_OTHER = "files of other kinds ignored"

logger = logging.getLogger(__name__)


def find_files(sources: Sequence[str | Path], formats: Sequence[str] | None = None) -> list[Path]:
    """Return the files of `sources` in order; a folder stands for the files below it, sorted by path.

    formats: suffixes of the files, which may be packed; by default those of all `source_formats`.

    Links are followed, and what several folders or links lead to is read once. Below a folder, names that begin with a
    dot, links that lead nowhere and files of other kinds are left out, which is logged. Suffixes match in any case.

    Raises FileNotFoundError for a missing path; ValueError for a file of another kind and where nothing can be read.
    """
    suffixes = [end + packing for end in formats or source_formats.names() for packing in PACKINGS]
    files: list[Path] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for source in map(Path, sources):
        if source.is_dir():
            left_out: dict[str, list[Path]] = {}
            below = list(_files_below(source, tuple(suffixes), seen, left_out))
            files += below
            notes += [f"{source}: {len(paths)} {kind} ({named(paths)})" for kind, paths in left_out.items()]
            if not (below or left_out):
                notes.append(f"{source}: no file at all")
        else:
            files.append(_named_file(source, suffixes))
    if not files:
        raise ValueError(f"nothing to read in {'; '.join(notes) or 'no source'}; give {_expected(suffixes)}")
    for note in notes:
        logger.warning("%s", note)
    return files


def format_of(file: Path) -> str:
    """Return the one of `source_formats` that a file is read as, going by its name; of two, the longer."""
    name = file.name.lower()
    packing = next((end for end in PACKINGS[1:] if name.endswith(end)), "")
    return max((end for end in source_formats.names() if name.endswith(end + packing)), key=len)


def named(things: Sequence[object]) -> str:
    """Return the first few of `things` in words."""
    return ", ".join(map(str, things[:NUM_NAMED])) + ", …" * (len(things) > NUM_NAMED)


def _named_file(source: Path, suffixes: Sequence[str]) -> Path:
    if source.is_symlink() and not source.exists():
        raise FileNotFoundError(f"{source} is a link to {source.readlink()}, which leads nowhere")
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give {_expected(suffixes)}")
    if not source.name.lower().endswith(tuple(suffixes)):
        raise ValueError(f"{source} is not a kind of file that can be read here; give {_expected(suffixes)}")
    if not source.is_file():
        raise ValueError(f"{source} is no regular file, but a pipe, a device or a socket; give {_expected(suffixes)}")
    return source


def _files_below(
    source: Path, suffixes: tuple[str, ...], seen: set[Path], left_out: dict[str, list[Path]]
) -> Iterator[Path]:
    """Yield the files of a folder by path; add what they lead to to `seen`, and what is left out to `left_out`."""

    def leave_out(kind: str, path: Path) -> None:
        left_out.setdefault(kind, []).append(path.relative_to(source))

    waiting = [source]
    while waiting:
        path = waiting.pop()
        is_dir = path.is_dir()
        if path != source and path.name.startswith("."):
            leave_out(_HIDDEN, path)
        elif not path.exists():
            leave_out(_DANGLING, path)
        elif not is_dir and not (path.is_file() and path.name.lower().endswith(suffixes)):
            leave_out(_OTHER, path)
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


def _expected(suffixes: Sequence[str]) -> str:
    return f"files that end in {', '.join(suffixes)}, or folders that hold some"
