"""A bucket with faults: a real S3 server in a process of its own, and a proxy in front of it that injects errors.

This module does not use logitstore. Tests and benchmarks pass `s3_options(proxy.url)` to the code under test.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Sequence

HOST = "127.0.0.1"
KINDS = ("error_500", "slow_down_503", "reset_before", "reset_in_body", "slow_body", "lost_response")
SLOW_BODY_S = 0.3
BUFFER_BYTES = 2**20
UPSTREAM_CONNECTIONS = 64  # the S3 server queues 128: with more at once, some would wait a second for a TCP retry
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of 0 seconds: the peer sees a reset, not an orderly end


def s3_options(url: str) -> dict[str, str]:
    """Returns the fsspec options for an S3 server, or a proxy, at a URL."""
    return {"key": "k", "secret": "hunter2", "endpoint_url": url}


class S3Server(AbstractContextManager):
    """A real, empty S3 server in a process that ends with this one. Its `url` is a free port of loopback."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True)
        port = self._process.stdout.readline().strip()  # printed once it listens
        if not port:
            self.stop()
            raise RuntimeError("moto must be installed with its server, got none that starts; pip install moto[server]")
        self.url = f"http://{HOST}:{port}"

    def make_bucket(self, name: str) -> None:
        self._send("PUT", f"/{name}")

    def reset(self) -> None:
        """Deletes all buckets and their objects."""
        self._send("POST", "/moto-api/reset")

    def stop(self) -> None:
        """Ends the process. The objects were in its memory and are lost."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _send(self, method: str, path: str) -> None:
        request = urllib.request.Request(self.url + path, method=method, data=b"")
        urllib.request.urlopen(request, timeout=60).close()

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve_s3() -> None:
    """Prints the port, and serves S3 until stdin ends. Stdin ends with the parent process, even if that is killed."""
    from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    backend, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ, start_response):
        # moto checks for an object and then writes it, so two clients could both create the same one; S3 lets only one
        # succeed. The body is read before the lock is taken: a client stopped half-way must not block the others.
        stream, size = environ["wsgi.input"], int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"] = BytesIO(stream.read() if environ.get("wsgi.input_terminated") else stream.read(size))
        with lock:
            return backend(environ, start_response)

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = make_server(HOST, 0, one_at_a_time, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)  # noqa: T201
    sys.stdin.read()


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """An HTTP/1.1 request or response. Header names are in lower case; the body is raw, including chunk headers."""

    start: str
    headers: dict[str, str]
    body: bytes = b""

    def head(self) -> bytes:
        """Returns the bytes before the body."""
        lines = [self.start, *(f"{name}: {value}" for name, value in self.headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def operation(self) -> str:
        """Returns the S3 operation of a request: LIST, COPY or DELETE_MANY, otherwise its HTTP method."""
        method, target, _ = self.start.split(" ")
        query = "&" + target.partition("?")[2]
        if method == "GET" and "&list-type=" in query:
            return "LIST"
        if method == "PUT" and "x-amz-copy-source" in self.headers:
            return "COPY"
        return "DELETE_MANY" if method == "POST" and "&delete" in query else method


async def read_head(reader: asyncio.StreamReader) -> Message:
    """Reads a message up to its body. Raises EOFError if the other side has closed the connection."""
    start, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return Message(start=start, headers={name.lower(): value.strip() for name, _, value in pairs})


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes | None:
    """Reads a body by its framing. Returns None if no header gives its length."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers["content-length"])) if "content-length" in headers else None
    parts, size = [], -1
    while size:
        parts.append(await reader.readuntil(b"\r\n"))
        size = int(parts[-1].split(b";")[0], 16)
        parts.append(await reader.readexactly(size + 2) if size else b"")
    while parts[-1] != b"\r\n":  # trailers end with an empty line
        parts.append(await reader.readuntil(b"\r\n"))
    return b"".join(parts)


