"""A transformers folder of a CLIP: its weights and processor, checked on the same pixels and on the same files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finealign.backbone import Backbone
from finealign.classifier import FineAlign
from finealign.errors import ModelError
from finealign.export.clip_processor import squashes, write_processor
from finealign.export.clip_weights import write_weights
from finealign.export.companions import write_anchors, write_classes, write_usage
from finealign.export.parity import COSINE, TEXTS, largest, prompts, run_usage
from finealign.export.pictures import write_pictures
from finealign.export.record import Checked, Measure
from finealign.storage import save_tensors
from finealign.types import ImageFeatures, Score

LOGIT = 1e-4
# Of pixels in [0, 1]: Pillow resizes to the last bit as FineAlign does, torchvision rounds otherwise, twice.
RESIZED = {"pillow": 1e-5, "torchvision": 3.01 / 255}
ASK = """
from safetensors.torch import load_file
from transformers import AutoProcessor
tensors = load_file(given["tensors"])
with usage.torch.inference_mode():
    answer = usage.model(input_ids=tensors["tokens"], pixel_values=tensors["pixels"])
found["logits"], found["scores"] = answer.logits_per_image, usage.score(tensors["pixels"])[0]
found["tokens"] = usage.processor.tokenizer(given["texts"], padding="max_length")["input_ids"]
found["pillow"] = usage.prepare(given["images"])
usage.processor = AutoProcessor.from_pretrained(usage.HERE, backend="torchvision")
found["torchvision"] = usage.prepare(given["images"])
"""


def write_clip(saved: FineAlign, kind: Score, folder: Path, aside: Path) -> Checked:
    """Raises ModelError where transformers would read a prompt otherwise."""
    backbone = saved.backbone_
    texts = prompts(saved.texts_)
    tokens = backbone.tokenizer(texts)
    tokenizer = write_processor(backbone, folder)
    _refuse_other_tokens(tokenizer(texts, padding="max_length")["input_ids"], tokens, texts, backbone)
    write_weights(backbone, folder)
    write_classes(saved, kind, folder)
    write_anchors(saved, folder)
    write_usage("hf", folder)
    return _compare(saved, kind, folder, aside, texts, tokens)


def _compare(saved: FineAlign, kind: Score, folder: Path, aside: Path, texts: Sequence[str], tokens: Tensor) -> Checked:
    backbone = saved.backbone_
    images = write_pictures(backbone.input_size, aside)
    seen = torch.stack([_seen(backbone, path) for path in images])
    mean, std = torch.tensor([backbone.preprocess["mean"], backbone.preprocess["std"]])[:, :, None, None]
    pixels = seen.float().div(255).sub(mean).div(std)
    given = aside / "given.safetensors"
    save_tensors({"pixels": pixels, "tokens": tokens[:TEXTS]}, given)
    found = run_usage(folder, aside, images, ASK, texts=texts, tensors=str(given))
    _refuse_other_tokens(found["tokens"].tolist(), tokens, texts, backbone)
    whole = backbone.embed(seen)
    logits = backbone.logit_scale * whole @ backbone.encode_sentences(texts[:TEXTS]).T
    scores = saved.method_.score(ImageFeatures(whole, whole[:, None][:, :0]), kind)
    alike = [not _is_shifted(path, backbone) for path in images]
    apart = {way: np.abs((found[way] - pixels.numpy()) * std.numpy())[alike].max() for way in RESIZED}
    return Checked(
        {
            "logits": Measure(largest(found["logits"], logits.numpy()), LOGIT),
            "scores": Measure(largest(found["scores"], scores.numpy()), COSINE),
            **{f"pixels by {way}": Measure(float(one), RESIZED[way]) for way, one in apart.items()},
        },
        (
            "transformers cuts the centre one pixel beside open_clip's where the resized image is 3, 7, 11, ... pixels "
            f"longer than {backbone.input_size}. Pixels are compared where it does not; logits and scores on the same "
            "pixels. A pipeline resizes by torchvision, usage.py by Pillow as FineAlign does.",
        ),
    )


def _refuse_other_tokens(own: list[list[int]], tokens: Tensor, texts: Sequence[str], backbone: Backbone) -> None:
    """Raises ModelError where transformers reads a prompt otherwise than open_clip, which mends curly quotes."""
    end = backbone.tokenizer.eot_token_id
    for text, row, wanted in zip(texts, own, tokens.tolist(), strict=True):
        if row[: row.index(end)] != wanted[: wanted.index(end)]:
            raise ModelError(
                f"transformers' tokenizer reads {text!r:.100} as other tokens than open_clip's, which writes such "
                "characters plainly first. Wanted: plain quotes and letters in class names and templates; or --format "
                "open_clip."
            )


def _seen(backbone: Backbone, path: Path) -> Tensor:
    """The image as the model sees it: (3, S, S) uint8."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(backbone.geometry(image)).transpose(2, 0, 1).copy())


def _is_shifted(path: Path, backbone: Backbone) -> bool:
    with Image.open(path) as image:
        longer = int(backbone.input_size * max(image.size) / min(image.size))
    return not squashes(backbone) and (longer - backbone.input_size) % 4 == 3
