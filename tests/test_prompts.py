"""Class names, templates and descriptions: what is read as what, and every way in which they cannot be used."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import ADVICE, shared_folder

from finealign.errors import PromptError
from finealign.texts.names import Matcher, fold, same
from finealign.texts.prompts import (
    DEFAULT_TEMPLATES,
    check_classes,
    check_templates,
    make_texts,
    read_classes,
    read_descriptions,
    read_templates,
)

few = settings(max_examples=120, deadline=None)

UNICODE = ["قط منزلي", "כלב", "三毛猫", "🐈‍⬛", "naïve café", "Ångström", "1a (b), {c}"]
TWO = {"robin": ["A small bird with a red breast."], "wren": ["A tiny brown bird."]}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that hypothesis may write again and again."""
    return tmp_path_factory.mktemp("prompts") / "file"


def written(tmp_path: Path, content: str | bytes, name: str = "file.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- read_classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "robin\nhouse wren\n",
        "robin\nhouse wren",
        "robin\r\nhouse wren\r\n",
        "\ufeffrobin\nhouse wren\n",
        "  robin \n\thouse   wren\t\n",
        "robin\nhouse wren\n\n  \n\n",
    ],
)
def test_read_classes__from_a_file(content: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    assert read_classes(path) == read_classes(str(path)) == ("robin", "house wren")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("robin,wren", ("robin", "wren")),
        (" robin , house  wren,finch ", ("robin", "house wren", "finch")),
        ('"gull, herring", wren', ("gull, herring", "wren")),
        ("wren,robin", ("wren", "robin")),
        ('["wren", "gull, herring"]', ("wren", "gull, herring")),
        ("-1,1", ("-1", "1")),
    ],
)
def test_read_classes__from_a_list(text: str, wanted: tuple[str, ...]) -> None:
    assert read_classes(text) == wanted


def test_read_classes__a_list_in_brackets_is_json_or_refused() -> None:
    with pytest.raises(PromptError, match="The list in --classes is not JSON"):
        read_classes("[robin, wren]")


def test_read_classes__a_file_whose_name_has_a_comma_is_a_file(tmp_path: Path) -> None:
    assert read_classes(str(written(tmp_path, "x\ny\n", "a,b.txt"))) == ("x", "y")


def test_read_classes__commas_in_a_file_belong_to_the_name(tmp_path: Path) -> None:
    assert read_classes(written(tmp_path, "gull, herring\nwren\n")) == ("gull, herring", "wren")


def test_read_classes__any_script_in_its_order(tmp_path: Path) -> None:
    assert read_classes(written(tmp_path, "\n".join(UNICODE))) == tuple(UNICODE)


def test_read_classes__decomposed_becomes_composed(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Ångström café")
    path = written(tmp_path, f"{decomposed}\nwren\n")
    assert read_classes(path) == read_classes(f"{decomposed},wren") == ("Ångström café", "wren")


@pytest.mark.parametrize("content", ["robin\n\nwren\n", "robin\n  \t\nwren\n", "\u00a0\nwren\nrobin\n"])
def test_read_classes__a_blank_before_the_end(content: str, tmp_path: Path) -> None:
    position = content.splitlines().index(next(line for line in content.splitlines() if not line.strip())) + 1
    with pytest.raises(PromptError, match=f"blank name at position {position}"):
        read_classes(written(tmp_path, content))


@pytest.mark.parametrize(("text", "position"), [("a,,b", "2"), ("a,b,", "3"), (",", "1, 2"), ("a, ,b", "2")])
def test_read_classes__a_blank_in_a_list(text: str, position: str) -> None:
    with pytest.raises(PromptError, match=f"blank name at position {position}"):
        read_classes(text)


@pytest.mark.parametrize("text", ["robin", "no/such/file.txt", "", "\x00", "x" * 5000])
def test_read_classes__neither_a_file_nor_a_list(text: str) -> None:
    with pytest.raises(PromptError, match="neither a file nor a list"):
        read_classes(text)


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", " \n \t\n"])
def test_read_classes__empty_file(content: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"holds no name\. Wanted: at least two"):
        read_classes(written(tmp_path, content))


def test_read_classes__one_class_cannot_be_told_apart(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"holds only 'robin'\. Wanted: at least two"):
        read_classes(written(tmp_path, "robin\n"))


def test_read_classes__missing_file_folder_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"No class names at .*nowhere"):
        read_classes(tmp_path / "nowhere")
    with pytest.raises(PromptError, match="cannot be read"):
        read_classes(tmp_path)
    with pytest.raises(PromptError, match="cannot be read"):
        read_classes(written(tmp_path, "café\nwren".encode("latin-1")))


