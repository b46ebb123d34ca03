"""Process groups, the DeepSpeed engine, and what megatron-core needs to run on CPU."""

from bd3_scale.model import megatron_core  # noqa: F401
