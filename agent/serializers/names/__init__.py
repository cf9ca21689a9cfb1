"""What metrics are called: one file for each vocabulary."""

from __future__ import annotations

from importlib import import_module

from agent.serializers.families import Naming
from agent.serializers.formats import Names


def naming(names: Names) -> Naming:
    """The naming that a configuration calls so, imported now."""
    families: Naming = import_module(f"agent.serializers.names.{names}").families
    return families
