"""The peers against the equations that METHOD.md gives them, over lists; and all presets."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transductive import clip_features, measure

from finealign.config import MethodSettings, make_config, read_config, resolve
from finealign.errors import ConfigError
from finealign.method.registry import create_method, find_method, method_names, method_options, method_settings
from finealign.method.transductive import TransductiveMethod
from finealign.methods.dpa import Dpa
from finealign.methods.lafter import Lafter
from finealign.methods.stata import Stata
from finealign.types import ImageFeatures, PseudoLabels, TextFeatures
from test_methods import (
    SCALE,
    Cube,
    Matrix,
    Vector,
    agree,
    backward,
    believed,
    believed_batch,
    best,
    description_means,
    dot,
    global_row,
    images,
    las_row,
    logit_rows,
    make,
    make_trained,
    mean_prediction,
    move,
    normalised,
    slope,
    softmax,
    texts,
    unfairness,
    unit,
    unit_of,
)


def whole(weak: Tensor) -> ImageFeatures:
    return ImageFeatures(weak, weak[:, None, :][:, :0])


def mean_of(rows: Matrix) -> Vector:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def rows_of(anchors: Cube) -> Matrix:
    return [row for (row,) in anchors]


# --- DPA --------------------------------------------------------------------------------------------------------------


def opinions(weak: Matrix, prototypes: Matrix, anchors: Cube, past: Vector | None) -> tuple[Matrix, Matrix, Vector]:
    """p_v, aligned p_t and the mean it was aligned by: of these images, or 0.6 of the past."""
    by_images = [softmax([SCALE * dot(row, prototype) for prototype in prototypes]) for row in weak]
    by_texts = [softmax([SCALE * value for value in global_row(row, anchors)]) for row in weak]
    mean = mean_of(by_texts)
    if past is not None:
        mean = [0.6 * old + 0.4 * new for old, new in zip(past, mean, strict=True)]
    divided = [[p / m for p, m in zip(row, mean, strict=True)] for row in by_texts]
    return by_images, [[value / math.fsum(row) for value in row] for row in divided], mean


def mixed(by_images: Matrix, by_texts: Matrix, share: float) -> Matrix:
    return [
        [share * v + (1 - share) * t for v, t in zip(*rows, strict=True)]
        for rows in zip(by_images, by_texts, strict=True)
    ]


def surveyed(weak: Matrix, prototypes: Matrix, anchors: Cube, share: float) -> Matrix:
    """Each class's prototype: the direction of the mean of its images, or as it was without any."""
    by_images, by_texts, _ = opinions(weak, prototypes, anchors, None)
    labels = [best(row) for row in mixed(by_images, by_texts, share)]
    own = [[row for row, label in zip(weak, labels, strict=True) if label == c] for c in range(len(prototypes))]
    return [unit_of(mean_of(rows)) if rows else old for rows, old in zip(own, prototypes, strict=True)]


def make_dpa(known: TextFeatures | None = None, **options: Any) -> Dpa:
    method = make_trained("dpa", known, **{"logit_scale": SCALE, "fairness_window": 10} | options)
    assert isinstance(method, Dpa)
    return method


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_dpa__surveys_then_labels_by_both_prototypes(share: float) -> None:
    known = texts()
    method = make_dpa(known, image_share=share)
    prototypes, past = rows_of(description_means(known)), [1 / 4] * 4
    for seed in range(3):  # as three epochs of a batch, the text prototypes learning in between
        everything = unit(11, 6, seed=seed + 40)
        anchors = normalised(method.anchors)
        method.survey(everything)
        prototypes = surveyed(everything.tolist(), prototypes, anchors, share)
        agree(method.image_prototypes, prototypes)
        features = images(b=4, seed=seed)
        by_images, by_texts, past = opinions(features.weak.tolist(), prototypes, anchors, past)
        wanted = mixed(by_images, by_texts, share)
        labels = [best(row) for row in wanted]
        found = method.pseudo_label(features)
        agree(found.probabilities, wanted)
        assert found.labels.tolist() == labels
        pairs = zip(by_images, by_texts, labels, strict=True)
        agree(found.weights, [v[y] / max(v) * t[y] / max(t) for v, t, y in pairs])
        agree(method.mean_text, past)
        move(method, seed=seed)


