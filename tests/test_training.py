"""The loop: what learns and what does not, that it can be repeated and resumed bit for bit, that it sees no label."""

import inspect
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import CLASSES, open_clip_backbone, tiny_config, write_photos
from finealign.backbone.model import OpenClipBackbone
from finealign.classifier import FineAlign
from finealign.config import MethodSettings, read_config
from finealign.errors import ImageInputError, ModelError, NotFiniteError, StoppedError
from finealign.images.decoding import Pixels, read_image
from finealign.images.prefetch import Prefetcher
from finealign.method.registry import create_method, method_settings
from finealign.runtime.devices import choose_workers
from finealign.runtime.distributed import Ranks
from finealign.runtime.progress import Progress
from finealign.training import features as encoding
from finealign.training import loop as training
from finealign.training.checkpoints import read_last_checkpoint
from finealign.training.features import EncodingPlan, FeatureBank
from finealign.training.loop import adapt, settle_anchors, step
from finealign.training.memmap import read_memmap
from finealign.training.schedule import shuffled
from finealign.training.state import EpochMeter, EpochRecord, State, begin
from finealign.types import Gaze, ImageFeatures, Loss, TextFeatures

Tiny = Callable[[str], str]
METHODS = ["fair", "self-training"]
NO_STEPS_OF_ANCHORS: dict[str, Any] = {"training__anchor_steps": 0, "training__last_label_pass": False}
TOWERS = ["transformer", "convolutional"]
nightly = pytest.mark.nightly
Fit = Callable[..., FineAlign]


class KilledError(Exception):
    """What a test raises in the middle of a run."""


def short_config(backbone: str, **overrides: Any) -> Any:
    """The anchors take no steps of their own, which have tests of their own."""
    return tiny_config(backbone, **NO_STEPS_OF_ANCHORS | overrides)


def killed_after(epochs: int, photos: Path, backbone: str, checkpoints: Path, **overrides: Any) -> None:
    """A run that ends when the record of the last of these epochs is out and its checkpoint is not."""

    def stop(record: EpochRecord) -> None:
        if record.epoch == epochs:
            raise KilledError

    model = FineAlign(CLASSES, config=short_config(backbone, **overrides))
    with pytest.raises(KilledError):
        model.fit(photos, checkpoints=checkpoints, on_epoch=stop)


