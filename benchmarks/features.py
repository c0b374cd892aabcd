"""Sets encoded once, and methods trained on them: what the benchmarks with a frozen encoder share."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finealign.backbone.base import Backbone
from finealign.classifier import FineAlign
from finealign.config import Config, make_config, resolve
from finealign.demo.model import demo_model
from finealign.demo.world import make_world
from finealign.evaluate.truth import read_truth
from finealign.images.decoding import read_pixels
from finealign.images.listing import list_images
from finealign.images.views import PREDICTION_EPOCH, Views
from finealign.method.base import Method, SelfTrainingMethod
from finealign.method.registry import create_method
from finealign.runtime.progress import Progress
from finealign.texts.prompts import make_texts, read_classes, read_descriptions
from finealign.training.loop import run_epochs
from finealign.training.state import begin
from finealign.types import ImageFeatures, TextFeatures, Texts

CROPS, STRONG = 16, 4  # encoded per image; a run with N crops takes the first N, which are the ones it would draw
CHUNK = 32

# What a step learns from: the strong view, or in its place one of the image's crops, or the whole image.
STRONG_VIEW, ANOTHER_CROP, WHOLE_IMAGE = "strong view", "another crop", "the whole image"

Settings = dict[str, Any]  # of the package; "strong" beside its sections is one of the three above


@dataclass(frozen=True)
class Encoded:
    """A set as the backbone sees it before anything is learned; n images to learn from, m to test on, N crops each."""

    weak: Tensor  # (n, D)
    crops: Tensor  # (n, N, D)
    strong: Tensor  # (S, n, D), S strong views of each
    test_weak: Tensor  # (m, D)
    test_crops: Tensor  # (m, N, D)
    labels: Tensor  # (m,) int64, for evaluation alone
    hidden: Tensor  # (n,) int64, for the ceiling alone
    texts: TextFeatures
    logit_scale: float


@dataclass(frozen=True)
class EncodedSet:
    """The images to learn from, as ``training.ImageSource``: every view encoded, the first N crops looked at."""

    encoded: Encoded
    crops: int
    strong: str = STRONG_VIEW
    seed: int = 0

    def start_epoch(self, epoch: int, images: Tensor | None = None) -> bool:
        return epoch == 0

    def renew(self, epoch: int, images: Tensor | None = None) -> bool:
        return False

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        return ImageFeatures(self.encoded.weak[batch], self.encoded.crops[batch, : self.crops])

    def whole_images(self, epoch: int) -> Tensor:
        return self.encoded.weak

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        for batch in batches:
            if self.strong == ANOTHER_CROP:
                crops = self.encoded.crops[batch, : self.crops]
                chosen = torch.randint(crops.shape[1], batch.shape, generator=generator)
                yield crops[torch.arange(len(batch)), chosen]
            elif self.strong == WHOLE_IMAGE:
                yield self.encoded.weak[batch]
            else:
                yield self.encoded.strong[epoch % len(self.encoded.strong), batch]


def encoded_views(
    backbone: Backbone, views: Views, learned: Sequence[Path], tested: Sequence[Path], *, crops: int, strong: int
) -> dict[str, Tensor]:
    """Encode the views that a run makes of images to learn from and to test on: the features of ``Encoded``."""
    found: dict[str, list[Tensor]] = {}
    for prefix, paths in (("", learned), ("test_", tested)):
        for start in range(0, len(paths), CHUNK):
            seen = [read_pixels(path, shorter_side=2 * views.size) for path in paths[start : start + CHUNK]]
            drawn = [(PREDICTION_EPOCH, 0) if prefix else (0, start + i) for i in range(len(seen))]
            cut = [
                views.crops(pixels, epoch=epoch, image=image)
                for pixels, (epoch, image) in zip(seen, drawn, strict=True)
            ]
            weak = backbone.embed(torch.stack([views.weak(pixels) for pixels in seen])).cpu()
            found.setdefault(f"{prefix}weak", []).append(weak)
            parts = backbone.embed(torch.cat(cut)).reshape(len(seen), crops, -1).cpu()
            found.setdefault(f"{prefix}crops", []).append(parts)
            if not prefix:
                distorted = [
                    views.strong(pixels, epoch=epoch, image=start + i)
                    for epoch, (i, pixels) in product(range(strong), enumerate(seen))
                ]
                embedded = backbone.embed(torch.stack(distorted)).reshape(strong, len(seen), -1).cpu()
                found.setdefault("strong", []).append(embedded)
    return {key: torch.cat(parts, dim=1 if key == "strong" else 0) for key, parts in found.items()}


class Sets:
    """All images of a set, encoded when first asked for and kept in ``out``; `demo` is the drawn world."""

    def __init__(self, shared: Path, out: Path, backbone: str, device: str = "auto") -> None:
        self.shared, self.out, self.identifier, self.device = shared, out, backbone, device
        self.backbones: dict[str, Backbone] = {}

    def _folders(self, name: str, seed: int, scratch: Path) -> tuple[Texts, Path, Path, Path]:
        """Texts, images to learn from, their truth (for the ceiling alone), and the truth of the test images."""
        if name == "demo":
            world = make_world(scratch / "world", seed=seed)
            return make_texts(world.classes, world.descriptions), world.unlabelled, world.hidden, world.truth
        data = self.shared / "data" / name
        texts = make_texts(read_classes(data / "classes.txt"), read_descriptions(data / "descriptions.json"))
        return texts, data / "train", data / "train", data / "test"

    def encoded(self, name: str, seed: int) -> Encoded:
        file = self.out / f"{name}-{seed}.safetensors"
        if not file.exists():
            with TemporaryDirectory() as scratch:
                tensors = self._encode(name, seed, Path(scratch))
            save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        found = load_file(file)
        texts = TextFeatures(found.pop("names"), found.pop("descriptions"), found.pop("class_of"))
        scale = float(found.pop("logit_scale"))
        return Encoded(**found, texts=texts, logit_scale=scale)

    def _encode(self, name: str, seed: int, scratch: Path) -> dict[str, Tensor]:
        began = time.perf_counter()
        identifier = demo_model() if name == "demo" else self.identifier
        config = make_config({"backbone": identifier, "seed": seed, "device": self.device, "views": {"crops": CROPS}})
        texts, train, hidden, test = self._folders(name, seed, scratch)
        if identifier not in self.backbones:
            self.backbones[identifier] = FineAlign(texts.classes).load_backbone(config)
        backbone = self.backbones[identifier]
        views = Views(config.views, size=backbone.input_size, geometry=backbone.geometry, mean=backbone.mean, seed=seed)
        truth, learned = read_truth(test, texts.classes), read_truth(hidden, texts.classes)
        classes = dict(zip(learned.paths, learned.labels, strict=True))
        paths = list_images(train)
        tensors = encoded_views(backbone, views, paths, list(truth.paths), crops=CROPS, strong=STRONG)
        features = backbone.encode_texts(texts)
        print(f"encoded {name}, seed {seed}, in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return tensors | {
            "labels": torch.tensor(truth.labels),
            "hidden": torch.tensor([classes[path] for path in paths]),
            "names": features.names.cpu(),
            "descriptions": features.descriptions.cpu(),
            "class_of": features.class_of.cpu(),
            "logit_scale": torch.tensor(backbone.logit_scale),
        }


class NoBackbone:
    """Stands where nothing of the backbone learns."""


def configured(encoded: Encoded, settings: Settings, seed: int) -> Config:
    """The settings with everything that was not given, as resolved for this many images and classes."""
    values = {**settings, "seed": seed, "training": {"encoder": "frozen", **settings.get("training", {})}}
    values.pop("strong", None)
    return resolve(make_config(values), images=len(encoded.weak), classes=encoded.texts.num_classes, input_size=1)


def trained(
    encoded: Encoded, settings: Settings, seed: int, *, shares: Tensor | None = None, known: Tensor | None = None
) -> tuple[Method, int]:
    """A method that has learned from the encoded set, and how many crops of an image it looks at.

    ``shares`` (C,) is the class prior, in place of the one in the settings. ``known`` (n,) are the known labels, as
    ``method.few_labels`` has them.
    """
    config, strong = configured(encoded, settings, seed), settings.get("strong", STRONG_VIEW)
    crops, epochs = config.views.crops, config.training.epochs
    assert epochs != "auto"
    method = create_method(config.method, encoded.texts, logit_scale=encoded.logit_scale)
    if shares is not None and isinstance(method, SelfTrainingMethod):
        method.expect(shares)
    if method.trains:
        state = begin(NoBackbone(), method, config, images=len(encoded.weak), known=known)  # type: ignore[arg-type]
        for _ in run_epochs(state, EncodedSet(encoded, crops, strong, seed), config, range(epochs), Progress()):
            pass
    elif method.surveys:
        method.survey(encoded.weak) if known is None else method.survey(encoded.weak, known)
    return method.requires_grad_(False), crops
