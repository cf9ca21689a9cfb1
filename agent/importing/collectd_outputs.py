"""What becomes of collectd's writers: each makes sinks of the statements in its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from agent.importing.collectd_syntax import Item, Value
from agent.importing.draft import NO_SETTING, SinkDraft
from agent.importing.options import Options, Tree, each
from agent.importing.sink_parts import READ_ANEW, add_headers, add_user, clean_url, host_port, without_user

LeftOut = list[tuple[str, str]]

_NETWORK_PORT, _GRAPHITE_PORT, _PROMETHEUS_PORT, _INFLUX_PORT = "25826", "2003", "9103", "8089"
_MILLISECOND = 0.001


def options_of(place: str, items: Iterable[Item]) -> Options:
    """Statements as settings: a repeated key has a list, a block is left as it is."""
    found: dict[str, tuple[str, list[Value | Item]]] = {}
    for item in items:
        _, values = found.setdefault(item.key.lower(), (item.key, []))
        values += [item] if item.is_block else item.values
    values_of: Tree = {name: values[0] if len(values) == 1 else values for name, values in found.values()}
    return Options(place, values_of)


def _network(items: list[Item], left_out: LeftOut) -> list[SinkDraft]:
    found = []
    for item in items:
        if item.key.lower() != "server":
            left_out.append((f"network.{item.key}", "hostprobe takes in no metrics" if _listens(item) else NO_SETTING))
            continue
        sink = _datagrams("network.Server", item, _NETWORK_PORT, "json")
        sink.refused = "only collectd reads its protocol, which hostprobe doesn't speak; a receiver of JSON is needed"
        found.append(sink)
    return found


def _write_influxdb_udp(items: list[Item], left_out: LeftOut) -> list[SinkDraft]:
    found = []
    for item in items:
        if item.key.lower() == "server":
            found.append(_datagrams("write_influxdb_udp.Server", item, _INFLUX_PORT, "influx"))
            found[-1].remarks.append(READ_ANEW)
        else:
            left_out.append((f"write_influxdb_udp.{item.key}", NO_SETTING))
    return found


def _listens(item: Item) -> bool:
    return item.key.lower() in ("listen", "forward")


def _datagrams(origin: str, item: Item, port: str, format: str) -> SinkDraft:
    given = Options(origin, {"port": item.values[1]} if len(item.values) > 1 else {})
    address = host_port(item.name, given.text("port", port))
    return SinkDraft(origin, {"type": "udp", "address": address, "format": format})


def _write_graphite(items: list[Item], left_out: LeftOut) -> list[SinkDraft]:
    found = []
    for options in _nodes("write_graphite", items, ("node", "carbon"), left_out):
        kind = options.text("protocol", "tcp").lower()
        address = host_port(options.text("host", "localhost"), options.text("port", _GRAPHITE_PORT))
        sink = SinkDraft(options.place, {"type": kind, "address": address, "format": "graphite"})
        if kind not in ("tcp", "udp"):
            sink.settings["type"], sink.refused = "tcp", "expected the protocol tcp or udp"
        sink.remarks.append("its paths are hostprobe.HOST.TABLE.LABELS.COLUMN: docs/formats.md")
        options.drop("logsenderrors", "reconnectinterval", "storerates")
        found.append(_finished(sink, options, _PATHS))
    return found


_PATHS = each(
    "prefix postfix escapecharacter separateinstances alwaysappendds preserveseparator dropduplicatefields usetags"
    " reversehost",
    "paths have the form that docs/formats.md says",
)


def _write_http(items: list[Item], left_out: LeftOut) -> list[SinkDraft]:
    found = []
    for options in _nodes("write_http", items, ("node", "url"), left_out):
        sink = SinkDraft(options.place, {"type": "http"})
        sink.settings["url"] = clean_url(sink, options.text("url"))
        name = options.text("format", "Command").upper()
        if name != "JSON":
            sink.refused = f"hostprobe has no format {name}"
        sink.settings |= {"format": "json", "gzip": False}
        sink.remarks.append("a frame is one JSON document of hostprobe's, not a list of values: docs/migration.md")
        if timeout := options.duration("timeout", _MILLISECOND):
            sink.settings["timeout"] = timeout
        headers = (text.partition(":") for text in options.texts("header"))
        add_headers(sink, {name.strip(): value.strip() for name, _, value in headers})
        add_user(sink, options, "user", "password")
        tls = {"ca": "cacert", "certificate": "clientcert", "key": "clientkey"}
        if given := {setting: text for setting, key in tls.items() if (text := options.text(key))}:
            sink.settings["tls"] = given
        sink.left_out += [
            (f"{options.place}.{name}", "the peer is always verified")
            for name in ("VerifyPeer", "VerifyHost")
            if not options.flag(name.lower(), True)
        ]
        options.drop("buffersize", "storerates", "loghttperror", "metrics")
        found.append(_finished(sink, options, _PEER))
    return found


_PEER = {
    "clientkeypass": "a private key without a password is expected",
    "notifications": "hostprobe sends no notifications",
}


def _write_prometheus(items: list[Item], left_out: LeftOut) -> list[SinkDraft]:
    options = options_of("write_prometheus", items)
    host, port = without_user(options.text("host", "::")), options.text("port", _PROMETHEUS_PORT)
    sink = SinkDraft(options.place, {"type": "prometheus", "address": host_port(host, port)})
    sink.remarks.append('its names are hostprobe\'s; names = "node_exporter" gives those that dashboards know')
    options.drop("stalenessdelta")
    return [_finished(sink, options, {})]


def _csv(items: list[Item], left_out: LeftOut) -> list[SinkDraft]:
    options = options_of("csv", items)
    folder = options.text("datadir", "/var/lib/collectd/csv")
    sink = SinkDraft(options.place, {"type": "stdout"}, ["JSON lines, one for each frame, instead of a file a value"])
    if folder == "stderr":
        sink.refused = "payloads go to stdout, never to stderr"
    elif folder != "stdout":
        sink.settings = {"type": "file", "path": f"{folder.rstrip('/')}/hostprobe.jsonl"}
    options.drop("storerates")
    return [_finished(sink, options, {})]


def _nodes(origin: str, items: list[Item], keys: tuple[str, ...], left_out: LeftOut) -> Iterable[Options]:
    """The settings of each block that describes a peer."""
    number = 0
    for item in items:
        if item.key.lower() not in keys:
            left_out.append((f"{origin}.{item.key}", NO_SETTING))
            continue
        number += 1
        options = options_of(f"{origin}.{item.key} {item.name if item.key.lower() != 'url' else number}", item.items)
        if item.key.lower() == "url" and "url" not in options:
            options.put("url", item.name)
        yield options


def _finished(sink: SinkDraft, options: Options, reasons: dict[str, str]) -> SinkDraft:
    sink.left_out += [(f"{options.place}.{key}", why) for key, why in options.faults]
    sink.left_out += [(f"{options.place}.{name}", reasons.get(name.lower(), NO_SETTING)) for name in options.rest()]
    return sink


WRITERS: dict[str, Callable[[list[Item], LeftOut], list[SinkDraft]]] = {
    "network": _network,
    "write_graphite": _write_graphite,
    "write_http": _write_http,
    "write_prometheus": _write_prometheus,
    "write_influxdb_udp": _write_influxdb_udp,
    "csv": _csv,
}
"""The writers that hostprobe has a sink for."""
