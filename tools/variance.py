"""Test whether the variance of the gradient follows that of the loss, over clipped intervals of mask rates.

    python tools/variance.py runs/quickstart --draws 64 --out variance.png

All intervals use the same training sequences and noise levels (common random numbers); a draw is the gradient of one
sequence's loss. The gradient's variance is the unbiased trace of its covariance, E‖g‖² − ‖E g‖². Both variances are
compared by Spearman's rank correlation, and with those of mask rates 0 to 1 (Arriola et al., ICLR 2025, section 4.2).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from bd3_scale.checkpoint.folder import resolve_checkpoint
from bd3_scale.checkpoint.model import open_model
from bd3_scale.data.batch import Batch
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.stream import TrainingStream
from bd3_scale.diffusion.interval import Interval, candidates
from bd3_scale.model.rows import Placement
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.objective import BlockDiffusion, StepKeys, objective_of
from bd3_scale.recipe.schema import Recipe

FOLDS = 4
SEED = 0


@dataclass(frozen=True)
class Variances:
    """Variances of a sequence's loss (squared nats per token) and of its gradient; standard errors over folds of
    draws."""

    low: float
    high: float
    loss: float
    loss_standard_error: float
    gradient: float
    gradient_standard_error: float


def draws_of(recipe: Recipe, count: int) -> Iterator[Batch]:
    """Yield batches of one training sequence."""
    data = load_manifest(recipe.data.path, recipe.data.remote)
    stream = TrainingStream(recipe.data, data, global_batch_size=1, dp_rank=0, dp_size=1, seed=SEED, step=0)
    for _ in range(count):
        yield next(stream)


def measure(
    model: BlockDiffusionTransformer, recipe: Recipe, batches: list[Batch], interval: Interval
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the variances of loss [FOLDS] and gradient [FOLDS] under `interval`, each over a fold of the draws."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    objective = objective_of(recipe.diffusion, model.vocabulary)
    variances = []
    for fold in range(FOLDS):
        losses, squares, mean = [], [], None
        for step, batch in enumerate(batches):
            if step % FOLDS != fold:
                continue
            keys = StepKeys(step, recipe.seed, recipe.train.global_batch_size, {recipe.diffusion.block_size: interval})
            inputs = objective.training_inputs(batch, keys, Placement(parameters[0].device))
            total, _ = model(inputs)
            gradients = torch.autograd.grad(total / batch.tokens.numel(), parameters)
            flat = torch.cat([g.double().flatten() for g in gradients])
            losses.append(total.item() / batch.tokens.numel())
            squares.append(flat.square().sum().item())
            mean = flat if mean is None else mean + flat
        count = len(losses)
        assert mean is not None
        spread = (sum(squares) - (mean / count).square().sum().item() * count) / (count - 1)
        variances.append((float(torch.tensor(losses).double().var()), spread))
    loss, gradient = torch.tensor(variances).T
    return loss, gradient


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Return Spearman's rank correlation."""
    ranks = torch.tensor([first, second]).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])


def compare(checkpoint: Path, draws: int) -> list[Variances]:
    """Measure every interval of the search's grid."""
    with open_model(resolve_checkpoint(checkpoint)) as (model, manifest, _):
        if manifest.trained_with is None or type(manifest.trained_objective()) is not BlockDiffusion:
            raise SystemExit(f"{checkpoint} was not trained here by block diffusion: there is no interval to measure")
        recipe = Recipe.model_validate(manifest.trained_with)
        plain = {"noise_schedule": "linear", "noise_steps": None, "block_size_schedule": (), "block_size_choices": ()}
        recipe = recipe.model_copy(update={"diffusion": recipe.diffusion.model_copy(update=plain), "seed": SEED})
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"global_batch_size": 1})})
        batches = list(draws_of(recipe, draws))
        variances = []
        for interval in track(candidates(recipe.diffusion.block_size), "measuring", console=Console(stderr=True)):
            loss, gradient = measure(model.train(), recipe, batches, interval)
            errors = [float(part.std() / FOLDS**0.5) for part in (loss, gradient)]
            variances.append(Variances(*interval, float(loss.mean()), errors[0], float(gradient.mean()), errors[1]))
        return variances


def draw(variances: list[Variances], out: Path) -> None:
    """Plot loss variance against gradient variance, one point for each interval, as a PNG."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    for point in variances:
        errors = {"xerr": point.loss_standard_error, "yerr": point.gradient_standard_error}
        axes.errorbar(point.loss, point.gradient, **errors, fmt="o", color="tab:blue", markersize=4, alpha=0.7)
        axes.annotate(f"{point.low:g}–{point.high:g}", (point.loss, point.gradient), fontsize=6, alpha=0.8)
    axes.set(xlabel="variance of a sequence's loss", ylabel="variance of its gradient", xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(out, format="png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--draws", type=int, default=64, help=f"sequences an interval, {4 * FOLDS} at the least")
    parser.add_argument("--out", type=Path, help="a PNG")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.draws < 4 * FOLDS:
        parser.error(f"--draws is {options.draws}: give at least {4 * FOLDS}")
    variances = compare(options.checkpoint, options.draws)
    correlation = rank_correlation([v.loss for v in variances], [v.gradient for v in variances])
    if options.out is not None:
        draw(variances, options.out)
    if options.json:
        print(json.dumps({"rank_correlation": correlation, "intervals": [asdict(v) for v in variances]}))
        return
    print("| mask rates | loss variance | of 0 to 1 | gradient variance | of 0 to 1 |\n|---|---|---|---|---|")
    whole = variances[0]
    for v in sorted(variances, key=lambda v: v.gradient):
        print(
            f"| {v.low:.2f} to {v.high:.2f} | {v.loss:.4f} ± {v.loss_standard_error:.4f} | {v.loss / whole.loss:.2f} "
            f"| {v.gradient:.4f} ± {v.gradient_standard_error:.4f} | {v.gradient / whole.gradient:.2f} |"
        )
    print(f"\nSpearman's rank correlation of both over all {len(variances)} intervals: {correlation:.3f}.")


if __name__ == "__main__":
    main()
