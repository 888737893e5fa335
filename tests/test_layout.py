"""The order of the packages: what is further down may import what is further up, and nothing else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cka_probe

ROOT = Path(cka_probe.__file__).parent
ORDER = (
    "errors", "runtime", "images", "activations", "estimation", "measures", "networks", "results", "probing",
    "reports", "distill", "check", "cli", "__main__",
)  # fmt: skip


def imports() -> Iterator[tuple[str, str]]:
    """(module, module that it imports), those of the package by their paths in it, imports in functions too."""
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cka_probe."):
                yield name, str(node.module).removeprefix("cka_probe.")


def test_packages_import_what_stands_above_them_alone() -> None:
    place = {package: number for number, package in enumerate(ORDER)}
    wrong = [
        f"{module} imports {imported}"
        for module, imported in imports()
        if module != "__init__" and place[module.split(".")[0]] < place[imported.split(".")[0]]
    ]
    assert not wrong


def test_no_folder_holds_more_than_sixteen_modules() -> None:
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 16, folder
