"""Check many clients over a while, clients of other programs, and ranks that share a model."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

import bd3_scale
from tests.serve.servers import served

NAME = "native"


def resident(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


@pytest.mark.slow
def test_a_minute_of_32_clients_loses_nothing_and_memory_stays(chat_checkpoint: Path, tmp_path: Path) -> None:
    """Check texts of many lengths, streamed and whole; each client gets what its seed gives alone."""
    with served(chat_checkpoint, "--name", NAME, folder=tmp_path) as server:
        asked, answers, errors, memory = [0] * 32, [], [], []
        stop = time.monotonic() + 60

        def run(number: int) -> None:
            rng = random.Random(number)
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
            while time.monotonic() < stop:
                how = {"prompt": "ab" * rng.randrange(40), "max_tokens": rng.randint(1, 80), "seed": rng.randrange(9)}
                asked[number] += 1
                try:
                    if rng.random() < 0.5:
                        parts = client.completions.create(model=NAME, **how, stream=True)
                        text = "".join(part.choices[0].text for part in parts)
                    else:
                        text = client.completions.create(model=NAME, **how).choices[0].text
                    answers.append((how, text))
                except openai.OpenAIError as error:
                    errors.append(repr(error))

        threads = [threading.Thread(target=run, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            memory.append(resident(server.process.pid))
        assert errors == []
        assert len(answers) == sum(asked) > 100
        assert (server.meter("active_texts"), server.meter("waiting_texts")) == (0, 0)
    # From the time when all caches have been written once.
    assert max(memory[20:]) - min(memory[20:]) < 25, memory
    written = bd3_scale.load(chat_checkpoint).generate
    for how, text in random.Random(0).sample(answers, 60):
        assert written(how["prompt"], max_new_tokens=how["max_tokens"], seed=how["seed"]).text == text


@pytest.mark.slow
def test_answers_come_in_the_order_of_asking(chat_checkpoint: Path, tmp_path: Path) -> None:
    with served(chat_checkpoint, "--name", NAME, "--batch-size", "1", folder=tmp_path) as server:
        ended: list[int] = []

        def run(number: int) -> None:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
            client.completions.create(model=NAME, prompt="ab", max_tokens=60, seed=number)
            ended.append(number)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
            time.sleep(0.15)  # so that they are requested in this order
        for thread in threads:
            thread.join(60)
    assert ended == list(range(12))


@pytest.mark.slow
def test_a_long_prompt_lets_others_go_on(chat_checkpoint: Path, tmp_path: Path) -> None:
    """Check a prompt of two thousand blocks: a text that is being denoised finishes blocks all the while."""
    options = ("--name", NAME, "--max-prompt-tokens", "20000", "--cache-tokens", "16384")
    with served(chat_checkpoint, *options, folder=tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        reading = threading.Thread(
            target=lambda: client.completions.create(model=NAME, prompt="x" * 8000, n=20, max_tokens=4)
        )
        stream = client.completions.create(model=NAME, prompt="ab", max_tokens=400, n=4, seed=1, stream=True)
        gaps, before = [], time.monotonic()
        for place, _ in enumerate(stream):
            if place == 3:
                reading.start()
            gaps.append(time.monotonic() - before)
            before = time.monotonic()
        reading.join(60)
    assert len(gaps) > 20
    assert max(gaps) < 2


@pytest.mark.slow
def test_the_harness_s_client_gets_what_generate_writes(chat_checkpoint: Path, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    prompts = [f"Question {number}:" for number in range(8)]
    until = {"until": ["\n", "zz"], "max_gen_toks": 24, "temperature": 0.0}
    with served(chat_checkpoint, "--name", NAME, folder=tmp_path) as server:
        model = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions", model=NAME, tokenizer_backend=None, tokenized_requests=False,
            num_concurrent=4, max_retries=1, seed=7,
        )  # fmt: skip
        requests = [Instance("generate_until", {}, (prompt, until), i) for i, prompt in enumerate(prompts)]
        found = model.generate_until(requests)
    written = bd3_scale.load(chat_checkpoint).generate
    how = {"max_new_tokens": 24, "temperature": 0.0, "stop": ["\n", "zz"], "seed": 7}
    assert found == [written(prompt, **how).text for prompt in prompts]


@pytest.mark.slow
def test_curl_gets_a_stream(chat_checkpoint: Path, tmp_path: Path) -> None:
    with served(chat_checkpoint, "--name", NAME, folder=tmp_path) as server:
        body = {"model": NAME, "prompt": "ab", "max_tokens": 12, "seed": 1, "stream": True}
        command = ["curl", "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d"]
        told = subprocess.run([*command, json.dumps(body)], capture_output=True, text=True, timeout=60, check=True)
    events = told.stdout.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    text = "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-1])
    assert text == bd3_scale.load(chat_checkpoint).generate("ab", max_new_tokens=12, seed=1).text


@pytest.mark.slow
def test_two_ranks_serve_what_one_writes(chat_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29712"]
    command += ["--no-python", str(Path(sys.executable).with_name("bd3-scale")), "serve"]
    with served(chat_checkpoint, "--name", NAME, folder=tmp_path, command=command) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        answers = client.completions.create(model=NAME, prompt=["ab", "x" * 60, ""], n=4, max_tokens=20, seed=3)
        time.sleep(12)  # idle ranks also communicate now and then
        again = client.completions.create(model=NAME, prompt="ab", max_tokens=20, seed=3)
    written = bd3_scale.load(chat_checkpoint).generate
    prompts = [prompt for prompt in ("ab", "x" * 60, "") for _ in range(4)]
    expected = [written(p, max_new_tokens=20, seed=3 + i).text for i, p in enumerate(prompts)]
    assert [choice.text for choice in answers.choices] == expected
    assert again.choices[0].text == expected[0]
