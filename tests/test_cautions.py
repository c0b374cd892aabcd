"""Each caution on a folder made for it, none on even folders of real photos, and what the messages say."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from finealign.training.cautions import FEW, NAMED, Caution, alike, cautions, few_images, many_copies

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

WIDTH = 64


class Folder(NamedTuple):
    """What ``cautions`` is told of a folder of images."""

    weak: Floats
    class_text: Floats
    classes: list[str]
    descriptions: list[list[str]]

    def probabilities(self, scale: float = 100.0) -> Floats:
        scores = scale * self.weak @ self.class_text.T
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    def told(self, shares: Floats | None = None) -> list[Caution]:
        probabilities = self.probabilities()
        return cautions(
            self.weak,
            probabilities,
            shares=probabilities.mean(axis=0) if shares is None else shares,
            class_text=self.class_text,
            classes=self.classes,
            descriptions=self.descriptions,
        )


def unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def folder(counts: Sequence[int], *, seed: int = 0, blur: float = 1.0) -> Folder:
    """``counts`` images of each class around the class's text, all in a narrow cone."""
    generator = np.random.default_rng(seed)
    cone = 2 * generator.normal(size=WIDTH)
    texts = cone + generator.normal(size=(len(counts), WIDTH))
    images = np.repeat(texts, counts, axis=0) + blur * generator.normal(size=(sum(counts), WIDTH))
    names = [f"class {index}" for index in range(len(counts))]
    return Folder(unit(images), unit(texts), names, [[f"A {name}.", f"One {name}."] for name in names])


def kinds(found: list[Caution]) -> list[str]:
    return [one.kind for one in found]


def only(found: list[Caution], kind: str) -> str:
    assert kinds(found) == [kind]
    return found[0].message


# --- folders made for a caution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10, 40])
def test_cautions__none_on_an_even_folder(classes: int) -> None:
    assert folder([20] * classes).told() == []


def test_cautions__uneven_by_less_is_no_matter() -> None:
    assert folder([80, 40, 20, 20, 10, 10]).told() == []


def test_cautions__classes_without_images() -> None:
    message = only(folder([20, 0, 20, 20, 0, 20, 20, 20]).told(), "absent")
    assert message.startswith("2 classes seem to have no images: 'class 1', 'class 4'. ")
    assert "--class-prior FILE" in message and "class list" in message
    assert "1 class seems to have" in only(folder([20, 0, 20, 20, 20]).told(), "absent")


def test_cautions__name_no_more_than_some_of_many_classes() -> None:
    message = only(folder([20] * 20 + [0] * 15).told(), "absent")
    assert "15 classes seem" in message and "and 7 more" in message
    assert len(re.findall(r"'class \d+'", message)) == NAMED


def test_cautions__an_estimate_of_nought_alone_makes_no_class_absent() -> None:
    even = folder([20] * 5)
    assert even.told(np.array([0.0, 0.25, 0.25, 0.25, 0.25])) == []
    missing = folder([0, 20, 20, 20, 20])
    assert missing.told(np.full(5, 0.2)) == []  # nor do the start's scores
    assert kinds(missing.told(np.array([0.0, 0.25, 0.25, 0.25, 0.25]))) == ["absent"]


def test_cautions__most_images_of_one_class() -> None:
    message = only(folder([190, 10, 10, 10, 10, 10]).told(), "dominant")
    assert message.startswith("About 79% of the images seem to be of one class, 'class 0'. ")
    assert "--class-prior FILE" in message and "--descriptions" in message


def test_cautions__of_two_classes_one_may_have_most_images() -> None:
    assert folder([190, 30]).told() == []
    assert folder([150, 30, 30]).told() == []  # less than thrice an even share


def test_cautions__an_estimate_that_ran_away_makes_no_class_dominant() -> None:
    assert folder([20] * 10).told(np.array([0.91] + [0.01] * 9)) == []


@pytest.mark.parametrize("count", [4, 49])
def test_cautions__few_images(count: int) -> None:
    few = folder([5] * 10)
    assert few.told() == []
    fewer = few._replace(weak=few.weak[np.linspace(0, 49, count).astype(int)])
    message = only(fewer.told(), "few_images")  # and none of absent classes, of which some there must be
    assert message.startswith("Fewer images than classes: 4 for 10" if count == 4 else "Few images a class: 49 for 10")


