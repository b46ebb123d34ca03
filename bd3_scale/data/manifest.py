"""What a folder of prepared data says of itself."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bd3_scale.data.chat import CHAT_TEMPLATE
from bd3_scale.data.tokenizer import TOKENIZER_FILES, Tokenizer
from bd3_scale.recipe.vocabulary import Vocabulary

MANIFEST_FILE = "manifest.json"
SplitName = Literal["train", "validation"]
Count = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _later(**constraints: Any) -> Any:
    """A field that older manifests lack, which mean its default; it is left out there, so that hashes stay."""
    return Field(exclude_if=lambda value: not value, **constraints)


class Source(_Frozen):
    """A file that documents were read from, with its size in bytes as stored."""

    path: str
    bytes: Count


class Split(_Frozen):
    """Counts of one split."""

    documents: Count
    sequences: Annotated[int, Field(ge=1)]
    counted_tokens: Annotated[Count, Field(description="tokens of its sequences that count for perplexity")]
    shown_tokens: Annotated[int, _later(ge=0, description="tokens of its sequences that are never masked")] = 0
    dropped_tokens: Annotated[Count, Field(description="tokens of sequences that were not kept: cut, or all shown")]
    text_bytes: Annotated[Count, Field(description="UTF-8 bytes of its documents, of conversations the assistant's")]


class Manifest(_Frozen):
    """Written last into a folder of prepared data, beside the tokeniser and the shards of each split."""

    format_version: Literal[1] = 1
    vocabulary: Vocabulary
    tokenizer_hash: str
    seq_len: Annotated[int, Field(ge=1)]
    document_multiple: Annotated[int, Field(ge=1)]
    holdout: Annotated[float, Field(ge=0, le=1)]
    seed: Count
    empty_documents: Count
    skipped_documents: Annotated[int, _later(ge=0, description="left out with --on-error skip")] = 0
    field: Annotated[str, _later(description="of the JSON lines, where it is not `text`")] = ""
    parse_special: Annotated[bool, _later(description="special tokens that documents spell are parsed")] = False
    messages: Annotated[bool, _later(description="conversations, of which the assistant's part is trained on")] = False
    sources: tuple[Source, ...]
    train: Split | None
    validation: Split | None

    @property
    def shows_tokens(self) -> bool:
        """Whether any sequence has tokens that are not trained on."""
        return any(split is not None and split.shown_tokens > 0 for split in (self.train, self.validation))


def differing(old: Manifest, new: Manifest) -> list[str]:
    """What was asked for or read otherwise for two folders of prepared data, a line each."""
    found = []
    for key in ("seq_len", "document_multiple", "holdout", "seed", "field", "parse_special", "messages"):
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
    for name, then, split in (("train", old.train, new.train), ("validation", old.validation, new.validation)):
        if then is not None and split is not None and then != split:
            counts = [f"{s.documents:,} documents in {s.sequences:,} sequences" for s in (split, then)]
            found.append(f"{name} has {counts[0]}, there {counts[1]}")
    return found


def data_hash(manifest: Manifest) -> str:
    """16 hexadecimal digits of the SHA-256 of a manifest: which data a position in them counts in."""
    return hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()[:16]


def load_manifest(path: str | Path, remote: str | None = None) -> Manifest:
    """The manifest of the prepared data in the folder `path`.

    With `remote` (a folder or an object store that streaming reads), manifest and tokeniser are fetched from there into
    `path`, the node-local cache. Raises FileNotFoundError if there is no manifest, ValueError if it is not valid or if
    the cache belongs to other data.
    """
    file = Path(path) / MANIFEST_FILE
    if remote is not None:
        _fetch(remote, Path(path))
    elif not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; make the data with `bd3-scale data prepare`")
    return parse_manifest(file, file.read_bytes())


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


def parse_manifest(file: Path, content: bytes) -> Manifest:
    """The manifest that `content` of `file` is. ValueError: it is none."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise ValueError(f"{file} is not a valid manifest ({problems}); prepare the data again") from error


def _fetch(remote: str, folder: Path) -> None:
    from bd3_scale.data.mosaicml import CloudDownloader

    names = [MANIFEST_FILE, *TOKENIZER_FILES]
    for name in names:
        # Every rank of a node fetches for itself, so each needs a file of its own until it is complete.
        aside = folder / f".{name}.{secrets.token_hex(4)}"
        CloudDownloader.direct_download(os.path.join(remote, name), str(aside))
        file = folder / name
        if name == MANIFEST_FILE and file.exists() and file.read_bytes() != aside.read_bytes():
            aside.unlink()
            raise ValueError(f"{folder} caches other data than {remote} holds; empty it or choose another folder")
        aside.replace(file)
        if name == MANIFEST_FILE and parse_manifest(file, file.read_bytes()).messages:
            names.append(CHAT_TEMPLATE)
