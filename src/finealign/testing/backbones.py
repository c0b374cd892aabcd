"""Check a backbone of one's own: what it encodes, what it lends, and that a model can be adapted from it."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finealign.backbone.base import Backbone, lacking
from finealign.classifier import FineAlign
from finealign.config import make_config
from finealign.errors import BackboneError
from finealign.testing.findings import CheckError, Findings, near
from finealign.testing.methods import _Stopping
from finealign.testing.toy import COLOURS, draw_images
from finealign.types import Gaze, Texts

ROUNDING = {"fp32": 1e-3, "bf16": 0.03, "fp16": 0.01}


def check_backbone(backbone: Backbone) -> None:
    """Check that a backbone keeps to ``finealign.Backbone``; to be called in the backbone's tests.

    Images and texts are encoded as unit vectors of the right shape, the same every time and whatever is beside them;
    gradients reach the normalisation parameters, which can be lent and come back; the checksum stays; and a model that
    is adapted from it for one epoch, saved and loaded again with it, predicts the same and leaves it as it was.

    Raises CheckError with a sentence for each fault.
    """
    if missing := lacking(backbone):
        raise CheckError(f"{type(backbone).__name__} lacks {', '.join(missing)}. Wanted: all of finealign.Backbone.")
    found = Findings()
    with found.during("to say what it is"):
        _check_properties(backbone, found)
    for work, check in (
        ("to encode images", _check_images),
        ("to encode texts", _check_texts),
        ("to lend its normalisation parameters", _check_norms),
        ("to be adapted", _check_fit),
    ):
        if not found.faults:
            with found.during(work):
                check(backbone, found)
    found.close(f"The backbone {backbone.identifier!r}")


def _check_properties(backbone: Backbone, found: Findings) -> None:
    size, image = backbone.input_size, Image.new("RGB", (37, 53), "red")
    prepared = backbone.geometry(image)
    found.expect(
        prepared.size == (size, size) and prepared.mode == "RGB",
        f"Its geometry makes a {prepared.mode} image of {prepared.size}. Wanted: RGB, {(size, size)}, the input_size.",
    )
    mean = backbone.mean
    found.expect(
        len(mean) == 3 and all(0 <= value <= 1 for value in mean), f"Its mean is {mean!r}. Wanted: three in [0, 1]."
    )
    found.expect(backbone.logit_scale > 0, f"Its logit_scale is {backbone.logit_scale!r}. Wanted: a number above 0.")
    found.expect(
        isinstance(backbone.identifier, str) and bool(backbone.identifier),
        f"Its identifier is {backbone.identifier!r}. Wanted: a text that names it.",
    )
    found.expect(
        isinstance(backbone.device, torch.device), f"Its device is {backbone.device!r}. Wanted: a torch.device."
    )
    found.expect(
        backbone.precision in ROUNDING, f"Its precision is {backbone.precision!r}. Wanted: {', '.join(ROUNDING)}."
    )
    checksum = backbone.checksum
    found.expect(
        len(checksum) == 64 and set(checksum) <= set("0123456789abcdef") and checksum == backbone.checksum,
        "Its checksum is no SHA-256 in hexadecimal, or another one every time.",
    )


def _pixels(backbone: Backbone, count: int = 4) -> Tensor:
    """Drawn images (count, 3, S, S) uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, backbone.input_size, backbone.input_size), generator=generator).to(
        torch.uint8
    )


def _near(backbone: Backbone, one: Tensor, other: Tensor) -> bool:
    """Whether features are equal, up to the rounding of the backbone's precision."""
    rounding = ROUNDING[backbone.precision]
    return near(one, other, relative=rounding, absolute=rounding)


def _check_images(backbone: Backbone, found: Findings) -> None:
    pixels = _pixels(backbone)
    embedded = backbone.embed(pixels)
    _expect_embeddings(embedded, 4, backbone, "embed of 4 images", found)
    found.expect(not embedded.requires_grad, "embed records gradients. Wanted: torch.inference_mode or no_grad.")
    with torch.no_grad():
        encoded = backbone.encode_images(pixels)
        alone = backbone.encode_images(pixels[:1])
        again = backbone.encode_images(pixels)
    _expect_embeddings(encoded, 4, backbone, "encode_images of 4 images", found)
    if found.faults:
        return
    found.expect(torch.equal(encoded, again), "It encodes an image otherwise every time. Wanted: evaluation mode.")
    found.expect(_near(backbone, encoded, embedded), "embed and encode_images differ. Wanted: the same features.")
    found.expect(
        _near(backbone, encoded[:1], alone),
        "It encodes an image otherwise if others are beside it. Wanted: evaluation mode, which BatchNorm needs.",
    )
    found.expect(not torch.equal(encoded[0], encoded[1]), "It encodes two different images alike.")
    if not backbone.token_width:
        gazed = backbone.embed(pixels, Gaze(salient=True))
        found.expect(
            _near(backbone, gazed, embedded), "It has no token_width, and gaze changes its features nonetheless."
        )


