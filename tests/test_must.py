"""MUST: a teacher that follows, and labels that count where it is sure."""

from typing import Any

import pytest
import torch

from finealign.methods.must import Must
from finealign.testing import check_method
from finealign.types import TextFeatures
from test_methods import SCALE, best, description_means, dot, images, make, move, softmax, texts, unit, unit_of


def must(known: TextFeatures | None = None, **options: Any) -> Must:
    method = make("must", known, **{"logit_scale": SCALE} | options)
    assert isinstance(method, Must)
    return method


@pytest.mark.parametrize("classes", [1, 2, 4, 9])
@pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0])
def test_pseudo_label__by_a_teacher_that_follows_ever_more_slowly(classes: int, confidence: float) -> None:
    known = texts(classes)
    method = must(known, confidence=confidence, teacher_start=0.5, teacher_end=0.9, teacher_steps=2)
    teacher = [row for (row,) in description_means(known)]
    for step, momentum in enumerate((0.5, 0.7, 0.9, 0.9)):
        learned = [unit_of(row) for row in method.anchors.detach()[:, 0].tolist()]
        teacher = [
            [momentum * old + (1 - momentum) * new for old, new in zip(*pair, strict=True)]
            for pair in zip(teacher, learned, strict=True)
        ]
        features = images(b=6, seed=step)
        rows = [softmax([SCALE * dot(row, unit_of(text)) for text in teacher]) for row in features.weak.tolist()]
        found = method.pseudo_label(features)
        torch.testing.assert_close(found.probabilities, torch.tensor(rows, dtype=torch.float64))
        assert found.labels.tolist() == [best(row) for row in rows]
        assert found.weights.tolist() == [float(max(row) > confidence) for row in rows]
        move(method, seed=step)


def test_loss__is_a_mean_over_sure_labels_and_fair_to_all_images() -> None:
    method, features = must(confidence=0.8, fairness="batch", fairness_weight=1.5), images(b=20)
    pseudo, strong = method.pseudo_label(features), unit(20, 6, seed=5)
    sure = pseudo.weights > 0
    assert 0 < int(sure.sum()) < 20
    logits = SCALE * strong @ method.classifier().detach()[:, 0].T
    mean = torch.softmax(logits, dim=1).mean(0)
    wanted = torch.nn.functional.cross_entropy(logits[sure], pseudo.labels[sure]) - 1.5 * mean.log().mean()
    torch.testing.assert_close(method.loss(strong, pseudo).total.detach(), wanted)


def test_loss__where_the_teacher_is_sure_of_nothing_is_that_of_fairness() -> None:
    method, features = must(confidence=1.0, fairness_weight=2.0), images(b=5)
    found = method.loss(unit(5, 6, seed=5), method.pseudo_label(features))
    assert float(found.parts["cross_entropy"]) == 0
    assert float(found.total.detach()) == pytest.approx(2 * float(found.parts["fairness"]))


@pytest.mark.nightly
def test_check_method() -> None:
    check_method(Must, confidence=0.4)
