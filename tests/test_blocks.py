"""Runs on more images than are labelled at a time: what each round reads, and that such runs resume like any other."""

import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import CLASSES, tiny_config, write_photos
from finealign.classifier import FineAlign
from finealign.config import make_config, resolve
from finealign.images.paths import PathList
from finealign.model.prepare import drawn
from finealign.run.adapt import adapt_into
from finealign.training import features as encoding
from finealign.training import loop
from finealign.training.features import FeatureBank
from finealign.training.outset import tell_strangers
from finealign.training.schedule import Schedule, schedule_of, shuffled
from finealign.training.state import State
from finealign.types import ImageFeatures

Tiny = Callable[[str], str]
# Of 24 photos: three blocks of two steps an epoch, and a last label pass.
BLOCKS: dict[str, Any] = {
    "data__cache": "temporary",
    "training__batch_size": 4,
    "training__block_images": 8,
    "training__epochs": 1,
    "training__anchor_steps": 3,
    "training__anchor_batch_size": 4,
}


class KilledError(BaseException):
    """What stands for a signal that nothing can catch."""


def fit(photos: Path, backbone: str, checkpoints: Path | None = None, **overrides: Any) -> FineAlign:
    model = FineAlign(CLASSES, config=tiny_config(backbone, **(BLOCKS | overrides)))
    return model.fit(photos, checkpoints=checkpoints)


def learned(model: FineAlign) -> dict[str, Tensor]:
    return {**model.norms_, **model.method_.state_dict()}


def same(first: FineAlign, second: FineAlign) -> bool:
    one, other = learned(first), learned(second)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- which images are read when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 7, 64, 65, 1000])
@pytest.mark.parametrize("kept", [1, 10, 64, 500, 8192])
@pytest.mark.parametrize(("epochs", "refresh"), [(1, "auto"), (3, 1), (2, 0.5), (1, 0.2)])
def test_schedule__each_image_once_an_epoch_and_none_older_than_a_block(
    images: int, kept: int, epochs: int, refresh: Any
) -> None:
    training = {"epochs": epochs, "batch_size": 8, "block_images": kept}
    config = make_config({"training": training, "views": {"refresh_epochs": refresh}})
    made = schedule_of(resolve(config, images=images, classes=3, input_size=32), images)
    anew = round(1 / refresh) if refresh != "auto" and refresh < 1 else 1
    assert (made.blocks == 1) == (made.steps_an_epoch == 1 or (images <= kept and anew == 1))
    assert made.blocks >= min(anew, made.steps_an_epoch)
    shares = []
    for epoch in range(epochs):
        rounds = range(epoch * made.blocks, (epoch + 1) * made.blocks)
        batches = [made.batches(number) for number in rounds]
        everything = torch.cat([batch for blocks in batches for batch in blocks])
        assert torch.equal(everything, torch.cat(shuffled(images, made.steps_an_epoch, seed=0, epoch=epoch)))
        assert sorted(everything.tolist()) == list(range(images))
        for number, block in zip(rounds, batches, strict=True):
            read, labelled = torch.cat(block).sort().values, made.labelled(number)
            assert made.images_in(number) == len(read)
            shares += [made.share_done(number, step) for step in range(len(block))]
            if labelled is None:
                assert made.blocks == 1 or (number == 0 and images <= kept)
            else:
                assert torch.equal(labelled, read)
                assert len(labelled) <= max(kept, max(map(len, block)))
    assert shares == [step / len(shares) for step in range(len(shares))]


def test_schedule__the_last_pass_encodes_what_its_steps_read_and_no_more() -> None:
    steps = {"epochs": 1, "batch_size": 10, "block_images": 100, "anchor_steps": 4, "anchor_batch_size": 20}
    config = make_config({"training": steps, "views": {"refresh_epochs": 1}})
    last = schedule_of(config, 1000).labelled(10)
    assert last is not None and len(set(last.tolist())) == 80
    assert schedule_of(config, 100).labelled(1) is None  # a small set is encoded whole


@pytest.mark.parametrize("refresh", [0, 2])
def test_schedule__no_blocks_where_nothing_is_kept_or_all_is_kept_for_good(refresh: int) -> None:
    for training in ({}, {"encoder": "frozen", "learn": "anchors"}):
        values = {"training": {"epochs": 3, "block_images": 64, **training}, "views": {"refresh_epochs": refresh}}
        config = resolve(make_config(values), images=1000, classes=3, input_size=32)
        assert (schedule_of(config, 1000).blocks == 1) == (refresh == 0 or bool(training))


