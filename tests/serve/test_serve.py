"""Check a server as its clients see it: OpenAI's client, and sockets for what that client would not send."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

import bd3_scale
from bd3_scale.cli import app
from bd3_scale.convert.gguf import plan_gguf, write_gguf
from tests.convert.models import BYTES, QWEN_SHAPE, native_checkpoint
from tests.serve.servers import Server, served

RULES = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "unmasking": "static", "steps": 2},
    {"temperature": 1.3, "top_k": 20, "unmasking": "ancestral", "steps": 3},
    {"temperature": 0.0, "unmasking": "dynamic", "threshold": 0.3},
    {"temperature": 1.0, "unmasking": "entropy", "threshold": 2.0},
)
# Prompts shorter than a block, of many blocks, and so long that the window slides.
PROMPTS = ("", "Once upon", "x" * 41, "def main():\n" * 9, "An é, 日本 and more. " * 9)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
NAME = "native"


@pytest.fixture(scope="module")
def server(chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(chat_checkpoint, "--name", NAME, folder=tmp_path_factory.mktemp("serve")) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def written(chat_checkpoint: Path):
    """Return the same model's `generate` in this process."""
    return bd3_scale.load(chat_checkpoint).generate


def asked(rule: dict) -> dict:
    """Return OpenAI's own options, and ours as OpenAI's client sends them."""
    own = ("temperature", "top_p", "seed", "stop", "n")
    ours = {key: value for key, value in rule.items() if key not in own}
    return {**{key: value for key, value in rule.items() if key in own}, "extra_body": ours}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_completions_are_what_generate_writes(client: openai.OpenAI, written, rule: dict) -> None:
    for seed, prompt in enumerate(PROMPTS):
        how = {"max_tokens": 30, "seed": seed}
        answer = client.completions.create(model=NAME, prompt=prompt, **how, **asked(rule))
        expected = written(prompt, max_new_tokens=30, seed=seed, **rule)
        assert answer.choices[0].text == expected.text
        assert answer.choices[0].finish_reason == {"length": "length"}.get(expected.stopped_by, "stop")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(expected.tokens)
        assert answer.usage.model_extra == {"denoising_passes": expected.nfe}


