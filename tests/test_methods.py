"""Every method, made as the command line makes it, against plain Python over lists written from METHOD.md.

Options that a test depends on are given, so that a changed default changes no result here.
"""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from finealign import methods
from finealign.config import MethodSettings, read_config
from finealign.errors import ConfigError
from finealign.method.base import Method, SelfTrainingMethod
from finealign.method.pseudo_labels import WeightKind
from finealign.method.registry import create_method, find_method, method_names, method_options
from finealign.types import ImageFeatures, Loss, PseudoLabels, Score, TextFeatures

Vector = list[float]
Matrix = list[Vector]
Cube = list[Matrix]

SCALE = 12.0
NAMES = ("cupl", "dpa", "fair", "lafter", "microclip", "self-training", "stata", "transclip", "wca", "zero-shot")
TRAINED = ("dpa", "fair", "lafter", "microclip", "self-training")
UNTRAINED = ("cupl", "stata", "transclip", "wca", "zero-shot")
# What a method adds to the equations that the tests here state; the tests of each addition ask for it.
PLAIN: dict[str, dict[str, Any]] = {name: {"fairness_temperature": 1.0} for name in TRAINED}
PLAIN["fair"] |= {"whole_share": 0.0, "fixed_share": 0.0, "teacher_momentum": 0.0, "label_balance": 0.0}
PLAIN["dpa"] |= {"align_weight": 0.0}
PLAIN["lafter"] |= {"text_steps": 3}  # so that making one takes no time
KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
SCORES: tuple[Score, ...] = get_args(Score)
CROPS = [("all", 1.0), (1, 1.0), (3, 0.1), (9, math.exp(-4))]  # K and tau; of five crops

over_crops = pytest.mark.parametrize(("kept", "temperature"), CROPS)
over_kinds = pytest.mark.parametrize("weight", KINDS)


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def texts(c: int = 4, d: int = 6, *, seed: int = 0) -> TextFeatures:
    """Classes of three or four descriptions, their rows in turn."""
    class_of = torch.cat([torch.arange(c).repeat(3), torch.arange(0, c, 2)])
    return TextFeatures(unit(c, d, seed=seed), unit(len(class_of), d, seed=seed + 100), class_of)


def images(b: int = 3, n: int = 5, d: int = 6, *, seed: int = 0) -> ImageFeatures:
    """Crops that resemble their image somewhat, as crops do."""
    weak = unit(b, d, seed=seed + 200)
    return ImageFeatures(weak, normalize(weak[:, None] + unit(b, n, d, seed=seed + 300), dim=-1))


def make(name: str, features: TextFeatures | None = None, *, scale: float = SCALE, **options: Any) -> Method:
    settings = MethodSettings.model_validate({"name": name, **PLAIN.get(name, {}), **options})
    return create_method(settings, features or texts(), logit_scale=scale, token_width=8 * (name == "microclip"))


def make_trained(name: str, features: TextFeatures | None = None, **options: Any) -> SelfTrainingMethod:
    method = make(name, features, **options)
    assert isinstance(method, SelfTrainingMethod)
    return method


def move(method: SelfTrainingMethod, *, seed: int = 7) -> None:
    """Put the anchors elsewhere, at lengths other than 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        method.anchors.add_(0.5 * torch.randn(method.anchors.shape, generator=generator, dtype=torch.float64))


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def agree(found: Tensor, wanted: object) -> None:
    expected = torch.tensor(wanted, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# --- METHOD.md over lists ---------------------------------------------------------------------------------------------


def dot(one: Vector, other: Vector) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def unit_of(vector: Vector) -> Vector:
    length = math.sqrt(dot(vector, vector))
    return [value / length for value in vector]


def softmax(values: Sequence[float]) -> Vector:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / math.fsum(powers) for power in powers]


def best(values: Vector) -> int:
    return values.index(max(values))


def description_means(features: TextFeatures) -> Cube:
    """T_c = mean_j t_cj, normalised: one anchor a class."""
    means = []
    for c in range(features.num_classes):
        own = [
            row
            for row, owner in zip(features.descriptions.tolist(), features.class_of.tolist(), strict=True)
            if owner == c
        ]
        means.append([unit_of([math.fsum(column) for column in zip(*own, strict=True)])])
    return means


def normalised(anchors: Tensor) -> Cube:
    return [[unit_of(anchor) for anchor in of_class] for of_class in anchors.tolist()]


def global_row(whole: Vector, anchors: Cube) -> Vector:
    return [max(dot(whole, anchor) for anchor in of_class) for of_class in anchors]


def crop_shares(whole: Vector, crops: Matrix, kept: int | str, temperature: float) -> Vector:
    """Step 3: softmax of the relevance over the crops kept."""
    relevance = [dot(crop, whole) for crop in crops]
    order = sorted(range(len(crops)), key=lambda index: -relevance[index])
    chosen = order if isinstance(kept, str) else order[:kept]
    shares = dict(zip(chosen, softmax([relevance[index] / temperature for index in chosen]), strict=True))
    return [shares.get(index, 0.0) for index in range(len(crops))]


def las_row(whole: Vector, crops: Matrix, anchors: Cube, kept: int | str, temperature: float) -> Vector:
    """Step 4, the best of a class's sums."""
    shares = crop_shares(whole, crops, kept, temperature)
    return [
        max(math.fsum(w * dot(crop, anchor) for w, crop in zip(shares, crops, strict=True)) for anchor in of_class)
        for of_class in anchors
    ]


def score_rows(features: ImageFeatures, anchors: Cube, kind: Score, kept: int | str, temperature: float) -> Matrix:
    """Step 9."""
    rows = []
    for whole, crops in zip(features.weak.tolist(), features.crops.tolist(), strict=True):
        seen = global_row(whole, anchors)
        las = las_row(whole, crops, anchors, kept, temperature)
        both = [(a + b) / 2 for a, b in zip(las, seen, strict=True)]
        rows.append({"global": seen, "las": las, "fused": both}[kind])
    return rows


