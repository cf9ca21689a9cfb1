"""From a file of another agent's to the text of a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from agent.importing import collectd, telegraf
from agent.importing.draft import Draft
from agent.importing.source import Kind, kind_of, read


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of it.

    Attributes:
        kind: whose configuration it was.
        text: a commented configuration, which loads.
        left_out: a line for each thing that was not carried over.
    """

    kind: Kind
    text: str
    left_out: tuple[str, ...]


def convert(path: str, kind: Kind | None = None) -> Imported:
    """Reads the configuration of another agent.

    Args:
        kind: whose it is; by what stands in it unless given.

    Raises:
        UsageError: it can't be read or understood, with the line to show.
    """
    text = read(path)
    kind = kind or kind_of(path, text)
    if kind == "telegraf":
        draft = Draft(telegraf.PRODUCT, path)
        telegraf.fill(draft, telegraf.parse(path, text))
    else:
        draft = Draft(collectd.PRODUCT, path)
        collectd.fill(draft, collectd.read(path, text, draft))
    written = draft.text()
    return Imported(kind, written, tuple(draft.left_out))
