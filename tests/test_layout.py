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


def test_no_module_imports_itself_through_others() -> None:
    """Imports in functions count, as they hide circles; those for types alone do not."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in _files()}
    imported: dict[str, set[str]] = {module: set() for module in modules}
    for path in _files():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for module, names in _runtime_imports(ast.parse(path.read_text())):
            imported[name] |= {f"{module}.{one}" if f"{module}.{one}" in modules else module for one in names} & modules
    for module in modules:
        reached, left = set[str](), [*imported[module]]
        while left:
            one = left.pop()
            if one not in reached:
                reached.add(one)
                left.extend(imported[one])
        assert module not in reached


def _files() -> list[Path]:
    return list(ROOT.rglob("*.py"))


def _runtime_imports(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """(module, names) of each import from the package that is not below ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("cka_probe."):
            yield str(child.module).removeprefix("cka_probe."), [alias.name for alias in child.names]
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from _runtime_imports(other)
        else:
            yield from _runtime_imports(child)
