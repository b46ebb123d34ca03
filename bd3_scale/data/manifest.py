"""Read the manifest of prepared data, with the indices of its shards, from a folder or from remote storage."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bd3_scale.data.chat import CHAT_TEMPLATE
from bd3_scale.data.index import INDEX_FILE, INDEX_LIMIT, NO_SHARDS, ShardField, ShardTable, parse_index, read_index
from bd3_scale.data.packing import Packing
from bd3_scale.data.tokenizer import TOKENIZER_FILES, Tokenizer
from bd3_scale.recipe.data import DATA_RETRY_MINUTES, DataRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.resilience.files import write_atomically
from bd3_scale.resilience.leftovers import temporary_folder
from bd3_scale.resilience.readers import in_one_line, read_regular, reader

MANIFEST_FILE = "manifest.json"
SplitName = Literal["train", "validation"]
Count = Annotated[int, Field(ge=0)]
T = TypeVar("T")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _added_later(default: Any = None, **constraints: Any) -> Any:
    """Return a field that older manifests lack. Its default value is not written, so that their hashes stay equal."""
    return Field(exclude_if=lambda value: not value or value == default, **constraints)


class Source(_Frozen):
    """A source file, with its size in bytes as stored."""

    path: str
    bytes: Count


class Counts(_Frozen):
    """Counts of one split, or of the part of it that one task wrote."""

    documents: Count
    sequences: Count
    counted_tokens: Annotated[Count, Field(description="tokens of its sequences that count for perplexity")]
    shown_tokens: Annotated[int, _added_later(ge=0, description="tokens of its sequences that are never masked")] = 0
    dropped_tokens: Annotated[
        Count, Field(description="tokens of sequences that were dropped: incomplete, or without a trained token")
    ]
    text_bytes: Annotated[Count, Field(description="UTF-8 bytes of its documents; of conversations, of the answers")]


class Split(Counts):
    """One split. Its manifest file has the counts; `load_manifest` adds the shards from the index."""

    sequences: Annotated[int, Field(ge=1)]
    shards: Annotated[ShardField, _added_later(description="XXH64 and samples of each, see `identities`")] = NO_SHARDS


class Manifest(_Frozen):
    """The description of prepared data; written last, next to the tokeniser and the shards of each split."""

    format_version: Literal[1] = 1
    vocabulary: Vocabulary
    tokenizer_hash: str
    seq_len: Annotated[int, Field(ge=1)]
    document_multiple: Annotated[int, Field(ge=1)]
    packing: Annotated[Packing, _added_later("concatenate")] = "concatenate"
    holdout: Annotated[float, Field(ge=0, le=1)]
    seed: Count
    empty_documents: Count
    skipped_documents: Annotated[int, _added_later(ge=0, description="left out with --on-error skip")] = 0
    field: Annotated[str, _added_later(description="field of the JSON lines, if not `text`")] = ""
    parse_special: Annotated[bool, _added_later(description="special tokens that documents spell are parsed")] = False
    messages: Annotated[bool, _added_later(description="conversations; only answers are trained on")] = False
    tokens: Annotated[str, _added_later(description="format of the sources, if they held ids")] = ""
    sources: tuple[Source, ...]
    train: Split | None
    validation: Split | None

    @property
    def splits(self) -> dict[SplitName, Split]:
        """Return the splits that exist."""
        both: tuple[tuple[SplitName, Split | None], ...] = (("train", self.train), ("validation", self.validation))
        return {name: split for name, split in both if split is not None}

    @property
    def shows_tokens(self) -> bool:
        """Return whether any sequence has tokens that are never masked or trained on."""
        return any(split.shown_tokens > 0 for split in self.splits.values())

    def part(self, source: str) -> Manifest:
        """Return the manifest of a source by its name; a single data set has one source, without a name."""
        return self

    def without_shards(self) -> str:
        """Return the content of the manifest's file as one line of JSON, without the shards."""
        return self.model_dump_json(exclude={"train": {"shards"}, "validation": {"shards"}})


class MixedManifest(Manifest):
    """The combined manifest of a mixture: counts are summed, and `parts` are the manifests of its sources."""

    parts: dict[str, Manifest] = Field(exclude=True)

    def part(self, source: str) -> Manifest:
        """Return the manifest of a source by its name."""
        return self.parts[source]


def combine(parts: Mapping[str, Manifest]) -> Manifest:
    """Return the combined manifest of named sources, or the manifest of a single one without a name.

    ValueError: they do not fit together.
    """
    names, (first, *others) = list(parts), parts.values()
    if names == [""]:
        return first
    for name, part in zip(names[1:], others, strict=True):
        if problems := list(_differing_sources(part, first)):
            raise ValueError(
                f"data.sources: {name} does not fit {names[0]}: {'; '.join(problems)}; prepare them with equal options"
            )
    combined = {
        "document_multiple": math.gcd(*(part.document_multiple for part in parts.values())),
        "sources": tuple(source for part in parts.values() for source in part.sources),
        "train": _sum(part.train for part in parts.values()),
        "validation": _sum(part.validation for part in parts.values()),
    }
    return MixedManifest(**{**dict(first), **combined}, parts=dict(parts))