def wca_rows(
    features: ImageFeatures, known: TextFeatures, kept: int | str, temperature: float, of_descriptions: float
) -> Matrix:
    """sum_ij w_i v_cj <p_i, t_cj>."""
    rows = []
    for whole, crops in zip(features.weak.tolist(), features.crops.tolist(), strict=True):
        w = crop_shares(whole, crops, kept, temperature)
        row = []
        for c, name in enumerate(known.names.tolist()):
            own = known.descriptions[known.class_of == c].tolist()
            v = softmax([dot(text, name) / of_descriptions for text in own])
            row.append(
                math.fsum(w[i] * v[j] * dot(crop, text) for i, crop in enumerate(crops) for j, text in enumerate(own))
            )
        rows.append(row)
    return rows


def confusable(anchors: Cube, counts: Matrix) -> Matrix:
    """Cosine of the (middle of the) anchors scaled over all pairs, or the count over the largest."""
    middles = [unit_of([math.fsum(column) for column in zip(*of_class, strict=True)]) for of_class in anchors]
    size = range(len(middles))
    cosines = [dot(middles[i], middles[j]) for i in size for j in size if i != j]
    most = max(counts[i][j] + counts[j][i] for i in size for j in size)
    kappa = [[0.0] * len(middles) for _ in middles]
    for i in size:
        for j in size:
            if i != j:
                similar = (dot(middles[i], middles[j]) - min(cosines)) / (max(cosines) - min(cosines))
                frequent = (counts[i][j] + counts[j][i]) / most if most else 0.0
                kappa[i][j] = 1 - (1 - similar) * (1 - frequent)
    return kappa


@dataclass
class Belief:
    """The pseudo-labels of a batch, and the pairs counted up to and with it."""

    labels: list[int]
    weights: Vector
    probabilities: Matrix
    counts: Matrix


def fair_belief(
    features: ImageFeatures, anchors: Cube, counts: Matrix, weight: str, kept: int | str, temperature: float
) -> Belief:
    """Steps 3 to 6; the pairs of this batch count from the next one on."""
    kappa = confusable(anchors, counts)
    belief = Belief([], [], [], [list(row) for row in counts])
    for whole, crops in zip(features.weak.tolist(), features.crops.tolist(), strict=True):
        q = softmax([SCALE * value for value in las_row(whole, crops, anchors, kept, temperature)])
        seen = softmax([SCALE * value for value in global_row(whole, anchors)])
        first, second, *_ = sorted(range(len(q)), key=lambda c: -q[c])
        factors = {
            "none": 1.0,
            "margin": 1 - q[second] / q[first],
            "agreement": seen[first] / max(seen),
            "confusion": 1 - kappa[first][second] * q[second] / q[first],
        }
        belief.labels.append(first)
        belief.weights.append(math.prod(factors[name] for name in weight.split("*")))
        belief.probabilities.append(q)
        belief.counts[first][second] += 1
    return belief


def logit_rows(strong: Matrix, anchors: Cube) -> Matrix:
    return [[SCALE * value for value in global_row(row, anchors)] for row in strong]


def believed(logits: Matrix, labels: list[int], weights: Vector) -> float:
    """mean_x omega * CE."""
    terms = [
        -weight * math.log(softmax(row)[label]) for row, label, weight in zip(logits, labels, weights, strict=True)
    ]
    return math.fsum(terms) / len(terms)


def mean_prediction(logits: Matrix) -> Vector:
    return [math.fsum(column) / len(logits) for column in zip(*map(softmax, logits), strict=True)]


def unfairness(mean: Vector, prior: Vector | None = None) -> float:
    prior = prior or [1 / len(mean)] * len(mean)
    return -math.fsum(pi * math.log(value) for pi, value in zip(prior, mean, strict=True))


# --- scores -----------------------------------------------------------------------------------------------------------


@over_crops
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("name", ["cupl", "zero-shot", *TRAINED])
def test_score__is_the_equation_of_its_classifier(name: str, kind: Score, kept: int | str, temperature: float) -> None:
    known, features = texts(), images()
    equal = {"whole_share": 0.5} if name in TRAINED else {}
    method = make(name, known, crops_kept=kept, crop_temperature=temperature, **equal)
    anchors = description_means(known)
    if name == "zero-shot":
        anchors = [[row] for row in known.names.tolist()]
    if isinstance(method, SelfTrainingMethod):
        move(method)
        anchors = normalised(method.anchors)
    agree(method.score(features, kind).detach(), score_rows(features, anchors, kind, kept, temperature))


@over_crops
@pytest.mark.parametrize("of_descriptions", [0.05, math.exp(-2), 1.0])
def test_score__of_wca_is_the_double_sum(kept: int | str, temperature: float, of_descriptions: float) -> None:
    known, features = texts(), images()
    method = make("wca", known, crops_kept=kept, crop_temperature=temperature, description_temperature=of_descriptions)
    agree(method.score(features, "las"), wca_rows(features, known, kept, temperature, of_descriptions))


def test_score__of_wca_has_its_published_temperatures_unasked() -> None:
    known, features = texts(), images()
    method = make("wca", known, crops_kept="all")
    agree(method.score(features, "las"), wca_rows(features, known, "all", math.exp(-4), math.exp(-2)))
    assert method.scores == ("las",)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("per_class", [2, 5])
def test_score__of_several_anchors_a_class_is_the_best(kind: Score, per_class: int) -> None:
    features = images()
    method = make_trained("fair", anchors_per_class=per_class, crops_kept=3, crop_temperature=0.1, whole_share=0.5)
    move(method)
    assert method.anchors.shape == (4, per_class, 6)
    anchors = normalised(method.anchors)
    agree(method.score(features, kind).detach(), score_rows(features, anchors, kind, 3, 0.1))


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("name", TRAINED)
def test_score__does_not_depend_on_the_anchors_length(name: str, kind: Score) -> None:
    method, features = make_trained(name), images()
    wanted = method.score(features, kind).tolist()
    with torch.no_grad():
        method.anchors.mul_(torch.tensor([0.01, 3.0, 0.5, 100.0], dtype=torch.float64)[:, None, None])
    agree(method.score(features, kind).detach(), wanted)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("name", NAMES)