@few
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_read_classes__any_file_is_class_names_or_a_prompt_error(content: bytes, scratch: Path) -> None:
    scratch.write_bytes(content)
    try:
        names = read_classes(scratch)
    except PromptError as error:
        assert str(error).strip()
        return
    assert len(names) >= 2
    assert not any(same(first, second) for place, first in enumerate(names) for second in names[:place])
    assert check_classes(names) == names


@few
@given(st.text(st.characters(exclude_characters="\r\n") | st.sampled_from(',," -_'), max_size=40))
def test_read_classes__any_list_is_class_names_or_a_prompt_error(text: str) -> None:
    try:
        names = read_classes(text)
    except PromptError as error:
        assert str(error).strip()
    else:
        assert check_classes(names) == names


@pytest.mark.parametrize(
    "text", ["robin,\nwren", "robin,wren\rfinch", "robin," + "x" * 140_000], ids=["lf", "cr", "long"]
)
def test_read_classes__what_csv_refuses(text: str) -> None:
    try:
        assert check_classes(read_classes(text))
    except PromptError as error:
        assert str(error).strip()


# --- lists of other kinds ---------------------------------------------------------------------------------------------

FLOWERS = ("pansy", "iris", "daisy")
LISTS: dict[str, tuple[str, str | bytes]] = {
    "JSON over lines": ("a.json", '[\n  "pansy",\n  "iris",\n  "daisy"\n]\n'),
    "JSON over lines as text": ("a.txt", '[\n  "pansy",\n  "iris",\n  "daisy"\n]\n'),
    "JSON on one line": ("a.txt", '["pansy", "iris", "daisy"]'),
    "a list of Python": ("a.txt", "['pansy', 'iris', 'daisy',]\n"),
    "descriptions": ("a.json", '{"pansy": ["A face."], "iris": ["A flag."], "daisy": ["A star."]}'),
    "classes of torchvision": ("a.json", '{"pansy": 0, "iris": 1, "daisy": 2}'),
    "names of transformers": ("a.json", '{"2": "daisy", "0": "pansy", "1": "iris"}'),
    "categories of COCO": (
        "a.json",
        json.dumps({"images": [], "categories": [{"id": 7, "name": name} for name in ("pansy", "iris", "daisy")]}),
    ),
    "YAML": ("a.yaml", "# flowers\n- pansy\n- iris\n- 'daisy'\n"),
    "YAML as text": ("a.txt", "- pansy\n- iris\n- daisy\n"),
    "YAML of YOLO": ("a.yml", "path: data\nnc: 3\nnames:\n  0: pansy\n  1: iris\n  2: daisy\n"),
    "CSV with ids": ("a.csv", "id,name\n0,pansy\n1,iris\n2,daisy\n"),
    "CSV with ids as text": ("a.txt", "id,name\n0,pansy\n1,iris\n2,daisy\n"),
    "CSV by a spreadsheet": ("A.CSV", "\ufeffNr;Class;Note\r\n1;pansy;\r\n2;iris;x\r\n3;daisy\r\n;;\r\n"),
    "CSV that tells its separator": ("a.csv", "sep=;\nclass;Name\n0;pansy\n1;iris\n2;daisy\n"),
    "CSV of one column": ("a.csv", "name\npansy\niris\ndaisy\n"),
    "CSV without a header": ("a.csv", "pansy\niris\ndaisy\n"),
    "CSV of numbered classes": ("a.csv", "class,species\n0,pansy\n1,iris\n2,daisy\n"),
    "tabs": ("a.tsv", "name\tlatin\npansy\tViola\niris\tIris\ndaisy\tBellis\n"),
    "tabs in UTF-16": ("a.txt", "id\tName\n1\tpansy\n2\tiris\n3\tdaisy\n".encode("utf-16")),
    "UTF-16": ("a.txt", "pansy\r\niris\r\ndaisy\r\n".encode("utf-16")),
    "UTF-32": ("a.txt", "pansy\niris\ndaisy\n".encode("utf-32")),
}


