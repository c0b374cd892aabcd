"""Each alignment function against plain loops over lists, written from METHOD.md and the docstrings."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from finealign.method.alignment import (
    class_description_anchors,
    class_means,
    crop_relevance,
    crop_weights,
    description_weights,
    global_score,
    learned_alignment_score,
    normalised_cut,
    saliency_pooled,
    weighted_alignment_score,
)

Vector = list[float]
Matrix = list[Vector]

few = settings(max_examples=60, deadline=None)


class Sizes(NamedTuple):
    """Images, crops, crops kept, classes, anchors per class, width."""

    B: int
    N: int
    K: int | None
    C: int
    J: int
    D: int


GRID = [
    Sizes(1, 1, 1, 2, 1, 2),
    Sizes(2, 3, 1, 3, 1, 4),  # one crop kept
    Sizes(3, 5, 2, 2, 2, 3),
    Sizes(4, 8, 8, 7, 3, 5),
    Sizes(2, 4, 9, 11, 2, 6),  # K > N, C > B
    Sizes(6, 7, None, 4, 5, 8),  # J beyond the descriptions of most classes
]
TEMPERATURES = [math.exp(-4), 0.1, 1.0, 10.0]

over_sizes = pytest.mark.parametrize("sizes", GRID, ids=str)
over_temperatures = pytest.mark.parametrize("temperature", TEMPERATURES)


def unit(*shape: int, seed: int) -> Tensor:
    """Random directions in double precision, so that a formula can be held to more digits than it is run with."""
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def uneven_classes(num_classes: int) -> Tensor:
    """One to four descriptions a class, the classes' rows in turn, not in blocks."""
    counts = [1 + (3 * c + 1) % 4 for c in range(num_classes)]
    rows = [(turn, c) for c in range(num_classes) for turn in range(counts[c])]
    return torch.tensor([c for _, c in sorted(rows)])


def agree(found: Tensor, wanted: object) -> None:
    expected = torch.tensor(wanted, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def dot(one: Vector, other: Vector) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def mean_direction(vectors: Matrix, width: int) -> Vector:
    """The normalised mean; zeros of nothing."""
    if not vectors:
        return [0.0] * width
    mean = [math.fsum(column) / len(vectors) for column in zip(*vectors, strict=True)]
    length = math.sqrt(dot(mean, mean))
    return [value / length for value in mean]


def softmax(values: Vector) -> Vector:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / math.fsum(powers) for power in powers]


def kept_softmax(relevance: Vector, keep: int | None, temperature: float) -> Vector:
    """Step 3: the softmax over the most relevant crops, the earlier of equal ones."""
    best_first = sorted(range(len(relevance)), key=lambda index: (-relevance[index], index))
    kept = best_first if keep is None else best_first[:keep]
    shares = dict(zip(kept, softmax([relevance[index] / temperature for index in kept]), strict=True))
    return [shares.get(index, 0.0) for index in range(len(relevance))]


# --- class_means ------------------------------------------------------------------------------------------------------


def members(features: Tensor, class_of: Tensor, c: int) -> Matrix:
    return [row for row, owner in zip(features.tolist(), class_of.tolist(), strict=True) if owner == c]


@over_sizes
def test_class_means__is_the_normalised_mean_of_each_class(sizes: Sizes) -> None:
    class_of = uneven_classes(sizes.C)
    features = unit(len(class_of), sizes.D, seed=1)
    agree(
        class_means(features, class_of, sizes.C),
        [mean_direction(members(features, class_of, c), sizes.D) for c in range(sizes.C)],
    )


def test_class_means__an_empty_class_gets_zeros() -> None:
    features, class_of = unit(3, 4, seed=0), torch.tensor([0, 2, 2])
    found = class_means(features, class_of, 4)
    agree(found[[1, 3]], [[0.0] * 4] * 2)
    agree(found.norm(dim=1), [1.0, 0.0, 1.0, 0.0])


def test_class_means__one_description_a_class_is_that_description() -> None:
    features = unit(5, 3, seed=0)
    order = torch.tensor([3, 0, 4, 1, 2])
    agree(class_means(features, order, 5)[order], features.tolist())


