"""Fill a cache as the sampler does."""

from __future__ import annotations

from torch import Tensor


def read(model, clean_BL: Tensor, block_size: int, cache) -> None:
    """Append the clean blocks of each text at once, from position 0 on."""
    positions = clean_BL.new_tensor(range(clean_BL.shape[1]))
    for text, clean_L in enumerate(clean_BL):
        model.append(clean_L.view(-1, block_size), positions.view(-1, block_size), cache, text)
