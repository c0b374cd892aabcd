"""The training loop: label passes, steps, checkpoints and exact resumption. It has no access to ground truth."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finealign.backbone.base import Backbone
from finealign.config import Config
from finealign.errors import StoppedError
from finealign.images.decoding import Pixels
from finealign.images.views import Views
from finealign.method.base import Method
from finealign.method.few_labels import with_known
from finealign.runtime.devices import choose_workers
from finealign.runtime.distributed import Ranks
from finealign.runtime.progress import Progress
from finealign.training.features import EncodingPlan, FeatureBank, FrozenBank, ImageSource, Seen
from finealign.training.outset import Stock, take_stock, tell_strangers
from finealign.training.schedule import Schedule, schedule_of
from finealign.training.state import EpochRecord, State, begin
from finealign.training.trust_region import TrustRegion
from finealign.types import ImageFeatures, Loss, PseudoLabels

# With (seed, epoch), seeds the generator that draws for the steps of the anchors alone. The one that shuffles an epoch
# is in ``schedule``, those of the views are in images/views.py.
_SETTLING = 3
MOST_WHOLE = 0.5  # odds at most of the whole image in place of a crop in the steps of the anchors alone
# Steps between two checks for values that are not finite and for a request to stop. A check makes a GPU wait; on a CPU
# it costs nothing.
_LOOK_EVERY = {"cpu": 1}
_LOOK_SELDOM = 8


@dataclass(frozen=True)
class Learner:
    """What is trained, and the settings for it."""

    backbone: Backbone
    method: Method
    views: Views
    config: Config  # resolved


def adapt(
    images: Sequence[Pixels],
    learner: Learner,
    *,
    known: Tensor | None = None,
    progress: Progress,
    checkpoints: Path | None = None,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    on_stock: Callable[[Stock], dict[str, Any]] | None = None,
    on_resume: Callable[[dict[str, Any]], None] = lambda outset: None,
    on_seen: Callable[[Seen], None] = lambda seen: None,
    name_of: Callable[[int], str] = lambda image: f"number {image}",
    ranks: Ranks | None = None,
) -> list[EpochRecord]:
    """Train the method, and the backbone's parameters that learn, in place. Returns the records of the epochs run here.

    ``known`` (images,) has the labels that are known, as in ``method.few_labels``; None where none is.

    ``checkpoints`` is a folder. Training continues from the last valid checkpoint in it, and writes one after each
    epoch, every ``training.checkpoint_minutes``, and when it is asked to stop. ``on_epoch`` is called with the record
    of each epoch as the epoch ends, ``on_stock`` with what is seen of the images before the first step: what it
    returns is kept in checkpoints, and ``on_resume`` is called with it by a run that continues. ``on_seen`` is called
    at the end with the features of these images that the run has encoded and that predictions can be made from, if it
    has. ``name_of`` gives the name of an image from its position. ``ranks`` share the encoding, and all get the same
    result. A method that does not train only processes the features of all images, in ``survey``, and no record is
    returned.

    Raises StoppedError when asked to stop, and NotFiniteError, which names the images of the batch, if the loss or a
    parameter is no longer finite; the last checkpoint before it is kept. Raises ValueError if the configuration is not
    resolved.
    """
    backbone, method, config = learner.backbone, learner.method, learner.config
    schedule = schedule_of(config, len(images))
    ranks = ranks or Ranks()
    with ExitStack() as ending:
        folder = ending.enter_context(_folder_of_all(checkpoints, ranks))
        plan = _encoding_plan(learner, schedule)
        source = ending.enter_context(
            FeatureBank(images, learner.views, backbone, plan, folder=folder, progress=progress, ranks=ranks)
        )
        if not method.trains:
            _survey(method, source.whole_images(0), known)
            return []
        state = begin(backbone, method, config, images=len(images), known=known, ranks=ranks)
        # Made while the normalisation is still that of the start, not that of a checkpoint.
        hold_back = _trust_region(state, source, config, schedule, progress)
        if checkpoints:
            state.restore(checkpoints, source, schedule)
            if state.outset:
                on_resume(state.outset)
        # In a single epoch of blocks no view is needed twice.
        kept = plan.frozen and schedule.blocks == 1 and state.epoch < schedule.rounds
        strong_views = min(config.training.strong_views, schedule.epochs)  # an epoch looks at one of each image
        encoded = FrozenBank(source, strong_views=strong_views) if kept else source
        keeper = _Keeper(state, source, checkpoints, progress, schedule, config.training.checkpoint_minutes)
        records = []
        for record in run_epochs(
            state,
            encoded,
            config,
            range(state.epoch, schedule.rounds),
            progress,
            schedule=schedule,
            after_step=keeper.after_step,
            before_last_pass=keeper.save,
            hold_back=hold_back,
            on_stock=on_stock,
            name_of=name_of,
        ):
            records.append(record)
            on_epoch(record)
            keeper.save(record)
        # The start looks at whole images alone, and a method with prompts of its own at other ones than label passes.
        seen = None if plan.weakly or plan.strongly else source.seen(schedule.rounds)
        if seen:
            on_seen(seen)
        ranks.wait()  # before the first rank deletes a temporary folder that the others still read
        return records


def _trust_region(
    state: State, source: FeatureBank, config: Config, schedule: Schedule, progress: Progress
) -> Callable[[int], None]:
    """What holds the encoder back before the epoch of a number, and at the end."""
    limit = config.training.drift_limit
    if limit == "off" or not state.norms:
        return lambda epoch: None
    region = TrustRegion(state, source, limit, progress, schedule.labelled(0))
    return lambda epoch: region.hold(epoch, ended=epoch == schedule.rounds)


@contextmanager
def _folder_of_all(checkpoints: Path | None, ranks: Ranks) -> Iterator[Path]:
    """The folder for kept features, the same on all ranks: that of the checkpoints, or a temporary one."""
    with ExitStack() as stack:
        if checkpoints is not None:
            yield checkpoints
            return
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="finealign-")) if ranks.first else ""
        yield Path(ranks.texts(temporary)[0])


def _encoding_plan(learner: Learner, schedule: Schedule) -> EncodingPlan:
    method, config = learner.method, learner.config
    refresh, unmoved = config.views.refresh_epochs, config.views.refresh_moved
    if refresh == "auto" or unmoved == "auto":
        raise ValueError("adapt() needs a resolved configuration")
    return EncodingPlan(
        refresh=math.ceil(refresh) if schedule.blocks == 1 else 1,
        crops=method.uses_crops,
        unmoved=unmoved,
        frozen=config.training.encoder == "frozen",
        workers=choose_workers(config.data.workers, learner.backbone.device),
        weakly=method.weak_gaze,
        strongly=method.gaze,
    )


class _Keeper:
    """Writes checkpoints: when told to, every ``checkpoint_minutes``, and when the run is asked to stop."""

    def __init__(
        self,
        state: State,
        source: FeatureBank,
        folder: Path | None,
        progress: Progress,
        schedule: Schedule,
        minutes: float,
    ) -> None:
        self.state, self.source, self.folder, self.progress = state, source, folder, progress
        self.schedule, self.minutes = schedule, minutes
        self.saved = time.monotonic()

    def save(self, record: EpochRecord | None = None) -> None:
        """Write a checkpoint, on the first rank only. ``record`` is that of an epoch that has just ended."""
        if self.folder and self.state.ranks.first:
            self.state.save(self.folder, self.source, record)
        self.saved = time.monotonic()

    def after_step(self) -> None:
        """Save if it is time to, or if any rank was asked to stop; then raises StoppedError, on all ranks."""
        state = self.state
        stopping = state.ranks.any(self.progress.asked_to_stop)
        if stopping or time.monotonic() - self.saved > 60 * self.minutes:
            self.save()
        if stopping:
            place = f"{self.schedule.word} {state.epoch + 1} of {self.schedule.rounds}"
            raise StoppedError(f"Stopped after step {state.step} of {place}.")


def run_epochs(
    state: State,
    source: ImageSource,
    config: Config,
    epochs: range,
    progress: Progress,
    *,
    schedule: Schedule | None = None,
    after_step: Callable[[], None] = lambda: None,
    before_last_pass: Callable[[], None] = lambda: None,
    hold_back: Callable[[int], None] = lambda epoch: None,
    on_stock: Callable[[Stock], dict[str, Any]] | None = None,
    name_of: Callable[[int], str] = lambda image: f"number {image}",
) -> Iterator[EpochRecord]:
    """Run these epochs and yield the record of each as it ends. ``state`` changes in place.

    Epochs are the rounds of the ``schedule``, by default of ``epochs.stop`` epochs without blocks. The first of them
    may have begun earlier: ``state.step`` of its steps are done. ``after_step`` is called after a check that all values
    are finite, which on a GPU is not after every step. ``before_last_pass`` is called after the last step, before the
    last label pass and the anchors' last steps. ``hold_back`` is called with the number of epochs done: before each
    epoch but the first, and after the last step. ``on_stock`` is passed to ``take_stock``. ``name_of`` gives the name
    of an image from its position. Raises NotFiniteError.
    """
    training, images = config.training, len(state.labels)
    schedule = schedule or Schedule(images, epochs.stop, training.batch_size, config.seed)

    def set_rates(epoch: int, step: int) -> float:
        _set_learning_rates(state.optimizer, schedule.share_done(epoch, step), final=training.final_learning_rate)
        return float(state.optimizer.param_groups[0]["lr"])

    with progress.stage("adapting", sum(map(schedule.images_in, epochs))) as stage:
        for epoch in epochs:
            began = time.perf_counter()
            state.ranks.follow(state.tensors().values())  # rounding may have made the ranks differ
            if not state.step:
                if epoch:
                    hold_back(epoch)
                _refresh_labels(state, source, config, schedule, name_of, on_stock)
            batches = schedule.batches(epoch)
            images_left = sum(map(len, batches[state.step :]))
            if state.step:
                stage.advance(schedule.images_in(epoch) - images_left)
            for batch in _steps(state, source, batches, partial(set_rates, epoch)):
                stage.advance(len(batch))
                unchecked = _due(state, len(batches))
                if unchecked is not None:
                    state.refuse_not_finite(batches[unchecked], state.meter.losses[unchecked], config, name_of)
                    after_step()
            # Set again: a resumed epoch may have taken its last step before it was stopped.
            rate = set_rates(epoch, len(batches) - 1)
            last = epoch + 1 == epochs.stop and training.last_label_pass and _settles(state.method, config)
            if last:
                before_last_pass()
            if epoch + 1 == epochs.stop:
                hold_back(epoch + 1)
            labelled = schedule.labelled(epoch + 1)
            if last and source.renew(epoch + 1, labelled):
                settle_anchors(state, source, config, epoch + 1, images=labelled, name_of=name_of)
            record = state.finish_epoch(rate, images_left, began)
            told = f"loss {record.loss:.3f} changed {record.changed:.1%}"
            stage.note(f"{schedule.word} {epoch + 1}/{epochs.stop} {told}")
            yield record


def _refresh_labels(
    state: State,
    source: ImageSource,
    config: Config,
    schedule: Schedule,
    name_of: Callable[[int], str],
    on_stock: Callable[[Stock], dict[str, Any]] | None,
) -> None:
    """Before the first step of an epoch: encode label features anew if due, call ``survey``, settle the anchors.

    Before the first epoch also ``take_stock``, before others ``tell_strangers`` if stock was not taken of their images.
    """
    epoch = state.epoch
    images = schedule.labelled(epoch)
    fresh = source.start_epoch(epoch, images)
    if not epoch:
        take_stock(state, source, config, images=images, on_stock=on_stock)
    elif images is not None and schedule.labelled(0) is not None:
        tell_strangers(state, source, config, images)
    if state.method.surveys:
        _survey(state.method, source.whole_images(epoch), state.known)
    if fresh:
        settle_anchors(state, source, config, epoch, images=images, name_of=name_of)


def _survey(method: Method, weak: Tensor, known: Tensor | None) -> None:
    """Have the method process all images. Without known labels it is not asked to know of any."""
    if known is None:
        method.survey(weak)
    else:
        method.survey(weak, known.to(weak.device))


def _steps(
    state: State, source: ImageSource, batches: Sequence[Tensor], set_rates: Callable[[int], object]
) -> Iterator[Tensor]:
    """Take the remaining steps of an epoch, and yield the batch of each step after it is taken."""
    epoch, remaining = state.epoch, batches[state.step :]
    for batch, strong in zip(remaining, source.strong_features(epoch, remaining), strict=True):
        set_rates(state.step)
        state.meter.add(batch, *step(state, source.label_features(batch, epoch), strong, batch))
        state.step += 1
        yield batch


def _due(state: State, steps: int) -> slice | None:
    """The steps since the last check that all values are finite, if the next check is due; otherwise None."""
    check_every = _LOOK_EVERY.get(state.device.type, _LOOK_SELDOM)
    if state.step % check_every and state.step != steps:
        return None
    return slice(max(0, state.step - check_every), state.step)


def settle_anchors(
    state: State,
    source: ImageSource,
    config: Config,
    epoch: int,
    *,
    images: Tensor | None = None,
    name_of: Callable[[int], str] = lambda image: f"number {image}",
) -> None:
    """Train the anchors alone, on kept crop features. No image is encoded, so this costs next to nothing.

    ``images`` (n,) are the positions of those to take, of which features are kept; None for all.

    In place of an image's strong view, each step takes one of its crops, or the whole image with odds of what it counts
    for in labels, at most even ones. This is ours and not part of the paper. Does nothing if the method or the settings
    do not ask for it. Raises NotFiniteError.
    """
    training = config.training
    if not _settles(state.method, config) or training.anchor_steps == "auto":
        return
    images = torch.arange(len(state.labels)) if images is None else images
    batch_count = max(1, round(len(images) / training.anchor_batch_size))
    rng = np.random.default_rng((config.seed, epoch, _SETTLING))
    odds = min(MOST_WHOLE, float(state.method.share_of_whole()))
    step_batches, losses = [], []
    for number in range(training.anchor_steps):
        if number % batch_count == 0:
            batches = np.array_split(rng.permutation(len(images)), batch_count)
        batch = images[torch.from_numpy(batches[number % batch_count])]
        features = source.label_features(batch, epoch)
        device = features.crops.device
        chosen = torch.from_numpy(rng.integers(features.crops.shape[1], size=len(batch))).to(device, non_blocking=True)
        whole = torch.from_numpy(rng.random(len(batch)) < odds).to(device, non_blocking=True)
        _set_learning_rates(state.optimizer, number / training.anchor_steps, final=training.final_learning_rate)
        crop = features.crops[torch.arange(len(batch), device=device), chosen]
        view = torch.where(whole[:, None], features.weak, crop)
        loss, _ = step(state, features, view, batch)
        step_batches.append(batch)
        losses.append(loss.total.detach())
    state.refuse_not_finite(step_batches, losses, config, name_of)


def _settles(method: Method, config: Config) -> bool:
    """Whether ``settle_anchors`` has anything to do."""
    training = config.training
    if training.anchor_steps == "auto":
        raise ValueError("the configuration is not resolved")
    return method.settles and training.anchor_steps > 0 and training.learn != "norms"


def step(state: State, features: ImageFeatures, strong: Tensor, batch: Tensor) -> tuple[Loss, PseudoLabels]:
    """Take one step of the optimiser, and return the loss and the pseudo-labels of the batch.

    The batch (B,), positions of images, is labelled by its weak and crop ``features``; the loss is that of its strong
    features (B, D). The less an image belongs to the classes, the less its label weighs and it counts in means;
    a label that is known is kept.
    """
    pseudo = state.method.pseudo_label(features)
    # Without waiting: not even a GPU that is busy with the steps before holds this one up.
    belonging = state.belonging[batch].to(pseudo.weights, non_blocking=True)
    pseudo = replace(pseudo, weights=pseudo.weights * belonging, belonging=belonging)
    if state.known is not None:
        known = state.known[batch].to(pseudo.labels, non_blocking=True)
        pseudo = with_known(pseudo, known, state.method.label_weight)
    loss = state.method.loss(strong, pseudo)
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss.total)
    # All ranks compute the same loss, so only gradients through images that a single rank encoded have to be summed.
    state.ranks.add_gradients(state.encoders())
    state.optimizer.step()
    return loss, pseudo


def _set_learning_rates(optimizer: torch.optim.Optimizer, share_done: float, *, final: float) -> None:
    """A cosine schedule from each group's initial rate, at a share of 0, to ``final``, at 1.

    The rates depend on the step alone, so resuming needs no state of the schedule.
    """
    for group in optimizer.param_groups:
        group["lr"] = final + (group["start"] - final) * (1 + math.cos(math.pi * share_done)) / 2
