"""``README.md`` of a saved model: a model card in the form the Hugging Face hub reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finealign import __version__
from finealign.config import Config, without_folder
from finealign.methods import Method
from finealign.model_folder import SavedModel
from finealign.templates import fill

CLASSES_SHOWN = 50
TAGS = "finealign", "clip", "fine-grained", "unsupervised-adaptation"


def model_card(
    model: SavedModel,
    run: Mapping[str, Any] | None = None,
    *,
    library: str = "open_clip",
    task: str = "zero-shot-image-classification",
    use: str | None = None,
) -> str:
    """The card of a saved model. ``run`` is what ``run.json`` knows of how it was made, where there was a run.

    Of an export: ``library`` and ``task`` are the hub's names for what opens it and what it does, and ``use`` is what
    the card says of its use.
    """
    from huggingface_hub import ModelCardData

    origin = (run or {}).get("origin") or model.backbone.origin
    data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=list(TAGS),
        base_model=origin.get("repository"),
        ignore_metadata_errors=False,
    )
    classes = model.texts.classes
    values = {
        "metadata": data.to_yaml(),
        "version": __version__,
        "method": model.config.method.name,
        "backbone": without_folder(model.config.backbone),
        "origin": origin,
        "images": run["images"] - run.get("set_aside", 0) if run else None,
        "classes": [_plain(name) for name in classes[:CLASSES_SHOWN]],
        "total": len(classes),
        "texts": sum(len(group) for group in model.texts.descriptions),
        "learned": what_learned(model.config, model.method),
        "run": run,
        "use": use,
    }
    return fill("model_card.md.j2", values)


def is_card(path: Path) -> bool:
    """Whether a README.md is one of ours, which may be renewed."""
    try:
        head = path.read_text(encoding="utf-8")[:1000]
    except (OSError, ValueError):
        return False
    return head.startswith("---\n") and f"- {TAGS[0]}\n" in head


def what_learned(config: Config, method: Method) -> str:
    """What of the model differs from where it started, in words."""
    if method.surveys and not method.trains:
        return "a vector for each class, from all images at once"
    if not method.trains:
        return "nothing"
    if config.training.encoder == "frozen" or config.training.learn == "anchors":
        parts = ["a vector for each class"]
    else:
        parts = ["scale and shift of the image tower's normalisation layers"]
        parts += ["a vector for each class"] * (config.training.learn == "norms+anchors")
    return " and ".join([*parts, *["tokens shown with each image"] * (method.prompts is not None)])


def _plain(text: str) -> str:
    """A name as Markdown shows it, whatever it holds."""
    return "".join(f"\\{one}" if one in "\\`*_{}[]()<>#+-.!|&~" else one for one in text)
