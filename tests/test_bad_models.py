"""Settings and models that could break a run, or do harm: each ends in a stated error, and soon."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from conftest import CLASSES, tiny_config, write_photos
from finealign import FineAlign
from finealign.backbone.load import load_backbone
from finealign.config import MOST_BYTES, make_config, read_config
from finealign.errors import BackboneError, ConfigError, ModelError

Tiny = Callable[[str], str]
Change = Callable[[Path], object]


# --- settings ---------------------------------------------------------------------------------------------------------


def bomb(kind: str, depth: int = 30) -> str:
    """Nine to the power of ``depth`` values in a few hundred bytes."""
    lines = ["a0: &a0 [x]" if kind == "list" else "a0: &a0 {x: 1}"]
    for level in range(1, depth):
        below = f"*a{level - 1}"
        many = {
            "list": f"[{', '.join([below] * 9)}]",
            "mapping": f"{{{', '.join(f'k{key}: {below}' for key in range(9))}}}",
            "merge": f"{{<<: [{', '.join([below] * 9)}], k{level}: 1}}",
        }
        lines.append(f"a{level}: &a{level} {many[kind]}")
    return "\n".join(lines)


SETTINGS: dict[str, tuple[str | bytes, str]] = {
    # unknown names
    "unknown key": ("sed: 3", r"sed: Unknown setting 'sed'\. Did you mean 'seed'\? Valid: "),
    "unknown section": ("trainning: {epochs: 3}", r"Unknown setting 'trainning'\. Did you mean 'training'\?"),
    "unknown key below": (
        "training: {epoch: 3}",
        r"training\.epoch: Unknown setting 'epoch'\. Did you mean 'epochs'\?",
    ),
    "key in the wrong section": ("views: {epochs: 3}", r"views\.epochs: Unknown setting 'epochs'\."),
    "key of no shape": ("'': 3", "Unknown setting ''"),
    "class attribute": ("model_config: {}", "Unknown setting 'model_config'"),
    "dunder": ("__class__: {}", "Unknown setting '__class__'"),
    # wrong types
    "text for a number": ("training: {epochs: many}", r"training\.epochs: found 'many'"),
    "list for a number": ("seed: [1]", r"seed: found \[1\]"),
    "section for a number": ("seed: {a: 1}", r"seed: found \{'a': 1\}"),
    "null for a number": ("seed:", "seed: found None"),
    "fraction for a whole number": ("seed: 1.5", "seed: found 1.5"),
    "true for a number": ("seed: true", "seed: found True. A number is wanted"),
    "yes for a number or auto": ("training: {epochs: yes}", r"training\.epochs: found True. A number is wanted"),
    "on for a share": ("views: {crop_low: on}", r"views\.crop_low: found True. A number is wanted"),
    "date for a number": ("seed: 2001-01-01", "seed: found datetime"),
    "date for text": ("device: 2001-01-01", "device: found datetime"),
    "number for text": ("backbone: 3", "backbone: found 3"),
    "list for text": ("device: [cpu]", r"device: found \['cpu'\]"),
    "bytes for a number": ("seed: !!binary aGVsbG8=", "seed: found b'hello'"),
    "set for a section": ("training: !!set {epochs}", "training: found {'epochs'}"),
    "number for a section": ("training: 5", "training: found 5"),
    "list for a section": ("views: [1]", r"views: found \[1\]"),
    "null for a section": ("training:", "training: found None"),
    "number for a method's name": ("method: {name: 3}", r"method\.name: found 3"),
    "section in a section": ("training: {epochs: {steps: {a: 1}}}", r"training\.epochs: found \{'steps': "),
    "unknown choice": ("precision: fp64", "precision: found 'fp64'.* Valid: auto, fp32, bf16, fp16"),
    "policy that is none": ("views: {randaugment: 'rand-m9); import os'}", r"views\.randaugment: found "),
    # out of range, or no number
    "negative": ("seed: -1", "seed: found -1"),
    "nought": ("views: {crops: 0}", r"views\.crops: found 0"),
    "infinite": ("training: {learning_rate: .inf}", r"training\.learning_rate: found inf"),
    "negative infinity": ("data: {cache_gb: -.inf}", r"data\.cache_gb: found -inf"),
    "not a number": ("views: {crop_high: .nan}", r"views\.crop_high: found nan"),
    "infinite by its exponent": ("training: {weight_decay: 1.0e+999}", r"training\.weight_decay: found inf"),
    "infinite whole number": ("views: {crops: .inf}", r"views\.crops: found inf"),
    "beyond 64 bits": ("seed: 18446744073709551616", "seed: found 18446744073709551616"),
    "count beyond 64 bits": ("training: {steps: 1000000000000000000000}", r"training\.steps: found 1000000"),
    "beyond any float": (f"seed: {10**400}", "is not YAML: a number of 1329 bits is too large"),
    "beyond Python's digits": ("seed: " + "9" * 5000, "is not YAML: Exceeds the limit"),
    "beyond Python's digits in hexadecimal": ("seed: 0x" + "f" * 5000, "a number of 20000 bits is too large"),
    "the same as text": ("device: 0x" + "f" * 5000, "a number of 20000 bits is too large"),
    "the same in the method": ("method: {tau: 0b" + "1" * 9000 + "}", "a number of 9000 bits is too large"),
    # what only YAML can do
    "key twice": ("seed: 1\ndevice: cpu\nseed: 2", r"the key 'seed' stands twice in one section.*line 3"),
    "key twice in other quotes": ("{seed: 1, 'seed': 2}", "the key 'seed' stands twice"),
    "section twice": ("training: {epochs: 1}\ntraining: {steps: 1}", "the key 'training' stands twice"),
    "key twice below": ("method:\n  name: fair\n  x: {y: [{z: 1, z: 1}]}", "the key 'z' stands twice"),
    "merge key twice": ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "the key '<<' stands twice"),
    "bomb of lists": (bomb("list"), "holds more than 10,000 values"),
    "bomb of mappings": (bomb("mapping"), "holds more than 10,000 values"),
    "bomb of merges": (bomb("merge"), "holds more than 10,000 values"),
    "bomb in the method": ("method:\n " + bomb("list").replace("\n", "\n "), "holds more than 10,000 values"),
    "small bomb": (bomb("list", 4), "Unknown setting 'a0'"),
    "list in itself": ("seed: &a [*a]", "a value holds itself"),
    "mapping in itself": ("method: &a {name: fair, x: *a}", "a value holds itself"),
    "mapping merged into itself": ("method: &a {<<: *a}", "a value holds itself"),
    "mapping in itself, deep": ("method: &a {x: [{y: [*a]}]}", "a value holds itself"),
    "unknown alias": ("seed: *a", "is not YAML"),
    "merge of a number": ("training: {<<: 3}", "is not YAML"),
    "key that is a list": ("? [a]\n: 1", "is not YAML|holds no settings"),
    "key that is a number": ("1: 2", "holds no settings"),
    "two documents": ("seed: 1\n---\nseed: 2", "is not YAML"),
    "no document": ("just words", "holds no settings"),
    "list of settings": ("- seed: 3", "holds no settings"),
    "torn": ("training: {epochs: 3", "is not YAML"),
    "tab": ("training:\n\tepochs: 3", "is not YAML"),
    "nested too deep": ("method: " + "{a: " * 3000, "is not YAML"),
    "many values": ("method: {x: [" + "1," * 20_000 + "]}", "holds more than 10,000 values"),
    "half a character": ('device: "\\ud800"', "surrogates not allowed"),
    "half a character in a key": ('method: {"\\ud800": 1}', "surrogates not allowed"),
    # not text
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "cannot be read as UTF-8 text"),
    "nulls": (bytes(100), "is not YAML"),
    "UTF-16 cut": ("seed: 3".encode("utf-16")[:-1], "cannot be read as UTF-8 text"),
    "random bytes": (bytes(range(128, 256)) * 9, "cannot be read as UTF-8 text"),
    "pickle": (pickle.dumps({"seed": 3}), "cannot be read as UTF-8 text"),
    "escape codes": ("seed: \x1b[31m3", "is not YAML"),
    "as large as a disk": (b"#" * (MOST_BYTES + 1), "holds 100,001 bytes"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str, tmp_path: Path) -> None:
    content, message = SETTINGS[case]
    path = tmp_path / "settings.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(path)
    assert len(str(caught.value)) < 20_000
    str(caught.value).encode()


CODE = [
    "!!python/object/apply:os.system ['touch CANARY']",
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.PosixPath [CANARY]]",
    "!!python/object/apply:builtins.open [CANARY, w]",
    "!!python/object/new:os.system ['touch CANARY']",
    "!!python/object:pathlib.PosixPath {}",
    "!!python/name:os.system ''",
    "!!python/module:os ''",
    "!!python/tuple [1]",
    "!!python/str x",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch CANARY']",
    "!e!object/apply:os.system ['touch CANARY']",
    "!own {}",
]


@pytest.mark.parametrize("way", ["file", "override"])
@pytest.mark.parametrize("value", CODE)
def test_settings__a_tag_never_constructs(value: str, way: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    value = value.replace("CANARY", str(canary))
    with pytest.raises(ConfigError, match="is not YAML"):
        if way == "override":
            read_config(None, [f"method.x={value}"])
        path = tmp_path / "settings.yaml"
        path.write_text(f"%TAG !e! tag:yaml.org,2002:python/\n---\nmethod: {{x: {value}}}", encoding="utf-8")
        read_config(path)
    assert not canary.exists()


def test_settings__an_anchor_of_use_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "training: &t {epochs: 3, steps: 4}\nmethod: {name: fair, a: *t, b: {<<: *t, epochs: 5}}\n", encoding="utf-8"
    )
    config = read_config(path)
    assert config.training.epochs == 3
    assert config.method.options == {"a": {"epochs": 3, "steps": 4}, "b": {"epochs": 5, "steps": 4}}


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link_to_itself(path: Path) -> Path:
    path.symlink_to(path)
    return path


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none.yaml", "No configuration file at "),
    "folder": (lambda folder: folder, "not a regular file"),
    "pipe": (lambda folder: pipe(folder / "pipe.yaml"), "not a regular file"),
    "device without an end": (lambda folder: Path("/dev/zero"), "not a regular file"),
    "link to itself": (lambda folder: link_to_itself(folder / "loop.yaml"), "cannot be read"),
    "name with a null byte": (lambda folder: folder / "a\0b.yaml", "cannot be read"),
    "name too long": (lambda folder: folder / ("x" * 300), "cannot be read"),
    "below a file": (lambda folder: Path(__file__) / "settings.yaml", "cannot be read"),
}


@pytest.mark.parametrize("case", PLACES)
def test_settings__a_place_that_is_no_file(case: str, tmp_path: Path) -> None:
    make, message = PLACES[case]
    with pytest.raises(ConfigError, match=message):
        read_config(make(tmp_path))


def test_settings__that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "settings.yaml").write_text("seed: 3", encoding="utf-8")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match="permission denied"):
        read_config(tmp_path / "settings.yaml")


@pytest.mark.parametrize("value", [16**5000, [16**5000], {"a": 16**5000}], ids=["plain", "list", "mapping"])
def test_make_config__a_number_that_python_does_not_write(value: object) -> None:
    with pytest.raises(ConfigError, match="device: found a very large number"):
        make_config({"device": value})


@pytest.mark.parametrize("case", ["key twice", "bomb of lists", "picture", "as large as a disk", "nested too deep"])
def test_settings__on_the_command_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finealign.cli import main

    content, _ = SETTINGS[case]
    path = tmp_path / "settings.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    (tmp_path / "images").mkdir()
    command = ["finealign", "adapt", str(tmp_path / "images"), "--classes", "a,b", "--config", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr()
    assert stopped.value.code not in (0, None)
    assert "settings.yaml" in (told.err + told.out).replace("\n", "")
    assert "Traceback" not in told.err + told.out


# --- saved models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tiny_backbone: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved")
    config = tiny_config(tiny_backbone("transformer"), training__epochs=1, training__anchor_steps=1)
    FineAlign(CLASSES, config=config).fit(write_photos(place / "photos", each=2)).save(place / "model")
    return place / "model"


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def sealed(folder: Path, name: str = "", content: bytes = b"") -> None:
    """The file with other content, and a saved model's checksums made to fit, so that what was changed is looked at."""
    if name:
        (folder / name).write_bytes(content)
    path = folder / "finealign.json"
    if path.exists():
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["sha256"] = {kept: sha256((folder / kept).read_bytes()).hexdigest() for kept in manifest["sha256"]}
        path.write_text(json.dumps(manifest), encoding="utf-8")