def test_class_means__forgets_length_order_and_how_often_all_is_repeated() -> None:
    class_of = uneven_classes(3)
    features = unit(len(class_of), 4, seed=0)
    found = class_means(features, class_of, 3).tolist()
    agree(class_means(7 * features, class_of, 3), found)
    agree(class_means(features.flip(0), class_of.flip(0), 3), found)
    agree(class_means(features.repeat(5, 1), class_of.repeat(5), 3), found)


def test_class_means__descriptions_that_cancel_give_zeros() -> None:
    one = unit(1, 4, seed=0)
    agree(class_means(torch.cat([one, -one]), torch.tensor([0, 0]), 1), [[0.0] * 4])


# --- class_description_anchors ----------------------------------------------------------------------------------------


def spherical_means(points: Matrix, count: int, iterations: int) -> Matrix:
    """Spherical k-means from the point nearest the mean, then from the ones farthest from all chosen."""
    middle = mean_direction(points, len(points[0]))
    chosen = [max(range(len(points)), key=lambda index: dot(points[index], middle))]
    while len(chosen) < min(count, len(points)):
        others = [index for index in range(len(points)) if index not in chosen]
        chosen.append(min(others, key=lambda index: max(dot(points[index], points[c]) for c in chosen)))
    centres = [points[index] for index in chosen]
    for _ in range(iterations):
        groups: list[Matrix] = [[] for _ in centres]
        for point in points:
            closeness = [dot(point, centre) for centre in centres]
            groups[closeness.index(max(closeness))].append(point)
        centres = [
            mean_direction(group, len(points[0])) if group else old for group, old in zip(groups, centres, strict=True)
        ]
    return centres + [centres[-1]] * (count - len(centres))


@over_sizes
@pytest.mark.parametrize("iterations", [0, 1, 20])
def test_class_description_anchors__are_the_spherical_means_of_each_class(sizes: Sizes, iterations: int) -> None:
    per_class = max(2, sizes.J)
    class_of = uneven_classes(sizes.C).repeat(3)
    descriptions = unit(len(class_of), sizes.D, seed=2)
    found = class_description_anchors(
        descriptions, class_of, num_classes=sizes.C, per_class=per_class, iterations=iterations
    )
    assert found.shape == (sizes.C, per_class, sizes.D)
    agree(found, [spherical_means(members(descriptions, class_of, c), per_class, iterations) for c in range(sizes.C)])


@over_sizes
def test_class_description_anchors__one_a_class_is_the_mean(sizes: Sizes) -> None:
    class_of = uneven_classes(sizes.C)
    descriptions = unit(len(class_of), sizes.D, seed=2)
    found = class_description_anchors(descriptions, class_of, num_classes=sizes.C, per_class=1)
    assert found.shape == (sizes.C, 1, sizes.D)
    agree(found[:, 0], [mean_direction(members(descriptions, class_of, c), sizes.D) for c in range(sizes.C)])


@over_sizes
def test_class_description_anchors__have_length_one_and_repeat_the_last_when_descriptions_run_out(
    sizes: Sizes,
) -> None:
    class_of = uneven_classes(sizes.C)
    found = class_description_anchors(unit(len(class_of), sizes.D, seed=2), class_of, num_classes=sizes.C, per_class=5)
    agree(found.norm(dim=-1), [[1.0] * 5] * sizes.C)
    for c, count in enumerate(torch.bincount(class_of).tolist()):
        assert torch.equal(found[c, count:], found[c, count - 1].expand(5 - count, -1))
        assert len({tuple(row) for row in found[c].tolist()}) == count


@pytest.mark.parametrize("per_class", [1, 2, 5])
def test_class_description_anchors__one_description_a_class_fills_all(per_class: int) -> None:
    descriptions = unit(3, 4, seed=0)
    found = class_description_anchors(descriptions, torch.arange(3), num_classes=3, per_class=per_class)
    agree(found, [[row] * per_class for row in descriptions.tolist()])


