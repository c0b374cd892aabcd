"""Images that show none of the classes: what every way to predict says of them, refusing them, and the report."""

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from conftest import CLASSES, predictions, tiny_config, write_photos
from finealign import FineAlign
from finealign.errors import ConfigError
from finealign.images.listing import list_images
from finealign.method.strangers import StrangerModel, fit, p_none
from finealign.model.predictions import explained
from finealign.model.refusal import NONE_OF_THESE, check_reject, cutoff, read_reject
from finealign.run.adapt import adapt_into
from finealign.run.examples import EACH, Watch
from finealign.run.report import render
from finealign.serve.app import create_app
from finealign.types import Prediction, Reject
from test_cli import command, only_json, table
from test_report import Reader

Tiny = Callable[[str], str]
SHARES = [0.05, 0.25, 0.5, 0.9]
PRECISE = ["--device", "cpu", "--precision", "fp32"]


def fit_surely(weak: Tensor, mean_crops: Tensor | None, anchors: Tensor) -> StrangerModel:
    """What tells strangers, sure that there are some: about half the images, those that the texts claim least."""
    model = fit(weak, mean_crops, anchors)
    weights = torch.zeros_like(model.weights)
    weights[-1] = -2.0
    model = replace(model, weights=weights, bias=model.bias * 0, openness=torch.tensor(1.0))
    none = p_none(model, weak, mean_crops)
    return replace(model, quantiles=none.quantile(torch.linspace(0, 1, 101)), share=none.mean())


