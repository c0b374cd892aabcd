"""transformers' processor of a CLIP: its tokenizer and the way its images are prepared."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from finealign.backbone import Backbone
from finealign.export.companions import resampling
from finealign.storage import save_text


def squashes(backbone: Backbone) -> bool:
    """Whether images are resized to a square whatever their shape, with nothing cut off."""
    mode: str = backbone.preprocess.get("resize_mode", "shortest")
    return mode == "squash"


def write_processor(backbone: Backbone, folder: Path) -> Any:
    """The tokenizer that was written with it."""
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    names = {backbone.tokenizer.sot_token_id: "<|startoftext|>", backbone.tokenizer.eot_token_id: "<|endoftext|>"}
    vocabulary = {names.get(number, token): number for token, number in backbone.tokenizer.encoder.items()}
    merges: Any = [tuple(pair) for pair in backbone.tokenizer.bpe_ranks if len(pair) == 2]
    save_text(json.dumps(vocabulary, ensure_ascii=False), folder / "vocab.json")
    save_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), folder / "merges.txt")
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=backbone.window)
    preprocess, side = backbone.preprocess, backbone.input_size
    square = {"height": side, "width": side}
    squashed = squashes(backbone)
    images = CLIPImageProcessor(
        size=square if squashed else {"shortest_edge": side},
        crop_size=square,
        do_center_crop=not squashed,
        resample=getattr(Image.Resampling, resampling(preprocess)),
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )
    images.save_pretrained(folder)
    both: Any = CLIPProcessor
    both(images, tokenizer).save_pretrained(folder)
    return tokenizer
