"""Merge the folders of all tasks into one folder of prepared data."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from pathlib import Path

from bd3_scale.data.chat import CHAT_TEMPLATE
from bd3_scale.data.index import INDEX_FILE, merge_indices
from bd3_scale.data.manifest import MANIFEST_FILE, Counts, Manifest, Split, SplitName
from bd3_scale.data.overlap import merge_hashes
from bd3_scale.data.sources import LeftOut
from bd3_scale.data.tasks import RESULT_FILE, Result, read_result
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.resilience.files import new_folder

# The errors of file systems without hard links, and of links between two file systems.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)


class EmptySplitError(ValueError):
    """A split has no sequence."""


def merge(folders: Sequence[Path], out: Path, data: Manifest, tokenizer: Tokenizer, chat_template: str) -> LeftOut:
    """Make `out` from the tasks' folders, in their order; return what was left out.

    Shards are hard-linked, not moved, so that a killed merge can be repeated; without links they are copied.
    Raises EmptySplitError if a split has no sequence; FileExistsError if `out` exists.
    """
    results = [read_result(folder / RESULT_FILE) for folder in folders]
    names: tuple[SplitName, ...] = ("train", "validation")
    splits = {name: _sum(results, name) for name in names if any(name in result.splits for result in results)}
    left_out = reduce(add, (result.left_out for result in results), LeftOut())
    for name, counts in splits.items():
        _check_not_empty(name, counts, data)
    with new_folder(out) as folder:
        for name in splits:
            (folder / name).mkdir()
            with_split = [one for one, result in zip(folders, results, strict=True) if name in result.splits]
            indices = (one / name / INDEX_FILE for one in with_split)
            for shard, new_name in merge_indices(folder / name / INDEX_FILE, indices):
                _link(shard, folder / name / new_name)
            merge_hashes(with_split, folder, name)
        tokenizer.save(folder)
        if chat_template:
            (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        manifest = data.model_copy(
            update={"empty_documents": left_out.empty, "skipped_documents": left_out.skipped}
            | {name: Split(**counts.model_dump()) for name, counts in splits.items()}
        )
        (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return left_out


def _sum(results: Iterable[Result], name: SplitName) -> Counts:
    counts = [result.splits[name] for result in results if name in result.splits]
    return Counts(**{field: sum(getattr(one, field) for one in counts) for field in Counts.model_fields})


def _check_not_empty(name: SplitName, counts: Counts, data: Manifest) -> None:
    if counts.sequences:
        return
    if name == "train" and data.packing == "concatenate":
        raise EmptySplitError(
            f"the documents for training fill {counts.dropped_tokens} tokens, less than one sequence of seq_len="
            f"{data.seq_len}; give more text or choose a shorter seq_len"
        )
    raise EmptySplitError("the conversations have no sequence with an answer; give more or longer ones")


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(file, to)
