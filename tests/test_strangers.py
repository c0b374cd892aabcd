"""p_none on made folders whose strangers are known, its properties, and on real photos encoded by the small model."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from finealign.method import strangers
from finealign.method.strangers import StrangerModel, _logistic, fit, p_none, upper_component

D, CLASSES, EACH = 48, 8, 30


def auroc(values: Tensor, positive: Tensor) -> float:
    higher = values[positive][:, None] - values[~positive][None]
    return float(((higher > 0).double() + (higher == 0).double() / 2).mean())


def folder(
    sizes: list[int], strange: int = 0, *, seed: int = 0, kinds: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole images and mean crops (n, D), class anchors (C, D), and the class of each image, -1 for strangers.

    Classes share a domain, as birds do; strangers come from ``kinds`` clusters of another domain.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    gap, domain, other = noise(3, D)
    classes = noise(len(sizes), D) * 0.7
    labels = torch.tensor([c for c, size in enumerate(sizes) for _ in range(size)] + [-1] * strange)
    centres = torch.cat([gap + domain + classes, gap + other + noise(kinds, D) * 0.7])
    which = torch.where(labels >= 0, labels, len(sizes) + torch.arange(len(labels)) % kinds)
    weak = normalize(centres[which] + noise(len(labels), D) * 0.5, dim=1)
    crops = centres[which] + noise(len(labels), D) * 0.5
    anchors = normalize(domain + classes + noise(len(sizes), D) * 0.4, dim=1)
    order = torch.randperm(len(labels), generator=generator)
    return weak[order], crops[order], anchors, labels[order]


# --- strangers are told apart -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_strangers_of_another_domain_are_told_apart(share: float, seed: int) -> None:
    weak, crops, anchors, labels = folder([EACH] * CLASSES, int(share * EACH * CLASSES), seed=seed)
    model = fit(weak, crops, anchors)
    p = p_none(model, weak, crops)
    assert auroc(p, labels < 0) > 0.95
    assert p[labels >= 0].mean() < 0.1
    assert p[labels < 0].mean() > 0.5
    assert abs(float(model.share) - float((labels < 0).float().mean())) < 0.15


def test_new_images_are_judged_as_the_folder_s_own() -> None:
    weak, crops, anchors, labels = folder([EACH] * CLASSES, 120)
    half = len(weak) // 2
    model = fit(weak[:half], crops[:half], anchors)
    assert auroc(p_none(model, weak[half:], crops[half:]), labels[half:] < 0) > 0.95


@pytest.mark.parametrize("seed", range(4))
def test_without_crops(seed: int) -> None:
    weak, _, anchors, labels = folder([EACH] * CLASSES, 120, seed=seed)
    assert auroc(p_none(fit(weak, None, anchors), weak, None), labels < 0) > 0.9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "sizes",
    [
        [EACH] * CLASSES,
        [60, 39, 25, 17, 11, 7, 5, 3],
        [EACH] * 4 + [0] * 4,
        [100, *[5] * 7],
        [100, *[0] * 7],
        [5] * CLASSES,
        [EACH] * 2,
    ],
    ids=["even", "long tail", "half absent", "dominated", "one class", "few", "two classes"],
)
def test_a_folder_without_strangers_pays_nothing(sizes: list[int], seed: int) -> None:
    weak, crops, anchors, labels = folder(sizes, seed=seed)
    p = p_none(fit(weak, crops, anchors), weak, crops)
    assert p.mean() < 0.05
    for c in sorted(set(labels.tolist())):
        assert p[labels == c].mean() < 0.25


# --- properties -------------------------------------------------------------------------------------------------------


def test_the_same_folder_gives_the_same_model() -> None:
    weak, crops, anchors, _ = folder([EACH] * CLASSES, 100)
    first, second = fit(weak, crops, anchors), fit(weak.clone(), crops.clone(), anchors.clone())
    for name, value in first.tensors().items():
        assert torch.equal(value, second.tensors()[name]), name


def test_the_order_of_the_images_does_not_matter() -> None:
    weak, crops, anchors, _ = folder([EACH] * CLASSES, 100)
    order = torch.randperm(len(weak), generator=torch.Generator().manual_seed(1))
    p = p_none(fit(weak, crops, anchors), weak, crops)
    shuffled = p_none(fit(weak[order], crops[order], anchors), weak, crops)
    torch.testing.assert_close(p, shuffled, atol=1e-2, rtol=0)


def test_an_image_s_value_does_not_depend_on_its_batch() -> None:
    weak, crops, anchors, _ = folder([EACH] * CLASSES, 100)
    model = fit(weak, crops, anchors)
    p = p_none(model, weak, crops)
    for i in (0, 7, 100):
        torch.testing.assert_close(p_none(model, weak[i : i + 1], crops[i : i + 1]), p[i : i + 1])


def test_lengths_and_the_number_of_anchors_a_class_do_not_matter() -> None:
    weak, crops, anchors, _ = folder([EACH] * CLASSES, 100)
    p = p_none(fit(weak, crops, anchors), weak, crops)
    longer = p_none(fit(3 * weak, 0.2 * crops, 5 * anchors[:, None].expand(-1, 2, -1)), 3 * weak, 0.2 * crops)
    torch.testing.assert_close(p, longer, atol=1e-3, rtol=0)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weak, crops, anchors, _ = folder([EACH] * CLASSES, 100)
    p = p_none(fit(weak, crops, anchors), weak, crops)
    monkeypatch.setattr(strangers, "CHUNK", 7)
    torch.testing.assert_close(p, p_none(fit(weak, crops, anchors), weak, crops), atol=1e-3, rtol=0)


def test_a_sample_of_the_reference_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    weak, crops, anchors, labels = folder([EACH] * CLASSES, 100)
    monkeypatch.setattr(strangers, "REFERENCE", 60)
    assert auroc(p_none(fit(weak, crops, anchors), weak, crops), labels < 0) > 0.95


def test_the_model_comes_back_from_its_tensors() -> None:
    weak, crops, anchors, _ = folder([EACH] * CLASSES, 100)
    model = fit(weak, crops, anchors)
    again = StrangerModel.from_tensors(model.tensors())
    assert torch.equal(p_none(model, weak, crops), p_none(again, weak, crops))
    for name, value in model.tensors().items():
        assert value.dtype == torch.float32 and value.is_contiguous() and not value.requires_grad, name
    with pytest.raises(ValueError, match="axes"):
        StrangerModel.from_tensors({"mean": model.mean})


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("mean", 1, math.nan, "mean .* not finite"),
        ("cosine_deviation", 1, 0.0, "cosine_deviation .* not above 0"),
        ("claim_deviation", 1, -1.0, "claim_deviation .* not above 0"),
        ("scale", (), 0.0, "scale .* not above 0"),
        ("openness", (), 1.5, r"openness .* not in \[0, 1\]"),
        ("share", (), -0.5, r"share .* not in \[0, 1\]"),
        ("quantiles", -1, 1.5, r"quantiles .* not in \[0, 1\]"),
    ],
)
def test_from_tensors__one_value_that_cannot_be_is_refused(
    name: str, place: object, value: float, message: str
) -> None:
    weak, crops, anchors, _ = folder([EACH] * CLASSES, 40)
    tensors = {key: tensor.clone() for key, tensor in fit(weak, crops, anchors).tensors().items()}
    tensors[name][place] = value  # type: ignore[index]
    with pytest.raises(ValueError, match=message):
        StrangerModel.from_tensors(tensors)


def test_logistic__ends_where_the_loss_is_level() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 3, generator=generator)
    target = torch.sigmoid(inputs @ torch.tensor([3.0, -5.0, 1.0]) + 2)
    weights, bias = _logistic(inputs, target, ridge=0.5)
    error = torch.sigmoid(inputs.double() @ weights.double() + bias.double()) - target.double().clamp(1e-3, 1 - 1e-3)
    torch.testing.assert_close(inputs.double().T @ error, -0.5 * weights.double(), atol=1e-4, rtol=0)
    assert float(error.sum()) == pytest.approx(-1e-3 * float(bias), abs=1e-4)


def test_no_gradient_and_no_change_of_what_is_given() -> None:
    weak, crops, anchors, _ = folder([EACH] * CLASSES, 40)
    before = [value.clone() for value in (weak, crops, anchors)]
    learned = anchors.requires_grad_()
    assert not p_none(fit(weak, crops, learned), weak, crops).requires_grad
    for value, old in zip((weak, crops, anchors), before, strict=True):
        assert torch.equal(value.detach(), old)


# --- degenerate folders -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    classes=st.integers(1, 5),
    width=st.sampled_from([2, 3, 16]),
    distinct=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_any_folder_gives_probabilities(n: int, classes: int, width: int, distinct: int, seed: int) -> None:
    """Also tiny ones, identical images, one class, fewer dimensions than classes."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(distinct, width, generator=generator)
    weak = kinds[torch.randint(distinct, (n,), generator=generator)]
    anchors = torch.randn(classes, width, generator=generator)
    model = fit(weak, weak, anchors)
    p = p_none(model, weak, weak)
    assert p.shape == (n,) and p.dtype == torch.float32
    assert ((p >= 0) & (p <= 1)).all()
    assert all(bool(value.isfinite().all()) for name, value in model.tensors().items() if name != "bias")


