"""Load a trained model in Python by `bd3_scale.load`, without a launcher or process groups.

    model = bd3_scale.load("runs/mine")
    print(model.generate("def main(").text)

The module itself does not import PyTorch; `load` does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bd3_scale.checkpoint.manifest import CheckpointManifest
    from bd3_scale.data.chat import Messages
    from bd3_scale.data.tokenizer import Tokenizer
    from bd3_scale.evaluate.checkpoint import Evaluation
    from bd3_scale.generate.config import SamplingConfig
    from bd3_scale.generate.writer import Piece, Writer, Written
    from bd3_scale.model.transformer import BlockDiffusionTransformer

# The fields of the manifest that describe a model.
_CONFIG = ("name", "step", "objective", "block_size", "max_position_embeddings", "precision", "model", "vocabulary")
_NO_TOKENIZER = "has no tokeniser: the model takes and returns token ids, not text"


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Model:
    """Load a model: the moving average of its weights if the training kept one, else the last weights.

    Any number of models may be loaded, also by a process that has, or will have, process groups of its own. Each
    process holds the whole model and communicates with no other.

    Args:
        path: a run directory (its newest checkpoint), a checkpoint, or a Hugging Face folder or file that
            `bd3-scale convert import` takes. The latter is imported into a temporary folder, which is removed.
        dtype: of the weights in memory; default: that of the training's forward, or of the imported model.
        device: default: the GPU of this process (LOCAL_RANK), else the CPU.

    Raises:
        FileNotFoundError, ValueError: there is no model, it is damaged, or its format is not supported here.
    """
    source = Path(path)
    with _quiet():
        from bd3_scale.checkpoint.folder import refuse_gguf
        from bd3_scale.convert.importer import open_checkpoint

        refuse_gguf(source)
        with open_checkpoint(source) as (checkpoint, template):
            return _opened(source, checkpoint, dtype, device, template)


class Model:
    """A model with its tokeniser, made by `load`.

    Attributes:
        path: the path that it was loaded from.
        manifest: the manifest of its checkpoint.
        transformer: the PyTorch module, in eval mode, for everything else; its parameters may be changed between calls.
    """

    def __init__(
        self,
        path: Path,
        manifest: CheckpointManifest,
        transformer: BlockDiffusionTransformer,
        tokenizer: Tokenizer | None,
        writer: Writer | None,
    ) -> None:
        self.path, self.manifest, self.transformer = path, manifest, transformer
        self._tokenizer, self._writes = tokenizer, writer

    def __repr__(self) -> str:
        manifest = self.manifest
        weight = next(self.transformer.parameters())
        count = sum(parameter.numel() for parameter in self.transformer.parameters())
        return (
            f"<bd3_scale model {manifest.name!r}, step {manifest.step}: {manifest.objective}, blocks of "
            f"{manifest.block_size}, {count:,} parameters in {str(weight.dtype).removeprefix('torch.')} on "
            f"{weight.device}>"
        )

    @property
    def config(self) -> dict[str, Any]:
        """Return a description of the model as plain values: its shape under `model`, its ids under `vocabulary`."""
        return self.manifest.model_dump(include=set(_CONFIG))

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the model's tokeniser. ValueError: the model has none."""
        if self._tokenizer is None:
            raise ValueError(f"{self.path} {_NO_TOKENIZER}")
        return self._tokenizer

    @overload
    def generate(
        self, prompts: str | Messages, *, infill: bool = ..., stop: str | Sequence[str] = ..., **sampling: Any
    ) -> Written: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str | Messages],
        *,
        infill: bool = ...,
        stop: str | Sequence[str] = ...,
        **sampling: Any,
    ) -> list[Written]: ...

    def generate(
        self,
        prompts: str | Messages | Sequence[str | Messages],
        *,
        infill: bool = False,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Written | list[Written]:
        """Continue a prompt, or each of several, as `bd3-scale generate` does.

        Args:
            prompts: a text or a conversation for one result, or a list of them for a list of results. A conversation is
                a list of messages with `role` and `content`, from which the model's chat template makes a text.
            infill: fill each `[MASK]` of a prompt, a gap of one token; the result's text then includes the prompt.
            stop: a string, or several, that end a text; the result does not contain them.
            sampling: fields of `bd3_scale.generate.SamplingConfig`, such as max_new_tokens, temperature, seed. Text i
                depends on seed + i and its own prompt only.

        Raises:
            TypeError: an unknown field. ValueError: a value that is not allowed, or a model of next tokens.
        """
        texts, is_one = _several(prompts)
        written = list(self._writer.write(texts, _config_of(sampling), infill=infill, stop=_strings(stop)))
        return written[0] if is_one else written

    def stream(
        self,
        prompts: str | Messages | Sequence[str | Messages],
        *,
        infill: bool = False,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Yield what `generate` returns, block by block: each piece has the `text` that a finished block adds.

        A piece has the `index` of its prompt; `stopped_by` is None except in the last piece of a text.
        """
        texts, _ = _several(prompts)
        return self._writer.stream(texts, _config_of(sampling), infill=infill, stop=_strings(stop))

    def nelbo(self, texts: str | Sequence[str], *, block_size: int | None = None, draws: int = 4) -> Evaluation:
        """Measure a text, or several together, as `bd3-scale evaluate --text` measures a file of them.

        The result's `nelbo` is in nats a token, over mask rates in [0, 1] and `draws` draws of the noise, with its
        standard errors. It is an upper bound of the negative log-likelihood; where `exact`, it is the negative
        log-likelihood itself. Texts are cut into sequences of the training's length, each without context before it;
        the end of a text counts as a token. Equal texts are measured under equal noise. `perplexity` and
        `bits_per_byte` are computed from the same number.

        block_size: default: that of the training.
        ValueError: a text shorter than a block, a block size that does not divide the sequences, or draws below 1.
        """
        from bd3_scale.evaluate.checkpoint import evaluate_texts

        given = [texts] if isinstance(texts, str) else list(texts)
        parts = (self.transformer, self.manifest, self.tokenizer)
        return evaluate_texts(str(self.path), *parts, given, block_size=block_size, draws=draws)

    def logits(self, ids: Tensor | Sequence[int] | Sequence[Sequence[int]], *, block_size: int | None = None) -> Tensor:
        """Return fp32 logits [B, L, vocabulary] of ids [B, L], or [L] for one sequence, in one forward without noise.

        A position sees all blocks before its own and its whole own block, as in an exported model's forward. Tokens
        that are never predicted, such as the mask, have −∞. Ids may be masks: if only the last block has masks, its
        rows give the model's distribution of those tokens given all others, from which `generate` draws. At a clean
        position of a block diffusion model the row has seen the token that it would predict. A model of next tokens
        predicts at each position the token after it.

        block_size: default: that of the training.
        ValueError: ids that are not in the vocabulary, or not integers [B, L].
        """
        import torch

        from bd3_scale.attention.spans import make_spans

        tokens = torch.atleast_2d(torch.as_tensor(ids))
        size = self.manifest.vocabulary.size
        if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
            raise ValueError(f"ids have shape {tuple(tokens.shape)} and dtype {tokens.dtype}: give integers [B, L]")
        if bad := tokens[(tokens < 0) | (tokens >= size)].tolist():
            raise ValueError(f"ids {bad[:5]} are not in this vocabulary of {size}")
        device = next(self.transformer.parameters()).device
        spans = make_spans(torch.zeros(tokens.shape, dtype=torch.int32), block_size or self.manifest.block_size)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            logits = self.transformer.clean_logits(tokens.to(device), positions.to(device), spans.to(device))
        return logits[..., :size]

    @property
    def _writer(self) -> Writer:
        from bd3_scale.generate.text import check_fills_masks

        check_fills_masks(self.path, self.manifest)
        if self._writes is None:
            raise ValueError(f"{self.path} {_NO_TOKENIZER}")
        return self._writes


def _opened(
    path: Path,
    checkpoint: Path,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    chat_template: Path | None = None,
) -> Model:
    """Return the model of a checkpoint.

    chat_template: the folder that may have a chat template, if the checkpoint is temporary.
    """
    import torch

    from bd3_scale.checkpoint.manifest import TOKENIZER, read_manifest
    from bd3_scale.checkpoint.model import load_model
    from bd3_scale.generate.source import checkpoint_source
    from bd3_scale.generate.text import checkpoint_tokenizer
    from bd3_scale.parallel.groups import lone_groups

    manifest = read_manifest(checkpoint)
    tokenizer = checkpoint_tokenizer(checkpoint, manifest) if (checkpoint / TOKENIZER).is_dir() else None
    where = None if device is None else torch.device(device)
    transformer = load_model(checkpoint, manifest, lone_groups(), dtype=dtype, device=where)
    writer = None
    if tokenizer is not None and manifest.fills_masks:
        writer = checkpoint_source(checkpoint, manifest).writer(transformer, tokenizer)
        template, entropy = chat_template or writer.chat_template, partial(_least_entropy, manifest)
        writer = replace(writer, chat_template=template, least_entropy=cache(entropy))
    return Model(path, manifest, transformer, tokenizer, writer)


def _least_entropy(manifest: CheckpointManifest) -> float:
    import torch.distributed as dist

    from bd3_scale.generate.draft import SMALLEST_SUBWORD_VOCABULARY
    from bd3_scale.generate.text import default_min_entropy

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 or (dist.is_initialized() and dist.get_world_size() > 1)
    if several and manifest.vocabulary.size < SMALLEST_SUBWORD_VOCABULARY:
        raise ValueError(
            "min_entropy has no default for a vocabulary of bytes among several processes: the default comes from "
            "held-out text, which all of them would have to read together. Give min_entropy=0, or a number of nats"
        )
    return default_min_entropy(manifest)


def _several(prompts: str | Messages | Sequence[str | Messages]) -> tuple[list[str | Messages], bool]:
    """Return a list of prompts, and whether a single prompt was given."""
    if isinstance(prompts, str) or (prompts and all(isinstance(each, Mapping) for each in prompts)):
        return [cast("str | Messages", prompts)], True
    return list(cast("Sequence[str | Messages]", prompts)), False


def _config_of(sampling: dict[str, Any]) -> SamplingConfig:
    from bd3_scale.generate.config import SamplingConfig

    return SamplingConfig(**sampling)


def _strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of libraries at import; the warning filters of a notebook stay as they are."""
    from bd3_scale.observe.libraries import quieten_libraries

    with warnings.catch_warnings():
        quieten_libraries()
        yield
