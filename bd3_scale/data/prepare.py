"""From documents to shards of token sequences: split by document, tokenised, packed and written by tasks, merged."""

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
    """Tokenises the documents of `sources` into the new folder `out`: the MDS shards of `train/` and `validation/`,
    the tokeniser, the hashes of documents and the manifest.

    A sample holds `tokens` [seq_len] (uint16; uint32 for a vocabulary above 65,536), `document_lengths` and
    `counted_lengths` (int32), and where any token is shown `shown` (int32), see `PackedSequence`. Documents begin with
    `tokenizer.vocabulary.bos_id`, which is shown; `parse_special`: special tokens but the mask that a document spells
    are these tokens. With `chat`, lines hold conversations, of which all but the assistant's part is shown. `field`
    (default `text`, of conversations `messages`), `on_error` and `max_document_bytes`: see `DocumentReader`; `packing`:
    see `Packer` and `BestFitPacker`. Documents keep their order: training shuffles the sequences. The share `holdout`
    of the documents goes to `validation`, by a hash of text and `seed`, so that equal documents go to one side; 0 holds
    out none, 1 all. Where the sources `validation` are given, they are held out in place of a share. `tokens`: the
    sources hold ids, see `TokenReader`, of which `tokenizer` is the tokeniser; then `field`, `on_error`,
    `parse_special`, `chat` and `max_document_bytes` are for nothing.

    The work is cut into tasks, see `cut`. The last, incomplete sequence of documents that a task concatenates is
    dropped from `train`; what else is incomplete is filled with tokens that do not count. What is done lies beside
    `out`, in `OUT.tasks`, until all is: whoever asks for the same does what is missing, on any machine that sees the
    folder. The result depends on none of this, nor on `workers` (processes; default: the usable CPUs). `out` exists
    only complete.

    Raises FileExistsError if `out` exists, and says what differs there; ValueError for arguments out of range, sources
    that cannot be read (see `DocumentReader`), a split that would be empty, before tokenising where that can be known,
    and unfinished work on something else.
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
        """Return how many tasks there are."""
        return len(self._plan.tasks)

    def missing(self) -> list[int]:
        """Return the numbers of the tasks that are not done."""
        done = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return [number for number in range(self.num_tasks) if folder_of(number) not in done]

    def share(self, number: int, shares: int) -> list[int]:
        """Return the tasks missing of one of so many shares of all tasks. ValueError: there is no such share."""
        if not 0 <= number < shares:
            raise ValueError(f"--task {number}: give one from 0 to {shares - 1}, below --tasks")
        return [task for task in self.missing() if task % shares == number]

    def shares_missing(self, shares: int) -> list[int]:
        """Return those of so many shares of all tasks that are not done. ValueError: so many cannot be."""
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
        """Do what is missing, make `out` of all tasks, and return its manifest."""
        try:
            self.work(self.missing())
            folders = [self.folder / folder_of(number) for number in range(self.num_tasks)]
            left_out = merge(folders, self._out, self._plan.asked, self._encoder.tokenizer, self._plan.chat_template)
        except BaseException as error:
            # Where there is nothing that it would be worth to go on with, and nobody else is at work.
            if isinstance(error, EmptySplitError) or [path.name for path in self.folder.iterdir()] == [PLAN_FILE]:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        shutil.rmtree(self.folder, ignore_errors=True)
        left_out.tell()
        return load_manifest(self._out)

    def store_plan(self) -> None:
        """Make `OUT.tasks`, by whose plan others see what there is to do, where it is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / PLAN_FILE).exists():
            write_atomically(self.folder / PLAN_FILE, self._plan.model_dump_json())

    def _begun(self, asked: Manifest, chat_template: str) -> Plan | None:
        """Return the plan that work has begun by. ValueError: that was work on something else."""
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
    @wraps(make, assigned=("__module__", "__doc__"), updated=())
    def prepared(*args: P.args, **kwargs: P.kwargs) -> Manifest:
        return make(*args, **kwargs).finish()

    return prepared


# Does what a `Preparation` of the same arguments stands for, and returns the manifest.
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
        raise ValueError(f"{where} has no message of the role {ASSISTANT!r}, and there is nothing to train on")
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
    """FileExistsError: `out` is there; of prepared data it says what differs from what is asked for."""
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
    """ValueError: a split would have no document. Reads until each has one, which is soon unless that is so."""
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