@pytest.mark.parametrize("per_class", [2, 3, 6])
def test_class_description_anchors__duplicates_alone_give_copies(per_class: int) -> None:
    one = unit(1, 4, seed=0)
    found = class_description_anchors(
        one.repeat(4, 1), torch.zeros(4, dtype=torch.int64), num_classes=1, per_class=per_class
    )
    agree(found, [one.tolist() * per_class])


def test_class_description_anchors__more_anchors_than_different_descriptions() -> None:
    two = unit(2, 4, seed=0)
    found = class_description_anchors(two[[0, 0, 0, 1]], torch.zeros(4, dtype=torch.int64), num_classes=1, per_class=3)
    agree(found[0, [0, 1]], two.tolist())
    agree((found[0, 2] @ two.T).max(), 1.0)  # a copy of one of them


def test_class_description_anchors__find_groups_that_are_apart() -> None:
    middles = torch.eye(6, dtype=torch.float64)[:3]
    points = normalize(middles.repeat_interleave(5, 0) + 0.1 * unit(15, 6, seed=0), dim=-1)
    shuffled = points[torch.randperm(15, generator=torch.Generator().manual_seed(0))]
    found = class_description_anchors(shuffled, torch.zeros(15, dtype=torch.int64), num_classes=1, per_class=3)[0]
    wanted = [mean_direction(group, 6) for group in points.reshape(3, 5, 6).tolist()]
    agree(found[(found @ middles.T).argmax(0)], wanted)


def test_class_description_anchors__permuting_classes_permutes_them_and_nothing_is_drawn() -> None:
    class_of = uneven_classes(5).repeat(3)
    descriptions, order = unit(len(class_of), 4, seed=0), torch.tensor([3, 0, 4, 1, 2])
    before = torch.get_rng_state()
    found = class_description_anchors(descriptions, class_of, num_classes=5, per_class=3)
    permuted = class_description_anchors(descriptions, order.argsort()[class_of], num_classes=5, per_class=3)
    assert torch.equal(permuted, found[order])
    assert torch.equal(torch.get_rng_state(), before)


# --- crop_relevance ---------------------------------------------------------------------------------------------------


@over_sizes
def test_crop_relevance__is_the_cosine_with_the_whole(sizes: Sizes) -> None:
    weak, crops = unit(sizes.B, sizes.D, seed=3), unit(sizes.B, sizes.N, sizes.D, seed=4)
    wanted = [[dot(crop, whole) for crop in row] for whole, row in zip(weak.tolist(), crops.tolist(), strict=True)]
    agree(crop_relevance(weak, crops), wanted)


def test_crop_relevance__of_the_image_itself_is_one_and_of_its_opposite_minus_one() -> None:
    weak = unit(3, 5, seed=0)
    agree(crop_relevance(weak, torch.stack([weak, -weak], dim=1)), [[1.0, -1.0]] * 3)


# --- crop_weights -----------------------------------------------------------------------------------------------------


