"""What scikit-learn asks of an estimator, without scikit-learn: parameters by name, and what kind of estimator it is.

Nothing here imports scikit-learn unless scikit-learn itself asks.
"""

import inspect
import sys
from typing import Any, Self

from finealign.errors import NotFittedError, ParameterError, unknown_name


class Estimator:
    """Parameters are the arguments of the constructor, each kept in an attribute of its name."""

    @classmethod
    def _parameter_names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor by name. ``deep`` changes nothing: none of them has parameters itself."""
        return {name: getattr(self, name) for name in self._parameter_names()}

    def set_params(self, **parameters: Any) -> Self:
        """Replace arguments of the constructor. A fitted model stays as it is until the next ``fit``.

        Raises ParameterError, which is a ConfigError and a ValueError, for a name that is none of them, before any is
        replaced.
        """
        names = self._parameter_names()
        for name in parameters:
            if name not in names:
                raise ParameterError(unknown_name("parameter", name, names))
        for name, value in parameters.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        given = {name: value for name, value in self.get_params().items() if value is not None}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r:.60}' for name, value in given.items())})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_predictor")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=False),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(two_d_array=False, string=True),
        )


def not_fitted(message: str) -> NotFittedError:
    """The error of a model that is not fitted; where scikit-learn is in use, one of its own NotFittedErrors as well."""
    theirs = getattr(sys.modules.get("sklearn.exceptions"), "NotFittedError", None)
    if theirs is None:
        return NotFittedError(message)
    both: type[NotFittedError] = type("NotFittedError", (NotFittedError, theirs), {"__module__": __name__})
    return both(message)