def _differing_sources(part: Manifest, first: Manifest) -> Iterator[str]:
    if part.seq_len != first.seq_len:
        yield f"its sequences have {part.seq_len} tokens, there {first.seq_len}"
    if part.vocabulary.bos_id != first.vocabulary.bos_id:
        begins = ["nothing" if m.vocabulary.bos_id is None else f"the id {m.vocabulary.bos_id}" for m in (part, first)]
        yield f"its documents begin with {begins[0]}, there with {begins[1]}"
    elif part.tokenizer_hash != first.tokenizer_hash or part.vocabulary != first.vocabulary:
        yield f"its tokeniser is {part.tokenizer_hash[:12]}, there {first.tokenizer_hash[:12]}"


def _sum(splits: Iterable[Split | None]) -> Split | None:
    present = [split for split in splits if split is not None]
    counts = {name: sum(getattr(split, name) for split in present) for name in Split.model_fields if name != "shards"}
    return Split(**counts) if present else None


def differences_of(old: Manifest, new: Manifest) -> list[str]:
    """Return the differences in options, sources and contents of two folders of prepared data, a line each."""
    lines = []
    options = ("seq_len", "document_multiple", "packing", "holdout", "seed", "field", "parse_special", "messages")
    for key in (*options, "tokens"):
        before, now = getattr(old, key), getattr(new, key)
        if before != now:
            lines.append(f"{key} is {'unset' if now == '' else now}, there {'unset' if before == '' else before}")
    if old.vocabulary.bos_id != new.vocabulary.bos_id:
        begins = ["nothing" if m.vocabulary.bos_id is None else f"the id {m.vocabulary.bos_id}" for m in (new, old)]
        lines.append(f"documents begin with {begins[0]}, there with {begins[1]}")
    if old.tokenizer_hash != new.tokenizer_hash:
        lines.append(f"the tokeniser is {new.tokenizer_hash[:12]}, there {old.tokenizer_hash[:12]}")
    before_by_path, now_by_path = ({source.path: source.bytes for source in m.sources} for m in (old, new))
    for path in [*now_by_path, *(path for path in before_by_path if path not in now_by_path)]:
        size, was = (sources.get(path) for sources in (now_by_path, before_by_path))
        if size != was:
            sizes = ["not read" if size is None else f"{size:,} bytes" for size in (size, was)]
            lines.append(f"{path} is {sizes[0]}, there {sizes[1]}")
    for name in old.splits.keys() & new.splits.keys():
        lines += _differing_contents(name, old.splits[name], new.splits[name])
    return lines


def _differing_contents(name: str, then: Split, split: Split) -> list[str]:
    if then.model_copy(update={"shards": NO_SHARDS}) != split.model_copy(update={"shards": NO_SHARDS}):
        counts = [f"{s.documents:,} documents in {s.sequences:,} sequences" for s in (split, then)]
        return [f"{name} has {counts[0]}, there {counts[1]}"]
    changed = split.shards.differing(then.shards)
    if changed and then.shards and split.shards:
        return [f"{name} has as many documents as there, but other contents in {changed} of {len(split.shards)} shards"]
    return []


def data_hash(manifest: Manifest, sources: Sequence[str] | None = None) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of what a training reads: the data that a resume position belongs to.

    sources: the sources of a mixture that count; default: all.

    Hashed are the tokeniser and the sequences, by the shard hashes that `load_manifest` reads. Not hashed are the paths
    of the text, how it was divided among sources, and how shards are packed and indexed.
    """
    if isinstance(manifest, MixedManifest):
        names = manifest.parts if sources is None else sources
        return _digits(json.dumps({name: data_hash(manifest.parts[name]) for name in names}, sort_keys=True))
    contents = {
        "tokenizer": manifest.tokenizer_hash,
        "vocabulary": manifest.vocabulary.model_dump(mode="json"),
        "seq_len": manifest.seq_len,
        "shards": {name: _Identities(split.shards) for name, split in manifest.splits.items()},
    }
    digest = hashlib.sha256()
    for piece in json.JSONEncoder(sort_keys=True).iterencode(contents):
        digest.update(piece.encode())
    return digest.hexdigest()[:16]


class _Identities(list[str]):
    """The `identities` of a table as a lazy list: the JSON encoder sees one at a time and not millions at once."""

    def __init__(self, table: ShardTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[str]:
        return self._table.identities()


def earlier_data_hash(manifest: Manifest) -> str:
    """Return the `data_hash` of earlier versions, of counts, paths and sizes; equal ones do not prove equal text."""
    return _digits(manifest.without_shards())


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@reader("prepared data")
def load_manifest(
    path: str | Path, remote: str | None = None, *, retry_minutes: float = DATA_RETRY_MINUTES
) -> Manifest:
    """Return the manifest of the prepared data in the folder `path`, with the shards of its indices.

    With `remote` (a folder or an object store that streaming reads), manifest, tokeniser and indices are fetched from
    there into `path`, the node-local cache; see `with_retries`. Raises FileNotFoundError if a manifest or index is
    missing, ValueError if one is invalid or the cache belongs to other data, OSError as `with_retries`.
    """
    folder = Path(path)
    file = folder / MANIFEST_FILE
    if remote is not None:
        return _fetched(remote, folder, retry_minutes)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; make the data with `bd3-scale data prepare`")
    manifest = parse_manifest(file, read_regular(file))
    for name in manifest.splits:
        if not (index := folder / name / INDEX_FILE).is_file():
            raise FileNotFoundError(f"{index} is missing; copy the data again")
    return with_shards(manifest, lambda name: read_index(folder / name / INDEX_FILE))


def check_seq_len(data: DataRecipe, manifest: Manifest) -> None:
    """Raise ValueError unless the data of one source were prepared with the recipe's sequence length."""
    if data.seq_len != manifest.seq_len:
        raise ValueError(
            f"data.seq_len={data.seq_len}, but {data.path} was prepared with seq_len={manifest.seq_len}; "
            f"set data.seq_len={manifest.seq_len} or prepare the text again"
        )


