"""Write the files of an exported folder: weights in shards, configuration, tokeniser, code and model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from bd3_scale.checkpoint.manifest import TOKENIZER
from bd3_scale.checkpoint.source_ids import GENERATION_CONFIG, KEYS, source_ids
from bd3_scale.convert.remote_code_files import remote_code
from bd3_scale.convert.serving import ENGINE_MASK_IDS, SGLANG_CONFIG, Packing, model_card, sglang_config
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.data.tokenizer_folder import write_tokenizer
from bd3_scale.resilience.foreign import CONFIG, WEIGHTS, WEIGHTS_INDEX

if TYPE_CHECKING:
    from bd3_scale.convert.export import ExportPlan

SHARD_BYTES = 1 << 30


def write_shards(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    sizes: Mapping[str, int],
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write tensors as model.safetensors, or as shards with an index; `sizes`: bytes of each tensor, in their order."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    files = [WEIGHTS] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    done = 0
    for file, names in zip(files, shards, strict=True):
        shard = {}
        for name in names:
            given, tensor = next(tensors)
            assert given == name
            shard[name] = tensor.contiguous()
            done += sizes[name]
            progress(done)
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2))


def write_companions(
    folder: Path, plan: ExportPlan, extra_config: Mapping[str, Any] | None = None, packing: Packing | None = None
) -> None:
    """Write all files but the weights: configuration, tokeniser, code, model card and engines' settings."""
    (folder / CONFIG).write_text(json.dumps(plan.config | dict(extra_config or {}), indent=2) + "\n")
    _write_generation_config(folder, plan)
    if (tokenizer := plan.tokenizer()) is not None:
        write_tokenizer(
            tokenizer,
            plan.checkpoint / TOKENIZER,
            folder,
            with_mask=plan.is_block_diffusion,
            mask_id=plan.mask_id,
            settings=_tokenizer_settings(plan, tokenizer),
        )
    if plan.is_block_diffusion:
        for name, source in remote_code(plan.kind).items():
            (folder / name).write_text(source, encoding="utf-8")
    if plan.kind in ENGINE_MASK_IDS:
        (folder / SGLANG_CONFIG).write_text(sglang_config(plan.config["block_size"]))
    card = model_card(plan.kind, plan.config, plan.manifest, packing, plan.padding.summary if plan.padding else None)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _tokenizer_settings(plan: ExportPlan, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings with which `generate(**tokenizer(texts, padding=True, return_tensors="pt"))` works."""
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    if not plan.is_block_diffusion:
        return inputs
    pad = plan.config["pad_token_id"]
    name = tokenizer.name_of(pad) if pad >= 0 else None
    return inputs | {"padding_side": "left"} | ({} if name is None else {"pad_token": name})


def _write_generation_config(folder: Path, plan: ExportPlan) -> None:
    """Write the source's generation config if there is one, else the special ids, and sampling options under which
    tokens come from the distribution that the model was trained for.
    """
    # transformers defaults to top_k=50, and other engines refuse the 0 that turns it off there; the vocabulary's size
    # turns it off everywhere.
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": plan.config["vocab_size"], "top_p": 1.0}
    content = source_ids(plan.checkpoint).generation_config or {key: plan.config[key] for key in KEYS} | drawn
    content |= renumber_mask(content, plan.manifest.vocabulary.mask_id, plan.mask_id)
    (folder / GENERATION_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def renumber_mask(content: Mapping[str, Any], mask_id: int, new_id: int) -> dict[str, int]:
    """Return the token ids of a configuration that are the mask, such as the padding id, with the mask's new id."""
    return {key: new_id for key, value in content.items() if key.endswith("_token_id") and value == mask_id}
