"""Test preparing by tasks: the result does not depend on who does them, and continues after a kill."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data import index, merge, overlap, tasks
from bd3_scale.data.encode import Encoder
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.overlap import count_known, evenly_spaced, hashes_file, merge_hashes, read_hashes
from bd3_scale.data.prepare import Preparation
from bd3_scale.data.sources import DocumentReader, OpenFile, lines
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.registry import source_cuts
from tests.data.documents import SEQ_LEN, random_texts, write_jsonl
from tests.data.test_prepare import read

BYTES = load_tokenizer("bytes")
TASK_BYTES = 1500


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASK_BYTES", TASK_BYTES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "t.jsonl", random_texts(150))


def begun(source: Path, out: Path, **options: Any) -> Preparation:
    defaults = {"document_multiple": 8, "holdout": 0.2, "workers": 1, "progress": False}
    return Preparation([source], out, BYTES, SEQ_LEN, **(defaults | options))


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_in(data: bytes, part: tuple[int, int] | None, max_bytes: int = 100) -> list[tuple[bytes, int]]:
    found = lines(OpenFile(Path("x"), io.BytesIO(data), max_bytes, part))  # type: ignore[arg-type]
    return [(bytes(line.data), line.start) for line in found]


@given(
    st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\xef\xbb\xbf", b"long" * 40])).map(b"".join),
    st.lists(st.integers(0, 300)),
)
def test_any_cuts_give_the_lines_of_the_whole_file(data: bytes, cuts: list[int]) -> None:
    borders = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    parts = [line for part in itertools.pairwise(borders) for line in lines_in(data, part)]
    assert parts == lines_in(data, None)


def test_a_line_behind_the_first_part_is_named_by_its_byte(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", ["x" * 90] * 40)
    source.write_bytes(source.read_bytes() + b"{\n")
    with pytest.raises(ValueError, match=rf"t\.jsonl, the line at byte {source.stat().st_size - 2:,} is not JSON"):
        begun(source, tmp_path / "out", holdout=0).finish()


def test_tasks_are_runs_of_files_and_parts_of_large_ones_that_can_be_cut(tmp_path: Path) -> None:
    sizes = {"a.txt": 600, "b.jsonl": 600, "c.txt": 700, "d.jsonl": 4000, "e.txt": 4000, "f.jsonl.gz": 4000, "g.txt": 9}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    found = [list(task.parts) for task in tasks.cut(0, DocumentReader([tmp_path]))]
    assert found == [
        [(0, 600, None), (1, 600, None)],
        [(2, 700, None)],
        [(3, 1500, (0, 1500))],
        [(3, 1500, (1500, 3000))],
        [(3, 1000, (3000, 4000))],
        [(4, 4000, None)],
        [(5, 4000, None)],
        [(6, 9, None)],
    ]


def test_adjacent_parts_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that adjacent parts are merged, such as row groups, many of which fit into a task."""
    (tmp_path / "a.jsonl").write_bytes(b"x" * 4000)
    groups = [((number, number + 1), 400) for number in range(10)]
    monkeypatch.setattr(source_cuts, "get", lambda name: lambda file, num_bytes: groups)
    found = [list(task.parts) for task in tasks.cut(0, DocumentReader([tmp_path]))]
    assert found == [[(0, 1200, (0, 3))], [(0, 1200, (3, 6))], [(0, 1200, (6, 9))], [(0, 400, (9, 10))]]


def test_the_result_is_that_of_each_task_alone(source: Path, tmp_path: Path) -> None:
    whole = begun(source, tmp_path / "out")
    assert whole.num_tasks > 5
    manifest = whole.finish()
    data = source.read_bytes()
    alone = []
    for number, start in enumerate(range(0, len(data), TASK_BYTES)):
        first, last = (data.find(b"\n", border - 1) + 1 if border else 0 for border in (start, start + TASK_BYTES))
        part = tmp_path / f"part{number}.jsonl"
        part.write_bytes(data[first : last or len(data)])
        alone.append(begun(part, tmp_path / f"part{number}").finish())
    folders = [tmp_path / f"part{number}" for number in range(len(alone))]
    assert len(alone) == whole.num_tasks
    for split in ("train", "validation"):
        merged, apart = read(tmp_path / "out", split), [sample for folder in folders for sample in read(folder, split)]
        assert len(merged) == len(apart)
        for one, other in zip(merged, apart, strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)
        counts = [getattr(each, split).model_dump(exclude={"shards"}) for each in (manifest, *alone)]
        assert counts[0] == {name: sum(each[name] for each in counts[1:]) for name in counts[0]}
        hashes = np.concatenate([read_hashes(folder, split) for folder in folders])
        np.testing.assert_array_equal(read_hashes(tmp_path / "out", split), np.unique(hashes))
    assert not (tmp_path / "out.tasks").exists()


