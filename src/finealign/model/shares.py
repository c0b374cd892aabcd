"""The shares of the classes that a model expects, as values for ``run.json`` and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from finealign.config import Config
from finealign.model.fitted import FittedModel

LARGEST = 3  # classes that are named
DIGITS = 6
SOURCE = {"auto": "estimated without labels; ", "given": "as they were given; "}
EVEN = {"auto": ", as the images did not clearly speak for others", "given": ", as they were given"}


def told_shares(model: FittedModel, config: Config | None = None) -> dict[str, Any] | None:
    """The shares that the adapted model expects as JSON values; None if its method expects none.

    ``kind`` is that of ``method.class_prior`` in ``config``: "auto" for an estimate, "even" or "given"; None if no
    configuration is given. ``shares`` has one number a class. ``taught`` is whether the loss drew predictions to them.
    """
    adapted = model.using("adapted")
    shares = adapted.method.class_prior
    if shares is None:
        return None
    asked = config.method.options.get("class_prior") if config else None
    return {
        "kind": "given" if isinstance(asked, Mapping) else asked,
        "shares": [round(share, DIGITS) for share in shares.tolist()],
        "taught": adapted.inference.images > 0,
    }


def shares_in_words(told: Mapping[str, Any], classes: Sequence[str]) -> str:
    """What ``told_shares`` tells as a clause: where the shares are from, and the classes of the largest ones."""
    shares: Sequence[float] = told["shares"]
    if min(shares) == max(shares):
        return f"even{EVEN.get(told['kind'], '')}"
    order = sorted(range(len(shares)), key=lambda index: -shares[index])[:LARGEST]
    largest = ", ".join(f"{classes[index]} {shares[index]:.1%}" for index in order)
    unused = "" if told["taught"] else "; the loss did not use them"
    return f"{SOURCE.get(told['kind'], '')}the largest are {largest}{unused}"
