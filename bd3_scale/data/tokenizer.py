"""Tokenise text: bytes, byte-level BPE trained here, and any Hugging Face `tokenizer.json`, behind one class.

There are three ways from text to ids. In a training document special tokens are plain text: `<|endoftext|>` is just
letters. In a prompt they are parsed, as the tokeniser itself does. In neither can text become the mask. Text around
gaps is one text: after a gap no prefix (such as SentencePiece's space) is added.
"""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import tokenizers  # type: ignore[import-untyped]
from tokenizers import decoders, models, pre_tokenizers, trainers

from bd3_scale.data.sources import DOCUMENT_BYTES, DocumentReader
from bd3_scale.data.tokenizer_json import beginning_with, template_of, without_mask, without_prefix
from bd3_scale.recipe.vocabulary import MOST_IDS, Vocabulary
from bd3_scale.resilience.files import new_folder, read_object
from bd3_scale.resilience.foreign import file_in, for_transformers
from bd3_scale.resilience.readers import panics_as_value_errors, read_regular, reader

EOS = "<|endoftext|>"
MASK = "[MASK]"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SENTENCEPIECE_FILE = "tokenizer.model"
# Classes of transformers that add BOS by a switch of tokenizer_config.json, whatever tokenizer.json says, with the
# switch's default.
_CLASSES_WITH_SWITCH = {
    "LlamaTokenizer": True,
    "CodeLlamaTokenizer": True,
    "GemmaTokenizer": True,
    "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}
_CANNOT_ENCODE = "the tokeniser cannot encode a text; choose another, or leave the text out"
INCOMPLETE = "\ufffd"


class Tokenizer:
    """Text to token ids and back, with ids for EOS and mask that no text is encoded as.

    `eos` must be a token of `backend`. `mask` is added after the last id if `backend` does not know it, so that the
    mask lies outside the clean vocabulary. `bos` names the token for `--bos` if the template of `backend` adds none.
    `vocabulary.bos_id` is what that template puts before a text, see `with_bos`.
    Raises ValueError if plain text can be encoded as EOS or mask.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos: str = EOS, mask: str = MASK, bos: str | None = None) -> None:
        eos_id = backend.token_to_id(eos)
        if eos_id is None:
            raise ValueError(f"the end-of-document token {eos!r} is not in the vocabulary")
        last = max(backend.get_vocab(with_added_tokens=True).values())
        if last >= MOST_IDS:
            raise ValueError(
                f"the token {backend.id_to_token(last)!r} has the id {last}, and ids end at {MOST_IDS - 1}"
            )
        backend.no_truncation()
        backend.no_padding()
        taken = set(backend.get_vocab(with_added_tokens=True).values())
        is_new = backend.token_to_id(mask) is None
        backend.add_special_tokens([eos, mask])
        if is_new and backend.token_to_id(mask) in taken:
            # The library numbers new tokens by the count of all tokens; with gaps, that id may be taken.
            raise ValueError(
                f"the vocabulary leaves ids out, and the new token {mask!r} would take the id "
                f"{backend.token_to_id(mask)} of another one; name an unused token of the vocabulary as the mask"
            )
        backend.encode_special_tokens = True
        self._backend, self._eos, self._mask, self._bos = backend, eos, mask, bos
        ids = set(backend.get_vocab(with_added_tokens=True).values())
        self._ids = ids
        before, self._after = template_of(backend)
        self._before = tuple(before)
        self.vocabulary = Vocabulary(
            size=max(ids) + 1,
            eos_id=eos_id,
            mask_id=backend.token_to_id(mask),
            bos_id=before[0] if len(before) == 1 else None,
        )
        for token in (eos, mask):
            if backend.token_to_id(token) in self.encode(token):
                raise ValueError(
                    f"text that spells {token!r} would become that special token; choose another tokeniser"
                )

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[tokenizers.Tokenizer, str, str, str | None]]:
        # A pickled backend loses `encode_special_tokens`, and text that spells the mask would then become it.
        return Tokenizer, (self._backend, self._eos, self._mask, self._bos)

    @property
    def declared_bos_id(self) -> int | None:
        """Return the BOS id of `tokenizer_config.json`, whether the template adds it or not, or None."""
        declared = None if self._bos is None else self._backend.token_to_id(self._bos)
        return self.vocabulary.bos_id if declared is None else int(declared)

    def with_bos(self, bos_id: int | None) -> Tokenizer:
        """Return the tokeniser whose template puts `bos_id`, or nothing, before a text; itself if it does so already.

        ValueError: no token has that id.
        """
        if self._before == (() if bos_id is None else (bos_id,)) and not self._after:
            return self
        name = None if bos_id is None else self.name_of(bos_id)
        if bos_id is not None and name is None:
            raise ValueError(f"bos_id={bos_id} is not a token of the tokeniser")
        content = beginning_with(json.loads(self._backend.to_str()), name, bos_id)
        return Tokenizer(_from_json(content), self._eos, self._mask, self._bos if name is None else name)

    def with_bos_switch(self, bos: bool) -> Tokenizer:
        """Return `with_bos` of the BOS that its files declare, or without BOS. ValueError: they declare none."""
        if bos and self.declared_bos_id is None:
            raise ValueError(f"the tokeniser declares no BOS: add a bos_token to its {TOKENIZER_FILES[1]}")
        return self.with_bos(self.declared_bos_id if bos else None)

    def checked_template(self) -> Tokenizer:
        """Return the tokeniser with a template that adds one BOS or nothing, as data and checkpoints record it.

        Tokens that its template puts after a text are dropped: documents get their own EOS.
        ValueError: the template puts several tokens before a text.
        """
        if len(self._before) > 1:
            names = " ".join(str(self.name_of(i)) for i in self._before)
            raise ValueError(
                f"the tokeniser begins every text with {names}, and documents begin with one token or none: decide "
                "with --bos or --no-bos"
            )
        return self.with_bos(self.vocabulary.bos_id)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as plain text, without special tokens and BOS."""
        with panics_as_value_errors(_CANNOT_ENCODE):
            return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        """Return the ids of texts by `encode` or `encode_special`, on all cores unless TOKENIZERS_PARALLELISM=false."""
        backend = self._parsing if parse_special else self._backend
        with panics_as_value_errors(_CANNOT_ENCODE):
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_special(self, text: str) -> list[int]:
        """Return the ids of `text`, in which special tokens except the mask are parsed; without BOS."""
        return self.encode_spans(text)[0]

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `encode_special`, and the position of each token in `text`, in characters."""
        with panics_as_value_errors(_CANNOT_ENCODE):
            encoding = self._parsing.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_prompt(self, text: str, *, gaps: bool = False) -> list[int]:
        """Return the ids of a prompt: BOS if documents have it, then the text with special tokens parsed.

        gaps: each `[MASK]` is a gap of one token, and the text around gaps is one text.
        """
        begin = [] if self.vocabulary.bos_id is None else [self.vocabulary.bos_id]
        first, *rest = text.split(MASK) if gaps else [text]
        ids = begin + self.encode_special(first)
        for piece in rest:
            with panics_as_value_errors(_CANNOT_ENCODE):
                ids += [self.vocabulary.mask_id, *self._inner.encode(piece, add_special_tokens=False).ids]
        return ids

    def decode(self, ids: Iterable[int], skip_eos: bool = False) -> str:
        """Return the text of `ids`. The mask becomes its name, and so does EOS unless `skip_eos`.

        Bytes that are not UTF-8 become replacement characters. Raises ValueError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if i not in self._ids:
                raise ValueError(f"token id {i} is not in the vocabulary of {self.vocabulary.size} ids")
        kept = [i for i in ids if not (skip_eos and i == self.vocabulary.eos_id)]
        return self._backend.decode(kept, skip_special_tokens=False)

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` from its beginning, without BOS."""
        return self.decode(ids[1:] if ids and ids[0] == self.vocabulary.bos_id else ids)

    def continuation(self, before: Sequence[int], new: Sequence[int], *, final: bool = True) -> str:
        """Return what `new` adds to the text of `before`: the decoded whole without the decoded beginning.

        Unless `final`, bytes at the end that are no whole character yet are held back. If the tokens spell UTF-8, the
        text of more tokens then begins with the text of fewer.
        """
        ids = [*before, *new]
        begin, whole = self.text_of(before), self.text_of(ids)
        if not final and whole.endswith(INCOMPLETE):
            # A character has at most four bytes; some decoders also replace whole characters before an incomplete one.
            ends = range(len(ids), max(len(ids) - 4, len(before) - 1), -1)
            whole = max((self.text_of(ids[:end]).rstrip(INCOMPLETE) for end in ends), key=len)
        shared = next((i for i, (a, b) in enumerate(zip(begin, whole, strict=False)) if a != b), len(begin))
        return whole[shared:]

    def name_of(self, token_id: int) -> str | None:
        """Return the token of an id, or None if it has none."""
        return self._backend.id_to_token(token_id)

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """Return a backend that parses special tokens, but with an unguessable name for the mask."""
        content = without_mask(json.loads(self._backend.to_str()), self._mask, secrets.token_hex(16))
        # The post-processor adds nothing here, but may trim spaces off the offsets.
        backend = _from_json({**content, "post_processor": None})
        if self.vocabulary.mask_id in backend.encode(self._mask, add_special_tokens=False).ids:
            raise ValueError(f"a prompt that spells {self._mask!r} would become the mask; choose another tokeniser")
        return backend

    @cached_property
    def _inner(self) -> tokenizers.Tokenizer:
        """Return a backend like `_parsing` for text that continues: it adds no prefix."""
        return _from_json(without_prefix(json.loads(self._parsing.to_str())))

    @property
    def hash(self) -> str:
        """Return the SHA-256 (hex) of everything that decides which ids a text becomes."""
        canonical = json.dumps([json.loads(self._backend.to_str()), self._config()], sort_keys=True)
        return sha256(canonical.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `load_tokenizer` and transformers read."""
        folder.mkdir(parents=True, exist_ok=True)
        bos = {} if self.declared_bos_id is None else {"bos_token": self.name_of(self.declared_bos_id)}
        contents = (self._backend.to_str(pretty=True), json.dumps(self._config() | bos, indent=2))
        for name, content in zip(TOKENIZER_FILES, contents, strict=True):
            (folder / name).write_text(content + "\n", encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._eos,
            "mask_token": self._mask,
            "clean_up_tokenization_spaces": False,
        }


def _from_json(content: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@reader("a tokeniser", path="source")
def load_tokenizer(source: str | Path, mask: str | None = None) -> Tokenizer:
    """Return a tokeniser by name: `bytes`, a `tokenizer.json`, or a folder with one (a Hugging Face model, a trained
    tokeniser, prepared data).

    A `tokenizer_config.json` in the folder must declare `eos_token` and may declare `mask_token`; without that file,
    EOS is `<|endoftext|>`. `mask` overrides a declared one. `bytes` has ids 0 to 255 for the bytes, 256 for EOS, 257
    for the mask. A folder with `tokenizer.model` alone is converted if transformers can.
    Raises FileNotFoundError if there is no such file, ValueError if it is unsuitable.
    """
    if str(source) == "bytes":
        return _byte_tokenizer()
    given = Path(source)
    folder, name = (given, TOKENIZER_FILES[0]) if given.is_dir() else (given.parent, given.name)
    path = folder / name
    there, pieces = (file_in(folder, file) is not None for file in (name, SENTENCEPIECE_FILE))
    if pieces and (name == SENTENCEPIECE_FILE or not there):
        backend = converted_sentencepiece(folder / SENTENCEPIECE_FILE)
    elif not there:
        raise FileNotFoundError(f"no tokeniser at {path}; give `bytes`, a tokenizer.json or a folder that holds one")
    else:
        backend = _read_backend(path)
    config_path = file_in(folder, TOKENIZER_FILES[1])
    config = {"eos_token": EOS} if config_path is None else read_object(config_path)
    eos, mask = text_of_token(config.get("eos_token")), mask or text_of_token(config.get("mask_token"))
    if eos is None:
        raise ValueError(f'{config_path} declares no end-of-document token; add "eos_token" to it')
    try:
        return _with_class_bos(Tokenizer(backend, eos, mask or MASK, text_of_token(config.get("bos_token"))), config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _with_class_bos(tokenizer: Tokenizer, config: dict[str, Any]) -> Tokenizer:
    """Apply the BOS switch of `tokenizer_config.json`, if the tokeniser's class in transformers has one."""
    default = _CLASSES_WITH_SWITCH.get(str(config.get("tokenizer_class")).removesuffix("Fast"))
    if default is None:
        return tokenizer
    return tokenizer.with_bos(tokenizer.declared_bos_id if config.get("add_bos_token", default) else None)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    data = read_regular(path)
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises no more specific class
        raise ValueError(f"{path} is not a tokeniser that `tokenizers` can read: {error}") from error


def converted_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """Return the tokeniser that transformers converts from a `tokenizer.model` and the configuration in its folder.

    ValueError: a package is missing, or transformers knows no conversion; the message says what to do.
    """
    from bd3_scale.observe.libraries import without_broken_torchvision

    way_out = "make a tokenizer.json of it where they are installed: python -c " + shlex.quote(
        "from transformers import AutoTokenizer; "
        f"AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained('FOLDER')"
    )
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if missing:
        raise ValueError(
            f"{path} is of SentencePiece, and its conversion needs {' and '.join(missing)}: "
            f"pip install 'bd3_scale[sentencepiece]', or {way_out}"
        )
    with without_broken_torchvision(), for_transformers(path.parent) as folder:
        from transformers import AutoTokenizer

        try:
            converted = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            return converted.backend_tokenizer
        except (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            raise ValueError(f"transformers cannot convert {path} ({error}); {way_out}") from error


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even its parent package
        return False


def train_tokenizer(
    sources: Sequence[str | Path],
    out: Path,
    vocab_size: int,
    *,
    progress: bool = True,
    field: str = "text",
    on_error: Literal["stop", "skip"] = "stop",
    max_document_bytes: int = DOCUMENT_BYTES,
) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) on documents; save it to the new folder `out`.

    `vocab_size` counts the 256 bytes, the merges and `<|endoftext|>`; the mask is extra. Equal text gives an equal
    tokeniser. Raises ValueError if the text is too short for so many tokens.
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
    reader = DocumentReader(sources, field, on_error, max_bytes=max_document_bytes)
    with new_folder(Path(out)) as folder:
        backend.train_from_iterator((document.text for document in reader), trainer)
        if backend.get_vocab_size() < vocab_size:
            raise ValueError(
                f"the text yields only {backend.get_vocab_size()} tokens, not vocab_size={vocab_size}; "
                f"ask for fewer or give more text"
            )
        tokenizer = Tokenizer(backend)
        tokenizer.save(folder)
    reader.left_out.log()
    return tokenizer


def _byte_tokenizer() -> Tokenizer:
    # BPE without merges over GPT-2's byte-level alphabet: so bytes are saved and loaded like every other tokeniser.
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    backend = _byte_level(tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[])), use_regex=False)
    backend.add_special_tokens([EOS])
    return Tokenizer(backend)


def _byte_alphabet() -> list[str]:
    """Return GPT-2's character for each byte: itself if printable, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def _byte_level(backend: tokenizers.Tokenizer, use_regex: bool) -> tokenizers.Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend


def text_of_token(declared: Any) -> str | None:
    """Return a special token as Hugging Face declares one: a string, or an object with `content`; None otherwise."""
    text = declared.get("content") if isinstance(declared, dict) else declared
    return text if isinstance(text, str) else None
