"""Telegraf's configuration: the agent's settings, the inputs of the host, and what becomes of the outputs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from agent.errors import UsageError
from agent.importing import devices
from agent.importing.draft import Draft, SinkDraft, rest
from agent.importing.inputs import HOST_ONLY, Input, carry_over, count_tcp
from agent.importing.options import Options, Tree, each
from agent.importing.patterns import Patterns, from_go, literal
from agent.importing.telegraf_outputs import OUTPUTS

PRODUCT = "Telegraf"
SECTIONS = ("global_tags", "tags", "agent", "inputs", "outputs", "processors", "aggregators", "secretstores")
_BARE_VARIABLE = re.compile(r"(?m)^([ \t]*[\w.-]+[ \t]*=[ \t]*)(\$\{[^}\n\"]*\}|\$[A-Za-z_]\w*)([ \t]*(?:#.*)?)$")

_TAGS_MAX = 64
_WHOLE_TABLES = "hostprobe fills whole tables; a sink's `tables` chooses among them"
_PACE = "frames are sent as they come; a sink's batch.linger holds them together"
REASONS = {
    **each(
        "namepass namedrop pass drop fieldpass fieldinclude fielddrop fieldexclude tagpass tagdrop taginclude"
        " tagexclude metricpass",
        _WHOLE_TABLES,
    ),
    **each("name_override name_prefix name_suffix", "the names of tables are fixed"),
    **each("flush_interval flush_jitter", _PACE),
    **each("metric_buffer_limit metric_batch_size", "a sink's buffer.size and batch count bytes"),
    **each("collection_jitter collection_offset", "all hosts collect at once, or with align = false"),
    "insecure_skip_verify": "the peer is always verified",
    "tags": "tags are those of the agent, on every frame",
    "ignore_mount_opts": "mounts are chosen by mount point and type",
    "device_tags": "rows have the kernel's names only",
    "name_templates": "rows have the kernel's names only",
    "tls_key_pwd": "a private key without a password is expected",
    "logfile": "hostprobe logs to stderr",
    "precision": "frames have nanoseconds",
    "omit_hostname": "a frame always says of which host it is",
}
"""Why a setting was not carried over, where there is more to say than that there is none like it."""


def parse(path: str, text: str) -> Tree:
    """The text as tables; variables without quotes, which TOML doesn't know, become texts.

    Raises:
        UsageError: it is no TOML, or has nothing of Telegraf's.
    """
    try:
        tree = tomllib.loads(_BARE_VARIABLE.sub(r'\1"\2"\3', text))
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply", "tables and lists a few levels deep") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}", "valid TOML") from None
    if not any(section in tree for section in SECTIONS):
        raise UsageError(f"{path}: no section of Telegraf's in it", "[agent], [[inputs.NAME]] or [[outputs.NAME]]")
    return tree


def fill(draft: Draft, tree: Tree) -> None:
    """Puts all that can be carried over into the draft."""
    for section, value in tree.items():
        if section not in SECTIONS:
            draft.leave_out(draft.inputs, section, "no section of Telegraf's that hostprobe knows")
        elif not isinstance(value, dict):
            draft.leave_out(draft.inputs, section, "expected a table")
    _fill_agent(draft, Options("agent", _table(tree, "agent"), has_variables=True))
    for section in ("global_tags", "tags"):
        for name, value in _table(tree, section).items():
            _fill_tag(draft, name, Options(section, {name: value}, has_variables=True))
    seen: set[str] = set()
    for name, options in _plugins(draft, tree, "inputs"):
        source = INPUTS.get(name)
        if source is None:
            draft.leave_out(draft.inputs, options.place, _NOT_COLLECTED.get(name, HOST_ONLY))
        elif name in seen:
            draft.leave_out(draft.inputs, options.place, "hostprobe has each probe once, the first one's settings hold")
        else:
            seen.add(name)
            options.drop("alias", "log_level", "startup_error_behavior")
            carry_over(draft, source, options, REASONS)
    for name, options in _plugins(draft, tree, "outputs"):
        _add_sinks(draft, name, options)
    for section, why in _NO_SECTION.items():
        for _, options in _plugins(draft, tree, section):
            draft.leave_out(draft.outputs, options.place, why)


def _table(tree: Tree, section: str) -> Tree:
    value = tree.get(section)
    return value if isinstance(value, dict) else {}


def _plugins(draft: Draft, tree: Tree, section: str) -> Iterator[tuple[str, Options]]:
    """Each plugin of a section by its name; `[[inputs.cpu]]` and `[inputs.cpu]` mean the same."""
    for name, value in _table(tree, section).items():
        tables = value if isinstance(value, list) else [value]
        for number, table in enumerate(tables, 1):
            place = f"{section}.{name}" + (f" ({number})" if len(tables) > 1 else "")
            if isinstance(table, dict):
                yield name, Options(place, table, has_variables=True)
            else:
                draft.leave_out(draft.inputs, place, "expected a table")


def _fill_agent(draft: Draft, options: Options) -> None:
    if interval := options.duration("interval"):
        draft.put(draft.agent, "interval", interval, "agent.interval")
    if "round_interval" in options:
        draft.put(draft.agent, "align", options.flag("round_interval", True), "agent.round_interval")
    if hostname := options.text("hostname"):
        draft.put(draft.agent, "hostname", hostname, "agent.hostname")
    levels = {"debug": "debug", "quiet": "error"}
    for key, level in levels.items():
        if options.flag(key, False):
            draft.put(draft.log, "level", level, f"agent.{key}")
    if options.text("logformat") in ("structured", "json"):
        draft.put(draft.log, "format", "json", "agent.logformat")
    options.drop("logtarget")
    draft.leave_out_rest(draft.agent, options, REASONS)


def _fill_tag(draft: Draft, name: str, options: Options) -> None:
    if len(draft.tags.settings) >= _TAGS_MAX:
        draft.leave_out(draft.tags, options.place, f"more than {_TAGS_MAX} of them")
    elif text := options.text(name.lower()):
        draft.put(draft.tags, name, text, f"{options.place}.{name}")
    draft.leave_out_rest(draft.tags, options, REASONS)


def _add_sinks(draft: Draft, name: str, options: Options) -> None:
    convert = OUTPUTS.get(name)
    if convert is None:
        draft.leave_out(draft.outputs, options.place, "hostprobe has no sink for it")
        return
    options.drop("alias", "log_level", "startup_error_behavior")
    found: list[SinkDraft] = convert(options)
    lost = rest(options, REASONS)
    if found:
        found[0].left_out += lost
    for sink in found:
        draft.add_sink(sink)
    for what, why in [] if found else lost or [(options.place, "there is no address in it")]:
        draft.leave_out(draft.outputs, what, why)


def _fill_cpu(draft: Draft, options: Options) -> None:
    draft.put(draft.probes["cpu"], "per_core", options.flag("percpu", True), f"{options.place}.percpu")


def _fill_kernel(draft: Draft, options: Options) -> None:
    collect = options.texts("collect")
    if "psi" in collect:
        draft.turn_on("pressure", options.place)
    if "ksm" in collect:
        draft.leave_out(draft.probes["cpu"], f"{options.place}.collect", "same-page merging has no column")


def _fill_disk(draft: Draft, options: Options) -> None:
    block, place = draft.probes["filesystem"], options.place
    devices.select(draft, block, "include", options.texts("mount_points"), f"{place}.mount_points", _literally)
    ignored = options.texts("ignore_fs")
    _select_tags(draft, options, "filesystem", "path")
    if drop := options.table("tagdrop"):
        ignored += drop.texts("fstype")
        draft.leave_out_rest(block, drop, REASONS)
    devices.select_types(draft, block, ignored, f"{place}.ignore_fs")


def _fill_diskio(draft: Draft, options: Options) -> None:
    block, place = draft.probes["disk_io"], options.place
    devices.keep_all(draft, block, place)
    plain = []
    for name in options.texts("devices"):
        if "/" in name.removeprefix("/dev/"):
            draft.leave_out(block, f"{place}.devices {name!r}", "devices are chosen by the kernel's names")
        else:
            plain.append(name.removeprefix("/dev/"))
    devices.select(draft, block, "include", plain, f"{place}.devices", from_go)
    options.drop("skip_serial_number")
    _select_tags(draft, options, "disk_io", "name")


def _fill_net(draft: Draft, options: Options) -> None:
    block, place = draft.probes["network"], options.place
    names = options.texts("interfaces")
    devices.select(draft, block, "include", names, f"{place}.interfaces", from_go)
    if not names:
        draft.put(block, "exclude", ["lo"], place, "as there: no loopback unless it is named")
    _select_tags(draft, options, "network", "interface")
    if not options.flag("ignore_protocol_stats", False):
        draft.turn_on("sockets", place)
        count_tcp(draft, place, states=False)


def _fill_netstat(draft: Draft, options: Options) -> None:
    count_tcp(draft, options.place, states=True)


def _fill_nstat(draft: Draft, options: Options) -> None:
    count_tcp(draft, options.place, states=False)


def _select_tags(draft: Draft, options: Options, probe: str, tag: str) -> None:
    """Filters by the tag that is the row's name: `[inputs.net.tagdrop] interface = ["veth*"]`."""
    for key, setting in (("tagpass", "include"), ("tagdrop", "exclude")):
        table = options.table(key)
        if table is None:
            continue
        devices.select(draft, draft.probes[probe], setting, table.texts(tag), f"{table.place}.{tag}", from_go)
        options.put_back(key, table)


