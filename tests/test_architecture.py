"""The rules that keep the package in order, read off the source without importing it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FILES = sorted((REPO / "matfound").rglob("*.py"))

BOTTOM = {"errors", "fields", "units", "catalog", "unpickle"}
STRUCTURES = BOTTOM | {"structures"}
GRAPHS = STRUCTURES | {"graphs"}
NN = GRAPHS | {"ops", "nn"}
MODELS = NN | {"models", "report"}
MIDDLE = MODELS | {"inference", "tasks", "data"}
TOP = MIDDLE | {"training", "evaluation", "generation", "testing"}

#: What each floor may import, besides itself. inference, tasks and data are siblings and never meet; data knows no model.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "fields": {"errors"},
    "units": {"errors", "fields"},
    "catalog": {"errors", "fields", "units"},
    "unpickle": {"errors"},
    "structures": BOTTOM,
    "graphs": STRUCTURES,
    "ops": {"errors"},
    "nn": NN,
    "models": NN,
    "report": GRAPHS,
    "inference": MODELS,
    "tasks": MODELS,
    "data": GRAPHS,
    "training": MIDDLE,
    "evaluation": MIDDLE,
    "generation": MIDDLE,
    "testing": MIDDLE,
    "cli": TOP,
    "__main__": {"cli"},
}

#: What `matfound --help` and `matfound VERB --help` must not wait for.
HEAVY = {
    "ase",
    "e3nn",
    "fsspec",
    "h5py",
    "lightning",
    "matplotlib",
    "numpy",
    "pandas",
    "pooch",
    "pyarrow",
    "pydantic",
    "pymatgen",
    "rdkit",
    "rich",
    "torch",
    "torch_geometric",
    "torchmetrics",
}
#: The modules of cli that are only imported when their verb runs.
LATE = {"demo", "lightning"}

MAX_FILE, MAX_FUNCTION = 500, 80
#: Longer ones, with the reason. Empty is best.
LONGER: dict[str, str] = {}


def floor(path: Path) -> str:
    return path.relative_to(REPO / "matfound").parts[0].removesuffix(".py")


def label(path: Path) -> str:
    return str(path.relative_to(REPO))


def imports(node: ast.AST, *, inside_functions: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import; those for the type checker alone do not count."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            yield from ((child.lineno, f"{child.module}.{alias.name}") for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        elif inside_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(child, inside_functions=inside_functions)


def misplaced(floor_name: str, source: str) -> list[str]:
    """Imports of this source that the floor may not have."""
    allowed = ALLOWED[floor_name] | {floor_name, "__version__", "__file__"}
    tree = ast.parse(source)
    names = [(line, name) for line, name in imports(tree, inside_functions=True) if name.startswith("matfound.")]
    # After a bare `import matfound`, what is taken from it counts: matfound.load would reach around the floors.
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "matfound":
            names.append((node.lineno, f"matfound.{node.attr}"))
    return [f"line {line}: {floor_name} imports {name}" for line, name in names if name.split(".")[1] not in allowed]


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_go_down(path: Path) -> None:
    name = floor(path)
    if name == "__init__":  # lazy by design: tests/test_import.py
        return
    assert name in ALLOWED, f"{label(path)} is on no floor; see ALLOWED"
    assert misplaced(name, path.read_text(encoding="utf-8")) == []


def test_floor_rule_catches() -> None:
    assert misplaced("data", "def f():\n    from matfound.models.base import Potential") == [
        "line 2: data imports matfound.models.base.Potential"
    ]
    assert misplaced("tasks", "import matfound.data.files") == ["line 1: tasks imports matfound.data.files"]
    assert misplaced("ops", "from matfound import fields") == ["line 1: ops imports matfound.fields"]
    assert misplaced("nn", "from matfound import load") == ["line 1: nn imports matfound.load"]
    assert misplaced("nn", "import matfound\nmatfound.load('x')") == ["line 2: nn imports matfound.load"]
    assert misplaced("nn", "import matfound\nmatfound.__version__") == []
    assert misplaced("data", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import matfound.models") == []
    assert misplaced("models", "from matfound.nn import radial\nfrom matfound.models import base") == []


def test_every_floor_rule_is_a_descent() -> None:
    for upper, lowers in ALLOWED.items():
        for lower in lowers - {upper}:
            assert upper not in ALLOWED[lower], f"{upper} and {lower} may import each other"


@pytest.mark.parametrize("name", ["datasets", "models", "recipes"])
def test_facts_values_and_choices_hold_no_code(name: str) -> None:
    assert [label(path) for path in (REPO / name).rglob("*.py*")] == []


@pytest.mark.parametrize("path", FILES, ids=label)
def test_sizes(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    too_long = {}
    if (lines := source.count("\n")) > MAX_FILE:
        too_long[label(path)] = lines
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION:
                too_long[f"{label(path)}:{node.name}"] = lines
    assert {name: lines for name, lines in too_long.items() if name not in LONGER} == {}


def test_size_exceptions_are_needed() -> None:
    for name in LONGER:
        assert (REPO / name.partition(":")[0]).is_file(), f"{name} is gone: remove it from LONGER"


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "unpickle.py"], ids=label)
def test_pickle_stays_in_one_place(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for line, name in imports(tree, inside_functions=True):
        assert name.partition(".")[0] not in {"pickle", "dill", "cloudpickle", "joblib", "shelve"}, f"line {line} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) == "torch":
            pytest.fail(f"{label(path)}:{node.lineno}: torch.load outside unpickle.py")
        if isinstance(node, ast.Call) and any(keyword.arg == "allow_pickle" for keyword in node.keywords):
            values = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "allow_pickle"]
            assert values == ["False"], f"{label(path)}:{node.lineno}: allow_pickle"


@pytest.mark.parametrize("path", [path for path in FILES if floor(path) == "cli" and path.stem not in LATE], ids=label)
def test_help_imports_nothing_heavy(path: Path) -> None:
    light = {"cli", "errors", "fields"}  # any other floor would bring torch with it
    heavy = []
    for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), inside_functions=False):
        package, *rest = name.split(".")
        if package in HEAVY or (package == "matfound" and rest and rest[0] not in light | {"__version__"}):
            heavy.append(f"line {line}: {name}")
    assert heavy == []


@pytest.mark.parametrize("path", FILES, ids=label)
def test_annotations_can_be_checked(path: Path) -> None:
    """jaxtyping reads what an annotation is, not how it is spelled; beartype refuses `Self` where it decorates single methods."""
    for _, name in imports(ast.parse(path.read_text(encoding="utf-8")), inside_functions=True):
        assert name not in {"__future__.annotations", "typing.Self"}


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_stubs(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            assert ast.unparse(raised) != "NotImplementedError" or path.name == "base.py", f"{label(path)}:{node.lineno}: a stub"
