"""Build the block diffusion transformer on megatron-core's parallel layers."""

from bd3_scale.lazy import lazy_names
from bd3_scale.model import megatron_core  # noqa: F401

__getattr__, __dir__ = lazy_names(__name__)
