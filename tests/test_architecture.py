"""The house: who may import whom, read from the imports themselves and from the table of docs/ARCHITECTURE.md.

A new room fails here until the table gives it its place: below everything it imports from.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import finealign
from conftest import HANG

HOUSE = Path(finealign.__file__).parent

TABLE = Path(__file__).parents[1] / "docs" / "ARCHITECTURE.md"
ORDER = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
PURE_MATHS = [
    "method.alignment",
    "method.class_prior",
    "method.crop_trust",
    "method.few_labels",
    "method.joint",
    "method.losses",
    "method.mixture",
    "method.propagation",
    "method.pseudo_labels",
    "method.strangers",
]
MAY_READ_TRUTH = {"evaluate", "cli", "demo", "benchmark"}  # stages
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
PUBLIC = finealign._PLACES
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
    inside = ".".join(["finealign", *ROOMS[room].parent.relative_to(HOUSE).parts])
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
        elif name and name in PUBLIC:
            found[PUBLIC[name]] = line
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
    assert {"errors", "types", "config", "images.views", "methods", "method.base", "training.loop"} <= set(ROOMS)


# --- the order of the house -------------------------------------------------------------------------------------------


def test_order__the_table_has_every_room_once() -> None:
    rooms = {stage(room) for room in ROOMS if room}
    assert sorted(ORDER) == sorted(rooms)


@rooms
def test_order__a_stage_imports_only_from_those_before_it(room: str) -> None:
    if not room or stage(room) == "moved":
        return  # the front door and the old ones lead anywhere
    place = ORDER.index(stage(room))
    for other, line in imported_rooms(room).items():
        if stage(other) != stage(room):
            assert ORDER.index(stage(other)) < place, f"{room}, line {line}: {other} does not come before it"


@pytest.mark.parametrize("folder", sorted({stage(room) for room in ROOMS if "." in room}))
def test_order__within_a_folder_nothing_imports_in_a_circle(folder: str) -> None:
    inner = {room: set(imported_rooms(room)) & set(ROOMS) for room in ROOMS if stage(room) == folder}
    if folder == "cli":
        inner.pop("cli")  # its verbs register as they are imported, after what they register with
    left = {room: {other for other in others if other in inner and other != room} for room, others in inner.items()}
    while free := [room for room, others in left.items() if not others]:
        left = {room: others - set(free) for room, others in left.items() if room not in free}
    assert not left, f"in a circle: {left}"


@rooms
def test_order__a_method_imports_no_other_method(room: str) -> None:
    assert not [other for other in imported_rooms(room) if other.startswith("methods.")]  # known by name, not by file


@rooms
def test_order__the_demo_is_entered_by_its_runner(room: str) -> None:
    inner = {other for other in imported_rooms(room) if stage(other) == "demo"}
    if stage(room) != "demo":  # the rest of the house does not know what the demo is made of
        assert inner <= {"demo.run", "demo.result"}


@pytest.mark.parametrize("room", PURE_MATHS)
def test_order__pure_maths_knows_tensors_alone(room: str) -> None:
    assert outsiders(room) <= {"torch", "typing", "math", "collections", "dataclasses"}
    assert set(imported_rooms(room)) <= {"types", *PURE_MATHS}


@rooms
def test_order__no_import_hides_in_a_text(room: str) -> None:
    hidden = [line for name, line in called(TREES[room]) if name.split(".")[-1] in ("__import__", "import_module")]
    assert not hidden or room in ("", "method.registry"), f"{room}, line {hidden[0]}: an import this file cannot see"


# --- no ground truth in training --------------------------------------------------------------------------------------


@rooms
def test_truth__only_evaluation_knows_it(room: str) -> None:
    """That labels change nothing of what is learned is shown by running: in test_prepare and test_demo_run."""
    if not room or stage(room) in MAY_READ_TRUTH:
        return
    assert "evaluate" not in {stage(other) for other in imported_rooms(room)}
    words = mentioned(TREES[room])
    assert "read_truth" not in words
    assert "Truth" not in words or room == "types"
    assert not [text for text in words if "finealign.evaluate" in text]


def test_truth__the_room_that_reads_it_knows_little_else() -> None:
    # ``texts.prompts`` for ``fold`` alone: folder names are matched to class names as descriptions are.
    assert {stage(other) for other in imported_rooms("evaluate.truth")} <= {
        "errors",
        "types",
        "images",
        "texts",
        "evaluate",
    }


# --- what is public ---------------------------------------------------------------------------------------------------


def test_public__is_what_the_reference_lists() -> None:
    import finealign.integrations.ray
    import finealign.method

    listed = re.findall(r"^::: (\S+)$", (TABLE.parent / "python.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    names = [f"finealign.{name}" for name in finealign.__all__ if name != "__version__"]
    names += [f"finealign.method.{name}" for name in finealign.method.__all__]
    names += [f"finealign.integrations.ray.{name}" for name in finealign.integrations.ray.__all__]
    assert sorted(listed) == sorted(names)


def test_public__every_name_is_there_and_documented() -> None:
    for name in finealign.__all__:
        assert name == "__version__" or (getattr(finealign, name).__doc__ or "").strip(), name


OLD_PATHS = {  # as release 0.1 documented them
    "classifier": ["FineAlign"],
    "config": ["read_config"],
    "ranks": ["Ranks"],
    "backbone": ["load_backbone", "Backbone"],
    "run_folder": ["adapt_into"],
    "report": ["write_report"],
    "verdict": ["judge_model"],
    "evaluate": ["read_truth", "evaluate_predictions"],
    "types": ["Prediction", "Texts"],
    "alignment": ["crop_relevance", "learned_alignment_score"],
    "pseudo_labels": ["margin_weight"],
    "losses": ["fairness"],
    "errors": ["FinealignError"],
}


@pytest.mark.parametrize("module", OLD_PATHS)
@pytest.mark.filterwarnings("ignore:finealign:DeprecationWarning")
def test_public__old_import_paths_lead_to_the_same_things(module: str) -> None:
    found = importlib.import_module(f"finealign.{module}")
    for name in OLD_PATHS[module]:
        assert getattr(found, name) is getattr(finealign, name, getattr(found, name))


def test_public__an_old_import_path_says_what_to_use_instead() -> None:
    sys.modules.pop("finealign.ranks", None)
    with pytest.warns(DeprecationWarning, match="from finealign import Ranks"):
        importlib.import_module("finealign.ranks")


# --- what only one room may do, or none -------------------------------------------------------------------------------


@rooms
def test_imports__only_the_backbone_knows_open_clip(room: str) -> None:
    assert "open_clip" not in outsiders(room) or stage(room) == "backbone"


@rooms
def test_imports__nobody_pickles(room: str) -> None:
    assert not outsiders(room) & PICKLES
    for name, line in called(TREES[room]):
        # One place reads files of weights that users bring, of tensors and plain values alone: see the next test.
        allowed = (room, name) == ("backbone.checkpoints", "torch.load")
        assert allowed or name not in ("torch.load", "torch.save"), f"{room}, line {line}: pickle by way of {name}"
        assert "_object" not in name, f"{room}, line {line}: {name} sends pickles between processes"
    assert "allow_pickle" not in {node.arg for node in ast.walk(TREES[room]) if isinstance(node, ast.keyword)}
    assert not {(module, name) for module, name, _ in imports(room)} & {("torch", "load"), ("torch", "save")}


def test_calls__weights_of_users_are_read_as_tensors_and_plain_values_alone() -> None:
    calls = [node for node in ast.walk(TREES["backbone.checkpoints"]) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert loads
    for call in loads:
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert options.get("weights_only") == "True"
        assert None not in options and "pickle_module" not in options


@rooms
def test_calls__nobody_assumes_a_gpu(room: str) -> None:
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda", f"{room}, line {node.lineno}: a device comes from runtime/devices.py"


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
        [sys.executable, "-c", prologue + code], capture_output=True, text=True, timeout=HANG, check=False
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
    names = [f"finealign.{room}" for room in ROOMS if room and stage(room) not in ("__main__", "moved")]
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
