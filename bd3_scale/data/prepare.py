"""Prepare documents for training: divide them among splits, tokenise, pack and write them in tasks, then merge."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from bd3_scale.data.chat import ASSISTANT, ChatTemplate
from bd3_scale.data.encode import Encoder
from bd3_scale.data.fields import field_value
from bd3_scale.data.imported import Kind, TokenEncoder, TokenReader
from bd3_scale.data.manifest import MANIFEST_FILE, Manifest, Source, differences_of, load_manifest, parse_manifest
from bd3_scale.data.merge import EmptySplitError, merge
from bd3_scale.data.packing import Packing
from bd3_scale.data.prompts import check_messages
from bd3_scale.data.sources import DOCUMENT_BYTES, DocumentReader
from bd3_scale.data.tasks import PLAN_FILE, Plan, cut, read_plan
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.data.work import TaskWriter, folder_of, splits_of, write_tasks
from bd3_scale.observe.console import Console, label
from bd3_scale.resilience.files import write_atomically
from bd3_scale.resilience.readers import read_regular

DOCUMENT_MULTIPLE = 32
OnError = Literal["stop", "skip"]
P = ParamSpec("P")


class Preparation:
    """The preparation of `sources` as the new folder `out`: MDS shards of `train/` and `validation/`, the tokeniser,
    the hashes of the documents and the manifest.

    A sample holds `tokens` [seq_len] (uint16; uint32 for a vocabulary above 65,536), `document_lengths` and
    `counted_lengths` (int32), and `shown` (int32) if any token can be shown, see `PackedSequence`. Documents begin with
    `tokenizer.vocabulary.bos_id`, which is shown, and keep their order: training shuffles the sequences.

    Args:
        holdout: the share of the documents that goes to `validation`, by a hash of text and `seed`, so that equal
            documents go to the same split; 0 holds out none, 1 all.
        validation: sources to hold out, in place of a share.
        packing: see `Packer` and `BestFitPacker`.
        parse_special: parse special tokens, except the mask, that a document spells.
        chat: lines hold conversations; all but the assistant's answers is shown.
        field: default `text`, of conversations `messages`; this, `on_error` and `max_document_bytes`: see
            `DocumentReader`.
        tokens: the sources hold ids of `tokenizer`, see `TokenReader`; then `field`, `on_error`, `parse_special`,
            `chat` and `max_document_bytes` have no effect.
        workers: processes; default: the usable CPUs.

    The work is cut into tasks, see `cut`. In `train`, the incomplete sequence at the end of a task that concatenates
    documents is dropped; elsewhere it is filled with tokens that do not count. Finished tasks stay in `OUT.tasks` until
    all are done, so anybody who sees that folder can repeat the call and do the missing ones. The result depends
    neither on this nor on `workers`. `out` appears complete or not at all.

    Raises FileExistsError if `out` exists, and says what differs there. Raises ValueError for arguments out of range,
    for sources that cannot be read (see `DocumentReader`), for an empty split (if possible before tokenising), and if
    `OUT.tasks` holds unfinished work on other data.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        out: str | Path,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        document_multiple: int = DOCUMENT_MULTIPLE,
        packing: Packing = "concatenate",
        holdout: float = 0.05,
        validation: Sequence[str | Path] = (),
        seed: int = 1,
        workers: int | None = None,
        progress: bool = True,
        field: str | None = None,
        on_error: OnError = "stop",
        parse_special: bool = False,
        chat: ChatTemplate | None = None,
        max_document_bytes: int = DOCUMENT_BYTES,
        tokens: Kind | None = None,
    ) -> None:
        self._workers = len(os.sched_getaffinity(0)) if workers is None else workers
        _check_arguments(seq_len, document_multiple, holdout, seed, self._workers)
        kind = TokenEncoder if tokens else Encoder
        self._encoder = kind(tokenizer.checked_template(), seed, parse_special=parse_special, chat=chat)

        def read(paths: Sequence[str | Path]) -> DocumentReader:
            if tokens:
                return TokenReader(paths, tokens, self._encoder.tokenizer)
            return _reader(paths, field, on_error, chat, max_document_bytes)

        self._readers = [(read(sources), 0.0 if validation else holdout)]
        if validation:
            self._readers.append((read(validation), 1.0))
        files = [file for reader, _ in self._readers for file in reader.files]
        asked = Manifest(
            vocabulary=self._encoder.tokenizer.vocabulary,
            tokenizer_hash=self._encoder.tokenizer.hash,
            seq_len=seq_len,
            document_multiple=document_multiple,
            packing=packing,
            holdout=0.0 if validation else holdout,
            seed=seed,
            empty_documents=0,
            field=field or "",
            parse_special=parse_special,
            messages=chat is not None,
            tokens=tokens or "",
            sources=tuple(Source(path=str(file), bytes=file.stat().st_size) for file in files),
            train=None,
            validation=None,
        )
        self._out, self._progress = Path(out), progress
        _check_new(self._out, asked)
        self.folder = self._out.with_name(f"{self._out.name}.tasks")
        self._plan = self._begun(asked, chat.template if chat else "") or self._new_plan(asked, chat)

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks."""
        return len(self._plan.tasks)

    def missing(self) -> list[int]:
        """Return the numbers of the unfinished tasks."""
        done = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return [number for number in range(self.num_tasks) if folder_of(number) not in done]

    def share(self, number: int, shares: int) -> list[int]:
        """Return the unfinished tasks of share `number` of `shares`. ValueError: there is no such share."""
        if not 0 <= number < shares:
            raise ValueError(f"--task {number}: give one from 0 to {shares - 1}, below --tasks")
        return [task for task in self.missing() if task % shares == number]

    def shares_missing(self, shares: int) -> list[int]:
        """Return which of `shares` shares have unfinished tasks. ValueError: `shares` is below 1."""
        if shares < 1:
            raise ValueError(f"--tasks {shares}: give at least 1")
        return sorted({task % shares for task in self.missing()})

    def work(self, numbers: Sequence[int]) -> None:
        """Do these tasks."""
        self.store_plan()
        if not numbers:
            return
        writer = TaskWriter(self.folder, self._plan.asked, self._encoder, self._readers)
        tasks = {number: self._plan.tasks[number] for number in numbers}
        with _progress_bar(self._progress) as bar:
            shown = bar.add_task("tokenising", total=sum(task.num_bytes for task in tasks.values()))
            write_tasks(writer, tasks, self._workers, lambda num_bytes: bar.advance(shown, num_bytes))

    def finish(self) -> Manifest:
        """Do the unfinished tasks, merge all into `out`, and return its manifest."""
        try:
            self.work(self.missing())
            folders = [self.folder / folder_of(number) for number in range(self.num_tasks)]
            left_out = merge(folders, self._out, self._plan.asked, self._encoder.tokenizer, self._plan.chat_template)
        except BaseException as error:
            # Only if no finished task would be lost, and no other process is at work.
            if isinstance(error, EmptySplitError) or [path.name for path in self.folder.iterdir()] == [PLAN_FILE]:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        shutil.rmtree(self.folder, ignore_errors=True)
        left_out.log()
        return load_manifest(self._out)

    def store_plan(self) -> None:
        """Make `OUT.tasks` if it is missing; its plan tells other machines what there is to do."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / PLAN_FILE).exists():
            write_atomically(self.folder / PLAN_FILE, self._plan.model_dump_json())

    def _begun(self, asked: Manifest, chat_template: str) -> Plan | None:
        """Return the plan of begun work, or None. ValueError: it is work on other data."""
        if not (self.folder / PLAN_FILE).exists():
            return None
        plan = read_plan(self.folder / PLAN_FILE)
        differences = differences_of(plan.asked, asked)
        if plan.chat_template != chat_template:
            differences.append("the chat template is another")
        if differences:
            raise ValueError(
                f"{self.folder} holds unfinished work on other data:\n  - " + "\n  - ".join(differences) + "\nrepeat "
                "the command that it began with, remove the folder, or choose another --out"
            )
        return plan

    def _new_plan(self, asked: Manifest, chat: ChatTemplate | None) -> Plan:
        _check_splits(self._readers, self._encoder)
        tasks = [task for number, (reader, _) in enumerate(self._readers) for task in cut(number, reader)]
        return Plan(asked=asked, chat_template=chat.template if chat else "", tasks=tuple(tasks))


