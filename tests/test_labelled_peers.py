"""The peers that need labels, against their equations written once more, in NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from finealign.errors import ConfigError
from finealign.method.base import Method
from finealign.method.few_labels import UNKNOWN
from finealign.method.registry import find_method, method_names
from finealign.model.fitted import what_learned
from finealign.model.known_labels import check_taken
from finealign.testing import check_method
from finealign.types import ImageFeatures
from test_methods import SCALE, make, unit

Array = NDArray[np.float64]
NEED_LABELS = ("linear-probe", "tip-adapter", "transclip-few-shot")
over_all = pytest.mark.parametrize("name", NEED_LABELS)


def near_texts(n: int, *, seed: int = 0) -> Tensor:
    """Images, each near the text of the class of its number, class by class in turn."""
    prototypes = find_prototypes()
    drawn = prototypes[torch.arange(n) % len(prototypes)] + 0.6 * unit(n, prototypes.shape[1], seed=seed + 50)
    return torch.nn.functional.normalize(drawn, dim=1)


def find_prototypes() -> Tensor:
    return make("cupl").classifier()[:, 0]


def labels_of(n: int, *places: int) -> Tensor:
    """The labels of the images at these places; the others' are not known."""
    known = torch.full((n,), UNKNOWN)
    known[list(places)] = torch.tensor(places, dtype=torch.int64) % 4
    return known


def surveyed(name: str, weak: Tensor, known: Tensor, **options: Any) -> Method:
    method = make(name, logit_scale=SCALE, **options)
    method.survey(weak, known)
    return method


def scored(method: Method, weak: Tensor) -> Array:
    return (method.logit_scale * method.score(ImageFeatures(weak, weak[:, None][:, :0]), "global")).numpy()


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    found: Array = powers / powers.sum(1, keepdims=True)
    return found


def close(found: Array | Tensor, wanted: Array, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=tolerance, atol=tolerance)


def test_methods__those_that_need_labels_are_these_and_say_so() -> None:
    assert tuple(name for name in method_names() if find_method(name).known_labels == "needed") == NEED_LABELS
    for name in NEED_LABELS:
        with pytest.raises(ConfigError, match="learns from labelled images and has none"):
            check_taken(name, given=False)
        for known in (None, labels_of(8)):
            with pytest.raises(ValueError, match="needs known labels"):
                make(name).survey(near_texts(8), known)


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_linear_probe__is_where_the_gradient_vanishes(penalty: float) -> None:
    weak, known = near_texts(12), labels_of(12, 0, 1, 4, 5, 8)  # of classes 0 and 1 alone
    method = surveyed("linear-probe", weak, known, penalty=penalty)
    rows, targets = weak.numpy()[[0, 1, 4, 5, 8]], np.eye(2)[[0, 1, 0, 1, 0]]
    weights, bias = method.get_buffer("weights").numpy(), method.get_buffer("bias").numpy()
    error = softmax(rows @ weights[:2].T + bias[:2]) - targets
    close(error.T @ rows + penalty * weights[:2], np.zeros((2, 6)), 1e-4)
    close(error.sum(0), np.zeros(2), 1e-4)
    close(weights[2:], np.zeros((2, 6)))
    assert np.isneginf(bias[2:]).all()
    others = near_texts(5, seed=1)
    close(scored(method, others)[:, :2], others.numpy() @ weights[:2].T + bias[:2])
    probabilities = method.probabilities(method.score(ImageFeatures(others, others[:, None]), "global"))
    assert bool((probabilities[:, 2:] == 0).all())


def test_linear_probe__its_penalty_is_the_best_on_images_that_are_left_out() -> None:
    weak, known = near_texts(40), labels_of(40, *range(24))
    found = surveyed("linear-probe", weak, known)
    by_penalty = {value: surveyed("linear-probe", weak, known, penalty=value) for value in (0.003, 0.03, 0.3, 3.0)}
    same = [value for value, method in by_penalty.items() if torch.equal(method.weights, found.weights)]  # type: ignore[arg-type]
    assert len(same) == 1
    single = labels_of(40, 0, 1, 2, 3)  # nothing to leave out
    assert torch.equal(
        surveyed("linear-probe", weak, single).get_buffer("weights"),
        surveyed("linear-probe", weak, single, penalty=0.03).get_buffer("weights"),
    )


def cached(weak: Array, keys: Array, classes: list[int], alpha: float, beta: float) -> Array:
    """Tip-Adapter's logits."""
    votes = np.exp(-beta * (1 - weak @ keys.T)) @ np.eye(4)[classes]
    found: Array = SCALE * weak @ find_prototypes().numpy().T + alpha * votes
    return found


def test_tip_adapter__adds_votes_of_the_labelled_images() -> None:
    weak, known = near_texts(12), labels_of(12, 1, 2, 6)
    method = surveyed("tip-adapter", weak, known, votes_weight=2.0, sharpness=3.0)
    others = near_texts(5, seed=1)
    close(scored(method, others), cached(others.numpy(), weak.numpy()[[1, 2, 6]], [1, 2, 2], 2.0, 3.0))


