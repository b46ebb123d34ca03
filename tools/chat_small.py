"""Make the data of `recipes/chat-small.yaml`: small conversations, a tokeniser with a chat template, prepared data.

    python tools/chat_small.py

It writes `data/chat-small-text`, `data/chat-small-tokenizer` and `data/chat-small`, which it replaces.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT, TOKENIZER, DATA = Path("data/chat-small-text"), Path("data/chat-small-tokenizer"), Path("data/chat-small")
COMMAND = Path(os.path.relpath(Path(sys.executable).with_name("bd3-scale")))
CONVERSATIONS, HELD_OUT, VOCABULARY = 6000, 300, 512
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
OPPOSITES = ("hot cold", "high low", "old new", "dark light", "early late", "open closed", "full empty", "loud quiet")
Exchange = tuple[str, str]


def main() -> None:
    for folder in (TEXT, TOKENIZER, DATA):
        shutil.rmtree(folder, ignore_errors=True)
    TEXT.mkdir(parents=True)
    draw = random.Random(1)
    lines = {conversation(draw): None for _ in range(CONVERSATIONS + HELD_OUT)}
    train, held_out = list(lines)[HELD_OUT:], list(lines)[:HELD_OUT]
    (TEXT / "train.jsonl").write_text("".join(f"{line}\n" for line in train))
    (TEXT / "held-out.jsonl").write_text("".join(f"{line}\n" for line in held_out))
    write_tokenizer(train)
    options = ["--tokenizer", TOKENIZER, "--seq-len", 128, "--document-multiple", 16]
    sources = [TEXT / "train.jsonl", "--validation", TEXT / "held-out.jsonl"]
    command = [COMMAND, "data", "prepare", *sources, "--messages", "--out", DATA, *options]
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True)


def conversation(draw: random.Random) -> str:
    """Return one to three questions and their answers, as a line of JSON."""
    messages = []
    for _ in range(draw.randint(1, 3)):
        question, answer = draw.choice(KINDS)(draw)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages})


def sum_of_two(draw: random.Random) -> Exchange:
    a, b = draw.randint(0, 20), draw.randint(0, 20)
    return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


def next_day(draw: random.Random) -> Exchange:
    day = draw.randrange(7)
    return f"What day comes after {DAYS[day]}?", f"{DAYS[(day + 1) % 7]} comes after {DAYS[day]}."


def opposite(draw: random.Random) -> Exchange:
    one, other = draw.sample(draw.choice(OPPOSITES).split(), 2)
    return f"What is the opposite of {one}?", f"The opposite of {one} is {other}."


def counting(draw: random.Random) -> Exchange:
    first, count = draw.randint(1, 40), draw.randint(2, 6)
    numbers = [str(number) for number in range(first, first + count)]
    return f"Count from {first} to {numbers[-1]}.", f"{', '.join(numbers)}."


KINDS: tuple[Callable[[random.Random], Exchange], ...] = (sum_of_two, next_day, opposite, counting)


def write_tokenizer(lines: list[str]) -> None:
    """Write a byte-level BPE tokeniser with chat tokens, which splits numbers into digits, and its template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = (message["content"] for line in lines for message in json.loads(line)["messages"])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([START, END])
    TOKENIZER.mkdir()
    tokenizer.save(str(TOKENIZER / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    (TOKENIZER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (TOKENIZER / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    main()
