"""Selections of devices, mount points and interfaces, as the probes' include, exclude and exclude_types."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from agent.importing.draft import Block, Draft
from agent.importing.patterns import Patterns, UnlikeError
from probes.filesystem import FilesystemSettings

_WIDER_SHOWN_MAX = 3
_SIZED_TYPES = ("devtmpfs", "overlay", "squashfs", "tmpfs")
"""Of the types that hostprobe leaves out, those with a size: other agents tell them unless told not to."""


def keep_all(draft: Draft, block: Block, origin: str) -> None:
    """Drops the template's exclusions: where nothing is selected, the other agent tells every device."""
    draft.put(block, "exclude", [], origin, "as there: every device")


def select(
    draft: Draft, block: Block, key: str, names: Iterable[str], origin: str, patterns: Callable[[str], Patterns]
) -> None:
    """Adds to `include` or `exclude` what the names select; those that no pattern is like are told.

    Args:
        patterns: makes a name of the other agent's one of shell patterns.
    """
    before = list(block.settings.get(key, ()))
    texts = dict.fromkeys(before)
    wider = []
    for name in names:
        try:
            found = patterns(name)
        except UnlikeError:
            draft.leave_out(block, f"{origin} {name!r}", "no shell patterns select the same")
            continue
        texts.update(dict.fromkeys(found.texts))
        if not found.exact:
            wider.append(name)
    if len(texts) > len(before):
        why = f"a little wider than {' '.join(wider[:_WIDER_SHOWN_MAX])}" if wider else ""
        draft.put(block, key, list(texts), origin, why)


def select_types(draft: Draft, block: Block, ignored: Iterable[str], origin: str) -> None:
    """Sets `exclude_types` to what the other agent ignores, and to what has no size."""
    ignored = dict.fromkeys(ignored)
    default = FilesystemSettings().exclude_types
    types = dict.fromkeys(name for name in default if name not in _SIZED_TYPES or name in ignored) | ignored
    if tuple(types) != default:
        draft.put(block, "exclude_types", list(types), origin)
