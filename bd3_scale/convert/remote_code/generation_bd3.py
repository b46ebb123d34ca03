"""Writing text block by block, with the arguments that transformers' own `generate` has.

What is drawn, and which of it stays, is the native sampler's (generate/draw.py has the law, generate/unmasking.py the
rules "static" and "dynamic"), so that a checkpoint writes alike there and here: tokens are drawn from
softmax(logits / T) after top-k and top-p; their confidence is their probability before these. Everything is computed in
float64, but on devices that have none (mps), where it is float32.

Legend: B sequences, P tokens of the longest prompt, S new tokens, L of both without padding, K tokens a block,
V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What is read of a generation config; and what is this model's own, there or as arguments.
READ = (
    *("max_length", "max_new_tokens", "max_time", "stop_strings", "do_sample", "temperature", "top_k", "top_p"),
    *("num_return_sequences", "return_dict_in_generate", "bos_token_id", "eos_token_id", "pad_token_id"),
)
OWN = ("block_size", "steps", "unmasking", "threshold")
# transformers' own, of new tokens, where nobody says how many; as `max_length` it means the same.
DEFAULT_LENGTH = 20


@dataclass(frozen=True)
class Unmasking:
    """How tokens are drawn, and which of them stay; see `Bd3GenerationMixin.generate`."""

    block_size: int
    steps: int
    kind: str
    threshold: float
    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        for right, problem in (
            (self.block_size >= 1, f"block_size={self.block_size} must be at least 1"),
            (1 <= self.steps <= self.block_size, f"steps={self.steps} must be 1 to block_size={self.block_size}"),
            (self.kind in ("dynamic", "static"), f"unmasking={self.kind!r} must be 'dynamic' or 'static'"),
            (0 <= self.threshold <= 1, f"threshold={self.threshold} must be a probability"),
            (self.temperature >= 0, f"temperature={self.temperature} must be 0 (most likely token) or above"),
            (self.top_k is None or self.top_k >= 1, f"top_k={self.top_k} must be None or at least 1"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p={self.top_p} must be None or in (0, 1]"),
        ):
            if not right:
                raise ValueError(problem)

    def draw(self, logits_BKV: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A token for every place, and its confidence: [B, K] each. Of equal candidates the smallest id ranks first."""
        wide = torch.float32 if logits_BKV.device.type == "mps" else torch.float64
        shares = (logits_BKV.to(wide) / (self.temperature or 1.0)).softmax(dim=-1)
        if self.temperature == 0:
            drawn = logits_BKV.argmax(dim=-1, keepdim=True)
        else:
            ranked, ids = truncate(shares, self.top_k, self.top_p)
            rank = torch.multinomial(ranked.flatten(0, -2), 1, generator=generator)
            drawn = ids.gather(-1, rank.reshape(*ranked.shape[:-1], 1))
        return drawn[..., 0], shares.gather(-1, drawn)[..., 0]

    def choose(self, confidence_BK: Tensor, masked_BK: Tensor, step: int) -> Tensor:
        """Which masked places a pass settles: [B, K]. Of equal confidences the first places win."""
        count = self.block_size // self.steps + (step < self.block_size % self.steps)
        confidence_BK = confidence_BK.masked_fill(~masked_BK, -1)
        rank_BK = confidence_BK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        best_BK = masked_BK & (rank_BK < count)
        if self.kind == "static":
            return best_BK
        sure_BK = masked_BK & (confidence_BK > self.threshold)
        return torch.where(sure_BK.sum(dim=1, keepdim=True) >= count, sure_BK, best_BK)


