"""Methods and backbones from outside the package: found, refused by a sentence, trained, saved, opened without them."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from conftest import CLASSES, write_photos
from finealign import FineAlign, adapt_into, load_backbone, read_config, register
from finealign.config import MethodSettings, make_config
from finealign.errors import BackboneError, CautionWarning, ConfigError, ModelError
from finealign.method import registry
from finealign.method.alignment import class_means
from finealign.method.base import Method, MethodOptions, SelfTrainingMethod, SelfTrainingOptions
from finealign.method.registry import (
    bare_method,
    broken_plug_ins,
    create_method,
    describe_methods,
    find_method,
    method_names,
    method_options,
    method_settings,
    name_of,
    require_class_prior,
)
from finealign.methods import lafter
from finealign.methods.fair import Fair
from finealign.model.prepare import check_settings
from finealign.testing import CheckError, check_backbone, check_method
from finealign.testing.methods import texts
from finealign.testing.toy import ToyBackbone
from finealign.types import Gaze, ImageFeatures, Loss, PseudoLabels, Score, TextFeatures
from test_cli import command

PLUG_IN = """
from typing import Annotated, Any

import torch
from pydantic import Field

from finealign.method.alignment import class_means, global_score
from finealign.method.base import SelfTrainingMethod, SelfTrainingOptions


class HalfOptions(SelfTrainingOptions):
    keep: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="share")


class Half(SelfTrainingMethod):
    '''Labels whole images.'''

    Options = HalfOptions
    presets = {"short": {"training": {"epochs": 1}, "method": {"keep": 0.25}}}

    def __init__(self, options: Any, texts: Any, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)[:, None]
        super().__init__(options, texts, means, logit_scale=logit_scale)

    @torch.no_grad()
    def pseudo_label(self, features: Any) -> Any:
        return self.fully_believed(self.probabilities(global_score(features.weak, self.classifier())))
"""


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


class Site:
    """A folder of installed packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def install(self, package: str, points: Mapping[str, str], source: str = PLUG_IN, module: str = "") -> None:
        """A package of version 1.5 with entry points and, where it is named, one module."""
        info = self.folder / f"{package.replace('-', '_')}-1.5.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n", encoding="utf-8")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[finealign.methods]\n{lines}", encoding="utf-8")
        if module:
            (self.folder / f"{module}.py").write_text(source, encoding="utf-8")
            self.modules.append(module)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site(tmp_path / "site-packages")
    made.folder.mkdir()
    monkeypatch.syspath_prepend(str(made.folder))
    yield made
    for module in made.modules:
        sys.modules.pop(module, None)


# --- methods of packages ----------------------------------------------------------------------------------------------


def test_find_method__a_package_is_imported_when_its_method_is_asked_for(site: Site) -> None:
    site.install("half-package", {"half": "half_module:Half"}, module="half_module")
    assert "half" in method_names()
    find_method("fair")
    assert method_settings("dpa@published")["method"]["name"] == "dpa"
    assert "half_module" not in sys.modules
    assert find_method("half").__name__ == "Half"
    assert "half_module" in sys.modules
    row = next(row for row in describe_methods() if row["name"] == "half")
    assert row == {
        "name": "half",
        "presets": ["short"],
        "trains": True,
        "about": "Labels whole images.",
        "from": "half-package 1.5",
    }
    assert name_of(find_method("half")) == "half"


def test_settings__of_a_plug_in_are_checked_as_ours_are(site: Site) -> None:
    site.install("half-package", {"half": "half_module:Half"}, module="half_module")
    config = read_config(overrides=["method.keep=0.75"], base=method_settings("half@short"))
    checked = check_settings(config, {})
    assert (checked.method.options["keep"], checked.training.epochs) == (0.75, 1)
    with pytest.raises(ConfigError, match=r"method\.kep: Unknown setting 'kep'. Did you mean 'keep'\?"):
        method_options(read_config(overrides=["method.name=half", "method.kep=1"]).method)
    with pytest.raises(ConfigError, match=r"method\.keep: found 2\. .*less than or equal to 1"):
        method_options(read_config(overrides=["method.name=half", "method.keep=2"]).method)
    with pytest.raises(ConfigError, match="half@short"):
        method_settings("half@published")
    require_class_prior("half")