def test_a_stream_is_the_text_block_by_block(client: openai.OpenAI, written) -> None:
    how = {"model": NAME, "prompt": "An é, 日本", "max_tokens": 40, "seed": 3, "stop": ["\ufffd\ufffd", "zz"]}
    stream = client.completions.create(**how, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    expected = written("An é, 日本", max_new_tokens=40, seed=3, stop=["\ufffd\ufffd", "zz"])
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    blocks = -(-(len("An é, 日本".encode()) % 4 + len(expected.tokens)) // 4)
    assert blocks - 1 <= len(chunks) <= blocks + 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason is not None
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(expected.tokens)


def test_a_conversation_goes_through_the_template(client: openai.OpenAI, written) -> None:
    expected = written(MESSAGES, max_new_tokens=24, seed=1)
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=24, seed=1)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}]
    chunks = list(
        client.chat.completions.create(model=NAME, messages=[*parts, MESSAGES[1]], max_tokens=24, seed=1, stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", *[None] * (len(chunks) - 1)]
    # Without a limit, the text is as long as the context allows.
    open_end = client.chat.completions.create(model=NAME, messages=MESSAGES, seed=1)
    assert open_end.choices[0].message.content.startswith(expected.text[:8])


def test_many_at_once_are_what_they_are_alone(server: Server, written) -> None:
    """Check thirty texts in eight slots, of all rules together."""

    async def all_of_them() -> list:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as several:
            calls = [
                several.completions.create(model=NAME, prompt=prompt, max_tokens=20 + place, seed=place, **asked(rule))
                for place, (prompt, rule) in enumerate((p, r) for p in PROMPTS for r in RULES)
            ]
            return await asyncio.gather(*calls)

    found = [answer.choices[0].text for answer in asyncio.run(all_of_them())]
    expected = [
        written(prompt, max_new_tokens=20 + place, seed=place, **rule).text
        for place, (prompt, rule) in enumerate((p, r) for p in PROMPTS for r in RULES)
    ]
    assert found == expected
    server.wait_for("active_texts", 0)
    assert server.meter("waiting_texts") == 0


def test_choices_prompts_and_ids(client: openai.OpenAI, written) -> None:
    """Check that text i, counted over all prompts and choices, has the seed + i, as in `generate`."""
    answer = client.completions.create(model=NAME, prompt=["ab", "cd"], n=2, max_tokens=9, seed=5)
    expected = [written(p, max_new_tokens=9, seed=5 + i).text for i, p in enumerate(("ab", "ab", "cd", "cd"))]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    ids = client.completions.create(model=NAME, prompt=[list(b"ab"), list(b"cd")], max_tokens=9, seed=5)
    assert ids.choices[0].text == expected[0]
    seeds = {client.completions.create(model=NAME, prompt="a", max_tokens=12).choices[0].text for _ in range(3)}
    assert len(seeds) > 1  # another seed each time, which the answer states


def test_likelihoods(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="ab", max_tokens=9, seed=5, logprobs=3)
    found = answer.choices[0].logprobs
    assert found is not None
    assert "".join(found.tokens) == answer.choices[0].text or "\ufffd" in answer.choices[0].text
    assert all(value < 0 for value in found.token_logprobs)
    assert {len(each) for each in found.top_logprobs} <= {2, 3}  # two tokens may have one text
    greedy = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=8, seed=5, temperature=0, logprobs=True, top_logprobs=1
    )
    content = greedy.choices[0].logprobs.content
    assert len(content) == 8
    assert all(each.logprob == each.top_logprobs[0].logprob for each in content)


def test_a_gap_before_a_suffix(client: openai.OpenAI, written) -> None:
    """Check three tokens after the prompt; the last one's block ends with the suffix's first token, which it sees."""
    found = client.completions.create(model=NAME, prompt="abcd", suffix="efgh", max_tokens=3, seed=2)
    whole = written("abcd[MASK][MASK][MASK]efgh", infill=True, max_new_tokens=0, seed=2).text
    assert whole.startswith("abcd")
    assert whole.endswith("efgh")
    assert found.choices[0].text == whole[4:-4].partition("<|endoftext|>")[0]
    assert (found.choices[0].finish_reason, found.usage.prompt_tokens) == ("length", 4)


REFUSED = {
    "frequency_penalty": ({"frequency_penalty": 0.5}, "frequency_penalty is not supported here"),
    "unknown": ({"extra_body": {"beams": 3}}, "beams is unknown here"),
    "echo": ({"echo": True}, "echo is not supported here"),
    "best_of": ({"best_of": 3}, "best_of is not supported here"),
    "temperature": ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
    "top_p": ({"top_p": 0}, "top_p: Input should be greater than 0"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    "too many": ({"max_tokens": 5000}, "a text may have 2,048 new tokens"),
    "too long": ({"prompt": "x" * 9000}, "a prompt has 9,000 tokens, and 8,192 are allowed"),
    "rule": ({"extra_body": {"unmasking": "magic"}}, "no unmasking rule is called 'magic'"),
    "steps": ({"extra_body": {"unmasking": "static", "steps": 9}}, "steps is 9: give 1 to 4"),
    "threshold": ({"extra_body": {"threshold": 0.9}}, "threshold=0.9 is an option of dynamic and entropy unmasking"),
    "block_size": ({"extra_body": {"block_size": 8}}, "native has blocks of 4"),
    "stop": ({"stop": ["a"] * 17}, "stop: give up to 16 strings"),
    "empty stop": ({"stop": ""}, "stop: give up to 16 strings"),
    "suffix and stop": ({"suffix": "b", "stop": "c"}, "stop and suffix exclude each other"),
    "mask": ({"prompt": [97, 257]}, "ids [257] that are no tokens"),
    "ids": ({"prompt": [97, 999]}, "ids [999] that are no tokens"),
    "usage": ({"stream_options": {"include_usage": True}}, "stream_options needs stream=true"),
    "model": ({"model": "gpt-4"}, "there is no model 'gpt-4'"),
    "no prompt": ({"prompt": []}, "there is no prompt"),
    "n": ({"n": 1000}, "n: Input should be less than or equal to 128"),
    "texts": ({"prompt": [""] * 90, "n": 128}, "11,520 texts are requested, and a request may have 128"),
    "all at once": ({"prompt": [""] * 90}, "90 texts are requested, and this server takes 72 at once"),
    "little warmth": ({"temperature": 5e-324}, "temperature is 5e-324: give 0 (most likely token), or 1e-06"),
    "many steps": ({"extra_body": {"unmasking": "ancestral", "steps": 10**9}}, "steps: Input should be less than"),
    "a wide gap": ({"suffix": "b", "max_tokens": 10**15}, "a text may have 2,048 new tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_done_is_refused_by_name(client: openai.OpenAI, case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(**{"model": NAME, "prompt": "a", "max_tokens": 4, **changes})
    assert raised.value.status_code == (404 if case == "model" else 400)
    assert words in raised.value.body["message"]


def test_what_says_nothing_passes(client: openai.OpenAI) -> None:
    client.completions.create(
        model=NAME, prompt="a", max_tokens=4, frequency_penalty=0, presence_penalty=0, echo=False, best_of=1,
        logit_bias={}, user="me", extra_body={"block_size": 4},
    )  # fmt: skip
    client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=4, response_format={"type": "text"}, tools=[], store=False
    )


def raw(server: Server, request: bytes) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        connection.settimeout(20)
        found = b""
        while part := connection.recv(65536):
            found += part
        return found


def posted(body: bytes, *headers: bytes, length: int | None = None) -> bytes:
    head = [b"POST /v1/completions HTTP/1.1", b"Host: localhost", b"Connection: close", *headers]
    if length != -1:
        head.append(b"Content-Length: %d" % (len(body) if length is None else length))
    if not any(h.startswith(b"Content-Type") for h in headers):
        head.append(b"Content-Type: application/json")
    return b"\r\n".join(head) + b"\r\n\r\n" + body


ODD = {
    "no JSON": (posted(b"{"), b"400", b"the body is not JSON"),
    "a list": (posted(b"[1]"), b"400", b"valid dict"),
    "nothing": (posted(b""), b"400", b"Field required"),
    "a number": (posted(b'{"model": "native", "prompt": 3}'), b"400", b"prompt"),
    "deep": (posted(b"[" * 100_000), b"400", b"message"),
    "not a number": (posted(b'{"model":"native","prompt":"a","temperature":NaN}'), b"400", b"temperature"),
    "half a character": (posted(b'{"model":"native","prompt":"\xff"}'), b"400", b"message"),
    "a lone surrogate": (posted(b'{"model":"native","prompt":"\\ud800","max_tokens":2}'), b"400", b"message"),
    "large": (posted(b" " * 400_000), b"413", b"larger than 327,680 bytes"),
    "form": (posted(b"a=1", b"Content-Type: application/x-www-form-urlencoded"), b"415", b"must be JSON"),
    "another name": (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", b"403", b"evil"),
    "no such path": (b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404", b"there is no /v2"),
    "method": (b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"405", b"GET"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_requests_are_answered_in_openai_s_form(server: Server, case: str) -> None:
    request, status, words = ODD[case]
    found = raw(server, request)
    assert found.split(b" ", 2)[1] == status, found
    assert words in found
    assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert json.loads(server.get("/health")) == {"status": "ok"}


def test_a_deep_body_is_read_or_refused_at_every_depth(server: Server) -> None:
    """Check depths around the limits: one part of the server can still parse what the next one cannot."""
    for depth in range(900, 1000, 3):
        body = b'{"model":"native","prompt":"a","max_tokens":1,"user":' + b"[" * depth + b"]" * depth + b"}"
        assert raw(server, posted(body)).split(b" ", 2)[1] in (b"200", b"400"), depth


def test_a_large_body_in_parts_is_cut_off(server: Server) -> None:
    chunk = b"%x\r\n%s\r\n" % (100_000, b" " * 100_000)
    found = raw(server, posted(b"", b"Transfer-Encoding: chunked", length=-1) + chunk * 4 + b"0\r\n\r\n")
    assert b" 413 " in found.partition(b"\r\n")[0]


def test_a_client_that_leaves_frees_its_place(server: Server, client: openai.OpenAI) -> None:
    for stream in (True, False):
        body = {"model": NAME, "prompt": "a", "max_tokens": 2000, "n": 60, "stream": stream}
        request = posted(json.dumps(body).encode())
        host, port = server.url.removeprefix("http://").split(":")
        before = server.meter("generated_tokens_total")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request)
            while server.meter("active_texts") == 0:
                time.sleep(0.02)
        server.wait_for("active_texts", 0, 10)
        assert server.meter("waiting_texts") == 0
        assert server.meter("generated_tokens_total") - before < 60 * 2000
    assert client.completions.create(model=NAME, prompt="a", max_tokens=4).choices


def test_models_and_meters(server: Server, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.model_extra["block_size"], model.model_extra["context_length"]) == (NAME, 4, 128)
    assert client.models.retrieve(NAME).model_extra["has_chat"] is True
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("made-up")
    meters = server.get("/metrics")
    assert "made-up" not in meters  # made-up names must not fill the memory
    assert 'bd3_scale_requests_total{path="/v1/completions",status="200"}' in meters
    assert "bd3_scale_first_block_seconds_count" in meters
    assert server.meter("denoising_passes_total") > server.meter("forwards_total") > 0


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same model for llama.cpp, without the template."""
    folder = tmp_path_factory.mktemp("file")
    checkpoint = native_checkpoint(folder / "native", QWEN_SHAPE, BYTES)
    write_gguf(plan_gguf(checkpoint, "f32", importance=False), folder / "native-f32.bd3.gguf")
    return folder / "native-f32.bd3.gguf"


def test_llama_cpp_writes_the_same_behind_a_key_and_a_short_queue(file: Path, written, tmp_path: Path) -> None:
    options = ("--batch-size", "3", "--queue", "2", "--max-seconds", "1", "--name", NAME)
    with served(file, *options, folder=tmp_path, BD3_SCALE_API_KEY="secret") as server:
        stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="guess", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=60)
        texts: dict[int, str] = {}

        def ask(place: int, rule: dict) -> None:
            how = {"prompt": PROMPTS[2 + place % 3], "max_tokens": 24, "seed": place}
            texts[place] = client.completions.create(model=NAME, **how, **asked(rule)).choices[0].text

        for start in (0, 3):
            threads = [threading.Thread(target=ask, args=(p, RULES[p])) for p in range(start, start + 3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        for place, rule in enumerate(RULES):
            expected = written(PROMPTS[2 + place % 3], max_new_tokens=24, seed=place, **rule)
            assert texts[place] == expected.text
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            client.chat.completions.create(model=NAME, messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="6 texts are requested, and this server takes 5 at once"):
            client.completions.create(model=NAME, prompt="a", n=6, max_tokens=4)
        long = {"prompt": "a" * 4000, "n": 5, "max_tokens": 2000, "suffix": "b"}  # no EOS ends a gap
        stream = client.completions.create(model=NAME, **long, stream=True)
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(model=NAME, prompt="a", max_tokens=4)
        assert int(raised.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.APIError, match="takes longer than 1 s"):
            list(stream)
        assert client.completions.create(model=NAME, prompt="a", max_tokens=4).choices
        with pytest.raises(openai.InternalServerError, match="takes longer than 1 s"):
            client.completions.create(model=NAME, **long)
        bare = (
            b"Authorization: bearer secret",
            b"Authorization: secret",
            b"Authorization: Bearer s\xc3\xa9cret",
            b"X: y",
        )
        codes = [raw(server, posted(b"{}", header)).split(b" ", 2)[1] for header in bare]
        assert codes == [b"400", b"401", b"401", b"401"]  # the first one is authorised, but its body is invalid
        assert client.completions.create(model=NAME, prompt="a", max_tokens=4).choices


def test_sigterm_lets_answers_end(chat_checkpoint: Path, tmp_path: Path) -> None:
    with served(chat_checkpoint, "--name", NAME, folder=tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
        stream = client.completions.create(model=NAME, prompt="a" * 100, max_tokens=1500, n=8, seed=1, stream=True)
        chunks = [next(iter(stream))]
        server.process.terminate()
        chunks += list(stream)
        assert sum(chunk.choices[0].finish_reason is not None for chunk in chunks) == 8
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), "no key is set: set BD3_SCALE_API_KEY"),
        (("--unmasking", "static", "--steps", "9"), "steps is 9: give 1 to 4"),
    ],
)
def test_a_server_that_cannot_be_says_why(chat_checkpoint: Path, options: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(app, ["serve", str(chat_checkpoint), "--port", "0", *options])
    assert isinstance(done.exception, ValueError)
    assert words in str(done.exception)


def test_a_port_that_is_taken_is_told_before_the_model_is_opened(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", str(taken.getsockname()[1])])
    assert isinstance(done.exception, OSError)
    assert "cannot listen on port" in str(done.exception)


@pytest.mark.parametrize("key", ["a b", "a\nb", "schlüssel"])
def test_a_key_that_no_header_can_bear_is_refused_at_once(tmp_path: Path, key: str) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path)], env={"BD3_SCALE_API_KEY": key})
    assert isinstance(done.exception, ValueError)
    assert "BD3_SCALE_API_KEY cannot be sent in an HTTP header" in str(done.exception)
