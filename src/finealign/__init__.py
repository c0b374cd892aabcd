"""finealign: fine-grained adaptation of CLIP-like models from unlabelled images and class names.

The public names are those listed in ``__all__``, here and in ``finealign.method``. Everything else may change between
releases.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finealign import errors, testing, types
    from finealign.backbone.base import Backbone
    from finealign.backbone.load import load_backbone
    from finealign.backbone.tower_backbone import TowerBackbone
    from finealign.classifier import FineAlign
    from finealign.config import read_config
    from finealign.evaluate.summary import evaluate_predictions
    from finealign.evaluate.truth import read_truth
    from finealign.images.sources import find_images
    from finealign.method.registry import register
    from finealign.model.prepare import Prepared
    from finealign.run.adapt import adapt_into
    from finealign.run.report import write_report
    from finealign.run.verdict import judge_model
    from finealign.runtime.distributed import Ranks

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "FineAlign",
    "Prepared",
    "Ranks",
    "TowerBackbone",
    "__version__",
    "adapt_into",
    "errors",
    "evaluate_predictions",
    "find_images",
    "judge_model",
    "load_backbone",
    "read_config",
    "read_truth",
    "register",
    "testing",
    "types",
    "write_report",
]

_PLACES = {
    "Backbone": "backbone.base",
    "FineAlign": "classifier",
    "Prepared": "model.prepare",
    "Ranks": "runtime.distributed",
    "TowerBackbone": "backbone.tower_backbone",
    "adapt_into": "run.adapt",
    "evaluate_predictions": "evaluate.summary",
    "find_images": "images.sources",
    "judge_model": "run.verdict",
    "load_backbone": "backbone.load",
    "read_config": "config",
    "read_truth": "evaluate.truth",
    "register": "method.registry",
    "write_report": "run.report",
}
__path__.append(str(Path(__file__).parent / "moved"))  # deprecated import paths are modules in this folder


def __getattr__(name: str) -> Any:
    """Import a public name, and torch with it, only when it is accessed, so that the package itself imports fast."""
    if name in ("errors", "testing", "types"):
        return import_module(f"{__name__}.{name}")
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
