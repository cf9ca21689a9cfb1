"""Layers of settings: a template, a file, the environment, the command line; and how to name a place in them.

A layer is a tree of plain values. Later ones are merged over earlier ones, table by table; an error names
the last layer that sets its key.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any

import msgspec

from agent.errors import UsageError

_VARIABLE_PREFIX = "HOSTPROBE__"
DROP_INS = "conf.d"
RENAMED: dict[tuple[str, ...], tuple[tuple[str, ...], str]] = {}
"""Keys by their former name: the present one, and the last version that takes the former. None has been renamed yet."""

Tree = dict[str, Any]


class Layer(msgspec.Struct, frozen=True):
    """One source of settings, and how to name it in a message."""

    where: str
    tree: Tree


def read_toml(path: str) -> Tree:
    """A TOML file as a tree.

    Raises:
        UsageError: it can't be read, or is no TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.loads(file.read().decode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "a configuration file that can be read") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8", "a TOML file") from None
    except ValueError as error:  # besides tomllib's own error: a number of more digits than Python reads
        raise UsageError(f"{path}: {error}", "valid TOML") from None


def demand_file(path: str) -> None:
    """Raises a UsageError where there is something else than a regular file, which may have no end; "" is none."""
    try:
        is_file = not path or stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # whoever reads it says why
        return
    if not is_file:
        raise UsageError(f"{path}: is no regular file", "a configuration file that can be read again")


def drop_ins(path: str) -> list[str]:
    """The files of `conf.d` beside a configuration file that end in .toml, in the order of their names.

    Raises:
        UsageError: the directory is there and can't be read.
    """
    folder = os.path.join(os.path.dirname(path), DROP_INS)
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}", "a directory that can be read") from None
    files = [os.path.join(folder, name) for name in names if name.endswith(".toml") and not name.startswith(".")]
    for file in files:
        demand_file(file)
    return files


def renamed(layers: Iterable[Layer]) -> tuple[str, ...]:
    """Moves what stands under a key's former name to its present one, and says so, a line for each.

    Raises:
        UsageError: a layer has both.
    """
    notices = []
    for layer in layers:
        for former, (present, until) in RENAMED.items():
            old, new = (reduce(_within, path[:-1], layer.tree) for path in (former, present))
            if not isinstance(old, dict) or former[-1] not in old:
                continue
            names = ".".join(former), ".".join(present)
            if isinstance(new, dict) and present[-1] in new:
                raise UsageError(f"{layer.where}: {names[0]} and {names[1]}", f"{names[1]} alone, its present name")
            tree = layer.tree
            for key in present[:-1]:
                tree = tree.setdefault(key, {})
            tree[present[-1]] = old.pop(former[-1])
            notices.append(f"{layer.where}: {names[0]} is {names[1]} now; its former name is taken until {until}")
    return tuple(notices)


def _within(tree: Any, key: str) -> Any:
    return tree.get(key) if isinstance(tree, dict) else None


def merge(into: Tree, tree: Tree) -> None:
    """Merges a tree into another, table by table; where both have a value, the new one stands."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            merge(into[key], value)
        else:
            into[key] = value


def environment_layers(environment: Mapping[str, str]) -> Iterable[Layer]:
    """`HOSTPROBE__AGENT__INTERVAL=1s` as a layer; a value is TOML where it is valid TOML, else text."""
    for name in sorted(environment):
        if not name.startswith(_VARIABLE_PREFIX):
            continue
        *path, key = name.removeprefix(_VARIABLE_PREFIX).lower().split("__")
        value: Any = environment[name]
        if path[:2] != ["agent", "tags"]:
            with suppress(ValueError):
                parsed = tomllib.loads(f"value = {value}")
                value = parsed["value"] if len(parsed) == 1 else value
        tree: Tree = {key: value}
        for part in reversed(path):
            tree = {part: tree}
        yield Layer(f"${name}", tree)


def error_at(layers: Sequence[Layer], path: tuple[str, ...], value: Any, expected: str) -> UsageError:
    """A mistake: where it stands, its key, its value (None: not shown) and what was expected."""
    keys = (key if re.fullmatch(r"[\w-]+", key) else shown(key) for key in path)
    equals = "" if value is None else f" = {shown(value)}"
    return UsageError(f"{where(layers, path)}{'.'.join(keys)}{equals}", expected)


def where(layers: Sequence[Layer], path: tuple[str, ...]) -> str:
    """The last layer that sets the key, or the table that it would stand in."""
    for length in range(len(path), 0, -1):
        for layer in reversed(layers):
            tree: Any = layer.tree
            for key in path[:length]:
                tree = tree.get(key) if isinstance(tree, dict) else None
            if tree is not None:
                return f"{layer.where}: "
    return ""


def shown(value: Any) -> str:
    """A value as a message shows it, shortened where it is long."""
    if isinstance(value, float):
        return str(value)  # nan and inf too
    try:
        text = msgspec.json.encode(value, enc_hook=str).decode()
    except ValueError:  # bytes from the environment that are not UTF-8; a number of thousands of digits
        text = ascii(value) if isinstance(value, str) else "(too long to show)"
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_of(known: Iterable[str], name: Any) -> str:
    """What was expected, and first the known name that is nearest to what was given."""
    from difflib import get_close_matches

    known = list(known)
    near = get_close_matches(str(name), known, n=1)
    choices = " ".join(known)
    return f"{near[0]!r}, or another of {choices}" if near else f"one of {choices}"
