"""Image-text models: loading, encoding and saving."""

from finealign.backbone.base import Backbone
from finealign.backbone.load import load_backbone

__all__ = ["Backbone", "load_backbone"]
