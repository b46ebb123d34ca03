"""Write what engines need besides the weights (launch lines, SGLang's algorithm file, model card), and tell who can
run it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.convert.architectures import EXPORT_FORMATS, Format
from bd3_scale.recipe.plain_yaml import dump_yaml

ENGINE_MASK_ID = 151669  # in Qwen3's tokeniser; SGLang and LMDeploy have it hard-coded for SDAR
# Formats that engines run -> the mask id that the engines expect; only SGLang runs LLaDA2.
ENGINE_MASK_IDS: Mapping[Format, int] = {"sdar": ENGINE_MASK_ID, "sdar_moe": ENGINE_MASK_ID, "llada2": 156895}
# Statements about these engines come from their source, those about the mask at these commits; no export was run in
# them.
SGLANG_READ, LMDEPLOY_READ = "0ad4de4", "a574968"
SGLANG_CONFIG = "sglang.yaml"
THRESHOLD = 0.9
MAX_RUNNING_REQUESTS = 32  # SGLang's default is 1 for diffusion models


@dataclass(frozen=True)
class Engine:
    """An engine's verdict on an export: whether it runs it, and the reason."""

    name: str
    runs: bool
    reason: str


@dataclass(frozen=True)
class Packing:
    """The packing of quantised weights. notes: why SGLang's kernel cannot run layers of it."""

    description: str
    notes: tuple[str, ...]


def engines(kind: Format, mask_id: int, packing: Packing | None = None) -> tuple[Engine, ...]:
    """Return which engines run an export of `kind` with this mask id, with reasons for people."""
    table = _engines(kind, mask_id)
    if packing is None:
        return table
    return tuple(Engine(e.name, False, reason) if (reason := _packing_obstacle(e.name, packing)) else e for e in table)


def _packing_obstacle(engine: str, packing: Packing) -> str | None:
    """Return why an engine does not run weights packed by compressed-tensors, None if it does."""
    if engine == "SGLang" and packing.notes:
        return f"its kernel for packed weights cannot run these layers: {'; '.join(packing.notes)}"
    if engine.startswith(("transformers", "SGLang", "vLLM")):
        return None
    if engine == "LMDeploy":
        return "only its PyTorch engine runs SDAR, and that reads AWQ, SmoothQuant and FP8, but not compressed-tensors"
    return "it is not known to read compressed-tensors"


def _engines(kind: Format, mask_id: int) -> tuple[Engine, ...]:
    transformers = Engine("transformers", True, "4.5x and 5.x")
    if not EXPORT_FORMATS[kind].is_block_diffusion:
        reason = "an autoregressive model like any other"
        return transformers, Engine("SGLang, vLLM", True, reason), Engine("LMDeploy, llama.cpp", True, reason)
    transformers = Engine("transformers", True, "4.5x and 5.x, with trust_remote_code")
    llama_cpp = Engine("llama.cpp", False, "it reads GGUF files: `bd3-scale convert export --format gguf` writes one")
    if kind == "bd3":
        reason = "they run SDAR, and SGLang also LLaDA2, which need q/k norm, RMSNorm and SwiGLU"
        return transformers, Engine("SGLang, LMDeploy, JetEngine, Diffulex", False, reason), llama_cpp
    expected = ENGINE_MASK_IDS[kind]
    fits = mask_id == expected
    reason = (
        f"the mask has the id {expected}, which it expects"
        if fits
        else f"it takes {expected} ({'LLaDA2' if kind == 'llada2' else 'Qwen3'}'s tokeniser) for the mask, and here "
        f"the mask has the id {mask_id}: `--mask-id {expected}` moves it there"
    )
    if kind == "llada2":
        unknown = Engine("LMDeploy, JetEngine, Diffulex", False, "they are not known to run LLaDA2")
        return transformers, Engine("SGLang", fits, reason), unknown, llama_cpp
    read = [f" (source read at commit {commit})" * (kind == "sdar") for commit in (SGLANG_READ, LMDEPLOY_READ)]
    return (
        transformers,
        Engine("SGLang", fits, reason + read[0]),
        Engine("LMDeploy", fits, reason + read[1]),
        Engine("JetEngine, Diffulex" if kind == "sdar" else "JetEngine", True, "they read mask_token_id"),
        llama_cpp,
    )


def launch_lines(block_size: int, engine_list: Sequence[Engine]) -> str:
    """Return the commands that serve an export, from inside its folder, with the engines that run it."""
    lines = {
        "SGLang": f"python -m sglang.launch_server --model-path . --trust-remote-code \\\n"
        f"    --dllm-algorithm LowConfidence --dllm-algorithm-config {SGLANG_CONFIG} \\\n"
        f"    --max-running-requests {MAX_RUNNING_REQUESTS}\n",
        "LMDeploy": f"lmdeploy serve api_server . --backend pytorch --dllm-block-length {block_size} \\\n"
        f"    --dllm-denoising-steps {block_size} --dllm-unmasking-strategy low_confidence_dynamic \\\n"
        f"    --dllm-confidence-threshold {THRESHOLD}\n",
    }
    return "".join(lines[engine.name] for engine in engine_list if engine.runs and engine.name in lines)


def sglang_config(block_size: int) -> str:
    """Return SGLang's algorithm file: SGLang does not read the block size from config.json."""
    return f"block_size: {block_size}\nthreshold: {THRESHOLD}\n"


