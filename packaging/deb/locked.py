"""Prints the pins of what the package brings: hostprobe's dependencies and those of its sinks, as the lock has them.

Runs in the environment of the Makefile, where all of them are installed: `python packaging/deb/locked.py > pins`.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).parents[1] / "requirements-dev.lock"
EXTRAS = ("http", "prometheus", "remote_write", "otlp", "kafka", "nats")
"""Those of sinks: a package can't be told to install an extra."""


def needed(name: str, extras: tuple[str, ...] = ()) -> set[str]:
    """The distributions that an installed one depends on, and theirs."""
    found = set()
    for text in requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            found |= {canonicalize_name(requirement.name)} | needed(requirement.name, tuple(requirement.extras))
    return found


def main() -> None:
    pins = {
        canonicalize_name(pin[1]): pin[0]
        for pin in re.finditer(r"^(\S+)==\S+(?: \\\n    --hash=\S+)+$", LOCK.read_text(), re.MULTILINE)
    }
    names = needed("hostprobe", EXTRAS)
    missing = names - pins.keys()
    if missing:
        sys.exit(f"packaging/deb: not in {LOCK.name}: {', '.join(sorted(missing))}; run `make lock`")
    print("\n".join(pins[name] for name in sorted(names)))


main()
