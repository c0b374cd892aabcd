"""The public noun in scikit-learn's grammar: fit, predict, predict_proba, save, load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from conftest import CLASSES, predictions, tiny_config, write_photos
from finealign import FineAlign
from finealign.errors import ConfigError, FinealignError, ImageInputError, ModelError, PromptError
from finealign.images.listing import list_images
from finealign.types import SetAside

Tiny = Callable[[str], str]
Fit = Callable[..., FineAlign]
METHODS = ["fair", "self-training", "wca", "cupl", "zero-shot"]


def fitted(photos: Path, backbone: str, **overrides: Any) -> FineAlign:
    return FineAlign(CLASSES, config=tiny_config(backbone, training__epochs=2, **overrides)).fit(photos)


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``photos``, made once; nothing may write into it."""
    return write_photos(tmp_path_factory.mktemp("album") / "photos")


@pytest.fixture(scope="module")
def fitted_once(album: Path, tiny_backbone: Tiny) -> Fit:
    """A model of the album, fitted once for all tests that only ask it."""
    made: dict[str, FineAlign] = {}

    def make(tower: str, **overrides: Any) -> FineAlign:
        key = repr((tower, sorted(overrides.items())))
        if key not in made:
            made[key] = fitted(album, tiny_backbone(tower), **overrides)
        return made[key]

    return make


def test_fit__returns_self_and_learns_attributes(photos: Path, tiny_backbone: Tiny) -> None:
    model = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer")))
    assert not [name for name in vars(model) if name.endswith("_")]
    assert model.fit(photos) is model
    assert model.classes_.tolist() == CLASSES
    assert len(model.history_) == 3
    assert model.set_aside_ == []


def test_fit__plain_arguments_are_enough(photos: Path, tiny_backbone: Tiny) -> None:
    descriptions = {name: [f"something {name}", f"a {name} thing"] for name in CLASSES}
    model = FineAlign(CLASSES, descriptions=descriptions, backbone=tiny_backbone("transformer"), method="cupl", seed=3)
    model.fit(photos)
    assert model.config_.seed == 3
    assert model.config_.method.options == {"logit_scale": "auto", "crops_kept": "all", "crop_temperature": 1.0}
    assert model.text_features_.descriptions.shape == (6, 32)


