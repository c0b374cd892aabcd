"""Which deliberate bugs do the tests not find? Mutants of the package, and the tests that run their lines.

    make mutants
    python benchmarks/mutation.py --out runs/mutants [--mutants 100] [--seed 0] [--again] [--map-only]

Needs coverage (`pip install coverage`). The checkout is copied to a temporary folder, where everything happens. First
each test file runs once and OUT/lines keeps which test runs which lines of the packages; where the file or the packages
have changed it runs again. What starts processes, browsers or whole runs is left out (LEFT_OUT): the share is that of
the quicker tests, and with all of them it is higher.

Then every mutant, one small change, is written into the copy, and the tests that run its line are run until one fails,
in a process forked from one that has collected them: functions are given the code of the changed file, which takes a
second. What runs when a module is imported is imported again, and has the tests that run anything of the module. Tests
of the file of the same name come first, then the cheapest; those beyond --seconds in all, as recorded, are left. In the
end the tests that killed are run without any mutant, which they must pass.

A mutant flips a comparison or moves its boundary, swaps an operator or a function (min for max), changes a number,
a flag or a word, adds a `not`, takes out a condition, a keyword argument, a call or a returned value, or ends a loop
instead of going on. No place for one are docstrings, sentences, annotations, `raise`, decorators, `__all__`, and
the keywords in ASSURANCES, without which sound calls do the same or which are texts.

OUT/mutants.jsonl has a line a mutant; those that are in it already are not run again, unless they survived and
``--again`` is given, after tests were mended. Ends with the share that was killed and the survivors.
"""

import argparse
import ast
import compileall
import copy
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from py_compile import PycInvalidationMode
from types import CodeType, FunctionType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
PACKAGES = ("method", "images", "model")
# Test files are run that import something of the packages, but for those that start processes, servers, browsers or
# whole runs, and those of other packages, which take long and say little of these.
IMPORTS = re.compile(rf"\bfinealign\.({'|'.join(PACKAGES)})\b")
LEFT_OUT = {"architecture", "both_models", "cli", "estimator", "page", "reproduce", "review_page", "serve"}
LEFT_OUT |= {"bad_input", "blocks", "classifier", "readers", "smaller", "tail", "training"}
LEFT_OUT |= {"backbone", "catalogue", "cautions", "evaluate", "outset", "run_folder", "streams", "verdict"}
# Imported before anything is forked. Of the package nothing is: every mutant imports its own.
WARM = """torch torchvision open_clip timm accelerate pydantic typer rich matplotlib.pyplot jinja2 psutil yaml
safetensors.torch huggingface_hub PIL.Image"""
# What is imported before pytest begins is not rewritten for its asserts, which need not be.
PYTEST = ("-m", "not nightly", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
ASSURANCES = {"encoding", "strict", "stacklevel", "description"}
SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "ctx"}
CRASHED, NOT_SWAPPED = 70, 71  # how a process ends that could not do its work; pytest ends with 0 to 5
QUICK = 0.5  # seconds; tests that took longer come last
COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
PAIRS = (("min", "max"), ("any", "all"), ("amin", "amax"), ("argmin", "argmax"), ("floor", "ceil"))
SWAPPED = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])}


