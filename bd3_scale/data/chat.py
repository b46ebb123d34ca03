"""Conversations as text, by the chat template that lies beside a tokeniser, with transformers' own template code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
CHAT_TEMPLATE = "chat_template.jinja"  # as transformers names it
ASSISTANT = "assistant"
# What marks the assistant's text inside a template, for transformers' `return_assistant_tokens_mask`.
_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """The template of a tokeniser's folder: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`.

    Raises ValueError: the folder has none.
    """

    def __init__(self, folder: Path) -> None:
        from bd3_scale.observe.libraries import without_broken_torchvision

        with without_broken_torchvision():
            import transformers
            from transformers.utils import chat_template_utils

        # Never the class that a folder names for itself.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        if not tokenizer.chat_template:
            raise ValueError(
                f"{folder} has no chat template: put a chat_template.jinja into it, or give plain text with --prompt"
            )
        self.folder = folder
        self.template: str = tokenizer.get_chat_template()
        self._special_tokens = tokenizer.special_tokens_map
        self._render = chat_template_utils.render_jinja_template

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[Path]]:
        return ChatTemplate, (self.folder,)

    def prompt(self, messages: Messages) -> str:
        """The text of a conversation up to where the assistant is to speak. ValueError: the template refuses it."""
        return self._text(messages, add_generation_prompt=True)

    def spans(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text of a whole conversation, and where in it the assistant speaks, in characters.

        Where the template does not mark that itself (`{% generation %}`), it is what each answer adds to the text of
        the messages before it and the words that ask for an answer.
        ValueError: the template refuses the conversation, or an answer changes the text before it.
        """
        if _MARKS_ASSISTANT.search(self.template):
            (text,), (spans,) = self._rendered(messages, return_assistant_tokens_mask=True)
            return text, [(int(start), int(end)) for start, end in spans]
        text, found = self._text(messages), []
        for place, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before, after = self.prompt(messages[:place]), self._text(messages[: place + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "the chat template writes earlier messages otherwise once an answer follows, and does not mark the "
                    "assistant's text: put {% generation %} and {% endgeneration %} around it in the template"
                )
            found.append((len(before), len(after)))
        return text, found

    def _text(self, messages: Messages, **how: Any) -> str:
        return str(self._rendered(messages, **how)[0][0])

    def _rendered(self, messages: Messages, **how: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._render([list(messages)], chat_template=self.template, **how, **self._special_tokens)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template of {self.folder} refuses the conversation: {reason}") from error
