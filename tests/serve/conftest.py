from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.models import BYTES, QWEN_SHAPE, native_checkpoint

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random model of bytes in blocks of 4, for 128 tokens, with a chat template."""
    checkpoint = native_checkpoint(tmp_path_factory.mktemp("chat") / "native", QWEN_SHAPE, BYTES)
    (checkpoint / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    return checkpoint