def test_dpa__before_any_survey_the_images_prototypes_are_the_texts() -> None:
    agree(make_dpa().image_prototypes, rows_of(description_means(texts())))


def test_dpa__a_class_without_images_keeps_its_prototype() -> None:
    known = TextFeatures(torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), torch.arange(3))
    method = make_dpa(known, image_share=1.0)
    seen = torch.tensor([[0.8, 0.0, 0.6], [0.6, 0.8, 0.0], [0.8, 0.6, 0.0]], dtype=torch.float64)
    method.survey(seen)  # of classes 0, 1 and 0
    agree(method.image_prototypes, [unit_of([1.6, 0.6, 0.6]), [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])


def test_dpa__a_survey_changes_nothing_that_learns_and_no_running_mean() -> None:
    method = make_dpa()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.survey(unit(9, 6, seed=3))
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"image_prototypes"}


def test_dpa__labels_that_both_agree_on_weigh_one_and_others_less() -> None:
    method = make_dpa()
    features = images(b=40)
    found = method.pseudo_label(features)  # nothing surveyed: the two differ by the alignment alone
    alike = found.weights == 1
    assert bool(alike.any())
    assert bool(((found.weights > 0) & (found.weights <= 1)).all())
    assert bool((~alike).any())


def aligned(prototypes: Matrix, anchors: Cube) -> float:
    """CE(s P T', identity)."""
    rows = [softmax(row) for row in logit_rows(prototypes, anchors)]
    return -math.fsum(math.log(row[c]) for c, row in enumerate(rows)) / len(rows)


@pytest.mark.parametrize("align", [0.0, 1.0, 2.5])
def test_dpa__loss_has_the_term_that_aligns_the_prototypes(align: float) -> None:
    method = make_dpa(align_weight=align, fairness="batch", fairness_weight=1.5)
    method.survey(unit(11, 6, seed=40))
    move(method)
    strong, pseudo = believed_batch(4, 4)
    anchors, prototypes = normalised(method.anchors), method.image_prototypes.tolist()
    logits = logit_rows(strong.tolist(), anchors)
    found = method.loss(strong, pseudo)
    agree(found.parts["align"], aligned(prototypes, anchors))
    plain = believed(logits, pseudo.labels.tolist(), pseudo.weights.tolist()) + 1.5 * unfairness(
        mean_prediction(logits)
    )
    agree(found.total.detach(), plain + align * aligned(prototypes, anchors))


def test_dpa__the_aligning_term_pulls_the_texts_prototypes_alone() -> None:
    method = make_dpa(align_weight=2.0, fairness="off")
    method.survey(unit(11, 6, seed=40))
    move(method)
    prototypes = method.image_prototypes.tolist()

    def of_anchors(rows: Matrix) -> float:
        return 2 * aligned(prototypes, [[unit_of(row)] for row in rows])

    strong, pseudo = believed_batch(4, 4)
    unweighted = PseudoLabels(pseudo.labels, torch.zeros_like(pseudo.weights), pseudo.probabilities)
    backward(method.loss(strong, unweighted).total)
    assert method.anchors.grad is not None
    wanted = torch.tensor(slope(of_anchors, method.anchors.flatten(0, 1).tolist()), dtype=torch.float64)
    torch.testing.assert_close(method.anchors.grad.flatten(0, 1), wanted, rtol=1e-6, atol=1e-7)
    assert not method.image_prototypes.requires_grad


# --- TransCLIP and StatA ----------------------------------------------------------------------------------------------

Near = list[tuple[float, int]]


