"""Where a loop gets the features of its images: encoded as it goes on, kept for some epochs, or encoded once.

With several ranks each encodes its share; the features come together on all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from finealign.ahead import ahead
from finealign.backbone import Backbone, Gaze
from finealign.errors import ModelError, OutputError
from finealign.images import Pixels
from finealign.mapped import MappedTensors, read_mapped
from finealign.progress import Progress
from finealign.ranks import Ranks
from finealign.storage import make_folder
from finealign.types import Box, ImageFeatures
from finealign.views import Views, cut_and_resize

Item = TypeVar("Item")
Result = TypeVar("Result")

Uncut = tuple[Tensor, list[Box]]  # an image (3, H, W) and where its crops lie

RENDER_CHUNK = 32  # images whose views are in memory at once in a label pass


class ImageSource(Protocol):
    """Where a loop gets the features of a batch of images, by their position in the data set."""

    def start_epoch(self, epoch: int) -> bool:
        """Refresh what is kept, if it is due; whether label features were encoded that are kept."""

    def renew(self, epoch: int) -> bool:
        """Encode what is kept once more, due or not; whether anything is kept that could differ."""

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        """Weak and crop features, without gradient."""

    def whole_images(self, epoch: int) -> Tensor:
        """The weak features of all images, as kept or encoded now: (n, D)."""

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The strong views of each batch in turn, encoded with gradient where the encoder learns."""


