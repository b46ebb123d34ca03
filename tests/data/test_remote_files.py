"""Test source files through fsspec: from memory, a folder, a local server, and by S3's protocol (slow)."""

from __future__ import annotations

import http.server
import json
import logging
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from typer.testing import CliRunner

from bd3_scale import cli
from bd3_scale.data.files import find_files
from bd3_scale.data.sources import DocumentReader
from bd3_scale.registry import source_cuts
from tests.data.documents import random_texts

TEXTS = [text for text in random_texts(300) if text.strip()]


def fill(write: Any) -> None:
    """Write a corpus of every format; `write` gets the path below a folder and the content."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:100]).encode()
    parquet, arrow = pa.BufferOutputStream(), pa.BufferOutputStream()
    pq.write_table(pa.table({"text": TEXTS[100:150]}), parquet, row_group_size=20)
    table = pa.table({"text": TEXTS[150:200]})
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table, 20)
    write("b.jsonl.zst", zstandard.compress(lines))
    write("a/c.jsonl", lines)
    write("c.parquet", parquet.getvalue().to_pybytes())
    write("set/data-00000-of-00001.arrow", arrow.getvalue().to_pybytes())
    write("set/cache-1.arrow", arrow.getvalue().to_pybytes())
    write("set/state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}).encode())
    write("z.json", json.dumps([{"text": text} for text in TEXTS[200:]]).encode())
    write(".hidden/x.txt", b"hidden")
    write("other.py", b"no text")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    def write(name: str, data: bytes) -> None:
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_bytes(data)

    fill(write)
    return tmp_path / "corpus"


@pytest.fixture
def memory() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fill(lambda name, data: fs.pipe(f"/corpus/{name}", data))
    yield "memory://corpus"
    fs.rm("/corpus", recursive=True)


def test_a_remote_folder_is_read_as_a_local_one(corpus: Path, memory: str, caplog: pytest.LogCaptureFixture) -> None:
    for url in (memory, f"file://{corpus}"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            local = DocumentReader([corpus])
            told = [message.replace(str(corpus), url) for message in caplog.messages]
            caplog.clear()
            remote = DocumentReader([url])
        assert set(caplog.messages) == {message.replace(" (.hidden)", " (.hidden/x.txt)") for message in told}
        assert [str(file).replace(url, str(corpus)) for file in remote.files] == [str(file) for file in local.files]
        assert remote.num_bytes == local.num_bytes
        documents = list(remote)
        assert documents == list(local)
        assert len(documents) == len(TEXTS) + 100
        assert list(pickle.loads(pickle.dumps(remote)))[-1] == documents[-1]


def test_one_file_parts_and_errors_name_the_url(memory: str) -> None:
    assert [d.text for d in DocumentReader([f"{memory}/c.parquet"])] == TEXTS[100:150]
    for name in ("c.parquet", "a/c.jsonl", "set/data-00000-of-00001.arrow"):
        (file,) = find_files([f"{memory}/{name}"])
        parts = list(source_cuts.get(f".{name.rpartition('.')[2]}")(file, 1000))
        assert len(parts) > 2
        assert parts[0][0][0] == 0
    fsspec.filesystem("memory").pipe("/corpus/d.jsonl", b'{"text": "a"}\nnull\n')
    with pytest.raises(ValueError, match=rf"{memory}/d\.jsonl:2 holds null"):
        list(DocumentReader([f"{memory}/d.jsonl"]))
    for source, kind, message in (
        (f"{memory}/other.py", ValueError, r"other\.py is not a kind of file that can be read here"),
        ("memory://nothing", FileNotFoundError, "memory://nothing does not exist"),
        ("nosuch://corpus", ValueError, "nosuch://corpus cannot be read .*: give a path, or a URL that fsspec knows"),
    ):
        with pytest.raises(kind, match=message) as error:
            find_files([source])
        assert "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        ValueError, match=r"s3://bucket/x needs another package .*pip install 'bd3_scale\[s3\]'"
    ) as error:
        find_files(["s3://bucket/x"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (
            RuntimeError("Unable to locate\ncredentials"),
            ConnectionError,
            "cannot be read .*: set them as for any other",
        ),
        (RuntimeError("timed out"), ConnectionError, "cannot be read .*timed out.*: try again later"),
        (PermissionError("Forbidden"), PermissionError, "may not be read .*Forbidden.*: check the credentials"),
        (FileNotFoundError("b"), FileNotFoundError, "does not exist"),
    ],
)
def test_what_storage_says_is_no_damage_of_the_file(
    memory: str, monkeypatch: pytest.MonkeyPatch, fault: Exception, kind: type, message: str
) -> None:
    """Check that with `--on-error skip` a failing storage does not silently make a shorter corpus."""
    from fsspec.implementations.memory import MemoryFile

    def fail(*args: Any) -> None:
        raise fault

    reader = DocumentReader([f"{memory}/c.parquet", f"{memory}/b.jsonl.zst"], on_error="skip")
    monkeypatch.setattr(MemoryFile, "read", fail)
    monkeypatch.setattr(MemoryFile, "readinto", fail, raising=False)
    for number in range(2):
        reader.files = reader.files[number:]
        with pytest.raises(kind, match=message) as error:
            list(reader)
        assert str(reader.files[0]) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_that_ends_before_its_size_is_no_shorter_corpus(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    reader = DocumentReader([f"{memory}/a/c.jsonl"], on_error="skip")
    info = MemoryFileSystem.info
    monkeypatch.setattr(
        MemoryFileSystem, "info", lambda self, path: info(self, path) | {"size": info(self, path)["size"] + 5}
    )
    with pytest.raises(
        ConnectionError, match=rf"{memory}/a/c\.jsonl ends at byte [\d,]+ of [\d,]+: it was replaced or cut"
    ):
        list(reader)


def test_a_server_of_http(corpus: Path) -> None:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(corpus))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert [d.text for d in DocumentReader([f"{url}/a/c.jsonl"])] == TEXTS[:100]
        with pytest.raises(FileNotFoundError, match=f"{url}/gone.jsonl does not exist"):
            DocumentReader([f"{url}/gone.jsonl"])
        server.shutdown()


def test_the_commands_take_urls(tmp_path: Path, memory: str) -> None:
    options = ["--vocab-size", "300", "--out", str(tmp_path / "tokeniser")]
    done = CliRunner().invoke(cli.app, ["data", "tokenizer", memory, *options])
    assert done.exit_code == 0, done.output
    command = ["data", "prepare", memory, "--tokenizer", str(tmp_path / "tokeniser"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, [*command, "--seq-len", "64", "--workers", "1", "--json"])
    assert done.exit_code == 0, done.output
    sources = [source["path"] for source in json.loads(done.stdout)["sources"]]
    assert sources[0] == f"{memory}/a/c.jsonl"
    assert len(sources) == 5


@pytest.mark.slow
def test_s3(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test a server of S3's protocol, read by processes of `data prepare`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    secrets = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    known = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1", "HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-c",
        "from bd3_scale.cli import main; main()",
        "data",
        "prepare",
        "--tokenizer",
        "bytes",
        "--seq-len",
        "64",
    ]
    command += ["--workers", "2", "--json"]

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        other = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        known_to_all = other | known | {"AWS_EC2_METADATA_DISABLED": "true"} | environment
        return subprocess.run([*command, *arguments], env=known_to_all, capture_output=True, text=True, timeout=200)

    try:
        for name, value in (known | secrets).items():
            monkeypatch.setenv(name, value)
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        for _ in range(100):
            try:
                fs.mkdir("corpora")
                break
            except Exception:  # noqa: BLE001 — until the server answers
                time.sleep(0.3)
        fill(lambda name, data: fs.pipe(f"corpora/set/{name}", data))
        made = run("s3://corpora/set", "--out", str(tmp_path / "remote"), **secrets)
        assert made.returncode == 0, made.stderr
        local = run(str(corpus), "--out", str(tmp_path / "local"))
        assert local.returncode == 0, local.stderr
        found, expected = (json.loads(one.stdout) for one in (made, local))
        assert [found[split] for split in ("train", "validation")] == [expected[s] for s in ("train", "validation")]
        assert found["sources"][0]["path"] == "s3://corpora/set/a/c.jsonl"
        for sources, words, environment in (
            ("s3://corpora/gone", "error: s3://corpora/gone does not exist", secrets),
            ("s3://gone/set", "error: s3://gone/set does not exist", secrets),
            ("s3://corpora/set", "redentials.*: set them as for any other", {}),
            (
                "s3://corpora/set",
                "error: s3://corpora/set cannot be read",
                secrets | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            ),
        ):
            done = run(sources, "--out", str(tmp_path / "never"), **environment)
            assert done.returncode == 2
            assert len(done.stderr.splitlines()) == 1
            assert re.search(words, done.stderr), done.stderr
    finally:
        server.terminate()
        server.wait()
