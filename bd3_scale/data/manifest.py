"""What a folder of prepared data says of itself."""

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


def _later(default: Any = None, **constraints: Any) -> Any:
    """A field that older manifests lack, which mean its default (`default`, or what is false); it is left out there, so
    that hashes stay.
    """
    return Field(exclude_if=lambda value: not value or value == default, **constraints)


class Source(_Frozen):
    """A file that documents were read from, with its size in bytes as stored."""

    path: str
    bytes: Count


class Counts(_Frozen):
    """Counts of one split, or of what one task wrote of it."""

    documents: Count
    sequences: Count
    counted_tokens: Annotated[Count, Field(description="tokens of its sequences that count for perplexity")]
    shown_tokens: Annotated[int, _later(ge=0, description="tokens of its sequences that are never masked")] = 0
    dropped_tokens: Annotated[
        Count, Field(description="tokens of sequences that were not kept: incomplete, or all shown")
    ]
    text_bytes: Annotated[Count, Field(description="UTF-8 bytes of its documents, of conversations the assistant's")]


class Split(Counts):
    """One split, with what `load_manifest` finds in its index; the folder's own manifest has the counts."""

    sequences: Annotated[int, Field(ge=1)]
    shards: Annotated[ShardField, _later(description="XXH64 and samples of each, see `identities`")] = NO_SHARDS


class Manifest(_Frozen):
    """Written last into a folder of prepared data, beside the tokeniser and the shards of each split."""

    format_version: Literal[1] = 1
    vocabulary: Vocabulary
    tokenizer_hash: str
    seq_len: Annotated[int, Field(ge=1)]
    document_multiple: Annotated[int, Field(ge=1)]
    packing: Annotated[Packing, _later("concatenate")] = "concatenate"
    holdout: Annotated[float, Field(ge=0, le=1)]
    seed: Count
    empty_documents: Count
    skipped_documents: Annotated[int, _later(ge=0, description="left out with --on-error skip")] = 0
    field: Annotated[str, _later(description="of the JSON lines, where it is not `text`")] = ""
    parse_special: Annotated[bool, _later(description="special tokens that documents spell are parsed")] = False
    messages: Annotated[bool, _later(description="conversations, of which the assistant's part is trained on")] = False
    tokens: Annotated[str, _later(description="the format of sources that held ids")] = ""
    sources: tuple[Source, ...]
    train: Split | None
    validation: Split | None

    @property
    def splits(self) -> dict[SplitName, Split]:
        """Return the splits that there are."""
        both: tuple[tuple[SplitName, Split | None], ...] = (("train", self.train), ("validation", self.validation))
        return {name: split for name, split in both if split is not None}

    @property
    def shows_tokens(self) -> bool:
        """Return whether any sequence has tokens that are not trained on."""
        return any(split.shown_tokens > 0 for split in self.splits.values())

    def part(self, source: str) -> Manifest:
        """Return that of a source by its name; of data that are alone there is one, without a name."""
        return self

    def without_shards(self) -> str:
        """Return it as one line of JSON that holds what its file does: what the indices say of shards is left out."""
        return self.model_dump_json(exclude={"train": {"shards"}, "validation": {"shards"}})


class MixedManifest(Manifest):
    """What several data sets that are mixed say together: counts are summed, and `parts` are their own."""

    parts: dict[str, Manifest] = Field(exclude=True)

    def part(self, source: str) -> Manifest:
        return self.parts[source]


def mixed(parts: Mapping[str, Manifest]) -> Manifest:
    """Return what the sources of a run say together, by their names; of one without a name its own.

    ValueError: they do not fit together.
    """
    names, (first, *others) = list(parts), parts.values()
    if names == [""]:
        return first
    for name, part in zip(names[1:], others, strict=True):
        if problems := list(_differing_sources(part, first)):
            raise ValueError(
                f"data.sources: {name} does not go with {names[0]}: {'; '.join(problems)}; prepare them alike"
            )
    together = {
        "document_multiple": math.gcd(*(part.document_multiple for part in parts.values())),
        "sources": tuple(source for part in parts.values() for source in part.sources),
        "train": _sum(part.train for part in parts.values()),
        "validation": _sum(part.validation for part in parts.values()),
    }
    return MixedManifest(**{**dict(first), **together}, parts=dict(parts))


def _differing_sources(part: Manifest, first: Manifest) -> Iterator[str]:
    if part.seq_len != first.seq_len:
        yield f"its sequences have {part.seq_len} tokens, there {first.seq_len}"
    if part.vocabulary.bos_id != first.vocabulary.bos_id:
        begins = ["nothing" if m.vocabulary.bos_id is None else f"the id {m.vocabulary.bos_id}" for m in (part, first)]
        yield f"its documents begin with {begins[0]}, there with {begins[1]}"
    elif part.tokenizer_hash != first.tokenizer_hash or part.vocabulary != first.vocabulary:
        yield f"its tokeniser is {part.tokenizer_hash[:12]}, there {first.tokenizer_hash[:12]}"


def _sum(splits: Iterable[Split | None]) -> Split | None:
    found = [split for split in splits if split is not None]
    counts = {name: sum(getattr(split, name) for split in found) for name in Split.model_fields if name != "shards"}
    return Split(**counts) if found else None