class ByHand:
    """The alternation over lists: assignments, then means and variances, one for all classes or a row for each."""

    def __init__(self, name: str, weak: Matrix, prototypes: Matrix, options: dict[str, Any]) -> None:
        self.name, self.weak, self.prototypes, self.options = name, weak, prototypes, options
        n, width = range(len(weak)), range(len(weak[0]))
        self.z = [self.opinion(row) for row in weak]
        self.near = [self.nearest(weak[i], i) for i in n]
        self.start_variance = [
            math.fsum(self.z[i][c] * (weak[i][d] - text[d]) ** 2 for i in n for c, text in enumerate(prototypes))
            / len(n)
            for d in width
        ]
        first = self.start_variance if name == "stata" else [1 / len(width)] * len(width)
        self.means, self.variances = [list(row) for row in prototypes], [first for _ in prototypes]
        if options.get("confident"):
            self.means = [self.confident_mean([row[c] for row in self.z]) for c in range(len(prototypes))]
        for _ in range(options["rounds"]):
            for _ in range(options["assignments"]):
                self.z = [self.assigned(weak[i], self.voters(i)) for i in n]
            self.refit_stata() if name == "stata" else self.refit_transclip()

    def confident_mean(self, column: Vector) -> Vector:
        best = sorted(range(len(column)), key=lambda i: -column[i])[: self.options["confident"]]
        return unit_of([math.fsum(column[i] * self.weak[i][d] for i in best) for d in range(len(self.weak[0]))])

    def own_mean(self, c: int) -> Vector:
        rows = zip(self.z, self.weak, strict=True)
        return unit_of(
            [math.fsum(column) for column in zip(*([z[c] * x for x in row] for z, row in rows), strict=True)]
        )

    def refit_transclip(self) -> None:
        n, classes = range(len(self.weak)), range(len(self.prototypes))
        for c in classes:
            if math.fsum(row[c] for row in self.z) > 1e-6:
                self.means[c] = self.own_mean(c)
        shared = [
            math.fsum(self.z[i][c] * (self.weak[i][d] - self.means[c][d]) ** 2 for i in n for c in classes) / len(n)
            for d in range(len(self.weak[0]))
        ]
        self.variances = [[max(1e-8, value) for value in shared] for _ in classes]

    def refit_stata(self) -> None:
        n, width = range(len(self.weak)), range(len(self.weak[0]))
        for c, text in enumerate(self.prototypes):
            count, total = sum(best(row) == c for row in self.z), math.fsum(row[c] for row in self.z)
            beta = count / (self.options["text_images"] + count)
            mean = unit_of([beta * m + (1 - beta) * t for m, t in zip(self.own_mean(c), text, strict=True)])
            own = [math.fsum(self.z[i][c] * (self.weak[i][d] - mean[d]) ** 2 for i in n) / total for d in width]
            by_text = [self.start_variance[d] + (text[d] - mean[d]) ** 2 for d in width]
            self.means[c] = mean
            self.variances[c] = [max(1e-8, beta * own[d] + (1 - beta) * by_text[d]) for d in width]

    def opinion(self, image: Vector) -> Vector:
        return softmax([SCALE * dot(image, prototype) for prototype in self.prototypes])

    def nearest(self, image: Vector, itself: int | None) -> Near:
        """Cosine and number of the nearest images other than ``itself``; a new image has n - 1 at most as well."""
        others = [(dot(image, row), i) for i, row in enumerate(self.weak) if i != itself]
        others.sort(key=lambda pair: -pair[0])
        return others[: min(self.options["neighbours"], len(self.weak) - 1)]

    def voters(self, i: int) -> Near:
        """The neighbours of image i, and the images that it is a neighbour of."""
        return self.near[i] + [(cosine, j) for j, of_j in enumerate(self.near) for cosine, k in of_j if k == i]

    def newcomers_voters(self, image: Vector) -> Near:
        """The same of an image that is not there: a neighbour of those to whom it is nearer than their last one."""
        chosen_by = [
            (dot(image, row), j)
            for j, (row, of_j) in enumerate(zip(self.weak, self.near, strict=True))
            if of_j and dot(image, row) >= of_j[-1][0]
        ]
        return self.nearest(image, None) + chosen_by

    def assigned(self, image: Vector, voters: Near) -> Vector:
        logs = []
        for c, text in enumerate(self.opinion(image)):
            parts = zip(image, self.means[c], self.variances[c], strict=True)
            gaussian = -math.fsum((x - m) ** 2 / v + math.log(v) for x, m, v in parts) / 2
            votes = math.fsum(max(cosine, 0.0) * self.z[j][c] for cosine, j in voters)
            share = self.options["damping"] / (2 * max(1, self.options["neighbours"]))
            logs.append(
                self.options["text_power"] * math.log(text) + (gaussian + share * votes) / self.options["damping"]
            )
        return softmax(logs)


