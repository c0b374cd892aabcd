"""The public noun: ``FineAlign`` with ``fit``, ``predict``, ``predict_proba``, ``save`` and ``load``."""

import hashlib
import json
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from platformdirs import user_cache_dir
from torch import Tensor

from finealign.backbone import Backbone, load_backbone
from finealign.config import DEFAULT_BACKBONE, Config, MethodSettings, make_config, resolve
from finealign.devices import WantedPrecision, choose_device, choose_precision
from finealign.errors import ConfigError, FinealignError, ImageInputError, StoppedError
from finealign.images import ImageReadError, Pixels, display_path, in_order, list_images, read_image
from finealign.methods import Method, create_method, find_method, method_options, method_settings
from finealign.model_card import is_card, model_card
from finealign.model_folder import SavedModel, read_model, write_model
from finealign.pixels import store_pixels
from finealign.progress import Progress
from finealign.prompts import make_texts
from finealign.ranks import Ranks
from finealign.storage import save_text
from finealign.training import EpochRecord, adapt, method_gaze
from finealign.types import Explanation, ImageFeatures, Prediction, Score, SetAside, TextFeatures, Texts
from finealign.views import PREDICTION_EPOCH, Views

Images = str | Path | Sequence[str | Path]  # a folder, a list file, a CSV, one image, or paths

Item = TypeVar("Item")
Rendered = tuple[Tensor, Tensor]  # uint8: the weak view (3, S, S) and the crops (N, 3, S, S)
Outcome = tuple[Path, str | None]  # why an image cannot be read; None if it can

PREDICTION_CHUNK = 32  # images decoded and encoded together


