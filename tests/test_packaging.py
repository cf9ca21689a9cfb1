"""The wheel holds the program and nothing else; the lock files hold what it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import agent
from agent.discovery import SINKS

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("agent", "probes", "templates")
BUILD_NEEDS = ("pyproject.toml", "README.md", "LICENSE")
LOCKS = ("requirements.lock", "requirements-dev.lock")
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
DIST_INFO = f"hostprobe-{agent.__version__}.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    """The wheel, built from a copy, so that the repository gets no build/."""
    tree = tmp_path_factory.mktemp("tree")
    for package in (*PACKAGES, "tests"):
        shutil.copytree(REPOSITORY / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILD_NEEDS:
        shutil.copy(REPOSITORY / name, tree)
    target = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--check-build-dependencies", "--disable-pip-version-check")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", target, "."],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, f"{built.stdout}\n{built.stderr}"
    (path,) = target.iterdir()
    assert path.name == f"hostprobe-{agent.__version__}-py3-none-any.whl"
    with ZipFile(path) as file:
        yield file


@pytest.fixture(scope="module")
def metadata(wheel: ZipFile) -> Message:
    return Parser().parsestr(wheel.read(f"{DIST_INFO}/METADATA").decode())


def lock(name: str) -> dict[str, tuple[str, list[str]]]:
    """Every pinned distribution of a lock file, with its version and its hashes."""
    text = (REPOSITORY / "packaging" / name).read_text()
    pins = re.findall(r"^([a-z0-9-]+)==(\S+)((?: \\\n    --hash=\S+)+)$", text, re.MULTILINE)
    return {pin: (version, re.findall(r"--hash=(\S+)", hashes)) for pin, version, hashes in pins}


def requirements(*texts: str) -> list[Requirement]:
    return [Requirement(text) for text in texts]


RUNTIME = requirements(*PYPROJECT["project"]["dependencies"])
DEVELOPMENT = requirements(*PYPROJECT["dependency-groups"]["dev"], *PYPROJECT["build-system"]["requires"])
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def test_wheel_holds_every_module_and_template(wheel: ZipFile) -> None:
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for pattern in ("*.py", "*.toml")
        for path in (REPOSITORY / package).rglob(pattern)
    } | {f"agent/service/systemd/{name}" for name in ("hostprobe.service", "hostprobe.sysusers")}
    assert {f"templates/{name}.toml" for name in ("minimal", "standard", "full")} <= expected
    assert {name for name in wheel.namelist() if not name.startswith(DIST_INFO)} == expected


def test_wheel_has_the_unit_of_packaging(wheel: ZipFile) -> None:
    for name in ("hostprobe.service", "hostprobe.sysusers"):
        assert wheel.read(f"agent/service/systemd/{name}") == (REPOSITORY / "packaging/systemd" / name).read_bytes()


def test_wheel_brings_three_top_level_names_and_no_tests(wheel: ZipFile) -> None:
    assert {name.partition("/")[0] for name in wheel.namelist()} == {*PACKAGES, DIST_INFO}
    assert set(wheel.read(f"{DIST_INFO}/top_level.txt").decode().split()) == set(PACKAGES)
    assert not [name for name in wheel.namelist() if Path(name).name.startswith(("test_", "conftest"))]


def test_entry_point_is_the_command(wheel: ZipFile) -> None:
    lines = wheel.read(f"{DIST_INFO}/entry_points.txt").decode().split("\n")
    assert lines[:2] == ["[console_scripts]", "hostprobe = agent.__main__:main"]


def test_metadata(wheel: ZipFile, metadata: Message) -> None:
    assert metadata["Name"] == "hostprobe"
    assert metadata["Version"] == agent.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = metadata.get_all("Requires-Dist", [])
    assert requirements(*(line for line in needed if "extra ==" not in line)) == RUNTIME
    extras = {
        Requirement(f'{requirement}; extra == "{extra.replace("_", "-")}"')
        for extra, requirements in EXTRAS.items()
        for requirement in requirements
    }
    assert {Requirement(line) for line in needed if "extra ==" in line} == extras
    assert b"Apache License" in wheel.read(f"{DIST_INFO}/licenses/LICENSE")


def test_extras_are_of_sinks_and_tested() -> None:
    assert set(EXTRAS) <= set(SINKS) | {"bench"}
    tested = {requirement.name for requirement in DEVELOPMENT}
    assert {requirement.name for extra in EXTRAS.values() for requirement in requirements(*extra)} <= tested


@pytest.mark.parametrize("name", LOCKS)
@pytest.mark.parametrize("requirement", RUNTIME, ids=str)
def test_runtime_dependency_is_pinned_in_both_locks(requirement: Requirement, name: str) -> None:
    version, _ = lock(name)[requirement.name]
    assert requirement.specifier.contains(version)
    assert version == lock(LOCKS[0])[requirement.name][0]


@pytest.mark.parametrize("requirement", DEVELOPMENT, ids=str)
def test_development_dependency_is_pinned(requirement: Requirement) -> None:
    version, _ = lock("requirements-dev.lock")[requirement.name]
    assert requirement.specifier.contains(version)


@pytest.mark.parametrize("name", LOCKS)
def test_lock_holds_only_pins_hashes_and_comments(name: str) -> None:
    text = (REPOSITORY / "packaging" / name).read_text()
    pins = lock(name)
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert len(lines) == sum(1 + len(hashes) for _, hashes in pins.values())
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for _, hashes in pins.values() for value in hashes)
    assert "://" not in text
    assert not re.search(r"(?<!\w)/\w", text), "a path outside the repository"
