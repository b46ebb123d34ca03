"""Define the commands `bd3-scale convert …`; each imports what it needs when it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bd3_scale.convert.tables import show_gguf, show_inspection, show_quantization, show_result
from bd3_scale.observe.console import put
from bd3_scale.observe.progress import Bar

if TYPE_CHECKING:
    from bd3_scale.convert.export import ExportPlan
    from bd3_scale.convert.serving import Packing

app = typer.Typer(help="Import and export checkpoints, and make smaller formats of them.", no_args_is_help=True)


@app.callback()
def _check_single_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("conversions run in one process: start them without torchrun or srun")


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the arguments and show what would be written.")]
MaskId = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="sdar, sdar_moe, llada2: id of the mask in the export; the vocabulary is padded up to it. SGLang and "
        "LMDeploy expect 151669, and 156895 for llada2.",
        show_default="training's",
    ),
]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k"]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint, or a run directory for its newest one.")]


@app.command("import", epilog="Example: bd3-scale convert import models/Qwen3-0.6B --out checkpoints/qwen3")
def import_(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder, or a checkpoint of the official bd3lms code.")],
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json or its folder.", show_default="beside the weights")
    ] = None,
    mask_token: Annotated[
        str | None,
        typer.Option(
            help="An unused token that becomes the mask, or the name of a new one.", show_default="declared, or [MASK]"
        ),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="For a block diffusion model whose files do not say it.")
    ] = None,
    mask_id: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Id of the mask of a block diffusion model whose files do not say it.",
            show_default="LLaDA2's",
        ),
    ] = None,
    eos_id: Annotated[int | None, typer.Option(min=0, help="End of document, where there is no tokeniser.")] = None,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Texts begin with BOS.", show_default="as the tokeniser's template"),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of this package, for any topology, from one of other software.

    Qwen3, Qwen3-MoE, Qwen2, Llama and Mistral models get a mask token, so that they can be adapted. SDAR, SDAR-MoE
    and LLaDA2-MoE models and those of the official bd3lms code are imported unchanged.
    """
    from bd3_scale.convert.importer import plan_import, run_import

    plan = plan_import(
        source,
        tokenizer=tokenizer,
        mask_token=mask_token,
        block_size=block_size,
        mask_id=mask_id,
        eos_id=eos_id,
        bos=bos,
    )
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    if not dry_run:
        with Bar("importing", unit="bytes") as bar:
            run_import(plan, out, bar.show)
    vocabulary = plan.vocabulary
    mask = f"{vocabulary.mask_id}, " + ("new" if plan.new_mask else "the model's own")
    show_result(
        f"{'would write' if dry_run else 'wrote and verified'} {out}",
        {
            "source": f"{plan.source}, {plan.architecture}",
            "tensors": len(plan.tensors),
            "bytes": plan.num_bytes,
            "embedding rows": f"{plan.vocab_rows}, padded to {vocabulary.padded_size}",
            "mask id": mask,
            "texts begin with": "nothing of their own" if vocabulary.bos_id is None else vocabulary.bos_id,
            "end of document": vocabulary.eos_id,
            "tokeniser": "none: text commands need one" if plan.tokenizer is None else plan.tokenizer.hash[:12],
            "objective": plan.diffusion.objective,
            "block size": plan.diffusion.block_size,
        },
        as_json,
    )


