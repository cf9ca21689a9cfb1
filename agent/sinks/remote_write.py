"""Batches as Prometheus remote-write requests, version 1.0 of its specification."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

from agent.errors import SinkError
from agent.extras import needed
from agent.serializers.formats import FORMATS
from agent.serializers.remote_write import write_request_class
from agent.sinks.http_body import joined
from agent.sinks.http_client import HttpClient, HttpClientSettings

_VERSION_HEADER = "X-Prometheus-Remote-Write-Version"


class RemoteWriteSettings(HttpClientSettings, frozen=True, kw_only=True):
    """A receiver of remote-write requests; without a path in the url, Prometheus' own is meant."""

    default_path: ClassVar[str] = "/api/v1/write"
    own_headers: ClassVar[tuple[str, ...]] = (_VERSION_HEADER.lower(),)

    format: Literal["remote_write"] = "remote_write"


class RemoteWriteSink:
    """POSTs a batch as one WriteRequest in a snappy block.

    A payload is an uncompressed WriteRequest, and several one after the other are one with all their series. A receiver
    that refuses some samples (400: out of order, a duplicate, too old) keeps the others, so that the payloads
    may be sent again one by one. What may be taken later (408, 429, 5xx, no answer) is a SinkError.

    Attributes:
        notices: what `open` saw that is worth a warning.
    """

    Settings = RemoteWriteSettings

    def __init__(self, settings: RemoteWriteSettings) -> None:
        headers = {
            "Content-Type": FORMATS[settings.format].content_type,
            "Content-Encoding": "snappy",
            _VERSION_HEADER: "0.1.0",  # as version 1.0 of the specification has it
        }
        self._client = HttpClient(settings, "remote_write", headers)
        self._compressed: Callable[[bytes], Any] | None = None
        self._request: Any = None  # the class WriteRequest
        self.notices = self._client.notices

    def open(self) -> None:
        needed("cramjam", "remote_write", "sinks of type remote_write need cramjam")
        import cramjam

        self._compressed = cramjam.snappy.compress_raw
        self._request = write_request_class()
        self._client.open()

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        if self._compressed is None:
            self.open()
        delivered = 0
        for stop in self._ends_of_runs(payloads):
            try:
                self._post(payloads[delivered:stop], is_last=len(payloads) - delivered == 1)
            except SinkError as error:
                error.delivered = delivered
                raise
            delivered = stop

    def close(self) -> None:
        self._client.close()

    def _ends_of_runs(self, payloads: Sequence[memoryview]) -> Iterator[int]:
        """Where a request must end: at the end, and before a payload that is no later than the one before it.

        Prometheus compares samples with what it had before the request. Those in disorder within it are left out
        without a word, and it answers 204; in a request of their own they are refused, and so counted.
        """
        before = None
        for place, payload in enumerate(payloads if len(payloads) > 1 else ()):
            (*_, series) = self._request.FromString(bytes(payload)).timeseries
            time = series.samples[-1].timestamp
            if before is not None and time <= before:
                yield place
            before = time
        yield len(payloads)

    def _post(self, payloads: Sequence[memoryview], is_last: bool) -> None:
        assert self._compressed is not None
        answer = self._client.post(bytes(self._compressed(joined(payloads))))
        if answer.is_for_later:
            self._client.fail(answer, answer.start)
        if not answer.is_taken:
            self._client.reject(answer, answer.start, each=answer.may_be_for_one and not is_last)
