"""Export to GGUF: a folder with the file, a model card and a report, which appears complete or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bd3_scale.checkpoint.model import open_model
from bd3_scale.convert.calibration import Calibration, check_data
from bd3_scale.convert.check_export import expected_logits
from bd3_scale.convert.export import check_undamaged
from bd3_scale.convert.gguf import GgufPlan, Importance, check_tokenizer_ids, undersampled_weights, write_gguf
from bd3_scale.convert.gguf_report import GgufReport, HeldOutText
from bd3_scale.convert.gguf_types import uses_importance
from bd3_scale.convert.quantizer import SquareSum
from bd3_scale.convert.serving import gguf_card
from bd3_scale.generate.llama_file import open_llama_file
from bd3_scale.generate.llama_model import LlamaModel
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.observe.environment import available_bytes
from bd3_scale.recipe.schema import DataRecipe
from bd3_scale.resilience.files import check_writable, new_folder

REPORT = "gguf_report.json"
# Allowed norm of the logits' difference over the logits' norm, by type. Measured on random weights, which rounding
# changes most (8 layers of width 512): 3e-6, 3e-3, 2e-2 and 6e-2; a wrong graph gives 1. Coarser types are measured,
# not checked.
_TOLERANCES = {"f32": 1e-3, "f16": 2e-2, "bf16": 1e-1, "q8_0": 2e-1}
# With experts rounding routes some rows to other experts; 8 such layers gave up to 0.3.
_MIXTURE_TOLERANCE = 0.5


@dataclass(frozen=True)
class GgufOptions:
    """Options of calibration and measurement.

    data: prepared data with a held-out split; None if nothing is calibrated or measured. calibration_sequences: for the
    importance matrix; 0: no matrix. sequences: held-out sequences to measure on; 0: none. draws: noise draws of each.
    """

    data: DataRecipe | None
    calibration_sequences: int
    sequences: int
    draws: int


def run_gguf_export(
    plan: GgufPlan, out: Path, options: GgufOptions, progress: Callable[[int, int], object] = lambda done, total: None
) -> GgufReport:
    """Write the folder `out`, read the file again, compute with it in llama.cpp, and measure the loss.

    If nothing is calibrated or measured, a model that does not fit in memory is written one tensor at a time, and
    llama.cpp's logits are not compared with it.

    Raises:
        FileExistsError: `out` exists; OSError: it cannot be written; ValueError: llama.cpp computes other logits, or
            other ids of a text.
    """
    if options.data is not None:
        check_data(plan.export, options.data)
    check_undamaged(plan.export)
    check_writable(out.parent, plan.num_bytes)
    calibrates = options.calibration_sequences if uses_importance(plan.kind) else 0
    objective = plan.export.manifest.trained_objective()
    text = None
    if options.sequences and options.data is not None:
        text = HeldOutText(options.data, objective, options.sequences, options.draws)
    unchecked = None if calibrates or text else _too_large(plan)
    with new_folder(out) as folder, ExitStack() as opened:
        native = None
        if unchecked is None:
            native, _, _ = opened.enter_context(open_model(plan.export.checkpoint, torch.float32))
        done, total = 0.0, 100 + (text.steps if text else 0)

        def advance(count: float) -> None:
            nonlocal done
            done += count
            progress(int(done), total)

        importance = None
        if calibrates:
            assert options.data is not None
            assert native is not None
            mixed = options.data.as_mixed_before(plan.export.manifest.step)
            importance = importance_matrix(native, Calibration(native, mixed, objective, calibrates))
        path = folder / plan.name
        write_gguf(plan, path, importance, lambda size: advance(100 * size / (2 * plan.num_bytes)))
        report = GgufReport(
            type=plan.kind,
            architecture=plan.architecture,
            bytes_before=plan.whole_bytes,
            bytes_after=path.stat().st_size,
            calibration_sequences=calibrates,
            checked_texts=check_tokenizer_ids(plan, path),
            evaluation_sequences=text.sequences if text else 0,
            draws=options.draws if text else 0,
            unchecked=unchecked,
            seldom=undersampled_weights(importance) if importance else {},
        )
        if native is not None:
            with open_llama_file(path) as file, closing(file.load()) as model:
                check_logits(plan, native, model)
                if text is not None:
                    before, after, change = text.nelbo(native, model, advance)
                    rates = text.rates(native, model, advance)
                    report = dataclasses.replace(report, before=before, after=after, change=change, rates=rates)
        (folder / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")
        card = gguf_card(plan.name, plan.kind, plan.export.manifest)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def _too_large(plan: GgufPlan) -> str | None:
    """Return why the model and the file do not fit in memory together to be compared; None if they do."""
    needed, available = plan.whole_bytes + plan.num_bytes, available_bytes()
    if needed <= available:
        return None
    return (
        f"the model in fp32 and the file need {needed / 1e9:.1f} GB together, and {available / 1e9:.1f} GB of memory "
        "are left: llama.cpp's logits were not compared; evaluate file and checkpoint on a machine with more memory"
    )


def importance_matrix(model: BlockDiffusionTransformer, calibration: Calibration) -> Importance:
    """Return the sums of squared inputs of each linear, on block diffusion inputs of all mask rates.

    llama.cpp's own tool (`llama-imatrix`) collects them on text read left to right, where no row is masked.
    """
    sums: dict[tuple[int, str], list[SquareSum]] = {}
    for layer in range(model.recipe.num_layers):
        sums |= {(layer, name): totals for name, totals in calibration.squares(layer).items()}
        calibration.advance(layer)
    return sums


def check_logits(plan: GgufPlan, native: BlockDiffusionTransformer, model: LlamaModel) -> None:
    """Raise ValueError if llama.cpp's logits of some clean blocks differ by more than the type's rounding explains."""
    manifest = plan.export.manifest
    size, vocabulary = manifest.block_size, manifest.vocabulary
    ids, logits = expected_logits(native, size, manifest.max_position_embeddings)
    length = ids.shape[1] // size * size or ids.shape[1]
    cache, block_logits = model.new_cache(1, length), []
    for block in ids[:, :length].numpy().reshape(-1, min(size, length)):
        start = cache.lengths[0]
        block_logits.append(cache.write(block[None], [start], np.ones((1, len(block)), dtype=np.bool_)))
        cache.commit([len(block)])
    theirs = torch.from_numpy(np.concatenate(block_logits))[:, : vocabulary.size]
    ours = logits[0, :length]
    kept = ours.isfinite()
    error = float((theirs - ours)[kept].norm() / ours[kept].norm())
    tolerance = _TOLERANCES.get(plan.kind, float("inf"))
    if manifest.model.moe is not None and plan.kind != "f32":
        tolerance = max(tolerance, _MIXTURE_TOLERANCE)
    if not error <= tolerance:
        raise ValueError(
            f"llama.cpp's logits differ by {error:.1e} of their norm, more than {plan.kind} explains: check that its "
            "release is the one in pyproject.toml, and verify the checkpoint"
        )
