"""Configuration: TOML from a template, a file, the environment and the command line, typed and checked.

Layers are merged table by table, a later one over an earlier one; unset is not false.
Every mistake is one line that says where it stands, its key, its value and what was expected.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

import templates
from agent import discovery
from agent.errors import UsageError
from agent.layers import (
    Layer,
    Tree,
    drop_ins,
    environment_layers,
    error_at,
    merge,
    one_of,
    read_toml,
    renamed,
    shown,
    where,
)
from agent.mistakes import decode, explain
from agent.sinks.sink import SinkSettings, owned
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
        control_socket: where `hostprobe service status` asks how the agent does; "" for `control.sock` in the service
            manager's $RUNTIME_DIRECTORY, and for none without one.
    """

    interval: Duration = Duration(10)
    align: bool = True
    hostname: str = ""
    rates: bool = True
    root: str = "/"
    source: Source = "auto"
    shutdown_timeout: Duration = Duration(5)
    max_memory: Size = Size(100_000_000)
    control_socket: str = ""
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
        notices: what whoever wrote it should know, a line each.
        layers: what it was made from; a mistake that shows up later names one of them.
        probes: settings of the enabled probes, in the order of collection.
        sinks: settings of the enabled sinks.
    """

    where: str = ""
    notices: tuple[str, ...] = ()
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
    layers += [Layer(file, read_toml(file)) for file in drop_ins(path)] if path else []
    files = [layer.where for layer in layers]
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
    notices = renamed(layers)
    return msgspec.structs.replace(_check(layers, files, name), where=path, notices=notices)


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


def _check(layers: list[Layer], files: Collection[str], template: str) -> Config:
    tree: Tree = {"agent": {}, "log": {}, "probes": {}, "sinks": {}}
    named: set[str] = set()
    for layer in layers:
        _check_sections(layer)
        if layer.where in files:  # a file's sink replaces the template's whole
            for name in set(layer.tree.get("sinks", ())) - named:
                tree["sinks"].pop(name, None)
                named.add(name)
        merge(tree, layer.tree)
    _check_texts(layers, tree, ())
    agent = _convert(layers, tree["agent"], AgentSettings, ("agent",))
    probes = _check_probes(layers, tree["probes"], agent)
    sinks = _check_sinks(layers, tree["sinks"])
    _check_tables(layers, probes, agent, sinks)
    return Config(
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
        for key, path in owned(settings).items():
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
        return msgspec.convert(section, kind, dec_hook=decode)
    except msgspec.ValidationError as error:
        inner, value, expected = explain(str(error), section, kind)
        raise error_at(layers, path + inner, value, expected) from None
