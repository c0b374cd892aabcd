"""Calibration without labels: its maths against plain statements, what it leaves alone, and what it does on photos."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import CLASSES, predictions, tiny_config
from finealign import FineAlign
from finealign.config import make_config, resolve
from finealign.images.listing import list_images
from finealign.method.base import Method
from finealign.model.calibration import (
    COOLEST,
    HOTTEST,
    adapted_witnesses,
    confidences,
    confirmed,
    estimate_accuracy,
    fit_temperature,
    half_of_texts,
    temperature_for,
)
from finealign.model.folder import MANIFEST
from finealign.run.verdict import judge_model
from finealign.types import TextFeatures
from test_methods import images, make_trained, texts

Tiny = Callable[[str], str]
nightly = pytest.mark.nightly


def logits_of(seed: int, n: int, classes: int, scale: float = 3.0) -> Any:
    return scale * np.random.default_rng(seed).normal(size=(n, classes))


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(2, 6), st.floats(0.2, 10))
def test_confidences__are_the_largest_of_a_softmax(seed: int, n: int, classes: int, temperature: float) -> None:
    logits = logits_of(seed, n, classes)
    expected = [max(softmax([value / temperature for value in row])) for row in logits.tolist()]
    assert confidences(logits, temperature) == pytest.approx(np.array(expected))


def test_confidences__no_overflow() -> None:
    assert confidences(np.array([[1e6, 0.0], [-1e6, -1e6]]), COOLEST) == pytest.approx(np.array([1, 0.5]))


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(2, 6), st.floats(0.3, 0.99))
def test_temperature_for__gives_the_mean_confidence(seed: int, n: int, classes: int, target: float) -> None:
    logits = logits_of(seed, n, classes)
    found = temperature_for(logits, target)
    assert COOLEST <= found <= HOTTEST
    reached = confidences(logits, found).mean()
    if confidences(logits, HOTTEST).mean() < target < confidences(logits, COOLEST).mean():
        assert reached == pytest.approx(target, abs=1e-6)
    else:  # out of reach: the end of the range on that side
        assert found == pytest.approx(HOTTEST if reached > target else COOLEST, rel=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(2, 5))
def test_fit_temperature__none_explains_the_confirmations_better(seed: int, n: int, classes: int) -> None:
    logits = logits_of(seed, n, classes)
    right = (np.random.default_rng(seed).random(n) < 0.6).astype(float)
    k = right.sum()

    def unlikelihood(temperature: float) -> float:
        total = 0.0
        for row, hit in zip(logits.tolist(), right, strict=True):
            target = (k + 1) / (k + 2) if hit else 1 / (n - k + 2)
            chance = min(max(max(softmax([value / temperature for value in row])), 1e-6), 1 - 1e-6)
            total -= target * math.log(chance) + (1 - target) * math.log(1 - chance)
        return total

    found = fit_temperature(logits, right)
    assert COOLEST * 0.999 <= found <= HOTTEST * 1.001
    for other in (0.06, 0.3, 0.9, 1.1, 4.0, 15.0):
        assert unlikelihood(found) <= unlikelihood(other) + 0.02 * n


def test_fit_temperature__finds_that_of_draws() -> None:
    """Labels drawn from softmax(logits / 2.5) are best explained by 2.5, up to chance."""
    logits = logits_of(0, 20_000, 4)
    right = (np.random.default_rng(1).random(20_000) < confidences(logits, 2.5)).astype(float)
    assert fit_temperature(logits, right) == pytest.approx(2.5, rel=0.1)


@pytest.mark.parametrize("right", [True, False])
def test_fit_temperature__degenerate(right: bool) -> None:
    """One image; two classes; all classes equal; every image alike; nothing certain however many confirm."""
    one = fit_temperature(np.array([[2.0, 0.0]]), np.array([float(right)]))
    assert math.isfinite(one)
    assert fit_temperature(np.zeros((5, 3)), np.full(5, float(right))) == 1
    alike = np.tile([3.0, 0.0, 0.0], (50, 1))
    found = confidences(alike, fit_temperature(alike, np.full(50, float(right))))
    assert found[0] == pytest.approx(51 / 52 if right else 1 / 3, abs=0.08)


def test_fit_temperature__surer_where_more_is_confirmed() -> None:
    logits = logits_of(3, 200, 5)
    rank = np.argsort(np.argsort(-confidences(logits, 1.0)))
    found = [fit_temperature(logits, (rank < known).astype(float)) for known in (80, 120, 160, 200)]
    assert found == sorted(found, reverse=True)


def test_confirmed_and_estimate__by_hand() -> None:
    labels = np.array([0, 1, 2, 2])
    one, two, three = np.array([0, 1, 1, 2]), np.array([0, 0, 2, 2]), np.array([0, 1, 0, 2])
    assert confirmed(labels, [one]).tolist() == [1, 1, 0, 1]
    assert confirmed(labels, [one, two]).tolist() == [1, 0, 0, 1]
    right = confirmed(labels, [one, two, three])  # of three pairs all, one (the first and the third), none, all
    assert right == pytest.approx(np.array([1, 1 / 3, 0, 1]))
    assert estimate_accuracy(right) == pytest.approx((7 / 3 + 1) / 6)
    assert 0 < estimate_accuracy(np.array([0])) < estimate_accuracy(np.array([1])) < 1


def test_half_of_texts__every_second_of_each_class() -> None:
    class_of = torch.tensor([0, 0, 0, 1, 2, 2])
    texts = TextFeatures(torch.zeros(3, 2), torch.arange(12.0).reshape(6, 2), class_of)
    first, second = half_of_texts(texts, 0), half_of_texts(texts, 1)
    assert first.descriptions[:, 0].tolist() == [0, 4, 6, 8]
    assert second.descriptions[:, 0].tolist() == [2, 6, 10]
    assert first.class_of.tolist() == [0, 0, 1, 2]
    assert second.class_of.tolist() == [0, 1, 2]
    assert first.num_classes == second.num_classes == 3


# --- in the model -----------------------------------------------------------------------------------------------------


def fitted(backbone: str, photos: Path, **settings: Any) -> FineAlign:
    return FineAlign(CLASSES, config=tiny_config(backbone, **settings)).fit(photos)


METHODS = ["fair", "dpa", *(pytest.param(name, marks=nightly) for name in ("self-training", "lafter", "microclip"))]


@pytest.mark.parametrize("method", METHODS)
def test_fit__calibrated_gives_the_same_labels_and_another_confidence(
    method: str, photos: Path, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    backbone = tiny_backbone("transformer")
    plain = fitted(backbone, photos, method__name=method)
    model = fitted(backbone, photos, method__name=method, prediction__calibrate=True)
    paths = list_images(photos)
    assert plain.calibration_ is None
    assert model.calibration_ is not None
    assert 0 < model.calibration_.accuracy < 1
    kinds = [kind for kind in model.method_.scores if kind == "global" or model.score_ != "global"]
    assert sorted(model.calibration_.temperatures) == sorted(kinds)
    for kind in kinds:
        temperature = model.model_.temperature(kind)
        assert temperature == model.calibration_.temperatures[kind]
        before, after = (predictions(one, paths, score=kind, with_start=True) for one in (plain, model))
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(old.scores, new.scores)  # training is not touched
            scale = model.method_.logit_scale
            expected = torch.softmax(scale / temperature * torch.from_numpy(new.scores).double(), dim=0)
            np.testing.assert_allclose(new.probabilities, expected, atol=1e-4)
            assert new.scores[new.probabilities.argmax()] == pytest.approx(new.scores.max(), abs=1e-6)
            first = torch.from_numpy(new.start_scores).double() * scale / model.calibration_.start_temperature
            np.testing.assert_allclose(new.start_probabilities, torch.softmax(first, dim=0), atol=1e-4)
    model.save(tmp_path / "model")
    again = FineAlign.load(tmp_path / "model", device="cpu", precision="fp32")
    np.testing.assert_allclose(again.predict_proba(photos), model.predict_proba(photos), atol=1e-6)
    assert again.model_.inference.temperatures == model.model_.inference.temperatures


def test_load__a_model_without_temperatures_has_one_of_1(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    model = fitted(tiny_backbone("convolutional"), photos)
    model.save(tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / MANIFEST).read_text(encoding="utf-8"))
    del manifest["inference"]["temperatures"], manifest["inference"]["start_temperature"]
    (tmp_path / "model" / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    again = FineAlign.load(tmp_path / "model", device="cpu", precision="fp32")
    np.testing.assert_allclose(again.predict_proba(photos), model.predict_proba(photos), atol=1e-6)
    assert again.model_.temperature("las") == again.model_.start().temperature("global") == 1


def test_fit__calibration_judging_and_reverting(
    photos: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict encodes nothing again, is the same as without, and the start keeps its own temperature."""
    plain = fitted(tiny_backbone("convolutional"), photos)
    model = fitted(tiny_backbone("convolutional"), photos, prediction__calibrate=True)
    images = list_images(photos)
    expected = judge_model(plain, images)
    with monkeypatch.context() as patch:
        patch.setattr(FineAlign, "features", None)
        assert judge_model(model, images) == expected
    at_start = [one.start_probabilities for one in predictions(model, images, with_start=True)]
    assert model.calibration_ is not None
    model.revert()
    assert model.model_.temperature("global") == model.calibration_.start_temperature
    np.testing.assert_allclose([one.probabilities for one in predictions(model, images)], at_start, atol=1e-6)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=nightly)])
