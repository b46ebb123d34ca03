"""Run a checkpoint behind the interface of lm-evaluation-harness (Gao et al., 2024): likelihoods and text.

A block diffusion model has no likelihood to read off. For a continuation it gives a lower bound, computed with what
follows the continuation in its last block masked (see `bounds`). At block size 1 this is the likelihood (except for a
score-entropy model). All answers to a question get the same noise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# `datasets` before version 4 asks at the terminal whether to run the code of a data set; this answers no. It must be
# set before the import.
os.environ.setdefault("HF_DATASETS_TRUST_REMOTE_CODE", "0")

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as error:
    raise ValueError(f"lm-evaluation-harness is not installed ({error}): pip install 'bd3_scale[harness]'") from error

from bd3_scale.checkpoint.model import open_model
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.evaluate.bounds import ContinuationBounds
from bd3_scale.evaluate.measured_text import LONGEST_CONTEXT
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.sampler import generate
from bd3_scale.generate.text import checkpoint_tokenizer, stop_ids
from bd3_scale.generate.writer import text_before
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.objective import Objective
from bd3_scale.observe.console import say
from bd3_scale.parallel.groups import ProcessGroups

DEFAULT_NEW_TOKENS = 256


class BlockDiffusionLM(LM):
    """Adapts a checkpoint's model to `lm_eval.simple_evaluate(model=...)`.

    max_length: tokens of context and continuation together; longer contexts lose their beginning. draws: noise draws
    for each continuation; the bound's standard error falls with their square root.
    """

    def __init__(
        self,
        model: BlockDiffusionTransformer,
        groups: ProcessGroups,
        tokenizer: Tokenizer,
        *,
        objective: Objective,
        max_length: int,
        draws: int = 8,
        eos_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self._model, self._tokenizer, self._eos_ids = model, tokenizer, eos_ids
        self._block_size, self._max_length = objective.block_size, max_length
        self._bounds = ContinuationBounds(model, groups, objective, max_length=max_length, draws=draws)

    @property
    def tokenizer_name(self) -> str:
        """Return the name under which the harness caches tokenised requests."""
        return self._tokenizer.hash

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the bound of log p(continuation | context) in nats, and whether greedy decoding equals it."""
        pairs = [self._pair(*request.args) for request in requests]
        bounds = self._bounds.of(pairs, [request.doc_id or 0 for request in requests])
        greedy = [self._is_greedy(*pair) for pair in pairs]
        return list(zip(bounds, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the bound of log p(text) in nats, summed over windows of the text.

        Each window scores the tokens that no window before has scored, with the longest context that fits. What follows
        a window in its last block stays masked, as behind a continuation.
        """
        totals = []
        for request in requests:
            ids = self._tokenizer.encode_prompt(request.args[0])
            given = 0 if self._tokenizer.vocabulary.bos_id is None else 1
            windows = list(windows_of(ids, self._max_length, given))
            totals.append(sum(self._bounds.of(windows, [request.doc_id or 0] * len(windows))))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return continuations up to the first of the strings `until`; greedy unless the task gives a temperature."""
        texts = []
        for request in requests:
            context, options = request.args
            count = options.get("max_gen_toks", DEFAULT_NEW_TOKENS)
            prompt = self._tokenizer.encode_prompt(context)
            sampled = options.get("do_sample", "temperature" in options)
            temperature = options.get("temperature", 1.0) if sampled else 0.0
            text = self._tokenizer.continuation(prompt, self._generated(prompt, count, temperature))
            until = options.get("until") or []
            texts.append(text_before(text, [until] if isinstance(until, str) else until))
        return texts

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of context and continuation, tokenised as one text; a token that spans both is scored."""
        both, before = (self._tokenizer.encode_prompt(text) for text in (context + continuation, context))
        shared = next((i for i, (a, b) in enumerate(zip(both, before, strict=False)) if a != b), len(before))
        given, scored = both[:shared], both[shared:]
        if len(scored) > self._max_length:
            raise ValueError(
                f"a continuation of {len(scored)} tokens is longer than the {self._max_length} that the model takes"
            )
        return given[len(given) - min(len(given), self._max_length - len(scored)) :], scored

    def _is_greedy(self, given: list[int], scored: list[int]) -> bool:
        return not scored or self._generated(given, len(scored), 0.0) == scored

    def _generated(self, prompt: list[int], count: int, temperature: float) -> list[int]:
        """Return `count` tokens after the prompt; a block sees the last `max_length` of both together."""
        if count < 1:
            return []
        window = self._max_length // self._block_size * self._block_size
        sample = generate(
            self._model,
            prompt,
            SamplingConfig(max_new_tokens=count, temperature=temperature, min_entropy=0.0, unmasking="static"),
            block_size=self._block_size,
            eos_ids=self._eos_ids,
            window=window if window >= 2 * self._block_size else None,
        )
        return sample.tokens


def windows_of(ids: list[int], length: int, given: int = 0) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (context, scored tokens) pairs that cover a text; both together have at most `length` ids.

    The first `given` ids, such as BOS, are context only and never scored.
    """
    start = given
    while start < len(ids):
        end = min(start + length - (given if start == given else 0), len(ids))
        yield ids[max(0, end - length) : start], ids[start:end]
        start = end


def evaluate_tasks(checkpoint: Path, tasks: Sequence[str], *, folder: str | None, limit: int | None, draws: int) -> Any:
    """Return the results of `lm_eval.simple_evaluate`, in one process.

    folder: holds YAML files of further tasks. A `!function` in them runs Python code of that folder: trust it first.

    ValueError: an unknown task, several processes, or a next-token model.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("tasks are measured in one process: start it without torchrun")
    manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}: `lm_eval ls tasks` lists its tasks; --include "
            "adds a folder of yours"
        )
    with open_model(checkpoint) as (model, manifest, groups):
        if not manifest.fills_masks:
            raise ValueError(
                f"{checkpoint} was trained for {manifest.objective} and fills no masks: write it with "
                "`bd3-scale convert export`, and run the harness on that folder with `lm_eval --model hf`"
            )
        adapter = BlockDiffusionLM(
            model,
            groups,
            checkpoint_tokenizer(checkpoint, manifest),
            objective=manifest.trained_objective(),
            max_length=min(manifest.max_position_embeddings, LONGEST_CONTEXT),
            draws=draws,
            eos_ids=stop_ids(checkpoint, manifest),
        )
        return lm_eval.simple_evaluate(model=adapter, tasks=list(tasks), task_manager=manager, limit=limit)


def show_results(results: Any) -> None:
    """Print the harness's table of results."""
    say(make_table(results))
