"""The shares that a model expects: given or estimated at adapt, recorded, and taken out again for other images."""

import csv
import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from conftest import CLASSES, predictions, tiny_config, write_photos
from finealign import FineAlign
from finealign.cli import app
from finealign.config import read_config
from finealign.errors import ConfigError, ModelError
from finealign.export.checks import Format
from finealign.export.run import export
from finealign.images.decoding import read_image
from finealign.images.listing import list_images
from finealign.model.folder import MANIFEST, TENSORS
from finealign.model.shares import shares_in_words, told_shares
from finealign.run.adapt import adapt_into
from finealign.run.report import render
from finealign.serve.app import create_app
from finealign.types import Score

Tiny = Callable[[str], str]
OLD = Path(__file__).parent / "data" / "model-format-1"
GIVEN = {"red": 0.7, "green": 0.25, "blue": 0.05}
IMAGES = 24


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that nothing may write to."""
    return write_photos(tmp_path_factory.mktemp("album") / "photos")


def adapted(backbone: str, album: Path, **settings: Any) -> FineAlign:
    quick = {"training__epochs": 1, "training__anchor_steps": 2}
    return FineAlign(CLASSES, config=tiny_config(backbone, **(quick | settings))).fit(album)


@pytest.fixture(scope="module")
def uneven(album: Path, tiny_backbone: Tiny) -> FineAlign:
    """A model that was taught uneven shares, with a temperature."""
    settings = {"method__class_prior": GIVEN, "prediction__calibrate": True}
    return adapted(tiny_backbone("transformer"), album, **settings)


@pytest.fixture(scope="module")
def saved(uneven: FineAlign, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    uneven.save(folder)
    return folder


def load(folder: Path, **how: Any) -> FineAlign:
    return FineAlign.load(folder, device="cpu", precision="fp32", **how)


def offset(share: float, logit_scale: float, images: int = IMAGES, classes: int = 3) -> float:
    """What a class's score is too high by, stated plainly."""
    return math.log(classes * (images * share + 1) / (images + classes)) / logit_scale


def scores(model: FineAlign, album: Path | list[Path], score: Score | None = None) -> Any:
    return np.stack([one.scores for one in predictions(model, list_images(album), score=score)])


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["las", "global", "fused"])
def test_even__scores_labels_and_probabilities_follow_the_formula(saved: Path, album: Path, score: Score) -> None:
    folder, even = load(saved), load(saved, class_prior="even")
    assert (folder.class_prior_, even.class_prior_) == ("folder", "even")
    scale, plain = folder.method_.logit_scale, scores(folder, album, score)
    expected = plain - np.array([offset(GIVEN[name], scale) for name in CLASSES])
    np.testing.assert_allclose(scores(even, album, score), expected, rtol=0, atol=1e-6)
    assert not np.allclose(expected, plain, atol=1e-4)
    logits = scale * expected / folder.model_.temperature(score)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = even.predict_proba(album, score=score)
    np.testing.assert_allclose(probabilities, powers / powers.sum(1, keepdims=True), rtol=0, atol=1e-4)
    assert list(even.predict(album, score=score)) == [CLASSES[index] for index in expected.argmax(1)]


def test_folder__scores_are_the_methods_own(uneven: FineAlign, album: Path) -> None:
    assert uneven.class_prior_ == "folder"
    assert uneven.model_.offsets() is None
    features, _ = uneven.features(list_images(album))
    np.testing.assert_array_equal(scores(uneven, album), uneven.method_.score(features, uneven.score_).numpy())


@pytest.mark.parametrize("prior", ["even", {"red": 8, "green": 8, "blue": 8}])
def test_even__after_even_shares_nothing_changes(prior: Any, album: Path, tiny_backbone: Tiny) -> None:
    """Bit for bit, where rounding would leave offsets of 1e-9."""
    model = adapted(tiny_backbone("convolutional"), album, method__class_prior=prior)
    before = scores(model, album), model.predict_proba(album)
    model._become(model.model_.with_prior("even"))
    assert model.model_.inference.images == IMAGES
    assert model.model_.offsets() is None
    np.testing.assert_array_equal(scores(model, album), before[0])
    np.testing.assert_array_equal(model.predict_proba(album), before[1])


