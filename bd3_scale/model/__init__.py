"""The block diffusion transformer on megatron-core layers."""

from bd3_scale.model import megatron_core  # noqa: F401
