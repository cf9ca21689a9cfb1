"""The nats sink behind a real worker, and a real nats-server with JetStream that is killed, stopped and locked."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import nats as nats_client
import pytest
import trustme
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from agent.errors import SinkError
from agent.mistakes import decode
from agent.sink_worker import SinkWorker
from agent.sinks.nats import NatsSettings, NatsSink
from agent.sinks.tls import TlsSettings
from tests.engines.brokers import NatsServer
from tests.engines.process import LOCALHOST
from tests.workers import opened, until

PASSWORD = "p4ssword-of-nobody"
T = TypeVar("T")


def settings(url: str, subject: str, **more: Any) -> NatsSettings:
    plain = {"type": "nats", "servers": [url], "subject": subject, "timeout": "1s", **more}
    return msgspec.convert(plain, NatsSettings, dec_hook=decode)


def ask(server: NatsServer, what: Callable[[JetStreamContext], Awaitable[T]], **options: Any) -> T:
    """What a plain client learns of a server's JetStream."""

    async def run() -> T:
        client = await nats_client.connect(server.url, **options)
        try:
            return await what(client.jetstream())
        finally:
            await client.close()

    return asyncio.run(run())


def add_stream(server: NatsServer, name: str, options: dict[str, Any] | None = None, **more: Any) -> None:
    ask(server, lambda stream: stream.add_stream(name=name, subjects=[f"{name}.>"], **more), **(options or {}))


def stored(server: NatsServer, name: str, **options: Any) -> list[bytes]:
    """Every message of a stream, in its order."""

    async def read(stream: JetStreamContext) -> list[bytes]:
        try:
            state = (await stream.stream_info(name)).state
        except NotFoundError:
            return []
        found = [await stream.get_msg(name, number) for number in range(1, state.last_seq + 1)]
        assert len(found) == state.messages
        return [message.data or b"" for message in found]

    return ask(server, read, **options)


def frame(sequence: int) -> bytes:
    return json.dumps({"sequence": sequence, "text": "x" * 200}).encode()


def push(worker: SinkWorker, first: int, last: int) -> None:
    for sequence in range(first, last + 1):
        worker.ring.push(frame(sequence), sequence, worker._clock_ns(), 1)


def worker_of(server: NatsServer, name: str, **more: Any) -> SinkWorker:
    # Pauses as long as a server takes to start, so that five failures in a row don't open the circuit for long.
    sink = NatsSink(settings(server.url, f"{name}.web", **more))
    worker = opened(sink, size=4 << 20, base=1, cap=1)
    worker.start()
    return worker


def end(worker: SinkWorker) -> None:
    worker.finish(worker._now_seconds() + 30)
    worker.join()
    assert not worker._thread.is_alive()


def test_frames_are_stored_once_and_in_order(nats: NatsServer) -> None:
    add_stream(nats, "plain")
    worker = worker_of(nats, "plain", stream="plain")
    push(worker, 1, 1000)
    until(lambda: worker.frames == (1000, 0, 0), "all are sent")
    end(worker)
    assert worker.failures == 0
    assert stored(nats, "plain") == [frame(sequence) for sequence in range(1, 1001)]


@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_a_server_that_is_away_for_a_while(nats: NatsServer, way: str) -> None:
    """Its store remains: nothing is missing in it, nothing is there twice, and all is in order."""
    add_stream(nats, way)
    worker = worker_of(nats, way)
    push(worker, 1, 300)
    until(lambda: worker.frames[0] >= 100, "some are sent")
    if way == "killed":
        nats.kill()
    else:
        nats.send(signal.SIGSTOP)
    push(worker, 301, 600)
    until(lambda: worker.failures, "it was missed")
    assert worker.frames[2] >= 300
    if way == "killed":
        nats.start()
    else:
        nats.send(signal.SIGCONT)
    push(worker, 601, 900)
    until(lambda: worker.frames == (900, 0, 0), "all are sent")
    end(worker)
    assert stored(nats, way) == [frame(sequence) for sequence in range(1, 901)]


def test_a_server_that_is_killed_in_the_middle_of_it_all(nats: NatsServer) -> None:
    """Again and again, while frames come without a pause: messages without their answers are under way."""
    add_stream(nats, "again")
    worker = worker_of(nats, "again")
    for number in range(3):
        first = number * 1000 + 1
        push(worker, first, first + 999)
        until(lambda first=first: worker.frames[0] >= first + 100, "some are sent")
        nats.kill()
        nats.start()
    until(lambda: worker.frames == (3000, 0, 0), "all are sent")
    end(worker)
    assert worker.failures > 0
    assert stored(nats, "again") == [frame(sequence) for sequence in range(1, 3001)]


