"""Configuration of LLaDA2-MoE: the keys are its own, which `Bd3Config` knows, too."""

from __future__ import annotations

from typing import Any

from .configuration_bd3 import Bd3Config


class LLaDA2MoeConfig(Bd3Config):
    """See `Bd3Config`; `block_size` and `mask_token_id` are beside what published models say."""

    model_type = "llada2_moe"

    # transformers 5 would make another of a class that has none itself.
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