def truncate(shares: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Probabilities [..., V] from the largest on, normalised, with zeros where `top_k` and then `top_p` forbid; and
    the ids that they are of.
    """
    ranked, ids = shares.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[..., top_k:] = 0
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    if top_p is not None and top_p < 1:
        # The mass before a token: the one that crosses top_p stays.
        ranked[ranked.cumsum(dim=-1) - ranked >= top_p] = 0
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    return ranked, ids


class Bd3GenerationMixin(GenerationMixin):
    """Generation of a model that has `model`, which takes `store_kv`, `block_size` and `padding`, and `_logits`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue prompts [B, P] block by block: [B, P + the longest continuation].

        The mask token is never drawn, and the prompt never changed. A sequence ends at its first stop token after the
        prompt, at a stop string, or where a criterion says so, and is padded from there. What else it is depends on
        its own prompt alone, not on its padding or the batch (but for the last bits of the logits, and that tokens that
        are drawn share the random numbers).

        Args:
            inputs, input_ids: prompts, by either name; None: one that is empty but for BOS, where there is one.
            generation_config: goes before the model's own, and `options` before both.
            attention_mask: [B, P], zeros to the left of shorter prompts; None: every id is text. Blocks count from the
                first token behind the zeros.
            stopping_criteria: asked as elsewhere in transformers, after each new token of the batch, [B, P + so many],
                without scores; by as many tokens as a block has, texts may wait for each other.
            tokenizer: for `stop_strings`.
            streamer: of one prompt; is given it, then the new tokens of block after block.
            generator: of random numbers.
            options: of these and `generation_config`, the following. Any other is refused.
            max_new_tokens, max_length, max_time, stop_strings, num_return_sequences, return_dict_in_generate: as
                elsewhere in transformers; 20 new tokens where neither length is said.
            do_sample: draw tokens; else the most likely are taken, as at temperature 0, with their probability at
                temperature 1.
            temperature, top_k, top_p: draw among the k most likely tokens, then among the fewest whose share of these
                is at least p. transformers' default of 50 for top_k holds where nothing is said; 0 is all.
            eos_token_id: one or several, or [] never to stop.
            pad_token_id: the first stop token by default.
            block_size: in place of `config.block_size`.
            steps: denoising passes a block at the most, `block_size` by default; a pass settles at least its share of
                the block, `block_size // steps` tokens, and one more in the first passes where that leaves a rest.
            unmasking: "static" settles just that many, the most confident first; "dynamic", the default, settles every
                token whose confidence exceeds `threshold`, 0.9 by default, where these are more. Confidence is the
                probability of the drawn token under softmax(logits / temperature), before `top_k` and `top_p`.

        Raises:
            ValueError: an argument outside its range, one that is not listed here, padding that is not on the left, a
                prompt that holds the mask token, or a streamer for several.
        """
        config = self._asked(generation_config, options)
        rule = self._rule(config)
        ids, mask = self._prompts(inputs if input_ids is None else input_ids, attention_mask, config)
        count = new_tokens(config, ids.shape[1], options.get("max_length") is not None)
        if streamer is not None and len(ids) != 1:
            raise ValueError(f"streamer takes one text, and here are {len(ids)}: give one prompt, or no streamer")
        criteria = stopping(config, stopping_criteria, tokenizer)
        stops, pad = self._stop_and_pad(config)
        draft = Draft.of(ids, mask, count, rule.block_size, self.config.mask_token_id, pad)
        if streamer is not None:
            streamer.put(ids.cpu())
        for start in self._blocks(draft, rule, generator):
            draft.end_at(start, stops)
            draft.end_by(criteria, start + rule.block_size)
            if streamer is not None:
                streamer.put(draft.news(start).cpu())
        if streamer is not None:
            streamer.end()
        whole = draft.padded(int((draft.ends - draft.begins).max()))
        return GenerateDecoderOnlyOutput(sequences=whole) if config.return_dict_in_generate else whole

    def _asked(self, given: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
        """Return what is asked for. ValueError: something that this model does not do."""
        config, rest = self._prepare_generation_config(given, **options)
        for name in OWN:
            setattr(config, name, rest.pop(name, getattr(config, name, None)))
        # In transformers 5 a new config holds nothing, and what holds where nobody says anything stands elsewhere.
        plain = vars(GenerationConfig()) | getattr(GenerationConfig, "_get_default_generation_params", dict)()
        own, said = vars(self.generation_config), vars(config)
        names = [name for name in plain if name not in READ and name[0] != "_" and name != "transformers_version"]
        other = {name: said[name] for name in names if said.get(name) not in (None, plain[name])}
        asked = {name for name, value in other.items() if value != own.get(name)}
        asked |= {name for name, value in rest.items() if value is not None and value is not False}
        if asked:
            raise ValueError(
                f"generate of this model, which fills blocks of masks, has no {', '.join(sorted(asked))}: leave it out"
            )
        for name, value in other.items():
            logger.warning_once(f"the model's generation_config says {name}={value!r}, which has no meaning here")
        return config

    def _rule(self, config: GenerationConfig) -> Unmasking:
        size = _first_known(config.block_size, self.config.block_size)
        return Unmasking(
            block_size=size,
            steps=_first_known(config.steps, size),
            kind=_first_known(config.unmasking, "dynamic"),
            threshold=_first_known(config.threshold, 0.9),
            temperature=_first_known(config.temperature, 1.0) if config.do_sample else 0.0,
            top_k=config.top_k or None,
            top_p=config.top_p,
        )

    def _prompts(self, ids: Tensor | None, mask: Tensor | None, config: GenerationConfig) -> tuple[Tensor, Tensor]:
        """Return ids and where they are text, both [B, P]."""
        if ids is None:
            begin = [] if config.bos_token_id is None else [config.bos_token_id]
            ids = torch.tensor([begin], dtype=torch.long, device=self.device)
        if ids.dim() != 2:
            raise ValueError(f"input_ids has the shape {list(ids.shape)}: give [prompts, tokens]")
        text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask == 1
        # Each place is text if the one before is: zeros, and then ones.
        if text.shape != ids.shape or bool((text[:, :-1] & ~text[:, 1:]).any()):
            raise ValueError(
                f"attention_mask must be {list(ids.shape)}, as the prompts are, with zeros on the left of shorter ones "
                "alone: set tokenizer.padding_side = 'left'"
            )
        if bool(((ids == self.config.mask_token_id) & text).any()):
            raise ValueError(f"the prompt holds the mask token, id {self.config.mask_token_id}: give clean tokens")
        copies = config.num_return_sequences or 1
        return ids.repeat_interleave(copies, dim=0), text.repeat_interleave(copies, dim=0)

    def _stop_and_pad(self, config: GenerationConfig) -> tuple[Tensor, int]:
        """Return what ends a sequence and what fills it up: as asked, else as the model's config has them."""
        eos = _first_known(config.eos_token_id, self.config.eos_token_id, [])
        stops = eos if isinstance(eos, list) else [eos]
        pad = _first_known(config.pad_token_id, self.config.pad_token_id, *stops, 0)
        return torch.tensor(stops, dtype=torch.long, device=self.device), pad

    def _blocks(self, draft: Draft, rule: Unmasking, generator: torch.Generator | None) -> Iterator[int]:
        """Fill a draft in place, and yield where each block begins that was filled, as soon as it is."""
        cache, stored, size = DynamicCache(), 0, rule.block_size
        for start in range(0, draft.tokens.shape[1], size):
            masked = draft.masked(start)
            if not masked.any():
                continue
            if stored < start:
                # The blocks that no text has masks in, or has any more.
                finished = draft.tokens[:, stored:start]
                self.model(finished, past_key_values=cache, block_size=size, padding=draft.padding)
                stored = start
            self._denoise(draft.tokens[:, start : start + size], masked, cache, draft.padding, rule, generator)
            yield start

    def _denoise(
        self,
        block_BK: Tensor,
        masked_BK: Tensor,
        cache: DynamicCache,
        padding: Tensor | None,
        rule: Unmasking,
        generator: torch.Generator | None,
    ) -> None:
        """Fill the masked places of a block in place, in at most `rule.steps` passes that leave the cache as it is."""
        for step in range(rule.steps):
            if not masked_BK.any():
                return
            how = {"store_kv": False, "block_size": rule.block_size, "padding": padding}
            logits = self._logits(self.model(block_BK, past_key_values=cache, **how)[0])
            logits[..., self.config.mask_token_id] = float("-inf")
            logits[..., self.config.num_token_ids or self.config.vocab_size :] = float("-inf")
            drawn_BK, confidence_BK = rule.draw(logits, generator)
            settled_BK = rule.choose(confidence_BK, masked_BK, step)
            block_BK.copy_(torch.where(settled_BK, drawn_BK, block_BK))
            masked_BK = masked_BK & ~settled_BK


@dataclass
class Draft:
    """Texts that grow, the blocks that they grow from below each other.

    prompts: [B, P] as they were given; tokens: [B, L], whole blocks; padding: [B], how many places are none of each
    text, whole blocks, on its left, or None where no text has any; begins, ends: [B], where its new tokens begin and
    end; asked: after how many of them criteria were asked.
    """

    prompts: Tensor
    tokens: Tensor
    padding: Tensor | None
    begins: Tensor
    ends: Tensor
    block_size: int
    pad: int
    asked: int = 0

    @classmethod
    def of(cls, prompts: Tensor, text: Tensor, count: int, block_size: int, mask_id: int, pad: int) -> Draft:
        """`text`: [B, P], where prompts are no padding; `count`: of new tokens."""
        lengths = text.sum(dim=1)
        whole = lengths // block_size * block_size
        padding = whole.max() - whole
        begins = padding + lengths
        longest = int(begins.max()) + count
        tokens = prompts.new_full((len(prompts), -(-longest // block_size) * block_size), mask_id)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        tokens[(places >= padding[:, None]) & (places < begins[:, None])] = prompts[text]
        return cls(prompts, tokens, padding if padding.any() else None, begins, begins + count, block_size, pad)

    def masked(self, start: int) -> Tensor:
        """Return the places to fill of the block at `start`, [B, K]: to its end, even where a text may go less far, as
        the model has seen blocks.
        """
        places = torch.arange(start, start + self.block_size, device=self.tokens.device)
        return (places >= self.begins[:, None]) & (start < self.ends[:, None])

    def news(self, start: int) -> Tensor:
        """Return the new tokens of the first text in the block at `start`, [at most K]."""
        return self.tokens[0, max(start, int(self.begins[0])) : min(start + self.block_size, int(self.ends[0]))]

    def end_at(self, start: int, stops: Tensor) -> None:
        """End texts at the first of `stops` in the block at `start`, which is filled."""
        is_stop = torch.isin(self.tokens[:, start : start + self.block_size], stops) & self.masked(start)
        first = torch.where(is_stop.any(dim=1), start + is_stop.int().argmax(dim=1) + 1, self.ends)
        self.ends = torch.minimum(self.ends, first)

    def end_by(self, criteria: StoppingCriteriaList, filled: int) -> None:
        """End texts where criteria say so. filled: how many places of every text are; as many new tokens are asked
        about as each text has that goes on.
        """
        if not criteria:
            return
        counts = torch.where(self.ends <= filled, (self.ends - self.begins).max(), filled - self.begins)
        for count in range(self.asked + 1, int(counts.min()) + 1):
            done = criteria(self.padded(count), None)
            self.ends = torch.where(done, torch.minimum(self.ends, self.begins + count), self.ends)
            self.asked = count

    def padded(self, count: int) -> Tensor:
        """Return the prompts, as they were given, and `count` new tokens, [B, P + count]."""
        places = self.begins[:, None] + torch.arange(count, device=self.tokens.device)
        new = self.tokens.gather(1, places).masked_fill(places >= self.ends[:, None], self.pad)
        return torch.cat([self.prompts, new], dim=1)


def new_tokens(config: GenerationConfig, width: int, has_length: bool) -> int:
    """Return how many tokens follow prompts of `width`; has_length: the call itself says `max_length`."""
    count = config.max_new_tokens
    if count is None:
        known = has_length or config.max_length not in (None, DEFAULT_LENGTH)
        count = config.max_length - width if known else DEFAULT_LENGTH
    if count < 1:
        raise ValueError(f"max_new_tokens={count} must be at least 1; a max_length counts the prompt, too")
    return count


def stopping(config: GenerationConfig, given: Sequence[Any] | None, tokenizer: Any) -> StoppingCriteriaList:
    """Return what ends a text beside its stop tokens."""
    criteria = StoppingCriteriaList(given or [])
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings needs the tokeniser: give tokenizer=, too")
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=config.stop_strings))
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(max_time=config.max_time))
    return criteria


def _first_known(*values: Any) -> Any:
    return next(value for value in values if value is not None)
