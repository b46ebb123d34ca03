"""Compare adaptation of an autoregressive model with training from scratch on as many tokens, through the command line.

    python tools/compare_adaptation.py books-train.jsonl.zst --validation books-valid.jsonl.zst --out runs/adaptation

Trains a small autoregressive model, exports it as Qwen3, adapts that folder with recipes/adapt-small.yaml, and trains
the same model from scratch on as many tokens; writes table.md and curves.png. Existing results are not computed again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

COMMAND = [str(Path(sys.executable).parent / "bd3-scale")]
RECIPES = Path(__file__).parents[1] / "recipes"
MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 64,
    "ffn_hidden_size": 768,
    "init_std": 0.06,
}


def run(*arguments: object) -> str:
    line = [*COMMAND, *map(str, arguments)]
    print("$", *line, file=sys.stderr, flush=True)
    return subprocess.run(line, check=True, text=True, stdout=subprocess.PIPE).stdout


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def held_out(checkpoint: Path, data: Path) -> dict[str, Any]:
    return json.loads(run("evaluate", checkpoint, "--data", data, "--sequences", 256, "--draws", 4, "--json"))[0]


def main(
    text: Annotated[list[Path], typer.Argument(help="Files or folders to train on.")],
    validation: Annotated[Path, typer.Option(help="Held-out text.")],
    out: Annotated[Path, typer.Option(help="Folder of all results.")],
    ar_steps: Annotated[int, typer.Option(help="Steps of the autoregressive model, of 2,048 tokens.")] = 1000,
    vocab_size: Annotated[int, typer.Option(help="Tokens of the tokeniser.")] = 4096,
) -> None:
    """Measure what adaptation gains over training from scratch."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, data, exported = out / "tokenizer", out / "data", out / "autoregressive-hf"
    if not tokenizer.exists():
        run("data", "tokenizer", *text, "--out", tokenizer, "--vocab-size", vocab_size)
    if not data.exists():
        run(
            "data",
            "prepare",
            *text,
            "--validation",
            validation,
            "--out",
            data,
            "--tokenizer",
            tokenizer,
            "--seq-len",
            256,
        )
    small = str(RECIPES / "adapt-small.yaml")
    # Two data-parallel processes are the fastest way to train a small model on two cores.
    layout = {"parallel": {"tensor": 1}, "train": {"micro_batch_size": 4}, "launch": {"processes": 2}}
    common = {"extends": small, "model": MODEL, "data": {"path": str(data)}} | layout
    autoregressive = {
        "name": "autoregressive",
        "run_dir": str(out / "autoregressive"),
        "diffusion": {"objective": "next_token", "block_size": 1, "block_size_schedule": [], "mask_rate_low": 0.0,
                      "mask_rate_high": 1.0, "mask_noise_std": 0.0, "mask_noise_steps": 0},
        "optimizer": {"lr": 2.0e-3, "decay_steps": ar_steps // 5},
        "train": layout["train"] | {"steps": ar_steps},
    }  # fmt: skip
    scratch = {
        "name": "scratch",
        "run_dir": str(out / "scratch"),
        "diffusion": {"block_size_schedule": [], "mask_noise_std": 0.0, "mask_noise_steps": 0},
        "optimizer": {"lr": 2.0e-3},
    }
    run("train", write_recipe(out / "autoregressive.yaml", common | autoregressive))
    if not exported.exists():
        run("convert", "export", out / "autoregressive", "--out", exported, "--dtype", "float32")
    overrides = [f"data.path={data}", f"run_dir={out / 'adapted'}"]
    overrides += [f"{section}.{key}={value}" for section, keys in layout.items() for key, value in keys.items()]
    run("adapt", exported, small, *overrides)
    run("train", write_recipe(out / "scratch.yaml", common | scratch))
    results = {name: held_out(out / name, data) for name in ("autoregressive", "adapted", "scratch")}
    (out / "results.json").write_text(json.dumps(results, indent=2))
    (out / "table.md").write_text(table(results))
    plot(out)
    print(table(results))


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| model | steps | held-out NELBO, nats a token | perplexity |", "|---|---|---|---|"]
    for name, r in results.items():
        error = "exact" if r["exact"] else f"± {r['noise_standard_error']:.4f} (noise)"
        kind = f"{name}, {'next token' if r['exact'] else 'blocks of ' + str(r['block_size'])}"
        bound = "" if r["exact"] else "≤ "
        lines.append(f"| {kind} | {r['step']} | {r['nelbo']:.4f} {error} | {bound}{r['perplexity']:.1f} |")
    return "\n".join(lines) + "\n"


def plot(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name in ("adapted", "scratch"):
        records = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        points = [(r["step"], r["eval/nelbo"]) for r in records if "eval/nelbo" in r]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel("optimiser step of 2,048 tokens")
    axes.set_ylabel("held-out NELBO, nats a token")
    axes.legend()
    figure.savefig(out / "curves.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    typer.run(main)
