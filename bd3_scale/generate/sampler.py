"""Block by block with a KV cache of the clean prefix; inside a block, by one of the rules of `unmasking`.

Blocks are aligned to position 0 including the prompt, whose tail is clean tokens of the first generated block. Texts of
a batch are at blocks of their own: a pass denoises some and puts the finished blocks of others into the cache.

Shapes: B texts, L' tokens a block, M masked tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.draw import Drawing
from bd3_scale.generate.unmasking import BlindRule, Rule, SightedRule
from bd3_scale.model.kv_cache import KVCache
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.registry import unmasking_rules

ENTROPY_WINDOW = 256
SUBWORD_ENTROPY = 4.0
SMALLEST_SUBWORD_VOCABULARY = 1024
_ORDER, _TOKENS, _CHANCE = range(3)  # last words of the random counters
_STEPS = 16  # of a block whose uniforms one counter serves


@dataclass(frozen=True)
class Sample:
    """`tokens`: generated ids, without the prompt and without EOS; `prompt`: with its gaps filled; `nfe`: denoising
    passes; `cache_passes`: apart from them.
    """

    tokens: list[int]
    prompt: list[int]
    stopped_by: str
    nfe: int
    cache_passes: int


@dataclass
class Draft:
    """A text that grows.

    tokens: of its finished blocks; block: [L'], with masks; finished: whether it has none any more; order: [L'], its
    places' uniforms; sample: where the text has ended.
    """

    index: int
    prompt: list[int]
    seed: int
    tokens: list[int]
    step: int = 0
    nfe: int = 0
    cache_passes: int = 0
    block: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    finished: bool = False
    sample: Sample | None = None
    order: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    _drawn: dict[int, tuple[tuple[int, ...], NDArray[np.float64]]] = field(default_factory=dict)

    @property
    def whole(self) -> list[int]:
        """All tokens, masks among them."""
        return self.tokens + self.block.tolist()

    @property
    def generated(self) -> int:
        """How many tokens of finished blocks, or of the sample, are behind the prompt."""
        return max(0, len(self.tokens) - len(self.prompt)) if self.sample is None else len(self.sample.tokens)

    def uniforms(self, purpose: int, count: int) -> NDArray[np.float64]:
        """float64 [count] in [0, 1) of this block and step; a generator is made for 16 steps at once, since that takes
        longer than they do.
        """
        counter = (0, self.step // _STEPS, len(self.tokens), purpose)
        if purpose not in self._drawn or self._drawn[purpose][0] != counter:
            key = np.array([self.seed, 0], dtype=np.uint64)
            bits = np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64)).random_raw(_STEPS * count)
            self._drawn[purpose] = counter, ((bits >> np.uint64(11)) * 2.0**-53).reshape(_STEPS, count)
        return self._drawn[purpose][1][self.step % _STEPS]


def generate(
    model: BlockDiffusionTransformer,
    prompt: list[int],
    sampling: SamplingConfig,
    *,
    block_size: int,
    window: int | None = None,
    eos_ids: Sequence[int] | None = None,
) -> Sample:
    """Continue one prompt; see `generate_batch`."""
    return generate_batch(model, [prompt], sampling, block_size=block_size, window=window, eos_ids=eos_ids)[0]


def generate_batch(
    model: BlockDiffusionTransformer,
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    *,
    block_size: int,
    window: int | None = None,
    eos_ids: Sequence[int] | None = None,
    ends: Callable[[int, list[int]], int | None] = lambda index, tokens: None,
) -> list[Sample]:
    """Continue every prompt, text i with the seed `sampling.seed` + i; see `denoise`."""
    passes = denoise(model, prompts, sampling, block_size=block_size, window=window, eos_ids=eos_ids, ends=ends)
    samples = {draft.index: draft.sample for going in passes for draft in going if draft.sample is not None}
    return [samples[index] for index in range(len(prompts))]


@torch.no_grad()
def denoise(
    model: BlockDiffusionTransformer,
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    *,
    block_size: int,
    window: int | None = None,
    eos_ids: Sequence[int] | None = None,
    ends: Callable[[int, list[int]], int | None] = lambda index, tokens: None,
) -> Iterator[list[Draft]]:
    """Yield the texts that are not at their end yet, or just reached it, before the first pass and after each.

    All tensor-parallel ranks call it alike and take what it yields to the end (collective). A text depends on its own
    prompt and seed, whatever the batch around it (but for the last bits of the logits). Masks in a prompt are gaps,
    which are filled in place, block by block; what follows a gap in later blocks is not seen.

    Args:
        window: how many tokens a block sees, itself among them, whole blocks; default: all.
        eos_ids: each of them ends a text; default: the vocabulary's.
        ends: told a text's number and its generated tokens after each block, how many of them to keep where the text
            ends there, else None.

    Raises:
        ValueError: no prompt, ids outside the vocabulary, no new tokens without a gap to fill, a window that is not of
            whole blocks or holds fewer than two, or more steps than the rule takes of such blocks.
    """
    rule = unmasking_rules.get(sampling.unmasking)(block_size, sampling.steps, sampling.threshold)
    drawing = Drawing(sampling.temperature, sampling.top_k, sampling.top_p)
    _check(model, prompts, sampling.max_new_tokens, window, block_size)
    model.eval()
    mask_id = model.vocabulary.mask_id
    eos_ids = (model.vocabulary.eos_id,) if eos_ids is None else eos_ids
    texts = [
        Draft(index, list(prompt), sampling.seed + index, list(prompt[: _whole(prompt, block_size, mask_id)]))
        for index, prompt in enumerate(prompts)
    ]
    cache = _prefilled(model, texts, block_size, sampling.max_new_tokens, window)
    for text in texts:
        _open_block(text, block_size, mask_id)
    while True:
        for text in texts:
            text.finished = not (text.block == mask_id).any()
            if text.finished:
                text.sample = _ended(text, model.vocabulary, sampling, eos_ids, ends)
        yield texts
        kept = [place for place, text in enumerate(texts) if text.sample is None]
        if not kept:
            return
        if len(kept) < len(texts):
            cache.keep(kept)
        texts = [texts[place] for place in kept]
        _pass(model, cache, texts, rule, drawing, window)


def _pass(
    model: BlockDiffusionTransformer,
    cache: KVCache,
    texts: Sequence[Draft],
    rule: Rule,
    drawing: Drawing,
    window: int | None,
) -> None:
    """One forward: texts with masks have some unmasked, finished blocks of others go into the cache.

    Bookkeeping is in NumPy, whose calls on a few numbers take a tenth of a tensor's.
    """
    mask_id = model.vocabulary.mask_id
    blocks = np.stack([text.block for text in texts])
    size = blocks.shape[1]
    masked = blocks == mask_id
    open_texts = masked.any(1).tolist()
    positions = cache.positions([len(text.tokens) for text in texts], size)
    if any(open_texts):
        _unmask(model, cache, texts, blocks, masked, positions, rule, drawing)
        cache.commit([0 if is_open else size for is_open in open_texts])
    else:
        model.prefill(torch.from_numpy(blocks).to(positions.device), positions, None, cache)
    for place, text in enumerate(texts):
        if open_texts[place]:
            text.block = blocks[place]
            text.step += 1
            text.nfe += 1
            continue
        text.cache_passes += 1
        text.tokens = text.tokens + text.block.tolist()
        _open_block(text, size, mask_id)
        if window is not None and (over := cache.lengths[place] + size - window) > 0:
            cache.forget(place, over)


def _unmask(
    model: BlockDiffusionTransformer,
    cache: KVCache,
    texts: Sequence[Draft],
    blocks: NDArray[np.int64],
    masked: NDArray[np.bool_],
    positions: Tensor,
    rule: Rule,
    drawing: Drawing,
) -> None:
    """Put tokens at some of the masked places of `blocks` [B, L']; what the cache is to keep of them is told later."""
    # Before the forward, where they do not depend on it.
    places = _blind_places(texts, masked, rule) if isinstance(rule, BlindRule) else masked
    at = torch.from_numpy(places).to(positions.device)
    logits = model.decode(torch.from_numpy(blocks).to(positions.device), positions, cache, at)
    uniforms = np.stack([text.uniforms(_TOKENS, blocks.shape[1]) for text in texts])
    chances = torch.from_numpy(uniforms[places])
    if not isinstance(rule, SightedRule):
        drawn = drawing.tokens(logits, chances)
    else:
        drawn, confidence, entropy = drawing.draw(logits, chances)
        chosen = _seen_places(rule, texts, at, confidence, entropy)
        drawn, places = drawn[chosen[at]], chosen.cpu().numpy()
    blocks[places] = drawn.cpu().numpy()


def _blind_places(texts: Sequence[Draft], masked: NDArray[np.bool_], rule: BlindRule) -> NDArray[np.bool_]:
    """bool [B, L']; idle steps, which unmask nothing, are passed over without a forward."""
    found = np.zeros(masked.shape, dtype=np.bool_)
    for place, text in enumerate(texts):
        here = masked[place]
        while here.any():
            found[place] = rule.choose(here, text.order, text.uniforms(_CHANCE, len(here)), text.step)
            if found[place].any():
                break
            text.step += 1
    return found


def _seen_places(
    rule: SightedRule, texts: Sequence[Draft], masked: Tensor, confidence: Tensor, entropy: Tensor
) -> Tensor:
    """bool [B, L'], by confidence and entropy [M] of the masked places; ValueError: a block is left as it was."""
    spread = (torch.zeros(masked.shape, dtype=torch.float64, device=masked.device) for _ in range(2))
    sure, doubt = (s.masked_scatter(masked, x) for s, x in zip(spread, (confidence, entropy), strict=True))
    steps = torch.tensor([text.step for text in texts]).to(masked.device)
    chosen = rule.choose(sure, doubt, masked, steps)
    if not torch.equal(chosen.any(1), masked.any(1)):
        name = unmasking_rules.name_of(type(rule))
        raise ValueError(
            f"the unmasking rule {name} took no place of a block with masks: let it take one at least, such as the "
            "most confident"
        )
    return chosen


def _open_block(text: Draft, size: int, mask_id: int) -> None:
    """The next block: what the prompt has of it, else masks."""
    given = text.prompt[len(text.tokens) : len(text.tokens) + size]
    text.block = np.array(given + [mask_id] * (size - len(given)), dtype=np.int64)
    text.step = 0
    text.order = text.uniforms(_ORDER, size)


def _whole(prompt: Sequence[int], size: int, mask_id: int) -> int:
    """Tokens of the whole blocks of a prompt before its first gap."""
    clean = prompt.index(mask_id) if mask_id in prompt else len(prompt)
    return clean // size * size


def _prefilled(
    model: BlockDiffusionTransformer, texts: Sequence[Draft], size: int, max_new_tokens: int, window: int | None
) -> KVCache:
    """The cache of the prompts' whole blocks, of which a window sees the last."""
    device = next(model.parameters()).device
    longest = max(-(-(len(text.prompt) + max_new_tokens) // size) * size for text in texts)
    cache = model.new_cache(len(texts), min(longest, window or longest))
    seen = [text.tokens[max(0, len(text.tokens) - (window - size)) :] if window else text.tokens for text in texts]
    length = max(map(len, seen))
    if length == 0:
        return cache
    eos = model.vocabulary.eos_id
    clean = torch.tensor([part + [eos] * (length - len(part)) for part in seen], device=device)
    # What fills a row up is a document of its own, and is not kept.
    ends = torch.tensor([len(part) for part in seen], device=device)[:, None]
    place = torch.arange(length, device=device)
    spans = make_spans(torch.where(place < ends, 0, ends.expand(-1, length)).to(torch.int32), size)
    starts = torch.tensor([len(text.tokens) - len(part) for text, part in zip(texts, seen, strict=True)], device=device)
    model.prefill(clean, starts[:, None] + place, spans, cache, [len(part) for part in seen])
    for text, part in zip(texts, seen, strict=True):
        text.cache_passes += bool(part)
    return cache


def _ended(
    text: Draft,
    vocabulary: Vocabulary,
    sampling: SamplingConfig,
    eos_ids: Sequence[int],
    ends: Callable[[int, list[int]], int | None],
) -> Sample | None:
    """The sample, if the finished block ends it."""
    everything, given = text.whole, len(text.prompt)
    if len(everything) < given:
        return None
    limit = sampling.max_new_tokens
    generated = everything[given : given + limit]

    def sample(count: int, stopped_by: str) -> Sample:
        return Sample(generated[:count], everything[:given], stopped_by, text.nfe, text.cache_passes)

    if (first := next((place for place, token in enumerate(generated) if token in eos_ids), None)) is not None:
        return sample(first, "eos")
    if (count := ends(text.index, generated)) is not None:
        return sample(count, "stop string")
    if _entropy(generated) < least_entropy(sampling, vocabulary):
        # They are what was found degenerate; the entropy is infinite where there are fewer.
        return sample(len(generated) - ENTROPY_WINDOW, "entropy")
    return sample(limit, "length") if len(everything) >= given + limit else None


def _check(
    model: BlockDiffusionTransformer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    window: int | None,
    block_size: int,
) -> None:
    vocabulary = model.vocabulary
    if not prompts:
        raise ValueError("there is no prompt: give at least one, which may be empty")
    for prompt in prompts:
        if bad := [i for i in prompt if not 0 <= i < vocabulary.size]:
            raise ValueError(f"a prompt holds ids {bad[:5]} that are not in this vocabulary of {vocabulary.size}")
        if max_new_tokens == 0 and vocabulary.mask_id not in prompt:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: give at least 1, or a prompt with gaps and 0")
    if window is not None and (window % block_size or window < 2 * block_size):
        raise ValueError(f"window is {window}: give a multiple of the block size {block_size}, twice that or more")


def least_entropy(sampling: SamplingConfig, vocabulary: Vocabulary) -> float:
    """Return the nats below which a text ends where nobody knows text of this vocabulary; 0 where it has few ids."""
    if sampling.min_entropy is not None:
        return sampling.min_entropy
    return SUBWORD_ENTROPY if vocabulary.size >= SMALLEST_SUBWORD_VOCABULARY else 0.0


def _entropy(tokens: list[int]) -> float:
    """Entropy in nats of the frequencies of the last 256 tokens; infinite before there are as many."""
    if len(tokens) < ENTROPY_WINDOW:
        return float("inf")
    share = np.unique(tokens[-ENTROPY_WINDOW:], return_counts=True)[1] / ENTROPY_WINDOW
    return float(-(share * np.log(share)).sum())
