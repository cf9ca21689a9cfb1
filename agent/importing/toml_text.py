"""Values as TOML, as a configuration file has them."""

from __future__ import annotations

import re
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_LINE_CHARACTERS_MAX = 116


def key_text(*path: str) -> str:
    """Keys with dots between them, in quotes where they need some."""
    return ".".join(key if _BARE_KEY.fullmatch(key) else _quoted(key) for key in path)


def value_text(value: Any) -> str:
    """A text, number, boolean, list or table of those, the table on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, dict):
        pairs = ", ".join(f"{key_text(key)} = {value_text(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value)


def setting_lines(key: str, value: Any, why: str = "") -> list[str]:
    """`key = value`, with a comment behind it; a list that is too long for a line has several."""
    start, comment = f"{key_text(key)} = ", f"  # {comment_text(why)}" if why else ""
    line = f"{start}{value_text(value)}{comment}"
    if len(line) <= _LINE_CHARACTERS_MAX or not isinstance(value, list | tuple):
        return [line]
    lines, row = [f"{start}[{comment}"], "   "
    for item in map(value_text, value):
        if len(row) > 4 and len(row) + len(item) + 2 > _LINE_CHARACTERS_MAX:
            lines.append(row)
            row = "   "
        row += f" {item},"
    return [*lines, row, "]"]


def comment_text(text: str) -> str:
    """One line that a comment can hold, whatever characters were in the text."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def _quoted(text: str) -> str:
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return f"\\u{ord(character):04x}" if character < " " or character == "\x7f" else character
