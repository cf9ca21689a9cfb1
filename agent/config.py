"""Configuration: TOML from a template, a file, the environment and the command line, typed and checked.

Layers are merged table by table, a later one over an earlier one; unset is not false.
Every mistake is one line that says where it stands, its key, its value and what was expected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

import templates
from agent import discovery
from agent.errors import UsageError
from agent.layers import Layer, Tree, environment_layers, error_at, merge, one_of, read_toml, shown, where
from agent.sinks.secret import SecretSettings
from agent.sinks.sink import SinkSettings
from agent.units import LONGEST_INTERVAL, Duration, Size
from probes.probe import ProbeSettings
from probes.procfs import Source
from templates import TEMPLATES

DEFAULT_TEMPLATE = "standard"
DEFAULT_FILE = "/etc/hostprobe/hostprobe.toml"
FILE_VARIABLE = "HOSTPROBE_CONFIG"
_SECTIONS = ("template", "agent", "log", "probes", "sinks")
_SHORTEST_INTERVAL = Duration(0.001)

S = TypeVar("S")


class AgentSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The section [agent].

    Attributes:
        max_memory: resident, without rings in files; above, the agent lengthens its interval.
        max_cpu_ratio: of one core; likewise.
        priorities: of tables, by name, where they are to have another than declared.
    """

    interval: Duration = Duration(10)
    align: bool = True
    hostname: str = ""
    rates: bool = True
    root: str = "/"
    source: Source = "auto"
    shutdown_timeout: Duration = Duration(5)
    max_memory: Size = Size(100_000_000)
    max_cpu_ratio: Annotated[float, msgspec.Meta(gt=0)] = 0.25
    priorities: dict[str, Literal["low", "normal", "high"]] = {}
    tags: dict[str, str] = {}

    def __post_init__(self) -> None:
        if not _SHORTEST_INTERVAL <= self.interval <= LONGEST_INTERVAL:
            raise ValueError(f"interval: a duration from {_SHORTEST_INTERVAL} to {LONGEST_INTERVAL}")


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The section [log]."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A checked configuration.

    Attributes:
        where: the file that it comes from, or "" without one.
        layers: what it was made from; a mistake that shows up later names one of them.
        probes: settings of the enabled probes, in the order of collection.
        sinks: settings of the enabled sinks.
    """

    where: str
    layers: tuple[Layer, ...]
    template: str
    agent: AgentSettings
    log: LogSettings
    probes: dict[str, ProbeSettings]
    sinks: dict[str, SinkSettings]

    def place(self, *path: str) -> str:
        """A key for a message, and before it the layer that has set it last."""
        return f"{where(self.layers, path)}{'.'.join(path)}"

    def every(self, probe: str) -> int:
        """At how many of the agent's intervals a probe is collected once."""
        interval = self.probes[probe].interval
        return 1 if interval is None else round(interval.ns / self.agent.interval.ns)


