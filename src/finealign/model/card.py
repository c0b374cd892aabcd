"""The ``README.md`` of a saved model: a model card in the format of the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finealign import __version__
from finealign.backbone.base import Backbone
from finealign.backbone.model import OpenClipBackbone
from finealign.config import without_folder
from finealign.model.fitted import CALLED, OTHER, FittedModel
from finealign.model.known_labels import labels_in_words
from finealign.model.shares import shares_in_words, told_shares
from finealign.runtime.render import fill

CLASSES_SHOWN = 50
TAGS = "finealign", "clip", "fine-grained"
UNSUPERVISED, SUPERVISED = "unsupervised-adaptation", "few-shot-adaptation"


def model_card(
    model: FittedModel,
    run: Mapping[str, Any] | None = None,
    *,
    library: str = "open_clip",
    task: str = "zero-shot-image-classification",
    use: str | None = None,
) -> str:
    """Return the model card of a saved model, as Markdown.

    ``run`` is the content of ``run.json``, if the model was made by a run. For an export, ``library`` and ``task`` are
    the hub's names of the library that opens it and of its task, and ``use`` is the text of the card's section on use.
    An export holds the model in use alone.
    """
    from huggingface_hub import ModelCardData

    origin = (run or {}).get("origin") or model.backbone.origin
    data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=[*TAGS, SUPERVISED if model.learned_from else UNSUPERVISED],
        base_model=origin.get("repository"),
        ignore_metadata_errors=False,
    )
    classes, about = model.texts.classes, model if use else model.using("adapted")
    told = told_shares(about) if about.class_prior else None
    if told and run and run.get("class_prior"):
        told = run["class_prior"]
    values = {
        "metadata": data.to_yaml(),
        "version": __version__,
        "method": about.name,
        "backbone": without_folder(model.inference.backbone),
        "origin": origin,
        "images": run["images"] - run.get("set_aside", 0) if run else None,
        "classes": [_plain(name) for name in classes[:CLASSES_SHOWN]],
        "total": len(classes),
        "texts": sum(len(group) for group in model.texts.descriptions),
        "learned": about.learned,
        "shares": told and shares_in_words(told, [_plain(name) for name in classes]),
        "class_prior": about.class_prior,
        "used": CALLED[model.use],
        "other": OTHER[model.use],
        "labels": _labels_told(model, run),
        "run": run,
        "use": use,
        "given": _to_be_given(model.backbone),
    }
    return fill("finealign.model", "model_card.md.j2", values)


def _to_be_given(backbone: Backbone) -> str:
    """The path of the backbone's class; empty for one of open_clip, which the folder holds."""
    kind = type(backbone)
    return "" if kind is OpenClipBackbone else f"{kind.__module__}.{kind.__qualname__}"


def _labels_told(model: FittedModel, run: Mapping[str, Any] | None) -> str:
    """How many images with a label the model learned from, as a clause; empty if there were none."""
    if run and run.get("labels"):
        return labels_in_words(run["labels"], len(model.texts.classes))
    return f"{len(model.learned_from)} with a label" if model.learned_from else ""


def is_card(path: Path) -> bool:
    """Return whether a README.md is a model card written by finealign, which may be replaced."""
    try:
        head = path.read_text(encoding="utf-8")[:1000]
    except (OSError, ValueError):
        return False
    return head.startswith("---\n") and f"- {TAGS[0]}\n" in head


def _plain(text: str) -> str:
    """The text with Markdown's special characters escaped, so that it is shown literally."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()<>#+-.!|&~" else letter for letter in text)