TOGETHER = ("stata", "transclip")
PUBLISHED: dict[str, Any] = {"text_power": 1.0, "damping": 50.0, "neighbours": 3, "rounds": 10, "assignments": 5}
OWN: dict[str, dict[str, Any]] = {"stata": {"text_images": 1.0}, "transclip": {"confident": 0}}
over_both = pytest.mark.parametrize("name", TOGETHER)


def fitted(name: str, weak: Tensor, known: TextFeatures | None = None, **options: Any) -> TransductiveMethod:
    method = make(name, known, **{"logit_scale": SCALE} | PUBLISHED | OWN[name] | options)
    assert isinstance(method, TransductiveMethod)
    method.survey(weak)
    return method


def by_hand(name: str, weak: Tensor, known: TextFeatures | None = None, **options: Any) -> ByHand:
    return ByHand(name, weak.tolist(), rows_of(description_means(known or texts())), PUBLISHED | OWN[name] | options)


def close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def near_texts(n: int, *, seed: int = 0, classes: int = 4, known: TextFeatures | None = None) -> Tensor:
    """Images that resemble one of the first classes each, in turn."""
    towards = torch.tensor(rows_of(description_means(known or texts())), dtype=torch.float64)[torch.arange(n) % classes]
    return torch.nn.functional.normalize(towards + unit(n, 6, seed=seed + 60), dim=-1)


SITUATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "as published": (13, {}),
    "no neighbours": (13, {"neighbours": 0}),
    "more neighbours than images": (5, {"neighbours": 9}),
    "texts that do not count": (13, {"text_power": 0.0}),
    "texts that count double": (13, {"text_power": 2.0}),
    "an undamped mixture": (13, {"damping": 1.0}),
    "one round of one assignment": (13, {"rounds": 1, "assignments": 1}),
    "two images": (2, {}),
    "one image": (1, {}),
}
CASES = [
    *((name, *case) for name in TOGETHER for case in SITUATIONS.values()),
    ("transclip", 13, {"confident": 8}),
    ("transclip", 5, {"confident": 8}),
    ("transclip", 13, {"confident": 1}),
    ("stata", 13, {"text_images": 0.1}),
    ("stata", 13, {"text_images": 30.0}),
]


@pytest.mark.parametrize(("name", "n", "options"), CASES, ids=str)
def test_transductive__alternates_assignments_with_means_and_variances(
    name: str, n: int, options: dict[str, Any]
) -> None:
    weak = near_texts(n)
    method, wanted = fitted(name, weak, **options), by_hand(name, weak, **options)
    close(method.assigned, wanted.z)
    close(method.means, wanted.means)
    close(method.variance.expand_as(method.means), wanted.variances)
    # The fitted images once more, and others, which were no neighbours.
    others = near_texts(7, seed=1)
    again = [wanted.assigned(row, wanted.voters(i)) for i, row in enumerate(weak.tolist())]
    new = [wanted.assigned(row, wanted.newcomers_voters(row)) for row in others.tolist()]
    for seen, expected in ((weak, again), (others, new)):
        close(method.probabilities(method.score(whole(seen), "global")), expected)


@over_both
def test_transductive__two_classes(name: str) -> None:
    known = texts(2)
    weak = near_texts(9, classes=2, known=known)
    close(fitted(name, weak, known).assigned, by_hand(name, weak, known).z)


@over_both
def test_transductive__chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weak, others = near_texts(13), whole(near_texts(7, seed=1))
    at_once = fitted(name, weak)
    expected = at_once.score(others, "global")
    monkeypatch.setattr("finealign.method.mixture.CHUNK", 3)
    in_chunks = fitted(name, weak)
    close(in_chunks.assigned, at_once.assigned.tolist())
    close(in_chunks.score(others, "global"), expected.tolist())
    assert in_chunks.score(whole(weak[:0]), "global").shape == (0, 4)


