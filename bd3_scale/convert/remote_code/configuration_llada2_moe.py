"""Configure LLaDA2-MoE, whose keys `Bd3Config` knows."""

from __future__ import annotations

from typing import Any

from .configuration_bd3 import Bd3Config


class LLaDA2MoeConfig(Bd3Config):
    """See `Bd3Config`; `block_size` and `mask_token_id` are additions to the keys of published models."""

    model_type = "llada2_moe"

    # transformers 5 would generate an `__init__` for a class that does not define one.
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
