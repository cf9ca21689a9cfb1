"""collectd's `Include`: what it names is read, as far as it is there."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from fnmatch import fnmatch

from agent.importing.collectd_syntax import Item, parse
from agent.importing.draft import Draft
from agent.importing.source import read

_LEVELS_MAX = 8  # collectd's own
_FILES_MAX = 256


class Includes:
    """Follows the statements `Include`, and tells those that lead nowhere."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._files = 0

    def expanded(self, items: list[Item], level: int = 1) -> Iterator[Item]:
        """The items with those of included files in place of the `Include`.

        Raises:
            UsageError: an included file is damaged.
        """
        for item in items:
            if item.key.lower() != "include":
                yield item
                continue
            paths = self._paths(item)
            if not paths:
                self._leave_out(item, "there is no such file that can be read here")
            for path in paths:
                if level >= _LEVELS_MAX or self._files >= _FILES_MAX:
                    self._leave_out(item, f"more than {_LEVELS_MAX} levels, or {_FILES_MAX} files")
                    break
                self._files += 1
                yield from self.expanded(parse(path, read(path)), level + 1)

    def _paths(self, item: Item) -> list[str]:
        patterns = [child.name for child in item.items if child.key.lower() == "filter"]
        found: list[str] = []
        for path in sorted(glob.glob(item.name)) if "\0" not in item.name else ():
            if os.path.isdir(path):
                below = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
                found += sorted(each for each in below if _is_wanted(each, patterns))
            elif _is_wanted(path, patterns):
                found.append(path)
        return [path for path in found[: _FILES_MAX + 1] if os.access(path, os.R_OK)]

    def _leave_out(self, item: Item, why: str) -> None:
        self._draft.leave_out(self._draft.inputs, f"Include {item.name!r}", why)


def _is_wanted(path: str, patterns: list[str]) -> bool:
    return os.path.isfile(path) and (not patterns or any(fnmatch(os.path.basename(path), each) for each in patterns))
