"""Batches of payloads as POST requests, in any format; a 2xx status is the acknowledgement."""

from __future__ import annotations

from collections.abc import Sequence

from agent.serializers.formats import FORMATS
from agent.sinks.http_body import gzipped, joined
from agent.sinks.http_client import HttpClient, HttpClientSettings


class HttpSettings(HttpClientSettings, frozen=True, kw_only=True):
    """A receiver of payloads as they are, such as JSON lines."""

    gzip: bool = True


class HttpSink:
    """POSTs a batch as one body: its payloads, each with its format's terminator.

    What the peer may take later (408, 429, 5xx, no answer) is a SinkError; any other status is a rejection.

    Attributes:
        notices: what `open` saw that is worth a warning.
    """

    Settings = HttpSettings

    def __init__(self, settings: HttpSettings) -> None:
        form = FORMATS[settings.format]
        headers = {"Content-Type": form.content_type}
        if settings.gzip:
            headers["Content-Encoding"] = "gzip"
        self._encoded = gzipped if settings.gzip else joined
        self._terminator = form.terminator
        self._client = HttpClient(settings, "http", headers)
        self.notices = self._client.notices

    def open(self) -> None:
        self._client.open()

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        answer = self._client.post(self._encoded(payloads, self._terminator))
        if answer.is_for_later:
            self._client.fail(answer, "")
        if not answer.is_taken:
            self._client.reject(answer, answer.start, each=answer.may_be_for_one and len(payloads) > 1)

    def close(self) -> None:
        self._client.close()
