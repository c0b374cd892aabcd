"""What people bring, through the command: each case of benchmarks/cases.py is read, or refused with its sentence."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import Bench, Case, Found, lying_in, made, table

Tiny = Callable[[str], str]


@pytest.fixture(scope="module")
def bench(tiny_backbone: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("brought"), tiny_backbone("transformer"))


@pytest.mark.parametrize("case", made(), ids=lambda case: f"{case.kind}: {case.name}")
def test_case__is_read_or_refused_with_its_sentence(bench: Bench, case: Case) -> None:
    found = bench.tried(case)
    assert found.outcome == case.outcome, found.told
    assert case.told in found.told


def test_cases__of_the_shared_folder_are_all_handled(bench: Bench, shared: Path) -> None:
    if not (shared / "cases").is_dir():
        pytest.skip("no folder of cases beside the real photos")
    results = [(case, bench.tried(case)) for case in lying_in(shared / "cases")]
    assert not [(case.name, found) for case, found in results if found.outcome == "fault"]
    refused = {case.name for case, found in results if found.outcome == "refused"}
    # A comment in a class list, and a HEIC whose header alone is there.
    assert refused == {"classes_comment.txt", "heic_header_named.jpg"}


def test_table__counts_and_shows_each() -> None:
    case = Case("class list", "a|b.txt", lambda path: None, "read")
    text = table([(case, Found("read", "pansy")), (case, Found("refused", "A sentence.")), (case, Found("fault", "x"))])
    assert "| class list | 3 | 1 | 1 | 1 |" in text
    assert re.search(r'class list: a|b.txt \| "A sentence\."', text)
