"""A few known labels: read and matched, learned from and never relabelled, told, and not measured by."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from few_labels import drawn_labels, mean_and_error
from torch import Tensor

from conftest import CLASSES, tiny_config, write_photos
from finealign import FineAlign
from finealign.errors import CautionWarning, ConfigError, ImageInputError, OutputError
from finealign.images.listing import list_images
from finealign.method.class_prior import estimate_shares
from finealign.method.few_labels import STRANGER, UNKNOWN, begun_anchors, with_known
from finealign.model.known_labels import check_taken, read_known_labels
from finealign.run.adapt import adapt_into
from finealign.training import loop
from finealign.types import PseudoLabels
from test_cli import command, only_json

Tiny = Callable[[str], str]
TAKE_LABELS = [
    ("fair", False),
    ("fair", True),
    ("dpa", False),
    *(
        pytest.param(name, frozen, marks=pytest.mark.nightly)
        for name in ("self-training", "lafter")
        for frozen in (0, 1)
    ),
]


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos in class folders, made once; nothing may write into it."""
    return write_photos(tmp_path_factory.mktemp("album") / "photos")


def csv_of(path: Path, *rows: tuple[str, str]) -> Path:
    """A file of labels as a review writes it."""
    lines = "".join(f"{name},{label},changed\n" for name, label in rows)
    path.write_text(f"path,label,why_asked\n{lines}", encoding="utf-8")
    return path


def known_of(labels: Any, paths: Any, **how: Any) -> dict[str, int]:
    return {Path(path).name: known for path, known in read_known_labels(labels, paths, CLASSES, **how).classes.items()}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_read_known_labels__paths_are_found_from_the_file_the_images_and_here(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(album.parent)
    (tmp_path / "linked").symlink_to(album, target_is_directory=True)
    rows = [
        ("red/0.png", "red"),  # from the folder of images
        ("photos/green/1.png", "GREEN"),  # from here
        (str(album / "blue" / "2.png"), "blue"),
        ("linked/red/3.png", "none of these"),  # from the file, by a link
        ("photos/red/4.png", "cannot tell"),
    ]
    found = read_known_labels(csv_of(tmp_path / "labels.csv", *rows), list_images(album), CLASSES, folder=album)
    by_name = {os.path.relpath(path, album): known for path, known in found.classes.items()}
    assert by_name == {"red/0.png": 0, "green/1.png": 1, "blue/2.png": 2, "red/3.png": STRANGER}
    assert not found.not_used
    known = found.of(list_images(album))
    assert known is not None
    assert (known != UNKNOWN).sum() == 4


def test_read_known_labels__a_row_that_names_an_image_means_no_other_link_to_it(photos: Path) -> None:
    (photos / "blue" / "again.png").symlink_to(photos / "red" / "0.png")
    paths = [photos / "red" / "0.png", photos / "blue" / "again.png"]
    assert known_of({"red/0.png": "red"}, paths, folder=photos) == {"0.png": 0}


def test_read_known_labels__as_a_mapping_or_one_for_each_image(album: Path) -> None:
    paths = list_images(album)
    one_each = [None] * len(paths)
    one_each[5] = "red"  # type: ignore[call-overload]
    by_path = {paths[5]: "red", paths[6]: None}
    assert read_known_labels(one_each, paths, CLASSES) == read_known_labels(by_path, paths, CLASSES)
    with pytest.raises(ImageInputError, match=r"^23 labels for 24 images\. Give one for each"):
        read_known_labels(one_each[1:], paths, CLASSES)


def test_read_known_labels__of_no_image_to_adapt_to_is_told(album: Path) -> None:
    labels = {"gone.png": "red", "red/0.png": "red"}
    found = read_known_labels(labels, list_images(album), CLASSES, folder=album)
    assert found.not_used == "1 label is of no image to adapt to, and not used: 'gone.png'."
    with pytest.raises(ImageInputError, match=r"None of the 1 labelled image is among the 24 images.*'gone\.png'"):
        read_known_labels({"gone.png": "red"}, list_images(album), CLASSES)


def test_read_known_labels__a_label_that_is_no_class_is_refused(album: Path) -> None:
    with pytest.raises(ImageInputError, match=r"'mauve' of 'red/0\.png' is no class\. Valid: 'red'.*'none of these'"):
        read_known_labels({"red/0.png": "mauve"}, list_images(album), CLASSES, folder=album)
    with pytest.raises(ImageInputError, match=r"label 3 of .* is no class"):
        wrong: Any = {"red/0.png": 3}
        read_known_labels(wrong, list_images(album), CLASSES, folder=album)
    with pytest.raises(ImageInputError, match="may be several classes; write one exactly"):
        read_known_labels({"red/0.png": "rED"}, list_images(album), ["Red", "RED"], folder=album)


def test_read_known_labels__two_labels_of_one_image_are_refused_with_both(album: Path, tmp_path: Path) -> None:
    labels = csv_of(tmp_path / "labels.csv", ("red/0.png", "red"), (str(album / "red" / "0.png"), "blue"))
    with pytest.raises(ImageInputError, match=r"red/0\.png' has two labels: 'red' in row 1, and 'blue' in row 2"):
        read_known_labels(labels, list_images(album), CLASSES, folder=album)
    twice = csv_of(tmp_path / "twice.csv", ("red/0.png", "red"), ("red/0.png", "Red"))
    assert known_of(twice, list_images(album), folder=album) == {"0.png": 0}


def test_read_known_labels__copies_with_different_labels_are_refused_with_both(photos: Path) -> None:
    shutil.copy(photos / "red" / "0.png", photos / "blue" / "again.png")
    labels = {"red/0.png": "red", "blue/again.png": "blue"}
    with pytest.raises(ImageInputError, match=r"again\.png' and '.*red/0\.png' are the same image.*'blue' and 'red'"):
        read_known_labels(labels, list_images(photos), CLASSES, folder=photos)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,class\na,b\n", "columns named 'label'"),
        ("path,label\n", "There are no labels"),
        ("path,label\nred/0.png,cannot tell\n", "which says nothing"),
        (None, "are a folder. Give a CSV"),
    ],
)
def test_read_known_labels__a_file_that_holds_none_is_refused(
    album: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text(content, encoding="utf-8") if content is not None else labels.mkdir()
    with pytest.raises(ImageInputError, match=message):
        read_known_labels(labels, list_images(album), CLASSES, folder=album)


def test_check_taken__says_who_learns_from_labels() -> None:
    with pytest.raises(ConfigError, match=r"'cupl' learns nothing from labels.*take one of dpa, fair"):
        check_taken("cupl", given=True)
    with pytest.raises(ConfigError, match=r"'tip-adapter' learns from labelled images and has none.*--labels FILE"):
        check_taken("tip-adapter", given=False)
    check_taken("fair", given=True)
    check_taken("fair", given=False)


# --- what labels change in a step -------------------------------------------------------------------------------------


def test_with_known__replaces_labels_and_weights_of_known_images_alone() -> None:
    probabilities = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4]])
    pseudo = PseudoLabels(probabilities.argmax(1), torch.tensor([0.5, 0.25, 0.1]), probabilities)
    found = with_known(pseudo, torch.tensor([1, UNKNOWN, STRANGER]), 4.0)
    assert found.labels.tolist() == [1, 1, 0]
    assert found.weights.tolist() == [4.0, 0.25, pytest.approx(0.1)]
    torch.testing.assert_close(found.probabilities, torch.tensor([[0.0, 1.0], [0.2, 0.8], [0.6, 0.4]]))