@pytest.mark.parametrize("case", LISTS)
def test_read_classes__from_lists_of_other_kinds(case: str, tmp_path: Path) -> None:
    name, content = LISTS[case]
    assert read_classes(written(tmp_path, content, name)) == FLOWERS


@pytest.mark.parametrize("name", ["classes_pretty.json", "classes_table.csv"])
def test_read_classes__from_the_files_that_failed(name: str) -> None:
    assert read_classes(shared_case(name)) == FLOWERS


def shared_case(name: str) -> Path:
    path = shared_folder() / "cases" / name
    if not path.is_file():
        pytest.skip(f"no {name} here. {ADVICE}")
    return path


def test_read_classes__a_list_may_have_any_name(tmp_path: Path) -> None:
    odd = ("[", '"pansy",', "# 1", "0 name", "a: b", "-")
    assert read_classes(written(tmp_path, json.dumps(odd[:-1]), "a.json")) == odd[:-1]


# What is written, the line of which is told, and what is told of it.
OTHER_LISTS = {
    "a comment": ("# my flowers\npansy\niris\n", 1, "looks like a comment"),
    "a comment between": ("pansy\n// more\niris\n", 2, "looks like a comment"),
    "quotes and commas": ('"pansy",\n"iris",\n', 1, "is in quotes"),
    "quotes": ("pansy\n'iris'\n", 2, "is in quotes"),
    "commas at the end": ("pansy,\niris,\n", 1, "take its last character away"),
    "a list that is cut": ('[\n"pansy",\n"iris"\n', 1, "is punctuation"),
    "an object that is cut": ('{"pansy": 1,\n"iris": 2\n', 1, "part of a list or a mapping"),
    "JSON lines": ('{"name": "pansy"}\n{"name": "iris"}\n', 1, "part of a list or a mapping"),
    "code": ("classes = [\n'pansy',\n'iris']\n", 1, "beginning of a list"),
    "code on a line": ("pansy\nclasses = ['iris']\n", 2, "part of a list"),
    "a section": ("[classes]\npansy\niris\n", 1, "part of a list"),
    "YAML": ("names:\n  - pansy\n  - iris\n", 1, "beginning of a list or a mapping"),
    "YAML on a line": ("nc: 2\nnames: [pansy, iris]\n", 2, "part of a list"),
    "a line of YAML": ("---\npansy\niris\n", 1, "is punctuation"),
    "one entry of YAML": ("pansy\n- iris\n", 2, "entry of a list"),
    "entries of Markdown": ("* pansy\n* iris\n", 1, "entry of a list"),
    "a table of Markdown": ("| id | name |\n|---|---|\n| 0 | pansy |\n", 1, "row of a table"),
    "tabs": ("0\tpansy\n1\tiris\n", 1, "row of a table"),
    "markup": ("<li>pansy</li>\n<li>iris</li>\n", 1, "looks like markup"),
    "ids": ("0 pansy\n1 iris\n", 1, "begin with a number"),
    "ids with dots": ("1. pansy\n2. iris\n", 1, "begin with a number"),
    "ids in brackets": ("[0] pansy\n[1] iris\n", 1, "begin with a number"),
    "ids and commas": ("0,pansy\n1,iris\n", 1, "begin with a number"),
    "ids of CUB": ("001.Black_footed_Albatross\n002.Laysan_Albatross\n", 1, "begin with a number"),
    "ids of WordNet": ("n01440764 tench\nn01443537 goldfish\n", 1, "begin with a number or an identifier"),
    "a mapping": ("pansy: a flower with a face\niris: a flag\n", 1, "look like a mapping"),
    "a mapping to numbers": ("pansy:0\niris:1\n", 1, "look like a mapping"),
    "numbers behind": ("pansy,0\niris,1\n", 1, "look like a mapping"),
    "rows without a header": ("pansy;Viola\niris;Iris\n", 1, "look like rows of a table"),
}


@pytest.mark.parametrize("case", OTHER_LISTS)
def test_read_classes__a_line_of_another_kind_of_list_is_no_name(case: str, tmp_path: Path) -> None:
    content, line, told = OTHER_LISTS[case]
    with pytest.raises(PromptError, match=rf"file\.txt, line {line}: .*{told}.*Wanted: one class name a line.*JSON"):
        read_classes(written(tmp_path, content))


