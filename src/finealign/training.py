"""The one loop: label passes, steps, checkpoints, exact resumption. No label of the user's comes near it."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from finealign.ahead import ahead
from finealign.backbone import Backbone, Gaze
from finealign.checkpoints import Checkpoint, read_last_checkpoint, write_checkpoint
from finealign.config import Config
from finealign.devices import choose_workers
from finealign.errors import FinealignError, ModelError
from finealign.images import Pixels
from finealign.mapped import MappedTensors, read_mapped
from finealign.methods import Method
from finealign.progress import Progress
from finealign.types import Box, ImageFeatures, Loss, PseudoLabels
from finealign.views import Views, cut_and_resize

Item = TypeVar("Item")
Result = TypeVar("Result")

Uncut = tuple[Tensor, list[Box]]  # an image (3, H, W) and where its crops lie

RENDER_CHUNK = 32  # images whose views are in memory at once in a label pass
# The draws that shuffle an epoch, and the anchors' own steps; views have numbers of their own, see views.py.
_ORDER, _SETTLING = 2, 3


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
    ) -> None:
        """``folder`` is for the kept features; ``crops`` says whether the method looks at any.

        ``weakly`` and ``strongly`` are how weak and strong views are looked at, where not as the tower does.
        """
        self.images, self.views, self.backbone, self.progress = images, views, backbone, progress
        self.refresh, self.crops = refresh, crops
        self.folder, self.workers = folder, workers
        self.weakly, self.strongly = weakly, strongly
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
        file: MappedTensors | None = None
        done = 0
        with self.progress.stage("label pass", len(self.images)) as stage:
            for part in self._encode(range(len(self.images)), epoch, crops=self.crops):
                if file is None:
                    shapes = {"weak": part.weak.shape[1:], "crops": part.crops.shape[1:]}
                    file = MappedTensors(
                        self.folder / name, {key: (len(self.images), *rest) for key, rest in shapes.items()}
                    )
                rows = slice(done, done + len(part.weak))
                file.tensors["weak"][rows] = part.weak
                file.tensors["crops"][rows] = part.crops
                done = rows.stop
                stage.advance(len(part.weak))
        if file is None:
            raise ValueError("there are no images")
        self.kept, self.kept_in = file.finish(), name
        kept = sorted(self.folder.glob("features-*.safetensors"), key=lambda path: int(path.stem.partition("-")[2]))
        for old in kept[:-2]:
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
        return torch.cat([part.weak for part in self._encode(range(len(self.images)), epoch, crops=False)])

    def _on_device(self, name: str, batch: Tensor) -> Tensor:
        rows = self.kept[name][batch]
        if self.backbone.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.backbone.device, non_blocking=True)

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for views in self._ahead(_StrongViews(self.images, self.views, epoch), batches):
            yield self.backbone.encode_images(views, self.strongly)

    def _ahead(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        return ahead(work, items, workers=self.workers, pinned=self.backbone.device.type == "cuda")

    def _encode(self, indices: Sequence[int], epoch: int, *, crops: bool) -> Iterator[ImageFeatures]:
        """Part by part, so that no more than one part's views are in memory, and the next one's."""
        chunks = [indices[start : start + RENDER_CHUNK] for start in range(0, len(indices), RENDER_CHUNK)]
        for weak, cut in self._ahead(_LabelViews(self.images, self.views, epoch, crops, self.cut_late), chunks):
            whole = self.backbone.embed(weak, self.weakly)
            pixels = cut if isinstance(cut, Tensor) else self._cut(cut)
            parts = self.backbone.embed(pixels) if crops else whole.new_zeros(0, whole.shape[1])
            yield ImageFeatures(weak=whole, crops=parts.reshape(len(whole), -1, whole.shape[1]))

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
        width = images.kept["weak"].shape[1]
        # Not among the features that a checkpoint speaks of: a resumed run encodes them anew, the same ones.
        file = MappedTensors(images.folder / "strong.safetensors", {"strong": (strong_views, len(everything), width)})
        with images.progress.stage("strong views", len(everything) * strong_views) as stage, torch.no_grad():
            for epoch in range(strong_views):
                done = 0
                for features in images.strong_features(epoch, torch.split(everything, RENDER_CHUNK)):
                    file.tensors["strong"][epoch, done : done + len(features)] = features
                    done += len(features)
                    stage.advance(len(features))
        self.strong = file.finish()["strong"]

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
    epochs, refresh = config.training.epochs, config.views.refresh_epochs
    if epochs == "auto" or refresh == "auto":
        raise ValueError("adapt() needs a resolved configuration")
    with ExitStack() as leaving:
        folder = checkpoints or Path(leaving.enter_context(tempfile.TemporaryDirectory(prefix="finealign-")))
        source = EncodedAfresh(
            images,
            views,
            backbone,
            refresh=refresh,
            crops=method.uses_crops,
            folder=folder,
            workers=choose_workers(config.data.workers, backbone.device),
            weakly=Gaze(salient=True) if method.salient else None,
            strongly=method_gaze(method),
            progress=progress,
        )
        if not method.trains:
            method.survey(source.whole_images(0))
            return []
        state = begin(backbone, method, config, images=len(images))
        done = state.restore(checkpoints, source) if checkpoints else 0
        records = []
        frozen = config.training.encoder == "frozen" and done < epochs
        encoded = EncodedOnce(source, strong_views=config.training.strong_views) if frozen else source
        for record in run_epochs(state, encoded, config, range(done, epochs), progress):
            records.append(record)
            on_epoch(record)
            if checkpoints:
                state.save(checkpoints, source, record)
        return records


def method_gaze(method: Method) -> Gaze | None:
    """How a method looks at the images it classifies and at strong views; None: as the tower does."""
    return Gaze(method.prompts, method.salient) if method.salient or method.prompts is not None else None


def begin(backbone: Backbone, method: Method, config: Config, *, images: int) -> "State":
    """The state before the first step: what learns is opened to gradients, the rest is closed."""
    norms = _what_learns(backbone, method, config)
    optimizer = torch.optim.AdamW(_groups(norms, method, config), betas=(0.9, 0.999))
    return State(norms=norms, method=method, optimizer=optimizer, labels=torch.full((images,), -1))


def run_epochs(
    state: "State", source: ImageSource, config: Config, epochs: range, progress: Progress
) -> Iterator[EpochRecord]:
    """Run these epochs of ``epochs.stop``, each recorded as it ends; ``state`` changes in place."""
    training, images = config.training, len(state.labels)
    batches_an_epoch = math.ceil(images / training.batch_size)
    with progress.stage("adapting", len(epochs) * images) as stage:
        for epoch in epochs:
            began = time.perf_counter()
            fresh = source.start_epoch(epoch)
            if state.method.surveys:
                state.method.survey(source.whole_images(epoch))
            if fresh:
                settle_anchors(state, source, config, epoch)
            batches = _batches(images, batches_an_epoch, seed=config.seed, epoch=epoch)
            meter = _Meter(classes=state.method.num_classes)
            for number, (batch, strong) in enumerate(zip(batches, source.strong_features(epoch, batches), strict=True)):
                progressed = (epoch * batches_an_epoch + number) / (epochs.stop * batches_an_epoch)
                _set_learning_rates(state.optimizer, progressed, final=training.final_learning_rate)
                meter.add(batch, *step(state, source.label_features(batch, epoch), strong))
                stage.advance(len(batch))
            last = epoch + 1 == epochs.stop and training.last_label_pass and _settles(state.method, config)
            if last and source.renew(epoch + 1):
                settle_anchors(state, source, config, epoch + 1)
            labels = meter.labels()
            record = meter.record(epoch + 1, labels, state.labels, state.optimizer.param_groups[0]["lr"], began)
            if not math.isfinite(record.loss):
                raise FinealignError(
                    f"The loss is no longer finite in epoch {epoch + 1}. Lower training.learning_rate "
                    f"({training.learning_rate}) or training.anchor_learning_rate ({training.anchor_learning_rate})."
                )
            state.labels = labels
            stage.note(f"epoch {epoch + 1}/{epochs.stop} loss {record.loss:.3f} changed {record.changed:.1%}")
            yield record


def settle_anchors(state: "State", source: ImageSource, config: Config, epoch: int) -> None:
    """Train the anchors alone on crop features that are kept: no image is encoded, so it costs next to nothing.

    Each image's strong view is one of its crops, another one each time. Ours, not the paper's.
    """
    training = config.training
    if not _settles(state.method, config):
        return
    images = len(state.labels)
    count = max(1, round(images / training.anchor_batch_size))
    rng = np.random.default_rng((config.seed, epoch, _SETTLING))
    for number in range(training.anchor_steps):
        if number % count == 0:
            batches = _shuffled(images, count, rng)
        batch = batches[number % count]
        features = source.label_features(batch, epoch)
        chosen = torch.from_numpy(rng.integers(features.crops.shape[1], size=len(batch))).to(features.crops.device)
        _set_learning_rates(state.optimizer, number / training.anchor_steps, final=training.final_learning_rate)
        step(state, features, features.crops[torch.arange(len(batch)), chosen])


def _settles(method: Method, config: Config) -> bool:
    """Whether ``settle_anchors`` has anything to do."""
    training = config.training
    return method.settles and training.anchor_steps > 0 and training.learn != "norms"


def step(state: "State", features: ImageFeatures, strong: Tensor) -> tuple[Loss, PseudoLabels]:
    """One step of the optimiser: label the batch by its weak and crop features, learn from its strong ones (B, D)."""
    pseudo = state.method.pseudo_label(features)
    loss = state.method.loss(strong, pseudo)
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss.total)
    state.optimizer.step()
    return loss, pseudo


@dataclass
class State:
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
        values = {"record": asdict(record), "features": source.kept_in}
        write_checkpoint(folder, Checkpoint(record.epoch, tensors, values))

    def restore(self, folder: Path, source: EncodedAfresh) -> int:
        """Take up the last checkpoint in the folder, if any: the number of epochs it has done."""
        found = read_last_checkpoint(folder)
        if found is None:
            return 0
        sections: dict[str, dict[str, Tensor]] = {"norms": {}, "method": {}, "optimizer": {}}
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
        passing = source.refresh and found.epoch % source.refresh == 0  # the next epoch encodes them anew
        if found.values.get("features") and not passing:
            source.take_up(found.values["features"])
        return found.epoch


class _Meter:
    """Sums over an epoch, kept on the device until its end so that no step waits for one."""

    def __init__(self, *, classes: int) -> None:
        self.classes = classes
        self.batches: list[Tensor] = []
        self.found: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, batch: Tensor, loss: Loss, pseudo: PseudoLabels) -> None:
        self.batches.append(batch)
        self.found.append(pseudo.labels)
        self.losses.append(loss.total.detach())
        self.weights.append(pseudo.weights)
        for name, value in loss.parts.items():
            self.parts.setdefault(name, []).append(value)

    def labels(self) -> Tensor:
        """The pseudo-label of every image, by position: (images,) int64 on the CPU."""
        order = torch.cat(self.batches)
        return torch.empty_like(order).scatter_(0, order, torch.cat(self.found).cpu())

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
    if config.training.encoder == "frozen" and method.prompts is not None:
        method.prompts.requires_grad_(False)  # strong views are encoded once
    return norms


def _groups(norms: dict[str, nn.Parameter], method: Method, config: Config) -> list[dict[str, object]]:
    training = config.training
    rate = training.anchor_learning_rate
    if rate == "auto":
        raise ValueError("the configuration is not resolved")
    anchors = [parameter for parameter in method.parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": list(norms.values()), "lr": training.learning_rate, "weight_decay": training.norm_weight_decay},
        {"params": anchors, "lr": rate, "weight_decay": training.weight_decay},
    ]
    return [{**group, "start": group["lr"]} for group in groups if group["params"]]


def _set_learning_rates(optimizer: torch.optim.Optimizer, progressed: float, *, final: float) -> None:
    """Cosine from each group's own start to ``final``; a function of the step alone, so resuming needs no state."""
    for group in optimizer.param_groups:
        group["lr"] = final + (group["start"] - final) * (1 + math.cos(math.pi * progressed)) / 2


def _batches(images: int, count: int, *, seed: int, epoch: int) -> list[Tensor]:
    """A shuffle of all images in ``count`` batches whose sizes differ by one at most: no runt at the end."""
    return _shuffled(images, count, np.random.default_rng((seed, epoch, _ORDER)))


def _shuffled(images: int, count: int, rng: np.random.Generator) -> list[Tensor]:
    return [torch.from_numpy(part) for part in np.array_split(rng.permutation(images), count)]