@over_both
def test_transductive__duplicates_of_an_image_are_its_neighbours(name: str) -> None:
    weak = near_texts(6).repeat(3, 1)
    method = fitted(name, weak, neighbours=2)  # the two others of the same, whichever way ties are broken
    close(method.assigned, by_hand(name, weak, neighbours=2).z)
    agree(method.assigned[:6], method.assigned[6:12].tolist())


@over_both
@pytest.mark.parametrize("n", [1, 2, 9])
def test_transductive__images_all_alike_stay_finite(name: str, n: int) -> None:
    """TransCLIP has no variance left, and every class's mean is the image: the texts decide."""
    weak = near_texts(1).repeat(n, 1)
    for single in (False, True):
        known = texts()
        if single:
            known = TextFeatures(known.names.float(), known.descriptions.float(), known.class_of)
            weak = weak.float()
        method = fitted(name, weak, known)
        seen = torch.cat([weak[:1], near_texts(3, seed=2).to(weak)])
        found = method.probabilities(method.score(whole(seen), "global"))
        assert bool(found.isfinite().all() & method.assigned.isfinite().all() & method.variance.isfinite().all())
        torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))
        expected = best(global_row(weak[0].tolist(), description_means(texts())))
        assert method.assigned.argmax(1).tolist() == [expected] * n


def corners(c: int) -> TextFeatures:
    return TextFeatures(torch.eye(c), torch.eye(c), torch.arange(c))


def test_transclip__a_class_nobody_is_assigned_to_keeps_its_mean() -> None:
    weak = torch.eye(3)[[0, 1, 0, 1]]
    method = fitted("transclip", weak, corners(3), logit_scale=1000.0, neighbours=1)
    assert method.assigned.argmax(1).tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(method.means, torch.eye(3))


def test_stata__a_class_nobody_is_assigned_to_stays_at_its_text() -> None:
    weak = near_texts(12, classes=2)
    method = fitted("stata", weak, logit_scale=100.0)
    assert set(method.assigned.argmax(1).tolist()) == {0, 1}
    torch.testing.assert_close(method.means[2:], method.prototypes[2:])
    assert isinstance(method, Stata)
    torch.testing.assert_close(method.variance[2:], method.text_variance.expand(2, -1))
    assert float((method.means[:2] * method.prototypes[:2]).sum(1).max()) < 0.999


@over_both
def test_transductive__is_all_texts_until_it_is_fitted(name: str) -> None:
    method, features = make(name, logit_scale=SCALE), images()
    wanted = make("cupl", logit_scale=SCALE)
    expected = wanted.probabilities(wanted.score(features, "global"))
    agree(method.probabilities(method.score(features, "global")), expected.tolist())
    assert method.scores == ("global",)


