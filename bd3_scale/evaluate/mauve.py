"""Compute MAUVE, which compares samples with human text in both directions (Pillutla et al., NeurIPS 2021).

Texts become feature vectors of a judge, vectors become clusters, and the two histograms over clusters are compared by
the
area under their divergence curve: 1 where they are equal, near 0 where they share no cluster.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data.sources import DocumentReader
from bd3_scale.data.tokenizer import Tokenizer

# The defaults of `mauve-text`, the package of the paper's authors.
_SCALE = 5.0  # c in exp(-c KL)
_POINTS = 25  # of the divergence curve
_TEXTS_PER_CLUSTER = 10
_KEPT_VARIANCE = 0.9  # by the PCA
# Two clusters at least: with one, both histograms are equal whatever the texts are.
SMALLEST_SAMPLE = 2 * _TEXTS_PER_CLUSTER


def human_texts(source: Path, tokenizer: Tokenizer, *, count: int, length: int) -> list[str]:
    """Return `count` pieces of `length` tokens, spread evenly over the documents of a file or folder (.txt, .jsonl).

    ValueError: the text has fewer pieces.
    """
    pieces = []
    for document in DocumentReader([source]):
        ids = tokenizer.encode(document.text)
        # Each piece keeps the token before it: a tokeniser that marks word starts decodes a piece inside a text
        # otherwise than one at the beginning.
        starts = range(0, len(ids) - length + 1, length)
        pieces += [(ids[max(0, start - 1) : start], ids[start : start + length]) for start in starts]
    if len(pieces) < count:
        raise ValueError(
            f"{source} has {len(pieces)} pieces of {length} tokens, and MAUVE compares {count} samples with as many: "
            "give more text, or ask for fewer or shorter samples"
        )
    return [tokenizer.continuation(*pieces[index * len(pieces) // count]) for index in range(count)]


def mauve(features_p: NDArray[np.float64], features_q: NDArray[np.float64], seed: int) -> float:
    """Return MAUVE of two sets of feature vectors [texts, size].

    ValueError: fewer texts than two clusters need, or scikit-learn is not installed.
    """
    smallest = min(len(features_p), len(features_q))
    if smallest < SMALLEST_SAMPLE:
        raise ValueError(f"MAUVE of {smallest} texts says nothing: take at least {SMALLEST_SAMPLE}, better 500")
    labels = _clusters(np.concatenate([features_p, features_q]), smallest // _TEXTS_PER_CLUSTER, seed)
    size = labels.max() + 1
    p, q = (np.bincount(part, minlength=size) / len(part) for part in np.split(labels, [len(features_p)]))
    return area_under_divergence_curve(p, q)


def _clusters(features: NDArray[np.float64], number: int, seed: int) -> NDArray[np.int64]:
    try:
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise ValueError(f"scikit-learn is not installed ({error}): pip install 'bd3_scale[mauve]'") from error
    directions = features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
    reduced = PCA(n_components=_KEPT_VARIANCE, svd_solver="full").fit_transform(directions)
    labels: NDArray[np.int64] = KMeans(number, n_init=5, max_iter=500, random_state=seed).fit_predict(reduced)
    return labels


def area_under_divergence_curve(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Return the area under the divergence curve of two distributions over clusters.

    The curve has the points (exp(-c KL(q, r)), exp(-c KL(p, r))) for mixtures r = λp + (1 - λ)q. The area is taken by
    the trapezoidal rule along both axes and averaged, which makes it symmetric in p and q.
    """
    # Without the ends: at λ = 0 or 1 a divergence may be infinite. The curve's ends (0, 1) and (1, 0) are added.
    shares = np.linspace(1e-6, 1 - 1e-6, _POINTS)
    mixtures = shares[:, None] * p + (1 - shares)[:, None] * q
    x = np.concatenate([[0.0], np.exp(-_SCALE * _divergence(q, mixtures))[::-1], [1.0]])
    y = np.concatenate([[1.0], np.exp(-_SCALE * _divergence(p, mixtures))[::-1], [0.0]])
    return float((np.trapezoid(y, x) - np.trapezoid(x, y)) / 2)


def _divergence(p: NDArray[np.float64], mixtures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return KL(p, r) in nats for each mixture r."""
    support = p > 0
    divergences: NDArray[np.float64] = (p[support] * np.log(p[support] / mixtures[:, support])).sum(1)
    return divergences
