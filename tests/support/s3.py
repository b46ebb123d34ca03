"""Run a real S3 server (moto) on this machine, behind a proxy that fails as storage and networks do."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "corpus"
KEY, SECRET = "right", "secret"
# With these headers, a client would detect a cut body before this package does.
_CHECKSUMS = ("x-amz-checksum", "x-amz-sdk-checksum", "etag")


@dataclass
class Store:
    """A store behind the proxy: the fault that the proxy makes, if any, and the requests that it saw.

    The faults are cut: the connection ends without an answer; 503; truncated: half a body, with the length of that half
    in its header; slow: the answer comes after `seconds`; denied: 403.
    """

    url: str
    client: Any
    fault: str | None = None
    times: float = float("inf")  # number of requests with that fault
    only: str = "shard"  # part of their path
    seconds: float = 0.2
    faults: int = 0
    gets: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, fault: str | None, times: float = float("inf"), only: str = "shard") -> None:
        with self.lock:
            self.fault, self.times, self.only = fault, times, only

    def next_fault(self, command: str, path: str) -> str | None:
        with self.lock:
            if self.fault is None or self.only not in path or self.times <= 0:
                return None
            if self.fault == "truncated" and command == "HEAD":
                return None
            self.times -= 1
            self.faults += 1
            return self.fault

    def upload(self, folder: Path, name: str) -> str:
        """Upload a prepared folder, without unpacked files, under `name`; return the remote."""
        for file in folder.rglob("*"):
            if file.is_file() and file.suffix != ".mds":
                self.client.put_object(Bucket=BUCKET, Key=f"{name}/{file.relative_to(folder)}", Body=file.read_bytes())
        return f"s3://{BUCKET}/{name}"

    def upload_copy(self, name: str, other: str) -> str:
        """Copy what lies under `name`; return the remote."""
        for each in self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{name}/")["Contents"]:
            source = {"Bucket": BUCKET, "Key": each["Key"]}
            self.client.copy_object(Bucket=BUCKET, Key=other + each["Key"].removeprefix(name), CopySource=source)
        return f"s3://{BUCKET}/{other}"

    def environment(self) -> dict[str, str]:
        """Return the environment variables of a client."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_MAX_ATTEMPTS": "1",  # botocore's own retries would hide short faults
            "S3_ENDPOINT_URL": self.url,
        }


@contextmanager
def serve() -> Iterator[Store]:
    """Serve an empty bucket, `BUCKET`."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    try:
        deadline = time.monotonic() + 60
        while not _listens(port):
            assert server.poll() is None, "moto did not start"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        store = Store(f"http://127.0.0.1:{proxy.server_port}", client)
        proxy.store, proxy.port = store, port  # type: ignore[attr-defined]
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield store
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.kill()
        server.wait()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        store: Store = self.server.store  # type: ignore[attr-defined]
        fault = store.next_fault(self.command, self.path)
        if fault == "cut":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if f"{KEY}/" not in self.headers.get("Authorization", ""):
            fault = "denied"
        if fault in ("503", "denied"):
            self._answer(503 if fault == "503" else 403, [], b"")
            return
        if fault == "slow":
            time.sleep(store.seconds)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.port)  # type: ignore[attr-defined]
        upstream.request(self.command, self.path, headers=dict(self.headers.items()))
        answer = upstream.getresponse()
        body = answer.read()
        if self.command == "GET" and answer.status == 200:
            with store.lock:
                store.gets[self.path.partition("?")[0]] += 1
        headers = [(name, value) for name, value in answer.getheaders() if not name.lower().startswith(_CHECKSUMS)]
        if fault == "truncated":
            body = body[: len(body) // 2]
        self._answer(answer.status, headers, body)
        upstream.close()

    do_HEAD = do_GET

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
