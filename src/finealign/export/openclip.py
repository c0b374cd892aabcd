"""An open_clip folder: the backbone as it is, with the class vectors beside it."""

from pathlib import Path

import torch
from torch.nn.functional import normalize

from finealign.classifier import FineAlign
from finealign.export.companions import write_anchors, write_classes, write_usage
from finealign.export.parity import COSINE, TEXTS, largest, own_scores, prompts, run_usage
from finealign.export.pictures import write_pictures
from finealign.export.record import Checked, Measure
from finealign.types import Score

ENCODE = "found['texts'] = usage.model.encode_text(usage.tokenizer(given['texts']))"


def write_open_clip(saved: FineAlign, kind: Score, folder: Path, aside: Path) -> Checked:
    backbone = saved.backbone_
    backbone.save(folder)
    write_classes(saved, kind, folder)
    write_anchors(saved, folder)
    write_usage("open_clip", folder)
    texts = prompts(saved.texts_)[:TEXTS]
    images = write_pictures(backbone.input_size, aside)
    found = run_usage(folder, aside, images, ENCODE, texts=texts)
    text = normalize(torch.from_numpy(found["texts"]), dim=-1)
    return Checked(
        {
            "scores": Measure(largest(found["scores"], own_scores(saved, images, kind)), COSINE),
            "text embeddings": Measure(largest(text.numpy(), backbone.encode_sentences(texts).numpy()), COSINE),
        }
    )
