"""Shell patterns select what a glob of Go or a regular expression selects."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.importing.patterns import UnlikeError, from_go, from_ignorelist, from_regular_expression, literal
from probes.probe import NameFilter

NAMES = st.text("abdsv019.-_/[]*?!^", max_size=8)
PARTS = st.sampled_from(
    [
        *(
            "a",
            "b",
            "sd",
            "veth",
            "[ab]",
            "[^ab]",
            "[0-9]",
            "[!a]",
            "[^!a]",
            "[]a]",
            ".",
            ".*",
            ".+",
            r"\.",
            r"\/",
            r"\*",
            r"\[",
        ),
        *("(a|b)", "(sd|v)?", "a?", "[0-9]?", "-", "!"),
    ]
)
LOOSE = st.sampled_from(["[0-9]+", "a*", "(a|b)+", "[ab]*"])


@st.composite
def expressions(draw: st.DrawFn, parts: st.SearchStrategy[str] = PARTS) -> str:
    start, end = draw(st.sampled_from(["", "^"])), draw(st.sampled_from(["", "$"]))
    return start + "".join(draw(st.lists(parts, min_size=1, max_size=3))) + end


@settings(max_examples=400)
@given(expressions(), NAMES)
def test_patterns_select_what_the_expression_selects(expression: str, name: str) -> None:
    patterns = from_regular_expression(expression)
    assert patterns.exact
    assert NameFilter(patterns.texts).keeps(name) == (re.search(expression, name, re.DOTALL) is not None)


@settings(max_examples=200)
@given(expressions(st.one_of(PARTS, LOOSE)), NAMES)
def test_patterns_never_select_less(expression: str, name: str) -> None:
    patterns = from_regular_expression(expression)
    if re.search(expression, name, re.DOTALL):
        assert NameFilter(patterns.texts).keeps(name)


@given(NAMES, NAMES)
def test_a_literal_selects_itself_alone(name: str, other: str) -> None:
    assert NameFilter([literal(name)]).keeps(name)
    assert NameFilter([literal(name)]).keeps(other) == (name == other)


@pytest.mark.parametrize(
    ("expression", "texts", "exact"),
    [
        ("^veth", ["veth*"], True),
        ("^loop[0-9]+$", ["loop[0-9]*"], False),
        ("^[hs]d[a-f][0-9]?$", ["[hs]d[a-f]", "[hs]d[a-f][0-9]"], True),
        ("^(veth|docker)", ["veth*", "docker*"], True),
        ("tun", ["*tun*"], True),
        ("^lo$|^eth", ["lo", "eth*"], True),
    ],
)
def test_expressions_as_they_are_common(expression: str, texts: list[str], exact: bool) -> None:
    assert from_regular_expression(expression) == (texts, exact)


@pytest.mark.parametrize(
    "expression",
    [
        "[[:digit:]]",
        r"\d",
        "a{2}",
        "a^b",
        "(a",
        "a)",
        "[a",
        "*",
        "a**",
        r"a\\"[:2],
        "\0",
        "(" * 5000,
        "(a|b)" * 9,
        r"[\a]",
    ],
)
def test_expressions_that_no_pattern_is_like(expression: str) -> None:
    with pytest.raises(UnlikeError):
        from_regular_expression(expression)


@given(st.text("()|[]*+?{}^$\\.a-\0!", max_size=12))
def test_any_text_is_a_pattern_or_unlike_one(text: str) -> None:
    try:
        texts = from_regular_expression(text).texts
    except UnlikeError:
        return
    assert texts
    assert all(texts)
    assert NameFilter(texts).keeps("a") in (True, False)  # they are patterns that the agent takes


def test_ignorelists_have_names_and_expressions() -> None:
    assert from_ignorelist("/mnt/a*b").texts == ["/mnt/a[*]b"]
    assert from_ignorelist("/^sd/").texts == ["sd*"]
    assert from_ignorelist("/").texts == ["/"]


def test_globs_of_go_have_braces() -> None:
    assert from_go("eth*").texts == ["eth*"]
    assert from_go("{sd,vd}[a-c]{,1}").texts == ["sd[a-c]", "sd[a-c]1", "vd[a-c]", "vd[a-c]1"]
    for glob in ("{a", r"\*", "{a,b}" * 9):
        with pytest.raises(UnlikeError):
            from_go(glob)
