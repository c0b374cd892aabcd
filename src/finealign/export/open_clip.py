"""open_clip export: the backbone as it is, with the class vectors beside it."""

from pathlib import Path

import torch
from torch.nn.functional import normalize

from finealign.backbone.text_tower import TEXT_TOWER
from finealign.classifier import FineAlign
from finealign.export.checks import (
    COSINE,
    TEXTS,
    Checked,
    Measure,
    largest,
    open_clip_backbone,
    own_scores,
    prompts,
    run_usage,
    write_pictures,
)
from finealign.export.companions import write_anchors, write_classes, write_usage
from finealign.types import Score

ENCODE = "found['texts'] = usage.model.encode_text(usage.tokenizer(given['texts']))"


def write_open_clip(saved: FineAlign, kind: Score, folder: Path, aside: Path) -> Checked:
    """Write the model as an open_clip folder with classes, anchors and ``usage.py``, and check it.

    ``aside`` is a folder for temporary files. Raises ModelError when ``usage.py`` fails.
    """
    backbone = open_clip_backbone(saved)
    backbone.save(folder)
    write_classes(saved, kind, folder)
    write_anchors(saved, folder)
    tower = TEXT_TOWER if (folder / TEXT_TOWER).is_dir() else ""
    write_usage(saved, "open_clip", folder, text_tower=tower)
    texts = prompts(saved.texts_)[:TEXTS]
    expected = backbone.encode_sentences(texts).numpy()  # first, as it says so where the text tower is not to be had
    images = write_pictures(backbone.input_size, aside)
    outputs = run_usage(folder, aside, images, ENCODE, texts=texts)
    embeddings = normalize(torch.from_numpy(outputs["texts"]), dim=-1)
    name = backbone.config["text_cfg"].get("hf_model_name")
    note = (
        f"The text tower is one of transformers ({name}). usage.py builds it from {TEXT_TOWER}/. open_clip's own "
        "create_model asks a hub for its configuration, unless it is given text_cfg as in usage.py."
    )
    return Checked(
        {
            "scores": Measure(largest(outputs["scores"], own_scores(saved, images, kind)), COSINE),
            "text embeddings": Measure(largest(embeddings.numpy(), expected), COSINE),
        },
        (note,) if tower else (),
    )