def test_tip_adapter__chooses_by_labelled_images_that_are_left_out() -> None:
    weak, places = near_texts(24), list(range(16))
    method = surveyed("tip-adapter", weak, labels_of(24, *places))
    keys, classes = weak.numpy()[places], [place % 4 for place in places]

    def loss(alpha: float, beta: float) -> float:
        total = 0.0
        for place in places:
            rest = [other for other in places if other != place]
            logits = cached(keys[[place]], keys[rest], [classes[other] for other in rest], alpha, beta)
            total -= float(np.log(softmax(logits)[0, classes[place]]))
        return total

    pairs = [(alpha, beta) for alpha in (0.5, 1.0, 2.0, 4.0, 8.0) for beta in (1.0, 3.0, 5.5, 9.0, 15.0)]
    close(method.get_buffer("chosen"), np.array(min(pairs, key=lambda pair: loss(*pair))))
    alone = surveyed("tip-adapter", weak, labels_of(24, 0, 1))
    close(alone.get_buffer("chosen"), np.array([1.0, 5.5]))


def test_tip_adapter__fine_tuned_keys_fit_the_labels_better() -> None:
    weak, known = near_texts(24), labels_of(24, *range(8))
    plain, tuned = (
        surveyed("tip-adapter", weak, known, votes_weight=1.0, sharpness=5.5, key_steps=steps) for steps in (0, 50)
    )

    def loss(method: Method) -> float:
        return float(-np.log(softmax(scored(method, weak[:8]))[np.arange(8), np.arange(8) % 4]).mean())

    assert loss(tuned) < loss(plain)
    assert float((tuned.get_buffer("keys") - plain.get_buffer("keys")).norm()) > 0.01


def transclip(weak: Array, known: NDArray[np.int64], gamma: float, rounds: int) -> tuple[Array, Array, Array]:
    """Its objective's alternating steps over an explicit matrix of neighbours: z, mu and v."""
    n, width, given = len(weak), weak.shape[1], known >= 0
    log_texts = np.log(softmax(SCALE * weak @ find_prototypes().numpy().T))
    target = np.eye(4)[np.maximum(known, 0)]
    z = np.where(given[:, None], target, np.exp(log_texts))
    cosines = weak @ weak.T
    nearest = np.zeros((n, n))
    for i in range(n):
        for j in sorted(set(range(n)) - {i}, key=lambda j: -cosines[i, j])[:3]:
            nearest[i, j] = max(cosines[i, j], 0)
    affinity = (nearest + nearest.T) / 6
    mu = np.stack([weak[known == c].sum(0) if (known == c).any() else find_prototypes().numpy()[c] for c in range(4)])
    mu, v = mu / np.linalg.norm(mu, axis=1, keepdims=True), np.full(width, 1 / width)
    weights = np.where(given, gamma / given.sum(), 1 / (~given).sum())
    for _ in range(rounds):
        likelihood = -(((weak[:, None] - mu) ** 2) / v).sum(2) / 2
        for _ in range(5):
            z = np.where(given[:, None], target, softmax(0.5 * log_texts + likelihood / 50 + affinity @ z))
        weighed = weights[:, None] * z
        mu = weighed.T @ weak
        mu = mu / np.linalg.norm(mu, axis=1, keepdims=True)
        v = (weighed[:, :, None] * (weak[:, None] - mu) ** 2).sum((0, 1)) / weighed.sum()
    return z, mu, v


@pytest.mark.parametrize("gamma", [0.1, 10.0])
def test_transclip_few_shot__alternates_as_its_objective_says(gamma: float) -> None:
    weak, known = near_texts(17), labels_of(17, 0, 1, 2, 5, 9)
    method = surveyed("transclip-few-shot", weak, known, labelled_share=gamma, rounds=4)
    z, mu, v = transclip(weak.numpy(), known.numpy(), gamma, 4)
    close(method.get_buffer("assigned"), z)
    close(method.get_buffer("means"), mu)
    close(method.get_buffer("variance"), v)


def test_transclip_few_shot__takes_the_share_by_which_neighbours_of_labelled_images_get_their_classes() -> None:
    weak, known = near_texts(21), labels_of(21, 0, 1, 2, 3, 5, 9)
    method = surveyed("transclip-few-shot", weak, known)
    cosines = weak.numpy() @ weak.numpy().T
    cosines[:, known.numpy() >= 0] = -np.inf
    labelled = np.flatnonzero(known.numpy() >= 0)
    nearest = cosines[labelled].argmax(1)
    found = {gamma: transclip(weak.numpy(), known.numpy(), gamma, 10) for gamma in (0.1, 0.5, 1.0, 10.0)}
    right = {gamma: (z[nearest].argmax(1) == known.numpy()[labelled]).sum() for gamma, (z, _, _) in found.items()}
    close(method.get_buffer("means"), found[max(right, key=lambda gamma: right[gamma])][1])


@over_all
def test_methods_that_need_labels__are_whole_methods(name: str) -> None:
    check_method(find_method(name))


@over_all
def test_methods_that_need_labels__load_what_they_have_learned(name: str) -> None:
    weak, known = near_texts(12), labels_of(12, 0, 1, 2, 3, 5)
    method, other = surveyed(name, weak, known), make(name, logit_scale=SCALE)
    other.load_inference_tensors(method.inference_tensors())
    close(scored(other, near_texts(4, seed=3)), scored(method, near_texts(4, seed=3)))


@over_all
def test_what_learned__to_classify_images_from_labelled_ones(name: str) -> None:
    assert what_learned(make(name), {}) == "to classify images, from those with a label"


def test_what_learned__without_training_and_labels() -> None:
    assert what_learned(make("transclip"), {}) == "a vector for each class, from all images at once"
    assert what_learned(make("cupl"), {}) == "nothing"