def fit(photos: Path, backbone: str, checkpoints: Path | None = None, **overrides: Any) -> FineAlign:
    model = FineAlign(CLASSES, config=short_config(backbone, **overrides))
    return model.fit(photos, checkpoints=checkpoints)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; nothing may write into them."""
    return write_photos(tmp_path_factory.mktemp("training") / "photos")


@pytest.fixture(scope="module")
def uninterrupted(photos: Path, tiny_backbone: Tiny) -> Fit:
    """The transformer fitted by these settings, once for all tests that hold another run against it."""
    made: dict[str, FineAlign] = {}

    def make(**settings: Any) -> FineAlign:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = fit(photos, tiny_backbone("transformer"), **settings)
        return made[key]

    return make


def state(model: FineAlign) -> dict[str, torch.Tensor]:
    with model.backbone_.lend(model.norms_):
        weights = open_clip_backbone(model).model.state_dict()
        backbone = {f"backbone.{name}": value.clone() for name, value in weights.items()}
    return backbone | {f"method.{name}": value for name, value in model.method_.state_dict().items()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


@pytest.mark.parametrize("tower", TOWERS)
def test_adapt__only_norms_and_anchors_change(photos: Path, tiny_backbone: Tiny, tower: str) -> None:
    before = state(FineAlign(CLASSES, config=short_config(tiny_backbone(tower), method__name="cupl")).fit(photos))
    model = fit(photos, tiny_backbone(tower))
    norms = {f"backbone.visual.{name}" for name in model.backbone_.norm_parameters()}
    after = {name: value for name, value in state(model).items() if name in before}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == norms
    assert not torch.equal(model.method_.state_dict()["anchors"], before["method.prototypes"])


@pytest.mark.parametrize(("learn", "norms", "anchors"), [("norms", True, False), ("anchors", False, True)])
def test_adapt__learns_only_what_is_asked(uninterrupted: Fit, learn: str, norms: bool, anchors: bool) -> None:
    start = uninterrupted(method__name="cupl")
    model = uninterrupted(training__learn=learn)
    changed = differing(
        {name: value for name, value in state(start).items() if name.startswith("backbone")},
        {name: value for name, value in state(model).items() if name.startswith("backbone")},
    )
    assert bool(changed) == norms
    moved = not torch.equal(model.method_.state_dict()["anchors"], start.method_.state_dict()["prototypes"])
    assert moved == anchors


@pytest.mark.parametrize(
    ("method", "tower"),
    [
        ("fair", "transformer"),
        ("self-training", "convolutional"),
        pytest.param("fair", "convolutional", marks=nightly),
        pytest.param("self-training", "transformer", marks=nightly),
    ],
)
def test_adapt__same_seed_gives_identical_weights(photos: Path, tiny_backbone: Tiny, tower: str, method: str) -> None:
    first, second = (state(fit(photos, tiny_backbone(tower), method__name=method)) for _ in range(2))
    assert not differing(first, second)


def test_adapt__another_seed_gives_other_weights(uninterrupted: Fit) -> None:
    assert differing(state(uninterrupted()), state(uninterrupted(seed=1)))


@pytest.mark.parametrize(
    ("encoder", "refresh"),
    [
        ("full", 2),
        ("frozen", 1),
        *(pytest.param(*case, marks=nightly) for case in [("full", 0), ("full", 1), ("frozen", 0), ("frozen", 2)]),
    ],
)
def test_adapt__resumed_is_bit_for_bit_the_uninterrupted(
    photos: Path, tiny_backbone: Tiny, uninterrupted: Fit, tmp_path: Path, encoder: str, refresh: int
) -> None:
    settings: dict[str, Any] = {"training__encoder": encoder, "views__refresh_epochs": refresh, "training__epochs": 4}
    backbone = tiny_backbone("transformer")
    whole = state(uninterrupted(**settings))
    killed_after(3, photos, backbone, tmp_path / "kept", **settings)
    resumed = fit(photos, backbone, checkpoints=tmp_path / "kept", **settings)
    assert [record.epoch for record in resumed.history_] == [3, 4]
    assert not differing(whole, state(resumed))


def test_adapt__a_finished_run_has_nothing_left_to_do(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    first = fit(photos, tiny_backbone("transformer"), checkpoints=tmp_path / "kept")
    again = fit(photos, tiny_backbone("transformer"), checkpoints=tmp_path / "kept")
    assert again.history_ == []
    assert not differing(state(first), state(again))


def test_adapt__class_folders_mean_nothing(
    photos: Path, tiny_backbone: Tiny, uninterrupted: Fit, tmp_path: Path
) -> None:
    """Photos under shuffled folder names, in the same order, give the same weights: no label is read."""
    shuffled = tmp_path / "shuffled"
    # Sorted order is kept by the new names; what each folder was called is lost.
    for position, path in enumerate(
        sorted(photos.rglob("*.png"), key=lambda path: path.relative_to(photos).as_posix())
    ):
        target = shuffled / CLASSES[position % 3] / "x"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / f"{position:03d}.png")
    ordered = sorted(shuffled.rglob("*.png"), key=lambda path: path.name)
    second = FineAlign(CLASSES, config=short_config(tiny_backbone("transformer"))).fit(ordered)
    assert not differing(state(uninterrupted()), state(second))


@pytest.mark.parametrize("function", [adapt, FineAlign.fit, FineAlign.__init__])
def test_training__takes_no_label_unless_it_is_given(function: Callable[..., Any]) -> None:
    """``fit`` takes those of a few images that a user knows, and scikit-learn's ``y``, at which it does not look."""
    parameters = inspect.signature(function).parameters
    left_out = {name for name in ("y", "labels") if name in parameters and parameters[name].default is None}
    names = set(parameters) - left_out
    assert not names & {"y", "label", "labels", "truth", "target", "targets"}


@pytest.mark.parametrize("tower", ["convolutional", pytest.param("transformer", marks=nightly)])
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
    config = short_config(tiny_backbone("transformer"), training__batch_size=4)
    model = FineAlign(classes, config=config).fit(photos)
    assert all(np.isfinite(record.loss) for record in model.history_)
    assert model.predict_proba(photos).shape == (24, 40)


def test_adapt__a_loss_that_is_not_finite_stops_with_advice(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"no longer finite in epoch 1.*learning_rate"):
        fit(photos, tiny_backbone("transformer"), tmp_path / "kept", training__learning_rate=1e30, training__epochs=9)