@over_sizes
@over_temperatures
def test_crop_weights__is_the_softmax_over_the_most_relevant(sizes: Sizes, temperature: float) -> None:
    relevance = 2 * torch.rand(sizes.B, sizes.N, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 1
    untouched = relevance.clone()
    agree(
        crop_weights(relevance, keep=sizes.K, temperature=temperature),
        [kept_softmax(row, sizes.K, temperature) for row in relevance.tolist()],
    )
    assert torch.equal(relevance, untouched)


@st.composite
def relevances(draw: st.DrawFn) -> Tensor:
    """Relevance (B, N) on a coarse grid, so that ties are common."""
    b, n = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    cells = draw(st.lists(st.integers(-4, 4), min_size=b * n, max_size=b * n))
    return torch.tensor(cells, dtype=torch.float64).reshape(b, n) / 4


@few
@given(relevances(), st.none() | st.integers(1, 11), st.sampled_from(TEMPERATURES))
def test_crop_weights__are_shares_and_ties_go_by_position(
    relevance: Tensor, keep: int | None, temperature: float
) -> None:
    found = crop_weights(relevance, keep=keep, temperature=temperature)
    n = relevance.shape[1]
    assert bool(((found >= 0) & (found <= 1)).all())
    agree(found.sum(1), [1.0] * len(found))
    assert (found > 0).sum(1).tolist() == [n if keep is None else min(keep, n)] * len(found)
    agree(found, [kept_softmax(row, keep, temperature) for row in relevance.tolist()])


@pytest.mark.parametrize("keep", [1, 2, 4, 5, 9])
def test_crop_weights__all_relevance_equal_shares_among_the_first(keep: int) -> None:
    kept = min(keep, 5)
    found = crop_weights(torch.full((2, 5), 0.3, dtype=torch.float64), keep=keep, temperature=0.1)
    agree(found, [[1 / kept] * kept + [0.0] * (5 - kept)] * 2)


def test_crop_weights__ties_among_many_crops_go_by_position() -> None:
    relevance = torch.tensor([[0.5, 0.1, 0.5, 0.3, 0.3] * 60] * 2, dtype=torch.float64)
    wanted = kept_softmax(relevance[0].tolist(), 150, 1.0)
    agree(crop_weights(relevance, keep=150, temperature=1.0), [wanted] * 2)


@over_temperatures
def test_crop_weights__one_crop_kept_takes_all(temperature: float) -> None:
    relevance = torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.2, 0.5]], dtype=torch.float64)
    found = crop_weights(relevance, keep=1, temperature=temperature)
    assert found.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_crop_weights__keeping_n_or_more_or_none_is_keeping_all() -> None:
    relevance = crop_relevance(unit(3, 4, seed=0), unit(3, 5, 4, seed=1))
    every = crop_weights(relevance, keep=None, temperature=0.1)
    for keep in (5, 6, 100):
        assert torch.equal(crop_weights(relevance, keep=keep, temperature=0.1), every)
    assert not torch.equal(crop_weights(relevance, keep=4, temperature=0.1), every)


def test_crop_weights__temperature_runs_from_the_best_alone_to_even() -> None:
    relevance = torch.tensor([[0.1, 0.9, 0.3, 0.2]], dtype=torch.float64)
    agree(crop_weights(relevance, keep=3, temperature=1e-3), [[0.0, 1.0, 0.0, 0.0]])
    agree(crop_weights(relevance, keep=3, temperature=1e12), [[0.0, 1 / 3, 1 / 3, 1 / 3]])


def test_crop_weights__of_no_crops_are_none() -> None:
    assert crop_weights(torch.zeros(3, 0), keep=2, temperature=1.0).shape == (3, 0)


@pytest.mark.parametrize("temperature", [0.0, -0.0, -1.0, -math.inf])
def test_crop_weights__refuses_a_temperature_not_above_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must be above 0, found -?(0\.0|1\.0|inf)"):
        crop_weights(torch.zeros(1, 2), keep=None, temperature=temperature)


@pytest.mark.parametrize("keep", [0, -1])
def test_crop_weights__refuses_to_keep_nothing(keep: int) -> None:
    with pytest.raises(ValueError, match=f"at least one crop must be kept, found {keep}"):
        crop_weights(torch.zeros(1, 2), keep=keep, temperature=1.0)


# --- global_score -----------------------------------------------------------------------------------------------------


def best_anchor(vector: Vector, anchors: Matrix) -> float:
    return max(dot(vector, anchor) for anchor in anchors)


@over_sizes
def test_global_score__is_the_best_cosine_of_the_class(sizes: Sizes) -> None:
    weak, anchors = unit(sizes.B, sizes.D, seed=6), unit(sizes.C, sizes.J, sizes.D, seed=7)
    wanted = [[best_anchor(whole, of_class) for of_class in anchors.tolist()] for whole in weak.tolist()]
    agree(global_score(weak, anchors), wanted)


def test_global_score__all_scores_equal_when_all_anchors_are() -> None:
    weak, anchor = unit(3, 4, seed=0), unit(1, 1, 4, seed=1)
    found = global_score(weak, anchor.expand(5, 2, 4))
    assert torch.equal(found, found[:, :1].expand(3, 5))


@over_sizes
def test_global_score__is_a_cosine(sizes: Sizes) -> None:
    anchors = unit(sizes.C, sizes.J, sizes.D, seed=7)
    for j in range(sizes.J):
        agree(global_score(anchors[:, j], anchors).diagonal(), [1.0] * sizes.C)
    assert float(global_score(unit(50, sizes.D, seed=8), anchors).abs().max()) <= 1 + 1e-12


