"""Texts that are denoised together, which join and leave between passes: continuous batching, by blocks.

A pass denoises the blocks of some texts and puts the finished blocks of others into the cache. What is asked for may
differ from text to text: rules, temperatures, lengths, windows. A long prompt is read some blocks at a time, between
the passes of the texts that are further.

Shapes: B texts, L' tokens a block, M masked tokens, V vocabulary entries.
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

# Of a prompt that are read at once, by the type of the device: enough for products at full speed. While other texts
# wait to be denoised it is a quarter, which takes about as long as one of their passes.
_ROWS = {"cpu": 256}
_ROWS_ELSEWHERE = 2048
Law = tuple[Rule, Drawing]


class Denoiser:
    """Denoise some texts together with one model.

    All tensor-parallel ranks call it alike (collective). What a text becomes depends on its own request alone, whatever
    the batch around it (but for the last bits of the logits).

    Args:
        slots: texts at once. capacity: tokens of each that the cache holds.
    """

    def __init__(self, model: BlockDiffusionTransformer, *, block_size: int, slots: int, capacity: int) -> None:
        model.eval()
        self._model, self._size, self._slots = model, block_size, slots
        self._cache = model.new_cache(slots, capacity)
        self._cache.keep(())
        self._device = next(model.parameters()).device
        # Those whose prompt is read stand behind the others: a pass is over the first places of the cache.
        self._active: list[Draft] = []
        self._reading: list[Draft] = []

    @property
    def active(self) -> list[Draft]:
        """Return the texts whose prompts are read, in a list of its own."""
        return list(self._active)

    @property
    def reads(self) -> bool:
        """Return whether some prompt is not read yet."""
        return bool(self._reading)

    @property
    def free(self) -> int:
        """Return how many texts may join."""
        return self._slots - len(self._active) - len(self._reading)

    def join(self, draft: Draft) -> None:
        """Take a text in, of a request that was checked. ValueError: its rule is none for blocks of this size."""
        law(draft.request.sampling, self._size)
        assert self.free
        self._cache.add()
        self._reading.append(draft)
        if not draft.unread:
            self._open(draft)

    def leave(self, drafts: Iterable[Draft]) -> None:
        """Free the places of some texts."""
        gone = {id(draft) for draft in drafts}
        texts = [*self._active, *self._reading]
        kept = [place for place, draft in enumerate(texts) if id(draft) not in gone]
        if len(kept) < len(texts):
            self._cache.keep(kept)
            self._active, self._reading = (
                [draft for draft in group if id(draft) not in gone] for group in (self._active, self._reading)
            )

    @torch.no_grad()
    def read(self, *, briefly: bool = False) -> None:
        """Put the next blocks of the first prompt that is not read into the cache; briefly: others wait for it."""
        draft, place = self._reading[0], len(self._active)
        most = _ROWS.get(self._device.type, _ROWS_ELSEWHERE) // (4 if briefly else 1)
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
        """Begin the first block of a text whose prompt is read, and move it before those that are not."""
        place = len(self._active) + self._reading.index(draft)
        self._cache.swap(len(self._active), place)
        self._reading[place - len(self._active)] = self._reading[0]
        self._reading = self._reading[1:]
        self._active.append(draft)
        draft.open_block(self._size, self._model.vocabulary)

    @torch.no_grad()
    def advance(self) -> None:
        """Run one forward: texts with masks have some unmasked, finished blocks of others go into the cache.

        Bookkeeping is in NumPy, whose calls on a few numbers take a tenth of a tensor's.
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
                text.settle(self._model.vocabulary)
                continue
            text.cache_passes += 1
            text.tokens = text.tokens + text.block.tolist()
            window = text.request.window
            if window is not None and (over := self._cache.lengths[place] + size - window) > 0:
                self._cache.forget(place, over)
            text.open_block(size, self._model.vocabulary)

    def _unmask(self, blocks: NDArray[np.int64], masked: NDArray[np.bool_], positions: Tensor) -> None:
        """Put tokens at some of the masked places of `blocks` [B, L']; what the cache keeps of them is told later."""
        texts = self._active
        laws = [law(text.request.sampling, self._size) for text in texts]
        # Before the forward, where they do not depend on it.
        places = masked.copy()
        for place, (text, (rule, _)) in enumerate(zip(texts, laws, strict=True)):
            if isinstance(rule, BlindRule):
                places[place] = _blind_places(text, masked[place], rule)
        at = torch.from_numpy(places).to(self._device)
        logits = self._model.decode(torch.from_numpy(blocks).to(self._device), positions, self._cache, at)
        uniforms = np.stack([text.uniforms(TOKENS, self._size) for text in texts])
        row_text = np.nonzero(places)[0]
        for (rule, drawing), group in _groups(laws).items():
            alone = len(group) == len(texts)
            rows = logits if alone else logits[torch.from_numpy(np.isin(row_text, group)).to(self._device)]
            if not len(rows):
                continue
            of_group = places[group]
            chances = torch.from_numpy(uniforms[group][of_group])
            if not isinstance(rule, SightedRule):
                drawn = drawing.tokens(rows, chances)
            else:
                drawn, confidence, entropy = drawing.draw(rows, chances)
                chosen = _seen_places(rule, [texts[i] for i in group], of_group, confidence, entropy)
                taken = torch.from_numpy(chosen[of_group]).to(self._device)
                drawn, rows, of_group = drawn[taken], rows[taken], chosen
            inside = blocks[group]
            inside[of_group] = drawn.cpu().numpy()
            blocks[group] = inside
            _keep_likelihoods([texts[i] for i in group], of_group, rows, drawn)


