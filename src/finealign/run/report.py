"""``report.html``: a report of a run in one file, made from the run folder alone and shown without any network."""

import base64
import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finealign.config import without_folder
from finealign.errors import ModelError, OutputError, display_path, printable
from finealign.model.known_labels import labels_in_words
from finealign.model.refusal import LIKELY
from finealign.model.shares import shares_in_words
from finealign.model.trust import trust_in_words
from finealign.run.charts import Curve, by_epoch, calibration
from finealign.run.contract import (
    CONFIG,
    EVALUATION,
    EXAMPLES,
    EXAMPLES_LIST,
    METRICS,
    MODEL,
    PREDICTIONS,
    REPORT,
    RUN,
    SET_ASIDE,
)
from finealign.run.folder import read_metrics
from finealign.run.review import read_review
from finealign.runtime.atomic import save_text
from finealign.runtime.render import base_style, fill

if TYPE_CHECKING:
    from markupsafe import Markup

MANIFEST = f"{MODEL}/finealign.json"
CLASSES_SHOWN = 40  # rows shown at first; the others are folded
CONFUSION_SHOWN = 30  # most classes for which a confusion matrix is drawn; larger ones are not readable
PAIRS_SHOWN = 12
RENEW = "Copy it again, or renew it with `finealign adapt ... --resume`."
ASIDE_SHOWN = 200


@dataclass(frozen=True)
class Pair:
    """Two classes that are often the two most probable ones of an image."""

    first: str
    second: str
    images: int
    lead: float  # mean difference of the two probabilities, in [0, 1]