def s3_error(status: int, code: str) -> Message:
    """Returns the response with which S3 refuses a request."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>injected</Message></Error>'
    headers = {"content-type": "application/xml", "content-length": str(len(body))}
    return Message(start=f"HTTP/1.1 {status} {code}", headers=headers, body=body.encode())


ERRORS = {"error_500": s3_error(500, "InternalError"), "slow_down_503": s3_error(503, "SlowDown")}


class FaultyProxy(AbstractContextManager):
    """A proxy, in a thread of its own, that forwards requests unchanged and makes some of them fail.

    - `error_500`, `slow_down_503`: answers with that S3 error and does not forward
    - `reset_before`: resets the connection and does not forward
    - `lost_response`: forwards, then resets the connection: the request succeeds but its response is lost
    - `reset_in_body`: forwards, then sends half of the body, or half of the headers if there is no body
    - `slow_body`: forwards, and sends the response in pieces over `SLOW_BODY_S`

    Attributes:
        url: The address where the proxy listens.
        requests: Number of requests received.
        counts: Number of requests by operation: GET, HEAD, PUT, POST, DELETE, LIST, COPY, DELETE_MANY.
        faults: Number of injected faults by kind.
    """

    def __init__(self, upstream_url: str, seed: int = 0, rate: float = 0.0, kinds: Sequence[str] = KINDS) -> None:
        self.requests = 0
        self.counts: Counter[str] = Counter()
        self.faults = dict.fromkeys(KINDS, 0)
        self._upstream = urlsplit(upstream_url).netloc.split(":")
        self._random = random.Random(seed)
        self._refusal: Message | None = None
        self._forced: list[tuple[str, str, str]] = []
        self.set(rate=rate, kinds=kinds)
        listener = socket.create_server((HOST, 0), backlog=1024)
        self.url = f"http://{HOST}:{listener.getsockname()[1]}"
        self._loop, self._stopping = asyncio.new_event_loop(), asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(UPSTREAM_CONNECTIONS)
        served = (self._serve(listener),)
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=served, daemon=True)
        self._thread.start()

    def set(self, *, rate: float | None = None, kinds: Sequence[str] | None = None) -> None:
        """Changes the probability that a request fails, or the kinds of faults to draw from. None: no change."""
        self._rate = self._rate if rate is None else rate
        self._kinds = self._kinds if kinds is None else tuple(kinds)

    def force(self, kind: str, *, operation: str, path: str = "", times: int = 1) -> None:
        """Makes the next `times` requests of an operation whose paths contain `path` fail in one way."""
        self._forced.extend([(kind, operation, path)] * times)

    def refuse(self, status: int = 403, code: str = "AccessDenied") -> None:
        """Answers every request with one S3 error until `allow` is called."""
        self._refusal = s3_error(status, code)

    def allow(self) -> None:
        self._refusal = None

    @property
    def busy(self) -> bool:
        """Whether a client is connected, or the request of a client that has left may still be carried out."""
        return bool(self._connections)

    def stop(self) -> None:
        """Cuts all connections and ends the thread."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._loop.close()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _serve(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._connected, sock=listener, limit=BUFFER_BYTES, backlog=1024)
        await self._stopping.wait()
        self._loop.remove_reader(listener)
        await asyncio.sleep(0.01)  # the last accepted connections become tasks; a closed server could not start them
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections)
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._connections.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
            writer.close()
            await writer.wait_closed()
        except (OSError, EOFError, asyncio.CancelledError):  # the client or the server is gone, or `stop`
            writer.transport.abort()
        finally:
            self._connections.discard(task)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Receives one request and answers it, or injects a fault. Returns whether the connection stays open."""
        request = await read_head(reader)
        if request.headers.get("expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request = replace(request, body=await read_body(reader, request.headers) or b"")
        fault = self._count(request)
        response = self._refusal or ERRORS.get(fault)
        if response is None and fault != "reset_before":
            response = await self._forward(request)
        if response is None or fault == "lost_response":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            writer.transport.abort()
            return False
        head, body = response.head(), b"" if request.start.startswith("HEAD ") else response.body
        if fault == "reset_in_body":
            writer.write(head + body[: len(body) // 2] if body else head[: len(head) // 2])
            return False
        whole, sent = head + body, 0
        for _ in range(5 if fault == "slow_body" else 0):
            writer.write(whole[sent : sent + len(whole) // 6])
            sent += len(whole) // 6
            await asyncio.sleep(SLOW_BODY_S / 5)
        writer.write(whole[sent:])
        await writer.drain()
        return request.headers.get("connection") != "close"

    def _count(self, request: Message) -> str | None:
        """Counts a request, and returns the fault to inject; None for no fault."""
        operation, path = request.operation(), unquote(request.start.split(" ")[1])
        self.requests += 1
        self.counts[operation] += 1
        if self._refusal is not None:
            return None
        forced = next((one for one in self._forced if one[1] == operation and one[2] in path), None)
        if forced is None and self._random.random() >= self._rate:
            return None
        if forced is not None:
            self._forced.remove(forced)
        fault = forced[0] if forced else self._random.choice(self._kinds)
        self.faults[fault] += 1
        return fault

    async def _forward(self, request: Message) -> Message:
        """Sends a request to the server over a new connection, and returns the whole response."""
        headers = request.headers | {"connection": "close"}
        headers.pop("expect", None)  # answered already
        async with self._room:
            reader, writer = await asyncio.open_connection(*self._upstream, limit=BUFFER_BYTES)
            try:
                writer.write(replace(request, headers=headers).head() + request.body)
                response = await read_head(reader)
                response.headers.pop("connection", None)  # the client's connection stays open
                if request.start.startswith("HEAD ") or response.start.split(" ")[1] in ("204", "304"):
                    return response
                body = await read_body(reader, response.headers)
                if body is None:  # without a length, the body ends with the connection
                    body = await reader.read()
                    response.headers["content-length"] = str(len(body))
                return replace(response, body=body)
            finally:
                writer.transport.abort()


if __name__ == "__main__":
    serve_s3()