def test_score__permuting_images_or_classes_permutes_and_crops_do_not_matter(name: str, kind: Score) -> None:
    known, features = texts(), images()
    options: dict[str, Any] = {"crops_kept": 3, "crop_temperature": 0.1}
    method = make(name, known, **options)
    found = method.score(features, kind).detach()
    order, turn = torch.tensor([2, 0, 1]), torch.tensor([3, 0, 4, 1, 2])
    agree(
        method.score(ImageFeatures(features.weak[order], features.crops[order]), kind).detach(), found[order].tolist()
    )
    agree(method.score(replace(features, crops=features.crops[:, turn]), kind).detach(), found.tolist())
    classes = torch.tensor([2, 0, 3, 1])
    other = TextFeatures(known.names[classes], known.descriptions, classes.argsort()[known.class_of])
    agree(make(name, other, **options).score(features, kind).detach(), found[:, classes].tolist())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "wca"])
def test_score__global_needs_no_crops(name: str) -> None:
    method, features = make(name), images()
    without = replace(features, crops=features.crops[:, :0])
    assert torch.equal(method.score(without, "global"), method.score(features, "global"))


@pytest.mark.parametrize("name", NAMES)
def test_score__on_more_classes_than_images_and_two_classes(name: str) -> None:
    for c in (2, 9):
        method, features = make(name, texts(c)), images(b=2)
        for kind in method.scores:
            found = method.score(features, kind)
            assert found.shape == (2, c)
            assert float(found.detach().max()) <= 1
            assert float(found.detach().min()) >= -1 or name in ("stata", "transclip")  # whose score is a logarithm


@pytest.mark.parametrize("name", NAMES)
def test_probabilities__is_the_softmax_at_the_backbones_scale_or_the_one_asked_for(name: str) -> None:
    score = torch.tensor([[0.1, 0.3, -0.2], [0.2, 0.2, 0.2]], dtype=torch.float64)
    for asked, scale in (("auto", 40.0), (3.0, 3.0)):
        method = make(name, scale=40.0, logit_scale=asked)
        agree(method.probabilities(score), [softmax([scale * value for value in row]) for row in score.tolist()])


# --- where training starts --------------------------------------------------------------------------------------------


