"""Sources of image features for the training loop: encoded at every step, kept for some epochs, or encoded once.

Label features are those of the weak views and of the crops, by which images are labelled. With several ranks, each
encodes a share of the images, and all ranks get the features of all of them.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from finealign.backbone.base import Backbone, own_norms
from finealign.errors import ModelError, OutputError, StoppedError, display_path
from finealign.images.decoding import Pixels
from finealign.images.prefetch import Prefetcher
from finealign.images.views import PREDICTED_AS, PREDICTION_EPOCH, Padded, Views, blank_of, cut_on, padded
from finealign.runtime.atomic import make_folder
from finealign.runtime.distributed import Ranks
from finealign.runtime.progress import Progress
from finealign.training.drift import drift
from finealign.training.memmap import MemmapTensors, finished_memmap, forget, read_memmap
from finealign.types import Blank, Gaze, ImageFeatures

PROBED = 64  # images by which it is told how far the encoder has moved all
RENDER_CHUNK = 32  # images per chunk of a label pass; their views are in memory together
MARK_SECONDS = 10.0  # between two notes of how far a label pass is, behind which a killed run does not fall back


_BLANKS: tuple[Blank | None, ...] = (None, "black", "white")


def _name_of_pass(epoch: int) -> str:
    return f"features-{epoch:04d}.safetensors"


def pass_of_name(name: str) -> int:
    """The number of the epoch before which a label pass kept its features in the file of this name."""
    return int(Path(name).stem.partition("-")[2])


def _probed(images: int) -> Tensor:
    """At most ``PROBED`` positions of images, evenly among all."""
    return torch.linspace(0, images - 1, min(PROBED, images)).long()


class ImageSource(Protocol):
    """Provides the features of images for training. A batch is a tensor (B,) int64 of positions in the data set.

    Epochs are counted as ``Schedule`` counts rounds. ``images`` are the positions of the images whose label features
    are wanted, in ascending order; None for all images.
    """

    def start_epoch(self, epoch: int, images: Tensor | None = None) -> bool:
        """Encode the kept label features anew if that is due. Returns whether new ones were encoded and kept."""

    def renew(self, epoch: int, images: Tensor | None = None) -> bool:
        """Encode the kept label features anew, due or not. Returns whether any are kept that this can change."""

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        """Return the weak and crop features of a batch, without gradient. Kept ones must be kept for the batch."""

    def whole_images(self, epoch: int) -> Tensor:
        """Return the weak features of the n images that features are kept of, (n, D), or else of all, encoded now."""

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the features (B, D) of the strong views of each batch, with gradient where the encoder learns."""


@dataclass(frozen=True)
class EncodingPlan:
    """How the images of a run are encoded, and for how long their label features are kept."""

    refresh: int  # rounds that weak and crop features are kept for; 0: they are encoded at every step
    crops: bool  # whether the method needs crop features
    unmoved: float = 0.0  # they are kept on where the encoder has moved images less than this since, as in ``drift``
    frozen: bool = False  # whether the encoder does not learn, so that features do not grow old
    workers: int = 0  # processes that make views; 0: one thread
    weakly: Gaze | None = None  # prompts and pooling for weak views; None: the tower alone
    strongly: Gaze | None = None  # prompts and pooling for strong views; None: the tower alone


@dataclass(frozen=True, eq=False)
class Seen:
    """Features of all n images that a run has encoded anyway, memory-mapped."""

    start: ImageFeatures  # by the encoder before it learned
    final: ImageFeatures  # by the encoder as it is in the end, with the crops that predictions look at
    blanks: Sequence[Blank | None]  # (n,)


