"""The judge without labels: its evidence against plain statements, its calls, and what a run does with them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import CLASSES, predictions, tiny_config
from finealign import FineAlign
from finealign.images.listing import list_images
from finealign.model.calibration import SAMPLE, sample
from finealign.run import adapt as run_folder
from finealign.run import verdict
from finealign.run.adapt import adapt_into
from finealign.run.verdict import Verdict, anchors_kept, explained_variance, gather, judge, judge_model

Tiny = Callable[[str], str]


def spread(rows: list[list[float]]) -> float:
    """Sum of squared distances from the mean, in plain Python."""
    middle = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    found: float = sum((value - mean) ** 2 for row in rows for value, mean in zip(row, middle, strict=True))
    return found


@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 5))
def test_explained_variance__is_one_less_what_is_left_within_the_classes(seed: int, n: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    features, labels = rng.normal(size=(n, 3)), rng.integers(classes, size=n)
    within = sum(spread(features[labels == c].tolist()) for c in set(labels.tolist()))
    assert explained_variance(features, labels) == pytest.approx(1 - within / spread(features.tolist()))


def test_explained_variance__degenerate() -> None:
    features = np.arange(8.0).reshape(4, 2)
    assert explained_variance(features, np.zeros(4, int)) == pytest.approx(0)
    assert explained_variance(features, np.arange(4)) == pytest.approx(1)
    assert explained_variance(np.ones((4, 2)), np.arange(4)) == 0


def evidence(**values: float) -> dict[str, float]:
    usual = {"structure": 0.2, "images_a_class": 3.0, "confidence": 0.8, "anchors_kept": 0.8}
    return {**usual, "relabelled": 0.3, **values}


def test_gather__by_hand() -> None:
    """Four images in two clusters: the start took one for the wrong class, the adapted model does not."""
    crops = np.array([[0.0, 0], [0, 2], [10, 0], [10, 2]])
    start = np.array([[3.0, 1], [1, 2], [1, 2], [0, 5]])  # labels 0 1 1 1
    end = np.array([[3.0, 1], [4, 1], [1, 2], [0, 5]])  # labels 0 0 1 1
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.0, 1.0]])
    before_anchors, after_anchors = np.array([[1.0, 0], [0, 1]]), np.array([[1.0, 0], [0.6, 0.8]])
    found = gather(
        crops=crops,
        start=start,
        end=end,
        end_probabilities=probabilities,
        start_anchors=before_anchors,
        end_anchors=after_anchors,
        images=40,
    )
    total = spread(crops.tolist())
    before = 1 - (0 + spread(crops[1:].tolist())) / total
    after = 1 - (spread(crops[:2].tolist()) + spread(crops[2:].tolist())) / total
    assert found["structure"] == pytest.approx(after / before - 1)
    assert found["images_a_class"] == pytest.approx(math.log(20))
    assert found["relabelled"] == 0.25
    assert found["confidence"] == pytest.approx((0.9 + 0.8 + 0.7 + 1.0) / 4)
    # Less their mean, the start's two are (1, -1) / 2 and its opposite; the new ones (0.4, -0.8) / 2 and its opposite.
    assert found["anchors_kept"] == pytest.approx((0.4 + 0.8) / math.sqrt(2 * (0.4**2 + 0.8**2)))
    assert set(verdict.WEIGHTS) < set(found)


def test_anchors_kept__is_one_for_what_all_classes_share() -> None:
    anchors = np.random.default_rng(0).normal(size=(5, 8))
    assert anchors_kept(anchors, anchors + 7) == pytest.approx(1)
    assert anchors_kept(anchors, -anchors) == pytest.approx(-1)
    assert anchors_kept(anchors, np.ones((5, 8))) == 0


@pytest.mark.parametrize(("estimate", "call"), [(9.0, "helped"), (2.0, "unclear"), (-2.0, "hurt")])
def test_judge__calls_by_its_two_thresholds(estimate: float, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "WEIGHTS", {"structure": 1.0})
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
    monkeypatch.setattr(verdict, "WEIGHTS", {"structure": 1.0})
    monkeypatch.setattr(verdict, "CONSTANT", 0.0)
    assert judge(evidence(structure=structure), images=10).favours == favoured


@pytest.mark.parametrize(("name", "worse"), [("structure", -0.5), ("images_a_class", 1.0), ("anchors_kept", 0.1)])
def test_judge__what_speaks_against_a_run(name: str, worse: float) -> None:
    """Labels that leave the images' structure, few images a class, anchors far from their texts."""
    assert judge(evidence(**{name: worse}), images=10).score < judge(evidence(), images=10).score
    assert verdict.HURT < verdict.HELPED


def test_judge__a_collapse_is_hurt_and_a_clear_gain_is_helped() -> None:
    collapsed = evidence(structure=-0.9, confidence=1.0, anchors_kept=0.1)
    assert judge(collapsed, images=256).call == "hurt"
    gained = evidence(structure=0.5, images_a_class=4.5, confidence=0.85, anchors_kept=0.7)
    found = judge(gained, images=256)
    assert (found.call, found.most, found.images) == ("helped", 30.0, 256)


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
        ("unclear", -0.1, False, "start"),
        ("helped", 9.0, False, "adapted"),
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
