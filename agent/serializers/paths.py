"""Dotted paths of metrics: `hostprobe.web-1.disk_io.vda.reads_total`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from agent.serializers.series import plain
from agent.table import Labels, TableSpec

PREFIX = "hostprobe"


def node(text: str) -> str:
    """A text as one node of a path: what separates nodes or ends a name becomes `_`; empty, it is `_` too."""
    return re.sub(r"[^\w-]", "_", text, flags=re.ASCII) or "_"


def row_paths(spec: TableSpec, host: str, labels: Sequence[Labels]) -> list[str]:
    """The path of each row, up to the dot before the column; rows that would have the same are numbered from 2."""
    numbers: dict[str, int] = {}  # of each path that is taken, the last one behind it
    paths: list[str] = []
    for row in labels:
        path = free = ".".join([PREFIX, node(host), spec.name, *(node(plain(value)) for value in row)])
        while free in numbers:  # a row's own path may be another's with its number
            numbers[path] += 1
            free = f"{path}-{numbers[path]}"
        numbers[free] = 1
        paths.append(f"{free}.")
    return paths
