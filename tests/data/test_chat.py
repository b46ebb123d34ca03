"""Test conversations as text and tokens, against transformers' `apply_chat_template` on the same folder."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.data.chat import ChatTemplate
from bd3_scale.data.tokenizer import load_tokenizer
from tests.data.tokenisers import CHAT_TEMPLATE, KINDS, MARKED_TEMPLATE, transformers_tokenizer, write_tokenizer

EXAMPLES = settings(max_examples=40)
# A template that uses the names of special tokens, whitespace control and a person's own keys.
LLAMA_TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "        {{- ' ' }}{%- generation %}{{- message.content | trim }}{{- eos_token }}{%- endgeneration %}\n"
    "    {%- else %}\n"
    "        {{- '[' + (message.name or message.role) + '] ' + message.content }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
)
# Qwen 3's way: of earlier answers it leaves the thinking out.
FORGETS_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n"
    "{% if loop.last %}{{ turn['content'] }}{% else %}{{ turn['content'].split('</think>')[-1] }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]
ANSWERED = [*HELLO, {"role": "assistant", "content": "Nine crates."}]

contents = st.lists(
    st.sampled_from(["Nine crates", " ", "    ", "\n", "<|im_end|>", "<think>", "[MASK]", "é", "日", "{{ x }}", "<s>"])
    | st.text(st.characters(codec="utf-8"), max_size=4),
    max_size=5,
).map("".join)


def conversations(contents: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    roles = st.sampled_from(["system", "user", "assistant", "tool"])
    return st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), min_size=1, max_size=5)


def chat_folder(folder: Path, template: str | None, kind: str = "chat", **config: Any) -> Path:
    said = {} if template is None else {"chat_template": template}
    write_tokenizer(folder, KINDS[kind], **({"chat_template": None} | config))
    file = folder / "tokenizer_config.json"
    declared = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({key: value for key, value in (declared | said).items() if value is not None}), "utf-8")
    return folder


def shown(spans: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> list[int]:
    """Return 1 for each token that holds a character of a span."""
    inside = {index for first, last in spans for index in range(first, last)}
    return [int(any(index in inside for index in range(*place))) for place in places]


# --- prompts


@pytest.mark.parametrize(
    ("template", "kind"),
    [(CHAT_TEMPLATE, "chat"), (MARKED_TEMPLATE, "chat"), (CHAT_TEMPLATE, "llama-3"), (LLAMA_TEMPLATE, "llama-2")],
)
def test_a_prompt_is_what_transformers_makes_of_the_conversation(template: str, kind: str, tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "chat", template, kind)
    chat, tokenizer, theirs = ChatTemplate(folder), load_tokenizer(folder), transformers_tokenizer(folder)
    assert pickle.loads(pickle.dumps(chat)).prompt(HELLO) == chat.prompt(HELLO)

    @EXAMPLES
    @given(conversations(contents))
    def check(messages: list[dict[str, str]]) -> None:
        text = chat.prompt(messages)
        assert text == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer.encode_special(text) == theirs.apply_chat_template(messages, add_generation_prompt=True)

    check()


def test_the_name_of_the_mask_is_letters_in_a_conversation(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "chat", CHAT_TEMPLATE, "own mask")
    tokenizer = load_tokenizer(folder)
    text = ChatTemplate(folder).prompt([{"role": "user", "content": "a<|mask|>b"}])
    ids = tokenizer.encode_special(text)
    assert tokenizer.vocabulary.mask_id not in ids
    assert tokenizer.decode(ids) == text == "<|im_start|>user\na<|mask|>b<|im_end|>\n<|im_start|>assistant\n"


def test_messages_keep_their_other_keys_and_special_tokens_their_names(tmp_path: Path) -> None:
    chat = ChatTemplate(chat_folder(tmp_path / "chat", LLAMA_TEMPLATE, "llama-2"))
    messages = [{"role": "user", "name": "Ada", "content": "Hello"}, {"role": "assistant", "content": " Nine. "}]
    assert chat.spans(messages) == ("<s>[Ada] Hello Nine.</s>", [(15, 24)])


def test_a_template_of_its_own_file_goes_before_the_configuration(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "chat", "nothing")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    theirs = transformers_tokenizer(folder).apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
    assert ChatTemplate(folder).prompt(HELLO) == theirs == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


# --- where the assistant speaks


@pytest.mark.parametrize(("template", "kind"), [(MARKED_TEMPLATE, "chat"), (LLAMA_TEMPLATE, "llama-2")])
def test_a_template_that_marks_answers_says_which_tokens_are_the_assistants(
    template: str, kind: str, tmp_path: Path
) -> None:
    folder = chat_folder(tmp_path / "chat", template, kind)
    chat, tokenizer, theirs = ChatTemplate(folder), load_tokenizer(folder), transformers_tokenizer(folder)
    end = "</s>" if kind == "llama-2" else "<|im_end|>"

    @EXAMPLES
    @given(conversations(contents))
    def check(messages: list[dict[str, str]]) -> None:
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        text, spans = chat.spans(messages)
        ids, places = tokenizer.encode_spans(text)
        assert ids == found["input_ids"]
        assert shown(spans, places) == found["assistant_masks"]
        answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
        said = [text[first:last] for first, last in spans]
        assert all(one.endswith(end) for one in said)
        assert [one.removesuffix(end).strip() for one in said] == answers

    check()


def test_without_marks_an_answer_is_what_it_adds_to_the_words_that_ask_for_it(tmp_path: Path) -> None:
    chat = ChatTemplate(chat_folder(tmp_path / "chat", CHAT_TEMPLATE))

    @EXAMPLES
    @given(conversations(contents))
    def check(messages: list[dict[str, str]]) -> None:
        text, spans = chat.spans(messages)
        expected, pieces = [], []
        for message in messages:
            begin, end = f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>\n"
            place = len("".join(pieces)) + len(begin)
            if message["role"] == "assistant":
                expected.append((place, place + len(end)))
            pieces += [begin, end]
        assert (text, spans) == ("".join(pieces), expected)

    check()


def test_a_template_that_rewrites_what_was_said_before_is_refused(tmp_path: Path) -> None:
    chat = ChatTemplate(chat_folder(tmp_path / "chat", FORGETS_TEMPLATE))
    thinks = {"role": "assistant", "content": "<think>hm</think>Nine."}
    text, spans = chat.spans([*HELLO, thinks])
    assert [text[first:last] for first, last in spans] == ["<think>hm</think>Nine.<|im_end|>\n"]
    advice = r"writes earlier messages differently .* put \{% generation %\} and \{% endgeneration %\} around it"
    with pytest.raises(ValueError, match=advice):
        chat.spans([*HELLO, thinks, *HELLO, ANSWERED[1]])
    without = [*HELLO, ANSWERED[1], *HELLO, ANSWERED[1]]
    text, spans = chat.spans(without)  # nothing was left out of these
    assert [text[first:last] for first, last in spans] == ["Nine crates.<|im_end|>\n"] * 2


def test_a_template_whose_question_is_no_part_of_the_answered_text_is_refused(tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    chat = ChatTemplate(chat_folder(tmp_path / "chat", template))
    assert chat.prompt(HELLO).endswith("assistant\n<think>")
    with pytest.raises(ValueError, match="writes earlier messages differently"):
        chat.spans(ANSWERED)


# --- what cannot be


def test_a_folder_without_a_template_is_told(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "chat", None)
    with pytest.raises(ValueError, match=f"{folder} has no chat template: put a chat_template.jinja into it"):
        ChatTemplate(folder)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception('roles\nmust alternate') }}", "roles must alternate"),
        ("{{ messages[7]['role'] }}", "has no element 7"),
        ("{{ messages[0]['role'] + 7 }}", "can only concatenate str"),
        ("{{ messages.pop() }}", "unsafe|not safe"),
        ("{% for turn in messages %}", "Unexpected end of template"),
        ("{{ messages[0]['content'].index('x') }}", "substring not found"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_a_template_that_refuses_says_so_in_one_line(template: str, reason: str, tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "chat", template)
    chat = ChatTemplate(folder)
    for ask in (chat.prompt, chat.spans):
        with pytest.raises(ValueError, match=f"of {folder} refuses the conversation: .*({reason})") as error:
            ask(HELLO)
        assert len(str(error.value).splitlines()) == 1
