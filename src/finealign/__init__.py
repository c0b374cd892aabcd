"""finealign: fine-grained adaptation of CLIP-like models from unlabelled images and class names."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FineAlign", "__version__"]

if TYPE_CHECKING:
    from finealign.classifier import FineAlign


def __getattr__(name: str) -> Any:
    """Import the classifier, and torch with it, only when it is asked for."""
    if name == "FineAlign":
        from finealign.classifier import FineAlign

        return FineAlign
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
