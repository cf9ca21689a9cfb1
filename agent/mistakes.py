"""What is wrong with a section of the configuration: the place in it, and what was expected there."""

from __future__ import annotations

import re
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from agent.layers import one_of
from agent.sinks.secret import SecretSettings
from agent.units import Duration, Size


def explain(text: str, section: Any, kind: Any) -> tuple[tuple[str, ...], Any, str]:
    """What msgspec's message says: the place inside the section, the value there, and what was expected."""
    found = re.fullmatch(r"(.*?)(?: - at `\$([^`]*)`)?", text, re.DOTALL)
    assert found is not None
    message, place = found[1], found[2] or ""
    path: tuple[str, ...] = ()
    may_be_secret, is_free = _has_secret(kind), False
    for key in re.findall(r"\.\.\.|[^.\[\]]+", place):
        if key == "...":  # in a table of free keys msgspec doesn't say which one
            kind = get_args(kind)[-1]
            key = next((name for name, item in section.items() if not _fits(item, kind)), key)
        else:
            kind = (
                get_type_hints(kind, include_extras=True).get(key)
                if _is_struct(kind)
                else next(iter(get_args(kind)), None)
            )
        kind = _without_none(kind)
        is_free |= get_origin(kind) is dict
        section = section[int(key)] if isinstance(section, list) else section.get(key)
        path += (key,)
    if may_be_secret and is_free:  # a header's value, say
        section = None
    for pattern, expected in (
        (r"(\w+)(?: = [^:]*)?: (?:expected )?(.*)", lambda match: match[2]),  # from a section's __post_init__
        (r"Object contains unknown field `(.*)`", lambda match: one_of(kind.__struct_fields__, match[1])),
        (r"Object missing required field `(.*)`", lambda match: "a value, it has no default"),
    ):
        if match := re.fullmatch(pattern, message, re.DOTALL):
            value = None if section is None else section.get(match[1])
            hint = get_type_hints(kind).get(match[1])
            hidden = _has_secret(kind) and (hint is None or get_origin(hint) is dict)
            return (*path, match[1]), None if hidden else value, expected(match)
    if _is_struct(kind):
        return path, None if _has_secret(kind) else section, "a table"
    choices = _choices(kind)
    if choices:
        return path, section, _number_or(kind) + one_of(choices, section)
    message = re.sub(r"^Expected (.*?)(, got .*)?$", r"\1", message)
    return path, section, re.sub(r"`(\w+)`", lambda match: _WORDS.get(match[1], match[1]), message)


_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "object": "a table",
    "str": "a text in quotes",
}


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind, dec_hook=decode)
    except msgspec.ValidationError:
        return False
    return True


def decode(kind: type[Any], value: Any) -> Any:
    """A setting of a type of its own, for msgspec."""
    if kind in (Duration, Size):
        return kind.parse(value)
    raise NotImplementedError(f"no settings of type {kind}")


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _without_none(kind: Any) -> Any:
    """What a setting is where it is there."""
    parts = [part for part in get_args(kind) if part is not NoneType]
    return parts[0] if get_origin(kind) in (Union, UnionType) and len(parts) == 1 else kind


def _has_secret(kind: Any) -> bool:
    """Whether somebody may have put a secret into this table, or in its place: no message shows what it is."""
    if not _is_struct(kind):
        return False
    return kind is SecretSettings or any(_has_secret(_without_none(hint)) for hint in get_type_hints(kind).values())


def _number_or(kind: Any) -> str:
    """What else than one of its choices a setting takes: "", or a whole number in its range."""
    for part in get_args(kind) if get_origin(kind) in (Union, UnionType) else ():
        if get_origin(part) is Annotated and get_args(part)[0] is int:
            meta = get_args(part)[1]
            return f"a whole number from {meta.ge} to {meta.le}, or "
    return ""


def _choices(kind: Any) -> list[str]:
    """The values of a setting that has a fixed set of them, else none."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(member.value) for member in kind]
    if get_origin(kind) in (Union, UnionType, Annotated):
        parts = get_args(kind)
        return [choice for part in parts for choice in (["true", "false"] if part is bool else _choices(part))]
    return [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
