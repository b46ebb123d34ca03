"""Print the parity matrix as a table: every layout against one process of plain PyTorch.

python -m tests.integration.parity            all layouts
python -m tests.integration.parity --core     those of every test run
python -m tests.integration.parity 'cp2' --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from tests.integration import cases
from tests.integration.oracle import Oracle
from tests.integration.parity_ranks import run_layout
from tests.support.forks import run_ranks

TOLERANCE = 1e-5


def measure(name: str, oracle: Oracle, folder: Path) -> dict:
    """Run one layout; return its largest difference, the name of what differs, and the median seconds of a step."""
    layout = cases.LAYOUTS[name]
    out = folder / f"{name.replace(' ', '-')}.pt"
    run_ranks(run_layout, layout.world_size, name, out, logs=out.with_suffix(""))
    found = torch.load(out)
    differ = oracle.differences(layout, found)
    worst = max(differ, key=differ.__getitem__)
    return {
        "layout": name,
        "processes": layout.world_size,
        "case": layout.case,
        "difference": differ[worst],
        "in": worst,
        "step_seconds": statistics.median(found["seconds"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", help="names of layouts; default: all")
    parser.add_argument("--core", action="store_true", help="the layouts of every test run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = options.layouts or [name for name, layout in cases.LAYOUTS.items() if layout.core or not options.core]
    unknown = [name for name in names if name not in cases.LAYOUTS]
    if unknown:
        parser.error(f"no layout {', '.join(unknown)}; there are {', '.join(cases.LAYOUTS)}")
    results, oracle = [], Oracle()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in track(names, console=console):
            try:
                results.append(measure(name, oracle, Path(folder)))
            except AssertionError as error:
                layout = cases.LAYOUTS[name]
                results.append({"layout": name, "processes": layout.world_size, "case": layout.case})
                results[-1] |= {"difference": float("nan"), "in": str(error)}
            console.print(f"{name}: {results[-1]['difference']:.1e} in {results[-1]['in']}", markup=False)
    if options.json:
        print(json.dumps(results))
    else:
        print("| layout | processes | case | largest difference | in | step, ms |\n|---|---|---|---|---|---|")
        for row in results:
            seconds = f"{1000 * row['step_seconds']:.0f}" if "step_seconds" in row else ""
            cells = (row["layout"], row["processes"], row["case"], f"{row['difference']:.1e}", row["in"], seconds)
            print("| " + " | ".join(map(str, cells)) + " |")
    return int(not all(row["difference"] <= TOLERANCE for row in results))


if __name__ == "__main__":
    raise SystemExit(main())