class FeatureBank:
    """The feature bank of a run: label features are kept on disk for ``refresh`` epochs, then encoded anew.

    If ``refresh`` in the plan is 0, none are kept: label features are encoded at every step. One pool of workers makes
    the views of the whole run; a ``with`` block ends it.
    """

    def __init__(
        self,
        images: Sequence[Pixels],
        views: Views,
        backbone: Backbone,
        plan: EncodingPlan,
        *,
        folder: Path,
        progress: Progress,
        ranks: Ranks | None = None,
    ) -> None:
        """``folder``, the same on all ranks, stores the kept features. Raises OutputError if it cannot be made."""
        self.images, self.views, self.backbone, self.progress = images, views, backbone, progress
        self.plan, self.folder = plan, folder
        make_folder(folder)
        self.ranks = ranks or Ranks()
        # See ``strong_features``.
        self.halved = self.ranks.count == 1 and backbone.device.type == "cpu"
        self.cut_late = backbone.device.type == "cuda"  # a GPU cuts crops in next to no time
        self.prefetcher = Prefetcher(Photos(images, views), workers=plan.workers, device=backbone.device)
        self.bank: dict[str, Tensor] = {}  # "weak" (n, D) and "crops" (n, N, D), memory-mapped
        self.bank_file = ""  # the name of the file that ``bank`` is mapped from
        self.banked: Tensor | None = None  # (n,) positions of the images in ``bank``, ascending; None: all images
        self._start_key = self._fingerprint(0, range(len(images)))  # the encoder has not learned yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers that make views."""
        self.prefetcher.close()

    def start_epoch(self, epoch: int, images: Tensor | None = None) -> bool:
        """Run a label pass if none was run yet, and every ``refresh`` epochs unless features are as good as new.

        Returns whether it ran.
        """
        anew = self.due(epoch) and not self._as_good_as_new()
        if anew:
            self.label_pass(epoch, images)
        return anew

    def due(self, epoch: int) -> bool:
        """Whether ``start_epoch`` will run a label pass, or would if the encoder has moved images far enough."""
        return self.plan.refresh > 0 and (not self.bank or epoch % self.plan.refresh == 0)

    def renew(self, epoch: int, images: Tensor | None = None) -> bool:
        """Run a label pass if the plan keeps features that grow old. Returns whether it does."""
        grows_old = self.plan.refresh > 0 and not self.plan.frozen
        if grows_old:
            self.label_pass(epoch, images, last=True)
        return grows_old

    def label_pass(self, epoch: int, images: Tensor | None = None, *, last: bool = False) -> None:
        """Encode weak view and crops of these images, all if None, with the backbone as it is now; keep the features.

        The ``last`` pass of a run cuts the crops that predictions look at, and notes which images are blank. What an
        earlier process has encoded of the same pass, and was killed or stopped, is not encoded again. Raises
        OutputError or StoppedError.
        """
        name = _name_of_pass(epoch)
        positions = range(len(self.images)) if images is None else images.tolist()
        key = self._fingerprint(epoch, positions)
        drawn = PREDICTION_EPOCH if last else epoch
        with self.progress.stage("label pass", len(positions)) as stage:

            def parts(done: int) -> Iterator[dict[str, Tensor]]:
                if done:
                    stage.advance(done)
                yield from self._encode(positions[done:], drawn, crops=self.plan.crops, blanks=last)

            after_part = self.progress.between(stage, self.ranks)
            self.bank = keep(self.folder / name, len(positions), parts, self.ranks, after_part, key=key)
        self.bank_file, self.banked = name, images
        files = sorted(self.folder.glob("features-*.safetensors"), key=lambda path: pass_of_name(path.name))
        # The last two checkpoints need the last two files at most; that of the start is for the end of the run.
        for old in files[:-2] if self.ranks.first else ():
            if old.name != _name_of_pass(0):
                forget(old)

    def seen(self, rounds: int) -> "Seen | None":
        """The features of all images by the start and by the encoder as it is now, after ``rounds`` rounds.

        None where the first or the last label pass was none over all images by these, or is no longer there.
        """
        keys = {0: self._start_key, rounds: self._fingerprint(rounds, range(len(self.images)))}
        first, last = (
            finished_memmap(self.folder / _name_of_pass(epoch), self.ranks.texts(key)[0]) or {}
            for epoch, key in keys.items()
        )
        # Every rank has to answer alike, as they would encode together what is not there.
        if self.ranks.any(not first or "blank" not in last):
            return None
        return Seen(
            start=ImageFeatures(weak=first["weak"], crops=first["crops"]),
            final=ImageFeatures(weak=last["weak"], crops=last["crops"]),
            blanks=[_BLANKS[int(number)] for number in last["blank"]],
        )

    def probe(self, first: Tensor | None) -> tuple[Tensor, ImageFeatures] | None:
        """Return positions (n,) of ``PROBED`` images at most, and their features as the first label pass kept them.

        ``first`` are the positions of the images of that pass; None for all. None where it kept nothing, or no crops
        by the gaze of the whole images.
        """
        found: dict[str, Tensor] = {}
        if self.plan.refresh and self.plan.crops and not self.plan.weakly:
            with suppress(OSError, ValueError):
                found = read_memmap(self.folder / _name_of_pass(0))
        # Every rank has to answer alike, as they encode together what is asked for.
        if self.ranks.any(not found):
            return None
        rows = _probed(len(found["weak"]))
        positions = rows if first is None else first[rows]
        return positions, ImageFeatures(weak=found["weak"][rows], crops=found["crops"][rows])

    def moved(self, images: Tensor, before: ImageFeatures) -> float | None:
        """Tell how far the encoder as it is now has moved these images (n,), positions, from features it gave before.

        The measure is that of ``drift``, the same on all ranks, which decide by it what they encode together.
        """
        now = torch.cat([part["weak"] for part in self._encode(images.tolist(), 0, crops=False)])
        told = self.ranks.texts(repr(drift(now, before)))[0]
        return None if told == "None" else float(told)

    def _as_good_as_new(self) -> bool:
        """Whether features of all images are kept, and the encoder has moved images less than ``unmoved`` since.

        No where there is no measure: without crops, or where whole images are seen by another gaze than these.
        """
        measured = self.plan.unmoved and self.plan.crops and not self.plan.weakly
        if not self.bank or self.banked is not None or not measured:
            return False
        rows = _probed(len(self.bank["weak"]))
        found = self.moved(rows, ImageFeatures(weak=self.bank["weak"][rows], crops=self.bank["crops"][rows]))
        return found is not None and found < self.plan.unmoved

    def _fingerprint(self, epoch: int, positions: Sequence[int]) -> str:
        """What the features of a label pass depend on, as a checksum: images, views, and the encoder as it is now."""
        backbone, paths = self.backbone, getattr(self.images, "paths", ())
        told = [backbone.identifier, backbone.precision, str(backbone.device), repr(self.plan.weakly), self.plan.crops]
        told += [self.views.seed, self.views.size, repr(self.views.settings), len(self.images), epoch]
        digest = hashlib.sha256(json.dumps(told).encode())
        digest.update(np.array(positions, dtype=np.int64).tobytes())
        for position in positions if paths else ():
            digest.update(display_path(paths[position]).encode() + b"\n")
        for name, parameter in sorted(own_norms(backbone).items()):
            digest.update(name.encode() + parameter.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def take_up(self, name: str, images: Tensor | None = None) -> None:
        """Use the features of ``images`` (None: of all) that an earlier process kept in the file ``name``.

        Raises ModelError if it is not valid.
        """
        try:
            self.bank, self.bank_file, self.banked = read_memmap(self.folder / name), name, images
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{self.folder / name}, which the checkpoint beside it needs, cannot be read: {error}. "
                "Start afresh with --overwrite."
            ) from error

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        """Return the weak and crop features of a batch: the kept ones, or else encoded now, without gradient."""
        if self.bank:
            rows = batch if self.banked is None else torch.searchsorted(self.banked, batch)
            return ImageFeatures(weak=self._rows("weak", rows), crops=self._rows("crops", rows))
        parts = list(self._encode(batch.tolist(), epoch, crops=self.plan.crops))
        return ImageFeatures(
            weak=torch.cat([part["weak"] for part in parts]), crops=torch.cat([part["crops"] for part in parts])
        )

    def whole_images(self, epoch: int) -> Tensor:
        """Return the kept weak features, (n, D), or where none are kept those of all images, encoded now."""
        if self.bank:
            return self._rows("weak", torch.arange(len(self.bank["weak"])))
        parts = []
        with self.progress.stage("encoding all images", len(self.images)) as stage:
            after_part = self.progress.between(stage, self.ranks)
            for part in self._encode(range(len(self.images)), epoch, crops=False):
                parts.append(part["weak"])
                after_part(len(part["weak"]))
        return torch.cat(parts)

    def _rows(self, name: str, rows: Tensor) -> Tensor:
        """These rows of the bank, on the backbone's device."""
        found = self.bank[name][rows]
        if self.backbone.device.type == "cuda":
            found = found.pin_memory()  # only copies from pinned memory can run in the background
        return found.to(self.backbone.device, non_blocking=True)

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the features (B, D) of the strong views of each batch, with gradient where the encoder learns."""
        shares = [self.ranks.share(batch).tolist() for batch in batches]
        strong = self.prefetcher.map(_StrongViews(epoch), shares)
        for batch, views in zip(batches, strong, strict=True):
            # On a CPU, a single process encodes a batch in the two halves that two ranks would encode. Both then round
            # alike and their runs are the same bit for bit; the optimiser would amplify a difference in rounding.
            halves = views.tensor_split(2) if self.halved and len(views) > 1 else [views]
            part = torch.cat([self.backbone.encode_images(half, self.plan.strongly) for half in halves])
            yield self.ranks.gather(part, self.ranks.sizes(len(batch)))

    def _encode(
        self, indices: Sequence[int], epoch: int, *, crops: bool, blanks: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Encode the weak views and, with ``crops``, the crops of these images, one part after the other.

        A part has "weak" (B, D) and "crops" (B, N, D) or (B, 0, D), and with ``blanks`` "blank" (B,): numbers in
        ``_BLANKS``.

        Only the views of the current part and of the next one are in memory. Each rank encodes whole chunks, the same
        as a single process would, so the features do not depend on the number of ranks.
        """
        chunks = [indices[start : start + RENDER_CHUNK] for start in range(0, len(indices), RENDER_CHUNK)]
        index, count = self.ranks.index, self.ranks.count
        rounds = [chunks[start : start + count] for start in range(0, len(chunks), count)]
        # The last round may have fewer chunks than there are ranks: the others encode an image that ``gather`` drops.
        own = [chunks[index] if index < len(chunks) else chunks[0][:1] for chunks in rounds]
        views = self.prefetcher.map(_LabelViews(epoch, crops, self.cut_late), own)
        for round_chunks, (weak_views, crop_views) in zip(rounds, views, strict=True):
            weak = self.backbone.embed(weak_views, self.plan.weakly)
            if not isinstance(crop_views, Tensor):
                crop_views = cut_on(self.backbone.device, crop_views, self.views.size)
            crop_features = self.backbone.embed(crop_views) if crops else weak.new_zeros(0, weak.shape[1])
            crop_features = crop_features.reshape(len(weak), -1, weak.shape[1])
            sizes = [len(chunk) for chunk in round_chunks] + [0] * (count - len(round_chunks))
            part = {"weak": weak, "crops": crop_features}
            if blanks:
                numbers = [float(_BLANKS.index(blank_of(view))) for view in weak_views]
                part["blank"] = torch.tensor(numbers, device=weak.device)
            yield {name: self.ranks.gather(value, sizes) for name, value in part.items()}


