"""A fitted model is two, the adapted one and its start: each predicts as it did, whichever is used, saved or loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import CLASSES, predictions, tiny_config, write_photos
from finealign import FineAlign
from finealign.backbone.load import load_backbone
from finealign.errors import ConfigError
from finealign.images.listing import list_images
from finealign.run import adapt as run_folder
from finealign.run.adapt import adapt_into
from finealign.run.verdict import Verdict
from finealign.types import Use

Tiny = Callable[[str], str]
USES = get_args(Use)
OLD = Path(__file__).parent / "data" / "model-format-1"


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that nothing may write to."""
    return write_photos(tmp_path_factory.mktemp("album") / "photos", each=2)


@pytest.fixture(scope="module")
def fitted(album: Path, tiny_backbone: Tiny) -> FineAlign:
    """An adapted model. A test may use either of the two, and save."""
    config = tiny_config(tiny_backbone("transformer"), training__epochs=1, training__anchor_steps=2)
    return FineAlign(CLASSES, config=config).fit(album)


def said(model: FineAlign, album: Path) -> dict[str, Any]:
    """What each of the two says of the photos."""
    return {use: model.use(use).predict_proba(album) for use in USES}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(np.array_equal(found[use], wanted[use]) for use in USES)


def load(folder: Path, use: Use | None = None) -> FineAlign:
    return FineAlign.load(folder, use=use, device="cpu", precision="fp32")


# --- in memory --------------------------------------------------------------------------------------------------------


def test_use__goes_back_and_forth(fitted: FineAlign, album: Path) -> None:
    first = said(fitted, album)
    assert not np.allclose(first["start"], first["adapted"])
    assert same(said(fitted, album), first)
    assert fitted.use("adapted").use_ == "adapted"
    assert fitted.use("start").use("start").use_ == "start"
    assert fitted.use("adapted").revert().use_ == "start"
    assert same(said(fitted, album), first)


@pytest.mark.parametrize("use", USES)
def test_use__the_start_beside_predictions_is_the_start(fitted: FineAlign, album: Path, use: Use) -> None:
    wanted = said(fitted, album)["start"]
    found = [one.start_probabilities for one in predictions(fitted.use(use), list_images(album), with_start=True)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_use__what_belongs_to_the_start_does_not_change(fitted: FineAlign) -> None:
    adapted, start = (dict(fitted.use(use).start_norms_) for use in ("adapted", "start"))
    assert adapted and all(torch.equal(adapted[name], start[name]) for name in adapted)
    assert (fitted.use("start").score_, fitted.use("adapted").score_) == ("global", "fused")


def test_use__of_a_model_that_is_not_there(fitted: FineAlign, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"use: Unknown model 'stort'\. Did you mean 'start'\? Valid: adapted, start"):
        fitted.use("stort")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Valid: adapted, start"):  # before the folder is looked at
        FineAlign.load(tmp_path / "no such folder", use="before")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Tiny) -> FineAlign:
    """An adapted model of enough photos, among them noise, that it can tell strangers."""
    place = write_photos(tmp_path_factory.mktemp("many") / "photos", each=8)
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"noise {number}.png")
    config = tiny_config(tiny_backbone("transformer"), training__epochs=1, training__anchor_steps=2)
    return FineAlign(CLASSES, config=config).fit(place)