@pytest.mark.parametrize("classes", [1, 3, 100])
def test_few_images__begins_below_the_limit(classes: int) -> None:
    assert few_images(FEW * classes, classes) is None
    assert few_images(FEW * classes - 1, classes) is not None


def test_cautions__copies_of_an_image() -> None:
    even = folder([20] * 10)
    copied = even._replace(weak=np.concatenate([even.weak, even.weak[3:4].repeat(15, axis=0)]))
    message = only(copied.told(), "copies")
    assert message.startswith("15 of the 215 images are copies, or nearly, of others; of one image there are 16. ")
    assert "Remove the copies" in message and "--class-prior FILE" in message
    probabilities = copied.probabilities()
    known = cautions(
        copied.weak,
        probabilities,
        shares=probabilities.mean(axis=0),
        class_text=copied.class_text,
        classes=copied.classes,
        descriptions=copied.descriptions,
        groups=np.arange(215),
    )
    assert known == []


def test_many_copies__a_few_pairs_are_no_matter() -> None:
    assert many_copies(np.array([*range(190), *range(10)]), 10) is None
    assert many_copies(np.array([*range(100), *range(20)]), 10) is not None  # a sixth of the images
    assert many_copies(np.array([*range(196), *[0] * 4]), 50) is not None  # more than a class has
    assert many_copies(np.array([*range(196), *[0] * 4]), 10) is None


def test_cautions__classes_described_alike() -> None:
    even = folder([20] * 6)
    texts = even.class_text.copy()
    texts[4] = unit(texts[1:2] + 0.003)[0]
    message = only(even._replace(class_text=texts).told(np.full(6, 1 / 6)), "alike")
    assert message.startswith("The descriptions do not tell apart 'class 1' and 'class 4'. ")
    assert "--descriptions FILE" in message and "`finealign describe`" in message


def test_alike__the_same_descriptions_in_any_order() -> None:
    even = folder([1] * 4)
    descriptions = [["A bird.", "It sings."], ["a  fish."], ["It sings.", "a bird."], ["A Fish."]]
    found = alike(even.class_text, even.classes, descriptions)
    assert found and "'class 0' and 'class 2', 'class 1' and 'class 3'." in found.message
    assert alike(even.class_text, even.classes, even.descriptions) is None


def test_alike__two_classes_of_one_text_and_many() -> None:
    for count in (2, 3, 30):
        text = unit(np.random.default_rng(0).normal(size=(1, WIDTH))).repeat(count, axis=0)
        names = [f"class {index}" for index in range(count)]
        found = alike(text, names, [[name] for name in names])
        assert found and found.message.count("'class 0' and ") == min(NAMED, count - 1)
        assert ("and 21 more" in found.message) == (count == 30)


@pytest.mark.parametrize("cone", [0.0, 1.0, 10.0])
def test_alike__however_narrow_the_cone(cone: float) -> None:
    generator = np.random.default_rng(0)
    texts = cone * 8 * np.ones(WIDTH) + generator.normal(size=(12, WIDTH))
    names = [f"class {index}" for index in range(12)]
    assert alike(unit(texts), names, [[name] for name in names]) is None
    texts[7] = texts[2] + 0.1 * generator.normal(size=WIDTH)
    found = alike(unit(texts), names, [[name] for name in names])
    assert found and "'class 2' and 'class 7'" in found.message


def test_cautions__several_at_once_and_long_names_cut() -> None:
    made = folder([60, 0, 3, 3, 3, 3, 3, 3])
    made = made._replace(weak=np.concatenate([made.weak, made.weak[:1].repeat(60, axis=0)]), classes=["x" * 500] * 8)
    found = made.told()
    assert kinds(found) == ["absent", "dominant", "copies"]
    assert all(len(one.message) < 500 for one in found)


