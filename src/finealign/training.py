"""The one loop: label passes, steps, checkpoints, exact resumption. No label of the user's comes near it."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from finealign.backbone import Backbone
from finealign.checkpoints import Checkpoint, read_last_checkpoint, write_checkpoint
from finealign.config import Config
from finealign.errors import FinealignError
from finealign.methods import Method
from finealign.progress import Progress
from finealign.types import ImageFeatures, Loss, PseudoLabels
from finealign.views import Pixels, Views

Item = TypeVar("Item")
Result = TypeVar("Result")

RENDER_CHUNK = 32  # images whose views are in memory at once in a label pass
_ORDER = 2  # the draw that shuffles an epoch; views have numbers of their own, see views.py


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did, measured without labels."""

    epoch: int  # counted from 1
    loss: float
    parts: dict[str, float]  # the loss's parts
    mean_weight: float  # mean self-training weight
    changed: float  # share of pseudo-labels that differ from the epoch before; 1 in the first
    class_share: list[float]  # share of images labelled as each class
    learning_rate: float  # of the normalisation parameters, at the end
    seconds: float
    images_per_second: float


class ImageSource(Protocol):
    """Where a loop gets the features of a batch of images, by their position in the data set."""

    def start_epoch(self, epoch: int) -> None:
        """Refresh what is kept, if it is due."""

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        """Weak and crop features, without gradient."""

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The strong views of each batch in turn, encoded with gradient where the encoder learns."""


class EncodedAfresh:
    """Images encoded as training goes on; label features are kept for ``refresh_epochs`` and then encoded anew."""

    def __init__(
        self,
        images: Sequence[Pixels],
        views: Views,
        backbone: Backbone,
        *,
        refresh: int,
        crops: bool,
        progress: Progress,
    ) -> None:
        self.images, self.views, self.backbone = images, views, backbone
        self.refresh, self.crops, self.progress = refresh, crops, progress
        self.kept: ImageFeatures | None = None

    def start_epoch(self, epoch: int) -> None:
        if self.refresh and (self.kept is None or epoch % self.refresh == 0):
            with self.progress.stage("label pass", len(self.images)) as stage:
                self.kept = self._encode(range(len(self.images)), epoch, stage.advance)

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        if self.kept is None:
            return self._encode(batch.tolist(), epoch, lambda done: None)
        return ImageFeatures(weak=self.kept.weak[batch], crops=self.kept.crops[batch])

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        def render(batch: Tensor) -> Tensor:
            return torch.stack([self.views.strong(self.images[i], epoch=epoch, image=i) for i in batch.tolist()])

        for views in _ahead(render, batches):
            yield self.backbone.encode_images(views)

    def _encode(self, indices: Sequence[int], epoch: int, advance: Callable[[int], None]) -> ImageFeatures:
        def render(chunk: Sequence[int]) -> tuple[Tensor, Tensor | None]:
            weak = torch.stack([self.views.weak(self.images[i]) for i in chunk])
            if not self.crops:
                return weak, None
            return weak, torch.cat([self.views.crops(self.images[i], epoch=epoch, image=i) for i in chunk])

        weak, crops = [], []
        chunks = [indices[start : start + RENDER_CHUNK] for start in range(0, len(indices), RENDER_CHUNK)]
        for whole, parts in _ahead(render, chunks):
            weak.append(self.backbone.embed(whole))
            if parts is None:
                crops.append(weak[-1].new_zeros(len(whole), 0, weak[-1].shape[1]))
            else:
                crops.append(self.backbone.embed(parts).reshape(len(whole), -1, weak[-1].shape[1]))
            advance(len(whole))
        # Cloned out of inference mode, so that what is learned from them may carry gradients.
        return ImageFeatures(weak=torch.cat(weak).clone(), crops=torch.cat(crops).clone())


class EncodedOnce:
    """Every view encoded before training, for a frozen encoder: an epoch costs next to nothing."""

    def __init__(self, images: EncodedAfresh, *, strong_views: int) -> None:
        everything = torch.arange(len(images.images))
        images.start_epoch(0)
        self.kept = images.kept or images.label_features(everything, 0)
        strong = []
        with images.progress.stage("strong views", len(everything) * strong_views) as stage, torch.no_grad():
            for epoch in range(strong_views):
                parts = []
                for features in images.strong_features(epoch, torch.split(everything, RENDER_CHUNK)):
                    parts.append(features)
                    stage.advance(len(features))
                strong.append(torch.cat(parts))
        self.strong = torch.stack(strong)  # (views, images, D)

    def start_epoch(self, epoch: int) -> None:
        pass

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        return ImageFeatures(weak=self.kept.weak[batch], crops=self.kept.crops[batch])

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            yield self.strong[epoch % len(self.strong), batch]


def adapt(
    images: Sequence[Pixels],
    *,
    backbone: Backbone,
    method: Method,
    views: Views,
    config: Config,
    progress: Progress,
    checkpoints: Path | None = None,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
) -> list[EpochRecord]:
    """Train the method, and the backbone where it learns, in place; the records of the epochs run here.

    ``config`` is resolved. With ``checkpoints`` the last whole checkpoint in that folder is continued from, and each
    epoch leaves one. Raises FinealignError when the loss is no longer finite; the checkpoint before it stays.
    """
    training = config.training
    epochs, refresh = training.epochs, config.views.refresh_epochs
    if epochs == "auto" or refresh == "auto":
        raise ValueError("adapt() needs a resolved configuration")
    norms = _what_learns(backbone, method, config)
    optimizer = torch.optim.AdamW(_groups(norms, method, config), betas=(0.9, 0.999))
    state = _State(norms=norms, method=method, optimizer=optimizer, labels=torch.full((len(images),), -1))
    fresh = EncodedAfresh(images, views, backbone, refresh=refresh, crops=method.uses_crops, progress=progress)
    done = state.restore(checkpoints, fresh) if checkpoints else 0
    frozen = training.encoder == "frozen" and done < epochs
    source: ImageSource = EncodedOnce(fresh, strong_views=training.strong_views) if frozen else fresh
    batches_an_epoch = math.ceil(len(images) / training.batch_size)
    records = []
    with progress.stage("adapting", (epochs - done) * len(images)) as stage:
        for epoch in range(done, epochs):
            began = time.perf_counter()
            source.start_epoch(epoch)
            batches = _batches(len(images), batches_an_epoch, seed=config.seed, epoch=epoch)
            meter = _Meter(classes=method.num_classes)
            labels = torch.empty_like(state.labels)
            for number, (batch, strong) in enumerate(zip(batches, source.strong_features(epoch, batches), strict=True)):
                progressed = (epoch * batches_an_epoch + number) / (epochs * batches_an_epoch)
                _set_learning_rates(optimizer, progressed, final=training.final_learning_rate)
                pseudo = method.pseudo_label(source.label_features(batch, epoch))
                loss = method.loss(strong, pseudo)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss.total)
                optimizer.step()
                labels[batch] = pseudo.labels.cpu()
                meter.add(loss, pseudo)
                stage.advance(len(batch))
            record = meter.record(epoch + 1, labels, state.labels, optimizer.param_groups[0]["lr"], began)
            if not math.isfinite(record.loss):
                raise FinealignError(
                    f"The loss is no longer finite in epoch {epoch + 1}. Lower training.learning_rate "
                    f"({training.learning_rate}) or training.anchor_learning_rate ({training.anchor_learning_rate})."
                )
            state.labels = labels
            records.append(record)
            on_epoch(record)
            stage.note(f"epoch {epoch + 1}/{epochs} loss {record.loss:.3f} changed {record.changed:.1%}")
            if checkpoints:
                state.save(checkpoints, fresh, record)
    return records


@dataclass
class _State:
    """Everything that a later step depends on."""

    norms: dict[str, nn.Parameter]
    method: Method
    optimizer: torch.optim.AdamW
    labels: Tensor  # (images,) the pseudo-labels of the epoch before, -1 before the first

    def save(self, folder: Path, source: EncodedAfresh, record: EpochRecord) -> None:
        tensors: dict[str, Tensor] = {"labels": self.labels}
        tensors |= {f"norms.{name}": value for name, value in self.norms.items()}
        tensors |= {f"method.{name}": value for name, value in self.method.state_dict().items()}
        for index, kept in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in kept.items()}
        if source.kept is not None:
            tensors |= {"kept.weak": source.kept.weak, "kept.crops": source.kept.crops}
        write_checkpoint(folder, Checkpoint(record.epoch, tensors, {"record": asdict(record)}))

    def restore(self, folder: Path, source: EncodedAfresh) -> int:
        """Take up the last checkpoint in the folder, if any: the number of epochs it has done."""
        found = read_last_checkpoint(folder)
        if found is None:
            return 0
        sections: dict[str, dict[str, Tensor]] = {"norms": {}, "method": {}, "optimizer": {}, "kept": {}}
        for name, value in found.tensors.items():
            section, _, rest = name.partition(".")
            sections.get(section, {})[rest] = value
        with torch.no_grad():
            for name, parameter in self.norms.items():
                parameter.copy_(sections["norms"][name])
        self.method.load_state_dict(sections["method"])
        self.labels = found.tensors["labels"]
        kept: dict[int, dict[str, Tensor]] = {}
        for name, value in sections["optimizer"].items():
            index, key = name.split(".")
            kept.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": kept})
        if sections["kept"]:
            device = source.backbone.device
            source.kept = ImageFeatures(
                weak=sections["kept"]["weak"].to(device), crops=sections["kept"]["crops"].to(device)
            )
        return found.epoch


class _Meter:
    """Sums over an epoch, kept on the device until its end so that no step waits for one."""

    def __init__(self, *, classes: int) -> None:
        self.classes = classes
        self.losses: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, loss: Loss, pseudo: PseudoLabels) -> None:
        self.losses.append(loss.total.detach())
        self.weights.append(pseudo.weights)
        for name, value in loss.parts.items():
            self.parts.setdefault(name, []).append(value)

    def record(self, epoch: int, labels: Tensor, before: Tensor, learning_rate: float, began: float) -> EpochRecord:
        seconds = time.perf_counter() - began
        return EpochRecord(
            epoch=epoch,
            loss=float(torch.stack(self.losses).mean()),
            parts={name: float(torch.stack(values).mean()) for name, values in self.parts.items()},
            mean_weight=float(torch.cat(self.weights).mean()),
            changed=float((labels != before).float().mean()),
            class_share=(torch.bincount(labels, minlength=self.classes) / len(labels)).tolist(),
            learning_rate=learning_rate,
            seconds=seconds,
            images_per_second=len(labels) / seconds,
        )


def _what_learns(backbone: Backbone, method: Method, config: Config) -> dict[str, nn.Parameter]:
    """Open what learns to gradients and close the rest; the backbone's open parameters by name."""
    learn = config.training.learn
    norms = {}
    if config.training.encoder == "full" and learn != "anchors":
        norms = backbone.norm_parameters()
        for parameter in norms.values():
            parameter.requires_grad_(True)
    method.requires_grad_(learn != "norms")
    return norms


