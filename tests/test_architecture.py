"""The house: who may import whom, read from the imports themselves; and that ground truth cannot reach training.

A new room fails here until it has its place in ``ORDER``: above everything it needs nothing from.
"""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

import finealign

HOUSE = Path(finealign.__file__).parent

# A stage imports only from stages before it. Rooms that do not exist yet keep their place.
ORDER = [
    "errors",
    "storage",
    "layout",
    "templates",
    "types",
    "ranks",
    "progress",
    "config",
    "paths",
    "shards",
    "images",
    "pixels",
    "ahead",
    "mapped",
    "prompts",
    "views",
    "alignment",
    "towers",
    "hub",
    "backbone",
    "devices",
    "describe",
    "checkpoints",
    "pseudo_labels",
    "losses",
    "methods",
    "encoding",
    "training",
    "model_folder",
    "model_card",
    "classifier",
    "export",
    "predictions",
    "examples",
    "evaluate",
    "verdict",
    "charts",
    "report",
    "run_folder",
    "doctor",
    "demo",
    "benchmark",
    "serve",
    "terminal",
    "cli",
    "__main__",
]
PURE_MATHS = ["alignment", "pseudo_labels", "losses"]
MAY_READ_TRUTH = {"evaluate", "cli", "demo.run", "benchmark.catalogue", "benchmark.grid", "benchmark.table"}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NETWORK = {
    "aiohttp",
    "ftplib",
    "http",
    "httpx",
    "huggingface_hub",
    "openai",
    "requests",
    "socket",
    "ssl",
    "urllib",
    "urllib3",
}
LABELS = re.compile(r"label|target|truth|annotation|ground|^y$|^y_", re.IGNORECASE)


class Import(NamedTuple):
    """One imported name: ``from a.b import c`` is module ``a.b`` and name ``c``; ``import a.b`` has no name."""

    module: str
    name: str | None
    line: int


