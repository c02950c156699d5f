"""The rooms of distillery/ in their order: a room imports itself and the rooms before it, nothing imports a command."""

import ast
from pathlib import Path
from typing import get_args

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "distillery"
ROOMS = ["system", "config", "sources", "cache", "reading", "models", "losses", "teacher_cache", "precompute",
         "training", "evaluate", "report", "export"]  # fmt: skip
# rooms that answer --help and configuration errors in about a second, before anything slow is imported
LIGHT = ["system/errors", "system/signals", "system/machine", "system/files", "system/console", "config", "sources",
         "cache", "losses/registry", "teacher_cache/records", "precompute/worker", "precompute/loop",
         "precompute/pipeline", "precompute/estimate", "precompute/jobs", "evaluate/columns"]  # fmt: skip
SLOW = {"torch", "timm", "torchvision", "datasets", "sklearn", "matplotlib", "tensorboard"}


def imports_of(tree: ast.AST) -> list[str]:
    """Dotted names of all that is imported below a node."""
    nodes = list(ast.walk(tree))
    found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return found + [f"{n.module}.{alias.name}" for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_itself_and_the_rooms_before_it(room):
    assert not imports_of(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) - ({"precompute"} if room == "training" else set())
    for path in (PACKAGE / room).glob("[!_]*.py"):
        for name in imports_of(ast.parse(path.read_text())):
            if name.startswith("distillery."):
                assert name.split(".")[1] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("place", LIGHT)
def test_light_modules_import_nothing_slow_at_the_top(place):
    for path in [PACKAGE / f"{place}.py"] if "/" in place else (PACKAGE / place).glob("*.py"):
        body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = imports_of(ast.Module(body=body, type_ignores=[]))
        assert SLOW.isdisjoint(name.split(".")[0] for name in names), path


def test_every_folder_and_module_has_its_room():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] not in "_."} == set(ROOMS)


def test_what_the_configuration_offers_is_what_the_registries_have():
    from distillery.config.load import FILE_FORMATS
    from distillery.config.types import ModelSource
    from distillery.models.builders import BUILDERS
    from distillery.sources.registry import SOURCES

    assert set(FILE_FORMATS) == set(SOURCES) and set(get_args(ModelSource)) == set(BUILDERS)
