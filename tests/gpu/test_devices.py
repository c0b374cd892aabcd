"""What differs between devices, on the CPU and, by ``pytest --device cuda``, on a GPU against it.

On the CPU the towers are tiny ones, so that the tests themselves are known to run; on a GPU those that users have.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from conftest import CLASSES, VISION_TOWERS, tiny_config
from finealign.backbone import model as backbone_model
from finealign.backbone.load import load_backbone
from finealign.backbone.model import OpenClipBackbone
from finealign.classifier import FineAlign
from finealign.images.decoding import read_pixels
from finealign.images.views import Views, cut_on, padded
from finealign.method import alignment
from finealign.method.alignment import normalised_cut, saliency_pooled
from finealign.runtime.devices import choose_precision
from finealign.runtime.progress import Progress
from finealign.training.features import EncodingPlan, FeatureBank
from finealign.training.loop import step
from finealign.training.state import EpochRecord, begin
from finealign.types import Gaze, Precision

Tiny = Callable[[str], str]
# On a GPU; the tokenizer of open_clip's SigLIP would come from a hub.
TOWERS = {"transformer": "ViT-B-32/random", "timm": "siglip", "convolutional": "RN50/random"}
over_towers = pytest.mark.parametrize("tower", TOWERS)
over_precisions = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
# The least cosine with what the CPU computes in fp32.
ALIKE = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.999}


def load(tower: str, tiny: Tiny, device: torch.device, precision: Precision = "fp32") -> OpenClipBackbone:
    """The backbone on the device: of the kind that users have on a GPU, a tiny one on the CPU."""
    name = tower if device.type == "cpu" else TOWERS[tower]
    identifier = tiny(name) if name in VISION_TOWERS else name
    return load_backbone(identifier, device=device, precision=precision, texts=False)


def on_cpu(backbone: OpenClipBackbone) -> OpenClipBackbone:
    """The same weights on the CPU, in fp32."""
    return OpenClipBackbone(
        identifier=backbone.identifier,
        model=copy.deepcopy(backbone.model).cpu(),
        tokenizer=backbone.tokenizer,
        config=backbone.config,
        preprocess=backbone.preprocess,
        geometry=backbone.geometry,
    )


def pictures(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 7, 7, generator=generator) * 255
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").to(torch.uint8)


def gradients(backbone: OpenClipBackbone, images: Tensor) -> dict[str, Tensor]:
    """Those of the normalisation parameters, of a fixed function of the features."""
    parameters = backbone.norm_parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    features = backbone.encode_images(images)
    aim = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features.device)
    torch.autograd.backward((features * aim).sum())
    found = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        found[name] = parameter.grad.detach().clone().float().cpu()
        parameter.requires_grad_(False)
    return found


@over_towers
@over_precisions
def test_encode_images__is_nearly_what_the_cpu_computes_in_fp32(
    tiny_backbone: Tiny, device: torch.device, tower: str, precision: Precision
) -> None:
    backbone = load(tower, tiny_backbone, device, precision)
    images = pictures(8, backbone.input_size)
    found, wanted = backbone.embed(images), on_cpu(backbone).embed(images)
    assert found.device.type == device.type and found.dtype == torch.float32
    assert float(cosine_similarity(found.cpu(), wanted).min()) > ALIKE[precision]


@over_towers
@over_precisions
def test_encode_images__gives_nearly_the_gradients_of_the_cpu(
    tiny_backbone: Tiny, device: torch.device, tower: str, precision: Precision
) -> None:
    backbone = load(tower, tiny_backbone, device, precision)
    images = pictures(8, backbone.input_size)
    wanted, found = gradients(on_cpu(backbone), images), gradients(backbone, images)
    assert found.keys() == wanted.keys()
    first, second = (torch.cat([value.flatten() for value in one.values()]) for one in (found, wanted))
    assert all(value.isfinite().all() for value in found.values())
    assert float(cosine_similarity(first, second, dim=0)) > (0.98 if precision == "bf16" else 0.999)


@over_precisions
def test_encode_images__casts_no_weight_of_the_tower_at_a_call(
    tiny_backbone: Tiny, device: torch.device, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load("transformer", tiny_backbone, device, precision)
    images = pictures(2, backbone.input_size)
    backbone.embed(images)  # makes the working copy
    entered: list[bool] = []
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: entered.append(True))
    backbone.embed(images)
    assert not entered
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    visual = backbone._encoder(kind).visual
    learning = {id(parameter) for parameter in backbone.norm_parameters().values()}
    assert {p.dtype for p in visual.parameters() if id(p) not in learning} == {kind}


def test_cut_on__is_what_views_cut(device: torch.device) -> None:
    from finealign.config import ViewSettings

    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((90, 130), (120, 64))]
    views = Views(ViewSettings(crops=6), size=32, geometry=lambda image: image, mean=(0.5,) * 3, seed=0)
    uncut = [(pixels, views.crop_boxes(*pixels.shape[:2], epoch=1, image=2)) for pixels in photos]
    found = cut_on(device, padded(uncut), 32)
    wanted = torch.cat([views.crops(pixels, epoch=1, image=2) for pixels in photos])
    assert found.device.type == device.type
    assert int((found.cpu().int() - wanted.int()).abs().max()) <= 2


@over_precisions
def test_saliency__is_computed_in_float32(
    tiny_backbone: Tiny, device: torch.device, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load("transformer", tiny_backbone, device, precision)
    images = pictures(4, backbone.input_size)
    seen: list[torch.dtype] = []

    def noted(tokens: Tensor, *, scale: float) -> Tensor:
        seen.append(tokens.dtype)
        assert torch.get_float32_matmul_precision() == "highest"  # no TF32 in it
        return saliency_pooled(tokens, scale=scale)

    monkeypatch.setattr(backbone_model, "saliency_pooled", noted)
    found = backbone.embed(images, Gaze(salient=True))
    assert seen == [torch.float32]
    wanted = on_cpu(backbone).embed(images, Gaze(salient=True))
    # A patch at the edge of the object may fall to the other side of the cut.
    assert float(cosine_similarity(found.cpu(), wanted).median()) > 0.99


def test_normalised_cut__finds_the_same_patches_on_every_device(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 32, generator=generator)
    tokens = centres[(torch.arange(49) % 7 < 3).long()] + 0.3 * torch.randn(4, 49, 32, generator=generator)
    tokens = nn.functional.normalize(tokens, dim=-1)
    assert torch.equal(normalised_cut(tokens.to(device)).cpu(), normalised_cut(tokens))
    assert alignment.normalised_cut(tokens).sum() > 0


def test_gradient_chunk__measures_what_the_allocator_does(tiny_backbone: Tiny, device: torch.device) -> None:
    """The memory probe within 15 % of what a batch takes; on the CPU, whose allocator does not tell, of its own sum."""
    backbone = load("transformer", tiny_backbone, device, choose_precision("auto", device))
    for parameter in backbone.norm_parameters().values():
        parameter.requires_grad_(True)
    images = pictures(64, backbone.input_size).to(device)
    backbone._gradient_chunk(images)
    each = backbone._kept_bytes[backbone._working_type]
    if device.type == "cpu":
        weights = backbone._encoder(backbone._working_type).visual.parameters()
        measured = backbone_model._bytes_kept(lambda: backbone._encode(images), beside=weights)
    else:
        backbone.encode_images(images)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        features = backbone.encode_images(images)
        torch.cuda.synchronize(device)
        measured = torch.cuda.memory_allocated(device) - before - features.nbytes
        assert (
            torch.cuda.max_memory_allocated(device) - before < 1.5 * measured
        )  # what passes by is not the larger part
    assert 64 * each == pytest.approx(measured, rel=0.15)


@pytest.fixture
def not_waiting(device: torch.device) -> Iterator[Callable[[], None]]:
    """Called, it makes every operation an error that waits for the GPU. On a CPU nothing waits."""

    def forbid() -> None:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")

    yield forbid
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["fair", "self-training"])
def test_step__sixteen_of_them_wait_for_nothing(
    photos: Path,
    tiny_backbone: Tiny,
    tmp_path: Path,
    device: torch.device,
    not_waiting: Callable[[], None],
    method: str,
) -> None:
    config = tiny_config(tiny_backbone("transformer"), device=str(device), method__name=method)
    model = FineAlign(CLASSES, config=config).unlearned()
    images = [
        read_pixels(path, shorter_side=40, max_pixels=10**6, white_value="auto") for path in photos.rglob("*.png")
    ]
    plan = EncodingPlan(refresh=1, crops=model.method_.uses_crops)
    views, backbone = model.predictor_.views, model.backbone_
    with FeatureBank(images, views, backbone, plan, folder=tmp_path / "kept", progress=Progress()) as source:
        source.label_pass(0)
        state = begin(backbone, model.method_, model.config_, images=len(images))
        batches = [torch.arange(number % 3 * 8, number % 3 * 8 + 8) for number in range(18)]
        for number, strong in enumerate(source.strong_features(0, batches)):
            if number == 2:  # the first steps make the working copy and the optimiser's moments
                not_waiting()
            step(state, source.label_features(batches[number], 0), strong, batches[number])
    assert all(parameter.isfinite().all() for parameter in state.method.parameters())


class KilledError(Exception):
    """What ends a run in its middle."""


def test_adapt__killed_and_resumed_is_the_uninterrupted(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, device: torch.device
) -> None:
    config = tiny_config(tiny_backbone("transformer"), device=str(device), training__epochs=2)

    def die(record: EpochRecord) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        FineAlign(CLASSES, config=config).fit(photos, checkpoints=tmp_path, on_epoch=die)
    resumed = FineAlign(CLASSES, config=config).fit(photos, checkpoints=tmp_path)
    whole = FineAlign(CLASSES, config=config).fit(photos)
    found, wanted = (dict(model.method_.state_dict()) | dict(model.norms_) for model in (resumed, whole))
    for name, value in wanted.items():
        if device.type == "cpu":
            assert torch.equal(found[name], value), name
        else:  # some of CUDA's sums are taken in no fixed order
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3)


def test_adapt__learns_the_same_on_every_device(photos: Path, tiny_backbone: Tiny, device: torch.device) -> None:
    def labels(on: Any) -> list[str]:
        config = tiny_config(tiny_backbone("transformer"), device=str(on), training__epochs=1)
        return list(FineAlign(CLASSES, config=config).fit(photos).predict(photos))

    found, wanted = labels(device), labels("cpu")
    assert sum(a != b for a, b in zip(found, wanted, strict=True)) <= (0 if device.type == "cpu" else 2)


def test_predict__crops_cut_on_the_device_give_the_same_probabilities(
    photos: Path, tiny_backbone: Tiny, device: torch.device
) -> None:
    config = tiny_config(tiny_backbone("transformer"), device=str(device), method__name="wca")
    model = FineAlign(CLASSES, config=config).fit(photos)
    found = []
    for late in (False, True):
        model.predictor_.cut_late = late
        found.append(model.predict_proba(photos, score="las"))
    assert np.abs(found[0] - found[1]).max() < 0.05
    assert model.predictor_.cut_late and not np.array_equal(found[0], found[1])
