from bd3_scale.model.build import build_model as build_model
from bd3_scale.model.transformer import BlockDiffusionTransformer as BlockDiffusionTransformer
