"""The alert rules of docs/tuning.md: promtool finds them good, each fires where it should, none on a healthy agent."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.engines.process import program
from tests.test_guides import alert_rules

LABELS = '{job="hostprobe", instance="web-1:9101"}'
FRAME = '{job="hostprobe", instance="web-1:9101", host="web-1", run="6f0c", version="0.1.0"}'
PROBE = '{job="hostprobe", instance="web-1:9101", probe="cpu"}'
SINK = '{job="hostprobe", instance="web-1:9101", sink="central"}'
MOUNT = '{job="hostprobe", instance="web-1:9101", mountpoint="/mnt", device="nas:/mnt", type="nfs4"}'
MINUTES = 90
INTERVAL_SECONDS = 10
LAST = MINUTES * 60 // INTERVAL_SECONDS

HEALTHY = {
    f"hostprobe_frame_time_unix_seconds{FRAME}": f"0+{INTERVAL_SECONDS}x{LAST}",
    f"hostprobe_frame_interval_seconds{FRAME}": f"{INTERVAL_SECONDS}x{LAST}",
    f"hostprobe_agent_cycle_seconds{LABELS}": f"0.002x{LAST}",
    f"hostprobe_agent_missed_cycles_total{LABELS}": f"1x{LAST}",
    f"hostprobe_agent_throttle_ratio{LABELS}": f"0x{LAST}",
    f"hostprobe_agent_resident_bytes{LABELS}": f"36000000x{LAST}",
    f"hostprobe_agent_collector_runs_total{LABELS}": f"74x{LAST}",
    f"hostprobe_agent_cpu_seconds_total{LABELS}": f"0.3+0.002x{LAST}",
    f"hostprobe_agent_probe_up{PROBE}": f"1x{LAST}",
    f"hostprobe_agent_sink_dropped_frames_total{SINK}": f"7x{LAST}",
    f"hostprobe_agent_sink_ring_used_ratio{SINK}": f"0.02x{LAST}",
    f"hostprobe_agent_sink_circuit_open{SINK}": f"0x{LAST}",
    f"hostprobe_agent_sink_oldest_seconds{SINK}": f"{INTERVAL_SECONDS}x{LAST}",
    f"hostprobe_filesystem_stalled{MOUNT}": f"0x{LAST}",
}
"""Series of an agent with nothing to complain of, in promtool's notation: a value, a growth, how many more samples."""

ILL = {
    "HostprobeSilent": (f"hostprobe_frame_time_unix_seconds{FRAME}", f"0+{INTERVAL_SECONDS}x{LAST - 24}"),
    "HostprobeProbeFails": (f"hostprobe_agent_probe_up{PROBE}", f"0x{LAST}"),
    "HostprobeMissesCycles": (f"hostprobe_agent_missed_cycles_total{LABELS}", f"0+0.1x{LAST}"),
    "HostprobeSlow": (f"hostprobe_agent_cycle_seconds{LABELS}", f"6x{LAST}"),
    "HostprobeHoldsBack": (f"hostprobe_agent_throttle_ratio{LABELS}", f"0.5x{LAST}"),
    "HostprobeNearItsMemory": (f"hostprobe_agent_resident_bytes{LABELS}", f"95000000x{LAST}"),
    "HostprobeCollectsGarbage": (f"hostprobe_agent_collector_runs_total{LABELS}", f"74+1x{LAST}"),
    "HostprobeLosesFrames": (f"hostprobe_agent_sink_dropped_frames_total{SINK}", f"0+1x{LAST}"),
    "HostprobeRingFills": (f"hostprobe_agent_sink_ring_used_ratio{SINK}", f"0.7x{LAST}"),
    "HostprobePeerFails": (f"hostprobe_agent_sink_circuit_open{SINK}", f"1x{LAST}"),
    "HostprobeDeliversLate": (f"hostprobe_agent_sink_oldest_seconds{SINK}", f"600x{LAST}"),
    "HostprobeLeavesRowsOut": (
        'hostprobe_left_out_rows{job="hostprobe", instance="web-1:9101", table="network"}',
        f"3x{LAST}",
    ),
    "HostprobeMountHangs": (f"hostprobe_filesystem_stalled{MOUNT}", f"1x{LAST}"),
}
"""By alert: the series that makes it fire, alone among healthy ones."""


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "hostprobe.rules.yml"
    path.write_text(alert_rules())
    return path


def alerts() -> list[str]:
    return re.findall(r"^\s*- alert: (\S+)", alert_rules(), re.MULTILINE)


def promtool(*arguments: str | Path) -> tuple[int, str]:
    """Its status, and what it says."""
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


def firing(rules: Path, series: dict[str, str]) -> dict[str, str]:
    """What promtool has against each alert that is expected not to fire, by its name: those that fire are in it."""
    tests = [
        {"eval_time": f"{MINUTES}m", "alertname": name, "exp_alerts": []}
        for name in alerts()  # one wrong expectation each is reported
    ]
    test: dict[str, Any] = {
        "interval": f"{INTERVAL_SECONDS}s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": tests,
    }
    path = rules.with_name("test.yml")
    # JSON is YAML.
    path.write_text(json.dumps({"rule_files": [rules.name], "evaluation_interval": "1m", "tests": [test]}))
    status, said = promtool("test", "rules", path)
    found = dict(re.findall(r"alertname: ?(\w+),.*?(got:\[.*?\])$", said, re.MULTILINE | re.DOTALL))
    assert bool(found) == bool(status), said
    return found


def test_promtool_finds_the_rules_good(rules: Path) -> None:
    status, said = promtool("check", "rules", rules)
    assert status == 0, said
    assert f"{len(alerts())} rules found" in said


def test_promtool_can_tell(rules: Path) -> None:
    path = rules.with_name("wrong.yml")
    path.write_text(rules.read_text().replace("[10m]", "[10", 1))
    status, said = promtool("check", "rules", path)
    assert status == 1, said


def test_none_fires_on_a_healthy_agent(rules: Path) -> None:
    assert firing(rules, HEALTHY) == {}


def test_none_fires_after_a_restart(rules: Path) -> None:
    before, after = LAST - 101, 100
    restarted = {
        f"hostprobe_agent_collector_runs_total{LABELS}": f"80x{before} 74x{after}",
        f"hostprobe_agent_cpu_seconds_total{LABELS}": f"0.3+0.002x{before} 0.3+0.002x{after}",
        f"hostprobe_agent_sink_dropped_frames_total{SINK}": f"7x{before} 0x{after}",
    }
    assert firing(rules, HEALTHY | restarted) == {}


def test_every_alert_is_tried() -> None:
    assert sorted(ILL) == sorted(alerts())


@pytest.mark.parametrize("name", ILL)
def test_an_alert_fires_alone(name: str, rules: Path) -> None:
    series, values = ILL[name]
    assert set(firing(rules, HEALTHY | {series: values})) == {name}
