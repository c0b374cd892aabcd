"""Whatever a file holds: an error that says so, or a result that is whole. What the fuzzer found stays here as cases.

The fuzzer's targets (`fuzz/targets.py`) run here too, without it: on their seeds and on inputs mutated by chance.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.torch import save

from finealign.config import Config, make_config, read_config, read_overrides, write_config
from finealign.errors import ConfigError, FinealignError, ImageInputError, ModelError, OutputError, PromptError
from finealign.evaluate.truth import read_truth
from finealign.images.listing import list_images
from finealign.run.folder import Metrics, read_identity
from finealign.texts.prompts import check_templates, make_texts, read_classes, read_descriptions, read_templates
from finealign.training.checkpoints import read_last_checkpoint
from finealign.training.memmap import MemmapTensors, read_memmap

FUZZ = Path(__file__).parents[1] / "fuzz" / "targets.py"


def load_targets() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz_targets", FUZZ)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fuzz = load_targets()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose files hypothesis may write again and again."""
    return tmp_path_factory.mktemp("readers")


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- the fuzzer's targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_target(name: str) -> None:
    target, random = fuzz.TARGETS[name], Random(0)
    seeds = target.seeds()
    for data in [b"", *seeds, *(fuzz.mutated(seeds, random) for _ in range(300))]:
        fuzz.only_errors(target, data)


def test_targets__take_what_is_sound() -> None:
    """Every reader has a seed that it reads to the end: else nothing behind an early error would ever be looked at."""
    for name, readers in {"config": 2, "classes": 2, "descriptions": 2, "lists": 3, "run": 4, "model": 5}.items():
        sound = set()
        for seed in fuzz.TARGETS[name].seeds():
            try:
                fuzz.TARGETS[name].read(seed)
                sound.add(seed[0])
            except FinealignError:
                pass
        assert sound == set(range(readers)), name
    for seed in fuzz.TARGETS["image"].seeds():
        fuzz.TARGETS["image"].read(seed)


def of_image_tower(**preprocess: Any) -> bytes:
    found = json.loads(fuzz.model_files()["open_clip_config.json"])
    found["preprocess_cfg"] |= preprocess
    return b"\4" + json.dumps(found).encode()


def of_tensors(**changes: torch.Tensor) -> bytes:
    from safetensors.torch import load

    tensors = load(fuzz.model_files()["finealign.safetensors"])
    return b"\2" + save(tensors | {name.replace("__", "."): value for name, value in changes.items()})


def of_header(header: Any, length: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return b"\3" + len(text).to_bytes(8, "little") + text + bytes(length)


def of_checkpoint(values: str) -> bytes:
    return b"\2" + save({"x": torch.ones(1)}, {"finealign": values})


FOUND: dict[str, tuple[str, Any]] = {
    # settings
    "a mapping in itself": ("config", b"\0tzaining: &t {epIHDRodescri<: *t, crops: 4}"),
    "a number larger than any float": ("config", b"\1training.steps=0x" + b"f" * 500),
    "a number that Python does not write": ("config", b"\1device=0x" + b"f" * 5000),
    "the same in the method": ("config", b"\1method.x=0x" + b"f" * 5000),
    "a line separator": ("config", b'\1backbone="\\L"\0method.x="a\\N\\Nb"'),
    "half of a character": ("config", b'\1data.cache="\\ud800"'),
    "a date of no use": ("config", b"\1method.x=2001-01-01"),
    # texts
    "half of a character in a class": ("descriptions", b'\0{"\\ud800": ["x"]}'),
    # run folder
    "an identity nested too deep": ("run", b"\0" + b"[" * 100_000),
    "metrics of a list": ("run", b"\1[]\n"),
    "metrics of a number": ("run", b"\1" + b"3\n"),
    "metrics without an epoch": ("run", b'\1{"seconds": 1}\n'),
    "metrics of epoch null": ("run", b'\1{"epoch": null}\n'),
    "metrics of epoch one as text": ("run", b'\1{"epoch": "1"}\n'),
    "metrics not in UTF-8": ("run", b'\1{"epoch": 1}\n\xff\n'),
    "metrics nested too deep": ("run", b"\1" + b"[" * 100_000),
    "a checkpoint whose values are a list": ("run", of_checkpoint("[]")),
    "a checkpoint whose values are null": ("run", of_checkpoint("null")),
    "a checkpoint whose values are nested too deep": ("run", of_checkpoint("[" * 100_000)),
    "a checkpoint of epoch one as text": ("run", of_checkpoint('{"epoch": "1"}')),
    "a checkpoint of a step that is true": ("run", of_checkpoint('{"epoch": 1, "step": true}')),
    "a checkpoint before the first": ("run", of_checkpoint('{"epoch": -1}')),
    "a map nested too deep": ("run", of_header(b"[" * 60_000)),
    "a map of a list": ("run", of_header([1])),
    "a map with a shape beyond any number": (
        "run",
        of_header({"a": {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}}),
    ),
    "a map with a shape of floats": (
        "run",
        of_header({"a": {"dtype": "F32", "shape": [0.5], "data_offsets": [0, 2]}}, 4),
    ),
    "a map that begins in its header": (
        "run",
        of_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8),
    ),
    "a map with a place beyond any number": (
        "run",
        of_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [10**30, 10**30 + 4]}}, 4),
    ),
    # saved model
    "a logit scale as text": ("model", b'\1{"logit_scale": "1"}'),
    "a logit scale of a list": ("model", b'\1{"logit_scale": [1]}'),
    "checksums of lists": ("model", b'\1{"sha256": [[]]}'),
    "descriptions of a number": ("model", b'\1{"descriptions": {"robin": 3}}'),
    "settings that are a list": ("model", b'\1{"config": [1]}'),
    "settings that are not resolved": ("model", b'\1{"config": {}}'),
    "names of another width": ("model", of_tensors(texts__names=torch.ones(3, 9))),
    "classes of descriptions out of range": ("model", of_tensors(texts__class_of=torch.full((6,), 99))),
    "a colour mode that open_clip does not know": ("model", of_image_tower(mode="rGB")),
    "a mean of one number": ("model", of_image_tower(mean=[0.5])),
    "a way to resize that open_clip does not know": ("model", of_image_tower(resize_mode="x")),
}