# --- learned_alignment_score ------------------------------------------------------------------------------------------


@over_sizes
@over_temperatures
def test_learned_alignment_score__is_the_best_weighted_sum_of_cosines(sizes: Sizes, temperature: float) -> None:
    weak, crops = unit(sizes.B, sizes.D, seed=8), unit(sizes.B, sizes.N, sizes.D, seed=9)
    anchors = unit(sizes.C, sizes.J, sizes.D, seed=10)
    weights = crop_weights(crop_relevance(weak, crops), keep=sizes.K, temperature=temperature)
    wanted = []
    for whole, parts in zip(weak.tolist(), crops.tolist(), strict=True):
        shares = kept_softmax([dot(part, whole) for part in parts], sizes.K, temperature)
        wanted.append(
            [
                max(
                    math.fsum(share * dot(part, anchor) for share, part in zip(shares, parts, strict=True))
                    for anchor in of_class
                )
                for of_class in anchors.tolist()
            ]
        )
    agree(learned_alignment_score(crops, weights, anchors), wanted)


@few
@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 6), st.integers(2, 6), st.integers(0, 10_000))
def test_learned_alignment_score__with_one_anchor_is_the_weighted_sum_of_the_crops_own_scores(
    b: int, n: int, c: int, d: int, seed: int
) -> None:
    crops, anchors = unit(b, n, d, seed=seed), unit(c, 1, d, seed=seed + 1)
    weights = torch.softmax(unit(b, n, seed=seed + 2), dim=1)
    summed = sum((weights[:, i, None] * global_score(crops[:, i], anchors) for i in range(n)), torch.zeros(b, c))
    agree(learned_alignment_score(crops, weights, anchors), summed.tolist())


@over_sizes
def test_learned_alignment_score__of_one_kept_crop_is_that_crops_score(sizes: Sizes) -> None:
    weak, crops = unit(sizes.B, sizes.D, seed=8), unit(sizes.B, sizes.N, sizes.D, seed=9)
    anchors = unit(sizes.C, sizes.J, sizes.D, seed=10)
    relevance = crop_relevance(weak, crops)
    best = crops[torch.arange(sizes.B), relevance.argmax(1)]
    weights = crop_weights(relevance, keep=1, temperature=1.0)
    agree(learned_alignment_score(crops, weights, anchors), global_score(best, anchors).tolist())


@over_sizes
def test_learned_alignment_score__of_crops_that_are_the_image_is_its_global_score(sizes: Sizes) -> None:
    weak, anchors = unit(sizes.B, sizes.D, seed=8), unit(sizes.C, sizes.J, sizes.D, seed=10)
    crops = weak[:, None].expand(-1, sizes.N, -1)
    weights = crop_weights(crop_relevance(weak, crops), keep=sizes.K, temperature=0.1)
    agree(learned_alignment_score(crops, weights, anchors), global_score(weak, anchors).tolist())


def test_learned_alignment_score__all_scores_equal_when_all_anchors_are() -> None:
    crops, anchor = unit(3, 5, 4, seed=0), unit(1, 1, 4, seed=1)
    found = learned_alignment_score(crops, torch.full((3, 5), 0.2, dtype=torch.float64), anchor.expand(6, 2, 4))
    assert torch.equal(found, found[:, :1].expand(3, 6))


# --- description_weights ----------------------------------------------------------------------------------------------


def shares_of_descriptions(descriptions: Matrix, names: Matrix, class_of: list[int], temperature: float) -> Vector:
    """v_cj: the softmax over j of <t_cj, t_c,name> / temperature."""
    shares = [0.0] * len(class_of)
    for c, name in enumerate(names):
        own = [index for index, owner in enumerate(class_of) if owner == c]
        values = softmax([dot(descriptions[index], name) / temperature for index in own]) if own else []
        for index, value in zip(own, values, strict=True):
            shares[index] = value
    return shares