def doubts(model: FineAlign, weak: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {use: model.use(use).model_.p_none(weak) for use in USES}
    assert all(value is not None and bool(((value >= 0) & (value <= 1)).all()) for value in found.values())
    return {use: value for use, value in found.items() if value is not None}


@pytest.mark.parametrize("used", USES)
def test_save__what_tells_strangers_comes_back_bit_for_bit(many: FineAlign, tmp_path: Path, used: Use) -> None:
    weak = torch.nn.functional.normalize(torch.randn(20, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    known, found = many.use(used).model_.strangers, doubts(many, weak)
    assert set(known) == set(USES)
    many.use(used).save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.use_ == used
    for use in USES:
        tensors = again.model_.strangers[use].tensors()
        for name, value in known[use].tensors().items():
            assert torch.equal(tensors[name], value), name
    for use, value in doubts(again, weak).items():
        assert torch.equal(value, found[use])
    for place in ("saved", "again"):  # and once more, from what was loaded
        again.use(used).save(tmp_path / "again")
        assert load_file(tmp_path / place / "finealign.safetensors").keys() >= {f"strangers.{use}.mean" for use in USES}
    assert torch.equal(doubts(load(tmp_path / "again"), weak)[used], found[used])


def test_p_none__of_a_model_without_what_tells_strangers_is_unknown(tiny_backbone: Tiny) -> None:
    config = tiny_config(tiny_backbone("transformer"))
    assert FineAlign(CLASSES, config=config).unlearned().model_.p_none(torch.ones(2, 32)) is None
    assert load(OLD).model_.p_none(torch.ones(2, 32)) is None


# --- saved and loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", ["start", pytest.param("adapted", marks=pytest.mark.nightly)])
def test_save__keeps_both_and_which_is_used(fitted: FineAlign, album: Path, tmp_path: Path, used: Use) -> None:
    wanted = said(fitted, album)
    fitted.use(used).save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.use_ == used
    assert np.array_equal(loaded.predict_proba(album), wanted[used])
    assert same(said(loaded, album), wanted)
    for use in USES:
        assert load(tmp_path / "model", use).use_ == use
        assert np.array_equal(load(tmp_path / "model", use).predict_proba(album), wanted[use])
        loaded.use(use).save(tmp_path / "again")  # the second one in place of the first
        assert load(tmp_path / "again").use_ == use
        assert same(said(load(tmp_path / "again"), album), wanted)


@pytest.mark.parametrize("used", USES)
def test_save__the_weights_are_those_of_the_model_in_use(fitted: FineAlign, tmp_path: Path, used: Use) -> None:
    """So that another tool that reads the folder gets the model that was chosen."""
    fitted.use(used).save(tmp_path)
    weights = load_backbone(f"local-dir:{tmp_path}").norm_parameters()
    assert all(torch.equal(weights[name], value) for name, value in fitted.norms_.items())
    sections = {name.partition(".")[0] for name in load_file(tmp_path / "finealign.safetensors")}
    assert sections == {"texts", "method", "strangers", "adapted" if used == "start" else "start"}
    assert json.loads((tmp_path / "finealign.json").read_text(encoding="utf-8"))["use"] == used


def test_save__the_other_model_is_small(fitted: FineAlign, tmp_path: Path) -> None:
    fitted.use("start").save(tmp_path)
    other = {
        name: value
        for name, value in load_file(tmp_path / "finealign.safetensors").items()
        if name.startswith("adapted.")
    }
    assert sum(value.numel() for value in other.values()) == sum(value.numel() for value in fitted.norms_.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"training__learn": "anchors"},
        *({"method__name": name} for name in ("cupl", "transclip")),
        pytest.param({"training__encoder": "frozen"}, marks=pytest.mark.nightly),
        *(pytest.param({"method__name": name}, marks=pytest.mark.nightly) for name in ("zero-shot", "wca")),
    ],
    ids=str,
)
def test_save__where_no_normalisation_parameter_learned(
    album: Path, tiny_backbone: Tiny, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Then no tensors of the other model are needed."""
    config = tiny_config(tiny_backbone("convolutional"), training__epochs=1, **settings)
    model = FineAlign(CLASSES, config=config).fit(album)
    wanted = said(model, album)
    cupl = FineAlign(CLASSES, config=tiny_config(tiny_backbone("convolutional"), method__name="cupl")).unlearned()
    np.testing.assert_array_equal(wanted["start"], cupl.predict_proba(album, score="global"))
    for used in USES:
        model.use(used).save(tmp_path)
        assert not [name for name in load_file(tmp_path / "finealign.safetensors") if name.startswith(("start.", "ad"))]
        assert load(tmp_path).use_ == used
        assert same(said(load(tmp_path), album), wanted)


def test_save__prompts_of_the_adapted_model_are_kept_beside_the_start(
    album: Path, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    config = tiny_config(tiny_backbone("transformer"), method__name="microclip")
    model = FineAlign(CLASSES, config=config).unlearned()
    wanted = said(model, album)
    model.use("start").save(tmp_path)
    assert same(said(load(tmp_path), album), wanted)


def test_load__fits_again_by_the_method_that_adapted(fitted: FineAlign, tmp_path: Path) -> None:
    fitted.use("start").save(tmp_path)
    assert load(tmp_path).method == "fair"


def test_load__a_model_of_format_1_is_used_as_it_was_saved(album: Path, tmp_path: Path) -> None:
    old = load(OLD)
    assert old.use_ == "adapted"
    wanted = said(old, album)
    assert np.array_equal(load(OLD, "start").predict_proba(album), wanted["start"])
    old.use("start").save(tmp_path)
    assert load(tmp_path).use_ == "start"
    assert same(said(load(tmp_path), album), wanted)


def test_load__format_2_without_a_word_on_which_is_used(fitted: FineAlign, album: Path, tmp_path: Path) -> None:
    wanted = said(fitted, album)
    fitted.use("adapted").save(tmp_path)
    path = tmp_path / "finealign.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["use"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert load(tmp_path).use_ == "adapted"
    assert same(said(load(tmp_path), album), wanted)


@pytest.mark.parametrize(("use", "other"), [("adapted", "start"), ("start", "adapted")])
def test_card__says_which_is_used(fitted: FineAlign, tmp_path: Path, use: Use, other: Use) -> None:
    fitted.use(use).save(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"In use**: the {'adapted model' if use == 'adapted' else 'model before adaptation'}." in card
    assert f'`use="{other}"` below, or `--use {other}`' in card
    assert "# 3 classes, by fair" in card and "\n\n\n" not in card


# --- runs -------------------------------------------------------------------------------------------------------------


def test_adapt_into__after_hurt_the_adapted_model_is_there_and_a_resumed_run_may_take_it(
    album: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hurt(*_: Any, **__: Any) -> Verdict:
        return Verdict("hurt", -3.0, 40.0, "Do something.", {}, 6)

    monkeypatch.setattr(run_folder, "judge_model", hurt)
    config = tiny_config(tiny_backbone("transformer"), training__epochs=1, training__anchor_steps=2)
    model = FineAlign(CLASSES, config=config)
    summary = adapt_into(tmp_path / "run", model, album)
    assert (summary.kept, model.use_, load(tmp_path / "run").use_) == ("start", "start", "start")
    assert summary.why_kept == "the verdict is that adaptation hurt"
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert run["verdict"]["favours"] == "start"
    assert run["learned"].startswith("scale and shift")
    assert "--use adapted" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "as the verdict is that adaptation hurt" in (tmp_path / "run" / "model" / "README.md").read_text("utf-8")
    wanted = said(load(tmp_path / "run"), album)
    assert not np.allclose(wanted["start"], wanted["adapted"])
    again = adapt_into(tmp_path / "run", FineAlign(CLASSES, config=config), album, resume=True, keep_adapted=True)
    assert (again.kept, load(tmp_path / "run").use_) == ("adapted", "adapted")
    assert again.why_kept == "that was asked for, whatever the verdict"
    assert same(said(load(tmp_path / "run"), album), wanted)
