"""Define what a model is trained for: `base` has the abstract class, `inputs` shared code, and each other file is one
objective.
"""

import importlib
import pkgutil

from bd3_scale.objective.base import BLOCK_DIFFUSION_FORMATS, Draw, Objective, StepKeys, objective_of
from bd3_scale.objective.block_diffusion import BlockDiffusion
from bd3_scale.objective.next_token import NextToken
from bd3_scale.objective.score_entropy import ScoreEntropy
from bd3_scale.registry import objectives

__all__ = [
    "BLOCK_DIFFUSION_FORMATS",
    "BlockDiffusion",
    "Draw",
    "NextToken",
    "Objective",
    "ScoreEntropy",
    "StepKeys",
    "objective_of",
    "objectives",
]

for _file in pkgutil.iter_modules(__path__):
    # `inputs` imports PyTorch, which takes seconds; a launcher that only checks a recipe does without it.
    if _file.name not in ("base", "inputs"):
        importlib.import_module(f"{__name__}.{_file.name}")
