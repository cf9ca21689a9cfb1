"""The JSON Schema of one line, derived from the tables' declarations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from agent.serializers.document import DEGRADED, SCHEMA, key_of
from agent.table import COUNTER_MAX, Column, Kind, TableSpec


def line_schema(specs: Iterable[TableSpec]) -> dict[str, Any]:
    """JSON Schema (2020-12) that every line validates against.

    A table may be absent (its probe is off, not due, or failed); columns that are read
    are always there, null where unknown; derived ones are absent with `rates = false`,
    optional ones where no setting asks for them.
    """
    header: dict[str, Any] = {
        "schema": {"const": SCHEMA, "description": "The version of this layout."},
        "host": {"type": "string", "description": "The host's name."},
        "instance": {"type": "string", "description": "New at each start of the agent."},
        "sequence": {"type": "integer", "minimum": 1, "description": "By one a frame, from 1, within an instance."},
        "time": {
            "type": "string",
            "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z$",
            "description": "When the cycle began: RFC 3339, nanoseconds, UTC.",
        },
        "time_unix_ns": {"type": "integer", "description": "The same in nanoseconds since 1970."},
        "interval_seconds": {
            "type": ["number", "null"],
            "exclusiveMinimum": 0,
            "description": "Since the frame before, by the monotonic clock; null at the first.",
        },
        "tags": {"type": "object", "additionalProperties": {"type": "string"}, "description": "As configured."},
    }
    degraded = {
        "type": "array",
        "items": {"type": "string"},
        "minItems": 1,
        "description": "Tables that were left out because the sink's ring filled up; absent when none.",
    }
    tables: dict[str, Any] = {}
    for spec in specs:
        tables[key_of(spec)] = _table(spec)
        if spec.labels:
            tables[f"{key_of(spec)}_rows_dropped"] = {
                "type": "integer",
                "minimum": 1,
                "description": f"Rows of {spec.name} that the row limit left out; absent when none.",
            }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "One line of hostprobe",
        "type": "object",
        "properties": header | {DEGRADED: degraded} | tables,
        "required": list(header),
        "additionalProperties": False,
    }


def _table(spec: TableSpec) -> dict[str, Any]:
    labels = {name: {"type": ["string", "null"] if name in spec.optional else "string"} for name in spec.labels}
    always = [column.name for column in spec.columns if not column.derived]
    row: dict[str, Any] = {
        "type": "object",
        "properties": labels | {column.name: _column(column) for column in spec.columns},
        "required": [name for name in (*spec.labels, *always) if name not in spec.optional],
        "additionalProperties": False,
    }
    if not spec.labels:
        return {"description": spec.help, **row}
    return {"description": spec.help, "type": "array", "items": row}


def _column(column: Column) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": ["integer" if column.integral else "number", "null"],
        "description": f"{column.help} Unit: {column.unit}.",
    }
    if column.kind is Kind.COUNTER:
        schema["minimum"] = 0
        if column.integral:
            schema["maximum"] = COUNTER_MAX
    elif column.unit == "ratio":
        schema |= {"minimum": 0, "maximum": 1}
    return schema