@pytest.mark.parametrize(
    ("images", "given", "most", "epochs", "refresh"),
    [
        (1000, {}, "all", 5, 3),  # as it was for sets of less than an epoch of steps
        (3392, {}, "all", 2, 1),
        (3393, {}, "all", 1, 0.5),  # labelled anew within the epoch, and not by the start alone
        (5120, {}, "all", 1, 0.5),
        (1_000_000, {}, 5120, 1, 0.5),
        (1_000_000, {"max_images": "all"}, "all", 1, 0.5),
        (1_000_000, {"max_images": 2000}, 2000, 2, 1),
        (1_000_000, {"max_images": 9000}, 5120, 1, 0.5),
        (1_000_000, {"max_images": 9000, "epochs": 1}, 9000, 1, 1),
        (1_000_000, {"epochs": 2}, "all", 2, 1),
        (1_000_000, {"steps": 10}, 640, 1, 0.5),
        (1_000_000, {"encoder": "frozen"}, 5120, 1, 1),
    ],
)
def test_resolve__steps_bound_the_images_below_an_epoch(
    images: int, given: dict[str, Any], most: Any, epochs: int, refresh: float
) -> None:
    config = resolve(make_config({"training": given}), images=images, classes=10, input_size=224)
    training = config.training
    assert (training.max_images, training.epochs, config.views.refresh_epochs) == (most, epochs, refresh)
    assert resolve(config, images=images, classes=10, input_size=224) == config


def test_resolve__a_method_that_takes_no_steps_sees_all_images() -> None:
    config = resolve(make_config({}), images=10**6, classes=10, input_size=224, by_steps=False)
    assert config.training.max_images == "all"


def test_drawn__an_even_sample_in_order_that_the_seed_decides() -> None:
    paths = PathList(f"{number:03d}" for number in range(100))
    assert drawn(paths, "all", seed=0) is paths is drawn(paths, 100, seed=0)
    samples = [[int(str(path)) for path in drawn(paths, 30, seed=seed)] for seed in range(200)]
    assert all(len(set(sample)) == 30 and sample == sorted(sample) for sample in samples)
    assert samples[0] == [int(str(path)) for path in drawn(paths, 30, seed=0)] != samples[1]
    times = np.bincount(np.concatenate(samples), minlength=100)
    assert abs(times - 60).max() < 5 * 6.5  # a binomial's standard deviation is 6.5
    assert abs(times[:50].sum() - 3000) < 200


def test_drawn__what_has_a_label_is_always_among_them() -> None:
    paths, known = PathList(f"{number:03d}" for number in range(100)), {"007", "050", "093"}
    for seed in range(20):
        sample = [str(path) for path in drawn(paths, 10, seed=seed, known=known)]
        assert known < set(sample)
        assert len(set(sample)) == 10
        assert sample == sorted(sample)
    assert {str(path) for path in drawn(paths, 2, seed=0, known=known)} < known


