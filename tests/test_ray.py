"""Labelling by Ray Data: the callable by itself, and on a cluster that loses a worker."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import CLASSES, HANG, tiny_config, write_photos
from finealign.classifier import FineAlign
from finealign.errors import ConfigError, ImageInputError
from finealign.integrations.ray import Predictor

ROWS = 24  # in the cluster's test, by batches of four


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[[str], str]) -> Path:
    """The folder of a saved model, with the photos beside it."""
    folder = tmp_path_factory.mktemp("ray")
    write_photos(folder / "photos")
    config = tiny_config(tiny_backbone("transformer"), training__epochs=1)
    FineAlign(CLASSES, config=config).fit(folder / "photos").save(folder / "model")
    return folder


def photos_in(fitted: Path) -> list[Path]:
    return sorted((fitted / "photos").rglob("*.png"))


def objects(values: list[Any]) -> Any:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def test_predictor__labels_bytes_and_paths_as_predict_does_and_keeps_other_columns(fitted: Path) -> None:
    paths = photos_in(fitted)[::3]
    by_model = FineAlign.load(fitted / "model")
    predictor = Predictor(fitted / "model", top_k=2)
    read = objects([path.read_bytes() for path in paths])
    by_bytes = predictor({"bytes": read, "number": np.arange(len(paths))})
    by_paths = predictor({"path": np.array([str(path) for path in paths])})
    assert list(by_bytes) == ["number", "label", "confidence", "label_2", "confidence_2", "none", "reason"]
    assert next(iter(by_paths)) == "path" and list(by_paths["path"]) == list(map(str, paths))
    probabilities = by_model.predict_proba(paths)
    for told in (by_bytes, by_paths):
        assert list(told["label"]) == list(by_model.predict(paths))
        assert np.allclose(told["confidence"], probabilities.max(1), atol=1e-6)
        assert np.allclose(told["confidence_2"], np.sort(probabilities)[:, -2], atol=1e-6)
        assert set(told["reason"]) == {""}
    none = [outcome.none for outcome in by_model.iter_predictions(paths)]  # type: ignore[union-attr]
    assert np.allclose(by_bytes["none"], np.array(none, dtype=float), atol=1e-6, equal_nan=True)


def test_predictor__an_image_that_cannot_be_read_is_a_row_with_the_reason(fitted: Path) -> None:
    good = photos_in(fitted)[0]
    images = [
        good.read_bytes(),
        b"",
        b"no image at all",
        None,
        str(good),
        str(good.parent / "gone.png"),
        "s3://b/1.jpg",
    ]
    told = Predictor(fitted / "model", column="image")({"image": objects(images)})
    assert [bool(reason) for reason in told["reason"]] == [False, True, True, True, False, True, True]
    for label, confidence, none, reason in zip(
        told["label"], told["confidence"], told["none"], told["reason"], strict=True
    ):
        assert (label in CLASSES) == (not reason)
        assert math.isnan(confidence) == bool(reason)
        assert not reason or math.isnan(none)
    assert "no such file" in told["reason"][5] and "read_binary_files" in told["reason"][6]


def test_predictor__takes_pixels_and_batches_of_none(fitted: Path) -> None:
    predictor = Predictor(fitted / "model", column="image")
    pixels = np.zeros((2, 40, 40, 3), np.uint8)
    told = predictor({"image": pixels, "id": np.array([7, 8])})
    assert "image" not in told and list(told["id"]) == [7, 8] and set(told["label"]) <= set(CLASSES)
    empty = predictor({"image": objects([]), "id": np.array([], int)})
    assert {len(values) for values in empty.values()} == {0}
    assert {"label", "confidence", "none", "reason", "id"} <= set(empty)


def test_predictor__low_confidence_is_unsure_as_from_python(fitted: Path) -> None:
    paths = photos_in(fitted)[:5]
    told = Predictor(fitted / "model", min_confidence=1.0)({"path": np.array(list(map(str, paths)))})
    assert list(told["label"]) == list(FineAlign.load(fitted / "model").predict(paths, min_confidence=1.0))
    assert "unsure" in told["label"]


@pytest.mark.parametrize(
    ("batch", "how", "says"),
    [
        ({"uri": np.array(["a"])}, {}, "uri"),
        ({"path": np.array(["a"])}, {"column": "paht"}, "Valid: path"),
        ({"path": np.array(["a"]), "label": np.array(["x"])}, {}, "'label'"),
        ([1, 2], {}, "batch_format"),
    ],
    ids=["no column of images", "a name that is not there", "a column that would be lost", "another format"],
)
def test_predictor__a_batch_that_it_cannot_label_is_refused(
    fitted: Path, batch: Any, how: dict[str, Any], says: str
) -> None:
    with pytest.raises(ImageInputError, match=says):
        Predictor(fitted / "model", **how)(batch)


def test_predictor__a_bad_setting_is_refused_at_once(fitted: Path) -> None:
    for how in ({"top_k": 0}, {"score": "best"}, {"min_confidence": 2}, {"reject": 3}):
        with pytest.raises(ConfigError, match=r"[Vv]alid"):
            Predictor(fitted / "model", **how)


# A worker of the cluster that dies once, in the middle, as if its machine had been lost.
CLUSTER = """
import json, os, signal, sys
import ray
from finealign.integrations.ray import Predictor

folder, rows = sys.argv[1], int(sys.argv[2])

class Mortal(Predictor):
    def __call__(self, batch):
        told = super().__call__(batch)
        seen = f"{folder}/by-{os.getpid()}"
        with open(seen, "a") as file:
            file.write("x")
        if os.path.getsize(seen) == 2:  # whoever comes to its second batch first dies of it; the others live
            try:
                os.close(os.open(f"{folder}/died", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return told

ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
photos = sorted(f"{folder}/photos/{path}" for path in json.load(open(f"{folder}/photos.json")))
table = ray.data.from_items([{"path": photos[i % len(photos)], "number": i} for i in range(rows)])
found = table.repartition(rows // 4).map_batches(
    Mortal, fn_constructor_args=[f"{folder}/model"], batch_size=4, concurrency=2, num_cpus=1
)
with open(f"{folder}/rows.json", "w") as file:  # Ray has words of its own for the screen
    json.dump([[row["number"], row["path"], row["label"]] for row in found.take_all()], file)
"""


@pytest.mark.nightly  # a cluster takes a minute and more to start
def test_cluster__a_worker_that_is_killed_midway_loses_no_image_and_doubles_none(fitted: Path) -> None:
    pytest.importorskip("ray.data")
    paths = photos_in(fitted)
    names = [str(path.relative_to(fitted / "photos")) for path in paths]
    (fitted / "photos.json").write_text(json.dumps(names), encoding="utf-8")
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_raylet_start_wait_time_s": str(HANG),
        "RAY_worker_niceness": "0",  # by its default of 15, workers would starve beside other tests
    }
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(fitted), str(ROWS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3 * HANG,  # two processes at once import torch
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((fitted / "rows.json").read_text(encoding="utf-8"))
    assert (fitted / "died").exists()  # or nothing was shown
    assert len(list(fitted.glob("by-*"))) >= 2
    assert sorted(number for number, _, _ in rows) == list(range(ROWS))
    labels = dict(zip(map(str, paths), FineAlign.load(fitted / "model").predict(paths), strict=True))
    assert all(label == labels[path] for _, path, label in rows)
