"""Saved models live on: one of an earlier release opens and predicts as it did, whatever training is called today."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from conftest import CLASSES, predictions, tiny_config, write_photos
from finealign import FineAlign
from finealign.errors import ModelError
from finealign.images.listing import list_images
from finealign.method.registry import find_method, method_names
from finealign.model.folder import read_model

Tiny = Callable[[str], str]
DATA = Path(__file__).parent / "data"
OLD = DATA / "model-format-1"  # saved by finealign 0.1.0


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """The images that the old release predicted, one of them larger than the working size."""
    folder = write_photos(tmp_path / "photos", each=4)
    pixels = np.random.default_rng(7).integers(0, 256, (150, 210, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "red" / "large.png")
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return shutil.copytree(OLD, tmp_path / "old")


def test_load__a_model_of_format_1_predicts_what_it_did(album: Path) -> None:
    """To 1e-5, as other processors round otherwise; the larger photo is looked at in full, as it was then."""
    expected = json.loads((DATA / "model-format-1.json").read_text(encoding="utf-8"))
    model = FineAlign.load(OLD, device="cpu", precision="fp32")
    paths = list_images(album)
    assert [path.relative_to(album).as_posix() for path in paths] == expected["files"]
    for score in ("las", "fused", "global"):
        np.testing.assert_allclose(model.predict_proba(album, score=score), expected[score], rtol=0, atol=1e-5)
    start = [prediction.start_probabilities for prediction in predictions(model, paths, with_start=True)]
    np.testing.assert_allclose(start, expected["start"], rtol=0, atol=1e-5)
    assert model.model_.learned.startswith("scale and shift")


def test_save__an_old_model_is_saved_in_todays_format_and_stays_the_same(album: Path, tmp_path: Path) -> None:
    model = FineAlign.load(OLD, device="cpu", precision="fp32")
    model.save(tmp_path / "new")
    manifest = json.loads((tmp_path / "new" / "finealign.json").read_text(encoding="utf-8"))
    assert manifest["format"] == 2
    assert manifest["training"]["training"]["epochs"] == 3  # the record of how it was trained goes along
    again = FineAlign.load(tmp_path / "new", device="cpu", precision="fp32")
    np.testing.assert_array_equal(again.predict_proba(album), model.predict_proba(album))


@pytest.mark.parametrize("section", ["training", "data", "views", ""])
def test_load__settings_of_training_may_be_renamed(old: Path, album: Path, section: str) -> None:
    """Of format 1 too: what a predictor does not need may have any name and any value."""
    before = FineAlign.load(old, device="cpu", precision="fp32").predict_proba(album)
    path = old / "finealign.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    settings = manifest["config"][section] if section else manifest["config"]
    settings["a_setting_of_another_release"] = {"unknown": [1, 2]}
    manifest["config"]["training"].pop("anchor_steps")
    manifest["config"]["method"]["fairness_window"] = "renamed"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    np.testing.assert_array_equal(FineAlign.load(old, device="cpu", precision="fp32").predict_proba(album), before)


@pytest.mark.parametrize("method", [name for name in method_names() if name != "microclip"])
def test_load__no_setting_of_training_is_read(photos: Path, tiny_backbone: Tiny, tmp_path: Path, method: str) -> None:
    """Every method can be read back from what inference needs alone: the record of training may be anything."""
    config = tiny_config(tiny_backbone("transformer"), training__epochs=1, method__name=method)
    needed = find_method(method).known_labels == "needed"
    labels = {"red/0.png": "red", "red/1.png": "red", "blue/0.png": "blue"} if needed else None
    model = FineAlign(CLASSES, config=config).fit(photos, labels=labels)
    model.save(tmp_path / "model")
    path = tmp_path / "model" / "finealign.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["training"] = {"all": "of it", "was": ["renamed"]}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    loaded = FineAlign.load(tmp_path / "model", device="cpu", precision="fp32")
    np.testing.assert_array_equal(loaded.predict_proba(photos), model.predict_proba(photos))
    tensors = load_file(tmp_path / "model" / "finealign.safetensors")
    held = {name.removeprefix("method.") for name in tensors if name.startswith("method.")}
    assert held == model.method_.inference_tensors().keys()


def test_load__a_format_before_the_last_is_refused_with_what_to_do(old: Path) -> None:
    path = old / "finealign.json"
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(manifest | {"format": 0}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"is of format 0; this version, .*, reads formats 1 and 2\. Adapt again"):
        FineAlign.load(old, device="cpu")


def test_read_model__working_size_is_what_training_reduced_to(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    import torch

    config = tiny_config(tiny_backbone("convolutional"), data__working_size=40)
    FineAlign(CLASSES, config=config).unlearned().save(tmp_path / "model")
    assert read_model(tmp_path / "model", device=torch.device("cpu"), precision="fp32").inference.working_size == 40
