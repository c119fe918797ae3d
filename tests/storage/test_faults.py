"""The faulty bucket that other tests use: each fault as a plain HTTP client sees it, and correct S3 without faults."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import socket
import time
from collections import Counter
from urllib.parse import urlsplit

import fsspec
import pytest

from tests.helpers.faults import KINDS, SLOW_BODY_S, FaultyProxy, S3Server, read_body, s3_options

BODY = bytes(range(256)) * 40
# The server refuses anonymous requests, but does not check signatures.
WHO = "AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
HEADERS = f"Host: x\r\nAuthorization: {WHO}\r\n".encode()


@pytest.fixture(scope="module")
def server():
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(server):
    """The server with an empty bucket named `bucket` that holds /bucket/stored."""
    server.reset()
    server.make_bucket("bucket")
    send(server, "PUT", "/bucket/stored", BODY)
    return server


@pytest.fixture
def proxy(bucket):
    with FaultyProxy(bucket.url, seed=0, rate=0.0) as proxy:
        yield proxy


def connect(to):
    return http.client.HTTPConnection(urlsplit(to.url).netloc, timeout=30)


def send(to, method, path, body=None, connection=None, **headers):
    """Sends one request and returns the status and the body. Opens a new connection unless one is given."""
    used = connection or connect(to)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        used.request(method, path, body, {"Authorization": WHO} | named)
        response = used.getresponse()
        return response.status, response.read()
    finally:
        if connection is None:
            used.close()


def raw(to, request):
    """Sends raw bytes, and returns all bytes received until the connection ends."""
    parts = urlsplit(to.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as client:
        client.sendall(request)
        received = b""
        while part := client.recv(65536):
            received += part
        return received


def exists(server, path):
    return send(server, "HEAD", path)[0] == 200


@pytest.mark.parametrize(("kind", "status", "code"), [
    ("error_500", 500, b"<Code>InternalError</Code>"),
    ("slow_down_503", 503, b"<Code>SlowDown</Code>"),
])  # fmt: skip
def test_injected_error_has_the_form_of_s3_and_is_not_forwarded(bucket, proxy, kind, status, code):
    proxy.force(kind, operation="PUT")
    answered, body = send(proxy, "PUT", "/bucket/new", b"data")
    assert (answered, code in body) == (status, True)
    assert not exists(bucket, "/bucket/new")
    proxy.force(kind, operation="HEAD")
    connection = connect(proxy)
    assert send(proxy, "HEAD", "/bucket/stored", connection=connection) == (status, b"")
    assert send(proxy, "GET", "/bucket/stored", connection=connection) == (200, BODY)
    connection.close()


def test_reset_before_forwards_nothing(bucket, proxy):
    proxy.force("reset_before", operation="PUT")
    with pytest.raises(ConnectionResetError):
        send(proxy, "PUT", "/bucket/new", b"data")
    assert not exists(bucket, "/bucket/new")


def test_lost_response_follows_a_completed_write(bucket, proxy):
    proxy.force("lost_response", operation="PUT")
    with pytest.raises(ConnectionResetError):
        send(proxy, "PUT", "/bucket/new", b"data", If_None_Match="*")
    assert send(bucket, "GET", "/bucket/new") == (200, b"data")
    assert send(proxy, "PUT", "/bucket/new", b"data", If_None_Match="*")[0] == 412


def test_reset_in_body_sends_the_headers_and_half_of_the_body(proxy):
    proxy.force("reset_in_body", operation="GET")
    with pytest.raises(http.client.IncompleteRead) as error:
        send(proxy, "GET", "/bucket/stored")
    assert error.value.partial == BODY[: len(BODY) // 2]


def test_reset_in_body_cuts_the_headers_of_a_response_without_body(bucket, proxy):
    proxy.force("reset_in_body", operation="DELETE")
    received = raw(proxy, b"DELETE /bucket/stored HTTP/1.1\r\n%s\r\n" % HEADERS)
    assert received.startswith(b"HTTP/1.1 204 ")
    assert b"\r\n\r\n" not in received
    assert not exists(bucket, "/bucket/stored")


@pytest.mark.parametrize(("method", "expected"), [("GET", (200, BODY)), ("HEAD", (200, b""))])
def test_slow_body_arrives_late_and_complete(proxy, method, expected):
    proxy.force("slow_body", operation=method)
    started = time.monotonic()
    assert send(proxy, method, "/bucket/stored") == expected
    assert time.monotonic() - started >= SLOW_BODY_S * 0.9


def test_a_refusal_answers_every_request_until_it_is_lifted(proxy):
    proxy.set(rate=1.0)
    proxy.refuse(403, "ExpiredToken")
    for method in ("GET", "PUT"):
        status, body = send(proxy, method, "/bucket/stored", b"data")
        assert (status, b"<Code>ExpiredToken</Code>" in body) == (403, True)
    proxy.set(rate=0.0)
    proxy.allow()
    assert send(proxy, "GET", "/bucket/stored") == (200, BODY)
    assert (proxy.requests, sum(proxy.faults.values())) == (3, 0)


def test_forced_fault_applies_only_to_its_operation_and_path(proxy):
    proxy.force("error_500", operation="GET", path="stored", times=2)
    assert send(proxy, "GET", "/bucket/other")[0] == 404
    assert send(proxy, "HEAD", "/bucket/stored")[0] == 200
    assert [send(proxy, "GET", "/bucket/stored")[0] for _ in range(3)] == [500, 500, 200]


def outcomes(bucket, seed, requests):
    with FaultyProxy(bucket.url, seed, 0.5, kinds=("error_500", "slow_down_503")) as proxy:
        statuses = [send(proxy, "HEAD", "/bucket/stored")[0] for _ in range(requests)]
        counted = Counter({500: proxy.faults["error_500"], 503: proxy.faults["slow_down_503"]})
        assert counted == Counter(status for status in statuses if status != 200)
        assert proxy.requests == proxy.counts["HEAD"] == requests
    return statuses


def test_faults_are_counted_and_repeat_with_the_seed(bucket):
    first = outcomes(bucket, 1, 40)
    assert set(first) == {200, 500, 503}
    assert outcomes(bucket, 1, 40) == first
    assert outcomes(bucket, 2, 40) != first


def test_rate_and_kinds_can_change_while_the_proxy_runs(proxy):
    connection = connect(proxy)
    assert send(proxy, "GET", "/bucket/stored", connection=connection)[0] == 200
    proxy.set(rate=1.0, kinds=("slow_down_503",))
    assert send(proxy, "GET", "/bucket/stored", connection=connection)[0] == 503
    proxy.set(kinds=("error_500",))
    assert send(proxy, "GET", "/bucket/stored", connection=connection)[0] == 500
    proxy.set(rate=0.0)
    assert send(proxy, "GET", "/bucket/stored", connection=connection) == (200, BODY)
    assert proxy.faults == dict.fromkeys(KINDS, 0) | {"slow_down_503": 1, "error_500": 1}
    connection.close()


def test_bodies_of_every_framing_arrive_complete(bucket, proxy):
    send(proxy, "PUT", "/bucket/chunked", iter([BODY, b"tail"]))
    assert send(proxy, "GET", "/bucket/chunked") == (200, BODY + b"tail")
    assert send(proxy, "GET", "/bucket/stored", Range="bytes=10-19") == (206, BODY[10:20])
    encoded = b"4\r\ndata\r\n0\r\nx-amz-checksum-crc32:rfPzYw==\r\n\r\n"
    put = (
        b"PUT /bucket/aws HTTP/1.1\r\n%sContent-Encoding: aws-chunked\r\nX-Amz-Decoded-Content-Length: 4\r\n"
        b"X-Amz-Content-Sha256: STREAMING-UNSIGNED-PAYLOAD-TRAILER\r\nExpect: 100-continue\r\nConnection: close\r\n"
    ) % HEADERS
    framed = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(encoded), encoded)
    sized = b"Content-Length: %d\r\n\r\n%s" % (len(encoded), encoded)
    for body in (framed, sized):
        interim, _, rest = raw(proxy, put + body).partition(b"\r\n\r\n")
        assert (interim, rest[:13]) == (b"HTTP/1.1 100 Continue", b"HTTP/1.1 200 ")
        assert send(bucket, "GET", "/bucket/aws") == (200, b"data")


def test_a_chunked_body_ends_after_its_trailers():
    body = b"3;name=value\r\n\r\n0\r\n0\r\nx-checksum: 1\r\n\r\n"

    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(body + b"next")
        return await read_body(reader, {"transfer-encoding": "chunked"})

    assert asyncio.run(read()) == body


def test_incomplete_put_writes_nothing(bucket, proxy):
    for to in (bucket, proxy):
        parts = urlsplit(to.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=30) as client:
            client.sendall(b"PUT /bucket/half HTTP/1.1\r\n%sContent-Length: 100\r\n\r\n%s" % (HEADERS, b"x" * 50))
            client.shutdown(socket.SHUT_WR)
            client.recv(65536)
        assert not exists(bucket, "/bucket/half")


def test_only_one_of_many_concurrent_creates_succeeds(proxy):
    def create(i):
        return send(proxy, "PUT", "/bucket/winner", str(i).encode(), If_None_Match="*")[0]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(create, range(32)))
    assert Counter(statuses) == {200: 1, 412: 31}
    assert send(proxy, "GET", "/bucket/winner") == (200, str(statuses.index(200)).encode())


def test_stopping_the_proxy_closes_its_connections(bucket):
    proxy = FaultyProxy(bucket.url)
    idle, busy = connect(proxy), connect(proxy)
    send(proxy, "GET", "/bucket/stored", connection=idle)
    proxy.force("slow_body", operation="GET")
    busy.request("GET", "/bucket/stored", headers={"Authorization": WHO})
    while not proxy.faults["slow_body"]:
        time.sleep(0.01)
    proxy.stop()
    with pytest.raises((http.client.HTTPException, OSError)):
        busy.getresponse().read()
    with pytest.raises((http.client.HTTPException, OSError)):
        send(proxy, "GET", "/bucket/stored", connection=idle)
    for connection in (idle, busy):
        connection.close()


def test_s3fs_works_through_the_proxy(bucket, proxy):
    fs = fsspec.filesystem("s3", **s3_options(proxy.url), use_listings_cache=False)
    fs.pipe_file("bucket/folder/a", BODY)
    fs.copy("bucket/folder/a", "bucket/folder/b c")
    assert sorted(fs.ls("bucket/folder", detail=False)) == ["bucket/folder/a", "bucket/folder/b c"]
    assert fs.cat(["bucket/folder/a", "bucket/folder/b c"]) == dict.fromkeys(
        ["bucket/folder/a", "bucket/folder/b c"], BODY
    )
    assert fs.cat_file("bucket/folder/b c", start=5, end=9) == BODY[5:9]
    fs.pipe_file("bucket/folder/once", b"first", mode="create")
    with pytest.raises(FileExistsError):
        fs.pipe_file("bucket/folder/once", b"second", mode="create")
    assert fs.cat_file("bucket/folder/once") == b"first"
    fs.rm("bucket/folder", recursive=True)
    with pytest.raises(FileNotFoundError):
        fs.cat_file("bucket/folder/a")
    assert fs.ls("bucket", detail=False) == ["bucket/stored"]
    assert {"COPY": 1, "DELETE_MANY": 1}.items() <= proxy.counts.items()
    assert proxy.counts["PUT"] == 3
    assert proxy.counts["LIST"] >= 2
    assert proxy.requests == sum(proxy.counts.values())


def test_s3fs_survives_faults_with_retries(proxy):
    proxy.set(rate=0.2)
    fs = fsspec.filesystem("s3", **s3_options(proxy.url), use_listings_cache=False)
    for i in range(20):
        fs.pipe_file(f"bucket/{i}", BODY)
    for i in range(20):
        assert fs.cat_file(f"bucket/{i}") == BODY
    assert sum(proxy.faults.values()) > 0