@over_both
def test_transductive__the_order_of_the_images_does_not_matter(name: str) -> None:
    weak, order = near_texts(9), torch.tensor([4, 2, 0, 8, 1, 3, 7, 5, 6])
    first, second = fitted(name, weak), fitted(name, weak[order])
    torch.testing.assert_close(second.assigned, first.assigned[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(second.means, first.means, rtol=1e-9, atol=1e-12)


@over_both
def test_transductive__fitting_again_forgets_what_was_before(name: str) -> None:
    method = fitted(name, near_texts(13))
    method.survey(near_texts(9, seed=1))
    expected = fitted(name, near_texts(9, seed=1)).state_dict()
    for key, value in method.state_dict().items():
        assert torch.equal(value, expected[key])


def test_transductive__neighbours_carry_an_image_over_that_the_texts_leave_open() -> None:
    """An image half way between two classes goes where its neighbours are."""
    angles = torch.tensor([math.pi / 4, 0.70, 0.66, 1.5, 1.55, 1.52])
    weak = torch.stack([angles.cos(), angles.sin()], dim=1)
    alone, together = (
        fitted("transclip", weak, corners(2), neighbours=k, damping=1e6).assigned[0, 0].item() for k in (0, 2)
    )
    assert alone == pytest.approx(0.5, abs=1e-4)
    assert together > 0.55


@over_both
@pytest.mark.parametrize(("before", "after"), [(0, 9), (5, 9), (9, 5), (9, 0)])
def test_transductive__loads_as_many_images_as_were_fitted(name: str, before: int, after: int) -> None:
    method, other = (
        fitted(name, near_texts(n, seed=n)) if n else make(name, logit_scale=SCALE, **PUBLISHED)
        for n in (after, before)
    )
    other.load_inference_tensors(method.inference_tensors())
    assert other.state_dict()["images"].shape == (after, 6)
    assert other.state_dict()["assigned"].shape == (after, 4)
    assert other.state_dict()["reaches"].shape == (after,)
    seen = whole(near_texts(4, seed=3))
    assert torch.equal(other.score(seen, "global"), method.score(seen, "global"))
    # What was loaded is a copy.
    method.get_buffer("images").fill_(0)
    assert not after or bool(other.get_buffer("images").any())


@over_both
def test_transductive__loads_into_its_own_precision(name: str) -> None:
    method = fitted(name, near_texts(9))
    known = texts()
    single = make(name, TextFeatures(known.names.float(), known.descriptions.float(), known.class_of))
    single.load_state_dict(method.state_dict())
    assert {value.dtype for value in single.state_dict().values()} == {torch.float32}
    assert single.score(whole(near_texts(2).float()), "global").dtype == torch.float32


AUTHORS = {  # of their solvers on DTD's test images: start, StatA, TransCLIP; by the step between the classes kept
    1: (44.68, 51.48, 51.12),
    2: (42.25, 50.81, 47.57),
    10: (54.44, 60.00, 52.78),
}


@pytest.mark.parametrize("step", AUTHORS)
def test_transductive__has_its_authors_figures_on_genuine_features(step: int) -> None:
    if not (clip_features() / "dtd.safetensors").is_file():
        pytest.skip("no CLIP features here. Set FINEALIGN_SHARED to the folder that holds features/clip-b32/.")
    found = measure("dtd", step)
    assert list(found) == ["start", "stata", "transclip"]
    assert list(found.values()) == pytest.approx(AUTHORS[step], abs=0.3)


# --- LaFTer -----------------------------------------------------------------------------------------------------------


def adam(known: TextFeatures, steps: int, rate: float, smoothing: float, scale: float) -> NDArray[np.float64]:
    """The classifier of the descriptions by Adam, its gradient written out: (C, D), rows of length 1."""
    rows, owner = known.descriptions.numpy(), known.class_of.numpy()
    weight = np.array(rows_of(description_means(known)))
    target = (1 - smoothing) * np.eye(len(weight))[owner] + smoothing / len(weight)
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, steps + 1):
        length = np.linalg.norm(weight, axis=1, keepdims=True)
        unit_rows = weight / length
        powers = np.exp(scale * rows @ unit_rows.T)
        error = powers / powers.sum(1, keepdims=True) - target
        pull = scale * error.T @ rows / len(rows)
        gradient = (pull - (pull * unit_rows).sum(1, keepdims=True) * unit_rows) / length
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight = weight - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    found: NDArray[np.float64] = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    return found


@pytest.mark.parametrize(
    ("steps", "rate", "smoothing"), [(0, 1e-3, 0.1), (1, 0.1, 0.1), (30, 0.02, 0.0), (30, 0.02, 0.3)]
)
@pytest.mark.parametrize("asked", ["auto", 3.0])
def test_lafter__starts_from_a_classifier_of_the_texts(steps: int, rate: float, smoothing: float, asked: Any) -> None:
    options: dict[str, Any] = {
        "text_steps": steps,
        "text_learning_rate": rate,
        "label_smoothing": smoothing,
        "logit_scale": asked,
    }
    method = make("lafter", **options)
    wanted = adam(texts(), steps, rate, smoothing, SCALE if asked == "auto" else asked)
    for found in (method.classifier().detach()[:, 0], method.get_buffer("fixed")[:, 0]):
        torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-6, atol=1e-8)


