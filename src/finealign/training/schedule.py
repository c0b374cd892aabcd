"""Which images a run reads, and when: its rounds, the batches of each, and the images that are labelled before each."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finealign.config import Config

_ORDER = 2  # with (seed, epoch), seeds the generator that shuffles an epoch; other numbers are in ``loop``


@dataclass(frozen=True)
class Schedule:
    """The order in which a run reads its images, which are named by their positions.

    A round is an epoch, or a block of one: where there are several blocks an epoch, each begins with a label pass over
    the images that it trains on, so that no label is older than a block and no more features are kept than of ``kept``
    images. Whatever is counted in epochs in a run's records and checkpoints is counted in rounds.
    """

    images: int
    epochs: int
    batch_size: int
    seed: int
    blocks: int = 1  # rounds an epoch
    kept: int = 0  # most images whose features are kept where there are blocks
    last: int = 0  # images that the pass after the last round encodes where there are more than ``kept``

    @property
    def rounds(self) -> int:
        """The rounds of the run."""
        return self.epochs * self.blocks

    @property
    def steps_an_epoch(self) -> int:
        """The optimiser steps of an epoch."""
        return math.ceil(self.images / self.batch_size)

    @property
    def word(self) -> str:
        """What a round is called."""
        return "epoch" if self.blocks == 1 else "block"

    def images_in(self, number: int) -> int:
        """How many images a round trains on."""
        block = number % self.blocks
        runs = self.images % self.steps_an_epoch  # the first batches of an epoch have an image more than the others

        def before(step: int) -> int:
            return step * (self.images // self.steps_an_epoch) + min(step, runs)

        return before(self._first_step(block + 1)) - before(self._first_step(block))

    def batches(self, number: int) -> list[Tensor]:
        """The batches of a round, which are those of its epoch in order. In an epoch each image is in one batch."""
        epoch, block = divmod(number, self.blocks)
        batches = shuffled(self.images, self.steps_an_epoch, seed=self.seed, epoch=epoch)
        return batches[self._first_step(block) : self._first_step(block + 1)]

    def share_done(self, number: int, step: int) -> float:
        """The share of the run's steps that are done after ``step`` steps of a round."""
        epoch, block = divmod(number, self.blocks)
        done = epoch * self.steps_an_epoch + self._first_step(block) + step
        return done / (self.epochs * self.steps_an_epoch)

    def labelled(self, number: int) -> Tensor | None:
        """The images that the label pass before a round encodes, in ascending order; None for all of them.

        Without blocks these are all. With blocks they are those that the round trains on, but where the features of all
        images may be kept, the first pass, by which stock is taken, encodes all, and so does the pass after the last
        round, which has the number ``rounds``. Else the latter encodes as many, drawn anew, as its steps will read.
        """
        if self.blocks == 1:
            return None
        if number in (0, self.rounds) and self.images <= self.kept:
            return None
        if number == self.rounds:
            order = torch.cat(shuffled(self.images, self.steps_an_epoch, seed=self.seed, epoch=self.epochs))
            return order[: self.last].sort().values
        return torch.cat(self.batches(number)).sort().values

    def _first_step(self, block: int) -> int:
        """The step of an epoch that a block begins with. Blocks differ in length by a step at most."""
        return block * self.steps_an_epoch // self.blocks


def schedule_of(config: Config, images: int) -> Schedule:
    """The schedule of a run on this many images. Raises ValueError if the configuration is not resolved.

    There are blocks where label features are kept and either more images are to be read than ``training.block_images``
    or the features are to be kept for less than an epoch. A frozen encoder keeps features for good, so that blocks are
    of use in a single epoch alone, and there only for what they save.
    """
    training, refresh = config.training, config.views.refresh_epochs
    anchor_steps = training.anchor_steps
    if training.epochs == "auto" or refresh == "auto" or anchor_steps == "auto":
        raise ValueError("the configuration is not resolved")
    frozen = training.encoder == "frozen"
    steps = math.ceil(images / training.batch_size)
    blocks = 1
    if training.epochs == 1 if frozen else refresh > 0:
        fitting = max(1, training.block_images // math.ceil(images / steps))  # steps whose images may be kept
        anew = 1 if frozen or refresh >= 1 else math.ceil(1 / refresh)
        blocks = min(steps, max(math.ceil(steps / fitting), anew))
    return Schedule(
        images=images,
        epochs=training.epochs,
        batch_size=training.batch_size,
        seed=config.seed,
        blocks=blocks,
        kept=training.block_images,
        last=min(training.block_images, max(1, anchor_steps) * training.anchor_batch_size),
    )


def shuffled(images: int, count: int, *, seed: int, epoch: int) -> list[Tensor]:
    """All images, shuffled into ``count`` batches whose sizes differ by at most one, so no batch is much smaller."""
    order = np.random.default_rng((seed, epoch, _ORDER)).permutation(images)
    return [torch.from_numpy(part) for part in np.array_split(order, count)]
