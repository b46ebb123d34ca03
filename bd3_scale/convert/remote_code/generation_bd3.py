"""Generate text block by block, with the arguments of transformers' `generate`.

Which tokens are drawn, and which of them stay in a pass, is defined as in the library that trained the model (its
modules generate/draw.py and generate/unmasking.py, rules "static" and "dynamic"), so both generate equal text: tokens
are drawn from softmax(logits / T) after top-k and top-p, and a token's confidence is its probability before these. All
is computed in float64, or in float32 on devices without it (mps).

Legend: B sequences, P tokens of the longest prompt, S new tokens, L of both without padding, K tokens per block,
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

# Options of a generation config that this model supports; OWN are those that transformers does not have.
READ = (
    *("max_length", "max_new_tokens", "max_time", "stop_strings", "do_sample", "temperature", "top_k", "top_p"),
    *("num_return_sequences", "return_dict_in_generate", "bos_token_id", "eos_token_id", "pad_token_id"),
)
OWN = ("block_size", "steps", "unmasking", "threshold")
# transformers' default number of new tokens; also the default of `max_length`, where it has the same meaning.
DEFAULT_LENGTH = 20


@dataclass(frozen=True)
class Unmasking:
    """Options of drawing and unmasking; see `Bd3GenerationMixin.generate`."""

    block_size: int
    steps: int
    kind: str
    threshold: float
    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        for is_valid, problem in (
            (self.block_size >= 1, f"block_size={self.block_size} must be at least 1"),
            (1 <= self.steps <= self.block_size, f"steps={self.steps} must be 1 to block_size={self.block_size}"),
            (self.kind in ("dynamic", "static"), f"unmasking={self.kind!r} must be 'dynamic' or 'static'"),
            (0 <= self.threshold <= 1, f"threshold={self.threshold} must be a probability"),
            (self.temperature >= 0, f"temperature={self.temperature} must be 0 (most likely token) or above"),
            (self.top_k is None or self.top_k >= 1, f"top_k={self.top_k} must be None or at least 1"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p={self.top_p} must be None or in (0, 1]"),
        ):
            if not is_valid:
                raise ValueError(problem)

    def draw(self, logits_BKV: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw a token for every position and return it with its confidence, both [B, K]; of ties the smallest id
        wins."""
        wide = torch.float32 if logits_BKV.device.type == "mps" else torch.float64
        probabilities = (logits_BKV.to(wide) / (self.temperature or 1.0)).softmax(dim=-1)
        if self.temperature == 0:
            drawn = logits_BKV.argmax(dim=-1, keepdim=True)
        else:
            ranked, ids = truncate(probabilities, self.top_k, self.top_p)
            rank = torch.multinomial(ranked.flatten(0, -2), 1, generator=generator)
            drawn = ids.gather(-1, rank.reshape(*ranked.shape[:-1], 1))
        return drawn[..., 0], probabilities.gather(-1, drawn)[..., 0]

    def choose(self, confidence_BK: Tensor, masked_BK: Tensor, step: int) -> Tensor:
        """Choose the masked positions that a pass unmasks, bool [B, K]; of equal confidences the first positions
        win."""
        count = self.block_size // self.steps + (step < self.block_size % self.steps)
        confidence_BK = confidence_BK.masked_fill(~masked_BK, -1)
        rank_BK = confidence_BK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        best_BK = masked_BK & (rank_BK < count)
        if self.kind == "static":
            return best_BK
        confident_BK = masked_BK & (confidence_BK > self.threshold)
        return torch.where(confident_BK.sum(dim=1, keepdim=True) >= count, confident_BK, best_BK)


