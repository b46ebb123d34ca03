"""Tokenisers: bytes, byte-level BPE trained here, and any Hugging Face `tokenizer.json`, behind one class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers  # type: ignore[import-untyped]
from tokenizers import decoders, models, pre_tokenizers, trainers

from bd3_scale.data.sources import DocumentReader
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.resilience.files import new_folder

EOS = "<|endoftext|>"
MASK = "[MASK]"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Tokenizer:
    """Text to token ids and back, with the end-of-document and mask ids that text never becomes.

    `eos` must be a token of `backend`. `mask` is added behind the last id where `backend` does not know it, so that the
    mask lies outside the clean vocabulary. Raises ValueError where either can be spelled in text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos: str = EOS, mask: str = MASK) -> None:
        eos_id = backend.token_to_id(eos)
        if eos_id is None:
            raise ValueError(f"the end-of-document token {eos!r} is not in the vocabulary")
        backend.no_truncation()
        backend.no_padding()
        taken = set(backend.get_vocab(with_added_tokens=True).values())
        is_new = backend.token_to_id(mask) is None
        backend.add_special_tokens([eos, mask])
        if is_new and backend.token_to_id(mask) in taken:
            # The library numbers a new token by their count, which is an id in use where others are not.
            raise ValueError(
                f"the vocabulary leaves ids out, and the new token {mask!r} would take the id "
                f"{backend.token_to_id(mask)} of another one; name an unused token of the vocabulary as the mask"
            )
        backend.encode_special_tokens = True
        self._backend, self._eos, self._mask = backend, eos, mask
        ids = set(backend.get_vocab(with_added_tokens=True).values())
        self._unused_ids = set(range(max(ids))) - ids
        self.vocabulary = Vocabulary(size=max(ids) + 1, eos_id=eos_id, mask_id=backend.token_to_id(mask))
        for token in (eos, mask):
            if backend.token_to_id(token) in self.encode(token):
                raise ValueError(
                    f"text that spells {token!r} would become that special token; choose another tokeniser"
                )

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[tokenizers.Tokenizer, str, str]]:
        # A pickled backend forgets `encode_special_tokens`, and text that spells the mask would become it.
        return Tokenizer, (self._backend, self._eos, self._mask)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without any special token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores unless TOKENIZERS_PARALLELISM=false."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_eos: bool = False) -> str:
        """Text of `ids`: the mask shows as its name, as the end of document does unless `skip_eos`; bytes that are not
        UTF-8 become replacement characters. Raises ValueError for an id that is not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocabulary.size or i in self._unused_ids:
                raise ValueError(f"token id {i} is not in the vocabulary of {self.vocabulary.size} ids")
        kept = [i for i in ids if not (skip_eos and i == self.vocabulary.eos_id)]
        return self._backend.decode(kept, skip_special_tokens=False)

    def name_of(self, token_id: int) -> str | None:
        """The token of an id, or None where it has none."""
        return self._backend.id_to_token(token_id)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of everything that decides which ids a text becomes."""
        canonical = json.dumps([json.loads(self._backend.to_str()), self._config()], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `load_tokenizer` and transformers read."""
        folder.mkdir(parents=True, exist_ok=True)
        contents = (self._backend.to_str(pretty=True), json.dumps(self._config(), indent=2))
        for name, content in zip(TOKENIZER_FILES, contents, strict=True):
            (folder / name).write_text(content + "\n", encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._eos,
            "mask_token": self._mask,
            "clean_up_tokenization_spaces": False,
        }


def load_tokenizer(source: str | Path, mask: str | None = None) -> Tokenizer:
    """The tokeniser `source` names: `bytes`, a `tokenizer.json`, or a folder that holds one (a Hugging Face model, a
    trained tokeniser, prepared data).

    A `tokenizer_config.json` beside it must declare `eos_token` and may declare `mask_token`; without one, the end of
    document is `<|endoftext|>`. `mask` goes before a declared one. `bytes` has ids 0 to 255 for the bytes, 256 for the
    end of document, 257 for the mask.
    Raises FileNotFoundError if there is no such file, ValueError if it cannot serve.
    """
    if str(source) == "bytes":
        return _byte_tokenizer()
    path = Path(source)
    path = path / TOKENIZER_FILES[0] if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no tokeniser at {path}; give `bytes`, a tokenizer.json or a folder that holds one")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is not a tokeniser that `tokenizers` can read: {error}") from error
    config_path = path.with_name(TOKENIZER_FILES[1])
    config = _read_config(config_path) if config_path.is_file() else {"eos_token": EOS}
    eos, mask = _token(config.get("eos_token")), mask or _token(config.get("mask_token"))
    if eos is None:
        raise ValueError(f'{config_path} declares no end-of-document token; add "eos_token" to it')
    try:
        return Tokenizer(backend, eos, mask or MASK)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def train_tokenizer(sources: Sequence[str | Path], out: Path, vocab_size: int, *, progress: bool = True) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) on documents; save it to the new folder `out`.

    `vocab_size` counts the 256 bytes, the merges and `<|endoftext|>`; the mask comes on top. The same text gives the
    same tokeniser. Raises ValueError if the text is too short for so many tokens.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and the end of document need 257")
    backend = _byte_level(tokenizers.Tokenizer(models.BPE()), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    reader = DocumentReader(sources)
    with new_folder(Path(out)) as folder:
        backend.train_from_iterator((document.text for document in reader), trainer)
        if backend.get_vocab_size() < vocab_size:
            raise ValueError(
                f"the text yields only {backend.get_vocab_size()} tokens, not vocab_size={vocab_size}; "
                f"ask for fewer or give more text"
            )
        tokenizer = Tokenizer(backend)
        tokenizer.save(folder)
    return tokenizer


def _byte_tokenizer() -> Tokenizer:
    # BPE without merges over GPT-2's byte-level alphabet, so that bytes save and load like every other tokeniser.
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    backend = _byte_level(tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[])), use_regex=False)
    backend.add_special_tokens([EOS])
    return Tokenizer(backend)


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself where it is printable, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def _byte_level(backend: tokenizers.Tokenizer, use_regex: bool) -> tokenizers.Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config


def _token(declared: Any) -> str | None:
    # Hugging Face writes a special token as a string or as an object with its content.
    return declared.get("content") if isinstance(declared, dict) else declared
