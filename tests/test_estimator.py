"""FineAlign among scikit-learn's tools, held against scikit-learn itself."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import CLASSES, HANG, tiny_config, write_photos
from finealign import FineAlign
from finealign.errors import ConfigError, FinealignError, NotFittedError
from finealign.images.listing import list_images

sklearn = pytest.importorskip("sklearn")
from sklearn import exceptions  # noqa: E402
from sklearn.base import clone, is_classifier  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_predict  # noqa: E402
from sklearn.pipeline import Pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer  # noqa: E402
from sklearn.utils import estimator_checks  # noqa: E402
from sklearn.utils.validation import check_is_fitted  # noqa: E402


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return list(list_images(write_photos(tmp_path_factory.mktemp("estimator") / "photos", each=4)))


@pytest.fixture(scope="module")
def truth(paths: list[Path]) -> list[str]:
    return [path.parent.name for path in paths]


@pytest.fixture(scope="module")
def unfitted(tiny_backbone: Callable[[str], str]) -> FineAlign:
    return FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"), method__name="cupl"))


@pytest.mark.parametrize(
    "check",
    [
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_valid_tag_types",
    ],
)
def test_checks__that_do_not_fit_on_numbers(check: str) -> None:
    model = FineAlign(CLASSES)
    getattr(estimator_checks, check)("FineAlign", model)


def test_clone__has_the_same_arguments_and_is_not_fitted(unfitted: FineAlign, paths: list[Path]) -> None:
    fitted = clone(unfitted).fit(paths)
    again = clone(fitted)
    assert again.get_params().keys() == fitted.get_params().keys()
    assert again.classes == CLASSES and again.config == unfitted.config
    check_is_fitted(fitted)
    for model in (again, unfitted):
        with pytest.raises(exceptions.NotFittedError):
            check_is_fitted(model)


def test_predict__before_fit(unfitted: FineAlign) -> None:
    for error in (exceptions.NotFittedError, NotFittedError, FinealignError, ValueError, AttributeError):
        with pytest.raises(error, match="not fitted"):
            unfitted.predict(["a.png"])
    assert not hasattr(unfitted, "classes_")


def test_predict__before_fit_where_there_is_no_scikit_learn() -> None:
    code = """
import sys
sys.modules["sklearn"] = None
from finealign import FineAlign
from finealign.errors import NotFittedError
model = FineAlign(["a", "b"]).set_params(seed=3)
assert model.get_params()["seed"] == 3
try:
    model.predict(["a.png"])
except NotFittedError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=False)
    assert "is not fitted" in done.stdout, done.stderr


def test_set_params__a_wrong_name_changes_nothing(unfitted: FineAlign) -> None:
    model = clone(unfitted)
    for error in (ConfigError, ValueError):
        with pytest.raises(error, match=r"Unknown parameter 'sed'. Did you mean 'seed'\? Valid: backbone, classes"):
            model.set_params(method="fair", sed=3)
    assert model.method is None
    assert model.set_params(method="cupl", seed=3) is model
    assert [model.method, model.seed] == ["cupl", 3]


def test_repr__names_what_was_given() -> None:
    assert repr(FineAlign(["a", "b"], seed=3)) == "FineAlign(classes=['a', 'b'], seed=3)"


def test_pipeline__of_a_step_and_the_model(unfitted: FineAlign, paths: list[Path]) -> None:
    texts = [str(path) for path in paths]
    pipeline = Pipeline(
        [("paths", FunctionTransformer(lambda names: [Path(name) for name in names])), ("clip", clone(unfitted))]
    )
    expected = clone(unfitted).fit(paths).predict(paths).tolist()
    assert clone(pipeline).fit(texts).predict(texts).tolist() == expected
    pipeline.set_params(clip__seed=5, clip__config=None)
    assert pipeline.named_steps["clip"].seed == 5


def test_cross_val_predict__with_and_without_labels(unfitted: FineAlign, paths: list[Path], truth: list[str]) -> None:
    assert is_classifier(unfitted)
    expected = clone(unfitted).fit(paths).predict(paths).tolist()  # cupl learns nothing, so the folds do not matter
    images: list[Any] = [np.asarray(path) if index < 0 else path for index, path in enumerate(paths)]
    assert cross_val_predict(unfitted, images, cv=3).tolist() == expected
    assert cross_val_predict(unfitted, images, truth, cv=2).tolist() == expected
    column = np.array([str(path) for path in paths], dtype=object)
    assert cross_val_predict(unfitted, column, cv=2, method="predict_proba").shape == (12, 3)


def test_fit__ignores_labels(unfitted: FineAlign, paths: list[Path], truth: list[str]) -> None:
    with_labels = clone(unfitted).fit(paths, truth[::-1])
    np.testing.assert_array_equal(with_labels.predict_proba(paths), clone(unfitted).fit(paths).predict_proba(paths))


def test_grid_search__needs_a_measure_to_choose_by(unfitted: FineAlign, paths: list[Path], truth: list[str]) -> None:
    grid = {"templates": [["{}"], ["a photo of a {}"]]}
    with pytest.raises(TypeError, match="score"):
        GridSearchCV(unfitted, grid, cv=2).fit(paths, truth)
    found = GridSearchCV(unfitted, grid, cv=2, scoring="accuracy", error_score="raise").fit(paths, truth)
    assert found.best_params_ in [{"templates": value} for value in grid["templates"]]
    assert len(found.predict(paths)) == 12
