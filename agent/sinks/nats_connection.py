"""A connection to a NATS server, guarded and bounded, and the answers of JetStream that come over it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from agent.errors import UsageError
from agent.sinks.address import host_and_port, reason
from agent.units import Duration

if TYPE_CHECKING:
    import ssl

    from nats.aio.msg import Msg

_NEVER_SECONDS = 10**8  # between pings of ours: answers to messages show as well that the server is there
_TOO_LARGE_FOR_STREAM = 10054  # the err_code of JetStream's answer


class Answer(NamedTuple):
    """What the stream says to a message.

    Attributes:
        error: "" where it is stored.
        is_final: it will never be.
    """

    error: str = ""
    is_final: bool = False


class Connection:
    """A connection to one server, in a loop that runs only while somebody awaits it.

    Attributes:
        fault: why it has ended, or isn't answered; "" while all is well.
        max_payload_bytes: of a message, headers included.
    """

    def __init__(self, wants_tls: bool, login: dict[str, str], timeout: Duration) -> None:
        self.fault = ""
        self.max_payload_bytes = 0
        self._client = _client_class()(wants_tls, login)
        self._timeout = timeout
        self._inbox = ""
        self._published = 0
        self._answers: list[Answer | None] = []
        self._first = 0  # what the number of a message has to lose to be its place in the answers
        self._unanswered = 0
        self._settled: asyncio.Future[None] | None = None

    async def open(
        self,
        server: str,
        place: str,
        timeout_seconds: float,
        tls: ssl.SSLContext | None = None,
        tls_name: str = "",
        credentials: str = "",
    ) -> None:
        """Connects; `fault` says why not.

        Args:
            server: "nats://host:port" or "tls://host:port".
            place: the address of its host.
            tls_name: the name that the server's certificate must hold; "" is the host.
            credentials: a file with a JWT and a seed.
        """
        scheme, _, address = server.partition("://")
        host, port = host_and_port(address)
        place = f"[{place}]" if ":" in place else place
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._client.connect(
                    [f"{scheme}://{place}:{port}"],
                    name="hostprobe",
                    error_cb=self._on_error,
                    closed_cb=self._on_closed,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,  # 0 is for ever
                    reconnect_time_wait=0,
                    connect_timeout=timeout_seconds,
                    ping_interval=_NEVER_SECONDS,
                    tls=tls,
                    tls_hostname=tls_name or host,
                    user_credentials=credentials or None,
                )
                self.max_payload_bytes = int(self._client.max_payload)
                self._inbox = self._client.new_inbox()
                await self._client.subscribe(f"{self._inbox}.*", cb=self._on_answer)
            if not self._client.is_guarded:
                self.fault = "nats-py is of a version that hostprobe doesn't know"
        except Exception as error:  # whatever the first lines of a peer that is no NATS server make of the client
            self.fault = self.fault or fault_text(error, self._timeout)

    async def publish(
        self,
        subject: str,
        messages: Sequence[tuple[dict[str, str], memoryview]],
        answers: list[Answer | None],
    ) -> None:
        """Publishes messages with their headers, and appends the answer to each; None where there is none: `fault`."""
        from nats.errors import Error

        if not messages:
            return
        self.fault = ""
        self._answers, self._first = answers, self._published - len(answers)
        answers += [None] * len(messages)
        self._unanswered = len(messages)
        self._settled = asyncio.get_running_loop().create_future()
        try:
            for headers, payload in messages:
                reply = f"{self._inbox}.{self._published}"
                self._published += 1
                await self._client.publish(subject, bytes(payload), reply=reply, headers=headers)
            await self._settled
        except (Error, OSError) as error:
            self.fault = self.fault or fault_text(error, self._timeout)
        self._answers, self._settled = [], None

    async def close(self) -> None:
        """Takes leave of the server; it may not come back before `abort`."""
        await self._client.close()

    def abort(self) -> None:
        """Drops the connection at once."""
        self._client.abort()

    async def _on_answer(self, message: Msg) -> None:
        place = int(message.subject.rpartition(".")[2]) - self._first
        if 0 <= place < len(self._answers) and self._answers[place] is None:
            self._answers[place] = _answer(message)
            self._unanswered -= 1
            if not self._unanswered:
                self._wake()

    async def _on_error(self, error: Exception) -> None:
        self.fault = self.fault or fault_text(error, self._timeout)
        self._wake()  # a publication that isn't permitted has no answer

    async def _on_closed(self) -> None:
        error = self._client.last_error
        self.fault = self.fault or (fault_text(error, self._timeout) if error else "connection closed")
        self._wake()

    def _wake(self) -> None:
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(None)


@cache
def _client_class() -> Any:
    """nats-py's client, with a check before anything goes to a server, and a way to end at once."""
    from nats.aio.client import Client
    from nats.errors import SecureConnWantedError

    class GuardedClient(Client):
        def __init__(self, wants_tls: bool, login: dict[str, str]) -> None:
            super().__init__()
            self._wants_tls = wants_tls
            self._login = login
            self.is_guarded = False

        def _connect_command(self) -> bytes:
            # nats-py encrypts where the server asks for it, whatever the address says.
            if self._wants_tls and self._writer().get_extra_info("ssl_object") is None:
                raise SecureConnWantedError
            self.is_guarded = True
            if self._login:
                self.options.update(self._login)
                self._auth_configured = True
            return super()._connect_command()

        def _writer(self) -> Any:
            return getattr(self._transport, "_io_writer", None)

        def abort(self) -> None:
            if self._writer() is not None:
                self._writer().transport.abort()

    return GuardedClient


def _answer(message: Msg) -> Answer:
    if message.headers and message.headers.get("Status") == "503":  # nobody listens
        return Answer("no stream has this subject")
    try:
        answer = msgspec.json.decode(message.data)
        if isinstance(answer, dict) and isinstance(error := answer.get("error"), dict):
            text = str(error.get("description") or error.get("code"))
            return Answer(text, error.get("err_code") == _TOO_LARGE_FOR_STREAM)
        if isinstance(answer, dict) and answer.get("stream") and answer.get("seq"):
            return Answer()
    except msgspec.DecodeError:
        pass
    return Answer("an answer that is not JetStream's")


def fault_text(error: Exception, timeout: Duration) -> str:
    """Why something failed, in a few words."""
    if isinstance(error, OSError):
        if error.errno and (error.strerror or "").startswith("Connect call failed"):  # asyncio's words for it
            return os.strerror(error.errno)
        return reason(error, timeout)
    text = str(error).removeprefix("nats: ").strip("'")
    if type(error).__module__.startswith("nats.") or isinstance(error, UsageError):
        return text or type(error).__name__
    return f"no NATS server: {type(error).__name__}"
