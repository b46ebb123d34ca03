"""Denoise texts together that join and leave the batch between passes (continuous batching, by blocks).

One pass denoises the blocks of some texts and writes the finished blocks of others into the cache. Options may differ
from
text to text: unmasking rules, temperatures, lengths, windows. A long prompt is read some blocks at a time, between
passes, so that the other texts do not wait for all of it.

Shapes: B texts, L' tokens per block, M masked tokens, V vocabulary entries.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.draft import CHANCE, TOKENS, Draft, Likelihood
from bd3_scale.generate.draw import Drawing
from bd3_scale.generate.unmasking import BlindRule, Rule, SightedRule
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.registry import unmasking_rules

# Tokens of a prompt that are read at once, by device type: enough for matrix products at full speed. While other texts
# wait to be denoised it is a quarter of that, which takes about as long as one of their passes.
_PREFILL_TOKENS = {"cpu": 256}
_PREFILL_TOKENS_OTHER = 2048
Policy = tuple[Rule, Drawing]


class Denoiser:
    """Denoises a batch of texts with one model.

    All tensor-parallel ranks make the same calls (collective). A text depends on its own request alone and not on the
    rest of the batch, except for the last bits of the logits: matrix products of other sizes round differently.

    Args:
        slots: most texts at once. capacity: tokens per text that the cache holds.
    """

    def __init__(self, model: BlockDiffusionTransformer, *, block_size: int, slots: int, capacity: int) -> None:
        model.eval()
        self._model, self._size, self._slots = model, block_size, slots
        self._cache = model.new_cache(slots, capacity)
        self._cache.keep(())
        self._device = next(model.parameters()).device
        # A pass runs over the first rows of the cache, so texts whose prompt is still being read come last in it.
        self._active: list[Draft] = []
        self._prefilling: list[Draft] = []

    @property
    def active(self) -> list[Draft]:
        """Return the texts whose prompts are in the cache, as a new list."""
        return list(self._active)

    @property
    def reads(self) -> bool:
        """Return whether a prompt is not completely in the cache yet."""
        return bool(self._prefilling)

    @property
    def free(self) -> int:
        """Return how many more texts may join."""
        return self._slots - len(self._active) - len(self._prefilling)

    def join(self, draft: Draft) -> None:
        """Add a text, whose request was checked. ValueError: its rule does not allow blocks of this size."""
        sampling_policy(draft.request.sampling, self._size)
        assert self.free
        self._cache.add()
        self._prefilling.append(draft)
        if not draft.unread:
            self._open(draft)

    def leave(self, drafts: Iterable[Draft]) -> None:
        """Remove texts and free their slots."""
        removed = {id(draft) for draft in drafts}
        texts = [*self._active, *self._prefilling]
        kept = [place for place, draft in enumerate(texts) if id(draft) not in removed]
        if len(kept) < len(texts):
            self._cache.keep(kept)
            self._active, self._prefilling = (
                [draft for draft in group if id(draft) not in removed] for group in (self._active, self._prefilling)
            )

    @torch.no_grad()
    def read(self, *, briefly: bool = False) -> None:
        """Write the next blocks of the first incomplete prompt into the cache; briefly: other texts wait meanwhile."""
        draft, place = self._prefilling[0], len(self._active)
        most = _PREFILL_TOKENS.get(self._device.type, _PREFILL_TOKENS_OTHER) // (4 if briefly else 1)
        rows = max(1, most // self._size) * self._size
        start = len(draft.tokens) - draft.unread
        part = draft.tokens[start : start + rows]
        blocks = torch.tensor(part, device=self._device).view(-1, self._size)
        positions = start + torch.arange(len(part), device=self._device).view(-1, self._size)
        self._model.append(blocks, positions, self._cache, place)
        draft.cache_passes += 1
        draft.unread -= len(part)
        if not draft.unread:
            self._open(draft)

    def _open(self, draft: Draft) -> None:
        """Begin the first block of a text whose prompt is in the cache, and move it before the incomplete ones."""
        place = len(self._active) + self._prefilling.index(draft)
        self._cache.swap(len(self._active), place)
        self._prefilling[place - len(self._active)] = self._prefilling[0]
        self._prefilling = self._prefilling[1:]
        self._active.append(draft)
        draft.open_block(self._size, self._model.vocabulary)

    @torch.no_grad()
    def advance(self) -> None:
        """Run one forward: it unmasks tokens of texts with masks and writes finished blocks of others into the cache.

        Both happen in the same pass. The forward writes keys and values of every block behind the cached ones; `commit`
        keeps those of finished blocks and drops those of blocks with masks, which the next pass computes anew.
        Bookkeeping is in NumPy: a call on a few numbers takes a tenth of a PyTorch call.
        """
        texts, size = self._active, self._size
        blocks = np.stack([text.block for text in texts])
        masked = blocks == self._model.vocabulary.mask_id
        positions = self._cache.positions([len(text.tokens) for text in texts], size)
        open_texts = masked.any(1).tolist()
        if any(open_texts):
            self._unmask(blocks, masked, positions)
            self._cache.commit([0 if is_open else size for is_open in open_texts])
        else:
            self._model.prefill(torch.from_numpy(blocks).to(self._device), positions, self._cache)
        for place, text in enumerate(texts):
            if open_texts[place]:
                text.block = blocks[place]
                text.step += 1
                text.nfe += 1
                text.check_finished(self._model.vocabulary)
                continue
            text.cache_passes += 1
            text.tokens = text.tokens + text.block.tolist()
            window = text.request.window
            # The window holds the block to come: as many of the oldest tokens leave it.
            if window is not None and (over := self._cache.lengths[place] + size - window) > 0:
                self._cache.forget(place, over)
            text.open_block(size, self._model.vocabulary)

    def _unmask(self, blocks: NDArray[np.int64], masked: NDArray[np.bool_], positions: Tensor) -> None:
        """Put tokens at some of the masked positions of `blocks` [B, L'], in place; the caller commits the cache."""
        texts = self._active
        policies = [sampling_policy(text.request.sampling, self._size) for text in texts]
        # A blind rule chooses before the forward, which then computes logits for the chosen positions alone.
        places = masked.copy()
        for place, (text, (rule, _)) in enumerate(zip(texts, policies, strict=True)):
            if isinstance(rule, BlindRule):
                places[place] = _blind_places(text, masked[place], rule)
        at = torch.from_numpy(places).to(self._device)
        logits = self._model.decode(torch.from_numpy(blocks).to(self._device), positions, self._cache, at)
        uniforms = np.stack([text.uniforms(TOKENS, self._size) for text in texts])
        row_text = np.nonzero(places)[0]
        for (rule, drawing), group in _by_policy(policies).items():
            covers_batch = len(group) == len(texts)
            rows = logits if covers_batch else logits[torch.from_numpy(np.isin(row_text, group)).to(self._device)]
            if not len(rows):
                continue
            group_places = places[group]
            chances = torch.from_numpy(uniforms[group][group_places])
            if not isinstance(rule, SightedRule):
                drawn = drawing.tokens(rows, chances)
            else:
                drawn, confidence, entropy = drawing.draw(rows, chances)
                chosen = _seen_places(rule, [texts[i] for i in group], group_places, confidence, entropy)
                taken = torch.from_numpy(chosen[group_places]).to(self._device)
                drawn, rows, group_places = drawn[taken], rows[taken], chosen
            inside = blocks[group]
            inside[group_places] = drawn.cpu().numpy()
            blocks[group] = inside
            _keep_likelihoods([texts[i] for i in group], group_places, rows, drawn)


def sampling_policy(sampling: SamplingConfig, block_size: int) -> Policy:
    """Return the unmasking rule and the drawing of tokens. ValueError: the rule does not allow blocks of this size."""
    drawing = Drawing(sampling.temperature, sampling.top_k, sampling.top_p)
    return _rule(sampling.unmasking, sampling.steps, sampling.threshold, block_size), drawing


@functools.lru_cache(maxsize=64)
def _rule(name: str, steps: int | None, threshold: float | None, block_size: int) -> Rule:
    """Return the same object for equal options, so that `_by_policy` can group texts by it."""
    return unmasking_rules.get(name)(block_size, steps, threshold)


def _by_policy(policies: Sequence[Policy]) -> Mapping[Policy, list[int]]:
    """Return the indices of the texts that have each policy."""
    groups: dict[Policy, list[int]] = {}
    for index, policy in enumerate(policies):
        groups.setdefault(policy, []).append(index)
    return groups


def _blind_places(text: Draft, masked: NDArray[np.bool_], rule: BlindRule) -> NDArray[np.bool_]:
    """Return the positions to unmask, bool [L']. Steps that unmask nothing are skipped: they need no forward."""
    while masked.any():
        chosen = rule.choose(masked, text.order, text.uniforms(CHANCE, len(masked)), text.step)
        if chosen.any():
            return chosen
        text.step += 1
    return masked


def _seen_places(
    rule: SightedRule, texts: Sequence[Draft], masked: NDArray[np.bool_], confidence: Tensor, entropy: Tensor
) -> NDArray[np.bool_]:
    """Return the positions to unmask, bool [B, L'], by confidence and entropy [M] of the masked ones.

    ValueError: the rule leaves a block unchanged, which would never end.
    """
    device = confidence.device
    at = torch.from_numpy(masked).to(device)
    spread = (torch.zeros(masked.shape, dtype=torch.float64, device=device) for _ in range(2))
    confidence_BL, entropy_BL = (s.masked_scatter(at, x) for s, x in zip(spread, (confidence, entropy), strict=True))
    steps = torch.tensor([text.step for text in texts]).to(device)
    chosen = rule.choose(confidence_BL, entropy_BL, at, steps).cpu().numpy()
    if not np.array_equal(chosen.any(1), masked.any(1)):
        name = unmasking_rules.name_of(type(rule))
        raise ValueError(
            f"the unmasking rule {name} chose no position of a block with masks: it must choose at least one, such as "
            "the most confident"
        )
    return chosen


def _keep_likelihoods(texts: Sequence[Draft], places: NDArray[np.bool_], logits_MV: Tensor, tokens_M: Tensor) -> None:
    """Record the model's probabilities of the drawn tokens, for requests that ask for them."""
    if all(text.request.alternatives is None for text in texts):
        return
    logs = logits_MV.double().log_softmax(-1)
    taken = logs.gather(-1, tokens_M[:, None])[:, 0].tolist()
    for row, (of, place) in enumerate(zip(*np.nonzero(places), strict=True)):
        text = texts[of]
        if (count := text.request.alternatives) is None:
            continue
        values, ids = logs[row].topk(min(count, logs.shape[1]))
        most = [(int(i), float(v)) for i, v in zip(ids, values, strict=True) if v > -torch.inf]  # the mask token has −∞
        text.likelihoods[len(text.tokens) + int(place)] = Likelihood(taken[row], most)
