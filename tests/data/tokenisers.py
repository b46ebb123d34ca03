"""Make small tokenisers of the kinds that people use, as folders that transformers reads, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from hypothesis import settings
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer

SENTENCES = (
    "The barge left the lock at six and the keeper wrote its name down.",
    "Nine crates of lemons stood on deck, and one of them was open.",
    "By noon the wind had turned, so they tied up below the old mill.",
    "def weight(crates, each=12):\n        return crates * each    \n",
    "for crate in deck:\n        print(crate.name, end=', ')\n",
    "Where the river bends there is a ferry; it costs nothing on market days.",
    "Früh am Morgen lag Nebel über der Schleuse, à peine visible.",
)
# What the kinds without bytes know; `▁` stands for a space there, and is no letter of a text.
LETTERS = "".join(sorted(set("".join(SENTENCES)) | set("0123456789[]()<>|/MASKxyzq_-é"))).replace(" ", "")
CHAT_NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n"
    "{% if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ turn['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A tokeniser and what `tokenizer_config.json` says beside it.

    special: tokens that are no text. lossless: text of `letters` (None: any) comes back as it was, but where
    `eats_space`, which loses one space at the beginning. filler: a token of one letter that no other text here has.
    """

    build: Callable[[], tokenizers.Tokenizer]
    eos: str
    special: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    letters: str | None = LETTERS
    lossless: bool = True
    eats_space: bool = False
    filler: str = "q"


def write_tokenizer(folder: Path, kind: Kind, **config: Any) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json` as Hugging Face does; `config` overrides the kind's."""
    return write_backend(folder, kind.build(), {"eos_token": kind.eos, **kind.config, **config})


def write_backend(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def transformers_tokenizer(folder: Path) -> Any:
    from bd3_scale.observe.libraries import without_broken_torchvision

    with without_broken_torchvision():
        from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@dataclass(frozen=True)
class Made:
    """A kind in a folder, as this package reads it and as transformers does."""

    kind: Kind
    folder: Path
    ours: Tokenizer
    theirs: Any


def make(folder: Path, name: str) -> Made:
    write_tokenizer(folder, KINDS[name])
    return Made(KINDS[name], folder, load_tokenizer(folder), transformers_tokenizer(folder))


# --- byte-level BPE


def byte_level(size: int = 340) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def bytes_alone() -> tokenizers.Tokenizer:
    return load_tokenizer("bytes")._backend


def chat_tokens() -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.add_special_tokens(list(CHAT_NAMES))
    return backend


def begins(backend: tokenizers.Tokenizer, single: str) -> tokenizers.Tokenizer:
    """Return `backend` with a template such as `<s> $A`, whose tokens are added if missing."""
    names = [name for name in dict.fromkeys(single.split()) if name != "$A"]
    backend.add_special_tokens(names)
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[(name, backend.token_to_id(name)) for name in names]
    )
    return backend


def begins_as_llama_3() -> tokenizers.Tokenizer:
    """Return a backend whose template follows a step that leaves spaces out of offsets, as Llama 3's."""
    backend = begins(byte_level(), "<|begin|> $A")
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), backend.post_processor])
    return backend


def prefixed() -> tokenizers.Tokenizer:
    """Return byte-level BPE that puts a space before every text."""
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


def knows_a_mask() -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.add_special_tokens(["<|mask|>", "<|im_end|>"])
    return backend


# --- pieces, where ▁ is a space


def metaspace(scheme: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=special, initial_alphabet=["▁", *LETTERS], show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def pieces_with_bytes() -> tokenizers.Tokenizer:
    """Of Llama 2's kind: a ▁ before every text, bytes for what has no piece, and a decoder that takes one space from
    the beginning.
    """
    learnt = tokenizers.Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learnt.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=180, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def unigram() -> tokenizers.Tokenizer:
    """Return unigram pieces of text in NFKC."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=180,
        special_tokens=["<unk>"],
        unk_token="<unk>",
        initial_alphabet=["▁", *LETTERS],
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_special_tokens(["<s>", "</s>"])  # behind the pieces: one among them is what text that spells it becomes
    return backend


def word_pieces() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=special, initial_alphabet=list(LETTERS.lower()), show_progress=False
    )
    backend.train_from_iterator([sentence.lower() for sentence in SENTENCES], trainer)
    return backend


PIECES = ("<unk>", "<s>", "</s>")
KINDS = {
    "bytes": Kind(bytes_alone, "<|endoftext|>", ("<|endoftext|>",), letters=None),
    "byte-level": Kind(byte_level, "<|endoftext|>", ("<|endoftext|>",), letters=None),
    "chat": Kind(chat_tokens, "<|im_end|>", CHAT_NAMES, {"chat_template": CHAT_TEMPLATE}, letters=None),
    "begins": Kind(
        lambda: begins(byte_level(), "<|begin|> $A"),
        "<|endoftext|>",
        ("<|endoftext|>", "<|begin|>"),
        {"bos_token": "<|begin|>"},
        letters=None,
    ),
    "llama-3": Kind(
        begins_as_llama_3,
        "<|endoftext|>",
        ("<|endoftext|>", "<|begin|>"),
        {"bos_token": "<|begin|>", "chat_template": CHAT_TEMPLATE},
        letters=None,
    ),
    "prefixed": Kind(
        prefixed, "<|endoftext|>", ("<|endoftext|>",), {"add_prefix_space": True}, letters=None, lossless=False
    ),
    "own mask": Kind(
        knows_a_mask,
        "<|endoftext|>",
        ("<|endoftext|>", "<|mask|>", "<|im_end|>"),
        {"mask_token": "<|mask|>"},
        letters=None,
    ),
    "metaspace-always": Kind(lambda: metaspace("always"), "</s>", PIECES, eats_space=True),
    "metaspace-first": Kind(lambda: metaspace("first"), "</s>", PIECES, eats_space=True),
    "llama-2": Kind(
        lambda: begins(pieces_with_bytes(), "<s> $A"), "</s>", PIECES, {"bos_token": "<s>"}, letters=None, filler="x"
    ),
    "unigram": Kind(unigram, "</s>", PIECES[1:], eats_space=True),
    "word-pieces": Kind(word_pieces, "[SEP]", ("[UNK]", "[CLS]", "[SEP]"), {"mask_token": "[MASK]"}, lossless=False),
}
LOSSLESS = tuple(name for name, kind in KINDS.items() if kind.lossless)


EXAMPLES = settings(max_examples=30)
WORDS = (
    " ",
    "  ",
    "\n",
    "\n\n",
    "Nine crates",
    " of lemons",
    "12",
    "    return x",
    "é",
    "日本",
    "\U0001f600",
    "a\u0301",
)