NOT_FINITE: dict[str, Callable[[State, Loss], object]] = {
    "loss": lambda state, loss: loss.total.data.fill_(torch.nan),
    "gradient": lambda state, loss: next(iter(state.norms.values())).data.fill_(torch.inf),
}


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("loss", 1),
        ("gradient", 4),
        *(pytest.param("loss", number, marks=nightly) for number in (3, 4, 9)),
        *(pytest.param("gradient", number, marks=nightly) for number in (1, 3, 9)),
    ],
)
def test_adapt__names_the_images_of_the_batch_that_was_not_finite_and_keeps_what_was_good(
    photos: Path,
    tiny_backbone: Tiny,
    uninterrupted: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    number: int,
) -> None:
    """24 images in three batches an epoch; a checkpoint after every step."""
    calls = 0
    step = training.step

    def poisoned(state: State, features: Any, strong: torch.Tensor, belonging: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        loss, pseudo = step(state, features, strong, belonging)
        if calls == number:
            NOT_FINITE[what](state, loss)
        return loss, pseudo

    backbone, folder = tiny_backbone("transformer"), tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setattr(training, "step", poisoned)
        with pytest.raises(NotFiniteError) as caught:
            fit(photos, backbone, folder, training__checkpoint_minutes=0)
    assert calls == number
    epoch, place = divmod(number - 1, 3)
    listed = sorted(photos.rglob("*.png"), key=lambda path: path.relative_to(photos).as_posix())
    batch = shuffled(24, 3, seed=0, epoch=epoch)[place]
    assert caught.value.images == [str(listed[image]) for image in batch.tolist()]
    assert caught.value.images[0] in str(caught.value)
    found = read_last_checkpoint(folder)
    assert (found is None) == (number == 1)
    if found:
        assert (found.epoch, found.step) == divmod(number - 1, 3)
        assert all(bool(value.isfinite().all()) for value in found.tensors.values())
    resumed = fit(photos, backbone, folder, training__checkpoint_minutes=0)
    assert not differing(state(uninterrupted()), state(resumed))


def test_settle_anchors__not_finite_is_found_there_too(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    state, source, config = begun(photos, tiny_backbone("transformer"), tmp_path)
    source.bank["crops"][5] = torch.nan
    with pytest.raises(NotFiniteError) as caught:
        settle_anchors(state, source, config, 0)
    assert "number 5" in caught.value.images


# --- asked to stop ----------------------------------------------------------------------------------------------------


class StopsIn(Progress):
    """Is asked to stop in a stage, when so many images of it are done."""

    def __init__(self, stage: str, images: int) -> None:
        self.where, self.left, self.asked = stage, images, False

    @property
    def asked_to_stop(self) -> bool:
        return self.asked

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Any]:
        with super().stage(name, total) as stage:
            yield _Counts(self, stage) if name == self.where else stage


class _Counts:
    def __init__(self, progress: StopsIn, inner: Any) -> None:
        self.progress, self.note = progress, inner.note

    def advance(self, images: int) -> None:
        self.progress.left -= images
        self.progress.asked |= self.progress.left <= 0


STEPS = [1, 2, 3, 5, 9]  # of nine
STOPPED: list[dict[str, Any]] = [
    {},
    {"views__refresh_epochs": 0},
    {"views__refresh_epochs": 1, "training__anchor_steps": 4, "training__last_label_pass": True},
    {"training__encoder": "frozen"},
    {"method__name": "dpa"},
    {"method__name": "lafter"},
    {"method": {"name": "fair", "weight": "margin*agreement*confusion", "teacher_momentum": 0.5}},
]


def stopped(settings: dict[str, Any], steps: int) -> Any:
    """By the usual settings within an epoch and at the ends of the first and the last, by all others within one."""
    always = steps == 5 or (not settings and steps in (3, 9))
    return pytest.param(settings, steps, marks=() if always else nightly, id=f"{steps}-{settings}")


@pytest.mark.parametrize(("settings", "steps"), list(itertools.starmap(stopped, itertools.product(STOPPED, STEPS))))
def test_adapt__stopped_and_resumed_is_bit_for_bit_the_uninterrupted(
    photos: Path, tiny_backbone: Tiny, uninterrupted: Fit, tmp_path: Path, settings: dict[str, Any], steps: int
) -> None:
    backbone, folder = tiny_backbone("transformer"), tmp_path / "kept"
    whole = uninterrupted(**settings)
    model = FineAlign(CLASSES, config=short_config(backbone, **settings))
    with pytest.raises(StoppedError, match=f"after step {(steps - 1) % 3 + 1} of epoch {(steps - 1) // 3 + 1} of 3"):
        model.fit(photos, checkpoints=folder, progress=StopsIn("adapting", 8 * steps))
    resumed = fit(photos, backbone, folder, **settings)
    assert not differing(state(whole), state(resumed))
    for told, record in zip(resumed.history_, whole.history_[(steps - 1) // 3 :], strict=True):
        assert replace(told, seconds=0, images_per_second=0) == replace(record, seconds=0, images_per_second=0)


@pytest.mark.parametrize("stage", ["reading images", "label pass", "strong views"])
def test_adapt__stops_in_any_stage_and_leaves_what_was_there(
    photos: Path,
    tiny_backbone: Tiny,
    uninterrupted: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    monkeypatch.setattr("finealign.runtime.progress.IMAGES_BETWEEN", 1)
    backbone, folder = tiny_backbone("transformer"), tmp_path / "kept"
    settings: dict[str, Any] = {"training__encoder": "frozen"} if stage == "strong views" else {}
    model = FineAlign(CLASSES, config=short_config(backbone, **settings))
    with pytest.raises(StoppedError):
        model.fit(photos, checkpoints=folder, progress=StopsIn(stage, 1))
    assert read_last_checkpoint(folder) is None
    assert not differing(state(uninterrupted(**settings)), state(fit(photos, backbone, folder, **settings)))


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


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"training__encoder": "frozen"}, pytest.param({"method__name": "self-training"}, marks=nightly)],
    ids=str,
)
def test_adapt__views_made_by_processes_give_identical_weights(
    photos: Path, tiny_backbone: Tiny, settings: dict[str, Any]
) -> None:
    first, second = (
        state(fit(photos, tiny_backbone("transformer"), data__workers=workers, training__epochs=2, **settings))
        for workers in (0, 2)
    )
    assert not differing(first, second)


@pytest.mark.parametrize(("wanted", "expected"), [(0, 0), (3, 3), ("auto", 0)])
def test_adapt__views_are_made_by_as_many_processes_as_asked(
    photos: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch, wanted: int | str, expected: int
) -> None:
    seen: list[int] = []

    def watched(shared: Any, *, workers: int, device: torch.device) -> Prefetcher[Any]:
        seen.append(workers)
        return Prefetcher(shared, device=device)

    monkeypatch.setattr(encoding, "Prefetcher", watched)
    fit(photos, tiny_backbone("transformer"), data__workers=wanted, training__epochs=1)
    assert set(seen) == {expected}


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 1), (4, 3), (9, 8), (64, 8)])
def test_choose_workers__leave_a_core_to_the_model(monkeypatch: pytest.MonkeyPatch, cores: int, expected: int) -> None:
    monkeypatch.setattr("finealign.runtime.devices.usable_cores", lambda: cores)
    assert choose_workers("auto", torch.device("cuda")) == expected
    assert choose_workers("auto", torch.device("cpu")) == 0
    assert choose_workers(5, torch.device("cpu")) == choose_workers(5, torch.device("cuda")) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_adapt__an_image_that_goes_away_is_named(tmp_path: Path, tiny_backbone: Tiny, workers: int) -> None:
    """Images beyond the cache are read at each use; the command line prints the message as it is."""
    photos = write_photos(tmp_path / "photos")

    def remove(record: EpochRecord) -> None:
        (photos / "red" / "3.png").unlink()

    config = short_config(tiny_backbone("transformer"), data__cache_gb=0, data__workers=workers)
    with pytest.raises(ImageInputError, match=r"^'[^']*3.png' could be read at the start of the run") as caught:
        FineAlign(CLASSES, config=config).fit(photos, on_epoch=remove)
    assert "Traceback" not in str(caught.value)


