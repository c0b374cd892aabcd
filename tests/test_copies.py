"""Copies are found by a rule that a plain statement repeats, on made points and on features of real photos."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from finealign.method import copies as rule
from finealign.method.copies import GAP, LEVELS, SAME, copies

Floats = NDArray[np.floating[Any]]


def unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def photos(count: int, seed: int = 0, width: int = 32, cone: float = 1.0) -> Floats:
    """Features of different images, in a cone: the smaller ``cone``, the narrower."""
    generator = np.random.default_rng(seed)
    return unit(generator.normal(size=width) + cone * generator.normal(size=(count, width)))


def moved(image: Floats, count: int, distance: float, seed: int = 1) -> Floats:
    """``count`` features at about ``distance`` (1 - cosine) from one image's."""
    noise = np.random.default_rng(seed).normal(size=(count, image.shape[-1]))
    return unit(image + noise / np.linalg.norm(noise, axis=1, keepdims=True) * np.sqrt(2 * distance))


def sizes(weak: Floats) -> list[int]:
    return sorted(np.bincount(copies(weak)).tolist(), reverse=True)


def distances_of(weak: Floats) -> Floats:
    points = np.asarray(weak, dtype=np.float64)
    found: Floats = ((points[:, None] - points[None]) ** 2).sum(axis=2) / 2
    return found


def reach_of(apart: Floats) -> float:
    return float(np.quantile([apart[a, b] for a, b in combinations(range(len(apart)), 2)], 0.99))


def on_a_bound(weak: Floats) -> bool:
    """Whether a distance lies so near to a bound of the rule that rounding decides."""
    apart = distances_of(weak)
    bounds = np.array([SAME, *LEVELS, *(GAP * level for level in LEVELS)]) * reach_of(apart)
    return bool((np.abs(apart[..., None] / bounds - 1) < 1e-3).any())


def stated(weak: Floats) -> set[frozenset[int]]:
    """The groups by the rule in words, pair by pair, in double precision."""
    count, apart = len(weak), distances_of(weak)
    reach = reach_of(apart)
    groups: list[object] = [next(o for o in range(count) if apart[i, o] <= SAME * reach) for i in range(count)]
    for level in LEVELS:
        for image in range(count):
            near = frozenset(o for o in range(count) if apart[image, o] <= level * reach)
            wide = frozenset(o for o in range(count) if apart[image, o] <= GAP * level * reach)
            if near == wide and len(near) > 1:
                groups[image] = near
    return {frozenset(o for o in range(count) if groups[o] == groups[image]) for image in range(count)}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.sampled_from([0.0, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2]), max_size=8))
def test_copies__are_what_the_rule_says(seed: int, distances: list[float]) -> None:
    weak = photos(12, seed)
    more = [moved(weak[number % 5], 1 + number % 2, distance, seed) for number, distance in enumerate(distances)]
    weak = np.concatenate([weak, *more])[np.random.default_rng(seed).permutation(12 + sum(map(len, more)))]
    assume(not on_a_bound(weak))
    found = copies(weak)
    groups = {frozenset(np.flatnonzero(found == group).tolist()) for group in set(found.tolist())}
    assert groups == stated(weak)


def test_copies__different_images_are_alone_and_numbered_in_order() -> None:
    assert copies(photos(300)).tolist() == list(range(300))


@pytest.mark.parametrize("cone", [1.0, 0.1, 0.01])
def test_copies__of_two_images_are_two_groups_however_narrow_the_cone(cone: float) -> None:
    weak = photos(100, cone=cone)
    reach = 1 - float((weak @ weak.T).min())
    close = [moved(weak[:1], 30, 1e-4 * reach), weak[3:4].repeat(5, axis=0)]
    found = copies(np.concatenate([weak, *close]))
    assert (found[:100] == np.arange(100)).all()
    assert found[100:].tolist() == [0] * 30 + [3] * 5


def test_copies__in_a_cloud_are_those_with_the_same_features() -> None:
    """Photos of open water are as near to one another as copies are; there are chance pairs in any cloud, though."""
    generator = np.random.default_rng(9)
    cloud = unit(photos(1) + generator.normal(size=(300, 8)) @ generator.normal(size=(8, 32)) * 0.02)
    found = copies(np.concatenate([photos(100, seed=3), cloud, cloud[:4].repeat(3, axis=0)]))
    counts = np.bincount(found)
    assert (counts[found[100:104]] == 4).all()
    assert np.sort(counts)[-5] <= 2 and 400 - len(counts) < 10


