"""``README.md`` of a saved model: a model card in the form the Hugging Face hub reads."""

from collections.abc import Mapping
from typing import Any

from finealign import __version__
from finealign.config import without_folder
from finealign.model_folder import SavedModel

CLASSES_SHOWN = 50


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
    from jinja2 import Environment, PackageLoader, StrictUndefined

    origin = (run or {}).get("origin") or model.backbone.origin
    data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=["finealign", "clip", "fine-grained", "unsupervised-adaptation"],
        base_model=origin.get("repository"),
        ignore_metadata_errors=False,
    )
    environment = Environment(
        loader=PackageLoader("finealign", "pages"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("model_card.md.j2")
    classes = model.texts.classes
    return template.render(
        metadata=data.to_yaml(),
        version=__version__,
        method=model.config.method.name,
        backbone=without_folder(model.config.backbone),
        origin=origin,
        classes=[_plain(name) for name in classes[:CLASSES_SHOWN]],
        total=len(classes),
        texts=sum(len(group) for group in model.texts.descriptions),
        norms=bool(model.start_norms),
        run=run,
        use=use,
    )


def _plain(text: str) -> str:
    """A name as Markdown shows it, whatever it holds."""
    return "".join(f"\\{one}" if one in "\\`*_{}[]()<>#+-.!|" else one for one in text)