@over_sizes
@over_temperatures
def test_description_weights__is_a_softmax_within_the_class(sizes: Sizes, temperature: float) -> None:
    class_of = uneven_classes(sizes.C)
    descriptions, names = unit(len(class_of), sizes.D, seed=11), unit(sizes.C, sizes.D, seed=12)
    found = description_weights(descriptions, names, class_of, temperature=temperature)
    agree(found, shares_of_descriptions(descriptions.tolist(), names.tolist(), class_of.tolist(), temperature))
    assert bool(((found >= 0) & (found <= 1)).all())
    for c in range(sizes.C):
        assert float(found[class_of == c].sum()) == pytest.approx(1)


def test_description_weights__one_description_a_class_has_it_all() -> None:
    found = description_weights(unit(4, 3, seed=0), unit(4, 3, seed=1), torch.arange(4), temperature=0.01)
    assert found.tolist() == [1.0] * 4


def test_description_weights__duplicates_share_evenly() -> None:
    one, name = unit(1, 3, seed=0), unit(1, 3, seed=1)
    found = description_weights(one.repeat(4, 1), name, torch.zeros(4, dtype=torch.int64), temperature=0.1)
    agree(found, [0.25] * 4)


def test_description_weights__an_empty_class_harms_no_other() -> None:
    class_of = torch.tensor([0, 2, 2])
    descriptions, names = unit(3, 4, seed=0), unit(4, 4, seed=1)
    found = description_weights(descriptions, names, class_of, temperature=0.1)
    agree(found, shares_of_descriptions(descriptions.tolist(), names.tolist(), class_of.tolist(), 0.1))


def test_description_weights__cold_softmax_does_not_overflow() -> None:
    class_of = torch.tensor([0, 0, 1, 1])
    descriptions, names = torch.eye(4)[[0, 1, 2, 0]], torch.eye(4)[[0, 3]]
    found = description_weights(descriptions, names, class_of, temperature=1e-4)
    assert found.tolist() == [1.0, 0.0, 0.5, 0.5]


# --- weighted_alignment_score -----------------------------------------------------------------------------------------


@over_sizes
@over_temperatures
def test_weighted_alignment_score__is_the_double_sum(sizes: Sizes, temperature: float) -> None:
    weak, crops = unit(sizes.B, sizes.D, seed=13), unit(sizes.B, sizes.N, sizes.D, seed=14)
    class_of = uneven_classes(sizes.C)
    descriptions, names = unit(len(class_of), sizes.D, seed=15), unit(sizes.C, sizes.D, seed=16)
    crop_weight = crop_weights(crop_relevance(weak, crops), keep=sizes.K, temperature=temperature)
    description_weight = description_weights(descriptions, names, class_of, temperature=math.exp(-2))
    v = shares_of_descriptions(descriptions.tolist(), names.tolist(), class_of.tolist(), math.exp(-2))
    wanted = []
    for whole, parts in zip(weak.tolist(), crops.tolist(), strict=True):
        w = kept_softmax([dot(part, whole) for part in parts], sizes.K, temperature)
        scores = [0.0] * sizes.C
        for i, part in enumerate(parts):
            for j, (text, c) in enumerate(zip(descriptions.tolist(), class_of.tolist(), strict=True)):
                scores[c] += w[i] * v[j] * dot(part, text)
        wanted.append(scores)
    agree(weighted_alignment_score(crops, crop_weight, descriptions, description_weight, class_of), wanted)


def test_weighted_alignment_score__with_one_description_a_class_is_the_learned_score_on_it() -> None:
    crops, descriptions = unit(3, 5, 4, seed=0), unit(6, 4, seed=1)
    weights = torch.softmax(unit(3, 5, seed=2), dim=1)
    ones = torch.ones(6, dtype=torch.float64)
    agree(
        weighted_alignment_score(crops, weights, descriptions, ones, torch.arange(6)),
        learned_alignment_score(crops, weights, descriptions[:, None]).tolist(),
    )


