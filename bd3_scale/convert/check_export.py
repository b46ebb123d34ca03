"""Check in a fresh process, with transformers alone, that an exported folder computes what the checkpoint computes.

`python -m bd3_scale.convert.check_export FOLDER EXPECTED` is that process; it writes the problem into EXPECTED.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.resilience.leftovers import temporary_folder

TEXTS = (
    "Once upon a time, there were 3,141 of them.",
    "  two  spaces\n\n\tand lines\r\n",
    "naïve 日本語 \U0001f600 ½",
    "def f(x):\n    return [i**2 for i in x]\n",
)
LENGTH = 24
RESULT = "result.txt"
# Allowed difference as a share of the largest logit: two implementations in one dtype differ by rounding alone, far
# below these values, and wrong weights change logits completely.
TOLERANCES = {torch.float32: 1e-3}
HALF_PRECISION_TOLERANCE = 5e-2


@torch.no_grad()
def expected_logits(model: BlockDiffusionTransformer, block_size: int, max_length: int) -> tuple[Tensor, Tensor]:
    """Return random ids, int64 [1, S], and the model's fp32 logits of them as clean text [1, S, ids in use]."""
    vocabulary, length = model.vocabulary, min(LENGTH, max_length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary.size - 1, (1, length), generator=generator)
    ids = (ids + (ids >= vocabulary.mask_id)).to(next(model.parameters()).device)
    spans = make_spans(torch.zeros(1, length, dtype=torch.int32), block_size).to(ids.device)
    logits = model.clean_logits(ids, torch.arange(length, device=ids.device)[None], spans)
    return ids.cpu(), logits[..., : vocabulary.size].float().cpu()


@torch.no_grad()
def round_weights(model: BlockDiffusionTransformer, dtype: torch.dtype) -> None:
    """Round the weights of a model to the values of `dtype`, and keep its own dtype."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def check_export(
    folder: Path,
    tokenizer: Tokenizer | None,
    vocabulary: Vocabulary,
    ids: Tensor,
    logits: Tensor,
    dtype: torch.dtype,
    *,
    exact: bool = False,
) -> None:
    """Load `folder` in a fresh process and compare its logits and token ids.

    Args:
        tokenizer: the training's tokeniser; None if there is none.
        ids, logits: see `expected_logits`.
        dtype: that the weights are loaded in.
        exact: compute in fp32, as for the expected logits. For experts: rounding of activations would choose others.

    Raises:
        ValueError: transformers cannot load it, the tokeniser has more ids than the model has rows, or another result
            for a text, or the logits differ.
    """
    expected = expectations(tokenizer, vocabulary, dtype, exact=exact)
    with temporary_folder("check") as path:
        scratch = str(path)
        Path(scratch, "expected.json").write_text(json.dumps(expected))
        save_file({"ids": ids, "logits": logits.contiguous()}, Path(scratch, "expected.safetensors"))
        # Only the folder's code may run: empty caches and no current folder on the path, or modules of the same name
        # from there would be imported instead.
        caches = dict.fromkeys(("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE"), scratch)
        environment = os.environ | caches | {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "bd3_scale.convert.check_export", str(folder), scratch]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        result = Path(scratch, RESULT)
        problem = result.read_text() if result.is_file() else _failure(done)
    if problem:
        raise ValueError(
            f"the export differs from the checkpoint and is removed: {problem}. This is an error of bd3_scale or of "
            "the installed transformers: please report it with the model's config.json"
        )


def expectations(
    tokenizer: Tokenizer | None, vocabulary: Vocabulary, dtype: torch.dtype, *, exact: bool = False
) -> dict[str, Any]:
    """Return the expected properties of an export, as JSON values."""
    texts = [] if tokenizer is None else [*TEXTS, f"a{tokenizer.name_of(vocabulary.eos_id)}b"]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "exact": exact,
        "mask_id": vocabulary.mask_id,
        "texts": {text: tokenizer.encode_prompt(text) for text in texts if tokenizer is not None},
    }


def _failure(done: subprocess.CompletedProcess[str]) -> str:
    """Return the error of a process that ended without a result."""
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"the process that loads it was ended by {name}, as happens when memory runs out"
    return (done.stderr.strip().splitlines() or ["no message"])[-1]


@torch.no_grad()
def problems(folder: Path, expected: dict[str, Any], ids: Tensor, logits: Tensor) -> Iterator[str]:
    """Yield the problems of `folder`; runs in the fresh process. `expected`: see `expectations`."""
    from bd3_scale.observe.libraries import without_broken_torchvision

    with without_broken_torchvision():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = getattr(torch, expected["dtype"])
        # The folder was written just now by this package, and so was the code in it.
        trust = any(folder.glob("modeling_*.py"))
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust, local_files_only=True
        ).eval()
        if expected["exact"]:
            model(ids)  # the first forward unpacks packed weights
            torch.nn.Module.float(model)  # transformers' own `float` refuses quantised models
            dtype = torch.float32
        tokenizer = None
        if expected["texts"]:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer is not None and len(tokenizer) > rows:
        yield f"the tokeniser has {len(tokenizer)} ids, and the embedding {rows} rows"
    for text, native in expected["texts"].items():
        assert tokenizer is not None
        tokens = tokenizer(text).input_ids
        if tokens != native:
            yield f"{text!r} is tokenised as {tokens}, and in training as {native}"
    exported = model(ids).logits.float()
    known = [i for i in range(min(logits.shape[-1], exported.shape[-1])) if i != expected["mask_id"]]
    native, exported = logits[..., known], exported[..., known]
    if not torch.equal(native.isnan(), exported.isnan()):
        yield "logits are not finite at other positions than those of the native model"
    difference = float((exported - native).nan_to_num().abs().max() / native.nan_to_num().abs().max().clamp(min=1e-30))
    if difference > TOLERANCES.get(dtype, HALF_PRECISION_TOLERANCE):
        yield f"logits differ by {difference:.1%} of the largest"


def main(folder: Path, scratch: Path) -> None:
    """Write the first problem, or an empty text, into `scratch`."""
    expected = json.loads((scratch / "expected.json").read_text())
    tensors = load_file(scratch / "expected.safetensors")
    problem = next(problems(folder, expected, tensors["ids"], tensors["logits"]), "")
    (scratch / RESULT).write_text(problem)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
