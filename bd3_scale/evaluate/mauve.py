"""MAUVE: how far samples are from human text, both ways (Pillutla et al., NeurIPS 2021).

Texts become vectors of a judge, vectors become clusters, and the two histograms are compared by the area under their
divergence curve: 1 where they are the same, near 0 where they share no cluster.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data.sources import DocumentReader
from bd3_scale.data.tokenizer import Tokenizer

# The paper's and its package's choices: scale of the divergences, points of the curve, texts a cluster, kept variance.
_SCALE = 5.0
_POINTS = 25
_TEXTS_PER_CLUSTER = 10
_KEPT_VARIANCE = 0.9
SMALLEST_SAMPLE = 2 * _TEXTS_PER_CLUSTER


def human_texts(source: Path, tokenizer: Tokenizer, *, count: int, length: int) -> list[str]:
    """`count` pieces of `length` tokens, evenly over the documents of a `.txt` or `.jsonl` file or a folder of them.

    ValueError: there are fewer.
    """
    pieces = []
    for document in DocumentReader([source]):
        ids = tokenizer.encode(document.text)
        # With the token before it, by which a piece is known to be no beginning.
        starts = range(0, len(ids) - length + 1, length)
        pieces += [(ids[max(0, start - 1) : start], ids[start : start + length]) for start in starts]
    if len(pieces) < count:
        raise ValueError(
            f"{source} has {len(pieces)} pieces of {length} tokens, and MAUVE compares {count} samples with as many: "
            "give more text, or ask for fewer or shorter samples"
        )
    return [tokenizer.continuation(*pieces[place * len(pieces) // count]) for place in range(count)]


def mauve(features_p: NDArray[np.float64], features_q: NDArray[np.float64], seed: int) -> float:
    """Of two sets of vectors [texts, size].

    ValueError: fewer texts than two clusters need, or scikit-learn is wanting.
    """
    smallest = min(len(features_p), len(features_q))
    if smallest < SMALLEST_SAMPLE:
        raise ValueError(f"MAUVE of {smallest} texts would tell nothing: take at least {SMALLEST_SAMPLE}, better 500")
    labels = _clusters(np.concatenate([features_p, features_q]), smallest // _TEXTS_PER_CLUSTER, seed)
    size = labels.max() + 1
    p, q = (np.bincount(part, minlength=size) / len(part) for part in np.split(labels, [len(features_p)]))
    return area_under_divergence_curve(p, q)


def _clusters(features: NDArray[np.float64], number: int, seed: int) -> NDArray[np.int64]:
    try:
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise ValueError(f"scikit-learn is wanting ({error}): pip install 'bd3_scale[mauve]'") from error
    directions = features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
    reduced = PCA(n_components=_KEPT_VARIANCE, svd_solver="full").fit_transform(directions)
    found: NDArray[np.int64] = KMeans(number, n_init=5, max_iter=500, random_state=seed).fit_predict(reduced)
    return found


def area_under_divergence_curve(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Of two distributions over clusters: under all (exp(-c KL(q, r)), exp(-c KL(p, r))) of the mixtures r between
    them, by the trapezoidal rule, once along either axis.
    """
    shares = np.linspace(1e-6, 1 - 1e-6, _POINTS)
    mixtures = shares[:, None] * p + (1 - shares)[:, None] * q
    x = np.concatenate([[0.0], np.exp(-_SCALE * _divergence(q, mixtures))[::-1], [1.0]])
    y = np.concatenate([[1.0], np.exp(-_SCALE * _divergence(p, mixtures))[::-1], [0.0]])
    return float((np.trapezoid(y, x) - np.trapezoid(x, y)) / 2)


def _divergence(p: NDArray[np.float64], mixtures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nats, KL(p, r) of each mixture r."""
    there = p > 0
    found: NDArray[np.float64] = (p[there] * np.log(p[there] / mixtures[:, there])).sum(1)
    return found