# --- all scores -------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """All that the three scores are made of."""

    weak: Tensor
    crops: Tensor
    anchors: Tensor
    descriptions: Tensor
    names: Tensor
    class_of: Tensor

    @classmethod
    def draw(cls, sizes: Sizes) -> "Scored":
        class_of = uneven_classes(sizes.C)
        return cls(
            unit(sizes.B, sizes.D, seed=20),
            unit(sizes.B, sizes.N, sizes.D, seed=21),
            unit(sizes.C, sizes.J, sizes.D, seed=22),
            unit(len(class_of), sizes.D, seed=23),
            unit(sizes.C, sizes.D, seed=24),
            class_of,
        )

    def scores(self, keep: int | None) -> dict[str, Tensor]:
        weights = crop_weights(crop_relevance(self.weak, self.crops), keep=keep, temperature=0.1)
        shares = description_weights(self.descriptions, self.names, self.class_of, temperature=0.1)
        return {
            "global": global_score(self.weak, self.anchors),
            "las": learned_alignment_score(self.crops, weights, self.anchors),
            "wca": weighted_alignment_score(self.crops, weights, self.descriptions, shares, self.class_of),
        }


def shuffled(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


@over_sizes
@pytest.mark.parametrize("kind", ["global", "las", "wca"])
def test_scores__permuting_images_permutes_and_crops_do_not_matter(sizes: Sizes, kind: str) -> None:
    drawn = Scored.draw(sizes)
    found = drawn.scores(sizes.K)[kind]
    images, crops = shuffled(sizes.B), shuffled(sizes.N)
    moved = drawn._replace(weak=drawn.weak[images], crops=drawn.crops[images])
    agree(moved.scores(sizes.K)[kind], found[images].tolist())
    agree(drawn._replace(crops=drawn.crops[:, crops]).scores(sizes.K)[kind], found.tolist())


@over_sizes
@pytest.mark.parametrize("kind", ["global", "las", "wca"])
def test_scores__permuting_classes_permutes(sizes: Sizes, kind: str) -> None:
    drawn = Scored.draw(sizes)
    order = shuffled(sizes.C)
    moved = drawn._replace(
        anchors=drawn.anchors[order], names=drawn.names[order], class_of=order.argsort()[drawn.class_of]
    )
    agree(moved.scores(sizes.K)[kind], drawn.scores(sizes.K)[kind][:, order].tolist())


@over_sizes
@pytest.mark.parametrize("kind", ["global", "las", "wca"])
def test_scores__anchors_and_descriptions_of_a_class_have_no_order(sizes: Sizes, kind: str) -> None:
    drawn = Scored.draw(sizes)
    order = shuffled(len(drawn.class_of))
    moved = drawn._replace(
        anchors=drawn.anchors.flip(1), descriptions=drawn.descriptions[order], class_of=drawn.class_of[order]
    )
    agree(moved.scores(sizes.K)[kind], drawn.scores(sizes.K)[kind].tolist())


# --- normalised_cut and saliency_pooled -------------------------------------------------------------------------------


def two_blocks(patches: int, salient: set[int], *, width: int = 9, seed: int = 0) -> Tensor:
    """An image (1, L, D) whose salient patches point one way and the others another, each with some noise."""
    towards = torch.eye(width, dtype=torch.float64)[[0 if i in salient else 1 for i in range(patches)]]
    return normalize(towards + 0.3 * unit(patches, width, seed=seed), dim=-1)[None]


BLOCKS = [(12, {0, 1, 2}), (12, {3, 7, 8, 11}), (5, {4}), (49, {*range(20, 25), *range(27, 32)})]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("patches", "salient"), BLOCKS)
def test_normalised_cut__of_two_blocks_is_the_smaller(patches: int, salient: set[int], seed: int) -> None:
    found = normalised_cut(two_blocks(patches, salient, seed=seed))
    assert found.tolist() == [[float(i in salient) for i in range(patches)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_normalised_cut__each_image_on_its_own_in_its_dtype(dtype: torch.dtype) -> None:
    images = torch.cat([two_blocks(12, salient) for salient in ({0, 1, 2}, {5, 9}, {3, 7, 8, 11})])
    found = normalised_cut(images.to(dtype))
    assert found.dtype == dtype
    assert torch.equal(found, torch.cat([normalised_cut(image[None].to(dtype)) for image in images]))


def test_normalised_cut__has_no_gradient() -> None:
    assert not normalised_cut(two_blocks(12, {1, 2}).requires_grad_()).requires_grad


@pytest.mark.parametrize("scale", [0.5, 10.0, 100.0])
def test_saliency_pooled__is_the_patches_weighed_by_the_salient_ones_mean(scale: float) -> None:
    images = torch.cat([two_blocks(12, salient) for salient in ({0, 1, 2}, {3, 7, 8, 11})])
    lengths = torch.linspace(0.5, 3, 12, dtype=torch.float64)[:, None]
    wanted = []
    for image, salient in zip(images.tolist(), ({0, 1, 2}, {3, 7, 8, 11}), strict=True):
        query = mean_direction([image[i] for i in salient], 9)
        shares = softmax([scale * dot(query, row) for row in image])
        pooled = [math.fsum(share * row[d] for share, row in zip(shares, image, strict=True)) for d in range(9)]
        wanted.append([value / math.sqrt(dot(pooled, pooled)) for value in pooled])
    agree(saliency_pooled(images * lengths, scale=scale), wanted)


def test_saliency_pooled__patches_have_no_order() -> None:
    image, order = two_blocks(12, {3, 7, 8, 11}), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    agree(saliency_pooled(image[:, order], scale=5.0), saliency_pooled(image, scale=5.0).tolist())


@pytest.mark.parametrize("patches", [2, 9])
def test_saliency_pooled__of_patches_all_alike_is_theirs(patches: int) -> None:
    image = unit(1, 1, 5, seed=3).expand(1, patches, 5)
    agree(saliency_pooled(2 * image, scale=10.0), image[:, 0].tolist())


# --- dtype and gradient, promised for every function ------------------------------------------------------------------

CLASS_OF = torch.tensor([0, 1, 1, 0, 1, 0])
Differentiable = Callable[[Tensor], Tensor]


def functions(dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], Differentiable]]:
    """Each function of its first floating input alone, and that input's shape."""
    crops, anchors = unit(2, 4, 3, seed=30).to(dtype), unit(2, 2, 3, seed=31).to(dtype)
    descriptions, names = unit(6, 3, seed=32).to(dtype), unit(2, 3, seed=33).to(dtype)
    weights, shares = torch.full((2, 4), 0.25, dtype=dtype), torch.full((6,), 1 / 3, dtype=dtype)
    return {
        "class_means": ((6, 3), lambda x: class_means(x, CLASS_OF, 2)),
        "class_description_anchors": (
            (6, 3),
            lambda x: class_description_anchors(x, CLASS_OF, num_classes=2, per_class=2),
        ),
        "crop_relevance": ((2, 3), lambda x: crop_relevance(x, crops)),
        "crop_weights": ((2, 4), lambda x: crop_weights(x, keep=3, temperature=0.5)),
        "global_score": ((2, 3), lambda x: global_score(x, anchors)),
        "learned_alignment_score": ((2, 4, 3), lambda x: learned_alignment_score(x, weights, anchors)),
        "weighted_alignment_score": (
            (2, 4, 3),
            lambda x: weighted_alignment_score(x, weights, descriptions, shares, CLASS_OF),
        ),
        # On its argument, an offset to patches that are cut the same way for any small one.
        "saliency_pooled": (
            (1, 6, 4),
            lambda x: saliency_pooled(two_blocks(6, {1, 4}, width=4).to(dtype) + x / 10, scale=3.0),
        ),
        "description_weights": ((6, 3), lambda x: description_weights(x, names, CLASS_OF, temperature=0.5)),
    }


@pytest.mark.parametrize("name", functions(torch.float32))
def test_alignment__functions_are_differentiable(name: str) -> None:
    shape, function = functions(torch.float64)[name]
    assert torch.autograd.gradcheck(function, unit(*shape, seed=34).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", functions(torch.float32))
def test_alignment__functions_keep_the_dtype(name: str, dtype: torch.dtype) -> None:
    shape, function = functions(dtype)[name]
    exact_shape, exact = functions(torch.float64)[name]
    found = function(unit(*shape, seed=34).to(dtype))
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    wanted = exact(unit(*exact_shape, seed=34))
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
