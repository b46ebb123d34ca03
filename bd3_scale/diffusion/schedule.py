"""Noise schedule: from the noise level t in [0, 1] to the mask rate p."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mask_rate(noise_level: NDArray[np.float64], low: float, high: float) -> NDArray[np.float32]:
    """Mask rate of the linear schedule, p(t) = t, with t mapped affinely onto the clipped interval [low, high].

    BD3-LM (Arriola et al., ICLR 2025), section 5. float32, because that is what the loss divides by: masks are to
    be drawn with the rounded rate. ValueError: an interval outside 0 <= low <= high <= 1, or one that never masks.
    """
    if not 0.0 <= low <= high <= 1.0 or high == 0.0:
        raise ValueError(f"mask rates [{low}, {high}]: 0 <= low <= high <= 1 and high > 0 are needed")
    return np.clip(low + (high - low) * noise_level, low, high).astype(np.float32)
