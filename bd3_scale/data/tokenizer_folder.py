"""Write a tokeniser's folder: its two files, further settings of its source, and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bd3_scale.data.chat import CHAT_TEMPLATE, template_file
from bd3_scale.data.tokenizer import TOKENIZER_FILES, Tokenizer
from bd3_scale.data.tokenizer_json import with_mask_at, without_added
from bd3_scale.resilience.files import read_object
from bd3_scale.resilience.foreign import object_in, safe_settings

# Left out: transformers reads the added tokens, with the mask, from tokenizer.json, and BOS and EOS from its template.
_LEFT_OUT = ("added_tokens_decoder", "add_bos_token", "add_eos_token")


def write_tokenizer(
    tokenizer: Tokenizer,
    source: Path,
    folder: Path,
    *,
    with_mask: bool = True,
    mask_id: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a tokeniser into `folder`, with settings of the folder `source` beyond those of `Tokenizer.save`.

    Files are not copied: only the chat template and settings of `tokenizer_config.json` that name no code are passed
    on. Without the mask, that token is left out, unless it stands among others in the vocabulary. mask_id: another id
    for the mask, see `with_mask_at`. `settings` override those of `source`.

    ValueError: a file of `source` is a link out of it, too large, or not JSON or text.
    """
    template = template_file(source)
    declared = {key: value for key, value in object_in(source, TOKENIZER_FILES[1]).items() if key not in _LEFT_OUT}
    tokenizer.save(folder)
    content, own = (read_object(folder / name) for name in TOKENIZER_FILES)
    config = own | safe_settings(declared) | own | dict(settings or {})
    vocabulary = tokenizer.vocabulary
    if not with_mask:
        del config["mask_token"]
        if vocabulary.mask_id == vocabulary.size - 1:
            content = without_added(content, own["mask_token"])
    elif mask_id is not None and mask_id != vocabulary.mask_id:
        content = with_mask_at(content, own["mask_token"], mask_id)
    for name, value in zip(TOKENIZER_FILES, (content, config), strict=True):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if template is not None:
        (folder / CHAT_TEMPLATE).write_bytes(template.encode())