def manifest(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "finealign.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(found | changes), encoding="utf-8")

    return change


def without(key: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "finealign.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        del found[key]
        path.write_text(json.dumps(found), encoding="utf-8")

    return change


def setting(section: str, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "finealign.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        (found["inference"][section] if section else found["inference"]).update(changes)
        path.write_text(json.dumps(found), encoding="utf-8")

    return change


def file(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def folder_in_place(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def tensors(**changes: Any) -> Change:
    """Tensors replaced, or taken out where None; ``__`` for the dot."""

    def change(folder: Path) -> None:
        path = folder / "finealign.safetensors"
        found = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
        save_file({name: value for name, value in found.items() if value is not None}, path)
        sealed(folder)

    return change


def start_used(**changes: Any) -> Change:
    """As ``tensors``, in a model whose start is in use."""

    def change(folder: Path) -> None:
        FineAlign.load(folder, use="start", device="cpu").save(folder)
        tensors(**changes)(folder)

    return change


def torn(name: str, kept: float) -> Change:
    """Cut to a share of the file, or of so many bytes; the checksum is that of what is left."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        sealed(folder, name, content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])

    return change


def header(name: str, length: int) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        sealed(folder, name, length.to_bytes(8, "little") + content[8:])

    return change


def weights(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in changes.items()}
        save_file({name: value for name, value in found.items() if value is not None}, folder / WEIGHTS)

    return change


OURS, WEIGHTS = "finealign.safetensors", "open_clip_model.safetensors"
NAN = torch.full((3, 32), float("nan"))
MODELS: dict[str, tuple[Change, str]] = {
    # the manifest as a file
    "manifest missing": (lambda folder: (folder / "finealign.json").unlink(), "No model at "),
    "manifest a folder": (
        folder_in_place("finealign.json"),
        "No model at ",
    ),
    "manifest empty": (file("finealign.json", b""), "cannot be read"),
    "manifest torn": (file("finealign.json", b'{"format": 1, "cl'), "cannot be read"),
    "manifest binary": (file("finealign.json", bytes(range(256))), "cannot be read"),
    "manifest nested too deep": (file("finealign.json", b"[" * 100_000), "cannot be read"),
    "manifest a number too long": (file("finealign.json", b"9" * 5000), "cannot be read"),
    "manifest a list": (file("finealign.json", b"[]"), "is of format None"),
    "manifest null": (file("finealign.json", b"null"), "is of format None"),
    "manifest with nothing in it": (file("finealign.json", b"{}"), "is of format None"),
    # its fields
    "format of the future": (manifest(format=3), "is of format 3; this version, .*, reads formats 1 and 2"),
    "format of the past without its settings": (manifest(format=1), "is not whole: KeyError: 'config'"),
    "format as text": (manifest(format="1"), "is of format '1'"),
    "format a truth": (manifest(format=True), "is of format True"),
    "format a list": (manifest(format=[1]), r"is of format \[1\]"),
    "unknown key": (manifest(classs=[]), "Unknown setting 'classs'. Did you mean 'classes'"),
    **{
        f"no {key}": (without(key), f"is not whole: {key}: ")
        for key in (
            "finealign",
            "classes",
            "descriptions",
            "templates",
            "logit_scale",
            "inference",
            "training",
            "sha256",
        )
    },
    "version a number": (manifest(finealign=1), "finealign: found 1"),
    "classes a number": (manifest(classes=3), "classes: found 3"),
    "classes a text": (manifest(classes="red"), "classes: found 'red'"),
    "classes of numbers": (manifest(classes=[1, 2, 3]), "classes: found 1"),
    "classes a mapping": (manifest(classes={"red": 1}), "classes: found "),
    "classes none": (manifest(classes=[]), "classes: found "),
    "classes other": (manifest(classes=["red", "green", "grey"]), "descriptions are not those of its classes"),
    "classes twice": (manifest(classes=["red", "green", "blue", "blue"]), "descriptions are not those of its classes"),
    "classes in another order": (manifest(classes=["green", "red"]), "descriptions are not those of its classes"),
    "descriptions a list": (manifest(descriptions=[]), "descriptions: found "),
    "descriptions of text": (manifest(descriptions={"red": "a"}), "descriptions: found 'a'"),
    "descriptions of numbers": (manifest(descriptions={"red": [1]}), "descriptions: found 1"),
    "descriptions without one": (manifest(descriptions={"red": []}), "descriptions: found "),
    "descriptions too few": (
        manifest(descriptions={"red": ["a"], "green": ["b"], "blue": ["c"]}),
        "class_of does not follow the descriptions",
    ),
    "templates a text": (manifest(templates="a {}"), "templates: found 'a {}'"),
    "templates none": (manifest(templates=[]), "templates: found "),
    "templates of null": (manifest(templates=[None]), "templates: found None"),
    "logit_scale a text": (manifest(logit_scale="100"), "logit_scale: found '100'"),
    "logit_scale a list": (manifest(logit_scale=[100.0]), "logit_scale: found "),
    "logit_scale a truth": (manifest(logit_scale=True), "logit_scale: found True"),
    "logit_scale null": (manifest(logit_scale=None), "logit_scale: found None"),
    "logit_scale nought": (manifest(logit_scale=0.0), "logit_scale: found 0"),
    "logit_scale negative": (manifest(logit_scale=-5.0), "logit_scale: found -5"),
    "logit_scale NaN": (manifest(logit_scale=float("nan")), "logit_scale: found nan"),
    "logit_scale infinite": (manifest(logit_scale=float("inf")), "logit_scale: found inf"),
    "use a number": (manifest(use=1), "use: found 1"),
    "use unknown": (manifest(use="both"), "use: found 'both'"),
    "use null": (manifest(use=None), "use: found None"),
    "use the other without its tensors": (manifest(use="start"), "holds a tensor 'start.* that no such model has"),
    "sha256 a list": (manifest(sha256=[WEIGHTS, OURS]), "sha256: found "),
    "sha256 of numbers": (manifest(sha256={WEIGHTS: 1, OURS: 2}), "sha256: found 1"),
    "sha256 null": (manifest(sha256=None), "sha256: found None"),
    "sha256 of nothing": (manifest(sha256={}), "a checksum is missing"),
    "sha256 of one alone": (manifest(sha256={WEIGHTS: "0" * 64}), "a checksum is missing"),
    "sha256 of another file": (
        manifest(sha256={WEIGHTS: "", OURS: "", "../../etc/passwd": ""}),
        "a checksum is missing",
    ),
    "sha256 other": (manifest(sha256={WEIGHTS: "0" * 64, OURS: "0" * 64}), "its checksum differs"),
    "sha256 empty": (manifest(sha256={WEIGHTS: "", OURS: ""}), "its checksum differs"),
    "inference a list": (manifest(inference=[]), "inference: found "),
    "inference null": (manifest(inference=None), "inference: found None"),
    "inference with nothing in it": (manifest(inference={}), "inference.backbone: "),
    "inference of a future version": (setting("", warm_up=3), "Unknown setting 'warm_up'"),
    "inference of a wrong type": (setting("", crops="many"), "inference.crops: found 'many'"),
    "inference unresolved": (setting("", working_size="auto"), "inference.working_size: found 'auto'"),
    "a score that is none": (setting("", score="lass"), "inference.score: found 'lass'"),
    "a method that is none": (setting("method", name="fairer"), "Unknown method 'fairer'. Did you mean 'fair'"),
    "a method outside": (setting("method", name="../fair"), "Unknown method "),
    "an unknown option": (setting("method", anchors=3), "Unknown setting 'anchors'"),
    "an option of another shape": (setting("method", anchors_per_class=2), "cannot be read: Error.*size mismatch"),
    "training a list": (manifest(training=[]), "training: found "),
    # tensor files
    **{
        f"{name} cut to {kept}": (torn(name, kept), "cannot be read|does not load")
        for name in (OURS, WEIGHTS)
        for kept in (0, 4, 8, 50, 0.3, 0.9, 0.9999)
    },
    **{
        f"{name} with a header of {length} bytes": (header(name, length), "cannot be read|does not load")
        for name in (OURS, WEIGHTS)
        for length in (0, 1, 2**31, 2**63, 2**64 - 1)
    },
    "tensors missing": (lambda folder: (folder / OURS).unlink(), f"{OURS} is missing"),
    "weights missing": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "tensors changed": (
        lambda folder: (folder / OURS).write_bytes((folder / OURS).read_bytes() + b"x"),
        "checksum differs",
    ),
    "tensors of nothing": (lambda folder: sealed(folder, OURS, save({})), "texts.names"),
    "names lacking": (tensors(texts__names=None), "'texts.names'"),
    "names wide": (tensors(texts__names=torch.ones(3, 33)), "texts.names is torch.float32 of shape"),
    "names too few": (tensors(texts__names=torch.ones(2, 32)), "texts.names is torch.float32 of shape"),
    "names in half": (tensors(texts__names=torch.ones(3, 32).half()), "texts.names is torch.float16"),
    "names without a shape": (tensors(texts__names=torch.tensor(1.0)), "texts.names is torch.float32 of shape"),
    "names not finite": (tensors(texts__names=NAN), "texts.names is not finite"),
    "descriptions narrow": (tensors(texts__descriptions=torch.ones(18, 1)), "texts.descriptions is torch.float32"),
    "class_of lacking": (tensors(texts__class_of=None), "'texts.class_of'"),
    "class_of of floats": (tensors(texts__class_of=torch.zeros(18)), "class_of does not follow"),
    "class_of out of range": (tensors(texts__class_of=torch.full((18,), 99)), "class_of does not follow"),
    "class_of short": (tensors(texts__class_of=torch.zeros(2, dtype=torch.int64)), "class_of does not follow"),
    "a tensor of the method lacking": (
        tensors(method__anchors__value=None, method__anchors=None),
        "the method's tensors are",
    ),
    "a tensor of the method extra": (tensors(method__more=torch.ones(1)), "the method's tensors are .*more"),
    "a tensor extra": (tensors(more=torch.ones(1)), "holds a tensor 'more' that no such model has"),
    # what tells strangers
    **{
        f"{use}'s {name} {how}": (
            tensors(**{f"strangers__{use}__{name}": value}),
            f"cannot be read: .*{name} of a stranger model is {told}",
        )
        for use in ("start", "adapted")
        for name, how, value, told in (
            ("mean", "not finite", NAN[0], "torch.float32 of shape .32,., not finite"),
            ("anchors", "not finite", NAN, "torch.float32 of shape .3, 32., not finite"),
            ("bias", "not finite", torch.tensor(float("-inf")), "torch.float32 of shape .., not finite"),
            ("weights", "short", torch.ones(2), "torch.float32 of shape .2,., not"),
            ("quantiles", "short", torch.ones(100), "torch.float32 of shape .100,., not"),
            ("quantiles", "out of range", torch.full((101,), 1.5), r"not in \[0, 1\]"),
            ("openness", "in double", torch.tensor(0.5).double(), "torch.float64"),
            ("openness", "a vector", torch.ones(2), "torch.float32 of shape .2,., not"),
            ("openness", "out of range", torch.tensor(-1.0), r"not in \[0, 1\]"),
            ("scale", "nought", torch.tensor(0.0), "not above 0"),
            ("cosine_deviation", "of two classes", torch.ones(2), "torch.float32 of shape .2,., not"),
            ("cosine_deviation", "negative", -torch.ones(3), "not above 0"),
            ("claim_deviation", "nought", torch.zeros(2), "not above 0"),
        )
    },
    "strangers of four classes": (
        tensors(
            strangers__start__anchors=torch.ones(4, 32),
            strangers__start__cosine_mean=torch.ones(4),
            strangers__start__cosine_deviation=torch.ones(4),
        ),
        r"what tells strangers is for \(4, 32\), not \(3, 32\)",
    ),
    "strangers of a scalar mean": (tensors(strangers__start__mean=torch.tensor(1.0)), "cannot be read"),
    "strangers of anchors in a row": (tensors(strangers__start__anchors=torch.ones(32)), "cannot be read"),
    "strangers without a tensor": (tensors(strangers__adapted__share=None), "the tensors of a stranger model are "),
    "strangers with one more": (tensors(strangers__start__more=torch.ones(1)), "the tensors of a stranger model are "),
    "strangers of another model": (
        tensors(strangers__other__mean=torch.ones(32)),
        "holds a tensor 'strangers.other.mean' that no such model has",
    ),
    "a text extra": (tensors(texts__more=torch.ones(1)), "holds a tensor 'texts.more' that no such model has"),
    "a start's parameter extra": (tensors(start__more=torch.ones(1)), "the start model's parameters are not those"),
    "a start's parameter lacking": (tensors(start__ln_post__bias=None), "the start model's parameters are not those"),
    "a start's parameter of another shape": (
        tensors(start__ln_post__bias=torch.ones(3)),
        r"start.ln_post.bias is torch.float32 of shape \(3,\), not \(64,\)",
    ),
    "a start's parameter not finite": (
        tensors(start__ln_post__bias=torch.full((64,), float("nan"))),
        "start.ln_post.bias is not finite",
    ),
    "an adapted parameter besides": (tensors(adapted__ln_post__bias=torch.ones(64)), "holds a tensor 'adapted.ln_post"),
    # of a model whose start is in use
    "an adapted parameter extra": (start_used(adapted__more=torch.ones(1)), "the adapted model's parameters are not"),
    "an adapted parameter lacking": (start_used(adapted__ln_post__bias=None), "the adapted model's parameters are not"),
    "an adapted parameter of another shape": (
        start_used(adapted__ln_post__bias=torch.ones(3)),
        r"adapted.ln_post.bias is torch.float32 of shape \(3,\), not \(64,\)",
    ),
    "an adapted parameter in half": (
        start_used(adapted__ln_post__bias=torch.ones(64).half()),
        "adapted.ln_post.bias is torch.float16",
    ),
    "an adapted parameter not finite": (
        start_used(adapted__ln_post__bias=torch.full((64,), float("inf"))),
        "adapted.ln_post.bias is not finite",
    ),
    "a start's parameter beside the start's weights": (
        start_used(start__ln_post__bias=torch.ones(64)),
        "holds a tensor 'start.ln_post.bias' that no such model has",
    ),
    # open_clip's own settings
    "open_clip's settings missing": (lambda folder: (folder / "open_clip_config.json").unlink(), "is not there"),
    "open_clip's settings torn": (file("open_clip_config.json", b'{"model_cfg": {'), "does not load"),
}


@pytest.mark.parametrize("case", MODELS)
def test_model(case: str, model: Path) -> None:
    change, message = MODELS[case]
    change(model)
    with pytest.raises((ModelError, BackboneError), match=message) as caught:
        FineAlign.load(model, device="cpu")
    assert len(str(caught.value)) < 20_000
    str(caught.value).encode()


def test_model__sealed_anew_is_taken(model: Path) -> None:
    """The changes above are refused for what they are, not for how they were made."""
    tensors()(model)
    manifest()(model)
    assert list(FineAlign.load(model, device="cpu").classes_) == CLASSES
    (model / "unknown.bin").write_bytes(b"not looked at")
    assert list(FineAlign.load(model.parent, device="cpu").classes_) == CLASSES


# --- backbones from a folder ------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(tiny_backbone: Tiny, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_backbone("transformer").removeprefix("local-dir:"), tmp_path / "backbone")


def described(section: str, **changes: Any) -> Change:
    """open_clip's settings with those of a section, as ``model_cfg.text_cfg``, changed."""

    def change(folder: Path) -> None:
        path = folder / "open_clip_config.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        inner = found
        for name in filter(None, section.split(".")):
            inner = inner.setdefault(name, {})
        inner.update(changes)
        path.write_text(json.dumps(found), encoding="utf-8")

    return change


def raw(content: bytes) -> Change:
    return file("open_clip_config.json", content)


VISION, TEXT = "model_cfg.vision_cfg", "model_cfg.text_cfg"
UNFILLED = "describes a tower that the .* bytes of weights cannot fill"
BACKBONES: dict[str, tuple[Change, str]] = {
    # the file
    "empty": (raw(b""), ""),
    "torn": (raw(b'{"model_cfg": {"embed_dim": 32, "vis'), ""),
    "binary": (raw(bytes(range(256))), ""),
    "nested too deep": (raw(b"[" * 100_000), ""),
    "a number too long": (raw(b"9" * 5000), ""),
    "a list": (raw(b"[]"), ""),
    "a number": (raw(b"3"), ""),
    "null": (raw(b"null"), ""),
    "nothing in it": (raw(b"{}"), ""),
    "model_cfg null": (raw(b'{"model_cfg": null}'), ""),
    "model_cfg a text": (raw(b'{"model_cfg": "ViT-B-32"}'), ""),
    "model_cfg with nothing in it": (raw(b'{"model_cfg": {}}'), ""),
    # the architecture
    "embed_dim a text": (described("model_cfg", embed_dim="32"), ""),
    "embed_dim other": (described("model_cfg", embed_dim=16), "size mismatch"),
    "embed_dim null": (described("model_cfg", embed_dim=None), ""),
    "vision_cfg a list": (described("model_cfg", vision_cfg=[]), ""),
    "text_cfg null": (described("model_cfg", text_cfg=None), ""),
    "unknown key": (described("model_cfg", colour="red"), "unexpected keyword argument 'colour'"),
    "unknown key of the image tower": (described(VISION, colour="red"), "unexpected keyword argument 'colour'"),
    "unknown key of the text tower": (described(TEXT, colour="red"), "unexpected keyword argument 'colour'"),
    "layers a text": (described(VISION, layers="2"), ""),
    "layers negative": (described(VISION, layers=-1), ""),
    "layers a fraction": (described(VISION, layers=2.5), ""),
    "layers other": (described(VISION, layers=3), "Missing key"),
    "width other": (described(VISION, width=128), "size mismatch"),
    "width nought": (described(TEXT, width=0), ""),
    "heads nought": (described(TEXT, heads=0), ""),
    "patch_size nought": (described(VISION, patch_size=0), ""),
    "patch_size a list": (described(VISION, patch_size=[16, 16]), ""),
    "a third tower": (described("model_cfg", multimodal_cfg={}, custom_text=True), ""),
    "layers without end": (described(VISION, layers=10**12), UNFILLED),
    "layers of the text tower without end": (described(TEXT, layers=10**6), UNFILLED),
    "layers of a ResNet without end": (described(VISION, layers=[1, 1, 10**9, 1]), UNFILLED),
    "width beyond all memory": (described(VISION, width=10**9), UNFILLED),
    "width beyond most memory": (described(TEXT, width=50_000), UNFILLED),
    "mlp_ratio beyond all memory": (described(VISION, mlp_ratio=1e12), UNFILLED),
    "vocabulary beyond all memory": (described(TEXT, vocab_size=10**12), UNFILLED),
    "context beyond all memory": (described(TEXT, context_length=10**9), UNFILLED),
    "image beyond all memory": (described(VISION, image_size=10**7), UNFILLED),
    "image beyond all memory, not square": (described(VISION, image_size=[32, 10**7]), UNFILLED),
    "embedding beyond all memory": (described("model_cfg", embed_dim=10**12), UNFILLED),
    "timm model unknown": (described(VISION, timm_model_name="no_such_model"), ""),
    "timm model of another folder": (described(VISION, timm_model_name="local-dir:/no/such/folder"), ""),
    # preprocessing
    "mean of two": (
        described("preprocess_cfg", mean=[0.5, 0.5]),
        "wants mean and std as three numbers|expected sequence",
    ),
    "mean of text": (described("preprocess_cfg", mean=["a", "b", "c"]), ""),
    "mean a number": (described("preprocess_cfg", mean=0.5), ""),
    "mean not finite": (described("preprocess_cfg", mean=[float("nan")] * 3), "wants mean and std as three numbers"),
    "std nought": (described("preprocess_cfg", std=[0.5, 0.0, 0.5]), "wants mean and std as three numbers"),
    "std negative": (described("preprocess_cfg", std=[-1, -1, -1]), "wants mean and std as three numbers"),
    "interpolation unknown": (described("preprocess_cfg", interpolation="magic"), ""),
    "resize_mode unknown": (described("preprocess_cfg", resize_mode="magic"), ""),
    "mode unknown": (described("preprocess_cfg", mode="CMYK"), ""),
    "preprocess_cfg a list": (described("", preprocess_cfg=[1]), ""),
    # weights
    **{f"weights cut to {kept}": (torn(WEIGHTS, kept), "") for kept in (0, 4, 8, 50, 0.3, 0.9, 0.9999)},
    **{
        f"weights with a header of {length} bytes": (header(WEIGHTS, length), "")
        for length in (0, 1, 2**31, 2**63, 2**64 - 1)
    },
    "weights extra": (weights(more=torch.ones(1)), "Unexpected key"),
    "weights lacking": (weights(logit_scale=None), ""),
    "weights of another shape": (weights(visual__proj=torch.ones(64, 31)), "size mismatch"),
    "weights of nothing": (lambda folder: (folder / WEIGHTS).write_bytes(save({})), ""),
    "weights missing": (lambda folder: (folder / WEIGHTS).unlink(), ""),
    "weights a folder": (folder_in_place(WEIGHTS), ""),
    # code
    "tokenizer's code": (described(TEXT, tokenizer_kwargs={"trust_remote_code": True}), "by trust_remote_code; remove"),
    "tokenizer's code, by any true": (
        described(TEXT, tokenizer_kwargs={"trust_remote_code": "no"}),
        "trust_remote_code",
    ),
    "tokenizer's code from a folder": (
        described(TEXT, hf_tokenizer_name="x", tokenizer_kwargs={"trust_remote_code": True}),
        "by trust_remote_code; remove",
    ),
    "tokenizer's options a list": (described(TEXT, tokenizer_kwargs=["trust_remote_code"]), ""),
    "tokenizer's options unknown": (described(TEXT, tokenizer_kwargs={"colour": "red"}), "unexpected keyword argument"),
}


@pytest.mark.parametrize("case", BACKBONES)
def test_backbone(case: str, backbone: Path) -> None:
    change, message = BACKBONES[case]
    change(backbone)
    (backbone / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.Own", null]}}')
    (backbone / "code.py").write_text(f"open({str(backbone / 'canary')!r}, 'w')")
    with pytest.raises(BackboneError, match=f"does not load: .*{message}") as caught:
        load_backbone(f"local-dir:{backbone}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not (backbone / "canary").exists()


class Code:
    """Runs a command when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch", "state_dict"])
@pytest.mark.parametrize(
    "name", ["open_clip_pytorch_model.bin", "pytorch_model.bin", "model.pth", "other.bin", "model.pt", "model.ckpt"]
)
def test_backbone__a_pickle_is_never_run(name: str, kind: str, beside: bool, backbone: Path) -> None:
    canary, code = backbone / "canary", Code(backbone / "canary")
    if kind == "pickle":
        (backbone / name).write_bytes(pickle.dumps(code))
    elif kind == "state_dict":
        torch.save({"state_dict": {"visual.proj": torch.ones(64, 32), "logit_scale": code}}, backbone / name)
    else:
        torch.save(code, backbone / name, _use_new_zipfile_serialization=kind == "torch")
    if beside:  # the weights without pickle come first
        assert load_backbone(f"local-dir:{backbone}").input_size == 32
    else:
        (backbone / WEIGHTS).unlink()
        with pytest.raises(BackboneError, match="does not load"):
            load_backbone(f"local-dir:{backbone}")
    assert not canary.exists()
    if kind == "pickle":  # that it would be made
        pickle.loads((backbone / name).read_bytes())
        assert canary.exists()


def test_backbone__weights_of_tensors_alone_are_taken_from_a_pickle(backbone: Path) -> None:
    torch.save(load_file(backbone / WEIGHTS), backbone / "open_clip_pytorch_model.bin")
    (backbone / WEIGHTS).unlink()
    assert load_backbone(f"local-dir:{backbone}").input_size == 32