def room_files() -> dict[str, Path]:
    """Every module of the package by dotted name below it; a folder's ``__init__`` bears the folder's name."""
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        parts = list(path.relative_to(HOUSE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path  # "" is the package itself
    return found


ROOMS = room_files()
TREES = {room: ast.parse(path.read_text(encoding="utf-8"), str(path)) for room, path in ROOMS.items()}
rooms = pytest.mark.parametrize("room", [pytest.param(room, id=room or "finealign") for room in ROOMS])


def imports_of(tree: ast.AST, package: str = "finealign") -> Iterator[Import]:
    """Every import of a module that lies in ``package``, wherever it stands in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)


def imports(room: str) -> list[Import]:
    inside = "finealign" if ROOMS[room].parent == HOUSE else f"finealign.{ROOMS[room].parent.name}"
    return list(imports_of(TREES[room], inside))


def imported_rooms(room: str) -> dict[str, int]:
    """The rooms of the house that a room imports, with the line; the package's own names count as none."""
    found = {}
    for module, name, line in imports(room):
        if module.split(".")[0] != "finealign":
            continue
        inner = module.partition(".")[2]
        whole = ".".join(part for part in (inner, name or "") if part)
        if whole in ROOMS:
            found[whole] = line
        elif inner:
            found[inner] = line
        elif name == "FineAlign":
            found["classifier"] = line
        else:
            assert name in (None, "__version__"), f"{room}, line {line}: finealign has no room {name!r}"
    return found


def outsiders(room: str) -> set[str]:
    """The top-level names of the packages that a room imports from outside."""
    return {module.split(".")[0] for module, _, _ in imports(room)} - {"finealign"}


def stage(room: str) -> str:
    return room.split(".")[0]


def mentioned(tree: ast.AST) -> set[str]:
    """Every identifier in a file, and every text that is not a docstring."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found |= {*name.split("."), other or ""}
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                found.add(text)
    return found


def called(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The dotted name of everything that is called, and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node.lineno


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: all but the bodies of functions."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += [*node.decorator_list, *node.args.defaults, *(value for value in node.args.kw_defaults if value)]
        elif not isinstance(node, ast.Lambda):
            waiting += ast.iter_child_nodes(node)


# --- this file's own eyes ---------------------------------------------------------------------------------------------


def test_imports_of__sees_every_form() -> None:
    source = """
import finealign.views as v
from finealign import losses, __version__
from finealign.types import Truth
from . import base
from .base import Method
from .. import errors
def late():
    if True:
        import open_clip.transform
"""
    found = {(module, name) for module, name, _ in imports_of(ast.parse(source), "finealign.methods")}
    assert found == {
        ("finealign.views", None),
        ("finealign", "losses"),
        ("finealign", "__version__"),
        ("finealign.types", "Truth"),
        ("finealign.methods", "base"),
        ("finealign.methods.base", "Method"),
        ("finealign", "errors"),
        ("open_clip.transform", None),
    }


def test_mentioned__sees_names_aliases_attributes_and_texts_but_no_docstring() -> None:
    source = '"""Truth in prose."""\nimport a.b as c\nx = d.Truth\ny: "Wrapped" = 1\n'
    assert {"a", "b", "c", "d", "Truth", "Wrapped"} <= mentioned(ast.parse(source))
    assert "Truth" not in mentioned(ast.parse('"""Truth"""\ndef f():\n    """Truth"""\n'))


def test_rooms__are_found() -> None:
    assert {"errors", "types", "config", "views", "methods", "methods.base", "training"} <= set(ROOMS)


# --- the order of the house -------------------------------------------------------------------------------------------


@rooms
def test_order__every_room_has_its_place(room: str) -> None:
    assert not room or stage(room) in ORDER, f"{room} has no place in ORDER: say what it may import"


@rooms
def test_order__a_stage_imports_only_from_those_before_it(room: str) -> None:
    if not room:
        return  # the front door, below
    place, houses = ORDER.index(stage(room)), ("methods", "demo", "benchmark", "serve", "describe", "export")
    for other, line in imported_rooms(room).items():
        if stage(other) == stage(room) and stage(room) in houses:
            continue  # these have their own order, below
        assert ORDER.index(stage(other)) < place, f"{room}, line {line}: imports {other}, which does not come before it"


def test_order__the_front_door_opens_to_the_classifier_alone() -> None:
    assert set(imported_rooms("")) <= {"classifier"}


@rooms
def test_order__a_method_imports_no_other_method(room: str) -> None:
    inner = {other for other in imported_rooms(room) if stage(other) == "methods"}
    if room == "methods.base":
        assert not inner
    elif stage(room) == "methods":
        assert inner <= {"methods.base"}
    else:  # the rest of the house knows methods by name, not by file
        assert inner <= {"methods"}


@rooms
def test_order__the_demo_is_entered_by_its_runner(room: str) -> None:
    inner = {other for other in imported_rooms(room) if stage(other) == "demo"}
    if stage(room) != "demo":  # the rest of the house does not know what the demo is made of
        assert inner <= {"demo.run"}
    elif room != "demo.run":
        assert not inner & {"demo.run", "demo.picture"}


def test_order__the_benchmark_reads_as_it_runs() -> None:
    order = ["catalogue", "published", "grid", "table"]
    for place, name in enumerate(order):
        inner = {other for other in imported_rooms(f"benchmark.{name}") if stage(other) == "benchmark"}
        assert inner <= {f"benchmark.{earlier}" for earlier in order[:place]}


def test_order__describe_reads_as_it_runs() -> None:
    order = ["checks", "alike", "wording", "record", "endpoint", "run"]
    for place, name in enumerate(order):
        inner = {other for other in imported_rooms(f"describe.{name}") if stage(other) == "describe"}
        assert inner <= {f"describe.{earlier}" for earlier in order[:place]}


@pytest.mark.parametrize("room", PURE_MATHS)
def test_order__pure_maths_knows_tensors_alone(room: str) -> None:
    assert outsiders(room) <= {"torch", "typing"}
    assert set(imported_rooms(room)) <= {"types"}


@rooms
def test_order__no_import_hides_in_a_text(room: str) -> None:
    hidden = [line for name, line in called(TREES[room]) if name.split(".")[-1] in ("__import__", "import_module")]
    assert not hidden or room == "methods", f"{room}, line {hidden[0]}: an import this file cannot see"


# --- no ground truth in training --------------------------------------------------------------------------------------


@rooms
def test_truth__only_evaluation_knows_it(room: str) -> None:
    if room in MAY_READ_TRUTH:
        return
    assert "evaluate" not in {stage(other) for other in imported_rooms(room)}
    words = mentioned(TREES[room])
    assert "read_truth" not in words
    assert "Truth" not in words or room == "types"
    assert not [text for text in words if "finealign.evaluate" in text]


def test_truth__the_demo_hands_it_to_nothing_that_learns() -> None:
    """What is fitted or adapted to is the folder of unlabelled images; their own labels nobody looks up."""
    given = [
        [ast.unparse(argument) for argument in [*node.args, *(word.value for word in node.keywords)]]
        for node in ast.walk(TREES["demo.run"])
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("fit", "adapt_into", "FineAlign")
    ]
    assert len(given) == 4
    assert not [text for arguments in given for text in arguments if LABELS.search(text.replace("unlabelled", ""))]
    assert "hidden" not in mentioned(TREES["demo.run"])


def test_truth__the_benchmark_hands_it_to_nothing_that_learns() -> None:
    """A cell is fitted to, and judged on, the bare paths of the images without labels."""
    given = [
        [ast.unparse(argument) for argument in [*node.args, *(word.value for word in node.keywords)]]
        for node in ast.walk(TREES["benchmark.grid"])
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("fit", "judge_model", "start_features")
    ]
    assert len(given) == 3
    assert not [text for arguments in given for text in arguments if LABELS.search(text.replace("unlabelled", ""))]


def test_truth__the_room_that_reads_it_knows_little_else() -> None:
    # ``prompts`` for ``fold`` alone: folder names are matched to class names as descriptions are.
    assert set(imported_rooms("evaluate")) <= {"errors", "types", "images", "prompts"}


def test_truth__fit_takes_no_labels() -> None:
    from finealign.classifier import FineAlign

    parameters = inspect.signature(FineAlign.fit).parameters.values()
    assert "images" in {parameter.name for parameter in parameters}
    for parameter in parameters:
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        assert not LABELS.search(parameter.name)
        assert not LABELS.search(str(parameter.annotation))
    assert not [name for name in inspect.signature(FineAlign).parameters if LABELS.search(name)]


def test_truth__adapt_takes_no_labels() -> None:
    from finealign.training import adapt

    for parameter in inspect.signature(adapt).parameters.values():
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        assert not LABELS.search(parameter.name)
        assert not LABELS.search(str(parameter.annotation))


def test_truth__a_training_batch_has_no_field_for_it() -> None:
    from finealign.types import ImageFeatures

    assert {field.name for field in fields(ImageFeatures)} == {"weak", "crops"}


# --- what only one room may do, or none -------------------------------------------------------------------------------


@rooms
def test_imports__only_the_backbone_knows_open_clip(room: str) -> None:
    assert "open_clip" not in outsiders(room) or room == "backbone"


@rooms
def test_imports__nobody_pickles(room: str) -> None:
    assert not outsiders(room) & PICKLES
    for name, line in called(TREES[room]):
        assert name not in ("torch.load", "torch.save"), f"{room}, line {line}: pickle by way of {name}"
        assert "_object" not in name, f"{room}, line {line}: {name} sends pickles between processes"
    assert "allow_pickle" not in {node.arg for node in ast.walk(TREES[room]) if isinstance(node, ast.keyword)}
    assert not {(module, name) for module, name, _ in imports(room)} & {("torch", "load"), ("torch", "save")}


@rooms
def test_calls__nobody_assumes_a_gpu(room: str) -> None:
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda", f"{room}, line {node.lineno}: a device comes from devices.py"


@rooms
def test_calls__none_at_import_knows_the_network(room: str) -> None:
    tree = TREES[room]
    reaching = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            reaching |= {a.asname or a.name.split(".")[0] for a in node.names if a.name.split(".")[0] in NETWORK}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in NETWORK:
            reaching |= {alias.asname or alias.name for alias in node.names}
    for node in at_import(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            assert name.split(".")[0] not in reaching, f"{room}, line {node.lineno}: {name} runs at import"


# --- a fresh interpreter ----------------------------------------------------------------------------------------------


def fresh(code: str) -> str:
    """What a new interpreter prints, with this very package in its way."""
    prologue = f"import sys; sys.path.insert(0, {str(HOUSE.parent)!r})\n"
    run = subprocess.run(
        [sys.executable, "-c", prologue + code], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


HEAVY = "print(*sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'open_clip', 'timm', 'numpy', 'PIL'}))"


def test_import__the_package_is_light() -> None:
    assert fresh(f"import finealign; finealign.__version__\n{HEAVY}").split() == []


@pytest.mark.skipif("cli" not in ROOMS, reason="there is no command yet")
def test_import__help_is_light() -> None:
    code = f"""
from typer.testing import CliRunner
from finealign.cli import app
result = CliRunner().invoke(app, ["--help"])
assert result.exit_code == 0, result.output
{HEAVY}
"""
    assert not {"torch", "open_clip", "timm"} & set(fresh(code).split())


def test_import__every_room_without_the_network() -> None:
    names = [f"finealign.{room}" for room in ROOMS if room and room != "__main__"]
    code = f"""
import importlib
reached = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        reached.append((event, arguments))
sys.addaudithook(watch)
for name in {names!r}:
    importlib.import_module(name)
print(reached, "open_clip" in sys.modules)
"""
    assert fresh(code).strip() == "[] False"