@app.command(epilog="Example: bd3-scale convert export runs/quickstart --out served/quickstart")
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="New folder.")],
    kind: Annotated[
        Literal["sdar", "sdar_moe", "llada2", "bd3", "gguf", "qwen3", "qwen3_moe", "qwen2", "llama"] | None,
        typer.Option(
            "--format",
            help="sdar, sdar_moe and llada2 run in engines; bd3 is our own for transformers; gguf is a file for "
            "llama.cpp, through which `generate` runs it on a CPU; the others are for next-token models.",
            show_default="the first that the model can become",
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Type of the weights.", show_default="that of the training"),
    ] = None,
    type_: Annotated[
        GgufType | None, typer.Option("--type", help="gguf: type of the weights.", show_default="q8_0")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="gguf: prepared data to calibrate and measure on.", show_default="what the run trained on"),
    ] = None,
    calibration_sequences: Annotated[
        int, typer.Option(min=0, help="gguf: training sequences for the importance matrix; 0: none.")
    ] = 128,
    sequences: Annotated[
        int, typer.Option(min=0, help="gguf: held-out sequences to measure on, before and after; 0: none.")
    ] = 64,
    draws: Annotated[int, typer.Option(min=1, help="gguf: noise draws a held-out sequence.")] = 2,
    mask_id: MaskId = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a Hugging Face folder that transformers and serving engines load, or a GGUF file for llama.cpp."""
    if kind == "gguf":
        if dtype is not None:
            raise ValueError(f"--dtype {dtype} is for Hugging Face folders: give --type for a GGUF file")
        if mask_id is not None:
            raise ValueError(
                f"--mask-id {mask_id} is for Hugging Face folders: llama.cpp needs no particular id, leave it out"
            )
        given = {"data": data, "calibration_sequences": calibration_sequences, "sequences": sequences, "draws": draws}
        _export_gguf(checkpoint, out, type_ or "q8_0", given, dry_run=dry_run, as_json=as_json)
        return
    if type_ is not None or data is not None:
        raise ValueError("--type and --data are for GGUF files: give --format gguf with them")
    from bd3_scale.checkpoint.folder import resolve_checkpoint
    from bd3_scale.convert.export import plan_export, run_export

    plan = plan_export(resolve_checkpoint(checkpoint), kind, dtype, mask_id)
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    padding = None
    if not dry_run:
        with Bar("exporting", unit="bytes") as bar:
            padding = run_export(plan, out, bar.show)
    show_result(
        f"{'would write' if dry_run else 'wrote and verified'} {out}",
        {
            "format": plan.config["architectures"][0],
            "weights": f"{plan.manifest.weights_state} of step {plan.manifest.step}, {plan.config['torch_dtype']}",
            "tensors": len(plan.tensors),
            "bytes": plan.num_bytes,
        }
        | _moved_mask(plan)
        | ({} if padding is None else {"in engines": padding.summary})
        | _engines(plan),
        as_json,
    )


def _moved_mask(plan: ExportPlan) -> dict[str, object]:
    """Return what a mask with another id than in training costs, empty if it has the same id."""
    if not plan.moves_mask:
        return {}
    vocabulary, rows = plan.manifest.vocabulary, plan.config["vocab_size"]
    padding = f"{plan.padding_bytes:,} bytes: {rows:,} rows of embedding and head in place of {vocabulary.size:,}"
    return {"mask": f"{plan.mask_id}, {vocabulary.mask_id} in training", "padding": padding}


def _engines(plan: ExportPlan, packing: Packing | None = None) -> dict[str, object]:
    from bd3_scale.convert.serving import engines

    return {
        engine.name: f"{'runs it' if engine.runs else 'does not run it'}: {engine.reason}"
        for engine in engines(plan.kind, plan.mask_id, packing)
    }


def _export_gguf(
    checkpoint: Path, out: Path, kind: GgufType, given: dict[str, Any], *, dry_run: bool, as_json: bool
) -> None:
    import dataclasses

    from bd3_scale.checkpoint.folder import resolve_checkpoint
    from bd3_scale.convert.gguf import plan_gguf
    from bd3_scale.convert.gguf_export import GgufOptions, run_gguf_export
    from bd3_scale.convert.gguf_types import uses_importance
    from bd3_scale.evaluate.measured_text import data_recipe

    if not uses_importance(kind):
        given["calibration_sequences"] = 0
    plan = plan_gguf(resolve_checkpoint(checkpoint), kind, importance=given["calibration_sequences"] > 0)
    needs_data = given["calibration_sequences"] or given["sequences"]
    prepared = data_recipe(plan.export.manifest, given["data"]) if needs_data else None
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    if dry_run:
        entries: dict[str, object] = {"architecture": plan.architecture, "type": kind, "bytes": plan.num_bytes}
        show_result(f"would write {out / plan.name}", entries, as_json)
        return
    with Bar("exporting") as bar:
        report = run_gguf_export(plan, out, GgufOptions(**{**given, "data": prepared}), bar.show)
    if as_json:
        put(json.dumps(dataclasses.asdict(report)))
        return
    show_gguf(report, out / plan.name)


@app.command(epilog="Example: bd3-scale convert quantize runs/quickstart --bits 4 --out served/quickstart-int4")
def quantize(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="New folder.")],
    bits: Annotated[Literal["4", "8"], typer.Option(help="Bits a weight.")] = "4",
    method: Annotated[
        Literal["rtn", "gptq"] | None,
        typer.Option(
            help="Round to nearest, or GPTQ, calibrated on block diffusion inputs at all mask rates.",
            show_default="gptq for 4 bits, rtn for 8",
        ),
    ] = None,
    group_size: Annotated[int, typer.Option(min=1, help="Input features that share a scale.")] = 128,
    data: Annotated[
        str | None,
        typer.Option(help="Prepared data to calibrate and measure on.", show_default="what the run trained on"),
    ] = None,
    calibration_sequences: Annotated[int, typer.Option(min=1, help="Training sequences to calibrate on.")] = 128,
    sequences: Annotated[int, typer.Option(min=1, help="Held-out sequences of each source to measure on.")] = 256,
    draws: Annotated[int, typer.Option(min=1, help="Noise draws a held-out sequence.")] = 4,
    dtype: Annotated[
        Literal["bfloat16", "float16"],
        typer.Option(help="Type of the weights that are not quantised, and of the scales."),
    ] = "bfloat16",
    mask_id: MaskId = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a Hugging Face folder with the layers' weights in 4 or 8 bits, as compressed-tensors packs them.

    Embedding, norms and head are kept. The report shows the error of each weight and the loss in held-out perplexity.
    """
    import dataclasses

    from bd3_scale.checkpoint.folder import resolve_checkpoint
    from bd3_scale.convert.calibration import check_data
    from bd3_scale.convert.export import plan_export
    from bd3_scale.convert.quantize import check_quantizable, is_quantized, packing_of, run_quantize
    from bd3_scale.convert.quantizer import Scheme
    from bd3_scale.evaluate.measured_text import data_recipe

    plan = plan_export(resolve_checkpoint(checkpoint), None, dtype, mask_id)
    scheme = Scheme(bits=4 if bits == "4" else 8, group_size=group_size)
    chosen = method or ("gptq" if scheme.bits == 4 else "rtn")
    check_quantizable(plan, scheme)
    prepared = data_recipe(plan.manifest, data)
    check_data(plan, prepared)
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    engine_table = _engines(plan, packing_of(plan, scheme, chosen))
    if dry_run:
        numels = {True: 0, False: 0}
        for tensor in plan.tensors:
            numels[is_quantized(tensor)] += tensor.numel
        entries: dict[str, object] = {"method": chosen, "bits": scheme.bits, "group size": group_size}
        entries |= {"weights that are quantised": numels[True], "weights that are kept": numels[False]}
        entries |= _moved_mask(plan) | engine_table
        show_result(f"would write {out}", entries, as_json)
        return
    with Bar("quantising") as bar:
        report = run_quantize(
            plan,
            out,
            scheme,
            chosen,
            prepared,
            calibration_sequences=calibration_sequences,
            evaluation_sequences=sequences,
            draws=draws,
            progress=bar.show,
        )
    if as_json:
        put(json.dumps(dataclasses.asdict(report) | engine_table))
        return
    show_quantization(report, out, engine_table)


