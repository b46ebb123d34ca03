"""Text from a checkpoint: prompts and stop strings in words, and what the recipe knows of context and entropy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.stream import held_out_batches
from bd3_scale.data.tokenizer import MASK, Tokenizer, load_tokenizer
from bd3_scale.generate.sampler import ENTROPY_WINDOW, SMALLEST_SUBWORD_VOCABULARY, SUBWORD_ENTROPY, generate_batch
from bd3_scale.recipe.schema import Recipe

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


def read_prompts(path: Path) -> list[str]:
    """One a line: of a `.jsonl` file its string `prompt`, else the line. ValueError: there are none, or a bad line."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number} is no JSON object with a string "prompt"') from error
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{path} has no prompts: give one a line")
    return prompts


def write_texts(
    checkpoint: Path,
    prompts: Sequence[str],
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
        infill: each `[MASK]` of a prompt is a gap of one token.
        stop: strings that end a text, which does not hold them.
        min_entropy: default: 4 nats, or three quarters of the median of held-out windows for small vocabularies.
        watch: told a text's number and what it looks like, after each pass.
        sampling: see `generate_batch`.

    Raises:
        ValueError: a checkpoint without a tokeniser or of a next-token model, or what `generate_batch` refuses.
    """
    if not (checkpoint / TOKENIZER).is_dir():
        raise ValueError(f"{checkpoint} has no folder {TOKENIZER}: text cannot be read or written with it")
    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    with open_model(checkpoint) as (model, manifest, _):
        if manifest.recipe.diffusion.objective == "next_token":
            raise ValueError(
                f"{checkpoint} predicts the next token, and generation here is block diffusion: adapt it with "
                "`bd3-scale adapt`, or write it for transformers with `bd3-scale convert export`"
            )
        least = default_min_entropy(manifest) if min_entropy is None else min_entropy
        ids = [encode_prompt(tokenizer, prompt, infill) for prompt in prompts]
        context = manifest.recipe.max_position_embeddings
        limit = max_new_tokens * len(prompts)
        for first in range(0, len(prompts), batch_size):
            batch = ids[first : first + batch_size]

            def told(done: int, _: int, first: int = first) -> None:
                progress(first * max_new_tokens + done, limit)

            def watched(index: int, tokens: list[int], first: int = first) -> None:
                if watch is not None:
                    watch(first + index, tokenizer.decode(tokens))

            longest = max(map(len, batch)) + max_new_tokens
            window = context if longest > context and context >= 2 * manifest.recipe.diffusion.block_size else None
            began = time.monotonic()
            samples = generate_batch(
                model,
                batch,
                seeds=range(seed + first, seed + first + len(batch)),
                block_size=manifest.recipe.diffusion.block_size,
                max_new_tokens=max_new_tokens,
                min_entropy=least,
                window=window,
                ends=lambda tokens: kept_tokens(tokenizer, tokens, stop),
                progress=told,
                watch=watched,
                **sampling,
            )
            seconds = time.monotonic() - began
            for place, sample in enumerate(samples):
                text = tokenizer.decode(sample.tokens)
                ends = [text.index(word) for word in stop if word in text]
                text = text[: min(ends)] if ends else text
                if infill:
                    text = tokenizer.decode(sample.prompt) + text
                counts = (sample.stopped_by, sample.nfe, sample.cache_passes)
                yield Written(prompts[first + place], text, sample.tokens, *counts, least, window, seconds)


def default_min_entropy(manifest: CheckpointManifest) -> float:
    """Nats, below which the last 256 tokens of a text are taken for stuck; 0 where no held-out text tells a small
    vocabulary's.
    """
    if manifest.vocabulary.size >= SMALLEST_SUBWORD_VOCABULARY:
        return SUBWORD_ENTROPY
    recipe = manifest.recipe
    if not isinstance(recipe, Recipe) or not (Path(recipe.data.path) / "manifest.json").is_file():
        return 0.0
    data = load_manifest(recipe.data.path)
    if data.validation is None:
        return 0.0
    share = {"batch_size": 16, "dp_rank": 0, "dp_size": 1, "sequences": MEDIAN_SEQUENCES}
    local = recipe.data.model_copy(update={"remote": None, "cache_limit": None})
    tokens = np.concatenate([b.tokens[b.counted].numpy() for b in held_out_batches(local, data, **share)])
    windows = tokens[: len(tokens) // ENTROPY_WINDOW * ENTROPY_WINDOW].reshape(-1, ENTROPY_WINDOW)
    if not len(windows):
        return 0.0
    shares = (np.unique(window, return_counts=True)[1] / ENTROPY_WINDOW for window in windows)
    return SHARE_OF_MEDIAN * float(np.median([-(share * np.log(share)).sum() for share in shares]))


def encode_prompt(tokenizer: Tokenizer, prompt: str, infill: bool) -> list[int]:
    """Return the ids of a prompt; without `infill` a `[MASK]` in it is text like any other."""
    if not infill:
        return tokenizer.encode(prompt)
    if MASK not in prompt:
        raise ValueError(f"--infill fills the {MASK} of a prompt, and there is none in {prompt[:60]!r}")
    first, *rest = (tokenizer.encode(piece) for piece in prompt.split(MASK))
    return first + [i for piece in rest for i in (tokenizer.vocabulary.mask_id, *piece)]


def kept_tokens(tokenizer: Tokenizer, tokens: list[int], stop: Sequence[str]) -> int | None:
    """Return the fewest tokens whose text holds one of the strings; None: none is there."""
    if not any(word in tokenizer.decode(tokens) for word in stop):
        return None
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        text = tokenizer.decode(tokens[:middle])
        low, high = (low, middle) if any(word in text for word in stop) else (middle + 1, high)
    return high
