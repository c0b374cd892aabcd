"""What is found out before the first step: who belongs, what share each class has; and that training goes by it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from conftest import CLASSES, tiny_config, write_photos
from finealign.backbone.base import Backbone
from finealign.classifier import FineAlign
from finealign.config import Config, MethodSettings, make_config, resolve
from finealign.method.base import ESTIMATED_PULL, PULL, SelfTrainingMethod
from finealign.method.registry import create_method
from finealign.training import loop
from finealign.training.checkpoints import read_last_checkpoint
from finealign.training.loop import step
from finealign.training.outset import LEAST_BELONGING, take_stock
from finealign.training.state import State, begin
from finealign.types import ImageFeatures, TextFeatures

Tiny = Callable[[str], str]
nightly = pytest.mark.nightly
D, EVEN = 48, [1 / 8] * 8


@dataclass
class Folder:
    """Features of a made folder, as an image source that remembers what it was asked for."""

    weak: Tensor  # (n, D)
    crops: Tensor  # (n, N, D)
    texts: TextFeatures
    labels: Tensor  # (n,), -1 for strangers
    asked: set[str]

    def start_epoch(self, epoch: int, images: Tensor | None = None) -> bool:
        return epoch == 0

    def renew(self, epoch: int, images: Tensor | None = None) -> bool:
        return False

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        self.asked.add("crops")
        return ImageFeatures(self.weak[batch], self.crops[batch])

    def whole_images(self, epoch: int) -> Tensor:
        self.asked.add("whole")
        return self.weak

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            yield self.weak[batch]


def folder(sizes: list[int], strange: int = 0, *, seed: int = 0) -> Folder:
    """Eight classes that share a domain; strangers come from four clusters of another."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        drawn: Tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return drawn

    gap, domain, other, classes = noise(D), noise(D), noise(D), noise(8, D) * 0.7
    labels = torch.tensor([c for c, size in enumerate(sizes) for _ in range(size)] + [-1] * strange)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.cat([gap + domain + classes, gap + other + noise(4, D) * 0.7])
    which = torch.where(labels >= 0, labels, 8 + torch.arange(len(labels)) % 4)
    weak = normalize(centres[which] + noise(len(labels), D) * 0.5, dim=1)
    crops = normalize(centres[which][:, None] + noise(len(labels), 3, D) * 0.5, dim=2)
    anchors = normalize(domain + classes + noise(8, D) * 0.4, dim=1)
    return Folder(weak, crops, TextFeatures(anchors, anchors, torch.arange(8)), labels, set())


def configured(folder: Folder, prior: Any = "auto", share: Any = "auto", **training: Any) -> Config:
    values = {"learn": "anchors", "encoder": "full", **training}
    method = {"name": "fair", "class_prior": prior, "whole_share": share}
    config = make_config({"method": method, "training": values})
    return resolve(config, images=len(folder.weak), classes=8, input_size=32)


def looked_at(folder: Folder, config: Config) -> tuple[State, SelfTrainingMethod]:
    """The state after ``take_stock``. No backbone is needed, as the anchors learn alone."""
    method = create_method(config.method, folder.texts, logit_scale=60.0)
    assert isinstance(method, SelfTrainingMethod)
    state = begin(cast(Backbone, None), method, config, images=len(folder.weak))
    take_stock(state, folder, config)
    return state, method


def far_from(found: Tensor, shares: Sequence[float]) -> float:
    return float((found - torch.tensor(shares)).abs().sum() / 2)


TAIL = [100, 60, 40, 25, 15, 8, 5, 3]


def test_take_stock__told_to_take_all_alike_looks_at_nothing() -> None:
    made = folder(TAIL, 60)
    state, method = looked_at(made, configured(made, "even", 0.5, strangers="off"))
    assert not made.asked
    assert bool((state.belonging == 1).all()) and state.belonging.shape == (len(made.weak),)
    assert method.class_prior.tolist() == pytest.approx(EVEN) == method.mean_prediction.tolist()


@pytest.mark.parametrize(("blurred", "share"), [("weak", 0.0), ("crops", 1.0)])
def test_take_stock__trusts_what_shows_the_classes(blurred: str, share: float) -> None:
    made, drawn = folder([30] * 8), torch.Generator().manual_seed(5)
    seen = getattr(made, blurred)
    noise = torch.randn((len(seen), D), generator=drawn).reshape(-1, *[1] * (seen.dim() - 2), D)
    setattr(made, blurred, normalize(seen + 0.6 * noise, dim=-1))
    _, method = looked_at(made, configured(made, "even", strangers="off"))
    assert float(method.share_of_whole()) == share
    _, method = looked_at(made, configured(made, "even", 0.25, strangers="off"))
    assert float(method.share_of_whole()) == 0.25


