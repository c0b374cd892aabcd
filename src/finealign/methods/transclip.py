"""TransCLIP, zero-shot (Zanella et al., NeurIPS 2024, arXiv 2406.01837): labels all images jointly, trains nothing.

It assumes that every class is among the images: where many are absent, it ends below its start. The published figures
are those of its authors' solver in the code of StatA, in which the class means start from the texts.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from finealign.method.transductive import SharedVarianceMethod


class Transclip(SharedVarianceMethod):
    """The assignments of ``TransductiveMethod``, with one diagonal covariance that all classes share."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}}  # the defaults are the published values


METHOD = Transclip