@pytest.mark.parametrize("case", FOUND)
def test_found(case: str) -> None:
    name, data = FOUND[case]
    fuzz.only_errors(fuzz.TARGETS[name], data)


# --- settings ---------------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.binary(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**300), 10**300) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
PLACES: list[tuple[str, ...]] = [(name,) for name in Config.model_fields]
PLACES += [
    (name, key) for name, section in Config() if isinstance(section, BaseModel) for key in type(section).model_fields
]


@settings(max_examples=200, deadline=None)
@given(place=st.sampled_from(PLACES), value=anything)
@example(place=("device",), value=16**5000)
@example(place=("views", "crops"), value=True)
@example(place=("training", "steps"), value=10**400)
def test_make_config__any_value_anywhere(place: tuple[str, ...], value: Any) -> None:
    values: Any = value
    for key in reversed(place):
        values = {key: values}
    try:
        config = make_config(values)
    except ConfigError as error:
        assert str(error).startswith(place[0])
        str(error).encode()
    else:
        assert make_config(config.model_dump()) == config


@settings(max_examples=100, deadline=None)
@given(value=yaml_values)
def test_read_overrides__any_value_comes_back(value: Any) -> None:
    shown = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    assert read_overrides([f"method.x={shown}"]) == {"method": {"x": value}}


@settings(max_examples=100, deadline=None)
@given(options=st.dictionaries(text, yaml_values, max_size=3), backbone=text)
@example(options={"\x85": "\u2028\u2029"}, backbone="a\x85\x85b")
def test_write_config__any_option_comes_back(options: dict[str, Any], backbone: str, scratch: Path) -> None:
    config = make_config({"backbone": backbone, "method": {**options, "name": "fair"}})
    write_config(config, scratch / "config.yaml")
    assert read_config(scratch / "config.yaml") == config


@settings(max_examples=100, deadline=None)
@given(values=st.dictionaries(text, yaml_values, min_size=1, max_size=5), data=st.data())
def test_read_config__a_key_twice_is_never_silent(values: dict[str, Any], data: Any, scratch: Path) -> None:
    twice = data.draw(st.sampled_from(sorted(values)))
    lines = [yaml.safe_dump({key: value}, allow_unicode=False) for key, value in [*values.items(), (twice, 1)]]
    with pytest.raises(ConfigError, match="stands twice"):
        read_config(written(scratch / "twice.yaml", "".join(lines)))


# --- texts ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(names=st.lists(st.text(max_size=8), min_size=1, max_size=5))
@example(names=["a", "b\u200b"])
@example(names=["\ufeffa", "b"])
def test_read_classes__what_is_read_reads_again(names: list[str], scratch: Path) -> None:
    try:
        found = read_classes(written(scratch / "classes.txt", "\n".join(names).encode("utf-8", "surrogatepass")))
    except PromptError as error:
        str(error).encode()
    else:
        assert read_classes(written(scratch / "again.txt", "\n".join(found))) == found
        assert make_texts(found).classes == found


sentences = st.lists(st.text(max_size=8) | anything, max_size=3)


@settings(max_examples=200, deadline=None)
@given(found=st.dictionaries(st.text(max_size=6), sentences | anything, max_size=4) | anything)
@example(found={"\ud800": ["x"]})
@example(found={"a": ["\udfff"]})
def test_read_descriptions__any_json(found: Any, scratch: Path) -> None:
    path = written(scratch / "descriptions.json", json.dumps(found, default=str))
    try:
        descriptions = read_descriptions(path)
    except PromptError as error:
        str(error).encode()
    else:
        again = written(scratch / "again.json", json.dumps(descriptions, ensure_ascii=False))
        assert read_descriptions(again) == descriptions


