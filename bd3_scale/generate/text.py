"""What a checkpoint says of text: its tokeniser, what ends its texts, and what the recipe knows of their entropy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest
from bd3_scale.checkpoint.source_ids import source_ids
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.stream import held_out_batches
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.generate.draft import ENTROPY_WINDOW, SMALLEST_SUBWORD_VOCABULARY, SUBWORD_ENTROPY

# Of the median entropy of held-out windows, where a window cannot reach the paper's 4 nats.
SHARE_OF_MEDIAN = 0.75
MEDIAN_SEQUENCES = 256


def checkpoint_tokenizer(checkpoint: Path, manifest: CheckpointManifest) -> Tokenizer:
    """Return the tokeniser of a checkpoint, which begins texts as those of its training began.

    ValueError: there is none.
    """
    if not (checkpoint / TOKENIZER).is_dir():
        raise ValueError(f"{checkpoint} has no folder {TOKENIZER}: text cannot be read or written with it")
    return load_tokenizer(checkpoint / TOKENIZER).with_bos(manifest.vocabulary.bos_id)


def stop_ids(checkpoint: Path, manifest: CheckpointManifest) -> tuple[int, ...]:
    """Return the ids that end a text: what ends documents, and every `eos_token_id` of the model that it came from."""
    said = source_ids(checkpoint)
    found: set[int] = {manifest.vocabulary.eos_id}
    for part in (said.config, said.generation_config):
        ids = part.get("eos_token_id")
        found |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    return tuple(sorted(i for i in found if 0 <= i < manifest.vocabulary.size))


def check_fills_masks(where: Path, manifest: CheckpointManifest) -> None:
    """Raise ValueError if the model that lies there fills no masks, and writes no text here."""
    if not manifest.fills_masks:
        raise ValueError(
            f"{where} was trained for {manifest.objective} and fills no masks, and generation here is block "
            "diffusion: adapt it with `bd3-scale adapt`, or write it for transformers with `bd3-scale convert export`"
        )


def default_min_entropy(manifest: CheckpointManifest) -> float:
    """Nats, below which the last 256 tokens of a text are taken for stuck; 0 where no held-out text tells a small
    vocabulary's.
    """
    if manifest.vocabulary.size >= SMALLEST_SUBWORD_VOCABULARY:
        return SUBWORD_ENTROPY
    trained = manifest.trained_data()
    # Of several sources the first, which has the vocabulary of all.
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