def truncate(probabilities: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Apply `top_k` and then `top_p` to probabilities [..., V].

    Returns the probabilities in descending order, normalised, with zeros for excluded tokens, and their ids.
    """
    ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[..., top_k:] = 0
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    if top_p is not None and top_p < 1:
        # Compare the mass before a token, so that the token that crosses top_p stays.
        ranked[ranked.cumsum(dim=-1) - ranked >= top_p] = 0
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    return ranked, ids


class Bd3GenerationMixin(GenerationMixin):
    """Generation for a class with `_logits`, and with `model`, whose forward takes `store_kv`, `block_size`,
    `padding`."""

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
        """Continue prompts [B, P] block by block; returns [B, P + length of the longest continuation].

        The mask token is never drawn, and the prompt is never changed. A sequence ends at its first stop token after
        the prompt, at a stop string, or by a criterion, and is padded from there. It depends on its own prompt alone,
        not on
        padding or the batch, with two exceptions: the last bits of the logits, and sampling, where the sequences of a
        batch share one generator.

        Args:
            inputs, input_ids: prompts, under either name; None: one prompt, empty or BOS if there is one.
            generation_config: overrides the model's own; `options` override both.
            attention_mask: [B, P], zeros on the left of shorter prompts; None: every id is text. Blocks are counted
                from the first token behind the zeros.
            stopping_criteria: called after each new token of the batch with ids [B, P + new tokens], as in
                transformers, but without scores. A sequence may wait for others by up to a block of tokens.
            tokenizer: for `stop_strings`.
            streamer: for one prompt only; receives the prompt, then the new tokens of each block.
            generator: random number generator.
            options: the following options, which `generation_config` may also have. Any other one is refused.
            max_new_tokens, max_length, max_time, stop_strings, num_return_sequences, return_dict_in_generate: as in
                transformers; 20 new tokens if neither length is given.
            do_sample: draw tokens; else the most likely ones are taken, as at temperature 0, with confidences at
                temperature 1.
            temperature, top_k, top_p: draw among the k most likely tokens, then among the fewest of these that have
                together at least the share p. The default of top_k is transformers' 50; 0 means all.
            eos_token_id: one or several ids, or [] to never stop.
            pad_token_id: the first stop token by default.
            block_size: replaces `config.block_size`.
            steps: most denoising passes per block, `block_size` by default; a pass unmasks at least its share of the
                block, `block_size // steps` tokens, and the first passes one more if there is a remainder.
            unmasking: "static" unmasks exactly that many, the most confident first; "dynamic", the default, unmasks
                every token whose confidence exceeds `threshold`, 0.9 by default, if these are more. Confidence is the
                probability of the drawn token under softmax(logits / temperature), before `top_k` and `top_p`.

        Raises:
            ValueError: an argument outside its range or not listed here, padding that is not on the left, a prompt with
                the mask token, or a streamer for several prompts.
        """
        config = self._effective_config(generation_config, options)
        rule = self._rule(config)
        ids, mask = self._prompts(inputs if input_ids is None else input_ids, attention_mask, config)
        count = new_tokens(config, ids.shape[1], options.get("max_length") is not None)
        if streamer is not None and len(ids) != 1:
            raise ValueError(f"a streamer is for one text, not for {len(ids)}: give one prompt, or no streamer")
        criteria = stopping(config, stopping_criteria, tokenizer)
        stops, pad = self._stop_and_pad(config)
        draft = Draft.of(ids, mask, count, rule.block_size, self.config.mask_token_id, pad)
        if streamer is not None:
            streamer.put(ids.cpu())
        for start in self._blocks(draft, rule, generator):
            draft.end_at(start, stops)
            draft.end_by(criteria, start + rule.block_size)
            if streamer is not None:
                streamer.put(draft.new_tokens_of_block(start).cpu())
        if streamer is not None:
            streamer.end()
        whole = draft.padded(int((draft.ends - draft.begins).max()))
        return GenerateDecoderOnlyOutput(sequences=whole) if config.return_dict_in_generate else whole

    def _effective_config(self, given: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
        """Return the options in effect. ValueError: an option that this model does not support.

        Unsupported options are refused if the caller set them, and only logged if they come from the model's folder.
        """
        config, rest = self._prepare_generation_config(given, **options)
        for name in OWN:
            setattr(config, name, rest.pop(name, getattr(config, name, None)))
        # In transformers 5 a new config holds None everywhere, and the defaults come from another method.
        defaults = vars(GenerationConfig()) | getattr(GenerationConfig, "_get_default_generation_params", dict)()
        own, effective = vars(self.generation_config), vars(config)
        names = [name for name in defaults if name not in READ and name[0] != "_" and name != "transformers_version"]
        unsupported = {name: effective[name] for name in names if effective.get(name) not in (None, defaults[name])}
        refused = {name for name, value in unsupported.items() if value != own.get(name)}
        refused |= {name for name, value in rest.items() if value is not None and value is not False}
        if refused:
            raise ValueError(
                f"generate of this model, which fills blocks of masks, does not support {', '.join(sorted(refused))}: "
                "leave it out"
            )
        for name, value in unsupported.items():
            logger.warning_once(f"the model's generation_config says {name}={value!r}, which has no effect here")
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
        """Return ids and whether they are text, both [B, P]."""
        if ids is None:
            begin = [] if config.bos_token_id is None else [config.bos_token_id]
            ids = torch.tensor([begin], dtype=torch.long, device=self.device)
        if ids.dim() != 2:
            raise ValueError(f"input_ids has the shape {list(ids.shape)}: give [prompts, tokens]")
        text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask == 1
        # Only zeros and then ones: no position that is text has one behind it that is not.
        if text.shape != ids.shape or bool((text[:, :-1] & ~text[:, 1:]).any()):
            raise ValueError(
                f"attention_mask must have the prompts' shape {list(ids.shape)}, with zeros only on the left of "
                "shorter prompts: set tokenizer.padding_side = 'left'"
            )
        if bool(((ids == self.config.mask_token_id) & text).any()):
            raise ValueError(f"the prompt holds the mask token, id {self.config.mask_token_id}: give clean tokens")
        copies = config.num_return_sequences or 1
        return ids.repeat_interleave(copies, dim=0), text.repeat_interleave(copies, dim=0)

    def _stop_and_pad(self, config: GenerationConfig) -> tuple[Tensor, int]:
        """Return the ids that end a sequence and the padding id, from the options, else from the model's config."""
        eos = _first_known(config.eos_token_id, self.config.eos_token_id, [])
        stops = eos if isinstance(eos, list) else [eos]
        pad = _first_known(config.pad_token_id, self.config.pad_token_id, *stops, 0)
        return torch.tensor(stops, dtype=torch.long, device=self.device), pad

    def _blocks(self, draft: Draft, rule: Unmasking, generator: torch.Generator | None) -> Iterator[int]:
        """Fill a draft in place, and yield the start of each block as soon as it is filled."""
        cache, stored, size = DynamicCache(), 0, rule.block_size
        for start in range(0, draft.tokens.shape[1], size):
            masked = draft.masked(start)
            if not masked.any():
                continue
            if stored < start:
                # Cache the blocks before this one: they have no masks, or no masks any more.
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
        """Fill the masked positions of a block in place, in at most `rule.steps` passes that do not change the
        cache."""
        for step in range(rule.steps):
            if not masked_BK.any():
                return
            options = {"store_kv": False, "block_size": rule.block_size, "padding": padding}
            logits = self._logits(self.model(block_BK, past_key_values=cache, **options)[0])
            logits[..., self.config.mask_token_id] = float("-inf")
            logits[..., self.config.num_token_ids or self.config.vocab_size :] = float("-inf")
            drawn_BK, confidence_BK = rule.draw(logits, generator)
            chosen_BK = rule.choose(confidence_BK, masked_BK, step)
            block_BK.copy_(torch.where(chosen_BK, drawn_BK, block_BK))
            masked_BK = masked_BK & ~chosen_BK


@dataclass
class Draft:
    """A batch of texts that are generated, aligned so that the first blocks to fill have the same position.

    prompts: [B, P], as they were given; tokens: [B, L], whole blocks; padding: [B], positions on the left of each text
    that hold nothing, whole blocks, or None if no text has any; begins, ends: [B], where its new tokens begin and end;
    checked: the number of new tokens after which criteria were last called.
    """

    prompts: Tensor
    tokens: Tensor
    padding: Tensor | None
    begins: Tensor
    ends: Tensor
    block_size: int
    pad: int
    checked: int = 0

    @classmethod
    def of(cls, prompts: Tensor, text: Tensor, count: int, block_size: int, mask_id: int, pad: int) -> Draft:
        """Return the draft of prompts. text: [B, P], where prompts are not padding; count: new tokens."""
        lengths = text.sum(dim=1)
        whole = lengths // block_size * block_size
        padding = whole.max() - whole
        begins = padding + lengths
        longest = int(begins.max()) + count
        tokens = prompts.new_full((len(prompts), -(-longest // block_size) * block_size), mask_id)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        tokens[(positions >= padding[:, None]) & (positions < begins[:, None])] = prompts[text]
        return cls(prompts, tokens, padding if padding.any() else None, begins, begins + count, block_size, pad)

    def masked(self, start: int) -> Tensor:
        """Return the positions to fill of the block at `start`, bool [B, K].

        A block is filled to its end even if the text may end earlier, since the model was trained on complete blocks.
        """
        positions = torch.arange(start, start + self.block_size, device=self.tokens.device)
        return (positions >= self.begins[:, None]) & (start < self.ends[:, None])

    def new_tokens_of_block(self, start: int) -> Tensor:
        """Return the new tokens of the first text in the block at `start`, [at most K]."""
        return self.tokens[0, max(start, int(self.begins[0])) : min(start + self.block_size, int(self.ends[0]))]

    def end_at(self, start: int, stops: Tensor) -> None:
        """End texts at the first of `stops` in the filled block at `start`."""
        is_stop = torch.isin(self.tokens[:, start : start + self.block_size], stops) & self.masked(start)
        first = torch.where(is_stop.any(dim=1), start + is_stop.int().argmax(dim=1) + 1, self.ends)
        self.ends = torch.minimum(self.ends, first)

    def end_by(self, criteria: StoppingCriteriaList, filled: int) -> None:
        """End texts by criteria. filled: number of filled positions of every text.

        Criteria are called for as many new tokens as all unfinished texts have.
        """
        if not criteria:
            return
        counts = torch.where(self.ends <= filled, (self.ends - self.begins).max(), filled - self.begins)
        for count in range(self.checked + 1, int(counts.min()) + 1):
            done = criteria(self.padded(count), None)
            self.ends = torch.where(done, torch.minimum(self.ends, self.begins + count), self.ends)
            self.checked = count

    def padded(self, count: int) -> Tensor:
        """Return the prompts, as they were given, with `count` new tokens each, [B, P + count]."""
        positions = self.begins[:, None] + torch.arange(count, device=self.tokens.device)
        new = self.tokens.gather(1, positions).masked_fill(positions >= self.ends[:, None], self.pad)
        return torch.cat([self.prompts, new], dim=1)


def new_tokens(config: GenerationConfig, width: int, has_length: bool) -> int:
    """Return the number of new tokens for prompts of `width`; has_length: the call itself gives `max_length`."""
    count = config.max_new_tokens
    if count is None:
        known = has_length or config.max_length not in (None, DEFAULT_LENGTH)
        count = config.max_length - width if known else DEFAULT_LENGTH
    if count < 1:
        raise ValueError(f"max_new_tokens={count} must be at least 1; a max_length counts the prompt, too")
    return count


def stopping(config: GenerationConfig, given: Sequence[Any] | None, tokenizer: Any) -> StoppingCriteriaList:
    """Return the criteria that end a text, besides stop tokens."""
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