# --- label features ---------------------------------------------------------------------------------------------------


def kept_features(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".safetensors") for path in folder.glob("features-*"))


def source_of(model: FineAlign, images: list[Pixels], folder: Path, **how: Any) -> FeatureBank:
    progress = how.pop("progress", Progress())
    plan = EncodingPlan(**({"refresh": 1, "crops": True} | how))
    return FeatureBank(images, model.predictor_.views, model.backbone_, plan, folder=folder, progress=progress)


@pytest.fixture(scope="module")
def start(uninterrupted: Fit) -> FineAlign:
    return uninterrupted(method__name="cupl", views__crops=3)


@pytest.fixture(scope="module")
def pictures(photos: Path) -> list[Pixels]:
    return [np.array(read_image(path, max_pixels=10**6)) for path in sorted(photos.rglob("*.png"))[:7]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("refresh", [0, 1])
def test_label_features__are_those_of_each_images_views(
    start: FineAlign,
    pictures: list[Pixels],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refresh: int,
    chunk: int,
    workers: int,
) -> None:
    monkeypatch.setattr(encoding, "RENDER_CHUNK", chunk)
    source = source_of(start, pictures, tmp_path, refresh=refresh, workers=workers)
    source.start_epoch(4)
    found = source.label_features(torch.tensor([5, 0, 2]), 4)
    embed = start.backbone_.embed
    for row, image in enumerate((5, 0, 2)):
        pixels = pictures[image]
        weak = embed(start.predictor_.views.weak(pixels)[None])[0]
        crops = embed(start.predictor_.views.crops(pixels, epoch=4, image=image))
        torch.testing.assert_close(found.weak[row], weak, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.crops[row], crops, rtol=0, atol=1e-6)
    assert not found.weak.is_inference()
    assert not found.crops.is_inference()
    assert kept_features(tmp_path) == (["features-0004"] if refresh else [])
    if refresh:
        kept = read_memmap(tmp_path / source.bank_file)
        assert kept["weak"].shape == (7, 32)
        assert torch.equal(kept["crops"][[5, 0, 2]], found.crops)


@pytest.mark.parametrize("refresh", [0, 1])
def test_label_features__of_a_method_without_crops(
    start: FineAlign, pictures: list[Pixels], tmp_path: Path, refresh: int
) -> None:
    source = source_of(start, pictures, tmp_path, refresh=refresh, crops=False)
    source.start_epoch(0)
    found = source.label_features(torch.tensor([6, 1]), 0)
    assert found.crops.shape == (2, 0, 32)
    for row, image in enumerate((6, 1)):
        weak = start.backbone_.embed(start.predictor_.views.weak(pictures[image])[None])[0]
        torch.testing.assert_close(found.weak[row], weak, rtol=0, atol=1e-6)


@pytest.mark.parametrize("learn", ["anchors", "norms+anchors"])
def test_adapt__kept_for_one_epoch_or_not_at_all_is_the_same_where_no_encoder_learns(
    uninterrupted: Fit, learn: str
) -> None:
    """The views of an epoch are the same; only as the encoder learns do its features grow old within it."""
    kept, afresh = (state(uninterrupted(training__learn=learn, views__refresh_epochs=refresh)) for refresh in (1, 0))
    # Encoded in other batches, which may round otherwise.
    close = all(torch.allclose(value, afresh[name], rtol=0, atol=1e-6) for name, value in kept.items())
    assert close == (learn == "anchors")


@pytest.mark.parametrize(
    ("refresh", "epochs", "expected"),
    [
        (0, 3, []),
        (1, 1, ["features-0000"]),
        (1, 5, ["features-0000", "features-0003", "features-0004"]),
        (2, 5, ["features-0000", "features-0002", "features-0004"]),
        (9, 3, ["features-0000"]),
    ],
)
def test_adapt__keeps_the_first_and_the_last_two_files_of_features(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, refresh: int, epochs: int, expected: list[str]
) -> None:
    settings: dict[str, Any] = {"views__refresh_epochs": refresh, "training__epochs": epochs}
    fit(photos, tiny_backbone("transformer"), tmp_path / "kept", **settings)
    assert kept_features(tmp_path / "kept") == expected
    found = read_last_checkpoint(tmp_path / "kept")
    assert found is not None
    assert found.values["features"] == (f"{expected[-1]}.safetensors" if expected else "")


def test_adapt__without_checkpoints_leaves_no_features(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    seen: list[Path] = []
    model = FineAlign(CLASSES, config=short_config(tiny_backbone("transformer")))
    model.fit(photos, on_epoch=lambda record: seen.extend((tmp_path / "temporary").rglob("features-*")))
    assert seen
    assert not list((tmp_path / "temporary").rglob("features-*"))


def test_label_pass__keeps_its_own_file_beyond_four_digits(
    start: FineAlign, pictures: list[Pixels], tmp_path: Path
) -> None:
    source = source_of(start, pictures, tmp_path)
    for epoch in (9998, 9999, 10_000, 10_001):
        source.start_epoch(epoch)
        assert (tmp_path / source.bank_file).is_file()
    assert kept_features(tmp_path) == ["features-10000", "features-10001"]


def test_adapt__resumed_uses_the_features_that_the_checkpoint_names(
    photos: Path, tiny_backbone: Tiny, uninterrupted: Fit, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"views__refresh_epochs": 9, "training__epochs": 4}
    backbone, folder = tiny_backbone("transformer"), tmp_path / "kept"
    whole = state(uninterrupted(**settings))
    killed_after(3, photos, backbone, folder, **settings)
    shutil.copytree(folder, tmp_path / "other")
    features = folder / "features-0000.safetensors"
    # A later file, which no checkpoint names, and one of a pass that was cut short: neither is looked at.
    (folder / "features-0009.safetensors").write_bytes(bytes(100))
    (folder / "features-0001.part").write_bytes(bytes(100))
    before = features.read_bytes()
    assert not differing(whole, state(fit(photos, backbone, folder, **settings)))
    assert features.read_bytes() == before

    other = tmp_path / "other" / "features-0000.safetensors"
    other.write_bytes(before[:-4000] + bytes(4000))
    assert differing(whole, state(fit(photos, backbone, tmp_path / "other", **settings)))


@pytest.mark.parametrize("encoder", ["full", pytest.param("frozen", marks=nightly)])
@pytest.mark.parametrize("damage", ["missing", "torn", "empty", "a folder"])
def test_adapt__resumed_without_its_features(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, damage: str, encoder: str
) -> None:
    settings: dict[str, Any] = {"views__refresh_epochs": 9, "training__epochs": 4, "training__encoder": encoder}
    backbone, folder = tiny_backbone("transformer"), tmp_path / "kept"
    killed_after(3, photos, backbone, folder, **settings)
    features = folder / "features-0000.safetensors"
    content = features.read_bytes()
    features.unlink()
    if damage == "torn":
        features.write_bytes(content[:-1])
    elif damage == "empty":
        features.touch()
    elif damage == "a folder":
        features.mkdir()
    expected = r"features-0000.safetensors, which the checkpoint beside it needs, cannot be read: .*--overwrite"
    with pytest.raises(ModelError, match=expected):
        fit(photos, backbone, folder, **settings)


@pytest.mark.parametrize("refresh", [2, *(pytest.param(refresh, marks=nightly) for refresh in (0, 1, 9))])
def test_adapt__resumed_from_the_last_but_one_checkpoint(
    photos: Path, tiny_backbone: Tiny, uninterrupted: Fit, tmp_path: Path, refresh: int
) -> None:
    """Two are kept so that a torn last one loses an epoch, not the run."""
    settings: dict[str, Any] = {"views__refresh_epochs": refresh, "training__epochs": 4}
    backbone, folder = tiny_backbone("transformer"), tmp_path / "kept"
    whole = state(uninterrupted(**settings))
    killed_after(3, photos, backbone, folder, **settings)
    last = folder / "epoch-0002.safetensors"
    last.write_bytes(last.read_bytes()[:-10])
    resumed = fit(photos, backbone, folder, **settings)
    assert [record.epoch for record in resumed.history_] == [2, 3, 4]
    assert not differing(whole, state(resumed))


@pytest.mark.parametrize("call", [1, pytest.param(2, marks=nightly), pytest.param(5, marks=nightly), 6], ids=str)
def test_label_pass__cut_short_leaves_no_file_under_its_name(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """24 images in three chunks, the weak views of each and then its crops: six calls of the encoder."""
    monkeypatch.setattr(encoding, "RENDER_CHUNK", 8)
    backbone, folder = tiny_backbone("transformer"), tmp_path / "kept"
    whole = state(fit(photos, backbone))
    calls = 0
    embed = OpenClipBackbone.embed

    def killed(self: OpenClipBackbone, images: torch.Tensor, gaze: Gaze | None = None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KilledError
        return embed(self, images, gaze)

    with monkeypatch.context() as patch:
        patch.setattr(OpenClipBackbone, "embed", killed)
        with pytest.raises(KilledError):
            fit(photos, backbone, folder)
    assert not list(folder.rglob("*.safetensors"))
    assert not differing(whole, state(fit(photos, backbone, folder)))
    assert not list(folder.rglob("*.part"))


# --- steps of the anchors alone ---------------------------------------------------------------------------------------

SETTLING: dict[str, Any] = {"training__anchor_steps": 4, "training__anchor_batch_size": 10}


def begun(photos: Path, backbone: str, folder: Path, **overrides: Any) -> tuple[State, FeatureBank, Any]:
    """A run before its first step, its label features kept."""
    settings = {"data__cache": "temporary", "views__refresh_epochs": 1} | SETTLING | overrides
    model = FineAlign(CLASSES, config=short_config(backbone, **settings)).unlearned()
    images = [np.array(read_image(path, max_pixels=10**6)) for path in sorted(photos.rglob("*.png"))]
    source = source_of(model, images, folder, crops=model.method_.uses_crops)
    source.label_pass(0)
    return begin(model.backbone_, model.method_, model.config_, images=len(images)), source, model.config_


def values(state: State) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in (state.norms | state.method.state_dict()).items()}


def settled(photos: Path, backbone: str, folder: Path, *, epoch: int = 0, **overrides: Any) -> set[str]:
    """What the anchors' own steps changed."""
    state, source, config = begun(photos, backbone, folder, **overrides)
    before = values(state)
    settle_anchors(state, source, config, epoch)
    return differing(before, values(state))


def test_settle_anchors__moves_the_anchors_and_no_norm(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    state, source, config = begun(photos, tiny_backbone("transformer"), tmp_path, training__norm_weight_decay=0.5)
    before = values(state)
    settle_anchors(state, source, config, 0)
    changed = differing(before, values(state))
    assert "anchors" in changed
    assert not changed & state.norms.keys()
    assert all(parameter.grad is None for parameter in state.norms.values())
    assert {float(kept["step"]) for kept in state.optimizer.state.values()} == {4.0}


@pytest.mark.parametrize(
    "overrides",
    [
        *({"method__name": name} for name in ("self-training", "dpa", "lafter", "microclip")),
        {"training__anchor_steps": 0},
        {"training__learn": "norms", "training__anchor_steps": "auto"},
    ],
    ids=str,
)
def test_settle_anchors__leaves_other_methods_and_anchors_that_do_not_learn_alone(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    assert not settled(photos, tiny_backbone("transformer"), tmp_path, **overrides)


def test_settle_anchors__depends_on_seed_and_epoch_alone(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    found: list[torch.Tensor] = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        state, source, config = begun(photos, tiny_backbone("transformer"), tmp_path / str(len(found)))
        torch.manual_seed(len(found))
        settle_anchors(state, source, config.model_copy(update={"seed": seed}), epoch)
        found.append(values(state)["anchors"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


@pytest.mark.parametrize(("share", "views"), [(0.0, {0, 1}), (0.75, {0, 1, "whole"}), (1.0, {0, 1, "whole"})])
def test_settle_anchors__takes_each_image_in_turn_by_one_of_its_crops_or_whole(
    share: float,
    views: set[int | str],
    photos: Path,
    tiny_backbone: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole only where whole images count for something in labels."""
    settings: dict[str, Any] = {"training__anchor_batch_size": 12, "method__whole_share": share}
    state, source, config = begun(photos, tiny_backbone("transformer"), tmp_path, **settings)
    seen: list[tuple[int, int | str]] = []

    def watched(_: State, features: Any, strong: torch.Tensor, belonging: torch.Tensor) -> tuple[Loss, None]:
        for row in strong:
            crops = (source.bank["crops"] == row).all(-1).nonzero().tolist()
            whole = (source.bank["weak"] == row).all(-1).nonzero().tolist()
            ((image, view),) = crops or [(image, "whole") for (image,) in whole]
            seen.append((image, view))
        return Loss(torch.zeros(())), None

    monkeypatch.setattr(training, "step", watched)
    settle_anchors(state, source, config, 0)
    images = [image for image, _ in seen]
    assert sorted(images[:24]) == sorted(images[24:]) == list(range(24))  # four steps of 12 of 24 images
    assert images[:24] != images[24:]
    assert {view for _, view in seen} == views


LAST: dict[str, Any] = {**SETTLING, "training__last_label_pass": True, "training__epochs": 3}


@pytest.mark.parametrize(
    ("encoder", "refresh"),
    [("full", 2), pytest.param("full", 1, marks=nightly), pytest.param("frozen", 2, marks=nightly)],
)
def test_adapt__with_steps_of_the_anchors_resumed_is_bit_for_bit_the_uninterrupted(
    photos: Path, tiny_backbone: Tiny, uninterrupted: Fit, tmp_path: Path, encoder: str, refresh: int
) -> None:
    settings: dict[str, Any] = {**LAST, "training__encoder": encoder, "views__refresh_epochs": refresh}
    backbone = tiny_backbone("transformer")
    whole = state(uninterrupted(**settings))
    killed_after(2, photos, backbone, tmp_path / "kept", **settings)
    resumed = fit(photos, backbone, checkpoints=tmp_path / "kept", **settings)
    assert [record.epoch for record in resumed.history_] == [2, 3]
    assert not differing(whole, state(resumed))
    # A finished run has nothing left to do, and one whose last checkpoint is torn an epoch and the last steps.
    last = tmp_path / "kept" / "epoch-0003.safetensors"
    for left in ([], [3]):
        again = fit(photos, backbone, checkpoints=tmp_path / "kept", **settings)
        assert [record.epoch for record in again.history_] == left
        assert not differing(whole, state(again))
        last.write_bytes(last.read_bytes()[:-10])


def test_adapt__last_label_pass_is_for_the_anchors_last_steps(
    photos: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    encode = FeatureBank.label_pass

    def watched(self: FeatureBank, epoch: int, images: torch.Tensor | None = None, **how: Any) -> None:
        passes.append(epoch)
        encode(self, epoch, images, **how)

    monkeypatch.setattr(FeatureBank, "label_pass", watched)

    def anchors(**overrides: Any) -> torch.Tensor:
        passes.clear()
        settings = {**LAST, "training__epochs": 1, "views__refresh_epochs": 1} | overrides
        found = fit(photos, tiny_backbone("transformer"), **settings).method_.state_dict()["anchors"]
        assert isinstance(found, torch.Tensor)
        return found

    last = anchors()
    assert passes == [0, 1]
    assert not torch.equal(anchors(training__last_label_pass=False), last)
    assert passes == [0]
    # Where there are no such steps the pass would be for nothing.
    for overrides in ({"training__anchor_steps": 0}, {"method__name": "dpa"}, {"training__encoder": "frozen"}):
        anchors(**overrides)
        assert passes == [0]
    anchors(
        views__refresh_epochs=0, training__anchor_steps="auto"
    )  # nothing is kept that the anchors could take steps on
    assert passes == []


@pytest.mark.parametrize(("encoder", "passes"), [("full", []), ("frozen", [0])])
def test_adapt__the_reconstruction_takes_no_step_but_one_a_batch(
    photos: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch, encoder: str, passes: list[int]
) -> None:
    """Labels are encoded at every step, or once where the encoder is frozen; the images are equally believed."""
    label_passes, belonging = [], []
    encode, take = FeatureBank.label_pass, training.step

    def watched_pass(self: FeatureBank, epoch: int, images: torch.Tensor | None = None, **how: Any) -> None:
        label_passes.append(epoch)
        encode(self, epoch, images, **how)

    def watched_step(state: State, *rest: Any) -> Any:
        belonging.append(state.belonging[rest[-1]])
        return take(state, *rest)

    monkeypatch.setattr(FeatureBank, "label_pass", watched_pass)
    monkeypatch.setattr(training, "step", watched_step)
    quick: dict[str, Any] = {"device": "cpu", "precision": "fp32", "backbone": tiny_backbone("transformer")}
    config = read_config(base=method_settings("fair@reconstruction"), training__encoder=encoder, **quick)
    model = FineAlign(CLASSES, config=config).fit(photos)
    assert len(belonging) == len(model.history_) == 15  # 24 images are one batch
    assert all((part == 1).all() for part in belonging)
    assert label_passes == passes
    assert torch.allclose(model.method_.get_buffer("class_prior"), torch.full((3,), 1 / 3))
    assert not torch.equal(model.method_.get_parameter("anchors"), model.method_.get_buffer("fixed"))


# --- methods that survey ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stata", "transclip"])
def test_fit__labels_the_images_together_and_trains_nothing(
    name: str, photos: Path, tiny_backbone: Tiny, uninterrupted: Fit, tmp_path: Path
) -> None:
    before = uninterrupted(method__name="cupl")
    model = fit(photos, tiny_backbone("transformer"), method__name=name)
    kept = model.method_.state_dict()
    assert model.history_ == []
    weak = model.features(model.paths_, crops=False)[0].weak
    torch.testing.assert_close(kept["images"], weak, rtol=0, atol=1e-6)
    assert kept["assigned"].shape == (24, 3)
    unchanged = open_clip_backbone(model).model.state_dict()
    assert not differing(unchanged, open_clip_backbone(before).model.state_dict())
    found = model.predict_proba(photos)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(found, kept["assigned"].numpy(), atol=0.05)
    assert np.abs(found - before.predict_proba(photos)).max() > 0.05
    model.save(tmp_path / "model")
    loaded = FineAlign.load(tmp_path / "model", device="cpu", precision="fp32")
    np.testing.assert_allclose(loaded.predict_proba(photos), found, atol=1e-6)


@pytest.mark.parametrize("refresh", [0, 2])
def test_adapt__dpa_surveys_all_images_before_each_epoch(
    photos: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch, refresh: int
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr("finealign.methods.dpa.Dpa.survey", lambda self, weak: seen.append(weak.clone()))
    fit(photos, tiny_backbone("transformer"), method__name="dpa", views__refresh_epochs=refresh, training__epochs=3)
    assert [weak.shape for weak in seen] == [(24, 32)] * 3
    # The encoder learns: what is kept is as it was, what is encoded afresh is not.
    assert torch.equal(seen[0], seen[1]) == (refresh == 2)
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("method", [pytest.param("dpa", marks=nightly), "lafter", "microclip"])
def test_adapt__peers_resumed_are_bit_for_bit_the_uninterrupted(
    photos: Path, tiny_backbone: Tiny, uninterrupted: Fit, tmp_path: Path, method: str
) -> None:
    settings: dict[str, Any] = {"method__name": method, "views__refresh_epochs": 2}
    backbone = tiny_backbone("transformer")
    whole = uninterrupted(**settings)
    killed_after(2, photos, backbone, tmp_path / "kept", **settings)
    assert not differing(state(whole), state(fit(photos, backbone, tmp_path / "kept", **settings)))
    if method == "lafter":
        start = FineAlign(CLASSES, config=short_config(backbone, **settings)).unlearned()
        assert whole.method_.prompts is not None
        assert start.method_.prompts is not None
        assert not torch.equal(whole.method_.prompts, start.method_.prompts)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "count"), [(1, 1), (7, 3), (64, 1), (65, 2), (100, 7)])
def test_shuffled__each_image_once_and_no_runt(images: int, count: int) -> None:
    batches = shuffled(images, count, seed=3, epoch=5)
    assert sorted(torch.cat(batches).tolist()) == list(range(images))
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == count
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("name", ["dpa", "fair", "lafter", "microclip", "self-training"])
def test_step__looks_at_no_value_of_a_tensor(name: str) -> None:
    """Those of the device "meta" have none. Looking at one would make the program wait for a GPU at every step."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, 16, generator=generator), dim=-1)

    texts = TextFeatures(names=rows(5), descriptions=rows(15), class_of=torch.arange(5).repeat_interleave(3))
    method = create_method(MethodSettings(name=name), texts, logit_scale=100.0, token_width=16)
    if method.surveys:
        method.survey(rows(8))
    method = method.to("meta").requires_grad_(True)
    state = State(
        norms={},
        method=method,
        optimizer=torch.optim.AdamW(method.parameters()),
        labels=torch.full((8,), -1),
        meter=EpochMeter(classes=5),
        ranks=Ranks(),
        belonging=torch.ones(8),
        known=torch.full((8,), -1),
    )
    features = ImageFeatures(weak=rows(8).to("meta"), crops=rows(8, 4).to("meta"))
    strong = rows(8).to("meta").requires_grad_()
    loss, pseudo = step(state, features, strong, torch.arange(8))
    assert loss.total.device == pseudo.labels.device == torch.device("meta")
    assert strong.grad is not None


@pytest.mark.parametrize("workers", [0, 2])
def test_label_pass__crops_cut_on_the_device_are_those_of_the_cpu(
    start: FineAlign, pictures: list[Pixels], tmp_path: Path, workers: int
) -> None:
    """As a GPU does it: images go there whole. What differs is rounding, by 2 of 255 at the most."""
    found = []
    for late in (False, True):
        source = source_of(start, pictures, tmp_path / str(late), workers=workers)
        source.cut_late = late
        source.label_pass(3)
        found.append({name: kept.clone() for name, kept in source.bank.items()})
    assert torch.equal(found[0]["weak"], found[1]["weak"])
    torch.testing.assert_close(found[0]["crops"], found[1]["crops"], rtol=0, atol=2e-3)
    assert not torch.equal(found[0]["crops"], found[0]["crops"].roll(1, 0))
