"""What tests of the import share: a text imported, and the configuration that it becomes, loaded."""

from __future__ import annotations

from pathlib import Path

from agent import config
from agent.config import Config
from agent.importing.conversion import Imported, convert
from agent.importing.source import Kind

FOLDER = Path(__file__).parent
FIXTURES = {kind: FOLDER / f"{kind}.conf" for kind in ("telegraf", "collectd")}


class Result:
    """An imported text.

    Attributes:
        config: what the printed configuration loads as.
        left_out: by what, why it was not carried over.
    """

    def __init__(self, folder: Path, text: str, kind: Kind | None = None) -> None:
        source = folder / "source.conf"
        source.write_text(text)
        self.imported: Imported = convert(str(source), kind)
        self.text = self.imported.text
        self.config = loaded(folder, self.text)
        parts = (line.removeprefix("not carried over: ").partition(": ") for line in self.imported.left_out)
        self.left_out = {what: why for what, _, why in parts}


def loaded(folder: Path, text: str) -> Config:
    """The configuration in a text, as the agent loads it."""
    path = folder / "hostprobe.toml"
    path.write_text(text)
    return config.load(str(path), environment={})
