"""Class shares as users give them: JSON and CSV, what numbers mean, and an error that helps for everything else."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finealign.classifier import FineAlign
from finealign.config import read_config
from finealign.errors import ConfigError
from finealign.texts.shares import class_shares, read_shares

BIRDS = ("robin", "house wren", "crow")


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- files ------------------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[str, str | bytes, dict[str, float]]] = {
    "shares": ("a.json", '{"robin": 0.5, "crow": 0.25}', {"robin": 0.5, "crow": 0.25}),
    "counts": ("a.json", '{"robin": 12, "crow": 0}', {"robin": 12, "crow": 0}),
    "numbers as text": ("a.json", '{"robin": "0.5", "crow": "1e-1"}', {"robin": 0.5, "crow": 0.1}),
    "with a byte order mark": ("a.json", b"\xef\xbb\xbf" + b'{"robin": 1}', {"robin": 1}),
    "any suffix is JSON": ("prior.txt", '{"robin": 1}', {"robin": 1}),
    "no class": ("a.json", "{}", {}),
    "a name of other letters": ("a.json", '{"Zaunk\\u00f6nig": 1, "ж": 2}', {"Zaunkönig": 1, "ж": 2}),
    "CSV of shares": ("a.csv", "class,share\nrobin,0.5\ncrow,0.25\n", {"robin": 0.5, "crow": 0.25}),
    "CSV of counts": ("a.csv", "class,count\nrobin,12\nhouse wren,3\n", {"robin": 12, "house wren": 3}),
    "CSV by Windows": ("a.CSV", b"\xef\xbb\xbfclass,share\r\nrobin,0.5\r\n\r\ncrow,1\r\n", {"robin": 0.5, "crow": 1}),
    "CSV with quotes": ("a.csv", 'share,class\n0.5,"wren, ""house"""\n', {'wren, "house"': 0.5}),
    "CSV with a column more": ("a.csv", "id, class ,count\n1, robin ,4\n", {"robin": 4}),
    "CSV by a spreadsheet": ("a.csv", "sep=;\r\nClass;Share\r\nrobin;0,5\r\n", {"robin": 0.5}),
    "CSV with tabs in UTF-16": ("a.csv", "Class\tCount\nrobin\t5\n".encode("utf-16"), {"robin": 5}),
    "TSV": ("a.TSV", "class\tcount\nrobin\t5\n", {"robin": 5}),
    "UTF-16": ("a.json", '{"robin": 1}'.encode("utf-16"), {"robin": 1}),
    "CSV of no class": ("a.csv", "class,share\n", {}),
}


@pytest.mark.parametrize("case", FILES)
def test_read_shares__are_the_numbers_by_name(case: str, tmp_path: Path) -> None:
    name, content, wanted = FILES[case]
    assert read_shares(written(tmp_path, name, content)) == wanted


