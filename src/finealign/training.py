"""The one loop: label passes, steps, checkpoints, exact resumption. No label of the user's comes near it."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from finealign.backbone import Backbone, Gaze
from finealign.checkpoints import Checkpoint, read_last_checkpoint, write_checkpoint
from finealign.config import Config
from finealign.devices import choose_workers
from finealign.encoding import EncodedAfresh, EncodedOnce, ImageSource
from finealign.errors import NotFiniteError, StoppedError
from finealign.images import Pixels
from finealign.methods import Method
from finealign.progress import Progress
from finealign.ranks import Ranks
from finealign.storage import require_folder
from finealign.types import ImageFeatures, Loss, PseudoLabels
from finealign.views import Views

# The draws that shuffle an epoch, and the anchors' own steps; views have numbers of their own, see views.py.
_ORDER, _SETTLING = 2, 3
# Steps between two looks at whether all is finite and anyone asked to stop: each makes a GPU wait, and no CPU.
_LOOK_EVERY = {"cpu": 1}
_LOOK_SELDOM = 8
NAMES_SHOWN = 8  # images of a batch that a message names


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
    seconds: float  # of an epoch that was stopped midway, since it was resumed
    images_per_second: float


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
    name_of: Callable[[int], str] = lambda image: f"number {image}",
    ranks: Ranks | None = None,
) -> list[EpochRecord]:
    """Train the method, and the backbone where it learns, in place; the records of the epochs run here.

    ``config`` is resolved. With ``checkpoints`` the last whole checkpoint in that folder is continued from, and one is
    left by each epoch, every ``training.checkpoint_minutes`` and when the run is asked to stop. ``ranks`` share the
    encoding; each gets the same result. Raises StoppedError when asked to stop, and NotFiniteError, which names the
    images by ``name_of`` their position, when the loss is no longer finite; the checkpoint before it stays.
    """
    epochs, refresh = config.training.epochs, config.views.refresh_epochs
    if epochs == "auto" or refresh == "auto":
        raise ValueError("adapt() needs a resolved configuration")
    ranks = ranks or Ranks()
    with ExitStack() as leaving:
        folder = checkpoints
        if folder is None:
            own = leaving.enter_context(tempfile.TemporaryDirectory(prefix="finealign-")) if ranks.first else ""
            folder = Path(ranks.texts(own)[0])
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
            ranks=ranks,
        )
        if not method.trains:
            method.survey(source.whole_images(0))
            return []
        state = begin(backbone, method, config, images=len(images), ranks=ranks)
        if checkpoints:
            state.restore(checkpoints, source)
        records = []
        frozen = config.training.encoder == "frozen" and state.epoch < epochs
        encoded = EncodedOnce(source, strong_views=config.training.strong_views) if frozen else source
        saved = time.monotonic()

        def save(record: EpochRecord | None = None) -> None:
            nonlocal saved
            if checkpoints and ranks.first:
                state.save(checkpoints, source, record)
            saved = time.monotonic()

        def after_step() -> None:
            stopping = ranks.any(progress.asked_to_stop)
            if stopping or time.monotonic() - saved > 60 * config.training.checkpoint_minutes:
                save()
            if stopping:
                raise StoppedError(f"Stopped after step {state.step} of epoch {state.epoch + 1} of {epochs}.")

        todo = range(state.epoch, epochs)
        for record in run_epochs(
            state, encoded, config, todo, progress, after_step=after_step, before_last_pass=save, name_of=name_of
        ):
            records.append(record)
            on_epoch(record)
            save(record)
        ranks.wait()  # before the first one removes what all look at
        return records


def method_gaze(method: Method) -> Gaze | None:
    """How a method looks at the images it classifies and at strong views; None: as the tower does."""
    return Gaze(method.prompts, method.salient) if method.salient or method.prompts is not None else None


def begin(backbone: Backbone, method: Method, config: Config, *, images: int, ranks: Ranks | None = None) -> "State":
    """The state before the first step: what learns is opened to gradients, the rest is closed."""
    norms = _what_learns(backbone, method, config)
    optimizer = torch.optim.AdamW(_groups(norms, method, config), betas=(0.9, 0.999))
    labels = torch.full((images,), -1)
    meter = _Meter(classes=method.num_classes)
    return State(norms=norms, method=method, optimizer=optimizer, labels=labels, meter=meter, ranks=ranks or Ranks())


def run_epochs(
    state: "State",
    source: ImageSource,
    config: Config,
    epochs: range,
    progress: Progress,
    *,
    after_step: Callable[[], None] = lambda: None,
    before_last_pass: Callable[[], None] = lambda: None,
    name_of: Callable[[int], str] = lambda image: f"number {image}",
) -> Iterator[EpochRecord]:
    """Run these epochs of ``epochs.stop``, each recorded as it ends; ``state`` changes in place.

    The first may have been begun: ``state.step`` steps of it are done. ``after_step`` is called when all was found to
    be finite: on a GPU not after each step; ``before_last_pass`` when all steps are done and the anchors' last are not.
    Raises NotFiniteError.
    """
    training, images = config.training, len(state.labels)
    batches_an_epoch = math.ceil(images / training.batch_size)
    look_every = _LOOK_EVERY.get(state.device.type, _LOOK_SELDOM)

    def set_rates(epoch: int, step: int) -> float:
        progressed = (epoch * batches_an_epoch + step) / (epochs.stop * batches_an_epoch)
        _set_learning_rates(state.optimizer, progressed, final=training.final_learning_rate)
        return float(state.optimizer.param_groups[0]["lr"])

    with progress.stage("adapting", len(epochs) * images) as stage:
        for epoch in epochs:
            began = time.perf_counter()
            state.ranks.follow(state.tensors().values())
            if not state.step:
                fresh = source.start_epoch(epoch)
                if state.method.surveys:
                    state.method.survey(source.whole_images(epoch))
                if fresh:
                    settle_anchors(state, source, config, epoch, name_of=name_of)
            batches = _batches(images, batches_an_epoch, seed=config.seed, epoch=epoch)
            left = batches[state.step :]
            images_left = sum(map(len, left))
            if state.step:
                stage.advance(images - images_left)
            for batch, strong in zip(left, source.strong_features(epoch, left), strict=True):
                set_rates(epoch, state.step)
                state.meter.add(batch, *step(state, source.label_features(batch, epoch), strong))
                state.step += 1
                stage.advance(len(batch))
                if state.step % look_every == 0 or state.step == len(batches):
                    recent = slice(max(0, state.step - look_every), state.step)
                    state.refuse_not_finite(batches[recent], state.meter.losses[recent], config, name_of)
                    after_step()
            rate = set_rates(epoch, len(batches) - 1)  # anew, for an epoch whose last step was before a stop
            last = epoch + 1 == epochs.stop and training.last_label_pass and _settles(state.method, config)
            if last:
                before_last_pass()
            if last and source.renew(epoch + 1):
                settle_anchors(state, source, config, epoch + 1, name_of=name_of)
            labels = state.meter.labels()
            record = state.meter.record(epoch + 1, labels, state.labels, rate, images_left, began)
            state.labels, state.epoch, state.step = labels, epoch + 1, 0
            state.meter = _Meter(classes=state.method.num_classes)
            stage.note(f"epoch {epoch + 1}/{epochs.stop} loss {record.loss:.3f} changed {record.changed:.1%}")
            yield record


def settle_anchors(
    state: "State",
    source: ImageSource,
    config: Config,
    epoch: int,
    *,
    name_of: Callable[[int], str] = lambda image: f"number {image}",
) -> None:
    """Train the anchors alone on crop features that are kept: no image is encoded, so it costs next to nothing.

    Each image's strong view is one of its crops, another one each time. Ours, not the paper's. Raises NotFiniteError.
    """
    training = config.training
    if not _settles(state.method, config):
        return
    images = len(state.labels)
    count = max(1, round(images / training.anchor_batch_size))
    rng = np.random.default_rng((config.seed, epoch, _SETTLING))
    seen, losses = [], []
    for number in range(training.anchor_steps):
        if number % count == 0:
            batches = _shuffled(images, count, rng)
        batch = batches[number % count]
        features = source.label_features(batch, epoch)
        chosen = torch.from_numpy(rng.integers(features.crops.shape[1], size=len(batch))).to(features.crops.device)
        _set_learning_rates(state.optimizer, number / training.anchor_steps, final=training.final_learning_rate)
        loss, _ = step(state, features, features.crops[torch.arange(len(batch)), chosen])
        seen.append(batch)
        losses.append(loss.total.detach())
    state.refuse_not_finite(seen, losses, config, name_of)


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
    state.ranks.add_gradients(state.encoders())
    state.optimizer.step()
    return loss, pseudo


@dataclass
class State:
    """Everything that a later step depends on."""

    norms: dict[str, nn.Parameter]
    method: Method
    optimizer: torch.optim.AdamW
    labels: Tensor  # (images,) the pseudo-labels of the epoch before, -1 before the first
    meter: "_Meter"  # of the epoch that is going on
    ranks: Ranks
    epoch: int = 0  # epochs done
    step: int = 0  # steps done of the next one

    @property
    def device(self) -> torch.device:
        return next(self.method.buffers()).device

    def encoders(self) -> list[nn.Parameter]:
        """What learns through encoded images alone, of which a rank encodes its share."""
        prompts = [] if self.method.prompts is None else [self.method.prompts]
        return [*self.norms.values(), *prompts]

    def tensors(self) -> dict[str, Tensor]:
        """What learns, what the method remembers and what the optimiser does, by name."""
        found: dict[str, Tensor] = {f"norms.{name}": value for name, value in self.norms.items()}
        found |= {f"method.{name}": value for name, value in self.method.state_dict().items()}
        for index, kept in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{key}": value for key, value in kept.items()}
        return found

    def refuse_not_finite(
        self, batches: Sequence[Tensor], losses: Sequence[Tensor], config: Config, name_of: Callable[[int], str]
    ) -> None:
        """Raise NotFiniteError where a loss of these steps is not, or what learns no longer is after them."""
        learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        sound = torch.stack([loss.isfinite() for loss in losses])
        whole = torch.stack([parameter.isfinite().all() for parameter in learning]).all()
        if bool(sound.all() & whole):
            return
        batch = batches[-1 if bool(sound.all()) else int(sound.int().argmin())]
        names = [name_of(image) for image in batch.tolist()]
        shown = ", ".join(names[:NAMES_SHOWN]) + (
            f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        )
        training = config.training
        raise NotFiniteError(
            f"The loss is no longer finite in epoch {self.epoch + 1}, from a batch of these images on: {shown}. "
            f"Lower training.learning_rate ({training.learning_rate:g}) or training.anchor_learning_rate "
            f"({training.anchor_learning_rate:g}), or look at these images. The last good state is kept.",
            images=names,
        )

    def save(self, folder: Path, source: EncodedAfresh, record: EpochRecord | None = None) -> None:
        """Leave a checkpoint: of the end of an epoch, with its record, or of the midst of one."""
        require_folder(folder)
        tensors = {"labels": self.labels, **self.tensors()}
        if self.step:
            tensors |= {f"meter.{name}": value for name, value in self.meter.tensors().items()}
        values = {"record": asdict(record) if record else None, "features": source.kept_in}
        write_checkpoint(folder, Checkpoint(self.epoch, tensors, values, step=self.step))

    def restore(self, folder: Path, source: EncodedAfresh) -> None:
        """Take up the last checkpoint in the folder, if any."""
        found = read_last_checkpoint(folder)
        if found is None:
            return
        sections: dict[str, dict[str, Tensor]] = {"norms": {}, "method": {}, "optimizer": {}, "meter": {}}
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
        self.epoch, self.step = found.epoch, found.step
        if found.step:
            self.meter.load(sections["meter"], self.device)
        passing = not found.step and source.refresh and found.epoch % source.refresh == 0  # encoded anew at once
        if found.values.get("features") and not passing:
            source.take_up(found.values["features"])


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

    def tensors(self) -> dict[str, Tensor]:
        """All of it, to go on from later."""
        parts = {f"parts.{name}": torch.stack(values) for name, values in self.parts.items()}
        order, found, weights = torch.cat(self.batches), torch.cat(self.found), torch.cat(self.weights)
        return {"order": order, "found": found, "losses": torch.stack(self.losses), "weights": weights, **parts}

    def load(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Go on from what ``tensors`` gave."""
        there = {name: value.to(device) for name, value in tensors.items() if name != "order"}
        self.batches, self.found, self.weights = [tensors["order"]], [there["found"]], [there["weights"]]
        self.losses = list(there["losses"].unbind())
        self.parts = {
            name.removeprefix("parts."): list(value.unbind())
            for name, value in there.items()
            if name.startswith("parts.")
        }

    def labels(self) -> Tensor:
        """The pseudo-label of every image, by position: (images,) int64 on the CPU."""
        order = torch.cat(self.batches)
        return torch.empty_like(order).scatter_(0, order, torch.cat(self.found).cpu())

    def record(
        self, epoch: int, labels: Tensor, before: Tensor, learning_rate: float, images: int, began: float
    ) -> EpochRecord:
        """Of an epoch of which so many images were looked at since it began here."""
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
            images_per_second=images / seconds,
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
