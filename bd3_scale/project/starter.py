"""Make a starter project: a commented recipe, a README with six commands, and a .gitignore."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from bd3_scale.resilience.files import check_writable, write_atomically

_RECIPE = """\
# The recipe of this project. `bd3-scale recipe explain KEY` says what a key means; `bd3-scale recipe list` has others.
name: "NAME"
seed: 1

# A transformer of about 3 million parameters, which two CPU cores train in some minutes. For a GPU, take more and wider
# layers.
model:
  num_layers: 3
  hidden_size: 256
  num_attention_heads: 4
  num_query_groups: 2
  ffn_hidden_size: 768
  tie_embeddings: true
  # About 1/sqrt(hidden_size).
  init_std: 0.06

# Block diffusion: the model fills the masks of a block, given the blocks before it. A block of 1 token is
# autoregressive; a block of data.seq_len tokens is the whole sequence (MDLM).
diffusion:
  block_size: 8
  # The interval of mask rates that training draws from. Instead, `search_interval: true` finds the one with the least
  # variance.
  mask_rate_low: 0.3
  mask_rate_high: 0.8

# What `bd3-scale data prepare` wrote; see the README.
data:
  path: data/tokens
  seq_len: 256

optimizer:
  lr: 4.0e-3
  # Warm-up, a constant rate, and a decay in the last steps.
  schedule: wsd
  warmup_steps: 20
  decay_steps: 250
  # Evaluations and exports take a moving average of the weights.
  ema_decay: 0.95

train:
  steps: 500
  # Sequences of a step over all ranks, and those that a rank computes at a time.
  global_batch_size: 8
  micro_batch_size: 4

evaluation:
  every_steps: 250
  sequences: 64

# Where a run has a checkpoint, `bd3-scale train` goes on from it.
checkpoint:
  every_steps: 250

# Ranks that train here. Leave it out to use every GPU of the machine.
launch:
  processes: 1
"""

_README = """\
# NAME

A block diffusion language model, trained with bd3_scale. Put your text (.txt, .jsonl, .parquet; also in folders) into
`text/`, and run the six commands in this folder:

```
bd3-scale data tokenizer text --out data/tokenizer --vocab-size 4096
bd3-scale data prepare text --out data/tokens --tokenizer data/tokenizer --recipe recipe.yaml
bd3-scale doctor --recipe recipe.yaml
bd3-scale train recipe.yaml
bd3-scale evaluate runs/NAME
bd3-scale generate runs/NAME --prompt 'The ' --max-new-tokens 100
```

The first two make the data, once. `doctor` checks this machine for the recipe. `train` writes to `runs/NAME`; after a
crash or Ctrl-C the same command goes on from the last checkpoint. `evaluate` gives the perplexity on held-out text.

A value of the recipe can be replaced on the command line, with a folder of its own for that run:

```
bd3-scale train recipe.yaml run_dir=runs/longer train.steps=5000
```
"""

_GITIGNORE = """\
data/
runs/
wandb/
"""


def make_project(folder: Path) -> list[Path]:
    """Write a starter project into `folder`, and return what was written. The project has the folder's name.

    Where it fails, nothing of it is left.

    OSError: the folder is a file, is not empty (FileExistsError), or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(os.scandir(folder))):
        raise FileExistsError(f"{folder} is not an empty folder: name one that is new or empty")
    # A run's name begins with a letter or digit.
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).lstrip("._-") or "project"
    files = {"recipe.yaml": _RECIPE, "README.md": _README, ".gitignore": _GITIGNORE}
    was_there = folder.exists()
    check_writable(folder)
    try:
        (folder / "text").mkdir()
        for file, text in files.items():
            write_atomically(folder / file, text.replace("NAME", name))
    except OSError:
        with contextlib.suppress(OSError):
            for file in files:
                (folder / file).unlink(missing_ok=True)
            (folder / "text").rmdir()
            if not was_there:
                folder.rmdir()
        raise
    return [folder / "text", *(folder / file for file in files)]