def test_a_stream_that_is_made_later(nats: NatsServer) -> None:
    worker = worker_of(nats, "later")
    push(worker, 1, 50)
    until(lambda: worker.failures >= 2, "nobody takes them")
    assert worker.frames == (0, 0, 50)
    add_stream(nats, "later")
    until(lambda: worker.frames == (50, 0, 0), "all are sent")
    end(worker)
    assert stored(nats, "later") == [frame(sequence) for sequence in range(1, 51)]


def test_the_reasons_of_a_stream_that_does_not_take_it(nats: NatsServer) -> None:
    add_stream(nats, "small", max_msg_size=500, max_msgs=2, discard="new")
    for subject, stream, text in (
        ("absent.web", "", "no stream has this subject"),
        ("small.web", "other", "expected stream does not match"),
    ):
        assert reason_of(nats.url, subject, stream=stream).endswith(text)
    worker = worker_of(nats, "small")
    worker.ring.push(b"1", 1, worker._clock_ns())
    worker.ring.push(b"x" * 501, 2, worker._clock_ns())
    worker.ring.push(b"3", 3, worker._clock_ns())
    until(lambda: worker.frames == (2, 1, 0), "the large one is dropped")
    end(worker)
    assert stored(nats, "small") == [b"1", b"3"]
    assert reason_of(nats.url, "small.web").endswith("maximum messages exceeded")


def test_what_is_larger_than_the_server_takes(nats: NatsServer) -> None:
    """Its max_payload is 1 MiB, headers included: one byte more and it would drop the connection."""
    add_stream(nats, "large")
    worker = worker_of(nats, "large")
    fits = (1 << 20) - 59
    for sequence, size in enumerate((10, fits + 1, fits, 11), 1):
        worker.ring.push(b"x" * size, sequence, worker._clock_ns())
    until(lambda: worker.frames == (3, 1, 0), "the large one is dropped")
    end(worker)
    assert [len(message) for message in stored(nats, "large")] == [10, fits, 11]


# Who may, and over what


def reason_of(url: str, subject: str, **more: Any) -> str:
    """Why a delivery fails; "" where it doesn't."""
    sink = NatsSink(settings(url, subject, **more))
    sink.open()
    try:
        sink.deliver([memoryview(b"frame")])
    except SinkError as error:
        return str(error)
    finally:
        sink.close()
    return ""


def test_user_and_password(tmp_path: Path) -> None:
    place = tmp_path / "password"
    place.write_text(PASSWORD)
    wrong = tmp_path / "wrong"
    wrong.write_text("n0t-it")
    with NatsServer(tmp_path / "server", ("--user", "agent", "--pass", PASSWORD)) as server:
        options = {"user": "agent", "password": PASSWORD}
        add_stream(server, "locked", options)
        assert reason_of(server.url, "locked.web", user="agent", password={"file": str(place)}) == ""
        for more in ({"user": "agent", "password": {"file": str(wrong)}}, {"token": {"file": str(place)}}, {}):
            reason = reason_of(server.url, "locked.web", **more)
            assert reason.lower().endswith("authorization violation")
            assert PASSWORD not in reason
        assert stored(server, "locked", **options) == [b"frame"]


def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    leaf = authority.issue_cert(LOCALHOST)
    leaf.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    place = tmp_path / "token"
    place.write_text(PASSWORD)
    more = (f"--tlscert={tmp_path}/server.pem", f"--tlskey={tmp_path}/server.pem", "--tls", "--auth", PASSWORD)
    with NatsServer(tmp_path / "server", more) as server:
        options = {"token": PASSWORD, "tls": TlsSettings(ca=str(tmp_path / "ca.pem")).context()}
        add_stream(server, "secret", options)
        url = server.url.replace("nats://", "tls://")
        token = {"file": str(place)}
        assert reason_of(url, "secret.web", tls={"ca": str(tmp_path / "ca.pem")}, token=token) == ""
        reason = reason_of(url, "secret.web", tls={"ca": str(tmp_path / "other.pem")}, token=token)
        assert "certificate verify failed" in reason
        named = {"ca": str(tmp_path / "ca.pem"), "server_name": "nats.example"}
        assert "certificate verify failed" in reason_of(url, "secret.web", tls=named, token=token)
        assert stored(server, "secret", **options) == [b"frame"]


def test_tls_that_the_server_does_not_speak(nats: NatsServer, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    add_stream(nats, "open")
    url = nats.url.replace("nats://", "tls://")
    assert reason_of(url, "open.web", tls={"ca": str(tmp_path / "ca.pem")}).endswith("secure connection not available")
    assert stored(nats, "open") == []