def test_start__is_not_corrected(saved: Path, album: Path) -> None:
    paths = list_images(album)
    plain, even = load(saved, use="start"), load(saved, use="start", class_prior="even")
    assert plain.class_prior_ is None
    assert even.class_prior_ is None
    np.testing.assert_array_equal(plain.predict_proba(album), even.predict_proba(album))
    beside = [one.start_scores for one in predictions(load(saved, class_prior="even"), paths, with_start=True)]
    np.testing.assert_allclose(beside, scores(plain, album), rtol=0, atol=1e-6)
    assert even.use("adapted").class_prior_ == "even"  # what was asked for holds for the other model
    assert even.model_.offsets() is not None


def test_shares__without_training_on_them_there_is_nothing_to_correct(album: Path, tiny_backbone: Tiny) -> None:
    settings = {"method__class_prior": GIVEN, "prediction__class_prior": "even"}
    config = tiny_config(tiny_backbone("convolutional"), **settings)
    unlearned = FineAlign(CLASSES, config=config).unlearned()
    assert unlearned.class_prior_ == "even"
    assert unlearned.model_.offsets() is None
    for untaught in ({"method__fairness": "off"}, {"method__fairness_weight": 0.0}):
        model = adapted(tiny_backbone("convolutional"), album, **settings, **untaught)
        assert model.model_.inference.images == 0
        assert model.model_.offsets() is None
        assert (told_shares(model.model_) or {})["taught"] is False


def test_shares__the_smoothed_share_of_an_absent_class_is_bounded(album: Path, tiny_backbone: Tiny) -> None:
    settings = {"method__class_prior": {"red": 24}, "prediction__class_prior": "even"}
    model = adapted(tiny_backbone("convolutional"), album, **settings)
    offsets = model.model_.offsets()
    assert offsets is not None
    expected = [offset(share, model.method_.logit_scale) for share in (1, 0, 0)]
    np.testing.assert_allclose(offsets, expected, rtol=1e-5)
    assert np.isfinite(model.predict_proba(album)).all()


