"""Count the floating-point operations of a step, and look up the peak rate of a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_scale.recipe.schema import ModelRecipe

if TYPE_CHECKING:
    import torch

# Dense bf16 in the vendors' data sheets, FLOP/s, by whole words of the device name in PyTorch; the first match counts.
_PEAK_BF16 = (
    (("B200",), 2250e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("A100",), 312e12),
    (("L40S",), 362e12),
)


def model_flops(
    model: ModelRecipe,
    vocabulary_size: int,
    *,
    noisy_rows: int,
    clean_rows: int,
    noisy_pairs: int,
    clean_pairs: int,
    head_rows: int,
) -> int:
    """Count the floating-point operations of the matrix products that a step needs, forward and backward.

    It is the numerator of MFU (Chowdhery et al., 2022, appendix B). Only the pairs that the mask allows count, and the
    rows whose result is used: in the last layer, clean rows have no queries, attention output or MLP if there are noisy
    rows. Of a mixture, the experts that a row is sent to count. Backward is twice forward, without recomputation.

    Args:
        noisy_rows, clean_rows: rows of the forward, over all sequences and noisy copies.
        noisy_pairs, clean_pairs: query-key pairs that the mask lets through, by kind of query, for one head.
        head_rows: rows whose logits are computed.
    """
    queries = model.num_attention_heads * model.head_size
    keys = 2 * model.query_groups * model.head_size
    last_rows, last_pairs = (noisy_rows, noisy_pairs) if noisy_rows else (clean_rows, clean_pairs)
    all_rows, all_pairs, before = noisy_rows + clean_rows, noisy_pairs + clean_pairs, model.num_layers - 1
    # Multiplications by each kind of weight, for one channel of the hidden size.
    features = (
        (before * all_rows + last_rows) * 2 * queries
        + model.num_layers * all_rows * keys
        + sum((all_rows if layer < before else last_rows) * _mlp_width(model, layer) for layer in range(before + 1))
        + head_rows * vocabulary_size
    )
    pairs = before * all_pairs + last_pairs
    return 3 * (features * 2 * model.hidden_size + pairs * 4 * queries)


def _mlp_width(model: ModelRecipe, layer: int) -> int:
    """Return the number of weight vectors of the hidden size that a row meets in the MLP or mixture of a layer."""
    if model.moe is None or layer < model.dense_layers:
        return model.ffn_hidden_size * (3 if model.activation == "swiglu" else 2)
    moe = model.moe
    return moe.num_experts + 3 * (moe.top_k * moe.ffn_hidden_size + moe.shared_ffn_hidden_size)


def peak_flops(dtype: torch.dtype) -> float | None:
    """Return the FLOP/s of this rank's GPU at `dtype`; None if it is not known: no MFU is better than a wrong one."""
    import torch

    if not torch.cuda.is_available() or dtype != torch.bfloat16:
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by its name in PyTorch; None if it is not known."""
    name = device_name.replace("-", " ").split()
    return next((peak for words, peak in _PEAK_BF16 if set(words) <= set(name)), None)