@pytest.mark.parametrize("n", [1, 2, 9, 11])
def test_a_tiny_folder_says_nothing(n: int) -> None:
    weak, crops, anchors, _ = folder([EACH] * CLASSES, 100)
    assert p_none(fit(weak[:n], crops[:n], anchors), weak, crops).max() == 0


def test_identical_images_say_nothing() -> None:
    weak, crops, anchors, _ = folder([EACH] * CLASSES)
    same = weak[:1].expand(50, -1)
    assert p_none(fit(same, same, anchors), weak, crops).max() == 0


def test_all_strangers_stay_probabilities() -> None:
    weak, crops, anchors, _ = folder([0] * CLASSES, 200)
    p = p_none(fit(weak, crops, anchors), weak, crops)
    assert ((p >= 0) & (p <= 1)).all()


def test_half_precision_is_computed_in_float32() -> None:
    weak, crops, anchors, _ = folder([EACH] * CLASSES, 100)
    model = fit(weak.half(), crops.half(), anchors.half())
    assert model.mean.dtype == torch.float32
    torch.testing.assert_close(
        p_none(model, weak, crops), p_none(fit(weak, crops, anchors), weak, crops), atol=0.05, rtol=0
    )


# --- the parts --------------------------------------------------------------------------------------------------------


def test_upper_component_finds_two_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(300, generator=generator), 6 + torch.randn(100, generator=generator)
    r = upper_component(torch.cat([low, high]))
    assert ((r > 0.5) == (torch.arange(400) >= 300)).float().mean() > 0.99
    assert float(r.mean()) == pytest.approx(0.25, abs=0.01)