@app.command(
    epilog="Example: bd3-scale convert upcycle runs/quickstart --experts 8 --top-k 2 --out checkpoints/quickstart-moe"
)
def upcycle(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer, each a copy of its MLP.")],
    top_k: Annotated[int, typer.Option(min=1, help="Experts that a row is sent to.")],
    dense_layers: Annotated[int, typer.Option(min=0, help="Number of first layers that stay dense.")] = 0,
    bias: Annotated[
        bool, typer.Option("--bias", help="Give experts a selection bias, which balances them in training.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the routers.")] = 1,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a mixture of experts from a dense checkpoint; it computes the same until it is trained.

    Train it with init_from and the model.moe that the result shows.
    """
    from bd3_scale.checkpoint.folder import resolve_checkpoint
    from bd3_scale.convert.upcycle import plan_upcycle, run_upcycle

    sizes = {"num_experts": experts, "top_k": top_k, "dense_layers": dense_layers}
    plan = plan_upcycle(resolve_checkpoint(checkpoint), **sizes, bias=bias, seed=seed)
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    if not dry_run:
        with Bar("upcycling", unit="bytes") as bar:
            run_upcycle(plan, out, bar.show)
    show_result(
        f"{'would write' if dry_run else 'wrote and verified'} {out}",
        {
            "source": f"{plan.manifest.weights_state} of step {plan.manifest.step}",
            "bytes": plan.num_bytes,
            "model.moe": json.dumps(plan.moe.model_dump(exclude_defaults=True)),
        },
        as_json,
    )


@app.command("inspect", epilog="Example: bd3-scale convert inspect runs/quickstart --verify")
def inspect_(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, a run directory, a Hugging Face folder, a .bd3.gguf file, or a bd3lms file."
        ),
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and check its hash.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds and which formats it can be exported to, without loading it."""
    import dataclasses

    from bd3_scale.convert.inspect import inspect

    inspection = inspect(checkpoint, verify=verify)
    if as_json:
        put(json.dumps(dataclasses.asdict(inspection)))
    else:
        show_inspection(inspection)
    if not inspection.sound:
        raise typer.Exit(1)