def test_lafter__learns_texts_that_their_mean_confuses() -> None:
    known = texts(5, d=12, seed=2)

    def right(steps: int) -> float:
        classifier = make("lafter", known, text_steps=steps, text_learning_rate=0.05).classifier().detach()[:, 0]
        return float(((known.descriptions @ classifier.T).argmax(1) == known.class_of).double().mean())

    assert right(0) < 1
    assert right(200) == 1


def test_lafter__labels_by_the_texts_classifier_however_the_anchors_move() -> None:
    method, features = make_trained("lafter", logit_scale=SCALE, text_steps=20, text_learning_rate=0.05), images(b=6)
    classifier: Cube = method.classifier().tolist()
    wanted = [softmax([SCALE * value for value in global_row(row, classifier)]) for row in features.weak.tolist()]
    move(method)
    found = method.pseudo_label(features)
    agree(found.probabilities, wanted)
    assert found.labels.tolist() == [best(row) for row in wanted]
    assert found.weights.tolist() == [1.0] * 6


def lafter(width: int, **options: Any) -> Lafter:
    settings = MethodSettings.model_validate({"name": "lafter", "text_steps": 2, **options})
    method = create_method(settings, texts(), logit_scale=SCALE, token_width=width)
    assert isinstance(method, Lafter)
    return method


def test_lafter__has_prompts_where_there_are_tokens() -> None:
    prompts = lafter(16).prompts
    assert prompts is not None
    assert prompts.shape == (10, 16)
    assert prompts.requires_grad
    assert 0.01 < prompts.std().item() < 0.04
    assert "prompts" in lafter(16).state_dict()
    for method in (lafter(0), lafter(16, prompt_tokens=0)):
        assert method.prompts is None
        assert set(method.state_dict()) == {"anchors", "class_prior", "whole_share", "pull", "mean_prediction", "fixed"}


def test_lafter__prompts_are_the_same_each_time_and_draw_nothing_of_the_users() -> None:
    torch.manual_seed(5)
    wanted = torch.get_rng_state()
    first, second = lafter(16).prompts, lafter(16).prompts
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), wanted)


@pytest.mark.parametrize("name", [name for name in method_names() if name != "lafter"])
def test_suit_tower__prompts_are_lafters_alone(name: str) -> None:
    assert create_method(MethodSettings(name=name), texts(), logit_scale=SCALE, token_width=16).prompts is None


# --- microCLIP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_microclip__labels_by_the_fixed_texts_of_the_crops_and_the_learned_ones_of_the_token(share: float) -> None:
    known, features = texts(), images(b=6)
    method = make_trained("microclip", known, logit_scale=SCALE, fixed_share=share, crops_kept=3, crop_temperature=0.1)
    move(method)
    fixed, learned = description_means(known), normalised(method.anchors)
    wanted = []
    for row, crops in zip(features.weak.tolist(), features.crops.tolist(), strict=True):
        by_crops, by_token = las_row(row, crops, fixed, 3, 0.1), global_row(row, learned)
        wanted.append(softmax([SCALE * (share * x + (1 - share) * y) for x, y in zip(by_crops, by_token, strict=True)]))
    found = method.pseudo_label(features)
    agree(found.probabilities, wanted)
    assert found.labels.tolist() == [best(row) for row in wanted]
    assert found.weights.tolist() == [1.0] * 6


def test_microclip__is_refused_where_there_are_no_patch_tokens() -> None:
    with pytest.raises(
        ConfigError, match=r"^method.name: microclip pools patch tokens.*Wanted: .*transformer"
    ) as raised:
        create_method(MethodSettings(name="microclip"), texts(), logit_scale=SCALE)
    assert "another method" in str(raised.value)
    for name in set(method_names()) - {"microclip"}:
        assert create_method(MethodSettings(name=name), texts(), logit_scale=SCALE).gaze is None


# --- presets ----------------------------------------------------------------------------------------------------------