@pytest.mark.parametrize("method", METHODS)
def test_predict__columns_follow_classes(album: Path, fitted_once: Fit, method: str) -> None:
    model = fitted_once("transformer", method__name=method)
    probabilities = model.predict_proba(album)
    assert probabilities.shape == (24, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert model.predict(album).tolist() == [CLASSES[index] for index in probabilities.argmax(1)]


@pytest.mark.parametrize("score", ["global", "las", "fused"])
def test_predict__an_image_is_scored_by_itself(album: Path, fitted_once: Fit, score: Any) -> None:
    """Neither order nor neighbours change an image's scores, so permuting the images permutes the result."""
    model = fitted_once("convolutional", method__name="fair")
    paths = list_images(album)
    order = np.random.default_rng(0).permutation(len(paths))
    straight = model.predict_proba(paths, score=score)
    shuffled = model.predict_proba([paths[index] for index in order], score=score)
    np.testing.assert_allclose(shuffled, straight[order], atol=1e-6)
    alone = model.predict_proba(paths[:1], score=score)
    np.testing.assert_allclose(alone, straight[:1], atol=1e-6)


def test_predict__scores_differ(album: Path, fitted_once: Fit) -> None:
    model = fitted_once("transformer", method__name="fair")
    whole, crops, both = (model.predict_proba(album, score=kind) for kind in ("global", "las", "fused"))
    assert not np.allclose(whole, crops)
    assert not np.allclose(both, crops)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tower", ["transformer", "convolutional"])
def test_save__load_then_predict_is_identical(
    album: Path, fitted_once: Fit, tmp_path: Path, method: str, tower: str
) -> None:
    model = fitted_once(tower, method__name=method)
    model.save(tmp_path / "model")
    loaded = FineAlign.load(tmp_path / "model", device="cpu", precision="fp32")
    assert loaded.classes_.tolist() == CLASSES
    np.testing.assert_array_equal(loaded.predict_proba(album), model.predict_proba(album))
    before, after = (list(predictions(found, list_images(album), with_start=True)) for found in (model, loaded))
    for first, second in zip(before, after, strict=True):
        np.testing.assert_array_equal(first.start_scores, second.start_scores)


def test_iter_predictions__start_is_the_model_before_adaptation(album: Path, fitted_once: Fit) -> None:
    adapted = fitted_once("transformer", training__learning_rate=1e-2)
    start = fitted_once("transformer", method__name="cupl")
    predicted = predictions(adapted, list_images(album), with_start=True)
    found = np.stack([one.start_probabilities for one in predicted if one.start_probabilities is not None])
    np.testing.assert_allclose(found, start.predict_proba(album), atol=1e-5)
    assert not np.allclose(found, adapted.predict_proba(album), atol=1e-3)
    again = adapted.predict_proba(album)
    np.testing.assert_array_equal(again, adapted.predict_proba(album))


def test_fit__unreadable_images_are_set_aside(photos: Path, tiny_backbone: Tiny) -> None:
    (photos / "red" / "torn.png").write_bytes((photos / "red" / "0.png").read_bytes()[:200])
    model = fitted(photos, tiny_backbone("transformer"))
    assert [Path(row.path).name for row in model.set_aside_] == ["torn.png"]
    with pytest.warns(UserWarning, match=r"1 of 25 images could not be read"):
        labels = model.predict(photos)
    assert [path.name for path, label in zip(list_images(photos), labels, strict=True) if label is None] == ["torn.png"]


def test_fit__no_readable_image(tmp_path: Path, tiny_backbone: Tiny) -> None:
    (tmp_path / "a.jpg").write_text("not an image")
    with pytest.raises(ImageInputError, match="None of the 1 images"):
        fitted(tmp_path, tiny_backbone("transformer"))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"classes": ["one"]}, PromptError, "at least two"),
        ({"classes": ["a", "A"]}, PromptError, "same name"),
        ({"classes": ["a", "b"], "descriptions": {"a": ["x"]}}, PromptError, "miss 1 of 2 classes: 'b'"),
        ({"classes": ["a", "b"], "method": "fare"}, ConfigError, "Did you mean 'fair'"),
        ({"classes": ["a", "b"], "precision": "fp8"}, ConfigError, "precision"),
        ({"classes": ["a", "b"], "device": "tpu"}, ConfigError, "tpu"),
    ],
)
def test_fit__a_wrong_setting_stops_at_once(
    photos: Path, tiny_backbone: Tiny, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        FineAlign(**({"backbone": tiny_backbone("transformer")} | arguments)).fit(photos)


def test_predict__a_score_the_method_does_not_have(photos: Path, tiny_backbone: Tiny) -> None:
    model = fitted(photos, tiny_backbone("transformer"), method__name="wca")
    with pytest.raises(ConfigError, match=r"'wca' has no score 'global'. Valid: las"):
        model.predict(photos, score="global")


@pytest.mark.parametrize("call", ["predict", "predict_proba", "save"])
def test_unfitted__says_so(photos: Path, tmp_path: Path, call: str) -> None:
    with pytest.raises(FinealignError, match="not fitted"):
        getattr(FineAlign(CLASSES), call)(photos)


@pytest.mark.parametrize("damage", ["missing", "changed", "manifest", "format", "key"])
def test_load__a_damaged_model_is_refused(fitted_once: Fit, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    fitted_once("transformer", method__name="fair").save(folder)
    manifest = folder / "finealign.json"
    weights = folder / "open_clip_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "changed":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "manifest":
        manifest.write_text("{", encoding="utf-8")
    elif damage == "format":
        manifest.write_text(
            manifest.read_text(encoding="utf-8").replace('"format": 2', '"format": 99'), encoding="utf-8"
        )
    else:
        manifest.write_text(manifest.read_text(encoding="utf-8").replace('"classes"', '"klasses"'), encoding="utf-8")
    with pytest.raises(ModelError):
        FineAlign.load(folder, device="cpu")


# --- explain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("score", ["las", "fused"])
def test_explain__is_what_predicting_goes_by(album: Path, fitted_once: Fit, method: str, score: Any) -> None:
    model = fitted_once("convolutional", method__name=method, views__crops=5)
    path = list_images(album)[3]
    if method == "wca" and score == "fused":
        with pytest.raises(ConfigError, match=r"'wca' has no score 'fused'. Valid: las"):
            model.explain(path, score=score)
        return
    found = model.explain(str(path), score=score)
    (wanted,) = predictions(model, [path], score=score)
    assert found.score == score
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-6)
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-5)
    assert found.weights.shape == (5,) and len(found.boxes) == 5
    assert found.weights.min() >= 0
    assert found.weights.sum() == pytest.approx(1, abs=1e-6)