BROKEN = [
    ("from nowhere_at_all import x", "bad:Half", "cannot be imported from 'bad:Half': ModuleNotFoundError"),
    ("1 / 0", "bad:Half", "ZeroDivisionError"),
    ("raise SystemExit(3)", "bad:Half", "SystemExit"),
    ("", "bad:Half", "AttributeError"),
    ("class Half: pass", "bad:Half", "no method. Wanted: a subclass of finealign.method.base.Method"),
    ("def Half(): pass", "bad:Half", "no method"),
    ("from finealign.method.base import Method as Half", "bad:Half", "no method"),
    (PLUG_IN + "\nHalf.Options = dict", "bad:Half", "whose Options are <class 'dict'>"),
]


@pytest.mark.parametrize(("source", "value", "message"), BROKEN)
def test_find_method__a_broken_plug_in_is_named_and_stops_no_other(
    site: Site, source: str, value: str, message: str
) -> None:
    site.install("bad-package", {"half": value}, source, module="bad")
    with pytest.raises(ConfigError) as raised:
        FineAlign(CLASSES, method="half").check()
    assert "the plug-in 'half' of bad-package 1.5" in str(raised.value)
    assert message in str(raised.value)
    assert broken_plug_ins() == [str(raised.value)]
    assert FineAlign(CLASSES, method="fair").check()[1].method.name == "fair"
    assert "half" not in {row["name"] for row in describe_methods()}
    with pytest.raises(ConfigError, match="expects no shares"):
        require_class_prior("cupl")


def test_find_method__two_packages_with_one_name_are_both_named(site: Site) -> None:
    site.install("half-package", {"half": "half_module:Half"}, module="half_module")
    site.install("other-package", {"half": "half_module:Half"})
    with pytest.raises(
        ConfigError, match=r"'half' of (half|other)-package 1.5 is also offered by (half|other)-package"
    ):
        find_method("half")


@pytest.mark.parametrize("name", ["a@b", "a b", "../a"])
def test_find_method__a_name_that_no_run_can_have_is_refused(site: Site, name: str) -> None:
    site.install("odd-package", {name: "half_module:Half"}, module="half_module")
    with pytest.raises(ConfigError, match=r"odd-package 1.5 has no name that a method can have"):
        find_method(name)
    assert "half_module" not in sys.modules


def test_clash__stops_who_asks_for_that_name_and_warns_all_others(site: Site) -> None:
    site.install("grabbing", {"dpa": "half_module:Half"}, module="half_module")
    with pytest.raises(ConfigError, match=r"grabbing 1.5 offers a plug-in 'dpa', which is the name of a method of"):
        FineAlign(CLASSES, method="dpa").check()
    with pytest.warns(CautionWarning, match="grabbing 1.5 offers a plug-in 'dpa'"):
        assert FineAlign(CLASSES).check()[1].method.name == "fair"
    assert find_method("dpa").__module__ == "finealign.methods.dpa"
    assert len(broken_plug_ins()) == 1
    assert "half_module" not in sys.modules


def test_methods__lists_plug_ins_and_what_is_wrong_with_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("half-package", {"half": "half_module:Half"}, module="half_module")
    site.install("bad-package", {"worse": "bad:Half"}, "1 / 0", module="bad")
    monkeypatch.setenv("COLUMNS", "250")
    shown = command("methods")
    assert "half-package 1.5" in shown.stdout
    assert "worse" not in shown.stdout
    assert "'worse' of bad-package 1.5 cannot be imported" in shown.stderr
    found = json.loads(command("methods", "--json").stdout)
    assert len(found["broken"]) == 1
    assert {row["from"] for row in found["methods"]} == {"finealign", "half-package 1.5"}


# --- classes and instances --------------------------------------------------------------------------------------------


