"""The prometheus sink, asked by real clients: in time, over TLS, with passwords, by many and by such that dawdle."""

from __future__ import annotations

import base64
import gc
import gzip
import http.client
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
import urllib3
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus

from agent.errors import SinkError, UsageError
from agent.mistakes import decode
from agent.sinks import pages
from agent.sinks.pages import Exposition, accepts_gzip
from agent.sinks.prometheus import PrometheusSettings, PrometheusSink
from tests.workers import PATIENCE_SECONDS, until

TEXT = b"""# HELP hostprobe_load_load1 Load over 1 minute.
# TYPE hostprobe_load_load1 gauge
hostprobe_load_load1 0.25
# HELP hostprobe_disk_io_reads_total Reads.
# TYPE hostprobe_disk_io_reads_total counter
hostprobe_disk_io_reads_total{device="sda"} 18446744073709551615
hostprobe_disk_io_reads_total{device="a\\"b\\\\c\\nd"} 2"""
OPEN_METRICS = b"""# TYPE hostprobe_disk_io_reads counter
# HELP hostprobe_disk_io_reads Reads.
hostprobe_disk_io_reads_total{device="sda"} 7.0
# EOF"""
BODY = TEXT + b"\n"
PASSWORD = "pässwörd of nobody"
GET = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n"


def settings(**more: Any) -> PrometheusSettings:
    return msgspec.convert({"type": "prometheus", **more}, PrometheusSettings, dec_hook=decode)


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as place:
        place.bind((host, 0))
        return int(place.getsockname()[1])


class Served:
    """An open sink and ways to ask it."""

    def __init__(self, host: str = "127.0.0.1", at: str = "", **more: Any) -> None:
        self.port = free_port(host)
        self.host = host
        place = at or host
        self.address = f"[{place}]:{self.port}" if ":" in place else f"{place}:{self.port}"
        self.sink = PrometheusSink(settings(address=self.address, **more))
        self.sink.open()

    def deliver(self, *payloads: bytes) -> None:
        self.sink.deliver([memoryview(payload) for payload in payloads])

    @property
    def held(self) -> int:
        """Connections that the server holds."""
        assert self.sink._server is not None
        return len(self.sink._server._held)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE_SECONDS)

    def raw(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), PATIENCE_SECONDS)

    def get(self, path: str = "/metrics", method: str = "GET", **headers: str) -> http.client.HTTPResponse:
        """The answer, read, on a connection of its own."""
        with closing(self.connection()) as connection:
            return ask(connection, path, method, **headers)


