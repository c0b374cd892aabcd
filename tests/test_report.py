"""The report and what it is made of: that it is whole, true to the run folder, and takes nothing at its word."""

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from conftest import CLASSES, predictions, tiny_config, write_photos
from finealign import FineAlign
from finealign.errors import ModelError, OutputError
from finealign.images.decoding import read_image
from finealign.images.listing import list_images
from finealign.run.adapt import adapt_into
from finealign.run.charts import Curve, by_epoch, calibration
from finealign.run.examples import EACH, SIDE, Watch, write_examples
from finealign.run.report import read_predictions, render, save_evaluation, write_report
from finealign.types import Prediction
from test_cli import command

Tiny = Callable[[str], str]
HOSTILE = "<img src=x onerror=alert(1)>"


class Reader(HTMLParser):
    """What a browser would make of a page: its texts, its tags, what it would fetch, and whether tags close."""

    EMPTY = frozenset({"meta", "img", "br", "link", "input", "path", "use"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.anchors: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has {name}"
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "srcset", "data", "action", "poster"):
                self.fetched.append(value or "")
            if name in ("href", "xlink:href"):
                (self.anchors if (value or "").startswith("#") else self.fetched).append(value or "")
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Tiny) -> Path:
    """A run of three epochs on 24 photos and one file that is none."""
    photos = write_photos(tmp_path_factory.mktemp("reported") / "photos")
    (photos / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    folder = photos.parent / "run"
    adapt_into(folder, FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"))), str(photos))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_render__says_what_was_left_out(run: Path) -> None:
    told = json.loads((run / "run.json").read_text(encoding="utf-8"))
    sentence = "Left out: 3 files that are no images (3 .mov)."
    assert "Left out" not in Reader(render(run)).text
    (run / "run.json").write_text(json.dumps(told | {"left_out": sentence}), encoding="utf-8")
    assert sentence in Reader(render(run)).text


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "predictions.csv").read_text(encoding="utf-8").splitlines()))