class Whole(SelfTrainingMethod):
    """Labels whole images by the learned anchors."""

    def __init__(self, options: SelfTrainingOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)[:, None]
        super().__init__(options, texts, means, logit_scale=logit_scale)

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        return self.fully_believed(self.probabilities(self.score(features, "global")))


class Adapter(Method):
    """Learns a matrix for the features, and has no class vectors."""

    scores = ("global",)
    texts: Tensor

    def __init__(self, options: MethodOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        self.register_buffer("texts", class_means(texts.descriptions, texts.class_of, texts.num_classes))
        self.matrix = nn.Parameter(torch.eye(self.texts.shape[1]))

    @property
    def learns(self) -> str:
        return "a matrix for the features"

    def _score(self, weak: Tensor) -> Tensor:
        return normalize(weak @ self.matrix, dim=-1) @ self.texts.T

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        return self._score(features.weak)

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        return SelfTrainingMethod.fully_believed(self.probabilities(self._score(features.weak)))

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        each = cross_entropy(self.logit_scale * self._score(strong), pseudo.labels, reduction="none")
        return Loss((pseudo.weights * each).mean())


class Entropy(Method):
    """Learns nothing of its own: the normalisation alone."""

    scores = ("global",)
    texts: Tensor

    def __init__(self, options: MethodOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        self.register_buffer("texts", class_means(texts.descriptions, texts.class_of, texts.num_classes))

    def classifier(self) -> Tensor:
        return self.texts[:, None]

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        return SelfTrainingMethod.fully_believed(self.probabilities(features.weak @ self.texts.T))

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        probabilities = self.probabilities(strong @ self.texts.T)
        return Loss(-(probabilities * probabilities.clamp_min(1e-9).log()).sum(1).mean())


def config(**more: Any) -> Any:
    values: dict[str, Any] = {
        "views": {"crops": 2},
        "data": {"cache": "temporary"},
        "training": {"epochs": 2, "batch_size": 6, "anchor_steps": 4, "learning_rate": 1e-2},
        "prediction": {"calibrate": False},
    }
    return make_config(values | more)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "all", each=4)


def toy(kind: Any = None, **more: Any) -> FineAlign:
    return FineAlign(CLASSES, method=kind, backbone=ToyBackbone(), config=config(**more))


def test_register__what_cannot_be_registered_is_refused(site: Site) -> None:
    site.install("half-package", {"half": "half_module:Half"}, module="half_module")
    register("whole", Whole)
    for name, kind, message in [
        ("fair", Whole, "'fair' is a method of finealign"),
        ("whole", Adapter, "'whole' is registered for .*:Whole"),
        ("half", Whole, "'half' is a method of half-package 1.5"),
        ("a@b", Whole, "cannot be the name of a method"),
        ("other", dict, "no method"),
    ]:
        with pytest.raises(ConfigError, match=message):
            register(name, kind)
    again = type("Whole", (Whole,), {"__module__": Whole.__module__, "__qualname__": Whole.__qualname__})
    register("whole", again)  # as a cell of a notebook that is run again
    assert find_method("whole") is again


def test_name_of__a_class_has_the_name_it_is_known_by() -> None:
    assert name_of(Fair) == "fair"
    assert name_of(type("KNNByCrops", (Whole,), {})) == "knn-by-crops"
    register("other", Whole)
    assert name_of(Whole) == "other"
    with pytest.raises(ConfigError, match=r"'fair' is a method of finealign.*register\(\) with another name"):
        name_of(type("Fair", (Whole,), {}))


def test_fit__a_name_a_class_and_an_instance_are_one_method(photos: Path) -> None:
    register("whole", Whole)
    by_name = toy("whole", method={"name": "whole", "fairness_weight": 0.5}).fit(photos)
    by_class = toy(Whole, method={"fairness_weight": 0.5}).fit(photos)
    options = SelfTrainingOptions(fairness_weight=0.5)
    made = Whole(options, by_name.text_features_, logit_scale=ToyBackbone.logit_scale)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    model = toy(made)
    by_instance = model.fit(photos)
    expected = by_name.predict_proba(photos)
    for other in (by_class, by_instance, model.fit(photos)):
        np.testing.assert_array_equal(other.predict_proba(photos), expected)
        assert other.model_.name == "whole"
        assert other.config_.method.options["fairness_weight"] == 0.5
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_fit__an_instance_of_other_texts_or_options_is_refused(photos: Path) -> None:
    other = Whole(SelfTrainingOptions(), texts(5), logit_scale=20.0)
    with pytest.raises(
        ConfigError, match=r"made for other texts or another backbone: its 'anchors' is of shape \(5, 1"
    ):
        toy(other).fit(photos)
    with pytest.raises(ConfigError, match=r"method\.fairness_weight=3\.0 contradicts the instance"):
        toy(other, method={"fairness_weight": 3.0}).check()
    with pytest.raises(ConfigError, match="no method"):
        toy(dict).check()
    with pytest.raises(ConfigError, match="method='whole' contradicts config, which has 'dpa'"):
        toy(Whole, method={"name": "dpa"}).check()


def test_capabilities__are_what_is_overridden() -> None:
    told = {name: (kind.trains, kind.surveys) for name in method_names() if (kind := find_method(name))}
    assert {name for name, (trains, _) in told.items() if trains} == {
        "dpa",
        "fair",
        "gta-clip",
        "lafter",
        "microclip",
        "must",
        "pouf",
        "reclip",
        "self-training",
        "upl",
    }
    assert {name for name, (_, surveys) in told.items() if surveys} == {
        "dpa",
        "gta-clip",
        "reclip",
        "stata",
        "transclip",
        "upl",
        "linear-probe",
        "tip-adapter",
        "transclip-few-shot",
    }
    assert (Adapter.trains, Adapter.surveys, Adapter.has_classifier) == (True, False, False)


def test_lafter__trains_on_texts_in_study_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    studied = create_method(MethodSettings(name="lafter", text_steps=2), texts(3), logit_scale=20.0)
    monkeypatch.setattr(lafter, "text_classifier", lambda *_, **__: pytest.fail("it trains"))
    bare = bare_method(MethodSettings(name="lafter", text_steps=2), texts(3), logit_scale=20.0)
    bare.load_inference_tensors(studied.inference_tensors())
    assert torch.equal(bare.classifier(), studied.classifier())


def test_fit__a_method_without_class_vectors_has_no_verdict(photos: Path, tmp_path: Path) -> None:
    summary = adapt_into(tmp_path / "run", toy(Adapter), photos)
    assert summary.verdict is None
    assert summary.why_kept == "there is no verdict on adapter, which has no class vectors"
    assert summary.kept == "adapted"
    model = summary.model
    assert (
        model.model_.learned
        == "scale and shift of the image tower's normalisation layers and a matrix for the features"
    )
    assert not torch.equal(model.method_.get_parameter("matrix"), torch.eye(8))
    told = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert told["method"] == "adapter"
    assert told["versions"]["method"].endswith(":Adapter")
    opened = FineAlign.load(tmp_path / "run", backbone=ToyBackbone())
    np.testing.assert_array_equal(opened.predict_proba(photos), model.predict_proba(photos))


def test_fit__a_method_without_parameters_learns_by_the_normalisation(photos: Path) -> None:
    model = toy(Entropy, prediction={"calibrate": True}).fit(photos)
    assert any(not torch.equal(value, model.start_norms_[name]) for name, value in model.norms_.items())
    assert model.calibration_ is not None
    training = {"epochs": 1, "learn": "anchors"}
    with pytest.raises(ConfigError, match=r"Nothing would learn: the method 'entropy' has no parameters"):
        toy(Entropy, training=training).fit(photos)


# --- saved models of methods that are not there -----------------------------------------------------------------------


@pytest.mark.parametrize("use", ["adapted", "start"])
def test_load__without_the_plug_in_predicts_the_same(photos: Path, tmp_path: Path, use: Any) -> None:
    register("whole", Whole)
    model = toy("whole", method={"name": "whole", "whole_share": 0.25}).fit(photos).use(use)
    model.save(tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / "finealign.json").read_text(encoding="utf-8"))
    assert manifest["inference"]["method"]["name"] == "whole"
    assert manifest["plug_in"]["origin"].endswith("test_plug_ins:Whole")
    registry._registered.clear()
    opened = FineAlign.load(tmp_path / "model", backbone=ToyBackbone())
    opened.save(tmp_path / "again")
    for there in (opened, FineAlign.load(tmp_path / "again", backbone=ToyBackbone())):
        assert there.use_ == use
        for taken in ("adapted", "start"):
            for score in ("global", "las", "fused") if taken == "adapted" else ("global",):
                expected = model.use(taken).predict_proba(photos, score=score)
                found = there.use(taken).predict_proba(photos, score=score)
                np.testing.assert_array_equal(found, expected)
        assert there.use("adapted").class_prior_ == "folder"
        with pytest.raises(ConfigError, match="has no score 'most'"):
            there.predict(photos, score="most")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Unknown method 'whole'"):
        opened.fit(photos)
    register("whole", Whole)
    np.testing.assert_array_equal(
        FineAlign.load(tmp_path / "again", backbone=ToyBackbone(), use="adapted").predict_proba(photos),
        model.use("adapted").predict_proba(photos),
    )