def test_explain__cutting_its_boxes_and_weighing_them_gives_its_scores(photos: Path, tiny_backbone: Tiny) -> None:
    """The boxes, the weights and the scores belong to one another and to the image, which is a wide one."""
    model = fitted(
        photos, tiny_backbone("transformer"), views__crops=4, method__crop_temperature=0.01, method__whole_share=0
    )
    path = photos / "wide.png"
    patches = np.random.default_rng(0).integers(0, 256, (5, 16, 3), dtype=np.uint8)
    image = Image.fromarray(patches.repeat(10, axis=0).repeat(10, axis=1))
    image.save(path)
    found = model.explain(path)
    assert (found.width, found.height) == image.size == (160, 50)
    assert all(0 <= left < right <= 160 and 0 <= top < bottom <= 50 for left, top, right, bottom in found.boxes)
    assert found.score == "las"  # fair's own where crops alone are trusted
    parts = [image.crop(box).resize((32, 32), Image.Resampling.BICUBIC) for box in found.boxes]
    pixels = torch.from_numpy(np.stack([np.array(part) for part in parts])).permute(0, 3, 1, 2)
    with model.backbone_.lend(model.norms_):
        crops = model.backbone_.embed(pixels)
    anchors = model.method_.classifier()[:, 0]
    scores = torch.from_numpy(found.weights) @ (crops @ anchors.T)
    np.testing.assert_allclose(found.scores, scores.detach().numpy(), atol=2e-3)
    view = torch.from_numpy(np.array(model.backbone_.geometry(image))).permute(2, 0, 1)[None]
    with model.backbone_.lend(model.norms_):
        whole = model.backbone_.embed(view)
    assert int(found.weights.argmax()) == int((crops @ whole[0]).argmax())
    assert found.weights.max() - found.weights.min() > 0.01  # or the order would prove little


def test_explain__boxes_are_of_the_image_as_it_is_shown(fitted_once: Fit, tmp_path: Path) -> None:
    model = fitted_once("transformer", method__name="fair")
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # shown turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    first, second = model.explain(tmp_path / "upright.png"), model.explain(tmp_path / "turned.png")
    assert (first.width, first.height) == (second.width, second.height) == (50, 30)
    assert first.boxes == second.boxes
    np.testing.assert_array_equal(first.scores, second.scores)


@pytest.mark.parametrize("method", ["cupl", "fair"])
def test_explain__a_score_without_crops(album: Path, fitted_once: Fit, method: str) -> None:
    """Whether asked for, the method's default, or the configuration's."""
    model = fitted_once("transformer", method__name=method, prediction__score="global")
    for score in ("global", None):
        with pytest.raises(ConfigError, match=r"no crops to explain.* score='las'"):
            model.explain(album / "red" / "0.png", score=score)
    assert model.explain(album / "red" / "0.png", score="las").score == "las"


@pytest.mark.parametrize("kind", ["missing", "folder", "torn", "too large"])
def test_explain__an_image_that_cannot_be_read(photos: Path, tiny_backbone: Tiny, kind: str) -> None:
    pixels = 1000 if kind == "too large" else 10_000
    model = fitted(photos, tiny_backbone("transformer"), method__name="wca", data__max_pixels=pixels)
    path = photos / "red" / "0.png"
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "too large":
        Image.new("RGB", (100, 100)).save(path)
    elif kind != "folder":
        path.unlink()
    with pytest.raises(ImageInputError, match=r"Cannot explain '.*'.*: .*\. Give the path of one image"):
        model.explain(path.parent if kind == "folder" else path)


def test_explain__unfitted_says_so() -> None:
    with pytest.raises(FinealignError, match="not fitted"):
        FineAlign(CLASSES).explain("a.png")


# --- while it is being fitted -----------------------------------------------------------------------------------------


def test_fit__one_that_fails_leaves_no_fitted_model(photos: Path, tiny_backbone: Tiny) -> None:
    model = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer")))

    def stop(record: Any) -> None:
        assert model.predict_proba(photos / "red").shape == (8, 3)  # until then it is there
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(photos, on_epoch=stop)
    with pytest.raises(FinealignError, match="not fitted"):
        model.predict(photos)
    assert model.fit(photos).predict_proba(photos).shape == (24, 3)


@pytest.mark.parametrize("method", METHODS)
def test_fit__leaves_nothing_open_to_gradients_of_the_method(fitted_once: Fit, method: str) -> None:
    model = fitted_once("transformer", method__name=method)
    assert not [name for name, value in model.method_.named_parameters() if value.requires_grad]


@pytest.mark.parametrize("method", METHODS)
def test_unlearned__scores_as_fit_starts_from(photos: Path, tiny_backbone: Tiny, method: str) -> None:
    """By the global score it is the start that every prediction can be held against, except where names are scored."""
    config = tiny_config(tiny_backbone("transformer"), method__name=method)
    model = FineAlign(CLASSES, config=config).unlearned()
    assert model.history_ == [] and not any(p.requires_grad for p in model.method_.parameters())
    if method in ("fair", "self-training", "cupl"):
        for found in model.iter_predictions(list_images(photos), score="global", with_start=True):
            assert not isinstance(found, SetAside) and found.start_probabilities is not None
            np.testing.assert_allclose(found.probabilities, found.start_probabilities, atol=1e-6)
    before = model.predict_proba(photos)
    after = model.fit(photos).predict_proba(photos)
    assert np.allclose(before, after, atol=1e-6) is not model.method_.trains
