"""A run ends without encoding again what it has just encoded: its predictions are those of the model that it saves."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import CLASSES, predictions, tiny_config
from finealign.classifier import FineAlign
from finealign.errors import display_path
from finealign.model.inference import Predictor
from finealign.run import adapt as run
from finealign.run.adapt import adapt_into
from finealign.types import Prediction

Tiny = Callable[[str], str]
FAIR: dict[str, Any] = {"training__epochs": 2, "training__anchor_steps": 4, "training__anchor_batch_size": 8}
# The same in two blocks, of which the first pass and the last see all images.
IN_BLOCKS = FAIR | {"training__epochs": 1, "views__refresh_epochs": 0.5}


@pytest.fixture
def mixed(photos: Path) -> Path:
    """Photos of which one is black and one is none."""
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(photos / "green" / "3a.png")
    (photos / "red" / "7a.png").write_bytes(b"no image")
    return photos


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The images that are read and encoded outside training, as they come."""
    seen: list[Any] = []
    encode = Predictor._encoded

    def watched(self: Predictor, paths: Any, looks: Any) -> Iterator[Any]:
        for outcomes, features in encode(self, paths, looks):
            seen.extend(outcomes)
            yield outcomes, features

    monkeypatch.setattr(Predictor, "_encoded", watched)
    return seen


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def refuse_others(row: dict[str, str], wanted: Prediction) -> None:
    """The row has the two best classes of the prediction, and the best one of the start."""
    best = np.argsort(-wanted.probabilities, kind="stable")[:2]
    assert (row["label"], row["label_2"]) == tuple(CLASSES[index] for index in best)
    assert float(row["confidence"]) == pytest.approx(wanted.probabilities[best[0]], abs=2e-5)
    assert wanted.start_probabilities is not None
    assert row["start_label"] == CLASSES[int(wanted.start_probabilities.argmax())]
    assert float(row["start_confidence"]) == pytest.approx(wanted.start_probabilities.max(), abs=2e-5)
    assert float(row["none"]) == pytest.approx(wanted.none, abs=2e-5)


@pytest.mark.parametrize("settings", [FAIR, IN_BLOCKS], ids=["epochs", "blocks"])
@pytest.mark.parametrize("use", ["adapted", "start"])
def test_adapt_into__predictions_are_those_of_the_saved_model_and_encode_nothing(
    mixed: Path,
    tiny_backbone: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoded: list[Any],
    settings: dict[str, Any],
    use: Any,
) -> None:
    monkeypatch.setattr(run, "_favoured", lambda verdict: (use, "as the test says"))
    config = tiny_config(tiny_backbone("transformer"), prediction__calibrate=True, **settings)
    summary = adapt_into(tmp_path / "run", FineAlign(CLASSES, config=config), mixed)
    assert encoded == []
    assert summary.images == 25 and len(summary.set_aside) == 1
    assert summary.blank.startswith("1 image is all but black") and "3a.png" in summary.blank
    loaded = FineAlign.load(tmp_path / "run", device="cpu", precision="fp32")
    assert loaded.use_ == use
    rows = rows_of(tmp_path / "run")
    wanted = predictions(loaded, sorted(mixed.rglob("*.png")), with_start=True)
    assert [display_path(one.path) for one in wanted] == list(rows)
    for one in wanted:
        refuse_others(rows[display_path(one.path)], one)


@pytest.mark.parametrize(
    "settings",
    [
        {"training__last_label_pass": False},
        {"method__name": "dpa", "training__anchor_steps": 0},
        {"training__encoder": "frozen"},
        {"training__block_images": 8, "training__batch_size": 4, "training__epochs": 1},
        {"method__name": "cupl", "training__anchor_steps": "auto"},
    ],
    ids=str,
)
def test_adapt_into__predictions_are_those_of_the_saved_model_where_they_have_to_be_encoded(
    mixed: Path, tiny_backbone: Tiny, tmp_path: Path, encoded: list[Any], settings: dict[str, Any]
) -> None:
    config = tiny_config(tiny_backbone("transformer"), **(FAIR | settings))
    summary = adapt_into(tmp_path / "run", FineAlign(CLASSES, config=config), mixed, keep_adapted=True)
    assert len(encoded) >= 25 and summary.images == 25 and len(summary.set_aside) == 1
    wanted = predictions(summary.model, sorted(mixed.rglob("*.png")), with_start=True)
    rows = rows_of(tmp_path / "run")
    assert [display_path(one.path) for one in wanted] == list(rows)
    for one in wanted if settings.get("method__name") != "cupl" else ():
        refuse_others(rows[display_path(one.path)], one)


def test_adapt_into__a_run_cut_after_its_last_step_is_resumed_without_encoding(
    mixed: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[Any]
) -> None:
    config = tiny_config(tiny_backbone("transformer"), **FAIR)
    whole = adapt_into(tmp_path / "whole", FineAlign(CLASSES, config=config), mixed)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "judge_model", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        adapt_into(tmp_path / "cut", FineAlign(CLASSES, config=config), mixed)
    resumed = adapt_into(tmp_path / "cut", FineAlign(CLASSES, config=config), mixed, resume=True)
    assert encoded == []
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert resumed.verdict == whole.verdict


def test_fit__a_sample_is_judged_by_what_was_encoded(
    photos: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch, encoded: list[Any]
) -> None:
    """The features after adaptation are those that ``features`` gives, and the files of a fit without a folder go."""
    monkeypatch.setattr("finealign.model.calibration.SAMPLE", 7)
    monkeypatch.setattr("finealign.classifier.SAMPLE", 7)
    model = FineAlign(
        CLASSES, config=tiny_config(tiny_backbone("transformer"), **FAIR, prediction__calibrate=True)
    ).fit(photos)
    before, after = model.sampled_features(model.paths_)
    assert encoded == [] and model._seen is None
    assert len(before.weak) == len(after.weak) == 7
    assert model.calibration_ is not None and model.calibration_.images == 24  # calibrated by all that were encoded
    paths = [model.paths_[index] for index in np.random.default_rng(0).choice(24, 7, replace=False)]
    fresh, start = model.features(sorted(paths))[0], model.features(sorted(paths), at_start=True, crops=False)[0]
    np.testing.assert_allclose(after.weak, fresh.weak, atol=1e-5)
    np.testing.assert_allclose(before.weak, start.weak, atol=1e-5)
    if after.crops.shape[1]:
        np.testing.assert_allclose(after.crops, fresh.crops, atol=1e-5)
