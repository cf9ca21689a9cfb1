"""Payloads as messages of a NATS JetStream stream; the stream's own answer to each is the acknowledgement."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from agent.errors import RejectedError, SinkError, UsageError
from agent.extras import needed
from agent.sinks.address import host_and_port, is_loopback
from agent.sinks.nats_connection import Answer, Connection, fault_text
from agent.sinks.secret import Secret, SecretSettings, exposure
from agent.sinks.sink import SinkSettings
from agent.sinks.tls import TlsSettings
from agent.units import Duration

if TYPE_CHECKING:
    import ssl

_TIMEOUTS = (Duration(0.01), Duration(3600))
_CLOSE_SECONDS = 0.5
_CANCELS = 3  # rounds: a task that swallows a cancellation meets the next one
_WINDOW = 128  # messages under way at once
_LINE_CHARACTERS_MAX = 200
_CREDENTIALS_BYTES_MAX = 64 << 10
_CREDENTIALS_PARTS = (b"BEGIN NATS USER JWT", b"BEGIN USER NKEY SEED")  # nats-py reads for ever for want of the first
# Two of their payloads may be equal, byte by byte, without being one that came twice: no time, no sequence is in them.
_REPEATING_FORMATS = ("prometheus", "openmetrics", "statsd", "dogstatsd")


class NatsSettings(SinkSettings, frozen=True, kw_only=True):
    """A stream, by a subject of it.

    Attributes:
        servers: "nats://host:port" or "tls://host:port", of one cluster; they are tried in turn.
        stream: the name of the stream that must have the subject; "" takes whichever has.
        timeout: for a whole delivery, with connecting.
        password: where the password of `user` is.
        token: where the server's token is.
        credentials: a file with a JWT and the seed that signs, as `nsc` writes them.
    """

    servers: tuple[str, ...]
    subject: str
    stream: str = ""
    timeout: Duration = Duration(4)
    user: str = ""
    password: SecretSettings | None = None
    token: SecretSettings | None = None
    credentials: str = ""
    tls: TlsSettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # A message shows its key's value: one about a secret in the wrong place names the key that is the right one.
        if any("@" in server for server in self.servers):
            raise ValueError("password: user and password, or token, outside of servers")
        if not self.servers:
            raise ValueError('servers: one "nats://host:port" or more')
        for server in self.servers:
            _check_server(server)
        if not re.fullmatch("[!-~]{1,1024}", self.subject) or not all(map(_is_token, self.subject.split("."))):
            raise ValueError("subject: visible ASCII characters, with something between dots, and without * and >")
        if self.stream and (not re.fullmatch("[!-~]{1,255}", self.stream) or set(self.stream) & set(".*>/\\")):
            raise ValueError("stream: a name of visible ASCII characters without . * > / \\")
        if not _TIMEOUTS[0] <= self.timeout <= _TIMEOUTS[1]:
            raise ValueError(f"timeout: a duration from {_TIMEOUTS[0]} to {_TIMEOUTS[1]}")
        if bool(self.user) != bool(self.password):
            raise ValueError("password: with user, and only with it")
        if sum((bool(self.user), bool(self.token), bool(self.credentials))) > 1:
            raise ValueError("user: one of user, token and credentials")
        if self.secret and not all(map(_is_private, self.servers)):
            raise ValueError("servers: addresses with tls://, a secret goes over no open connection")
        if self.tls and not all(map(_is_encrypted, self.servers)):
            raise ValueError("servers: addresses with tls://, which tls is for")

    @property
    def secret(self) -> SecretSettings | None:
        return self.password or self.token


class NatsSink:
    """Publishes a batch, up to 128 messages at a time, and waits for the stream's answer to each.

    Each message has the header Nats-Msg-Id, 128 bits of BLAKE2b of the payload, by which the server leaves out what
    it has stored within the stream's `duplicate_window` (two minutes as a rule): a payload that comes again
    since its answer was lost is stored once. In formats whose payloads may be equal without being the same, such as
    statsd, the place in the row of payloads goes into it too, and what comes again after a restart is stored twice.

    The connection is kept, but nobody reads it between deliveries. Where it has ended meanwhile the delivery
    connects anew, once; after a failure the next one does. The sink's own thread asks for the addresses of names.

    A message that is too large for the server or the stream is a rejection. Everything else is a SinkError, because
    somebody can mend it while the ring waits: no stream for the subject yet, a full one, a permission, a password.

    Attributes:
        notices: what `open` saw that is worth a warning.
    """

    Settings = NatsSettings

    def __init__(self, settings: NatsSettings) -> None:
        self.notices: list[str] = []
        self._settings = settings
        self._place = f"nats {','.join(settings.servers)} {settings.subject}"
        self._headers = {"Nats-Expected-Stream": settings.stream} if settings.stream else {}
        self._run = os.urandom(16) if settings.format in _REPEATING_FORMATS else b""
        self._delivered = 0  # since the start: the place of a batch's first payload
        self._failures = 0  # another server is asked first after each
        self._tls: ssl.SSLContext | None = None
        self._secret: Secret | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Connection | None = None

    def open(self) -> None:
        self.close()
        settings = self._settings
        nats = needed("nats", "nats", "sinks of type nats need nats-py")
        logger = logging.getLogger(nats.__name__)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())  # without any, what it logs goes to stderr
        self.notices = []
        if any(map(_is_encrypted, settings.servers)):
            tls = settings.tls or TlsSettings()
            self._tls = tls.context()
            self.notices += tls.notices()
        if settings.secret is not None:
            self.notices += settings.secret.read().notices
        if settings.credentials:
            _check_credentials(settings.credentials)
            self.notices += exposure(settings.credentials)

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop.set_exception_handler(lambda _loop, _context: None)  # it would log of tasks that are given up
        answers: list[Answer | None] = []
        # The client swallows cancellations, so a task that takes too long is left alone here; `_end` ends it.
        task = self._loop.create_task(self._deliver(payloads, answers))
        self._loop.run_until_complete(asyncio.wait([task], timeout=float(self._settings.timeout)))
        if task.done():
            error = task.result()
        else:
            fault = self._connection.fault if self._connection else ""
            timed_out = f"timed out after {self._settings.timeout}"
            error = self._failure(f"{timed_out}: {fault}" if fault not in ("", timed_out) else timed_out)
        delivered = next((index for index, answer in enumerate(answers) if answer != Answer()), len(answers))
        self._delivered += delivered
        if error is not None:
            error.delivered = delivered
            if not isinstance(error, RejectedError):
                self._failures += 1
                self._end(is_in_order=False)
            raise error

    def close(self) -> None:
        self._end(is_in_order=True)

    async def _deliver(self, payloads: Sequence[memoryview], answers: list[Answer | None]) -> SinkError | None:
        """Connects where need be and publishes; returns an error, which as a task's own would be a reference cycle."""
        if self._connection is not None:
            error = await self._publish(self._connection, payloads, answers)
            if not self._connection.fault or any(answers):
                return error
            self._connection.abort()  # it has ended while nobody read it
        fault = await self._connect()
        if self._connection is None:
            return self._failure(fault)
        return await self._publish(self._connection, payloads, answers)

    async def _publish(
        self, connection: Connection, payloads: Sequence[memoryview], answers: list[Answer | None]
    ) -> SinkError | None:
        """Publishes window by window; `answers` has one for each payload that was published, in their order."""
        answers.clear()
        room_bytes = connection.max_payload_bytes - _header_bytes(self._message_headers(b"", 0))
        for start in range(0, len(payloads), _WINDOW):
            window = payloads[start : start + _WINDOW]
            too_large = next((index for index, payload in enumerate(window) if len(payload) > room_bytes), len(window))
            messages = [
                (self._message_headers(payload, self._delivered + place), payload)
                for place, payload in enumerate(window[:too_large], start)
            ]
            await connection.publish(self._settings.subject, messages, answers)
            refused = next((answer for answer in answers[start:] if answer != Answer()), Answer())
            if refused is None:
                return self._failure(connection.fault)
            if refused.is_final:
                return RejectedError(self._line(refused.error), each=True)
            if refused.error:
                return self._failure(refused.error)
            if too_large < len(window):
                size_bytes = len(window[too_large])
                return RejectedError(self._line(f"a message of {size_bytes} bytes, {room_bytes} at most"), each=True)
        return None

    def _message_headers(self, payload: bytes | memoryview, place: int) -> dict[str, str]:
        salt = place.to_bytes(blake2b.SALT_SIZE, "big") if self._run else b""
        digest = blake2b(payload, digest_size=16, key=self._run, salt=salt)
        return {"Nats-Msg-Id": digest.hexdigest(), **self._headers}

    async def _connect(self) -> str:
        """Sets `_connection` to one with the first address that takes it, each in its part of the time; else why."""
        self._connection = None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.timeout
        places, fault = self._places()
        for index, (server, place) in enumerate(places):
            try:
                self._connection = Connection(_is_encrypted(server), self._login(), self._settings.timeout)
            except UsageError as error:
                return str(error)
            await self._connection.open(
                server,
                place,
                (deadline - loop.time()) / (len(places) - index),
                self._tls if _is_encrypted(server) else None,
                self._settings.tls.server_name if self._settings.tls else "",
                self._settings.credentials,
            )
            fault = self._connection.fault
            if not fault:
                return ""
            self._connection.abort()
            self._connection = None
        return fault

    def _places(self) -> tuple[list[tuple[str, str]], str]:
        """Each server with each of its addresses, another server first after each failure; and why one has none."""
        servers = self._settings.servers
        places: list[tuple[str, str]] = []
        fault = ""
        for number in range(len(servers)):
            server = servers[(self._failures + number) % len(servers)]
            host, port = host_and_port(server.partition("://")[2])
            try:
                # Left to itself, asyncio asks in a thread of its own, for which the process waits at its end.
                found = socket.getaddrinfo(host.encode(), port, 0, socket.SOCK_STREAM)
            except OSError as error:
                fault = fault_text(error, self._settings.timeout)
            else:
                places += [(server, str(address[0])) for *_, address in found]
        return places, fault

    def _login(self) -> dict[str, str]:
        """What nats-py is to tell the server, with the secret as it is now at its place."""
        settings = self._settings
        if settings.credentials:
            _check_credentials(settings.credentials)
        if settings.secret is None:
            return {}
        self._secret = settings.secret.read()
        if settings.token:
            return {"token": self._secret.reveal()}
        return {"user": settings.user, "password": self._secret.reveal()}

    def _end(self, is_in_order: bool) -> None:
        """Ends the connection and all that runs in the loop, in bounded time."""
        loop, self._loop = self._loop, None
        connection, self._connection = self._connection, None
        if loop is None:
            return
        if connection is not None:
            if is_in_order:
                loop.run_until_complete(asyncio.wait([loop.create_task(connection.close())], timeout=_CLOSE_SECONDS))
            connection.abort()
        for _ in range(_CANCELS):
            loop.run_until_complete(asyncio.sleep(0))  # sockets are closed in the loop's next turn
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=_CLOSE_SECONDS))
        loop.close()

    def _failure(self, what: str) -> SinkError:
        return SinkError(self._line(what))

    def _line(self, what: str) -> str:
        """What went wrong in one line, without the secret in case that the server has sent it back."""
        line = "".join(character if character.isprintable() else " " for character in what)
        if self._secret is not None:
            line = re.sub(re.escape(self._secret.reveal()), "***", line, flags=re.IGNORECASE)  # nats-py lowers errors
        return f"{self._place}: {' '.join(line.split())[:_LINE_CHARACTERS_MAX]}"