def test_load__without_a_plug_in_that_scores_in_its_own_way_says_what_to_install(photos: Path, tmp_path: Path) -> None:
    toy(Adapter).fit(photos).save(tmp_path / "model")
    registry._registered.clear()
    with pytest.raises(
        ModelError, match=r"'adapter' of the class .*:Adapter, which is not here.*Install it, or register"
    ):
        FineAlign.load(tmp_path / "model", backbone=ToyBackbone())


@pytest.mark.parametrize("spoilt", ["anchors", "whole_share"])
def test_load__what_stands_for_a_plug_in_is_checked(photos: Path, tmp_path: Path, spoilt: str) -> None:
    from safetensors.torch import load_file, save_file

    from finealign.model.folder import _sha256

    toy(Whole).unlearned().save(tmp_path / "model")
    registry._registered.clear()
    tensors, manifest = tmp_path / "model" / "finealign.safetensors", tmp_path / "model" / "finealign.json"
    values = load_file(tensors)
    values[f"plain.{spoilt}"] = torch.full_like(values[f"plain.{spoilt}"], float("nan"))
    save_file(values, tensors)
    told = json.loads(manifest.read_text(encoding="utf-8"))
    told["sha256"]["finealign.safetensors"] = _sha256(tensors)
    manifest.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(ModelError, match="not finite"):
        FineAlign.load(tmp_path / "model", backbone=ToyBackbone())


