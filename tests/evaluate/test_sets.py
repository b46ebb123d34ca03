"""Check texts by name: what their rules do to tokenised corpora, and what cannot be measured."""

from __future__ import annotations

import json

import pytest

from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.overlap import count_known, document_hash, hashes_file, hashes_of, read_hashes
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.sets import NamedText
from bd3_scale.registry import text_sets

SETS = ["ptb", "wikitext2", "lm1b", "lambada", "ag_news", "pubmed", "arxiv"]


@pytest.mark.parametrize(
    ("name", "tokenised", "plain"),
    [
        ("wikitext2", "in the 1 @.@ 5 @-@ inch , 3 @,@ 000 km range .", "in the 1.5-inch, 3,000 km range."),
        ("wikitext2", " = = Early life = = \n He ( then 20 ) didn 't", " == Early life == \n He (then 20) didn't"),
        ("wikitext2", 'He said " no , never " ; such as \' this', 'He said "no, never"; such as \' this'),
        ("ptb", " mr. <unk> did n't buy N shares at $ N \n", " mr. ? didn't buy 1 shares at $1 \n"),
        ("ptb", " it 's a N\\/N split of the investors ' u.s. stake", " it's a N/N split of the investors' u.s. stake"),
        ("lm1b", 'See http : / / www.x.com : " It is so , " she said .', 'See http://www.x.com: "It is so," she said.'),
        ("lambada", "“ no , ” he ``said'', ‘ah’", '" no , " he "said", \'ah\''),
        ("ag_news", "Oil rises (Reuters) - $50 a barrel", "Oil rises (Reuters) - $50 a barrel"),
        (
            "arxiv",
            "we show ( see below ) that x is 1 / 2 , as in [ 3 ] .",
            "we show (see below) that x is 1/2, as in [3].",
        ),
    ],
)
def test_tokenised_text_becomes_plain(name: str, tokenised: str, plain: str) -> None:
    assert text_sets.get(name)(tokenised) == plain


@pytest.mark.parametrize("name", SETS)
def test_plain_text_stays(name: str) -> None:
    text = (
        "It's 3.5% (or so), \"perhaps\": the students' idea; see http://a.b/c, didn't you?\nA new line - 1,000 of them!"
    )
    assert text_sets.get(name)(text) == text


def test_the_sets_of_the_paper_are_known_by_name(tmp_path) -> None:
    assert list(text_sets.names()[: len(SETS)]) == SETS
    assert NamedText.parse("ptb=a/b=c.txt") == NamedText("ptb", type(tmp_path)("a/b=c.txt"), text_sets.get("ptb"))
    assert NamedText.parse("notes/day.jsonl.zst").name == "day"
    plain = tmp_path / "ptb.txt"
    plain.write_text("N <unk>")
    assert NamedText.parse(str(plain)).plain("N <unk>") == "N <unk>", "a path is measured as it stands"
    odd = tmp_path / "c4=x.txt"
    odd.write_text("x")
    assert NamedText.parse(str(odd)).path == odd
    with pytest.raises(ValueError, match=r"set is called 'c4': known are ptb, wikitext2, lm1b.*give the path alone"):
        NamedText.parse("c4=text.txt")
    with pytest.raises(ValueError, match=r"'wikitext': did you mean wikitext2\?"):
        NamedText.parse("wikitext=text.txt")


def test_a_set_from_outside_is_known_by_its_name(tmp_path) -> None:
    @text_sets.register("test_shouted")
    def shouted(text: str) -> str:
        """Return a corpus in capitals."""
        return text.lower()

    (tmp_path / "set.txt").write_text("HELLO THERE")
    text = NamedText.parse(f"test_shouted={tmp_path / 'set.txt'}")
    text.prepare(tmp_path / "data", load_tokenizer("bytes"), seq_len=32, document_multiple=4)
    assert (tmp_path / "data.jsonl").read_text() == '{"text": "hello there"}\n'


def test_a_text_is_prepared_whole_in_plain_words(tmp_path) -> None:
    """Check that every byte of every document and its end count, and nothing else does."""
    texts = [" it 's N of N \n" * 9, " no n't "]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text = NamedText.parse(f"ptb={tmp_path / 'set.jsonl'}")
    text.prepare(tmp_path / "data", load_tokenizer("bytes"), seq_len=32, document_multiple=8)
    manifest = load_manifest(tmp_path / "data")
    size = sum(len(text_sets.get("ptb")(text)) for text in texts)
    assert (manifest.train, manifest.document_multiple) == (None, 8)
    assert (manifest.validation.text_bytes, manifest.validation.counted_tokens) == (size, size + 2)


def test_text_shorter_than_a_block_is_refused(tmp_path) -> None:
    (tmp_path / "short.txt").write_text("hello")
    text = NamedText.parse(str(tmp_path / "short.txt"))
    prepared = text.prepare(tmp_path / "data", load_tokenizer("bytes"), seq_len=32, document_multiple=8)
    with pytest.raises(ValueError, match=r"short.txt has 6 tokens, less than one block of 8: give more text"):
        text.check_length(prepared, 8)
    text.check_length(prepared, 4)
    with pytest.raises(FileNotFoundError, match=r"gone.txt does not exist"):
        NamedText.parse("gone.txt").prepare(tmp_path / "gone", load_tokenizer("bytes"), seq_len=32, document_multiple=4)


def test_training_documents_are_known_again_whatever_their_white_space(tmp_path) -> None:
    texts = [f"Document {number} of the training,\nwhich has two lines." for number in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for workers in (1, 2):
        out = tmp_path / str(workers)
        options = {"holdout": 0.3, "progress": False, "document_multiple": 8, "workers": workers}
        manifest = prepare([tmp_path / "text.jsonl"], out, load_tokenizer("bytes"), 32, **options)
        known = read_hashes(out, "train")
        assert len(known) == manifest.train.documents < 20, "those held out are not trained on"
        assert count_known(known, hashes_of(texts)) == manifest.train.documents
    assert count_known(known, hashes_of(text.replace("\n", "  ") for text in texts)) == manifest.train.documents
    assert count_known(known, hashes_of(text + "!" for text in texts)) == 0
    assert document_hash("a b") != document_hash("ab")
    assert len(read_hashes(out, "validation")) == 20 - len(known)
    (out / hashes_file("train")).unlink()
    assert read_hashes(out, "train") is None