def _in_one_go(make: Callable[P, Preparation]) -> Callable[P, Manifest]:
    """Return a function that makes a preparation and finishes it at once."""

    @wraps(make, assigned=("__module__", "__doc__"), updated=())
    def prepared(*args: P.args, **kwargs: P.kwargs) -> Manifest:
        return make(*args, **kwargs).finish()

    return prepared


# Finishes a `Preparation` with the same arguments and returns the manifest.
prepare = _in_one_go(Preparation)


def _reader(
    sources: Sequence[str | Path], field: str | None, on_error: OnError, chat: ChatTemplate | None, max_bytes: int
) -> DocumentReader:
    if chat is None:
        return DocumentReader(sources, field=field or "text", on_error=on_error, max_bytes=max_bytes)
    text_of = partial(_conversation, field or "messages")
    return DocumentReader(sources, field or "messages", on_error, text_of, max_bytes)


def _conversation(field: str, record: dict[str, Any], where: str) -> str:
    way_out = "a conversation is a list of messages: name its field with --field"
    messages = check_messages(field_value(record, field, where, way_out), where)
    if all(message["role"] != ASSISTANT for message in messages):
        raise ValueError(f"{where} has no message of the role {ASSISTANT!r}, so there is nothing to train on")
    return json.dumps([where, messages], default=str)


