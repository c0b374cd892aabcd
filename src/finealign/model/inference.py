"""Inference with a fitted model: from an image file to pixels, views, embeddings and scores.

Fitting, predicting, explaining and serving prepare images in the same way, so that a model classifies images of the
same kind as those that it learned from.
"""

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice, tee
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from finealign.config import ViewSettings
from finealign.errors import ImageInputError, display_path
from finealign.images.decoding import Photo, decode_image, read_photo, to_photo
from finealign.images.files import ImageReadError
from finealign.images.prefetch import in_order
from finealign.images.views import PREDICTED_AS, PREDICTION_EPOCH, Uncut, Views, blank_of, cut_on, padded
from finealign.method.registry import choose_score
from finealign.model.fitted import FittedModel
from finealign.runtime.distributed import Ranks
from finealign.types import Blank, Box, Explanation, ImageFeatures, ImagePath, Prediction, Score, SetAside

Item = TypeVar("Item")
# uint8: the weak view (3, S, S), and the crops (N, 3, S, S) or the image and the boxes that they are cut from late.
Rendered = tuple[Tensor, Tensor | Uncut]
Outcome = tuple[
    ImagePath, str | None, Blank | None
]  # an image, why it cannot be read (None if it can), and if it is blank
Rows = NDArray[np.float32]  # (n, C)

PREDICTION_CHUNK = 32  # images decoded and encoded together