WRONG: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("a.json", "", "is not JSON: .*Wanted: JSON"),
    "torn": ("a.json", '{"robin": 0.5', "is not JSON"),
    "nested too deep": ("a.json", '{"a":' * 100_000, "is not JSON"),
    "a list": ("a.json", "[0.5, 0.5]", "is not an object of classes"),
    "a list of lists": ("a.json", '[["robin", 0.5]]', "is not an object of classes"),
    "an empty list": ("a.json", "[]", "is not an object of classes"),
    "a number": ("a.json", "3", "is not an object of classes"),
    "null": ("a.json", "null", "is not an object of classes"),
    "nested": ("a.json", '{"robin": {"share": 0.5}}', "for 'robin'. Wanted: a share or a count, at least 0"),
    "a list for a number": ("a.json", '{"robin": [0.5]}', "for 'robin'. Wanted: a share or a count"),
    "null for a number": ("a.json", '{"robin": null}', "has None for 'robin'"),
    "true": ("a.json", '{"robin": true}', "has True for 'robin'"),
    "a word": ("a.json", '{"robin": "many"}', "has 'many' for 'robin'"),
    "negative": ("a.json", '{"robin": -0.5}', "has -0.5 for 'robin'"),
    "NaN": ("a.json", '{"robin": NaN}', "has nan for 'robin'"),
    "infinite": ("a.json", '{"robin": 1e999}', "has inf for 'robin'"),
    "too many digits": ("a.json", '{"robin": ' + "9" * 4000 + "}", "for 'robin'. Wanted: a share or a count"),
    "more digits than Python reads": ("a.json", '{"robin": ' + "9" * 5000 + "}", "is not JSON"),
    "twice": ("a.json", '{"robin": 0.5, "robin": 0.5}', "names 'robin' twice"),
    "UTF-16 without its mark": ("a.json", '{"robin": 1}'.encode("utf-16-le"), "is not JSON"),
    "UTF-16 cut": ("a.json", '{"robin": 1}'.encode("utf-16")[:-1], "cannot be read: .*not UTF-16 text"),
    "a picture": ("a.csv", b"\x89PNG\r\n\x1a\n\xff", "cannot be read: .*not UTF-8 text"),
    "CSV empty": ("a.csv", "", "has the columns ''. Wanted: .*CSV with the columns class and share"),
    "CSV of other columns": ("a.csv", "name,share\nrobin,1\n", "has the columns 'name,share'"),
    "CSV without a number": ("a.csv", "class\nrobin\n", "has the columns 'class'"),
    "CSV with both": ("a.csv", "class,share,count\nrobin,1,2\n", "has the columns 'class,share,count'"),
    "CSV with a column twice": ("a.csv", "class,class,share\na,b,1\n", "has the columns 'class,class,share'"),
    "CSV short": ("a.csv", "class,share\nrobin\n", "row 2: 1 values for 2 columns"),
    "CSV long": ("a.csv", "class,share\nrobin,1\nwren, house,1\n", "row 3: 3 values for 2 columns"),
    "CSV twice": ("a.csv", "class,share\nrobin,0.5\nrobin,0.5\n", "names 'robin' twice"),
    "CSV without its number": ("a.csv", "class,share\nrobin,\n", "has '' for 'robin'"),
    "CSV of a decimal comma": ("a.csv", 'class,share\nrobin,"0,5"\n', "has '0,5' for 'robin'"),
    "CSV negative": ("a.csv", "class,share\nrobin,-1\n", "has '-1' for 'robin'"),
    "CSV NaN": ("a.csv", "class,share\nrobin,nan\n", "has 'nan' for 'robin'"),
    "CSV of an open quote": ("a.csv", 'class,share\n"robin,0.5\n', "is not CSV"),
}


@pytest.mark.parametrize("case", WRONG)
def test_read_shares__anything_else_is_refused_with_what_was_found(case: str, tmp_path: Path) -> None:
    name, content, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as caught:
        read_shares(written(tmp_path, name, content))
    told = str(caught.value)
    assert name in told and len(told) < 1000
    told.encode()