WRONG_LISTS = {
    "JSON cut": ("a.json", '["pansy", "iris"', "is not JSON"),
    "JSON of numbers": ("a.json", "[1, 2]", "entry 1 is not text, but int"),
    "JSON of a text": ("a.json", '"pansy"', "no list of class names, but str"),
    "JSON of objects": ("a.json", '[{"id": 1}, {"id": 2}]', "not all of which have a name"),
    "JSON with a key twice": ("a.json", '{"pansy": [], "pansy": []}', "'pansy' stands twice"),
    "JSON nested": ("a.json", "[" * 100_000, "is not JSON"),
    "YAML of words that mean something": ("a.yaml", "- yes\n- no\n", "entry 1 is not text, but bool.*in quotes"),
    "YAML nested": ("a.yaml", "[" * 100_000, "is not YAML"),
    "CSV without names": ("a.csv", "0,pansy\n1,iris\n", "no column for the class names; its first line is '0,pansy'"),
    "CSV with a name left out": ("a.csv", "id,name\n0,pansy\n1,\n", "line 3: no value for 'name'"),
    "CSV with a comma in a name": ("a.csv", "id,name\n0,pansy, wild\n", "line 2: 3 values for 2 columns.*in quotes"),
    "CSV with an open quote": ("a.csv", 'id,name\n0,"pansy\n', "line .*quotes"),
    "CSV with a column twice": ("a.csv", "name,Name\npansy,iris\n", "2 columns named|stands twice|only 'pansy'"),
}


@pytest.mark.parametrize("case", WRONG_LISTS)
def test_read_classes__a_list_that_cannot_be_read_is_told(case: str, tmp_path: Path) -> None:
    name, content, told = WRONG_LISTS[case]
    with pytest.raises(PromptError, match=told):
        read_classes(written(tmp_path, content, name))


@pytest.mark.parametrize(
    "names",
    [
        ("737-200", "737-300", "A320"),
        ("5 euro", "10 euro", "20 euro"),
        ("7-spot ladybird", "2 spot ladybird", "harlequin"),
        ("Star Wars: A New Hope", "Alien"),
        ("gull, herring", "tench, Tinca tinca"),
        ("AM General Hummer SUV 2000", "Audi TT 2012"),
        ("class 0", "class 1"),
        ("0", "1", "2"),
        ("0.5", "1.5"),
        ("-1", "+1", "1"),
        ("C++", "C#", "F#"),
        ("'Apapane", "\u02bbo\u02bbo", "Bewick's wren"),
        ("$5", "€10", "🐈"),
        ("St. John's wort", "U.S.A."),
    ],
)
def test_read_classes__names_with_signs_and_numbers_are_names(names: tuple[str, ...], tmp_path: Path) -> None:
    assert read_classes(written(tmp_path, "\n".join(names))) == names


# --- check_classes, fold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Tabby cat", "tabby Cat"),
        ("tabby_cat", "tabby cat"),
        ("tabby-cat", "tabby cat"),
        ("tabby_-cat", "Tabby  Cat"),
        ("STRASSE", "straße"),
        ("Maße", "MASSE"),
        ("MA\u1e9eE", "maße"),
        ("-cat", "cat"),
        ("-1 b", "-1 B"),
        ("tree-", "Tree"),
        ("\ufb01nch", "finch"),
        ("café", unicodedata.normalize("NFD", "CAFÉ")),
        ("ΣΊΣΥΦΟΣ", "σίσυφος"),
    ],
)
def test_check_classes__the_same_name_but_for_spelling(first: str, second: str) -> None:
    assert fold(first) == fold(second)
    with pytest.raises(PromptError, match="are the same name but for case or spacing"):
        check_classes([first, "another", second])


@pytest.mark.parametrize("second", ["robin", " robin ", "\u3000robin\u00a0"])
def test_check_classes__the_same_name_twice(second: str) -> None:
    with pytest.raises(PromptError, match="my list: 'robin' stands twice"):
        check_classes(["robin", "wren", second], where="my list")


