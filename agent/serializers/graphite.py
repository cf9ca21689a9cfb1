"""Graphite's plaintext protocol: `hostprobe.web-1.disk_io.vda.reads_total 12 1795217867`.

The nodes of a path are the host, the table, the values of its key labels and the column; what a node can't hold is `_`.
What is unknown is left out, and so are the tags.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agent.serializers.frame_tables import FRAME
from agent.serializers.paths import row_paths
from agent.serializers.rows import Rows, expression, tuple_of
from agent.serializers.series import Block, Group, SeriesSerializer, by_row
from agent.table import Labels, Table, TableSpec


class GraphiteSerializer(SeriesSerializer):
    """Writes frames as lines of path, value and seconds since 1970."""

    stamp = b" \0"

    def time(self, time_unix_ns: int) -> bytes:
        return b" %d" % (time_unix_ns // 1_000_000_000)

    def block(self, spec: TableSpec) -> Block:
        columns = [column for column in spec.columns if self._rates or not column.derived]

        def result(guarded: bool) -> str:
            return tuple_of([expression(spec, column, guarded=guarded) for column in columns])

        rows = Rows(result)

        def values(table: Table, previous: Table | None) -> list[float | None]:
            return by_row(rows.of(table))

        def groups(labels: Sequence[Labels]) -> Iterable[Group]:
            # The frame's labels say nothing that the path hasn't, but for the run, which would be a new path each time.
            shown: Sequence[Labels] = [()] if spec is FRAME else labels
            for path in row_paths(spec, self._identity.host, shown):
                yield Group(b"", [(f"{path}{column.name} ".encode(), self.stamp + b"\n") for column in columns])

        return Block(values, groups)
