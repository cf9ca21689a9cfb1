"""Serves the latest frame to whoever asks, on /metrics: a scrape is a copy of what is rendered, not a collection.

Whether the agent is well is said beside it, on /healthz and /readyz.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from agent.errors import SinkError, UsageError
from agent.extras import needed
from agent.logs import Episode
from agent.serializers.formats import FORMATS
from agent.sinks.address import host_and_port, is_loopback
from agent.sinks.pages import HEALTHY_PATH, READY_PATH, Account, Exposition, Health, Pages
from agent.sinks.secret import BasicSettings
from agent.sinks.sink import SinkSettings
from agent.sinks.tls import ServerTlsSettings
from agent.units import Duration

if TYPE_CHECKING:
    from agent.sinks.serving import Server

_TIMEOUTS = (Duration(0.001), Duration(3600))


class PrometheusSettings(SinkSettings, frozen=True, kw_only=True):
    """Where a scraper finds the frame, and who is served.

    Attributes:
        address: to listen on, of this host alone unless told otherwise; "[::]:9101" is every address that it has.
        path: of the frame; the pages about health and the one with links have theirs.
        basic: user and password for all but the pages about health; without tls on a loopback address only.
        gzip: whether those who accept it get the frame compressed.
        max_clients: connections at the most; whoever asks for longest, or rests, makes room for a new one.
        timeout: for a client's whole request, and again for taking the answer.
    """

    format: Literal["prometheus", "openmetrics"] = "prometheus"
    address: str = "127.0.0.1:9101"
    path: str = "/metrics"
    basic: BasicSettings | None = None
    tls: ServerTlsSettings | None = None
    gzip: bool = True
    max_clients: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 64
    timeout: Duration = Duration(5)

    def __post_init__(self) -> None:
        super().__post_init__()
        host, _ = host_and_port(self.address)
        if not re.fullmatch(r"/[\w/.~-]+", self.path, re.ASCII) or self.path in (HEALTHY_PATH, READY_PATH):
            raise ValueError(f'path: a path such as "/metrics", none of {HEALTHY_PATH} and {READY_PATH}')
        if not _TIMEOUTS[0] <= self.timeout <= _TIMEOUTS[1]:
            raise ValueError(f"timeout: a duration from {_TIMEOUTS[0]} to {_TIMEOUTS[1]}")
        if self.basic and not self.tls and not is_loopback(host):
            raise ValueError("address: one of loopback, a password goes over no open connection; or tls")


class _InUseError(UsageError):
    """Somebody listens on the address already."""


class PrometheusSink:
    """Keeps the latest payload for whoever asks; that is its delivery, of a batch's others as well.

    Attributes:
        notices: what `open` saw that is worth a warning, and defects of the server, one a minute, should it have any.
    """

    Settings = PrometheusSettings

    def __init__(self, settings: PrometheusSettings) -> None:
        self.notices: list[str] = []
        self._settings = settings
        self._terminator = FORMATS[settings.format].terminator
        self._pages = Pages(settings.path, FORMATS[settings.format].content_type, settings.gzip)
        self._server: Server | None = None
        self._faulty = Episode()

    def watch(self, health: Health) -> None:
        """Who says how the agent is, for the pages about it."""
        self._pages.health = health

    def open(self) -> None:
        self.close()
        settings = self._settings
        needed("cheroot.wsgi", "prometheus", "sinks of type prometheus need cheroot")
        from agent.sinks.serving import Server, listening

        self._read_password()
        context = settings.tls.context() if settings.tls else None
        self.notices += settings.tls.notices() if settings.tls else []
        try:
            listener = listening(*host_and_port(settings.address))
        except OSError as error:
            what = f'address "{settings.address}": {error.strerror}'
            expected = "an address of this host, with a port that is free and allowed"
            raise (_InUseError if error.errno == errno.EADDRINUSE else UsageError)(what, expected) from None
        self._server = Server(
            listener, self._pages, context, settings.max_clients, float(settings.timeout), self._on_fault
        )
        self._server.open()

    def check(self) -> None:
        """Opens, but for an address that is in use: by the agent that runs with this configuration, most likely."""
        try:
            self.open()
        except _InUseError:
            self.notices.append(f'address "{self._settings.address}" is in use: by this agent, or somebody else')

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        self._pages.exposition = Exposition(b"".join((payloads[-1], self._terminator)), time.monotonic_ns())
        if self._server is not None and self._server.is_alive:
            return
        try:
            self.open()
        except UsageError as error:
            raise SinkError(f"prometheus: {error}") from None

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _read_password(self) -> None:
        basic = self._settings.basic
        if basic is None:
            return
        password = basic.password.read()
        self.notices += password.notices
        self._pages.account = Account(basic.user, password)

    def _on_fault(self, what: str) -> None:
        if self._faulty.begins(time.monotonic()):
            self.notices.append(f"prometheus {self._settings.address}: {' '.join(what.split())}")
        self._faulty.ends()  # so that the next one a minute later is told too
