"""A checkpoint behind the interface of lm-evaluation-harness (Gao et al., 2024): likelihood by the NELBO, and text.

A block diffusion model has no likelihood to read off. What it gives a continuation is a lower bound of the logarithm:
the continuation's tokens alone are masked, at rates over the whole of [0, 1], the context stays clean inside their
block, too, and what would follow the continuation in its last block is always masked, so that nothing tells where it
ends. At block size 1 this is the likelihood. All choices of a question meet the same noise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as error:
    raise ValueError(f"lm-evaluation-harness is wanting ({error}): pip install 'bd3_scale[harness]'") from error
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.checkpoint.manifest import TOKENIZER
from bd3_scale.checkpoint.model import open_model
from bd3_scale.data.batch import Batch
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.diffusion.nelbo import sequence_nelbo
from bd3_scale.diffusion.noise import Noise, draw_noise
from bd3_scale.diffusion.schedule import Schedule
from bd3_scale.evaluate.checkpoint import LONGEST_CONTEXT
from bd3_scale.evaluate.nelbo import NOISE_SEED, masked_nll
from bd3_scale.generate.sampler import generate
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.parallel.groups import ProcessGroups
from bd3_scale.recipe.schema import Recipe

BATCH = 16
DEFAULT_NEW_TOKENS = 256


class BlockDiffusionLM(LM):
    """The model of a checkpoint for `lm_eval.simple_evaluate(model=...)`.

    max_length: tokens of context and continuation together; longer contexts lose their beginning. draws: of the noise,
    for each continuation; its standard error falls with their square root.
    """

    def __init__(
        self,
        model: BlockDiffusionTransformer,
        groups: ProcessGroups,
        tokenizer: Tokenizer,
        *,
        block_size: int,
        max_length: int,
        draws: int = 8,
    ) -> None:
        super().__init__()
        self._model, self._groups, self._tokenizer = model, groups, tokenizer
        self._block_size, self._max_length = block_size, max_length
        self._draws = 1 if block_size == 1 else draws

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's cache of requests."""
        return self._tokenizer.hash

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The bound of log p(continuation | context) in nats, and whether greedy decoding gives the continuation."""
        pairs = [self._pair(*request.args) for request in requests]
        bounds = self._bounds(pairs, [request.doc_id or 0 for request in requests])
        greedy = [self._is_greedy(*pair) for pair in pairs]
        return list(zip(bounds, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The bound of log p(text) in nats: in windows that each predict what none before has, with the longest context
        that fits.
        """
        totals = []
        for request in requests:
            ids = self._tokenizer.encode(request.args[0])
            windows = list(_windows(ids, self._max_length))
            totals.append(sum(self._bounds(windows, [request.doc_id or 0] * len(windows))))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the strings `until`; greedy unless the task gives a temperature."""
        texts = []
        for request in requests:
            context, options = request.args
            room = min(options.get("max_gen_toks", DEFAULT_NEW_TOKENS), self._max_length - 1)
            prompt = self._tokenizer.encode(context)[-(self._max_length - room) :]
            sampled = options.get("do_sample", "temperature" in options)
            temperature = options.get("temperature", 1.0) if sampled else 0.0
            text = self._tokenizer.decode(self._generated(prompt, room, temperature))
            until = options.get("until") or []
            ends = [text.find(stop) for stop in ([until] if isinstance(until, str) else until) if stop in text]
            texts.append(text[: min(ends)] if ends else text)
        return texts

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both as one text has them, so that a token across their border counts with the continuation."""
        both, before = self._tokenizer.encode(context + continuation), self._tokenizer.encode(context)
        shared = next((i for i, (a, b) in enumerate(zip(both, before, strict=False)) if a != b), len(before))
        given, scored = both[:shared], both[shared:]
        if len(scored) > self._max_length:
            raise ValueError(
                f"a continuation of {len(scored)} tokens is longer than the {self._max_length} that the model takes"
            )
        return given[len(given) - min(len(given), self._max_length - len(scored)) :], scored

    def _bounds(self, pairs: Sequence[tuple[list[int], list[int]]], documents: Sequence[int]) -> list[float]:
        # By length, so that rows of a batch are alike; a row's noise depends on nothing but itself.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        bounds = [0.0] * len(pairs)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            found = self._batch_bounds([pairs[i] for i in rows], [documents[i] for i in rows])
            for i, bound in zip(rows, found, strict=True):
                bounds[i] = bound
        return bounds

    def _batch_bounds(self, pairs: Sequence[tuple[list[int], list[int]]], documents: Sequence[int]) -> list[float]:
        longest = max(len(given) + len(scored) for given, scored in pairs)
        length = -(-longest // self._block_size) * self._block_size
        tokens = torch.full((len(pairs), length), self._model.vocabulary.eos_id)
        counted = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, (given, scored) in enumerate(pairs):
            tokens[row, : len(given) + len(scored)] = torch.tensor(given + scored, dtype=torch.int64)
            counted[row, len(given) : len(given) + len(scored)] = True
        start = torch.zeros(tokens.shape, dtype=torch.int32)
        ids = torch.tensor(documents)
        batch = Batch(ids, ids, 0, tokens, start, torch.arange(length).expand_as(tokens), counted)
        noises = [self._noise(pairs, documents, length, draw) for draw in range(self._draws)]
        nll = masked_nll([self._model], batch, noises, self._groups, self._block_size)
        sums = torch.stack([sequence_nelbo(*one, counted) for one in zip(nll, noises, strict=True)])
        return [-float(bound) for bound in sums.mean(0)]

    def _noise(
        self, pairs: Sequence[tuple[list[int], list[int]]], documents: Sequence[int], length: int, draw: int
    ) -> Noise:
        """Of each row as if it were alone; the context is never masked, and all behind the continuation is."""
        masked = torch.ones(len(pairs), length, dtype=torch.bool)
        rate = torch.ones(len(pairs), length)
        for row, ((given, scored), document) in enumerate(zip(pairs, documents, strict=True)):
            end = len(given) + len(scored)
            noise = draw_noise(
                make_spans(torch.zeros(1, end, dtype=torch.int32), self._block_size)[1],
                seed=NOISE_SEED,
                epoch=0,
                sample_ids=torch.tensor([document]),
                schedule=Schedule(low=1.0 if self._block_size == 1 else 0.0),
                draw=draw,
                num_draws=self._draws,
            )
            masked[row, :end], rate[row, :end] = noise.masked[0], noise.mask_rate[0]
            masked[row, : len(given)] = False
        return Noise(masked, rate, _reciprocal(rate))

    def _is_greedy(self, given: list[int], scored: list[int]) -> bool:
        return not scored or self._generated(given, len(scored), 0.0) == scored

    def _generated(self, prompt: list[int], count: int, temperature: float) -> list[int]:
        sample = generate(
            self._model,
            prompt,
            block_size=self._block_size,
            max_new_tokens=count,
            temperature=temperature,
            min_entropy=0.0,
            unmasking="static",
        )
        return sample.tokens


def _reciprocal(rate: Tensor) -> Tensor:
    # Nothing is masked at rate 0.
    return torch.where(rate > 0, 1 / rate, 0.0)


def _windows(ids: list[int], length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Context and what is predicted, `length` together where so many tokens came before."""
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[max(0, end - length) : start], ids[start:end]


def evaluate_tasks(checkpoint: Path, tasks: Sequence[str], *, folder: str | None, limit: int | None, draws: int) -> Any:
    """What `lm_eval.simple_evaluate` finds, in one process; `folder` holds further tasks' YAML.

    ValueError: an unknown task, several processes, or a next-token model.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("tasks are measured in one process: start it without torchrun")
    manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(
            f"lm-evaluation-harness knows no task {', '.join(unknown)}: `lm_eval ls tasks` lists them, and --include "
            "names a folder of your own"
        )
    with open_model(checkpoint) as (model, manifest, groups):
        recipe = manifest.recipe
        if recipe.diffusion.objective == "next_token":
            raise ValueError(
                f"{checkpoint} predicts the next token: write it with `bd3-scale convert export`, and give the folder "
                "to the harness as a model of its own kind, `lm_eval --model hf`"
            )
        context = recipe.data.seq_len if isinstance(recipe, Recipe) else recipe.max_position_embeddings
        adapter = BlockDiffusionLM(
            model,
            groups,
            load_tokenizer(checkpoint / TOKENIZER),
            block_size=recipe.diffusion.block_size,
            max_length=min(context, LONGEST_CONTEXT),
            draws=draws,
        )
        return lm_eval.simple_evaluate(model=adapter, tasks=list(tasks), task_manager=manager, limit=limit)


def show_results(found: Any) -> None:
    """The harness's own table."""
    print(make_table(found))
