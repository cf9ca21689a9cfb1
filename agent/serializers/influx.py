"""InfluxDB's line protocol: `disk_io,host=web-1,device=vda reads_total=12i,utilization_ratio=0.5 1795217867123456789`.

A row is a line; whole numbers have the suffix `i`, and what has no place in 64 bits with a sign is left out, as is what
is unknown. The frame's own figures are the measurement `frame`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from agent.serializers.rows import Rows, expression, tuple_of
from agent.serializers.series import Block, Group, SeriesSerializer, by_row, plain, told_apart
from agent.table import Labels, Table, TableSpec


class InfluxSerializer(SeriesSerializer):
    """Writes frames as line protocol; the tags are the host, those of the configuration and the key labels."""

    stamp = b" \0"

    def time(self, time_unix_ns: int) -> bytes:
        return b" %d" % time_unix_ns

    def block(self, spec: TableSpec) -> Block:
        columns = [column for column in spec.columns if self._rates or not column.derived]

        def result(guarded: bool) -> str:
            return tuple_of([expression(spec, column, only_int64=True, guarded=guarded) for column in columns])

        rows = Rows(result)
        fields = [(f"{column.name}=".encode(), b"i" if column.integral else b"") for column in columns]

        def values(table: Table, previous: Table | None) -> list[float | None]:
            return by_row(rows.of(table))

        def groups(labels: Sequence[Labels]) -> Iterable[Group]:
            lines = []
            for row in labels:
                tags = {**self._identity.tags, "host": self._identity.host}
                tags |= {name: plain(value) for name, value in zip(spec.labels, row, strict=True)}
                shown = {escaped(name): escaped(value) for name, value in tags.items() if name and value}
                lines.append((spec.name, *(f"{name}={value}" for name, value in shown.items())))
            for line, repeat in zip(lines, told_apart(lines), strict=True):
                texts = [*line, *(f"{name}={value}" for name, value in repeat.items())]
                yield Group(f"{','.join(texts)} ".encode(), fields, b",", self.stamp + b"\n")

        return Block(values, groups)


def escaped(text: str) -> str:
    """A tag's name or value: the protocol's own characters escaped, others that no line can hold replaced by `?`.

    So is a backslash before one of those characters, or at the end: receivers don't agree on what it means there.
    """
    text = re.sub(r"[\0-\x1f\x7f]|\\(?=[,= ]|\Z)", "?", text)
    return re.sub("([,= ])", r"\\\1", text)
