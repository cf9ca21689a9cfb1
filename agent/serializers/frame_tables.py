"""What a JSON line has in its header and beside its tables, as tables for formats that know only series."""

from __future__ import annotations

from collections.abc import Collection

from agent import __version__
from agent.frame import Frame
from agent.serializers.document import Identity
from agent.table import Table, TableSpec, gauge

FRAME = TableSpec(
    "frame",
    "The frame itself, in formats without a header.",
    gauge("sequence", "frames", "By one a frame, from 1, within a run."),
    gauge("time_unix_seconds", "seconds", "When the cycle began, since 1970."),
    gauge("interval_seconds", "seconds", "Since the frame before, by the monotonic clock."),
    gauge("degraded_tables", "tables", "Tables that were left out because the sink's ring filled up."),
    labels=("host", "instance", "version"),
    rows=1,
)
LEFT_OUT = TableSpec(
    "left_out",
    "What the row limits left out, in formats without a header; absent where nothing.",
    gauge("rows", "rows", "Rows that are not there."),
    labels=("table",),
)
UNAME = TableSpec(
    "uname",
    "The kernel, as uname(2) names it; only with the names of node_exporter.",
    gauge("info", "boolean", "Always 1."),
    labels=("sysname", "release", "version", "machine", "nodename", "domainname"),
    rows=1,
)
FRAME_TABLES = (FRAME, LEFT_OUT, UNAME)


class FrameTables:
    """Puts these tables before those of a frame."""

    def __init__(self, identity: Identity, has_uname: bool = False) -> None:
        self._frame = Table(FRAME)
        self._frame.claim([(identity.host, identity.instance, __version__)])
        self._left_out = Table(LEFT_OUT)
        self._first = [self._frame]
        if has_uname and identity.uname:
            uname = Table(UNAME)
            uname.claim([identity.uname])
            uname.put_gauges(0, (1.0,))
            self._first.append(uname)

    def of(
        self, frame: Frame, tables: Collection[str], left_out: Collection[str], is_state: bool = False
    ) -> list[Table]:
        """The frame's tables and these; parameters as `JsonSerializer.write` has them.

        Args:
            is_state: also the last ones of the probes that weren't due.
        """
        held = frame.latest() if is_state else frame.tables
        wanted = [table for name, table in held.items() if name not in left_out and (not tables or name in tables)]
        figures = (frame.sequence, frame.time_unix_ns / 1e9, frame.interval_seconds, len(left_out))
        self._frame.put_gauges(0, figures)
        dropped = [(table.spec.name, table.dropped) for table in wanted if table.dropped]
        if not dropped:
            return [*self._first, *wanted]
        self._left_out.clear()
        self._left_out.claim([(name,) for name, _ in dropped])
        for row, (_, rows) in enumerate(dropped):
            self._left_out.put_gauges(row, (rows,))
        return [*self._first, *wanted, self._left_out]
