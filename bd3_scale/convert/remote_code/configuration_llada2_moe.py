"""Configuration of LLaDA2-MoE: the keys are its own, which `Bd3Config` knows, too."""

from __future__ import annotations

from .configuration_bd3 import Bd3Config


class LLaDA2MoeConfig(Bd3Config):
    """See `Bd3Config`; `block_size` and `mask_token_id` are beside what published models say."""

    model_type = "llada2_moe"
