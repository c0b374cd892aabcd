"""Worlds (a backbone and a set), and folders of all kinds drawn from them, for runs with a frozen encoder.

MiniCLIP's features are made here, of at most ``MOST`` images a class, and kept in a folder; those of the genuine CLIP
B/16 tower lie in FINEALIGN_SHARED/features/clip-b16, and only the class texts are encoded. Those of the genuine CLIP
ViT-B/32 are read as they lie in features/clip-b32. The demo's world is drawn and encoded by the demo's model.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from features import Encoded, Sets, encoded_views
from folders import COPIES, NONE, STRANGERS, VARIANTS, chosen_per_class
from safetensors.torch import load_file, save_file
from transductive import SPLITS, whole_images

from finealign.backbone.base import Backbone
from finealign.classifier import FineAlign
from finealign.config import make_config
from finealign.images.listing import list_images
from finealign.images.views import Views
from finealign.texts.prompts import make_texts, read_classes, read_descriptions
from finealign.types import TextFeatures, Texts

SETS = {
    "miniclip": ("eurosat", "ucmerced", "dtd10", "flowers12", "food10", "pets37-small", "cifar100"),
    "clip-b16": ("eurosat", "ucmerced", "dtd10", "flowers12", "pets37-small", "cifar100"),
}
# By group; each world is BACKBONE/SET, or the demo.
WORLDS = {
    **{backbone: tuple(f"{backbone}/{name}" for name in names) for backbone, names in SETS.items()},
    "clip-b32": tuple(f"clip-b32/{name}" for name in SPLITS),
    "demo": ("demo",),
}
STRANGE_TO = {"dtd": ("stanford_cars",)}  # where the strangers of a set come from, if not from its backbone's others
MOST = {"cifar100": 8}  # images a class that are encoded; else USUAL
USUAL, TESTED = 45, 200
CROPS, STRONG = 8, 2


class Frozen:
    """The encoded worlds."""

    def __init__(self, shared: Path, out: Path, device: str = "auto") -> None:
        """``device`` is where images and texts are encoded; what is made of their features is made on the CPU."""
        self.shared, self.out, self.device = shared, out, device
        self.loaded: dict[str, Backbone] = {}
        self.kept: dict[tuple[str, str], Encoded] = {}
        out.mkdir(parents=True, exist_ok=True)

    def encoded(self, backbone: str, name: str) -> Encoded:
        """Return a set as a backbone sees it; it is encoded when first asked for."""
        if backbone in ("clip-b32", "demo") and (backbone, name) not in self.kept:
            self.kept[backbone, name] = self.world("demo" if backbone == "demo" else f"{backbone}/{name}", 0)
        if (backbone, name) not in self.kept:
            file = self.out / f"{backbone}-{name}.safetensors"
            if not file.exists():
                print(f"encoding {name} by {backbone}", file=sys.stderr, flush=True)
                made = self._images(name) if backbone == "miniclip" else self._ready(name)
                made |= self._texts(backbone, name)
                save_file({key: value.contiguous() for key, value in made.items()}, file)
            found = load_file(file)
            texts = TextFeatures(found.pop("names"), found.pop("descriptions"), found.pop("class_of"))
            scale = float(found.pop("logit_scale"))
            self.kept[backbone, name] = Encoded(**found, texts=texts, logit_scale=scale)
        return self.kept[backbone, name]

    def world(self, name: str, seed: int) -> Encoded:
        """Return a world by its name in ``WORLDS``. The demo's is drawn by the seed, which changes no other."""
        backbone, _, of_set = name.partition("/")
        if name == "demo":
            return Sets(self.shared, self.out, "", self.device).encoded("demo", seed)
        return whole_images(of_set) if backbone == "clip-b32" else self.encoded(backbone, of_set)

    def folder(self, backbone: str, name: str, variant: str, seed: int, *, most: int, classes: int = 0) -> Encoded:
        """Draw a variant of ``folders.py`` from at most ``most`` images a class; strangers have the label ``NONE``.

        Of ``classes``, if any, drawn by the seed, the list is made: the others are neither in it nor in the folder.
        """
        whole, rng = self.encoded(backbone, name), np.random.default_rng((seed, VARIANTS.index(variant)))
        if classes:
            order = np.random.default_rng((seed, classes)).permutation(whole.texts.num_classes)
            whole = _of_classes(whole, torch.from_numpy(np.sort(order[:classes])))
        hidden = whole.hidden.numpy()
        places = [rng.permutation(np.flatnonzero(hidden == c))[:most] for c in range(whole.texts.num_classes)]
        counts = chosen_per_class([len(of_class) for of_class in places], variant, rng)
        chosen = np.sort(np.concatenate([of_class[:count] for of_class, count in zip(places, counts, strict=True)]))
        if variant == "copies":
            chosen = np.concatenate([chosen, *[chosen[::10]] * COPIES])
        drawn = _rows(whole, torch.from_numpy(chosen))
        if variant != "strangers":
            return drawn
        others = [
            self.encoded(backbone, other) for other in STRANGE_TO.get(name, SETS.get(backbone, ())) if other != name
        ]
        pool = [(other, row) for other in others for row in range(len(other.weak))]
        picked = [pool[place] for place in rng.permutation(len(pool))[: round(STRANGERS * len(chosen))]]
        strangers = [_rows(other, torch.tensor([row])) for other, row in picked]
        return replace(
            drawn,
            weak=torch.cat([drawn.weak, *[one.weak for one in strangers]]),
            crops=torch.cat([drawn.crops, *[one.crops for one in strangers]]),
            strong=torch.cat([drawn.strong, *[one.strong for one in strangers]], dim=1),
            hidden=torch.cat([drawn.hidden, torch.full((len(strangers),), NONE)]),
        )

    def _backbone(self, backbone: str) -> Backbone:
        if backbone not in self.loaded:
            folder = self.shared / "models" / backbone
            if backbone == "clip-b16":
                folder = self.out / "clip-b16"
                if not (folder / "open_clip_config.json").exists():
                    build = self.shared / "models" / "clip-b16" / "build.py"
                    subprocess.run([sys.executable, str(build), str(folder)], check=True)
            config = make_config({"backbone": f"local-dir:{folder}", "device": self.device})
            self.loaded[backbone] = FineAlign(["one", "other"]).load_backbone(config)
        return self.loaded[backbone]

    def _of(self, name: str) -> Texts:
        data = self.shared / "data" / name
        return make_texts(read_classes(data / "classes.txt"), read_descriptions(data / "descriptions.json"))

    def _texts(self, backbone: str, name: str) -> dict[str, torch.Tensor]:
        loaded = self._backbone(backbone)
        features = loaded.encode_texts(self._of(name))
        return {
            "names": features.names.cpu(),
            "descriptions": features.descriptions.cpu(),
            "class_of": features.class_of.cpu(),
            "logit_scale": torch.tensor(loaded.logit_scale),
        }

    def _ready(self, name: str) -> dict[str, torch.Tensor]:
        found = load_file(self.shared / "features" / "clip-b16" / f"{name}.safetensors")
        wanted = ("weak", "crops", "strong", "hidden", "test_weak", "test_crops", "labels")
        return {key: found[key].float() if found[key].is_floating_point() else found[key].long() for key in wanted}

    def _images(self, name: str) -> dict[str, torch.Tensor]:
        backbone, classes = self._backbone("miniclip"), self._of(name).classes
        settings = make_config({"views": {"crops": CROPS}}).views
        views = Views(settings, size=backbone.input_size, geometry=backbone.geometry, mean=backbone.mean, seed=0)
        learned, hidden = self._chosen(name, classes, "train", MOST.get(name, USUAL))
        tested, labels = self._chosen(name, classes, "test", max(2, TESTED // len(classes)))
        found = encoded_views(backbone, views, learned, tested, crops=CROPS, strong=STRONG)
        return found | {"hidden": torch.tensor(hidden), "labels": torch.tensor(labels)}

    def _chosen(self, name: str, classes: Sequence[str], split: str, most: int) -> tuple[list[Path], list[int]]:
        """At most ``most`` images of each class, and their classes."""
        paths, labels = [], []
        for label, of_class in enumerate(classes):
            photos = list_images(self.shared / "data" / name / split / of_class)
            order = np.random.default_rng((7, label)).permutation(len(photos))[:most]
            paths += [photos[place] for place in sorted(order)]
            labels += [label] * len(order)
        return paths, labels


def _of_classes(encoded: Encoded, kept: torch.Tensor) -> Encoded:
    """The images to learn from, and the texts, of the classes ``kept``, which ascend and are numbered from 0."""
    texts = encoded.texts
    number = torch.full((texts.num_classes,), NONE)
    number[kept] = torch.arange(len(kept))
    described = number[texts.class_of] != NONE
    images = _rows(encoded, torch.nonzero(number[encoded.hidden] != NONE)[:, 0])
    return replace(
        images,
        hidden=number[images.hidden],
        texts=TextFeatures(texts.names[kept], texts.descriptions[described], number[texts.class_of][described]),
    )


def _rows(encoded: Encoded, rows: torch.Tensor) -> Encoded:
    return replace(
        encoded,
        weak=encoded.weak[rows],
        crops=encoded.crops[rows, :CROPS],
        strong=encoded.strong[:STRONG, rows],
        hidden=encoded.hidden[rows],
    )
