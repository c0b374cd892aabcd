"""What reads a file from outside, each with small inputs to start from: all it may raise is a FinealignError.

A target takes any bytes. Where it has several readers, the first byte chooses one and the rest is the file's content.
"""

import atexit
import hashlib
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from safetensors.torch import load, save, save_file

from finealign.backbone.base import own_norms
from finealign.backbone.load import load_backbone
from finealign.backbone.model import CONFIG, WEIGHTS
from finealign.config import Config, make_config, read_config, resolve, write_config
from finealign.errors import FinealignError
from finealign.evaluate.truth import read_truth
from finealign.images.decoding import read_image
from finealign.images.listing import list_images
from finealign.method.registry import create_method
from finealign.model import folder as model_folder
from finealign.model.fitted import FittedModel, inference_settings
from finealign.run.folder import Metrics, read_identity
from finealign.texts.names import same
from finealign.texts.prompts import make_texts, read_classes, read_descriptions, read_templates
from finealign.training.checkpoints import Checkpoint, read_last_checkpoint, write_checkpoint
from finealign.training.memmap import MemmapTensors, read_memmap
from finealign.training.state import EpochRecord
from finealign.types import ImageFeatures, TextFeatures

CLASSES = ("robin", "wren", "tree pipit")
MAX_PIXELS = 1 << 20
EPOCH = EpochRecord(
    epoch=2,
    loss=0.5,
    parts={"fair": 0.5},
    mean_weight=0.5,
    changed=0.0,
    class_share=[1.0],
    learning_rate=1e-3,
    seconds=1.0,
    images_per_second=3.0,
)


@dataclass(frozen=True)
class Target:
    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