def _check_texts(backbone: Backbone, found: Findings) -> None:
    texts = Texts(("red", "blue"), (("It is red.",), ("It is blue.", "As the sky.")), ("a photo of {}.", "{}"))
    features = backbone.encode_texts(texts)
    _expect_embeddings(features.names, 2, backbone, "encode_texts' names of 2 classes", found)
    _expect_embeddings(features.descriptions, 3, backbone, "encode_texts' descriptions, of which there are 3", found)
    found.expect(
        features.class_of.dtype == torch.int64 and features.class_of.tolist() == [0, 1, 1],
        f"Its class_of is {features.class_of.tolist()}, {features.class_of.dtype}. Wanted: [0, 1, 1], int64.",
    )
    sentences = [sentence for group in texts.descriptions for sentence in group]
    encoded = backbone.encode_sentences(sentences)
    _expect_embeddings(encoded, 3, backbone, "encode_sentences of 3 texts", found)
    if encoded.shape == features.descriptions.shape:
        found.expect(
            _near(backbone, encoded, features.descriptions),
            "encode_sentences and encode_texts encode descriptions differently, or in another order.",
        )
    found.expect(
        backbone.beyond_window(["a", "b"]) == [False, False],
        "Its beyond_window is not [False, False] of two texts of one letter.",
    )


def _check_norms(backbone: Backbone, found: Findings) -> None:
    try:
        norms = backbone.norm_parameters()
    except BackboneError:
        return  # allowed: such a tower is adapted by its anchors alone
    found.expect(bool(norms), "Its norm_parameters are none. Wanted: BackboneError for a tower without normalisation.")
    asking = [name for name, parameter in norms.items() if parameter.requires_grad]
    found.expect(
        not asking, f"{', '.join(asking[:3])} require a gradient before training. Wanted: requires_grad_(False)."
    )
    pixels, before = _pixels(backbone), {name: value.detach().clone() for name, value in norms.items()}
    for parameter in norms.values():
        parameter.requires_grad_(True)
    try:
        torch.autograd.backward(backbone.encode_images(pixels)[:, 0].sum())
        reached = [name for name, parameter in norms.items() if parameter.grad is not None]
        found.expect(bool(reached), "No gradient of encode_images reaches its normalisation parameters.")
    finally:
        for parameter in norms.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    features, checksum = backbone.embed(pixels), backbone.checksum
    moved = {name: value + 0.5 for name, value in before.items()}
    with backbone.lend(moved):
        lent = backbone.embed(pixels)
        same = backbone.checksum == checksum
    found.expect(not torch.equal(lent, features), "Lent other normalisation parameters, it encodes alike.")
    found.expect(same or backbone.checksum == checksum, "Its checksum is another one after lend.")
    found.expect(torch.equal(backbone.embed(pixels), features), "After lend it encodes otherwise than before.")
    for name, value in backbone.norm_parameters().items():
        found.expect(torch.equal(value, before[name]), f"After lend its {name!r} is not what it was.")


def _check_fit(backbone: Backbone, found: Findings) -> None:
    norms = backbone.norm_parameters() if _has_norms(backbone) else {}
    before = {name: value.detach().clone() for name, value in norms.items()}
    learn = "norms+anchors" if norms else "anchors"
    pace = {"epochs": 1, "batch_size": 6, "anchor_steps": 2, "learn": learn, "learning_rate": 1e-2}
    data = {"cache": "temporary", "workers": 0}
    config = make_config({"views": {"crops": 2}, "training": pace, "data": data, "prediction": {"calibrate": False}})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = draw_images(folder)
        model = FineAlign(list(COLOURS), config=config, backbone=backbone).fit(paths, progress=_Stopping())
        expected = model.predict_proba(paths)
        for key, value in norms.items():
            found.expect(
                torch.equal(value, before[key]), f"After a fit its {key!r} is not what it was: see load_norms."
            )
        model.save(folder / "model")
        if not (folder / "model" / "backbone").is_dir():
            opened = FineAlign.load(folder / "model", device=str(backbone.device), precision=backbone.precision)
        else:
            written = any((folder / "model" / "backbone").iterdir())
            found.expect(written, "Its save writes nothing. Wanted: what it can be loaded from again.")
            opened = FineAlign.load(folder / "model", backbone=backbone)
        found.expect(
            np.array_equal(opened.predict_proba(paths), expected),
            "A model that is saved and loaded predicts otherwise.",
        )


def _has_norms(backbone: Backbone) -> bool:
    try:
        return bool(backbone.norm_parameters())
    except BackboneError:
        return False


def _expect_embeddings(values: Tensor, count: int, backbone: Backbone, what: str, found: Findings) -> None:
    wanted = (count, backbone.embed_dim)
    found.expect(
        tuple(values.shape) == wanted and values.dtype == torch.float32,
        f"The result of {what} is {values.dtype} of shape {tuple(values.shape)}. Wanted: float32 of shape {wanted}.",
    )
    if tuple(values.shape) == wanted:
        lengths = values.float().norm(dim=-1)
        found.expect(
            torch.allclose(lengths, torch.ones_like(lengths), rtol=0, atol=1e-3),
            f"The result of {what} has rows that are not of length 1. Wanted: torch.nn.functional.normalize.",
        )