def test_take_stock__strangers_belong_less_and_shares_are_those_of_the_others() -> None:
    made = folder(TAIL, 128)
    state, method = looked_at(made, configured(made))
    strangers = made.labels < 0
    assert float(state.belonging.min()) > 0.999 * LEAST_BELONGING and float(state.belonging.max()) <= 1
    assert state.belonging[strangers].mean() < 0.4 < 0.9 < state.belonging[~strangers].mean()
    truth = [size / sum(TAIL) for size in TAIL]
    assert far_from(method.class_prior, truth) < 0.15 < far_from(method.class_prior, EVEN)
    assert torch.equal(method.mean_prediction, method.class_prior)
    assert torch.equal(method.state_dict()["mean_label"], method.class_prior)


def test_take_stock__each_of_the_two_can_be_left_out() -> None:
    made = folder(TAIL, 128)
    state, method = looked_at(made, configured(made, "even"))
    assert state.belonging[made.labels < 0].mean() < 0.4
    assert method.class_prior.tolist() == pytest.approx(EVEN)
    state, method = looked_at(made, configured(made, strangers="off"))
    assert bool((state.belonging == 1).all())
    assert far_from(method.class_prior, EVEN) > 0.15


def test_take_stock__shares_that_were_given_stay() -> None:
    made = folder(TAIL, 128)
    config = configured(made, {f"class {number}": 1.0 for number in range(8)})
    method = create_method(config.method, made.texts, logit_scale=60.0)
    assert isinstance(method, SelfTrainingMethod)
    given = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05])
    method.expect(given)
    state = begin(cast(Backbone, None), method, config, images=len(made.weak))
    take_stock(state, made, config)
    assert torch.equal(method.class_prior, given)
    assert state.belonging[made.labels < 0].mean() < 0.4


@pytest.mark.parametrize("seed", range(3))
def test_take_stock__an_even_folder_without_strangers_is_left_as_it_is(seed: int) -> None:
    made = folder([25] * 8, seed=seed)
    state, method = looked_at(made, configured(made))
    assert method.class_prior.tolist() == pytest.approx(EVEN)
    assert state.belonging.mean() > 0.95


def test_take_stock__a_hundred_copies_of_one_image_are_one_image() -> None:
    made = folder([25] * 8)
    for name in ("weak", "crops", "labels"):
        value = getattr(made, name)
        setattr(made, name, torch.cat([value, value[:1].repeat(100, *[1] * (value.dim() - 1))]))
    _, method = looked_at(made, configured(made, strangers="off"))
    assert method.class_prior.tolist() == pytest.approx(EVEN)


def test_take_stock__without_kept_features_looks_at_crops_all_the_same() -> None:
    made = folder(TAIL, 128)
    config = configured(made)
    views = config.views.model_copy(update={"refresh_epochs": 0})
    state, method = looked_at(made, config.model_copy(update={"views": views}))
    assert made.asked == {"crops"}
    assert state.belonging[made.labels < 0].mean() < 0.5
    assert far_from(method.class_prior, EVEN) > 0.15


def test_take_stock__of_a_method_without_crops() -> None:
    made = folder(TAIL, 128)
    made.crops = made.crops[:, :0]
    config = configured(made).model_copy(update={"method": MethodSettings.model_validate({"name": "self-training"})})
    state, method = looked_at(made, config)
    assert state.belonging[made.labels < 0].mean() < 0.5
    assert far_from(method.class_prior, EVEN) > 0.15


def test_take_stock__in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = folder(TAIL, 60)
    state, method = looked_at(made, configured(made))
    monkeypatch.setattr("finealign.training.outset.CHUNK", 7)
    again, other = looked_at(made, configured(made))
    assert torch.equal(again.belonging, state.belonging) and torch.equal(other.class_prior, method.class_prior)


def test_step__a_label_weighs_as_far_as_its_image_belongs() -> None:
    made = folder([6] * 8)
    belonging = torch.linspace(0.01, 1, 12)
    batch, found = torch.arange(12), []
    for far in (torch.ones(12), belonging):
        config = configured(made, "even", strangers="off")
        state, _ = looked_at(made, config)
        state.belonging = far
        found.append(step(state, made.label_features(batch, 0), made.weak[batch], batch))
    (wholly, all_of_it), (loss, pseudo) = found
    torch.testing.assert_close(pseudo.weights, all_of_it.weights * belonging)
    assert torch.equal(pseudo.labels, all_of_it.labels) and pseudo.belonging is not None
    torch.testing.assert_close(pseudo.belonging, belonging)
    assert loss.parts["cross_entropy"] < wholly.parts["cross_entropy"]


# --- in a fit ---------------------------------------------------------------------------------------------------------


