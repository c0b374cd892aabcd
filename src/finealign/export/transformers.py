"""transformers export of a CLIP: weights and processor, checked on the same pixels and on the same files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from finealign.backbone.clip_folder import clip_vocabulary
from finealign.backbone.clip_names import clip_weights
from finealign.backbone.model import OpenClipBackbone
from finealign.classifier import FineAlign
from finealign.errors import ModelError, sentence
from finealign.export.checks import (
    COSINE,
    TEXTS,
    Checked,
    Measure,
    largest,
    open_clip_backbone,
    prompts,
    run_usage,
    write_pictures,
)
from finealign.export.companions import resampling, write_anchors, write_classes, write_usage
from finealign.export.refusals import activation
from finealign.images.decoding import Photo
from finealign.runtime.atomic import save_tensors, save_text
from finealign.types import ImageFeatures, Score

LOGIT = 1e-4  # the largest difference promised for logits of the same pixels
# The same for pixels in [0, 1]: Pillow resizes exactly as FineAlign does, torchvision rounds differently, twice.
RESIZED = {"pillow": 1e-5, "torchvision": 3.01 / 255}
# Code that ``run_usage`` runs after usage.py.
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
    """Write the model as a transformers folder of a CLIP with classes, anchors and ``usage.py``, and check it.

    ``aside`` is a folder for temporary files. Raises ModelError when transformers would tokenize a prompt differently,
    when the weights do not fit its CLIP, or when ``usage.py`` fails.
    """
    backbone = open_clip_backbone(saved)
    texts = prompts(saved.texts_)
    tokens = backbone.tokenizer(texts)
    tokenizer = write_processor(backbone, folder)
    _refuse_other_tokens(tokenizer(texts, padding="max_length")["input_ids"], tokens, texts, backbone)
    write_weights(backbone, folder)
    write_classes(saved, kind, folder)
    write_anchors(saved, folder)
    write_usage(saved, "hf", folder)
    return _compare(saved, kind, folder, aside, texts, tokens)


def _compare(saved: FineAlign, kind: Score, folder: Path, aside: Path, texts: Sequence[str], tokens: Tensor) -> Checked:
    backbone = open_clip_backbone(saved)
    images = write_pictures(backbone.input_size, aside)
    predictor = saved.predictor_
    photos = [predictor.read(path) for path in images]
    views = torch.stack([predictor.render(photo, crops=False)[0] for photo in photos])
    mean, std = torch.tensor([backbone.preprocess["mean"], backbone.preprocess["std"]])[:, :, None, None]
    pixels = views.float().div(255).sub(mean).div(std)
    tensors_path = aside / "given.safetensors"
    save_tensors({"pixels": pixels, "tokens": tokens[:TEXTS]}, tensors_path)
    outputs = run_usage(folder, aside, images, ASK, texts=texts, tensors=str(tensors_path))
    _refuse_other_tokens(outputs["tokens"].tolist(), tokens, texts, backbone)
    features = backbone.embed(views)
    logits = backbone.logit_scale * features @ backbone.encode_sentences(texts[:TEXTS]).T
    scores = saved.model_.score(ImageFeatures(features, features[:, None][:, :0]), kind)
    comparable = [not _is_shifted(photo, backbone) for photo in photos]
    distances = {
        backend: np.abs((outputs[backend] - pixels.numpy()) * std.numpy())[comparable].max() for backend in RESIZED
    }
    return Checked(
        {
            "logits": Measure(largest(outputs["logits"], logits.numpy()), LOGIT),
            "scores": Measure(largest(outputs["scores"], scores.numpy()), COSINE),
            **{
                f"pixels by {backend}": Measure(float(distance), RESIZED[backend])
                for backend, distance in distances.items()
            },
        },
        (
            "transformers cuts the centre one pixel beside open_clip's where the resized image is 3, 7, 11, ... pixels "
            f"longer than {backbone.input_size}. Pixels are compared where it does not; logits and scores on the same "
            "pixels. A pipeline resizes the photo by torchvision at once, usage.py by Pillow as FineAlign does.",
        ),
    )


def _refuse_other_tokens(
    own: list[list[int]], tokens: Tensor, texts: Sequence[str], backbone: OpenClipBackbone
) -> None:
    """Raises ModelError where transformers reads a text as other tokens than open_clip, which replaces curly quotes."""
    end = backbone.tokenizer.eot_token_id
    for text, row, expected in zip(texts, own, tokens.tolist(), strict=True):
        if row[: row.index(end)] != expected[: expected.index(end)]:
            raise ModelError(
                f"transformers' tokenizer reads {text!r:.100} as other tokens than open_clip's, which writes such "
                "characters plainly first. Wanted: plain quotes and letters in class names and templates; or --format "
                "open_clip."
            )


def _is_shifted(photo: Photo, backbone: OpenClipBackbone) -> bool:
    """Whether transformers' centre crop of an image lies one pixel beside open_clip's."""
    height, width = photo.pixels.shape[:2]
    longer = int(backbone.input_size * max(width, height) / min(width, height))
    return not squashes(backbone) and (longer - backbone.input_size) % 4 == 3


def squashes(backbone: OpenClipBackbone) -> bool:
    """Whether images are resized to a square whatever their aspect ratio, without cropping."""
    mode: str = backbone.preprocess.get("resize_mode", "shortest")
    return mode == "squash"


def write_processor(backbone: OpenClipBackbone, folder: Path) -> Any:
    """Write the image processor and the tokenizer into a folder, and return the tokenizer."""
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    vocabulary = clip_vocabulary(backbone.tokenizer)
    merges: Any = [tuple(pair) for pair in backbone.tokenizer.bpe_ranks if len(pair) == 2]
    save_text(json.dumps(vocabulary, ensure_ascii=False), folder / "vocab.json")
    save_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), folder / "merges.txt")
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=backbone.window)
    preprocess, side = backbone.preprocess, backbone.input_size
    square = {"height": side, "width": side}
    squashed = squashes(backbone)
    image_processor = CLIPImageProcessor(
        size=square if squashed else {"shortest_edge": side},
        crop_size=square,
        do_center_crop=not squashed,
        resample=getattr(Image.Resampling, resampling(preprocess)),
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )
    image_processor.save_pretrained(folder)
    processor_class: Any = CLIPProcessor
    processor_class(image_processor, tokenizer).save_pretrained(folder)
    return tokenizer


def write_weights(backbone: OpenClipBackbone, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``. Raises ModelError for weights that do not fit."""
    from transformers import CLIPConfig, CLIPModel

    weights = clip_weights(backbone.model.state_dict())
    config = CLIPConfig(**_configuration(backbone), architectures=["CLIPModel"], dtype="float32")
    with torch.device("meta"):  # allocates no memory; the weights are assigned below
        empty = CLIPModel(config)
    try:
        empty.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"The weights do not fit transformers' CLIP: {sentence(error)}") from error
    config.save_pretrained(folder)
    save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _configuration(backbone: OpenClipBackbone) -> dict[str, Any]:
    model, tokenizer = backbone.model, backbone.tokenizer
    visual = model.visual

    def tower(transformer: Any, norm: nn.LayerNorm) -> dict[str, Any]:
        block = transformer.resblocks[0]
        return {
            "hidden_size": transformer.width,
            "intermediate_size": block.mlp.c_fc.out_features,
            "num_hidden_layers": len(transformer.resblocks),
            "num_attention_heads": block.attn.num_heads,
            "hidden_act": activation(block),
            "layer_norm_eps": norm.eps,
            "projection_dim": backbone.config["embed_dim"],
        }

    image = {"image_size": backbone.input_size, "patch_size": visual.patch_size[0]}
    text = {
        "vocab_size": model.token_embedding.num_embeddings,
        "max_position_embeddings": len(model.positional_embedding),
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": tokenizer.eot_token_id,
        "pad_token_id": tokenizer.eot_token_id,
    }
    return {
        "vision_config": tower(visual.transformer, visual.ln_post) | image,
        "text_config": tower(model.transformer, model.ln_final) | text,
        "projection_dim": backbone.config["embed_dim"],
    }
