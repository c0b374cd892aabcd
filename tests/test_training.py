"""The loop: what learns and what does not, that it can be repeated and resumed bit for bit, that it sees no label."""

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import CLASSES, tiny_config, write_photos
from finealign.classifier import FineAlign
from finealign.errors import FinealignError
from finealign.training import EpochRecord, _batches, adapt

Tiny = Callable[[str], str]
METHODS = ["fair", "self-training"]
TOWERS = ["transformer", "convolutional"]


def fit(photos: Path, backbone: str, checkpoints: Path | None = None, **overrides: Any) -> FineAlign:
    model = FineAlign(CLASSES, config=tiny_config(backbone, **overrides))
    return model.fit(photos, checkpoints=checkpoints)


def state(model: FineAlign) -> dict[str, torch.Tensor]:
    backbone = {f"backbone.{name}": value for name, value in model.backbone_.model.state_dict().items()}
    return backbone | {f"method.{name}": value for name, value in model.method_.state_dict().items()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


@pytest.mark.parametrize("tower", TOWERS)
def test_adapt__only_norms_and_anchors_change(photos: Path, tiny_backbone: Tiny, tower: str) -> None:
    before = state(FineAlign(CLASSES, config=tiny_config(tiny_backbone(tower), method__name="cupl")).fit(photos))
    model = fit(photos, tiny_backbone(tower))
    norms = {f"backbone.visual.{name}" for name in model.backbone_.norm_parameters()}
    after = {name: value for name, value in state(model).items() if name in before}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == norms
    assert not torch.equal(model.method_.state_dict()["anchors"], before["method.prototypes"])


@pytest.mark.parametrize(("learn", "norms", "anchors"), [("norms", True, False), ("anchors", False, True)])
def test_adapt__learns_only_what_is_asked(
    photos: Path, tiny_backbone: Tiny, learn: str, norms: bool, anchors: bool
) -> None:
    start = fit(photos, tiny_backbone("transformer"), method__name="cupl")
    model = fit(photos, tiny_backbone("transformer"), training__learn=learn)
    changed = differing(
        {name: value for name, value in state(start).items() if name.startswith("backbone")},
        {name: value for name, value in state(model).items() if name.startswith("backbone")},
    )
    assert bool(changed) == norms
    moved = not torch.equal(model.method_.state_dict()["anchors"], start.method_.state_dict()["prototypes"])
    assert moved == anchors


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("method", METHODS)
def test_adapt__same_seed_gives_identical_weights(photos: Path, tiny_backbone: Tiny, tower: str, method: str) -> None:
    first, second = (state(fit(photos, tiny_backbone(tower), method__name=method)) for _ in range(2))
    assert not differing(first, second)


def test_adapt__another_seed_gives_other_weights(photos: Path, tiny_backbone: Tiny) -> None:
    first, second = (state(fit(photos, tiny_backbone("transformer"), seed=seed)) for seed in (0, 1))
    assert differing(first, second)


@pytest.mark.parametrize("encoder", ["full", "frozen"])
@pytest.mark.parametrize("refresh", [0, 1, 2])
def test_adapt__resumed_is_bit_for_bit_the_uninterrupted(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, encoder: str, refresh: int
) -> None:
    settings: dict[str, Any] = {"training__encoder": encoder, "views__refresh_epochs": refresh, "training__epochs": 4}
    backbone = tiny_backbone("transformer")
    whole = state(fit(photos, backbone, **settings))

    class KilledError(Exception):
        pass

    def stop_after_three(record: EpochRecord) -> None:
        if record.epoch == 3:
            raise KilledError

    model = FineAlign(CLASSES, config=tiny_config(backbone, **settings))
    with pytest.raises(KilledError):
        model.fit(photos, checkpoints=tmp_path / "kept", on_epoch=stop_after_three)
    resumed = fit(photos, backbone, checkpoints=tmp_path / "kept", **settings)
    assert [record.epoch for record in resumed.history_] == [3, 4]
    assert not differing(whole, state(resumed))


def test_adapt__a_finished_run_has_nothing_left_to_do(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    first = fit(photos, tiny_backbone("transformer"), checkpoints=tmp_path / "kept")
    again = fit(photos, tiny_backbone("transformer"), checkpoints=tmp_path / "kept")
    assert again.history_ == []
    assert not differing(state(first), state(again))


def test_adapt__class_folders_mean_nothing(tiny_backbone: Tiny, tmp_path: Path) -> None:
    """Photos under shuffled folder names, in the same order, give the same weights: no label is read."""
    honest = write_photos(tmp_path / "honest")
    shuffled = tmp_path / "shuffled"
    # Sorted order is kept by the new names; what each folder was called is lost.
    for position, path in enumerate(
        sorted(honest.rglob("*.png"), key=lambda path: path.relative_to(honest).as_posix())
    ):
        target = shuffled / CLASSES[position % 3] / "x"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / f"{position:03d}.png")
    ordered = sorted(shuffled.rglob("*.png"), key=lambda path: path.name)
    first = state(fit(honest, tiny_backbone("transformer")))
    second = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"))).fit(ordered)
    assert not differing(first, state(second))


@pytest.mark.parametrize("function", [adapt, FineAlign.fit, FineAlign.__init__])
def test_training__takes_no_label(function: Callable[..., Any]) -> None:
    names = set(inspect.signature(function).parameters)
    assert not names & {"y", "label", "labels", "truth", "target", "targets"}


@pytest.mark.parametrize("tower", TOWERS)
def test_adapt__batchnorm_statistics_stay(photos: Path, tiny_backbone: Tiny, tower: str) -> None:
    model = fit(photos, tiny_backbone(tower))
    start = fit(photos, tiny_backbone(tower), method__name="cupl")
    statistics = {name for name in state(start) if "running_" in name or "num_batches" in name}
    assert bool(statistics) == (tower == "convolutional")
    assert not {name for name in statistics if not torch.equal(state(model)[name], state(start)[name])}


def test_adapt__in_bf16_keeps_masters_and_features_in_fp32(photos: Path, tiny_backbone: Tiny) -> None:
    model = fit(photos, tiny_backbone("transformer"), precision="bf16")
    assert {value.dtype for value in state(model).values() if value.is_floating_point()} == {torch.float32}
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    low = model.backbone_.embed(images)
    model.backbone_.precision = "fp32"
    high = model.backbone_.embed(images)
    assert low.dtype == torch.float32
    assert not torch.equal(low, high)
    assert float((low * high).sum(1).min()) > 0.99


def test_adapt__more_classes_than_images_in_a_batch(photos: Path, tiny_backbone: Tiny) -> None:
    classes = [f"colour {number}" for number in range(40)]
    config = tiny_config(tiny_backbone("transformer"), training__batch_size=4)
    model = FineAlign(classes, config=config).fit(photos)
    assert all(np.isfinite(record.loss) for record in model.history_)
    assert model.predict_proba(photos).shape == (24, 40)


def test_adapt__a_loss_that_is_not_finite_stops_with_advice(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    with pytest.raises(FinealignError, match=r"no longer finite.*learning_rate"):
        fit(photos, tiny_backbone("transformer"), tmp_path / "kept", training__learning_rate=1e30, training__epochs=9)


@pytest.mark.parametrize("method", METHODS)
def test_adapt__records_say_what_happened(photos: Path, tiny_backbone: Tiny, method: str) -> None:
    settings = {"name": method, "fairness_weight": 3.0}
    records = fit(photos, tiny_backbone("transformer"), method=settings).history_
    assert [record.epoch for record in records] == [1, 2, 3]
    assert records[0].changed == 1
    for record in records:
        assert sum(record.class_share) == pytest.approx(1)
        assert 0 <= record.mean_weight <= 1
        assert record.loss == pytest.approx(record.parts["cross_entropy"] + 3 * record.parts["fairness"], rel=1e-4)
    rates = [record.learning_rate for record in records]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("images", "count"), [(1, 1), (7, 3), (64, 1), (65, 2), (100, 7)])
def test_batches__each_image_once_and_no_runt(images: int, count: int) -> None:
    batches = _batches(images, count, seed=3, epoch=5)
    assert sorted(torch.cat(batches).tolist()) == list(range(images))
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == count
    assert max(sizes) - min(sizes) <= 1