# --- check_method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [(Fair, {}), (Adapter, {}), (Entropy, {}), (find_method("wca"), {})])
def test_check_method__passes_a_whole_method(kind: type[Method], options: dict[str, Any]) -> None:
    check_method(kind, **options)


class AsksForLabels(Whole):
    """A label too many."""

    def loss(self, strong: Tensor, pseudo: PseudoLabels, truth: Tensor) -> Loss:  # type: ignore[override]
        return super().loss(strong, pseudo)


class NotFinite(Whole):
    """A loss that is no number."""

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        return Loss(super().loss(strong, pseudo).total * float("nan"))


class Forgets(Whole):
    """A count that is neither saved nor loaded."""

    seen = 1.0

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        self.seen += 1
        return Loss(super().loss(strong, pseudo).total * self.seen)


class LeavesOut(Whole):
    """The anchors are missing from what is saved."""

    training_state = (*Whole.training_state, "anchors")


class Draws(Whole):
    """Anchors that differ each time."""

    def study(self, texts: TextFeatures) -> None:
        self.anchors.data.add_(torch.randn_like(self.anchors))


class Hides(Whole):
    """A tensor that is no state."""

    def study(self, texts: TextFeatures) -> None:
        self.kept = texts.names.clone()


class Spoils(Whole):
    """The texts are changed."""

    def study(self, texts: TextFeatures) -> None:
        texts.names.zero_()


class NeedsCrops(Whole):
    """Crops are used and not asked for."""

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        return self.fully_believed(self.probabilities(features.crops[:, 0] @ self.classifier()[:, 0].T))


