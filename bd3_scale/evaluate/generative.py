"""Measure a checkpoint's samples: the perplexity under another model, and figures that it would hide.

Text that repeats itself has a low generative perplexity, so the results also have entropy (Zheng et al., ICLR 2025),
repetition (Holtzman et al., ICLR 2020) and distinct n-grams (Li et al., NAACL 2016), and MAUVE, which measures quality
and diversity together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bd3_scale.checkpoint.manifest import TOKENIZER
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.mauve import SMALLEST_SAMPLE, human_texts, mauve
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.source import open_writer
from bd3_scale.generate.writer import Written
from bd3_scale.observe.libraries import without_broken_torchvision
from bd3_scale.resilience.foreign import CONFIG, for_transformers, object_in, weight_files
from bd3_scale.resilience.readers import in_one_line, reader

REPETITION_NGRAM = 4


@dataclass(frozen=True)
class Generative:
    """Figures of `samples` texts.

    length_median, length_max: tokens of a text. perplexity: exp of the judge's mean nats per token of its own
    tokeniser; None if no text is long enough to score. entropy: nats, of a text's token frequencies, mean over texts.
    repetition: share of a text's 4-grams that occur earlier in it, mean. distinct_1, distinct_2: distinct n-grams over
    all n-grams, of all texts together. nfe_per_token: denoising passes. mauve: against human text, if some was given.
    stopped_by: number of texts by the reason of their end.
    """

    checkpoint: str
    judge: str
    samples: int
    tokens: int
    length_median: float
    length_max: int
    judged_tokens: int
    perplexity: float | None
    entropy: float
    repetition: float
    distinct_1: float
    distinct_2: float
    nfe_per_token: float
    mauve: float | None
    stopped_by: dict[str, int]


def evaluate_generative(
    checkpoint: Path,
    judge: Path,
    sampling: SamplingConfig,
    *,
    samples: int,
    human: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, limit: None,
) -> Generative:
    """Draw `samples` texts without a prompt and score them with a causal Hugging Face model in a local folder.

    human: file with human text, for MAUVE; as many pieces of `max_new_tokens` tokens are taken from it.

    ValueError: not a model folder, no sample, or what `Writer.write` and `human_texts` refuse.
    """
    if samples < (1 if human is None else SMALLEST_SAMPLE):
        raise ValueError(f"samples is {samples}: give at least 1, and {SMALLEST_SAMPLE} for MAUVE")
    reader = Judge(judge)
    references: list[str] = []
    if human is not None:
        tokenizer = load_tokenizer(checkpoint / TOKENIZER)
        references = human_texts(human, tokenizer, count=samples, length=sampling.max_new_tokens)
    with open_writer(checkpoint) as writer:
        texts = list(writer.write([""] * samples, sampling, progress=progress))
    return score_samples(checkpoint, texts, reader, references, seed=sampling.seed)


def score_samples(
    checkpoint: Path, texts: Sequence[Written], judge: Judge, references: Sequence[str] = (), *, seed: int = 0
) -> Generative:
    """Return the figures of the `texts` that `checkpoint` generated; `references`: human texts, for MAUVE."""
    nats, count = 0.0, 0
    for text in texts:
        more, tokens_read = judge.nats(text.text)
        nats, count = nats + more, count + tokens_read
    tokens = [text.tokens for text in texts]
    lengths = [len(t) for t in tokens]
    return Generative(
        checkpoint=str(checkpoint),
        judge=str(judge.folder),
        samples=len(texts),
        tokens=sum(lengths),
        length_median=float(np.median(lengths)),
        length_max=max(lengths),
        judged_tokens=count,
        perplexity=math.exp(nats / count) if count else None,
        entropy=float(np.mean([entropy(t) for t in tokens])),
        repetition=float(np.mean([repetition(t) for t in tokens])),
        distinct_1=distinct(tokens, 1),
        distinct_2=distinct(tokens, 2),
        nfe_per_token=sum(text.nfe for text in texts) / max(1, sum(lengths)),
        mauve=_mauve(judge, [text.text for text in texts], references, seed) if references else None,
        stopped_by=_counts(texts),
    )


def entropy(tokens: Sequence[int]) -> float:
    """Return the entropy in nats of a text's token frequencies; 0 for an empty text."""
    share = np.unique(tokens, return_counts=True)[1] / max(1, len(tokens))
    return float(-(share * np.log(share)).sum())


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of a text's 4-grams that occur earlier in it."""
    grams = _grams(tokens, REPETITION_NGRAM)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[int]], size: int) -> float:
    """Return the number of distinct n-grams of `size` over the number of all, in all texts together."""
    grams = [gram for tokens in texts for gram in _grams(tokens, size)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(tokens: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


def _mauve(judge: Judge, texts: Sequence[str], references: Sequence[str], seed: int) -> float:
    human, samples = (np.stack([judge.vector(text) for text in part]) for part in (references, texts))
    return mauve(human, samples, seed)


def _counts(texts: Sequence[Written]) -> dict[str, int]:
    ends = [text.stopped_by for text in texts]
    return {end: ends.count(end) for end in sorted(set(ends))}


class Judge:
    """A causal Hugging Face model that scores texts."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer, model = _open_judge(folder)
        self.folder = folder
        self._model = model.eval()
        limit = getattr(model.config, "max_position_embeddings", None)
        # A bound of memory: the logits of a window are [tokens, vocabulary] in float32.
        self._limit = 2048 if limit is None else min(2048, limit)

    @torch.no_grad()
    def vector(self, text: str) -> NDArray[np.float64]:
        """Return the last layer's hidden state at the last token, of as many as fit; zeros for an empty text.

        This is the feature that MAUVE uses (Pillutla et al., NeurIPS 2021).
        """
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"][: self._limit]
        if not ids:
            return np.zeros(self._model.config.hidden_size)
        row = torch.tensor([ids], device=self._model.device)
        hidden = self._model(row, output_hidden_states=True).hidden_states[-1][0, -1]
        vector: NDArray[np.float64] = hidden.double().cpu().numpy()
        return vector

    @torch.no_grad()
    def nats(self, text: str) -> tuple[float, int]:
        """Return the summed negative log-likelihood of a text's tokens in nats, and the number of tokens scored."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        first = self._tokenizer.bos_token_id
        nats, count = 0.0, 0
        # A causal model cannot score the first token of a window. With a BOS token that token is the BOS; without one,
        # the first token of each window is left out.
        room = self._limit - (first is not None)
        for start in range(0, len(ids), room):
            window = ([] if first is None else [first]) + ids[start : start + room]
            if len(window) < 2:
                continue
            row = torch.tensor([window], device=self._model.device)
            log_probs = self._model(row).logits[0, :-1].float().log_softmax(-1)
            nats -= float(log_probs.gather(-1, row[0, 1:, None]).sum())
            count += len(window) - 1
        return nats, count


@reader("a judge", path="folder")
def _open_judge(folder: Path) -> tuple[Any, Any]:
    """Return the tokeniser and the model of a folder; no code of the folder is run.

    ValueError: it is not the folder of a model class that the installed transformers has; FileNotFoundError: it has no
    weights.
    """
    if not object_in(folder, CONFIG):
        raise ValueError(f"{folder} is not the folder of a Hugging Face model: it has no {CONFIG}")
    weight_files(folder)
    with without_broken_torchvision(), for_transformers(folder) as model_folder:
        import transformers

        options = {"trust_remote_code": False, "local_files_only": True}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder, **options)
            return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(
                model_folder, use_safetensors=True, **options
            )
        except Exception as error:
            raise ValueError(
                f"transformers {transformers.__version__} cannot load the judge {folder}, and code of a folder is not "
                "run: give a causal model of a class that transformers has, such as GPT-2, with safetensors and a "
                f"tokenizer.json ({in_one_line(error).replace(str(model_folder), str(folder))})"
            ) from error
