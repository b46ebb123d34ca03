"""Check the data of a report: which points are drawn, what is collected, how it is embedded."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bd3_scale.launch.run_commands import app
from bd3_scale.launch.run_report import write_report
from bd3_scale.observe.console import Console
from bd3_scale.observe.downsample import BINS, extremes, running_median
from bd3_scale.observe.figures import run_series
from bd3_scale.observe.follow import RunFollower
from bd3_scale.observe.report_data import (
    differences,
    read_run,
    remaining_seconds,
    run_events,
    run_for_page,
    step_seconds,
    total_seconds,
)
from bd3_scale.observe.report_page import json_for_html
from bd3_scale.observe.watch import watch_run
from tests.observe.run_folders import make_run, train_record, write_lines

FINITE = st.floats(-1e9, 1e9)


def page_data(page: Path) -> dict:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert match is not None
    return json.loads(match[1])


@given(st.lists(FINITE, min_size=1, max_size=300), st.integers(1, 20), st.integers(1, 50))
def test_the_points_that_are_drawn_keep_the_extremes_of_every_bin(values: list[float], bins: int, stride: int) -> None:
    steps = [7 + stride * i for i in range(len(values))]
    kept = extremes(steps, values, bins)
    assert kept == sorted(set(kept))
    assert {0, len(values) - 1} <= set(kept)
    assert len(kept) <= max(2 * bins, 2 * bins + 2)
    width = (steps[-1] - steps[0]) / bins
    for number in range(bins):
        low, high = steps[0] + number * width, steps[0] + (number + 1) * width
        inside = [i for i, step in enumerate(steps) if low < step < high]
        if inside:
            # Points on an edge may fall in either bin; a bin's own extremes are within those that are kept.
            near = [values[i] for i in kept if low - 1e-6 <= steps[i] <= high + 1e-6]
            assert min(near) <= min(values[i] for i in inside)
            assert max(near) >= max(values[i] for i in inside)


def test_a_spike_of_one_step_among_a_hundred_thousand_is_drawn_and_the_curve_is_short() -> None:
    values = [1.0] * 100_000
    values[61_234] = 50.0
    kept = extremes(range(100_000), values)
    assert 61_234 in kept
    assert len(kept) <= 2 * BINS + 2


@given(st.lists(FINITE, min_size=1, max_size=200))
def test_the_running_median_is_of_the_latest_fiftieth(values: list[float]) -> None:
    window = max(1, len(values) // 50)
    expected = [median(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
    assert running_median(values) == pytest.approx(expected)
    assert running_median(values, [len(values) - 1]) == pytest.approx(expected[-1:])


@example("</script ><!-- & -->")
@settings(max_examples=30)
@given(st.recursive(st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists, max_leaves=8))
def test_no_text_can_leave_the_script_element_that_holds_it(data: object) -> None:
    text = json_for_html(data)
    assert json.loads(text) == data
    assert text.isascii()
    assert not set("<>&") & set(text)


def test_every_figure_of_a_run_has_its_curves(tmp_path: Path) -> None:
    series = run_series(read_run(make_run(tmp_path / "run")).metrics)
    labels = {figure: [curve["label"] for curve in curves] for figure, curves in series.items()}
    assert labels["loss"] == ["training loss"]
    assert labels["loss_parts"] == ["blocks of 4", "blocks of 16"]  # sorted by number
    assert labels["step_parts"] == ["whole step", "waiting for data"]
    assert labels["intervals"] == ["blocks of 4"]
    assert labels["variance"] == ["blocks of 4, in its interval", "blocks of 4, mask rates 0 to 1"]
    assert labels.keys() >= {"throughput", "mfu", "memory", "lr", "grad_norm", "experts", "dead_experts", "saves"}
    assert series["mfu"][0]["y"][0] == 41
    assert series["memory"][0]["y"][0] == 1.5
    nelbo = series["nelbo"][0]
    assert (nelbo["x"], nelbo["y"]) == ([50, 100], [5.5, 5.0])
    assert (nelbo["low"], nelbo["high"]) == ([5.0, 4.5], [6.0, 5.5])  # independent errors 0.3 and 0.4 add up to 0.5
    assert not any(figure.startswith("other:") for figure in series)


def test_metrics_of_a_plug_in_are_drawn_and_nulls_left_out() -> None:
    series = run_series([train_record(1, **{"my/metric": 3.0}), train_record(2, **{"my/metric": None})])
    assert series["other:my/metric"] == [{"label": "my/metric", "x": [1], "y": [3.0]}]


def test_events_have_the_command_that_computes_them_again(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a run")
    spike, resumed = run_events(read_run(folder))
    assert spike["command"] == f"bd3-scale replay '{folder}' --step 33"
    assert (spike["kind"], spike["text"]) == ("loss spike", "loss 9.5, grad norm 3.25, median 4.5")
    assert (resumed["command"], resumed["text"]) == ("", "optimizer.lr: 0.001 → 0.002; the data moved")


def test_a_run_of_an_earlier_version_is_collected_with_notes(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "train_loss": 5.0, "lr": 0.1, "tokens_per_second": 10.0}])
    (tmp_path / "recipe.yaml").write_text("name: old\nsome: {key: 3}\ntrain: {steps: 4}\n")
    page = run_for_page(read_run(tmp_path))
    assert (page["name"], page["steps"], page["state"], page["loss"]) == ("old", 4, "not running", 5.0)
    assert page["recipe"]["some.key"] == "3"
    notes = " ".join(page["notes"])
    assert "recipe.yaml is no recipe of this version: " in notes
    assert all(word in notes for word in ("No evaluation", "earlier version started", "No samples"))


def test_what_is_damaged_is_left_out_with_a_note(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "train/loss": "ten"}\n{"step": 102, "tr')
    (folder / "attempts/0000/environment.json").write_text("{")
    (folder / "recipe.yaml").write_bytes(b"\xff")
    run = read_run(folder)
    assert run.step == 100
    notes = " ".join(run.notes)
    assert "metrics.jsonl: 1 damaged line left out." in notes
    assert "metrics.jsonl: the last line is unfinished" in notes
    assert "attempts/0000 cannot be read" in notes
    assert "the report goes without it" in notes
    write_report([folder], tmp_path / "page.html")


def test_a_folder_that_is_no_run_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run directory: it has neither recipe\.yaml nor metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_into_the_run_and_says_where(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert (result.exit_code, result.output) == (0, f"wrote {folder}/report.html\n")
    assert page_data(folder / "report.html")["runs"][0]["name"] == "tiny"
    assert [path.name for path in folder.glob(".*")] == []


def test_a_page_that_is_a_folder_or_below_a_file_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"is a folder: name the page in it, such as --out .*/run/report\.html"):
        write_report([folder], folder)
    for name in ("recipe.yaml/report.html", "recipe.yaml/deeper/report.html"):
        with pytest.raises(OSError, match="a part of this path is a file; choose another"):
            write_report([folder], folder / name)


def link_to_a_page(path: Path) -> None:
    path.with_name("real.html").write_text("<!doctype html>")
    path.symlink_to("real.html")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text('{"step": 1}\n'), "a file that is no report"),
        (link_to_a_page, "a link"),
        (lambda path: path.symlink_to("nowhere"), "a link"),
        (os.mkfifo, "a pipe, a device or a socket"),
    ],
    ids=["file", "link", "dangling link", "FIFO"],
)
def test_what_is_no_report_is_not_replaced(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    out = tmp_path / "out"
    make(out)
    before = out.lstat()
    # No folder is read first: there is no run here.
    with pytest.raises(
        ValueError, match=f"out is {words}, and a report would replace it: name another file with --out"
    ):
        write_report([tmp_path], out)
    assert out.lstat() == before


def test_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    folder, out = make_run(tmp_path / "run"), tmp_path / "page.html"
    write_report([folder], out)
    write_lines(folder / "metrics.jsonl", [train_record(7)])
    write_report([folder], out)
    assert page_data(out)["runs"][0]["step"] == 7


@given(
    st.lists(st.tuples(st.integers(0, 60), st.none() | st.floats(0, 9), st.none() | st.floats(0.5, 9)), max_size=9),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_seconds_are_those_of_a_list_of_all_steps(
    lines: list[tuple[int, float | None, float | None]], last: int, first: int
) -> None:
    records = [{"step": s, "train/tokens": tokens, "perf/tokens_per_second": rate} for s, tokens, rate in lines]
    each: list[float] = []
    tokens_before = 0.0
    for step, tokens, rate in lines:
        if rate and tokens is not None and len(each) < step <= last:
            each += [(tokens - tokens_before) / (step - len(each)) / rate] * (step - len(each))
            tokens_before = tokens
    spans = step_seconds(records, last)
    assert (total_seconds(spans, first) or 0.0) == pytest.approx(sum(each[:first]))
    left = median(each[-20:]) * 3 if each else -1.0
    assert remaining_seconds(spans, 3) == (pytest.approx(left) if left >= 0 else None)


@pytest.mark.timeout(30)
def test_a_line_with_a_huge_step_takes_no_memory_and_numbers_that_overflow_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "recipe.yaml").write_text(f"name: broken\ntrain: {{steps: {10**400}}}\n")
    huge = {
        "train/tokens": 9e299,
        "perf/tokens_per_second": 1e-300,
        "eval/nelbo": 9e299,
        "eval/nelbo_text_standard_error": 9e299,
        "eval/nelbo_noise_standard_error": 9e299,
        "perf/mfu": 9e299,
    }
    write_lines(
        folder / "metrics.jsonl",
        [{"step": 1, **huge}, {"step": 9_000_000_000_000_000_000, **huge, "train/tokens": -9e299}],
    )
    line = {"attempt": 0, "started": 0.0, "ended": 1e-9, "from_step": 0, "step": 1}
    write_lines(folder / "slurm/attempts.jsonl", [line])
    spike = {"step": 1, "kind": "loss_spike", "loss": 10**400}
    write_lines(folder / "events.jsonl", [{"step": 1}, spike])
    write_report([folder], tmp_path / "page.html")
    assert run_for_page(dataclasses.replace(read_run(folder), in_use=True))["eta"] is None
    (run,) = page_data(tmp_path / "page.html")["runs"]
    assert (run["state"], run["steps"], run["step"]) == ("not running", None, 9_000_000_000_000_000_000)
    assert (run["seconds"], run["goodput"]) == (None, None)
    assert run["events"][0]["text"] == f"loss 1{'0' * 79}"
    assert "events.jsonl: 1 damaged line left out." in run["notes"]


def test_a_goodput_that_overflows_is_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "train/tokens": 1e299, "perf/tokens_per_second": 1e-8}])
    write_lines(tmp_path / "slurm/attempts.jsonl", [{"started": 0.0, "ended": 1e-9}])
    write_report([tmp_path], tmp_path / "page.html")
    (run,) = page_data(tmp_path / "page.html")["runs"]
    assert (run["seconds"], run["goodput"]) == (pytest.approx(1e307), None)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.name)], ids=["FIFO", "folder", "loop"]
)
@pytest.mark.parametrize("name", ["events.jsonl", "samples.jsonl"])
def test_events_and_samples_that_are_no_file_are_left_out_with_a_note(
    tmp_path: Path, name: str, make: Callable[[Path], object]
) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).unlink()
    make(folder / name)
    watched, _ = RunFollower(folder).refresh()
    for run in (read_run(folder), watched):
        assert run.step == 100
        assert sum(note.startswith(f"{name} is left out: ") for note in run.notes) == 1
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    watch_run(RunFollower(folder), console)
    assert console.export_text().startswith(f"{name} is left out: ")


@pytest.mark.parametrize("records", [[], [train_record(1)]], ids=["no step", "one step"])
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path: Path, records: list) -> None:
    folder = make_run(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", records)
    write_report([folder], tmp_path / "page.html")
    (run,) = page_data(tmp_path / "page.html")["runs"]
    assert run["step"] == len(records)
    assert run["state"] == ("not running" if records else "not started")


def test_the_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [train_record(step) for step in range(1, 6_001)])
    write_report([folder], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 800_000


def test_attempts_have_their_steps_and_their_machine(tmp_path: Path) -> None:
    write_report([make_run(tmp_path / "run")], tmp_path / "page.html")
    (run,) = page_data(tmp_path / "page.html")["runs"]
    assert run["where"] == "2 ranks on node-a, node-b: A CPU, 8 cores"
    assert [(each["from"], each["to"]) for each in run["attempts"]] == [(0, 50), (50, 100)]
    assert run["attempts"][0]["software"] == "bd3_scale 0.2.0, torch 2.13.0, commit abc123, with changed files"
    assert run["goodput"] is None


def test_slurm_s_attempts_take_their_place_and_give_the_goodput(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    line = {
        "attempt": 0,
        "job_id": "7",
        "nodes": ["n1"],
        "started": 1000.0,
        "ended": 1050.0,
        "from_step": 0,
        "step": 100,
    }
    line |= {"saved": 100, "outcome": "done", "reason": "all steps", "failure": False}
    write_lines(folder / "slurm/attempts.jsonl", [line])
    write_report([folder], tmp_path / "page.html")
    (run,) = page_data(tmp_path / "page.html")["runs"]
    (attempt,) = run["attempts"]
    assert (attempt["name"], attempt["to"], attempt["text"]) == ("attempt 0, job 7", 100, "done: all steps")
    seconds = sum(2048 / (8000 + step) for step in range(1, 101))
    assert run["goodput"] == pytest.approx(seconds / 50)


NUMBERS = st.sampled_from((math.nan, math.inf, -1e300, 1e300, 1 << 70, -1, 1.5))
ANYTHING = st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
TIMES = st.fixed_dictionaries({"started": NUMBERS, "ended": NUMBERS, "from_step": NUMBERS, "step": NUMBERS})
KEYS = (
    "attempt",
    "began",
    "commit",
    "clean",
    "cpu",
    "gpus",
    "hosts",
    "job_id",
    "nodes",
    "outcome",
    "started",
    "versions",
)
RECORD = st.tuples(TIMES, st.dictionaries(st.sampled_from(KEYS), ANYTHING)).map(lambda pair: pair[0] | pair[1])


@settings(max_examples=40, deadline=None)
@given(st.lists(RECORD, max_size=2), RECORD)
def test_records_of_attempts_that_hold_anything_have_a_report(lines: list[dict], start: dict) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_lines(folder / "metrics.jsonl", [train_record(1)])
        write_lines(folder / "slurm/attempts.jsonl", lines)
        for number in range(2):
            write_lines(folder / f"attempts/{number}/environment.json", [start])
        write_report([folder], folder / "page.html")
        assert page_data(folder / "page.html")["runs"][0]["step"] == 1


def test_differences_of_recipes_are_by_key() -> None:
    recipes = [{"a": 1, "b": [1, 2], "c": "x"}, {"a": 1, "b": [1], "d": None}]
    assert differences(recipes) == [("b", ["[1, 2]", "[1]"]), ("c", ["x", "–"]), ("d", ["–", "null"])]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("one", "two")]
    write_report(folders, tmp_path / "page.html")
    assert [run["label"] for run in page_data(tmp_path / "page.html")["runs"]] == [str(folder) for folder in folders]


def test_a_folder_that_is_given_twice_is_shown_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_report([folder, tmp_path / "run/../run"], tmp_path / "page.html")
    assert [run["label"] for run in page_data(tmp_path / "page.html")["runs"]] == ["tiny"]


def test_runs_whose_names_and_folders_look_the_same_are_numbered(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("\\x1b", "\x1b")]
    write_report(folders, tmp_path / "page.html")
    labels = [run["label"] for run in page_data(tmp_path / "page.html")["runs"]]
    assert labels == [rf"{tmp_path}/\x1b ({number})" for number in (1, 2)]