class Predictor:
    """Classifies images with a fitted model, and with the model before adaptation."""

    def __init__(self, model: FittedModel, ranks: Ranks | None = None) -> None:
        """``ranks`` share the encoding; every rank gets all results."""
        self.model, self.start = model, model.start()
        self.ranks = ranks or Ranks()
        self.cut_late = model.backbone.device.type == "cuda"  # a GPU cuts crops in next to no time
        settings, backbone = model.inference, model.backbone
        self.views = Views(
            ViewSettings(crops=settings.crops, crop_low=settings.crop_low, crop_high=settings.crop_high),
            size=backbone.input_size,
            geometry=backbone.geometry,
            mean=backbone.mean,
            seed=settings.seed,
        )

    def choose_score(self, asked: Score | None) -> Score:
        """Return ``asked``, or the model's own score if it is None.

        Raises ConfigError for a score that the method does not have.
        """
        return choose_score(self.model.name, asked or self.model.inference.score, self.model.method.scores)

    # --- from a file to views -----------------------------------------------------------------------------------------

    def read(self, path: ImagePath) -> Photo:
        """Read an image file and reduce it to the model's working size. Raises ImageReadError."""
        settings = self.model.inference
        return read_photo(
            path,
            shorter_side=settings.working_size,
            max_pixels=settings.max_pixels,
            white_value=settings.white_value,
        )

    def decode(self, file: BinaryIO, *, max_pixels: int, before: Callable[[int], None] = lambda pixels: None) -> Photo:
        """Do what ``read`` does, for the image in an open, seekable file.

        ``before`` is called with the image's number of pixels before they are decoded. Raises ImageReadError, also for
        an image of more than ``max_pixels`` pixels.
        """
        white = self.model.inference.white_value
        side = self.model.inference.working_size
        return self.to_photo(
            decode_image(file, max_pixels=max_pixels, white_value=white, shorter_side=side, before=before)
        )

    def to_photo(self, image: Image.Image) -> Photo:
        """Reduce a decoded RGB image to the model's working size."""
        return to_photo(image, shorter_side=self.model.inference.working_size)

    def render(self, photo: Photo, *, crops: bool) -> Rendered:
        """Make the weak view of an image and, with ``crops``, its crops; otherwise (0, 3, S, S) in their place.

        Where the crops are cut on a GPU, the image and their boxes stand there. Every image gets the same random draws,
        so its scores do not depend on other images or on its place in a list.
        """
        weak = self.views.weak(photo.pixels)
        if not crops:
            return weak, weak.new_empty(0, *weak.shape)
        if self.cut_late:
            return weak, (photo.pixels, self._boxes(photo))
        return weak, self.views.crops(photo.pixels, epoch=PREDICTION_EPOCH, image=PREDICTED_AS)

    def _boxes(self, photo: Photo) -> list[Box]:
        """The boxes of the crops in the image as it is at the working size."""
        return self.views.crop_boxes(*photo.pixels.shape[:2], epoch=PREDICTION_EPOCH, image=PREDICTED_AS)

    def crop_boxes(self, photo: Photo) -> tuple[Box, ...]:
        """Return the boxes of the crops that ``render`` makes, in pixels of the original image, upright by its EXIF."""
        height, width = photo.pixels.shape[:2]
        boxes = self._boxes(photo)
        if (width, height) == (photo.width, photo.height):
            return tuple(boxes)
        across, down = photo.width / width, photo.height / height
        return tuple(
            (round(left * across), round(top * down), round(right * across), round(bottom * down))
            for left, top, right, bottom in boxes
        )

    # --- from views to scores -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def embed(self, rendered: Sequence[Rendered], look: "Look") -> ImageFeatures:
        """Encode the views of B images: weak features (B, D), crop features (B, N, D), or (B, 0, D) without crops."""
        model = self.start if look.at_start else self.model
        count = model.inference.crops if look.crops else 0
        if not rendered:
            empty = model.text_features.names[:0]
            return ImageFeatures(weak=empty, crops=empty[:, None].expand(0, count, -1))
        with model.backbone.lend(model.norms):
            weak = model.backbone.embed(torch.stack([view for view, _ in rendered]), model.method.gaze)
            crops = model.backbone.embed(self._crops(rendered)) if look.crops else weak[:0]
        return ImageFeatures(weak=weak, crops=crops.reshape(len(rendered), count, weak.shape[1]))

    def _crops(self, rendered: Sequence[Rendered]) -> Tensor:
        """The crops of all images: (B * N, 3, S, S) uint8."""
        cut = [views for _, views in rendered if isinstance(views, Tensor)]
        uncut = [views for _, views in rendered if not isinstance(views, Tensor)]
        return cut_on(self.model.backbone.device, padded(uncut), self.views.size) if uncut else torch.cat(cut)

    @staticmethod
    def scored(model: FittedModel, features: ImageFeatures, score: Score) -> tuple[Rows, Rows]:
        """Compute the scores and the probabilities of every class: (n, C) each."""
        scores = model.score(features, score)
        return scores.cpu().numpy(), model.probabilities(scores, score).cpu().numpy()

    def predictions(
        self, paths: Iterable[ImagePath], *, score: Score | None = None, with_start: bool = False
    ) -> Iterator[Prediction | SetAside]:
        """Yield the prediction of each image, or why there is none, in order. Memory does not grow with their number.

        ``with_start`` also scores each image with the model before adaptation. Raises ConfigError for a score that the
        method does not have.
        """
        chosen = self.choose_score(score)
        looks = [Look(crops=chosen != "global")]
        if with_start and not self.model.encodes_as_start:
            looks.append(Look(crops=False, at_start=True))
        with closing(self._encoded(paths, looks)) as encoded:
            for outcomes, features in encoded:
                read = [(path, blank) for path, reason, blank in outcomes if reason is None]
                at_start = features[-1] if with_start else None
                predicted = self._predicted(read, features[0], chosen, at_start=at_start)
                for path, reason, _ in outcomes:
                    yield next(predicted) if reason is None else SetAside(display_path(path), reason)

    def predictions_of(
        self,
        paths: Sequence[ImagePath],
        *,
        features: ImageFeatures,
        start: ImageFeatures,
        blanks: Sequence[Blank | None],
        score: Score | None = None,
    ) -> Iterator[Prediction]:
        """Yield the predictions of n images, with those of the start, from features that are known.

        ``features`` are those of the adapted model and ``start`` those of the start: of whole images (n, D) and, where
        the score needs them, of the crops that ``render`` makes (n, N, D). ``blanks`` has what ``blank_of`` says of
        each. Raises ConfigError as ``predictions`` does.
        """
        chosen, device = self.choose_score(score), self.model.backbone.device
        known = start if self.model.adapted is not None else features
        for begin in range(0, len(paths), PREDICTION_CHUNK):
            rows = slice(begin, begin + PREDICTION_CHUNK)
            own, first = (
                ImageFeatures(weak=part.weak[rows].to(device), crops=part.crops[rows].to(device))
                for part in (known, start)
            )
            images = list(zip(paths[rows], blanks[rows], strict=True))
            yield from self._predicted(images, own, chosen, at_start=first)

    def _none(self, features: ImageFeatures) -> Sequence[float | None]:
        """How likely each image shows none of the classes; None for each if the model cannot say."""
        doubts = self.model.p_none(features.weak)
        return [None] * len(features.weak) if doubts is None else doubts.tolist()

    @torch.inference_mode()
    def _predicted(
        self,
        images: Sequence[tuple[ImagePath, Blank | None]],
        features: ImageFeatures,
        score: Score,
        *,
        at_start: ImageFeatures | None,
    ) -> Iterator[Prediction]:
        scores, probabilities = self.scored(self.model, features, score)
        none = self._none(features)
        if at_start is None:
            for index, (path, blank) in enumerate(images):
                yield Prediction(path, scores[index], probabilities[index], none=none[index], blank=blank)
            return
        start_scores, start_probabilities = self.scored(self.start, at_start, "global")
        for index, (path, blank) in enumerate(images):
            yield Prediction(
                path=path,
                scores=scores[index],
                probabilities=probabilities[index],
                start_scores=start_scores[index],
                start_probabilities=start_probabilities[index],
                none=none[index],
                blank=blank,
            )

    @torch.inference_mode()
    def features(
        self, paths: Iterable[ImagePath], *, at_start: bool = False, crops: bool = True
    ) -> tuple[ImageFeatures, list[SetAside]]:
        """Encode images: weak features (n, D) and crop features (n, N, D), N = 0 if ``crops`` is false.

        Images that cannot be read have no row; they are returned as the second value. ``at_start`` encodes them with
        the model before adaptation. Raises ImageInputError if none of the images can be read.
        """
        parts, set_aside = [], []
        with closing(self._encoded(paths, [Look(crops=crops, at_start=at_start)])) as encoded:
            for outcomes, (features,) in encoded:
                set_aside += [
                    SetAside(display_path(path), reason) for path, reason, _ in outcomes if reason is not None
                ]
                parts.append(features)
        if not any(len(part.weak) for part in parts):
            first = f" The first: {set_aside[0].path} ({set_aside[0].reason})." if set_aside else ""
            raise ImageInputError(f"None of the images can be read.{first}")
        joined = ImageFeatures(
            weak=torch.cat([part.weak for part in parts]), crops=torch.cat([part.crops for part in parts])
        )
        return joined, set_aside

    def _encoded(
        self, paths: Iterable[ImagePath], looks: Sequence["Look"]
    ) -> Generator[tuple[list[Outcome], list[ImageFeatures]], None, None]:
        """Encode images in rounds, in order. A round gives its paths, each with the reason if it cannot be read, and
        for each look the features of the others.

        Each rank reads and encodes one chunk of a round, and all ranks get the results of all of them. Threads decode
        images and cut crops one chunk ahead.
        """
        ranks, crops = self.ranks, any(look.crops for look in looks)

        def rendered(path: ImagePath) -> Rendered:
            return self.render(self.read(path), crops=crops)

        all_paths, unfiltered = tee(paths)
        own_paths = (
            path for place, path in enumerate(unfiltered) if place // PREDICTION_CHUNK % ranks.count == ranks.index
        )
        with closing(in_order(rendered, own_paths, held=2 * PREDICTION_CHUNK)) as results:
            chunks = _chunks(results, PREDICTION_CHUNK)
            for round_paths in _chunks(all_paths, PREDICTION_CHUNK * ranks.count):
                chunk = [result for _, result in next(chunks, [])]  # none if other ranks take the last ones
                found = [
                    (result.reason, None) if isinstance(result, SetAside) else (None, blank_of(result[0]))
                    for result in chunk
                ]
                all_found = [json.loads(text) for text in ranks.texts(json.dumps(found))]
                sizes = [sum(reason is None for reason, _ in rank_found) for rank_found in all_found]
                views = [result for result in chunk if not isinstance(result, SetAside)]
                parts = [self.embed(views, look) for look in looks]
                features = [
                    ImageFeatures(weak=ranks.gather(part.weak, sizes), crops=ranks.gather(part.crops, sizes))
                    for part in parts
                ]
                told = chain.from_iterable(all_found)
                outcomes = [(path, *one) for path, one in zip(round_paths, told, strict=True)]
                yield outcomes, features

    # --- explanations -------------------------------------------------------------------------------------------------

    def explain(
        self, photos: Sequence[Photo], *, score: Score | None = None, with_start: bool = False
    ) -> list[Explanation]:
        """Explain the scores of each image: its crops, their weights, and the scores and probabilities of the classes.

        The images are encoded together. The score ``global`` uses no crops, so none are given. ``with_start`` also
        scores each image with the model before adaptation. Raises ConfigError for a score that the method does not
        have.
        """
        chosen = self.choose_score(score)
        look = Look(crops=chosen != "global")
        rendered = [self.render(photo, crops=look.crops) for photo in photos]
        if not rendered:
            return []
        with torch.inference_mode():
            features = self.embed(rendered, look)
            weights = features.weak.new_empty(len(rendered), 0)
            if look.crops:
                weights = self.model.method.crop_weights(features)
            scores, probabilities = self.scored(self.model, features, chosen)
            none = self._none(features)
            start: tuple[Rows, Rows] | None = None
            if with_start:
                start = self.scored(self.start, self.embed(rendered, Look(crops=False, at_start=True)), "global")
        return [
            Explanation(
                width=photo.width,
                height=photo.height,
                score=chosen,
                boxes=self.crop_boxes(photo) if look.crops else (),
                weights=weights[index].cpu().numpy(),
                scores=scores[index],
                probabilities=probabilities[index],
                start_scores=start[0][index] if start else None,
                start_probabilities=start[1][index] if start else None,
                none=none[index],
            )
            for index, photo in enumerate(photos)
        ]

    def explain_file(self, path: ImagePath, *, score: Score | None = None) -> Explanation:
        """Do what ``explain`` does, for one image file.

        Raises ImageInputError if it cannot be read, and ConfigError as ``explain`` does.
        """
        try:
            photo = self.read(path)
        except ImageReadError as error:
            raise ImageInputError(
                f"Cannot explain '{display_path(path)}': {error}. Give the path of one image that can be read."
            ) from error
        return self.explain([photo], score=score)[0]


@dataclass(frozen=True)
class Look:
    """One way to encode images: with their crops or without, with the model or with the model before adaptation."""

    crops: bool
    at_start: bool = False


def tell_blank(count: int, first: str) -> str:
    """A sentence on ``count`` images that are all but black or white; empty where there are none."""
    if not count:
        return ""
    are = "image is" if count == 1 else "images are"
    return f"{count} {are} all but black or white, the first: {first}. Of more than 8 bits? See data.white_value."


def readable(
    predictions: Iterable[Prediction | SetAside],
    set_aside: list[SetAside],
    advance: Callable[[int], None] = lambda images: None,
) -> Iterator[Prediction]:
    """Yield the predictions only. Images that could not be read are appended to ``set_aside`` as they come.

    ``advance`` is called with 1 for every image, whether it could be read or not.
    """
    for outcome in predictions:
        advance(1)
        if isinstance(outcome, SetAside):
            set_aside.append(outcome)
        else:
            yield outcome


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