@pytest.mark.launch
def test_who_does_the_tasks_and_in_which_order_changes_nothing(source: Path, tmp_path: Path) -> None:
    begun(source, tmp_path / "one").finish()
    assert begun(source, tmp_path / "three", workers=3).num_tasks >= 3
    begun(source, tmp_path / "three", workers=3).finish()
    for share in (2, 0, 1):  # as three machines do, each of which sees what there is when it begins
        machine = begun(source, tmp_path / "shares")
        machine.work(machine.share(share, 3))
        assert not (tmp_path / "shares").exists()
    assert begun(source, tmp_path / "shares").missing() == []
    begun(source, tmp_path / "shares").finish()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three") == files_of(tmp_path / "shares")


def test_a_repeated_command_does_what_is_missing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(source, tmp_path / "whole").finish()
    first = begun(source, tmp_path / "out")
    first.work([4, 1])
    shutil.rmtree(first.folder / "00004")
    (first.folder / ".00002.0123abcd").mkdir()  # of a machine that went down
    whole = set(range(first.num_tasks))
    assert set(begun(source, tmp_path / "out").missing()) == whole - {1}
    encoded: list[str] = []
    encode = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    begun(source, tmp_path / "out").finish()
    assert len(encoded) < 150
    assert set(encoded) < set(random_texts(150))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl", "out", "whole"}


def test_a_merge_that_was_interrupted_is_done_again_from_the_same_tasks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(source, tmp_path / "whole").finish()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge, "merge_hashes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begun(source, tmp_path / "out").finish()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Encoder, "__call__", None)
    begun(source, tmp_path / "out").finish()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_file_system_without_links(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(source, tmp_path / "linked").finish()

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOTSUP, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    begun(source, tmp_path / "copied").finish()
    assert files_of(tmp_path / "linked") == files_of(tmp_path / "copied")


def test_work_on_other_data_is_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    begun(source, tmp_path / "out").work([0])
    before = files_of(tmp_path / "out.tasks")
    for options in ({"seed": 2}, {"holdout": 0.3}, {"document_multiple": 16}):
        (key,) = options
        with pytest.raises(ValueError, match=rf"out\.tasks holds unfinished work on other data:\n  - {key} is"):
            begun(source, tmp_path / "out", **options)
    with source.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl is [\d,]+ bytes, there"):
        begun(source, tmp_path / "out")
    assert files_of(tmp_path / "out.tasks") == before


def test_an_error_keeps_what_is_done_for_when_it_is_left_out(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", random_texts(150))
    data = source.read_bytes()
    place = data.find(b"\n", 3 * TASK_BYTES) + 1
    source.write_bytes(data[:place] + b"no JSON\n" + data[place:])
    begun(source, tmp_path / "skipped", on_error="skip").finish()
    with pytest.raises(ValueError, match="is not JSON"):
        begun(source, tmp_path / "out").finish()
    assert begun(source, tmp_path / "out").missing()[0] == 3
    begun(source, tmp_path / "out", on_error="skip").finish()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "skipped")
    assert load_manifest(tmp_path / "out").skipped_documents == 1


def test_the_shares_of_the_work(source: Path, tmp_path: Path) -> None:
    whole = begun(source, tmp_path / "out")
    shares = [whole.share(number, 4) for number in range(4)]
    assert sorted(itertools.chain(*shares)) == list(range(whole.num_tasks))
    assert whole.shares_missing(10_000) == list(range(whole.num_tasks))
    whole.work(shares[2])
    assert whole.shares_missing(4) == [0, 1, 3]
    for number in (-1, 4):
        with pytest.raises(ValueError, match=rf"--task {number}: give one from 0 to 3"):
            whole.share(number, 4)
    with pytest.raises(ValueError, match="--tasks 0: give at least 1"):
        whole.shares_missing(0)


SCRIPT = """
import sys
from bd3_scale.data import tasks
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.registry import import_plugins
if __name__ == "__main__":
    source, out, workers, tasks.TASK_BYTES, field, *plugins = sys.argv[1:]
    tasks.TASK_BYTES = int(tasks.TASK_BYTES)
    import_plugins(plugins)
    options = dict(holdout=0.2, field=field, workers=int(workers), progress=False)
    prepare([source], out, load_tokenizer("bytes"), 64, **options)
"""


def start(tmp_path: Path, *arguments: object) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parents[1] / "plugins")])
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.launch
@pytest.mark.parametrize("victim", ["the first process", pytest.param("a worker", marks=pytest.mark.slow)])
def test_killed_in_the_middle_and_repeated(tmp_path: Path, victim: str) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", [f"{number} " + "word " * 200 for number in range(1200)])
    process = start(tmp_path, source, tmp_path / "out", 2, 30_000, "text")
    try:
        deadline = time.monotonic() + 60
        while not (done := list((tmp_path / "out.tasks").glob("[0-9]*"))) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert done
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if victim == "the first process" else int(children[-1]), signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        assert process.returncode
        assert victim == "the first process" or "a process of the preparation was killed" in said
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "out").exists()
    assert 0 < len(list((tmp_path / "out.tasks").glob("[0-9]*"))) < source.stat().st_size // 30_000
    for out, workers in (("out", 2), ("whole", 1)):
        again = start(tmp_path, source, tmp_path / out, workers, 30_000, "text")
        _, said = again.communicate(timeout=60)
        assert again.returncode == 0, said
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl", "out", "whole", "script.py"}


