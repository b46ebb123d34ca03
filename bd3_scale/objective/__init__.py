"""What a model is trained for: `base` has the type, `inputs` what objectives share, and every other file is one."""

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
    if _file.name not in ("base", "inputs"):  # which has PyTorch, that a launcher does without
        importlib.import_module(f"{__name__}.{_file.name}")
