"""docs/internals.md names files that are there, and everything that hangs on a model."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "melinoe"
PAGE = (ROOT / "docs" / "internals.md").read_text()
SPANS = set(re.findall(r"`([^`\n]+)`", PAGE))


def test_every_path_is_there():
    paths = {span for span in SPANS if re.fullmatch(r"[a-z_]+/([a-z_]+/)*([a-z_0-9]+\.py)?", span)}
    assert len(paths) > 25
    assert not [path for path in sorted(paths) if not ((SOURCE / path).exists() or (ROOT / path).exists())]


def test_every_name_is_there():
    """A function or class that the page names exists somewhere in the package."""
    code = "\n".join(file.read_text() for file in SOURCE.rglob("*.py"))
    theirs = {"config._experts_implementation"}  # set by a method of transformers
    names = {span for span in SPANS if re.fullmatch(r"[A-Za-z_]*[a-z](\.[a-z_]+)?", span)}
    assert len(names) > 40
    assert not [
        name for name in sorted(names - theirs) if not re.search(rf"\b{name.rpartition('.')[2]}\b", code)
    ]


def assigned_from_outside(tree: ast.AST) -> set[str]:
    """Attributes that are written on something other than self, cls or a module's own name."""
    targets: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets.append(node.target)
        elif isinstance(node, ast.Delete):
            targets += node.targets
    flat = [part for one in targets for part in (one.elts if isinstance(one, ast.Tuple) else [one])]
    return {
        one.attr
        for one in flat
        if isinstance(one, ast.Attribute) and not (isinstance(one.value, ast.Name) and one.value.id == "self")
    }


@pytest.mark.parametrize(
    "room", ["runtime", "experts", "models", "adapters", "conversion", "losses", "paging"]
)
def test_every_attribute_that_hangs_on_a_model_is_listed(room):
    """Whatever begins with melinoe_ or an underscore, or is one of transformers' own that we replace."""
    found = {
        name
        for file in (SOURCE / room).rglob("*.py")
        for name in assigned_from_outside(ast.parse(file.read_text()))
    }
    hidden = {name for name in found if name.startswith(("melinoe_", "_")) or name in ("low_rank", "forward")}
    assert not sorted(hidden - {part for span in SPANS for part in re.findall(r"\w+", span)})


def test_files_that_comments_name_are_there():
    """So that a file that moves or goes takes its mentions along."""
    there = {
        file.name
        for folder in ("src", "tests", "tools", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
    }
    for file in SOURCE.rglob("*.py"):
        named = set(re.findall(r"\b\w+\.py\b", file.read_text()))
        assert named <= there, (file, named - there)
