"""Every figure of the README is in docs/figures.json, with its command, and on the page that the file names."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = json.loads((ROOT / "docs" / "figures.json").read_text(encoding="utf-8"))["measurements"]
IN_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
# What is no figure: code, where links lead, papers, years, names of models, versions.
NO_FIGURE = [r"^```.*?^```", r"^    .*?$", r"`[^`\n]*`", r"\]\([^)]*\)", r"arXiv[: ]\d+\.\d+", r"et al\., \d{4}"]
NO_FIGURE += [r"\bB/\d+", r"\b[A-Za-z]+-?\d+(?:\.\d+)*\b", r"Apache-2\.0", r"seeds? \d(?: to \d)?"]
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def prose(text: str) -> str:
    """The text without what is no figure."""
    for pattern in NO_FIGURE:
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE if "```" in pattern else re.MULTILINE)
    return text


def stated(text: str) -> list[float]:
    """The figures that a text states: as digits, and before "sets" in words."""
    text = prose(text)
    worded = [IN_WORDS[word] for word in re.findall(r"\b([a-z]+) sets\b", text) if word in IN_WORDS]
    return [float(found) for found in NUMBER.findall(text)] + worded


def tables(text: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Each table whose first column is ``method``, with the bold words before it."""
    heading = ""
    lines = iter(text.splitlines())
    for line in lines:
        if bold := re.match(r"\*\*([^*]+)\*\*", line):
            heading = bold[1]
        if line.startswith("| method"):
            rows = [line]
            for row in lines:
                if not row.startswith("|"):
                    break
                rows.append(row)
            yield heading, [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_figures__every_number_of_the_readme_is_in_the_file() -> None:
    known = {number for name in MEASURED for number in numbers(MEASURED[name])}
    found = stated(README)
    assert len(found) > 50
    unknown = sorted({number for number in found if number not in known})
    assert not unknown, f"README.md states {unknown}, which docs/figures.json has not."


def test_figures__the_tables_of_the_readme_are_those_of_the_file() -> None:
    """Cell by cell; a table may show fewer methods than the file has, and a cell without a figure is empty or "-"."""
    by_heading = {measured["heading"]: measured for measured in MEASURED.values() if "heading" in measured}
    shown = dict(tables(README))
    assert set(shown) == set(by_heading)
    for heading, (head, _, *rows) in shown.items():
        figures = by_heading[heading]["figures"]
        assert rows, heading
        for method, *cells in rows:
            for column, cell in zip(head[1:], cells, strict=True):
                asked = list(numbers(figures[method].get(column, [])))
                found = [float(one) for one in cell.split(" / ")] if cell not in ("", "-") else []
                assert found == asked, f"{heading}: {method}, {column}"


def test_figures__one_of_an_earlier_state_is_called_so_beside_its_table() -> None:
    for name, measured in MEASURED.items():
        if "heading" in measured and "earlier" in measured["state"]:
            after = README.partition(f"**{measured['heading']}**")[2].partition("| method")[0]
            assert "earlier" in after, name


@pytest.mark.parametrize("name", list(MEASURED))
def test_figures__each_has_its_command_and_is_on_its_page(name: str) -> None:
    measured = MEASURED[name]
    assert {"state", "command", "page", "unit", "measured_on", "figures"} <= set(measured)
    page = (ROOT / measured["page"]).read_text(encoding="utf-8")
    missing = [number for number in numbers(measured["figures"]) if not _written(number, page)]
    assert not missing, f"{measured['page']} has no {missing}"
    script = re.match(r"python (\S+\.py)", measured["command"])
    assert (ROOT / script[1]).is_file() if script else measured["command"].startswith("finealign ")


def _written(number: float, page: str) -> bool:
    """Whether a page has this number, with one digit behind the point or two, and with its sign if it is negative."""
    sign = "-" if number < 0 else "[+ ]?"
    digits = "|".join(re.escape(f"{abs(number):.{places}f}") for places in (1, 2) if round(number, places) == number)
    return re.search(rf"(?<![\d.]){sign}(?:{digits})(?![\d.]*\d)", page) is not None