@dataclass(frozen=True)
class Photos:
    """What all views of a run are made of: decoded images, and what cuts them. Picklable, for worker processes."""

    images: Sequence[Pixels]
    views: Views


@dataclass(frozen=True)
class _StrongViews:
    """Makes the strong views of a batch in one epoch: (B, 3, S, S) uint8."""

    epoch: int

    def __call__(self, photos: Photos, batch: Sequence[int]) -> Tensor:
        return torch.stack([photos.views.strong(photos.images[i], epoch=self.epoch, image=i) for i in batch])


@dataclass(frozen=True)
class _LabelViews:
    """Makes the views for label features, uint8: weak views (B, 3, S, S) and crops (B * N, 3, S, S).

    Without ``crops`` the second tensor is (0, 3, S, S). With ``cut_late`` the crops are left to be cut on the device:
    the second value is then what ``padded`` makes of the images and the boxes of their crops.
    """

    epoch: int
    crops: bool
    cut_late: bool

    def __call__(self, photos: Photos, chunk: Sequence[int]) -> tuple[Tensor, Tensor | list[Padded]]:
        views = photos.views
        decoded = [(i, photos.images[i]) for i in chunk]
        weak = torch.stack([views.weak(pixels) for _, pixels in decoded])
        if not self.crops:
            return weak, weak[:0]
        if self.cut_late:
            boxes = [
                views.crop_boxes(*pixels.shape[:2], epoch=self.epoch, image=self._drawn_as(i)) for i, pixels in decoded
            ]
            return weak, padded([(pixels, own) for (_, pixels), own in zip(decoded, boxes, strict=True)])
        cut = [views.crops(pixels, epoch=self.epoch, image=self._drawn_as(i)) for i, pixels in decoded]
        return weak, torch.cat(cut)

    def _drawn_as(self, image: int) -> int:
        """The image that the crops of this one are drawn for."""
        return PREDICTED_AS if self.epoch == PREDICTION_EPOCH else image