def ask(
    connection: http.client.HTTPConnection, path: str = "/metrics", method: str = "GET", **headers: str
) -> http.client.HTTPResponse:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=names)
    answer = connection.getresponse()
    answer.body = answer.read()  # type: ignore[attr-defined]
    return answer


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """`serve(**settings)`: an open sink, closed after the test."""
    with ExitStack() as stack:

        def make(*arguments: str, **more: Any) -> Served:
            served = Served(*arguments, **more)
            stack.callback(served.sink.close)
            return served

        yield make


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other end closes, or resets."""
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


# What is served


@pytest.mark.parametrize("format", ["prometheus", "openmetrics"])
def test_a_scrape_is_the_latest_frame(serve: Any, format: str) -> None:
    served = serve(format=format)
    text = TEXT if format == "prometheus" else OPEN_METRICS
    served.deliver(b"older", b"old", text)
    answer = served.get()
    assert (answer.status, answer.body) == (200, text + b"\n")
    expected = {
        "prometheus": "text/plain; version=0.0.4; charset=utf-8",
        "openmetrics": "application/openmetrics-text; version=1.0.0; charset=utf-8",
    }
    assert answer.headers["Content-Type"] == expected[format]
    assert answer.headers["Content-Length"] == str(len(answer.body))
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Server"] == "hostprobe"
    assert answer.headers["Content-Encoding"] is None
    parse = parse_prometheus if format == "prometheus" else parse_openmetrics
    families = {family.name: family for family in parse(answer.body.decode())}
    samples = [(sample.labels, sample.value) for sample in families["hostprobe_disk_io_reads"].samples]
    if format == "prometheus":
        assert samples == [({"device": "sda"}, 2**64 - 1), ({"device": 'a"b\\c\nd'}, 2)]
        assert [sample.value for sample in families["hostprobe_load_load1"].samples] == [0.25]
    else:
        assert samples == [({"device": "sda"}, 7)]


def test_what_is_served_outlives_the_payloads_memory(serve: Any) -> None:
    served = serve()
    payload = bytearray(TEXT)
    served.sink.deliver([memoryview(payload)])
    payload[:] = b"x" * len(payload)
    assert served.get().body == BODY


def test_before_the_first_frame_it_says_so(serve: Any) -> None:
    served = serve()
    answer = served.get()
    assert (answer.status, answer.body) == (503, b"no frame yet\n")
    served.deliver(TEXT)
    assert served.get().status == 200


@pytest.mark.parametrize("is_on", [True, False])
def test_gzip_for_those_who_accept_it(serve: Any, is_on: bool) -> None:
    served = serve(gzip=is_on)
    served.deliver(TEXT * 100)
    answer = served.get(Accept_Encoding="deflate, gzip;q=0.5")
    assert answer.headers["Content-Encoding"] == ("gzip" if is_on else None)
    assert answer.headers["Vary"] == ("Accept-Encoding" if is_on else None)
    assert answer.headers["Content-Length"] == str(len(answer.body))
    assert (gzip.decompress(answer.body) if is_on else answer.body) == TEXT * 100 + b"\n"
    assert served.get(Accept_Encoding="gzip;q=0").body == TEXT * 100 + b"\n"


def test_urllib3_sees_the_same_with_and_without_gzip(serve: Any) -> None:
    served = serve()
    served.deliver(TEXT)
    with urllib3.PoolManager(retries=False, timeout=PATIENCE_SECONDS) as pool:
        for encoding in ("gzip", "identity"):
            answer = pool.request("GET", f"http://{served.address}/metrics", headers={"Accept-Encoding": encoding})
            assert (answer.status, answer.data) == (200, BODY)


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("gzip", True),
        ("GZIP", True),
        ("x-gzip", True),
        ("deflate , gzip ; q=1.0", True),
        ("gzip;q=0.001", True),
        ("*", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("*;q=0", False),
        ("*, gzip;q=0", False),
        ("gzip;q=0, x-gzip", False),
    ],
)
def test_accepts_gzip(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


def test_a_frame_is_compressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = pages.zlib.compressobj

    def counted(*arguments: int) -> Any:
        made.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(pages.zlib, "compressobj", counted)
    exposition = Exposition(os.urandom(1 << 20), 0)
    barrier = threading.Barrier(8)

    def scrape() -> bytes:
        barrier.wait(PATIENCE_SECONDS)
        return exposition.zipped()

    with ThreadPoolExecutor(8) as pool:
        results = [done.result() for done in [pool.submit(scrape) for _ in range(8)]]
    assert len(made) == 1
    assert all(result is results[0] for result in results)
    assert gzip.decompress(results[0]) == exposition.text


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/"])
def test_head_is_get_without_a_body(serve: Any, path: str) -> None:
    served = serve()
    served.deliver(TEXT)
    got = served.get(path, Accept_Encoding="gzip")
    with closing(served.raw()) as connection:
        head = b"HEAD %s HTTP/1.1\r\nHost: here\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n" % path.encode()
        connection.sendall(head)
        answer = read_all(connection)
    assert answer.endswith(b"\r\n\r\n")
    status, *lines = answer.decode().splitlines()
    headers = dict(line.split(": ") for line in lines if line)
    assert status == "HTTP/1.1 200 OK"
    assert headers["Content-Length"] == str(len(got.body))
    for name in ("Content-Type", "Content-Encoding", "Cache-Control"):
        assert headers.get(name) == got.headers[name]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
def test_other_methods_are_not_allowed(serve: Any, method: str) -> None:
    served = serve()
    for path in ("/metrics", "/healthz"):
        with closing(served.connection()) as connection:
            connection.request(method, path, body=b"some body" if method in ("POST", "PUT") else None)
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
            assert answer.read() == b"GET or HEAD, please\n"
    assert served.get("/metrics").status == 503  # it goes on


def test_other_paths_are_not_found(serve: Any) -> None:
    served = serve(path="/host/probe")
    served.deliver(TEXT)
    assert [served.get(path).status for path in ("/metrics", "/host", "/host/probe/", "/favicon.ico")] == [404] * 4
    assert served.get("/host/probe?name=x").body == BODY
    page = served.get("/")
    assert page.headers["Content-Type"].startswith("text/html")
    for path in ("/host/probe", "/healthz", "/readyz"):
        assert f'<a href="{path}">'.encode() in page.body
        assert served.get(path).status == 200


@pytest.mark.parametrize(
    "request_head",
    [
        b"nonsense\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET http://elsewhere/metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n continued\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"GET /" + b"x" * 20_000,
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 20_000,
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    ],
)
def test_nonsense_is_refused_and_said_nowhere(
    serve: Any, capfd: pytest.CaptureFixture[str], request_head: bytes
) -> None:
    served = serve()
    served.deliver(TEXT)
    with closing(served.raw()) as connection:
        connection.sendall(request_head)
        assert read_all(connection).split(b" ")[1][:1] in (b"4", b"5")
    assert served.get().body == BODY
    assert served.sink.notices == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /" + b"x" * 20_000, 414),
        (b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 20_000, 413),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 10_000 + b"\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 4_000, 413),
    ],
)
def test_a_head_that_is_too_long_is_refused(serve: Any, request_head: bytes, status: int) -> None:
    with closing(serve().raw()) as connection:
        connection.sendall(request_head)
        assert read_all(connection).startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("framing", [b"Content-Length: %d" % len(GET), b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_a_body_is_no_second_request(serve: Any, method: bytes, framing: bytes) -> None:
    served = serve()
    served.deliver(TEXT)
    with closing(served.raw()) as connection:
        connection.sendall(method + b" /metrics HTTP/1.1\r\nHost: here\r\n" + framing + b"\r\n\r\n" + GET)
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answer


# Connections


def test_a_connection_is_kept_for_the_next_scrapes(serve: Any) -> None:
    served = serve()
    with closing(served.connection()) as connection:
        for number in range(20):
            served.deliver(b"frame %d" % number)
            assert ask(connection).body == b"frame %d\n" % number
            until(lambda: served.held == 1)
    until(lambda: served.held == 0)


def test_a_client_that_wants_no_more_is_left(serve: Any) -> None:
    served = serve()
    served.deliver(TEXT)
    for head in (GET.replace(b"Host", b"Connection: close\r\nHost"), b"GET /metrics HTTP/1.0\r\n\r\n"):
        with closing(served.raw()) as connection:
            connection.sendall(head)
            assert read_all(connection).endswith(b"\r\n\r\n" + BODY)
    until(lambda: served.held == 0)


def test_requests_in_one_piece_and_in_many(serve: Any) -> None:
    served = serve()
    served.deliver(TEXT)
    last = GET.replace(b"Host", b"Connection: close\r\nHost")
    with closing(served.raw()) as connection:
        connection.sendall(GET + GET + last)
        assert read_all(connection).count(BODY) == 3
    with closing(served.raw()) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in last:
            connection.send(bytes([byte]))
        assert read_all(connection).endswith(BODY)


@pytest.mark.parametrize("encrypted", [False, True])
def test_200_clients_that_say_nothing_keep_nobody_waiting(serve: Any, tls: Tls, encrypted: bool) -> None:
    served = serve(max_clients=20, timeout="1h", **(tls.server() if encrypted else {}))
    with ExitStack() as stack:
        kept = stack.enter_context(closing(tls.connection(served) if encrypted else served.connection()))
        assert ask(kept).status == 503
        idle = [stack.enter_context(closing(served.raw())) for _ in range(200)]
        served.deliver(TEXT)
        assert ask(kept).body == BODY  # whoever was answered before isn't who makes room
        for _ in range(3):
            with closing(tls.connection(served) if encrypted else served.connection()) as connection:
                assert ask(connection).body == BODY
        until(lambda: served.held <= 20)
        assert [read_all(connection) for connection in idle[:180]] == [b""] * 180
        assert threading.active_count() < 20


@pytest.mark.parametrize("encrypted", [False, True])
def test_who_trickles_a_request_in_is_cut_off(serve: Any, tls: Tls, encrypted: bool) -> None:
    served = serve(timeout="1500ms", **(tls.server() if encrypted else {}))
    served.deliver(TEXT)
    stop = threading.Event()

    def trickle() -> bytes:
        """Sends forever, a byte at a time; returns when it is cut off."""
        with closing(tls.wrapped(served.raw()) if encrypted else served.raw()) as connection:
            try:
                connection.sendall(b"GET /metrics HTTP/1.1\r\n")
                while not stop.wait(0.02):
                    connection.sendall(b"X: y\r\n")
            except OSError:
                return b"cut off"
        return b"never"

    with ThreadPoolExecutor(5) as pool:
        clients = [pool.submit(trickle) for _ in range(5)]
        try:
            for _ in range(3):
                with closing(tls.connection(served) if encrypted else served.connection()) as connection:
                    assert ask(connection).body == BODY
            assert [client.result(PATIENCE_SECONDS) for client in clients] == [b"cut off"] * 5
        finally:
            stop.set()


@pytest.mark.parametrize("encrypted", [False, True])
def test_who_does_not_take_the_answer_is_cut_off(serve: Any, tls: Tls, encrypted: bool) -> None:
    served = serve(timeout="1s", gzip=False, **(tls.server() if encrypted else {}))
    large = b"x" * (32 << 20)
    served.deliver(large)
    with ExitStack() as stack:
        lazy = [
            stack.enter_context(closing(tls.wrapped(served.raw()) if encrypted else served.raw())) for _ in range(5)
        ]
        for connection in lazy:
            connection.sendall(GET)
        with closing(tls.connection(served) if encrypted else served.connection()) as connection:
            assert ask(connection, "/healthz").body == b"ok\n"
        until(lambda: served.held == 0)
        for connection in lazy:
            with suppress(ssl.SSLError):
                assert len(read_all(connection)) < len(large)
    served.deliver(TEXT)
    with closing(tls.connection(served) if encrypted else served.connection()) as connection:
        assert ask(connection).body == BODY


def test_a_large_answer_arrives_whole_at_a_slow_pace(serve: Any, tls: Tls) -> None:
    served = serve(gzip=False, **tls.server())
    text = os.urandom(8 << 20)
    served.deliver(text)
    with closing(tls.connection(served)) as connection:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        parts = []
        while part := answer.read(50_000):
            parts.append(part)
    assert b"".join(parts) == text + b"\n"


def test_who_comes_while_all_are_being_answered_is_left(serve: Any) -> None:
    """There is nobody then who could make room."""
    served = serve(max_clients=2)
    in_it, may_go_on = threading.Semaphore(0), threading.Event()

    class Slow:
        def problems(self) -> list[str]:
            in_it.release()
            assert may_go_on.wait(PATIENCE_SECONDS)
            return []

        hindrances = problems

    served.sink.watch(Slow())
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(served.get, "/healthz") for _ in range(2)]
        try:
            for _ in answers:
                assert in_it.acquire(timeout=PATIENCE_SECONDS)
            with closing(served.raw()) as late:
                assert read_all(late) == b""
        finally:
            may_go_on.set()
        assert [answer.result(PATIENCE_SECONDS).body for answer in answers] == [b"ok\n"] * 2


def test_every_scrape_is_one_whole_frame(serve: Any) -> None:
    served = serve()
    served.deliver(b"0," * 20_000)
    ended = threading.Event()

    def scrape(encoding: str) -> list[int]:
        seen = []
        with closing(served.connection()) as connection:
            while not ended.is_set() or len(seen) < 20:
                answer = ask(connection, Accept_Encoding=encoding)
                body = gzip.decompress(answer.body) if encoding == "gzip" else answer.body
                numbers = body.decode().rstrip("\n").rstrip(",").split(",")
                assert len(numbers) == 20_000
                assert len(set(numbers)) == 1, "a mix of frames"
                seen.append(int(numbers[0]))
        return seen

    with ThreadPoolExecutor(4) as pool:
        scrapes = [pool.submit(scrape, encoding) for encoding in ("gzip", "identity") * 2]
        for number in range(1, 300):
            served.deliver(b"%d," % number * 20_000)
        ended.set()
        for scraped in scrapes:
            seen = scraped.result(PATIENCE_SECONDS)
            assert seen == sorted(seen)
            assert seen[-1] == 299


def test_scrapes_leave_nothing_to_the_collector(serve: Any) -> None:
    served = serve()
    served.deliver(TEXT)

    def scrape() -> None:
        with closing(served.raw()) as connection:
            connection.sendall(GET.replace(b"Host", b"Connection: close\r\nAccept-Encoding: gzip\r\nHost"))
            assert b" 200 OK" in read_all(connection)
        until(lambda: served.held == 0)

    scrape()
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            scrape()
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_without_descriptors_it_says_so_once_and_goes_on() -> None:
    """In a process of its own that may open three files more."""
    port = free_port()
    code = (
        "import os, resource, sys\nfrom agent.sinks.prometheus import *\n"
        f"sink = PrometheusSink(PrometheusSettings(address='127.0.0.1:{port}'))\n"
        "sink.open(); sink.deliver([memoryview(b'x')])\n"
        "limit = max(map(int, os.listdir('/proc/self/fd'))) + 3\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))\n"
        "print('open', flush=True); sys.stdin.readline(); print(sink.notices); sink.close()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child, ExitStack() as stack:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        for _ in range(10):
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS)))
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)) as connection:
            assert ask(connection).body == b"x\n"
        said, _ = child.communicate("end\n", timeout=PATIENCE_SECONDS)
    assert said == f"['prometheus 127.0.0.1:{port}: a client was not accepted: Too many open files']\n"
    assert child.returncode == 0


# Health


class Patient:
    """Whose health is as the test says."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.obstacles: list[str] = []
        self.patience_ns = 3600 * 10**9

    def problems(self) -> list[str]:
        return list(self.faults)

    def hindrances(self) -> list[str]:
        return [*self.faults, *self.obstacles]


