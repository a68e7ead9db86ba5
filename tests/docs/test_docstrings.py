"""Public functions over tensors say their shapes: in the name, as ``x_TH``, or in the docstring, as ``[T, H]``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("adapters", "bank", "engine", "evaluation", "model", "moe", "training")
MODULES = sorted(
    path
    for folder in (*(ROOT / "meteora_dist" / name for name in FOLDERS), ROOT / "kernels" / "meteora_kernels")
    for path in folder.rglob("*.py")
    if path.name != "kernel.py"
)
SUFFIX = re.compile(r".*_[A-Z0-9]+$")
SHAPE = re.compile(r"\[[^\]]*\]|shape|scalar|_[A-Z]{1,4}\b")


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Public functions and methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield "", node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield ast.get_docstring(node) or "", inner


def nameless(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for around, function in functions(tree):
        text = around + (ast.get_docstring(function) or "")
        for argument in (*function.args.args, *function.args.kwonlyargs):
            kind = ast.unparse(argument.annotation) if argument.annotation else ""
            if kind in ("Tensor", "Tensor | None", "torch.Tensor") and not SUFFIX.match(argument.arg):
                described = re.search(rf"{argument.arg}: [^:]*", text)
                if not SHAPE.search(described[0] if described else text):
                    yield f"{path.relative_to(ROOT)}: {function.name}({argument.arg})"


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=lambda path: path.name)
def test_shapes_are_said(folder: Path) -> None:
    assert [fault for path in MODULES if path.parent == folder for fault in nameless(path)] == []