def _groups(norms: dict[str, nn.Parameter], method: Method, config: Config) -> list[dict[str, object]]:
    training = config.training
    anchors = [parameter for parameter in method.parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": list(norms.values()), "lr": training.learning_rate, "weight_decay": training.norm_weight_decay},
        {"params": anchors, "lr": training.anchor_learning_rate, "weight_decay": training.weight_decay},
    ]
    return [{**group, "start": group["lr"]} for group in groups if group["params"]]


def _set_learning_rates(optimizer: torch.optim.Optimizer, progressed: float, *, final: float) -> None:
    """Cosine from each group's own start to ``final``; a function of the step alone, so resuming needs no state."""
    for group in optimizer.param_groups:
        group["lr"] = final + (group["start"] - final) * (1 + math.cos(math.pi * progressed)) / 2


def _batches(images: int, count: int, *, seed: int, epoch: int) -> list[Tensor]:
    """A shuffle of all images in ``count`` batches whose sizes differ by one at most: no runt at the end."""
    order = np.random.default_rng((seed, epoch, _ORDER)).permutation(images)
    return [torch.from_numpy(part) for part in np.array_split(order, count)]


def _ahead(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """``map`` with the next result made in the background while the caller uses this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for item in items:
            coming = pool.submit(work, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()