def test_a_frame_that_is_too_old_is_none(serve: Any) -> None:
    served = serve()
    patient = Patient()
    served.sink.watch(patient)
    served.deliver(TEXT)
    assert served.get().body == BODY
    patient.patience_ns = -1
    answer = served.get()
    assert (answer.status, answer.body) == (503, b"no frame for 0 s\n")
    assert served.get("/healthz").status == 200


def test_health_and_readiness(serve: Any) -> None:
    served = serve()
    patient = Patient()
    served.sink.watch(patient)
    assert [served.get(path).body for path in ("/healthz", "/readyz")] == [b"ok\n"] * 2
    patient.obstacles = ["no frame yet", "sink a: its circuit is open"]
    assert served.get("/healthz").status == 200
    answer = served.get("/readyz")
    assert (answer.status, answer.body) == (503, b"no frame yet\nsink a: its circuit is open\n")
    patient.faults = ["sink b: its thread has ended"]
    answer = served.get("/healthz")
    assert (answer.status, answer.body) == (503, b"sink b: its thread has ended\n")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    patient.faults, patient.obstacles = [], []
    assert [served.get(path).status for path in ("/healthz", "/readyz")] == [200, 200]


# Passwords


@pytest.fixture
def basic(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    path.chmod(0o600)
    return {"user": "prometheus", "password": {"file": str(path)}}


def authorization(text: str, scheme: str = "Basic") -> str:
    return f"{scheme} {base64.b64encode(text.encode()).decode()}"


def test_the_right_password_opens_the_frame(serve: Any, basic: Any) -> None:
    served = serve(basic=basic)
    served.deliver(TEXT)
    right = authorization(f"prometheus:{PASSWORD}")
    assert served.get(Authorization=right).body == BODY
    assert served.get(Authorization=right.replace("Basic", "basic")).body == BODY
    assert served.get("/", Authorization=right).status == 200


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Basic",
        "Basic !!!",
        "Basic YWJj=",
        "Basic é",
        authorization("prometheus:"),
        authorization("prometheus:wrong"),
        authorization(f"other:{PASSWORD}"),
        authorization(f"prometheus:{PASSWORD}x"),
        authorization(f"prometheus:{PASSWORD}", "Bearer"),
    ],
)
def test_any_other_does_not(serve: Any, basic: Any, capfd: pytest.CaptureFixture[str], header: str) -> None:
    served = serve(basic=basic)
    served.deliver(TEXT)
    for path in ("/metrics", "/"):
        answer = served.get(path, Authorization=header)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"].startswith('Basic realm="hostprobe"')
        assert b"hostprobe_" not in answer.body
    assert capfd.readouterr() == ("", "")
    assert served.sink.notices == []


