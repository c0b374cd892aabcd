"""Labels that are no class: images that seem to show none of the classes, and those whose class is too uncertain.

[ours]: the paper gives every image one of the classes. ``method/strangers.py`` says how ``none`` comes about.
"""

import math
from numbers import Real

from finealign.errors import ConfigError
from finealign.method.strangers import threshold
from finealign.model.fitted import FittedModel
from finealign.types import Explanation, Prediction, Reject

NONE_OF_THESE = "none of these"  # the label of an image that is refused
UNSURE = "unsure"  # the label of an image whose best class is less probable than asked for
DIGITS = 6  # of a confidence that are written, and held against the least one that is asked for
LIKELY = 0.5  # from which ``none`` on an image seems to show none of the classes


def read_reject(text: str | None) -> Reject | None:
    """Read what ``--reject`` was given. Raises ConfigError for what is neither ``auto`` nor a share."""
    if text is None or text == "auto":
        return check_reject(text)
    try:
        return check_reject(float(text))
    except ValueError:
        raise _invalid(text) from None


def check_reject(reject: object) -> Reject | None:
    """Return ``reject`` if it is None, "auto" or a share between 0 and 1. Raises ConfigError for anything else."""
    if reject is None or isinstance(reject, str):
        if reject is None or reject == "auto":
            return reject  # type: ignore[return-value]  # "auto", which mypy does not narrow to
    elif isinstance(reject, Real) and not isinstance(reject, bool):
        share = float(reject)
        if math.isfinite(share) and 0 < share < 1:
            return share
    raise _invalid(reject)


def _invalid(found: object) -> ConfigError:
    return ConfigError(
        f"reject: found {found!r:.100}. Valid: auto, which refuses images that likelier show none of the classes than "
        "one, or the share of images to refuse, above 0 and below 1, as 0.05."
    )


def cutoff(model: FittedModel, reject: Reject | None) -> float | None:
    """From which ``none`` on the model refuses an image, for "auto" or for a share of such images; None: never.

    The share is of images like those that the model was adapted to, so no image waits for others. Raises ConfigError
    for another value, for a model that cannot tell such images, and if a class is called "none of these" itself.
    """
    wanted = check_reject(reject)
    if wanted is None:
        return None
    _refuse_class(model, NONE_OF_THESE, "refused. Leave reject out and go by the column none")
    strangers = model.tells_strangers
    if strangers is None:
        raise ConfigError(
            f"This model ({model.using('adapted').name}) cannot tell images that show none of the classes, so it can "
            "refuse none. Wanted: a model of this release, by a method that trains, adapted to at least 12 images that "
            "differ. Adapt again so, or leave reject out."
        )
    return LIKELY if wanted == "auto" else threshold(strangers, wanted)


def least_confidence(model: FittedModel, wanted: float | None) -> float | None:
    """Return ``wanted`` if it is a probability above 0 and at most 1, or None: any class is good enough.

    Raises ConfigError for another value, and if a class is called "unsure" itself.
    """
    if wanted is None:
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, Real) or not 0 < float(wanted) <= 1:
        raise ConfigError(
            f"min_confidence: found {wanted!r:.100}. Valid: a probability above 0 and at most 1, as 0.5. Labels of "
            f"less are written as '{UNSURE}'."
        )
    _refuse_class(model, UNSURE, "not sure enough. Leave min_confidence out and go by the column confidence")
    return float(wanted)


def _refuse_class(model: FittedModel, label: str, of_what: str) -> None:
    """Raise ConfigError where a class is called as images are labelled that get no class."""
    for name in model.texts.classes:
        if name.strip().casefold() == label:
            raise ConfigError(
                f"A class is called {name!r}, which is also the label of images that are {of_what}, or adapt with "
                "another name for the class."
            )


def in_place_of_class(
    outcome: Prediction | Explanation, refused_from: float | None = None, unsure_below: float | None = None
) -> str | None:
    """The label of an image that gets no class: "none of these" before "unsure"; None for one that gets its class."""
    if refused_from is not None and outcome.none is not None and outcome.none >= refused_from:
        return NONE_OF_THESE
    if unsure_below is not None and round(float(outcome.probabilities.max()), DIGITS) < unsure_below:
        return UNSURE
    return None
