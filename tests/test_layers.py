"""The package's folders form layers: a module imports only from its own layer or from a lower one.

WORKSPACE.md states the order; this file reads it from there, so that the two cannot differ. Imports inside functions
and for type checkers count too.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxtml"


def stated(title: str) -> list[list[str]]:
    """Returns the layers in the block under a heading of WORKSPACE.md, from the ground up."""
    text = (ROOT / "WORKSPACE.md").read_text().split(f"## {title}\n")[1]
    block = " ".join(re.findall(r"^    (.*-> .+)$", text.split("\n## ")[0], re.MULTILINE))
    return [layer.split(", ") for layer in block.split(" -> ")]


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports, without the leading `jaxtml.`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxtml":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "jaxtml"}
    return {name.removeprefix("jaxtml").removeprefix(".") for name in found}


def climbing(layers: list[list[str]], folder: Path, prefix: str) -> list[str]:
    """The imports inside `folder` that lead from a layer to a higher one."""
    level = {name: i for i, names in enumerate(layers) for name in names}
    wrong = []
    for file in sorted(folder.rglob("*.py")):
        place = file.relative_to(folder).with_suffix("").parts[0]
        if place in ("__init__", "__main__"):
            continue
        assert place in level, f"{place} is in no layer that WORKSPACE.md states"
        for name in imported(file):
            if not name.startswith(prefix):
                continue
            target = name.removeprefix(prefix).split(".")[0]
            if target in level and level[target] > level[place]:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    return wrong


def test_no_folder_of_the_package_imports_upwards():
    assert not climbing(stated("Layers"), PACKAGE, "")


def test_no_folder_of_the_server_imports_upwards():
    assert not climbing(stated("Layers of the server"), PACKAGE / "serve", "serve.")


def test_no_modules_import_each_other_in_a_circle():
    files = {file: ".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in PACKAGE.rglob("*.py")}
    names = {name.removesuffix(".__init__"): file for file, name in files.items()}
    edges = {}
    for name, file in names.items():
        targets = (next((t for t in (i, i.rpartition(".")[0]) if t in names), None) for i in imported(file))
        edges[name] = {target for target in targets if target and target != name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in edges[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())