def load(
    file: str | None = None,
    template: str | None = None,
    overrides: Mapping[str, Tree] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Reads, merges and checks the configuration.

    Args:
        file: as `--config` names it; else the environment's, else the system's, else none.
        template: as `--template` names it; else the file's own, else the standard one.
        overrides: settings from the command line, by the flag that gave them.
        environment: os.environ unless given.

    Raises:
        UsageError: something is wrong, with the line to show.
    """
    environment = os.environ if environment is None else environment
    path = _file(file, environment)
    try:
        return _load(path, template, overrides or {}, environment)
    except RecursionError:
        raise UsageError(f"{path or 'environment'}: nested too deeply", "tables and lists a few levels deep") from None


def _load(path: str, template: str | None, overrides: Mapping[str, Tree], environment: Mapping[str, str]) -> Config:
    layers = [Layer(path, read_toml(path))] if path else []
    layers += environment_layers(environment)
    layers += [Layer(flag, tree) for flag, tree in overrides.items()]
    if template is not None:
        layers.append(Layer("--template", {"template": template}))
    name = DEFAULT_TEMPLATE
    for layer in layers:
        if "template" in layer.tree:
            name = layer.tree["template"]
            check_template(name, f"{layer.where}: ")
    layers.insert(0, Layer(f"template {name}", read_toml(template_path(name))))
    return _check(layers, path, name)


def _file(file: str | None, environment: Mapping[str, str]) -> str:
    """The configuration file to read, "" for none. One that is there and can't be read is not passed over."""
    if file is not None:
        if not file:
            raise UsageError('--config: ""', "a configuration file")
        return file
    if environment.get(FILE_VARIABLE):
        return environment[FILE_VARIABLE]
    try:
        os.stat(DEFAULT_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError:
        pass
    return DEFAULT_FILE


def check_template(name: Any, place: str) -> None:
    """Raises a UsageError that begins with `place` if there is no template of this name."""
    if name not in TEMPLATES:
        raise UsageError(f"{place}template = {shown(name)}", one_of(TEMPLATES, name))


def template_path(name: str) -> str:
    """Where the template stands: the file that is loaded is the one that `sample-config` prints."""
    return os.path.join(templates.__path__[0], f"{name}.toml")


def _check(layers: list[Layer], path: str, template: str) -> Config:
    tree: Tree = {"agent": {}, "log": {}, "probes": {}, "sinks": {}}
    for layer in layers:
        _check_sections(layer)
        if layer.where == path:  # a file's sink replaces the template's whole
            for name in layer.tree.get("sinks", ()):
                tree["sinks"].pop(name, None)
        merge(tree, layer.tree)
    _check_texts(layers, tree, ())
    agent = _convert(layers, tree["agent"], AgentSettings, ("agent",))
    probes = _check_probes(layers, tree["probes"], agent)
    sinks = _check_sinks(layers, tree["sinks"])
    _check_tables(layers, probes, agent, sinks)
    return Config(
        where=path,
        layers=tuple(layers),
        template=template,
        agent=agent,
        log=_convert(layers, tree["log"], LogSettings, ("log",)),
        probes=probes,
        sinks=sinks,
    )


def _check_sections(layer: Layer) -> None:
    """Checks what a merge would hide: that a layer's sections are known and are tables."""
    for key, section in layer.tree.items():
        if key not in _SECTIONS:
            raise error_at([layer], (key,), section, one_of(_SECTIONS, key))
        if key == "template":
            continue
        if not isinstance(section, dict):
            raise error_at([layer], (key,), section, "a table")
        for name, part in section.items() if key in ("probes", "sinks") else ():
            if not isinstance(part, dict):
                raise error_at([layer], (key, name), part, "a table")


def _check_texts(layers: list[Layer], value: Any, path: tuple[str, ...]) -> None:
    """No file name and no line of output can hold a NUL, or bytes from the environment that are not UTF-8."""
    if not all(_is_plain(text) for text in (value, *path[-1:]) if isinstance(text, str)):
        raise error_at(layers, path, value, "text in UTF-8 without NUL")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_texts(layers, item, (*path, key))
    elif isinstance(value, list):
        for item in value:
            _check_texts(layers, item, path)


def _is_plain(text: str) -> bool:
    return "\0" not in text and text == text.encode(errors="replace").decode()


def _check_probes(layers: list[Layer], sections: Tree, agent: AgentSettings) -> dict[str, ProbeSettings]:
    probes: dict[str, ProbeSettings] = {}
    for name, section in sections.items():
        probe = discovery.load("probes", name)
        if probe is None:
            raise error_at(layers, ("probes", name), None, one_of(discovery.names("probes"), name))
        settings: ProbeSettings = _convert(layers, section, probe.Settings, ("probes", name))
        interval = settings.interval
        if interval is not None and (interval.ns == 0 or interval.ns % agent.interval.ns):
            expected = f"a multiple of agent.interval, which is {agent.interval}"
            raise error_at(layers, ("probes", name, "interval"), section["interval"], expected)
        if settings.enabled:
            probes[name] = settings
    ours = [name for name in discovery.PROBES if name in probes]
    others = [name for name in probes if name not in discovery.PROBES]
    last = [ours.pop()] if "agent" in ours else []
    return {name: probes[name] for name in (*ours, *others, *last)}


def _check_sinks(layers: list[Layer], sections: Tree) -> dict[str, SinkSettings]:
    sinks: dict[str, SinkSettings] = {}
    files: set[str] = set()
    for name, section in sections.items():
        kind = section.get("type", "stdout")
        sink = discovery.load("sinks", kind) if isinstance(kind, str) else None
        if sink is None:
            raise error_at(layers, ("sinks", name, "type"), kind, one_of(discovery.names("sinks"), kind))
        settings: SinkSettings = _convert(layers, section, sink.Settings, ("sinks", name))
        if not settings.enabled:
            continue
        for key, path in _owned(settings).items():
            if os.path.realpath(path) in files:
                expected = "an address of its own" if key == ("address",) else "a file that nothing else is written to"
                raise error_at(layers, ("sinks", name, *key), path, expected)
            files.add(os.path.realpath(path))
        sinks[name] = settings
    if not sinks:
        raise UsageError(
            f"{where(layers, ('sinks',))}sinks: none is enabled", "at least one enabled sink, such as [sinks.main]"
        )
    return sinks


def _owned(settings: SinkSettings) -> dict[tuple[str, ...], str]:
    """What a sink must have for itself, by its key: a file that two rotate, or an address that two listen on."""
    files: dict[tuple[str, ...], str] = {}
    if settings.buffer.path:
        files["buffer", "path"] = settings.buffer.path
    if settings.type == "file":
        files[("path",)] = str(getattr(settings, "path", ""))
    if settings.type == "prometheus":
        files[("address",)] = str(getattr(settings, "address", ""))
    return files


def _check_tables(
    layers: list[Layer], probes: Mapping[str, Any], agent: AgentSettings, sinks: Mapping[str, SinkSettings]
) -> None:
    """Checks that every table that a setting names is filled by an enabled probe."""
    classes: list[Any] = [discovery.load("probes", name) for name in probes]
    known = [spec.name for probe in classes for spec in probe.tables]
    named = [(("sinks", name, "tables"), settings.tables) for name, settings in sinks.items()]
    for place, tables in ((("agent", "priorities"), tuple(agent.priorities)), *named):
        for table in tables:
            if table not in known:
                raise error_at(layers, place, table, one_of(known, table))


def _convert(layers: list[Layer], section: Any, kind: type[S], path: tuple[str, ...]) -> S:
    """A section as its settings; a UsageError that names the place inside it where that is wrong."""
    try:
        return msgspec.convert(section, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        inner, value, expected = _explain(str(error), section, kind)
        raise error_at(layers, path + inner, value, expected) from None


def _explain(text: str, section: Any, kind: Any) -> tuple[tuple[str, ...], Any, str]:
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
        msgspec.convert(value, kind, dec_hook=_decode)
    except msgspec.ValidationError:
        return False
    return True


def _decode(kind: type[Any], value: Any) -> Any:
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