@dataclass(frozen=True)
class Predicted:
    """Counts of images over a whole ``predictions.csv``."""

    images: int
    changed: int  # images whose label differs from the start's
    now: Mapping[str, int]  # images by class, as the model in use labels them
    before: Mapping[str, int]  # images by class, as the start labels them
    pairs: tuple[Pair, ...]  # the most frequent first


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, replacing an earlier one, and return its path.

    Raises ModelError when the folder holds no run or one that is not complete, and OutputError when the report cannot
    be written.
    """
    path = folder / REPORT
    save_text(render(folder), path)
    return path


def save_evaluation(found: Mapping[str, object], folder: Path) -> None:
    """Save an evaluation in the run folder, where the report takes it from; an earlier one is replaced.

    ``found`` is what ``evaluate_predictions`` returns, with its details. Raises OutputError, also where the folder
    holds no run.
    """
    if not (folder / RUN).is_file():
        raise OutputError(f"{folder} holds no run, so there is nowhere to keep its evaluation.")
    save_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", folder / EVALUATION)


def render(folder: Path, *, measured: bool = True) -> str:
    """The report of a run folder as HTML. ``measured``: include the saved evaluation, where there is one.

    Raises ModelError when the folder holds no run or one that is not complete.
    """
    from jinja2 import UndefinedError

    run = _read_json(folder / RUN)
    if run.get("status") != "complete":
        raise ModelError(
            f"The run in {folder} is {run.get('status', 'of no known status')!r}, and only a complete one has a "
            "report. Go on with `finealign adapt ... --resume`."
        )
    try:
        manifest = _read_json(folder / MANIFEST)
        evaluation = None
        if measured and (folder / EVALUATION).is_file():
            evaluation = _with_start(_read_json(folder / EVALUATION))
        epochs = read_metrics(folder / METRICS)
        predicted = read_predictions(folder / PREDICTIONS)
        classes: list[str] = run["classes"]
        values = {
            "css": base_style() + (files("finealign.run") / "pages" / "report.css").read_text(encoding="utf-8"),
            "run": run,
            "classes": classes,
            "shares": shares_in_words(run["class_prior"], classes) if run.get("class_prior") else "",
            "learned_from": labels_in_words(run["labels"], len(classes)) if run.get("labels") else "",
            "trust": trust_in_words(run["crop_trust"]) if run.get("crop_trust") else "",
            "epochs": epochs,
            "charts": _charts(epochs, classes),
            "predicted": predicted,
            "balance": _balance(predicted, classes),
            "examples": _examples(folder / EXAMPLES),
            "likely": LIKELY,
            "texts": manifest["descriptions"],
            "templates": manifest["templates"],
            "aside": list(_rows(folder / SET_ASIDE)),
            "settings": _read(folder / CONFIG),
            "evaluation": evaluation,
            "review": _reviewed(folder) if measured else None,
            "measured": None if evaluation is None else _measured(evaluation, classes),
            "shown": {"classes": CLASSES_SHOWN, "aside": ASIDE_SHOWN},
            "name": display_path(folder.resolve().name),
            "backbone": without_folder(run["backbone"]),
        }
        filters: dict[str, Callable[..., Any]] = {
            "share": _share,
            "points": _points,
            "code": _code,
            "printable": printable,
        }
        return fill("finealign.run", "report.html.j2", values, filters)
    except (AttributeError, LookupError, ArithmeticError, TypeError, ValueError, csv.Error, UndefinedError) as error:
        raise ModelError(
            f"The run in {folder} is not whole, or of an earlier version ({type(error).__name__}: {error}). Copy it "
            "again, or renew it with `finealign adapt ... --resume`."
        ) from error


def read_predictions(path: Path) -> Predicted:
    """Count the labels and pairs of classes in a run's ``predictions.csv``.

    Raises ModelError when the file cannot be read, KeyError or ValueError when it is not a file of predictions.
    """
    now: Counter[str] = Counter()
    before: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    leads: defaultdict[tuple[str, str], float] = defaultdict(float)
    changed = 0
    for row in _rows(path):
        now[row["label"]] += 1
        before[row["start_label"]] += 1
        changed += row["label"] != row["start_label"]
        first, second = sorted((row["label"], row["label_2"]))
        together[first, second] += 1
        leads[first, second] += float(row["confidence"]) - float(row["confidence_2"])
    pairs = [
        Pair(first=first, second=second, images=images, lead=leads[first, second] / images)
        for (first, second), images in together.most_common(PAIRS_SHOWN)
    ]
    return Predicted(images=now.total(), changed=changed, now=now, before=before, pairs=tuple(pairs))


def _charts(epochs: Sequence[dict[str, Any]], classes: Sequence[str]) -> list[dict[str, str]]:
    """Charts of what is known during training without labels: title, explanation, SVG and summary of each."""
    if not epochs:
        return []
    even = 1 / len(classes)
    kinds: list[tuple[str, str, Sequence[dict[str, Any]], Callable[[dict[str, Any]], float], bool]] = [
        ("Loss", "What training lowers: cross-entropy and fairness.", epochs, lambda record: record["loss"], False),
        (
            "Pseudo-labels that changed",
            "Share of images whose label differs from the epoch before. It should fall.",
            # The first epoch has no earlier labels to compare with, nor have blocks of it.
            [record for record in epochs[1:] if record["changed"] < 1],
            lambda record: record["changed"],
            True,
        ),
        (
            "Mean weight",
            "How far labels are trusted: low where classes compete.",
            epochs,
            lambda record: record["mean_weight"],
            True,
        ),
        (
            "Largest class",
            f"Share of images given the most frequent class. Even would be {even:.1%}.",
            epochs,
            lambda record: max(record["class_share"]),
            True,
        ),
        (
            "Distance from the start",
            "How far the encoder had moved images, as a multiple of how far it saw their crops from them. Beyond "
            "training.drift_limit it is held back.",
            [record for record in epochs if record.get("drift") is not None],
            lambda record: record["drift"],
            False,
        ),
    ]
    charts = []
    for title, about, records, value, percent in kinds:
        if not records:
            continue
        x, y = [record["epoch"] for record in records], [value(record) for record in records]
        text = f"{_figure(y[-1], percent)} after epoch {x[-1]}"
        if len(y) > 1:
            text = f"From {_figure(y[0], percent)} after epoch {x[0]} to {_figure(y[-1], percent)} after {x[-1]}"
        svg = by_epoch([Curve(title, x, y)], name=title, percent=percent)
        charts.append({"title": title, "about": about, "svg": svg, "text": f"{text}."})
    return charts


def _figure(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.3g}"


def _balance(predicted: Predicted, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row per class, the most frequent first, with the widths of its bars in percent of the longest."""
    longest = max([1, *predicted.now.values(), *predicted.before.values()])
    rows = []
    for name in classes:
        now, before = predicted.now.get(name, 0), predicted.before.get(name, 0)
        widths = {"now_width": 100 * now / longest, "before_width": 100 * before / longest}
        rows.append({"name": name, "now": now, "before": before, **widths})
    return sorted(rows, key=lambda row: (-row["now"], -row["before"]))


