"""The house rules that a program can check: sizes, names, the direction of imports, tests and docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
LINES_MAX = 400
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "base", "manager", "misc"}
UNDER_TABLE = {"agent.errors", "agent.pool"}
OPEN_TO_PROBES = UNDER_TABLE | {"agent.frame", "agent.table", "agent.units"}
STOREYS = (
    ("agent.table",),
    ("agent.arena",),
    ("agent.rates",),
    ("agent.frame",),
    ("agent.delivery",),
    ("agent.ring_records",),
    ("agent.ring_file", "agent.ring_memory"),
    ("probes", "agent.serializers", "agent.ring"),
    ("agent.ring_recovery",),
    ("agent.sinks",),
    ("agent.sink_worker",),
    ("agent.exporter",),
    ("agent.cycle",),
    ("agent.bench", "agent.daemon", "agent.importing"),
    ("agent.service",),
    ("agent.commands",),
)
"""From the ground up: a room imports from those below it, and from itself."""
WITHOUT_OWN_TEST = {"__init__", "probe", "socket_tables"}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = sorted(path for package in ("agent", "probes") for path in (REPOSITORY / package).rglob("*.py"))
TREES = {module_name(path): ast.parse(path.read_bytes()) for path in PATHS}


def imports(module: str) -> Iterator[str]:
    """The modules of agent and probes that a module imports, inside functions too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in TREES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in TREES:
                    yield submodule
                elif node.module in TREES:
                    yield str(node.module)


IMPORTS = {module: set(imports(module)) - {module} for module in TREES}


def room_of(module: str) -> tuple[int, str] | None:
    """The storey and the room where a module stands; None for the rooms that have no fixed place."""
    for storey, rooms in enumerate(STOREYS):
        for room in rooms:
            if module == room or module.startswith(f"{room}."):
                return storey, room
    return None


@pytest.mark.parametrize("path", PATHS, ids=module_name)
def test_file_is_short_and_named_for_its_subject(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES_MAX
    assert path.stem.strip("_") not in VAGUE_NAMES


@pytest.mark.parametrize("module", ["agent.table", "agent.pool"])
def test_ground_floor_stands_on_its_own(module: str) -> None:
    assert IMPORTS[module] <= UNDER_TABLE


@pytest.mark.parametrize("module", [name for name in TREES if name.startswith("probes")])
def test_probe_knows_the_frame_and_not_the_agent(module: str) -> None:
    assert {name for name in IMPORTS[module] if not name.startswith("probes")} <= OPEN_TO_PROBES


@pytest.mark.parametrize("module", [name for name in TREES if room_of(name)])
def test_imports_point_downwards(module: str) -> None:
    here = room_of(module)
    assert here is not None
    for imported in IMPORTS[module]:
        there = room_of(imported)
        assert there is None or there == here or there[0] < here[0], f"{module} imports {imported}"


def test_every_room_is_there() -> None:
    assert {room_of(name) for name in TREES} - {None} == {
        (storey, room) for storey, rooms in enumerate(STOREYS) for room in rooms
    }


def test_no_import_circles() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("name", [path.stem for path in PATHS if path.parent.name == "probes"])
def test_probe_module_has_a_test_module(name: str) -> None:
    assert name in WITHOUT_OWN_TEST or (REPOSITORY / "tests" / "probes" / f"test_{name}.py").is_file()


@pytest.mark.parametrize("module", list(TREES))
def test_public_names_have_docstrings(module: str) -> None:
    tree = TREES[module]
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