NEAR = [
    *[("cat", "cats"), ("a b", "ab"), ("e", "é"), ("1", "１")],
    *[("-1", "1"), ("at -5 degrees", "at 5 degrees"), ("A-", "A"), ("AB-", "AB"), ("blood O-", "blood O")],
    *[("Masse", "Maße"), ("busse", "Buße")],
]


@pytest.mark.parametrize(("first", "second"), NEAR)
def test_check_classes__near_names_are_not_the_same(first: str, second: str) -> None:
    assert check_classes([first, second]) == (first, second)


def test_matcher__takes_the_nearest_spelling_and_does_not_guess() -> None:
    meant = Matcher(["Masse", "Maße", "-1", "1"])
    names = ["masse", "maße", "MASSE", "Maße", "-1", "1", "_1", "2"]
    assert [meant(name) for name in names] == [[0], [1], [0], [1], [2], [3], [3], []]


def test_make_texts__names_that_differ_by_a_sign_have_texts_of_their_own() -> None:
    texts = make_texts(["-1", "1", "Masse", "Maße"], {"1": ["a"], "-1": ["b"], "maße": ["c"], "masse": ["d"]})
    assert texts.descriptions == (("b",), ("a",), ("d",), ("c",))
    with pytest.raises(PromptError, match="miss 1 of 2 classes: '-1'"):
        make_texts(["-1", "1"], {"1": ["a"]})


@pytest.mark.parametrize("name", ["a\x00b", "a\x07b", "\x1b[31mred", "a\x7fb", "a\x9fb"])
def test_check_classes__control_characters(name: str) -> None:
    with pytest.raises(PromptError, match="control character"):
        check_classes(["robin", name])


def test_check_classes__a_text_or_a_number_is_no_list_of_names() -> None:
    with pytest.raises(PromptError, match="Found one text, 'robin'"):
        check_classes("robin")
    not_names: Any = ["robin", 7]
    with pytest.raises(PromptError, match="7 is not text"):
        check_classes(not_names)


@pytest.mark.parametrize("names", [[], ["robin"]])
def test_check_classes__fewer_than_two(names: list[str]) -> None:
    with pytest.raises(PromptError, match="Wanted: at least two classes"):
        check_classes(names)


# --- read_descriptions ------------------------------------------------------------------------------------------------


def test_read_descriptions__as_written(tmp_path: Path) -> None:
    found = {name: [f"About {name}.", "Another."] for name in UNICODE}
    text = json.dumps(found, ensure_ascii=False)
    assert read_descriptions(written(tmp_path, text)) == found
    assert read_descriptions(written(tmp_path, "\ufeff" + text)) == found
    assert read_descriptions(written(tmp_path, json.dumps(found))) == found


@pytest.mark.parametrize("text", ["", "{", "robin: [a]", '{"robin": ["a"],}', "{'robin': ['a']}"])
def test_read_descriptions__not_json(text: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="is not JSON"):
        read_descriptions(written(tmp_path, text))


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_read_descriptions__nested_too_deep(opening: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"nested too deep|is not JSON"):
        read_descriptions(written(tmp_path, opening * 100_000))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "found NoneType"),
        (["robin"], "found list"),
        ("robin", "found str"),
        (3.5, "found float"),
        ({"robin": "a bird"}, "'robin' holds 'a bird'. Wanted: a list of sentences"),
        ({"robin": {"a": "bird"}}, "'robin' holds"),
        ({"robin": None}, "'robin' holds None"),
        ({"robin": 3}, "'robin' holds 3"),
        ({"wren": ["a"], "robin": []}, "'robin' has no description"),
        ({"robin": ["a", ""]}, "'robin' has the description ''"),
        ({"robin": ["a", " \t\n"]}, "is no sentence"),
        ({"robin": ["a", 7]}, "'robin' has the description 7"),
        ({"robin": [["a"]]}, "is no sentence"),
    ],
)
def test_read_descriptions__wrong_types(value: object, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps(value))
    with pytest.raises(PromptError, match=message) as caught:
        read_descriptions(path)
    assert str(path) in str(caught.value)


def test_read_descriptions__missing_file_folder_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"No descriptions at .*nowhere"):
        read_descriptions(tmp_path / "nowhere")
    with pytest.raises(PromptError, match="cannot be read"):
        read_descriptions(tmp_path)
    with pytest.raises(PromptError, match="cannot be read"):
        read_descriptions(written(tmp_path, '{"café": ["x"]}'.encode("latin-1")))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@few