def _examples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The example images by kind: the picture as a data URL, boxes in percent, weights as shares of the largest."""
    kinds: dict[str, list[dict[str, Any]]] = _read_json(folder / EXAMPLES_LIST)
    for example in (example for examples in kinds.values() for example in examples):
        picture = folder / Path(example["picture"]).name
        try:
            encoded = base64.b64encode(picture.read_bytes()).decode("ascii")
        except OSError as error:
            raise ModelError(f"{picture} cannot be read: {error}. Copy the run folder again.") from error
        example["url"] = f"data:image/jpeg;base64,{encoded}"
        largest = max((crop["weight"] for crop in example["crops"]), default=1) or 1
        for crop in example["crops"]:
            left, top, right, bottom = crop["box"]
            crop["style"] = (
                f"--share: {crop['weight'] / largest:.3f}; "
                f"left: {100 * left / example['width']:.2f}%; top: {100 * top / example['height']:.2f}%; "
                f"width: {100 * (right - left) / example['width']:.2f}%; "
                f"height: {100 * (bottom - top) / example['height']:.2f}%"
            )
    return kinds


def _with_start(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The evaluation with the start's figures under "start", also where it has release 0.1's name, "zero_shot"."""
    parts = [evaluation, evaluation["confusion"], evaluation["calibration"], *evaluation["per_class"].values()]
    for part in parts:
        if "start" not in part:
            part["start"] = part["zero_shot"]
    return evaluation


def _measured(evaluation: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """An evaluation arranged for the page: a row per class, the largest gain first, calibration chart, confusions."""
    rows = [
        {"name": name, **row, "gain": None if row["adapted"] is None else row["adapted"] - row["start"]}
        for name, row in evaluation["per_class"].items()
    ]
    rows.sort(key=lambda row: (row["gain"] is None, -(row["gain"] or 0)))
    curves = [
        Curve(
            name,
            [bin_["confidence"] for bin_ in evaluation["calibration"][name]],
            [bin_["accuracy"] for bin_ in evaluation["calibration"][name]],
            start=name == "start",
        )
        for name in ("start", "adapted")
    ]
    matrices = {}
    if len(classes) <= CONFUSION_SHOWN:
        matrices = {name: _matrix(cells, len(classes)) for name, cells in evaluation["confusion"].items()}
    return {"per_class": rows, "calibration": calibration(curves, name="calibration"), "matrices": matrices}


def _reviewed(folder: Path) -> dict[str, Any] | None:
    """What a review of the run measured so far; None where none was begun."""
    begun = read_review(folder)
    return None if begun is None else {**begun.figures().as_json(), "aim": begun.plan.aim}


def _matrix(cells: Sequence[Sequence[int]], classes: int) -> list[list[dict[str, float]]]:
    """The confusion matrix, one row per true class; each cell has its images and their share of the row.

    ``cells`` are [true class, predicted class, images] for the cells that are not zero.
    """
    counts = [[0] * classes for _ in range(classes)]
    for truth, predicted, images in cells:
        counts[truth][predicted] = images
    return [[{"images": count, "share": count / max(1, sum(row))} for count in row] for row in counts]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as table:
            yield from csv.DictReader(table)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the run folder again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the run folder again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds {type(values).__name__}, not an object. Copy the run folder again.")
    return values


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path.name == RUN:
            problem = f"No run in {path.parent}: {RUN} is not there. Wanted: a folder of `finealign adapt`."
        else:
            problem = f"{path} is missing: the run is not whole, or of an earlier version. {RENEW}"
        raise ModelError(problem) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the run folder again.") from error


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _code(text: str) -> "Markup":
    """The text escaped for HTML, with everything between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
