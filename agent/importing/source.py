"""The file that is imported: read whole, as text, and whose it is by what stands in it."""

from __future__ import annotations

import os
import re
import stat
from typing import Literal

from agent.errors import UsageError

Kind = Literal["telegraf", "collectd"]
KINDS: tuple[Kind, ...] = ("telegraf", "collectd")

_BYTES_MAX = 4 << 20
_TELEGRAF = re.compile(
    r"[ \t]*\[\[?[ \t]*(?:agent|global_tags|tags|(?:inputs|outputs|processors|aggregators|secretstores)\.)"
)
_COLLECTD = re.compile(
    r"[ \t]*(?:</?[ \t]*[A-Za-z]\w*[^\n>]*>"
    r"|(?:LoadPlugin|Include|Hostname|FQDNLookup|BaseDir|PIDFile|PluginDir|TypesDB|Interval)[ \t]+[^=\s])",
    re.IGNORECASE,
)


def read(path: str) -> str:
    """The file's text.

    Raises:
        UsageError: it can't be read, is too large, or no text.
    """
    expected = "a configuration file of Telegraf or collectd that can be read"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UsageError(f"{path}: it is no file", expected)
            content = file.read(_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}", expected) from None
    if len(content) > _BYTES_MAX:
        raise UsageError(f"{path}: it is longer than {_BYTES_MAX >> 20} MiB", "a configuration file")
    try:
        return content.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8", "a configuration file") from None


def kind_of(path: str, text: str) -> Kind:
    """Whose configuration it is: the first line that only one of them has says it.

    Raises:
        UsageError: nothing in it does.
    """
    for line in text.splitlines():
        if _TELEGRAF.match(line):
            return "telegraf"
        if _COLLECTD.match(line):
            return "collectd"
    what = f"{path}: neither Telegraf's nor collectd's"
    raise UsageError(what, "[agent] or [[inputs.NAME]], or LoadPlugin or <Plugin NAME>; --from says which it is")
