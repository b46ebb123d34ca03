"""Read what generation needs from a checkpoint: its tokeniser, the ids that end a text, and the entropy of its data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest
from bd3_scale.checkpoint.source_ids import source_ids
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.stream import held_out_batches
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.generate.draft import ENTROPY_WINDOW, SMALLEST_SUBWORD_VOCABULARY, SUBWORD_ENTROPY

# The threshold as a share of the median entropy of held-out windows, for vocabularies whose text never has 4 nats.
SHARE_OF_MEDIAN = 0.75
MEDIAN_SEQUENCES = 256


def checkpoint_tokenizer(checkpoint: Path, manifest: CheckpointManifest) -> Tokenizer:
    """Return the tokeniser of a checkpoint, with BOS if documents of the training began with it.

    ValueError: there is none.
    """
    if not (checkpoint / TOKENIZER).is_dir():
        raise ValueError(f"{checkpoint} has no folder {TOKENIZER}: text cannot be read or written with it")
    return load_tokenizer(checkpoint / TOKENIZER).with_bos(manifest.vocabulary.bos_id)


def stop_ids(checkpoint: Path, manifest: CheckpointManifest) -> tuple[int, ...]:
    """Return the ids that end a text: the vocabulary's EOS, and every `eos_token_id` of an imported model's files."""
    source = source_ids(checkpoint)
    stops: set[int] = {manifest.vocabulary.eos_id}
    for part in (source.config, source.generation_config):
        ids = part.get("eos_token_id")
        stops |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    return tuple(sorted(i for i in stops if 0 <= i < manifest.vocabulary.size))


def check_fills_masks(path: Path, manifest: CheckpointManifest) -> None:
    """Raise ValueError if the model at the path `path` fills no masks, and so cannot generate text here."""
    if not manifest.fills_masks:
        raise ValueError(
            f"{path} was trained for {manifest.objective} and fills no masks, but generation here is block diffusion: "
            "adapt the model with `bd3-scale adapt`, or export it for transformers with `bd3-scale convert export`"
        )


def default_min_entropy(manifest: CheckpointManifest) -> float:
    """Return the entropy in nats below which the last 256 tokens of a text count as degenerate.

    It is 4 for subword vocabularies, and for small ones a share of the median of held-out text; 0 without such text.
    """
    if manifest.vocabulary.size >= SMALLEST_SUBWORD_VOCABULARY:
        return SUBWORD_ENTROPY
    trained = manifest.trained_data()
    # All sources have the same vocabulary: the first one represents them.
    trained = trained and trained.first_source
    if trained is None or not (Path(trained.path) / "manifest.json").is_file():
        return 0.0
    data = load_manifest(trained.path)
    if data.validation is None:
        return 0.0
    share = {"batch_size": 16, "dp_rank": 0, "dp_size": 1, "sequences": MEDIAN_SEQUENCES}
    local = trained.model_copy(update={"remote": None, "cache_limit": None})
    tokens = np.concatenate([b.tokens[b.counted].numpy() for b in held_out_batches(local, data, **share)])
    windows = tokens[: len(tokens) // ENTROPY_WINDOW * ENTROPY_WINDOW].reshape(-1, ENTROPY_WINDOW)
    if not len(windows):
        return 0.0
    shares = (np.unique(window, return_counts=True)[1] / ENTROPY_WINDOW for window in windows)
    return SHARE_OF_MEDIAN * float(np.median([-(share * np.log(share)).sum() for share in shares]))