def test_copies__the_same_features_amid_a_chain_are_those_alone() -> None:
    """A chain of images, each near the next and without a gap around any, in which one occurs twice."""
    chain = np.zeros((120, 7))
    chain[:, 6] = 0.004 * np.arange(
        120
    )  # neighbours are nearer than the narrowest level, the ends farther than any gap
    chain[80] = chain[3]
    assert copies(np.concatenate([np.eye(6, 7), chain])).tolist() == [*range(86), 9, *range(86, 125)]


def test_copies__most_images_being_copies_is_no_matter() -> None:
    weak = photos(30)
    assert sizes(np.concatenate([weak, moved(weak[:1], 200, 3e-4)]))[:2] == [201, 1]


@pytest.mark.parametrize(
    ("weak", "groups"), [(np.zeros((0, 4)), []), (photos(1), [0]), (photos(1).repeat(5, 0), [0] * 5)]
)
def test_copies__few_images_or_one(weak: Floats, groups: list[int]) -> None:
    found = copies(weak)
    assert found.tolist() == groups and found.dtype == np.int64


def test_copies__order_precision_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = photos(80)
    weak = np.concatenate([weak, moved(weak[:1], 9, 1e-4), moved(weak[1:2], 4, 1e-3)])
    whole, order = copies(weak), np.random.default_rng(4).permutation(len(weak))
    assert (whole[:, None] == whole).sum() == 78 + 10**2 + 5**2
    shuffled = copies(weak[order])
    assert ((shuffled[:, None] == shuffled) == (whole[order][:, None] == whole[order])).all()
    assert copies(weak.astype(np.float16)).tolist() == whole.tolist()
    monkeypatch.setattr(rule, "CELLS", 500)  # some images at a time
    assert copies(weak).tolist() == whole.tolist()
    monkeypatch.setattr(rule, "WINDOW", 40)  # and not all pairs
    assert copies(weak).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("weak", "message"), [(np.zeros(3), r"not \(n, D\)"), (np.array([[1.0, 0.0], [np.nan, 1.0]]), "finite")]
)
def test_copies__refuses_what_are_no_features(weak: Floats, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        copies(weak)


# --- features of real photos ------------------------------------------------------------------------------------------


def real(shared: Path, name: str) -> tuple[Floats, list[str]]:
    from safetensors.numpy import load_file

    stored = shared / "features" / "clip-b16" / f"{name}.safetensors"
    if not stored.is_file():
        pytest.skip(f"no features at {stored}")
    found = load_file(stored)
    names = json.loads(stored.with_suffix(".json").read_text(encoding="utf-8"))
    return unit(np.concatenate([found["weak"], found["test_weak"]]).astype(np.float32)), names["train"] + names["test"]


@pytest.mark.parametrize("name", ["cifar100", "eurosat", "pets37-small", "ucmerced"])
def test_copies__of_different_photos_there_are_none(shared: Path, name: str) -> None:
    """Not even among the satellite photos of water, of which some are nearer than copies with other compression are."""
    weak, _ = real(shared, name)
    assert sizes(weak)[0] == 1


def test_copies__those_that_a_data_set_has_are_found(shared: Path) -> None:
    weak, names = real(shared, "flowers12")
    found = copies(weak)
    pairs = [np.flatnonzero(found == group) for group in np.flatnonzero(np.bincount(found) > 1)]
    assert {frozenset(Path(names[image]).stem for image in pair) for pair in pairs} == {
        frozenset({"image_0467", "image_0434"}),
        frozenset({"image_0411", "image_0468"}),
        frozenset({"image_0882", "image_0921"}),
        frozenset({"image_0923", "image_0907"}),
        frozenset({"image_1150", "image_1168"}),
    }


def test_copies__put_among_real_photos_are_found(shared: Path) -> None:
    weak, _ = real(shared, "eurosat")
    added = np.concatenate([weak, weak[7:8].repeat(40, axis=0), moved(weak[250:251], 20, 1e-4)])
    found = copies(added)
    assert (found[-60:-20] == found[7]).all() and (found[-20:] == found[250]).all()
    assert np.bincount(found).max() == 41
