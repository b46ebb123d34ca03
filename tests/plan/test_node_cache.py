"""Check the prediction of how much remote data a machine must keep."""

from __future__ import annotations

from types import SimpleNamespace

from bd3_scale.data.cache import NodeCache, ShardSizes
from bd3_scale.plan.forecast import Forecast
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.support.recipes import tiny_recipe


def test_later_stages_of_a_pipeline_keep_nothing() -> None:
    """Check twelve ranks on three machines: the second holds the last two of the first stage and two of the second."""
    recipe = Recipe.model_validate(
        tiny_recipe(
            data={"remote": "s3://bucket/data"},
            train={"global_batch_size": 192, "micro_batch_size": 1},
            parallel={"pipeline": 2},
        )
    )
    sizes = ShardSizes.expected(recipe.data.seq_len, 258)
    first_stages, all_ranks = (
        NodeCache.of_fullest(sizes, 192, machines, 6)
        for machines in ([[0, 1, 2, 3], [4, 5]], [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]])
    )
    assert first_stages.canonical_nodes < all_ranks.canonical_nodes
    vocabulary = Vocabulary(size=258, eos_id=256, mask_id=257, bos_id=None)
    hardware = SimpleNamespace(gpus_per_node=4)
    forecast = Forecast(recipe, vocabulary, 12, hardware, 0, [], None, {}, {}, {})
    assert forecast.node_cache == first_stages
