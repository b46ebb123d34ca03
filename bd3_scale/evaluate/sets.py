"""Texts to measure perplexity on: the zero-shot sets of the literature by name, and files as they stand.

A set is a function that makes plain text of the corpus's, registered with `@text_sets.register("name")`; its docstring
says which corpus it is.
A file is read as training data is: a `.txt` is one document, a `.jsonl` has one a line. Tokenised corpora are put back
into plain text first, as MDLM and BD3-LM do (Sahoo et al., NeurIPS 2024; Arriola et al., ICLR 2025, section 6), since
a model trained on text has never seen `@-@` or ` n't`; the rules are our own, regular and few.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bd3_scale.data.manifest import Manifest
from bd3_scale.data.prepare import prepare
from bd3_scale.data.sources import DocumentReader
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.registry import text_sets

Rules = tuple[tuple[str, str], ...]

_CONTRACTIONS: Rules = ((r" (n't|'(?:s|t|re|ve|ll|d|m))\b", r"\1"),)
_PUNCTUATION: Rules = (
    (r" ([.,:;!?%])(?=\s|$)", r"\1"),
    (r"([(\[{]) ", r"\1"),
    (r" ([)\]}])", r"\1"),
    (r'" ([^"\n]*) "', r'"\1"'),
    (r"' ([^'\n]*) '(?!\w)", r"'\1'"),
    (r"([$£]) (?=\d)", r"\1"),
)
_WIKITEXT: Rules = (
    (r" @([-,.])@ ", r"\1"),
    *_CONTRACTIONS,
    *_PUNCTUATION,
    (r"(?<==) (?==)", ""),  # = = Heading = =
)
# Single quotes are possessives there, elsewhere they may open a quotation.
_PTB: Rules = (
    *_CONTRACTIONS,
    (r"(?<=s) ' ", "' "),
    (r"\\/", "/"),
    (r"(?<!\S)N(?!\S)", "1"),
    (r"([$#]) (?=1)", r"\1"),
    (r"<unk>", "?"),
)
_NEWS_CRAWL: Rules = ((r"\b(https?) : / / ", r"\1://"), (r" / ", "/"), *_CONTRACTIONS, *_PUNCTUATION)
_QUOTES: Rules = ((r"[“”]|``|''", '"'), (r"[‘’]", "'"))


def _replaced(text: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


@text_sets.register("ptb")
def ptb(text: str) -> str:
    """Penn Treebank (Marcus et al., 1993), lower case with <unk> and N."""
    return _replaced(text, _PTB)


@text_sets.register("wikitext2")
def wikitext2(text: str) -> str:
    """WikiText-2 (Merity et al., 2017)."""
    return _replaced(text, _WIKITEXT)


@text_sets.register("lm1b")
def lm1b(text: str) -> str:
    """One Billion Words (Chelba et al., 2014)."""
    return _replaced(text, _NEWS_CRAWL)


@text_sets.register("lambada")
def lambada(text: str) -> str:
    """LAMBADA (Paperno et al., 2016)."""
    return _replaced(text, _QUOTES)


@text_sets.register("ag_news")
def ag_news(text: str) -> str:
    """AG News (Zhang et al., 2015)."""
    return text


@text_sets.register("pubmed")
def pubmed(text: str) -> str:
    """PubMed articles (Cohan et al., 2018)."""
    return _replaced(text, (*_WIKITEXT, *_NEWS_CRAWL))


@text_sets.register("arxiv")
def arxiv(text: str) -> str:
    """arXiv articles (Cohan et al., 2018)."""
    return _replaced(text, (*_WIKITEXT, *_NEWS_CRAWL))


def as_it_stands(text: str) -> str:
    """Text of no known set."""
    return text


@dataclass(frozen=True)
class NamedText:
    """A text to measure: its `path`, the `name` that results bear, and the function that makes `plain` text of it."""

    name: str
    path: Path
    plain: Callable[[str], str]

    @classmethod
    def parse(cls, argument: str) -> NamedText:
        """From `NAME=PATH`, or `PATH` of text that is measured as it stands. ValueError: an unknown name."""
        name, separator, path = argument.partition("=")
        if not separator or Path(argument).exists():
            return cls(Path(argument).name.partition(".")[0], Path(argument), as_it_stands)
        try:
            return cls(name, Path(path), text_sets.get(name))
        except ValueError as error:
            raise ValueError(f"{error}; or give the path alone to measure text as it stands") from None

    def documents(self) -> DocumentReader:
        """FileNotFoundError, ValueError: see `DocumentReader`."""
        return DocumentReader([self.path])

    def prepare(self, folder: Path, tokenizer: Tokenizer, *, seq_len: int, document_multiple: int) -> Manifest:
        """Held-out data in the new folder `folder`, with documents padded to whole blocks of `document_multiple`.

        ValueError: text that cannot be read, or shorter than such a block.
        """
        plain = folder.with_suffix(".jsonl")
        with plain.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": self.plain(d.text)}) + "\n" for d in self.documents())
        return prepare(
            [plain], folder, tokenizer, seq_len, document_multiple=document_multiple, holdout=1.0, progress=False
        )

    def check_length(self, manifest: Manifest, block_size: int) -> None:
        """ValueError: what was prepared is shorter than a block."""
        assert manifest.validation is not None
        if manifest.validation.counted_tokens < block_size:
            raise ValueError(
                f"{self.path} has {manifest.validation.counted_tokens} tokens, less than one block of {block_size}: "
                "give more text, or take a model of smaller blocks"
            )