class FineAlign:
    """A CLIP-like classifier that adapts itself to unlabelled images of the named classes.

        model = FineAlign(classes=["robin", "wren"], descriptions={...}).fit("photos/")
        labels = model.predict("more-photos/")

    The constructor only keeps its arguments; ``fit`` checks them. Learned attributes end in ``_``: ``classes_``,
    ``backbone_``, ``method_``, ``start_method_`` (that adaptation starts from), ``config_`` (resolved), ``texts_``,
    ``history_`` (one record an epoch) and ``set_aside_`` (images that could not be read, and why).
    """

    set_aside_: list[SetAside]
    history_: list[EpochRecord]
    start_norms_: dict[str, Tensor]

    def __init__(
        self,
        classes: Sequence[str],
        *,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        templates: Sequence[str] | None = None,
        backbone: str = DEFAULT_BACKBONE,
        method: str = "fair",
        seed: int = 0,
        device: str = "auto",
        precision: WantedPrecision = "auto",
        config: Config | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """``config``, where given, decides everything but the texts; the other settings are then not looked at.

        ``ranks`` are the processes that share the encoding, as ``Ranks.launched()`` gives them, all of which call the
        same methods in the same order and get the same results. Without it a process does everything by itself.
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

    def fit(
        self,
        images: Images,
        *,
        backbone: Backbone | None = None,
        checkpoints: Path | None = None,
        on_epoch: Callable[[EpochRecord], None] = lambda record: None,
        progress: Progress | None = None,
    ) -> Self:
        """Adapt to unlabelled images: a folder (its structure means nothing), a list file, a CSV, or paths.

        ``backbone`` is one that ``load_backbone`` gave, to save loading it twice; it is adapted in place. With
        ``checkpoints`` each epoch leaves one in that folder, and the last one there is continued from. ``on_epoch``
        is called after each epoch and may predict with the model as it is then; that changes nothing of the run.
        Raises FinealignError: PromptError, ConfigError, ImageInputError or BackboneError, by what is wrong.
        """
        progress = progress or Progress()
        texts, config = self.check()
        paths = list_images(images)
        # Before training, so that ``on_epoch`` can predict: what learns is shared with ``adapt``, not copied.
        config, backbone, method = self._begin(texts, config, len(paths), backbone, progress)
        if method.trains or method.surveys:
            try:
                self.history_ = adapt(
                    self._decode(paths, config, progress),
                    backbone=backbone,
                    method=method,
                    views=self._views,
                    config=config,
                    progress=progress,
                    checkpoints=checkpoints,
                    on_epoch=on_epoch,
                    name_of=lambda image: display_path(self.paths_[image]),
                    ranks=self._ranks,
                )
            except BaseException:
                del self._saved  # half trained is not fitted
                raise
        method.requires_grad_(False)
        return self

    def unlearned(self, *, backbone: Backbone | None = None, progress: Progress | None = None) -> Self:
        """Ready to predict with nothing learned: the scores of the method that ``fit`` would start from.

        Raises PromptError, ConfigError or BackboneError.
        """
        texts, config = self.check()
        _, _, method = self._begin(texts, config, 1, backbone, progress or Progress())
        method.requires_grad_(False)
        return self

    def _begin(
        self, texts: Texts, config: Config, images: int, backbone: Backbone | None, progress: Progress
    ) -> tuple[Config, Backbone, Method]:
        """Become the model that nothing has been learned by: its resolved configuration, backbone and method."""
        backbone = backbone or self.load_backbone(config, progress)
        config = resolve(config, images=images, classes=len(texts.classes), input_size=backbone.input_size)
        features = backbone.encode_texts(texts)
        method = create_method(
            config.method, features, logit_scale=backbone.logit_scale, token_width=backbone.token_width
        ).to(backbone.device)
        self.set_aside_, self.history_, self.start_norms_ = [], [], {}
        if method.trains and config.training.encoder == "full" and config.training.learn != "anchors":
            norms = backbone.norm_parameters()
            self.start_norms_ = {name: value.detach().clone() for name, value in norms.items()}
        self._become(SavedModel(config, texts, features, backbone, method, self.start_norms_))
        return config, backbone, method

    def check(self) -> tuple[Texts, Config]:
        """The checked texts and configuration, without loading anything. Raises PromptError or ConfigError."""
        config = self.config or make_config(
            {
                "backbone": self.backbone,
                **method_settings(self.method),
                "seed": self.seed,
                "device": self.device,
                "precision": self.precision,
            }
        )
        # With the method's defaults written out, the record of a run outlives a change of them.
        options = method_options(config.method).model_dump()
        config = config.model_copy(update={"method": MethodSettings(name=config.method.name, **options)})
        _choose_score(find_method(config.method.name), config.prediction.score, None)
        return make_texts(self.classes, self.descriptions, self.templates), config

    def predict(self, images: Images, *, score: Score | None = None) -> NDArray[np.object_]:
        """The class name of each image, in the order of ``list_images``: (n,) str.

        An image that cannot be read gets None, a warning, and a line in ``set_aside_``. ``score`` is global, las or
        fused; the model's own choice if None.
        """
        self._require_fitted()
        probabilities = self.predict_proba(images, score=score)
        names = np.array([*self.classes_, None], dtype=object)
        unread = np.isnan(probabilities[:, 0])
        return names[np.where(unread, len(self.classes_), np.nan_to_num(probabilities).argmax(1))]

    def predict_proba(self, images: Images, *, score: Score | None = None) -> NDArray[np.float32]:
        """The probability of each class, columns as in ``classes_``: (n, C); NaN for an image that cannot be read."""
        self._require_fitted()
        paths = list_images(images)
        rows = np.full((len(paths), len(self.classes_)), np.nan, dtype=np.float32)
        self.set_aside_ = []
        for row, found in zip(rows, self.iter_predictions(paths, score=score), strict=True):
            if isinstance(found, SetAside):
                self.set_aside_.append(found)
            else:
                row[:] = found.probabilities
        if self.set_aside_:
            first = self.set_aside_[0]
            warnings.warn(
                f"{len(self.set_aside_)} of {len(paths)} images could not be read and have no prediction; "
                f"the first: {first.path} ({first.reason}). All are in set_aside_.",
                stacklevel=2,
            )
        return rows

    def iter_predictions(
        self, paths: Iterable[Path], *, score: Score | None = None, with_start: bool = False
    ) -> Iterator[Prediction | SetAside]:
        """The prediction of each image, or why there is none, in order; memory does not grow with their number.

        ``with_start`` also scores each image by the model adaptation started from: the same texts, their mean a
        class, the whole image. Raises ConfigError for a score the method does not have.
        """
        self._require_fitted()
        kind = _choose_score(type(self.method_), self.config_.prediction.score, score)
        looks = [_Look(crops=kind != "global")]
        if with_start and (self._saved.start_norms or method_gaze(self.method_)):
            looks.append(_Look(crops=False, at_start=True))
        with closing(self._encoded(paths, looks)) as encoded:
            for outcomes, features in encoded:
                read = [path for path, reason in outcomes if reason is None]
                scored = self._score(read, features[0], kind, at_start=features[-1] if with_start else None)
                for path, reason in outcomes:
                    yield next(scored) if reason is None else SetAside(display_path(path), reason)

    def readable_predictions(
        self,
        paths: Iterable[Path],
        *,
        score: Score | None = None,
        with_start: bool = False,
        advance: Callable[[int], None] = lambda images: None,
    ) -> Iterator[Prediction]:
        """As ``iter_predictions`` for the images that can be read; the others are gathered in ``set_aside_``."""
        self.set_aside_ = []
        for found in self.iter_predictions(paths, score=score, with_start=with_start):
            advance(1)
            if isinstance(found, SetAside):
                self.set_aside_.append(found)
            else:
                yield found

    @torch.inference_mode()
    def features(self, paths: Iterable[Path], *, at_start: bool = False, crops: bool = True) -> ImageFeatures:
        """The embeddings the model scores images by: whole (n, D) and crops (n, N, D), N = 0 unless wanted.

        Images that cannot be read are gathered in ``set_aside_`` and have no row. ``at_start``: as the backbone was
        before it learned.
        """
        self._require_fitted()
        self.set_aside_ = []
        parts = []
        with closing(self._encoded(paths, [_Look(crops=crops, at_start=at_start)])) as encoded:
            for outcomes, (found,) in encoded:
                self.set_aside_ += [SetAside(display_path(path), why) for path, why in outcomes if why is not None]
                parts.append(found)
        if not any(len(one.weak) for one in parts):
            raise ImageInputError("None of the images can be read. The reason for each is in set_aside_.")
        return ImageFeatures(torch.cat([one.weak for one in parts]), torch.cat([one.crops for one in parts]))

    def explain(self, path: str | Path, *, score: Score | None = None) -> Explanation:
        """The crops the model looks at in one image and how much each counts, with its scores and probabilities.

        They are the crops and, up to rounding, the scores that predicting this image by the same ``score`` (the
        model's own choice if None) goes by. Raises ConfigError for a score the method does not have and for
        ``global``, which looks at no crops, and ImageInputError for an image that cannot be read.
        """
        self._require_fitted()
        kind = _choose_score(type(self.method_), self.config_.prediction.score, score)
        if kind == "global":
            raise ConfigError(
                "The score 'global' looks at the image as a whole, so there are no crops to explain it by. "
                "Wanted: a score that looks at crops, as score='las'."
            )
        path = Path(path)
        try:
            pixels = np.array(read_image(path, max_pixels=self.config_.data.max_pixels))
        except ImageReadError as error:
            raise ImageInputError(
                f"Cannot explain '{display_path(path)}': {error}. Give the path of one image that can be read."
            ) from error
        return self.explain_pixels([pixels], score=kind)[0]

    def explain_pixels(
        self, images: Sequence[Pixels], *, score: Score | None = None, with_start: bool = False
    ) -> list[Explanation]:
        """As ``explain`` for images that are decoded already, (H, W, 3) uint8 each, encoded together.

        By ``global`` there are no crops to tell of. ``with_start`` also scores each by the model adaptation started
        from. Raises ConfigError for a score the method does not have.
        """
        self._require_fitted()
        kind = _choose_score(type(self.method_), self.config_.prediction.score, score)
        look = _Look(crops=kind != "global")
        seen = [self._render(pixels, crops=look.crops) for pixels in images]
        if not seen:
            return []
        with torch.inference_mode():
            features = self._embed(seen, look)
            weights = self.method_.crop_weights(features) if look.crops else features.weak.new_empty(len(seen), 0)
            pairs = [self._with_probabilities(self.method_, features, kind)]
            if with_start:
                before = self._embed(seen, _Look(crops=False, at_start=True))
                pairs.append(self._with_probabilities(self.start_method_, before, "global"))
        found = []
        for index, pixels in enumerate(images):
            height, width = pixels.shape[:2]
            boxes = self._views.crop_boxes(height, width, epoch=PREDICTION_EPOCH, image=0) if look.crops else []
            weight = weights[index].cpu().numpy()
            scored = (rows[index] for pair in pairs for rows in pair)
            found.append(Explanation(width, height, kind, tuple(boxes), weight, *scored))
        return found

    @property
    def score_(self) -> Score:
        """What the model scores by when nothing else is asked for."""
        self._require_fitted()
        return _choose_score(type(self.method_), self.config_.prediction.score, None)

    def revert(self) -> Self:
        """Become the model adaptation started from: the same texts, their mean a class, by the whole image."""
        self._require_fitted()
        if self.start_norms_:
            self.backbone_.load_norms(self.start_norms_)
        self.start_norms_ = {}
        method = MethodSettings(name="cupl", logit_scale=self.method_.logit_scale)
        prediction = self.config_.prediction.model_copy(update={"score": "global"})
        config = self.config_.model_copy(update={"method": method, "prediction": prediction})
        self._become(SavedModel(config, self.texts_, self.text_features_, self.backbone_, self.start_method_, {}))
        return self

    def save(self, folder: str | Path, *, run: Mapping[str, Any] | None = None) -> None:
        """Write the fitted model: an open_clip local directory with the anchors and texts beside it, and a model card.

        ``run`` is what ``run.json`` says of how the model was made, for the card; another README.md stays.
        """
        self._require_fitted()
        write_model(self._saved, Path(folder))
        card = Path(folder) / "README.md"
        if not card.exists() or is_card(card):
            save_text(model_card(self._saved, run), card)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        precision: WantedPrecision = "auto",
        ranks: Ranks | None = None,
    ) -> Self:
        """A fitted model from a run folder or its ``model/``. Raises ModelError."""
        chosen = choose_device(device)
        saved = read_model(Path(folder), device=chosen, precision=choose_precision(precision, chosen))
        model = cls(
            saved.texts.classes,
            descriptions=dict(zip(saved.texts.classes, saved.texts.descriptions, strict=True)),
            templates=saved.texts.templates,
            config=saved.config,
            ranks=ranks,
        )
        model.set_aside_, model.history_, model.start_norms_ = [], [], saved.start_norms
        model._become(saved)
        return model

    def _become(self, saved: SavedModel) -> None:
        self._saved = saved
        self.config_, self.texts_ = saved.config, saved.texts
        self.backbone_: Backbone = saved.backbone
        self.method_: Method = saved.method
        self.text_features_: TextFeatures = saved.text_features
        self.classes_ = np.array(saved.texts.classes, dtype=object)
        self._views = _views(saved.config, saved.backbone)
        # The start is the same texts before anything was learned: their mean a class, by the global score.
        start = create_method(MethodSettings(name="cupl"), saved.text_features, logit_scale=saved.method.logit_scale)
        self.start_method_ = start.to(saved.backbone.device)

    @property
    def _ranks(self) -> Ranks:
        return self.ranks or Ranks()

    def _require_fitted(self) -> None:
        if not hasattr(self, "_saved"):
            raise FinealignError("This FineAlign is not fitted. Call fit(images) first, or FineAlign.load(folder).")

    def load_backbone(self, config: Config, progress: Progress | None = None) -> Backbone:
        """The configured backbone on the configured device. Raises BackboneError or ConfigError."""
        device = choose_device(config.device)
        with (progress or Progress()).stage("loading the backbone", None):
            return load_backbone(
                config.backbone, device=device, precision=choose_precision(config.precision, device), seed=config.seed
            )

    def _decode(self, paths: Sequence[Path], config: Config, progress: Progress) -> Sequence[Pixels]:
        data = config.data
        if data.working_size == "auto":
            raise ValueError("the configuration is not resolved")
        folder = None if data.cache == "temporary" else Path(data.cache).expanduser()
        if data.cache == "auto":
            folder = Path(user_cache_dir("finealign", appauthor=False)) / "pixels"
        with progress.stage("reading images", len(paths)) as stage:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                stage.advance(count - done)
                done = count
                progress.stop_if_asked()

            failed: FinealignError | None = None
            with self._ranks.first_of_each_machine():  # which all have to leave, whatever befalls one
                try:
                    stored, self.set_aside_ = store_pixels(
                        paths,
                        shorter_side=data.working_size,
                        max_pixels=data.max_pixels,
                        folder=folder,
                        max_bytes=int(data.cache_gb * 1e9),
                        on_progress=advance,
                    )
                except FinealignError as error:
                    failed = error
        if self._ranks.any(failed is not None):
            raise failed or StoppedError("Stopped, as another process of the run was.")
        self.paths_ = stored.paths
        self._ranks.refuse_different("the images that can be read", [len(stored.paths), _digest(stored.paths)])
        return stored

    @torch.inference_mode()
    def _score(
        self, read: Sequence[Path], features: ImageFeatures, kind: Score, *, at_start: ImageFeatures | None
    ) -> Iterator[Prediction]:
        scored = [self._with_probabilities(self.method_, features, kind)]
        if at_start is not None:
            scored.append(self._with_probabilities(self.start_method_, at_start, "global"))
        for index, path in enumerate(read):
            yield Prediction(path, *(rows[index] for pair in scored for rows in pair))

    def _norms_at_start(self) -> AbstractContextManager[None]:
        norms = self._saved.start_norms
        return self.backbone_.with_norms(norms) if norms else nullcontext()

    def _encoded(
        self, paths: Iterable[Path], looks: Sequence["_Look"]
    ) -> Generator[tuple[list[Outcome], list[ImageFeatures]], None, None]:
        """Some images at a time, in order: each path with why it cannot be read, and what each look makes of the rest.

        Each rank reads and encodes every ``count``-th chunk; all get all. Decoded and cut by threads, a chunk ahead.
        """
        ranks, kind = self._ranks, "las" if any(look.crops for look in looks) else "global"

        def see(path: Path) -> Rendered:
            return self._render(
                np.array(read_image(path, max_pixels=self.config_.data.max_pixels)), crops=kind == "las"
            )

        everyones, own = tee(paths)
        mine = (path for place, path in enumerate(own) if place // PREDICTION_CHUNK % ranks.count == ranks.index)
        with closing(in_order(see, mine, held=2 * PREDICTION_CHUNK)) as seen:
            chunks = _chunks(seen, PREDICTION_CHUNK)
            for together in _chunks(everyones, PREDICTION_CHUNK * ranks.count):
                chunk = [found for _, found in next(chunks, [])]  # none where other ranks take the last ones
                reasons = [found.reason if isinstance(found, SetAside) else None for found in chunk]
                of_ranks = [json.loads(text) for text in ranks.texts(json.dumps(reasons))]
                sizes = [one.count(None) for one in of_ranks]
                read = [found for found in chunk if not isinstance(found, SetAside)]
                parts = [self._embed(read, look) for look in looks]
                features = [
                    ImageFeatures(weak=ranks.gather(part.weak, sizes), crops=ranks.gather(part.crops, sizes))
                    for part in parts
                ]
                yield list(zip(together, chain.from_iterable(of_ranks), strict=True)), features

    def _render(self, pixels: Pixels, *, crops: bool) -> Rendered:
        weak = self._views.weak(pixels)
        if not crops:
            return weak, weak.new_empty(0, *weak.shape)
        # Every image gets the same draws, so its scores do not depend on its neighbours or its place in a list.
        return weak, self._views.crops(pixels, epoch=PREDICTION_EPOCH, image=0)

    @staticmethod
    def _with_probabilities(
        method: Method, features: ImageFeatures, kind: Score
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        scores = method.score(features, kind)
        return scores.cpu().numpy(), method.probabilities(scores).cpu().numpy()

    @torch.inference_mode()
    def _embed(self, seen: Sequence[Rendered], look: "_Look") -> ImageFeatures:
        """The features of rendered images, of their crops where ``look`` asks for those."""
        count = self.config_.views.crops if look.crops else 0
        if not seen:
            none = self.text_features_.names[:0]
            return ImageFeatures(weak=none, crops=none[:, None].expand(0, count, -1))
        gaze = None if look.at_start else method_gaze(self.method_)
        with self._norms_at_start() if look.at_start else nullcontext():
            whole = self.backbone_.embed(torch.stack([weak for weak, _ in seen]), gaze)
            crops = torch.cat([parts for _, parts in seen]) if look.crops else whole[:0]
            parts = self.backbone_.embed(crops) if look.crops else crops
        return ImageFeatures(weak=whole, crops=parts.reshape(len(seen), count, whole.shape[1]))


@dataclass(frozen=True)
class _Look:
    """One way to encode images: with their crops or without, by the backbone as it is or as it was at the start."""

    crops: bool
    at_start: bool = False


def _views(config: Config, backbone: Backbone) -> Views:
    return Views(
        config.views, size=backbone.input_size, geometry=backbone.geometry, mean=backbone.mean, seed=config.seed
    )


def _choose_score(method: type[Method], configured: Score | str, asked: Score | None) -> Score:
    kind = asked or (method.scores[0] if configured == "auto" else configured)
    for valid in method.scores:
        if kind == valid:
            return valid
    name = method.__module__.rpartition(".")[2].replace("_", "-")
    raise ConfigError(f"The method {name!r} has no score {kind!r}. Valid: {', '.join(method.scores)}.")


def _digest(paths: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(display_path(path).encode() + b"\n")
    return found.hexdigest()


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
