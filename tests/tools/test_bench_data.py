"""Check the tables of what data cost, on very small data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from tools import bench_data_child, bench_data_prepare
from tools.bench_data import Bench, main
from tools.bench_data_child import NotMeasuredError, measured

TINY = ["--megabytes", "0.4", "--vocab-size", "400", "--tokens", "1e5", "--rounds", "1", "--shard-bytes", "100000"]


def tables(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """Return the cells of what the tool prints, without headings."""
    assert main([*TINY, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("- command: python tools/bench_data.py --megabytes 0.4")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    return rows[1:]


@pytest.mark.slow
def test_preparing_is_measured_beside_others_that_are_installed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row[0]: row[1:] for row in tables(capsys, "--only", "prepare")}
    assert rows["bare tokenizers, which only encodes"][1] == "1.00"
    assert all(float(cell) > 0 for cell in rows["bd3-scale data prepare"])
    assert all(float(row[0]) > 0 for row in rows.values() if "not installed" not in row[0])


@pytest.mark.slow
def test_nobody_finds_what_an_earlier_round_has_made(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    bench = Bench(tmp_path, argparse.Namespace(text=None, megabytes=0.4, vocab_size=400))
    function, _ = bench_data_prepare.CONTENDERS["datasets.map"]
    first, second = (bench.once(function, data=str(tmp_path), out=bench.path("prepared"))["seconds"] for _ in range(2))
    assert second > first / 2


@pytest.mark.slow
def test_reading_is_measured_beside_others_that_are_installed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = tables(capsys, "--only", "loader")
    assert [row[4] for row in rows if "TrainingStream" in row[0]] == ["1.00", "1.00"]
    assert all(float(row[3]) > 0 for row in rows[:-1] if "not installed" not in row[2])
    assert not any("failed" in row[2] for row in rows)


@pytest.mark.slow
def test_a_start_is_measured_of_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tables(capsys, "--only", "start", "--shards", "100")
    for row in (ours, theirs):
        seconds, cpu, most, then, before = map(float, row[2:])
        assert 0 < seconds < 120
        assert cpu > 0
        assert most >= then >= before > 100  # two processes with PyTorch


@pytest.mark.slow
def test_below_what_a_window_needs_shards_come_again(capsys: pytest.CaptureFixture[str]) -> None:
    rows = tables(capsys, "--megabytes", "2", "--only", "downloads", "--windows", "512")
    assert [row[2] for row in rows] == ["taken", "refused", "refused"]
    assert float(rows[0][3]) < 1.25
    assert float(rows[1][3]) > 2


@pytest.mark.slow
def test_memory_and_packing(capsys: pytest.CaptureFixture[str]) -> None:
    rows = tables(capsys, "--only", "memory")
    assert [row[0].split(", ")[1] for row in rows] == ["epoch 1", "epoch 1", "epoch 2", "epoch 3"]
    shares = {(row[0], row[2], row[3]): row[4:] for row in tables(capsys, "--only", "packing")}
    assert shares["one of the text's", "32", "best-fit"][1] == "0.0%"
    assert float(shares["a line", "4", "concatenate"][0][:-1]) < float(shares["a line", "32", "concatenate"][0][:-1])


def test_who_is_not_installed_is_said() -> None:
    with pytest.raises(NotMeasuredError, match=r"^no_such_package not installed$"):
        bench_data_child.missing("json", "no_such_package")


def test_what_fails_or_takes_too_long_is_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotMeasuredError, match=r"failed: TypeError: .*unexpected keyword"):
        measured(bench_data_child.missing, tmp_path, wrong=1)
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(NotMeasuredError, match=r"^ended after 0 s$"):
        measured(bench_data_child.missing, tmp_path, seconds=0)
    assert not list(tmp_path.glob("out-*")), sys.executable
