"""POUF: its loss over lists, and what it means."""

import math
from typing import Any

import pytest
import torch

from finealign.methods.pouf import Pouf
from finealign.testing import check_method
from finealign.types import PseudoLabels, TextFeatures
from test_methods import SCALE, Matrix, Vector, backward, dot, make, move, normalised, softmax, texts, unit
from test_peers import mean_of


def pouf(known: TextFeatures | None = None, **options: Any) -> Pouf:
    method = make("pouf", known, **{"logit_scale": SCALE} | options)
    assert isinstance(method, Pouf)
    move(method)
    return method


def cosines(method: Pouf, strong: torch.Tensor) -> Matrix:
    return [[dot(row, anchor) for (anchor,) in normalised(method.anchors)] for row in strong.tolist()]


def weighed(weights: Vector, classes: int) -> PseudoLabels:
    counts = torch.tensor(weights, dtype=torch.float64)
    labels = torch.zeros(len(weights), dtype=torch.int64)
    return PseudoLabels(labels, counts, torch.eye(classes, dtype=torch.float64)[labels])


def transport(found: Matrix, weights: Vector) -> float:
    images, classes = range(len(found)), range(len(found[0]))
    there = [softmax([SCALE * value for value in row]) for row in found]
    forward = [weights[i] * math.fsum(there[i][c] * (1 - found[i][c]) for c in classes) for i in images]
    back = []
    for c in classes:
        powers = [weights[i] * math.exp(SCALE * found[i][c]) for i in images]
        back.append(math.fsum(powers[i] / math.fsum(powers) * (1 - found[i][c]) for i in images))
    return math.fsum(forward) / len(found) + math.fsum(back) / len(found[0])


@pytest.mark.parametrize(("classes", "n"), [(1, 3), (2, 1), (4, 5), (9, 2)])
@pytest.mark.parametrize("uneven", [False, True])
def test_loss__is_transport_and_entropies(classes: int, n: int, uneven: bool) -> None:
    method = pouf(texts(classes), entropy_weight=0.4, fairness="batch", fairness_weight=1.5)
    prior = [(1 + c * uneven) / sum(1 + d * uneven for d in range(classes)) for c in range(classes)]
    method.expect(torch.tensor(prior, dtype=torch.float64))
    weights = [1.0, 0.25, 1.0, 0.5, 1.0][:n]
    strong = unit(n, 6, seed=3)
    found = cosines(method, strong)
    predictions = [softmax([SCALE * value for value in row]) for row in found]
    entropy = math.fsum(
        -w * math.fsum(p * math.log(p) for p in row) for w, row in zip(weights, predictions, strict=True)
    )
    mean = mean_of(predictions)
    unfair = math.fsum(p * math.log(p / q) for p, q in zip(mean, prior, strict=True))
    wanted = transport(found, weights) + 0.4 * entropy / n + 1.5 * unfair
    assert float(method.loss(strong, weighed(weights, classes)).total.detach()) == pytest.approx(wanted, rel=1e-9)


def test_loss__with_even_shares_and_equal_weights_is_less_the_mutual_information() -> None:
    method = pouf(entropy_weight=0.3, fairness="batch", fairness_weight=0.3)
    strong = unit(5, 6, seed=3)
    found = cosines(method, strong)
    joint = [[p / 5 for p in softmax([SCALE * value for value in row])] for row in found]
    of_class = [math.fsum(column) for column in zip(*joint, strict=True)]
    information = math.fsum(p * math.log(p / (q / 5)) for row in joint for p, q in zip(row, of_class, strict=True))
    wanted = transport(found, [1.0] * 5) - 0.3 * information + 0.3 * math.log(4)
    assert float(method.loss(strong, weighed([1.0] * 5, 4)).total.detach()) == pytest.approx(wanted, rel=1e-9)


def test_loss__without_fairness_and_with_its_running_mean() -> None:
    strong, pseudo = unit(5, 6, seed=3), weighed([1.0] * 5, 4)
    parts = pouf(fairness="off", entropy_weight=0.0).loss(strong, pseudo)
    assert float(parts.total.detach()) == pytest.approx(transport(cosines(pouf(), strong), [1.0] * 5))
    method = pouf(fairness="running", fairness_window=10)
    predictions = [softmax([SCALE * value for value in row]) for row in cosines(method, strong)]
    method.loss(strong, pseudo)
    wanted = [(1 / 4 + new) / 2 for new in mean_of(predictions)]
    torch.testing.assert_close(method.mean_prediction, torch.tensor(wanted, dtype=torch.float64))


def test_loss__pulls_images_and_texts_and_leaves_out_what_counts_nothing() -> None:
    method, strong = pouf(fairness="off"), unit(4, 6, seed=3).requires_grad_()
    backward(method.loss(strong, weighed([1.0, 0.0, 1.0, 0.0], 4)).total)
    assert strong.grad is not None
    assert method.anchors.grad is not None
    assert bool(method.anchors.grad.any())
    assert strong.grad.abs().sum(1).gt(1e-12).tolist() == [True, False, True, False]


def test_check_method() -> None:
    check_method(Pouf)