def test_health_needs_no_password(serve: Any, basic: Any) -> None:
    served = serve(basic=basic)
    assert [served.get(path).status for path in ("/healthz", "/readyz", "/metrics")] == [200, 200, 401]


def test_a_password_is_shown_nowhere(serve: Any, basic: Any) -> None:
    served = serve(basic=basic)
    for thing in (served.sink._settings, served.sink._pages.account, served.sink):
        assert PASSWORD not in repr(thing)


def test_a_password_that_is_not_there(tmp_path: Path) -> None:
    sink = PrometheusSink(settings(basic={"user": "x", "password": {"file": str(tmp_path / "none")}}))
    with pytest.raises(UsageError, match="No such file"):
        sink.open()


def test_an_exposed_password_is_noticed(serve: Any, basic: Any) -> None:
    Path(basic["password"]["file"]).chmod(0o644)
    (notice,) = serve(basic=basic).sink.notices
    assert "world-readable" in notice


# TLS


class Tls:
    """An authority, a certificate of 127.0.0.1 by it, and one of a client."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.authority = trustme.CA()
        self.issue()

    def issue(self) -> None:
        """A new certificate for the server, in the same files."""
        leaf = self.authority.issue_cert("127.0.0.1", "::1", key_type=trustme.KeyType.ECDSA)
        self.certificate = self.write("server.pem", b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        self.key = self.write("server.key", leaf.private_key_pem.bytes())

    def write(self, name: str, content: bytes) -> str:
        path = self.place / name
        path.write_bytes(content)
        path.chmod(0o600)
        return str(path)

    def server(self, **more: str) -> dict[str, Any]:
        return {"tls": {"certificate": self.certificate, "key": self.key, **more}}

    def context(self, *, with_certificate: bool = False, authority: trustme.CA | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if with_certificate:
            (authority or self.authority).issue_cert("scraper@hosts.example").configure_cert(context)
        return context

    def connection(self, served: Served, context: ssl.SSLContext | None = None) -> http.client.HTTPSConnection:
        context = context or self.context()
        return http.client.HTTPSConnection(served.host, served.port, timeout=PATIENCE_SECONDS, context=context)

    def wrapped(self, raw: socket.socket) -> ssl.SSLSocket:
        return self.context().wrap_socket(raw, server_hostname="127.0.0.1")


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return Tls(tmp_path)


def test_tls(serve: Any, tls: Tls, basic: Any) -> None:
    served = serve(basic=basic, **tls.server())
    served.deliver(TEXT)
    with closing(tls.connection(served)) as connection:
        for _ in range(3):
            assert ask(connection, Authorization=authorization(f"prometheus:{PASSWORD}")).body == BODY
        assert ask(connection).status == 401
    assert served.sink.notices == []


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_client_certificates_are_required_where_an_authority_is_named(
    serve: Any, tls: Tls, version: ssl.TLSVersion, capfd: pytest.CaptureFixture[str]
) -> None:
    served = serve(**tls.server(client_ca=tls.write("ca.pem", tls.authority.cert_pem.bytes())))
    served.deliver(TEXT)
    good, none = tls.context(with_certificate=True), tls.context()
    other = tls.context(with_certificate=True, authority=trustme.CA())
    for context in (good, none, other):
        context.maximum_version = version
    for context in (none, other):
        for path in ("/metrics", "/healthz"):
            with (
                closing(tls.connection(served, context)) as connection,
                pytest.raises((OSError, http.client.HTTPException)),
            ):
                ask(connection, path)
    with closing(tls.connection(served, good)) as connection:
        assert ask(connection).body == BODY
        assert ask(connection, "/healthz").body == b"ok\n"
    assert served.sink.notices == []
    assert capfd.readouterr() == ("", "")


def test_who_does_not_speak_tls_is_left(serve: Any, tls: Tls, capfd: pytest.CaptureFixture[str]) -> None:
    served = serve(**tls.server())
    served.deliver(TEXT)
    with closing(served.raw()) as connection:
        connection.sendall(GET)
        assert BODY not in read_all(connection)
    old = tls.context()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with closing(tls.connection(served, old)) as connection:
        assert ask(connection).body == BODY
    assert capfd.readouterr() == ("", "")


def test_a_new_certificate_is_taken_at_the_next_open(serve: Any, tls: Tls) -> None:
    served = serve(**tls.server())

    def shown() -> bytes:
        with closing(tls.wrapped(served.raw())) as connection:
            return connection.getpeercert(binary_form=True) or b""

    first = shown()
    tls.issue()
    assert shown() == first
    served.sink.open()
    assert shown() != first


def test_certificates_that_are_none(tls: Tls, tmp_path: Path) -> None:
    other = tls.write("other.key", tls.authority.issue_cert("x").private_key_pem.bytes())
    junk, none = tls.write("junk.pem", b"junk"), str(tmp_path / "none")
    absent = "No such file or directory: expected a PEM file that can be read"
    for more, expected in [
        ({"certificate": none}, f'certificate ".*none": {absent}'),
        ({"key": none}, f'key ".*none": {absent}'),
        ({"client_ca": none}, f'client_ca ".*none": {absent}'),
        ({"client_ca": junk}, 'client_ca ".*junk.pem": no certificate in it: expected a PEM file of certificates'),
        ({"certificate": junk}, 'certificate ".*junk.pem", key ".*": .*: expected PEM of a certificate'),
        ({"key": other}, 'key ".*other.key": its private key is not that of certificate'),
    ]:
        sink = PrometheusSink(settings(**tls.server(**more)))
        with pytest.raises(UsageError, match=expected):
            sink.open()


def test_an_exposed_key_is_noticed(serve: Any, tls: Tls) -> None:
    Path(tls.key).chmod(0o644)
    (notice,) = serve(**tls.server()).sink.notices
    assert "world-readable" in notice


# Addresses


@pytest.mark.parametrize(("host", "at"), [("::1", "::1"), ("::1", "::"), ("127.0.0.1", "::"), ("127.0.0.1", "0.0.0.0")])
def test_addresses(serve: Any, host: str, at: str) -> None:
    served = serve(host, at)
    served.deliver(TEXT)
    assert served.get().body == BODY


def test_a_name_is_looked_up(serve: Any) -> None:
    served = serve("127.0.0.1", "localhost")
    served.deliver(TEXT)
    with closing(http.client.HTTPConnection("localhost", served.port, timeout=PATIENCE_SECONDS)) as connection:
        assert ask(connection).body == BODY


def test_an_address_in_use(serve: Any) -> None:
    served = serve()
    sink = PrometheusSink(settings(address=served.address))
    with pytest.raises(UsageError) as caught:
        sink.open()
    expected = "expected an address of this host, with a port that is free and allowed"
    assert str(caught.value) == f'address "{served.address}": Address already in use: {expected}'
    served.deliver(TEXT)
    assert served.get().body == BODY


def test_check_beside_a_running_agent_is_a_notice(serve: Any) -> None:
    served = serve()
    sink = PrometheusSink(settings(address=served.address))
    sink.check()
    sink.close()
    assert sink.notices == [f'address "{served.address}" is in use: by this agent, or somebody else']
    with pytest.raises(UsageError, match="Cannot assign requested address"):
        PrometheusSink(settings(address="192.0.2.1:9101")).check()


@pytest.mark.parametrize(
    ("address", "reason"),
    [("192.0.2.1:9101", "Cannot assign requested address"), ("no-such-host.invalid:9101", ".+")],
)
def test_an_address_that_is_not_this_hosts(address: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f'^address "{address}": {reason}: expected an address of this host'):
        PrometheusSink(settings(address=address)).open()


def test_the_port_is_free_as_soon_as_it_is_closed(serve: Any) -> None:
    served = serve()
    assert served.get().status == 503  # all threads are there
    until(lambda: served.held == 0)
    threads = threading.active_count()
    files = len(os.listdir("/proc/self/fd"))
    served.deliver(TEXT)
    for _ in range(5):
        with closing(served.connection()) as kept, closing(served.raw()) as idle:
            assert ask(kept).body == BODY
            served.sink.close()
            assert read_all(idle) == b""
            assert threading.active_count() < threads
            with pytest.raises(ConnectionRefusedError):
                served.raw()
            served.sink.open()
    until(lambda: threading.active_count() == threads)
    assert served.get().body == BODY  # of before
    until(lambda: served.held == 0)
    assert len(os.listdir("/proc/self/fd")) == files


def test_close_waits_for_no_client(serve: Any, tls: Tls) -> None:
    served = serve(timeout="1h", gzip=False, **tls.server())
    served.deliver(b"x" * (32 << 20))
    with ExitStack() as stack:
        lazy = [stack.enter_context(closing(tls.wrapped(served.raw()))) for _ in range(5)]
        for connection in lazy:
            connection.sendall(GET)
        half = stack.enter_context(closing(served.raw()))
        half.sendall(b"GET")
        until(lambda: served.held == 6)
        served.sink.close()
        assert read_all(half) == b""
    served.sink.close()  # and again, which does nothing


def test_a_server_that_died_is_opened_again_and_said_once(serve: Any, capfd: pytest.CaptureFixture[str]) -> None:
    served = serve()
    server = served.sink._server

    def fail() -> None:
        raise RuntimeError("a defect\nin two lines")

    server._look = fail
    server._wake()
    until(lambda: not server.is_alive)
    notice = f"prometheus {served.address}: the server has ended: RuntimeError: a defect in two lines"
    assert served.sink.notices == [notice]
    server.error_log("more trouble", 40)
    assert served.sink.notices == [notice]
    served.deliver(TEXT)
    assert served.sink.notices == [notice]  # still there for the log
    assert served.get().body == BODY
    assert capfd.readouterr() == ("", "")


def test_a_server_that_can_not_open_again_fails_the_delivery(serve: Any) -> None:
    served = serve()
    served.sink.close()
    with closing(socket.create_server(("127.0.0.1", served.port))):
        with pytest.raises(SinkError, match="Address already in use") as caught:
            served.deliver(TEXT)
        assert caught.value.delivered == 0
    served.deliver(TEXT)
    assert served.get().body == BODY


def test_a_defect_in_an_answer_is_one_notice(serve: Any, capfd: pytest.CaptureFixture[str]) -> None:
    served = serve()

    class Broken:
        def problems(self) -> list[str]:
            raise RuntimeError("a defect")

        hindrances = problems

    served.sink.watch(Broken())
    for _ in range(3):
        assert served.get("/healthz").status == 500
    assert served.sink.notices == [f"prometheus {served.address}: RuntimeError('a defect')"]
    assert capfd.readouterr() == ("", "")


def test_no_thread_holds_up_the_programs_end() -> None:
    """One that never closes its sink, as where another sink can't open."""
    code = (
        "from agent.sinks.prometheus import *\n"
        f"sink = PrometheusSink(PrometheusSettings(address='127.0.0.1:{free_port()}'))\n"
        "sink.open(); sink.deliver([memoryview(b'x')]); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE_SECONDS, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"done\n", b"")


def test_without_cheroot_it_names_the_command() -> None:
    code = (
        "import sys; sys.modules['cheroot'] = None\n"
        "from agent.sinks.prometheus import *\n"
        "try: PrometheusSink(PrometheusSettings()).open()\n"
        "except UsageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.stderr == b""
    assert done.stdout == b'sinks of type prometheus need cheroot: expected pip install "hostprobe[prometheus]"\n'


def test_nothing_of_cheroot_is_imported_before_it_opens() -> None:
    code = (
        "import sys\nfrom agent.sinks.prometheus import *\n"
        "PrometheusSink(PrometheusSettings())\nprint({'cheroot', 'agent.sinks.serving'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE_SECONDS, check=False)
    assert (done.stdout, done.stderr) == (b"set()\n", b"")


# Settings


def test_defaults() -> None:
    given = settings()
    assert (given.format, given.address, given.path, given.gzip) == ("prometheus", "127.0.0.1:9101", "/metrics", True)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"address": "9101"}, 'address: "host:port"'),
        ({"address": "127.0.0.1:0"}, 'address: "host:port"'),
        ({"path": "metrics"}, 'path: a path such as "/metrics"'),
        ({"path": "/"}, 'path: a path such as "/metrics"'),
        ({"path": "/a b"}, 'path: a path such as "/metrics"'),
        ({"path": "/<i>"}, 'path: a path such as "/metrics"'),
        ({"path": "/healthz"}, "none of /healthz and /readyz"),
        ({"path": "/readyz"}, "none of /healthz and /readyz"),
        ({"format": "json"}, "format"),
        ({"max_clients": 0}, "max_clients"),
        ({"max_clients": 1001}, "max_clients"),
        ({"timeout": "0s"}, "timeout: a duration from 1ms to 1h"),
        ({"timeout": "2h"}, "timeout: a duration from 1ms to 1h"),
        ({"tls": {"certificate": ""}}, "certificate: a PEM file"),
        ({"tls": {"key": "x"}}, "certificate"),
        ({"basic": {"user": "a:b", "password": {"env": "X"}}}, "user"),
        ({"basic": {"user": "a", "password": {"env": "X"}}, "address": "0.0.0.0:9101"}, "address: one of loopback"),
        ({"basic": {"user": "a", "password": {"env": "X"}}, "address": "[::]:9101"}, "address: one of loopback"),
        ({"basic": {"user": "a", "password": {"env": "X"}}, "address": "web:9101"}, "address: one of loopback"),
        ({"names": "someone"}, "names"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_bad_settings(more: dict[str, Any], expected: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=expected):
        settings(**more)


@pytest.mark.parametrize(
    "more",
    [
        {"basic": {"user": "a", "password": {"env": "X"}}},
        {"basic": {"user": "a", "password": {"env": "X"}}, "address": "[::1]:9101"},
        {"basic": {"user": "a", "password": {"env": "X"}}, "address": "localhost:9101"},
        {"basic": {"user": "a", "password": {"env": "X"}}, "address": "[::]:1", "tls": {"certificate": "c"}},
        {"names": "node_exporter"},
        {"format": "openmetrics", "path": "/a/b.c"},
    ],
)
def test_good_settings(more: dict[str, Any]) -> None:
    assert settings(**more).type == "prometheus"