PRESETS = [(name, preset) for name in method_names() for preset in find_method(name).presets]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_method_settings__every_preset_is_a_configuration(name: str, preset: str) -> None:
    values = method_settings(f"{name}@{preset}")
    config = make_config(values)
    assert config.method.name == name
    options = method_options(config.method).model_dump()
    for section, given in find_method(name).presets[preset].items():
        found = options if section == "method" else config.model_dump()[section]
        assert given
        assert given.items() <= found.items()


def test_method_settings__the_reconstruction_has_the_values_of_the_steps_and_no_extension() -> None:
    config = resolve(make_config(method_settings("fair@reconstruction")), images=24, classes=10, input_size=224)
    views, training, prediction = config.views, config.training, config.prediction
    options = method_options(config.method).model_dump()
    assert (views.crops, views.crop_low, views.crop_high, views.refresh_epochs) == (8, 0.5, 0.9, 0)
    assert (training.epochs, training.batch_size, training.anchor_steps, training.last_label_pass) == (15, 64, 0, False)
    assert (training.learning_rate, training.anchor_learning_rate, training.final_learning_rate) == (1e-4, 1e-4, 2e-6)
    assert (training.weight_decay, training.norm_weight_decay, training.strangers) == (0.1, 0.0, "off")
    assert (options["fairness"], options["fairness_weight"], options["class_prior"]) == ("running", 1.0, "even")
    assert (options["crops_kept"], options["crop_temperature"], options["fixed_share"]) == ("all", 1.0, 0.0)
    assert (prediction.calibrate, prediction.class_prior) == (False, "even")
    assert set(options) == set(find_method("fair").presets["reconstruction"]["method"])  # no option is left to defaults


@pytest.mark.parametrize("name", method_names())
def test_method_settings__a_bare_name_has_the_defaults(name: str) -> None:
    assert method_settings(name) == {"method": {"name": name}}


def test_method_settings__presets_are_left_as_they_were() -> None:
    method_settings("dpa@published")["training"]["epochs"] = 1
    assert find_method("dpa").presets["published"]["training"]["epochs"] == 15
    read_config(base=method_settings("dpa@published"), training__epochs=2)
    assert find_method("dpa").presets["published"]["training"]["epochs"] == 15
    assert {name for name, preset in PRESETS if preset == "published"} >= {"dpa", "lafter", "microclip", "wca"}


def test_read_config__file_overrides_and_flags_lie_over_the_preset(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training: {epochs: 4, batch_size: 5}\nmethod: {fairness: 'off'}\n")
    preset = method_settings("dpa@published")
    config = read_config(tmp_path / "run.yaml", ["training.epochs=6"], base=preset, training__weight_decay=0.5)
    training = config.training
    assert (training.epochs, training.batch_size, training.weight_decay) == (6, 5, 0.5)
    assert training.learning_rate == preset["training"]["learning_rate"]
    assert {"name": config.method.name, **config.method.options} == preset["method"] | {"fairness": "off"}
    assert preset["method"]["fairness"] == "batch"


def test_settles__is_fair_alone() -> None:
    """Steps of the anchors alone on crops are ours: no part of what the peers' authors report."""
    made = {
        name: create_method(MethodSettings(name=name), texts(), logit_scale=SCALE, token_width=16)
        for name in method_names()
    }
    assert [name for name, method in made.items() if method.settles] == ["fair"]


@pytest.mark.parametrize(
    ("spec", "valid"),
    [("dpa@publshed", "dpa@published"), ("dpa@", "dpa@published"), ("zero-shot@published", "zero-shot alone")],
)
def test_method_settings__an_unknown_preset_is_answered_with_the_valid_ones(spec: str, valid: str) -> None:
    with pytest.raises(ConfigError) as raised:
        method_settings(spec)
    name, _, preset = spec.partition("@")
    assert str(raised.value) == f"method.name: {name!r} has no preset {preset!r}. Valid: {valid}."


def test_method_settings__an_unknown_method_is_answered_as_without_a_preset() -> None:
    with pytest.raises(ConfigError, match=r"^method.name: Unknown method 'fiar'. Did you mean 'fair'\?"):
        method_settings("fiar@published")
