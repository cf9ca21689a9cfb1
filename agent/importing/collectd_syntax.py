"""collectd's syntax: `Key value …`, `<Block value …>` … `</Block>`, comments from # to the line's end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from agent.errors import UsageError
from agent.layers import shown

Value = str | float | bool

_DEPTH_MAX = 32
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|[+-]?[0-9]*\.[0-9]+(?:[eE][+-]?[0-9]+)?|[+-]?[0-9]+")
_TOKEN = re.compile(
    r"""
    (?P<blank>[ \t\b\r]+|\#[^\n]*|\\\r?\n)
    |(?P<end>\n)
    |(?P<mark></|[<>])
    |"(?P<quoted>(?:[^"\\]|\\.)*)"
    |(?P<word>[0-9A-Za-z_.:+\[\]-]+)
    """,
    re.VERBOSE | re.DOTALL,
)
_KEY = re.compile(r"[0-9A-Za-z_]+")
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(slots=True)
class Item:
    """A statement: a key with values, or a block, which has items inside as well."""

    key: str
    values: tuple[Value, ...]
    line: int
    is_block: bool = False
    items: list[Item] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first value as text, "" without one."""
        return text_of(self.values[0]) if self.values else ""


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


def text_of(value: Value) -> str:
    """A value as it was written."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def parse(path: str, text: str) -> list[Item]:
    """The statements of a file, in order.

    Raises:
        UsageError: the syntax is wrong; it names the line.
    """
    top: list[Item] = []
    open_blocks: list[Item] = []
    for tokens in _lines(path, text):
        item, closes = _statement(path, tokens)
        if closes:
            if not open_blocks:
                _fail(path, item.line, f"</{_short(item.key)}>", "no end of a block that was not begun")
            block = open_blocks.pop()
            if block.key.lower() != item.key.lower():
                begun = f"</{_short(block.key)}>, of the block that begins in line {block.line}"
                _fail(path, item.line, f"</{_short(item.key)}>", begun)
            continue
        (open_blocks[-1].items if open_blocks else top).append(item)
        if item.is_block:
            open_blocks.append(item)
            if len(open_blocks) > _DEPTH_MAX:
                _fail(path, item.line, "nested too deeply", "blocks a few levels deep")
    if open_blocks:
        block = open_blocks[-1]
        _fail(path, block.line, f"<{_short(block.key)}> has no end", f"</{_short(block.key)}>")
    return top


def _lines(path: str, text: str) -> Iterator[list[_Token]]:
    """The tokens of each statement, at least one."""
    found: list[_Token] = []
    line, at = 1, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            if text[at] == '"':
                _fail(path, line, "a quote without its end", '"')
            expected = "a key, a value or a comment; other values than words and numbers in quotes"
            _fail(path, line, shown(text[at]), expected)
        kind = match.lastgroup or ""
        if kind == "end":
            if found:
                yield found
            found = []
        elif kind != "blank":
            found.append(_Token(kind, match[kind], line))
        line += match[0].count("\n")
        at = match.end()
    if found:
        yield found


def _statement(path: str, tokens: list[_Token]) -> tuple[Item, bool]:
    """The item of a line, and whether it ends a block."""
    first = tokens[0]
    if first.kind != "mark":
        item = Item(_key(path, first), tuple(_value(path, token) for token in tokens[1:]), first.line)
        if not item.values:
            _fail(path, first.line, f"{_short(item.key)} has no value", "a value")
        return item, False
    if first.text == ">" or len(tokens) < 2:
        _fail(path, first.line, shown(first.text), "a key")
    last = tokens[-1]
    if last.text != ">" or last.kind != "mark":
        _fail(path, first.line, f"{first.text}{_short(tokens[1].text)} has no end", '">"')
    item = Item(_key(path, tokens[1]), tuple(_value(path, token) for token in tokens[2:-1]), first.line, is_block=True)
    if first.text == "</" and item.values:
        _fail(path, first.line, f"</{_short(item.key)} …>", f"</{_short(item.key)}>")
    return item, first.text == "</"


def _key(path: str, token: _Token) -> str:
    is_name = token.kind == "word" and _KEY.fullmatch(token.text)
    if not is_name or token.text in _FLAGS or _NUMBER.fullmatch(token.text):
        # What is in quotes may be a secret that has slipped to the start of a line.
        what = shown(token.text) if token.kind == "word" else "a text in quotes"
        _fail(path, token.line, what, "a key of letters, digits and _")
    return token.text


def _value(path: str, token: _Token) -> Value:
    if token.kind == "mark":
        _fail(path, token.line, shown(token.text), "a value, or the end of the line")
    if token.kind == "quoted":
        # A string that is wrapped goes on behind the blanks of its next line.
        return re.sub(r"\\(.)", r"\1", re.sub(r"\\\r?\n[ \t]*", "", token.text), flags=re.DOTALL)
    if token.text in _FLAGS:
        return _FLAGS[token.text]
    if not _NUMBER.fullmatch(token.text) or len(token.text) > 40:
        return token.text
    if token.text[:2] in ("0x", "0X"):
        return float(int(token.text, 16))
    return float(token.text)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"


def _fail(path: str, line: int, what: str, expected: str) -> NoReturn:
    raise UsageError(f"{path}: line {line}: {what}", expected)