def model_card(
    kind: Format,
    config: Mapping[str, Any],
    manifest: CheckpointManifest,
    packing: Packing | None = None,
    padding: str | None = None,
) -> str:
    """Return README.md of an export: what it is, how to run it, and how it was trained.

    config: the content of config.json. padding: summary of the padding rows of a moved mask, see `Padding.summary`.
    """
    block_size, mask_id = manifest.block_size, config.get("mask_token_id", manifest.vocabulary.mask_id)
    block_diffusion = EXPORT_FORMATS[kind].is_block_diffusion
    tags = ["block-diffusion", "bd3_scale"] if block_diffusion else ["bd3_scale"]
    what = (
        f"A block diffusion language model (BD3-LM) with blocks of {block_size} tokens: blocks are generated left to "
        "right, and inside a block masked diffusion fills tokens in parallel."
        if block_diffusion
        else "An autoregressive language model."
    )
    weights = f"Its weights are in a smaller format: {packing.description}.\n" if packing else ""
    engine_list = engines(kind, mask_id, packing)
    rows = "\n".join(f"| {e.name} | {'yes' if e.runs else 'no'} | {e.reason} |" for e in engine_list)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{", ".join(tags)}]
---
# {manifest.name}

{what} Format: `{config["architectures"][0]}`, after {manifest.step:,} steps of training by bd3_scale. {weights}
## Run

```python
{_example(block_diffusion)}```

| engine | runs it | |
|---|---|---|
{rows}
{_padding(config, manifest, padding)}{_serving(kind, block_size, engine_list)}
## Training

{_training(manifest)}"""


def gguf_card(file: str, kind: str, manifest: CheckpointManifest) -> str:
    """Return README.md of a GGUF file: what runs it, and which programs generate rubbish with it."""
    return f"""---
library_name: bd3_scale
pipeline_tag: text-generation
tags: [block-diffusion, bd3_scale, gguf]
---
# {manifest.name} in GGUF ({kind})

A block diffusion language model (BD3-LM) with blocks of {manifest.block_size} tokens, for a CPU: blocks are
generated left to right, and inside a block masked diffusion fills tokens in parallel.

```
pip install 'bd3_scale[gguf]'
bd3-scale generate {file} --prompt 'Once upon a time'
```

**Programs for autoregressive models load this file, too, and generate rubbish.** llama.cpp's own programs and those
built on it (`llama-cli`, `llama-server`, Ollama, LM Studio …) predict the next token with causal attention. This model
fills masks: a token sees its whole block, and the logits at a position predict the token of that position. The file
says so in keys that these programs do not read: `attention.causal` and `diffusion.shift_logits` are false, and
`diffusion.block_length` is {manifest.block_size}.

## Training

{_training(manifest)}"""


def _example(block_diffusion: bool) -> str:
    trust = ", trust_remote_code=True" if block_diffusion else ""
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained("."{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
"""


_TRANSFORMERS = """`generate` accepts transformers' arguments `generation_config`, `streamer` (block by block),
`stop_strings` with `tokenizer`, `stopping_criteria`, and prompts of several lengths, padded on the left, with their
`attention_mask`. It also accepts `steps`, `unmasking` and `threshold`, which set how many tokens a pass fills in. Other
arguments, such as beams, are refused. Defaults of `do_sample`, `temperature`, `top_k` and `top_p` are in
`generation_config.json`.

`pipeline("text-generation", model=".", trust_remote_code=True)` works; transformers 4 sets its temperature to 0.7.
`transformers serve` does not work (4.57 and 5.24): it loads only classes of transformers itself, even with
`--trust-remote-code`.
"""


def _padding(config: Mapping[str, Any], manifest: CheckpointManifest, padding: str | None) -> str:
    """Return a paragraph about the padding of a moved mask, empty if the mask has its id of training."""
    mask_id = config.get("mask_token_id")
    if mask_id in (None, manifest.vocabulary.mask_id):
        return ""
    return f"""
The mask has the id {mask_id}, and had {manifest.vocabulary.mask_id} in training: embedding and head are padded up to it
with {config["vocab_size"] - config["num_token_ids"] - 1:,} rows that no text uses. The code in this folder never draws
them. SGLang and LMDeploy include all rows of the head in their softmax: {padding}.
"""


def _serving(kind: Format, block_size: int, engine_list: Sequence[Engine]) -> str:
    if not EXPORT_FORMATS[kind].is_block_diffusion:
        return ""
    lines = launch_lines(block_size, engine_list)
    fenced = f"\n```\n{lines}```\n" if lines else ""
    return f"""
{_TRANSFORMERS}{fenced}
Blocks are aligned to position 0, including the prompt. Logits predict the token of their own position, without a shift.
"""


def _training(manifest: CheckpointManifest) -> str:
    if manifest.trained_with is not None:
        text = dump_yaml(manifest.trained_with)
        fence = _fence(text, 3)
        return f"{fence}yaml\n{text}{fence}\n"
    source = manifest.imported_from
    fence = _fence(source, 1)
    return f"Not trained by bd3_scale as it is: imported from {fence} {source} {fence}.\n"


def _fence(text: str, least: int) -> str:
    """Return a Markdown fence longer than any run of backticks in the text, which cannot end it."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
