"""The reference step against ours, in turn, in one process: images a second, the ratio, and where the time goes.

    python benchmarks/step.py [--backbones ViT-B-32/random,ViT-B-16/random] [--refresh 10] [--device cuda] [--json]

The reference is written as the literature writes it: every step decodes its images, makes the weak view, N crops and
the strong view with Pillow, encodes them all in float32, and learns. Ours is the package's own code: images decoded
once, label features kept for ``--refresh`` epochs, the precision the processor is good at. A step of ours costs its
training pass and a ``refresh``-th of a label pass. Both keep freed memory (see benchmarks/allocator.py), so the
reference is no slower than it need be. The photos are drawn, and random weights do for timing; MiniCLIP is timed where
FINEALIGN_SHARED holds it.
"""

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from on_device import add_device, seconds
from PIL import Image
from real_data import miniclip
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torchvision.transforms import v2

from finealign.backbone.load import load_backbone
from finealign.backbone.model import OpenClipBackbone
from finealign.config import make_config, resolve
from finealign.images.pixel_cache import store_pixels
from finealign.images.views import Views
from finealign.method.registry import create_method
from finealign.runtime.devices import choose_device, choose_precision, choose_workers, keep_freed_memory
from finealign.runtime.progress import Progress
from finealign.texts.prompts import make_texts
from finealign.training.features import EncodingPlan, FeatureBank
from finealign.training.loop import step
from finealign.training.state import State, begin

CLASSES = [f"kind {number}" for number in range(10)]
GFLOP = {"ViT-B-32": 8.73, "ViT-B-16": 34.9, "ViT-L-14": 161.8}  # products of one forward pass, two operations each
PARTS = ("decode", "views", "label pass", "training pass", "optimiser")