class LooksAround(Whole):
    """Scores that depend on the other images."""

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        scores = super().score(features, kind)
        return scores - scores.mean(0)


class Carries(Whole):
    """Labels with a gradient."""

    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        probabilities = self.probabilities(self.score(features, "global"))
        return PseudoLabels(probabilities.argmax(1), torch.ones(len(probabilities)), probabilities)


class WrongScores(Whole):
    """A score that there is not."""

    scores = ("best",)  # type: ignore[assignment]


class NoLabels(Method):
    """A loss of no labels."""

    def classifier(self) -> Tensor:
        return torch.ones(1)

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        return Loss(strong.sum())


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (AsksForLabels, "Its loss asks for truth, which it is never given"),
        (NotFinite, "Its loss .*is nan"),
        (Forgets, "Loaded again, it goes on otherwise"),
        (LeavesOut, "Saved and loaded, its score 'global' differs"),
        (Draws, "Made twice, its 'anchors' differs"),
        (Hides, "It keeps a tensor in 'kept'"),
        (Spoils, "It changes the texts' names in place"),
        (NeedsCrops, "It fails to take steps"),
        (LooksAround, "Its score 'global' of an image depends on the images beside it"),
        (Carries, "Its labels carry a gradient"),
        (WrongScores, r"Its scores are \('best',\)"),
        (NoLabels, "It has a loss and no pseudo_label"),
        (Method, "no method"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_check_method__names_the_fault(kind: type[Method], fault: str) -> None:
    with pytest.raises(CheckError, match=fault):
        check_method(kind)


def test_check_method__a_wrong_option_or_preset_is_a_fault() -> None:
    with pytest.raises(CheckError, match="Unknown setting 'keep'"):
        check_method(Whole, keep=1)
    odd = type("Odd", (Whole,), {"presets": {"mine": {"training": {"epoch": 1}}}})
    with pytest.raises(CheckError, match="Unknown setting 'epoch'"):
        check_method(odd)


# --- backbones --------------------------------------------------------------------------------------------------------


def test_backbone__of_another_kind_is_fitted_saved_and_given_again(photos: Path, tmp_path: Path) -> None:
    backbone = ToyBackbone()
    untouched = {name: value.clone() for name, value in backbone.weights().items()}
    model = FineAlign(CLASSES, backbone=backbone, config=config()).fit(photos)
    assert model.model_.inference.backbone == "toy"
    expected = {use: model.use(use).predict_proba(photos) for use in ("start", "adapted")}
    assert not np.allclose(expected["start"], expected["adapted"], atol=1e-3)
    assert all(torch.equal(value, untouched[name]) for name, value in backbone.weights().items())
    folder = tmp_path / "model"
    for used in ("adapted", "start"):
        model.use(used).save(folder)
        opened = FineAlign.load(folder, backbone=ToyBackbone())
        assert opened.use_ == used
        for use, probabilities in expected.items():
            np.testing.assert_array_equal(opened.use(use).predict_proba(photos), probabilities)  # type: ignore[arg-type]
    assert "backbone=BACKBONE" in (folder / "README.md").read_text(encoding="utf-8")
    assert "open_clip.create_model" not in (folder / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "backbone",
        "finealign.json",
        "finealign.safetensors",
    }
    np.testing.assert_array_equal(opened.fit(photos).predict_proba(photos).shape, expected["start"].shape)


def test_backbone__a_missing_or_another_one_is_refused(photos: Path, tmp_path: Path, tiny_backbone: Any) -> None:
    toy(Fair).unlearned().save(tmp_path / "model")
    with pytest.raises(ModelError, match=r"class finealign.testing.toy.ToyBackbone.*FineAlign.load\(folder, backbone="):
        FineAlign.load(tmp_path / "model")
    other = ToyBackbone()
    other._words.add_(1)
    with pytest.raises(ModelError, match="adapted from other weights"):
        FineAlign.load(tmp_path / "model", backbone=other)
    failed = command("predict", str(tmp_path / "model"), str(photos))
    assert failed.exit_code == 1
    assert "ToyBackbone" in failed.stderr
    assert "Traceback" not in failed.stderr
    identifier = tiny_backbone("transformer")
    FineAlign(CLASSES, backbone=load_backbone(identifier), config=config()).unlearned().save(tmp_path / "own")
    FineAlign.load(tmp_path / "own")
    with pytest.raises(ModelError, match="holds its own backbone"):
        FineAlign.load(tmp_path / "own", backbone=ToyBackbone())


def test_backbone__what_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="backbone is int, no name and no Backbone: it lacks identifier"):
        FineAlign(CLASSES, backbone=3).check()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="device='cuda' is not that of the backbone"):
        FineAlign(CLASSES, backbone=ToyBackbone(), device="cuda").check()
    with pytest.raises(ConfigError, match="precision='bf16' is not that of the backbone"):
        FineAlign(CLASSES, backbone=ToyBackbone(), precision="bf16").check()
    with pytest.raises(ConfigError, match="backbone='toy' contradicts config"):
        FineAlign(CLASSES, backbone=ToyBackbone(), config=config(backbone="ViT-B-32/openai")).check()