def load_sources(data: DataRecipe) -> Manifest:
    """Return the manifest of a recipe's data, combined if there are several sources; raises as `load_manifest`."""
    return combine(load_parts(data))


def load_parts(data: DataRecipe) -> dict[str, Manifest]:
    """Return the manifest of each source of a recipe's data, by its name."""
    return {
        name: load_manifest(own.path, own.remote, retry_minutes=own.retry_minutes)
        for name, own in data.by_source.items()
    }


def with_shards(manifest: Manifest, table_of: Callable[[SplitName], ShardTable]) -> Manifest:
    """Return a manifest with the shards of each split."""
    splits = manifest.splits.items()
    loaded: dict[str, Split] = {name: split.model_copy(update={"shards": table_of(name)}) for name, split in splits}
    return manifest.model_copy(update=loaded)


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless the data was prepared with `tokenizer`; its BOS may differ."""
    if manifest.tokenizer_hash not in (tokenizer.hash, _with_bos_of(manifest, tokenizer).hash):
        raise ValueError(
            f"the tokeniser (hash {tokenizer.hash[:12]}) is not the one that the data was prepared with "
            f"(hash {manifest.tokenizer_hash[:12]}); use the one saved in the folder of the data"
        )


def _with_bos_of(manifest: Manifest, tokenizer: Tokenizer) -> Tokenizer:
    bos_id = manifest.vocabulary.bos_id
    is_token = bos_id is None or tokenizer.name_of(bos_id) is not None
    return tokenizer.with_bos(bos_id) if is_token else tokenizer


def bos_option(vocabulary: Vocabulary) -> str:
    """Return the option that prepares data whose documents begin as in `vocabulary`."""
    return "--no-bos" if vocabulary.bos_id is None else "--bos"


def parse_manifest(place: Path | str, content: bytes) -> Manifest:
    """Return the manifest in `content`, which was read from `place`. ValueError: it is invalid."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(f"{place} is not a valid manifest ({in_one_line(error)}); prepare the data again") from error


def _fetched(remote: str, folder: Path, minutes: float) -> Manifest:
    from bd3_scale.data.mosaicml import CloudDownloader
    from bd3_scale.data.remote import fetch, with_retries

    downloader = with_retries(functools.partial(CloudDownloader.get, remote), remote, minutes)
    contents: dict[str, bytes] = {}
    with temporary_folder("fetched") as scratch:

        def fetched(name: str, parse: Callable[[str, bytes], T]) -> T:
            place = os.path.join(remote, name)

            def parse_and_keep(content: bytes) -> T:
                contents[name] = content
                return parse(place, content)

            return fetch(place, scratch / name, parse_and_keep, INDEX_LIMIT, minutes, downloader)

        manifest = fetched(MANIFEST_FILE, parse_manifest)
        tables: dict[SplitName, ShardTable] = {}
        for split in manifest.splits:
            name = os.path.join(split, INDEX_FILE)
            tables[split] = fetched(name, parse_index)
            if (folder / name).is_file() and read_index(folder / name) != tables[split]:
                raise ValueError(f"{folder} caches other data than {remote} holds; empty it or choose another folder")
        for name in TOKENIZER_FILES:
            fetched(name, lambda _, content: json.loads(content))
        if manifest.messages:
            fetched(CHAT_TEMPLATE, lambda _, content: content)
    # Only when all have come and been checked, so that the cache never mixes two data sets; and atomically, because
    # another process that uses the same cache may be reading them.
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)
    return with_shards(manifest, tables.__getitem__)
