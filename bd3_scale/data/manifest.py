"""What a folder of prepared data says of itself."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bd3_scale.data.tokenizer import TOKENIZER_FILES, Tokenizer
from bd3_scale.recipe.vocabulary import Vocabulary

MANIFEST_FILE = "manifest.json"
SplitName = Literal["train", "validation"]
Count = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Source(_Frozen):
    """A file that documents were read from, with its size in bytes as stored."""

    path: str
    bytes: Count


class Split(_Frozen):
    """Counts of one split."""

    documents: Count
    sequences: Annotated[int, Field(ge=1)]
    counted_tokens: Annotated[Count, Field(description="tokens of its sequences that count for perplexity")]
    dropped_tokens: Annotated[Count, Field(description="tokens of the last, incomplete sequence, which is not kept")]
    text_bytes: Annotated[Count, Field(description="UTF-8 bytes of its documents")]


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
    sources: tuple[Source, ...]
    train: Split | None
    validation: Split | None


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
    return _parse(file, file.read_bytes())


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless the data was prepared with `tokenizer`."""
    if tokenizer.hash != manifest.tokenizer_hash:
        raise ValueError(
            f"the tokeniser (hash {tokenizer.hash[:12]}) is not the one that the data was prepared with "
            f"(hash {manifest.tokenizer_hash[:12]}); use the one saved in the folder of the data"
        )


def _parse(file: Path, content: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise ValueError(f"{file} is not a valid manifest ({problems}); prepare the data again") from error


def _fetch(remote: str, folder: Path) -> None:
    from bd3_scale.data.mosaicml import CloudDownloader

    for name in (MANIFEST_FILE, *TOKENIZER_FILES):
        # Every rank of a node fetches for itself, so each needs a file of its own until it is complete.
        aside = folder / f".{name}.{secrets.token_hex(4)}"
        CloudDownloader.direct_download(os.path.join(remote, name), str(aside))
        file = folder / name
        if name == MANIFEST_FILE and file.exists() and file.read_bytes() != aside.read_bytes():
            aside.unlink()
            raise ValueError(f"{folder} caches other data than {remote} holds; empty it or choose another folder")
        aside.replace(file)
