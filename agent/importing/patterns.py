"""Names that another agent selects (globs of Go, regular expressions of POSIX) as hostprobe's shell patterns."""

from __future__ import annotations

import re
from typing import NamedTuple

_ALTERNATIVES_MAX = 64
_START, _END = "\0^", "\0$"
_SPECIAL = "*?["
_ANY, _ANYTHING = "?", "*"


class Patterns(NamedTuple):
    """Shell patterns that select what something else selected; `exact` unless they may select more."""

    texts: list[str]
    exact: bool = True


class UnlikeError(Exception):
    """There are no shell patterns for this."""


def literal(name: str) -> str:
    """The pattern that matches this name alone."""
    return "".join(f"[{character}]" if character in _SPECIAL else character for character in name)


def from_go(glob: str) -> Patterns:
    """A glob of Telegraf's: that of the shell, and `{one,other}` besides.

    Raises:
        UnlikeError: it can't be expressed.
    """
    match = re.search(r"\{([^{}]*)\}", glob)
    if match is None:
        if "{" in glob or "\\" in glob:
            raise UnlikeError
        return Patterns([glob])
    texts: list[str] = []
    for part in match[1].split(","):
        texts += from_go(f"{glob[: match.start()]}{part}{glob[match.end() :]}").texts
        if len(texts) > _ALTERNATIVES_MAX:
            raise UnlikeError
    return Patterns(texts)


def from_ignorelist(text: str) -> Patterns:
    """An item of a collectd ignorelist: a name, or a regular expression between slashes.

    Raises:
        UnlikeError: it can't be expressed.
    """
    if len(text) > 2 and text.startswith("/") and text.endswith("/"):
        return from_regular_expression(text[1:-1])
    return Patterns([literal(text)])


def from_regular_expression(text: str) -> Patterns:
    """A POSIX extended regular expression that is looked for anywhere in a name.

    Raises:
        UnlikeError: it can't be expressed.
    """
    reader = _Reader(text)
    try:
        alternatives = reader.alternatives()
    except RecursionError:
        raise UnlikeError from None
    if reader.rest:
        raise UnlikeError
    texts = []
    for alternative in alternatives:
        inner = alternative.removeprefix(_START).removesuffix(_END)
        if "\0" in inner:
            raise UnlikeError
        start = "" if alternative.startswith(_START) else _ANYTHING
        end = "" if alternative.endswith(_END) else _ANYTHING
        texts.append(re.sub(r"\*+", "*", f"{start}{inner}{end}") if "[" not in inner else f"{start}{inner}{end}")
    return Patterns(list(dict.fromkeys(texts)), reader.exact)


class _Reader:
    """Reads a regular expression from left to right; each part is a list of alternative patterns."""

    def __init__(self, text: str) -> None:
        self.rest = text
        self.exact = True

    def alternatives(self) -> list[str]:
        found = self._sequence()
        while self.rest.startswith("|"):
            self.rest = self.rest[1:]
            found += self._sequence()
        return _bounded(found)

    def _sequence(self) -> list[str]:
        found = [""]
        while self.rest and self.rest[0] not in "|)":
            part = self._repeated(self._atom())
            found = _bounded([before + after for before in found for after in part])
        return found

    def _atom(self) -> list[str]:
        character, self.rest = self.rest[0], self.rest[1:]
        if character == "^":
            return [_START]
        if character == "$":
            return [_END]
        if character == ".":
            return [_ANY]
        if character == "[":
            return [self._class()]
        if character == "(":
            found = self.alternatives()
            if not self.rest.startswith(")"):
                raise UnlikeError
            self.rest = self.rest[1:]
            return found
        if character == "\\":
            if not self.rest or self.rest[0].isalnum():
                raise UnlikeError
            character, self.rest = self.rest[0], self.rest[1:]
        elif character in "*+?{}":
            raise UnlikeError
        if character == "\0":
            raise UnlikeError
        return [literal(character)]

    def _class(self) -> str:
        match = re.match(r"(\^?)(\]?[^\]]*)\]", self.rest)
        if match is None or "[" in match[2] or "\\" in match[2] or "\0" in match[2] or not match[2]:
            raise UnlikeError  # [:alpha:] and its like
        self.rest = self.rest[match.end() :]
        inner = match[2]
        if inner.startswith("!"):
            inner = inner[1:] + "!"
        if match[1]:
            return f"[!{inner}]"
        return "[!]" if inner == "!" else f"[{inner}]"

    def _repeated(self, atom: list[str]) -> list[str]:
        sign = self.rest[:1]
        if not sign or sign not in "*+?{":
            return atom
        self.rest = self.rest[1:]
        if sign == "{" or (self.rest and self.rest[0] in "*+?{") or any("\0" in part for part in atom):
            raise UnlikeError
        if sign == "?":
            return ["", *atom]
        self.exact &= atom == [_ANY]
        return [_ANYTHING] if sign == "*" else [f"{part}{_ANYTHING}" for part in atom]


def _bounded(texts: list[str]) -> list[str]:
    if len(texts) > _ALTERNATIVES_MAX:
        raise UnlikeError
    return texts
