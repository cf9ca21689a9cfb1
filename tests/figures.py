"""A frame's figures as a reader of the output sees them."""

from __future__ import annotations

import math
from typing import Any

from agent.frame import Frame


def rows(frame: Frame, table_name: str) -> list[dict[str, Any]]:
    """The rows of a table, key labels first; None is unknown, counters are in their shown unit."""
    table = frame.tables[table_name]
    found = []
    for row in range(table.count):
        values: dict[str, Any] = dict(zip(table.spec.labels, table.labels[row], strict=True))
        for column in table.spec.columns:
            if column.name in table.spec.counter_index:
                index = table.spec.counter_index[column.name]
                count = int(table.counters[row, index])
                shown = count if column.per == 1 else count / column.per
                values[column.name] = None if table.unknown[row, index] else shown
            else:
                value = float(table.gauges[row, table.spec.gauge_index[column.name]])
                values[column.name] = None if math.isnan(value) else value
        found.append(values)
    return found


def only_row(frame: Frame, table_name: str) -> dict[str, Any]:
    """The row of a table that has one."""
    (row,) = rows(frame, table_name)
    return row


def rows_by(frame: Frame, table_name: str, label: str) -> dict[str, dict[str, Any]]:
    """The rows of a table by one of its key labels."""
    return {row[label]: row for row in rows(frame, table_name)}
