"""The block diffusion transformer on megatron-core layers."""

from bd3_scale.model import _megatron  # noqa: F401