def test_read_shares__no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json' cannot be read: no such file\. Wanted: JSON"):
        read_shares(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read: not a regular file"):
        read_shares(tmp_path)


@settings(max_examples=40, deadline=None)
@given(numbers=st.dictionaries(st.text(min_size=1, max_size=8), st.floats(0, 1e6), max_size=6))
def test_read_shares__of_json_are_what_was_written(
    numbers: dict[str, float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("shares") / "prior.json"
    try:
        path.write_text(json.dumps(numbers), encoding="utf-8")
    except UnicodeEncodeError:
        return
    assert read_shares(path) == numbers


# --- numbers become shares --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_numbers", "wanted"),
    [
        ({"robin": 0.5, "house wren": 0.3, "crow": 0.2}, [0.5, 0.3, 0.2]),
        ({"crow": 0.2, "robin": 0.5, "house wren": 0.3}, [0.5, 0.3, 0.2]),  # in the order of the classes
        ({"robin": 0.5}, [0.5, 0.25, 0.25]),  # what is left, in equal parts
        ({"robin": 0.0}, [0.0, 0.5, 0.5]),
        ({"robin": 0.0, "crow": 0.0}, [0.0, 1.0, 0.0]),
        ({"robin": 0.75, "crow": 0.25}, [0.75, 0.0, 0.25]),  # nothing is left
        ({}, [1 / 3, 1 / 3, 1 / 3]),
        ({"robin": 30, "house wren": 10, "crow": 0}, [0.75, 0.25, 0.0]),
        ({"robin": 30, "crow": 10}, [0.75, 0.0, 0.25]),  # counts: one that is not named has none
        ({"robin": 7}, [1.0, 0.0, 0.0]),
        ({"robin": 1, "house wren": 0, "crow": 0}, [1.0, 0.0, 0.0]),
        ({"robin": 0.5, "house wren": 0.25, "crow": 0.255}, [0.5 / 1.005, 0.25 / 1.005, 0.255 / 1.005]),  # rounded
        ({"ROBIN": 0.5, "house_wren": 0.3, "Crow": 0.2}, [0.5, 0.3, 0.2]),
    ],
    ids=str,
)
def test_class_shares__are_what_the_numbers_mean(given_numbers: dict[str, float], wanted: list[float]) -> None:
    assert class_shares(given_numbers, BIRDS) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("given_numbers", "message"),
    [
        ({"owl": 1}, r"names 'owl', which is no class\. Valid: 'robin', 'house wren', 'crow'\."),
        ({"robin": 0.5, "": 0.5}, "names '', which is no class. Valid: 'robin'"),
        ({"robin": 0.5, "Robin": 0.5}, "names 'robin' twice"),
        ({"robin": -0.5}, "has -0.5 for 'robin'. Wanted: a share or a count, at least 0"),
        ({"robin": 1e308, "crow": 1e308}, "has 1e.308 for 'robin'. Wanted: .* at most 1e15"),
        ({"robin": math.nan}, "has nan for 'robin'"),
        ({"robin": math.inf}, "has inf for 'robin'"),
        ({"robin": 0.9, "crow": 0.2}, r"add up to 1\.1\. Wanted: 1, or less where classes are left out"),
        ({"robin": 50.5, "house wren": 49.5}, "add up to 100. Wanted: 1"),
        ({"robin": 0.5, "house wren": 0.2, "crow": 0.2}, r"add up to 0\.9\. Wanted: 1"),
        ({"robin": 0.0, "house wren": 0.0, "crow": 0.0}, "has no class above 0"),
    ],
    ids=str,
)
def test_class_shares__anything_else_is_refused(given_numbers: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        class_shares(given_numbers, BIRDS)


def test_class_shares__of_many_classes_some_are_named_and_of_like_ones_none_is_guessed() -> None:
    with pytest.raises(ConfigError, match=r"Valid: 'class 0', .*'class 19' and 80 more\.") as caught:
        class_shares({"owl": 1}, [f"class {number}" for number in range(100)])
    assert len(str(caught.value)) < 1000
    with pytest.raises(ConfigError, match="'CROW', which is several classes, write one exactly"):
        class_shares({"CROW": 1}, ["crow", "Crow"])
    assert class_shares({"Crow": 1}, ["crow", "Crow"]) == [0.0, 1.0]


@settings(max_examples=100, deadline=None)
@given(
    classes=st.integers(2, 9),
    numbers=st.lists(st.one_of(st.integers(0, 1000), st.floats(0, 1.2)), min_size=0, max_size=9),
)
def test_class_shares__are_shares_or_an_error(classes: int, numbers: list[float]) -> None:
    names = [f"class {number}" for number in range(classes)]
    given_numbers = dict(zip(names, numbers, strict=False))
    try:
        found = class_shares(given_numbers, names)
    except ConfigError:
        assert given_numbers and not 0.99 <= math.fsum(given_numbers.values()) <= 1.01
        return
    assert len(found) == classes and min(found) >= 0
    assert math.fsum(found) == pytest.approx(1, abs=1e-9)
    told = [(number, found[place]) for place, number in enumerate(given_numbers.values())]
    assert [share for _, share in sorted(told)] == sorted(share for _, share in told)  # more stays more


# --- before anything is loaded ----------------------------------------------------------------------------------------


def prior(method: str = "fair", **shares: float) -> FineAlign:
    config = read_config(None, (), backbone="none-that-exists", method={"name": method, "class_prior": shares})
    return FineAlign(BIRDS, config=config)


def test_check__classes_that_do_not_exist_are_refused_before_anything_is_loaded() -> None:
    prior(robin=0.5).check()
    with pytest.raises(ConfigError, match=r"names 'owl', which is no class\. Valid: 'robin'"):
        prior(owl=1.0).check()
    with pytest.raises(ConfigError, match=r"add up to 1\.5"):
        prior(robin=0.75, crow=0.75).check()


@pytest.mark.parametrize("method", ["cupl", "wca", "zero-shot"])
def test_check__a_method_that_expects_nothing_has_no_such_option(method: str) -> None:
    with pytest.raises(ConfigError, match=r"method\.class_prior: Unknown setting 'class_prior'\. .*Valid: "):
        prior(method, robin=1.0).check()