@contextmanager
def sure() -> Iterator[None]:
    """Within the context, models learn to tell strangers by ``fit_surely``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finealign.classifier.fit_strangers", fit_surely)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("strange") / "photos")


@pytest.fixture(scope="module")
def run(photos: Path, tiny_backbone: Tiny) -> Path:
    """A run whose model takes about half of its photos for strangers; nothing may write into it."""
    config = tiny_config(tiny_backbone("transformer"), training__epochs=2)
    with sure():
        adapt_into(photos.parent / "run", FineAlign(CLASSES, config=config), photos, keep_adapted=True)
    return photos.parent / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> FineAlign:
    return FineAlign.load(run, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def untold(run: Path) -> FineAlign:
    """The model as a release without strangers would have saved it."""
    return changed(FineAlign.load(run, device="cpu", precision="fp32"), strangers={})


def changed(model: FineAlign, **values: Any) -> FineAlign:
    model._become(replace(model.model_, **values))
    return model


def none_of(model: FineAlign, photos: Path) -> list[float]:
    found = [one.none for one in predictions(model, list_images(photos))]
    assert all(value is not None for value in found)
    return [value for value in found if value is not None]


# --- what may be asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("auto", "auto"), ("0.05", 0.05), (" .5 ", 0.5), ("1e-3", 0.001)]
)
def test_read_reject__valid(text: str | None, expected: Reject | None) -> None:
    assert read_reject(text) == expected


@pytest.mark.parametrize("text", ["", "Auto", "0", "1", "-0.1", "1.5", "nan", "inf", "5%", "none", "0,05", "x" * 1000])
def test_read_reject__anything_else_stops_and_tells_what_is_valid(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^reject: found .{1,110}\. Valid: auto, .* above 0 and below 1, as 0\.05"):
        read_reject(text)


@pytest.mark.parametrize("value", [True, False, 0, 1, "0.5", float("nan"), [0.5], np.float32(2)])
def test_check_reject__from_python(value: object) -> None:
    with pytest.raises(ConfigError, match="Valid: auto"):
        check_reject(value)


def test_check_reject__numbers_of_numpy_will_do() -> None:
    assert check_reject(np.float32(0.5)) == 0.5


# --- from which probability on ----------------------------------------------------------------------------------------


def test_cutoff__auto_is_even_odds_and_off_is_never(model: FineAlign, untold: FineAlign) -> None:
    assert cutoff(model.model_, "auto") == 0.5
    assert cutoff(model.model_, None) is None
    assert cutoff(untold.model_, None) is None


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("use", ["adapted", "start"])
def test_cutoff__a_share_refuses_about_so_many_of_the_images_adapted_to(
    run: Path, photos: Path, use: Any, share: float
) -> None:
    taken = FineAlign.load(run, use=use, device="cpu", precision="fp32")
    wanted = cutoff(taken.model_, share)
    assert wanted is not None
    refused = sum(value >= wanted for value in none_of(taken, photos))
    assert abs(refused - 24 * share) <= 1.5


def test_cutoff__a_model_that_cannot_tell_says_what_to_do(untold: FineAlign, photos: Path) -> None:
    for reject in ("auto", 0.05):
        with pytest.raises(ConfigError, match=r"\(fair\) cannot tell .* Adapt again so, or leave reject out"):
            untold.predict(photos, reject=reject)


def test_cutoff__a_method_that_trains_nothing(photos: Path, tiny_backbone: Tiny) -> None:
    config = tiny_config(tiny_backbone("transformer"), method__name="cupl")
    fitted = FineAlign(CLASSES, config=config).fit(photos)
    assert [one.none for one in predictions(fitted, list_images(photos)[:2])] == [None, None]
    with pytest.raises(ConfigError, match=r"\(cupl\) cannot tell .*Wanted: .* a method that trains"):
        cutoff(fitted.model_, "auto")


@pytest.mark.parametrize("images", ["few", "alike"])
def test_cutoff__images_too_few_or_alike_tell_nothing(run: Path, photos: Path, images: str) -> None:
    """There p_none is the same for every image, which would have all or none refused."""
    taken = FineAlign.load(run, device="cpu", precision="fp32")
    weak = taken.features(list_images(photos), crops=False)[0].weak
    weak = weak[:11] if images == "few" else weak[:1].expand(24, -1)
    unsure = fit(weak, None, taken.method_.classifier())
    assert not unsure.tells
    changed(taken, strangers={"adapted": unsure})
    assert predictions(taken, list_images(photos)[:1])[0].none is None
    with pytest.raises(ConfigError, match="at least 12 images that differ"):
        cutoff(taken.model_, 0.5)


@pytest.mark.parametrize("name", ["none of these", " None Of These"])
def test_cutoff__a_class_of_that_name_is_ambiguous(run: Path, name: str) -> None:
    taken = FineAlign.load(run, device="cpu", precision="fp32")
    changed(taken, texts=replace(taken.texts_, classes=("red", name, "blue")))
    with pytest.raises(ConfigError, match=r"A class is called .*another name for the class"):
        cutoff(taken.model_, "auto")
    assert cutoff(taken.model_, None) is None


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reject", ["auto", 0.25])
def test_predict__refuses_what_the_predictions_say(model: FineAlign, photos: Path, reject: Any) -> None:
    usual, found = model.predict(photos), model.predict(photos, reject=reject)
    wanted = cutoff(model.model_, reject)
    assert wanted is not None
    refused = np.array(none_of(model, photos)) >= wanted
    assert 0 < refused.sum() < 24
    assert set(found[refused]) == {NONE_OF_THESE}
    assert list(found[~refused]) == list(usual[~refused])
    assert set(usual) <= set(CLASSES)


def test_predict__an_unreadable_image_is_none_and_not_none_of_these(
    model: FineAlign, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    with pytest.warns(UserWarning, match="1 of 25 images could not be read") as warned:
        found = model.predict([tmp_path / "torn.png", *list_images(photos)], reject=0.9)
    assert warned[0].filename == __file__
    assert found[0] is None
    assert (found == NONE_OF_THESE).sum() >= 20


def test_predict__a_wrong_value_stops_before_any_image_is_looked_for(model: FineAlign, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reject: found 2\. Valid: auto"):
        model.predict(tmp_path / "nowhere", reject=2)


@pytest.mark.parametrize("score", ["las", "global", "fused"])
def test_explain__says_the_same_as_predict(model: FineAlign, photos: Path, score: Any) -> None:
    path = list_images(photos)[5]
    (predicted,) = predictions(model, [path], score=score)
    found = model.predictor_.explain_file(path, score=score)
    assert found.none == pytest.approx(predicted.none, abs=1e-5)
    assert explained(found, CLASSES, 2)["none"] == round(found.none or 0, 6)


def test_explain__without_knowing(untold: FineAlign, photos: Path) -> None:
    found = untold.explain(list_images(photos)[0])
    assert found.none is None
    assert explained(found, CLASSES, 2, refused_from=0.0)["label"] in CLASSES


# --- the command ------------------------------------------------------------------------------------------------------


def test_command__reject_labels_so_and_says_how_many(run: Path, photos: Path) -> None:
    usual = table(command("predict", run, photos, *PRECISE, "--top-k", "2").stdout)
    result = command("predict", run, photos, *PRECISE, "--top-k", "2", "--reject", "auto")
    rows = table(result.stdout)
    refused = [row for row in rows if float(row["none"]) >= 0.5]
    assert 0 < len(refused) < 24
    for row, before in zip(rows, usual, strict=True):
        assert row["none"] == before["none"]
        if row in refused:
            assert (row["label"], row["confidence"]) == (NONE_OF_THESE, row["none"])
            assert (row["label_2"], row["confidence_2"]) == (before["label"], before["confidence"])
        else:
            assert row == before
    assert f"{len(refused)} of 24 are 'none of these' (--reject auto)." in result.stderr
    found = only_json(command("predict", run, photos, *PRECISE, "--reject", "auto", "--json"))
    assert found["refused"] == len(refused)
    assert [one["label"] for one in found["predictions"]] == [row["label"] for row in rows]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_command__reject_a_share_into_a_file(run: Path, photos: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"labels{ending}"
    found = only_json(command("predict", run, photos, *PRECISE, "--reject", "0.25", "--out", out, "--json"))
    assert abs(found["refused"] - 6) <= 1
    if ending == ".csv":
        labels = [row["label"] for row in table(out.read_text(encoding="utf-8"))]
    elif ending == ".jsonl":
        labels = [json.loads(line)["label"] for line in out.read_text(encoding="utf-8").splitlines()]
    else:
        labels = pytest.importorskip("pyarrow.parquet").read_table(out)["label"].to_pylist()
    assert labels.count(NONE_OF_THESE) == found["refused"]


def test_command__a_model_that_cannot_tell_stops_before_it_writes(
    untold: FineAlign, photos: Path, tmp_path: Path
) -> None:
    untold.save(tmp_path / "model")
    rows = table(command("predict", tmp_path / "model", photos, *PRECISE).stdout)
    assert {row["none"] for row in rows} == {""}
    out = tmp_path / "labels.csv"
    result = command("predict", tmp_path / "model", photos, *PRECISE, "--reject", "auto", "--out", out)
    assert result.exit_code == 1
    assert "cannot tell images that show none of the classes" in result.stderr
    assert not out.exists()
    assert command("serve", tmp_path / "model", *PRECISE, "--reject", "auto").exit_code == 1


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reject", [None, "auto"])
def test_server__answers_what_the_model_makes_of_it(model: FineAlign, photos: Path, reject: Any) -> None:
    labels = set()
    with TestClient(create_app(model, reject=reject), base_url="http://localhost") as client:
        assert client.get("/model").json()["refused_from"] == (None if reject is None else 0.5)
        for path in list_images(photos):
            answer = client.post("/predict?top_k=3", files={"file": path.read_bytes()}).json()
            is_refused = reject is not None and answer["none"] >= 0.5
            assert (answer["label"] == NONE_OF_THESE) == is_refused
            assert len(answer["top"]) == 3
            assert answer["start"]["label"] in CLASSES
            labels.add(answer["label"])
    assert (NONE_OF_THESE in labels) == (reject is not None)
    assert labels & set(CLASSES)


def test_server__a_model_that_cannot_tell_is_refused_at_once(untold: FineAlign, photos: Path) -> None:
    with pytest.raises(ConfigError, match="cannot tell"):
        create_app(untold, reject=0.5)
    with TestClient(create_app(untold), base_url="http://localhost") as client:
        answer = client.post("/predict", files={"file": list_images(photos)[0].read_bytes()}).json()
    assert answer["none"] is None


# --- the run ----------------------------------------------------------------------------------------------------------


def test_run__counts_them_and_shows_the_likeliest(run: Path, photos: Path, model: FineAlign) -> None:
    none = none_of(model, photos)
    rows = list(csv.DictReader(io.StringIO((run / "predictions.csv").read_text(encoding="utf-8"))))
    assert list(rows[0])[-1] == "none"
    assert [float(row["none"]) for row in rows] == pytest.approx(none, abs=1e-5)
    likely = sum(value >= 0.5 for value in none)
    told = json.loads((run / "run.json").read_text(encoding="utf-8"))["strangers"]
    assert told == {"share": pytest.approx(np.mean(none), abs=1e-5), "likely": likely}
    shown = json.loads((run / "examples" / "examples.json").read_text(encoding="utf-8"))["strangers"]
    assert len(shown) == min(EACH, likely) > 0
    values = [one["none"] for one in shown]
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(sorted(none, reverse=True)[: len(shown)], abs=1e-5)
    text = Reader((run / "report.html").read_text(encoding="utf-8")).text
    assert f"{likely} of 24 images seem to show none of the classes" in text
    assert f"the estimated share of such images is {told['share']:.1%}" in text
    assert "--reject auto" in text
    assert f"none of the classes {values[0]:.1%}" in text


def test_adapt__tells_a_person_of_them(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    options = ["--classes", ",".join(CLASSES), "--backbone", tiny_backbone("transformer"), *PRECISE, "--keep-adapted"]
    options += ["--set", "views.crops=2", "--set", "training.epochs=1", "--set", "training.anchor_steps=0"]
    with sure():
        result = command("adapt", photos, *options, "--out", tmp_path / "run")
    likely = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["strangers"]["likely"]
    assert f"{likely} of 24 images seem to show none of the classes; finealign predict" in result.stdout
    assert "IMAGES --reject auto labels such images so." in result.stdout


@pytest.mark.parametrize("strangers", ["none", "unknown", "of an earlier version"])
def test_report__without_any(run: Path, tmp_path: Path, strangers: str) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    told = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    listed = json.loads((copy / "examples" / "examples.json").read_text(encoding="utf-8"))
    listed["strangers"] = []
    if strangers == "of an earlier version":
        del told["strangers"], listed["strangers"]
        for example in (example for kind in listed.values() for example in kind):
            del example["none"]
    else:
        told["strangers"] = {"share": 0.004, "likely": 0} if strangers == "none" else None
    (copy / "run.json").write_text(json.dumps(told), encoding="utf-8")
    (copy / "examples" / "examples.json").write_text(json.dumps(listed), encoding="utf-8")
    found = Reader(render(copy))
    assert ("No image seems to" in found.text) == (strangers == "none")
    assert ("strangers" in found.ids) == (strangers == "none")
    assert "seem to show none of the classes" not in found.text


def made_up(none: list[float | None]) -> list[Prediction]:
    even = np.array([0.5, 0.5], dtype=np.float32)
    return [Prediction(Path(f"{n}.png"), even, even, none=value) for n, value in enumerate(none)]


@pytest.mark.parametrize("count", [0, 1, 30])
def test_watch__keeps_the_likeliest_strangers(count: int) -> None:
    none = [float(value) for value in np.random.default_rng(count).random(count)]
    watch = Watch()
    assert len(list(watch.over(made_up(list(none))))) == count
    likely = sorted((n for n in range(count) if none[n] >= 0.5), key=lambda n: -none[n])
    assert watch.chosen["strangers"] == [Path(f"{n}.png") for n in likely[:EACH]]
    if count:
        assert watch.strangers is not None
        assert watch.strangers.likely == len(likely)
        assert watch.strangers.share == pytest.approx(np.mean(none))
    else:
        assert watch.strangers is None


def test_watch__a_model_that_cannot_say_counts_none() -> None:
    watch = Watch()
    list(watch.over(made_up([None, None])))
    assert watch.strangers is None
    assert watch.chosen["strangers"] == []
