"""The state of training: everything that a later step depends on, and how checkpoints store it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finealign.backbone.base import Backbone
from finealign.config import Config
from finealign.errors import ConfigError, NotFiniteError
from finealign.method.base import Method
from finealign.runtime.atomic import require_folder
from finealign.runtime.distributed import Ranks
from finealign.training.checkpoints import Checkpoint, read_last_checkpoint, write_checkpoint
from finealign.training.features import FeatureBank, pass_of_name
from finealign.training.schedule import Schedule
from finealign.types import Loss, PseudoLabels

NAMES_SHOWN = 8  # images of a batch that an error message names


@dataclass(frozen=True)
class EpochRecord:
    """Measurements of one epoch, or of one block of it (see ``Schedule``), made without ground truth."""

    epoch: int  # counted from 1
    loss: float
    parts: dict[str, float]  # the named parts of the loss
    mean_weight: float  # mean self-training weight
    changed: float  # share of pseudo-labels that differ from the image's one before; 1 where none had one, as at first
    class_share: list[float]  # share of its images labelled as each class
    learning_rate: float  # at the end: of the normalisation parameters, or of the anchors if those alone learn
    seconds: float  # duration; for an epoch that was stopped and resumed, the time since it was resumed
    images_per_second: float
    # How far images were moved, at most, as a multiple of how far crops lie from them; None: not looked at.
    drift: float | None = None
    kept: float = 1.0  # least share of what the normalisation parameters had learned that was kept


def begin(
    backbone: Backbone,
    method: Method,
    config: Config,
    *,
    images: int,
    known: Tensor | None = None,
    ranks: Ranks | None = None,
) -> "State":
    """Make the state before the first step. Gradients are enabled for what learns and disabled for the rest.

    ``images`` is the number of images. Raises BackboneError if the normalisation parameters are to learn and the
    backbone has none, ConfigError if nothing would learn, and ValueError if the configuration is not resolved.
    """
    norms = _what_learns(backbone, method, config)
    groups = _groups(norms, method, config)
    if not groups:
        raise ConfigError(
            f"Nothing would learn: the method {config.method.name!r} has no parameters of its own, and "
            f"training.learn={config.training.learn} with training.encoder={config.training.encoder} leaves the "
            "normalisation as it is. Use training.learn=norms and training.encoder=full, or another method."
        )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    labels = torch.full((images,), -1)
    meter = EpochMeter(classes=method.num_classes)
    return State(
        norms=norms,
        method=method,
        optimizer=optimizer,
        labels=labels,
        meter=meter,
        ranks=ranks or Ranks(),
        belonging=torch.ones(images),
        known=known,
    )


@dataclass
class State:
    """Everything that a later training step depends on."""

    norms: dict[str, nn.Parameter]  # the backbone's parameters that learn, by name
    method: Method
    optimizer: torch.optim.AdamW
    labels: Tensor  # (images,) int64, the last pseudo-labels of finished epochs; -1 for an image that has had none
    meter: "EpochMeter"  # of the current epoch
    ranks: Ranks
    belonging: Tensor  # (images,) in (0, 1], how far each image belongs to the classes; 1 before ``take_stock``
    known: Tensor | None = None  # (images,) int64 as in ``method.few_labels``; None where no label is known
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    outset: dict[str, Any] = field(default_factory=dict)  # JSON values: what ``take_stock`` was told to keep
    drift: float | None = None  # as in ``EpochRecord``, of this epoch; likewise ``kept``
    kept: float = 1.0

    @property
    def device(self) -> torch.device:
        """The device of the method and of its losses."""
        return next(chain(self.method.parameters(), self.method.buffers(), self.norms.values())).device

    def encoders(self) -> list[nn.Parameter]:
        """Return what learns only through encoded images. Its gradients on a rank are those of the rank's images."""
        prompts = [] if self.method.prompts is None else [self.method.prompts]
        return [*self.norms.values(), *prompts]

    def tensors(self) -> dict[str, Tensor]:
        """Return by name the backbone's parameters that learn, the method's state and the optimiser's state."""
        tensors: dict[str, Tensor] = {f"norms.{name}": value for name, value in self.norms.items()}
        tensors |= {f"method.{name}": value for name, value in self.method.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        return tensors

    def refuse_not_finite(
        self, batches: Sequence[Tensor], losses: Sequence[Tensor], config: Config, name_of: Callable[[int], str]
    ) -> None:
        """Raise NotFiniteError if a loss of these steps is not finite, or if a parameter is not finite after them.

        ``batches`` and ``losses`` are those of the steps. The error names the images of the first batch whose loss is
        not finite, or those of the last batch if only a parameter is not. ``name_of`` gives a name from a position.
        """
        learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        finite_losses = torch.stack([loss.isfinite() for loss in losses])
        finite_parameters = torch.stack([parameter.isfinite().all() for parameter in learning]).all()
        if bool(finite_losses.all() & finite_parameters):  # the only wait for the device if all is well
            return
        batch = batches[-1 if bool(finite_losses.all()) else int(finite_losses.int().argmin())]
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

    def finish_epoch(self, learning_rate: float, images: int, began: float) -> EpochRecord:
        """Count the current epoch as done and return its record.

        ``learning_rate`` is the one to record, ``images`` the number of images processed since ``began``, a value of
        ``time.perf_counter``.
        """
        order, found = torch.cat(self.meter.batches), torch.cat(self.meter.found).cpu()
        record = self.meter.record(self.epoch + 1, found, self.labels[order], learning_rate, images, began)
        record = replace(record, drift=self.drift, kept=self.kept)
        self.drift, self.kept = None, 1.0
        self.labels = self.labels.scatter(0, order, found)
        self.epoch, self.step = self.epoch + 1, 0
        self.meter = EpochMeter(classes=self.method.num_classes)
        return record

    def save(self, folder: Path, source: FeatureBank, record: EpochRecord | None = None) -> None:
        """Write a checkpoint: after an epoch, with its record, or within an epoch, without one. Raises OutputError."""
        require_folder(folder)
        tensors = {"labels": self.labels, "belonging": self.belonging, **self.tensors()}
        if self.step:
            tensors |= {f"meter.{name}": value for name, value in self.meter.tensors().items()}
        values = {
            "record": asdict(record) if record else None,
            "features": source.bank_file,
            "outset": self.outset,
            "drift": self.drift,
            "kept": self.kept,
        }
        write_checkpoint(folder, Checkpoint(self.epoch, tensors, values, step=self.step))

    def restore(self, folder: Path, source: FeatureBank, schedule: Schedule) -> None:
        """Continue from the last checkpoint in the folder, if there is one. Raises ModelError if none is valid."""
        checkpoint = read_last_checkpoint(folder)
        if checkpoint is None:
            return
        sections: dict[str, dict[str, Tensor]] = {"norms": {}, "method": {}, "optimizer": {}, "meter": {}}
        for name, value in checkpoint.tensors.items():
            section, _, rest = name.partition(".")
            sections.get(section, {})[rest] = value
        with torch.no_grad():
            for name, parameter in self.norms.items():
                parameter.copy_(sections["norms"][name])
        self.method.load_state_dict(sections["method"])
        self.labels, self.belonging = checkpoint.tensors["labels"], checkpoint.tensors["belonging"]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in sections["optimizer"].items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.epoch, self.step = checkpoint.epoch, checkpoint.step
        self.outset = checkpoint.values.get("outset", {})  # those of 0.1 have none
        self.drift, self.kept = checkpoint.values.get("drift"), checkpoint.values.get("kept", 1.0)
        if checkpoint.step:
            self.meter.load(sections["meter"], self.device)
        # Where a label pass will be run at once, the kept features are not needed.
        plan = source.plan
        pass_due = not (checkpoint.step or plan.unmoved) and plan.refresh and checkpoint.epoch % plan.refresh == 0
        kept_in = checkpoint.values.get("features")
        if kept_in and not pass_due:
            source.take_up(kept_in, schedule.labelled(pass_of_name(kept_in)))


class EpochMeter:
    """Collects the values of an epoch on the device until its end, so that no step has to wait for the device."""

    def __init__(self, *, classes: int) -> None:
        self.classes = classes
        self.batches: list[Tensor] = []  # positions of images
        self.found: list[Tensor] = []  # pseudo-labels
        self.losses: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, batch: Tensor, loss: Loss, pseudo: PseudoLabels) -> None:
        """Add the values of one step. ``batch`` (B,) holds the positions of its images."""
        self.batches.append(batch)
        self.found.append(pseudo.labels)
        self.losses.append(loss.total.detach())
        self.weights.append(pseudo.weights)
        for name, value in loss.parts.items():
            self.parts.setdefault(name, []).append(value)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything collected so far, by name, for a checkpoint within the epoch."""
        parts = {f"parts.{name}": torch.stack(values) for name, values in self.parts.items()}
        order, labels, weights = torch.cat(self.batches), torch.cat(self.found), torch.cat(self.weights)
        return {"order": order, "found": labels, "losses": torch.stack(self.losses), "weights": weights, **parts}

    def load(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what ``tensors`` returned."""
        on_device = {name: value.to(device) for name, value in tensors.items() if name != "order"}
        self.batches, self.found, self.weights = [tensors["order"]], [on_device["found"]], [on_device["weights"]]
        self.losses = list(on_device["losses"].unbind())
        self.parts = {
            name.removeprefix("parts."): list(value.unbind())
            for name, value in on_device.items()
            if name.startswith("parts.")
        }

    def record(
        self, epoch: int, labels: Tensor, before: Tensor, learning_rate: float, images: int, began: float
    ) -> EpochRecord:
        """Return the record of the epoch. ``labels`` and ``before`` are its images' labels, and those they had before.

        ``images`` is the number of images processed since ``began``, a value of ``time.perf_counter``.
        """
        seconds = time.perf_counter() - began
        labelled = before >= 0
        return EpochRecord(
            epoch=epoch,
            loss=float(torch.stack(self.losses).mean()),
            parts={name: float(torch.stack(values).mean()) for name, values in self.parts.items()},
            mean_weight=float(torch.cat(self.weights).mean()),
            changed=float((labels != before)[labelled].float().mean()) if bool(labelled.any()) else 1.0,
            class_share=(torch.bincount(labels, minlength=self.classes) / len(labels)).tolist(),
            learning_rate=learning_rate,
            seconds=seconds,
            images_per_second=images / seconds,
        )


def _what_learns(backbone: Backbone, method: Method, config: Config) -> dict[str, nn.Parameter]:
    """Enable gradients for what learns, disable them for the rest; the backbone's parameters that learn, by name."""
    learn = config.training.learn
    norms = {}
    if config.training.encoder == "full" and learn != "anchors":
        norms = backbone.norm_parameters()
        for parameter in norms.values():
            parameter.requires_grad_(True)
    method.requires_grad_(learn != "norms")
    if config.training.encoder == "frozen" and method.prompts is not None:
        method.prompts.requires_grad_(False)  # strong views are encoded once, before training
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
    # "start" is the initial rate of the cosine schedule.
    return [{**group, "start": group["lr"]} for group in groups if group["params"]]
