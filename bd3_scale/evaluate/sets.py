"""Prepare texts to measure perplexity on: the zero-shot sets of the literature by name, and files as they are.

A set is a function that turns a corpus's text into plain text, registered with `@text_sets.register("name")`; its
docstring says which corpus it is. A file is read as training data is: a `.txt` is one document, a `.jsonl` has one per
line. Tokenised corpora are turned into plain text first, as MDLM and BD3-LM do (Sahoo et al., NeurIPS 2024; Arriola et
al., ICLR 2025, section 6), since a model trained on text has never seen `@-@` or ` n't`. The rules here are regular and
few, and not those of these papers.
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
# In PTB a single quote after "s" is a possessive; in other corpora it may open a quotation. `N` stands for a number.
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
    """Return plain text of Penn Treebank (Marcus et al., 1993), which is in lower case with <unk> and N."""
    return _replaced(text, _PTB)


@text_sets.register("wikitext2")
def wikitext2(text: str) -> str:
    """Return plain text of WikiText-2 (Merity et al., 2017)."""
    return _replaced(text, _WIKITEXT)


@text_sets.register("lm1b")
def lm1b(text: str) -> str:
    """Return plain text of One Billion Words (Chelba et al., 2014)."""
    return _replaced(text, _NEWS_CRAWL)


@text_sets.register("lambada")
def lambada(text: str) -> str:
    """Return plain text of LAMBADA (Paperno et al., 2016)."""
    return _replaced(text, _QUOTES)


@text_sets.register("ag_news")
def ag_news(text: str) -> str:
    """Return plain text of AG News (Zhang et al., 2015), which it is already."""
    return text


@text_sets.register("pubmed")
def pubmed(text: str) -> str:
    """Return plain text of PubMed articles (Cohan et al., 2018)."""
    return _replaced(text, (*_WIKITEXT, *_NEWS_CRAWL))


@text_sets.register("arxiv")
def arxiv(text: str) -> str:
    """Return plain text of arXiv articles (Cohan et al., 2018)."""
    return _replaced(text, (*_WIKITEXT, *_NEWS_CRAWL))


def unchanged(text: str) -> str:
    """Return the text of a file that is of no known set, unchanged."""
    return text


@dataclass(frozen=True)
class NamedText:
    """A text to measure: its `path`, the `name` for results, and the function that makes `plain` text of a document."""

    name: str
    path: Path
    plain: Callable[[str], str]

    @classmethod
    def parse(cls, argument: str) -> NamedText:
        """Parse `NAME=PATH`, or `PATH` for text that is measured as it is. ValueError: an unknown name."""
        name, separator, path = argument.partition("=")
        if not separator or Path(argument).exists():
            return cls(Path(argument).name.partition(".")[0], Path(argument), unchanged)
        try:
            return cls(name, Path(path), text_sets.get(name))
        except ValueError as error:
            raise ValueError(f"{error}; or give the path alone to measure the text as it is") from None

    def documents(self) -> DocumentReader:
        """Return the documents of the file. FileNotFoundError, ValueError: see `DocumentReader`."""
        return DocumentReader([self.path])

    def prepare(self, folder: Path, tokenizer: Tokenizer, *, seq_len: int, document_multiple: int) -> Manifest:
        """Prepare held-out data in the new folder `folder`; documents are padded to `document_multiple` tokens.

        ValueError: the text cannot be read, or is shorter than such a multiple.
        """
        plain = folder.with_suffix(".jsonl")
        with plain.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": self.plain(d.text)}) + "\n" for d in self.documents())
        return prepare(
            [plain], folder, tokenizer, seq_len, document_multiple=document_multiple, holdout=1.0, progress=False
        )

    def check_length(self, manifest: Manifest, block_size: int) -> None:
        """Raise ValueError if the prepared text is shorter than a block."""
        assert manifest.validation is not None
        if manifest.validation.counted_tokens < block_size:
            raise ValueError(
                f"{self.path} has {manifest.validation.counted_tokens} tokens, less than one block of {block_size}: "
                "give more text, or use a model with smaller blocks"
            )
