"""The classifier: ``FineAlign`` with ``fit``, ``predict``, ``predict_proba``, ``save`` and ``load``."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from finealign.backbone.base import Backbone, lacking, own_norms
from finealign.backbone.load import load_backbone
from finealign.config import Config
from finealign.errors import CautionWarning, ConfigError, FinealignError, ImageInputError, display_path
from finealign.estimator import Estimator, not_fitted
from finealign.images.decoding import Pixels
from finealign.images.held import Images, stream
from finealign.images.listing import left_out_of
from finealign.images.sources import find_images
from finealign.images.training_set import decode_training_set
from finealign.images.views import Views
from finealign.method.base import Method, SelfTrainingMethod
from finealign.method.registry import copy_method, create_method, name_of
from finealign.method.strangers import StrangerModel
from finealign.method.strangers import fit as fit_strangers
from finealign.model.calibration import ENCODED, SAMPLE, Calibration, calibrate, sample, sampled
from finealign.model.card import is_card, model_card
from finealign.model.fitted import FittedModel, check_class_prior, check_use, inference_settings, what_learned
from finealign.model.folder import read_model, write_model
from finealign.model.inference import Predictor, readable, tell_blank
from finealign.model.known_labels import KnownLabels, Labels, check_taken, read_known_labels, told_labels
from finealign.model.prepare import Prepared, check_settings, given_shares, prepare, with_names
from finealign.model.refusal import DIGITS, NONE_OF_THESE, UNSURE, cutoff, least_confidence
from finealign.review.figures import Measured, measure
from finealign.review.labels import read_labels
from finealign.review.plan import Plan, look_at, make_plan
from finealign.review.sampling import Aim
from finealign.runtime.atomic import save_text
from finealign.runtime.devices import choose_device, choose_precision
from finealign.runtime.distributed import Ranks
from finealign.runtime.progress import Progress
from finealign.texts.prompts import make_texts
from finealign.training.cautions import Caution, cautions
from finealign.training.features import Seen
from finealign.training.loop import Learner, adapt
from finealign.training.outset import Stock
from finealign.training.state import EpochRecord
from finealign.types import (
    ClassPrior,
    Explanation,
    ImageFeatures,
    ImagePath,
    Prediction,
    Reject,
    Score,
    SetAside,
    TextFeatures,
    Texts,
    Use,
    WantedPrecision,
)


class FineAlign(Estimator):
    """A CLIP-like classifier that adapts itself to unlabelled images of the named classes.

        model = FineAlign(classes=["robin", "wren"], descriptions={...}).fit("photos/")
        labels = model.predict("more-photos/")

    The constructor only stores its arguments; ``fit`` checks them. scikit-learn's tools take it for a classifier of
    theirs, which learns without labels. A fitted model is two models, the adapted one and
    the start (the model before adaptation). One of them is in use: it predicts, and the attributes below are its own;
    ``use`` takes the other. After ``fit`` or ``load`` a model has these attributes:

    - ``use_``: which of the two is in use, "adapted" after ``fit``;
    - ``classes_``, ``texts_``, ``text_features_``: the class names, all texts, and their embeddings;
    - ``backbone_``, ``method_``, ``norms_``: the backbone as it was loaded, the method with what it has learned, and
      the model's own normalisation parameters, which it lends to the backbone while it encodes;
    - ``start_method_``, ``start_norms_``: those of the model before adaptation;
    - ``score_``: the score used when no other is asked for;
    - ``class_prior_``: how images to classify are taken to be distributed, "folder" or "even";
    - ``set_aside_``: the images that the last ``fit`` or ``predict`` could not read, and why.

    After ``fit`` only, it also has ``config_`` (the resolved settings), ``history_`` (one record per epoch), ``paths_``
    (the images adapted to), ``cautions_`` (what speaks against training on them, seen before it began), ``explained_``
    (by which crops were trusted or not, see ``method.crop_trust``; empty where nothing was looked at),
    ``calibration_`` (temperatures and estimated accuracy; None if it was not calibrated) and ``labels_`` (how many
    images with a label were learned from; None without labels).
    """

    config_: Config
    paths_: Sequence[ImagePath]
    history_: list[EpochRecord]
    set_aside_: list[SetAside]
    cautions_: list[Caution]
    explained_: dict[float, float]
    calibration_: Calibration | None = None
    labels_: dict[str, Any] | None = None
    _sampled: tuple[list[ImagePath], ImageFeatures, ImageFeatures] | None = None  # images, and their features
    _review: Plan | None = None  # of the last review_batch
    _seen: Seen | None = None  # features of the images adapted to that the fit has encoded anyway

    def __init__(
        self,
        classes: Sequence[str],
        *,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        templates: Sequence[str] | None = None,
        backbone: str | Backbone | None = None,
        method: str | type[Method] | Method | None = None,
        seed: int | None = None,
        device: str | None = None,
        precision: WantedPrecision | None = None,
        config: Config | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Store the arguments. Nothing is checked or loaded yet.

        ``classes`` are at least two names. ``descriptions`` has sentences for each of them, and ``templates`` are
        prompts with one ``{}`` for the class name. ``backbone``, ``method``, ``seed``, ``device`` and ``precision`` are
        settings, whose defaults are those of ``finealign adapt``: OpenAI's ViT-B/32, the method fair, seed 0, device
        and precision "auto". ``config`` holds these and all other settings; a setting that is given besides it must
        agree with it.

        ``backbone`` may also be a ``Backbone``, which has its own device and precision. ``method`` may also be a
        subclass of ``Method``, or an instance that ``create_method`` made from these texts, of which a copy is trained.
        Where ``config`` names no backbone or no method, it is taken to name these.

        ``ranks`` are the processes that share the encoding, as returned by ``Ranks.launched()``. All of them must call
        the same methods in the same order, and all get the same results. Without ``ranks`` there is only this process.
        """
        self.classes = classes
        self.descriptions = descriptions
        self.templates = templates
        self.backbone = backbone
        self.method = method
        self.seed = seed
        self.device = device
        self.precision = precision
        self.config = config
        self.ranks = ranks

    # --- fitting ------------------------------------------------------------------------------------------------------

    def check(self) -> tuple[Texts, Config]:
        """Check and return the texts and settings, without loading anything. Raises PromptError or ConfigError."""
        backbone, method, config = self.backbone, self.method, self.config
        if not (backbone is None or isinstance(backbone, str)):
            self._refuse_no_backbone(backbone)
            backbone = backbone.identifier
            config = config and with_names(config, backbone=backbone)
        if not (method is None or isinstance(method, str)):
            method = name_of(type(method) if isinstance(method, Method) else method)
            config = config and with_names(config, method=method)
        arguments = {
            "backbone": backbone,
            "method": method,
            "seed": self.seed,
            "device": self.device,
            "precision": self.precision,
        }
        options = self.method.options if isinstance(self.method, Method) else None
        config = check_settings(config, arguments, options)
        texts = make_texts(self.classes, self.descriptions, self.templates)
        given_shares(config, texts.classes)
        return texts, config

    def _refuse_no_backbone(self, backbone: Backbone) -> None:
        """Raise ConfigError if this is no backbone, or on another device or of another precision than was asked for."""
        if missing := lacking(backbone):
            raise ConfigError(
                f"backbone is {type(backbone).__name__}, no name and no Backbone: it lacks {', '.join(missing)}. "
                "Wanted: a name, as ViT-B-32-quickgelu/openai, or an object with all that finealign.Backbone lists."
            )
        for name in ("device", "precision"):
            asked, found = getattr(self, name), str(getattr(backbone, name))
            if asked not in (None, "auto", found):
                raise ConfigError(
                    f"{name}={asked!r} is not that of the backbone that was given, {found!r}. Leave {name} out, or "
                    "give another backbone."
                )

    def prepare(
        self,
        images: Images,
        *,
        labels: Labels | None = None,
        backbone: Backbone | None = None,
        text_features: TextFeatures | None = None,
        progress: Progress | None = None,
    ) -> Prepared:
        """Check texts and settings, list the images, load the backbone and encode the texts.

        ``labels`` are as for ``fit``. A ``backbone`` loaded before, or ``text_features`` encoded before, are used if
        given. Raises PromptError, ConfigError, ImageInputError or BackboneError, all of which are FinealignErrors.
        """
        texts, config = self.check()
        check_taken(config.method.name, given=labels is not None)
        paths = find_images(images, exclude=config.data.exclude)
        known = None
        if labels is not None:
            folder = Path(images) if isinstance(images, str | os.PathLike) else None
            known = read_known_labels(labels, paths, texts.classes, folder=folder)
        backbone = self.load_backbone(config, progress) if backbone is None else backbone
        prepared = prepare(texts, config, paths, backbone, text_features=text_features, labels=known)
        if prepared.unknown_words:
            (progress or Progress()).caution(prepared.unknown_words)
        return prepared

    def load_backbone(self, config: Config, progress: Progress | None = None) -> Backbone:
        """Load the configured backbone on the configured device, unless the constructor was given a loaded one.

        Raises BackboneError or ConfigError.
        """
        if not (self.backbone is None or isinstance(self.backbone, str)):
            return self.backbone
        device = choose_device(config.device)
        with (progress or Progress()).stage("loading the backbone", None):
            return load_backbone(
                config.backbone, device=device, precision=choose_precision(config.precision, device), seed=config.seed
            )

    def fit(
        self,
        images: Images | Prepared,
        y: object = None,
        *,
        labels: Labels | None = None,
        backbone: Backbone | None = None,
        checkpoints: Path | None = None,
        on_epoch: Callable[[EpochRecord], None] = lambda record: None,
        progress: Progress | None = None,
    ) -> Self:
        """Adapt to unlabelled images, which ``find_images`` lists: a folder (whose structure is ignored), a list file,
        a CSV, images in memory (PIL images, arrays, tensors), a Hugging Face or PyTorch dataset, whose labels are not
        looked at, or a list or generator of any of these and of paths. ``y``, which scikit-learn passes on, is ignored.

        ``labels`` are the classes of a few of the images, if they are known: class names by path, a class name or None
        for each image, or a CSV with the columns path and label. They are learned from; without them nothing is read
        but the images and the texts. "none of these" is the label of an image that shows none of the classes.

        ``images`` may also be what ``prepare`` returned, labels included. ``backbone`` is one that ``load_backbone``
        returned, to save loading it twice; several models can share one. ``checkpoints`` is a folder: a checkpoint is
        written into it after each epoch, and training continues from the last one in it. ``on_epoch`` is called after
        each epoch, and may predict with the model as it is then, which does not affect the run.

        Raises FinealignError: among others PromptError, ConfigError, ImageInputError, BackboneError, StoppedError if
        the run is asked to stop, and NotFiniteError if the loss is no longer finite.
        """
        progress = progress or Progress()
        if isinstance(images, Prepared):
            prepared = images
            if labels is not None:
                raise ConfigError(
                    "The images are prepared, labels included. Give the labels to prepare(), not to fit()."
                )
        else:
            prepared = self.prepare(images, labels=labels, backbone=backbone, progress=progress)
            if left_out := left_out_of(prepared.listed):
                progress.caution(left_out)
        if prepared.labels and prepared.labels.not_used and self._ranks.first:
            progress.caution(prepared.labels.not_used)
        # Made before training, so that ``on_epoch`` can predict: the model shares the parameters that learn.
        method = self._begin(prepared)
        if method.trains or method.surveys:
            try:
                self._train(prepared, method, checkpoints, on_epoch, progress)
            except BaseException:
                del self._predictor  # a partly trained model is not a fitted one
                raise
        method.requires_grad_(False)
        if method.trains:
            with progress.stage("calibrating without labels", None):
                self._learn_strangers()
                if self.config_.prediction.calibrate:
                    self._calibrate(prepared.labels)
        if checkpoints is None:
            self._seen = None  # its files are gone, but their space is only free when nothing refers to them
        return self

    def _learn_strangers(self) -> None:
        """Learn, for both models, how to tell images that show none of the classes from those that do."""
        before, after, _ = self._features_to_calibrate_by()
        start, method = self._model.start().method.classifier(), self._model.method
        strangers: dict[Use, StrangerModel] = {"start": fit_strangers(before.weak, None, start)}
        if method.has_classifier:
            strangers["adapted"] = fit_strangers(after.weak, None, method.classifier())
        self._become(replace(self._model, strangers=strangers))

    def _calibrate(self, labels: KnownLabels | None) -> None:
        before, after, rows = self._features_to_calibrate_by()
        known = None if labels is None else labels.of([self.paths_[row] for row in rows])
        found = calibrate(self._model, self.config_, before, after, images=len(self.paths_), known=known)
        values = {"temperatures": dict(found.temperatures), "start_temperature": found.start_temperature}
        self.calibration_ = found
        self._become(replace(self._model, inference=self._model.inference.model_copy(update=values)))

    def unlearned(self, *, backbone: Backbone | None = None, progress: Progress | None = None) -> Self:
        """Make the model ready to predict without any training, with the method as ``fit`` would initialise it.

        ``backbone`` is one that ``load_backbone`` returned. Raises PromptError, ConfigError or BackboneError.
        """
        texts, config = self.check()
        backbone = self.load_backbone(config, progress) if backbone is None else backbone
        self._begin(prepare(texts, config, (), backbone))
        self.method_.requires_grad_(False)
        return self

    def _begin(self, prepared: Prepared) -> Method:
        """Become a model that has learned nothing yet, and return its method."""
        config, backbone, texts = prepared.config, prepared.backbone, prepared.text_features
        scale, width = backbone.logit_scale, backbone.token_width
        if isinstance(self.method, Method):
            method = copy_method(self.method, config.method, texts, token_width=width)
        else:
            method = create_method(config.method, texts, logit_scale=scale, token_width=width)
        method = method.to(backbone.device)
        shares = given_shares(config, prepared.texts.classes)
        if shares is not None and isinstance(method, SelfTrainingMethod):
            method.expect(torch.tensor(shares))
        norms = own_norms(backbone)
        norms_learn = method.trains and config.training.encoder == "full" and config.training.learn != "anchors"
        settings = config.model_dump()
        self.config_, self.paths_ = config, prepared.paths
        self.set_aside_, self.history_ = [], []
        self.calibration_, self._sampled, self._review, self.explained_ = None, None, None, {}
        told = prepared.unknown_words
        self.cautions_ = [Caution("unknown_words", told)] if told else []
        self.labels_, self._seen = None, None
        self._become(
            FittedModel(
                inference=inference_settings(config),
                texts=prepared.texts,
                text_features=prepared.text_features,
                backbone=backbone,
                method=method,
                norms=norms,
                start_norms=norms if norms_learn else {},
                learned=what_learned(method, settings),
                training=settings,
            )
        )
        return method

    def _train(
        self,
        prepared: Prepared,
        method: Method,
        checkpoints: Path | None,
        on_epoch: Callable[[EpochRecord], None],
        progress: Progress,
    ) -> None:
        """Train the method and the model's normalisation parameters, which meanwhile are those of the backbone."""
        config, backbone = prepared.config, prepared.backbone
        decoded, self.set_aside_ = decode_training_set(
            prepared.paths, config.data, progress=progress, ranks=self._ranks
        )
        self.paths_ = decoded.paths
        known = self._take_labels(prepared.labels)
        if method.known_labels == "needed" and not _has_classes(known):
            raise ImageInputError(
                f"The method {config.method.name!r} learns from images with a class, and none of them could be read."
            )
        if isinstance(method, SelfTrainingMethod) and method.teaches_shares:
            taught = self._model.inference.model_copy(update={"images": len(decoded.paths)})
            self._become(replace(self._model, inference=taught))
        learner = Learner(
            backbone=backbone,
            method=method,
            views=Views(
                config.views, size=backbone.input_size, geometry=backbone.geometry, mean=backbone.mean, seed=config.seed
            ),
            config=config,
        )
        untrained = self._model
        if untrained.start_norms:  # so that ``on_epoch`` predicts with the parameters as they are then
            self._become(replace(untrained, norms=backbone.norm_parameters()))
        try:
            self.history_ = adapt(
                decoded,
                learner,
                known=known,
                progress=progress,
                checkpoints=checkpoints,
                on_epoch=on_epoch,
                on_stock=lambda stock: self._keep_stock(stock, progress),
                on_resume=self._recall_stock,
                on_seen=self._keep_seen,
                name_of=lambda image: display_path(self.paths_[image]),
                ranks=self._ranks,
            )
            self._become(replace(untrained, norms=own_norms(backbone)).with_own_score(config))
        finally:
            for parameter in backbone.norm_parameters().values() if untrained.start_norms else ():
                parameter.requires_grad_(False)
                parameter.grad = None
            backbone.load_norms(untrained.start_norms)  # the weights it was loaded with, for other models

    def _take_labels(self, labels: KnownLabels | None) -> Tensor | None:
        """Say in the model which images it learns from by label, and return what is known of each image to adapt to."""
        if labels is None:
            return None
        self.labels_ = told_labels(labels, self.paths_, self.texts_.classes)
        read = set(map(os.fspath, self.paths_)) & labels.digests.keys()
        self._become(replace(self._model, learned_from=tuple(sorted({labels.digests[path] for path in read}))))
        return labels.of(self.paths_)

    def _keep_seen(self, seen: Seen) -> None:
        self._seen = seen

    def _keep_stock(self, stock: Stock, progress: Progress) -> dict[str, Any]:
        """Keep what was decided by, and say what speaks against training on these images, before it begins.

        Returns what was kept, as JSON values for ``_recall_stock``.
        """
        self.explained_, texts = stock.explained, self.texts_
        found = cautions(
            stock.weak,
            stock.probabilities,
            shares=stock.shares,
            class_text=stock.class_text,
            classes=texts.classes,
            descriptions=texts.descriptions,
            groups=stock.groups,
            images=len(self.paths_),
        )
        if given_shares(self.config_, texts.classes) is not None:  # who gives the shares knows which are large or none
            found = [caution for caution in found if caution.kind not in ("absent", "dominant")]
        self.cautions_ += found
        for caution in found if self._ranks.first else ():
            progress.caution(caution.message)
        return {"explained": list(self.explained_.items()), "cautions": [asdict(caution) for caution in found]}

    def _recall_stock(self, kept: dict[str, Any]) -> None:
        """Take up what ``_keep_stock`` kept, in a run that continues. The user was told before."""
        self.explained_ = {float(share): float(value) for share, value in kept["explained"]}
        self.cautions_ += [Caution(**caution) for caution in kept["cautions"]]

    def sampled_features(
        self, images: Sequence[ImagePath], *, start: ImageFeatures | None = None
    ) -> tuple[ImageFeatures, ImageFeatures]:
        """Return the features, before and after adaptation, of ``calibration.sample`` of the images.

        Those that ``fit`` calibrated by are kept and not encoded again. ``start`` are the features before adaptation
        where they are known. Raises ImageInputError if none of the images can be read.
        """
        self._require_fitted()
        paths = sample(images, seed=self._model.inference.seed)
        if self._sampled is None or self._sampled[0] != paths:
            known = self._seen_of(images, SAMPLE)
            before = start or (known[0] if known else self.features(paths, at_start=True)[0])
            crops = self.score_ != "global"
            if known:
                after = known[1]
            elif self._model.encodes_as_start:
                after = before if crops else replace(before, crops=before.crops[:, :0])
            else:
                after = self.features(paths, crops=crops)[0]
            self._sampled = paths, before, after
        return self._sampled[1:]

    def _features_to_calibrate_by(self) -> tuple[ImageFeatures, ImageFeatures, list[int]]:
        """The features before and after adaptation of a sample of the images adapted to, and which images they are of.

        The sample is larger where no image has to be encoded for it.
        """
        usual = self.sampled_features(self.paths_)  # kept, for the verdict asks for them again
        known = self._seen_of(self.paths_, ENCODED)
        before, after = known or usual
        most = ENCODED if known else SAMPLE
        return before, after, sampled(len(self.paths_), seed=self._model.inference.seed, most=most)

    def _seen_of(self, images: Sequence[ImagePath], most: int) -> tuple[ImageFeatures, ImageFeatures] | None:
        """The features of a sample of at most so many of these images, where ``fit`` has encoded them anyway."""
        if self._seen is None or images is not self.paths_:
            return None
        rows = torch.tensor(sampled(len(images), seed=self._model.inference.seed, most=most))
        device = self._model.backbone.device
        start, final = (
            ImageFeatures(weak=part.weak[rows].to(device), crops=part.crops[rows].to(device))
            for part in (self._seen.start, self._seen.final)
        )
        return start, final if self.score_ != "global" else replace(final, crops=final.crops[:, :0])

    def predictions_of_adapted(self) -> Iterator[Prediction | SetAside]:
        """Yield the prediction of each image adapted to, with those of the start, or why there is none.

        Where ``fit`` was given a folder for checkpoints and has encoded these images by the model as it is in the end,
        they are not encoded again.
        """
        self._require_fitted()
        yield from list(self.set_aside_)
        if self._seen is None:
            yield from self._predictor.predictions(self.paths_, with_start=True)
            return
        yield from self._predictor.predictions_of(
            self.paths_, features=self._seen.final, start=self._seen.start, blanks=self._seen.blanks
        )

    # --- predicting ---------------------------------------------------------------------------------------------------

    def predict(
        self,
        images: Images,
        *,
        score: Score | None = None,
        reject: Reject | None = None,
        min_confidence: float | None = None,
    ) -> NDArray[np.object_]:
        """Predict the class name of each image, in the order given or that of ``find_images``: (n,) str.

        ``images`` are as for ``fit``. An image that cannot be read gets None, a warning, and an entry in
        ``set_aside_``. ``score`` is global, las or fused; None is the model's own.

        With ``reject`` the label is "none of these" where an image likelier shows none of the classes than one
        ("auto"), or for about that share of images like those adapted to, as 0.05, whose ``Prediction.none`` is
        highest. Of the others, the label is "unsure" where no class is as probable as ``min_confidence``.

        Raises ImageInputError if there is no image, and ConfigError for a score that the method does not have, another
        ``reject`` or ``min_confidence``, and with ``reject`` also for a model that cannot tell such images.
        """
        self._require_fitted()
        refused_from = cutoff(self._model, reject)
        unsure_below = least_confidence(self._model, min_confidence)
        probabilities, none = self._predicted(images, score)
        names = np.array([*self.classes_, NONE_OF_THESE, None, UNSURE], dtype=object)
        chosen = np.nan_to_num(probabilities).argmax(1)
        if unsure_below is not None:
            chosen[probabilities.max(1).astype(float).round(DIGITS) < unsure_below] = len(self.classes_) + 2
        if refused_from is not None:
            chosen[none >= refused_from] = len(self.classes_)
        chosen[np.isnan(probabilities[:, 0])] = len(self.classes_) + 1
        labels: NDArray[np.object_] = names[chosen]
        return labels

    def predict_proba(self, images: Images, *, score: Score | None = None) -> NDArray[np.float32]:
        """Predict the probability of each class: (n, C) float32, columns in the order of ``classes_``.

        ``images`` are as for ``fit``. The row of an image that cannot be read is NaN, with a warning and an entry in
        ``set_aside_``. ``score`` is as for ``predict``. Raises ImageInputError if there is no image, and ConfigError
        for a score that the method does not have.
        """
        self._require_fitted()
        return self._predicted(images, score)[0]

    def _predicted(self, images: Images, score: Score | None) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """The probabilities (n, C), and how likely each image shows none of the classes (n,); NaN if unknown."""
        paths = find_images(images)
        if left_out := left_out_of(paths):
            warnings.warn(left_out, CautionWarning, stacklevel=3)
        rows = np.full((len(paths), len(self.classes_)), np.nan, dtype=np.float32)
        none = np.full(len(paths), np.nan)
        set_aside, blank = [], []
        for index, outcome in enumerate(self.iter_predictions(paths, score=score)):
            if isinstance(outcome, SetAside):
                set_aside.append(outcome)
                continue
            rows[index] = outcome.probabilities
            if outcome.blank:
                blank.append(display_path(outcome.path))
            if outcome.none is not None:
                none[index] = outcome.none
        self.set_aside_ = set_aside
        if blank:
            warnings.warn(tell_blank(len(blank), blank[0]), CautionWarning, stacklevel=3)
        if set_aside:
            first = set_aside[0]
            warnings.warn(
                f"{len(set_aside)} of {len(paths)} images could not be read and have no prediction; "
                f"the first: {first.path} ({first.reason}). All are in set_aside_.",
                stacklevel=3,  # the caller of ``predict`` or ``predict_proba``
            )
        return rows, none

    def iter_predictions(
        self, images: Images, *, score: Score | None = None, with_start: bool = False
    ) -> Iterator[Prediction | SetAside]:
        """Yield the prediction of each image, or why there is none, in order. Memory does not grow with their number.

        ``images`` are as for ``predict``; those of a generator are read as it makes them. ``with_start`` also scores
        each image with the model before adaptation, which scores the whole image by the mean of each class's
        descriptions. Raises ConfigError for a score that the method does not have.
        """
        self._require_fitted()
        paths = stream(images) if isinstance(images, Iterator) else find_images(images)
        return self._predictor.predictions(paths, score=score, with_start=with_start)

    def review_batch(self, images: Images, n: int = 60, *, aim: Aim = "both", seed: int = 0) -> list[Path]:
        """Choose ``n`` of the images to label by eye, so that these labels say much: see ``accuracy``.

        The images are those to measure on, in the order in which they should be labelled. ``aim`` is what is to be
        measured: the accuracies ("accuracy"), their difference ("difference") or "both"; "random" draws every image
        alike. Which are chosen depends on the models, the images and ``seed`` alone.

        An image in memory is called as in predictions, such as ``image 3``, and labelled by that name. Raises
        ImageInputError if no image can be read, and ConfigError for an ``n`` below 1 or
        another ``aim``.
        """
        self._require_fitted()
        predictor = Predictor(self._model.using("adapted"), self.ranks)
        self.set_aside_ = []
        outcomes = predictor.predictions(find_images(images), score=None, with_start=True)
        seen = look_at(readable(outcomes, self.set_aside_), classes=len(self.texts_.classes))
        self._review = make_plan(seen, self.texts_.classes, aim=aim, budget=n, seed=seed)
        return [Path(item.path) for item in self._review.measuring[:n]]

    def accuracy(self, labels: Mapping[str, str] | str | Path) -> Measured:
        """What labels of the images of the last ``review_batch`` say: accuracy of both models and the difference.

        ``labels`` are class names by path, or a CSV with the columns path and label; "none of these" counts as a
        mistake of both models, and images with "cannot tell" are left out. The figures are of all images that
        ``review_batch`` was given, with 95 % intervals that stay valid whenever one stops to label. Labels count in
        the order of the batch: where more than three images of it have none, those behind them do not count.

        Raises FinealignError if there was no ``review_batch``, and ImageInputError for a label that is no class, or
        where no image of the batch is labelled.
        """
        self._require_fitted()
        if self._review is None:
            raise FinealignError("No images were chosen to measure by. Call review_batch(images, n), and label those.")
        found = read_labels(labels, self.texts_.classes)
        if not any(item.path in found for item in self._review.measuring):
            raise ImageInputError(
                f"None of the {len(found)} labelled images is one of the batch, whose first is "
                f"'{self._review.measuring[0].path}'. Label those that review_batch returned."
            )
        return measure(self._review, found)

    def features(
        self, images: Images, *, at_start: bool = False, crops: bool = True
    ) -> tuple[ImageFeatures, list[SetAside]]:
        """Return the embeddings that images are scored by, and the images that cannot be read, which have no row.

        ``images`` are as for ``predict``. Weak features are (n, D), crop features (n, N, D), with N = 0 if ``crops`` is
        false. ``at_start`` encodes them with the model before adaptation. Raises ImageInputError if none of the images
        can be read.
        """
        self._require_fitted()
        return self._predictor.features(find_images(images), at_start=at_start, crops=crops)

    def explain(self, image: Images, *, score: Score | None = None) -> Explanation:
        """Explain the prediction of one image: its crops, their weights, and the class scores and probabilities.

        The crops and, up to rounding, the scores are those with which this image is predicted by the same ``score``;
        None is the model's own. ``image`` is its path, or the image in memory, as for ``predict``. Raises ConfigError
        for a score that the method does not have and for ``global``, which uses no crops, and ImageInputError for
        several images or one that cannot be read.
        """
        self._require_fitted()
        if self._predictor.choose_score(score) == "global":
            raise ConfigError(
                "The score 'global' looks at the image as a whole, so there are no crops to explain it by. "
                "Wanted: a score that looks at crops, as score='las'."
            )
        paths = [Path(image)] if isinstance(image, str | Path) else find_images(image)
        if len(paths) != 1:
            raise ImageInputError(f"Found {len(paths)} images to explain, wanted one. Explain them one by one.")
        return self._predictor.explain_file(paths[0], score=score)

    def explain_pixels(
        self, images: Sequence[Pixels], *, score: Score | None = None, with_start: bool = False
    ) -> list[Explanation]:
        """Do what ``explain`` does, for decoded images, (H, W, 3) uint8 RGB each, which are encoded together.

        The score ``global`` is accepted, and gives no crops. ``with_start`` also scores each image with the model
        before adaptation. Raises ConfigError for a score that the method does not have.
        """
        predictor = self.predictor_
        photos = [predictor.to_photo(Image.fromarray(pixels)) for pixels in images]
        return predictor.explain(photos, score=score, with_start=with_start)

    # --- the fitted model ---------------------------------------------------------------------------------------------

    def use(self, model: Use) -> Self:
        """Take the adapted model, "adapted", or the model before adaptation, "start". The other one is kept.

        The start scores the whole image by the mean of each class's descriptions. Raises ConfigError for another name.
        """
        self._require_fitted()
        self._sampled = None
        self._become(self._model.using(model))
        return self

    def revert(self) -> Self:
        """Take the model before adaptation, as ``use("start")`` does."""
        return self.use("start")

    def save(self, folder: str | Path, *, run: Mapping[str, Any] | None = None) -> None:
        """Write both models: an open_clip local directory, the method's tensors and the texts, and a model card.

        The open_clip directory has the weights of the model in use, which is also the one that ``load`` takes.
        ``run`` is the content of ``run.json``, for the card. A README.md in the folder that is not such a card is not
        replaced. Raises OutputError.
        """
        self._require_fitted()
        write_model(self._model, Path(folder))
        card = Path(folder) / "README.md"
        if not card.exists() or is_card(card):
            save_text(model_card(self._model, run), card)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        use: Use | None = None,
        class_prior: ClassPrior | None = None,
        device: str = "auto",
        precision: WantedPrecision = "auto",
        ranks: Ranks | None = None,
        backbone: Backbone | None = None,
    ) -> Self:
        """Load a fitted model from a run folder or its ``model/``.

        ``use`` takes the adapted model or the start; None is the one that was in use when it was saved. Release 0.1
        saved one model alone, which "adapted" takes. ``class_prior`` is how the images to classify are distributed:
        "folder" as those adapted to, "even" with each class as likely as another, so that no class has a lead from its
        share there; None is what the model was saved with. ``backbone`` is the one that the model was adapted from,
        with the same weights, if it is not open_clip's: those are in the folder. Raises ModelError, BackboneError or
        ConfigError.
        """
        if use is not None:
            check_use(use)
        if class_prior is not None:
            check_class_prior(class_prior)
        on_device = choose_device(device)
        asked = choose_precision(precision, on_device)
        model = read_model(Path(folder), device=on_device, precision=asked, backbone=backbone)
        if class_prior is not None:
            model = model.with_prior(class_prior)
        loaded = cls(
            model.texts.classes,
            descriptions=dict(zip(model.texts.classes, model.texts.descriptions, strict=True)),
            templates=model.texts.templates,
            backbone=model.inference.backbone if backbone is None else backbone,
            method=model.using("adapted").name,
            seed=model.inference.seed,
            device=device,
            precision=precision,
            ranks=ranks,
        )
        loaded.set_aside_ = []
        loaded._become(model.using(use or model.use))
        return loaded

    @property
    def predictor_(self) -> Predictor:
        """The predictor, which decodes, renders, encodes and scores images for the fitted model."""
        self._require_fitted()
        return self._predictor

    @property
    def use_(self) -> Use:
        """Which of the two models is in use: "adapted", or "start" for the model before adaptation."""
        self._require_fitted()
        return self._model.use

    @property
    def class_prior_(self) -> ClassPrior | None:
        """How images to classify are taken to be distributed: "folder", as those adapted to, or "even".

        None for the start and for methods that expect no shares of classes, where there is nothing to choose.
        """
        self._require_fitted()
        return self._model.class_prior

    @property
    def score_(self) -> Score:
        """The score used when no other is asked for: global, las or fused."""
        self._require_fitted()
        return self._model.inference.score

    @property
    def classes_(self) -> NDArray[np.object_]:
        """The class names, in the order of the columns of ``predict_proba``: (C,)."""
        return np.array(self.texts_.classes, dtype=object)

    @property
    def texts_(self) -> Texts:
        """The class names with all their descriptions and templates."""
        self._require_fitted()
        return self._model.texts

    @property
    def text_features_(self) -> TextFeatures:
        """The embeddings of the texts."""
        self._require_fitted()
        return self._model.text_features

    @property
    def backbone_(self) -> Backbone:
        """The backbone, with the weights it was loaded with."""
        self._require_fitted()
        return self._model.backbone

    @property
    def method_(self) -> Method:
        """The method, with what it has learned; the start's own where the start is in use."""
        self._require_fitted()
        return self._model.method

    @property
    def norms_(self) -> Mapping[str, Tensor]:
        """The model's own normalisation parameters by name; empty for a tower without any."""
        self._require_fitted()
        return self._model.norms

    @property
    def start_method_(self) -> Method:
        """The method of the model before adaptation."""
        self._require_fitted()
        return self._predictor.start.method

    @property
    def start_norms_(self) -> Mapping[str, Tensor]:
        """The normalisation parameters before adaptation; empty if they did not learn."""
        self._require_fitted()
        return self._model.using("adapted").start_norms

    @property
    def model_(self) -> FittedModel:
        """The model in use as one record, which leads to the other one."""
        self._require_fitted()
        return self._model

    def _become(self, model: FittedModel) -> None:
        self._predictor = Predictor(model, self.ranks)

    @property
    def _model(self) -> FittedModel:
        return self._predictor.model

    @property
    def _ranks(self) -> Ranks:
        return self.ranks or Ranks()

    def _require_fitted(self) -> None:
        if not hasattr(self, "_predictor"):
            raise not_fitted("This FineAlign is not fitted. Call fit(images) first, or FineAlign.load(folder).")


def _has_classes(known: Tensor | None) -> bool:
    """Whether the class of an image is known."""
    return known is not None and bool((known >= 0).any())