def fit(photos: Path, backbone: str, checkpoints: Path | None = None, **settings: Any) -> FineAlign:
    config = tiny_config(backbone, training__anchor_steps=0, training__last_label_pass=False, **settings)
    return FineAlign(CLASSES, config=config).fit(photos, checkpoints=checkpoints)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Photos of three colours, of some more than of others, and a few of noise."""
    place = write_photos(tmp_path / "mixed", each=10)
    for number in range(2, 10):
        (place / "green" / f"{number}.png").unlink()
    generator = np.random.default_rng(1)
    for number in range(6):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"noise {number}.png")
    return place


@pytest.mark.parametrize("method", ["fair", *(pytest.param(name, marks=nightly) for name in ("dpa", "lafter"))])
def test_fit__expects_the_shares_that_are_given(photos: Path, tiny_backbone: Tiny, method: str) -> None:
    given = {"name": method, "class_prior": {"RED": 6, "blue": 2}}
    model = fit(photos, tiny_backbone("transformer"), method=given, training__epochs=1)
    assert model.method_.state_dict()["class_prior"].tolist() == [0.75, 0.0, 0.25]
    assert model.config_.method.options["class_prior"] == {"RED": 6, "blue": 2}


def test_fit__even_stays_even_and_auto_follows_the_folder(tmp_path: Path, tiny_backbone: Tiny) -> None:
    place = write_photos(tmp_path / "one", each=30) / "red"
    for prior, even in (("even", True), ("auto", False)):
        settings: dict[str, Any] = {"method": {"name": "fair", "class_prior": prior}, "training__epochs": 1}
        found = fit(place, tiny_backbone("transformer"), **settings).method_.state_dict()["class_prior"]
        assert float(found.sum()) == pytest.approx(1) and bool((found > 0).all())
        assert (found.tolist() == pytest.approx([1 / 3] * 3)) == even


@pytest.mark.parametrize("refresh", [pytest.param(0, marks=nightly), 1])
def test_fit__resumed_goes_by_what_was_found_at_first(
    mixed: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refresh: int
) -> None:
    backbone, kept = tiny_backbone("transformer"), tmp_path / "kept"
    found = []

    def watched(state: State, source: Any, config: Config, **told: Any) -> None:
        take_stock(state, source, config, **told)
        # Told by force, since a tower of random weights tells little.
        state.belonging = torch.linspace(0.1, 1, len(state.labels))
        method = state.method
        assert isinstance(method, SelfTrainingMethod)
        method.expect(torch.tensor([0.5, 0.1, 0.4]))
        found.append(state.belonging.clone())

    monkeypatch.setattr(loop, "take_stock", watched)
    settings: dict[str, Any] = {"training__epochs": 2, "views__refresh_epochs": refresh}
    whole = fit(mixed, backbone, **settings)

    class CutError(Exception):
        pass

    def cut(record: Any) -> None:
        if record.epoch == 2:
            raise CutError

    config = tiny_config(backbone, training__anchor_steps=0, training__last_label_pass=False, **settings)
    with pytest.raises(CutError):
        FineAlign(CLASSES, config=config).fit(mixed, checkpoints=kept, on_epoch=cut)
    checkpoint = read_last_checkpoint(kept)
    assert checkpoint is not None and checkpoint.epoch == 1
    assert torch.equal(checkpoint.tensors["belonging"], found[0])
    resumed = fit(mixed, backbone, kept, **settings)
    assert len(found) == 2  # of the whole run and of the one that was cut
    for name, value in whole.method_.state_dict().items():
        assert torch.equal(resumed.method_.state_dict()[name], value), name
    assert [record.loss for record in resumed.history_] == [whole.history_[1].loss]
    assert resumed.method_.state_dict()["class_prior"].tolist() == pytest.approx([0.5, 0.1, 0.4])


@pytest.mark.parametrize(
    ("sizes", "prior", "weight", "pull"),
    [
        (TAIL, "auto", "auto", ESTIMATED_PULL),
        ([30] * 8, "auto", "auto", PULL),  # the estimate is even
        (TAIL, "even", "auto", PULL),
        (TAIL, "auto", 1.5, 1.5),
    ],
)
def test_take_stock__draws_less_to_shares_that_are_estimated(
    sizes: list[int], prior: str, weight: Any, pull: float
) -> None:
    made = folder(sizes)
    config = configured(made, prior)
    options = {**config.method.options, "fairness_weight": weight}
    config = config.model_copy(update={"method": MethodSettings(name="fair", **options)})
    _, method = looked_at(made, config)
    assert float(method.get_buffer("pull")) == pull
    method.expect(method.class_prior.clone())  # as shares that are given
    assert float(method.get_buffer("pull")) == (PULL if weight == "auto" else weight)
