"""The judge without labels: its evidence against plain statements, its calls, and what a run does with them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from conftest import CLASSES, predictions, tiny_config
from finealign import FineAlign
from finealign.config import MethodSettings
from finealign.images.listing import list_images
from finealign.method.base import SelfTrainingMethod
from finealign.method.registry import create_method
from finealign.model.calibration import SAMPLE, sample
from finealign.run import adapt as run_folder
from finealign.run import verdict
from finealign.run.adapt import adapt_into
from finealign.run.verdict import Steps, Verdict, anchors_kept, gather, judge, judge_model, mean_margin, score_of
from finealign.types import ImageFeatures, TextFeatures

Tiny = Callable[[str], str]


def spread(rows: list[list[float]]) -> float:
    """Sum of squared distances from the mean, in plain Python."""
    middle = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    found: float = sum((value - mean) ** 2 for row in rows for value, mean in zip(row, middle, strict=True))
    return found


def evidence(**values: float) -> dict[str, float]:
    usual = {"structure": 0.2, "margin": 0.15, "images_a_class": 3.0, "confidence": 0.8, "anchors_kept": 0.8}
    usual |= {"unevenness": 0.1, "shift": 0.1, "off_prior": 0.05, "mixture": 0.1, "mixtures_agree": 0.9, "text": -0.2}
    return {**usual, "relabelled": 0.3, **values}


def unit(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def example(n: int = 30, *, c: int = 3, d: int = 8, prior: list[float] | None = None) -> dict[str, Any]:
    """Images before and after adaptation, the start's method, and one whose anchors have moved."""
    class_of = torch.arange(c).repeat_interleave(2)
    texts = TextFeatures(unit(c, d, seed=1), unit(2 * c, d, seed=2), class_of)
    first = create_method(MethodSettings(name="cupl"), texts, logit_scale=10.0)
    method = create_method(MethodSettings(name="fair"), texts, logit_scale=10.0)
    assert isinstance(method, SelfTrainingMethod)
    with torch.no_grad():
        method.anchors.add_(0.8 * unit(c, 1, d, seed=3))
        if prior:
            method.expect(torch.tensor(prior))
    method.requires_grad_(False)
    before = ImageFeatures(unit(n, d, seed=4), unit(n, 5, d, seed=5))
    after = ImageFeatures(unit(n, d, seed=6), unit(n, 5, d, seed=7))
    return {"before": before, "after": after, "first": first, "method": method, "score": "las", "images": n}


def labels_of(scores: Tensor) -> list[int]:
    return [row.index(max(row)) for row in scores.tolist()]


def test_gather__against_plain_statements() -> None:
    made = example(prior=[0.5, 0.3, 0.2])
    found = gather(**made)
    scores = made["method"].score(made["after"], "las")
    old, new = labels_of(made["first"].score(made["before"], "global")), labels_of(scores)
    crops = [[sum(column) / 5 for column in zip(*image, strict=True)] for image in made["before"].crops.tolist()]

    def within(labels: list[int]) -> float:
        groups = [[row for row, label in zip(crops, labels, strict=True) if label == c] for c in set(labels)]
        return 1 - sum(spread(group) for group in groups) / spread(crops)

    shares = [[labels.count(c) / 30 for c in range(3)] for labels in (old, new)]
    assert found["structure"] == pytest.approx((within(new) - within(old)) / max(within(old), 0.01), rel=1e-4)
    assert found["images_a_class"] == pytest.approx(math.log(10))
    assert found["relabelled"] == pytest.approx(sum(a != b for a, b in zip(old, new, strict=True)) / 30)
    largest = [max(row) for row in made["method"].probabilities(scores).tolist()]
    assert found["confidence"] == pytest.approx(sum(largest) / 30, rel=1e-5)
    assert found["unevenness"] == pytest.approx(sum(abs(p - 1 / 3) for p in (0.5, 0.3, 0.2)) / 2, abs=1e-6)
    assert found["shift"] == pytest.approx(sum(abs(a - b) for a, b in zip(*shares, strict=True)) / 2)
    expected = zip(shares[1], (0.5, 0.3, 0.2), strict=True)
    assert found["off_prior"] == pytest.approx(sum(abs(a - b) for a, b in expected) / 2, abs=1e-6)
    assert -1 <= found["mixture"] <= 1
    assert set(verdict.POINTS) < set(found)


def test_gather__without_adaptation_says_nothing_changed() -> None:
    made = example()
    method = create_method(
        MethodSettings(name="fair"),
        TextFeatures(unit(3, 8, seed=1), unit(6, 8, seed=2), torch.arange(3).repeat_interleave(2)),
        logit_scale=10.0,
    ).requires_grad_(False)
    found = gather(**{**made, "method": method, "score": "global", "after": made["before"]})
    assert found["relabelled"] == found["structure"] == found["shift"] == found["mixture"] == 0
    assert found["anchors_kept"] == pytest.approx(1, abs=1e-5)


