"""collectd's configuration: the daemon's settings, the plugins that read the host, and what becomes of the writers."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.errors import UsageError
from agent.importing import devices
from agent.importing.collectd_files import Includes
from agent.importing.collectd_outputs import WRITERS, options_of
from agent.importing.collectd_syntax import Item, parse
from agent.importing.draft import Block, Draft, rest
from agent.importing.inputs import HOST_ONLY, Input, carry_over, count_tcp
from agent.importing.options import Options, each
from agent.importing.patterns import from_ignorelist

PRODUCT = "collectd"

_DAEMON = "collectd's own"
_QUEUES = "a sink's buffer.size counts bytes"
REASONS = {
    **each("basedir pidfile plugindir typesdb readthreads writethreads timeout maxreadinterval", _DAEMON),
    **each("writequeuelimithigh writequeuelimitlow", _QUEUES),
    **each("precachechain postcachechain chain", "sinks take tables; filter where they are stored"),
    **each("valuespercentage storerates", "columns have both, as ratios and as they are"),
    "fqdnlookup": "the name is the system's, or agent.hostname",
    "reportrelative": "divide by cpu.logical_count",
    "reportbydevice": "a row has mount point, device and type; swap is told in sum",
    "flushinterval": "frames are sent as they come",
    "udevnameattr": "rows have the kernel's names only",
    "process": "processes have no table",
    "processmatch": "processes have no table",
    "localport": "connections are not counted by port; connections = true has a row for each",
    "remoteport": "connections are not counted by port; connections = true has a row for each",
    "listeningports": "connections are not counted by port; the table listening has a row for each port",
}
"""Why a setting was not carried over, where there is more to say than that there is none like it."""


@dataclass(slots=True)
class _Plugin:
    """A plugin, with the settings of all its blocks together."""

    name: str
    loaded: bool = False
    interval: str = ""
    items: list[Item] = field(default_factory=list)


def read(path: str, text: str, draft: Draft) -> list[Item]:
    """The statements, those of included files among them.

    Raises:
        UsageError: the syntax is wrong, or there is nothing of collectd's.
    """
    items = list(Includes(draft).expanded(parse(path, text)))
    if not any(item.key.lower() in _KNOWN_KEYS for item in items) and not draft.left_out:
        raise UsageError(f"{path}: no statement of collectd's in it", "LoadPlugin or <Plugin NAME>")
    return items


def fill(draft: Draft, items: list[Item]) -> None:
    """Puts all that can be carried over into the draft."""
    plugins: dict[str, _Plugin] = {}
    daemon: list[Item] = []
    for item in items:
        key = item.key.lower()
        if key not in ("loadplugin", "plugin"):
            daemon.append(item)
            continue
        name = item.name.lower()
        plugin = plugins.setdefault(name, _Plugin(item.name))
        if key == "plugin":
            plugin.items += item.items
        elif not plugin.loaded:  # collectd itself goes by the first one
            plugin.loaded = True
            _load(draft, plugin, item)
    loads_all = _fill_daemon(draft, options_of(PRODUCT, daemon))
    for name, plugin in plugins.items():
        if plugin.loaded or loads_all:
            _fill_plugin(draft, name, plugin)
        else:
            draft.leave_out(draft.inputs, f"Plugin {plugin.name}", "no LoadPlugin loads it, nor AutoLoadPlugin")


def _load(draft: Draft, plugin: _Plugin, item: Item) -> None:
    options = options_of(f"LoadPlugin {plugin.name}", item.items)
    plugin.interval = options.duration("interval")
    options.drop("globals")
    draft.leave_out_rest(draft.inputs, options, REASONS)


def _fill_daemon(draft: Draft, options: Options) -> bool:
    """Takes the settings of the daemon; returns whether a plugin's block loads it."""
    loads_all = options.flag("autoloadplugin", False)
    if interval := options.duration("interval"):
        draft.put(draft.agent, "interval", interval, "Interval")
    if hostname := options.text("hostname"):
        draft.put(draft.agent, "hostname", hostname, "Hostname")
    options.drop("collectinternalstats")  # the probe agent is always on
    for what, why in rest(options, REASONS):
        draft.leave_out(draft.agent, what.removeprefix(f"{PRODUCT}."), why)
    return loads_all


def _fill_plugin(draft: Draft, name: str, plugin: _Plugin) -> None:
    if name in WRITERS:
        left_out: list[tuple[str, str]] = []
        for sink in WRITERS[name](plugin.items, left_out):
            draft.add_sink(sink)
        for what, why in left_out:
            draft.leave_out(draft.outputs, what, why)
        return
    options = options_of(plugin.name, plugin.items)
    if name in _LOGS:
        level = options.text("loglevel").lower()
        if level:
            draft.put(draft.log, "level", _LEVELS.get(level, "info"), f"{plugin.name}.LogLevel")
        options.drop("file", "timestamp", "printseverity", "notifylevel")
    elif name in INPUTS:
        carry_over(draft, INPUTS[name], options, REASONS, plugin.interval)
    else:
        is_writer = name.startswith(("write_", "rrd"))
        why = "hostprobe has no sink for it" if is_writer else _NOT_COLLECTED.get(name, HOST_ONLY)
        draft.leave_out(draft.outputs if is_writer else draft.inputs, plugin.name, why)


