"""The floors of the house: what may import what, and what every room says of itself."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import lightning_influence

ROOT = Path(lightning_influence.__file__).parent
NAME = "lightning_influence"

# Lower rooms first; a room may import from lower floors, its own files, and nothing else.
FLOORS = (
    ("errors",),
    ("artifacts", "samples", "gradients", "metrics"),
    ("objective",),
    ("replay",),
    ("self_check", "fitted", "curvature", "targets"),
    ("stages",),
    ("estimators", "callbacks", "afterwards"),
    ("attribution", "edits"),
    ("queries", "streaming", "damping_choice", "mixed"),
    ("questions",),
    ("module", "layer_comparison"),
    ("report",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FORBIDDEN = {"utils", "common", "helpers", "misc"}


def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> syntax tree; the package's own front door apart."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            found[".".join(parts)] = ast.parse(path.read_text())
    return found


MODULES = modules()


def room(module: str) -> str:
    return module.split(".")[0]


def imports(module: str, tree: ast.Module) -> set[str]:
    """Modules of this package that are imported anywhere in the file, inside functions too; not for types alone."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = f"{NAME}.{module}".removesuffix(".__init__").split(".")
    if not module.endswith("__init__"):
        package = package[:-1]
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names} if origin == NAME else {origin}
    inside = {name.removeprefix(f"{NAME}.") for name in found if name == NAME or name.startswith(f"{NAME}.")}
    return {name for name in inside if name != NAME}


IMPORTS = {module: imports(module, tree) for module, tree in MODULES.items()}


def test_every_room_has_its_floor():
    assert {room(module) for module in MODULES} <= set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_no_import_runs_upward_or_sideways(module):
    mine = room(module)
    for other in {room(name) for name in IMPORTS[module]} - {mine}:
        assert LEVEL[other] < LEVEL[mine], f"{module} imports {other}, which is not below it"


def test_callbacks_and_estimators_never_meet():
    for module, names in IMPORTS.items():
        if room(module) in ("callbacks", "estimators"):
            assert not {room(name) for name in names} & ({"callbacks", "estimators"} - {room(module)})


def test_there_are_no_circles():
    """Between files; imports inside functions wait until both files are there, and stay inside one room."""
    edges: dict[str, set[str]] = {}
    for module, tree in MODULES.items():
        top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        own = module.removesuffix(".__init__")
        names = {
            n if n in MODULES or f"{n}.__init__" in MODULES else n.rpartition(".")[0] for n in imports(module, top)
        }
        edges.setdefault(own, set()).update(names - {own})
        for name in IMPORTS[module] - imports(module, top):
            assert room(name) == room(module), f"{module} hides an import of {name} in a function"
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module not in finished:
            for other in edges.get(module, ()):
                visit(other, (*path, module))
            finished.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("module", [*MODULES, "__init__"])
def test_every_file_says_in_one_sentence_what_it_is_for(module):
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, f"{module} has no docstring"
    first = text.split("\n\n")[0].replace("\n", " ").strip()
    assert first.endswith((".", ":", "?")), f"{module}: {first!r} is no sentence"
    inner = first[:-1].replace("e.g.", "").replace("i.e.", "")
    assert ". " not in inner, f"{module}: more than one sentence in {first!r}"


def test_names_of_rooms():
    for module in MODULES:
        for part in module.split("."):
            assert part not in FORBIDDEN and not part.startswith("base_"), module


def test_no_room_is_too_large():
    sizes = {module: (ROOT / Path(*module.split("."))).with_suffix(".py").read_text().count("\n") for module in MODULES}
    assert {module: size for module, size in sizes.items() if size > 440} == {}


def test_public_names_are_documented():
    packages = [NAME] + [f"{NAME}.{module.removesuffix('.__init__')}" for module in MODULES if "__init__" in module]
    for package in packages:
        loaded = importlib.import_module(package)
        assert loaded.__all__ == sorted(loaded.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
        for name in loaded.__all__:
            thing = getattr(loaded, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert inspect.getdoc(thing), f"{package}.{name} has no docstring"
            if inspect.isclass(thing) and thing.__module__.startswith(NAME) and package == NAME:
                for attribute, member in vars(thing).items():
                    if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                        assert inspect.getdoc(member), f"{package}.{name}.{attribute} has no docstring"
