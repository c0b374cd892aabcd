"""How far the encoder may move images: the measure, and that runs which go too far are held back."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from conftest import CLASSES, tiny_config, write_photos
from finealign.classifier import FineAlign
from finealign.training.drift import FARTHEST, drift
from finealign.training.features import FeatureBank
from finealign.training.state import EpochRecord
from finealign.types import ImageFeatures

WILD: dict[str, Any] = {"training__learning_rate": 0.5, "training__epochs": 4, "views__refresh_epochs": 2}


def images(spread: float, *, seed: int = 0) -> Tensor:
    """20 images in a cone: (20, 8)."""
    drawn = torch.from_numpy(np.random.default_rng(seed).standard_normal((20, 8)))
    return normalize(torch.ones(8) + spread * drawn, dim=1)


def test_drift__is_one_for_images_that_lie_where_their_crops_lay() -> None:
    whole, crops = images(0.3), images(0.3, seed=1)
    start = ImageFeatures(weak=whole, crops=torch.stack([crops, images(0.3, seed=2)], dim=1))
    assert drift(crops, start) == pytest.approx(1)
    assert drift(whole, start) == pytest.approx(0, abs=1e-12)


def test_drift__does_not_depend_on_how_wide_the_cone_is() -> None:
    """As whole features have length 1, a narrow cone is flat, and there the measure is the same at any width."""

    def measured(width: float) -> float | None:
        start = ImageFeatures(weak=images(width), crops=(images(width) + width * images(0.3, seed=1))[:, None])
        return drift(images(width) + 0.5 * width * images(0.3, seed=2), start)

    assert measured(0.01) == pytest.approx(measured(0.001), rel=0.05)


def test_drift__by_its_definition() -> None:
    whole, crops, now = (images(0.3, seed=seed).numpy() for seed in (0, 1, 2))
    centre = whole.mean(0)

    def apart(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
        cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(first - centre, second - centre, strict=True)]
        return 1 - float(np.mean(cosines))

    start = ImageFeatures(weak=torch.from_numpy(whole), crops=torch.from_numpy(crops)[:, None])
    assert drift(3 * torch.from_numpy(now), start) == pytest.approx(apart(now, whole) / apart(crops, whole))


def test_drift__where_there_is_nothing_to_compare() -> None:
    whole = images(0.3)
    assert drift(images(0.3, seed=1), ImageFeatures(weak=whole, crops=whole[:, None])) is None
    start = ImageFeatures(weak=whole, crops=images(0.3, seed=1)[:, None])
    assert drift(torch.full_like(whole, math.nan), start) == FARTHEST


def test_drift__of_images_that_are_all_alike() -> None:
    one, crop = images(0.3)[:1].expand(5, -1), images(0.3, seed=1)[:1].expand(5, -1)
    start = ImageFeatures(weak=one, crops=crop[:, None])
    assert drift(one, start) == pytest.approx(0, abs=1e-9)
    assert drift(crop, start) == pytest.approx(1)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("trust") / "photos")


def fitted(photos: Path, backbone: str, folder: Path | None = None, **settings: Any) -> FineAlign:
    return FineAlign(CLASSES, config=tiny_config(backbone, **settings)).fit(photos, checkpoints=folder)


def killed_after(epochs: int, photos: Path, backbone: str, folder: Path, **settings: Any) -> None:
    """A run that ends when the record of the last of these epochs is out and its checkpoint is not."""

    def stop(record: EpochRecord) -> None:
        if record.epoch == epochs:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FineAlign(CLASSES, config=tiny_config(backbone, **settings)).fit(photos, checkpoints=folder, on_epoch=stop)


def moved(model: FineAlign, photos: Path) -> float:
    """How far the model has moved the photos, by what the package shows of features."""
    found = drift(model.features(photos)[0].weak, model.features(photos, at_start=True)[0])
    assert found is not None
    return found


def test_adapt__a_run_that_goes_too_far_is_held_back(photos: Path, tiny_backbone: Any) -> None:
    backbone = tiny_backbone("transformer")
    free = fitted(photos, backbone, **WILD, training__drift_limit="off")
    held = fitted(photos, backbone, **WILD)
    assert all(record.drift is None and record.kept == 1 for record in free.history_)
    looked = [record for record in held.history_ if record.drift is not None]
    assert looked
    assert max(record.drift or 0 for record in looked) > 1
    assert min(record.kept for record in looked) < 1
    assert moved(held, photos) < moved(free, photos)


def test_adapt__a_run_that_stays_near_is_left_alone(photos: Path, tiny_backbone: Any) -> None:
    backbone = tiny_backbone("transformer")
    free, near = (fitted(photos, backbone, training__drift_limit=limit) for limit in ("off", 1.0))
    assert all(record.kept == 1 and (record.drift or 0) < 1 for record in near.history_)
    assert any(record.drift for record in near.history_)
    for name, value in free.norms_.items():
        assert torch.equal(value, near.norms_[name])


def test_adapt__held_back_and_resumed_is_bit_for_bit_the_uninterrupted(
    photos: Path, tiny_backbone: Any, tmp_path: Path
) -> None:
    backbone = tiny_backbone("transformer")
    whole = fitted(photos, backbone, tmp_path / "whole", **WILD)

    killed_after(3, photos, backbone, tmp_path / "killed", **WILD)
    resumed = fitted(photos, backbone, tmp_path / "killed", **WILD)
    for name, value in whole.norms_.items():
        assert torch.equal(value, resumed.norms_[name])
    assert [(record.drift, record.kept) for record in whole.history_[2:]] == [
        (record.drift, record.kept) for record in resumed.history_
    ]


def test_adapt__killed_in_the_last_label_pass_is_held_back_alike(
    photos: Path, tiny_backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone("transformer")
    whole = fitted(photos, backbone, tmp_path / "whole", **WILD)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureBank, "renew", killed)
        with pytest.raises(KeyboardInterrupt):
            fitted(photos, backbone, tmp_path / "killed", **WILD)
    resumed = fitted(photos, backbone, tmp_path / "killed", **WILD)
    assert resumed.history_[-1].kept == whole.history_[-1].kept
    for name, value in whole.norms_.items():
        assert torch.equal(value, resumed.norms_[name])


def killed(*_: Any) -> bool:
    raise KeyboardInterrupt


# --- label features that are as good as new ---------------------------------------------------------------------------


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs before which label passes are run from now on."""
    found: list[int] = []
    encode = FeatureBank.label_pass

    def watched(self: FeatureBank, epoch: int, *what: Any, **how: Any) -> None:
        found.append(epoch)
        encode(self, epoch, *what, **how)

    monkeypatch.setattr(FeatureBank, "label_pass", watched)
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 4]),  # the encoder hardly moves, so no features grow old but for the end, whose crops are others
        ({"views__refresh_moved": 0.0}, [0, 2, 4]),
        ({"views__refresh_moved": 1e-9}, [0, 2, 4]),
        ({"views__refresh_epochs": 1}, [0, 1, 2, 3, 4]),  # asked for
        ({"views__refresh_epochs": 1, "views__refresh_moved": 0.1}, [0, 4]),
        ({"training__learning_rate": 0.5, "training__drift_limit": "off"}, [0, 2, 4]),
        ({"training__epochs": 1, "training__max_epochs": 1, "views__refresh_epochs": 0.5}, [0, 1, 2]),  # two blocks
        ({"training__epochs": 1, "views__refresh_epochs": 0.5, "views__refresh_moved": 0.1}, [0, 2]),
        # Of the second block nothing is kept, so it is encoded however little the encoder has moved.
        (
            {
                "training__epochs": 1,
                "training__block_images": 12,
                "views__refresh_epochs": 0.5,
                "views__refresh_moved": 0.1,
            },
            [0, 1, 2],
        ),
        ({"method__name": "dpa", "views__refresh_moved": 0.1}, [0, 2]),  # without crops there is no measure
    ],
    ids=str,
)
def test_adapt__encodes_label_features_anew_where_the_encoder_has_moved(
    photos: Path, tiny_backbone: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: list[int]
) -> None:
    found = passes(monkeypatch)
    plain: dict[str, Any] = {"training__epochs": 4, "views__refresh_epochs": "auto", "training__batch_size": 12}
    fitted(photos, tiny_backbone("transformer"), **plain | {"training__learning_rate": 2e-4} | settings)
    assert found == expected