def photos(folder: Path, count: int) -> list[Path]:
    """JPEGs of 500 x 375 with the detail of a photo: smooth shapes and fine grain."""
    generator = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((500, 375))
        grain = generator.normal(0, 12, (375, 500, 3))
        paths.append(folder / f"{number:05d}.jpg")
        Image.fromarray(np.clip(np.array(coarse) + grain, 0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


class ReferenceStep:
    """The step as papers' code has it: nothing kept, float32, one encoder, Pillow in the training process."""

    def __init__(self, backbone: OpenClipBackbone, anchors: Tensor, paths: Sequence[Path], crops: int) -> None:
        self.model, self.paths, self.crops, self.device = backbone.model, paths, crops, backbone.device
        size = backbone.input_size
        to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        normal = v2.Normalize(backbone.preprocess["mean"], backbone.preprocess["std"])
        bicubic = v2.InterpolationMode.BICUBIC
        self.weak = v2.Compose([v2.Resize(size, bicubic), v2.CenterCrop(size), *to_tensor, normal])
        # A square of half to nine tenths of the shorter side, about.
        self.crop = v2.Compose([v2.RandomResizedCrop(size, (0.2, 0.6), (1, 1), bicubic), *to_tensor, normal])
        cut = v2.RandomResizedCrop(size, (0.3, 1), interpolation=bicubic)
        moved = [v2.RandomHorizontalFlip(), v2.RandAugment(2, 9)]
        self.strong = v2.Compose([cut, *moved, *to_tensor, normal])
        self.anchors = torch.nn.Parameter(anchors.clone())
        norms = list(backbone.norm_parameters().values())
        for parameter in norms:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW([*norms, self.anchors], lr=1e-5)

    def __call__(self) -> None:
        weak, crops, strong = [], [], []
        for path in self.paths:
            image = Image.open(path).convert("RGB")
            weak.append(self.weak(image))
            crops += [self.crop(image) for _ in range(self.crops)]
            strong.append(self.strong(image))
        with torch.no_grad():
            whole = normalize(self.model.encode_image(torch.stack(weak).to(self.device)), dim=-1)
            # In parts the size of the batch: all at once needs more memory and is slower.
            chunks = torch.split(torch.stack(crops), len(weak))
            parts = torch.cat([self.model.encode_image(chunk.to(self.device)) for chunk in chunks])
            parts = normalize(parts, dim=-1).reshape(len(weak), self.crops, -1)
            classifier = normalize(self.anchors, dim=-1)
            relevance = torch.softmax(torch.einsum("bd,bnd->bn", whole, parts), 1)
            scores = torch.softmax(100 * torch.einsum("bn,bnd,cd->bc", relevance, parts, classifier), 1)
            best, labels = scores.max(1)
            second = scores.topk(2, 1).values[:, 1]
        seen = normalize(self.model.encode_image(torch.stack(strong).to(self.device)), dim=-1)
        logits = 100 * seen @ normalize(self.anchors, dim=-1).T
        weighted = ((1 - second / best) * cross_entropy(logits, labels, reduction="none")).mean()
        loss = weighted - torch.softmax(logits, 1).mean(0).log().mean()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()


@dataclass
class OurStep:
    """The package's own pieces, timed apart."""

    source: FeatureBank
    state: State
    images: int

    @classmethod
    def make(cls, backbone: OpenClipBackbone, paths: list[Path], folder: Path, crops: int) -> "OurStep":
        config = make_config({"views": {"crops": crops}, "training": {"learning_rate": 1e-5}})
        config = resolve(config, images=len(paths), classes=len(CLASSES), input_size=backbone.input_size)
        assert config.data.working_size != "auto"
        stored, _ = store_pixels(
            paths, shorter_side=config.data.working_size, max_pixels=10**9, folder=None, max_bytes=10**10
        )
        views = Views(config.views, size=backbone.input_size, geometry=backbone.geometry, mean=backbone.mean, seed=0)
        texts = backbone.encode_texts(make_texts(CLASSES, None, None))
        method = create_method(config.method, texts, logit_scale=backbone.logit_scale)
        plan = EncodingPlan(refresh=1, crops=True, workers=choose_workers("auto", backbone.device))
        source = FeatureBank(stored, views, backbone, plan, folder=folder, progress=Progress())
        return cls(source, begin(backbone, method, config, images=len(paths)), len(paths))

    def label_pass(self) -> None:
        self.source.label_pass(0)

    def training_step(self) -> None:
        batch = torch.arange(self.images)
        (strong,) = self.source.strong_features(0, [batch])
        step(self.state, self.source.label_features(batch, 0), strong, batch)


def peak(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Products of matrices with sides of ``size``, in billions of operations a second: the best of several."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / min(seconds(lambda: left @ right, device) for _ in range(5)) / 1e9


def resident() -> float:
    """Memory of this process that no file stands behind, in GB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e9
    return float("nan")


def measure(
    name: str,
    *,
    batch: int,
    crops: int,
    refresh: int,
    pairs: int,
    precision: str,
    device: torch.device,
    matrices: int,
) -> dict[str, Any]:
    """One backbone, reference and ours in turn."""
    chosen: Any = choose_precision(precision, device)  # type: ignore[arg-type]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[chosen]
    with tempfile.TemporaryDirectory() as folder:
        paths = photos(Path(folder), batch)
        plain, fast = load_backbone(name, device=device), load_backbone(name, device=device, precision=chosen)
        plain.model.to(memory_format=torch.contiguous_format)  # as open_clip hands it over
        weights = sum(p.numel() for p in fast.model.parameters()) * 4 / 1e9
        anchors = plain.encode_texts(make_texts(CLASSES, None, None)).names
        ours = OurStep.make(fast, paths, Path(folder) / "kept", crops)
        before = resident()
        ours.label_pass()
        ours.training_step()
        # The high-water mark holds the loaded library and both models; what came on top is the step's.
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9 - before
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device) / 1e9
        reference = ReferenceStep(plain, anchors, paths, crops)
        reference()
        rows = []
        for number in range(pairs):
            theirs, label, training = (
                seconds(work, device) for work in (reference, ours.label_pass, ours.training_step)
            )
            rows.append((theirs, label, training))
            print(
                f"{name} pair {number + 1}: reference {theirs:.1f} s, label pass {label:.1f} s, step {training:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        optimiser = min(seconds(ours.state.optimizer.step, device) for _ in range(3))
        decode = seconds(lambda: [np.array(Image.open(path).convert("RGB")) for path in paths], device)
        views = ours.source.views
        label_views = seconds(
            lambda: [(views.weak(p), views.crops(p, epoch=0, image=0)) for p in ours.source.images], device
        )
        strong_views = seconds(lambda: [views.strong(p, epoch=0, image=0) for p in ours.source.images], device)
        best = {kind: peak(kind, device, matrices) for kind in {torch.float32, dtype}}
        ours.source.prefetcher.close()
    reference_rate = [batch / theirs for theirs, _, _ in rows]
    our_rate = [batch / (label / refresh + training) for _, label, training in rows]
    label_rate = median(batch * (crops + 1) / label for _, label, _ in rows)
    label, training = (median(column) for column in list(zip(*rows, strict=True))[1:])
    views_of_an_epoch = label_views / refresh + strong_views
    spent = zip(PARTS, (decode / refresh, views_of_an_epoch, label / refresh, training, optimiser), strict=True)
    found = {
        "backbone": name,
        "device": str(device),
        "precision": chosen,
        "batch": batch,
        "crops": crops,
        "refresh": refresh,
        "pairs": pairs,
        "reference_images_per_second": round(median(reference_rate), 2),
        "images_per_second": round(median(our_rate), 2),
        "ratio": round(median(ours / theirs for ours, theirs in zip(our_rate, reference_rate, strict=True)), 2),
        "ratio_by_refresh": {
            r: round(median(theirs / (labelling / r + learning) for theirs, labelling, learning in rows), 2)
            for r in (1, 2, 3, 5, 10, 20)
        },
        "label_pass_encodings_per_second": round(label_rate, 1),
        "training_images_per_second": round(batch / training, 1),
        "milliseconds_an_image": {part: round(1000 * value / batch, 2) for part, value in spent},
        "peak_gflops": {str(kind).removeprefix("torch."): round(value) for kind, value in best.items()},
        "memory_gb": round(memory, 2),
        "weights_gb": round(weights, 2),
    }
    each = (1 / median(reference_rate), label / batch, training / batch)
    found["seconds_of_a_run"] = {images: whole_run(images, *each) for images in (1000, 10000)}
    gflop = GFLOP.get(name.split("/")[0].removesuffix("-quickgelu"))
    found["peak_share"] = None if gflop is None else round(label_rate * gflop / best[dtype], 3)
    return found


def whole_run(images: int, reference: float, label: float, training: float) -> dict[str, float]:
    """Seconds that a run of ``fair`` by its defaults takes, counted from the seconds an image of a step and of a pass.

    ``reference``: the reference at each of its steps; ``every step``: ours, if it encoded all views at every step;
    ``default``: label features encoded at the start and at the end, as where the encoder has hardly moved in between.
    """
    config = resolve(make_config({}), images=images, classes=len(CLASSES), input_size=224)
    limit, epochs = config.training.max_images, config.training.epochs
    assert not isinstance(epochs, str)
    read = images if isinstance(limit, str) else min(images, limit)
    learned = min(config.training.steps * config.training.batch_size, epochs * read)
    kept = (1 + config.training.last_label_pass) * read * label + learned * training
    found = {"reference": reference * learned, "every step": (label + training) * learned, "default": kept}
    return {name: round(value, 1) for name, value in found.items()}


def show(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found), flush=True)
        return
    print(f"\n{found['backbone']}")
    for key, value in found.items():
        print(f"  {key}: {value}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = miniclip()
    usual = ["ViT-B-32/random", "ViT-B-16/random", *([f"local-dir:{shared}"] if shared.is_dir() else [])]
    parser.add_argument("--backbones", default=",".join(usual))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--crops", type=int, default=8)
    parser.add_argument("--refresh", type=int, default=10, help="epochs that label features are kept")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--matrices", type=int, help="side of those whose product is the peak; 3072, on a GPU 8192")
    add_device(parser)
    known = parser.parse_args()
    keep_freed_memory()
    options = {name: getattr(known, name) for name in ("batch", "crops", "refresh", "pairs", "precision")}
    options["device"] = device = choose_device(known.device)
    options["matrices"] = known.matrices or (3072 if device.type == "cpu" else 8192)
    for name in known.backbones.split(","):
        show(measure(name, **options), as_json=known.json)


if __name__ == "__main__":
    main()