def test_fit__few_images_and_two_classes(count: int, photos: Path, tiny_backbone: Tiny) -> None:
    config = tiny_config(tiny_backbone("convolutional"), prediction__calibrate=True)
    paths = list_images(photos)[:count]
    model = FineAlign(CLASSES[:2], config=config).fit(paths)
    assert model.calibration_ is not None
    assert model.calibration_.images == count
    assert np.isfinite(model.predict_proba(paths)).all()


def some(folder: Path, each: int = 12) -> list[Path]:
    """The first photos of each class."""
    return [path for kind in sorted(folder.iterdir()) for path in list_images(kind)[:each]]


def test_fit__the_encoder_is_left_as_it_was(photos: Path, tiny_backbone: Tiny) -> None:
    """Witnesses learn on kept features; the backbone has its own weights and no gradients after it."""
    model = fitted(tiny_backbone("transformer"), photos, prediction__calibrate=True)
    for name, parameter in model.backbone_.norm_parameters().items():
        assert torch.equal(parameter, model.start_norms_[name])
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert not any(parameter.requires_grad for parameter in model.method_.parameters())


def test_adapted_witnesses__expect_and_trust_what_the_adapted_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their anchors learn even if those of the run take no steps, as where it keeps no features of crops."""
    config = make_config({"method": {"name": "fair"}, "training": {"anchor_steps": 0, "batch_size": 8}})
    config = resolve(config, images=16, classes=4, input_size=32)
    like = make_trained("fair")
    like.whole_share.fill_(0.25)
    like.expect(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    backbone: Any = None  # nothing of it learns

    def witnesses(steps: int) -> list[Method]:
        monkeypatch.setattr("finealign.model.calibration.ANCHOR_STEPS", steps)
        return adapted_witnesses(images(16), texts(), config, backbone, like=like, images=16)

    for still, moved in zip(witnesses(0), witnesses(3), strict=True):
        assert float(moved.share_of_whole()) == 0.25
        assert moved.class_prior is not None
        torch.testing.assert_close(moved.class_prior.float(), torch.tensor([0.4, 0.3, 0.2, 0.1]))
        assert not torch.equal(moved.classifier(), still.classifier())


@pytest.mark.parametrize("name", ["eurosat", pytest.param("pets37-small", marks=nightly)])
def test_real_photos__confidence_lies_near_the_accuracy(shared: Path, name: str) -> None:
    """A frozen run of MiniCLIP, on test images, of the model and of the start."""
    data = shared / "data" / name
    classes = (data / "classes.txt").read_text(encoding="utf-8").splitlines()
    descriptions = json.loads((data / "descriptions.json").read_text(encoding="utf-8"))
    config = tiny_config(
        f"local-dir:{shared / 'models' / 'miniclip'}",
        training__encoder="frozen",
        training__epochs="auto",
        training__anchor_learning_rate="auto",
        training__batch_size=64,
        prediction__calibrate=True,
    )
    model = FineAlign(classes, descriptions=descriptions, config=config).fit(some(data / "train"))
    assert model.calibration_ is not None
    labels = {path: path.parent.name for path in some(data / "test")}
    found = predictions(model, list(labels), with_start=True)
    hits = [model.classes_[one.probabilities.argmax()] == labels[one.path] for one in found]
    first = [model.classes_[one.start_probabilities.argmax()] == labels[one.path] for one in found]
    assert abs(np.mean([one.probabilities.max() for one in found]) - np.mean(hits)) < 0.2
    assert abs(np.mean([one.start_probabilities.max() for one in found]) - np.mean(first)) < 0.2