def test_setting__even_from_the_start_holds_after_fit_and_in_the_saved_model(
    uneven: FineAlign, saved: Path, album: Path, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    """Training, calibration and the estimated accuracy look at the folder: they are the same."""
    settings = {"method__class_prior": GIVEN, "prediction__calibrate": True, "prediction__class_prior": "even"}
    model = adapted(tiny_backbone("transformer"), album, **settings)
    assert model.calibration_ == uneven.calibration_
    expected = load(saved, class_prior="even").predict_proba(album)
    np.testing.assert_allclose(model.predict_proba(album), expected, rtol=0, atol=1e-6)
    model.save(tmp_path / "model")
    assert load(tmp_path / "model").class_prior_ == "even"
    np.testing.assert_allclose(load(tmp_path / "model").predict_proba(album), expected, rtol=0, atol=1e-6)
    back = load(tmp_path / "model", class_prior="folder").predict_proba(album)
    np.testing.assert_allclose(back, load(saved).predict_proba(album), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        *("dpa", "self-training", "lafter", "microclip", "pouf"),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("must", "reclip", "upl")),
    ],
)
def test_even__every_method_that_is_taught_shares(
    method: str, album: Path, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    model = adapted(tiny_backbone("transformer"), album, method__name=method, method__class_prior=GIVEN)
    plain = scores(model, album)
    model.save(tmp_path / "model")
    even = load(tmp_path / "model", class_prior="even")
    expected = plain - np.array([offset(GIVEN[name], model.method_.logit_scale) for name in CLASSES])
    np.testing.assert_allclose(scores(even, album), expected, rtol=0, atol=1e-5)


# --- wherever a model answers -----------------------------------------------------------------------------------------


def test_explain__says_what_predict_does(saved: Path, album: Path) -> None:
    even = load(saved, class_prior="even")
    path = list_images(album)[0]
    told = even.explain(path)
    np.testing.assert_allclose(told.scores, scores(even, album)[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(told.probabilities, even.predict_proba([path])[0], rtol=0, atol=1e-5)
    pixels = even.explain_pixels([np.array(read_image(path))], with_start=True)[0]
    np.testing.assert_allclose(pixels.probabilities, told.probabilities, rtol=0, atol=1e-6)
    start = load(saved, use="start").predict_proba([path])[0]
    assert pixels.start_probabilities is not None
    np.testing.assert_allclose(pixels.start_probabilities, start, rtol=0, atol=1e-5)


def test_serve__answers_as_predict_and_tells(saved: Path, album: Path) -> None:
    from starlette.testclient import TestClient

    even = load(saved, class_prior="even")
    path = list_images(album)[-1]
    with TestClient(create_app(even), base_url="http://localhost") as client:
        assert client.get("/model").json()["class_prior"] == "even"
        found = client.post("/predict", files={"file": path.read_bytes()}).json()
    confidences = {one["label"]: one["confidence"] for one in found["top"]}
    wanted = even.predict_proba([path])[0]
    assert [confidences[name] for name in CLASSES] == pytest.approx(list(wanted), abs=1e-4)


def cut_alike(path: Path) -> bool:
    """Whether transformers cuts the centre that open_clip cuts; otherwise it lies a pixel beside it."""
    with Image.open(path) as image:
        return (int(32 * max(image.size) / min(image.size)) - 32) % 4 != 3


@pytest.mark.parametrize(
    "format", ["onnx", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("open_clip", "hf"))]
)
def test_export__scores_as_predict_does(format: Format, saved: Path, album: Path, tmp_path: Path) -> None:
    even = load(saved, class_prior="even")
    told = export(even, tmp_path / "out", format=format)
    assert told.class_prior == told.as_json()["class_prior"] == "even"
    assert json.loads((told.folder / "parity.json").read_text())["class_prior"] == "even"
    assert json.loads((told.folder / "classes.json").read_text())["class_prior"] == "even"
    code = "import json, sys, usage; print(json.dumps([part.tolist() for part in usage.classify(sys.argv[1:])]))"
    paths = [path for path in list_images(album) if format != "hf" or cut_alike(path)]
    assert len(paths) > IMAGES / 2
    done = subprocess.run(
        [sys.executable, "-B", "-c", f"import sys; sys.path.insert(0, '')\n{code}", *map(str, paths)],
        cwd=told.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    found, probabilities = json.loads(done.stdout.splitlines()[-1])
    close = 5e-3 if format == "onnx" else 1e-5  # onnx: crops are rounded otherwise
    np.testing.assert_allclose(found, scores(even, paths, told.score), rtol=0, atol=close)
    wanted = even.predict_proba(paths, score=told.score)
    np.testing.assert_allclose(probabilities, wanted, rtol=0, atol=close)
    assert np.abs(wanted - load(saved).predict_proba(paths, score=told.score)).max() > 2 * close
    card = (told.folder / "README.md").read_text()
    assert "distributed evenly over the classes" in card


def test_card__tells_the_shares_and_for_which_images(saved: Path) -> None:
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "**Shares of the classes it expects**: the largest are red 70.0%, green 25.0%, blue 5.0%." in card
    assert "taken to be distributed as those it was adapted to" in card


# --- models of other days ---------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The model with its manifest and tensors changed, and the checksum to match."""
    manifest, tensors = json.loads((folder / MANIFEST).read_text(encoding="utf-8")), load_file(folder / TENSORS)
    change(manifest, tensors)
    save_file(tensors, folder / TENSORS)
    manifest["sha256"][TENSORS] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_load__a_model_without_shares_expects_even_ones(saved: Path, album: Path, tmp_path: Path) -> None:
    def forget(manifest: dict[str, Any], tensors: dict[str, Any]) -> None:
        del manifest["inference"]["class_prior"], manifest["inference"]["images"], tensors["method.class_prior"]

    older = rewritten(Path(shutil.copytree(saved, tmp_path / "older")), forget)
    plain, even = load(older), load(older, class_prior="even")
    assert plain.class_prior_ == "folder"
    assert told_shares(plain.model_) == {"kind": None, "shares": [0.333333] * 3, "taught": False}
    np.testing.assert_array_equal(plain.predict_proba(album), load(saved).predict_proba(album))
    np.testing.assert_array_equal(even.predict_proba(album), plain.predict_proba(album))


def test_load__a_model_of_format_1_is_not_corrected(album: Path) -> None:
    np.testing.assert_array_equal(
        load(OLD, class_prior="even").predict_proba(album), load(OLD, class_prior="folder").predict_proba(album)
    )


@pytest.mark.parametrize("prior", [[0.5, 0.5, float("nan")], [0.5, 0.7, -0.2], [1.0, 1.0, 1.0], [0.5, 0.5]])
def test_load__shares_that_are_none_are_refused(prior: list[float], saved: Path, tmp_path: Path) -> None:
    def damage(manifest: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["method.class_prior"] = torch.tensor(prior)

    damaged = rewritten(Path(shutil.copytree(saved, tmp_path / "damaged")), damage)
    with pytest.raises(ModelError, match="class_prior"):
        load(damaged)


@pytest.mark.parametrize("how", ["load", "setting", "saved"])
def test_class_prior__another_word_is_refused_with_the_valid_ones(how: str, saved: Path, tmp_path: Path) -> None:
    if how == "load":
        with pytest.raises(ConfigError, match=r"class_prior: Unknown class prior 'flat'.* Valid: even, folder\."):
            load(saved, class_prior="flat")
    elif how == "setting":
        with pytest.raises(ConfigError, match=r"prediction\.class_prior: found 'flat'.* Valid: folder, even"):
            read_config(None, ["prediction.class_prior=flat"])
    else:

        def damage(manifest: dict[str, Any], tensors: dict[str, Any]) -> None:
            manifest["inference"]["class_prior"] = "flat"

        with pytest.raises(ModelError, match=r"class_prior: found 'flat'.* Valid: folder, even"):
            load(rewritten(Path(shutil.copytree(saved, tmp_path / "damaged")), damage))


# --- in words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shares", "words"),
    [
        ("auto", [1 / 3] * 3, "even, as the images did not clearly speak for others"),
        ("even", [1 / 3] * 3, "even"),
        ("given", [1 / 3] * 3, "even, as they were given"),
        ("auto", [0.1, 0.6, 0.3], "estimated without labels; the largest are green 60.0%, blue 30.0%, red 10.0%"),
        ("given", [0.5, 0.0, 0.5], "as they were given; the largest are red 50.0%, blue 50.0%, green 0.0%"),
        (None, [0.2, 0.5, 0.3], "the largest are green 50.0%, blue 30.0%, red 20.0%"),
    ],
)
def test_shares_in_words__by_kind(kind: str | None, shares: list[float], words: str) -> None:
    told = {"kind": kind, "shares": shares, "taught": True}
    assert shares_in_words(told, CLASSES) == words
    if len(set(shares)) > 1:
        assert shares_in_words(told | {"taught": False}, CLASSES) == f"{words}; the loss did not use them"


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def adapting(album: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setattr("finealign.runtime.devices.keep_freed_memory", lambda: False)
    quick = ["training.epochs=1", "training.anchor_steps=0", "views.crops=2", "prediction.calibrate=false"]
    settings = [part for setting in quick for part in ("--set", setting)]
    common = ["--classes", ",".join(CLASSES), "--backbone", tiny_backbone("transformer"), "--device", "cpu"]
    return lambda *more: command("adapt", album, *common, *settings, "--keep-adapted", *more)


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_adapt__a_file_of_shares_goes_into_the_run(
    adapting: Callable[..., Result], ending: str, tmp_path: Path
) -> None:
    shares = tmp_path / f"shares.{ending}"
    if ending == "csv":
        shares.write_text("class,share\nred,0.7\ngreen,0.25\nblue,0.05\n", encoding="utf-8")
    else:
        shares.write_text(json.dumps({"Red": 140, "green": 50, "blue": 10}), encoding="utf-8")
    run = tmp_path / "run"
    assert adapting("--class-prior", shares, "--out", run).exit_code == 0
    shares.unlink()  # what is in the run folder suffices
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert list(config["method"]["class_prior"].values()) in ([0.7, 0.25, 0.05], [140, 50, 10])
    told = json.loads((run / "run.json").read_text(encoding="utf-8"))["class_prior"]
    assert told == {"kind": "given", "shares": [0.7, 0.25, 0.05], "taught": True}
    words = "as they were given; the largest are red 70.0%, green 25.0%, blue 5.0%"
    assert words in (run / "model" / "README.md").read_text(encoding="utf-8")
    assert words in render(run)
    again = adapting("--config", run / "config.yaml", "--out", tmp_path / "again")
    assert again.exit_code == 0
    assert json.loads((tmp_path / "again" / "run.json").read_text(encoding="utf-8"))["class_prior"] == told


def test_adapt__resuming_with_another_prior_is_refused(adapting: Callable[..., Result], tmp_path: Path) -> None:
    run, shares = tmp_path / "run", tmp_path / "shares.json"
    shares.write_text(json.dumps(GIVEN), encoding="utf-8")
    assert adapting("--class-prior", "even", "--out", run).exit_code == 0
    told = json.loads((run / "run.json").read_text(encoding="utf-8"))["class_prior"]
    assert told == {"kind": "even", "shares": [0.333333] * 3, "taught": True}
    for more in ([], ["--dry-run"]):
        result = adapting("--class-prior", shares, "--out", run, "--resume", *more)
        assert result.exit_code == 1
        assert "had other settings" in result.stderr
    assert adapting("--class-prior", "even", "--out", run, "--resume").exit_code == 0


def test_adapt__a_dry_run_shows_and_checks_the_shares(adapting: Callable[..., Result], tmp_path: Path) -> None:
    shares = tmp_path / "shares.json"
    shares.write_text(json.dumps(GIVEN), encoding="utf-8")
    result = adapting("--class-prior", shares, "--out", tmp_path / "run", "--dry-run", "--json")
    settings = yaml.safe_load(json.loads(result.stdout)["settings"])
    assert settings["method"]["class_prior"] == GIVEN
    shares.write_text(json.dumps({"wren": 1}), encoding="utf-8")
    result = adapting("--class-prior", shares, "--out", tmp_path / "run", "--dry-run")
    assert result.exit_code == 1
    assert "names 'wren', which is no class. Valid: 'red', 'green', 'blue'." in result.stderr
    assert not (tmp_path / "run").exists()


def test_adapt__what_is_no_prior_is_refused_with_the_valid_values(
    adapting: Callable[..., Result], tmp_path: Path
) -> None:
    result = adapting("--class-prior", "flat", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "'flat' is no word that is known here, and no file. Valid: auto, even, or a file: JSON" in result.stderr
    result = adapting("--class-prior", "even", "--method", "cupl", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "the method 'cupl' expects no shares of classes" in result.stderr
    assert "Methods that do: dpa, fair, lafter, microclip, must, pouf, reclip, self-training, upl." in result.stderr
    assert not (tmp_path / "run").exists()


def test_run__auto_tells_what_it_found(album: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    settings = {"training__epochs": 1, "training__anchor_steps": 2}
    config = tiny_config(tiny_backbone("transformer"), **settings)
    model = adapt_into(tmp_path / "run", FineAlign(CLASSES, config=config), album).model.use("adapted")
    told = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["class_prior"]
    assert told["kind"] == "auto"
    assert told["shares"] == pytest.approx(load_prior(tmp_path / "run" / "model"), abs=1e-6)
    assert sum(told["shares"]) == pytest.approx(1, abs=1e-5)
    assert shares_in_words(told, CLASSES) in render(tmp_path / "run")
    assert model.model_.inference.images == IMAGES
    cupl = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"), method__name="cupl"))
    adapt_into(tmp_path / "cupl", cupl, album)
    assert json.loads((tmp_path / "cupl" / "run.json").read_text(encoding="utf-8"))["class_prior"] is None
    assert "expects" not in (tmp_path / "cupl" / "model" / "README.md").read_text(encoding="utf-8")


def load_prior(folder: Path) -> list[float]:
    return list(map(float, load_file(folder / TENSORS)["method.class_prior"]))


def test_predict_and_evaluate__tell_which_images_they_are_for(
    saved: Path, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finealign.runtime.devices.keep_freed_memory", lambda: False)
    device = ["--device", "cpu", "--precision", "fp32"]
    for asked in ("folder", "even"):
        out = tmp_path / f"{asked}.csv"
        flags = ["--class-prior", asked, *device]
        found = json.loads(command("predict", saved, album, *flags, "--out", out, "--json").stdout)
        assert found["class_prior"] == asked
        model = load(saved, class_prior=asked)
        with out.open(encoding="utf-8", newline="") as table:
            assert [row["label"] for row in csv.DictReader(table)] == list(model.predict(album))
        figures = json.loads(command("evaluate", saved, album, *flags, "--json").stdout)
        assert figures["class_prior"] == asked
        truth = [path.parent.name for path in list_images(album)]
        assert figures["adapted"]["top1"] == pytest.approx(np.mean(model.predict(album) == np.array(truth)))
    said = command("evaluate", saved, album, *flags).stdout
    assert "took each class for as likely as another" in said
    said = command("predict", saved, album, *flags, "--out", out, "--overwrite").stderr
    assert "which takes each class for as likely" in said
    found = json.loads(command("predict", saved, album, "--use", "start", *flags, "--json").stdout)
    assert found["class_prior"] is None
    assert command("predict", saved, album, "--class-prior", "flat").exit_code == 2
