"""How many floating-point operations a step needs, and what a GPU can do at the most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_scale.recipe.schema import ModelRecipe

if TYPE_CHECKING:
    import torch

# Dense bf16 in the vendors' data sheets, FLOP/s, by whole words of torch's device name; the first that fits counts.
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
    """Count the matrix products of forward and backward that a step cannot do without, in floating-point operations.

    The count behind MFU (Chowdhery et al., 2022, appendix B), of the mask's real pairs and the rows that something
    reads: the last layer makes no queries, attention output or MLP of clean rows where there are noisy ones. Backward
    is twice forward; what is recomputed there is not counted.

    Args:
        noisy_rows, clean_rows: rows of the forward, over all sequences and noisy copies.
        noisy_pairs, clean_pairs: query-key pairs that the mask lets through, by kind of query, for one head.
        head_rows: rows of which logits are made.
    """
    queries = model.num_attention_heads * model.head_size
    keys = 2 * model.query_groups * model.head_size
    mlp = model.ffn_hidden_size * (3 if model.activation == "swiglu" else 2)
    a_row = 2 * model.hidden_size * (2 * queries + mlp)
    a_key = 2 * model.hidden_size * keys
    last_rows, last_pairs = (noisy_rows, noisy_pairs) if noisy_rows else (clean_rows, clean_pairs)
    before = model.num_layers - 1
    rows = before * (noisy_rows + clean_rows) + last_rows
    pairs = before * (noisy_pairs + clean_pairs) + last_pairs
    forward = (
        rows * a_row
        + model.num_layers * (noisy_rows + clean_rows) * a_key
        + pairs * 4 * queries
        + head_rows * 2 * model.hidden_size * vocabulary_size
    )
    return 3 * forward


def peak_flops(dtype: torch.dtype) -> float | None:
    """Return the FLOP/s of this rank's GPU at `dtype`; None where they are not known: no MFU beats a wrong one."""
    import torch

    if not torch.cuda.is_available() or dtype != torch.bfloat16:
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by its name in PyTorch; None where it is not known."""
    name = device_name.replace("-", " ").split()
    return next((peak for words, peak in _PEAK_BF16 if set(words) <= set(name)), None)