def test_check_backbone__passes_ours_and_the_toy(tiny_backbone: Any) -> None:
    check_backbone(ToyBackbone())
    for precision in ("fp32", "bf16"):  # whichever this processor would take by itself
        check_backbone(load_backbone(tiny_backbone("transformer"), precision=precision))


class Unequal(ToyBackbone):
    """Not of length 1."""

    def encode_images(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        return 2 * super().encode_images(images, gaze)


class Restless(ToyBackbone):
    """Otherwise every time."""

    def encode_images(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        return normalize(super().encode_images(images, gaze) + 0.1 * torch.randn(len(images), self.embed_dim), dim=-1)


class Neighbourly(ToyBackbone):
    """By the images beside it."""

    def encode_images(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        features = super().encode_images(images, gaze)
        return normalize(features + features.mean(0), dim=-1)


class Keeping(ToyBackbone):
    """What is lent is not given back."""

    def lend(self, norms: Mapping[str, Tensor]) -> Any:
        self.load_norms(norms)
        return super().lend({})


class Deaf(ToyBackbone):
    """What is lent changes nothing."""

    def lend(self, norms: Mapping[str, Tensor]) -> Any:
        return super().lend({})


class Backwards(ToyBackbone):
    """Sentences in another order."""

    def encode_sentences(self, sentences: Sequence[str]) -> Tensor:
        return (
            super().encode_sentences(sentences).flip(0) if len(sentences) == 3 else super().encode_sentences(sentences)
        )


class Cut(ToyBackbone):
    """No gradient."""

    def encode_images(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        with torch.no_grad():
            return super().encode_images(images, gaze)


class Large(ToyBackbone):
    """Another size than its images have."""

    geometry = property(lambda self: lambda image: image.resize((20, 20)))


class Empty(ToyBackbone):
    """Saves nothing."""

    def save(self, folder: Path) -> None:
        pass


class Normless(ToyBackbone):
    """A tower without normalisation, which is allowed."""

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        raise BackboneError("there is none")


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (Unequal, "rows that are not of length 1"),
        (Restless, "otherwise every time"),
        (Neighbourly, "otherwise if others are beside it"),
        (Keeping, "After lend it encodes otherwise than before"),
        (Deaf, "Lent other normalisation parameters, it encodes alike"),
        (Backwards, "or in another order"),
        (Cut, "fails to lend|No gradient"),
        (Large, r"makes a RGB image of \(20, 20\)"),
        (Empty, "Its save writes nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_check_backbone__names_the_fault(kind: type[ToyBackbone], fault: str) -> None:
    with pytest.raises(CheckError, match=fault):
        check_backbone(kind())


def test_check_backbone__a_tower_without_normalisation_is_allowed() -> None:
    check_backbone(Normless())
    with pytest.raises(CheckError, match="object lacks identifier, origin"):
        check_backbone(object())  # type: ignore[arg-type]