def _literally(name: str) -> Patterns:
    return Patterns([literal(name)])


INPUTS = {
    "cpu": Input(("cpu",), harmless=("totalcpu", "collect_cpu_time", "report_active"), fill=_fill_cpu),
    "mem": Input(("memory",), lacks="active, inactive, mapped, page tables and vmalloc have no column"),
    "swap": Input(("memory",)),
    "system": Input(("host", "load"), lacks="users that are logged in are not counted"),
    "kernel": Input(("cpu", "host"), lacks="entropy has no column", fill=_fill_kernel),
    "kernel_vmstat": Input(("memory",), lacks="only paging, swapping, faults and OOM kills have columns"),
    "disk": Input(("filesystem",), fill=_fill_disk),
    "diskio": Input(("disk_io",), lacks="serial numbers are not collected", fill=_fill_diskio),
    "net": Input(("network",), lacks="the counters of ICMP, IP and UDP-Lite have no column", fill=_fill_net),
    "netstat": Input(("sockets",), lacks="sockets of no state (tcp_none) are not counted", fill=_fill_netstat),
    "nstat": Input(("sockets",), lacks="only the counters of the tables tcp and udp have columns", fill=_fill_nstat),
    "processes": Input(("load",), lacks="processes are not counted by state; load has tasks that run or are blocked"),
    "interrupts": Input(("cpu",), lacks="interrupts have one sum, cpu.interrupts_total"),
    "internal": Input(("agent",), lacks="the tables agent, agent_probe and agent_sink have figures of their own"),
}
"""The inputs that hostprobe has something of."""

_NOT_COLLECTED = {
    **each("procstat linux_cpu temp sensors smart hddtemp ipmi_sensor", "it has no column"),
    **each("conntrack ethtool bond mdstat zfs bcache wireless iptables cgroup", "it has no column"),
    **each("statsd socket_listener http_listener_v2 opentelemetry", "hostprobe takes in no metrics"),
    **each("exec execd tail file", "hostprobe runs and reads nothing of others; write a probe"),
}
_NO_SECTION: dict[str, Any] = {
    "processors": "hostprobe sends what the kernel says; change it where it is stored",
    "aggregators": "hostprobe sends what the kernel says; sum it up where it is stored",
    "secretstores": "secrets are in files, variables or credentials of systemd",
}
