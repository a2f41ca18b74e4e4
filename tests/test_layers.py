"""The layers of docs/development.md: what each part of the package imports."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "ras_fast"
LAYERS = ("ops", "patching", "methods", "engine", "sequential", "vllm", "evaluation", "cli")  # from below
PARTS = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}


def names(tree: ast.Module) -> set[str]:
    """The modules that a file imports, wherever it does, in full."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def imported_by(part: str) -> frozenset[str]:
    """The parts of ras_fast, modules and packages, that one imports by itself."""
    files = [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").is_file() else [*(ROOT / part).rglob("*.py")]
    modules = [name.split(".") for path in files for name in names(ast.parse(path.read_text()))]
    return frozenset(parts[1] for parts in modules if parts[0] == "ras_fast" and len(parts) > 1) & PARTS - {part}


def reached_from(part: str) -> set[str]:
    """The parts that it imports, directly or through others."""
    found, waiting = set(), [part]
    while waiting:
        new = imported_by(waiting.pop()) - found
        found |= new
        waiting += new
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_from_those_below_alone(layer):
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert not reached_from(layer) & above
    assert layer == "ops" or reached_from(layer) & set(LAYERS[: LAYERS.index(layer)])  # the walk finds something
