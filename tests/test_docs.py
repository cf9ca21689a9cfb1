"""The examples in the documents run, and their links lead somewhere."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from agent import config
from agent.frame import Frame
from probes.procfs import Host

ROOT = Path(__file__).parents[1]


def test_the_probe_of_the_architecture_page_collects() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    example = page[page.index("    from agent.frame import") : page.index("Name it in `agent/discovery.py`")]
    names: dict[str, Any] = {}
    exec(textwrap.dedent(example), names)
    frame = Frame([names["ENTROPY"]])
    frame.begin(1, 1)
    names["EntropyProbe"](names["ProbeSettings"](), Host()).collect(frame)
    bits = int(Path("/proc/sys/kernel/random/entropy_avail").read_text())
    assert frame.tables["entropy"].gauges.tolist() == [[bits]]


def test_the_configuration_of_the_readme_is_good(tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text()
    example = page[page.index('    template = "standard"') : page.index("`hostprobe sample-config standard`")]
    path = tmp_path / "hostprobe.toml"
    path.write_text(textwrap.dedent(example))
    loaded = config.load(str(path), environment={})
    assert loaded.agent.tags == {"env": "prod"}
    assert list(loaded.sinks) == ["main", "central"]
    assert loaded.every("filesystem") == 6


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target
