"""Payloads as records of a Kafka topic; the broker's delivery reports are the acknowledgement."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from agent.errors import RejectedError, SinkError, UsageError
from agent.extras import needed
from agent.sinks.address import host_and_port, is_loopback
from agent.sinks.secret import Secret, SecretSettings
from agent.sinks.sink import SinkSettings
from agent.sinks.tls import TlsSettings
from agent.units import Duration

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Producer

# An idempotent producer asks for its identity after half a second, and each failure makes a new one.
_TIMEOUTS = (Duration(1), Duration(3600))
_PURGE_SECONDS = 1.0  # for the reports of what was purged, which wait for nobody else
_RECORDS_MAX = 10_000  # of a batch, as BatchSettings has it
_RECORD_EXTRA_BYTES = 1 << 10  # key and bookkeeping
_LINE_CHARACTERS_MAX = 200
# With a value of its own each of these would break a promise: of order, of delivery, of a verified peer, of bounds.
_OUR_PROPERTIES = {
    "acks", "bootstrap.servers", "compression.codec", "compression.type", "default.topic.config",
    "delivery.report.only.error", "delivery.timeout.ms", "enable.idempotence", "enable.ssl.certificate.verification",
    "log.queue", "logger", "max.in.flight", "max.in.flight.requests.per.connection", "message.timeout.ms",
    "metadata.broker.list", "on_delivery", "queue.buffering.max.kbytes", "queue.buffering.max.messages",
    "request.required.acks", "security.protocol", "transactional.id",
}  # fmt: skip
_SECRET_PROPERTIES = r"(sasl|ssl)\..*|.*(password|secret|token|credential|\.pem).*"


class SaslSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who the agent is to the brokers.

    Attributes:
        password: where the password is; it is read again whenever a producer is made anew.
    """

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]
    user: str
    password: SecretSettings

    def __post_init__(self) -> None:
        if not self.user or not self.user.isprintable():
            raise ValueError("user: a name without control characters")


class KafkaSettings(SinkSettings, frozen=True, kw_only=True):
    """A topic.

    Attributes:
        servers: "host:port" of brokers to ask first; they name the others.
        key: of each record, so that a host's records are in one partition, in order; "" is the host's name.
        acks: who has a record before it counts as delivered: "all" replicas in sync, or "1", the partition's leader.
        timeout: for the delivery of a whole batch.
        properties: more of librdkafka's properties, as text.
    """

    servers: tuple[str, ...]
    topic: str
    key: str = ""
    acks: Literal["all", "1"] = "all"
    compression: Literal["none", "gzip", "lz4", "zstd", "snappy"] = "none"
    timeout: Duration = Duration(10)
    tls: TlsSettings | None = None
    sasl: SaslSettings | None = None
    properties: dict[str, str] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.servers:
            raise ValueError('servers: one "host:port" or more')
        for server in self.servers:
            try:
                host_and_port(server)
            except ValueError:
                raise ValueError('servers: each "host:port", with a port from 1 to 65535') from None
        if not re.fullmatch("[A-Za-z0-9._-]{1,249}", self.topic) or self.topic in (".", ".."):
            raise ValueError('topic: 1 to 249 of A-Z a-z 0-9 . _ -, and not "." or ".."')
        if not _TIMEOUTS[0] <= self.timeout <= _TIMEOUTS[1]:
            raise ValueError(f"timeout: a duration from {_TIMEOUTS[0]} to {_TIMEOUTS[1]}")
        if self.sasl and not self.is_private:
            raise ValueError("tls: a section tls, a secret goes over no open connection")
        if self.tls and self.tls.server_name:
            raise ValueError("tls: no server_name, each broker is verified by the name that it has in the cluster")
        _check_properties(self.properties)

    @property
    def is_private(self) -> bool:
        """Whether nobody but a broker can read what is sent: it is encrypted, or the first brokers are on this host."""
        return self.tls is not None or all(is_loopback(host_and_port(server)[0]) for server in self.servers)