def test_gather__whole_images_without_crops() -> None:
    made = example()
    bare = {key: ImageFeatures(made[key].weak, made[key].weak[:, None][:, :0]) for key in ("before", "after")}
    found = gather(**{**made, **bare, "score": "global"})
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_gather__of_few_images_is_finite(n: int) -> None:
    assert all(math.isfinite(value) for value in gather(**example(n)).values())


def test_mean_margin__by_hand() -> None:
    """Two pairs at right angles, around their mean; each image is at -1 to the other pair's mean direction or so."""
    rows = np.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    right = mean_margin(rows, np.array([0, 0, 1, 1]))
    cosine = (1 - 0.01) / (1 + 0.01)  # with the other image of the pair
    apart = -1 / math.hypot(1, 0.1)  # with the mean of the other pair
    assert right == pytest.approx(cosine - apart)
    assert mean_margin(rows, np.array([0, 1, 0, 1])) < 0 < right
    assert mean_margin(rows, np.zeros(4, int)) == 0
    assert mean_margin(rows, np.arange(4)) == 0  # each alone with its label
    assert mean_margin(np.ones((4, 2)), np.array([0, 0, 1, 1])) == 0


@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(2, 5))
def test_mean_margin__is_bounded_and_blind_to_names_and_order(seed: int, n: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    features, labels, order = rng.normal(size=(n, 3)), rng.integers(classes, size=n), rng.permutation(n)
    found = mean_margin(features, labels)
    assert -2 <= found <= 2
    assert mean_margin(features[order], labels[order]) == pytest.approx(found, abs=1e-9)
    assert mean_margin(features + 3, rng.permutation(classes)[labels] * 2) == pytest.approx(found, abs=1e-6)


def test_anchors_kept__is_one_for_what_all_classes_share() -> None:
    anchors = np.random.default_rng(0).normal(size=(5, 8))
    assert anchors_kept(anchors, anchors + 7) == pytest.approx(1)
    assert anchors_kept(anchors, -anchors) == pytest.approx(-1)
    assert anchors_kept(anchors, np.ones((5, 8))) == 0


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6, unique=True), st.floats(-9, 9))
def test_steps__are_the_points_of_the_range_that_a_value_lies_in(edges: list[float], value: float) -> None:
    edges.sort()
    found = Steps(tuple(edges), tuple(range(len(edges) + 1)))(value)
    assert found == sum(value > edge for edge in edges)


def test_score__is_the_sum_of_what_each_piece_gives() -> None:
    usual = evidence()
    assert score_of(usual) == pytest.approx(verdict.CONSTANT + sum(verdict.POINTS[n](usual[n]) for n in verdict.POINTS))
    for name, steps in verdict.POINTS.items():
        assert len(steps.points) == len(steps.edges) + 1
        assert list(steps.edges) == sorted(set(steps.edges))
        assert len({score_of(evidence(**{name: edge})) for edge in (*steps.edges, np.inf)}) > 1


@pytest.mark.parametrize(("estimate", "call"), [(9.0, "helped"), (2.0, "unclear"), (-2.0, "hurt")])
def test_judge__calls_by_its_two_thresholds(estimate: float, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "POINTS", {"structure": Steps((-1.0, 3.0), (-2.0, 2.0, 9.0))})
    monkeypatch.setattr(verdict, "CONSTANT", 0.0)
    monkeypatch.setattr(verdict, "HELPED", 5.0)
    monkeypatch.setattr(verdict, "HURT", -1.0)
    found = judge(evidence(structure=estimate), images=10)
    assert found.call == call
    assert found.advice.endswith(".")


@pytest.mark.parametrize(
    ("structure", "favoured"), [(-0.9, "start"), (0.0, "start"), (0.2, "adapted"), (0.5, "adapted")]
)
def test_judge__favours_the_likelier_model(structure: float, favoured: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "POINTS", {"structure": Steps((-0.5, 0.1), (-3.0, 0.0, 0.01))})
    monkeypatch.setattr(verdict, "CONSTANT", 0.0)
    assert judge(evidence(structure=structure), images=10).favours == favoured


@pytest.mark.parametrize(
    ("name", "worse"),
    [("mixture", -0.3), ("off_prior", 0.5), ("text", -2.0), ("structure", -0.5)],
)
def test_judge__what_speaks_against_a_run(name: str, worse: float) -> None:
    """Labels that clusters and texts do not bear out, shares that nobody expected, an unsure model."""
    assert judge(evidence(**{name: worse}), images=10).score < judge(evidence(), images=10).score
    assert verdict.HURT < verdict.HELPED


