"""collectd's syntax: what it means, and one line with its number where it is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import UsageError
from agent.importing.collectd_syntax import Item, parse


def read(text: str) -> list[tuple[str, tuple[object, ...], list[object]]]:
    def plain(item: Item) -> tuple[str, tuple[object, ...], list[object]]:
        return item.key, item.values, [plain(child) for child in item.items]

    return [plain(item) for item in parse("c.conf", text)]


def test_values_have_types() -> None:
    text = 'Key word "two words" 10 0x1F -2.5 true No 127.0.0.1:80 ::1 # a comment\n'
    assert read(text)[0][1] == ("word", "two words", 10.0, 31.0, -2.5, True, "No", "127.0.0.1:80", "::1")


def test_quotes_hold_escapes_and_lines() -> None:
    assert read('Key "a \\"b\\" # c" "wr\\\n\t  apped"') == [("Key", ('a "b" # c', "wrapped"), [])]
    assert read("Key \\\n 1") == [("Key", (1.0,), [])]


def test_blocks_stand_in_blocks() -> None:
    text = '<Plugin "write_http">\n <Node one>\n  URL "http://h/"\n </node>\n</Plugin>\nInterval 10'
    url = ("URL", ("http://h/",), [])
    assert read(text) == [("Plugin", ("write_http",), [("Node", ("one",), [url])]), ("Interval", (10.0,), [])]


def test_lines_are_counted_through_wrapped_ones() -> None:
    items = parse("c.conf", '# one\nKey "a\\\nb" \\\n 2\n\nOther 1\n')
    assert [(item.key, item.line) for item in items] == [("Key", 2), ("Other", 6)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "Hostname a\n<Plugin cpu>\n</Plugi>",
            "line 3: </Plugi>: expected </Plugin>, of the block that begins in line 2",
        ),
        ("<Plugin a>\nKey 1\n", "line 1: <Plugin> has no end: expected </Plugin>"),
        ("\n</Plugin>", "line 2: </Plugin>: expected no end of a block that was not begun"),
        ('Key 1\nKey "a', 'line 2: a quote without its end: expected "'),
        ("<Plugin cpu\nKey 1", 'line 1: <Plugin has no end: expected ">"'),
        ("<", 'line 1: "<": expected a key'),
        ("> a", 'line 1: ">": expected a key'),
        ("Key", "line 1: Key has no value: expected a value"),
        ("Key a > b", 'line 1: ">": expected a value, or the end of the line'),
        ('"Key" a', "line 1: a text in quotes: expected a key of letters, digits and _"),
        ("10 a", 'line 1: "10": expected a key of letters, digits and _'),
        ("a-b c", 'line 1: "a-b": expected a key of letters, digits and _'),
        ("<a>\n</a b>", "line 2: </a …>: expected </a>"),
        ("Key a;b", 'line 1: ";": expected a key, a value or a comment; other values than words and numbers in quotes'),
        ("<a>\n" * 33, "line 33: nested too deeply: expected blocks a few levels deep"),
    ],
)
def test_mistakes_have_one_line(text: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse("c.conf", text)
    assert str(caught.value) == f"c.conf: {line}"


@settings(max_examples=300)
@given(st.text('<>/"\\#\n\t aKey10.x:-;é\0\x85', max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    line = refusal(text)
    assert "\n" not in line
    assert line.startswith("c.conf: line ") or not line


def refusal(text: str) -> str:
    """What is said against a text, "" where it is read."""
    try:
        parse("c.conf", text)
    except UsageError as error:
        return str(error)
    return ""
