"""ReCLIP, and the spreading of labels that it labels by, against NumPy's dense algebra."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from finealign.method.propagation import propagated, without_common_direction
from finealign.methods.reclip import Reclip
from finealign.testing import check_method
from finealign.types import PseudoLabels, TextFeatures
from test_methods import SCALE, backward, description_means, images, make, move, texts, unit

Array = NDArray[np.float64]


def rows(values: Array) -> Array:
    found: Array = np.array([value / math.sqrt(float(value @ value)) for value in values])
    return found


def spread(nodes: Array, labels: Array, count: int, alpha: float) -> Array:
    """(I - alpha W)^-1 Y, every edge written out."""
    size = len(nodes)
    graph = np.zeros((size, size))
    for i in range(size):
        others = sorted((j for j in range(size) if j != i), key=lambda j: -float(nodes[i] @ nodes[j]))
        for j in others[:count]:
            graph[i, j] += (1 + nodes[i] @ nodes[j]) / 4
            graph[j, i] += (1 + nodes[i] @ nodes[j]) / 4
    degrees = graph.sum(1)
    shares = graph / np.sqrt(np.outer(degrees, degrees))
    return np.asarray(np.linalg.solve(np.eye(size) - alpha * shares, labels), dtype=np.float64)


def projected(texts_there: Array, features: Array) -> Array:
    """On the left singular vectors of the texts as columns, but the first."""
    vectors = np.linalg.svd(texts_there.T, full_matrices=False)[0][:, 1:]
    return rows(features @ vectors @ vectors.T)


@pytest.mark.parametrize(("count", "alpha"), [(1, 0.5), (3, 0.9), (3, 0.99), (40, 0.9)])
def test_propagated__solves_the_equation(count: int, alpha: float) -> None:
    nodes, labels = unit(12, 6, seed=1), torch.eye(12, dtype=torch.float64)[:, :3]
    found = propagated(nodes, labels, count=count, alpha=alpha, most_steps=100)
    np.testing.assert_allclose(found.numpy(), spread(nodes.numpy(), labels.numpy(), count, alpha), atol=1e-5)
    rough = propagated(nodes, labels, count=count, alpha=alpha, most_steps=1)
    assert float((rough - found).abs().max()) > 1e-3


def test_propagated__labels_go_where_there_are_edges() -> None:
    ends = torch.eye(2, dtype=torch.float64)
    nodes = torch.cat([ends, ends, ends])  # each of two kinds thrice
    found = propagated(nodes, torch.eye(6, dtype=torch.float64)[:, :2], count=2, alpha=0.5, most_steps=50)
    assert found.argmax(1).tolist() == [0, 1] * 3
    assert found[2, 1] == found[3, 0] == 0


@pytest.mark.parametrize("classes", [2, 4, 9])
def test_without_common_direction__is_the_projection_on_the_others(classes: int) -> None:
    known, features = unit(classes, 6, seed=3), unit(7, 6, seed=4)
    found = without_common_direction(known, features)
    wanted = projected(known.numpy(), features.numpy())
    np.testing.assert_allclose((found @ found.T).numpy(), wanted @ wanted.T, atol=1e-9)


def test_without_common_direction__of_one_class_and_of_many() -> None:
    one = unit(1, 6, seed=3)
    assert without_common_direction(one, unit(5, 6, seed=4)).abs().tolist() == [[1.0]] * 5
    assert without_common_direction(unit(501, 300, seed=5), unit(2, 300, seed=6)).shape == (2, 249)
    assert without_common_direction(unit(500, 300, seed=5), unit(2, 300, seed=6)).shape == (2, 299)


def reclip(known: TextFeatures | None = None, **options: Any) -> Reclip:
    method = make("reclip", known, **{"logit_scale": SCALE, "neighbours": 3, "solver_steps": 200} | options)
    assert isinstance(method, Reclip)
    return method


def labels_from(anchors: Array, weak: Array, **how: float) -> tuple[list[int], Array]:
    nodes = projected(anchors, np.concatenate([anchors, weak]))
    labels = np.eye(len(nodes))[:, : len(anchors)]
    found = spread(nodes, labels, 3, how.get("alpha", 0.9))
    return found[len(anchors) :].argmax(1).tolist(), found


def test_survey__labels_from_learned_and_fixed_texts_and_averages() -> None:
    method, weak = reclip(), unit(15, 6, seed=8)
    fixed = np.array(description_means(texts()))[:, 0]
    move(method)
    learned = rows(method.anchors.detach()[:, 0].numpy())
    method.survey(weak)
    by_learned, _ = labels_from(learned, weak.numpy())
    by_fixed, _ = labels_from(fixed, weak.numpy())
    assert method.reached.tolist() == by_learned
    assert method.agreed.tolist() == [a == b for a, b in zip(by_learned, by_fixed, strict=True)]
    assert 0 < int(method.agreed.sum()) < 15
    for c, centroid in enumerate(method.centroids[:, 0].numpy()):
        own = [fixed[c], *(row for row, label in zip(weak.numpy(), by_fixed, strict=True) if label == c)]
        np.testing.assert_allclose(centroid, rows(np.sum(own, axis=0)[None])[0], atol=1e-9)
    features = images(b=15)
    found = method.pseudo_label(replace(features, weak=weak[[3, 9, 0]]))
    assert found.labels.tolist() == [by_learned[i] for i in (3, 9, 0)]
    assert found.weights.tolist() == [float(method.agreed[i]) for i in (3, 9, 0)]
    seen = features.weak.numpy()
    wanted = (seen @ learned.T + seen @ method.centroids[:, 0].numpy().T) / 2
    np.testing.assert_allclose(method.score(features, "global").detach().numpy(), wanted, atol=1e-9)


def test_survey__labels_spread_from_images_whose_class_is_known() -> None:
    method, weak = reclip(), unit(15, 6, seed=8)
    method.survey(weak)
    before = method.reached.clone()
    known = torch.full((15,), -1)
    known[4] = (int(before[4]) + 1) % 4
    method.survey(weak, known)
    assert method.reached[4] == known[4]
    assert bool(method.agreed[4])


@pytest.mark.parametrize(("classes", "n"), [(1, 5), (2, 1), (9, 2)])
def test_survey__of_few_classes_and_of_fewer_images_than_classes(classes: int, n: int) -> None:
    known = texts(classes)
    method = reclip(known, neighbours=10)
    method.survey(unit(n, 6, seed=8))
    assert method.reached.shape == (n,)
    for name, value in method.state_dict().items():
        assert bool(value.isfinite().all()), name
    there = set(method.reached.tolist())
    absent = [c for c in range(classes) if c not in there]
    torch.testing.assert_close(method.centroids[absent], method.fixed[absent])


def test_loss__trains_the_tower_by_centroids_and_the_texts_by_themselves() -> None:
    method = reclip(fairness="off")
    method.survey(unit(15, 6, seed=8))
    move(method)
    strong = unit(4, 6, seed=9).requires_grad_()
    labels, weights = torch.tensor([0, 1, 1, 3]), torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    found = method.loss(strong, PseudoLabels(labels, weights, torch.eye(4, dtype=torch.float64)[labels]))

    def mean_of_two(vectors: Array) -> float:
        logits = SCALE * strong.detach().numpy() @ vectors.T
        by_class = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float(-(by_class[0, 0] + by_class[2, 1]) / 2)

    learned, means = rows(method.anchors.detach()[:, 0].numpy()), method.centroids[:, 0].numpy()
    assert float(found.total.detach()) == pytest.approx(mean_of_two(learned) + mean_of_two(means), rel=1e-9)
    backward(found.total)
    assert strong.grad is not None
    assert not bool(strong.grad[[1, 3]].any())
    step = 1e-6
    moved = strong.detach().clone()
    moved[0, 2] += step
    alone = [
        float(torch.nn.functional.cross_entropy(SCALE * view[[0]] @ method.centroids[:, 0].T, labels[:1])) / 2
        for view in (strong.detach(), moved)
    ]
    assert float(strong.grad[0, 2]) == pytest.approx((alone[1] - alone[0]) / step, abs=1e-4)
    assert method.anchors.grad is not None
    assert bool(method.anchors.grad.any())


def test_loss__is_finite_where_no_labels_agree() -> None:
    method = reclip()
    pseudo = PseudoLabels(torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.eye(4)[[0, 0, 0]])
    found = method.loss(unit(3, 6, seed=9), pseudo)
    assert float(found.parts["cross_entropy"]) == float(found.parts["image_cross_entropy"]) == 0
    assert bool(found.total.detach().isfinite())


def test_check_method() -> None:
    check_method(Reclip, neighbours=3)