def begun(anchors: list[float], text_images: float) -> Tensor:
    """Begin two classes on a plane's unit vectors at these angles; of class 0 two images are known, at 80 degrees."""
    at = torch.tensor(anchors, dtype=torch.float64).deg2rad()
    angles = torch.tensor([80.0, 80.0, 20.0, 50.0], dtype=torch.float64).deg2rad()
    points = torch.stack([at.cos(), at.sin()], dim=1)[:, None]
    images = torch.stack([angles.cos(), angles.sin()], dim=1)
    return begun_anchors(points, images, torch.tensor([0, 0, UNKNOWN, UNKNOWN]), text_images=text_images)


def test_begun_anchors__move_towards_the_images_by_how_many_there_are() -> None:
    texts = begun([40.0, 50.0], 1e9)
    angles = [float(torch.atan2(*begun([40.0, 50.0], worth)[0, 0].flip(0)).rad2deg()) for worth in (1e9, 8.0, 2.0, 0.1)]
    assert angles == sorted(angles)
    assert angles[0] == pytest.approx(40.0, abs=1e-3)
    assert angles[-1] > 45
    torch.testing.assert_close(begun([40.0, 50.0], 0.1)[1], texts[1], rtol=0, atol=0)  # a class without labels


def test_begun_anchors__are_no_surer_of_the_images_than_the_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(5, 1, 16, generator=generator) * 0.1 + 1, dim=-1)
    images = torch.nn.functional.normalize(torch.randn(60, 16, generator=generator) + 3, dim=-1)
    known = torch.full((60,), UNKNOWN)
    known[:10] = torch.arange(10) % 5
    found = begun_anchors(texts, images, known, text_images=4.0)

    def spread(anchors: Tensor) -> Tensor:
        differences = anchors[:, 0] - texts[:, 0].mean(0)
        return ((images - images.mean(0)) @ differences.T).square().mean(0).sqrt()

    assert bool((spread(found) <= 1.02 * spread(texts)).all())
    assert float((found - texts).norm()) > 0.05