# --- blocks in the loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fair", "dpa", "lafter", "self-training"])
def test_adapt__images_are_labelled_by_block_by_the_encoder_as_it_is(
    photos: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    seen: list[tuple[int, list[int], Tensor]] = []
    encode, label = FeatureBank.label_pass, FeatureBank.label_features

    def watched(self: FeatureBank, epoch: int, images: Tensor | None = None, **how: Any) -> None:
        norm = next(iter(self.backbone.norm_parameters().values())).detach().clone()
        assert images is not None
        seen.append((epoch, images.tolist(), norm))
        encode(self, epoch, images, **how)
        assert len(self.bank["weak"]) == len(images) <= 8

    def looked_up(self: FeatureBank, batch: Tensor, epoch: int) -> ImageFeatures:
        assert set(batch.tolist()) <= set(seen[-1][1])
        found = label(self, batch, epoch)
        row = seen[-1][1].index(int(batch[-1]))
        assert torch.equal(found.weak[-1], self.bank["weak"][row])
        return found

    monkeypatch.setattr(FeatureBank, "label_pass", watched)
    monkeypatch.setattr(FeatureBank, "label_features", looked_up)
    model = fit(photos, tiny_backbone("transformer"), method__name=method, training__epochs=2)
    last = method == "fair"  # whose anchors take steps of their own
    assert [epoch for epoch, _, _ in seen] == list(range(7 if last else 6))
    assert sorted(image for _, images, _ in seen[:3] for image in images) == list(range(24))
    assert all(not torch.equal(one[2], other[2]) for one, other in pairwise(seen[:6]))
    assert [record.epoch for record in model.history_] == list(range(1, 7))
    assert all(record.changed == 1 for record in model.history_[:3])  # of images that had no label
    assert model.history_[-1].changed < 1


def test_adapt__a_round_sees_the_folders_prior_and_strangers(
    photos: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    priors, told = [], []
    settle = loop.settle_anchors

    def watched(state: State, *rest: Any, **how: Any) -> None:
        priors.append(state.method.get_buffer("class_prior").clone())
        settle(state, *rest, **how)

    def asked(state: State, source: Any, config: Any, images: Tensor) -> None:
        assert bool((state.belonging[images] == 1).all())  # not looked at before
        tell_strangers(state, source, config, images)
        told.append(state.belonging[images])

    monkeypatch.setattr(loop, "settle_anchors", watched)
    monkeypatch.setattr(loop, "tell_strangers", asked)
    prior = {"red": 10, "green": 20, "blue": 70}
    fit(photos, tiny_backbone("transformer"), method={"name": "fair", "label_balance": 1.0, "class_prior": prior})
    wanted = torch.tensor([prior[name] / 100 for name in CLASSES])
    assert len(priors) == 4 and all(torch.allclose(found, wanted) for found in priors)
    assert len(told) == 2 and all(bool((found <= 1).all() and (found >= 0.01).all()) for found in told)


# --- killed and resumed -----------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, die_at: int | None = None) -> list[list[int]]:
    """The chunks that label passes encode from now on; before the one of this number the process dies.

    What is encoded to see how far images were moved is no part of a label pass, and is not kept.
    """
    chunks: list[list[int]] = []
    views, moved = encoding._LabelViews.__call__, FeatureBank.moved

    def watched(self: Any, photos: Any, chunk: Any) -> Any:
        if len(chunks) == die_at:
            raise KilledError
        chunks.append(list(chunk))
        return views(self, photos, chunk)

    def unwatched(self: FeatureBank, *what: Any) -> float | None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding._LabelViews, "__call__", views)
            return moved(self, *what)

    monkeypatch.setattr(encoding._LabelViews, "__call__", watched)
    monkeypatch.setattr(FeatureBank, "moved", unwatched)
    return chunks


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training__encoder": "frozen"},
        {"method__name": "dpa"},
        {"training__block_images": 24, "training__epochs": 3, "views__refresh_epochs": 1},  # without blocks
        {"views__refresh_epochs": 0.5, "training__block_images": 24},
    ],
    ids=str,
)
def test_adapt__killed_within_a_label_pass_goes_on_within_it(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(encoding, "RENDER_CHUNK", 2)
    monkeypatch.setattr(encoding, "MARK_SECONDS", 0.0)
    backbone = tiny_backbone("transformer")
    with monkeypatch.context() as patch:
        every = counted(patch)
        whole = fit(photos, backbone, **settings)
    for die_at in {3, len(every) * 2 // 3}:  # in the first pass, and in a later one
        folder = tmp_path / f"kept-{die_at}"
        with monkeypatch.context() as patch:
            counted(patch, die_at)
            with pytest.raises(KilledError):
                fit(photos, backbone, folder, **settings)
        with monkeypatch.context() as patch:
            again = counted(patch)
            resumed = fit(photos, backbone, folder, **settings)
        assert same(whole, resumed)
        assert again == every[die_at:]


def test_adapt__a_pass_over_other_images_is_not_taken_up(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may hold the remains of one."""
    monkeypatch.setattr(encoding, "RENDER_CHUNK", 2)
    monkeypatch.setattr(encoding, "MARK_SECONDS", 0.0)
    backbone = tiny_backbone("transformer")
    others = write_photos(tmp_path / "others", each=9)
    with monkeypatch.context() as patch:
        counted(patch, 1)
        with pytest.raises(KilledError):
            fit(others, backbone, tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").glob("*.part")] == ["features-0000.part"]
    chunks = counted(monkeypatch)
    assert same(fit(photos, backbone, tmp_path / "kept"), fit(photos, backbone))
    assert len(chunks) % 2 == 0 and chunks[: len(chunks) // 2] == chunks[len(chunks) // 2 :]


KILLED_BY_ITSELF = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_blocks import encoding, fit
encoding.RENDER_CHUNK, encoding.MARK_SECONDS = 2, 0.0
views, made = encoding._LabelViews.__call__, []

def watched(self, photos, chunk):
    if self.crops:  # as label passes want them
        made.append(chunk)
    if len(made) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return views(self, photos, chunk)

encoding._LabelViews.__call__ = watched
fit(Path({photos!r}), {backbone!r}, Path({kept!r}))
"""


def test_adapt__a_process_killed_within_a_label_pass_is_resumed_bit_for_bit(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "RENDER_CHUNK", 2)
    backbone, kept = tiny_backbone("transformer"), tmp_path / "kept"
    told = {"path": sys.path, "photos": str(photos), "backbone": backbone, "kept": str(kept)}
    done = subprocess.run([sys.executable, "-c", KILLED_BY_ITSELF.format(**told)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert list(kept.glob("features-*.part"))
    chunks = counted(monkeypatch)
    resumed = fit(photos, backbone, kept)
    assert len(chunks) < 16  # of the four passes of four chunks
    assert same(resumed, fit(photos, backbone))


# --- a sample of the images -------------------------------------------------------------------------------------------


def test_adapt_into__a_sample_is_said_to_be_one(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    config = tiny_config(tiny_backbone("transformer"), **BLOCKS, training__max_images=10)
    model = FineAlign(CLASSES, config=config)
    summary = adapt_into(tmp_path / "run", model, photos)
    assert (summary.images, summary.listed) == (10, 24)
    rows = (tmp_path / "run" / "predictions.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [str(path) for path in model.paths_]
    assert len(rows) == 10


def test_schedule__without_blocks_is_one_round_an_epoch() -> None:
    made = Schedule(images=24, epochs=3, batch_size=8, seed=0)
    assert (made.rounds, made.word) == (3, "epoch")
    assert [made.labelled(number) for number in range(4)] == [None] * 4
