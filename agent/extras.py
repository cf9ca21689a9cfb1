"""What only one sink or format needs: packages that come with an extra, imported where they are configured."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from agent.errors import UsageError


def needed(module: str, extra: str, what: str) -> Any:
    """A module of an extra, imported now.

    Args:
        what: says who needs which package: "sinks of type http need urllib3".

    Raises:
        UsageError: it isn't installed; names the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UsageError(what, f'pip install "hostprobe[{extra}]"') from None