@dataclass(frozen=True)
class Mutant:
    """One change of a file of the package: from ``start`` to ``end``, in characters, it reads ``after``."""

    file: str
    kind: str
    start: int
    end: int
    before: str
    after: str
    lines: range  # of the statement that it is in
    inside: bool  # a function, and not what runs when the module is imported

    @property
    def name(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.file}:{self.lines.start} ({self.start}) {self.kind}: {before} -> {after}"


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Every mutant of a file's text, in the order of its lines."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:
        text = source[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(text.encode()[:column].decode())

    found = {}
    for node, kind, after, lines, inside in _changes(ast.parse(source), range(1, 2), inside=False):
        start = offset(node.lineno, node.col_offset)
        end = offset(node.end_lineno or node.lineno, node.end_col_offset or 0)
        found[start, end, after] = Mutant(file, kind, start, end, source[start:end], after, lines, inside)
    return list(found.values())


def changed(source: str, mutant: Mutant) -> str:
    return source[: mutant.start] + mutant.after + source[mutant.end :]


def _can_be_read(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _changes(node: ast.AST, lines: range, *, inside: bool) -> Iterator[tuple[Any, str, str, range, bool]]:
    """What can be changed in a node and below it: what to replace, and what ``Mutant`` has of kind, text and place."""
    if _is_no_place(node):
        return
    if isinstance(node, ast.stmt):
        inner = getattr(node, "body", None)
        last = inner[0].lineno - 1 if inner else node.end_lineno or node.lineno
        lines = range(node.lineno, max(last, node.lineno) + 1)
    if isinstance(node, ast.stmt):
        for target, kind, after in _of_statement(node):
            yield target, kind, after, lines, inside
    elif isinstance(node, ast.expr):
        for kind, changed_to in _of_expression(node):
            yield node, kind, f"({ast.unparse(changed_to)})", lines, inside
    elif isinstance(node, ast.comprehension):
        for condition in node.ifs:
            yield condition, "condition removed", "True", lines, inside
    for field, value in ast.iter_fields(node):
        inner_inside = inside or (isinstance(node, ast.FunctionDef) and field == "body")
        if field not in SKIPPED_FIELDS:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _changes(child, lines, inside=inner_inside)


def _is_no_place(node: ast.AST) -> bool:
    match node:
        case ast.Raise() | ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.Assert():
            return True
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.keyword(arg=name) if name in ASSURANCES:
            return True
        case ast.Assign(targets=[ast.Name(id=name)]):
            # `__all__`, or a type's other name
            return name == "__all__" or (name[0].isupper() and not name.isupper())
        case ast.Call(func=ast.Name(id="cast" | "TypeVar")):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


def _of_statement(node: ast.stmt) -> Iterator[tuple[ast.AST, str, str]]:
    match node:
        case ast.If(test=test) | ast.While(test=test):
            yield test, "not added", f"(not ({ast.unparse(test)}))"
            if isinstance(node, ast.If):
                yield test, "condition removed", "True"
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield value, "return value dropped", "None"
        case ast.Expr(value=ast.Call()):
            yield node, "call removed", "pass"
        case ast.Continue():
            yield node, "loop", "break"
        case ast.Break():
            yield node, "loop", "continue"
        case ast.AugAssign(op=op) if type(op) in OPERATORS:
            swapped = copy.deepcopy(node)
            swapped.op = OPERATORS[type(op)]()
            yield node, "operator", ast.unparse(swapped)


def _of_expression(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    new: Any = copy.deepcopy(node)
    match node:
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                for other in COMPARED[type(op)]:
                    new.ops[place] = other()
                    yield "comparison", new
                    new.ops[place] = op
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            new.op = OPERATORS[type(op)]()
            yield "operator", new
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
            yield "sign or not removed", new.operand
        case ast.BoolOp(values=values):
            for place in range(len(values)):
                rest = [value for number, value in enumerate(values) if number != place]
                yield "condition removed", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
        case ast.IfExp():
            new.test = ast.UnaryOp(ast.Not(), node.test)
            yield "not added", new
        case ast.Call(func=func, keywords=keywords):
            for place, keyword in enumerate(keywords):
                if keyword.arg is not None and keyword.arg not in ASSURANCES:
                    new.keywords = keywords[:place] + keywords[place + 1 :]
                    yield "keyword removed", new
            new.keywords = keywords
            if isinstance(func, ast.Name) and func.id in SWAPPED:
                new.func.id = SWAPPED[func.id]
                yield "function", new
            elif isinstance(func, ast.Attribute) and func.attr in SWAPPED:
                new.func.attr = SWAPPED[func.attr]
                yield "function", new
        case ast.Constant(value=bool(value)):
            yield "flag", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "number", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield "number", ast.Constant(2 * value if value else 1.0)
        case ast.Constant(value=str(value)) if re.fullmatch(r"[\w.\-]+", value):
            yield "word", ast.Constant(f"{value}x")


class Recorder:
    """Has coverage tell the lines of each test; those of a fixture that tests share are lines of all that use it."""

    def __init__(self, measured: Any) -> None:
        self.measured = measured
        self.contexts = [""]
        self.seconds: Counter[str] = Counter()
        self.not_passed: set[str] = set()
        self.fixtures: dict[str, set[str]] = {}  # of each test, the contexts of its shared fixtures

    @contextmanager
    def _within(self, context: str) -> Iterator[None]:
        self.contexts.append(context)
        self.measured.switch_context(context)
        try:
            yield
        finally:
            self.contexts.pop()
            self.measured.switch_context(self.contexts[-1])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Generator[None, Any, Any]:
        defined = [one for several in item._fixtureinfo.name2fixturedefs.values() for one in several]
        self.fixtures[item.nodeid] = {_context(one) for one in defined if one.scope != "function"}
        with self._within(item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        with self._within(self.contexts[-1] if fixturedef.scope == "function" else _context(fixturedef)):
            return (yield)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.outcome != "passed":
            self.not_passed.add(report.nodeid)


def _context(fixture: Any) -> str:
    return f"fixture {fixture.baseid} {fixture.argname}"


class Chosen:
    """Leaves the tests given of those collected, in their order, and keeps the first that fails."""

    def __init__(self, tests: Sequence[str], kept: Path) -> None:
        self.order = {test: place for place, test in enumerate(tests)}
        self.kept = kept

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = (item for item in items if item.nodeid in self.order)
        items[:] = sorted(chosen, key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.kept.write_text(report.nodeid, encoding="utf-8")


def prepare(place: Path) -> None:
    """Have this process run tests of the copy, whose output goes into a file."""
    os.chdir(place)
    output = os.open(place / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path.insert(0, str(place / "src"))
    os.environ["PYTHONPATH"] = str(place / "src")
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(place / "hypothesis")  # no example outlives its mutant
    shutil.rmtree(place / "hypothesis", ignore_errors=True)
    settings.load_profile("steady")


def forked(work: Callable[[], int], place: Path, limit: float) -> int | None:
    """Run work in a process of its own, on the copy: its status, or None where it took longer."""
    child = os.fork()
    if not child:
        status = CRASHED
        try:
            os.setpgid(0, 0)
            prepare(place)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    ends, ended = time.monotonic() + limit, 0
    while not ended and time.monotonic() < ends:
        time.sleep(0.05)
        ended, waited = os.waitpid(child, os.WNOHANG)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with what it started
    if not ended:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(waited)


class Session:
    """A process that has collected the tests of the copy; others are forked from it, with what they are asked for."""

    def __init__(self, place: Path, test_files: Sequence[str], imported: Path) -> None:
        """``imported`` is where it is kept which lines run when modules are imported."""
        self.place, self.imported = place, imported
        self._asks, self._asked = multiprocessing.Pipe()
        if not os.fork():
            prepare(place)
            self._asks.close()
            self._measured = _coverage(place)
            self._measured.start()
            os._exit(int(pytest.main([*PYTEST, *test_files], plugins=[self])))
        self._asked.close()
        self._asks.recv()  # no file is to be changed before it has imported all of them

    def ask(self, work: str, limit: float, *given: Any) -> int | None:
        """Have a method do its work in a process of its own: its status, or None where it took longer."""
        self._asks.send((work, limit, given))
        status: int | None = self._asks.recv()
        return status

    def end(self) -> None:
        self._asks.close()
        os.wait()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.session = session
        self._measured.stop()
        self.functions: dict[str, list[FunctionType]] = {}
        for function in gc.get_objects():
            if type(function) is FunctionType:  # isinstance asks proxies, which may ask what is gone
                self.functions.setdefault(function.__code__.co_filename, []).append(function)
        gc.freeze()  # processes that are forked share the memory of all that is there
        self.imported.write_text(
            json.dumps({"tests": {}, "lines": _lines(self._measured, self.place)}), encoding="utf-8"
        )
        with suppress(EOFError):
            self._asked.send("collected")
            while True:
                work, limit, given = self._asked.recv()
                self._asked.send(forked(partial(getattr(self, work), *given), self.place, limit))
        return True

    def record(self, test_file: str, kept: Path) -> int:
        """Run a test file and keep which tests run which lines, and how long they take."""
        measured = _coverage(self.place)
        recorder = Recorder(measured)
        measured.start()
        self._run([item for item in self.session.items if item.nodeid.startswith(f"{test_file}::")], recorder)
        measured.stop()
        tests = {
            test: {"seconds": seconds, "contexts": sorted(recorder.fixtures[test] | {test})}
            for test, seconds in recorder.seconds.items()
            if test not in recorder.not_passed
        }
        told = {"key": _key(self.place, test_file), "not passed": sorted(recorder.not_passed), "tests": tests}
        kept.write_text(json.dumps(told | {"lines": _lines(measured, self.place)}), encoding="utf-8")
        return len(recorder.not_passed)

    def try_swapped(self, file: str, tests: list[str], failed: Path) -> int:
        """Run tests after the functions of a file were given the code that it has now; ends with the first failure."""
        path = self.place / "src" / "finealign" / file
        codes = dict(_codes(compile(path.read_text(encoding="utf-8"), str(path), "exec")))
        swapped = 0
        for function in self.functions[str(path)]:
            code = codes.get(_code_key(function.__code__), function.__code__)
            swapped += code != function.__code__
            function.__code__ = code
        if not swapped:
            return NOT_SWAPPED
        by_name = {item.nodeid: item for item in self.session.items}
        return self._run([by_name[test] for test in tests if test in by_name], Chosen(tests, failed), stop=True)

    def try_unchanged(self, tests: list[str], failed: Path) -> int:
        """Run tests without any change, which all must pass."""
        return self._run(
            [item for item in self.session.items if item.nodeid in tests], Chosen(tests, failed), stop=True
        )

    def _run(self, items: list[pytest.Item], plugin: object, *, stop: bool = False) -> int:
        plugins = self.session.config.pluginmanager
        plugins.unregister(name="terminalreporter")
        plugins.register(plugin)
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if stop and self.session.testsfailed:
                return 1
        return 0


def _coverage(place: Path) -> Any:
    import coverage

    folders = [str(place / "src" / "finealign" / name) for name in PACKAGES]
    return coverage.Coverage(data_file=None, source=folders, config_file=False)


def _lines(measured: Any, place: Path) -> dict[str, dict[str, list[int]]]:
    """The lines of each file that ran, by context."""
    data, lines = measured.get_data(), dict[str, dict[str, list[int]]]()
    for path in data.measured_files():
        file = str(Path(path).relative_to(place / "src" / "finealign"))
        for line, contexts in data.contexts_by_lineno(path).items():
            for context in contexts:
                lines.setdefault(context, {}).setdefault(file, []).append(line)
    return lines


def _codes(code: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
    yield _code_key(code), code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _code_key(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _key(place: Path, test_file: str) -> str:
    """A hash of the test file and of the packages."""
    folders = [place / "src" / "finealign" / name for name in PACKAGES]
    files = [place / test_file, *(path for folder in folders for path in sorted(folder.glob("*.py")))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


class Reached:
    """Which tests run which lines, from what was kept of every test file."""

    def __init__(self, kept: Path) -> None:
        self.seconds: dict[str, float] = {}
        self.of_line: dict[tuple[str, int], set[str]] = {}
        self.of_file: dict[str, set[str]] = {}
        self.at_import: set[tuple[str, int]] = set()
        for file in sorted(kept.glob("*.json")):
            known = json.loads(file.read_text(encoding="utf-8"))
            for name, lines in known["lines"].get("", {}).items():
                self.at_import.update((name, line) for line in lines)
            for test, told in known["tests"].items():
                self.seconds[test] = told["seconds"]
                for context in told["contexts"]:
                    for name, lines in known["lines"].get(context, {}).items():
                        self.of_file.setdefault(name, set()).add(test)
                        for line in lines:
                            self.of_line.setdefault((name, line), set()).add(test)

    def runs_at_import(self, mutant: Mutant) -> bool:
        return not mutant.inside or any((mutant.file, line) in self.at_import for line in mutant.lines)

    def tests(self, mutant: Mutant, most_seconds: float) -> list[str]:
        """The tests of a mutant, in the order in which they are to run."""
        places = [(mutant.file, line) for line in mutant.lines]
        tests = set[str]().union(*(self.of_line.get(place, set()) for place in places))
        if not tests and self.runs_at_import(mutant):
            tests = self.of_file.get(mutant.file, set())
        files: dict[str, list[float]] = {}
        for test in tests:
            files.setdefault(test.split("::")[0], []).append(self.seconds[test])
        own = f"tests/test_{Path(mutant.file).stem}.py"

        def order(test: str) -> tuple[bool, bool, float, str, float, str]:
            file, seconds = test.split("::")[0], self.seconds[test]
            mean = sum(files[file]) / len(files[file])
            return seconds > QUICK, file != own, mean, file, seconds, test

        chosen: list[str] = []
        total = 0.0
        for test in sorted(tests, key=order):
            total += self.seconds[test]
            if total <= most_seconds or not chosen:
                chosen.append(test)
        return chosen


def run(mutant: Mutant, tests: list[str], place: Path, limit: float, session: Session | None) -> tuple[str, str]:
    """What became of a mutant, and by which test: killed, survived, "too long" or, where no test runs it, unreached.

    The session swaps the code of functions. Without it, as for what runs at import, modules are imported again.
    """
    if not tests:
        return "unreached", ""
    target, failed = place / "src" / "finealign" / mutant.file, place / "failed.txt"
    source = target.read_text(encoding="utf-8")
    failed.unlink(missing_ok=True)
    target.write_text(changed(source, mutant), encoding="utf-8")
    try:
        status = NOT_SWAPPED if session is None else session.ask("try_swapped", limit, mutant.file, tests, failed)
        if status in (NOT_SWAPPED, CRASHED):
            words = [*PYTEST, "-x", *dict.fromkeys(test.split("::")[0] for test in tests)]
            status = forked(lambda: int(pytest.main(words, plugins=[Chosen(tests, failed)])), place, limit)
    finally:
        target.write_text(source, encoding="utf-8")
    by = failed.read_text(encoding="utf-8") if failed.exists() else ""
    if status is None:
        return "too long", by
    return ("survived" if status == 0 else "killed"), by or f"status {status}"


def copied(place: Path) -> None:
    """Copy the checkout, with bytecode that is trusted by what the source says and not by its time."""
    left = shutil.ignore_patterns(".*", "__pycache__", "runs", "artefacts", "site", "dist", "build")
    shutil.copytree(ROOT, place, ignore=left)
    compileall.compile_dir(place / "src", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mutants", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="of tests a mutant, as they took when recorded")
    parser.add_argument("--again", action="store_true", help="run those that survived once more")
    parser.add_argument("--map-only", action="store_true", help="only run the test files and keep what they reach")
    known = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The same examples each time, and none that fails because the machine has other work.
    settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no test that is run needs one, and they take their time
    for name in WARM.split():
        importlib.import_module(name)
    kept = known.out / "lines"
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "checkout").resolve()
        copied(place)
        paths = sorted((place / "tests").glob("test_*.py"))
        files = [f"tests/{path.name}" for path in paths if _is_run(path)]
        session = Session(place, files, kept / "imported.json")
        for file in files:
            told = kept / f"{Path(file).stem}.json"
            if not told.exists() or json.loads(told.read_text(encoding="utf-8"))["key"] != _key(place, file):
                began = time.monotonic()
                without = session.ask("record", 3600, file, told.resolve())
                print(
                    f"{file}: {without} that did not pass, {time.monotonic() - began:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
        if not known.map_only:
            sample(known, place, Reached(kept), session)
        session.end()


def _is_run(path: Path) -> bool:
    left_out = path.stem.removeprefix("test_") in LEFT_OUT
    return not left_out and IMPORTS.search(path.read_text(encoding="utf-8")) is not None


def sample(known: argparse.Namespace, place: Path, reached: Reached, session: Session) -> None:
    package = place / "src" / "finealign"
    files = sorted(path for name in PACKAGES for path in (package / name).glob("*.py"))
    sources = {str(path.relative_to(package)): path.read_text(encoding="utf-8") for path in files}
    everything = [mutant for file, source in sources.items() for mutant in mutants_of(file, source)]
    random.Random(known.seed).shuffle(everything)
    readable = (mutant for mutant in everything if _can_be_read(changed(sources[mutant.file], mutant)))
    drawn = list(islice(readable, known.mutants))
    log = known.out / "mutants.jsonl"
    done = {}
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines()
        done = {told["mutant"]: told for told in map(json.loads, lines)}
    print(f"{len(everything)} mutants, {len(drawn)} drawn", file=sys.stderr)
    for mutant in drawn:
        before = done.get(mutant.name)
        if before and not (known.again and before["outcome"] in ("survived", "unreached")):
            continue
        tests = reached.tests(mutant, known.seconds)
        expected = sum(reached.seconds[test] for test in tests)
        began = time.monotonic()
        able = None if reached.runs_at_import(mutant) else session
        outcome, by = run(mutant, tests, place, 120 + 10 * expected, able)
        told = {"mutant": mutant.name, "outcome": outcome, "by": by, "tests": len(tests)}
        told |= {"seconds": round(time.monotonic() - began, 1)}
        done[mutant.name] = told
        with log.open("a", encoding="utf-8") as appended:
            appended.write(json.dumps(told) + "\n")
    judges = sorted({done[mutant.name]["by"] for mutant in drawn if done[mutant.name]["outcome"] == "killed"})
    failed = place / "failed.txt"
    if session.ask("try_unchanged", 3600, judges, failed) != 0:
        sys.exit(f"Without any mutant this test fails as well, or a process does: {failed.read_text(encoding='utf-8')}")
    outcomes = Counter(done[mutant.name]["outcome"] for mutant in drawn)
    killed = outcomes["killed"] + outcomes["too long"]
    print(f"killed {killed} of {len(drawn)} ({100 * killed / len(drawn):.1f} %): {dict(outcomes)}")
    for mutant in sorted(drawn, key=lambda mutant: mutant.name):
        if done[mutant.name]["outcome"] in ("survived", "unreached"):
            print(f"  {done[mutant.name]['outcome']}, {done[mutant.name]['tests']} tests: {mutant.name}")


if __name__ == "__main__":
    main()
