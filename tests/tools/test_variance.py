"""Compare the gradient's variance that the tool measures with the covariance of the gradients themselves."""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch

from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.model.build import build_model
from bd3_scale.model.rows import Placement
from bd3_scale.objective import StepKeys, objective_of
from bd3_scale.recipe.schema import Recipe
from tests.support.recipes import tiny_recipe
from tools.variance import FOLDS, draws_of, measure, rank_correlation

CPU = torch.device("cpu")


def test_variances_are_those_of_the_draws(groups, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(pydoc_data.topics.topics["assert"])
    options = {"document_multiple": 8, "holdout": 0.0, "workers": 1, "progress": False}
    prepare([text], tmp_path / "data", load_tokenizer("bytes"), 32, **options)
    recipe = Recipe.model_validate(
        tiny_recipe(
            data={"path": str(tmp_path / "data"), "seq_len": 32},
            train={"global_batch_size": 1, "micro_batch_size": 1},
        )
    )
    vocabulary = load_manifest(tmp_path / "data").vocabulary
    (model,) = build_model(recipe.model, vocabulary, groups, dtype=torch.float32, device=CPU, seed=1)
    batches = list(draws_of(recipe, 4 * FOLDS))
    loss, gradient = measure(model, recipe, batches, (0.3, 0.8))
    for fold in range(FOLDS):
        losses, gradients = [], []
        for step in range(fold, len(batches), FOLDS):
            keys, objective = (
                StepKeys(step, recipe.seed, 1, {8: (0.3, 0.8)}),
                objective_of(recipe.diffusion, vocabulary),
            )
            total, _ = model(objective.training_inputs(batches[step], keys, Placement(CPU)))
            model.zero_grad()
            (total / 32).backward()
            losses.append(total.item() / 32)
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
        assert loss[fold].item() == pytest.approx(torch.tensor(losses).double().var().item(), rel=1e-6)
        assert gradient[fold].item() == pytest.approx(torch.stack(gradients).var(0).sum().item(), rel=1e-6)


def test_rank_correlation_sees_order_alone():
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 1e6, 1e7]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)
