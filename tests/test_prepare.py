"""What can be wrong is found once, before anything is trained; what is shown to a model is the same everywhere."""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CLASSES, tiny_config
from finealign import FineAlign, adapt_into
from finealign.backbone.model import OpenClipBackbone
from finealign.config import make_config, read_config, resolve
from finealign.errors import CautionWarning, ConfigError
from finealign.images import listing
from finealign.images.left_out import LeftOut
from finealign.images.listing import Listing, list_images
from finealign.images.paths import PathList
from finealign.images.training_set import decode_training_set
from finealign.model.prepare import unknown_words
from finealign.run.adapt import plan
from finealign.runtime import devices
from finealign.runtime.devices import choose_device
from finealign.types import Texts

Tiny = Callable[[str], str]


# --- once -------------------------------------------------------------------------------------------------------------


def test_adapt_into__texts_are_encoded_and_images_listed_once(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, listed = [], []
    encode, walk = OpenClipBackbone.encode_texts, listing._walk

    def watched(self: OpenClipBackbone, texts: Any) -> Any:
        encoded.append(texts)
        return encode(self, texts)

    def walked(root: Path, left_out: LeftOut) -> Listing:
        listed.append(root)
        return walk(root, left_out)

    monkeypatch.setattr(OpenClipBackbone, "encode_texts", watched)
    monkeypatch.setattr(listing, "_walk", walked)
    model = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer")))
    prepared = model.prepare(photos)
    assert isinstance(prepared.paths, PathList)
    assert plan(tmp_path / "run", prepared)["images"] == 24
    adapt_into(tmp_path / "run", model, prepared)
    assert len(encoded) == len(listed) == 1
    assert prepared.config.training.epochs == 3  # resolved


def test_list_images__a_compact_list_stays_one(photos: Path) -> None:
    paths = list_images(photos)
    assert list_images(paths) is paths


def test_fit__what_prepare_gives_is_the_same_as_the_folder(photos: Path, tiny_backbone: Tiny) -> None:
    config = tiny_config(tiny_backbone("transformer"))
    plain = FineAlign(CLASSES, config=config).fit(photos)
    model = FineAlign(CLASSES, config=config)
    prepared = model.fit(model.prepare(photos))
    np.testing.assert_array_equal(prepared.predict_proba(photos), plain.predict_proba(photos))


def test_fit__the_folders_that_images_lie_in_mean_nothing(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    """The same images in the same order, once in class folders and once in folders that name other classes."""
    for number, path in enumerate(list_images(photos)):
        other = tmp_path / "shuffled" / f"{number:02d}-{CLASSES[number % 3]}" / f"{CLASSES[-1 - number % 3]}.png"
        other.parent.mkdir(parents=True)
        other.write_bytes(path.read_bytes())
    config = tiny_config(tiny_backbone("transformer"))
    sorted_by_class = FineAlign(CLASSES, config=config).fit(photos)
    shuffled = FineAlign(CLASSES, config=config).fit(tmp_path / "shuffled")
    for name, value in sorted_by_class.method_.state_dict().items():
        assert torch.equal(value, shuffled.method_.state_dict()[name]), name
    assert all(torch.equal(value, shuffled.norms_[name]) for name, value in sorted_by_class.norms_.items())


# --- one way from a file to pixels ------------------------------------------------------------------------------------


def test_renderer__fit_predict_explain_and_serve_are_shown_the_same_pixels(
    tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of photos larger than the working size, which training reduces before it cuts views."""
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate([(150, 210), (300, 97), (64, 64), (500, 400)]):
        coarse = Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{number}.png")
    config = tiny_config(tiny_backbone("transformer"), data__cache="temporary")
    model = FineAlign(CLASSES, config=config)
    learned_from: list[Any] = []

    def kept(*arguments: Any, **options: Any) -> Any:
        stored, set_aside = decode_training_set(*arguments, **options)
        learned_from.append(stored)
        return stored, set_aside

    monkeypatch.setattr("finealign.classifier.decode_training_set", kept)
    model.fit(tmp_path / "photos")
    assert model.model_.inference.working_size == 64
    predictor = model.predictor_
    for pixels, path in zip(learned_from[0], model.paths_, strict=True):
        photo = predictor.read(path)
        assert min(photo.pixels.shape[:2]) <= 64
        np.testing.assert_array_equal(photo.pixels, pixels)
        served = predictor.decode(io.BytesIO(Path(path).read_bytes()), max_pixels=10**7)
        np.testing.assert_array_equal(served.pixels, pixels)
        with Image.open(path) as image:
            assert (photo.width, photo.height) == (served.width, served.height) == image.size
            (explained,) = model.explain_pixels([np.array(image)])
        explanation = model.explain(path)
        np.testing.assert_array_equal(explanation.scores, explained.scores)
        assert explanation.boxes == explained.boxes
        assert (explanation.width, explanation.height) == (photo.width, photo.height)
        for left, top, right, bottom in explanation.boxes:  # in pixels of the photo as it is shown
            assert 0 <= left < right <= photo.width and 0 <= top < bottom <= photo.height
            assert abs((right - left) - (bottom - top)) <= 0.05 * (right - left) + 2
            assert right - left >= 0.45 * min(photo.width, photo.height)


# --- settings that contradict each other ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "dpa"}, "method='dpa' contradicts config, which has 'fair'"),
        ({"method": "dpa@published"}, "method='dpa@published' contradicts"),
        ({"backbone": "ViT-B-32-quickgelu/openai"}, "backbone='ViT-B-32-quickgelu/openai' contradicts"),
        ({"seed": 1}, "seed=1 contradicts config, which has 0"),
        ({"device": "cuda"}, "device='cuda' contradicts"),
        ({"precision": "bf16"}, "precision='bf16' contradicts"),
    ],
)
def test_check__an_argument_that_contradicts_the_config(
    tiny_backbone: Tiny, given: dict[str, Any], message: str
) -> None:
    config = tiny_config(tiny_backbone("transformer"))
    with pytest.raises(ConfigError, match=message):
        FineAlign(CLASSES, config=config, **given).check()


def test_check__an_argument_that_agrees_with_the_config(tiny_backbone: Tiny) -> None:
    config = tiny_config(tiny_backbone("transformer"))
    FineAlign(CLASSES, config=config, method="fair", seed=0, device="cpu", backbone=config.backbone).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": {"refresh_epochs": 0}, "training": {"anchor_steps": 40}}, r"views\.refresh_epochs=0 keeps no crop"),
        ({"training": {"learn": "norms", "anchor_steps": 40}}, r"training\.learn=norms leaves the anchors"),
        ({"training": {"learn": "norms", "encoder": "frozen"}}, r"training\.encoder=frozen leaves"),
        ({"views": {"crop_low": 0.9, "crop_high": 0.5}}, r"views\.crop_low \(0\.9\) is above"),
    ],
)
def test_make_config__settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(settings)


def test_check__more_crops_kept_than_drawn(tiny_backbone: Tiny) -> None:
    config = tiny_config(tiny_backbone("transformer"), method__crops_kept=3)  # of 2
    with pytest.raises(ConfigError, match=r"method\.crops_kept=3 is more than the 2 crops"):
        FineAlign(CLASSES, config=config).check()


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 160),
        ({"views": {"refresh_epochs": 0}}, 0),
        ({"views": {"refresh_epochs": 0}, "training": {"encoder": "frozen"}}, 160),
        ({"training": {"learn": "norms"}}, 0),
        ({"training": {"anchor_steps": 7}}, 7),
    ],
)
def test_resolve__anchor_steps(settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    resolved = resolve(make_config(settings), images=100, classes=3, input_size=32)
    assert resolved.training.anchor_steps == steps
    assert make_config(resolved.model_dump()) == resolved  # a run's config.yaml is taken back
    assert read_config(None, ()).training.anchor_steps == "auto"


# --- devices ----------------------------------------------------------------------------------------------------------


class Accelerated:
    """What accelerate says of a process on the first of several GPUs."""

    def __init__(self, processes: int) -> None:
        self.device, self.num_processes = torch.device("cuda", 0), processes


@pytest.mark.parametrize(
    ("wanted", "processes", "answer"),
    [
        ("auto", 1, "cuda:0"),
        ("cuda", 1, "cuda:0"),
        ("cuda:0", 1, "cuda:0"),
        ("cuda:1", 1, "cuda:1"),
        ("cuda:2", 1, "there are 2, numbered from 0"),
        ("cuda:1", 2, "Each process of a launcher has a device of its own"),
        ("cuda:first", 1, "Use auto, cpu or cuda, or one of several as cuda:1"),
        ("mps", 1, "accelerate finds 'cuda'"),
        ("cpu", 1, "cpu"),
    ],
)
def test_choose_device__one_of_several(
    monkeypatch: pytest.MonkeyPatch, wanted: str, processes: int, answer: str
) -> None:
    monkeypatch.setattr(devices, "process_state", lambda: Accelerated(processes))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    if " " in answer:
        with pytest.raises(ConfigError, match=answer):
            choose_device(wanted)
    else:
        assert choose_device(wanted) == torch.device(answer)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_choose_device__the_second_gpu_is_the_one_that_computes(photos: Path, tiny_backbone: Tiny) -> None:
    config = tiny_config(tiny_backbone("transformer"), device="cuda:1")
    model = FineAlign(CLASSES, config=config).fit(photos)
    assert model.backbone_.device == model.method_.classifier().device == torch.device("cuda:1")


def test_prepare__names_without_words_of_the_tokenizer_are_told_once(tiny_backbone: Tiny, photos: Path) -> None:
    """open_clip's tokenizer has letters of English words; others it takes byte by byte."""
    model = FineAlign(
        ["三毛猫", "قط منزلي", "Straße", "naïve café", "tabby cat"], backbone=tiny_backbone("transformer")
    )
    with pytest.warns(CautionWarning) as told:
        model.prepare(photos)
    (message,) = [str(warning.message) for warning in told if warning.category is CautionWarning]
    assert "no words for 2 class names and reads 16 byte pieces: '三毛猫' as 8, 'قط منزلي' as 8." in message
    assert "xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k" in message


def test_prepare__names_in_latin_letters_are_not_told_of(tiny_backbone: Tiny, photos: Path) -> None:
    model = FineAlign(["Übergröße", "Đà Nẵng", "Ångström", "🐈", "-1"], backbone=tiny_backbone("transformer"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CautionWarning)
        model.prepare(photos)


def test_unknown_words__three_names_are_shown_and_all_are_counted() -> None:
    class SpellsOut:
        def spelled_out(self, names: Sequence[str]) -> dict[str, int]:
            return {name: 2 for name in names if not name.isascii()}

    def told(*names: str) -> str:
        return unknown_words(Texts(names, tuple((name,) for name in names), ("{}",)), SpellsOut())  # type: ignore[arg-type]

    assert told("wren") == ""
    assert "no words for 1 class name and reads 2 byte pieces: '犬' as 2. " in told("wren", "犬")
    four = told("犬", "猫", "鳥", "wren", "魚")
    assert "for 4 class names and reads 8 byte pieces: '犬' as 2, '猫' as 2, '鳥' as 2" in four and "魚" not in four


def test_fit__the_caution_of_unknown_words_is_kept(tiny_backbone: Tiny, photos: Path) -> None:
    """``cautions_`` is what run.json and the report have."""
    model = FineAlign(["三毛猫", "tabby cat"], backbone=tiny_backbone("transformer"), method="cupl").fit(photos)
    (caution,) = model.cautions_
    assert caution.kind == "unknown_words" and "'三毛猫' as 8" in caution.message