@given(
    content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | json_values.map(json.dumps).map(str.encode)
)
def test_read_descriptions__any_file_is_descriptions_or_a_prompt_error(content: bytes, scratch: Path) -> None:
    scratch.write_bytes(content)
    try:
        found = read_descriptions(scratch)
    except PromptError as error:
        assert str(error).strip()
        return
    assert all(sentences and all(sentence.strip() for sentence in sentences) for sentences in found.values())


def test_read_descriptions__an_integer_too_long_for_python(tmp_path: Path) -> None:
    with pytest.raises(PromptError):
        read_descriptions(written(tmp_path, '{"robin": [' + "1" * 5000 + "]}"))


@pytest.mark.parametrize("second", ["robin", "cafe\u0301"])
def test_read_descriptions__a_class_twice_loses_nothing_unsaid(second: str, tmp_path: Path) -> None:
    first = unicodedata.normalize("NFC", second)
    path = written(tmp_path, f'{{"{first}": ["one."], "{second}": ["two."]}}')
    try:
        assert sorted(read_descriptions(path)[first]) == ["one.", "two."]
    except PromptError as error:
        assert first in str(error)


# --- read_templates, check_templates ----------------------------------------------------------------------------------


def test_read_templates__one_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeffa photo of a {}.\n\n  {} 的照片  \r\n")
    assert read_templates(path) == ("a photo of a {}.", "{} 的照片")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_read_templates__none(content: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="found no template"):
        read_templates(written(tmp_path, content))


