"""Measure seconds of a denoising pass through llama.cpp, by type, against our own sampler in fp32, in one run.

    OMP_NUM_THREADS=1 python tools/bench_gguf.py
    OMP_NUM_THREADS=1 python tools/bench_gguf.py --checkpoint runs/mine --types q8_0,q4_k_m,q4_0
    OMP_NUM_THREADS=1 python tools/bench_gguf.py --quality --checkpoint runs/mine --types q4_k_m,q4_0,q3_k_m,q2_k

Without a checkpoint the model is random (126M: 12 layers of 768, a vocabulary of 32,000): the speed of a pass does not
depend on the weights. A pass denoises one block behind a prefix of 64 tokens. Seconds are CPU seconds of the process.
All models take turns, so that other load slows all equally, and medians are compared. `--quality` prints the accuracy
of each type instead, with an importance matrix and without.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import torch
from safetensors.torch import save_file

from bd3_scale.checkpoint.folder import resolve_checkpoint
from bd3_scale.checkpoint.model import open_model
from bd3_scale.convert.architectures import config_json
from bd3_scale.convert.gguf import plan_gguf, write_gguf
from bd3_scale.convert.gguf_export import GgufOptions, run_gguf_export
from bd3_scale.convert.gguf_report import GgufReport
from bd3_scale.convert.gguf_types import FILE_TYPES, FileType, uses_importance
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.convert.names import named_tensors
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.measured_text import data_recipe
from bd3_scale.generate.llama_file import open_llama_file
from bd3_scale.observe.libraries import quieten_libraries
from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.resilience.leftovers import temporary_folder

SHAPE = ModelRecipe(num_layers=12, hidden_size=768, num_attention_heads=12, num_query_groups=4, ffn_hidden_size=2048)
ROWS = 32_000
PREFIX = 64
OURS, OURS_BF16 = "bd3_scale, fp32", "bd3_scale, bf16"


def random_checkpoint(folder: Path, shape: ModelRecipe, rows: int) -> Path:
    """Return an import of a random model with a tokeniser of bytes."""
    source, generator = folder / "source", torch.Generator().manual_seed(0)
    source.mkdir()
    tensors = {
        t.name: torch.randn(t.shape, generator=generator) * 0.03 if len(t.shape) > 1 else torch.ones(t.shape)
        for t in named_tensors(shape, vocab_rows=rows, padded_rows=rows, tied=False)
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ids = {"eos_token_id": 256, "bos_token_id": None, "pad_token_id": 256}
    how: dict[str, Any] = {"block_size": 16, "mask_id": 257, "max_position_embeddings": 1024, "dtype": "float32"}
    config = config_json("sdar", shape, vocab_rows=rows, special_ids=ids, **how)
    (source / "config.json").write_text(json.dumps(config))
    load_tokenizer("bytes").save(source)
    run_import(plan_import(source), folder / "checkpoint")
    return folder / "checkpoint"


def speeds(checkpoint: Path, folder: Path, types: list[FileType], blocks: list[int], repeats: int) -> Iterator[dict]:
    """Yield, for every block size and model, the median seconds of a pass and the file's size relative to fp32."""
    with ExitStack() as stack:
        native, manifest, _ = stack.enter_context(open_model(checkpoint, torch.float32))
        halved, _, _ = stack.enter_context(open_model(checkpoint, torch.bfloat16))
        models: dict[str, Any] = {OURS: native, OURS_BF16: halved}
        shares = {OURS: 1.0, OURS_BF16: 0.5}
        for kind in types:
            plan = plan_gguf(checkpoint, kind, importance=False)
            write_gguf(plan, folder / plan.name)
            shares[kind] = (folder / plan.name).stat().st_size / plan.whole_bytes
            file = stack.enter_context(open_llama_file(folder / plan.name))
            models[kind] = stack.enter_context(closing(file.load()))
        for size in blocks:
            passes = {name: one_pass(model, manifest.vocabulary.mask_id, size) for name, model in models.items()}
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(repeats + 1):
                for name, run in passes.items():
                    began = time.process_time()
                    run()
                    if turn:  # the first is warming up
                        seconds[name].append(time.process_time() - began)
            ours = statistics.median(seconds[OURS])
            for name, found in seconds.items():
                median = statistics.median(found)
                yield {"block": size, "model": name, "ms": 1e3 * median, "times": ours / median, "size": shares[name]}