def test_classifier__of_fair_starts_as_cupls() -> None:
    fair, cupl = make("fair", anchors_per_class=1), make("cupl")
    agree(fair.classifier().detach(), cupl.classifier().tolist())
    agree(cupl.classifier(), description_means(texts()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("c", [2, 4, 9])
def test_classifier__has_rows_of_length_one(name: str, c: int) -> None:
    method = make(name, texts(c))
    if isinstance(method, SelfTrainingMethod):
        move(method)
    if name != "wca":
        lengths = method.classifier().detach().norm(dim=-1)
        agree(lengths, torch.ones_like(lengths).tolist())


@pytest.mark.parametrize("per_class", [1, 3, 6])
def test_fair__has_the_anchors_asked_for(per_class: int) -> None:
    method = make_trained("fair", anchors_per_class=per_class)
    assert method.classifier().shape == (4, per_class, 6)
    assert bool(method.classifier().isfinite().all())


# --- pseudo_label -----------------------------------------------------------------------------------------------------


@over_crops
@over_kinds
def test_pseudo_label__of_fair_is_steps_3_to_6(weight: WeightKind, kept: int | str, temperature: float) -> None:
    method = make_trained(
        "fair", weight=weight, anchors_per_class=1, crops_kept=kept, crop_temperature=temperature, logit_scale=SCALE
    )
    move(method)
    anchors, counts = normalised(method.anchors), [[0.0] * 4 for _ in range(4)]
    for seed in (0, 1):  # the second batch has pairs to look back on
        features = images(b=6, seed=seed)
        wanted = fair_belief(features, anchors, counts, weight, kept, temperature)
        found = method.pseudo_label(features)
        counts = wanted.counts
        assert found.labels.tolist() == wanted.labels
        assert found.labels.dtype == torch.int64
        agree(found.weights, wanted.weights)
        agree(found.probabilities, wanted.probabilities)
        assert bool(((found.weights >= 0) & (found.weights <= 1)).all())
        agree(found.probabilities.sum(1), [1.0] * 6)
        assert method.state_dict()["pair_counts"].tolist() == (counts if "confusion" in weight else [])


@over_kinds
@pytest.mark.parametrize("per_class", [2, 3])
def test_pseudo_label__of_fair_with_several_anchors(weight: WeightKind, per_class: int) -> None:
    method = make_trained(
        "fair", weight=weight, anchors_per_class=per_class, crops_kept=3, crop_temperature=0.1, logit_scale=SCALE
    )
    move(method)
    features = images(b=6)
    wanted = fair_belief(features, normalised(method.anchors), [[0.0] * 4 for _ in range(4)], weight, 3, 0.1)
    found = method.pseudo_label(features)
    assert found.labels.tolist() == wanted.labels
    agree(found.probabilities, wanted.probabilities)
    agree(found.weights, wanted.weights)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_pseudo_label__of_fair_with_fixed_share_teacher_and_balance(
    share: float, momentum: float, balance: float
) -> None:
    """gamma of the descriptions as they were, the anchors' running mean, and q over its running mean to beta."""
    known = texts()
    method = make_trained(
        "fair", known, weight="margin*agreement", crops_kept="all", crop_temperature=1.0, logit_scale=SCALE,
        fixed_share=share, teacher_momentum=momentum, label_balance=balance, fairness_window=20,
    )  # fmt: skip
    fixed, mean = description_means(known), [1 / 4] * 4
    teacher = [row for (row,) in fixed]
    for seed in range(3):
        move(method, seed=seed)
        anchors, features = normalised(method.anchors), images(b=6, seed=seed)
        teacher = [
            [momentum * old + (1 - momentum) * new for old, new in zip(row, anchor, strict=True)]
            for row, (anchor,) in zip(teacher, anchors, strict=True)
        ]
        labelling = [[unit_of(row)] for row in teacher]
        learned, kept = (score_rows(features, each, "las", "all", 1.0) for each in (labelling, fixed))
        raw = [
            softmax([SCALE * ((1 - share) * x + share * y) for x, y in zip(*rows, strict=True)])
            for rows in zip(learned, kept, strict=True)
        ]
        here = [math.fsum(column) / 6 for column in zip(*raw, strict=True)]
        mean = [0.7 * old + 0.3 * new for old, new in zip(mean, here, strict=True)]
        evened = [[q / p**balance for q, p in zip(row, mean, strict=True)] for row in raw]
        wanted = [[value / math.fsum(row) for value in row] for row in evened]
        seen = [
            softmax([SCALE * value for value in row]) for row in score_rows(features, anchors, "global", "all", 1.0)
        ]
        labels = [best(row) for row in wanted]
        ordered = [sorted(row) for row in wanted]
        found = method.pseudo_label(features)
        agree(found.probabilities, wanted)
        assert found.labels.tolist() == labels
        agree(
            found.weights,
            [(1 - q[-2] / q[-1]) * g[y] / max(g) for q, g, y in zip(ordered, seen, labels, strict=True)],
        )


def test_pseudo_label__of_fair_balance_labels_the_class_that_is_taken_too_seldom() -> None:
    """Two classes, one of which every image is nearer to: evened out, the images nearest the other get it."""
    known = TextFeatures(torch.eye(2), torch.eye(2), torch.arange(2))
    angles = torch.tensor([0.1, 0.2, 0.6, 0.7])  # of a quarter turn of 1.57
    weak = torch.stack([angles.cos(), angles.sin()], dim=1)
    features = ImageFeatures(weak, weak[:, None])
    for balance, labels in ((0.0, [0, 0, 0, 0]), (1.0, [0, 0, 1, 1])):
        method = make("fair", known, label_balance=balance, fairness_window=1, logit_scale=1.0)
        assert method.pseudo_label(features).labels.tolist() == labels


def test_pseudo_label__of_fair_follows_the_anchors_and_the_crops() -> None:
    method = make_trained("fair", weight="margin", crops_kept="all", crop_temperature=1.0)
    features = images(b=8)
    first = method.pseudo_label(features).probabilities
    other = method.pseudo_label(replace(features, crops=images(b=8, seed=1).crops)).probabilities
    move(method)
    assert not torch.allclose(method.pseudo_label(features).probabilities, first)
    assert not torch.allclose(other, first)


@pytest.mark.parametrize("moved", [False, True])
def test_pseudo_label__of_self_training_keeps_to_the_fixed_means_of_the_whole_image(moved: bool) -> None:
    known, features = texts(), images(b=6)
    method = make_trained("self-training", known, logit_scale=SCALE)
    if moved:
        move(method)
    wanted = [
        softmax([SCALE * value for value in global_row(row, description_means(known))])
        for row in features.weak.tolist()
    ]
    for seen in (features, replace(features, crops=features.crops[:, :0])):
        found = method.pseudo_label(seen)
        agree(found.probabilities, wanted)
        assert found.labels.tolist() == [best(row) for row in wanted]
        assert found.weights.tolist() == [1.0] * 6


@pytest.mark.parametrize("name", TRAINED)
def test_pseudo_label__carries_no_gradient_and_changes_no_anchor(name: str) -> None:
    method, features = make_trained(name), images()
    open_features = ImageFeatures(features.weak.requires_grad_(), features.crops.requires_grad_())
    before = method.anchors.detach().clone()
    found = method.pseudo_label(open_features)
    assert found.belonging is None  # which the loop knows, not the method
    for tensor in (found.labels, found.weights, found.probabilities):
        assert not tensor.requires_grad
    assert torch.equal(method.anchors, before)
    assert method.anchors.requires_grad
    assert not any(value.requires_grad for value in method.buffers())


@pytest.mark.parametrize("name", TRAINED)
def test_pseudo_label__of_two_classes_and_of_more_classes_than_images(name: str) -> None:
    for c in (2, 9):
        found = make_trained(name, texts(c)).pseudo_label(images(b=2))
        assert found.probabilities.shape == (2, c)
        assert found.labels.tolist() == [best(row) for row in found.probabilities.tolist()]


@over_kinds
def test_pseudo_label__of_fair_permuting_images_permutes_and_classes_renames(weight: WeightKind) -> None:
    known, features = texts(), images(b=6)
    options: dict[str, Any] = {"weight": weight, "anchors_per_class": 1, "crops_kept": 3, "crop_temperature": 0.1}
    found = make("fair", known, **options).pseudo_label(features)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    moved = make("fair", known, **options).pseudo_label(ImageFeatures(features.weak[order], features.crops[order]))
    assert moved.labels.tolist() == found.labels[order].tolist()
    agree(moved.weights, found.weights[order].tolist())
    classes = torch.tensor([2, 0, 3, 1])
    other = TextFeatures(known.names[classes], known.descriptions, classes.argsort()[known.class_of])
    renamed = make("fair", other, **options).pseudo_label(features)
    assert classes[renamed.labels].tolist() == found.labels.tolist()
    agree(renamed.weights, found.weights.tolist())
    agree(renamed.probabilities, found.probabilities[:, classes].tolist())


@over_kinds
def test_pseudo_label__of_fair_all_scores_equal_is_finite(weight: WeightKind) -> None:
    one = unit(1, 6, seed=0)
    same = TextFeatures(one.repeat(3, 1), one.repeat(3, 1), torch.arange(3))
    found = make("fair", same, weight=weight).pseudo_label(images(b=4))
    agree(found.probabilities, [[1 / 3] * 3] * 4)
    level = 0.0 if "margin" in weight or "confusion" in weight else 1.0
    agree(found.weights, [level] * 4)


@pytest.mark.parametrize("name", UNTRAINED)
def test_pseudo_label__and_loss_belong_to_methods_that_train(name: str) -> None:
    method, features = make(name), images()
    assert not method.trains
    assert list(method.parameters()) == []
    with pytest.raises(NotImplementedError):
        method.pseudo_label(features)
    with pytest.raises(NotImplementedError):
        method.loss(features.weak, PseudoLabels(torch.zeros(3).long(), torch.ones(3), torch.ones(3, 4) / 4))


# --- loss -------------------------------------------------------------------------------------------------------------

Fairness = Literal["running", "batch", "off"]


def believed_batch(b: int, c: int, *, seed: int = 0) -> tuple[Tensor, PseudoLabels]:
    """Strong features (B, D) and what is believed of them."""
    generator = torch.Generator().manual_seed(seed + 400)
    labels = torch.randint(0, c, (b,), generator=generator)
    weights = torch.rand(b, generator=generator, dtype=torch.float64)
    probabilities = torch.softmax(torch.rand(b, c, generator=generator, dtype=torch.float64), dim=1)
    return unit(b, 6, seed=seed + 500), PseudoLabels(labels, weights, probabilities)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("fairness", get_args(Fairness))
@pytest.mark.parametrize("strength", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("window", [10, 2, "auto"])  # longer and shorter than a batch of 4; 8 a class
def test_loss__is_step_7_over_two_batches(name: str, fairness: Fairness, strength: float, window: int | str) -> None:
    method = make_trained(name, logit_scale=SCALE, fairness=fairness, fairness_weight=strength, fairness_window=window)
    move(method)
    anchors, running = normalised(method.anchors), [1 / 4] * 4
    momentum = {10: 0.6, 2: 0.0, "auto": 1 - 4 / 32}[window]
    for seed in (0, 1, 2):
        strong, pseudo = believed_batch(4, 4, seed=seed)
        logits = logit_rows(strong.tolist(), anchors)
        cross_entropy = believed(logits, pseudo.labels.tolist(), pseudo.weights.tolist())
        mean = mean_prediction(logits)
        if fairness == "running":
            mean = [momentum * old + (1 - momentum) * new for old, new in zip(running, mean, strict=True)]
            running = mean
        found = method.loss(strong, pseudo)
        assert found.total.shape == ()
        agree(found.parts["cross_entropy"], cross_entropy)
        terms = set(found.parts) - ({"align"} if name == "dpa" else set())
        if fairness == "off":
            assert terms == {"cross_entropy"}
            agree(found.total.detach(), cross_entropy)
        else:
            assert terms == {"cross_entropy", "fairness"}
            agree(found.parts["fairness"], unfairness(mean))
            agree(found.total.detach(), cross_entropy + strength * unfairness(mean))
        assert not any(part.requires_grad for part in found.parts.values())
        agree(method.mean_prediction, running)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", TRAINED)
def test_loss__fairness_temperature_divides_the_logits_of_that_term_alone(name: str, temperature: float) -> None:
    options: dict[str, Any] = {"fairness": "batch", "fairness_weight": 2.0, "logit_scale": SCALE}
    method = make_trained(name, fairness_temperature=temperature, **options)
    move(method)
    strong, pseudo = believed_batch(4, 4)
    logits = logit_rows(strong.tolist(), normalised(method.anchors))
    softened = [[value / temperature for value in row] for row in logits]
    found = method.loss(strong, pseudo)
    agree(found.parts["cross_entropy"], believed(logits, pseudo.labels.tolist(), pseudo.weights.tolist()))
    agree(found.parts["fairness"], unfairness(mean_prediction(softened)))
    agree(found.total.detach(), (found.parts["cross_entropy"] + 2 * found.parts["fairness"]).item())


@pytest.mark.parametrize(
    ("away", "weight"),
    [(0.0, 0.25), (0.09, 0.25), (0.15, 0.6875), (0.2, 1.125), (0.25, 1.5625), (0.31, 2.0), (0.7, 2.0)],
)
@pytest.mark.parametrize("estimated", [True, False])
def test_loss__draws_harder_to_estimated_shares_the_further_predictions_are_from_them(
    away: float, weight: float, estimated: bool
) -> None:
    method = make_trained("fair", logit_scale=SCALE, fairness="batch")
    strong, pseudo = believed_batch(4, 4)
    mean = torch.tensor(mean_prediction(logit_rows(strong.tolist(), normalised(method.anchors))), dtype=torch.float64)
    one = torch.eye(4, dtype=torch.float64)[int(mean.argmin())]
    method.expect(mean + away / (1 - float(mean.min())) * (one - mean), estimated=estimated)
    found = method.loss(strong, pseudo)
    drawn = (found.total.detach() - found.parts["cross_entropy"]) / found.parts["fairness"]
    assert float(drawn) == pytest.approx(weight if estimated else 2.0, rel=1e-4)


UNEVEN = [0.5, 0.3, 0.15, 0.05]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("fairness", ["running", "batch"])
def test_loss__is_fair_to_what_is_expected_of_those_who_belong(name: str, fairness: str) -> None:
    options: dict[str, Any] = {"fairness": fairness, "fairness_weight": 2.0, "fairness_window": 10}
    method = make_trained(name, logit_scale=SCALE, **options)
    move(method)
    method.expect(torch.tensor(UNEVEN, dtype=torch.float64))
    agree(method.mean_prediction, UNEVEN)  # where the running mean begins
    anchors, mean = normalised(method.anchors), UNEVEN
    for seed in (0, 1):
        strong, pseudo = believed_batch(4, 4, seed=seed)
        belonging = [1.0, 0.25, 0.01, 0.5]
        logits = logit_rows(strong.tolist(), anchors)
        here = [
            math.fsum(far * p for far, p in zip(belonging, column, strict=True)) / math.fsum(belonging)
            for column in zip(*map(softmax, logits), strict=True)
        ]
        mean = [0.6 * old + 0.4 * new for old, new in zip(mean, here, strict=True)] if fairness == "running" else here
        found = method.loss(strong, replace(pseudo, belonging=torch.tensor(belonging, dtype=torch.float64)))
        agree(found.parts["fairness"], unfairness(mean, UNEVEN))
        agree(found.parts["cross_entropy"], believed(logits, pseudo.labels.tolist(), pseudo.weights.tolist()))


@pytest.mark.parametrize("fairness", get_args(Fairness))
@pytest.mark.parametrize("name", TRAINED)
def test_loss__where_all_belong_is_the_loss_without(name: str, fairness: Fairness) -> None:
    strong, pseudo = believed_batch(4, 4)
    found = []
    for belonging in (None, torch.ones(4, dtype=torch.float64)):
        method = make_trained(name, fairness=fairness)
        move(method)
        loss = method.loss(strong, replace(pseudo, belonging=belonging))
        backward(loss.total)
        assert method.anchors.grad is not None
        found.append((loss.total.detach(), method.anchors.grad, method.mean_prediction))
    for without, wholly in zip(*found, strict=True):
        agree(wholly, without.tolist())


@pytest.mark.parametrize("fairness", get_args(Fairness))
def test_loss__an_image_that_hardly_belongs_hardly_counts(fairness: Fairness) -> None:
    """Its label is weighted by the loop; here it is the mean prediction that it must not move."""
    strong, pseudo = believed_batch(4, 4)
    other = torch.cat([unit(1, 6, seed=77), strong[1:]])
    weights = torch.cat([torch.zeros(1, dtype=torch.float64), pseudo.weights[1:]])
    belonging = torch.tensor([1e-9, 1, 1, 1], dtype=torch.float64)
    found = []
    for rows in (strong, other):
        method = make_trained("fair", fairness=fairness, fairness_weight=1.0, fairness_window=10)
        move(method)
        loss = method.loss(rows, replace(pseudo, weights=weights, belonging=belonging))
        found.append((loss.total.detach(), method.mean_prediction.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", TRAINED)
def test_expect__every_running_mean_begins_at_the_prior(name: str) -> None:
    method = make_trained(name)
    means = [key for key in method.state_dict() if key == "class_prior" or key.startswith("mean_")]
    assert {"class_prior", "mean_prediction"} <= set(means)
    for key in means:
        agree(method.state_dict()[key], [1 / 4] * 4)
    anchors = method.anchors.detach().clone()
    method.expect(torch.tensor(UNEVEN))
    for key in means:
        torch.testing.assert_close(method.state_dict()[key], torch.tensor(UNEVEN, dtype=torch.float64))
    assert torch.equal(method.anchors.detach(), anchors)


def test_pseudo_label__of_fair_balance_is_towards_what_is_expected() -> None:
    """As below: of four images between two classes, the one nearest the second is its, if a quarter is to be."""
    known = TextFeatures(torch.eye(2), torch.eye(2), torch.arange(2))
    angles = torch.tensor([0.1, 0.2, 0.6, 0.9])
    weak = torch.stack([angles.cos(), angles.sin()], dim=1)
    features = ImageFeatures(weak, weak[:, None])
    for prior, labels in (([0.5, 0.5], [0, 0, 1, 1]), ([0.9, 0.1], [0, 0, 0, 0])):
        method = make_trained("fair", known, label_balance=1.0, fairness_window=1, logit_scale=1.0)
        method.expect(torch.tensor(prior))
        assert method.pseudo_label(features).labels.tolist() == labels


def slope(of: Callable[[Matrix], float], at: Matrix, step: float = 1e-5) -> Matrix:
    """Central differences, one coordinate at a time."""
    found: Matrix = []
    for i, row in enumerate(at):
        found.append([])
        for j in range(len(row)):
            moved = [[list(other) for other in at] for _ in range(2)]
            moved[0][i][j] += step
            moved[1][i][j] -= step
            found[-1].append((of(moved[0]) - of(moved[1])) / (2 * step))
    return found


@pytest.mark.parametrize("fairness", get_args(Fairness))
@pytest.mark.parametrize("name", TRAINED)
def test_loss__gradient_of_the_second_batch_is_that_of_its_own_mean(name: str, fairness: Fairness) -> None:
    """With the running mean, the batch's own mean pulls with the slope of the log at the running one, undamped."""
    options: dict[str, Any] = {
        "fairness": fairness,
        "fairness_weight": 2.0,
        "fairness_window": 10,
        "logit_scale": SCALE,
    }
    method = make_trained(name, **options)
    move(method)
    method.loss(*believed_batch(4, 4))
    strong, pseudo = believed_batch(4, 4, seed=1)
    labels, weights = pseudo.labels.tolist(), pseudo.weights.tolist()
    past = method.mean_prediction.tolist()
    here = mean_prediction(logit_rows(strong.tolist(), normalised(method.anchors)))
    judged = [0.6 * old + 0.4 * new for old, new in zip(past, here, strict=True)] if fairness == "running" else here

    def surrogate(logits: Matrix) -> float:
        pulled = 0.0
        if fairness != "off":
            pulled = -math.fsum(new / at for new, at in zip(mean_prediction(logits), judged, strict=True)) / 4
        return believed(logits, labels, weights) + 2.0 * pulled

    def of_strong(rows: Matrix) -> float:
        return surrogate(logit_rows(rows, normalised(method.anchors)))

    def of_anchors(rows: Matrix) -> float:
        as_anchors = torch.tensor(rows, dtype=torch.float64).reshape(method.anchors.shape)
        return surrogate(logit_rows(strong.tolist(), normalised(as_anchors)))

    wanted = slope(of_strong, strong.tolist()), slope(of_anchors, method.anchors.flatten(0, 1).tolist())
    backward(method.loss(strong.requires_grad_(), pseudo).total)
    assert strong.grad is not None
    assert method.anchors.grad is not None
    torch.testing.assert_close(strong.grad, torch.tensor(wanted[0], dtype=torch.float64), rtol=1e-6, atol=1e-7)
    found = method.anchors.grad.flatten(0, 1)
    torch.testing.assert_close(found, torch.tensor(wanted[1], dtype=torch.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fairness", get_args(Fairness))
@pytest.mark.parametrize("name", TRAINED)
def test_loss__gradient_reaches_the_anchors_and_the_strong_features_and_nothing_else(
    name: str, fairness: Fairness
) -> None:
    method, features = make_trained(name, fairness=fairness, fairness_weight=1.0), images(b=4)
    open_features = ImageFeatures(features.weak.requires_grad_(), features.crops.requires_grad_())
    earlier, later = unit(4, 6, seed=1).requires_grad_(), unit(4, 6, seed=2).requires_grad_()
    method.loss(earlier, method.pseudo_label(open_features))
    backward(method.loss(later, method.pseudo_label(open_features)).total)
    assert [key for key, _ in method.named_parameters()] == ["anchors"]
    assert method.anchors.grad is not None
    assert bool(method.anchors.grad.any(dim=-1).all())
    assert later.grad is not None
    assert bool(later.grad.any(dim=-1).all())
    assert open_features.weak.grad is open_features.crops.grad is earlier.grad is None
    assert not any(value.requires_grad or value.grad is not None for value in method.buffers())


@pytest.mark.parametrize("fairness", get_args(Fairness))
def test_loss__all_weights_zero_leaves_fairness_alone(fairness: Fairness) -> None:
    method = make_trained("fair", fairness=fairness, fairness_weight=1.0, fairness_window=10)
    strong, pseudo = believed_batch(4, 4)
    found = method.loss(strong, replace(pseudo, weights=torch.zeros_like(pseudo.weights)))
    assert found.parts["cross_entropy"].item() == 0
    agree(found.total.detach(), found.parts["fairness"].item() if fairness != "off" else 0.0)
    backward(found.total)
    assert method.anchors.grad is not None
    assert bool(method.anchors.grad.any()) == (fairness != "off")


@pytest.mark.parametrize("fairness", get_args(Fairness))
def test_loss__certain_and_unbalanced_predictions_stay_finite(fairness: Fairness) -> None:
    known = TextFeatures(torch.eye(4), torch.eye(4), torch.arange(4))
    method = make_trained("fair", known, fairness=fairness, fairness_window=1, logit_scale=1000.0)
    strong = torch.eye(4)[[0, 0, 0]].requires_grad_()
    found = method.loss(strong, PseudoLabels(torch.tensor([0, 0, 1]), torch.ones(3), torch.ones(3, 4) / 4))
    backward(found.total)
    assert method.anchors.grad is not None
    assert strong.grad is not None
    assert bool(found.total.isfinite() & method.anchors.grad.isfinite().all() & strong.grad.isfinite().all())


def test_loss__steps_down_its_own_gradient() -> None:
    method = make_trained("fair", fairness="batch", fairness_weight=1.0)
    batch = believed_batch(4, 4)
    first = method.loss(*batch)
    backward(first.total)
    assert method.anchors.grad is not None
    with torch.no_grad():
        method.anchors.sub_(1e-4 * method.anchors.grad)
    assert method.loss(*batch).total.item() < first.total.item()


# --- state ------------------------------------------------------------------------------------------------------------


def trained_a_little(name: str, known: TextFeatures, **options: Any) -> Method:
    running: dict[str, Any] = {"fairness": "running"} if name in TRAINED else {}
    method = make(name, known, **running, **options)
    method.survey(images(b=5).weak)
    if isinstance(method, SelfTrainingMethod):
        optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            backward(method.loss(unit(3, 6, seed=seed), method.pseudo_label(images(seed=seed))).total)
            optimizer.step()
    return method


WITH_PAIRS: dict[str, Any] = {"weight": "margin*agreement*confusion"}


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NAMES), ("fair", WITH_PAIRS)], ids=str)
def test_state_dict__is_the_whole_state_even_in_a_method_made_from_other_texts(
    name: str, options: dict[str, Any]
) -> None:
    method = trained_a_little(name, texts(), **options)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    for known in (texts(), texts(seed=9)):
        other = make(name, known, **options)
        other.load_state_dict(state)
        for kind in SCORES:
            assert torch.equal(other.score(images(seed=5), kind), method.score(images(seed=5), kind))
        assert set(other.state_dict()) == set(state)
        for key, value in other.state_dict().items():
            assert torch.equal(value, state[key])


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in TRAINED), ("fair", WITH_PAIRS)],
    ids=str,
)
def test_state_dict__lets_training_go_on_as_if_never_stopped(name: str, options: dict[str, Any]) -> None:
    method = trained_a_little(name, texts(), **options)
    other = make_trained(name, fairness="running", **options)
    assert isinstance(method, SelfTrainingMethod)
    assert not torch.equal(other.mean_prediction, method.mean_prediction)
    other.load_state_dict(method.state_dict())
    losses: list[Loss] = []
    for one in (method, other):
        pseudo = one.pseudo_label(images(seed=6))
        losses.append(one.loss(unit(3, 6, seed=6), pseudo))
    assert torch.equal(losses[0].total, losses[1].total)
    assert torch.equal(other.mean_prediction, method.mean_prediction)
    if options == WITH_PAIRS:
        assert torch.equal(other.state_dict()["pair_counts"], method.state_dict()["pair_counts"])
        assert other.state_dict()["pair_counts"].sum() == 3 * 4


def test_state_dict__holds_what_is_remembered() -> None:
    learned = {"anchors", "mean_prediction", "class_prior", "whole_share", "pull"}
    assert set(make("fair").state_dict()) == learned | {"pair_counts", "fixed", "teacher", "mean_label"}
    assert set(make("self-training").state_dict()) == learned | {"fixed"}
    assert set(make("dpa").state_dict()) == learned | {"image_prototypes", "mean_text"}
    together = {"prototypes", "means", "variance", "images", "assigned", "reaches"}
    assert set(make("transclip").state_dict()) == together
    assert set(make("stata").state_dict()) == together | {"text_variance"}
    agree(make_trained("fair", texts(5)).mean_prediction, [0.2] * 5)


@over_kinds
def test_state_dict__of_fair_has_a_place_for_pairs_only_where_confusion_is_named(weight: WeightKind) -> None:
    side = 5 if "confusion" in weight.split("*") else 0
    assert make("fair", texts(5), weight=weight).state_dict()["pair_counts"].shape == (side, side)


@pytest.mark.parametrize("name", TRAINED)
def test_create_method__training_leaves_the_texts_as_they_were(name: str) -> None:
    known = texts()
    trained_a_little(name, known)
    for field in fields(TextFeatures):
        assert torch.equal(getattr(known, field.name), getattr(texts(), field.name))


# --- making a method --------------------------------------------------------------------------------------------------


def test_method_names__are_the_files() -> None:
    folder = Path(methods.__file__).parent
    files = {path.stem.replace("_", "-") for path in folder.glob("*.py")} - {"--init--", "base"}
    assert method_names() == tuple(sorted(files))
    assert set(NAMES) <= files


@pytest.mark.parametrize("name", method_names())
def test_find_method__is_the_class_of_its_file(name: str) -> None:
    kind = find_method(name)
    assert issubclass(kind, Method)
    assert kind.__module__ == f"finealign.methods.{name.replace('-', '_')}"
    assert type(make(name)) is kind


def test_create_method__a_new_file_is_a_new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first_class.py").write_text(
        "from finealign.method.base import Method\n\n\n"
        "class FirstClass(Method):\n"
        "    def classifier(self):\n"
        "        return None\n\n\n"
        "METHOD = FirstClass\n"
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    try:
        assert "first-class" in method_names()
        assert type(make("first-class")).__name__ == "FirstClass"
        with pytest.raises(ConfigError, match="first-class"):
            make("unknown")
    finally:
        sys.modules.pop("finealign.methods.first_class", None)
        vars(methods).pop("first_class", None)
    monkeypatch.undo()
    assert "first-class" not in method_names()


@pytest.mark.parametrize("name", ["fiar", "base", "FAIR", "self_training", ""])
def test_create_method__an_unknown_name_is_answered_with_the_valid_ones(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make(name)
    message = str(raised.value)
    assert message.startswith(f"method.name: Unknown method {name!r}.")
    assert f"Valid: {', '.join(method_names())}." in message
    assert ("Did you mean 'fair'?" in message) == (name == "fiar")


@pytest.mark.parametrize("name", NAMES)
def test_create_method__an_unknown_option_is_answered_with_the_valid_ones(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make(name, crop_temprature=1.0)
    message = str(raised.value)
    assert "method.crop_temprature" in message
    assert "Did you mean 'crop_temperature'?" in message
    for option in find_method(name).Options.model_fields:
        assert option in message


@pytest.mark.parametrize(
    ("name", "option", "value", "valid"),
    [
        ("fair", "weight", "margins", KINDS),
        ("fair", "weight", 3, KINDS),
        ("self-training", "fairness", "on", ("running", "batch", "off")),
        ("fair", "fairness", True, ("running", "batch", "off")),
        ("fair", "crops_kept", "most", ("integer", "all")),
        ("cupl", "crops_kept", 0, ("greater than or equal to 1", "all")),
        ("wca", "crop_temperature", "hot", ("number",)),
        ("wca", "description_temperature", 0, ("greater than 0",)),
        ("fair", "crop_temperature", -1.0, ("greater than 0",)),
        ("fair", "fairness_weight", math.nan, ("finite",)),
        ("fair", "fairness_window", 0, ("greater than or equal to 1", "auto")),
        ("fair", "anchors_per_class", [2], ("integer",)),
        ("zero-shot", "logit_scale", "low", ("number", "auto")),
        ("fair", "class_prior", "uneven", ("auto", "even")),
        ("dpa", "class_prior", 0.5, ("auto", "even")),
    ],
)
def test_create_method__a_wrong_value_is_answered_with_what_is_wanted(
    name: str, option: str, value: object, valid: Sequence[str]
) -> None:
    wrong: dict[str, Any] = {option: value}
    with pytest.raises(ConfigError) as raised:
        make(name, **wrong)
    message = str(raised.value)
    assert f"method.{option}: found {value!r}" in message
    assert all(word in message for word in valid)


def test_create_method__every_wrong_option_is_named() -> None:
    with pytest.raises(ConfigError) as raised:
        make("fair", wieght="margin", fairness="on", crop_temperature=0)
    assert all(f"method.{option}" in str(raised.value) for option in ("wieght", "fairness", "crop_temperature"))


def test_create_method__options_of_one_method_are_unknown_to_another() -> None:
    make("fair", weight="none")
    with pytest.raises(ConfigError, match="Unknown setting 'weight'"):
        make("self-training", weight="none")


@pytest.mark.parametrize("name", UNTRAINED)
def test_create_method__a_method_that_expects_nothing_has_no_class_prior(name: str) -> None:
    for prior in ("even", {"a": 1.0}):
        with pytest.raises(ConfigError, match=r"method\.class_prior: Unknown setting 'class_prior'\. .*Valid: "):
            make(name, class_prior=prior)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True, "many", None])
def test_create_method__a_share_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"method\.class_prior"):
        make("fair", class_prior={"robin": 0.5, "wren": value})