def _header_bytes(headers: dict[str, str]) -> int:
    """What headers take of the server's max_payload; nats-py doesn't count them."""
    return len("NATS/1.0\r\n\r\n") + sum(len(f"{name}: {value}\r\n") for name, value in headers.items())


def _check_credentials(path: str) -> None:
    try:
        import nkeys  # type: ignore[import-not-found]  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "nkeys":
            raise
        raise UsageError("credentials of sinks of type nats need nkeys", 'pip install "nats-py[nkeys]"') from None
    try:
        with open(path, "rb") as file:
            content = file.read(_CREDENTIALS_BYTES_MAX)
    except OSError as error:
        raise UsageError(f'credentials "{path}": {error.strerror}', "a file that can be read") from None
    if not all(part in content for part in _CREDENTIALS_PARTS):
        raise UsageError(f'credentials "{path}": no credentials in it', "a file with a user's JWT and seed")


def _check_server(server: str) -> None:
    scheme, _, address = server.partition("://")
    try:
        host_and_port(address)
    except ValueError:
        scheme = ""
    if scheme not in ("nats", "tls"):
        raise ValueError('servers: each "nats://host:port" or "tls://host:port"')


def _is_encrypted(server: str) -> bool:
    return server.startswith("tls://")


def _is_private(server: str) -> bool:
    """Whether nobody but the peer can read what is sent: it is encrypted, or stays on this host."""
    host, _ = host_and_port(server.partition("://")[2])
    return is_loopback(host) or _is_encrypted(server)


def _is_token(part: str) -> bool:
    return bool(part) and not set(part) & set("*>")