def test_read_templates__missing_file(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No templates at"):
        read_templates(tmp_path / "nowhere")


@pytest.mark.parametrize("template", ["a photo.", "a {} by a {}.", "a { }.", "a {name}.", "{}{}", ""])
def test_check_templates__not_exactly_one_place_for_the_name(template: str) -> None:
    with pytest.raises(PromptError, match=r"needs exactly one \{\}"):
        check_templates(["a photo of a {}.", template])
    with pytest.raises(PromptError, match=r"needs exactly one \{\}"):
        make_texts(["robin", "wren"], templates=[template])


def test_check_templates__the_defaults_are_valid_and_differ() -> None:
    assert check_templates(DEFAULT_TEMPLATES) == DEFAULT_TEMPLATES
    assert len(set(DEFAULT_TEMPLATES)) == len(DEFAULT_TEMPLATES)


# --- make_texts -------------------------------------------------------------------------------------------------------


def test_make_texts__order_follows_the_classes() -> None:
    texts = make_texts(["wren", "robin"], TWO, ["a {}"])
    assert texts.classes == ("wren", "robin")
    assert texts.descriptions == (("A tiny brown bird.",), ("A small bird with a red breast.",))
    assert texts.templates == ("a {}",)


def test_make_texts__keeps_every_sentence_in_its_order_stripped() -> None:
    texts = make_texts(["robin", "wren"], {"robin": [" b. ", "a.", "b."], "wren": ("c.",)}, ["a {}"])
    assert texts.descriptions == (("b.", "a.", "b."), ("c.",))


@pytest.mark.parametrize("key", ["Tabby_Cat", "tabby-cat", "TABBY  CAT", " tabby cat "])
def test_make_texts__keys_match_after_folding(key: str) -> None:
    texts = make_texts(["wren", "tabby cat"], {key: ["A striped cat."], "Wren": ["A bird."]})
    assert texts.classes == ("wren", "tabby cat")
    assert texts.descriptions == (("A bird.",), ("A striped cat.",))


def test_make_texts__decomposed_keys_match_composed_names() -> None:
    key = unicodedata.normalize("NFD", "café")
    assert make_texts(["café", "wren"], {key: ["x"], "wren": ["y"]}).descriptions == (("x",), ("y",))
    assert make_texts([key, "wren"], {"café": ["x"], "wren": ["y"]}).classes == ("café", "wren")


def test_make_texts__missing_classes_are_named() -> None:
    with pytest.raises(PromptError, match="miss 2 of 4 classes: 'finch', 'gull'"):
        make_texts(["robin", "finch", "wren", "gull"], TWO)


def test_make_texts__strangers_are_named() -> None:
    with pytest.raises(PromptError, match="name 2 classes that are not in the class list: 'finch', 'gull'"):
        make_texts(["robin", "wren"], {**TWO, "gull": ["x"], "finch": ["y"]})


def test_make_texts__a_second_spelling_of_a_class_is_a_stranger() -> None:
    with pytest.raises(PromptError, match="not in the class list: 'Robin'"):
        make_texts(["robin", "wren"], {**TWO, "Robin": ["x"]})


def test_make_texts__many_missing_are_counted_not_all_listed() -> None:
    names = [f"class {number}" for number in range(100)]
    with pytest.raises(PromptError, match=r"miss 100 of 100 classes: .*'class 9' and 90 more\."):
        make_texts(names, {"class x": ["y"]})


@pytest.mark.parametrize("sentences", [[], [""], ["  "], "one text", None, [1]])
def test_make_texts__descriptions_that_say_nothing(sentences: Any) -> None:
    with pytest.raises(PromptError, match="'robin'"):
        make_texts(["robin", "wren"], {**TWO, "robin": sentences})


def test_make_texts__without_descriptions_the_filled_templates_stand_in() -> None:
    texts = make_texts(["robin", "house wren"], templates=["a {}.", "one {} here"])
    assert texts.descriptions == (("a robin.", "one robin here"), ("a house wren.", "one house wren here"))
    assert make_texts(["robin", "wren"]).templates == DEFAULT_TEMPLATES


def test_make_texts__empty_descriptions_are_not_no_descriptions() -> None:
    with pytest.raises(PromptError, match="miss 2 of 2"):
        make_texts(["robin", "wren"], {})
    with pytest.raises(PromptError, match="found no template"):
        make_texts(["robin", "wren"], TWO, [])


@pytest.mark.parametrize("name", ["{}", "a {} b", "{0}", "{name!r}", "{", "}", "%s", "a, b", '"quoted"', "\\1"])
def test_make_texts__a_name_is_never_read_as_a_template(name: str) -> None:
    texts = make_texts([name, "wren"], templates=["a photo of {}.", "{}"])
    assert texts.descriptions[0] == (f"a photo of {name}.", name)
    assert make_texts([name, "wren"], {name: ["x"], "wren": ["y"]}).descriptions == (("x",), ("y",))


@pytest.mark.parametrize("template", ["{0} {}", "a {name} of {}", "{{{}", "} {} {", "%s {}"])
def test_make_texts__other_braces_of_a_template_stay(template: str) -> None:
    start, end = template.split("{}")
    texts = make_texts(["robin", "wren"], templates=[template])
    assert texts.descriptions == ((f"{start}robin{end}",), (f"{start}wren{end}",))


def test_make_texts__checks_the_classes_too() -> None:
    with pytest.raises(PromptError, match="stands twice"):
        make_texts(["robin", "robin"])


# --- the real files ---------------------------------------------------------------------------------------------------


def test_make_texts__real_files_fit_together(shared: Path) -> None:
    folders = sorted(path.parent for path in (shared / "data").glob("*/classes.txt"))
    assert folders, f"no data sets under {shared / 'data'}"
    for folder in folders:
        lines = (folder / "classes.txt").read_text(encoding="utf-8").split("\n")
        classes = read_classes(folder / "classes.txt")
        assert list(classes) == [line.strip() for line in lines if line.strip()], folder
        descriptions = read_descriptions(folder / "descriptions.json")
        texts = make_texts(classes, descriptions)
        assert texts.classes == classes
        raw = json.loads((folder / "descriptions.json").read_text(encoding="utf-8"))
        assert [list(sentences) for sentences in texts.descriptions] == [raw[name] for name in classes], folder


def test_make_texts__real_descriptions_under_other_spellings(shared: Path) -> None:
    folder = shared / "data" / "eurosat"
    classes = read_classes(folder / "classes.txt")
    descriptions = read_descriptions(folder / "descriptions.json")
    respelled = {name.upper().replace(" ", "_"): sentences for name, sentences in reversed(descriptions.items())}
    assert make_texts(classes, respelled) == make_texts(classes, descriptions)
    del respelled[classes[0].upper().replace(" ", "_")]
    with pytest.raises(PromptError, match=f"miss 1 of {len(classes)} classes: '{classes[0]}'"):
        make_texts(classes, respelled)