def change(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(found | values), encoding="utf-8")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_report__is_one_file_that_fetches_nothing(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    found = Reader(page)
    assert found.fetched and all(one.startswith("data:image/jpeg;base64,") for one in found.fetched)
    assert not found.tags.keys() & {"script", "link", "iframe", "object", "base", "form"}
    assert "default-src 'none'" in page
    assert not re.findall(r"@import|url\((?!#)", page)


def test_report__every_link_leads_somewhere_and_no_name_stands_twice(finished: Path) -> None:
    found = Reader((finished / "report.html").read_text(encoding="utf-8"))
    assert len(found.ids) == len(set(found.ids))
    assert {anchor.removeprefix("#") for anchor in found.anchors} <= set(found.ids)
    assert len(found.anchors) > 8


def test_report__says_what_the_run_folder_says(finished: Path) -> None:
    text = Reader((finished / "report.html").read_text(encoding="utf-8")).text
    said = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert f"Verdict: {said['verdict']['call']}" in text
    assert said["identity"]["weights"] in text
    assert said["versions"]["torch"] in text
    changed = sum(row["label"] != row["start_label"] for row in rows(finished))
    assert f"Labels changed {changed} " in text
    assert "1 file could not be read" in text and "torn.png" in text
    assert yaml.safe_load((finished / "config.yaml").read_text())["backbone"] in text
    assert "a photo of a red." in text  # the texts used
    assert "2507.09615" in text


def test_report__the_run_folder_alone_makes_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the folder was moved, and with the photos gone, it is the same report."""
    before = (run / "report.html").read_text(encoding="utf-8")
    (run / "report.html").unlink()
    shutil.rmtree(run / "checkpoints")
    monkeypatch.setattr("finealign.images.decoding.read_image", None)
    assert write_report(run) == run / "report.html"
    assert (run / "report.html").read_text(encoding="utf-8") == before


def test_report__takes_no_text_at_its_word(run: Path) -> None:
    """Names of classes, files and reasons are shown as they are and never become markup."""
    manifest = json.loads((run / "model" / "finealign.json").read_text(encoding="utf-8"))
    swapped = json.loads(json.dumps(manifest["descriptions"]).replace("red", "RED").replace("RED", HOSTILE))
    change(run / "model" / "finealign.json", descriptions=swapped)
    change(run / "run.json", classes=[HOSTILE, "green", "blue"], method=HOSTILE)
    for name in ("predictions.csv", "set_aside.csv", "examples/examples.json", "config.yaml"):
        text = (run / name).read_text(encoding="utf-8")
        (run / name).write_text(text.replace("red", HOSTILE).replace("torn", HOSTILE), encoding="utf-8")
    page = render(run)
    assert "<img src=x" not in page
    assert HOSTILE in Reader(page).text
    assert Reader(page).tags["img"] == len(re.findall("data:image/jpeg", page))


def test_report__with_labels_has_accuracy_confusion_and_calibration(finished: Path, run: Path) -> None:
    labelled = finished.parent / "photos" / "truth.csv"
    labelled.write_text("path,label\n" + "".join(f"{name}/{n}.png,{name}\n" for name in CLASSES for n in range(8)))
    (run / "evaluation.json").write_text("torn", encoding="utf-8")  # about to be replaced, so it is in nobody's way
    result = command("report", run, "--labelled", labelled, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    saved = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    text = Reader((run / "report.html").read_text(encoding="utf-8")).text
    assert f"Measured on 24 labelled images: {saved['start']['top1']:.1%} before" in text
    assert "Confusion matrices" in text and "Calibration" in text
    for name in ("start", "adapted"):
        cells = saved["confusion"][name]
        assert sum(images for _, _, images in cells) == 24
        assert sum(images for truth, named, images in cells if truth == named) == round(24 * saved[name]["top1"])
        assert sum(one["images"] for one in saved["calibration"][name]) == 24
        gap = sum(one["images"] * abs(one["accuracy"] - one["confidence"]) for one in saved["calibration"][name]) / 24
        assert gap == pytest.approx(saved[name]["ece"])
        assert f"{saved[name]['balanced']:.1%} {saved[name]['balanced_low']:.1%} to" in text
        assert f"{saved[name]['brier']:.3f}" in text
    assert saved["adapted_to"] == 24
    assert "All images measured here are among those the model was adapted to" in text
    assert f"It changed by {100 * saved['difference']['balanced']:+.1f} points" in text
    again = command("report", run, "--json")
    assert json.loads(again.stdout) == {"report": str(run / "report.html")}
    assert "Measured on 24" in (run / "report.html").read_text(encoding="utf-8")  # kept for later reports


def test_report__shows_an_evaluation_without_the_newer_measures(finished: Path, run: Path) -> None:
    labelled = finished.parent / "photos" / "older.csv"
    labelled.write_text("path,label\nred/0.png,red\nblue/0.png,blue\n", encoding="utf-8")
    assert command("report", run, "--labelled", labelled, "--device", "cpu").exit_code == 0
    saved = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    del saved["adapted_to"]
    for part in ("adapted", "start", "zero_shot", "difference"):
        saved[part] = {name: value for name, value in saved[part].items() if not name.startswith(("balanced", "brier"))}
    (run / "evaluation.json").write_text(json.dumps(saved), encoding="utf-8")
    text = Reader(render(run)).text
    assert "Measured on 2 labelled images" in text
    assert "balanced" not in text and "Brier" not in text and "measured here" not in text


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
def test_report__of_a_run_that_is_not_complete_is_refused(run: Path, status: str) -> None:
    change(run / "run.json", status=status)
    with pytest.raises(ModelError, match=f"'{status}'.*--resume"):
        render(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", None),
        ("run.json", "[]"),
        ("run.json", '{"status": "complete"}'),
        ("metrics.jsonl", '{"epoch": 1}\n'),
        ("predictions.csv", "path,label\na.png,red\n"),
        ("predictions.csv", None),
        ("set_aside.csv", None),
        ("examples/examples.json", None),
        ("examples/examples.json", '{"changed": [{"picture": "gone.jpg", "crops": []}], "unsure": []}'),
        ("model/finealign.json", "{}"),
        ("evaluation.json", "{}"),
        ("evaluation.json", b"\xff\xfe"),
    ],
)
def test_report__a_folder_that_is_not_whole_is_refused_in_a_sentence(run: Path, name: str, content: Any) -> None:
    path = run / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = command("report", run)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")


def test_report__examples_may_not_name_files_elsewhere(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    listed = json.loads((run / "examples" / "examples.json").read_text(encoding="utf-8"))
    listed["unsure"][0]["picture"] = "../../secret.jpg"
    (run / "examples" / "examples.json").write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(ModelError, match=r"secret\.jpg cannot be read"):
        render(run)


def test_save_evaluation__wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no run"):
        save_evaluation({}, tmp_path)


def test_report__many_classes_unfold(run: Path) -> None:
    """With hundreds of classes the first rows are shown and no matrix, which nobody could read."""
    classes = CLASSES + [f"class {number}" for number in range(300)]
    change(run / "run.json", classes=classes)
    manifest = json.loads((run / "model" / "finealign.json").read_text(encoding="utf-8"))
    more = manifest["descriptions"] | {name: ["x"] for name in classes[3:]}
    change(run / "model" / "finealign.json", descriptions=more)
    page = render(run)
    assert "263 more classes" in Reader(page).text
    assert "Confusion matrices" not in page


def test_report__a_method_that_learns_nothing_has_no_verdict_and_no_curves(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    config = tiny_config(tiny_backbone("convolutional"), method__name="cupl")
    adapt_into(tmp_path / "run", FineAlign(CLASSES, config=config), str(photos))
    found = Reader((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "Nothing was learned" in found.text
    assert "Training, as seen" not in found.text
    assert "Scored as a whole, without crops." in found.text
    assert "No image has another label than before." in found.text
    assert "svg" not in found.tags


# --- what predictions say ---------------------------------------------------------------------------------------------


def test_read_predictions__counts_are_those_of_the_rows(finished: Path) -> None:
    found, listed = read_predictions(finished / "predictions.csv"), rows(finished)
    assert found.images == len(listed) == 24
    assert found.now == Counter(row["label"] for row in listed)
    assert found.before == Counter(row["start_label"] for row in listed)
    assert sum(pair.images for pair in found.pairs) == 24
    for pair in found.pairs:
        own = [row for row in listed if {row["label"], row["label_2"]} == {pair.first, pair.second}]
        leads = [float(row["confidence"]) - float(row["confidence_2"]) for row in own]
        assert pair.images == len(own)
        assert pair.lead == pytest.approx(sum(leads) / len(own))
    assert [pair.images for pair in found.pairs] == sorted((pair.images for pair in found.pairs), reverse=True)


# --- the images worth a look ------------------------------------------------------------------------------------------


def made_up(count: int, seed: int = 0) -> list[Prediction]:
    generator = np.random.default_rng(seed)
    draws = generator.dirichlet(np.ones(4), size=(count, 2)).astype(np.float32)
    return [Prediction(Path(f"{n}.png"), now, now, before, before) for n, (now, before) in enumerate(draws)]


@pytest.mark.parametrize("count", [0, 1, 5, 12, 13, 200])
def test_watch__keeps_what_sorting_everything_would(count: int) -> None:
    predictions, watch = made_up(count), Watch()
    assert list(watch.over(predictions)) == predictions
    changed = [one for one in predictions if one.probabilities.argmax() != start(one).argmax()]
    changed.sort(key=lambda one: -float(np.abs(one.probabilities - start(one)).sum()))
    unsure = sorted(predictions, key=lambda one: float(np.diff(np.sort(one.probabilities)[-2:])[0]))
    assert watch.chosen["changed"] == [one.path for one in changed[:EACH]]
    assert watch.chosen["unsure"] == [one.path for one in unsure[:EACH]]


def start(prediction: Prediction) -> Any:
    assert prediction.start_probabilities is not None
    return prediction.start_probabilities


def test_watch__of_equals_the_first_stay() -> None:
    even, other = np.array([0.5, 0.5], dtype=np.float32), np.array([0.4, 0.6], dtype=np.float32)
    predictions = [Prediction(Path(f"{n:03d}"), even, even, other, other) for n in range(50)]
    watch = Watch()
    assert len(list(watch.over(predictions))) == 50
    assert [str(path) for path in watch.chosen["unsure"]] == [f"{n:03d}" for n in range(EACH)]


def test_write_examples__what_is_listed_is_what_the_model_says(finished: Path, tmp_path: Path) -> None:
    model = FineAlign.load(finished, device="cpu", precision="fp32")
    photos = list_images(finished.parent / "photos")
    gone = tmp_path / "gone.png"
    write_examples(model, {"changed": [photos[0], gone], "unsure": [photos[0]]}, tmp_path / "examples")
    listed = json.loads((tmp_path / "examples" / "examples.json").read_text(encoding="utf-8"))
    assert [len(listed[kind]) for kind in ("changed", "unsure")] == [1, 1]
    assert listed["changed"] == listed["unsure"]  # one picture for both
    (one,) = listed["changed"]
    explained = model.explain(photos[0])
    assert [crop["box"] for crop in one["crops"]] == [list(box) for box in explained.boxes]
    np.testing.assert_allclose([crop["weight"] for crop in one["crops"]], explained.weights, atol=1e-6)
    (before,) = predictions(model, [photos[0]], with_start=True)
    assert one["start"]["label"] == model.texts_.classes[start(before).argmax()]
    assert one["confidence"] == pytest.approx(explained.probabilities.max(), abs=1e-6)
    assert max(read_image(tmp_path / "examples" / one["picture"]).size) <= SIDE
    assert [path.name for path in sorted((tmp_path / "examples").glob("*.jpg"))] == ["00.jpg"]


def test_report__a_carriage_return_in_a_name_stays_in_its_row(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    odd = 'a\rb",\n\x1b[31m.png'
    (photos / "red" / "0.png").rename(photos / odd)
    (photos / f"torn{odd}").write_bytes(b"torn")
    summary = adapt_into(tmp_path / "run", FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"))), photos)
    assert summary.report == tmp_path / "run" / "report.html"
    with (tmp_path / "run" / "predictions.csv").open(encoding="utf-8", newline="") as opened:
        listed = list(csv.DictReader(opened))
    assert len(listed) == 24 and str(photos / odd) in {row["path"] for row in listed}
    assert {row["label"] for row in listed} <= set(CLASSES)
    with (tmp_path / "run" / "set_aside.csv").open(encoding="utf-8", newline="") as opened:
        assert [row["path"] for row in csv.DictReader(opened)] == [str(photos / f"torn{odd}")]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in page and "torna\\rb" in page


def test_adapt_into__a_report_that_fails_fails_no_run(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> Path:
        raise OutputError("no room")

    monkeypatch.setattr("finealign.run.adapt.write_report", fail)
    summary = adapt_into(tmp_path / "run", FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"))), photos)
    assert (summary.report, summary.report_problem) == (None, "no room")
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "complete"


def test_adapt_into__what_labels_told_of_another_model_does_not_stay(
    run: Path, finished: Path, tiny_backbone: Tiny
) -> None:
    (run / "evaluation.json").write_text("{}", encoding="utf-8")
    (run / "examples" / "99.jpg").write_bytes(b"of another run")
    adapt_into(
        run,
        FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"))),
        str(finished.parent / "photos"),
        resume=True,
    )
    assert not (run / "evaluation.json").exists()
    assert not (run / "examples" / "99.jpg").exists()


def test_report__of_a_run_whose_start_was_kept_says_so(run: Path) -> None:
    change(run / "run.json", kept="start", why_kept="the verdict is that adaptation hurt")
    text = Reader(render(run)).text
    assert "In use is the model before adaptation" in text
    assert "as the verdict is that adaptation hurt. Both are saved" in text
    assert "--use adapted takes the other one" in text
    assert "All predictions below are the start's" in text
    assert "--resume --keep-adapted" in text


def test_report__a_torn_last_line_of_the_metrics_is_left_out(run: Path) -> None:
    before = render(run)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as opened:
        opened.write('{"epoch": 9, "lo')
    assert render(run) == before


def test_report__a_score_without_labels_is_refused(run: Path) -> None:
    assert "--labelled" in command("report", run, "--score", "las").stderr


# --- charts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [1, 2, 60])
def test_charts__are_svg_in_the_page_s_colours(points: int) -> None:
    x = list(range(1, points + 1))
    drawn = by_epoch([Curve("a", x, [1 / n for n in x])], name="a", percent=True)
    assert Reader(drawn).tags["svg"] == 1
    assert "var(--after)" in drawn and "#0" not in re.sub(r"url\(#\w+\)|href=\"#\w+\"", "", drawn)
    assert 'width="' not in drawn.partition(">")[0]


def test_charts__a_user_s_own_style_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    before = by_epoch([Curve("a", [1, 2], [0.1, 0.2])], name="a")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    assert by_epoch([Curve("a", [1, 2], [0.1, 0.2])], name="a") == before


def test_charts__parts_of_two_charts_bear_different_names() -> None:
    one = by_epoch([Curve("a", [1, 2], [0.1, 0.2])], name="one")
    other = calibration([Curve("a", [0.1, 0.2], [0.1, 0.2], start=True)], name="other")
    assert set(Reader(one).ids).isdisjoint(Reader(other).ids)
    assert {*Reader(one).ids} >= {anchor[1:] for anchor in Reader(one).anchors}


# --- the model card ---------------------------------------------------------------------------------------------------


def card(run: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (run / "model" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_card__is_what_the_hub_reads(finished: Path) -> None:
    from huggingface_hub import ModelCard

    path = finished / "model" / "README.md"
    front, text = card(finished)
    assert ModelCard.load(path).data.to_dict() == front
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert front["library_name"] == "open_clip"
    assert {"finealign", "clip", "fine-grained", "unsupervised-adaptation"} <= set(front["tags"])
    assert "base_model" not in front  # of a local folder there is none on the hub
    said = json.loads((finished / "run.json").read_text(encoding="utf-8"))["verdict"]
    assert f"{said['call']}. {said['advice']}" in text
    assert "red, green, blue." in text
    assert "none with a label" in text
    assert not re.search(r"\{[{%]|\n\n\n", text)


def test_card__of_a_method_without_shares_tells_of_none(tiny_backbone: Tiny, tmp_path: Path) -> None:
    """Not even if the run has them, as that of another method in whose place its start is exported."""
    shares = {"kind": "given", "shares": [0.6, 0.3, 0.1], "taught": True}
    for method, told in (("fair", True), ("cupl", False)):
        config = tiny_config(tiny_backbone("transformer"), method__name=method)
        model = FineAlign(CLASSES, config=config).unlearned()
        model.save(tmp_path / method / "model", run={"images": 3, "class_prior": shares, "verdict": None})
        assert ("60" in card(tmp_path / method)[1]) == told, method


def test_card__of_a_model_saved_by_hand_claims_no_verdict(finished: Path, tmp_path: Path) -> None:
    model = FineAlign.load(finished, device="cpu")
    model.save(tmp_path / "model")
    assert "Verdict" not in card(tmp_path)[1]
    made = {"origin": {"repository": "org/name", "revision": "abc"}, "images": 3, "verdict": None, "kept": "start"}
    model.revert().save(tmp_path / "model", run=made)
    front, text = card(tmp_path)
    assert front["base_model"] == "org/name"
    assert "revision `abc`" in text and "**In use**: the model before adaptation." in text


def test_card__another_readme_stays(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# mine\n", encoding="utf-8")
    model = FineAlign.load(finished, device="cpu")
    model.save(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# mine\n"


@pytest.mark.parametrize(
    ("method", "settings", "learned"),
    [
        ("fair", {}, "normalisation layers and a vector for each class"),
        (
            "fair",
            {"training__learn": "norms", "training__anchor_steps": 0},
            "scale and shift of the image tower's normalisation layers.",
        ),
        ("fair", {"training__encoder": "frozen"}, "**What learned**: a vector for each class."),
        ("stata", {}, "a vector for each class, from all images at once"),
        ("transclip", {}, "a vector for each class, from all images at once"),
        ("wca", {}, "nothing: images are scored"),
    ],
)
def test_card__says_what_learned(tiny_backbone: Tiny, tmp_path: Path, method: str, settings: Any, learned: str) -> None:
    config = tiny_config(tiny_backbone("transformer"), method__name=method, **settings)
    FineAlign(CLASSES, config=config).unlearned().save(tmp_path / "model")
    assert learned in card(tmp_path)[1]


def test_card__names_are_shown_as_they_are(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    names = ["*bold*", "<b>", "[a](b)"]
    model = FineAlign(names, config=tiny_config(tiny_backbone("transformer"))).unlearned()
    model.save(tmp_path / "model")
    assert r"\*bold\*, \<b\>, \[a\]\(b\)." in card(tmp_path)[1]