def one_pass(model: Any, mask_id: int, size: int) -> Any:
    """Return a function that denoises one block behind the prefix, any number of times."""
    cache = model.new_cache(1, PREFIX + 2 * size)
    with torch.inference_mode():
        for start in range(0, PREFIX, size):
            block = torch.arange(start, start + size)[None] % 250
            model.prefill(block, torch.arange(start, start + size)[None], cache)
    length = cache.lengths[0]
    block, positions = torch.full((1, size), mask_id), torch.arange(length, length + size)[None]
    everywhere = torch.ones(1, size, dtype=torch.bool)

    def run() -> None:
        with torch.inference_mode():
            model.decode(block, positions, cache, everywhere)

    return run


def qualities(
    checkpoint: Path, folder: Path, types: list[FileType], data: str | None, options: GgufOptions
) -> Iterator[GgufReport]:
    """Yield the report of every type, with an importance matrix and without."""
    for kind in types:
        for calibrated in (False, True) if uses_importance(kind) else (False,):
            plan = plan_gguf(checkpoint, kind, importance=calibrated)
            how = dataclasses.replace(
                options,
                data=data_recipe(plan.export.manifest, data),
                calibration_sequences=options.calibration_sequences if calibrated else 0,
            )
            yield run_gguf_export(plan, folder / f"{kind}-{calibrated}", how)


def show_qualities(reports: Iterator[GgufReport]) -> None:
    print("| type | importance matrix | size, share of fp32 | KL at rates 0.1, 0.5, 1, nats | same most likely token "
          "| NELBO | its change ± error over text |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for report in reports:
        rates = {at.mask_rate: at for at in report.rates}
        kl, same = ([getattr(rates[rate], key) for rate in (0.1, 0.5, 1.0)] for key in ("divergence", "same_token"))
        assert report.after is not None
        assert report.change is not None
        print(
            f"| {report.type} | {'yes' if report.calibration_sequences else 'no'} "
            f"| {report.bytes_after / report.bytes_before:.3f} | {', '.join(f'{value:.1e}' for value in kl)} "
            f"| {', '.join(f'{value:.3f}' for value in same)} | {report.after.nelbo:.4f} "
            f"| {report.change.nelbo:+.4f} ± {report.change.text_standard_error or 0:.4f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--types", default="f32,f16,q8_0,q6_k,q4_k_m,q4_0", help=f"of {', '.join(FILE_TYPES)}")
    parser.add_argument("--blocks", default="4,16,32", help="sizes of a block")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a random model of 2 layers, to try the tool")
    parser.add_argument("--quality", action="store_true", help="what each type costs, of a trained --checkpoint")
    parser.add_argument("--data", help="prepared data, where the checkpoint names none")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--draws", type=int, default=2)
    options = parser.parse_args()
    types = options.types.split(",")
    if unknown := set(types) - FILE_TYPES.keys():
        parser.error(f"--types has {', '.join(sorted(unknown))}: give of {', '.join(FILE_TYPES)}")
    if options.quality and options.checkpoint is None:
        parser.error("--quality measures a trained model: name its --checkpoint")
    quieten_libraries()
    with temporary_folder("bench") as folder:
        if options.quality:
            how = GgufOptions(None, 128, options.sequences, options.draws)
            checkpoint = resolve_checkpoint(options.checkpoint)
            show_qualities(qualities(checkpoint, folder, types, options.data, how))
            return
        if options.checkpoint is not None:
            checkpoint = resolve_checkpoint(options.checkpoint)
        elif options.small:
            small = {"num_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 512}
            checkpoint = random_checkpoint(folder, SHAPE.model_copy(update=small), 512)
        else:
            checkpoint = random_checkpoint(folder, SHAPE, ROWS)
        sizes = [int(size) for size in options.blocks.split(",")]
        print("| L' | model | ms a pass | × ours | size, share of fp32 |\n|---|---|---|---|---|")
        for row in speeds(checkpoint, folder, types, sizes, options.repeats):
            print(
                f"| {row['block']} | {row['model']} | {row['ms']:.1f} | {row['times']:.2f} | {row['size']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