def _check_arguments(seq_len: int, document_multiple: int, holdout: float, seed: int, workers: int) -> None:
    if seq_len < 1 or document_multiple < 1 or seq_len % document_multiple:
        raise ValueError(f"seq_len={seq_len} must be a positive multiple of document_multiple={document_multiple}")
    if not 0 <= holdout <= 1:
        raise ValueError(f"holdout={holdout} must be a share of the documents, from 0 to 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be from 0 to 2**63 - 1")
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")


def _check_new(out: Path, asked: Manifest) -> None:
    """Raise FileExistsError if `out` exists; for prepared data it says what differs from the request."""
    if not out.exists():
        return
    file = out / MANIFEST_FILE
    if not file.is_file():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    differences = differences_of(parse_manifest(file, read_regular(file)), asked)
    if not differences:
        raise FileExistsError(
            f"{out} holds these data already, prepared in the same way from files of the same names and sizes; remove "
            "it to prepare them again"
        )
    raise FileExistsError(
        f"{out} holds other data:\n  - " + "\n  - ".join(differences) + "\nremove it or choose another folder"
    )


def _check_splits(readers: Sequence[tuple[DocumentReader, float]], encoder: Encoder) -> None:
    """Raise ValueError if a split would have no document. Reads only until each split has one."""
    for reader, share in readers:
        wanted = set(splits_of(share))
        different: set[str] = set()
        divider = replace(encoder, holdout=share)
        for document in reader:
            if len(different) < 2:
                different.add(divider.key_of(document.text))
            wanted.discard(divider.split_of(document.text))
            if not wanted:
                break
        if not reader.num_documents:
            files = ", ".join(map(str, reader.files[:5])) + ", …" * (len(reader.files) > 5)
            raise ValueError(
                f"{files}: no document ({reader.num_empty} empty ones and {reader.num_skipped} with errors were "
                "left out)"
            )
        if wanted:
            (name,) = wanted
            count = reader.num_documents
            equal = len(different) == 1
            which = f"all {count} documents are equal, and none" if equal else f"none of the {count} documents"
            which = "the only document never" if count == 1 else which
            raise ValueError(
                f"{which} fell to {name} with holdout={share}; documents are not divided, so give more of them (one a "
                ".txt file or .jsonl line), name files to hold out with --validation, or change holdout or seed"
            )


def _progress_bar(enabled: bool) -> Progress:
    columns = (
        label("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not enabled)
