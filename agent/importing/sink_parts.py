"""What sinks of several kinds share: addresses without secrets in them, TLS, users, formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from agent.importing.draft import SinkDraft
from agent.importing.options import SECRETS_FOLDER, Options, Tree

SECRET_NAME = re.compile(r"pass|secret|token|key|auth|cookie|credential|sign|session|^sig$|^[pu]$", re.IGNORECASE)
_OUR_HEADERS = ("content-encoding", "content-length", "content-type", "host", "transfer-encoding")
FORMATS = {"influx": "influx", "json": "json", "graphite": "graphite", "prometheus": "prometheus", "msgpack": "msgpack"}
_PARAMETERS_MAX = 100
_OWN_SHAPES = ("json", "msgpack")
READ_ANEW = "its names and shape are hostprobe's, not those of before: docs/migration.md"


def without_user(address: str) -> str:
    """ "host:port" without what may stand before an "@" or behind a "?", where secrets are."""
    return address.rpartition("@")[2].partition("?")[0]


def clean_url(sink: SinkDraft, url: str) -> str:
    """An address without user, password and parameters that look like secrets; they are told. "" for none at all."""
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True, max_num_fields=_PARAMETERS_MAX)
    except ValueError:
        return ""
    if not parts.netloc:
        return "" if "@" in url or "?" in url else url
    host = without_user(parts.netloc)
    if host != parts.netloc:
        sink.left_out.append((f"{sink.origin}, user and password of its address", "a secret has a place of its own"))
    kept = [(name, value) for name, value in query if not SECRET_NAME.search(name)]
    sink.left_out += [
        (f"{sink.origin}, the parameter {name} of its address", "it may be a secret, which an address is no place for")
        for name, _ in query
        if SECRET_NAME.search(name)
    ]
    text = parts.query if kept == query and query else urlencode(kept, quote_via=quote)
    return urlunsplit((parts.scheme, host, parts.path, text, ""))


def with_query(url: str, path: str, query: Mapping[str, str]) -> str:
    """An address with a path below its own, and the parameters that have a value."""
    parts = urlsplit(url)
    given = urlencode({key: value for key, value in query.items() if value}, quote_via=quote)
    return urlunsplit(
        (parts.scheme, parts.netloc, parts.path.rstrip("/") + path, "&".join(filter(None, (parts.query, given))), "")
    )


def host_port(address: str, port: str) -> str:
    """ "host:port" of an address that may lack its port, or be an IPv6 address without brackets."""
    address = without_user(address)
    if address.count(":") > 1 and not address.startswith("["):
        return f"[{address}]:{port}"
    return address if re.search(r":[0-9]+$", address) else f"{address}:{port}"


def tls(options: Options, prefixes: tuple[str, ...] = ("tls_", "ssl_")) -> Tree:
    """The table `tls` of a client, {} without one."""
    found: Tree = {}
    names = (("ca", ("ca",)), ("certificate", ("cert",)), ("key", ("key",)), ("server_name", ("server_name",)))
    for setting, others in names:
        for key in (prefix + other for prefix in prefixes for other in others):
            if text := options.text(key):
                found[setting] = text
    return found


def add_secret(sink: SinkDraft, options: Options, key: str, what: str, env: bool = True) -> Tree | None:
    """The place of a secret, with a remark on what is to be put there; None without one."""
    place = options.secret(key, env)
    if place is not None:
        where = f"the file {place['file']}, mode 0600," if "file" in place else f"the variable {place['env']}"
        sink.remarks.append(f"{where} must hold {what}")
    return place


def add_user(sink: SinkDraft, options: Options, user_key: str, password_key: str) -> None:
    """The table `basic` where there is a user."""
    user = options.text(user_key)
    password = add_secret(sink, options, password_key, "the password")
    if user and password:
        sink.settings["basic"] = {"user": user, "password": password}
    elif password:
        sink.left_out.append((f"{sink.origin}.{password_key}", "there is no user that it belongs to"))
        sink.remarks.pop()


def add_headers(sink: SinkDraft, headers: Mapping[str, str]) -> None:
    """Headers of a request; those that may be secret become places."""
    for name, value in headers.items():
        if name.lower() in _OUR_HEADERS:
            sink.left_out.append((f"{sink.origin}, the header {name}", "hostprobe sets it"))
        elif SECRET_NAME.search(name):
            slug = re.sub("[^a-z0-9]+", "-", f"{sink.origin.rpartition('.')[2]} {name}".lower()).strip("-")
            path = f"{SECRETS_FOLDER}/{slug}"
            sink.settings.setdefault("header_secrets", {})[name] = {"file": path}
            sink.remarks.append(f"the file {path}, mode 0600, must hold the header {name}")
        else:
            sink.settings.setdefault("headers", {})[name] = value


def add_format(sink: SinkDraft, name: str) -> None:
    """The setting `format`; the sink is refused where hostprobe has none like it."""
    if name not in FORMATS:
        sink.refused = sink.refused or f"data_format {name!r}: expected one of {' '.join(FORMATS)}"
        return
    sink.settings["format"] = FORMATS[name]
    sink.remarks.append(READ_ANEW)
    if name in _OWN_SHAPES:
        sink.remarks.append("a whole frame is one document, not one for each measurement")


def first_of(sink: SinkDraft, key: str, addresses: list[str]) -> str:
    """The address that hostprobe writes to where another agent chooses one of several."""
    if len(addresses) > 1:
        sink.left_out.append((f"{sink.origin}.{key} but the first", "a sink has one address"))
    return addresses[0] if addresses else ""
