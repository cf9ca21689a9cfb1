"""What becomes of Telegraf's outputs: each makes sinks of its settings, and takes those that it understands."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlsplit

from agent.importing.draft import SinkDraft
from agent.importing.options import Options
from agent.importing.sink_parts import (
    READ_ANEW,
    add_format,
    add_headers,
    add_secret,
    add_user,
    clean_url,
    first_of,
    host_port,
    tls,
    with_query,
    without_user,
)
from agent.importing.toml_text import comment_text

_CODECS = ("none", "gzip", "snappy", "lz4", "zstd")
_ACKS = {"-1": "all", "1": "1", "0": "1"}
_SIZE = re.compile(r"([0-9]+)\s*([kKmMgG]i?)?[bB]?")
_OTLP_PORT, _GRPC_PORT = "4318", "4317"


def _influxdb(options: Options) -> list[SinkDraft]:
    sink = SinkDraft(options.place, {"type": "http"}, [READ_ANEW])
    url = clean_url(sink, first_of(sink, "urls", options.texts("urls") or options.texts("url") or _LOCAL_INFLUX))
    database = options.text("database", "telegraf")
    query = {
        "db": database,
        "rp": options.text("retention_policy"),
        "consistency": options.text("write_consistency"),
    }
    if url.startswith("udp"):
        sink.settings |= {"type": "udp", "address": urlsplit(url).netloc, "format": "influx"}
        return [sink]
    if not url.startswith(("http://", "https://")):
        sink.refused = "its address is no http:// or udp://"
    sink.settings |= {"url": with_query(url, "/write", query), "format": "influx"}
    sink.remarks.append(f"the database {comment_text(database)} must exist, hostprobe makes none")
    options.drop("skip_database_creation")
    _add_client(sink, options, "gzip")
    return [sink]


def _influxdb_v2(options: Options) -> list[SinkDraft]:
    sink = SinkDraft(options.place, {"type": "http"}, [READ_ANEW])
    url = clean_url(sink, first_of(sink, "urls", options.texts("urls") or _LOCAL_INFLUX))
    query = {"org": options.text("organization"), "bucket": options.text("bucket")}
    sink.settings |= {"url": with_query(url, "/api/v2/write", query), "format": "influx"}
    place = add_secret(sink, options, "token", 'the word "Token", a space and the token', env=False)
    if place:
        sink.settings["header_secrets"] = {"Authorization": place}
    _add_client(sink, options, "gzip")
    return [sink]


def _http(options: Options) -> list[SinkDraft]:
    sink = SinkDraft(options.place, {"type": "http"})
    sink.settings["url"] = clean_url(sink, options.text("url", "http://127.0.0.1:8080/telegraf"))
    method = options.text("method", "POST")
    if method.upper() != "POST":
        sink.refused = "hostprobe sends by POST"
    name = options.text("data_format", "influx")
    if name == "prometheusremotewrite":
        sink.settings["type"] = "remote_write"
        sink.remarks.append(READ_ANEW)
    else:
        add_format(sink, name)
    options.drop("use_batch_format", "max_idle_conn", "max_idle_conn_per_host", "idle_conn_timeout")
    _add_client(sink, options, "identity")
    return [sink]


def _add_client(sink: SinkDraft, options: Options, encoding: str) -> None:
    """What every output over HTTP may have."""
    if timeout := options.duration("timeout"):
        sink.settings["timeout"] = timeout
    is_packed = options.text("content_encoding", encoding) == "gzip"
    if sink.settings["type"] == "http":
        sink.settings["gzip"] = is_packed
    for key in ("http_headers", "headers"):
        if table := options.table(key):
            add_headers(sink, {name: table.text(name.lower()) for name in table.rest()})
            sink.left_out += [(f"{table.place}.{name}", why) for name, why in table.faults]
    add_user(sink, options, "username", "password")
    if found := tls(options):
        sink.settings["tls"] = found


def _prometheus_client(options: Options) -> list[SinkDraft]:
    sink = SinkDraft(options.place, {"type": "prometheus"})
    listen = options.text("listen", ":9273")
    listen = without_user(listen.removeprefix("tcp://").removeprefix("http://"))
    sink.settings["address"] = f"[::]{listen}" if listen.startswith(":") else listen
    if path := options.text("path"):
        sink.settings["path"] = path
    sink.remarks.append('its names are hostprobe\'s; names = "node_exporter" gives those that dashboards know')
    add_user(sink, options, "basic_username", "basic_password")
    if certificate := options.text("tls_cert"):
        sink.settings["tls"] = {"certificate": certificate, "key": options.text("tls_key")}
        if authorities := options.texts("tls_allowed_cacerts"):
            sink.settings["tls"]["client_ca"] = first_of(sink, "tls_allowed_cacerts", authorities)
    options.drop("metric_version", "expiration_interval", "string_as_label", "export_timestamp")
    return [sink]


def _file(options: Options) -> list[SinkDraft]:
    paths = options.texts("files") or ["stdout"]
    size, archives = options.text("rotation_max_size"), options.text("rotation_max_archives")
    name = options.text("data_format", "influx")
    options.drop("use_batch_format")
    found = []
    for number, path in enumerate(paths):
        place = options.place if len(paths) == 1 else f"{options.place}.files {number + 1}"
        sink = SinkDraft(place, {"type": "stdout"} if path == "stdout" else {"type": "file", "path": path})
        add_format(sink, name)
        if path != "stdout":
            _add_rotation(sink, options.place, size, archives)
        found.append(sink)
    return found


def _add_rotation(sink: SinkDraft, place: str, size: str, archives: str) -> None:
    match = _SIZE.fullmatch(size)
    if match and int(match[1][:18]) and len(match[1]) <= 18:
        sink.settings["max_size"] = f"{match[1]}{_unit(match[2] or '')}"
    elif size not in ("", "0") and not match:
        sink.left_out.append((f"{place}.rotation_max_size", 'expected a size such as "10MB"'))
    if archives.isdecimal():
        sink.settings["max_files"] = int(archives[:9])
    elif archives:
        sink.left_out.append((f"{place}.rotation_max_archives", "old files are always counted, and removed"))


def _unit(letters: str) -> str:
    return f"{letters.upper()[:1]}{letters[1:]}B" if letters else "B"


def _kafka(options: Options) -> list[SinkDraft]:
    sink = SinkDraft(options.place, {"type": "kafka"})
    sink.settings |= {
        "servers": [without_user(text) for text in options.texts("brokers")],
        "topic": options.text("topic", "telegraf"),
    }
    add_format(sink, options.text("data_format", "influx"))
    codec = options.text("compression_codec", "0")
    if codec.isdecimal() and int(codec[:3]) < len(_CODECS):
        sink.settings["compression"] = _CODECS[int(codec[:3])]
    acks = options.text("required_acks", "-1")
    sink.settings["acks"] = _ACKS.get(acks, "all")
    if acks == "0":
        sink.left_out.append((f"{sink.origin}.required_acks", "a frame must be acknowledged, by 1 or all"))
    if key := options.text("routing_key"):
        sink.settings["key"] = key
    options.drop("routing_tag", "client_id", "version", "max_retry", "idempotent_writes")
    is_encrypted = options.flag("enable_tls", False)
    if (found := tls(options)) or is_encrypted:
        sink.settings["tls"] = found
    user, place = options.text("sasl_username"), add_secret(sink, options, "sasl_password", "the password")
    mechanism = options.text("sasl_mechanism", "PLAIN")
    if user and place:
        sink.settings["sasl"] = {"mechanism": mechanism, "user": user, "password": place}
    return [sink]


def _nats(options: Options) -> list[SinkDraft]:
    sink = SinkDraft(options.place, {"type": "nats"})
    found, is_secure = tls(options), options.flag("secure", False)
    servers = [clean_url(sink, server) for server in options.texts("servers") or ["nats://localhost:4222"]]
    if found or is_secure:
        servers = [re.sub("^nats:", "tls:", server) for server in servers]
    sink.settings |= {"servers": servers, "subject": options.text("subject", "telegraf")}
    add_format(sink, options.text("data_format", "influx"))
    if stream := options.table("jetstream"):
        if name := stream.text("name"):
            sink.settings["stream"] = name
        sink.left_out += [(f"{stream.place}.{name}", "hostprobe makes no stream") for name in stream.rest()]
    else:
        sink.remarks.append("a stream of JetStream must have the subject: hostprobe waits for its answers")
    user, place = options.text("username"), add_secret(sink, options, "password", "the password")
    if user and place:
        sink.settings |= {"user": user, "password": place}
    if credentials := options.text("credentials"):
        sink.settings["credentials"] = credentials
    if found:
        sink.settings["tls"] = found
    options.drop("name")
    return [sink]


def _graphite(options: Options) -> list[SinkDraft]:
    sink = SinkDraft(options.place, {"type": "tcp", "format": "graphite"})
    server = first_of(sink, "servers", options.texts("servers") or ["localhost:2003"])
    sink.settings["address"] = host_port(server, "2003")
    sink.remarks.append("its paths are hostprobe.HOST.TABLE.LABELS.COLUMN: docs/formats.md")
    if timeout := options.duration("timeout"):
        sink.settings["timeout"] = timeout
    if found := tls(options):
        sink.settings["tls"] = found
    return [sink]


def _opentelemetry(options: Options) -> list[SinkDraft]:
    sink = SinkDraft(options.place, {"type": "otlp"})
    address = without_user(options.text("service_address", f"localhost:{_GRPC_PORT}"))
    found = tls(options)
    host, _, port = address.rpartition(":")
    sink.settings["url"] = f"http{'s' if found else ''}://{host}:{_OTLP_PORT}"
    sink.remarks.append(f"OTLP over HTTP, on port {_OTLP_PORT} as a rule; Telegraf's is over gRPC, on {_GRPC_PORT}")
    if port != _GRPC_PORT or not re.fullmatch(r"[A-Za-z0-9.\[\]:_-]+", host):
        sink.refused = "OTLP goes over HTTP: say where, the address of gRPC doesn't tell"
        sink.settings["url"] = f"https://localhost:{_OTLP_PORT}"
    if timeout := options.duration("timeout"):
        sink.settings["timeout"] = timeout
    if table := options.table("headers"):
        add_headers(sink, {name: table.text(name.lower()) for name in table.rest()})
    if found:
        sink.settings["tls"] = found
    options.drop("compression", "metrics_schema")
    return [sink]


def _socket_writer(options: Options) -> list[SinkDraft]:
    sink = SinkDraft(options.place, {"type": "tcp"})
    scheme, _, address = options.text("address").partition("://")
    address = without_user(address)
    kind = scheme.rstrip("46") if scheme.startswith(("tcp", "udp")) else scheme
    if kind not in ("tcp", "udp", "unix"):
        sink.refused = "expected an address with tcp://, udp:// or unix://"
        kind = "tcp"
    sink.settings = {"type": kind, "path" if kind == "unix" else "address": address}
    add_format(sink, options.text("data_format", "influx"))
    options.drop("keep_alive_period")
    if (found := tls(options)) and kind == "tcp":
        sink.settings["tls"] = found
    return [sink]


_LOCAL_INFLUX = ["http://localhost:8086"]

OUTPUTS: dict[str, Callable[[Options], list[SinkDraft]]] = {
    "influxdb": _influxdb,
    "influxdb_v2": _influxdb_v2,
    "prometheus_client": _prometheus_client,
    "file": _file,
    "kafka": _kafka,
    "nats": _nats,
    "graphite": _graphite,
    "http": _http,
    "opentelemetry": _opentelemetry,
    "socket_writer": _socket_writer,
}
"""The outputs that hostprobe has a sink for."""
