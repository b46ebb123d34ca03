"""Test which files a source stands for, and what is logged about those that are left out."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from bd3_scale.data.files import find_files


def put(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)


def found(*sources: Path) -> list[str]:
    """Return the files that were found, relative to the first source's parent."""
    return [str(file.relative_to(sources[0].parent)) for file in find_files(sources)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    put(tmp_path / "corpus" / "m.txt")
    return tmp_path / "corpus"


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


def test_a_folder_is_sorted_by_path_whatever_the_case_of_suffixes(corpus: Path, told: pytest.LogCaptureFixture) -> None:
    put(corpus / "a" / "z.TXT.GZ", corpus / "a.JSONL", corpus / "a" / "b" / "c.jsonl.Zst", corpus / "z.txt")
    assert found(corpus) == [
        f"corpus/{name}" for name in ("a/b/c.jsonl.Zst", "a/z.TXT.GZ", "a.JSONL", "m.txt", "z.txt")
    ]
    assert find_files([corpus]) == sorted(path for path in corpus.rglob("*") if path.is_file())
    assert not told.messages


def test_links_to_folders_and_files_are_followed(tmp_path: Path, corpus: Path, told: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "store" / "part.jsonl", tmp_path / "blobs" / "0f3e")
    (corpus / "part").symlink_to("../store")
    (corpus / "page.txt").symlink_to("../blobs/0f3e")
    assert found(corpus) == ["corpus/m.txt", "corpus/page.txt", "corpus/part/part.jsonl"]
    (tmp_path / "link").symlink_to(corpus)
    assert found(tmp_path / "link")[0] == "link/m.txt"
    assert not told.messages


def test_circles_of_links_end(corpus: Path, told: pytest.LogCaptureFixture) -> None:
    put(corpus / "sub" / "n.txt")
    (corpus / "sub" / "up").symlink_to(corpus)
    (corpus / "sub" / "self").symlink_to(".")
    (corpus / "to-itself.txt").symlink_to("to-itself.txt")
    assert found(corpus) == ["corpus/m.txt", "corpus/sub/n.txt"]
    assert f"{corpus}: 2 files and folders left out as already read (sub/self, sub/up)" in told.messages
    assert f"{corpus}: 1 broken links left out (to-itself.txt)" in told.messages


def test_nothing_is_read_twice(tmp_path: Path, corpus: Path, told: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "other" / "n.txt", tmp_path / "other" / "sub" / "o.txt")
    (corpus / "a").symlink_to("../other/sub")
    (corpus / "n.txt").symlink_to("m.txt")
    assert found(corpus, tmp_path / "other", corpus) == ["corpus/a/o.txt", "corpus/m.txt", "other/n.txt"]
    assert told.messages == [
        f"{corpus}: 1 files and folders left out as already read (n.txt)",
        f"{tmp_path / 'other'}: 1 files and folders left out as already read (sub)",
        f"{corpus}: 1 files and folders left out as already read (.)",
    ]


def test_a_file_is_read_as_often_as_it_is_named(corpus: Path) -> None:
    file = corpus / "m.txt"
    assert find_files([file, corpus, file]) == [file] * 3


def test_hidden_names_are_left_out_and_told(tmp_path: Path, corpus: Path, told: pytest.LogCaptureFixture) -> None:
    put(corpus / ".git" / "a.txt", corpus / "sub" / ".b.txt", corpus / ".idea" / ".x" / "c.txt")
    assert found(corpus) == ["corpus/m.txt"]
    assert told.messages == [f"{corpus}: 3 hidden files and folders left out (.git, .idea, sub/.b.txt)"]
    named = [corpus / ".git", corpus / "sub" / ".b.txt"]
    assert [file.name for file in find_files(named)] == ["a.txt", ".b.txt"]
    put(tmp_path / ".cache" / "corpus" / "d.txt")
    assert [file.name for file in find_files([tmp_path / ".cache" / "corpus"])] == ["d.txt"]


def test_dangling_links_and_other_kinds_are_told_five_at_most(corpus: Path, told: pytest.LogCaptureFixture) -> None:
    for number in range(6):
        (corpus / f"{number}.txt").symlink_to("missing.txt")
    put(corpus / "x.py", corpus / "y.txt.bz2")
    assert found(corpus) == ["corpus/m.txt"]
    assert set(told.messages) == {
        f"{corpus}: 6 broken links left out (0.txt, 1.txt, 2.txt, 3.txt, 4.txt, …)",
        f"{corpus}: 2 files of other kinds ignored (x.py, y.txt.bz2)",
    }


def test_a_folder_that_may_not_be_opened_is_told(
    corpus: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(corpus / "lost+found" / "n.txt")
    listed = Path.iterdir

    def iterdir(path: Path):  # the tests may run as root, to whom every folder is open
        if path.name == "lost+found":
            raise PermissionError(path)
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert found(corpus) == ["corpus/m.txt"]
    assert told.messages == [f"{corpus}: 1 folders without permission left out (lost+found)"]


def test_an_empty_folder_beside_others_is_told(tmp_path: Path, corpus: Path, told: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    assert found(corpus, tmp_path / "empty") == ["corpus/m.txt"]
    assert told.messages == [f"{tmp_path / 'empty'}: no file at all"]


def test_where_nothing_can_be_read_the_error_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.txt").symlink_to("missing")
    put(tmp_path / "hidden" / ".a.txt", tmp_path / "other" / "a.py")
    (tmp_path / "empty").mkdir()
    for name, there in (
        ("links", r"1 broken links left out \(a\.txt\)"),
        ("hidden", r"1 hidden files and folders left out \(\.a\.txt\)"),
        ("other", r"1 files of other kinds ignored \(a\.py\)"),
        ("empty", "no file at all"),
    ):
        with pytest.raises(ValueError, match=rf"nothing to read in \S+{name}: {there}; give files that end in \.txt"):
            find_files([tmp_path / name])
    with pytest.raises(ValueError, match="nothing to read in no source"):
        find_files([])


def test_named_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist; give files"):
        find_files([tmp_path / "missing"])
    (tmp_path / "a.txt").symlink_to("elsewhere.txt")
    with pytest.raises(FileNotFoundError, match=r"a\.txt is a broken link to elsewhere\.txt"):
        find_files([tmp_path / "a.txt"])
    put(tmp_path / "t.pdf", tmp_path / "t.txt")
    with pytest.raises(ValueError, match=r"t\.pdf is not a kind of file"):
        find_files([tmp_path / "t.pdf"])
    with pytest.raises(ValueError, match=r"t\.txt is not a kind of file .* give files that end in \.jsonl, "):
        find_files([tmp_path / "t.txt"], [".jsonl"])
