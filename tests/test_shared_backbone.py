"""Two models on one backbone, in any order of fit and predict, behave as two models on two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import CLASSES, open_clip_backbone, tiny_config, write_photos
from finealign import FineAlign, load_backbone

Tiny = Callable[[str], str]
TOWERS = ["transformer", "convolutional"]


def model(backbone: str, **overrides: Any) -> FineAlign:
    rates = {"training__learning_rate": 1e-2, "training__anchor_learning_rate": 1e-2}
    settings = {"training__epochs": 2, "data__cache": "temporary"} | rates | overrides
    return FineAlign(CLASSES, config=tiny_config(backbone, **settings))


@pytest.fixture
def others(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "others", each=5)


@pytest.mark.parametrize("tower", TOWERS)
def test_fit__a_second_model_leaves_the_first_as_it_was(
    photos: Path, others: Path, tiny_backbone: Tiny, tower: str
) -> None:
    identifier = tiny_backbone(tower)
    alone = [model(identifier).fit(photos), model(identifier, seed=1).fit(others)]
    shared = load_backbone(identifier)
    first = model(identifier).fit(photos, backbone=shared)
    before = first.predict_proba(photos)
    second = model(identifier, seed=1).fit(others, backbone=shared)
    np.testing.assert_array_equal(first.predict_proba(photos), before)
    np.testing.assert_array_equal(before, alone[0].predict_proba(photos))
    np.testing.assert_array_equal(second.predict_proba(photos), alone[1].predict_proba(photos))
    assert not np.allclose(before, second.predict_proba(photos), atol=1e-3)  # or this would prove nothing


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)], ids=str)
def test_predict__the_order_does_not_matter(
    photos: Path, others: Path, tiny_backbone: Tiny, tmp_path: Path, order: tuple[int, ...]
) -> None:
    """Adapted, adapted otherwise, and not at all: predicted, scored at their start, saved and opened in any order."""
    identifier = tiny_backbone("transformer")
    shared = load_backbone(identifier)

    def made(number: int, backbone: Any) -> FineAlign:
        if number == 2:
            return model(identifier, method__name="cupl").fit(photos, backbone=backbone)
        return model(identifier, seed=number).fit([photos, others][number], backbone=backbone)

    alone = {number: made(number, None) for number in range(3)}
    together = {number: made(number, shared) for number in order}
    for number in reversed(order):
        found = together[number]
        np.testing.assert_array_equal(found.predict_proba(photos), alone[number].predict_proba(photos))
        at_start = [p.features([photos / "red" / "0.png"], at_start=True)[0].weak for p in (found, alone[number])]
        assert torch.equal(*at_start)
        found.save(tmp_path / str(number))
        opened = FineAlign.load(tmp_path / str(number), device="cpu", precision="fp32")
        np.testing.assert_array_equal(opened.predict_proba(photos), alone[number].predict_proba(photos))


def test_fit__another_model_may_predict_between_two_epochs(photos: Path, others: Path, tiny_backbone: Tiny) -> None:
    identifier = tiny_backbone("transformer")
    shared = load_backbone(identifier)
    first = model(identifier).fit(photos, backbone=shared)
    before = first.predict_proba(photos)
    heard = []

    def listen(record: object) -> None:
        heard.append(first.predict_proba(photos))
        second.predict_proba(photos)

    second = model(identifier, seed=1)
    second.fit(others, backbone=shared, on_epoch=listen)
    undisturbed = model(identifier, seed=1).fit(others)
    assert len(heard) == 2
    for answer in heard:
        np.testing.assert_array_equal(answer, before)
    np.testing.assert_array_equal(second.predict_proba(photos), undisturbed.predict_proba(photos))


@pytest.mark.parametrize("fails", [False, True])
def test_fit__the_backbone_is_as_it_was_loaded_afterwards(photos: Path, tiny_backbone: Tiny, fails: bool) -> None:
    identifier = tiny_backbone("convolutional")
    untouched, shared = load_backbone(identifier), load_backbone(identifier)

    def stop(record: object) -> None:
        if fails:
            raise ZeroDivisionError

    adapted = model(identifier)
    if fails:
        with pytest.raises(ZeroDivisionError):
            adapted.fit(photos, backbone=shared, on_epoch=stop)
    else:
        adapted.fit(photos, backbone=shared, on_epoch=stop)
        learned = adapted.norms_
        assert any(not torch.equal(learned[name], value) for name, value in shared.norm_parameters().items())
        assert open_clip_backbone(adapted) is shared
    for (name, now), before in zip(shared.norm_parameters().items(), untouched.norm_parameters().values(), strict=True):
        assert torch.equal(now, before), name
        assert not now.requires_grad and now.grad is None


def test_revert__of_one_model_is_no_other_models(photos: Path, tiny_backbone: Tiny) -> None:
    identifier = tiny_backbone("transformer")
    shared = load_backbone(identifier)
    first, second = (model(identifier).fit(photos, backbone=shared) for _ in range(2))
    before = second.predict_proba(photos)
    first.revert()
    np.testing.assert_array_equal(second.predict_proba(photos), before)
    assert not np.allclose(first.predict_proba(photos), before, atol=1e-3)
