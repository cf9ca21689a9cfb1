"""Network interfaces: net/dev for what passed, /sys/class/net for their state.

States: Documentation/networking/operstates.rst; attributes: Documentation/ABI/testing/sysfs-class-net.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from agent.errors import ProbeError
from agent.frame import Frame
from agent.table import NAN, Labels, Table, TableSpec, counter, gauge, rate
from probes.probe import DeviceSettings, NameFilter, RowLimit, as_text
from probes.procfs import Host, ProcFile, integer
from probes.rows import RowForm, RowReader

NETWORK = TableSpec(
    "network",
    "Traffic and state of each network interface.",
    counter("receive_bytes_total", "bytes", "Bytes received."),
    counter("receive_packets_total", "packets", "Packets received."),
    counter("receive_errors_total", "packets", "Packets received with an error."),
    counter("receive_drops_total", "packets", "Packets received and dropped, those that the device missed included."),
    counter("transmit_bytes_total", "bytes", "Bytes sent."),
    counter("transmit_packets_total", "packets", "Packets sent."),
    counter("transmit_errors_total", "packets", "Packets that could not be sent."),
    counter("transmit_drops_total", "packets", "Packets dropped instead of being sent."),
    counter("receive_multicast_total", "packets", "Multicast packets received."),
    rate("receive_bytes_per_second", "bytes/second", "Bytes received a second.", "receive_bytes_total"),
    rate("transmit_bytes_per_second", "bytes/second", "Bytes sent a second.", "transmit_bytes_total"),
    gauge("up", "boolean", "1 where the interface can pass packets, else 0."),
    gauge("mtu_bytes", "bytes", "Largest payload of a frame."),
    gauge("speed_bytes_per_second", "bytes/second", "Speed of the link."),
    labels=("interface",),
)

# net/dev: bytes packets errs drop fifo frame compressed multicast received; bytes packets errs drop
# fifo colls carrier compressed sent (net/core/net-procfs.c). The counters' places among them:
_PLACES = np.array([0, 1, 2, 3, 8, 9, 10, 11, 7])
_SPEED_UNIT_BYTES = 125_000  # 1 Mbit/s
_NAME_BYTES = 15  # IFNAMSIZ less the final NUL
_LINKS_KEPT_OPEN = 128  # with three descriptors each; the files of others are opened at each cycle


class NetworkSettings(DeviceSettings, frozen=True, kw_only=True):
    """The interfaces of the table."""

    row_limit: RowLimit = 128


class NetworkProbe:
    """The `network` table from procfs."""

    Settings = NetworkSettings
    tables = (NETWORK,)

    def __init__(self, settings: NetworkSettings, host: Host) -> None:
        self._host = host
        self._row_limit = settings.row_limit
        self._filter = NameFilter(settings.include, settings.exclude)
        self._dev = host.net("dev", record_bytes=512)  # 16 numbers of up to 20 digits
        self._reader = RowReader(NET_DEV)
        self._names: list[bytes] | None = None
        self._kept = np.empty(0, dtype=np.intp)
        self._labels: list[Labels] = []
        self._links: list[_Link] = []
        self._indexes: dict[Labels, bytes] = {}
        self._states: npt.NDArray[np.float64] = np.empty((0, 3))

    def collect(self, frame: Frame) -> None:
        text = self._dev.read()
        if b"|" not in text[:200]:
            raise ProbeError(f"net/dev: {text[:60]!r} is not its heading")
        rows = self._reader.parse(text)
        before = frame.previous(NETWORK.name)
        if rows.names is not self._names:
            self._learn(rows.names, before)
            self._look()
        elif not self._look():
            self._learn(rows.names, before)  # an interface has gone, and another one has its name and place
            self._look()
        table = frame.open(NETWORK)
        count = table.claim(self._labels, self._row_limit)
        kept = self._kept[:count]
        table.counters[:count] = rows.cells[kept].take(_PLACES, axis=1)
        if rows.unknown is not None:
            table.unknown[:count] = rows.unknown[kept].take(_PLACES, axis=1)
            table.complete = not table.unknown[:count].any()
        table.gauges[:count, :3] = self._states

    def _look(self) -> bool:
        """Reads the links' states; whether all are still the interfaces that were learned."""
        intact = True
        for row, link in enumerate(self._links):
            if link.changed():
                self._states[row] = link.state
                intact = intact and not link.has_gone
        return intact

    def _learn(self, names: list[bytes], last: Table | None) -> None:
        """Takes another list of interfaces, after the table that the rates are made from.

        All their files are opened anew: a descriptor stays with an interface that is
        renamed, and another one may have its name now. What that one counted under its
        old name, or the other one under this name, makes no rate.
        """
        self._names = None  # until all is learned
        shown = [as_text(name) for name in names]
        kept = [place for place, name in enumerate(shown) if self._filter.keeps(name)]
        self._kept = np.array(kept, dtype=np.intp)
        self._labels = [(shown[place],) for place in kept]
        for link in self._links:
            link.close()
        self._links = []
        self._links = [
            _Link(self._host, os.fsdecode(names[place]), row < _LINKS_KEPT_OPEN)
            for row, place in enumerate(kept[: self._row_limit])
        ]
        self._states = np.full((len(self._links), 3), NAN)
        before = self._indexes
        self._indexes = {labels: link.index for labels, link in zip(self._labels, self._links, strict=False)}
        if last is not None:
            for row, labels in enumerate(last.labels):
                if before.get(labels) and self._indexes.get(labels, before[labels]) != before[labels]:
                    last.forget_counters(row)
        self._names = names

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._links = []
        self._names = None


