"""What benchmarks/mutation.py changes, what it leaves as it is, and which tests it runs, in which order."""

import json
from pathlib import Path

import pytest
from mutation import Mutant, Reached, changed, mutants_of


def mutants(source: str) -> set[str]:
    """The source with each of its mutants."""
    return {changed(source, mutant).strip() for mutant in mutants_of("method/part.py", source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", {"(a <= b)", "(a >= b)"}),
        ("a is None", {"(a is not None)"}),
        ("a + b", {"(a - b)"}),
        ("a or b", {"(b)", "(a)"}),
        ("not a", {"(a)"}),
        ("a = 3", {"a = (4)"}),
        ("a = 0.5", {"a = (1.0)"}),
        ("a = True", {"a = (False)"}),
        ("a = b['key']", {"a = b[('keyx')]"}),
        ("a = max(b)", {"a = (min(b))"}),
        ("a = b(c, dim=d)", {"a = (b(c))"}),
        ("a(b)", {"pass"}),
        ("a += b", {"a -= b"}),
        ("def f():\n    return a", {"def f():\n    return None"}),
        ("if a:\n    b = c", {"if (not (a)):\n    b = c", "if True:\n    b = c"}),
        ("a = [b for b in c if d]", {"a = [b for b in c if True]"}),
        ("for a in b:\n    continue", {"for a in b:\n    break"}),
        ("é = 'ä', a + b", {"é = ('äx'), a + b", "é = 'ä', (a - b)"}),  # columns are told in bytes
    ],
)
def test_mutants_of__change_one_thing_each(source: str, expected: set[str]) -> None:
    assert mutants(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""A sentence."""',
        "a = 'a sentence of two'",
        "a = f'{b + 1}'",
        "raise ValueError(1 + 2)",
        "assert a < b",
        "import a",
        "__all__ = ['a']",
        "Kind = Literal['a', 'b'] | None",
        "def f(a: int | None) -> Literal['a']: ...",
        "@dataclass(frozen=True)\nclass A: ...",
        "a = cast('A', b)",
        "a = zip(b, c, strict=True)",
        "if TYPE_CHECKING:\n    a = 1",
    ],
)
def test_mutants_of__leave_texts_and_types_alone(source: str) -> None:
    assert mutants(source) == set()


def test_reached__runs_the_parts_own_file_first_then_the_cheapest_and_the_slow_last(tmp_path: Path) -> None:
    own, other, import_only = "tests/test_part.py", "tests/test_other.py", {"": {"method/part.py": [1, 2]}}
    for file, seconds in ((own, {"a": 0.3, "slow": 3.0}), (other, {"b": 0.1, "c": 0.05, "fixture": 0.2})):
        tests = {f"{file}::{name}": {"seconds": took, "contexts": [name]} for name, took in seconds.items()}
        lines = {name: {"method/part.py": [7 if name == "fixture" else 5]} for name in seconds}
        told = {"tests": tests, "lines": lines | import_only}
        (tmp_path / f"{Path(file).stem}.json").write_text(json.dumps(told))
    reached = Reached(tmp_path)

    def tests_of(line: int, most: float = 60) -> list[str]:
        mutant = Mutant("method/part.py", "number", 0, 1, "1", "2", range(line, line + 1), inside=line > 2)
        return [test.split("::")[1] for test in reached.tests(mutant, most)]

    assert tests_of(5) == ["a", "c", "b", "slow"]
    assert tests_of(5, most=0.4) == ["a", "c"]
    assert tests_of(7) == ["fixture"]
    assert tests_of(2) == ["a", "c", "b", "fixture", "slow"], "a line that runs at import has the tests of its file"
    assert tests_of(9) == []