def law(sampling: SamplingConfig, block_size: int) -> Law:
    """Return by which rule places are chosen, and how tokens are drawn. ValueError: not for blocks of this size."""
    drawing = Drawing(sampling.temperature, sampling.top_k, sampling.top_p)
    return _rule(sampling.unmasking, sampling.steps, sampling.threshold, block_size), drawing


@functools.lru_cache(maxsize=64)
def _rule(name: str, steps: int | None, threshold: float | None, block_size: int) -> Rule:
    """Return one object for all texts that have the rule, by which `_groups` knows them."""
    return unmasking_rules.get(name)(block_size, steps, threshold)


def _groups(laws: Sequence[Law]) -> Mapping[Law, list[int]]:
    """Return the numbers of the texts that have each law."""
    found: dict[Law, list[int]] = {}
    for place, one in enumerate(laws):
        found.setdefault(one, []).append(place)
    return found


def _blind_places(text: Draft, masked: NDArray[np.bool_], rule: BlindRule) -> NDArray[np.bool_]:
    """Return bool [L']; idle steps, which unmask nothing, are passed over without a forward."""
    while masked.any():
        found = rule.choose(masked, text.order, text.uniforms(CHANCE, len(masked)), text.step)
        if found.any():
            return found
        text.step += 1
    return masked


def _seen_places(
    rule: SightedRule, texts: Sequence[Draft], masked: NDArray[np.bool_], confidence: Tensor, entropy: Tensor
) -> NDArray[np.bool_]:
    """Return bool [B, L'], by confidence and entropy [M] of masked places; ValueError: a block is left as it was."""
    device = confidence.device
    at = torch.from_numpy(masked).to(device)
    spread = (torch.zeros(masked.shape, dtype=torch.float64, device=device) for _ in range(2))
    sure, doubt = (s.masked_scatter(at, x) for s, x in zip(spread, (confidence, entropy), strict=True))
    steps = torch.tensor([text.step for text in texts]).to(device)
    chosen = rule.choose(sure, doubt, at, steps).cpu().numpy()
    if not np.array_equal(chosen.any(1), masked.any(1)):
        name = unmasking_rules.name_of(type(rule))
        raise ValueError(
            f"the unmasking rule {name} took no place of a block with masks: let it take one at least, such as the "
            "most confident"
        )
    return chosen


def _keep_likelihoods(texts: Sequence[Draft], places: NDArray[np.bool_], logits_MV: Tensor, tokens_M: Tensor) -> None:
    """Note what the model thought of the tokens that were taken, where a request asks for it."""
    if all(text.request.alternatives is None for text in texts):
        return
    logs = logits_MV.double().log_softmax(-1)
    taken = logs.gather(-1, tokens_M[:, None])[:, 0].tolist()
    for row, (of, place) in enumerate(zip(*np.nonzero(places), strict=True)):
        text = texts[of]
        if (count := text.request.alternatives) is None:
            continue
        values, ids = logs[row].topk(min(count, logs.shape[1]))
        most = [(int(i), float(v)) for i, v in zip(ids, values, strict=True) if v > -torch.inf]  # of clean tokens
        text.likelihoods[len(text.tokens) + int(place)] = Likelihood(taken[row], most)