def test_judge__a_collapse_is_hurt_and_a_clear_gain_is_helped() -> None:
    collapsed = evidence(structure=-0.9, mixture=-0.4, off_prior=0.6, mixtures_agree=0.7, text=-1.5)
    assert judge(collapsed, images=256).call == "hurt"
    gained = evidence(mixture=0.25, images_a_class=3.8, off_prior=0.03)
    found = judge(gained, images=256)
    assert (found.call, found.most, found.images) == ("helped", 30.0, 256)
    assert judge({**gained, "relabelled": 0.5}, images=256).call == "unclear"  # whole clusters may have got wrong names


def test_sample__is_bounded_drawn_by_the_seed_and_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:05d}" for number in range(2000)]
    chosen = sample(paths, seed=3)
    assert len(set(chosen)) == SAMPLE
    assert chosen == sorted(chosen)
    assert chosen == sample(paths, seed=3) != sample(paths, seed=4)
    assert sample(paths[:9], seed=3) == paths[:9]


@pytest.fixture
def fitted(photos: Path, tiny_backbone: Tiny) -> FineAlign:
    (photos / "torn.png").write_bytes(b"no image")
    return FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"))).fit(photos)


def test_judge_model__changes_nothing_of_the_model(fitted: FineAlign, photos: Path) -> None:
    images = list_images(photos)
    before, aside = fitted.predict_proba(photos / "red"), list(fitted.set_aside_)
    fitted.fit(photos)
    aside = list(fitted.set_aside_)
    assert len(aside) == 1
    found = judge_model(fitted, images)
    assert fitted.set_aside_ == aside
    assert np.array_equal(fitted.predict_proba(photos / "red"), before)
    assert found == judge_model(fitted, images)
    assert found.images == 25


def test_judge_model__nothing_learned_changes_nothing(photos: Path, tiny_backbone: Tiny) -> None:
    config = tiny_config(tiny_backbone("transformer"), prediction__score="global")
    model = FineAlign(CLASSES, config=config).unlearned()
    found = judge_model(model, list_images(photos))
    assert found.evidence["structure"] == pytest.approx(0, abs=1e-6)
    assert found.most == 0
    assert found.evidence["anchors_kept"] == pytest.approx(1, abs=1e-5)


def test_revert__is_the_start(fitted: FineAlign, photos: Path, tmp_path: Path) -> None:
    paths = list_images(photos / "red")
    start = [one.start_scores for one in predictions(fitted, paths, with_start=True)]
    adapted = fitted.predict_proba(photos / "red")
    fitted.revert().save(tmp_path / "model")
    for model in (fitted, FineAlign.load(tmp_path / "model", device="cpu", precision="fp32")):
        found = [one.scores for one in predictions(model, paths)]
        assert np.allclose(np.array(found), np.array(start), atol=1e-6)
    assert not np.allclose(fitted.predict_proba(photos / "red"), adapted)


def called(call: Any, score: float) -> Callable[..., Verdict]:
    def judged(*_: Any, **__: Any) -> Verdict:
        return Verdict(call, score, 40.0, "Do something.", {}, 24)

    return judged


@pytest.mark.parametrize(
    ("call", "score", "keep", "kept"),
    [
        ("hurt", -3.0, False, "start"),
        ("hurt", -3.0, True, "adapted"),
        ("unclear", 0.1, False, "adapted"),
        pytest.param("unclear", -0.1, False, "start", marks=pytest.mark.nightly),
        pytest.param("helped", 9.0, False, "adapted", marks=pytest.mark.nightly),
    ],
)
def test_adapt_into__uses_the_model_that_the_verdict_favours(
    call: str,
    score: float,
    keep: bool,
    kept: str,
    photos: Path,
    tiny_backbone: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_folder, "judge_model", called(call, score))
    model = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer")))
    summary = adapt_into(tmp_path / "run", model, photos, keep_adapted=keep)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert summary.kept == run["kept"] == kept
    assert summary.as_json()["method"] == run["method"] == "fair"  # what was run, whichever is kept
    assert summary.stopped == run["stopped"] == "all 3 epochs done; the last one is kept"
    assert (run["verdict"]["call"], run["verdict"]["favours"]) == (call, "adapted" if score > 0 else "start")
    assert summary.why_kept == run["why_kept"] != ""
    saved = FineAlign.load(tmp_path / "run", device="cpu", precision="fp32")
    assert saved.method_.__class__.__module__.endswith("cupl" if kept == "start" else "fair")
    assert np.allclose(saved.predict_proba(photos), model.predict_proba(photos), atol=1e-6)


def test_adapt_into__nothing_learned_has_no_verdict(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    model = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"), method__name="cupl"))
    assert adapt_into(tmp_path / "run", model, photos).verdict is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["verdict"] is None