@pytest.mark.launch
def test_a_format_of_a_plug_in_is_read_by_the_workers(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(4):
        rows = "".join(f"{number}\t{text}\n" for text in random_texts(20, seed=number) if "\n" not in text)
        (tmp_path / f"text/{number}.tsv").write_text("id\tbody\n" + rows)
    for workers in (1, 2):
        process = start(tmp_path, tmp_path / "text", tmp_path / str(workers), workers, 100, "body", "bd3_lab")
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


@given(st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), max_size=30), min_size=1, max_size=5))
def test_hashes_are_merged_as_sets_are(tmp_path_factory: pytest.TempPathFactory, runs: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("hashes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "MERGE_BYTES", 64)
        folders = [folder / str(number) for number in range(len(runs))]
        for path, run in zip(folders, runs, strict=True):
            path.mkdir()
            overlap.write_hashes(path, "train", run)
        merge_hashes([*folders, folder / "without"], folder, "train")
    merged = read_hashes(folder, "train")
    assert merged.tolist() == sorted(set().union(*runs))
    found = np.array(runs[0], np.uint64)
    assert count_known(merged, found) == len(found)
    assert count_known(read_hashes(folders[0], "train"), merged) == len(set(runs[0]))
    assert (folder / hashes_file("train")).stat().st_size == 8 * len(merged)


@given(st.text(st.sampled_from("ab \t\n\r\x1c\x85\xa0\u2009\u2028\u3000é日\u200b") | st.characters(), max_size=60))
def test_evenly_spaced_text_is_that_of_its_words(text: str) -> None:
    assert evenly_spaced(text) == " ".join(text.split())


def test_every_white_space_is_known() -> None:
    spaces = "".join(filter(str.isspace, map(chr, range(sys.maxunicode + 1))))
    assert evenly_spaced(f"a{spaces}b") == "a b"
    assert all(evenly_spaced(f"a{space}b") == "a b" for space in spaces)


def test_an_index_of_a_task_names_files_of_its_own_folder(source: Path, tmp_path: Path) -> None:
    begun(source, tmp_path / "out").work([0])
    path = tmp_path / "out.tasks/00000/train/index.json"
    content = json.loads(path.read_text())
    content["shards"][0]["zip_data"]["basename"] = "../../../secret"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"00000/train/index\.json is damaged"):
        list(index.merge_indices(tmp_path / "index.json", [path]))