class EncodedAfresh:
    """Images encoded as training goes on; label features are kept on disk for ``refresh`` epochs, then encoded anew.

    ``refresh`` 0 keeps none: they are encoded at every step.
    """

    def __init__(
        self,
        images: Sequence[Pixels],
        views: Views,
        backbone: Backbone,
        *,
        refresh: int,
        crops: bool,
        folder: Path,
        workers: int = 0,
        weakly: Gaze | None = None,
        strongly: Gaze | None = None,
        progress: Progress,
        ranks: Ranks | None = None,
    ) -> None:
        """``folder`` is for the kept features, the same for all ranks; ``crops`` says if the method looks at any.

        ``weakly`` and ``strongly`` are how weak and strong views are looked at, where not as the tower does.
        """
        self.images, self.views, self.backbone, self.progress = images, views, backbone, progress
        self.refresh, self.crops = refresh, crops
        self.folder, self.workers = folder, workers
        make_folder(folder)
        self.weakly, self.strongly = weakly, strongly
        self.ranks = ranks or Ranks()
        self.halved = self.ranks.count == 1 and backbone.device.type == "cpu"
        self.cut_late = backbone.device.type == "cuda"  # where cutting costs next to nothing
        self.kept: dict[str, Tensor] = {}  # "weak" (n, D) and "crops" (n, N, D), mapped
        self.kept_in = ""  # the name of their file

    def start_epoch(self, epoch: int) -> bool:
        due = self.refresh > 0 and (not self.kept or epoch % self.refresh == 0)
        if due:
            self.label_pass(epoch)
        return due

    def renew(self, epoch: int) -> bool:
        if self.refresh:
            self.label_pass(epoch)
        return self.refresh > 0

    def label_pass(self, epoch: int) -> None:
        """Encode the weak view and the crops of every image as the backbone is now, and keep them."""
        name = f"features-{epoch:04d}.safetensors"
        images = len(self.images)
        with self.progress.stage("label pass", images) as stage:
            parts = (
                {"weak": part.weak, "crops": part.crops}
                for part in self._encode(range(images), epoch, crops=self.crops)
            )
            self.kept = keep(self.folder / name, images, parts, self.ranks, self.progress.between(stage, self.ranks))
        self.kept_in = name
        kept = sorted(self.folder.glob("features-*.safetensors"), key=lambda path: int(path.stem.partition("-")[2]))
        for old in kept[:-2] if self.ranks.first else ():
            with suppress(OSError):  # one too many does no harm
                old.unlink()  # the last two checkpoints need the last two files at most

    def take_up(self, name: str) -> None:
        """Use the features an earlier process kept. Raises ModelError."""
        try:
            self.kept, self.kept_in = read_mapped(self.folder / name), name
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{self.folder / name}, which the checkpoint beside it needs, cannot be read: {error}. "
                "Start afresh with --overwrite."
            ) from error

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        if self.kept:
            return ImageFeatures(weak=self._on_device("weak", batch), crops=self._on_device("crops", batch))
        parts = list(self._encode(batch.tolist(), epoch, crops=self.crops))
        return ImageFeatures(
            weak=torch.cat([part.weak for part in parts]), crops=torch.cat([part.crops for part in parts])
        )

    def whole_images(self, epoch: int) -> Tensor:
        if self.kept:
            return self._on_device("weak", torch.arange(len(self.images)))
        parts = []
        with self.progress.stage("encoding all images", len(self.images)) as stage:
            after_part = self.progress.between(stage, self.ranks)
            for part in self._encode(range(len(self.images)), epoch, crops=False):
                parts.append(part.weak)
                after_part(len(part.weak))
        return torch.cat(parts)

    def _on_device(self, name: str, batch: Tensor) -> Tensor:
        rows = self.kept[name][batch]
        if self.backbone.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.backbone.device, non_blocking=True)

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        shares = [self.ranks.share(batch) for batch in batches]
        strong = self._ahead(_StrongViews(self.images, self.views, epoch), shares)
        for batch, views in zip(batches, strong, strict=True):
            # On a CPU one process takes the halves that two would, so that both round alike and their runs are the same
            # bit for bit: the optimiser makes much of what little rounding leaves.
            halves = views.tensor_split(2) if self.halved and len(views) > 1 else [views]
            part = torch.cat([self.backbone.encode_images(half, self.strongly) for half in halves])
            yield self.ranks.gather(part, self.ranks.sizes(len(batch)))

    def _ahead(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        return ahead(work, items, workers=self.workers, pinned=self.backbone.device.type == "cuda")

    def _encode(self, indices: Sequence[int], epoch: int, *, crops: bool) -> Iterator[ImageFeatures]:
        """Part by part, so that no more than one part's views are in memory, and the next one's.

        Each rank encodes whole chunks, those that one process alone would, so that the results are the same.
        """
        chunks = [indices[start : start + RENDER_CHUNK] for start in range(0, len(indices), RENDER_CHUNK)]
        index, count = self.ranks.index, self.ranks.count
        rounds = [chunks[first : first + count] for first in range(0, len(chunks), count)]
        own = [chunks[index] if index < len(chunks) else chunks[0][:1] for chunks in rounds]
        views = self._ahead(_LabelViews(self.images, self.views, epoch, crops, self.cut_late), own)
        for together, (weak, cut) in zip(rounds, views, strict=True):
            whole = self.backbone.embed(weak, self.weakly)
            pixels = cut if isinstance(cut, Tensor) else self._cut(cut)
            parts = self.backbone.embed(pixels) if crops else whole.new_zeros(0, whole.shape[1])
            parts = parts.reshape(len(whole), -1, whole.shape[1])
            sizes = [len(chunk) for chunk in together] + [0] * (count - len(together))
            yield ImageFeatures(weak=self.ranks.gather(whole, sizes), crops=self.ranks.gather(parts, sizes))

    def _cut(self, images: "list[Uncut]") -> Tensor:
        device = self.backbone.device
        return torch.cat(
            [cut_and_resize(p.to(device, non_blocking=True), boxes, self.views.size) for p, boxes in images]
        )


@dataclass(frozen=True)
class _StrongViews:
    """The strong views of a batch in one epoch: (B, 3, S, S) uint8."""

    images: Sequence[Pixels]
    views: Views
    epoch: int

    def __call__(self, batch: Tensor) -> Tensor:
        return torch.stack([self.views.strong(self.images[i], epoch=self.epoch, image=i) for i in batch.tolist()])


@dataclass(frozen=True)
class _LabelViews:
    """What a label pass looks at, uint8: weak views (B, 3, S, S) and crops (B * N, 3, S, S), or (0, 3, S, S).

    ``cut_late`` leaves the cutting to the device: each image (3, H, W) goes there once, with its boxes.
    """

    images: Sequence[Pixels]
    views: Views
    epoch: int
    crops: bool
    cut_late: bool

    def __call__(self, chunk: Sequence[int]) -> tuple[Tensor, Tensor | list[Uncut]]:
        seen = [(i, self.images[i]) for i in chunk]
        weak = torch.stack([self.views.weak(pixels) for _, pixels in seen])
        if not self.crops:
            return weak, weak[:0]
        if self.cut_late:
            return weak, [(torch.from_numpy(pixels).permute(2, 0, 1), self._boxes(i, pixels)) for i, pixels in seen]
        return weak, torch.cat([self.views.crops(pixels, epoch=self.epoch, image=i) for i, pixels in seen])

    def _boxes(self, image: int, pixels: Pixels) -> list[Box]:
        return self.views.crop_boxes(*pixels.shape[:2], epoch=self.epoch, image=image)


class EncodedOnce:
    """Every view encoded before training, for a frozen encoder: an epoch costs next to nothing."""

    def __init__(self, images: EncodedAfresh, *, strong_views: int) -> None:
        self.images = images
        if not images.kept:
            images.label_pass(0)
        everything = torch.arange(len(images.images))
        # Not among the features that a checkpoint speaks of: a resumed run encodes them anew, the same ones.
        path, count = images.folder / "strong.safetensors", len(everything) * strong_views
        with images.progress.stage("strong views", count) as stage, torch.no_grad():
            parts = (
                {"strong": features}
                for epoch in range(strong_views)
                for features in images.strong_features(epoch, torch.split(everything, RENDER_CHUNK))
            )
            kept = keep(path, count, parts, images.ranks, images.progress.between(stage, images.ranks))["strong"]
        self.strong = kept.reshape(strong_views, len(everything), -1)

    def start_epoch(self, epoch: int) -> bool:
        return epoch == 0

    def renew(self, epoch: int) -> bool:
        return False

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        return self.images.label_features(batch, epoch)

    def whole_images(self, epoch: int) -> Tensor:
        return self.images.whole_images(epoch)

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            yield self.strong[epoch % len(self.strong), batch].to(self.images.backbone.device)


def keep(
    path: Path, rows: int, parts: Iterator[Mapping[str, Tensor]], ranks: Ranks, after_part: Callable[[int], None]
) -> dict[str, Tensor]:
    """Tensors of so many rows, given part by part, mapped from the file that the first rank writes for all.

    Raises OutputError where it cannot be written, or another rank's machine cannot see it.
    """
    file: MappedTensors | None = None
    done = 0
    for part in parts:
        size = len(next(iter(part.values())))
        if ranks.first:
            if file is None:
                file = MappedTensors(path, {name: (rows, *value.shape[1:]) for name, value in part.items()})
            for name, value in part.items():
                file.tensors[name][done : done + size] = value
        done += size
        after_part(size)
    if done != rows:
        raise ValueError(f"{done} rows came, {rows} were announced")
    found = file.finish() if file else {}
    ranks.wait()
    if ranks.first:
        return found
    try:
        return read_mapped(path)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"Process {ranks.index} cannot read {path}, which the first process has written: {error}. "
            "Put the run folder where every machine of the run sees it."
        ) from error