def test_upper_component_is_that_of_a_mixture_with_one_variance() -> None:
    mixture = pytest.importorskip("sklearn.mixture")
    generator = torch.Generator().manual_seed(1)
    values = torch.cat([torch.randn(150, generator=generator), 3 + torch.randn(50, generator=generator)])
    points = values[:, None].numpy()
    fitted = mixture.GaussianMixture(2, covariance_type="tied", n_init=5, tol=1e-9, max_iter=1000, random_state=0)
    expected = fitted.fit(points).predict_proba(points)[:, fitted.means_[:, 0].argmax()]
    assert upper_component(values).numpy() == pytest.approx(expected, abs=5e-3)


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40))
@settings(max_examples=15, deadline=None)
def test_upper_component_rises_with_the_value(values: list[float]) -> None:
    v = torch.tensor(values)
    r = upper_component(v)[v.argsort()]
    assert ((r >= 0) & (r <= 1)).all()
    assert (r.diff() >= -1e-6).all()


def test_nearness_by_hand() -> None:
    """Two trusted clusters at right angles and an image between them: its nearest of another cluster is known."""
    features = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 1.0]]), dim=1)
    owner = torch.tensor([0, 0, 1, 1, 2])
    near = strangers._nearness(features, owner, torch.tensor([0, 1, 2, 3]))
    cosine = features @ features.T
    plain = torch.stack([cosine[0, 2:4].mean(), cosine[1, 2:4].mean(), cosine[2, :2].mean(), cosine[3, :2].mean()])
    wanted = (cosine[4, :4].topk(3).values.mean() - plain.mean()) / plain.std()
    torch.testing.assert_close(near[4], wanted)


def test_nearness_of_a_single_cluster_says_nothing() -> None:
    features = normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert strangers._nearness(features, torch.zeros(6, dtype=torch.int64), torch.tensor([0, 1, 2])).eq(0).all()


# --- real photos ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encode() -> Callable[[str, int], tuple[Tensor, Tensor]]:
    """A function that encodes the first photos of each class of a set, and the set's names, with the small model."""
    from real_data import miniclip, shared_folder

    from finealign.classifier import FineAlign
    from finealign.config import make_config
    from finealign.images.decoding import read_pixels
    from finealign.images.views import Views
    from finealign.texts.prompts import make_texts, read_classes, read_descriptions

    data = shared_folder() / "data"
    if not data.is_dir() or not miniclip().is_dir():
        pytest.skip(f"no real photos and small model at {shared_folder()}; FINEALIGN_SHARED names where they lie")

    def encoded(name: str, most: int) -> tuple[Tensor, Tensor]:
        texts = make_texts(
            read_classes(data / name / "classes.txt"), read_descriptions(data / name / "descriptions.json")
        )
        config = make_config({"backbone": f"local-dir:{miniclip()}"})
        backbone = FineAlign(texts.classes).load_backbone(config)
        views = Views(config.views, size=backbone.input_size, geometry=backbone.geometry, mean=backbone.mean, seed=0)
        paths = [path for c in texts.classes for path in sorted((data / name / "train" / c).iterdir())[:most]]
        pixels = [views.weak(read_pixels(path, shorter_side=2 * views.size)) for path in paths]
        return backbone.embed(torch.stack(pixels)), backbone.encode_texts(texts).names

    return encoded


def test_real_photos_of_other_sets_are_told_apart(encode: Callable[[str, int], tuple[Tensor, Tensor]]) -> None:
    flowers, names = encode("flowers12", 10)
    textures, _ = encode("dtd10", 6)
    images = torch.cat([flowers, textures])
    p = p_none(fit(images, None, names), images, None)
    assert auroc(p, torch.arange(len(images)) >= len(flowers)) > 0.85
    alone = p_none(fit(flowers, None, names), flowers, None)
    assert alone.mean() < 0.05