class KafkaSink:
    """Produces a batch and waits until the brokers have acknowledged every record of it.

    librdkafka tries again by itself until the timeout, and keeps the order: with acks = "all" its producer is
    idempotent, so that these tries store nothing twice; with "1" there is one request at a time. Past the
    timeout all that is left is purged and the producer ends, so that nothing is sent behind our back. A purged
    record may have been stored all the same, and comes again: at least once, with the frame's sequence to tell.

    What a broker refuses for the record's sake (too large, invalid) is a rejection. Everything else is a
    SinkError, because somebody can mend it while the ring waits: a topic that is yet to be made, an ACL, a password.

    Attributes:
        host: the key of records where the settings have none; whoever knows better sets it before `open`.
        notices: what `open` saw that is worth a warning.
    """

    Settings = KafkaSettings

    def __init__(self, settings: KafkaSettings) -> None:
        self.host = socket.gethostname().encode(errors="replace").decode()
        self.notices: list[str] = []
        self._settings = settings
        self._place = f"kafka {','.join(settings.servers)} {settings.topic}"
        self._key = b""
        self._producer: Producer | None = None
        self._secret: Secret | None = None
        self._fault = ""  # what librdkafka has said last of why it doesn't get on

    def open(self) -> None:
        self.close()
        settings = self._settings
        self._key = (settings.key or self.host).encode(errors="replace")
        self.notices = []
        if settings.tls is not None:
            settings.tls.context()  # librdkafka says less of what is wrong with a file
            self.notices += settings.tls.notices()
        self._producer = self._new_producer()
        if self._secret is not None:
            self.notices += self._secret.notices

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        if self._producer is None:
            try:
                self._producer = self._new_producer()
            except UsageError as error:  # a password's file, half written
                raise SinkError(f"{self._place}: {error}") from None
        reports = self._reports(self._producer, payloads)
        delivered = next((index for index, report in enumerate(reports) if report is not None), len(reports))
        if delivered == len(reports):
            self._fault = ""
            return
        failed = reports[delivered]
        assert failed is not None
        if failed.code() in _refusals():
            raise RejectedError(f"{self._place}: {self._shown(failed.str())}", delivered, each=True)
        reason = self._reason(failed)
        # A new one next time: a producer that lost an idempotent record may stay unable to send, and some errors
        # are fatal to it.
        self.close()
        raise SinkError(f"{self._place}: {reason}", delivered)

    def close(self) -> None:
        producer, self._producer = self._producer, None
        self._fault = ""
        if producer is not None:
            producer.purge()
            producer.flush(0)

    def _reports(self, producer: Producer, payloads: Sequence[memoryview]) -> list[KafkaError | None]:
        """Each payload's error, None where it is acknowledged."""
        from confluent_kafka import KafkaError, KafkaException

        reports: list[KafkaError | None] = [KafkaError(KafkaError._MSG_TIMED_OUT)] * len(payloads)
        for index, payload in enumerate(payloads):
            try:
                producer.produce(
                    self._settings.topic, bytes(payload), self._key, on_delivery=partial(_keep, reports, index)
                )
            except KafkaException as error:
                reports[index] = error.args[0]
                break
            except BufferError:  # its queue is full, which should hold any batch
                reports[index] = KafkaError(KafkaError._QUEUE_FULL)
                break
        if producer.flush(float(self._settings.timeout)):
            producer.purge()
            producer.flush(_PURGE_SECONDS)
        return reports

    def _new_producer(self) -> Producer:
        confluent_kafka = needed("confluent_kafka", "kafka", "sinks of type kafka need confluent-kafka")
        self._secret = self._settings.sasl.password.read() if self._settings.sasl else None
        self._fault = ""
        configuration = _configuration(self._settings, self._secret)
        logger = logging.Logger("hostprobe.kafka")  # without one it writes on stderr; `error_cb` says the same
        logger.addHandler(logging.NullHandler())
        try:
            producer: Producer = confluent_kafka.Producer(
                {**configuration, "error_cb": self._note_error}, logger=logger
            )
            return producer
        except (confluent_kafka.KafkaException, TypeError, ValueError) as error:
            text = error.args[0].str() if isinstance(error, confluent_kafka.KafkaException) else str(error)
            raise UsageError(f"librdkafka: {self._shown(text)}") from None

    def _note_error(self, error: KafkaError) -> None:
        if error.code() != error._ALL_BROKERS_DOWN or not self._fault:  # which says how many, and not why
            self._fault = error.str()

    def _reason(self, error: KafkaError) -> str:
        if error.code() not in (error._MSG_TIMED_OUT, error._PURGE_QUEUE, error._PURGE_INFLIGHT, error._FATAL):
            return self._shown(error.str())
        timed_out = f"not acknowledged within {self._settings.timeout}"
        return f"{timed_out}: {self._shown(self._fault)}" if self._fault else timed_out

    def _shown(self, text: str) -> str:
        """One line of what librdkafka says, without the password in case that it is in there."""
        line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
        if self._secret is not None:
            line = line.replace(self._secret.reveal(), "***")
        return line[:_LINE_CHARACTERS_MAX]