@settings(max_examples=200, deadline=None)
@given(
    content=st.binary(max_size=60) | st.lists(st.sampled_from(["{}", "{", "}", "a", "\n", "\r", "\ufeff"])).map("".join)
)
def test_read_templates__any_file(content: bytes | str, scratch: Path) -> None:
    try:
        templates = read_templates(written(scratch / "templates.txt", content))
    except PromptError as error:
        str(error).encode()
    else:
        assert check_templates(templates) == templates
        assert all(len(group) == len(templates) for group in make_texts(["a", "b"], None, templates).descriptions)


# --- lists ------------------------------------------------------------------------------------------------------------

PIECES = [
    "path",
    "label",
    ",",
    "\n",
    "\r\n",
    '"',
    "a.png",
    "robin",
    "wren",
    " ",
    "#",
    "\ufeff",
    "\0",
    "é",
    "/",
    "..",
    "",
]
tables = st.lists(st.sampled_from(PIECES), max_size=20).map("".join) | st.binary(max_size=60)


@pytest.mark.filterwarnings("ignore:Left out, as no class of the model is called so")
@settings(max_examples=200, deadline=None)
@given(
    content=tables | tables.map(lambda rows: "path,label\n" + rows if isinstance(rows, str) else b"path,label\n" + rows)
)
def test_lists__any_file(content: bytes | str, scratch: Path) -> None:
    written(scratch / "a.png", b"\x89PNG")
    for name in ("list.txt", "list.csv"):
        try:
            assert list_images(written(scratch / name, content))
        except ImageInputError as error:
            str(error).encode()
    try:
        truth = read_truth(scratch / "list.csv", ["robin", "wren"])
    except ImageInputError as error:
        str(error).encode()
    else:
        assert len(truth.paths) == len(truth.labels) > 0
        assert set(truth.labels) <= {0, 1}


# --- run folder -------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(max_size=40) | (json_values | json_values.map(lambda value: {"identity": value})).map(json.dumps)
)
def testread_identity__any_file(content: bytes | str, scratch: Path) -> None:
    try:
        assert isinstance(read_identity(written(scratch / "run.json", content)), dict)
    except OutputError as error:
        str(error).encode()


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(
        st.binary(max_size=12)
        | json_values.map(lambda value: json.dumps(value).encode())
        | (st.integers(1, 4) | json_values).map(lambda epoch: json.dumps({"epoch": epoch}).encode()),
        max_size=5,
    )
)
def test_metrics__any_file(lines: list[bytes], scratch: Path) -> None:
    metrics = Metrics(written(scratch / "metrics.jsonl", b"\n".join(lines)))
    metrics.add(fuzz.EPOCH)
    epochs = [record["epoch"] for record in metrics.records()]
    assert epochs[-1] == fuzz.EPOCH.epoch
    assert all(epoch < fuzz.EPOCH.epoch for epoch in epochs[:-1])


@settings(max_examples=200, deadline=None)
@given(
    values=json_values | st.fixed_dictionaries({"epoch": json_values}, optional={"step": json_values, "x": json_values})
)
def test_read_last_checkpoint__any_values(values: Any, scratch: Path) -> None:
    folder = scratch / "checkpoints"
    folder.mkdir(exist_ok=True)
    written(folder / "epoch-0001.safetensors", save({"x": torch.ones(2)}, {"finealign": json.dumps(values)}))
    try:
        found = read_last_checkpoint(folder)
    except ModelError as error:
        str(error).encode()
    else:
        assert found is not None
        assert {"epoch": found.epoch, "step": found.step} | found.values == {"step": 0} | values


shapes = st.dictionaries(
    st.text(max_size=5).filter(lambda name: name != "__metadata__"),
    st.lists(st.integers(0, 4), max_size=4),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(shapes=shapes)
def test_read_mapped__any_shapes_come_back(shapes: dict[str, list[int]], scratch: Path) -> None:
    MemmapTensors(scratch / "mapped.safetensors", shapes).finish()
    found = read_memmap(scratch / "mapped.safetensors")
    assert {name: list(value.shape) for name, value in found.items()} == shapes


numbers = st.integers(-8, 16) | json_values | st.sampled_from([2**31, 2**63, 10**30])
entries = st.fixed_dictionaries(
    {
        "dtype": st.just("F32") | json_values,
        "shape": st.lists(numbers, max_size=3) | json_values,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3), entries, max_size=2) | json_values, length=st.integers(0, 80))
@example(header={"a": {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}}, length=0)
@example(header={"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, length=8)
def test_read_mapped__any_header(header: Any, length: int, scratch: Path) -> None:
    head = json.dumps(header).encode()
    path = written(scratch / "headed.safetensors", len(head).to_bytes(8, "little") + head + bytes(length))
    try:
        found = read_memmap(path)
    except (OSError, ValueError):
        return
    assert sum(4 * value.numel() for value in found.values()) == length
    assert all(not value.any() for value in found.values())  # of the file's end, which is nought


# --- saved model ------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(sorted(json.loads(fuzz.model_files()["finealign.json"]))), value=anything)
def test_read_model__any_value_in_the_manifest(key: str, value: Any) -> None:
    fuzz.only_errors(fuzz.TARGETS["model"], b"\1" + json.dumps({key: value}, default=str).encode())