class FrozenBank:
    """A feature bank for a frozen encoder: all views are encoded once, so an epoch costs next to nothing."""

    def __init__(self, images: FeatureBank, *, strong_views: int) -> None:
        """Encode the label features of ``images``, unless they are kept, and ``strong_views`` strong views per image.

        Raises OutputError or StoppedError.
        """
        self.images = images
        if not images.bank:
            images.label_pass(0)
        positions = torch.arange(len(images.images))
        # Checkpoints do not name this file: a resumed run encodes the strong views again, and gets the same features.
        path, count = images.folder / "strong.safetensors", len(positions) * strong_views
        with images.progress.stage("strong views", count) as stage, torch.no_grad():

            def parts(done: int) -> Iterator[dict[str, Tensor]]:
                for epoch in range(strong_views):
                    for features in images.strong_features(epoch, torch.split(positions, RENDER_CHUNK)):
                        yield {"strong": features}

            strong = keep(path, count, parts, images.ranks, images.progress.between(stage, images.ranks))["strong"]
        self.strong = strong.reshape(strong_views, len(positions), -1)  # memory-mapped

    def start_epoch(self, epoch: int, images: Tensor | None = None) -> bool:
        """Return whether this is the first epoch, whose label features were encoded before it."""
        return epoch == 0

    def renew(self, epoch: int, images: Tensor | None = None) -> bool:
        """Return False: a frozen encoder would give the same features again."""
        return False

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        """Return the kept weak and crop features of a batch."""
        return self.images.label_features(batch, epoch)

    def whole_images(self, epoch: int) -> Tensor:
        """Return the kept weak features of all images: (n, D)."""
        return self.images.whole_images(epoch)

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the features (B, D) of one strong view per image of each batch; every epoch takes the next view."""
        for batch in batches:
            yield self.strong[epoch % len(self.strong), batch].to(self.images.backbone.device)


def keep(
    path: Path,
    rows: int,
    parts: Callable[[int], Iterator[Mapping[str, Tensor]]],
    ranks: Ranks,
    after_part: Callable[[int], None],
    *,
    key: str = "",
) -> dict[str, Tensor]:
    """Write tensors of ``rows`` rows, which come part by part, into one file, and return them memory-mapped by name.

    ``parts`` gives the parts from a row on: from the first, or, where a process that was to write the same file with
    the same ``key`` has ended before it was complete, from the first that is not there. Without a key all are written.
    Every rank passes the same parts. The first rank writes the file, and the others map it. ``after_part`` is called
    with the number of rows of each part. Raises OutputError if the file cannot be written, or if another rank's machine
    cannot read it, and ValueError if the parts do not add up to ``rows``.
    """
    file = MemmapTensors.resumed(path, key) if key and ranks.first else None
    done = int(ranks.texts(str(file.done if file else 0))[0])
    marked = time.monotonic()
    try:
        for part in parts(done):
            size = len(next(iter(part.values())))
            if ranks.first:
                if file is None:
                    file = MemmapTensors(path, {name: (rows, *value.shape[1:]) for name, value in part.items()})
                for name, value in part.items():
                    file.tensors[name][done : done + size] = value
            done += size
            if file and key and time.monotonic() - marked > MARK_SECONDS:
                file.mark(done, key)
                marked = time.monotonic()
            after_part(size)
    except StoppedError:
        if file and key:
            file.mark(done, key)
        raise
    if done != rows:
        raise ValueError(f"{done} rows came, {rows} were announced")
    if file and key:
        file.mark(done, key)
    tensors = file.finish() if file else {}
    ranks.wait()  # until the file is complete
    if ranks.first:
        return tensors
    try:
        return read_memmap(path)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"Process {ranks.index} cannot read {path}, which the first process has written: {error}. "
            "Put the run folder where every machine of the run sees it."
        ) from error
