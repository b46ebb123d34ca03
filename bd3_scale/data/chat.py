"""Render conversations as text with a tokeniser's chat template, through transformers' own template code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bd3_scale.data.tokenizer import TOKENIZER_FILES, text_of_token
from bd3_scale.resilience.foreign import file_in, object_in
from bd3_scale.resilience.readers import read_regular, reader

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
CHAT_TEMPLATE = "chat_template.jinja"  # as transformers names it
TEMPLATE_BYTES = 1 << 20
ASSISTANT = "assistant"
SEVERAL = "additional_special_tokens"
# Templates mark the assistant's text with this tag, for transformers' `return_assistant_tokens_mask`.
_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """The template in a tokeniser's folder: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`.

    Raises ValueError: the folder has no template, or an invalid one.
    """

    def __init__(self, folder: Path) -> None:
        from bd3_scale.observe.libraries import without_broken_torchvision

        with without_broken_torchvision():
            from transformers.utils import chat_template_utils

        self.folder = folder
        self.template, self._special_tokens = _template_and_tokens(folder)
        self._render = chat_template_utils.render_jinja_template

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[Path]]:
        return ChatTemplate, (self.folder,)

    def prompt(self, messages: Messages) -> str:
        """Return the text of a conversation up to the assistant's next answer. ValueError: the template refuses it."""
        return self._text(messages, add_generation_prompt=True)

    def spans(self, messages: Messages) -> tuple[str, list[Span]]:
        """Return the text of a conversation and the spans of the assistant's answers in it, in characters.

        If the template does not mark them itself (`{% generation %}`), the span of an answer is the text that the
        answer adds to the prompt of the messages before it.
        ValueError: the template refuses the conversation, or an answer changes the text before it.
        """
        if _MARKS_ASSISTANT.search(self.template):
            (text,), (spans,) = self._rendered(messages, return_assistant_tokens_mask=True)
            return text, [(int(start), int(end)) for start, end in spans]
        text, spans = self._text(messages), []
        for place, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before, after = self.prompt(messages[:place]), self._text(messages[: place + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "the chat template writes earlier messages differently once an answer follows, and does not mark "
                    "the assistant's text: put {% generation %} and {% endgeneration %} around it in the template"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _text(self, messages: Messages, **how: Any) -> str:
        return str(self._rendered(messages, **how)[0][0])

    def _rendered(self, messages: Messages, **how: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._render([list(messages)], chat_template=self.template, **how, **self._special_tokens)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template of {self.folder} refuses the conversation: {reason}") from error


def template_file(folder: Path) -> str | None:
    """Return the content of a folder's `chat_template.jinja`; None if there is no such file. ValueError: not UTF-8."""
    path = file_in(folder, CHAT_TEMPLATE)
    if path is None:
        return None
    try:
        return read_regular(path, TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


def chat_template(folder: Path) -> str | None:
    """Return the template of a tokeniser's folder, None if it has none. ValueError: the template is not text."""
    declared = object_in(folder, TOKENIZER_FILES[1]).get("chat_template")
    if isinstance(declared, list):  # several named templates, of which transformers uses this one
        declared = {one["name"]: one["template"] for one in declared}.get("default")
    template = template_file(folder) or declared or None
    if template is not None and not isinstance(template, str):
        raise ValueError(f"chat_template of {folder / TOKENIZER_FILES[1]} is not text: add a {CHAT_TEMPLATE} there")
    return template


@reader("a chat template", path="folder")
def _template_and_tokens(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the template of a tokeniser's folder and the special tokens that templates may use by name."""
    template = chat_template(folder)
    if template is None:
        raise ValueError(
            f"{folder} has no chat template: put a {CHAT_TEMPLATE} into it, or give plain text with --prompt"
        )
    config = object_in(folder, "special_tokens_map.json") | object_in(folder, TOKENIZER_FILES[1])
    more = config.get("extra_special_tokens")
    named = config | (more if isinstance(more, dict) else {})
    tokens: dict[str, Any] = {
        name: text for name, token in named.items() if name.endswith("_token") and (text := text_of_token(token))
    }
    several = config.get(SEVERAL)
    if isinstance(several, list):
        tokens[SEVERAL] = [text for token in several if (text := text_of_token(token))]
    return template, tokens