@pytest.mark.parametrize(
    ("epochs", "refresh", "stopped_after"), [(4, "auto", 2), (4, "auto", 3), (4, 1, 2), (1, 0.5, 1)]
)
def test_adapt__with_features_used_on_resumed_is_bit_for_bit_the_uninterrupted(
    photos: Path, tiny_backbone: Any, tmp_path: Path, epochs: int, refresh: Any, stopped_after: int
) -> None:
    backbone = tiny_backbone("transformer")
    settings: dict[str, Any] = {
        "training__epochs": epochs,
        "training__batch_size": 12,
        "training__learning_rate": 2e-4,
        "views__refresh_epochs": refresh,
        "views__refresh_moved": 0.1,
    }
    whole = fitted(photos, backbone, tmp_path / "whole", **settings)

    killed_after(stopped_after, photos, backbone, tmp_path / "killed", **settings)
    resumed = fitted(photos, backbone, tmp_path / "killed", **settings)
    for name, value in whole.norms_.items():
        assert torch.equal(value, resumed.norms_[name])
    for name, value in whole.method_.state_dict().items():
        assert torch.equal(value, resumed.method_.state_dict()[name])


def test_adapt__looked_at_twice_in_an_epoch_tells_the_farther(photos: Path, tiny_backbone: Any) -> None:
    """With a label pass before every epoch, the last epoch is looked at before it and at the end."""
    model = fitted(photos, tiny_backbone("transformer"), **WILD | {"training__epochs": 2, "views__refresh_epochs": 1})
    first, last = model.history_
    assert first.drift is None
    assert last.drift is not None
    assert last.drift > 1
    assert last.kept < 1