class PsutilNetworkProbe:
    """The same table from psutil, which doesn't tell multicast packets apart."""

    Settings = NetworkSettings
    tables = (NETWORK,)

    def __init__(self, settings: NetworkSettings, host: Host) -> None:
        import psutil

        self._psutil = psutil
        self._row_limit = settings.row_limit
        self._filter = NameFilter(settings.include, settings.exclude)
        self._names: list[str] = []
        self._labels: list[Labels] = []

    def collect(self, frame: Frame) -> None:
        # nowrap=False: psutil would hide that a counter fell by adding up what it had been.
        interfaces = self._psutil.net_io_counters(pernic=True, nowrap=False)
        states = self._psutil.net_if_stats()
        names = [name for name in interfaces if self._filter.keeps(name)]
        if names != self._names:
            self._names = names
            self._labels = [(name,) for name in names]
        table = frame.open(NETWORK)
        count = table.claim(self._labels, self._row_limit)
        for row, name in enumerate(names[:count]):
            passed, state = interfaces[name], states.get(name)
            received = (passed.bytes_recv, passed.packets_recv, passed.errin, passed.dropin)
            sent = (passed.bytes_sent, passed.packets_sent, passed.errout, passed.dropout)
            table.put_counters(row, [*received, *sent, None])
            if state is not None:
                speed = state.speed * _SPEED_UNIT_BYTES if state.speed > 0 else NAN
                table.put_gauges(row, (float(state.isup), state.mtu, speed))

    def close(self) -> None: ...


class _Link:
    """An interface's state in /sys/class/net.

    Args:
        keeps_open: whether its files are kept open.

    Attributes:
        index: the number (ifindex) that it keeps when it is renamed, as text; empty where unknown.
        has_gone: it is another interface that has the name now, or none.
        state: up, MTU in bytes, speed in bytes a second; NaN where unknown.
    """

    __slots__ = (
        "_host",
        "_ifindex",
        "_keeps_open",
        "_mtu",
        "_mtu_text",
        "_operstate",
        "_operstate_text",
        "_path",
        "_speed",
        "_speed_text",
        "has_gone",
        "index",
        "state",
    )

    def __init__(self, host: Host, name: str, keeps_open: bool) -> None:
        self._host = host
        self._path = f"class/net/{name}"
        self._keeps_open = keeps_open
        self._ifindex = host.sys(f"{self._path}/ifindex")
        self._operstate = host.sys(f"{self._path}/operstate")
        self._mtu = host.sys(f"{self._path}/mtu")
        self._speed: ProcFile | None = None  # while the kernel refuses to tell it
        self._operstate_text = self._mtu_text = self._speed_text = b""
        self.index = self._ifindex.read()
        self._ifindex.close()
        self.has_gone = False
        self.state = (NAN, NAN, NAN)

    def changed(self) -> bool:
        """Reads the files; whether `state` is another than before, or the interface has gone."""
        operstate, mtu, speed = self._operstate.read(), self._mtu.read(), b""
        # Most virtual interfaces and those that are down refuse their speed with EINVAL, which
        # would cost an exception a cycle: they are asked again when their operstate changes.
        if self._speed is None and operstate != self._operstate_text:
            self._speed = self._host.sys(f"{self._path}/speed")
        if self._speed is not None:
            speed = self._speed.read()
            if not speed:
                self._host.forget(self._speed)
                self._speed = None
        if not self._keeps_open:
            self.has_gone = self._ifindex.read() != self.index
            for file in self._files():
                file.close()
        if operstate == self._operstate_text and mtu == self._mtu_text and speed == self._speed_text:
            return self.has_gone
        # A file that was kept open ends with its interface (ENODEV).
        self.has_gone = self.has_gone or (not operstate and self._operstate_text != b"")
        self._operstate_text, self._mtu_text, self._speed_text = operstate, mtu, speed
        self.state = (parse_operstate(operstate), parse_attribute(mtu), parse_attribute(speed) * _SPEED_UNIT_BYTES)
        return True

    def close(self) -> None:
        for file in self._files():
            self._host.forget(file)

    def _files(self) -> list[ProcFile]:
        files = [self._ifindex, self._operstate, self._mtu]
        return files if self._speed is None else [*files, self._speed]


def split_net_dev(line: bytes) -> tuple[bytes, int] | None:
    """The name in `  eth0: 1 2 3…` and where its numbers start.

    Old kernels put no space behind the colon, and aliases have colons of their own.
    """
    before, colon, numbers = line.rpartition(b":")
    name = before.strip(b" ")
    # dev_valid_name() in net/core/dev.c; what it refuses is damage, and no path to follow.
    if not colon or not 0 < len(name) <= _NAME_BYTES or name in (b".", b".."):
        return None
    if b"/" in name or b"\0" in name or name.split() != [name]:
        return None
    return name, len(line) - len(numbers)


NET_DEV = RowForm(split_net_dev, fields=16, knows=lambda count: count >= 16)


# Documentation/networking/operstates.rst
_OPERSTATES = {b"up": 1.0, b"unknown": 1.0} | dict.fromkeys(
    (b"down", b"notpresent", b"lowerlayerdown", b"testing", b"dormant"), 0.0
)


def parse_operstate(text: bytes) -> float:
    """1 for an interface that can pass packets, 0 for another, NaN where the text is no state that is known.

    "unknown" is up: drivers without operstates (lo, tun) leave it so, and the kernel's
    own IFF_RUNNING takes it for up; netif_oper_up() in include/linux/netdevice.h.
    """
    return _OPERSTATES.get(text.strip(), NAN)


def parse_attribute(text: bytes) -> float:
    """The number in a file of sysfs; NaN where there is none, and for the -1 that means unknown."""
    number = integer(text.strip())
    return NAN if number is None else float(number)
