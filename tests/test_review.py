"""Measuring by few labels: the sample, estimates against enumeration and simulation, what counts and what does not."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finealign.errors import ConfigError, ImageInputError, OutputError
from finealign.review.figures import measure
from finealign.review.intervals import AT_PLAN, BEYOND, FEWEST, estimate, labels_for, looks, width_factor
from finealign.review.labels import LabelFile, read_labels
from finealign.review.plan import CHOICES, Item, Plan, Population, absolute, look_at, make_plan
from finealign.review.sampling import AIMS, Aim, Design, draw
from finealign.review.session import KEPT_FOR, AnswerError, Session
from finealign.types import Prediction

Floats = NDArray[np.floating[Any]]
RIGHT, GAIN = (1.0, 0.0), (1.0, 0.0, -1.0)
CLASSES = ("wren", "robin", "finch")


class World:
    """Images with known truth: a confidence, how both models label them, and what they show."""

    def __init__(self, images: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.confidence = rng.beta(3, 1.2, images)
        self.adapted = rng.integers(10, size=images)
        self.changed = rng.random(images) < 0.6 * (1 - self.confidence) + 0.1
        self.right = rng.random(images) < 0.9 * self.confidence
        self.start_right = np.where(self.changed, ~self.right & (rng.random(images) < 0.5), self.right)

    def draw(self, aim: Aim, budget: int, seed: int) -> Design:
        return draw(self.confidence, self.changed, self.adapted, aim=aim, budget=budget, seed=seed)

    def estimates(self, design: Design, number: int, factor: float) -> tuple[Any, Any]:
        """Accuracy of the adapted model, and the difference, by the first so many images; None: too early."""
        asked, strata = design.order[:number], len(design.sizes)
        counts = np.zeros((strata, 2, 2), dtype=np.int64)
        np.add.at(
            counts, (design.stratum[asked], self.right[asked].astype(int), self.start_right[asked].astype(int)), 1
        )
        sure, there = design.expected, counts.sum((1, 2)) > 0
        accuracy = gain = None
        if there.all():
            rates = np.stack([sure, 1 - sure], 1)
            accuracy = estimate(counts.sum(2)[:, ::-1], design.sizes, rates, values=RIGHT, factor=factor)
        if (there | design.unchanged).all():
            gains = np.stack([counts[:, 1, 0], counts[:, 0, 0] + counts[:, 1, 1], counts[:, 0, 1]], axis=1)
            rates = np.stack([sure, (1 - sure) / 2, (1 - sure) / 2], axis=1)
            gain = estimate(gains, design.sizes, rates, values=GAIN, factor=factor, zero=design.unchanged)
        return accuracy, gain


# --- the sample -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aim", AIMS)
def test_draw__asks_about_every_image_once_and_strata_are_whole(aim: Aim) -> None:
    world = World(200)
    design = world.draw(aim, 60, 0)
    assert sorted(design.order) == list(range(200))
    assert (np.bincount(design.stratum) == design.sizes).all()
    for stratum, unchanged in enumerate(design.unchanged):
        assert unchanged == (not world.changed[design.stratum == stratum].any())
    if aim == "random":
        assert len(design.sizes) == 1


def test_draw__each_image_of_a_stratum_is_equally_likely_at_every_place() -> None:
    world, times = World(24), 600
    places = np.zeros((24, 24))
    for seed in range(times):
        design = world.draw("accuracy", 16, seed)
        places[design.order, np.arange(24)] += 1
    for stratum, size in enumerate(design.sizes):
        of_stratum = places[design.stratum == stratum]
        there = of_stratum[:, of_stratum.sum(0) > 0]
        assert there.shape[1] == size  # the places of a stratum are the same in every draw
        assert np.abs(there / times - 1 / size).max() < 5 * math.sqrt(1 / size / times)


def test_draw__spreads_the_images_of_a_stratum_over_predicted_classes() -> None:
    predicted = np.repeat(np.arange(4), 25)
    for seed in range(20):
        design = draw(np.full(100, 0.7), np.zeros(100, bool), predicted, aim="random", budget=20, seed=seed)
        counts = np.bincount(predicted[design.order[:8]], minlength=4)
        assert counts.min() >= 1  # of 8 images drawn without a thought 27 % lack a class


def test_draw__for_the_difference_asks_first_about_what_changed() -> None:
    world = World(200)
    design = world.draw("difference", 20, 0)
    changed = int(world.changed.sum())
    assert world.changed[design.order[:changed]].all()
    shares = {aim: world.changed[world.draw(aim, 40, 0).order[:40]].mean() for aim in AIMS}
    assert shares["accuracy"] < shares["both"] < shares["difference"] == 1


def test_draw__shares_labels_out_by_how_unsure_the_images_are() -> None:
    confidence = np.repeat([0.99, 0.5], 100)
    design = draw(confidence, np.zeros(200, bool), np.zeros(200, int), aim="accuracy", budget=60, seed=0)
    asked = (confidence[design.order[:60]] == 0.5).mean()
    assert asked == pytest.approx(0.5 / (0.5 + math.sqrt(0.95 * 0.05)), abs=0.06)


@pytest.mark.parametrize("images", [1, 2, 3, 9])
@pytest.mark.parametrize("aim", AIMS)
def test_draw__of_few_images(aim: Aim, images: int) -> None:
    for changed in (np.zeros(images, bool), np.ones(images, bool), np.arange(images) == 0):
        design = draw(np.full(images, 1.0), changed, np.zeros(images, int), aim=aim, budget=60, seed=0)
        assert sorted(design.order) == list(range(images))


def test_draw__refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="confidence"):
        draw(np.ones(3), np.ones(2, bool), np.zeros(3, int), aim="both", budget=1, seed=0)
    with pytest.raises(ValueError, match="confidence"):
        draw(np.ones(0), np.ones(0, bool), np.zeros(0, int), aim="both", budget=1, seed=0)


# --- estimates and intervals ------------------------------------------------------------------------------------------


def outcomes(values: Sequence[Sequence[float]], numbers: Sequence[int], scale: tuple[float, ...]) -> Any:
    """Every sample of so many images of each stratum: the counts (S, H, V) of all of them."""
    of_strata = []
    for of_stratum, number in zip(values, numbers, strict=True):
        samples = itertools.combinations(of_stratum, number)
        of_strata.append([[sample.count(value) for value in scale] for sample in samples])
    return np.array(list(itertools.product(*of_strata)))


@pytest.mark.parametrize(
    ("values", "numbers", "scale"),
    [
        ([[1, 1, 0, 1], [0, 0, 1]], [2, 2], RIGHT),
        ([[1, 1, 0, 1, 0, 0], [0, 0, 0], [1, 1]], [3, 1, 1], RIGHT),
        ([[1, -1, 0, 1, 1], [0, 0, -1, 1]], [2, 3], GAIN),
    ],
)
def test_estimate__is_right_on_the_mean_of_all_samples(
    values: list[list[float]], numbers: list[int], scale: tuple[float, ...]
) -> None:
    counts = outcomes(values, numbers, scale)
    sizes = np.array([len(of_stratum) for of_stratum in values])
    even = np.full((len(sizes), len(scale)), 1 / len(scale))
    mean, low, high = estimate(counts, sizes, even, values=scale, factor=AT_PLAN)
    truth = sum(map(sum, values)) / sizes.sum()
    assert mean.mean() == pytest.approx(truth)
    assert (low <= mean + 1e-9).all() and (mean <= high + 1e-9).all()
    assert ((low <= truth + 1e-9) & (truth <= high + 1e-9)).mean() >= 0.95


def ways(size: int, right: int, number: int) -> Floats:
    """The chance of k right ones among ``number`` of ``size`` images of which ``right`` are: (number + 1,)."""
    return np.array([math.comb(right, k) * math.comb(size - right, number - k) for k in range(number + 1)]) / math.comb(
        size, number
    )


@pytest.mark.parametrize("rights", [(0, 0), (40, 25), (39, 25), (36, 20), (30, 10), (20, 12), (38, 3)])
@pytest.mark.parametrize("numbers", [(10, 10), (20, 5)])
def test_estimate__covers_in_every_small_population(rights: tuple[int, int], numbers: tuple[int, int]) -> None:
    """The exact chance, over all samples, that the interval holds the truth."""
    sizes = np.array([40, 25])
    chances = np.outer(*(ways(int(s), r, n) for s, r, n in zip(sizes, rights, numbers, strict=True)))
    first, second = np.indices(chances.shape)
    counts = np.stack([np.stack([k, n - k], -1) for k, n in ((first, numbers[0]), (second, numbers[1]))], axis=-2)
    _, low, high = estimate(counts, sizes, np.full((2, 2), 0.5), values=RIGHT, factor=AT_PLAN)
    truth = sum(rights) / 65
    assert chances.sum() == pytest.approx(1)
    assert chances[(low <= truth + 1e-9) & (truth <= high + 1e-9)].sum() >= 0.93


def test_estimate__of_all_images_is_exact() -> None:
    counts = np.array([[3, 2], [4, 0]])
    found = estimate(counts, np.array([5, 4]), np.full((2, 2), 0.5), values=RIGHT, factor=BEYOND)
    assert [float(one) for one in found] == pytest.approx([7 / 9] * 3)


def test_estimate__takes_strata_that_cannot_differ_as_known() -> None:
    counts = np.array([[4, 1, 1], [0, 0, 0]])
    zero = np.array([False, True])
    even = np.full((2, 3), 1 / 3)
    mean, low, high = estimate(counts, np.array([30, 70]), even, values=GAIN, factor=AT_PLAN, zero=zero)
    assert mean == pytest.approx(0.3 * 0.5)
    assert -0.3 < low < mean < high < 0.3
    with pytest.raises(ValueError, match="no label"):
        estimate(counts, np.array([30, 70]), even, values=GAIN, factor=AT_PLAN)
    nothing = estimate(counts, np.array([30, 70]), even, values=GAIN, factor=AT_PLAN, zero=np.array([True, True]))
    assert [float(one) for one in nothing] == [0, 0, 0]


def test_looks__are_fifths_of_the_plan_and_doublings_of_it() -> None:
    assert looks(60, 1000) == [12, 24, 36, 48, 60, 120, 240, 480, 960, 1000]
    assert looks(20, 30) == [FEWEST, 12, 16, 20, 30]
    assert looks(60, 7) == [7]
    factors = [width_factor(look, 60, 1000) for look in looks(60, 1000)]
    assert factors[4] == AT_PLAN and set(factors[5:]) == {BEYOND}
    assert factors[:5] == sorted(factors[:5], reverse=True)


def test_looks__all_together_are_wrong_in_at_most_five_percent() -> None:
    """Of Brownian motion, which the estimates follow: it leaves the bounds of any look as rarely as is promised."""
    at, images = np.array(looks(60, 6400)), 6400
    information = 1 / (1 / at[:-1] - 1 / images)  # at the last look everything is known
    steps = np.sqrt(np.diff(information, prepend=0))
    paths = np.cumsum(np.random.default_rng(0).standard_normal((100_000, len(steps))) * steps, axis=1)
    bounds = np.array([width_factor(int(look), 60, images) for look in at[:-1]])
    missed = (np.abs(paths) / np.sqrt(information) > bounds).any(axis=1).mean()
    assert 0.04 < missed < 0.0515


@pytest.mark.parametrize("aim", ["both", "accuracy", "difference"])
def test_intervals__hold_at_all_looks_of_simulated_reviews(aim: Aim) -> None:
    world, budget, times = World(300, seed=3), 60, 120
    truth = world.right.mean(), world.right.mean() - world.start_right.mean()
    held = np.ones((times, 2), dtype=bool)
    for seed in range(times):
        design = world.draw(aim, budget, seed)
        for look in looks(budget, 300)[:6]:
            figures = world.estimates(design, look, width_factor(look, budget, 300))
            for kind, found in enumerate(figures):
                if found is not None:
                    held[seed, kind] &= bool(found[1] <= truth[kind] + 1e-9 and truth[kind] - 1e-9 <= found[2])
    # Of 120 reviews by intervals that hold in 95 %, fewer than 89 % do once in some hundred times.
    assert (held.mean(0) >= 0.89).all(), held.mean(0)


def test_intervals__are_narrower_than_those_of_a_random_sample() -> None:
    world, budget = World(600, seed=1), 60
    widths = {}
    aims: tuple[Aim, ...] = ("random", "accuracy", "difference")
    for aim in aims:
        found = [world.estimates(world.draw(aim, budget, seed), budget, AT_PLAN) for seed in range(20)]
        widths[aim] = [np.mean([one[2] - one[1] for one in of if one]) for of in zip(*found, strict=True) if any(of)]
    assert widths["accuracy"][0] < 0.95 * widths["random"][0]
    assert widths["difference"][-1] < 0.6 * widths["random"][1]


def test_labels_for__is_the_number_that_gives_the_width() -> None:
    spread, sizes, shares = np.array([0.2, 0.05]), np.array([500, 1500]), np.array([0.6, 0.4])
    wanted = labels_for(0.05, spread, sizes, shares, factor=2.0)
    assert wanted is not None

    def reach(labels: int) -> float:
        number = np.minimum(sizes, shares * labels)
        return 2 * math.sqrt(float(((sizes / 2000) ** 2 * spread / number * (1 - number / sizes)).sum()))

    assert reach(wanted) <= 0.05 < reach(wanted - 1)
    assert labels_for(1.0, spread, sizes, shares, factor=2.0) == 2  # one of each stratum
    assert labels_for(1e-9, np.array([0.2, 0.05]), sizes, np.array([1.0, 0.0]), factor=2.0) is None


# --- the plan ---------------------------------------------------------------------------------------------------------


def population(images: int = 40, seed: int = 0) -> Population:
    rng = np.random.default_rng(seed)
    adapted, start = rng.integers(3, size=images), rng.integers(3, size=images)
    choices = np.tile(np.arange(3), (images, 1))
    return Population([f"/p/{i}.png" for i in range(images)], adapted, start, rng.uniform(0.4, 1, images), choices)


def test_make_plan__survives_json_and_depends_on_the_seed_alone() -> None:
    import json

    plan = make_plan(population(), CLASSES, budget=10, learning=5, seed=1)
    assert Plan.from_json(json.loads(json.dumps(plan.as_json()))) == plan
    assert make_plan(population(), CLASSES, budget=10, learning=5, seed=1) == plan
    assert make_plan(population(), CLASSES, budget=10, learning=5, seed=2) != plan


def test_make_plan__images_to_learn_from_are_apart_and_of_each_class() -> None:
    plan = make_plan(population(), CLASSES, budget=10, learning=9)
    measured = {item.path for item in plan.measuring[:10]}
    assert len(plan.learning) == 9 and not measured & {item.path for item in plan.learning}
    assert [np.bincount([item.adapted for item in plan.learning], minlength=3).min()] == [3]
    assert {item.why for item in plan.learning} == {"learning"}
    assert {item.why for item in plan.measuring} == {"measuring"}


def test_make_plan__what_the_model_learned_from_is_not_measured() -> None:
    taught = ["/p/3.png", "/p/7.png"]
    plan = make_plan(population(), CLASSES, budget=10, learning=5, learned_from=taught)
    assert (plan.images, plan.learned_from, sum(plan.sizes)) == (38, 2, 38)
    assert not {item.path for item in (*plan.measuring, *plan.learning)} & set(taught)
    with pytest.raises(ImageInputError, match="learned from the labels of all"):
        make_plan(population(2), CLASSES, learned_from=["/p/0.png", "/p/1.png"])


@pytest.mark.parametrize(
    ("classes", "wanted", "told"),
    [
        (CLASSES, {"budget": 0}, "at least 1"),
        (CLASSES, {"learning": -1}, "at least 1 and 0"),
        (CLASSES, {"aim": "speed"}, "Valid: accuracy, both, difference, random"),
        (("wren", "Cannot tell", "finch"), {}, "also an answer"),
    ],
)
def test_make_plan__refuses(classes: tuple[str, ...], wanted: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_plan(population(), classes, **wanted)


def test_look_at__offers_what_both_models_say_in_the_order_of_the_classes() -> None:
    rng = np.random.default_rng(0)
    predictions = []
    for number in range(20):
        own, start = rng.dirichlet(np.ones(30)), rng.dirichlet(np.ones(30))
        predictions.append(Prediction(Path(f"{number}.png"), own, own, start, start))  # type: ignore[arg-type]
    seen = look_at(predictions, classes=30)
    assert seen.choices.shape == (20, CHOICES)
    for choices, adapted, start in zip(seen.choices.tolist(), seen.adapted, seen.start, strict=True):
        assert {int(adapted), int(start)} <= set(choices)
        assert choices == sorted(set(choices))
    assert seen.paths[0] == str(Path("0.png").absolute())
    with pytest.raises(ImageInputError, match="nothing to review"):
        look_at([], classes=30)


# --- what counts ------------------------------------------------------------------------------------------------------


def plan_of(images: int, *, budget: int = 10, folder: Path = Path("/p"), learning: int = 0) -> Plan:
    """A plan of two strata; the models say "wren" of images whose label did not change, else "wren" and "robin"."""
    items = [
        Item(str(folder / f"{i}.png"), stratum=i % 2, adapted=0, start=i % 2, choices=(0, 1, 2)) for i in range(images)
    ]
    return Plan(
        classes=CLASSES,
        images=images,
        learned_from=0,
        aim="both",
        budget=budget,
        seed=0,
        sizes=((images + 1) // 2, images // 2),
        unchanged=(True, False),
        expected=(0.8, 0.6),
        measuring=tuple(items),
        learning=tuple(replace(item, path=f"{item.path}.more", stratum=-1) for item in items[:learning]),
    )


def test_measure__is_too_early_before_the_first_look() -> None:
    plan = plan_of(40, budget=20)
    found = measure(plan, {item.path: "wren" for item in plan.measuring[:9]})
    assert (found.labels, found.labelled, found.next_look) == (0, 9, 10)
    assert found.adapted is found.start is found.difference is None
    found = measure(plan, {item.path: "wren" for item in plan.measuring[:11]})
    assert (found.labels, found.labelled, found.next_look) == (10, 11, 12)
    assert found.adapted and found.start and found.difference
    assert (found.adapted.value, found.start.value, found.difference.value) == (1, 0.5, 0.5)


def test_measure__counts_in_the_order_of_the_plan_alone() -> None:
    plan = plan_of(40, budget=20)
    labels = {item.path: "wren" for item in plan.measuring[:20]}
    whole = measure(plan, labels)
    assert measure(plan, dict(reversed(list(labels.items())))) == whole
    for gaps, counted in ((1, 19), (3, 17), (4, 5)):
        missing = {item.path for item in plan.measuring[5 : 5 + gaps]}
        found = measure(plan, {path: label for path, label in labels.items() if path not in missing})
        assert found.labelled == counted
    more = {**labels, plan.measuring[30].path: "finch", "/elsewhere.png": "robin"}  # as of another plan
    assert measure(plan, more) == whole


def test_measure__none_of_these_is_a_mistake_and_what_cannot_be_told_is_left_out() -> None:
    plan = plan_of(400, budget=20)
    answers = ["wren"] * 8 + ["none of these"] * 4 + ["cannot tell"] * 4 + ["wren"] * 8
    found = measure(plan, {item.path: label for item, label in zip(plan.measuring, answers, strict=False)})
    assert (found.labels, found.none, found.cannot_tell) == (20, 4, 4)
    assert found.adapted and found.adapted.value == pytest.approx(0.8)


def test_measure__all_images_are_exact_and_no_image_of_a_stratum_may_be_nameable() -> None:
    plan = plan_of(12, budget=60)
    found = measure(plan, {item.path: "wren" if i < 6 else "robin" for i, item in enumerate(plan.measuring)})
    assert found.adapted and (found.adapted.low, found.adapted.value, found.adapted.high) == (0.5, 0.5, 0.5)
    assert found.next_look is None
    plan = plan_of(40, budget=20)
    odd = {item.path: "cannot tell" if i % 2 else "wren" for i, item in enumerate(plan.measuring)}
    found = measure(plan, odd)
    assert found.adapted and found.adapted.value == 1 and found.labels == 20


def test_measure__tells_how_many_labels_more_precision_takes() -> None:
    plan = plan_of(1000, budget=40)
    found = measure(plan, {item.path: CLASSES[i % 3 > 1] for i, item in enumerate(plan.measuring[:40])})
    wanted = list(found.labels_for_accuracy.values())
    assert wanted[0] is not None and wanted[1] is not None and 40 < wanted[0] < wanted[1]
    told = found.as_json()["labels_for_difference"]
    assert [row["within"] for row in told] == [0.1, 0.05, 0.03, 0.02, 0.01]


# --- the file ---------------------------------------------------------------------------------------------------------

HEADER = "path,label,why_asked\n"


def test_label_file__has_a_row_a_label_and_reads_it_back(tmp_path: Path) -> None:
    names = ['a "quoted", name', "two\nlines", "=1+1"]
    file = LabelFile(tmp_path / "new" / "labels.csv", names)
    for number, name in enumerate([*names, "none of these", "cannot tell"]):
        file.add(f"/p/{number}, x.png", name, "measuring" if number % 2 else "learning")
        assert LabelFile(file.path, names).rows == file.rows
    file.take_back("/p/1, x.png")
    again = LabelFile(file.path, names)
    assert list(again.rows) == ["/p/0, x.png", "/p/2, x.png", "/p/3, x.png", "/p/4, x.png"]
    assert not again.cut_off
    with pytest.raises(KeyError):
        again.add("/p/0, x.png", "=1+1", "measuring")


WHOLE = HEADER + "/p/0.png,wren,measuring\n"


@pytest.mark.parametrize(
    "cut", ["/p/1", "/p/1.png,", "/p/1.png,wre", '"/p/1,', "/p/1.png,wren,measu", '"/p/1.png","wr']
)
def test_label_file__what_a_kill_cut_off_is_removed_and_told(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(WHOLE + cut)
    assert LabelFile(path, CLASSES, mend=False).rows == {"/p/0.png": ("wren", "measuring")}
    assert path.read_text() == WHOLE + cut
    file = LabelFile(path, CLASSES)
    assert file.cut_off and path.read_text() == WHOLE
    file.add("/p/1.png", "robin", "measuring")
    assert list(LabelFile(path, CLASSES).rows) == ["/p/0.png", "/p/1.png"]


@pytest.mark.parametrize("text", ["", "path,la", HEADER[:-1], HEADER])
def test_label_file__of_a_header_alone_is_begun_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    LabelFile(path, CLASSES).add("/p/0.png", "wren", "measuring")
    assert path.read_text() == WHOLE


def test_label_file__a_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(WHOLE + "/p/1.png,robin,measuring")
    file = LabelFile(path, CLASSES)
    assert not file.cut_off
    file.add("/p/2.png", "wren", "learning")
    assert len(LabelFile(path, CLASSES).rows) == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path,label\n/p/0.png,wren\n", "its header is 'path,label', wanted path,label,why_asked"),
        (HEADER + "/p/0.png,ostrich,measuring\n/p/1.png,wren,measuring\n", "line 2 is"),
        (WHOLE + "/p/0.png,robin,measuring\n", "a second time"),
        (WHOLE + '/p/1.png,"wren,measuring\n/p/2.png,wren,measuring\n/p/3', "cannot be gone on with"),
    ],
)
def test_label_file__that_is_something_else_is_refused_and_kept(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(OutputError, match=r"labels\.csv"):
        LabelFile(path, CLASSES)
    with pytest.raises(OutputError, match=told):
        LabelFile(path, CLASSES)
    assert path.read_text() == text


def test_label_file__a_label_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LabelFile(tmp_path / "labels.csv", CLASSES)
    file.add("/p/0.png", "wren", "measuring")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="The label was not kept; the ones before it are"):
        file.add("/p/1.png", "robin", "measuring")
    with pytest.raises(OutputError):
        file.take_back("/p/0.png")
    assert file.path.read_text() == WHOLE
    assert list(file.rows) == ["/p/0.png"]


def test_read_labels__takes_a_mapping_or_a_table(tmp_path: Path) -> None:
    wanted = {str(tmp_path / "a.png"): "wren", str(tmp_path / "b.png"): "none of these"}
    (tmp_path / "labels.csv").write_text("path,label\na.png,Wren\nb.png,none of these\n")
    assert read_labels(tmp_path / "labels.csv", CLASSES) == wanted
    assert read_labels({path: label.upper() if label == "wren" else label for path, label in wanted.items()}, CLASSES)
    with pytest.raises(ImageInputError, match=r"No class is called 'ostrich'. Valid: 'wren', 'robin', 'finch'"):
        read_labels({"a.png": "ostrich"}, CLASSES)
    with pytest.raises(ImageInputError, match="labelled twice"):
        read_labels({"a.png": "wren", absolute("a.png"): "wren"}, CLASSES)


# --- the session ------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def session(tmp_path: Path, *, images: int = 8, target: int = 4, learning: int = 0) -> tuple[Session, Clock]:
    clock = Clock()
    file = LabelFile(tmp_path / "labels.csv", CLASSES)
    return Session(plan_of(images, learning=learning), file, target=target, clock=clock), clock


def test_session__two_windows_are_never_asked_about_one_image(tmp_path: Path) -> None:
    review, _ = session(tmp_path)
    asked = []
    for _ in range(2):
        for window in ("one", "two"):
            number = review.take(window)
            assert number is not None and review.take(window) == number  # till it is answered
            asked.append(number)
        for window, number in zip(("one", "two"), asked[-2:], strict=True):
            review.answer(window, number, "wren")
    assert asked == [0, 1, 2, 3]
    assert review.take("one") is review.take("two") is None
    assert review.progress().done
    assert len(LabelFile(review.labels.path, CLASSES).rows) == 4


def test_session__an_image_returns_from_a_window_that_leaves_or_falls_silent(tmp_path: Path) -> None:
    review, clock = session(tmp_path, images=2, target=2)
    assert (review.take("one"), review.take("two"), review.take("three")) == (0, 1, None)
    assert review.progress("three").held == 2
    review.leave("one")
    assert review.take("three") == 0
    clock.now += KEPT_FOR + 1
    assert review.take("four") == 0
    review.answer("three", 0, "wren")
    with pytest.raises(AnswerError, match="has its label already"):
        review.answer("four", 0, "robin")
    assert review.labels.rows["/p/0.png"] == ("wren", "measuring")


def test_session__undo_asks_about_the_image_again(tmp_path: Path) -> None:
    review, _ = session(tmp_path)
    for window in ("one", "two", "one"):
        number = review.take(window)
        assert number is not None
        review.answer(window, number, "wren")
    assert review.can_undo("one")
    assert review.undo("one") == (2, "wren")
    assert review.take("two") == 3  # the window that took it back has 2
    assert review.undo("one") == (0, "wren")
    assert not review.can_undo("one")
    with pytest.raises(AnswerError, match="nothing to take back"):
        review.undo("one")
    assert list(LabelFile(review.labels.path, CLASSES).rows) == ["/p/1.png"]


def test_session__images_that_cannot_be_told_are_made_up_for_and_those_to_learn_from_come_last(tmp_path: Path) -> None:
    review, _ = session(tmp_path, images=5, target=4, learning=2)
    answers = iter(["wren", "cannot tell", "wren", "none of these", "wren", "robin", "robin"])
    whys = []
    while (number := review.take("one")) is not None:
        whys.append(review.answer("one", number, next(answers)).why)
    assert whys == ["measuring"] * 5 + ["learning"] * 2
    progress = review.progress()
    assert (progress.labelled, progress.target, progress.cannot_tell, progress.learned) == (4, 4, 1, 2)
    assert review.figures().labelled == 4


@pytest.mark.parametrize(
    ("number", "label", "kind"), [(99, "wren", "unknown"), (-1, "wren", "unknown"), (0, "owl", "label")]
)
def test_session__refuses_what_is_no_answer(tmp_path: Path, number: int, label: str, kind: str) -> None:
    review, _ = session(tmp_path)
    with pytest.raises(AnswerError) as caught:
        review.answer("one", number, label)
    assert caught.value.kind == kind
    assert not review.labels.path.exists()


def test_session__labels_of_an_earlier_one_are_not_asked_again(tmp_path: Path) -> None:
    review, _ = session(tmp_path)
    review.answer("one", 0, "wren")
    review.answer("one", 1, "robin")
    again, _ = session(tmp_path)
    assert again.take("new") == 2
    assert again.progress().labelled == 2