# --- no labels in the training path -----------------------------------------------------------------------------------


def plain(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    signature = inspect.signature(function, eval_str=True)
    return [(parameter.name, parameter.annotation) for parameter in signature.parameters.values()][1:]


@pytest.mark.parametrize("name", method_names())
def test_methods__see_features_and_pseudo_labels_alone(name: str) -> None:
    kind = find_method(name)
    assert plain(kind.pseudo_label) == [("features", ImageFeatures)]
    assert plain(kind.loss) == [("strong", Tensor), ("pseudo", PseudoLabels)]
    assert plain(kind.score) == [("features", ImageFeatures), ("kind", Score)]
    made = [(key, annotation) for key, annotation in plain(kind.__init__) if key != "options"]
    assert made == [("texts", TextFeatures), ("logit_scale", float)]
    settings = method_options(MethodSettings(name=name))
    words = {*type(settings).model_fields, *vars(kind), *(key for key, _ in make(name).named_buffers())}
    # Of labels that a method gives itself, of one-hot vectors that are none of the images', and what is done with those
    # that a user gives for some of the images: they come in through ``survey`` and the loop, and by no other way.
    own = {"pseudo_label", "mean_label", "label_balance", "_label_score", "label_smoothing"}
    given = {"known_labels", "label_weight", "labelled_share"}
    assert plain(kind.survey) == [("weak", Tensor), ("known", Tensor | None)]
    for word in words - own - given:
        assert not any(told in word for told in ("label", "truth", "target", "supervis"))


def test_features__hold_no_label() -> None:
    assert [field.name for field in fields(ImageFeatures)] == ["weak", "crops"]
    assert [field.name for field in fields(TextFeatures)] == ["names", "descriptions", "class_of"]


def test_options__yaml_reads_off_as_false() -> None:
    config = read_config(overrides=["method.fairness=off"])
    assert method_options(config.method).model_dump()["fairness"] == "off"
