"""Text from a checkpoint: prompts and stop strings in words, and what the recipe knows of context and entropy."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest, read_manifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.source_ids import source_ids
from bd3_scale.data.chat import ChatTemplate, Messages
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.stream import held_out_batches
from bd3_scale.data.tokenizer import INCOMPLETE, MASK, Tokenizer, load_tokenizer
from bd3_scale.generate.sampler import ENTROPY_WINDOW, SMALLEST_SUBWORD_VOCABULARY, SUBWORD_ENTROPY, generate_batch

# Of the median entropy of held-out windows, where a window cannot reach the paper's 4 nats.
SHARE_OF_MEDIAN = 0.75
MEDIAN_SEQUENCES = 256


@dataclass(frozen=True)
class Written:
    """text: what was generated, or with gaps the whole of it. tokens: generated ids. seconds: of the whole batch.

    window: tokens that a block sees, itself among them, where the text is longer than the training's sequences.
    """

    prompt: str
    text: str
    tokens: list[int]
    stopped_by: str
    nfe: int
    cache_passes: int
    min_entropy: float
    window: int | None
    seconds: float


def checkpoint_tokenizer(checkpoint: Path, manifest: CheckpointManifest) -> Tokenizer:
    """The tokeniser of a checkpoint, which begins texts as those of its training began.

    ValueError: there is none.
    """
    if not (checkpoint / TOKENIZER).is_dir():
        raise ValueError(f"{checkpoint} has no folder {TOKENIZER}: text cannot be read or written with it")
    return load_tokenizer(checkpoint / TOKENIZER).with_bos(manifest.vocabulary.bos_id)


def stop_ids(checkpoint: Path, manifest: CheckpointManifest) -> tuple[int, ...]:
    """The ids that end a text: what ends documents, and every `eos_token_id` of the model that it came from."""
    said = source_ids(checkpoint)
    found: set[int] = {manifest.vocabulary.eos_id}
    for part in (said.config, said.generation_config):
        ids = part.get("eos_token_id")
        found |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    return tuple(sorted(i for i in found if 0 <= i < manifest.vocabulary.size))


def write_texts(
    checkpoint: Path,
    prompts: Sequence[str | Messages],
    *,
    max_new_tokens: int,
    seed: int,
    infill: bool = False,
    stop: Sequence[str] = (),
    min_entropy: float | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], object] = lambda done, limit: None,
    watch: Callable[[int, str], object] | None = None,
    **sampling: Any,
) -> Iterator[Written]:
    """Continue every prompt; text i depends on `seed` + i and its prompt alone.

    Args:
        prompts: text, or conversations that the chat template beside the checkpoint's tokeniser makes text of.
        infill: each `[MASK]` of a prompt is a gap of one token.
        stop: strings that end a text, which does not hold them.
        min_entropy: default: 4 nats, or three quarters of the median of held-out windows for small vocabularies.
        watch: told a text's number and what it looks like, after each pass.
        sampling: see `generate_batch`.

    Raises:
        ValueError: a checkpoint without a tokeniser, without a chat template for a conversation, or of a next-token
            model, or what `generate_batch` refuses.
    """
    tokenizer = checkpoint_tokenizer(checkpoint, read_manifest(checkpoint))
    with open_model(checkpoint) as (model, manifest, _):
        if not manifest.trained_objective().fills_masks:
            raise ValueError(
                f"{checkpoint} predicts the next token, and generation here is block diffusion: adapt it with "
                "`bd3-scale adapt`, or write it for transformers with `bd3-scale convert export`"
            )
        least = default_min_entropy(manifest) if min_entropy is None else min_entropy
        encoded = _encoded(checkpoint, tokenizer, prompts, infill)
        eos_ids = stop_ids(checkpoint, manifest)
        context, block_size = manifest.max_position_embeddings, manifest.block_size
        limit = max_new_tokens * len(prompts)
        for first in range(0, len(prompts), batch_size):
            batch = [ids for _, ids in encoded[first : first + batch_size]]

            def told(done: int, _: int, first: int = first) -> None:
                progress(first * max_new_tokens + done, limit)

            def watched(index: int, tokens: list[int], first: int = first) -> None:
                if watch is not None:
                    watch(first + index, settled(tokenizer.text_of(tokens)))

            def ends(index: int, tokens: list[int], batch: Sequence[list[int]] = batch) -> int | None:
                return kept_tokens(tokenizer, batch[index], tokens, stop)

            longest = max(map(len, batch)) + max_new_tokens
            window = context if longest > context and context >= 2 * block_size else None
            began = time.monotonic()
            samples = generate_batch(
                model,
                batch,
                seeds=range(seed + first, seed + first + len(batch)),
                block_size=block_size,
                max_new_tokens=max_new_tokens,
                min_entropy=least,
                window=window,
                eos_ids=eos_ids,
                ends=ends,
                progress=told,
                watch=watched,
                **sampling,
            )
            seconds = time.monotonic() - began
            for place, sample in enumerate(samples):
                text = text_before(tokenizer.continuation(sample.prompt, sample.tokens), stop)
                if infill:
                    text = tokenizer.text_of(sample.prompt) + text
                counts = (sample.stopped_by, sample.nfe, sample.cache_passes)
                yield Written(encoded[first + place][0], text, sample.tokens, *counts, least, window, seconds)


def default_min_entropy(manifest: CheckpointManifest) -> float:
    """Nats, below which the last 256 tokens of a text are taken for stuck; 0 where no held-out text tells a small
    vocabulary's.
    """
    if manifest.vocabulary.size >= SMALLEST_SUBWORD_VOCABULARY:
        return SUBWORD_ENTROPY
    trained = manifest.trained_data()
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


def _encoded(
    checkpoint: Path, tokenizer: Tokenizer, prompts: Sequence[str | Messages], infill: bool
) -> list[tuple[str, list[int]]]:
    """The text of every prompt, and its ids; a chat template says itself what a text begins with."""
    template = None if all(isinstance(prompt, str) for prompt in prompts) else ChatTemplate(checkpoint / TOKENIZER)
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            found.append((prompt, encode_prompt(tokenizer, prompt, infill)))
        else:
            assert template is not None
            text = template.prompt(prompt)
            found.append((text, tokenizer.encode_special(text)))
    return found


def encode_prompt(tokenizer: Tokenizer, prompt: str, infill: bool) -> list[int]:
    """Return the ids of a prompt; without `infill` a `[MASK]` in it is text like any other."""
    if infill and MASK not in prompt:
        raise ValueError(f"--infill fills the {MASK} of a prompt, and there is none in {prompt[:60]!r}")
    return tokenizer.encode_prompt(prompt, gaps=infill)


def kept_tokens(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], stop: Sequence[str]) -> int | None:
    """Return the fewest tokens behind a prompt whose text holds one of the strings; None: none is there."""

    def holds(count: int) -> bool:
        text = tokenizer.continuation(prompt, tokens[:count])
        return any(word in text for word in stop)

    if not stop or not holds(len(tokens)):
        return None
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def settled(text: str) -> str:
    """Return a text with masks without the characters that lack bytes, which are still masked or to come."""
    return re.sub(rf"{INCOMPLETE}+(?={re.escape(MASK)}|$)", "", text)


def text_before(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first of the strings."""
    ends = [text.index(word) for word in stop if word in text]
    return text[: min(ends)] if ends else text
