"""What a model is trained for; see `base` for the type, and the other files for one objective each."""

from bd3_scale.objective.base import Draw, MissingObjective, Objective, objective_of
from bd3_scale.objective.block_diffusion import BlockDiffusion
from bd3_scale.objective.next_token import NextToken
from bd3_scale.objective.score_entropy import ScoreEntropy
from bd3_scale.registry import objectives

__all__ = [
    "BlockDiffusion",
    "Draw",
    "MissingObjective",
    "NextToken",
    "Objective",
    "ScoreEntropy",
    "objective_of",
    "objectives",
]
