"""Run the autoregressive rows with transformers: the judge of samples, and AR's own samples."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from bd3_scale.generate.writer import Written
from bd3_scale.observe.libraries import without_broken_torchvision

COMMAND = Path(sys.executable).with_name("bd3-scale")


def export(checkpoint: Path, folder: Path) -> None:
    """Export a checkpoint as a causal Hugging Face model, unless the folder exists."""
    if not folder.exists():
        subprocess.run([COMMAND, "convert", "export", checkpoint, "--out", folder], check=True)


@torch.no_grad()
def write_autoregressively(folder: Path, count: int, length: int, *, seed: int, top_p: float) -> list[Written]:
    """Sample `count` texts of up to `length` tokens; each begins after EOS, the end of a preceding document."""
    with without_broken_torchvision():
        import transformers

        options = {"trust_remote_code": False, "local_files_only": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    torch.manual_seed(seed)
    began = time.monotonic()
    end = tokenizer.eos_token_id
    rows = model.generate(
        torch.full((count, 1), end),
        attention_mask=torch.ones(count, 1, dtype=torch.long),
        do_sample=True,
        top_p=top_p,
        top_k=0,
        max_new_tokens=length,
        eos_token_id=end,
        pad_token_id=end,
    )[:, 1:].tolist()
    seconds = time.monotonic() - began
    texts = []
    for row in rows:
        ended = end in row
        tokens = row[: row.index(end)] if ended else row
        text = tokenizer.decode(tokens)
        texts.append(Written("", text, tokens, "eos" if ended else "length", len(tokens), 0, 0.0, None, seconds))
    return texts