def differing(old: Manifest, new: Manifest) -> list[str]:
    """Return what was asked for or read otherwise for two folders of prepared data, a line each."""
    found = []
    asked = ("seq_len", "document_multiple", "packing", "holdout", "seed", "field", "parse_special", "messages")
    for key in (*asked, "tokens"):
        before, now = getattr(old, key), getattr(new, key)
        if before != now:
            found.append(f"{key} is {'unset' if now == '' else now}, there {'unset' if before == '' else before}")
    if old.vocabulary.bos_id != new.vocabulary.bos_id:
        begins = ["nothing" if m.vocabulary.bos_id is None else f"the id {m.vocabulary.bos_id}" for m in (new, old)]
        found.append(f"documents begin with {begins[0]}, there with {begins[1]}")
    if old.tokenizer_hash != new.tokenizer_hash:
        found.append(f"the tokeniser is {new.tokenizer_hash[:12]}, there {old.tokenizer_hash[:12]}")
    before_by_path, now_by_path = ({source.path: source.bytes for source in m.sources} for m in (old, new))
    for path in [*now_by_path, *(path for path in before_by_path if path not in now_by_path)]:
        size, was = (sources.get(path) for sources in (now_by_path, before_by_path))
        if size != was:
            sizes = ["not read" if size is None else f"{size:,} bytes" for size in (size, was)]
            found.append(f"{path} is {sizes[0]}, there {sizes[1]}")
    for name in old.splits.keys() & new.splits.keys():
        found += _differing_contents(name, old.splits[name], new.splits[name])
    return found


def _differing_contents(name: str, then: Split, split: Split) -> list[str]:
    if then.model_copy(update={"shards": NO_SHARDS}) != split.model_copy(update={"shards": NO_SHARDS}):
        counts = [f"{s.documents:,} documents in {s.sequences:,} sequences" for s in (split, then)]
        return [f"{name} has {counts[0]}, there {counts[1]}"]
    changed = split.shards.differing(then.shards)
    if changed and then.shards and split.shards:
        return [f"{name} has as many documents as there, but other contents in {changed} of {len(split.shards)} shards"]
    return []


def data_hash(manifest: Manifest, sources: Sequence[str] | None = None) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of what a training reads: which data a position counts in.

    sources: of data that are mixed, those that count; default: all.

    These are the sequences, by the hashes of the shards that `load_manifest` finds, and the tokeniser; not where the
    text lay, how it was divided among sources, or how shards are packed and indexed.
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
    """What `ShardTable.identities` says, as a list of which the encoder of JSON sees one at a time."""

    def __init__(self, table: ShardTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[str]:
        return self._table.identities()


def earlier_data_hash(manifest: Manifest) -> str:
    """Return the `data_hash` of earlier versions, of counts, paths and sizes: equal ones do not prove equal text."""
    return _digits(manifest.without_shards())


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@reader("prepared data")
def load_manifest(
    path: str | Path, remote: str | None = None, *, retry_minutes: float = DATA_RETRY_MINUTES
) -> Manifest:
    """Return the manifest of the prepared data in the folder `path`, with what the indices say of the shards.

    With `remote` (a folder or an object store that streaming reads), manifest, tokeniser and indices are fetched from
    there into `path`, the node-local cache; see `patiently`. Raises FileNotFoundError if there is no manifest or index,
    ValueError if one is not valid or if the cache belongs to other data, OSError as `patiently` does.
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
    """Return what the data of a recipe say, `mixed` where they are several. Raises as that and `load_manifest` do."""
    return mixed(load_parts(data))


def load_parts(data: DataRecipe) -> dict[str, Manifest]:
    """Return what each source of a recipe's data says, by its name."""
    return {
        name: load_manifest(own.path, own.remote, retry_minutes=own.retry_minutes)
        for name, own in data.by_source.items()
    }


def with_shards(manifest: Manifest, table_of: Callable[[SplitName], ShardTable]) -> Manifest:
    """Return a manifest with what the index of each split says."""
    splits = manifest.splits.items()
    found: dict[str, Split] = {name: split.model_copy(update={"shards": table_of(name)}) for name, split in splits}
    return manifest.model_copy(update=found)


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless the data was prepared with `tokenizer`; what it begins texts with may be another."""
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
    """How to prepare data that begin documents as `vocabulary` says."""
    return "--no-bos" if vocabulary.bos_id is None else "--bos"


def parse_manifest(place: Path | str, content: bytes) -> Manifest:
    """Return the manifest that `content` of `place` is. ValueError: it is none."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(f"{place} is not a valid manifest ({in_one_line(error)}); prepare the data again") from error


def _fetched(remote: str, folder: Path, minutes: float) -> Manifest:
    from bd3_scale.data.mosaicml import CloudDownloader
    from bd3_scale.data.remote import fetch, patiently

    downloader = patiently(functools.partial(CloudDownloader.get, remote), remote, minutes)
    contents: dict[str, bytes] = {}
    with temporary_folder("fetched") as aside:

        def fetched(name: str, parse: Callable[[str, bytes], T]) -> T:
            place = os.path.join(remote, name)

            def kept(content: bytes) -> T:
                contents[name] = content
                return parse(place, content)

            return fetch(place, aside / name, kept, INDEX_LIMIT, minutes, downloader)

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
    # Another process that uses the same cache may be reading.
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)
    return with_shards(manifest, tables.__getitem__)
