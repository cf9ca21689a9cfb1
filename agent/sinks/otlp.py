"""Batches as OTLP metrics requests, over HTTP in protobuf."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from agent.extras import needed
from agent.serializers.formats import FORMATS
from agent.sinks.http_answer import Answer
from agent.sinks.http_body import gzipped, joined
from agent.sinks.http_client import HttpClient, HttpClientSettings

_TRY_AGAIN = (429, 502, 503, 504)  # the specification's list; any other error is final
_TRY_EACH = (400, 413)
_QUIET_SECONDS = 60.0
_SERVICE = "opentelemetry.proto.collector.metrics.v1.metrics_service_pb2"


class OtlpSettings(HttpClientSettings, frozen=True, kw_only=True):
    """A receiver of OTLP; without a path in the url, the specification's own is meant."""

    default_path: ClassVar[str] = "/v1/metrics"

    format: Literal["otlp"] = "otlp"
    gzip: bool = True


class OtlpSink:
    """POSTs a batch as one ExportMetricsServiceRequest.

    A payload is such a request, and several one after the other are one with all their metrics. A receiver may take a
    batch without some of its points: they are not sent again, but counted and told, at most once a minute.

    Args:
        clock_seconds: any clock that doesn't go back.

    Attributes:
        notices: what `open` saw that is worth a warning, and which points the receiver refused.
        rejected_points: of requests that were taken otherwise.
    """

    Settings = OtlpSettings

    def __init__(self, settings: OtlpSettings, clock_seconds: Callable[[], float] = time.monotonic) -> None:
        content_type = FORMATS[settings.format].content_type
        headers = {"Content-Type": content_type}
        if settings.gzip:
            headers["Content-Encoding"] = "gzip"
        self._content_type = content_type
        self._encoded = gzipped if settings.gzip else joined
        self._client = HttpClient(settings, "otlp", headers)
        self._clock_seconds = clock_seconds
        self._response: Any = None
        self._status: Any = None
        self._untold = False
        self._untold_points = 0
        self._warning = ""
        self._told_seconds = -_QUIET_SECONDS
        self.rejected_points = 0
        self.notices = self._client.notices

    def open(self) -> None:
        if self._response is None:
            needed("google.protobuf.message", "otlp", "sinks of type otlp need protobuf")
            needed(_SERVICE, "otlp", "sinks of type otlp need opentelemetry-proto")
            from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

            self._response, self._status = ExportMetricsServiceResponse, _status_message()
        self._client.open()

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        if self._response is None:
            self.open()
        answer = self._client.post(self._encoded(payloads))
        if answer.status < 200 or answer.status in _TRY_AGAIN:  # an interim answer says nothing
            self._client.fail(answer, self._reason(answer))
        if not answer.is_taken:
            self._client.reject(answer, self._reason(answer), each=answer.status in _TRY_EACH and len(payloads) > 1)
        self._see_partial_success(answer)
        self._tell()

    def close(self) -> None:
        self._client.close()

    def _reason(self, answer: Answer) -> bytes:
        """What an error's body says: the message of a google.rpc.Status, or the text of whoever is in between."""
        from google.protobuf.message import DecodeError

        if answer.content_type != self._content_type:
            return answer.start
        try:
            return bytes(self._status.FromString(answer.start).message)
        except DecodeError:
            return answer.start

    def _see_partial_success(self, answer: Answer) -> None:
        """Counts the points that were refused. Without any, a message is a warning, as the specification has it."""
        from google.protobuf.message import DecodeError

        try:
            partial = self._response.FromString(answer.start).partial_success
        except DecodeError:  # the status was the answer
            return
        rejected = max(partial.rejected_data_points, 0)
        if rejected or partial.error_message:
            self.rejected_points += rejected
            self._untold_points += rejected
            self._untold = True
            self._warning = self._client.shown(partial.error_message)

    def _tell(self) -> None:
        now = self._clock_seconds()
        if not self._untold or now - self._told_seconds < _QUIET_SECONDS:
            return
        what = f"{self._untold_points} data points refused" if self._untold_points else "taken, with a warning"
        self.notices.append(f"{self._client.place}: {what}" + (f": {self._warning}" if self._warning else ""))
        self._untold, self._untold_points, self._told_seconds = False, 0, now


def _status_message() -> Any:
    """The class of google.rpc.Status, which no package of ours brings; its details are left undecoded."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="hostprobe/status.proto", package="hostprobe", syntax="proto3")
    status = file.message_type.add(name="Status")
    status.field.add(name="code", number=1, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    # A string on the wire; as bytes it can be shown even where it is no UTF-8.
    status.field.add(name="message", number=2, type=field.TYPE_BYTES, label=field.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("hostprobe.Status"))