def _fill_cpu(draft: Draft, options: Options) -> None:
    draft.put(draft.probes["cpu"], "per_core", options.flag("reportbycpu", True), f"{options.place}.ReportByCpu")


def _fill_df(draft: Draft, options: Options) -> None:
    block, place = draft.probes["filesystem"], options.place
    ignores = options.flag("ignoreselected", False)
    mounts, types = options.texts("mountpoint"), options.texts("fstype")
    for name in options.texts("device"):
        draft.leave_out(block, f"{place}.Device {name!r}", "mounts are chosen by mount point and type")
    key = "exclude" if ignores else "include"
    devices.select(draft, block, key, mounts, f"{place}.MountPoint", from_ignorelist)
    if types and not ignores:
        draft.leave_out(block, f"{place}.FSType", "types can be left out, not chosen: exclude_types")
    plain = [name for name in types if not name.startswith("/")] if ignores else []
    for name in types if ignores else ():
        if name not in plain:
            draft.leave_out(block, f"{place}.FSType {name!r}", "types are left out by name")
    devices.select_types(draft, block, plain, f"{place}.FSType")
    options.drop("reportinodes", "valuesabsolute", "logonce")


def _fill_disk(draft: Draft, options: Options) -> None:
    block = draft.probes["disk_io"]
    devices.keep_all(draft, block, options.place)
    _select(draft, block, options, "disk", f"{options.place}.Disk")


def _fill_interface(draft: Draft, options: Options) -> None:
    _select(draft, draft.probes["network"], options, "interface", f"{options.place}.Interface")
    if not options.flag("reportinactive", True):
        draft.leave_out(draft.probes["network"], f"{options.place}.ReportInactive", "idle interfaces have their row")
    options.drop("uniquename")


def _select(draft: Draft, block: Block, options: Options, key: str, origin: str) -> None:
    setting = "exclude" if options.flag("ignoreselected", False) else "include"
    devices.select(draft, block, setting, options.texts(key), origin, from_ignorelist)


def _fill_tcpconns(draft: Draft, options: Options) -> None:
    block = count_tcp(draft, options.place, states=True)
    if options.flag("listeningports", True):
        draft.put(block, "listening", True, options.place, "a row for each port, without its connections' states")
        draft.leave_out(block, options.place, REASONS["listeningports"])
    options.drop("allportssummary")


def _fill_protocols(draft: Draft, options: Options) -> None:
    count_tcp(draft, options.place, states=False)
    options.drop("value", "ignoreselected")


INPUTS = {
    "cpu": Input(
        ("cpu",),
        harmless=("reportbystate", "valuespercentage", "reportnumcpu", "reportgueststate", "subtractgueststate"),
        fill=_fill_cpu,
    ),
    "contextswitch": Input(("cpu",)),
    "df": Input(("filesystem",), harmless=("valuespercentage",), fill=_fill_df),
    "disk": Input(("disk_io",), harmless=("usebsdname",), fill=_fill_disk),
    "hugepages": Input(("memory",), lacks="only the pool of the default size has columns, not by node"),
    "interface": Input(("network",), fill=_fill_interface),
    "irq": Input(("cpu",), lacks="interrupts have one sum, cpu.interrupts_total"),
    "load": Input(("load",)),
    "memory": Input(("memory",), lacks="slab_unrecl has no column", harmless=("valuesabsolute", "valuespercentage")),
    "processes": Input(("load", "cpu"), lacks="processes are not counted by state; load has tasks that run or block"),
    "protocols": Input(("sockets",), lacks="only the counters of tcp and udp have columns", fill=_fill_protocols),
    "swap": Input(
        ("memory",),
        lacks="swap-cached has no column",
        harmless=("valuesabsolute", "valuespercentage", "reportbytes", "reportio"),
    ),
    "tcpconns": Input(("sockets",), fill=_fill_tcpconns),
    "uptime": Input(("host",)),
    "vmem": Input(
        ("memory",), lacks="only paging, swapping and faults have columns, no page numbers", harmless=("verbose",)
    ),
}
"""The plugins that hostprobe has something of."""

_LOGS = ("syslog", "logfile", "log_logstash")
_LEVELS = {"debug": "debug", "info": "info", "notice": "info", "warning": "warning", "err": "error"}
_NOT_COLLECTED = {
    **each(
        "users entropy conntrack cpufreq thermal sensors battery numa fhcount smart nfs md zfs_arc cgroups wireless"
        " ethstat ipvs iptables buddyinfo cpusleep ipstats hddtemp ipmi turbostat",
        "it has no column",
    ),
    **each("exec perl python java lua", "hostprobe runs nothing of others; write a probe"),
    **each("statsd email unixsock", "hostprobe takes in no metrics"),
    **each("threshold notify_email notify_desktop notify_nagios", "alert where it is stored"),
    **each("aggregation match_regex target_set", "change it where it is stored"),
}
_KNOWN_KEYS = {*REASONS, "loadplugin", "plugin", "interval", "hostname", "autoloadplugin", "collectinternalstats"}