def test_cautions__refuses_what_does_not_fit() -> None:
    even = folder([5] * 4)
    for broken in (
        even._replace(classes=even.classes[:3]),
        even._replace(descriptions=even.descriptions[:3]),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            broken.told()
    with pytest.raises(ValueError, match="do not fit together"):
        even.told(np.full(3, 1 / 3))
    with pytest.raises(ValueError, match="no image"):
        even._replace(weak=even.weak[:0]).told(np.full(4, 0.25))


# --- real photos ------------------------------------------------------------------------------------------------------

EACH = 6  # images of each class, so that encoding takes seconds


def estimates(probabilities: Floats) -> Iterator[Floats]:
    """Shares by three estimates that follow the start more and more."""
    count, num_classes = probabilities.shape
    yield probabilities.mean(axis=0)
    yield np.bincount(probabilities.argmax(axis=1), minlength=num_classes) / count
    shares = np.full(num_classes, 1 / num_classes)
    for _ in range(50):  # expectation maximisation, Saerens et al. 2002
        weighed = probabilities * shares
        shares = (weighed / weighed.sum(axis=1, keepdims=True)).mean(axis=0)
    yield shares


@pytest.fixture(scope="module")
def encoder(shared: Path) -> Any:
    from finealign.backbone.load import load_backbone

    return load_backbone(f"local-dir:{shared / 'models' / 'miniclip'}")


def encoded(encoder: Any, data: Path, each: int = EACH) -> tuple[Folder, Ints]:
    """The first images of each class, with the true classes for making uneven folders of them."""
    import torch

    from finealign.images.decoding import read_image
    from finealign.texts.prompts import read_classes, read_descriptions

    classes = list(read_classes(str(data / "classes.txt")))
    by_class = read_descriptions(data / "descriptions.json")
    texts = [list(by_class[name]) for name in classes]
    means = [encoder.encode_sentences(sentences).cpu().numpy().mean(axis=0) for sentences in texts]
    paths = [path for name in classes for path in sorted((data / "train" / name).iterdir())[:each]]
    pixels = np.stack([np.array(encoder.geometry(read_image(path))) for path in paths])
    parts = [
        encoder.embed(torch.from_numpy(part).permute(0, 3, 1, 2)).numpy() for part in np.split(pixels, len(classes))
    ]
    labels = np.repeat(np.arange(len(classes)), len(paths) // len(classes))
    return Folder(unit(np.concatenate(parts)), unit(np.stack(means)), classes, texts), labels


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("dtd10", 6),
        ("eurosat", 6),
        *(pytest.param(name, 6, marks=pytest.mark.nightly) for name in ("flowers12", "food10", "ucmerced")),
        *(pytest.param(name, 5, marks=pytest.mark.nightly) for name in ("pets37-small", "cifar100")),
    ],
)
def test_cautions__none_on_real_photos_in_even_folders(shared: Path, encoder: Any, name: str, each: int) -> None:
    found, _ = encoded(encoder, shared / "data" / name, each)
    for shares in estimates(found.probabilities()):
        assert found.told(shares) == []


def test_cautions__on_real_photos_each_where_it_is_due(shared: Path, encoder: Any) -> None:
    flowers, labels = encoded(encoder, shared / "data" / "flowers12", 20)

    def with_images(chosen: Ints) -> Folder:
        return flowers._replace(weak=flowers.weak[chosen])

    def classes_of(counts: dict[int, int]) -> Ints:
        return np.concatenate([np.flatnonzero(labels == index)[:count] for index, count in counts.items()])

    # Classes that are nowhere near: those of another set, which the folder has no photos of.
    textures, _ = encoded(encoder, shared / "data" / "dtd10", 1)
    wider = flowers._replace(
        class_text=np.concatenate([flowers.class_text, textures.class_text]),
        classes=flowers.classes + textures.classes,
        descriptions=flowers.descriptions + textures.descriptions,
    )
    message = only(wider.told(), "absent")
    assert "'bumpy'" in message and not any(f"'{name}'" in message for name in flowers.classes)

    found = []
    for most in range(12):  # 20 images of one class, 11 of all others
        one_class = with_images(classes_of(dict.fromkeys(range(12), 1) | {most: 20}))
        shares = list(estimates(one_class.probabilities()))[-1]
        found += [one.message for one in one_class.told(shares) if one.kind == "dominant"]
    assert len(found) >= 8  # of a class that the start hardly knows it cannot be seen
    assert len({message.split("'")[1] for message in found}) == len(found)  # each names another

    message = only(with_images(np.r_[np.arange(len(labels)), np.full(20, 7)]).told(), "copies")
    assert "of one image there are 21" in message
    assert kinds(with_images(classes_of(dict.fromkeys(range(12), 4))).told()) == ["few_images"]

    texts = flowers.class_text.copy()
    texts[3] = texts[0]
    same = flowers._replace(class_text=texts)
    assert f"{flowers.classes[0]!r} and {flowers.classes[3]!r}" in only(same.told(), "alike")