@cache
def scratch() -> Path:
    """A folder for files that are written again and again."""
    folder = Path(tempfile.mkdtemp(prefix="finealign-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def written(name: str, data: bytes) -> Path:
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def split(data: bytes, readers: int) -> tuple[int, bytes]:
    return (data[0] % readers, data[1:]) if data else (0, b"")


def chosen(reader: int, *contents: bytes) -> list[bytes]:
    return [bytes([reader]) + content for content in contents]


# --- settings ---------------------------------------------------------------------------------------------------------


def read_settings(data: bytes) -> None:
    reader, content = split(data, 2)
    if reader == 0:
        config = read_config(written("settings.yaml", content))
    else:
        config = read_config(None, content.decode("utf-8", "surrogateescape").split("\0"))
    resolve(config, images=100, classes=7, input_size=224)
    write_config(config, scratch() / "config.yaml")
    assert read_config(scratch() / "config.yaml") == config, "what is written is not what is read back"


def settings_seeds() -> list[bytes]:
    write_config(Config(), scratch() / "defaults.yaml")
    files = [
        (scratch() / "defaults.yaml").read_bytes(),
        b"seed: 3\nmethod: {name: fair, tau: 0.5, nested: {a: [1, 2]}}\n",
        b"training: &t {epochs: 5}\nviews: {<<: *t, crops: 4}\n",
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        b"backbone: !!python/object/apply:os.getcwd []\n",
        b"seed: 0x10\ndata: {cache_gb: .inf, max_pixels: 1_000}\ndevice: 2001-01-01\n",
        b"%YAML 1.1\n--- !!map\n? seed\n: !!int '3'\n",
        b'device: >-\n  cuda\nbackbone: |\n  a/b\nprecision: "\\x66p32"\n',
    ]
    overrides = [b"training.epochs=5\0seed=3", b"training={epochs: 3}\0training.steps=9", b"data.workers=auto"]
    return chosen(0, *files) + chosen(1, *overrides)


# --- texts ------------------------------------------------------------------------------------------------------------


def read_class_names(data: bytes) -> None:
    reader, content = split(data, 2)
    if reader == 0:
        names = read_classes(written("classes.txt", content))
    else:
        names = read_classes(content.decode("utf-8", "surrogateescape"))
    assert len(names) >= 2
    assert not any(same(first, second) for place, first in enumerate(names) for second in names[:place])
    "\n".join(names).encode()
    make_texts(names)
    assert read_classes(written("again.txt", "\n".join(names).encode())) == names


def class_seeds() -> list[bytes]:
    files = ["robin\nwren\n", "\ufeffcafe\u0301\r\nТетерев\r\n山雀", "a b\nA_B\n", "x\x00\ny", "\u200b\nwren", "\n\n"]
    return chosen(0, *(text.encode() for text in files)) + chosen(1, b"robin, wren", b'"a, b",c', b"one", b"a,,b")


def read_sentences(data: bytes) -> None:
    reader, content = split(data, 2)
    if reader == 0:
        descriptions = read_descriptions(written("descriptions.json", content))
        with suppress(FinealignError):  # that two keys are alike is seen here alone
            make_texts(list(descriptions), descriptions)
        if descriptions:
            again = json.dumps(descriptions, ensure_ascii=False).encode()
            assert read_descriptions(written("again.json", again)) == descriptions
    else:
        templates = read_templates(written("templates.txt", content))
        assert all(template.count("{}") == 1 for template in templates)
        make_texts(CLASSES, None, templates)


def sentence_seeds() -> list[bytes]:
    files = [
        b'{"robin": ["a bird", "red"], "wren": ["small"]}',
        b'{"a": ["\\ud800"], "b": []}',
        b'{"a": ["x"], "a": 1}',
    ]
    files += [b"[" * 2000, b'{"a": [1e999, NaN, -0]}', b"{}", '{"cafe\u0301": ["x"], "caf\u00e9": ["y"]}'.encode()]
    return chosen(0, *files) + chosen(1, b"a photo of a {}.\n{} here\n", b"a {0} {}\r\n", b"none\n")


# --- lists ------------------------------------------------------------------------------------------------------------


def read_lists(data: bytes) -> None:
    reader, content = split(data, 3)
    if reader == 0:
        assert len(list_images(written("lists/list.txt", content))) > 0
    elif reader == 1:
        assert len(list_images(written("lists/list.csv", content))) > 0
    else:
        truth = read_truth(written("lists/truth.csv", content), CLASSES)
        assert len(truth.paths) == len(truth.labels) > 0
        assert all(0 <= label < len(CLASSES) for label in truth.labels)


def list_seeds() -> list[bytes]:
    written("lists/a.png", b"\x89PNG")
    tables = [
        b"path,label\na.png,robin\n",
        b'\xef\xbb\xbfpath ,label,x\r\n"a,b.png",wren,1\r\n\r\na.png,Tree_Pipit,\r\n',
    ]
    tables += [b'path,label\n"a\n', b"label\nrobin\n", b"path,path\na,b\n", b"path,label\na\0.png,robin\n"]
    return chosen(0, b"a.png\n# b\n\nc d.jpg\r\n", "\ufeffé.png".encode()) + chosen(1, *tables) + chosen(2, *tables)


# --- run folder -------------------------------------------------------------------------------------------------------


def read_run(data: bytes) -> None:
    reader, content = split(data, 4)
    if reader == 0:
        assert isinstance(read_identity(written("run/run.json", content)), dict)
    elif reader == 1:
        metrics = Metrics(written("run/metrics.jsonl", content))
        metrics.records()
        metrics.add(EPOCH)
        assert metrics.records()[-1]["epoch"] == 2
    elif reader == 2:
        written("run/checkpoints/epoch-0003.safetensors", content)
        found = read_last_checkpoint(scratch() / "run/checkpoints")
        assert found is not None
        assert isinstance(found.epoch, int) and isinstance(found.step, int) and isinstance(found.values, dict)
    else:
        try:
            tensors = read_memmap(written("run/features.safetensors", content))
        except (OSError, ValueError):  # as its docstring has it
            return
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        assert all(math.isfinite(float(tensor.nan_to_num(0, 0, 0).sum())) for tensor in tensors.values())


def run_seeds() -> list[bytes]:
    folder = scratch() / "run/seeds"
    folder.mkdir(parents=True, exist_ok=True)
    values = {"features": {"kept": 3}, "record": [1.0]}
    tensors = {"anchors": torch.ones(2, 3), "count": torch.tensor(4)}
    write_checkpoint(folder, Checkpoint(epoch=3, step=2, tensors=tensors, values=values))
    checkpoint = next(folder.glob("*.safetensors")).read_bytes()
    MemmapTensors(folder / "mapped", {"weak": (2, 3), "crops": (2, 0, 3)}).finish()
    identity = json.dumps({"status": "running", "identity": {"settings": "ab", "texts": "cd", "images": "ef"}})
    metrics = "".join(json.dumps({"epoch": epoch, "seconds": 1.5, "parts": {"fair": 0.5}}) + "\n" for epoch in (1, 2))
    return [
        *chosen(0, identity.encode(), b"[]", b'{"identity": 3}'),
        *chosen(1, metrics.encode(), b'{"epoch": 1}\n{"epo', b"[]\n", b'{"epoch": "1"}\n'),
        *chosen(2, checkpoint, save({"x": torch.ones(1)}, {"finealign": '{"epoch": 3}'})),
        *chosen(3, (folder / "mapped").read_bytes()),
    ]


# --- saved model ------------------------------------------------------------------------------------------------------


@cache
def model() -> Path:
    """A saved model so small that reading it takes milliseconds."""
    from open_clip.model import CLIP

    folder = scratch() / "model"
    folder.mkdir()
    vision = {"image_size": 16, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8}
    texts = {"context_length": 77, "vocab_size": 8, "width": 8, "heads": 2, "layers": 1}
    described: dict[str, Any] = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": texts}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(CLIP(**described).state_dict(), folder / WEIGHTS)
        features = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    described = {"model_cfg": described, "preprocess_cfg": {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / CONFIG).write_text(json.dumps(described), encoding="utf-8")
    sentences = {name: [f"a {name}", f"one {name}"] for name in CLASSES}
    config = resolve(make_config({"device": "cpu"}), images=9, classes=3, input_size=16)
    text_features = TextFeatures(features[:3], features, torch.arange(6) // 2)
    backbone = load_backbone(f"local-dir:{folder}")
    model_folder.write_model(
        FittedModel(
            inference=inference_settings(config),
            texts=make_texts(CLASSES, sentences),
            text_features=text_features,
            backbone=backbone,
            method=create_method(config.method, text_features, logit_scale=100.0, token_width=backbone.token_width),
            norms=own_norms(backbone),
            start_norms=own_norms(backbone),
            learned="nothing",
            training={},
        ),
        folder,
    )
    return folder


@cache
def model_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model().iterdir()}


@cache
def open_clip_parts() -> dict[str, Any]:
    """What takes a second each and no file decides: the backbone as it is, and open_clip's own tokenizer."""
    import open_clip

    return {"backbone": load_backbone(f"local-dir:{model()}"), "tokenizer": open_clip.SimpleTokenizer()}


def read_saved(data: bytes) -> None:
    """The manifest, settings that replace the manifest's own, or one of the other files with its checksum renewed."""
    reader, content = split(data, 5)
    manifest = json.loads(model_files()[model_folder.MANIFEST])
    files = dict(model_files())
    if reader == 0:
        files[model_folder.MANIFEST] = content
    elif reader == 1:
        with suppress(ValueError, RecursionError):
            changes = json.loads(content)
            manifest |= changes if isinstance(changes, dict) else {}
        files[model_folder.MANIFEST] = json.dumps(manifest).encode()
    else:
        name = (model_folder.TENSORS, WEIGHTS, CONFIG)[reader - 2]
        files[name] = content
        manifest["sha256"] = {kept: hashlib.sha256(files[kept]).hexdigest() for kept in manifest["sha256"]}
        files[model_folder.MANIFEST] = json.dumps(manifest).encode()
    for name, file in files.items():
        written(f"model/{name}", file)
    parts = open_clip_parts()
    whole = reader > 2
    with (
        patch("open_clip.get_tokenizer", return_value=parts["tokenizer"]),
        patch.object(model_folder, "load_backbone", load_backbone if whole else lambda *_, **__: parts["backbone"]),
    ):
        saved = model_folder.read_model(scratch() / "model", device=torch.device("cpu"), precision="fp32")
    classes, width = len(saved.texts.classes), saved.text_features.names.shape[1]
    assert len(saved.texts.descriptions) == classes == saved.text_features.num_classes
    assert saved.text_features.class_of.max() < classes
    features = ImageFeatures(weak=torch.ones(1, width), crops=torch.ones(1, 2, width))
    assert saved.method.probabilities(saved.method.score(features, "global")).shape == (1, classes)


def saved_seeds() -> list[bytes]:
    files = model_files()
    changes: list[dict[str, Any]] = [
        {"templates": ["one {}"], "logit_scale": 50.0},
        {"classes": 3},
        {"sha256": []},
        {"logit_scale": "1"},
        {"inference": {"seed": -1}},
    ]
    changes += [{"format": 1, "config": {}}, {"format": 3}, {"templates": "a {}"}, {"descriptions": {"robin": [1]}}]
    tensors = load(files[model_folder.TENSORS])  # not from the folder, where a reader may have left another file
    wrong = [tensors | {"texts.class_of": torch.zeros(6)}, tensors | {"texts.names": torch.ones(3, 9)}]
    return [
        *chosen(0, files[model_folder.MANIFEST], b"[]", b"{}"),
        *chosen(1, *(json.dumps(change).encode() for change in changes)),
        *chosen(2, files[model_folder.TENSORS], *(save(found) for found in wrong)),
        *chosen(3, files[WEIGHTS]),
        *chosen(4, files[CONFIG]),
    ]


# --- images -----------------------------------------------------------------------------------------------------------


def read_picture(data: bytes) -> None:
    image = read_image(written("image", data), max_pixels=MAX_PIXELS)
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= MAX_PIXELS
    assert not image.info


def picture_seeds() -> list[bytes]:
    modes = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGBA", "P", "I;16", "1", "LA"), "WEBP": ("RGB", "RGBA")}
    modes |= {"GIF": ("P",), "BMP": ("RGB", "1"), "TIFF": ("RGB", "F", "I", "RGBA", "CMYK")}
    found = []
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, names in modes.items():
        for mode in names:
            buffer = io.BytesIO()
            options: dict[str, Any] = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
            Image.linear_gradient("L").resize((9, 6)).convert("RGB" if mode == "P" else "L").convert(mode).save(
                buffer, kind, **options
            )
            found.append(buffer.getvalue())
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((9, 6)).convert("RGB").save(buffer, "TIFF", compression=compression)
        found.append(buffer.getvalue())
    return found


TARGETS = {
    "config": Target(read_settings, settings_seeds),
    "classes": Target(read_class_names, class_seeds),
    "descriptions": Target(read_sentences, sentence_seeds),
    "lists": Target(read_lists, list_seeds),
    "run": Target(read_run, run_seeds),
    "model": Target(read_saved, saved_seeds),
    "image": Target(read_picture, picture_seeds),
}


def only_errors(target: Target, data: bytes) -> None:
    """Run the target; whatever else than a FinealignError comes out of it is a finding."""
    with suppress(FinealignError):
        target.read(data)


def mutated(seeds: list[bytes], random: Random) -> bytes:
    """One of the inputs after a few cuts, repeats, splices and changed bytes."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.randint(1, 4)):
        start = random.randrange(len(data) + 1)
        stop = min(len(data), start + random.choice((1, 2, 4, 8, 64)))
        match random.randrange(6):
            case 0:
                data[start:stop] = random.randbytes(stop - start)
            case 1:
                del data[start:stop]
            case 2:
                data[start:start] = data[start:stop] * random.choice((1, 2, 50))
            case 3:
                other = random.choice(seeds)
                place = random.randrange(len(other) + 1)
                data[start:stop] = other[place : place + random.choice((4, 16, 64))]
            case 4:
                data[start:stop] = random.choice(
                    (b"\0", b"\xff" * 8, b"-1", b"null", b"[]", b"{}", b'"', b"1e999", b"\n")
                )
            case _:
                if start < len(data):
                    data[start] ^= 1 << random.randrange(8)
    return bytes(data)
