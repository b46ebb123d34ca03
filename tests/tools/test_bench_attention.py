"""Check that the benchmark runs in all forms, counts work as the mask does, and gives no numbers for a wrong result."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools/bench_attention.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_attention", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_json_lines_of_the_machine_and_of_every_pass(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--quick", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    machine, *rows = map(json.loads, done.stdout.splitlines())
    assert torch.__version__ in machine["versions"]
    assert machine["command"] == "python tools/bench_attention.py --device cpu --quick --json"
    assert {"hardware", "commit"} <= machine.keys()
    assert [row["pass"] for row in rows] == ["forward", "backward", "both", "decode"]
    # Documents of 40 and 24 in blocks of 8: a row sees all before its block, and its block; noisy and clean rows.
    pairs = 2 * 2 * sum(8 * (8 * block + 8) for blocks in (5, 3) for block in range(blocks))
    for row, flops in zip(rows, (4, 10, 14), strict=False):
        assert row["rate"] * row["ms"] / 1e3 == pytest.approx(flops * 2 * 16 * pairs)
        assert row["rivals"].keys() == {"dense", "causal"}
        assert min(row["ms"], row["limit"], *row["rivals"].values()) > 0
    keys_and_values, queries_and_output = 2 * 64 * 2 * 16, 2 * 4 * 4 * 16
    assert rows[3]["rate"] * rows[3]["ms"] / 1e3 == pytest.approx(4 * (keys_and_values + queries_and_output))
    assert rows[3]["rivals"].keys() == {"dense"}


def test_a_table_for_people_and_its_part_of_the_file(bench, tmp_path, capsys) -> None:
    path = tmp_path / "attention.md"
    path.write_text("# Attention\n\nold\n\n## cpu\n\nold numbers\n\n## cuda\n\nmeasured elsewhere\n")
    assert bench.main(["--device", "cpu", "--quick", "--markdown", str(path)]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("| float32")]
    assert len(lines) == 4
    assert all("×" in line for line in lines)
    text = path.read_text()
    assert "old" not in text
    assert text.endswith("## cuda\n\nmeasured elsewhere\n")
    assert [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| float32")] == [
        "forward",
        "backward",
        "both",
        "decode",
    ]
    assert "commit: " in text
    part = text.partition("<!-- begin: attention-cpu -->\n\n")[2].partition("\n\n<!-- end: attention-cpu -->")[0]
    assert part == printed.strip()


def test_what_was_not_measured_says_so(bench, tmp_path) -> None:
    path = tmp_path / "attention.md"
    bench.write_part(path, "cpu", {}, [])
    cuda = path.read_text().partition("## cuda\n")[2]
    assert cuda.count("not measured") == len(bench.CASES["cuda"])
    assert "--device cuda --markdown benchmarks/attention.md" in cuda


def off_by_one_row(function):
    def wrong(*arguments, **options):
        out = function(*arguments, **options)
        shifted = out.clone()
        shifted[0, 1, 0] = out[0, 0, 0]
        return shifted

    return wrong


def wrong_gradient(function):
    def wrong(q, k, v, **options):
        return function(q, k, v + 0.01 * (v - v.detach()), **options)

    return wrong


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("block_attention", off_by_one_row, ["L64", "2 documents", "output differs from that of dense", "of a row's"]),
        ("block_attention", wrong_gradient, ["gradient of v differs", "0.00"]),
        ("decode_attention", off_by_one_row, ["4 queries on 64 keys", "output differs"]),
        ("decode_attention", lambda f: lambda *x: f(*x) * float("nan"), ["output differs", "nan"]),
    ],
)
def test_a_wrong_result_gets_no_numbers(bench, monkeypatch, capsys, tmp_path, name, fault, words) -> None:
    monkeypatch.setattr(bench, name, fault(getattr(bench, name)))
    path = tmp_path / "attention.md"
    assert bench.main(["--device", "cpu", "--quick", "--json", "--markdown", str(path)]) == 1
    captured = capsys.readouterr()
    assert [word for word in words if word not in captured.err] == []
    assert captured.err.startswith("error: ")
    kind = "decode" if name == "decode_attention" else "forward"
    assert f'"pass": "{kind}"' not in captured.out
    assert not path.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_named(bench, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["--device", "cuda"])
    assert caught.value.code == 2
    assert "use --device cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_both_backwards_and_compiled_flexattention_are_measured(bench, capsys) -> None:
    assert bench.main(["--device", "cuda", "--quick", "--json"]) == 0
    _, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    backwards = ["backward", "backward, deterministic", "both", "both, deterministic"]
    assert [row["pass"] for row in rows] == ["forward", *backwards, "decode"]
    assert all(row["rivals"].keys() == {"dense", "flex", "causal"} for row in rows[:-1])