def test_estimated_shares__follow_the_known_labels() -> None:
    """Two clusters that the texts cannot tell apart; the labels say which is which."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(6)[:2].repeat_interleave(torch.tensor([30, 10]), dim=0)
    images = torch.nn.functional.normalize(centres + 0.05 * torch.randn(40, 6, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(torch.eye(6)[4:6] * 0.1 + torch.eye(6)[3], dim=1)
    for large in (0, 1):
        known = torch.full((40,), UNKNOWN)
        known[:3], known[30:33] = large, 1 - large
        shares = estimate_shares(images, None, texts, logit_scale=1.0, known=known).shares
        assert float(shares[large]) == pytest.approx(0.75, abs=0.05)


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_benchmark__draws_labels_of_every_class_and_leaves_one_image_without() -> None:
    hidden = torch.tensor([0] * 5 + [1] * 2)
    first, again, other = (drawn_labels(hidden, 3, draw) for draw in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert bool((first[first >= 0] == hidden[first >= 0]).all())
    assert torch.bincount(first[first >= 0]).tolist() == [3, 1]


def test_benchmark__errs_by_the_draws_of_each_world() -> None:
    centre, error = mean_and_error({"one": [50.0, 54.0], "other": [70.0, 70.0]})
    assert centre == 61.0
    assert error == pytest.approx(2 * 2.0 / 2)  # the first world's standard error is 2, over two worlds
    assert mean_and_error({"one": [50.0]}) == (50.0, None)


# --- a run ------------------------------------------------------------------------------------------------------------


def turned(album: Path) -> dict[str, str]:
    """Every image with the class after its own."""
    after = dict(zip(CLASSES, [*CLASSES[1:], CLASSES[0]], strict=True))
    return {str(path): after[path.parent.name] for path in list_images(album)}


@pytest.mark.parametrize(("name", "frozen"), TAKE_LABELS)
def test_fit__known_labels_are_never_relabelled(
    album: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch, name: str, frozen: bool
) -> None:
    """Of every method that trains: labels that are all wrong are what it learns, at each step and to the end."""
    seen = []
    step = loop.step

    def watched(state: Any, features: Any, strong: Any, batch: Tensor) -> Any:
        loss, pseudo = step(state, features, strong, batch)
        seen.append((batch, pseudo.labels, pseudo.weights))
        return loss, pseudo

    monkeypatch.setattr(loop, "step", watched)
    encoder = {"training__encoder": "frozen"} if frozen else {}
    config = tiny_config(tiny_backbone("transformer"), method__name=name, method__label_weight=3.0, **encoder)
    labels = turned(album)
    model = FineAlign(CLASSES, config=config).fit(album, labels=labels)
    wanted = torch.tensor([CLASSES.index(labels[str(path)]) for path in model.paths_])
    assert seen
    for batch, found, weights in seen:
        assert torch.equal(found, wanted[batch])
        assert bool((weights == 3.0).all())
    assert model.labels_ is not None
    assert model.labels_["images"] == 24


def test_fit__strangers_hardly_count_and_others_are_labelled_as_before(
    album: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, float] = {}
    step = loop.step

    def watched(state: Any, features: Any, strong: Any, batch: Tensor) -> Any:
        loss, pseudo = step(state, features, strong, batch)
        assert pseudo.belonging is not None
        seen.update(zip(batch.tolist(), pseudo.belonging.tolist(), strict=True))
        return loss, pseudo

    monkeypatch.setattr(loop, "step", watched)
    config = tiny_config(tiny_backbone("transformer"), training__epochs=1)
    FineAlign(CLASSES, config=config).fit(album, labels={"red/0.png": "none of these", "red/1.png": "red"})
    paths = [os.path.relpath(path, album) for path in list_images(album)]
    assert seen[paths.index("red/0.png")] == pytest.approx(0.01)
    assert seen[paths.index("red/1.png")] == 1.0


def test_fit__labels_of_images_that_cannot_be_read_leave_the_run_as_it_is(photos: Path, tiny_backbone: Tiny) -> None:
    """Bit for bit: where nothing is known, nothing differs from a run without labels."""
    (photos / "red" / "torn.png").write_bytes((photos / "red" / "0.png").read_bytes()[:200])
    config = tiny_config(tiny_backbone("transformer"), training__epochs=2)
    plain = FineAlign(CLASSES, config=config).fit(photos)
    labelled = FineAlign(CLASSES, config=config).fit(photos, labels={"red/torn.png": "red"})
    assert labelled.labels_ == {"images": 0, "classes": {}, "none_of_these": 0, "not_used": ""}
    for (name, one), other in zip(
        plain.method_.state_dict().items(), labelled.method_.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert all(torch.equal(plain.norms_[name], labelled.norms_[name]) for name in plain.norms_)
    with pytest.raises(ImageInputError, match="'tip-adapter' learns from images with a class, and none of them could"):
        config = tiny_config(tiny_backbone("transformer"), method__name="tip-adapter")
        FineAlign(CLASSES, config=config).fit(photos, labels={"red/torn.png": "red"})


def test_fit__labels_beside_prepared_images_are_refused(album: Path, tiny_backbone: Tiny) -> None:
    model = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer")))
    with pytest.raises(ConfigError, match=r"Give the labels to prepare\(\), not to fit\(\)"):
        model.fit(model.prepare(album), labels={"red/0.png": "red"})


@pytest.fixture(scope="module")
def labelled_run(album: Path, tiny_backbone: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned from three labels and was given one too many; nothing may write into it."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = [("red/0.png", "red"), ("green/0.png", "green"), ("blue/0.png", "none of these"), ("gone.png", "red")]
    labels = csv_of(folder / "labels.csv", *rows)
    model = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer")))
    with pytest.warns(CautionWarning, match=r"1 label is of no image to adapt to, and not used: 'gone\.png'"):
        adapt_into(folder / "run", model, album, labels, keep_adapted=True)
    return folder / "run"


def test_adapt_into__says_that_it_is_supervised(labelled_run: Path, album: Path) -> None:
    told = json.loads((labelled_run / "run.json").read_text(encoding="utf-8"))
    assert told["labels"] == {
        "images": 3,
        "classes": {"red": 1, "green": 1},
        "none_of_these": 1,
        "not_used": "1 label is of no image to adapt to, and not used: 'gone.png'.",
    }
    words = "3 images with a label, of 2 of the 3 classes, 1 of them 'none of these'"
    card = (labelled_run / "model" / "README.md").read_text(encoding="utf-8")
    assert words in card
    assert "few-shot-adaptation" in card
    assert "unsupervised" not in card
    assert words.replace("'", "&#39;") in (labelled_run / "report.html").read_text(encoding="utf-8")
    lines = (labelled_run / "learned_from.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "path,label"
    assert f"{album}/blue/0.png,none of these" in lines
    assert len(lines) == 4


def test_adapt_into__resumes_with_the_same_labels_alone(labelled_run: Path, album: Path, tiny_backbone: Tiny) -> None:
    config = tiny_config(tiny_backbone("transformer"))
    for labels in (None, {"red/0.png": "blue"}):
        with pytest.raises(OutputError, match="had other labels, so it cannot be resumed"):
            adapt_into(labelled_run, FineAlign(CLASSES, config=config), album, labels, resume=True)


def test_evaluate__does_not_measure_by_images_that_were_learned_from(
    labelled_run: Path, album: Path, tmp_path: Path
) -> None:
    """By content, wherever a copy of the model and of the images lies; and by path, whatever is there by now."""
    shutil.copytree(album, tmp_path / "moved")
    shutil.copytree(labelled_run / "model", tmp_path / "model")
    for model, images in ((labelled_run, album), (tmp_path / "model", tmp_path / "moved")):
        found = only_json(command("evaluate", model, images, "--json"))
        assert found["images"] == 21
        assert found["learned_from"] == {"images": 3, "counted": False}
    counted = only_json(command("evaluate", labelled_run, album, "--count-learned", "--json"))
    assert counted["images"] == 24
    assert counted["learned_from"] == {"images": 3, "counted": True}
    done = command("evaluate", labelled_run, album)
    assert "Left out, as the model was given the labels: 3 images. --count-learned measures such" in done.stderr
    own = csv_of(tmp_path / "own.csv", (str(album / "red" / "0.png"), "red"))
    refused = command("evaluate", labelled_run, own)
    assert "was given the labels of all 1 image measured here" in refused.stderr


def test_adapt__a_plan_tells_the_labels(album: Path, tmp_path: Path, tiny_backbone: Tiny) -> None:
    labels = csv_of(tmp_path / "labels.csv", ("red/0.png", "red"), ("gone.png", "red"))
    asked = ("adapt", album, "--classes", ",".join(CLASSES), "--labels", labels, "--out", tmp_path / "run", "--dry-run")
    done = command(*asked, "--backbone", tiny_backbone("transformer"))
    assert "It would learn from 1 image with a label, of 1 of the 3 classes." in done.stdout
    assert "'gone.png'" in done.stderr
    refused = command(*asked, "--backbone", tiny_backbone("transformer"), "--method", "cupl")
    assert refused.exit_code == 1
    assert "'cupl' learns nothing from labels" in refused.stderr