def _keep(reports: list[KafkaError | None], index: int, error: KafkaError | None, _message: object) -> None:
    reports[index] = error


def _refusals() -> set[int]:
    """Errors about a record, or about a batch of them, that no waiting mends.

    INVALID_MSG isn't among them: it is a checksum that didn't fit, and librdkafka sends the record again.
    """
    from confluent_kafka import KafkaError

    return {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.INVALID_RECORD,
    }


def _configuration(settings: KafkaSettings, secret: Secret | None) -> dict[str, Any]:
    """What librdkafka is told, by its own names; the operator's properties come before those that are ours."""
    milliseconds = round(settings.timeout * 1000)
    largest_bytes = max(settings.buffer.size, settings.batch.bytes) + _RECORDS_MAX * _RECORD_EXTRA_BYTES
    configuration: dict[str, Any] = {
        "client.id": "hostprobe",
        "linger.ms": 5,  # while a batch is handed over; then it is flushed
        "topic.metadata.propagation.max.ms": milliseconds // 2,  # so that it says that the topic is unknown
        **settings.properties,
        "bootstrap.servers": ",".join(settings.servers),
        "security.protocol": ("sasl_" if settings.sasl else "") + ("ssl" if settings.tls else "plaintext"),
        "acks": settings.acks,
        "enable.idempotence": settings.acks == "all",
        "compression.type": settings.compression,
        "message.timeout.ms": milliseconds,
        "queue.buffering.max.messages": _RECORDS_MAX,
        "queue.buffering.max.kbytes": min(-(-largest_bytes // 1024), 2**31 - 1),
    }
    if settings.acks != "all":
        configuration["max.in.flight.requests.per.connection"] = 1  # a retry would come after the next ones
    if settings.tls is not None:
        paths = {
            "ssl.ca.location": settings.tls.ca,
            "ssl.certificate.location": settings.tls.certificate,
            "ssl.key.location": settings.tls.key or settings.tls.certificate,
        }
        configuration |= {name: path for name, path in paths.items() if path}
    if settings.sasl is not None:
        assert secret is not None
        configuration |= {
            "sasl.mechanism": settings.sasl.mechanism,
            "sasl.username": settings.sasl.user,
            "sasl.password": secret.reveal(),
        }
    return configuration


def _check_properties(properties: dict[str, str]) -> None:
    # A message shows its key's value: one about a secret in the wrong place names the key that is the right one.
    if any(re.fullmatch(_SECRET_PROPERTIES, name, re.IGNORECASE) for name in properties):
        raise ValueError(
            "sasl: the place of a user and a secret, as tls is that of certificates, instead of properties"
        )
    if any(name in _OUR_PROPERTIES or name.endswith("_cb") for name in properties):
        raise ValueError("properties: none of those that hostprobe sets, by itself or by a setting of its own")
